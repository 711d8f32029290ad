"""Continuous batching in a closed loop: the next pass starts when the last one ends.

The traffic of `traffic` is composed once, for all policies alike, and says nothing of requests: a policy
that is too slow falls behind, no more. Here requests queue. Before every pass those that have arrived are
admitted, in their order, as far as three limits go:

- `most_requests` in a batch;
- `most_tokens` of prompts and answers in a pass (a longer prompt is the only one of its pass);
- the KV cache: what the GPUs' memory leaves beside the weights and the replicas that the policy holds at that
  moment, those on their way included. The cache spreads evenly over the GPUs, so the fullest one limits
  (assumed); a request reserves room for its prompt and all of its answer when it is admitted, and is never
  preempted (assumed). What requests have reserved is no room for replicas.

The pass reads the prompts of the requests admitted and writes a token of every other live one; it takes what
the policy makes it take. So a quicker policy has shorter queues, and one that holds fewer replicas may run
larger batches; passes differ from policy to policy, and only requests can be compared: time to the first
token, time per further token, and time from arrival to the last one.

A request's routing is its own, not the pass's, and the same under every policy: drawn or recorded (`routes`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, number, whole
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.io import Arrivals
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.routes import DrawnRoutes, PlayedRoutes, Routes
from moeless_opt.runtime.simulate.traffic import Passes, RoutingModel

__all__ = ["ClosedLoop", "Served"]


_NEVER = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How requests fared.

    Parameters
    ----------
    first_R : array, shape [R]
        Seconds from arrival to the first token; not a number where it has not come.
    each_R : array, shape [R]
        Seconds per further token of the answers that ended and have any.
    whole_R : array, shape [R]
        Seconds from arrival to the last token of the answers that ended.
    queued_R : array, shape [R]
        Seconds from arrival to the start of the pass that read the prompt.
    passes, largest : int
        Passes run, and requests in the largest batch.
    batch : float
        Live requests, mean over the passes.
    held_back : int
        Passes before which the KV cache was the reason that a request had to wait.
    """

    first_R: FloatArray
    each_R: FloatArray
    whole_R: FloatArray
    queued_R: FloatArray
    passes: int
    largest: int
    batch: float
    held_back: int

    def figures(self) -> dict[str, float]:
        """Mean and 99th percentile of each time, in seconds, and what else is known."""
        row: dict[str, float] = {}
        for name in ("first", "each", "whole", "queued"):
            known = getattr(self, f"{name}_R")
            known = known[np.isfinite(known)]
            row[f"{name}_mean_s"] = float(known.mean()) if known.size else _NEVER
            row[f"{name}_p99_s"] = float(np.quantile(known, 0.99)) if known.size else _NEVER
        return row | {
            "ended": int(np.isfinite(self.whole_R).sum()),
            "passes": self.passes,
            "batch": self.batch,
            "largest_batch": self.largest,
            "held_back": self.held_back,
        }


