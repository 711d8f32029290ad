"""Full slots with an even split: which expert each slot holds, second copies as weights where they may be.

An engine that cannot weight divides an expert's tokens evenly over its slots, and wants every slot full.
Where a GPU may hold several of them, k slots of n there are a share of k/n: coarse weights, which balance
what an even split over different GPUs cannot (few GPUs, GPUs of different speeds, one expert above all).
Where it may not, empty slots, which an even split sometimes likes better than a replica, are lost. The search
replaces what a slot holds, or swaps two slots, the best change first, and forbids for a while what it has
just undone (tabu search). It follows no clock and draws nothing at random.

References
----------
Glover (1989), "Tabu search, part I", ORSA Journal on Computing 1 (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import even_times
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.limits import Rules

__all__ = ["best_full"]

_TENURE = 7  # steps for which a slot does not get back what it held
_CELLS = 4_000_000  # entries of the table of changes beyond which a layer is left as it is


def best_full(
    load_LE: FloatArray,
    starts: Sequence[SlotArray],
    speed_G: FloatArray,
    goal_L: FloatArray,
    *,
    copies: bool,
    steps: int,
    rules: Sequence[Rules] | None = None,
    stop: Stop | None = None,
) -> SlotArray:
    """Better full placements with an even split over slots.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens of each expert.
    starts : sequence of arrays of int32, shape [L, G, C]
        Full placements to start from; a GPU of fewer slots has the others empty. Not changed.
    speed_G : array, shape [G]
        Relative speeds.
    goal_L : array, shape [L]
        Times with which layers are done.
    copies : bool
        Whether an expert may be on a GPU several times; if not, it is not so in the starts. If so, there is
        one start more: the heaviest slots first, each to the GPU that it leaves least busy.
    steps : int
        Changes of each layer, from each start.
    rules : sequence of Rules, optional
        Limits of each layer, which the starts keep.
    stop : Stop, optional
        When to be content.

    Returns
    -------
    array of int32, shape [L, G, C]
        As many slots of each GPU are full as before; no layer is slower.
    """
    stop = stop or NeverStop()
    times = [even_times(load_LE, one, speed_G).max(1) for one in starts]
    first_L = np.argmin(times, axis=0)
    best_LGC: SlotArray = np.stack(starts)[first_L, np.arange(len(load_LE))]
    time_L = np.min(times, axis=0)
    experts = load_LE.shape[1]
    for row in np.flatnonzero(time_L > goal_L).tolist():
        room_G = np.count_nonzero(best_LGC[row] >= 0, axis=1)
        if int(room_G.sum()) * experts * len(speed_G) > _CELLS:
            continue
        begin = [_counts(one[row], experts) for one in starts]
        if copies and rules is None:
            begin.append(_heaviest_first(load_LE[row], room_G, speed_G))
        for at, start_GE in enumerate(begin):
            if stop() or time_L[row] <= goal_L[row]:
                break
            if any(np.array_equal(start_GE, other) for other in begin[:at]):
                continue
            own = None if rules is None else rules[row]
            search = _Search(load_LE[row], speed_G, float(goal_L[row]), copies, steps, own)
            found_GE, time = search.run(start_GE, stop)
            if time < time_L[row] * (1 - 1e-12):
                time_L[row], best_LGC[row] = time, _slots(found_GE, best_LGC.shape[2])
    return best_LGC


def _counts(slots_GC: SlotArray, experts: int) -> IntArray:
    """Slots of each expert on each GPU, shape [G, E]."""
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in slots_GC])


def _slots(count_GE: IntArray, wide: int) -> SlotArray:
    """The way back, experts ascending."""
    slots_GC = np.full((len(count_GE), wide), -1, dtype=np.int32)
    for gpu, count_E in enumerate(count_GE):
        held = np.repeat(np.arange(len(count_E)), count_E)
        slots_GC[gpu, : len(held)] = held
    return slots_GC


def _heaviest_first(load_E: FloatArray, room_G: IntArray, speed_G: FloatArray) -> IntArray:
    """As many slots for each expert as its tokens are worth, each to the GPU that it leaves least busy."""
    count_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(int(room_G.sum()) - len(load_E)):
        count_E[int((load_E / count_E).argmax())] += 1
    piece_E = load_E / count_E
    count_GE = np.zeros((len(room_G), len(load_E)), dtype=np.int64)
    busy_G, left_G = np.zeros(len(room_G)), room_G.copy()
    for expert in np.repeat(
        np.argsort(-piece_E, kind="stable"), count_E[np.argsort(-piece_E, kind="stable")]
    ):
        after_G = np.where(left_G > 0, (busy_G + piece_E[expert]) / speed_G, np.inf)
        gpu = int(after_G.argmin())
        count_GE[gpu, expert] += 1
        busy_G[gpu] += piece_E[expert]
        left_G[gpu] -= 1
    return count_GE


def _obeys(
    rules: Rules, count_GE: IntArray, to_K: IntArray, old_K: IntArray, new_K: IntArray, from_K: IntArray
) -> BoolArray:
    """Whether limits that are kept still are after each change, shape [K]; the changes are `_Changes`."""
    total_E, swaps_K, domain_G = count_GE.sum(0), from_K >= 0, rules.domain_G
    may_K = rules.allowed_EG[new_K, to_K] & ~(rules.pinned_EG[old_K, to_K] & (count_GE[to_K, old_K] == 1))
    may_K &= swaps_K | ((total_E[new_K] < rules.most_E[new_K]) & (total_E[old_K] > rules.least_E[old_K]))
    back_K = rules.allowed_EG[old_K, from_K]
    back_K &= ~(rules.pinned_EG[new_K, from_K] & (count_GE[from_K, new_K] == 1))
    may_K &= ~swaps_K | back_K
    if rules.spreads:
        in_ED = rules.domains_ED(count_GE.T)
        reach_E, to_D, from_D = (in_ED > 0).sum(1), domain_G[to_K], domain_G[from_K]
        other_K = ~swaps_K | (to_D != from_D)
        lost_K = other_K & (in_ED[old_K, to_D] == 1)
        won_K = swaps_K & other_K & (in_ED[old_K, from_D] == 0)
        may_K &= reach_E[old_K] - lost_K + won_K >= rules.spread_E[old_K]
        lost_K = swaps_K & other_K & (in_ED[new_K, from_D] == 1)
        may_K &= reach_E[new_K] - lost_K + (other_K & (in_ED[new_K, to_D] == 0)) >= rules.spread_E[new_K]
    return np.asarray(may_K)


_Changes = tuple[IntArray, IntArray, IntArray, IntArray, FloatArray, FloatArray]
"""Changes [K]: the slot of which GPU gives up which expert for which, the GPU that swaps with it or -1, the
largest time that it leads to, and what that is worth."""


def _steep(time: FloatArray) -> FloatArray:
    """The 16th power, by products: the same on every machine."""
    square = time * time
    fourth = square * square
    eighth = fourth * fourth
    return eighth * eighth


@dataclass(frozen=True, slots=True)
class _Search:
    """One layer's tabu search."""

    load_E: FloatArray
    speed_G: FloatArray
    goal: float
    copies: bool
    steps: int
    rules: Rules | None

    def run(self, count_GE: IntArray, stop: Stop) -> tuple[IntArray, float]:
        """The best counts seen, and their largest time."""
        count_GE = count_GE.copy()
        until_GE = np.zeros(count_GE.shape, dtype=np.int64)
        best_GE, best = count_GE.copy(), float(self.times(count_GE).max())
        for step in range(1, self.steps + 1):
            if best <= self.goal or stop():
                break
            change = self.best_change(count_GE, until_GE >= step, best)
            if change is None:
                break
            gpu, old, new, other = change
            count_GE[gpu, old] -= 1
            count_GE[gpu, new] += 1
            until_GE[gpu, old] = step + _TENURE
            if other >= 0:
                count_GE[other, new] -= 1
                count_GE[other, old] += 1
                until_GE[other, new] = step + _TENURE
            time = float(self.times(count_GE).max())
            if time < best * (1 - 1e-12):
                best_GE, best = count_GE.copy(), time
        return best_GE, best

    def times(self, count_GE: IntArray) -> FloatArray:
        """Time of each GPU; sums in the experts' order."""
        share_E = self.load_E / np.maximum(count_GE.sum(0), 1)
        return np.asarray((count_GE * share_E).sum(1) / self.speed_G)

    def best_change(
        self, count_GE: IntArray, banned_GE: BoolArray, best: float
    ) -> tuple[int, int, int, int] | None:
        """GPU, what it gives up and for what, and the GPU that swaps with it (or -1); None if none is left.

        Looked at is what touches the slowest GPU or thins out what it serves; banned changes only if they
        lead to a new best.
        """
        time_G = self.times(count_GE)
        hot = int(time_G.argmax())
        worths, changes = [], []
        for to_K, old_K, new_K, from_K, time_K, worth_K in (
            self.replaced(count_GE, time_G, hot),
            self.swapped(count_GE, time_G, hot),
        ):
            no_K = banned_GE[to_K, new_K] & (time_K >= best * (1 - 1e-12))
            if not self.copies:
                no_K |= (count_GE[to_K, new_K] > 0) | ((from_K >= 0) & (count_GE[from_K, old_K] > 0))
            if self.rules is not None:
                no_K |= ~_obeys(self.rules, count_GE, to_K, old_K, new_K, from_K)
            worths.append(np.where(no_K, np.inf, worth_K))
            changes.append(np.stack([to_K, old_K, new_K, from_K]))
        worth_K, change_4K = np.concatenate(worths), np.concatenate(changes, axis=1)
        if not len(worth_K) or not np.isfinite(worth_K.min()):
            return None
        gpu, old, new, other = change_4K[:, int(worth_K.argmin())].tolist()
        return gpu, old, new, other

    def replaced(self, count_GE: IntArray, time_G: FloatArray, hot: int) -> _Changes:
        """What the slowest GPU gives up for anything, and what others give up for what it holds."""
        load_E, total_E = self.load_E, count_GE.sum(0)
        many, here_E = total_E > 1, count_GE[hot] > 0
        old = np.flatnonzero(here_E & many)
        mine = np.stack(
            [
                np.full(len(old) * len(load_E), hot),
                np.repeat(old, len(load_E)),
                np.tile(np.arange(len(load_E)), len(old)),
            ]
        )
        gpu, gone = np.nonzero((count_GE > 0) & many)
        gpu, gone = gpu[gpu != hot], gone[gpu != hot]
        wanted = np.flatnonzero(here_E & (load_E > 0))
        theirs = np.stack(
            [np.repeat(gpu, len(wanted)), np.repeat(gone, len(wanted)), np.tile(wanted, len(gpu))]
        )
        to_K, old_K, new_K = np.concatenate([mine, theirs], axis=1)
        differ = old_K != new_K
        to_K, old_K, new_K = to_K[differ], old_K[differ], new_K[differ]
        fewer = np.maximum(total_E - 1, 1)
        served_EG = (count_GE * load_E).T
        without_EG = served_EG * (1.0 / fewer - 1.0 / total_E)[:, None]
        with_EG = served_EG * (1.0 / (total_E + 1) - 1.0 / total_E)[:, None]
        after_KG = without_EG[old_K] + with_EG[new_K]
        after_KG[np.arange(len(to_K)), to_K] += (
            load_E[new_K] / (total_E[new_K] + 1) - load_E[old_K] / fewer[old_K]
        )
        after_KG, scale = time_G + after_KG / self.speed_G, float(time_G[hot])
        none_K = np.full(len(to_K), -1, dtype=np.int64)
        return to_K, old_K, new_K, none_K, after_KG.max(1, initial=0.0), _steep(after_KG / scale).sum(1)

    def swapped(self, count_GE: IntArray, time_G: FloatArray, hot: int) -> _Changes:
        """Swaps of a slot of the slowest GPU with a lighter one elsewhere."""
        piece_E = self.load_E / count_GE.sum(0)
        mine = np.flatnonzero(count_GE[hot] > 0)
        gpu, theirs = np.nonzero(count_GE > 0)
        gpu, theirs = gpu[gpu != hot], theirs[gpu != hot]
        old_K, new_K, from_K = np.repeat(mine, len(gpu)), np.tile(theirs, len(mine)), np.tile(gpu, len(mine))
        lighter = piece_E[new_K] < piece_E[old_K]
        old_K, new_K, from_K = old_K[lighter], new_K[lighter], from_K[lighter]
        less_K = piece_E[old_K] - piece_E[new_K]
        here_K = time_G[hot] - less_K / self.speed_G[hot]
        there_K = time_G[from_K] + less_K / self.speed_G[from_K]
        scale = float(time_G[hot])
        worth_G = _steep(time_G / scale)
        rest_K = worth_G.sum() - worth_G[hot] - worth_G[from_K]
        second = float(np.sort(time_G)[-2]) if len(time_G) > 1 else 0.0  # at most: it may be the other one
        time_K = np.maximum(np.maximum(here_K, there_K), second)
        worth_K = rest_K + _steep(here_K / scale) + _steep(there_K / scale)
        return np.full(len(old_K), hot, dtype=np.int64), old_K, new_K, from_K, time_K, worth_K
