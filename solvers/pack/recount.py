"""Local search on the replica counts, where swaps alone stay stuck.

Greedy counts make the largest piece small, but what counts is the largest GPU: a heavy piece that must
share its GPU may be worth another replica, taken from an expert whose pieces find company easily. Here each
layer that is far from its bound tries many counts at once, those that the greedy's variants give and those
one replica away from its best so far, packs and swaps them all as if they were layers of one problem, and
goes on from the best while that helps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import even_times
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.pack.counts import apportion, hostable
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.pack.swaps import improve
from moeless_opt.solvers.pack.two_slots import fold

__all__ = ["resize"]


_CASES = 256  # packed at a time: more are no quicker, and stop is asked between them
_CELLS = 1 << 25  # pairs of expert and GPU in the cases that are packed at a time
LEANS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def resize(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    *,
    goal_L: FloatArray | None = None,
    steps: int = 8,
    width: int = 32,
    backend: str = "numpy",
    stop: Stop | None = None,
) -> SlotArray:
    """Try other replica counts for the layers above the target.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    slots_LGC : array of int32, shape [L, G, C]
        Placement to start from. Not changed.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.
    speed_G : array of float, shape [G]
        Relative speeds.
    goal_L : array of float, shape [L], optional
        Enough: a slowest GPU's time of at most this. Default: the mean, total load over total speed.
    steps : int
        Most steps of each layer.
    width : int
        Replica counts tried in each step.
    backend : {"numpy", "numba"}
        Which of the twins does the work; the result is the same.
    stop : Stop, optional
        When to be content with what is found.

    Returns
    -------
    array of int32, shape [L, G, C]
        No layer's slowest GPU is slower than before.
    """
    stop = stop or NeverStop()
    slots = np.array(slots_LGC, dtype=np.int32)
    E = load_LE.shape[1]
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    bench = _Bench(
        load_LE=load_LE,
        capacity_LG=np.asarray(capacity_LG, dtype=np.int64),
        speed_G=speed_G,
        goal_L=mean_L if goal_L is None else goal_L,
        width=slots.shape[2],
        swaps={"rounds": 3, "focus": 2, "backend": backend},
        stop=stop,
    )
    counts = _count(slots, E)
    top, excess = bench.score(np.arange(len(slots)), slots)
    cap_L = (capacity_LG > 0).sum(axis=1)
    total_L = np.minimum(capacity_LG, E).sum(axis=1)
    live = counts  # where the search stands: by excess, so not always at the best so far
    rows = np.flatnonzero(top > bench.goal_L)
    for step in range(steps):
        if not len(rows) or stop():
            break
        if step == 0:
            base, tried = _leaning(load_LE, live, cap_L, rows)
            trial = bench.run(base, tried)
        else:
            base, tried = _shifted(load_LE, live, cap_L, total_L, rows, width)
            trial = bench.run(base, tried)
            trial = trial.joined(bench.run(*_combined(trial, live)))
        if not len(trial.base):
            break
        record = trial.least(trial.top)
        record = record[trial.top[record] < top[trial.base[record]] * (1.0 - 1e-9)]
        slots[trial.base[record]], top[trial.base[record]] = trial.slots[record], trial.top[record]
        next_ = trial.least(trial.excess)
        if step == 0:  # the leaning counts are taken up only where they are better
            next_ = next_[trial.excess[next_] < excess[trial.base[next_]]]
        live[trial.base[next_]] = trial.counts[next_]
        rows = rows[top[rows] > bench.goal_L[rows]]
    return slots


class _Trial(NamedTuple):
    """Cases that were packed: layer, counts, placement, slowest GPU's time, and excess of all GPUs."""

    base: IntArray
    counts: IntArray
    slots: SlotArray
    top: FloatArray
    excess: FloatArray

    def joined(self, *others: _Trial) -> _Trial:
        """All of them."""
        fields: Any = zip(self, *others, strict=True)
        return _Trial(*(np.concatenate(each) for each in fields))

    def least(self, value: FloatArray) -> IntArray:
        """The case of least value of each layer."""
        order = np.lexsort((value, self.base))
        return order[np.unique(self.base[order], return_index=True)[1]]


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Packs and swaps cases, each a layer with some counts, as if they were layers of one problem."""

    load_LE: FloatArray
    capacity_LG: IntArray
    speed_G: FloatArray
    goal_L: FloatArray
    width: int  # slots of the widest GPU of all layers
    swaps: dict[str, Any]
    stop: Stop
    seen: set[tuple[int, bytes]] = field(default_factory=set)

    @property
    def pairs(self) -> bool:
        """Whether every GPU has two slots and the same speed."""
        equal = bool((self.capacity_LG == 2).all() and (self.speed_G == self.speed_G[0]).all())
        return equal and len(self.speed_G) > 1

    def score(self, base: IntArray, slots: SlotArray) -> tuple[FloatArray, FloatArray]:
        """Time of the slowest GPU, and sum over the GPUs of the squared time above the goal."""
        time = even_times(self.load_LE[base], slots, self.speed_G)
        over = np.maximum(time - self.goal_L[base, None], 0.0)
        return time.max(axis=1), (over * over).sum(axis=1)

    def run(self, base: IntArray, counts: IntArray) -> _Trial:
        """Pack the cases that are new and can be hosted."""
        keep = hostable(counts, self.capacity_LG[base])
        for case in np.flatnonzero(keep):
            key = (int(base[case]), counts[case].tobytes())
            keep[case] = key not in self.seen
            self.seen.add(key)
        base, counts = base[keep], counts[keep]
        shape = (0, self.capacity_LG.shape[1], self.width)
        parts = [_Trial(base[:0], counts[:0], np.empty(shape, dtype=np.int32), np.empty(0), np.empty(0))]
        cases = max(min(_CASES, _CELLS // (self.load_LE.shape[1] * self.capacity_LG.shape[1])), 1)
        for start in range(0, len(base), cases):
            if start and self.stop():
                break
            part = slice(start, start + cases)
            parts.append(self._packed(base[part], counts[part]))
        return _Trial.joined(*parts)

    def _packed(self, base: IntArray, counts: IntArray) -> _Trial:
        """Pack and swap cases."""
        load, capacity = self.load_LE[base], self.capacity_LG[base]
        if self.pairs:
            slots = fold(load, counts, capacity.shape[1])
        else:
            slots = pack(load, counts, capacity, self.speed_G, backend=self.swaps["backend"])
            slots = improve(
                load, slots, capacity, self.speed_G, goal_L=self.goal_L[base], stop=self.stop, **self.swaps
            )
        slots = np.pad(slots, ((0, 0), (0, 0), (0, self.width - slots.shape[2])), constant_values=-1)
        return _Trial(base, counts, slots, *self.score(base, slots))


def _count(slots_LGC: SlotArray, E: int) -> IntArray:
    """Replicas of each expert."""
    L, G, C = slots_LGC.shape
    flat = slots_LGC.reshape(L, G * C) % (E + 1) + np.arange(L)[:, None] * (E + 1)
    return np.bincount(flat.ravel(), minlength=L * (E + 1)).reshape(L, E + 1)[:, :E]


def _leaning(
    load_LE: FloatArray, counts_LE: IntArray, cap_L: IntArray, rows: IntArray
) -> tuple[IntArray, IntArray]:
    """Cases: the counts of the greedy's variants."""
    total = counts_LE[rows].sum(axis=1)
    cap = cap_L[rows, None]
    tried = [apportion(load_LE[rows], total, cap, lean=lean).astype(np.int64) for lean in LEANS]
    return np.tile(rows, len(LEANS)), np.concatenate(tried)


