"""Passes that need not wait for weights: what serves in each layer, and when what is missing comes.

When a layer begins is not known before the pass has run, and what has come by then decides how long it is.
So beginnings are taken as if all were there in the layers before: hardly ever is a replica taken to be there
too soon. What a layer waits for is then what the layers before it, as they ran, have not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import replica_keys
from moeless_opt.runtime.pool import WarmPool
from moeless_opt.runtime.simulate.beliefs import Beliefs
from moeless_opt.runtime.simulate.coming import STAGED, Coming, Memory
from moeless_opt.runtime.simulate.machine import LayerTimes, Machine
from moeless_opt.runtime.simulate.shares import Placed, ShareRule
from moeless_opt.runtime.simulate.traffic import Passes

__all__ = ["Early"]


@dataclass(slots=True, kw_only=True)
class Early:
    """What is on its way, and passes beside it.

    Parameters
    ----------
    machine : Machine
        True times.
    beliefs : Beliefs
        Those that decide what to wait for.
    pool : WarmPool
        What is in memory or on its way.
    rule : ShareRule
        How replicas share their tokens.
    bytes_L : array of int, shape [L]
        Bytes of a replica.
    patient : bool or None
        See `transfers.PerPass`.
    distance : int
        Layers ahead that loads are decided on.
    decide : float
        Seconds that deciding takes.
    contention : bool
        Whether transfers and the all-to-all share ports.
    """

    machine: Machine
    beliefs: Beliefs
    pool: WarmPool
    rule: ShareRule
    bytes_L: IntArray
    patient: bool | None
    distance: int
    decide: float
    contention: bool
    coming: Coming = field(init=False)
    asked: IntArray = field(init=False)
    wanted: IntArray = field(init=False)
    kept: IntArray = field(init=False)
    moved: float = 0.0
    _fresh: IntArray = field(init=False)
    _seconds: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        none = np.zeros(0, dtype=np.int64)
        self.coming = Coming(self.pool.gpus, self.pool.experts)
        self.pool.staging = STAGED
        self.asked, self.wanted, self.kept, self._fresh, self._seconds = none, none, none, none, np.zeros(0)

    def ask(self, slots_LGC: SlotArray, now: float, stretch: float, most: int) -> tuple[SlotArray, bool]:
        """Want a placement from the next pass on.

        Parameters
        ----------
        slots_LGC : array of int32, shape [L, G, C]
            The placement.
        now : float
            Before the pass.
        stretch : float
            How much longer transfers take than alone.
        most : int
            Replicas of all layers that a GPU has room for.

        Returns
        -------
        slots_LGC : array of int32, shape [L, G, C]
            What is to serve once all is there, and whether that is all that was wanted and no more.
        """
        pool, coming = self.pool, self.coming
        coming.settle(now)
        if coming.memory is not None:
            pool.drop(coming.memory.gone[coming.memory.gone_at <= now])
            coming.forget_limits(now)
        asked = self.asked = replica_keys(slots_LGC, pool.experts)
        given_up = coming.give_up(asked, now)
        fresh = np.isin(self._fresh, given_up)
        self._fresh, self._seconds = self._fresh[~fresh], self._seconds[~fresh]
        pool.drop(given_up)
        self.moved -= len(given_up)
        keys, self.kept = coming.guarded(asked, pool, most)
        before = np.setdiff1d(pool.keys, coming.key)
        cold = pool.load(keys, now).cold
        coming.forget(pool.keys)
        self.moved += len(cold)
        seconds = self.machine.replica_seconds(cold, before, self.bytes_L) * stretch
        self._fresh = np.concatenate([self._fresh, cold])
        self._seconds = np.concatenate([self._seconds, seconds])
        swapped = self.kept[np.isin(coming.kind(self.kept), coming.kind(np.intersect1d(keys, asked)))]
        memory = self._memory(swapped, most, now)
        if memory is not None:
            coming.keep_within(memory)
        self.wanted = self.serving() if self.rule.live else np.setdiff1d(keys, swapped)
        if np.array_equal(self.wanted, asked):
            return slots_LGC, True
        return self.slots(self.wanted), False

    def _memory(self, swapped: IntArray, most: int, now: float) -> Memory | None:
        """Room that transfers have to wait for, if there is less than all that is wanted takes together."""
        pool = self.pool
        if (pool.held_LG.sum(0) <= most).all():
            return None
        there = np.setdiff1d(pool.keys, np.union1d(self.coming.key, self._fresh))
        there_G = np.bincount(there // pool.experts % pool.gpus, minlength=pool.gpus)
        return Memory(most=most, there_G=there_G, leaving=swapped, now=now)

    def serving(self) -> IntArray:
        """Keys of what may serve where shares are live: all that is there or on its way and does not go."""
        memory = self.coming.memory
        return self.pool.keys if memory is None else np.setdiff1d(self.pool.keys, memory.gone)

    def held_G(self) -> IntArray:
        """The most replicas that each GPU holds at any moment until a new placement is wanted, shape [G]."""
        memory = self.coming.memory
        return self.pool.held_LG.sum(0) if memory is None else memory.peak_G

    def within(self) -> SlotArray:
        """What planners may take to be there: what is on its way included, and no more than fits.

        Where more is in memory while replicas change places, it is what was wanted last.
        """
        pool = self.pool
        over = np.flatnonzero(pool.held_LG.reshape(-1) > pool.capacity) // pool.gpus
        if not len(over):
            return pool.slots()
        held = pool.keys[~np.isin(self.coming.layer(pool.keys), over)]
        asked = self.asked[np.isin(self.coming.layer(self.asked), over)]
        return self.slots(np.union1d(held, asked))

    def slots(self, keys: IntArray) -> SlotArray:
        """Replicas as slots, shape [L, G, C]."""
        pool = self.pool
        cell, expert = np.divmod(keys, pool.experts)
        count = np.bincount(cell, minlength=pool.layers * pool.gpus)
        nth = np.arange(len(cell)) - (np.cumsum(count) - count)[cell]
        slots = np.full((pool.layers * pool.gpus, max(int(count.max()), 1)), -1, dtype=np.int32)
        slots[cell, nth] = expert
        return slots.reshape(pool.layers, pool.gpus, -1)

    def run(
        self, part: Passes, start: float, before_L: FloatArray, placed: Placed
    ) -> tuple[LayerTimes, FloatArray, SlotArray]:
        """One pass.

        Parameters
        ----------
        part : Passes
            The pass.
        start : float
            When it starts.
        before_L : array, shape [L]
            Seconds of each layer in the pass before.
        placed : Placed
            What is to serve.

        Returns
        -------
        times, waits_L, used_LGC
            The layers' times without waiting, shape [1, L]; waiting, shape [L]; and what served.
        """
        coming, layers = self.coming, len(before_L)
        coming.forget(self.pool.keys)
        if self.rule.live:
            self.wanted = self.serving()
        times, served = self.rule.times(part.load_BLE, placed)
        used_LGC = placed.slots_LGC if served is None else np.where(served, placed.slots_LGC, -1)
        rest = float(self.machine.rest(part.tokens_B, part.kv_tokens_B)[0]) / layers
        begin_L = start + np.concatenate([[0.0], np.cumsum(times.layer_BL[0] + rest)])
        coming.settle(start)
        if len(self._fresh):
            lead = start - np.cumsum(before_L[::-1] + rest)[::-1][-self.distance :]
            decided_L = np.concatenate([lead, begin_L])[:layers] + self.decide
            coming.ask(self._fresh, self._seconds, decided_L[coming.layer(self._fresh)])
            self._fresh, self._seconds = self._fresh[:0], self._seconds[:0]
            if coming.memory is not None and len(coming.memory.gone) and self.rule.live:
                self.wanted = self.serving()
                placed = replace(placed, slots_LGC=self.slots(self.wanted), planned_LGC=None)
                times, served = self.rule.times(part.load_BLE, placed)
                used_LGC = placed.slots_LGC if served is None else np.where(served, placed.slots_LGC, -1)
        self.pool.pinned = np.union1d(coming.key, self.kept)
        late = coming.end > begin_L[coming.layer(coming.key)]
        late &= np.isin(coming.key, self.wanted)
        waits_L = np.zeros(layers)
        if late.any():
            times, used_LGC, waited_L = self._choose(
                part, begin_L, coming.key[late], coming.end[late], placed, times, used_LGC
            )
            waits_L = self._waits(
                start, times.layer_BL[0] + rest, waited_L, coming.key[late], coming.end[late]
            )
        if self.contention and len(coming.key):
            busy_L = (coming.begin[:, None] < begin_L[1:]) & (coming.end[:, None] > begin_L[:-1])
            times = replace(times, network_BL=times.network_BL * (1 + busy_L.any(0)))
        return times, waits_L, used_LGC

    def _waits(
        self, start: float, seconds_L: FloatArray, waited_L: BoolArray, key: IntArray, end: FloatArray
    ) -> FloatArray:
        """Seconds that layers wait, one after the other: what one waits for the next ones need not."""
        there_L = np.zeros(len(seconds_L))
        np.maximum.at(there_L, self.coming.layer(key), end)
        waits_L, now = np.zeros(len(seconds_L)), start
        for layer, seconds in enumerate(seconds_L):
            if waited_L[layer]:
                waits_L[layer] = max(there_L[layer] - now, 0.0)
            now += seconds + waits_L[layer]
        return waits_L

    def begun(self, since: float, until: float) -> int:
        """Transfers that were decided on for a pass and begin during it."""
        coming = self.coming
        return int(((coming.begin < until) & (coming.begin >= since)).sum())

    def _choose(
        self,
        part: Passes,
        begin_L: FloatArray,
        key: IntArray,
        end: FloatArray,
        placed: Placed,
        times: LayerTimes,
        used_LGC: SlotArray,
    ) -> tuple[LayerTimes, SlotArray, BoolArray]:
        """Layer by layer: wait for what is late, or serve without it; times, what serves, and who waits."""
        coming = self.coming
        layer = coming.layer(key)
        late_L = np.zeros(len(begin_L) - 1)
        np.maximum.at(late_L, layer, end - begin_L[layer])
        some = np.unique(layer)
        there, kept = np.setdiff1d(self.wanted, key), np.intersect1d(self.kept, self.pool.keys)
        if coming.memory is not None:  # some of those in whose place others have come are gone
            kept = kept[~(np.isin(kept, coming.memory.gone) & np.isin(coming.kind(kept), coming.kind(there)))]
        there = np.union1d(there, kept)
        slots_LGC = self.slots(there)
        waited_L = np.zeros(len(late_L), dtype=np.bool_)
        if self.patient is None:
            load = part.load_BLE[:, some]
            quick, _ = self.rule.times(load, self._believes(slots_LGC[some], placed))
            whole, _ = self.rule.times(load, self._believes(placed.slots_LGC[some], placed))
            waited_L[some] = whole.layer_BL[0] + late_L[some] < quick.layer_BL[0]
        # An expert of which no copy is there at all has to be waited for.
        waited_L[np.setdiff1d(coming.kind(key), coming.kind(there)) // coming.experts] = True
        early = some[~waited_L[some]]
        if not len(early):
            return times, used_LGC, waited_L
        now = replace(placed, slots_LGC=slots_LGC[early], planned_LGC=None, rows=early)
        found, served = self.rule.times(part.load_BLE[:, early], now)
        parts = {}
        for item in fields(LayerTimes):
            value = getattr(times, item.name).copy()
            value[:, early] = getattr(found, item.name)
            parts[item.name] = value
        width = max(slots_LGC.shape[2], used_LGC.shape[2])
        both_LGC = np.full((*used_LGC.shape[:2], width), -1, dtype=np.int32)
        both_LGC[:, :, : used_LGC.shape[2]] = used_LGC
        both_LGC[early] = -1
        both_LGC[early, :, : slots_LGC.shape[2]] = (
            now.slots_LGC if served is None else np.where(served, now.slots_LGC, -1)
        )
        return LayerTimes(**parts), both_LGC, waited_L

    def _believes(self, slots_LGC: SlotArray, placed: Placed) -> Placed:
        """Some layers, in the times that are believed."""
        return Placed(self.beliefs.machine, placed.table, slots_LGC, brief=True)
