"""Experts as functions: which replicas are warm on which GPU, and for how long an unused one is kept.

A replica is *used* by a pass, then *kept alive* for a while, then released; the last replica of an expert is
never released (only extra ones scale to zero). A wanted replica that is not warm is a *cold start*: its
weights have to come from another GPU or from the host. How long to keep one is a policy (`keep_alive`).

The replicas are listed, in order, each with the time of its last use: on 2,048 GPUs x 256 experts x 58 layers
a table would have 30 million entries, one in a hundred of them a replica. A replica is one number, its *key*
(`moeless_opt.problems.spec.placement.replica_keys`); arrays of keys ascend.

A simulation says what is used (`use`, `prewarm`, `hold`, `keep_only`). A live model, whose replicas move at
moments of their own, says what it wants (`take`), what it gave up (`touch`), and what must not go (`pinned`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec import replica_keys
from moeless_opt.runtime.pool.keep_alive import FixedKeepAlive, KeepAlive

__all__ = ["Use", "WarmPool"]


@dataclass(frozen=True, slots=True)
class Use:
    """What a use of replicas met: keys that had to be loaded, and how many warm ones made room."""

    cold: IntArray
    evicted: int


class WarmPool:
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
        #: Keys of replicas that stay however long they idle: in a live model, those in force or on their way.
        self.pinned: IntArray | None = None
        #: Replicas that a GPU may hold of a layer beyond its room, on the way to where others still are.
        self.staging = 0
        #: Bytes in memory beside those of the list: of a migration that is under way.
        self.beside = 0.0
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

    def _at(self, keys: IntArray | None) -> IntArray:
        """Places in the list of those of the keys that are there."""
        if keys is None:
            return np.zeros(0, dtype=np.int64)
        place, warm = self._find(keys)
        return place[warm]

    def slots(self) -> SlotArray:
        """What is warm as slots, experts in ascending order, shape [L, G, C]."""
        cell = self.keys // self.experts
        count = self.held_LG.ravel()
        nth = np.arange(len(cell)) - (np.cumsum(count) - count)[cell]
        slots = np.full((self.layers * self.gpus, max(int(count.max()), 1)), -1, dtype=np.int32)
        slots[cell, nth] = self.keys % self.experts
        return slots.reshape(self.layers, self.gpus, -1)

    def advance(self, now: float, keep: IntArray | None = None) -> None:
        """Let time pass until `now`: charge what is held, release what has been idle for too long.

        Replicas with keys in `keep` are not released this time.
        """
        if now < self.now:
            raise ProblemError("now", f"is {now}, time has reached {self.now}")
        end = self.last + self.keep_alive.seconds_L(self.layers)[self._layer]
        gone = end < now
        self.byte_seconds += (self.bytes + self.beside) * (now - self.now)
        for kept in (self.pinned, keep) if gone.any() else ():
            gone[self._at(kept)] = False
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
        """Of every expert, the copy used last (on the lowest GPU among equals); pinned ones are in use."""
        kind = self._layer * self.experts + self.keys % self.experts
        last = self.last.copy()
        last[self._at(self.pinned)] = np.inf
        order = np.lexsort((-self.keys, last, kind))  # the last of each kind is the one
        final = np.ones(len(order), dtype=np.bool_)
        final[:-1] = kind[order[1:]] != kind[order[:-1]]
        copies: BoolArray = np.zeros(len(order), dtype=np.bool_)
        copies[order[final]] = True
        return copies

    def use(
        self, slots_LGC: SlotArray, now: float, until: float | None = None, *, there: bool = False
    ) -> Use:
        """Use replicas from `now` on; those that are not warm are loaded, idle ones make room if they must.

        Parameters
        ----------
        slots_LGC : array of int32, shape [L, G, C]
            What is used.
        now, until : float
            Start and end of the use (the start by default). Idle time counts from the end.
        there : bool
            Whether none of them is released now, however long it has been idle: all are known to be warm.

        Raises
        ------
        InfeasibleError
            If more is wanted on a GPU than it has room for.
        """
        wanted = self._keys(slots_LGC)
        self.advance(now, wanted if there else None)
        self._check_room(wanted)
        cold = self._take(wanted, now, now if until is None else max(now, until))
        return Use(cold, self._make_room(wanted) if len(cold) else 0)

    def take(self, wanted: IntArray, now: float) -> IntArray:
        """Want replicas, wherever they fit: what a live model does before it makes room (`fit`).

        Parameters
        ----------
        wanted : array of int64
            Keys; pinned ones count neither as cold nor as re-used.

        Returns
        -------
        array of int64
            What has to be loaded.
        """
        self.advance(now, wanted)
        return self._take(wanted, now, now)

    def _take(self, wanted: IntArray, now: float, until: float) -> IntArray:
        place, warm = self._find(wanted)
        there, again = place[warm], place[warm]
        if self.pinned is not None:
            again = np.setdiff1d(there, self._at(self.pinned), assume_unique=True)
        idle = again[self.last[again] < now]
        self.keep_alive.idle(self._layer[idle], now - self.last[idle])
        self.last[there] = until
        cold = wanted[~warm]
        self._add(cold, place[~warm], until)
        self.cold_starts += len(cold)
        self.reuses += len(again)
        return cold

    def fit(self) -> int:
        """Release the longest idle replicas of GPUs that are over their room, pinned ones excepted."""
        return self._make_room(np.zeros(0, dtype=np.int64) if self.pinned is None else self.pinned)

    def touch(self, used: IntArray, until: float) -> None:
        """Of these replicas those that are warm were used until then."""
        held = self._at(used)
        self.last[held] = np.maximum(self.last[held], until)

    def drop(self, gone: IntArray) -> None:
        """Forget replicas that are not there after all: a transfer has failed."""
        self._keep(np.setdiff1d(np.arange(len(self.keys)), self._at(gone), assume_unique=True))

    def follow(self, kept: IntArray, now: float) -> None:
        """Have exactly these replicas from now on: somebody else has moved them."""
        self.advance(now)
        self._take(kept, now, now)
        self._release_but(kept)

    def prewarm(self, slots_LGC: SlotArray, now: float) -> Use:
        """Load, ahead of their use, replicas that a prediction wants; a use at the same time finds them warm.

        Counts as cold starts what it loads, and nothing as re-used.
        """
        return self.load(self._keys(slots_LGC), now)

    def load(self, wanted: IntArray, now: float) -> Use:
        """`prewarm` by keys, ascending."""
        self.advance(now)
        self._check_room(wanted)
        place, warm = self._find(wanted)
        cold = wanted[~warm]
        self._add(cold, place[~warm], now)
        self.cold_starts += len(cold)
        return Use(cold, self._make_room(wanted) if len(cold) or self.staging else 0)

    def hold(self, slots_LGC: SlotArray, until: float) -> None:
        """Keep warm replicas until a time at least, used or not: what a serverful system does."""
        self.touch(self._keys(slots_LGC), until)

    def keep_only(self, slots_LGC: SlotArray) -> None:
        """Release all other replicas now: what a serverful system does when it has switched."""
        self._release_but(self._keys(slots_LGC))

    def _release_but(self, kept: IntArray) -> None:
        places = self._at(kept)
        self.released += len(self.keys) - len(places)
        self._keep(places)

    def _keep(self, places: IntArray) -> None:
        self._set(self.keys[places], self.last[places])

    def _add(self, cold: IntArray, place: IntArray, last: float) -> None:
        if len(cold):
            self._set(np.insert(self.keys, place, cold), np.insert(self.last, place, last))

    def _check_room(self, wanted: IntArray) -> None:
        count = np.bincount(wanted // self.experts, minlength=len(self.capacity))
        over = np.flatnonzero(count > self.capacity + self.staging)
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
        idle[self._at(wanted)] = False
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
