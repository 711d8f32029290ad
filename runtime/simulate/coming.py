"""Replicas on their way: who waits for whom at a GPU's port, and what serves until they are there.

A GPU receives one replica after the other, over all layers, in the order in which they were decided on. What
has not begun and is not wanted any more is given up. Of every expert a copy that is there stays until another
one has come, whatever else wants its slot. A GPU has room for `STAGED` replicas of a layer whose slots are
not free yet; what is more is put off. Where memory does not hold what all layers stage together, a transfer
begins when there is room for it: copies go as soon as others have come in their place, layer by layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.runtime.pool import WarmPool

__all__ = ["Coming", "Memory"]

STAGED = 2
"""Replicas of a layer on a GPU whose slots are not free yet (assumed)."""


def _none() -> IntArray:
    return np.zeros(0, dtype=np.int64)


def _never() -> FloatArray:
    return np.zeros(0)


@dataclass(slots=True, kw_only=True)
class Memory:
    """Room on GPUs while replicas come.

    Parameters
    ----------
    most : int
        Replicas of all layers that a GPU has room for.
    there_G : array of int, shape [G]
        Those in memory before any of the others has begun to come.
    leaving : array of int
        Keys of those that may go when another copy of their expert has come.
    now : float
        Transfers that began until then are under way, whatever room there is.
    peak_G : array of int, shape [G]
        The most that each GPU holds at any moment.
    gone, gone_at : arrays
        Keys, ascending, of those that do go, and when.
    """

    most: int
    there_G: IntArray
    leaving: IntArray
    now: float
    peak_G: IntArray = field(init=False)
    gone: IntArray = field(default_factory=_none)
    gone_at: FloatArray = field(default_factory=_never)

    def __post_init__(self) -> None:
        self.peak_G = self.there_G.copy()


@dataclass(slots=True)
class Coming:
    """The queues of all ports.

    Parameters
    ----------
    gpus, experts : int
        Of a layer; a replica is a key (`moeless_opt.problems.spec.replica_keys`).
    key, decided, seconds, begin, end : arrays, shape [N]
        Replicas on their way in the order in which they were decided on: when that was, how long the transfer
        takes alone, when it begins and when it ends.
    memory : Memory, optional
        Where there is not room for all of them at once.
    """

    gpus: int
    experts: int
    key: IntArray = field(default_factory=_none)
    decided: FloatArray = field(default_factory=_never)
    seconds: FloatArray = field(default_factory=_never)
    begin: FloatArray = field(default_factory=_never)
    end: FloatArray = field(default_factory=_never)
    memory: Memory | None = None

    def layer(self, key: IntArray) -> IntArray:
        """Layers of replicas."""
        return np.asarray(key // (self.gpus * self.experts))

    def _gpu(self, key: IntArray) -> IntArray:
        return np.asarray(key // self.experts % self.gpus)

    def kind(self, key: IntArray) -> IntArray:
        """Expert of a layer, as one number."""
        return np.asarray(self.layer(key) * self.experts + key % self.experts)

    def ask(self, key: IntArray, seconds: FloatArray, decided: FloatArray) -> None:
        """Line replicas up, in the order of the moments at which they were decided on."""
        order = np.argsort(decided, kind="stable")
        self.key = np.concatenate([self.key, key[order]])
        self.seconds = np.concatenate([self.seconds, seconds[order]])
        self.decided = np.concatenate([self.decided, decided[order]])
        self.begin, self.end = (
            np.concatenate([known, np.full(len(key), np.inf)]) for known in (self.begin, self.end)
        )
        self._schedule()

    def keep_within(self, memory: Memory) -> None:
        """Begin transfers only where there is room, from now on."""
        self.memory = memory
        self._schedule()

    def forget_limits(self, now: float) -> None:
        """Begin transfers as soon as ports are free, from now on; what has begun goes on."""
        soon = np.maximum(self.decided, np.nextafter(now, np.inf))
        self.decided = np.where(self.begin <= now, self.begin, soon)
        self.memory = None
        self._schedule()

    def _schedule(self) -> None:
        """When each transfer begins and ends."""
        if self.memory is not None:
            self._schedule_within(self.memory)
            return
        self.begin, self.end = np.zeros(len(self.key)), np.zeros(len(self.key))
        gpu_N = self._gpu(self.key)
        for gpu in np.unique(gpu_N):
            mine = np.flatnonzero(gpu_N == gpu)
            spent = np.cumsum(self.seconds[mine])
            before = spent - self.seconds[mine]
            start = np.maximum.accumulate(self.decided[mine] - before)
            self.begin[mine], self.end[mine] = start + before, start + spent

    def _schedule_within(self, memory: Memory) -> None:
        """... where each begins only when its GPU has room; what never has does not come."""
        gpu_N, kind_N = self._gpu(self.key).tolist(), self.kind(self.key).tolist()
        decided_N, seconds_N = self.decided.tolist(), self.seconds.tolist()
        leaves: dict[int, list[int]] = {}
        for kind, key in zip(self.kind(memory.leaving).tolist(), memory.leaving.tolist(), strict=True):
            leaves.setdefault(kind, []).append(key)
        begun = self.begin <= memory.now
        begin, end = np.where(begun, self.begin, np.inf), np.where(begun, self.end, np.inf)
        ready: list[list[tuple[float, int]]] = [[] for _ in range(self.gpus)]  # copies that may go, and when
        queues = [deque[int]() for _ in range(self.gpus)]
        held, free = memory.there_G.tolist(), [-np.inf] * self.gpus
        for n, gpu in enumerate(gpu_N):
            if begun[n]:
                held[gpu], free[gpu] = held[gpu] + 1, max(free[gpu], float(end[n]))
                self._replaced(leaves.pop(kind_N[n], ()), float(end[n]), ready)
            else:
                queues[gpu].append(n)
        peak, gone = list(held), dict[int, float]()
        while True:
            best, first = -1, np.inf
            for gpu, queue in enumerate(queues):
                full = held[gpu] >= memory.most
                if queue and (ready[gpu] or not full):
                    start = max(free[gpu], decided_N[queue[0]], ready[gpu][0][0] if full else -np.inf)
                    if start < first:
                        best, first = gpu, start
            if best < 0:
                break
            n = queues[best].popleft()
            if held[best] >= memory.most:
                gone[heappop(ready[best])[1]] = first
                held[best] -= 1
            held[best] += 1
            peak[best] = max(peak[best], held[best])
            begin[n], end[n] = first, first + seconds_N[n]
            free[best] = end[n]
            self._replaced(leaves.pop(kind_N[n], ()), float(end[n]), ready)
        self.begin, self.end = begin, end
        memory.peak_G, memory.gone = np.array(peak), np.array(sorted(gone), dtype=np.int64)
        memory.gone_at = np.array([gone[key] for key in sorted(gone)])

    def _replaced(self, copies: Iterable[int], when: float, ready: list[list[tuple[float, int]]]) -> None:
        """From then on these may go."""
        for key in copies:
            heappush(ready[key // self.experts % self.gpus], (when, key))

    def _take(self, keep: BoolArray) -> None:
        for name in ("key", "decided", "seconds", "begin", "end"):
            setattr(self, name, getattr(self, name)[keep])

    def settle(self, now: float) -> None:
        """Forget what has arrived."""
        if len(self.key) and self.end.min() <= now:
            late = self.end <= now
            # The port was busy until then: what comes after it cannot have begun sooner.
            gpu_N = self._gpu(self.key)
            for gpu in np.unique(gpu_N[late]):
                mine = (gpu_N == gpu) & ~late
                self.decided[mine] = np.maximum(self.decided[mine], self.end[late & (gpu_N == gpu)].max())
            self._take(~late)

    def give_up(self, wanted: IntArray, now: float) -> IntArray:
        """Give up what has not begun and is not wanted; returns the keys."""
        gone = (self.begin > now) & ~np.isin(self.key, wanted)
        keys = self.key[gone]
        if len(keys):
            self._take(~gone)
            self._schedule()
        return keys

    def forget(self, kept: IntArray) -> None:
        """Forget what made room for something else."""
        stays = np.isin(self.key, kept)
        if not stays.all():
            self._take(stays)
            self._schedule()

    def guarded(self, wanted: IntArray, pool: WarmPool, most: int) -> tuple[IntArray, IntArray]:
        """What is to be in memory if `wanted` is: copies that must stay are added, loads put off left out.

        Parameters
        ----------
        wanted : array of int
            Keys of the placement, ascending.
        pool : WarmPool
            What is in memory or on its way.
        most : int
            Replicas of all layers that a GPU has room for.

        Returns
        -------
        keys, kept : arrays of int
            All keys, ascending, and those that stay because no wanted copy of their expert is there yet.
        """
        there = pool.keys[~np.isin(pool.keys, self.key)]
        cold = wanted[~np.isin(wanted, there)]
        if not len(cold):
            return wanted, cold
        bare = np.setdiff1d(self.kind(cold), self.kind(np.intersect1d(wanted, there, assume_unique=True)))
        copies = there[np.isin(self.kind(there), bare)]
        last = pool.last[np.searchsorted(pool.keys, copies)]
        order = np.lexsort((copies, -last))  # of each expert the copy used last
        _, first = np.unique(self.kind(copies)[order], return_index=True)
        kept = np.sort(copies[order][first])
        keys = np.union1d(wanted, kept)
        over = np.bincount(keys // self.experts, minlength=len(pool.capacity)) - pool.capacity
        full = np.flatnonzero(over > 0)
        if not len(full):
            return keys, kept
        base_G = np.minimum(_held(keys, pool), pool.capacity).reshape(-1, self.gpus).sum(0)
        free = np.tile(np.clip(most - base_G, 0, STAGED), pool.layers)
        drop: list[int] = []
        for cell in full[over[full] > free[full]]:
            loads = cold[cold // self.experts == cell]
            drop += loads[max(len(loads) - (over[cell] - free[cell]), 0) :].tolist()
        return self._unstuck(np.setdiff1d(keys, drop), wanted, cold, kept, pool), kept

    def _unstuck(
        self, keys: IntArray, wanted: IntArray, cold: IntArray, kept: IntArray, pool: WarmPool
    ) -> IntArray:
        """Without loads into full cells where a copy stays that is not on its way to another one."""
        while True:
            wanted_too = np.isin(self.kind(kept), self.kind(np.intersect1d(keys, wanted)))
            stuck = np.unique(kept[~wanted_too] // self.experts)
            loads = np.intersect1d(keys, cold)
            count = np.bincount(keys // self.experts, minlength=len(pool.capacity))
            gone = loads[np.isin(loads // self.experts, stuck[count[stuck] > pool.capacity[stuck]])]
            if not len(gone):
                return keys
            keys = np.setdiff1d(keys, gone)


def _held(keys: IntArray, pool: WarmPool) -> IntArray:
    """Replicas of each layer and GPU with those of the pool that may stay, flat."""
    return np.bincount(np.union1d(keys, pool.keys) // pool.experts, minlength=len(pool.capacity))
