"""One rank: its requests, its part of every forward pass, and its part of the steering.

A step is the same on all ranks: one small exchange of whole numbers tells whether anybody has work and which
orders (new settings, plans, the end) all have received; then, if anybody has work, all compute one forward
pass, a rank without requests with one row that is no token. Orders are carried out in the order in which
they were given, at the same step everywhere. Where a rank is lost, the others repeat the step without it;
a process that takes its place comes in between two steps, and takes over what the others know.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.errors import MoelessError, UnsupportedFeatureError
from moeless_opt.runtime.engines import CudaRecorder
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live import ExpertGroup, Guard, LiveModel, RankLostError
from moeless_opt.runtime.serve import PlanEvent, ServeRequest
from moeless_opt.runtime.serve.engine.blocks import BlockPool
from moeless_opt.runtime.serve.engine.channel import Channel, ChannelClosedError
from moeless_opt.runtime.serve.engine.models import device_of, home_of, load_served
from moeless_opt.runtime.serve.engine.options import EngineOptions
from moeless_opt.runtime.serve.engine.paged import KvPool, PagedModel
from moeless_opt.runtime.serve.engine.sampling import ChosenToken, choose_tokens
from moeless_opt.runtime.serve.engine.scheduler import Scheduler, Sequenced, Turn
from moeless_opt.runtime.serve.engine.steering import Steering

__all__ = ["Seat", "Worker"]

#: Seconds that a rank without work waits for messages between two steps.
IDLE_WAIT = 0.05
#: Seconds that survivors wait for each other after the loss of a rank.
GRACE = 2.0
#: Seconds between two reports to the front.
REPORT = 0.25
#: Seconds that an operation among ranks may take which are all alive.
SLOWEST = 120.0
#: Answers to orders that are remembered.
ANSWERS = 16


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
    seat : Seat, optional
        The place of a rank that was lost, which this one takes.
    """

    def __init__(
        self,
        options: EngineOptions,
        channel: Channel,
        context_length: int,
        ends: frozenset[int],
        seat: Seat | None = None,
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
        self.live = self._attach(model, seat)
        self.guard = Guard(self.live, grace=min(options.timeout, GRACE))  # a new rank is in behind this
        self._new = seat is not None
        if seat is None:
            # The first pass makes the pool's tensors; compiled parts load now, not under the first request.
            self._forward(None)
            self.live.observe()
        if options.graphs and device.type == "cuda":
            self.paged.record(CudaRecorder(device))
        self.steering = Steering(self.live, options.planning, self._kv_bytes, new=self._new)
        self.sequences: dict[str, Sequenced] = {}
        #: Orders that are not carried out yet, with their numbers; the newest number that has come.
        self.orders: deque[tuple[int, str, Any]] = deque()
        self.received = self.carried_out = 0
        self.answers: deque[tuple[int, PlanEvent]] = deque(maxlen=ANSWERS)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self._stopping = False
        self._recovered = 0
        self._reported = 0.0
        self._told_events = 0
        self._idle_since = time.monotonic()

    def _attach(self, model: Any, seat: Seat | None) -> LiveModel:
        import torch.distributed as dist

        ranks = dist.get_world_size() if dist.is_initialized() else 1
        # Who hangs is known by its heart; who lives may take its time.
        how: dict[str, Any] = {
            "home": home_of(self.options, model, ranks),
            "timeout": max(SLOWEST, self.options.timeout),
            "dead_after": self.options.timeout,
        }
        if seat is not None:
            how |= {"join": seat.rank, "store": seat.store}
        wanted = self.options.experts
        if wanted != "auto":
            return attach(model, experts=wanted, **how)
        try:
            return attach(model, experts="grouped", **how)
        except UnsupportedFeatureError:  # experts with biases, float64
            return attach(model, experts="loop", **how)

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
        heart = live.group.heart
        knocks = 0 if heart is None else heart.knocks
        mine = [
            turn is not None,
            self.received,
            steering.failed,
            asks_sleep,
            knocks,
            live.knocks,
            steering.moving,
        ]
        rows = live.group.gather_ints(mine)
        busy = sum(row[0] for row in rows)
        if any(row[2] for row in rows):
            steering.halt()
        self._carry_out(min(row[1] for row in rows))
        if not busy:
            if all(row[3] for row in rows):
                steering.sleep()
            knocked = min(row[4] for row in rows) > min(row[5] for row in rows)
            # A plan may be under way for one rank alone, where planning has failed on the others.
            if any(row[6] for row in rows) or knocked:  # whoever knocks is heard in a round
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
        """Where ranks have left or come back since the last look, go on with those that there are."""
        count = len(self.guard.recoveries)
        if count == self._recovered:
            return
        fresh = self.guard.recoveries[self._recovered :]
        lost = sorted({rank for one in fresh for rank in one.lost})
        joined = sorted({rank for one in fresh for rank in one.joined})
        steering, group = self.steering, self.live.group
        rows = group.gather_ints([self._new, self.carried_out, bool(lost), steering.numbered])
        # Of those that were there before, who got furthest tells the others.
        giver = max(range(group.size), key=lambda g: (not rows[g][0], rows[g][1], -g))
        told = {
            "books": steering.books() | {"numbered": max(row[3] for row in rows)},
            "answers": [(number, asdict(event)) for number, event in self.answers],
            "detail": _changed(lost, joined, group.size),
        }
        heard = json.loads(_told_by(group, giver, json.dumps(told, default=int)))
        while self.orders and self.orders[0][0] <= rows[giver][1]:
            self.orders.popleft()
        self.carried_out = rows[giver][1]
        self.received = max(self.received, self.carried_out)
        self.answers = deque(((n, PlanEvent(**event)) for n, event in heard["answers"]), maxlen=ANSWERS)
        steering.regrouped(
            heard["books"],
            heard["detail"],
            lost=bool(rows[giver][2]),
            new=any(row[0] for row in rows),
        )
        self._new, self._recovered = False, count

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
                self.received = content[0]
            elif kind == "enter":  # what the others have carried out already
                self.received = self.carried_out = content

    def _take(self, request: ServeRequest, given: int) -> None:
        self.sequences[request.id] = self.scheduler.add(request, given)

    def _cancel(self, name: str) -> None:
        one = self.sequences.pop(name, None)
        if one is not None:
            self.scheduler.end(one)
            self.channel.send(("tokens", [(name, None, "cancelled", 0)]))

    def _carry_out(self, upto: int) -> None:
        """Orders that all ranks have."""
        while self.orders and self.orders[0][0] <= upto:
            number, kind, content = self.orders[0]
            event = None
            if kind == "stop":
                self._stopping = True
            elif kind == "planning":
                event = self.steering.apply_settings(content)
            elif kind == "apply":
                event = self._apply(*content)
            if event is not None:
                self.answers.append((number, event))
            # Only now: where a rank is lost in the midst, those who are not done do it again.
            self.orders.popleft()
            self.carried_out = number

    def _apply(self, why: str, plan: Any) -> PlanEvent:
        try:
            number = self.steering.applied(plan, why)
            if why == "restored":
                self.live.settle()
        except RankLostError:
            raise
        except MoelessError as error:  # the same on all ranks
            return self.steering.tell("refused", detail=str(error))
        return self.steering.event_of(number)

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
            "largest_rows": steering.largest_rows,
            "mean_rows": steering.mean_rows,
            "plans": steering.plans,
            "bytes_moved": steering.bytes_moved,
            "plan_seconds": steering.plan_seconds,
            "wait_seconds": steering.wait_seconds,
            "cold_starts": steering.cold_starts,
            "cost": steering.cost(),
            "prediction_error": steering.prediction_error,
            "recoveries": steering.recoveries,
            "carried_out": self.carried_out,
            "answers": list(self.answers),
            "planning": steering.planning,
            "asleep": steering.asleep,
            "events": fresh,
        }


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of a rank that was lost.

    Parameters
    ----------
    rank : int
        Global.
    store : torch.distributed.Store
        In which all ranks have met.
    """

    rank: int
    store: Any


def _changed(lost: list[int], joined: list[int], ranks: int) -> str:
    """What has happened to the ranks, for people."""

    def some(which: list[int], what: str) -> list[str]:
        names = ", ".join(map(str, which))
        return [f"rank{'s' * (len(which) > 1)} {names} {what}"] if which else []

    left = f"{ranks} {'is' if ranks == 1 else 'are'} there"
    return "; ".join([*some(lost, "left"), *some(joined, "came in"), left])


def _told_by(group: ExpertGroup, giver: int, text: str) -> str:
    """A text of one rank, on all of them; a collective."""
    mine = text.encode() if group.rank == giver else b""
    size = group.gather_ints([len(mine)])[giver][0]
    return bytes(group.gather_ints(list(mine.ljust(size, b" ")))[giver]).decode()


def kv_blocks(options: EngineOptions, context_length: int) -> int:
    """Blocks of a rank's pool."""
    if options.kv_blocks is not None:
        return options.kv_blocks
    whole = -(-context_length // options.block_tokens)
    return max(whole, options.max_running * -(-whole // 4))
