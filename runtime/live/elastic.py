"""Elastic experts of a live model: a warm pool that every rank keeps alike, and what it costs.

The `WarmPool` is the simulator's: replicas that a layer gives up stay in memory for a keep-alive, a wanted
one that is there needs no transfer, and the last copy of an expert never goes. Here it stands for real
memory: what it releases is freed. It is driven at batches that all ranks count alike, by a clock that they
share (forward passes, or the first rank's seconds, which travel with the token counts), so all pools are the
same without talking.

A replica that is not there is a *cold start*: it comes over the quickest link (`schedule.Router`) from
another rank, or from a home copy in host memory.

Costs are metered by `CostMeter`: the bytes are those in memory, the seconds are measured on this rank.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray, integers
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.control import stacked
from moeless_opt.runtime.live.dispatch import SlotDispatcher, Stopwatch
from moeless_opt.runtime.live.experts import SlotBank
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.pool import CostMeter, KeepAlive, WarmPool

__all__ = ["CLOCKS", "Elastic", "ElasticReport", "become_elastic"]

#: What a keep-alive is counted in: forward passes, or seconds of the first rank's clock.
CLOCKS = ("passes", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticReport:
    """What an elastic model did since it became one.

    Parameters
    ----------
    cold_starts, from_home, reuses, released : int
        Replicas loaded; of these from home copies; replicas that were wanted again and still warm; replicas
        let go. The same on all ranks.
    cold_bytes : int
        Bytes of the replicas loaded.
    cold_seconds : float
        Seconds for which loads to this rank were under way, one after the other.
    warm_L : array of float, shape [L]
        Replicas in memory now, kept-alive ones included.
    keep_alive_L : array of float, shape [L]
        Keep-alive now, in units of the clock.
    byte_seconds : float
        Bytes of all ranks' replicas times seconds, as this rank reckons.
    """

    cold_starts: int
    from_home: int
    reuses: int
    released: int
    cold_bytes: int
    cold_seconds: float
    warm_L: FloatArray
    keep_alive_L: FloatArray
    byte_seconds: float


class _Pass(NamedTuple):
    """A forward pass to be charged: its time, its layers', what was held and used, bytes of the KV cache."""

    watch: Stopwatch
    layers: list[Stopwatch]
    held_L: FloatArray
    used_L: torch.Tensor
    kv_bytes: float