class ClosedLoop:
    """Passes for `simulator.simulate`, made one at a time from what the backend's clock says.

    Parameters
    ----------
    backend : SimulatedBackend
        What serves; asked for its time and for what it holds before every pass.
    model : RoutingModel or PlayedRoutes
        Where tokens go.
    arrivals : Arrivals
        Requests and their lengths.
    memory : float, optional
        Bytes of a GPU that weights and the KV cache may fill; no limit by default.
    most_tokens, most_requests : int
        Of a pass.
    until : float, optional
        No pass starts after this time; by default all requests are served to the end.
    seed : int
        For the routing.
    """

    def __init__(
        self,
        backend: SimulatedBackend,
        model: RoutingModel | PlayedRoutes,
        arrivals: Arrivals,
        *,
        memory: float | None = None,
        most_tokens: int = 8192,
        most_requests: int = 256,
        until: float | None = None,
        seed: int = 0,
    ) -> None:
        self.backend, self.arrivals = backend, arrivals
        self.memory = None if memory is None else number("memory", memory, open_low=True)
        self.most_tokens = whole("most_tokens", most_tokens, low=1)
        self.most_requests = whole("most_requests", most_requests, low=1)
        self.until = np.inf if until is None else number("until", until, open_low=True)
        requests = arrivals.requests
        self.routes: Routes = (
            model if isinstance(model, PlayedRoutes) else DrawnRoutes(model, requests, whole("seed", seed))
        )
        expected = (len(backend.bytes_L), backend.experts)
        if self.routes.shape != expected:
            raise ProblemError(
                "routing", f"is for [layers, experts] = {self.routes.shape}, the backend has {expected}"
            )
        self._first_R = np.full(requests, _NEVER)
        self._end_R = np.full(requests, _NEVER)
        self._start_R = np.full(requests, _NEVER)
        self._passes = self._largest = self._held_back = 0
        self._batches = 0

    def cache_tokens(self) -> float:
        """Tokens whose keys and values the GPUs have room for beside what is held now."""
        if self.memory is None:
            return np.inf
        machine = self.backend.machine
        gpus = machine.topology.gpus
        held = float(self.backend.memory().held_G.max())
        free = self.memory - machine.other_bytes / gpus - held
        if free <= 0:
            raise InfeasibleError(
                f"memory: {self.memory:.4g} bytes a GPU do not hold the weights, which take "
                f"{self.memory - free:.4g} on the fullest GPU"
            )
        return gpus * free / (machine.kv_token_bytes)

    def __iter__(self) -> Iterator[Passes]:
        """Make passes until everything is served (or `until` is reached)."""
        arrivals, backend = self.arrivals, self.backend
        waiting: deque[int] = deque()
        live: IntArray = np.zeros(0, dtype=np.int64)
        written: IntArray = np.zeros(0, dtype=np.int64)
        come = 0
        while come < arrivals.requests or waiting or live.size:
            now = backend.now
            if not waiting and not live.size:
                now = max(now, float(arrivals.time_R[come]))
            if now > self.until:
                return
            reached = int(np.searchsorted(arrivals.time_R, now, side="right"))
            waiting.extend(range(come, reached))
            come = reached
            new = self._admit(waiting, live)
            self.routes.enter(new)
            live = np.concatenate([live, new])
            written = np.concatenate([written, np.zeros(len(new), dtype=np.int64)])
            reads_R = written == 0
            token_R = np.where(reads_R, np.maximum(arrivals.prompt_R[live], 1), 1)
            self._start_R[new] = now
            self._passes += 1
            self._batches += len(live)
            self._largest = max(self._largest, len(live))
            self._leave_room(live)
            yield Passes(
                start_B=np.array([now]),
                weight_B=np.ones(1),
                tokens_B=np.array([float(token_R.sum())]),
                kv_tokens_B=np.array([float((arrivals.prompt_R[live] + written).sum())]),
                prefill_B=reads_R.any(keepdims=True),
                load_BLE=self.routes.load_LE(token_R, written)[None],
            )
            # The pass has run: everybody in it has got a token.
            self._first_R[live[reads_R]] = backend.now
            written = written + 1
            over = written >= arrivals.output_R[live]
            self._end_R[live[over]] = backend.now
            self.routes.stay(~over)
            live, written = live[~over], written[~over]

    def _leave_room(self, live: IntArray) -> None:
        """Tell the backend what the requests' reservations leave of the memory for its experts."""
        if self.memory is None:
            return
        machine, gpus = self.backend.machine, self.backend.machine.topology.gpus
        reserved = float((self.arrivals.prompt_R[live] + self.arrivals.output_R[live]).sum())
        cache = reserved * machine.kv_token_bytes / gpus
        self.backend.room = self.memory - machine.other_bytes / gpus - cache

    def _admit(self, waiting: deque[int], live: IntArray) -> IntArray:
        """Take requests off the queue as far as the limits go; one at least where nothing runs."""
        prompt_R, output_R = self.arrivals.prompt_R, self.arrivals.output_R
        room = self.cache_tokens() - float((prompt_R[live] + output_R[live]).sum())
        tokens, new = len(live), list[int]()
        while waiting and len(live) + len(new) < self.most_requests:
            request = waiting[0]
            reads = max(int(prompt_R[request]), 1)
            needs = float(prompt_R[request] + output_R[request])
            if new and tokens + reads > self.most_tokens:
                break
            if needs > room:
                if not live.size and not new:
                    raise InfeasibleError(
                        f"memory: request {request} needs room for {needs:.0f} tokens in the KV cache, "
                        f"there is room for {room:.0f}"
                    )
                self._held_back += 1
                break
            new.append(waiting.popleft())
            tokens, room = tokens + reads, room - needs
        return np.array(new, dtype=np.int64)

    def served(self) -> Served:
        """How the requests have fared until now."""
        time_R, output_R = self.arrivals.time_R, self.arrivals.output_R
        further_R = np.where(output_R > 1, output_R - 1.0, _NEVER)
        return Served(
            first_R=self._first_R - time_R,
            each_R=(self._end_R - self._first_R) / further_R,
            whole_R=self._end_R - time_R,
            queued_R=self._start_R - time_R,
            passes=self._passes,
            largest=self._largest,
            batch=self._batches / max(self._passes, 1),
            held_back=self._held_back,
        )