def _shifted(
    load_LE: FloatArray, counts_LE: IntArray, cap_L: IntArray, total_L: IntArray, rows: IntArray, width: int
) -> tuple[IntArray, IntArray]:
    """Cases: one replica moved from an expert to another, left out, or added."""
    tried = []
    for layer in rows:
        counts = counts_LE[layer]
        empty = int(total_L[layer] - counts.sum())
        tried.append(_shifts(load_LE[layer], counts, int(cap_L[layer]), empty, width))
    return np.repeat(rows, [len(cases) for cases in tried]), np.concatenate(tried)


def _combined(trial: _Trial, counts_LE: IntArray) -> tuple[IntArray, IntArray]:
    """Cases: the best 2, 4, 8 ... moves of a layer's trial at once, no expert in two of them."""
    base, tried = [], []
    order = np.lexsort((trial.excess, trial.base))
    for layer, cases in zip(*_runs(trial.base[order], order), strict=True):
        counts = counts_LE[layer]
        moves = trial.counts[cases] - counts
        touched = np.zeros(len(counts), dtype=bool)
        joined, size, power = counts.copy(), 0, 2
        for move in moves:
            if not (touched & (move != 0)).any():
                touched |= move != 0
                joined = joined + move
                size += 1
                if size == power:
                    base.append(layer)
                    tried.append(joined)
                    power *= 2
    E = counts_LE.shape[1]
    return np.array(base, dtype=np.int64), np.array(tried, dtype=np.int64).reshape(len(base), E)


def _runs(key: IntArray, value: IntArray) -> tuple[list[int], list[IntArray]]:
    """Split `value` where the sorted `key` changes."""
    keys, starts = np.unique(key, return_index=True)
    return [int(k) for k in keys], np.split(value, starts[1:]) if len(keys) else []


def _shifts(load_E: FloatArray, counts_E: IntArray, cap: int, empty: int, width: int) -> IntArray:
    """Up to `width` ways to move a replica, first those with the smallest new and the largest old pieces.

    An expert without load, the last, stands for the empty slots.
    """
    E = len(counts_E)
    givers = np.append(np.flatnonzero(counts_E > 1), np.full(int(empty > 0), E))
    takers = np.append(np.flatnonzero(counts_E < cap), E)
    load, counts = np.append(load_E, 0.0), np.append(counts_E, empty)
    grown = load[givers] / np.maximum(counts[givers] - 1, 1)
    relieved = load[takers] / np.maximum(counts[takers], 1)
    # The best sums are sums of the best, one of which may be of no use: its giver is its taker.
    few = np.sort(np.argsort(grown, kind="stable")[: width + 1])
    givers, grown = givers[few], grown[few]
    few = np.sort(np.argsort(-relieved, kind="stable")[: width + 1])
    takers, relieved = takers[few], relieved[few]
    worth = np.where(givers[:, None] == takers, -np.inf, relieved - grown[:, None])
    order = np.argsort(-worth, axis=None, kind="stable")[:width]
    order = order[worth.flat[order] > -np.inf]
    tried = np.repeat(counts[None], len(order), axis=0)
    tried[np.arange(len(order)), givers[order // len(takers)]] -= 1
    tried[np.arange(len(order)), takers[order % len(takers)]] += 1
    return tried[:, :E]