class Elastic:
    """Warm pool and costs of one live model, on one rank; made by `LiveModel.elastic`.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The placement in force.
    experts : int
        Experts of a layer.
    capacity_LG : array of int, shape [L, G]
        Replicas of a layer that a rank keeps, warm ones included; what serves or is on its way always stays.
    bytes_L : array of int, shape [L]
        Bytes of one replica.
    keep_alive : KeepAlive or float
        How long a replica stays that no longer serves, in units of `clock`. What learns does so for each
        layer by itself.
    clock : {"passes", "seconds"}
        See ``CLOCKS``.
    other_bytes : float
        Bytes of everything but the experts, over all ranks.
    dispatchers : sequence of SlotDispatcher
        Where times and uses are read.
    kv_bytes : callable, optional
        Bytes of the KV cache of all ranks now.
    """

    def __init__(
        self,
        slots_LGC: SlotArray,
        experts: int,
        *,
        capacity_LG: IntArray,
        bytes_L: IntArray,
        keep_alive: KeepAlive | float,
        clock: str,
        other_bytes: float = 0.0,
        dispatchers: Sequence[SlotDispatcher] = (),
        kv_bytes: Callable[[], float] | None = None,
    ) -> None:
        if clock not in CLOCKS:
            raise ProblemError("clock", f"is {clock!r}, must be one of {', '.join(CLOCKS)}")
        self.clock = clock
        # A pool per layer: what happens to one layer costs nothing for the others.
        bytes_L = np.asarray(bytes_L)
        self.pools = [
            WarmPool(
                slots_LGC[layer : layer + 1],
                experts,
                capacity_LG=np.asarray(capacity_LG)[layer : layer + 1],
                bytes_L=bytes_L[layer : layer + 1],
                keep_alive=keep_alive if isinstance(keep_alive, int | float) else copy.deepcopy(keep_alive),
            )
            for layer in range(len(slots_LGC))
        ]
        for pool in self.pools:
            pool.pinned = pool.keys
        self._bytes_L = bytes_L
        self._held_L = np.array([pool.held_L[0] for pool in self.pools])
        self._meter = CostMeter(bytes_L, other_bytes, elastic=True)
        self.byte_seconds = 0.0
        self.cold_seconds = 0.0
        self.cold_bytes = 0
        self.from_home = 0
        self._dispatchers = dispatchers
        self._kv_bytes = kv_bytes
        self._start: tuple[float, float] | None = None
        self._units = 0.0
        self._charged = time.perf_counter()
        self._on_gpu = bool(dispatchers) and dispatchers[0].group.device.type == "cuda"
        self._pass: Stopwatch | None = None
        self._passes: deque[_Pass] = deque()

    @property
    def meter(self) -> CostMeter:
        """GB*s under each charging rule, of all passes so far; waits for the last of them on a GPU."""
        self._meter_passes(wait=True)
        return self._meter

    @property
    def now(self) -> float:
        """The shared clock, from 0 at the start."""
        return self._units

    @property
    def bytes(self) -> float:
        """Bytes of all ranks' replicas in memory."""
        return float(self._held_L @ self._bytes_L)

    @property
    def cold_starts(self) -> int:
        """Replicas that had to be loaded, over all ranks."""
        return sum(pool.cold_starts for pool in self.pools)

    @property
    def reuses(self) -> int:
        """Replicas that were wanted again and still warm."""
        return sum(pool.reuses for pool in self.pools)

    @property
    def warm_LGE(self) -> BoolArray:
        """What is in memory, or on its way."""
        return np.stack([self.warm_GE(layer) for layer in range(len(self.pools))])

    def report(self) -> ElasticReport:
        """What happened so far."""
        self._charge()
        return ElasticReport(
            cold_starts=self.cold_starts,
            from_home=self.from_home,
            reuses=self.reuses,
            released=sum(pool.released for pool in self.pools),
            cold_bytes=self.cold_bytes,
            cold_seconds=self.cold_seconds,
            warm_L=self._held_L.copy(),
            keep_alive_L=np.concatenate([pool.keep_alive.seconds_L(1) for pool in self.pools]),
            byte_seconds=self.byte_seconds,
        )

    # -- told by the lanes, on all ranks alike -----------------------------------------------------

    def at(self, passes: int, seconds: float) -> None:
        """Where the shared clock stands."""
        if self._start is None:
            self._start = (passes, seconds)
        by_passes = self.clock == "passes"
        self._units = passes - self._start[0] if by_passes else max(seconds - self._start[1], self._units)

    def wanted(self, layer: int, wanted_GE: BoolArray) -> None:
        """A layer will use these replicas."""
        self._charge()
        self.pools[layer].take(np.flatnonzero(wanted_GE), self.now)
        self._count(layer)

    def loaded(self, loaded_bytes: int, seconds: float, from_home: int) -> None:
        """Transfers are over: bytes and seconds of all of them, and how many came from home copies."""
        self.cold_bytes += loaded_bytes
        self.cold_seconds += seconds
        self.from_home += from_home

    def pin(self, layer: int, copies_GE: BoolArray) -> None:
        """These replicas of a layer serve, or will soon: they stay whatever the clock says."""
        self.pools[layer].pinned = np.flatnonzero(copies_GE)

    def left(self, layer: int, copies_GE: BoolArray) -> BoolArray:
        """These replicas serve no longer; returns those that stay warm."""
        self._charge()
        pool = self.pools[layer]
        pool.touch(np.flatnonzero(copies_GE), self.now)
        pool.fit()
        self._count(layer)
        return np.asarray(copies_GE & self.warm_GE(layer))

    def expire(self, layer: int) -> None:
        """Let the time of a layer's pool reach the shared clock."""
        self._charge()
        self.pools[layer].advance(self.now)
        self._count(layer)

    def warm_GE(self, layer: int) -> BoolArray:
        """Replicas of a layer that the pool has not let go."""
        pool = self.pools[layer]
        warm: BoolArray = np.zeros(pool.gpus * pool.experts, dtype=np.bool_)
        warm[pool.keys] = True
        return warm.reshape(pool.gpus, pool.experts)

    def lost(self, layer: int, copies_GE: BoolArray) -> None:
        """These replicas never arrived."""
        self._charge()
        self.pools[layer].drop(np.flatnonzero(copies_GE))
        self._count(layer)

    def follow(self, serving_LGE: BoolArray) -> None:
        """A whole plan has changed the placement."""
        self._charge()
        for layer, pool in enumerate(self.pools):
            pool.follow(np.flatnonzero(serving_LGE[layer]), self.now)
            pool.pinned = pool.keys
            self._count(layer)

    def _count(self, layer: int) -> None:
        self._held_L[layer] = len(self.pools[layer].keys)

    # -- costs, by this rank's clock ---------------------------------------------------------------

    def begin_pass(self, *_: Any) -> None:
        """A forward pass begins; a hook."""
        self._charge()
        self._meter_passes()
        self._pass = Stopwatch()
        self._pass.start(self._on_gpu)
        for dispatcher in self._dispatchers:
            dispatcher.layer_watch.take_spans()

    def end_pass(self, *_: Any) -> None:
        """It has ended: on the host. Its times are read when they are known."""
        if self._pass is None:
            return
        self._charge()
        used_L = torch.cat([d.used_slots() for d in self._dispatchers])
        if used_L.is_cuda:
            here = torch.empty(used_L.shape, dtype=used_L.dtype, pin_memory=True)
            used_L = here.copy_(used_L, non_blocking=True)
        watches = [d.layer_watch.take_spans() for d in self._dispatchers]
        self._pass.stop(self._on_gpu)
        kv = self._kv_bytes() if self._kv_bytes is not None else 0.0
        self._passes.append(_Pass(self._pass, watches, self._held_L.copy(), used_L, kv))
        self._pass = None
        self._meter_passes()

    def _meter_passes(self, *, wait: bool = False) -> None:
        """Charge passes that are over, in their order."""
        while self._passes and self._passes[0].watch.over(wait=wait):
            one = self._passes.popleft()
            self._meter.add_passes(
                one.held_L,
                one.used_L.numpy()[None].astype(np.float64),
                np.array([[watch.take() for watch in one.layers]]),
                np.array([one.watch.take()]),
                np.array([one.kv_bytes]),
                np.ones(1),
            )

    def _charge(self) -> None:
        """Charge wall time for what was held until now."""
        now = time.perf_counter()
        seconds, self._charged = now - self._charged, now
        held = self.bytes * seconds
        self.byte_seconds += held
        kv = self._kv_bytes() * seconds if self._kv_bytes is not None else 0.0
        self._meter.add_wall(held, seconds, kv)


