"""One rank: its requests, its part of every forward pass, and its part of the steering.

A step is the same on all ranks: one small exchange of whole numbers tells whether anybody has work and which
orders (new settings, plans, the end) all have received; then, if anybody has work, all compute one forward
pass, a rank without requests with one row that is no token. Orders are carried out in the order in which
they were given, at the same step everywhere. Where a rank is lost, the others repeat the step without it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.errors import MoelessError, UnsupportedFeatureError
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live import Guard, LiveModel
from moeless_opt.runtime.serve import Planning, ServeRequest
from moeless_opt.runtime.serve.engine.blocks import BlockPool
from moeless_opt.runtime.serve.engine.channel import Channel, ChannelClosedError
from moeless_opt.runtime.serve.engine.models import device_of, home_of, load_served
from moeless_opt.runtime.serve.engine.options import EngineOptions
from moeless_opt.runtime.serve.engine.paged import KvPool, PagedModel
from moeless_opt.runtime.serve.engine.sampling import ChosenToken, choose_tokens
from moeless_opt.runtime.serve.engine.scheduler import Scheduler, Sequenced, Turn
from moeless_opt.runtime.serve.engine.steering import Steering

__all__ = ["Worker"]

#: Seconds that a rank without work waits for messages between two steps.
IDLE_WAIT = 0.05
#: Seconds that survivors wait for each other after the loss of a rank.
GRACE = 2.0
#: Seconds between two reports to the front.
REPORT = 0.25


class Worker:
    """The engine of one rank.

    Parameters
    ----------
    options : EngineOptions
        The same on all ranks.
    channel : Channel
        To the front.
    context_length : int
        Longest request.
    ends : frozenset of int
        Tokens that end a text.
    """

    def __init__(
        self, options: EngineOptions, channel: Channel, context_length: int, ends: frozenset[int]
    ) -> None:
        self.options, self.channel, self.ends = options, channel, ends
        device = device_of(options)
        model = load_served(options, device, context_length)
        pool = KvPool(
            kv_blocks(options, context_length), options.block_tokens, next(model.parameters()).dtype, device
        )
        self.paged = PagedModel(model, pool, context_length)
        blocks = BlockPool(pool.blocks, pool.block_tokens, remember=options.prefix_cache)
        self.scheduler = Scheduler(
            blocks,
            budget=options.token_budget,
            most_running=options.max_running,
            context_length=context_length,
        )
        self.live = self._attach(model)
        self.guard = Guard(self.live, grace=min(options.timeout, GRACE))
        # The first pass makes the pool's tensors; compiled parts load now and not under the first request.
        self._forward(None)
        self.live.observe()
        self.steering = Steering(self.live, options.planning, self._kv_bytes)
        self.sequences: dict[str, Sequenced] = {}
        self.orders: deque[tuple[str, Any]] = deque()
        self.received = self.carried_out = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self._stopping = False
        self._recovered = 0
        self._reported = 0.0
        self._told_events = 0
        self._idle_since = time.monotonic()

    def _attach(self, model: Any) -> LiveModel:
        import torch.distributed as dist

        ranks = dist.get_world_size() if dist.is_initialized() else 1
        home = home_of(self.options, model, ranks)
        wanted = self.options.experts
        if wanted != "auto":
            return attach(model, home=home, experts=wanted, timeout=self.options.timeout)
        try:
            return attach(model, home=home, experts="grouped", timeout=self.options.timeout)
        except UnsupportedFeatureError:  # experts with biases, float64
            return attach(model, home=home, experts="loop", timeout=self.options.timeout)

    def _kv_bytes(self) -> float:
        return float(self.scheduler.pool.used * self.paged.pool.block_bytes)

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to end, or until the front is gone."""
        self.channel.send(("ready", self.facts()))
        try:
            while not self._stopping:
                self.step()
        except ChannelClosedError:
            return
        finally:
            self.steering.close()

    def facts(self) -> dict[str, Any]:
        """What the front has to know of this rank."""
        return {
            "kv_blocks": self.scheduler.pool.blocks,
            "longest": self.scheduler.context_length,
            "layers": tuple(self.live.layers),
            "experts": self.live.experts,
            "expert_bytes": [bank.expert_bytes for bank in self.live.banks],
        }

    def step(self) -> None:
        """One step; on all ranks together."""
        busy = self.scheduler.busy
        self._receive(0.0 if busy else IDLE_WAIT)
        turn = self.scheduler.next()
        logits, busy_ranks = self.guard.run(lambda: self._together(turn))
        self._after_losses()
        if turn is not None:
            assert logits is not None
            self._finish(turn, logits)
        if busy_ranks:
            self._idle_since = time.monotonic()
        if turn is None or time.monotonic() - self._reported > REPORT:
            self._report()

    def _together(self, turn: Turn | None) -> tuple[Tensor | None, int]:
        """What all ranks do at the same time: exchange, orders, and a pass if anybody has work."""
        self._after_losses()
        steering, live = self.steering, self.live
        asks_sleep = self._wants_sleep()
        mine = [int(turn is not None), self.received, int(steering.failed), int(asks_sleep)]
        rows = live.group.gather_ints(mine)
        busy = sum(row[0] for row in rows)
        if any(row[2] for row in rows):
            steering.halt()
        self._carry_out(min(row[1] for row in rows))
        if not busy:
            if all(row[3] for row in rows):
                steering.sleep()
            if steering.moving:
                steering.tick()
            return None, 0
        if steering.asleep:
            steering.wake()
        began = time.perf_counter()
        logits = self._forward(turn)
        steering.after_pass(time.perf_counter() - began)
        return logits, busy

    def _wants_sleep(self) -> bool:
        after = self.steering.planning.idle_after
        return after is not None and not self.steering.asleep and time.monotonic() - self._idle_since > after

    def _forward(self, turn: Turn | None) -> Tensor | None:
        if turn is not None:
            return self.paged.forward(turn.rows)
        with self.live.real_tokens(
            torch.zeros(1, dtype=torch.bool, device=self.paged.pool.device), skip=True
        ):
            self.paged.forward(self.paged.idle_rows())
        return None

    def _after_losses(self) -> None:
        """Where ranks were lost since the last look, steer for those that are left."""
        if len(self.guard.recoveries) > self._recovered:
            new = self.guard.recoveries[self._recovered :]
            self._recovered = len(self.guard.recoveries)
            self.steering.regrouped(sum(len(r.lost) for r in new))

    # -- messages ----------------------------------------------------------------------------------

    def _receive(self, wait: float) -> None:
        for message in self.channel.take(wait):
            kind, content = message
            if kind == "submit":
                self._take(*content)
            elif kind == "cancel":
                self._cancel(content)
            elif kind == "order":
                self.orders.append(content)
                self.received += 1

    def _take(self, request: ServeRequest, given: int) -> None:
        self.sequences[request.id] = self.scheduler.add(request, given)

    def _cancel(self, name: str) -> None:
        one = self.sequences.pop(name, None)
        if one is not None:
            self.scheduler.end(one)
            self.channel.send(("tokens", [(name, None, "cancelled", 0)]))

    def _carry_out(self, upto: int) -> None:
        """Orders that all ranks have."""
        while self.carried_out < upto:
            kind, content = self.orders.popleft()
            self.carried_out += 1
            if kind == "stop":
                self._stopping = True
            elif kind == "planning":
                planning: Planning = content
                self.steering.apply_settings(planning)
            elif kind == "apply":
                why, plan = content
                try:
                    self.steering.applied(plan, why)
                    if why == "restored":
                        self.live.settle(self.options.timeout)
                except MoelessError as error:  # the same on all ranks
                    self.steering.tell("refused", detail=str(error))

    # -- tokens ------------------------------------------------------------------------------------

    def _finish(self, turn: Turn, logits: Tensor) -> None:
        self.scheduler.done(turn)
        self.prompt_tokens += sum(count for one, count in turn.runs if one.computed <= one.given)
        wanted = turn.wanted
        if not wanted:
            return
        rules = [one.request.sampling for one in wanted]
        chosen = choose_tokens(logits, rules, [len(one.tokens) - one.given for one in wanted])
        said = [self._say(one, pick) for one, pick in zip(wanted, chosen, strict=True)]
        self.channel.send(("tokens", said))

    def _say(self, one: Sequenced, pick: ChosenToken) -> tuple[str, ChosenToken, str | None, int]:
        one.tokens.append(pick.token)
        self.generated_tokens += 1
        first = len(one.tokens) == len(one.request.prompt) + 1
        if first:
            self.cached_tokens += one.cached
        finish = None
        if pick.token in self.ends and not one.request.sampling.ignore_end:
            finish = "stop"
        elif len(one.tokens) >= one.most:
            finish = "length"
        if finish is not None:
            self.scheduler.end(one)
            self.sequences.pop(one.id, None)
        return one.id, pick, finish, one.cached if first else 0

    # -- reports -----------------------------------------------------------------------------------

    def _report(self) -> None:
        self._reported = time.monotonic()
        pool = self.scheduler.pool
        mine: dict[str, Any] = {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "used": pool.used,
            "kept": pool.kept,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
        }
        if self.live.group.rank == 0:
            mine["group"] = self._group_report()
        self.channel.send(("report", mine))

    def _group_report(self) -> dict[str, Any]:
        steering, live = self.steering, self.live
        fresh = [event for event in steering.events if event.number > self._told_events]
        self._told_events = steering.numbered
        slots_LGC = live.slots_LGC
        replicas_LE = np.stack(
            [np.bincount(slots_GC[slots_GC >= 0], minlength=live.experts) for slots_GC in slots_LGC]
        )
        return {
            "ranks": live.group.size,
            "members": live.group.ranks,
            "passes": steering.passes,
            "slots_LGC": slots_LGC,
            "target_LGC": live.target_LGC,
            "replicas_LE": replicas_LE,
            "load_LE": steering.load_LE,
            "tokens_LG": steering.tokens_LG,
            "imbalance_L": steering.imbalance_L,
            "plans": steering.plans,
            "bytes_moved": steering.bytes_moved,
            "plan_seconds": steering.plan_seconds,
            "wait_seconds": steering.wait_seconds,
            "cold_starts": steering.cold_starts,
            "cost": steering.cost(),
            "prediction_error": steering.prediction_error,
            "recoveries": len(self.guard.recoveries),
            "planning": steering.planning,
            "asleep": steering.asleep,
            "events": fresh,
        }


def kv_blocks(options: EngineOptions, context_length: int) -> int:
    """Blocks of a rank's pool."""
    if options.kv_blocks is not None:
        return options.kv_blocks
    whole = -(-context_length // options.block_tokens)
    return max(whole, options.max_running * -(-whole // 4))
