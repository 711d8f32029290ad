"""Replicas on their way: who waits for whom at a GPU's port, and what serves until they are there.

A GPU receives one replica after the other, over all layers, in the order in which they were decided on. What
has not begun and is not wanted any more is given up. Of every expert a copy that is there stays until another
one has come, whatever else wants its slot. A GPU has room for `STAGED` replicas of a layer whose slots are
not free yet (they take memory while the port is at it: one or two at once); what is more is put off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.runtime.pool import WarmPool

__all__ = ["Coming"]

STAGED = 2
"""Replicas of a layer on a GPU whose slots are not free yet (assumed)."""


def _none() -> IntArray:
    return np.zeros(0, dtype=np.int64)


def _never() -> FloatArray:
    return np.zeros(0)


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
    """

    gpus: int
    experts: int
    key: IntArray = field(default_factory=_none)
    decided: FloatArray = field(default_factory=_never)
    seconds: FloatArray = field(default_factory=_never)
    begin: FloatArray = field(default_factory=_never)
    end: FloatArray = field(default_factory=_never)

    def layer(self, key: IntArray) -> IntArray:
        """Layers of replicas."""
        return np.asarray(key // (self.gpus * self.experts))

    def kind(self, key: IntArray) -> IntArray:
        """Expert of a layer, as one number."""
        return np.asarray(self.layer(key) * self.experts + key % self.experts)

    def ask(self, key: IntArray, seconds: FloatArray, decided: FloatArray) -> None:
        """Line replicas up, in the order of the moments at which they were decided on."""
        order = np.argsort(decided, kind="stable")
        self.key = np.concatenate([self.key, key[order]])
        self.seconds = np.concatenate([self.seconds, seconds[order]])
        self.decided = np.concatenate([self.decided, decided[order]])
        self._schedule()

    def _schedule(self) -> None:
        """When each transfer begins and ends."""
        self.begin, self.end = np.zeros(len(self.key)), np.zeros(len(self.key))
        gpu_N = self.key // self.experts % self.gpus
        for gpu in np.unique(gpu_N):
            mine = np.flatnonzero(gpu_N == gpu)
            spent = np.cumsum(self.seconds[mine])
            before = spent - self.seconds[mine]
            start = np.maximum.accumulate(self.decided[mine] - before)
            self.begin[mine], self.end[mine] = start + before, start + spent

    def _take(self, keep: BoolArray) -> None:
        for name in ("key", "decided", "seconds", "begin", "end"):
            setattr(self, name, getattr(self, name)[keep])

    def settle(self, now: float) -> None:
        """Forget what has arrived."""
        if len(self.key) and self.end.min() <= now:
            late = self.end <= now
            # The port was busy until then: what comes after it cannot have begun sooner.
            gpu_N = self.key // self.experts % self.gpus
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

    def guarded(self, wanted: IntArray, pool: WarmPool) -> tuple[IntArray, IntArray]:
        """What is to be in memory if `wanted` is: copies that must stay are added, loads put off left out.

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
        drop: list[int] = []
        for cell in full[over[full] > STAGED]:
            loads = cold[cold // self.experts == cell]
            drop += loads[len(loads) - (over[cell] - STAGED) :].tolist()
        keys = np.setdiff1d(keys, drop)
        while True:  # what stays in a full cell has to be on its way to another one
            wanted_too = np.isin(self.kind(kept), self.kind(np.intersect1d(keys, wanted)))
            stuck = np.unique(kept[~wanted_too] // self.experts)
            loads = np.intersect1d(keys, cold)
            count = np.bincount(keys // self.experts, minlength=len(pool.capacity))
            gone = loads[np.isin(loads // self.experts, stuck[count[stuck] > pool.capacity[stuck]])]
            if not len(gone):
                return keys, kept
            keys = np.setdiff1d(keys, gone)