def become_elastic(
    group: ExpertGroup,
    dispatchers: Sequence[SlotDispatcher],
    banks: Sequence[SlotBank],
    *,
    keep_alive: KeepAlive | float,
    clock: str,
    slots: int | Sequence[int] | None,
    other_bytes: int,
    kv_bytes: Callable[[], float] | None,
) -> Elastic:
    """The warm pool of a live model, on all ranks together; see `LiveModel.elastic`.

    Raises
    ------
    ProblemError
        If ranks ask for different ones.
    """
    experts, layers = dispatchers[0].experts, len(banks)
    kept = integers("slots", np.atleast_1d(np.asarray(experts if slots is None else slots)), low=1)
    if kept.shape not in ((1,), (group.size,)):
        raise ProblemError("slots", f"has shape {kept.shape}, must be one number or {group.size}")
    kept_G = np.broadcast_to(kept, (group.size,))
    keeps = float(keep_alive) if isinstance(keep_alive, int | float) else vars(keep_alive)
    asked = zlib.crc32(repr((clock, kept_G.tolist(), keeps)).encode())
    rows = group.gather_ints([asked, other_bytes])
    if any(row[0] != asked for row in rows):
        raise ProblemError("elastic", "was called with different arguments on different ranks")
    return Elastic(
        stacked(d.table.slots() for d in dispatchers),
        experts,
        capacity_LG=np.broadcast_to(kept_G.astype(np.int64), (layers, group.size)),
        bytes_L=np.array([bank.expert_bytes for bank in banks], dtype=np.int64),
        keep_alive=keep_alive,
        clock=clock,
        other_bytes=float(sum(row[1] for row in rows)),
        dispatchers=dispatchers,
        kv_bytes=kv_bytes,
    )
