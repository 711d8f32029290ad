"""Elastic experts of a live model: a warm pool that every rank keeps alike, and what it costs.

The `WarmPool` is the simulator's: replicas that a layer gives up stay in memory for a keep-alive, a wanted
one that is there needs no transfer, and the last copy of an expert never goes. Here it stands for real
memory: what it releases is freed. It is driven at batches that all ranks count alike, by a clock that they
share (forward passes, or the first rank's seconds, which travel with the token counts), so all pools are the
same without talking.

A replica that is not there is a *cold start*: it comes over the quickest link (`placement.Router`) from
another rank, or from a home copy in host memory.

Costs are metered by `CostMeter`: the bytes are those in memory, the seconds are measured on this rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.cost import CostMeter
from moeless_opt.runtime.warm_pool import KeepAlive, WarmPool

if TYPE_CHECKING:
    from moeless_opt.runtime.dispatch import SlotDispatcher
    from moeless_opt.runtime.lanes import Ticket

__all__ = ["CLOCKS", "Elastic", "ElasticReport"]

#: What a keep-alive is counted in: forward passes, or seconds of the first rank's clock.
CLOCKS = ("passes", "seconds")
Copies = set[tuple[int, int, int]]


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
        How long a replica stays that no longer serves, in units of `clock`.
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
        self.pool = WarmPool(
            slots_LGC, experts, capacity_LG=capacity_LG, bytes_L=bytes_L, keep_alive=keep_alive
        )
        self.pool.pinned_LGE = self.pool.warm_LGE.copy()
        self.meter = CostMeter(bytes_L, other_bytes, elastic=True)
        self.byte_seconds = 0.0
        self.cold_seconds = 0.0
        self.cold_bytes = 0
        self.from_home = 0
        self._dispatchers = dispatchers
        self._kv_bytes = kv_bytes
        self._start: tuple[float, float] | None = None
        self._units = 0.0
        self._charged = time.perf_counter()
        self._began: float | None = None

    @property
    def now(self) -> float:
        """The shared clock, from 0 at the start."""
        return self._units

    def report(self) -> ElasticReport:
        """What happened so far."""
        self._charge()
        pool = self.pool
        return ElasticReport(
            cold_starts=pool.cold_starts,
            from_home=self.from_home,
            reuses=pool.reuses,
            released=pool.released,
            cold_bytes=self.cold_bytes,
            cold_seconds=self.cold_seconds,
            warm_L=pool.held_L,
            keep_alive_L=pool.keep_alive.seconds_L(len(pool.warm_LGE)),
            byte_seconds=self.byte_seconds,
        )

    # -- told by the lanes, on all ranks alike -----------------------------------------------------

    def at(self, passes: int, seconds: float) -> None:
        """Where the shared clock stands."""
        if self._start is None:
            self._start = (passes, seconds)
        by_passes = self.clock == "passes"
        self._units = passes - self._start[0] if by_passes else max(seconds - self._start[1], self._units)

    def wanted(self, layer: int, slots_GC: SlotArray) -> None:
        """A layer will use these replicas."""
        self._charge()
        pairs = {(layer, e, g) for g, row in enumerate(slots_GC.tolist()) for e in row if e >= 0}
        self.pool.take(self._mask(pairs), self.now)

    def loaded(self, ticket: Ticket) -> None:
        """A ticket's transfers are over."""
        self.cold_bytes += ticket.bytes
        self.cold_seconds += ticket.seconds
        self.from_home += ticket.from_home

    def pin(self, layer: int, copies: Copies) -> None:
        """These replicas of a layer serve, or will soon: they stay whatever the clock says."""
        assert self.pool.pinned_LGE is not None
        self.pool.pinned_LGE[layer] = self._mask(copies)[layer]

    def left(self, copies: Copies) -> Copies:
        """These replicas serve no longer; returns those that stay warm."""
        self._charge()
        self.pool.touch(self._mask(copies), self.now)
        self.pool.fit()
        return copies - self.released(copies)

    def expire(self) -> None:
        """Let the pool's time reach the shared clock."""
        self._charge()
        self.pool.advance(self.now)

    def released(self, copies: Copies) -> Copies:
        """Of these replicas those that the pool has let go."""
        warm_LGE = self.pool.warm_LGE
        return {(layer, e, g) for layer, e, g in copies if not warm_LGE[layer, g, e]}

    def lost(self, copies: Copies) -> None:
        """These replicas never arrived."""
        self._charge()
        self.pool.drop(self._mask(copies))

    def follow(self, slots_LGC: SlotArray) -> None:
        """A whole plan has changed the placement."""
        self._charge()
        self.pool.follow(slots_LGC, self.now)
        self.pool.pinned_LGE = self.pool.warm_LGE.copy()

    def _mask(self, copies: Copies) -> BoolArray:
        mask: BoolArray = np.zeros(self.pool.warm_LGE.shape, dtype=np.bool_)
        if copies:
            layer, expert, rank = np.array(sorted(copies)).T
            mask[layer, rank, expert] = True
        return mask

    # -- costs, by this rank's clock ---------------------------------------------------------------

    def begin_pass(self, *_: Any) -> None:
        """A forward pass begins; a hook."""
        self._charge()
        self._began = time.perf_counter()
        for dispatcher in self._dispatchers:
            dispatcher.layer_seconds = 0.0

    def end_pass(self, *_: Any) -> None:
        """It has ended."""
        if self._began is None:
            return
        self._charge()
        seconds = time.perf_counter() - self._began
        self._began = None
        used_L = [int((d.sends_RP.sum(axis=0) > 0).sum()) for d in self._dispatchers]
        layer_L = [d.layer_seconds for d in self._dispatchers]
        self.meter.add_passes(
            self.pool.held_L,
            np.array([used_L], dtype=np.float64),
            np.array([layer_L]),
            np.array([seconds]),
            np.array([self._kv_bytes() if self._kv_bytes is not None else 0.0]),
            np.ones(1),
        )

    def _charge(self) -> None:
        """Charge wall time for what was held until now."""
        now = time.perf_counter()
        seconds, self._charged = now - self._charged, now
        held = self.pool.bytes * seconds
        self.byte_seconds += held
        kv = self._kv_bytes() * seconds if self._kv_bytes is not None else 0.0
        self.meter.add_wall(held, seconds, kv)
