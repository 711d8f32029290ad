"""The warm pool of a simulation: the rules of `warm_pool.WarmPool`, kept as a list of replicas.

`WarmPool` marks replicas in a table of layers, GPUs and experts, which a live model with its few GPUs looks
up at leisure. On 2,048 GPUs x 256 experts x 58 layers that table has 30 million entries, one in a hundred of
them a replica. Here the replicas themselves are listed, in order, each with the time of its last use. A
replica is one number, its *key* (`moeless_opt.problems.spec.placement.replica_keys`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import replica_keys
from moeless_opt.runtime.pool.keep_alive import FixedKeepAlive, KeepAlive

__all__ = ["KeyUse", "ReplicaPool"]


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What a use of replicas met: keys that had to be loaded, and how many warm ones made room."""

    cold: IntArray
    evicted: int


class ReplicaPool:
    """The replicas in memory.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        What is warm at time 0.
    experts : int
        Experts per layer.
    capacity_LG : array of int, shape [L, G]
        Replicas that a GPU has room for, in use and kept alive together.
    bytes_L : array of int, shape [L]
        Bytes of one replica.
    keep_alive : KeepAlive or float
        Policy, or a fixed time in seconds.
    """

    def __init__(
        self,
        slots_LGC: SlotArray,
        experts: int,
        *,
        capacity_LG: IntArray,
        bytes_L: ArrayLike,
        keep_alive: KeepAlive | float = 10.0,
    ) -> None:
        self.layers, self.gpus = slots_LGC.shape[:2]
        self.experts = experts
        self.capacity = np.asarray(capacity_LG, dtype=np.int64).reshape(-1)
        self.bytes_L = np.asarray(bytes_L, dtype=np.float64)
        self.keep_alive: KeepAlive = (
            FixedKeepAlive(keep_alive) if isinstance(keep_alive, int | float) else keep_alive
        )
        self._known: tuple[SlotArray, IntArray] | None = None
        self._set(self._keys(slots_LGC).copy(), None)
        self.now = 0.0
        self.byte_seconds = 0.0
        self.cold_starts = self.reuses = self.released = 0
        self._check_room(self.keys)

    def _set(self, keys: IntArray, last: FloatArray | None) -> None:
        """Take over a list of replicas, and what follows from it."""
        self.keys = keys
        self.last: FloatArray = np.zeros(len(keys)) if last is None else last
        self._layer = keys // (self.gpus * self.experts)
        self.held_LG: IntArray = np.bincount(keys // self.experts, minlength=self.layers * self.gpus).reshape(
            self.layers, self.gpus
        )
        self.held_L: FloatArray = self.held_LG.sum(1).astype(np.float64)
        self.bytes = float(self.held_L @ self.bytes_L)

    def _keys(self, slots_LGC: SlotArray) -> IntArray:
        """`replica_keys`, remembered for the last array."""
        if self._known is None or self._known[0] is not slots_LGC:
            self._known = (slots_LGC, replica_keys(slots_LGC, self.experts))
        return self._known[1]

    def _find(self, wanted: IntArray) -> tuple[IntArray, BoolArray]:
        """Places of keys in the list, and whether they are there."""
        place = np.searchsorted(self.keys, wanted)
        inside = np.minimum(place, max(len(self.keys) - 1, 0))
        return place, np.asarray(self.keys[inside] == wanted) if len(self.keys) else wanted < 0

    def slots(self) -> SlotArray:
        """What is warm as slots, experts in ascending order, shape [L, G, C]."""
        cell = self.keys // self.experts
        count = self.held_LG.ravel()
        nth = np.arange(len(cell)) - (np.cumsum(count) - count)[cell]
        slots = np.full((self.layers * self.gpus, max(int(count.max()), 1)), -1, dtype=np.int32)
        slots[cell, nth] = self.keys % self.experts
        return slots.reshape(self.layers, self.gpus, -1)

    def advance(self, now: float) -> None:
        """Let time pass until `now`: charge what is held, release what has been idle for too long."""
        if now < self.now:
            raise ProblemError("now", f"is {now}, time has reached {self.now}")
        end = self.last + self.keep_alive.seconds_L(self.layers)[self._layer]
        gone = end < now
        self.byte_seconds += self.bytes * (now - self.now)
        if gone.any():
            gone &= ~self._last_copies()
        if gone.any():
            # A replica is charged to the moment of its release, not to the moment at which we notice.
            over = now - np.maximum(end[gone], self.now)
            self.byte_seconds -= float(over @ self.bytes_L[self._layer[gone]])
            self.released += int(gone.sum())
            self._set(self.keys[~gone], self.last[~gone])
        self.now = now

    def _last_copies(self) -> BoolArray:
        """Of every expert, the copy used last (on the lowest GPU among equals)."""
        kind = self._layer * self.experts + self.keys % self.experts
        order = np.lexsort((-self.keys, self.last, kind))  # the last of each kind is the one
        final = np.ones(len(order), dtype=np.bool_)
        final[:-1] = kind[order[1:]] != kind[order[:-1]]
        copies: BoolArray = np.zeros(len(order), dtype=np.bool_)
        copies[order[final]] = True
        return copies

    def use(self, slots_LGC: SlotArray, now: float, until: float | None = None) -> KeyUse:
        """Use replicas from `now` on, see `WarmPool.use`."""
        self.advance(now)
        wanted = self._keys(slots_LGC)
        self._check_room(wanted)
        place, warm = self._find(wanted)
        again = place[warm]
        idle = again[self.last[again] < now]
        self.keep_alive.idle(self._layer[idle], now - self.last[idle])
        end = now if until is None else max(now, until)
        self.last[again] = end
        cold = wanted[~warm]
        self._add(cold, place[~warm], end)
        self.cold_starts += len(cold)
        self.reuses += len(again)
        return KeyUse(cold, self._make_room(wanted) if len(cold) else 0)

    def prewarm(self, slots_LGC: SlotArray, now: float) -> KeyUse:
        """Load, ahead of their use, replicas that a prediction wants; see `WarmPool.prewarm`."""
        self.advance(now)
        wanted = self._keys(slots_LGC)
        self._check_room(wanted)
        place, warm = self._find(wanted)
        cold = wanted[~warm]
        self._add(cold, place[~warm], now)
        self.cold_starts += len(cold)
        return KeyUse(cold, self._make_room(wanted) if len(cold) else 0)

    def hold(self, slots_LGC: SlotArray, until: float) -> None:
        """Keep warm replicas until a time at least, used or not: what a serverful system does."""
        place, warm = self._find(self._keys(slots_LGC))
        held = place[warm]
        self.last[held] = np.maximum(self.last[held], until)

    def keep_only(self, slots_LGC: SlotArray) -> None:
        """Release all other replicas now: what a serverful system does when it has switched."""
        place, warm = self._find(self._keys(slots_LGC))
        kept = place[warm]
        self.released += len(self.keys) - len(kept)
        self._set(self.keys[kept], self.last[kept])

    def _add(self, cold: IntArray, place: IntArray, last: float) -> None:
        if len(cold):
            self._set(np.insert(self.keys, place, cold), np.insert(self.last, place, last))

    def _check_room(self, wanted: IntArray) -> None:
        count = np.bincount(wanted // self.experts, minlength=len(self.capacity))
        over = np.flatnonzero(count > self.capacity)
        if over.size:
            layer, gpu = divmod(int(over[0]), self.gpus)
            raise InfeasibleError(
                f"warm pool: {int(count[over[0]])} replicas are wanted on GPU {gpu} in layer {layer}, it has "
                f"room for {int(self.capacity[over[0]])}"
            )

    def _make_room(self, wanted: IntArray) -> int:
        """Release the longest idle replicas of GPUs that are over their room."""
        over = self.held_LG.reshape(-1) - self.capacity
        cell = self.keys // self.experts
        idle = over[cell] > 0
        idle[self._find(wanted)[0]] = False  # all of them are there
        where = np.flatnonzero(idle)
        if not where.size:
            return 0
        order = where[np.lexsort((where, self.last[where], cell[where]))]
        first = np.searchsorted(cell[order], cell[order])
        gone = order[np.arange(len(order)) - first < over[cell[order]]]
        keep = np.ones(len(self.keys), dtype=np.bool_)
        keep[gone] = False
        self.released += len(gone)
        self._set(self.keys[keep], self.last[keep])
        return len(gone)
