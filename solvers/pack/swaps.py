"""Local search on placements: swaps between GPUs, all layers at once.

A round ranks the GPUs of each layer by time, pairs each of the slower half with one of the faster half
(another one every round), and makes the swap in each pair that brings its two GPUs closest together:
thousands of swaps for a few array operations. An empty slot counts as a replica of weight zero, so moves
are swaps too. Layers leave as they reach the target; those that still miss it after the paired rounds get
focused ones, the slowest GPU against all the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import even_pieces, slot_sums
from moeless_opt.solvers.core import Stop
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.pack.packing import empties_last

__all__ = ["hasten", "improve"]


# Stands for "may not be swapped": larger than any load, and far enough from overflow to be added up.
BARRED = 1e300
_FEW_SLOTS = 4
_FIRST = 2  # paired rounds of the short pass
_FIRST_FOCUS = 24  # focused rounds after them
_NEAR = 1.004  # times the goal: layers further off go straight to the long pass


def improve(
    load_LE: FloatArray,
    slots_LGC: Any,
    capacity_LG: Any,
    speed_G: Any,
    *,
    target: float = 1.0,
    goal_L: FloatArray | None = None,
    rounds: int = 8,
    focus: int = 16,
    backend: str = "numpy",
    stop: Stop | None = None,
) -> SlotArray:
    """Swap replicas between GPUs until the slowest GPU is close to the bound, or no swap helps.

    The replicas of each expert stay as many as they are, and an equal split of the tokens is assumed.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    slots_LGC : array of int, shape [L, G, C]
        Placement to start from, no expert twice on a GPU; -1 is an empty slot. Not changed.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.
    speed_G : array of float, shape [G]
        Relative speeds.
    target : float
        A layer is done when its slowest GPU's time is at most `target` times the mean (total load over total
        speed) or the largest piece on the fastest GPU, whichever is larger.
    goal_L : array of float, shape [L], optional
        The times at which the layers are done, instead.
    rounds : int
        Most paired rounds. Where they are many, layers near their goal first get a short pass with two and
        few focused ones; the long one is for those that miss it so.
    focus : int
        Most focused rounds after them.
    backend : {"numpy", "numba"}
        Which of the two twins does the work; the result is the same.
    stop : Stop, optional
        When to be content with what is found. The compiled twin is done before it could ask.

    Returns
    -------
    array of int32, shape [L, G, C]
        No layer's slowest GPU is slower than before.
    """
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    speed = np.asarray(speed_G, dtype=np.float64)
    slots = np.array(slots_LGC, dtype=np.int32)
    if slots.shape[1] < 2 or len(slots) == 0:
        return slots
    usable, weight, time, floor = _measured(load_LE, slots, capacity_LG, speed)
    goal = target * floor if goal_L is None else np.maximum(floor, goal_L)
    E, inverse = load_LE.shape[1], 1.0 / speed
    first = _FIRST if rounds > 2 * _FIRST else rounds
    if backend == "numba":
        passes = (first, _FIRST_FOCUS, rounds, focus)
        fast.swap_rounds(slots, weight, time, usable, inverse, goal, _NEAR * goal, E, passes)
        return empties_last(slots)
    top = time.max(axis=1)
    near = np.flatnonzero((top <= _NEAR * goal) & (top > goal)) if first < rounds else np.zeros(0, np.int64)
    quick = slots
    if len(near):
        layers = (slots[near], weight[near], time[near], usable[near])
        short = _State(*layers, inverse, goal[near], E).run(first, min(focus, _FIRST_FOCUS), stop)
        quick = slots.copy()
        quick[near], top[near] = short
    rows = np.flatnonzero(top > goal)
    layers = (slots[rows], weight[rows], time[rows], usable[rows])
    found, last = _State(*layers, inverse, goal[rows], E).run(rounds, focus, stop)
    better = last <= top[rows]
    quick[rows[better]] = found[better]
    return empties_last(quick)


def hasten(
    load_LE: FloatArray,
    slots_LGC: Any,
    capacity_LG: Any,
    speed_G: FloatArray,
    goal_L: FloatArray,
    *,
    rounds: int,
    focus: int,
    stop: Stop | None = None,
) -> SlotArray:
    """As `improve`, but GPUs that end in time swap only with those that do not: fewer swaps.

    It has no compiled twin.
    """
    slots = np.array(slots_LGC, dtype=np.int32)
    if slots.shape[1] < 2:
        return slots
    usable, weight, time, floor = _measured(load_LE, slots, capacity_LG, speed_G)
    goal = np.maximum(floor, goal_L)
    state = _State(slots, weight, time, usable, 1.0 / speed_G, goal, load_LE.shape[1], only_late=True)
    return empties_last(state.run(rounds, focus, stop)[0])


def _measured(
    load_LE: FloatArray, slots: SlotArray, capacity_LG: Any, speed: FloatArray
) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
    """Slots that may be used, pieces, GPU times, and the least time that these pieces allow."""
    usable = np.minimum(np.asarray(capacity_LG, dtype=np.int64), slots.shape[2])
    weight = even_pieces(load_LE, slots)
    mean = load_LE.sum(axis=1) / speed.sum()
    floor = np.maximum(mean, weight.max(axis=(1, 2)) / speed.max())
    return usable, weight, slot_sums(weight) * (1.0 / speed), floor


class _State:
    """The layers still at work, and what the rounds need of them."""

    def __init__(
        self,
        slots: SlotArray,
        weight: FloatArray,
        time: FloatArray,
        usable: IntArray,
        inverse_G: FloatArray,
        goal: FloatArray,
        E: int,
        only_late: bool = False,
    ) -> None:
        L, G, C = slots.shape
        self.only_late = only_late
        self.inverse_G = inverse_G
        self.done = slots  # where finished layers are put
        self.done_time = np.zeros(L)
        self.layer_A = np.arange(L)
        self.expert = slots.copy()
        self.weight = weight
        self.time = time
        self.goal = goal
        beyond = np.arange(C) >= usable[:, :, None]
        self.barred: BoolArray | None = beyond if beyond.any() else None
        self.held: BoolArray | None = None
        if C > _FEW_SLOTS:  # with few, the slots of two GPUs are quicker compared than looked up
            self.held = np.zeros((L, G, E + 1), dtype=bool)
            self.held[np.arange(L)[:, None, None], np.arange(G)[:, None], slots] = True
            self.held[:, :, E] = False  # index -1: an empty slot clashes with nothing
        self.stale = np.zeros(L, dtype=np.int64)
        self.stuck = np.zeros(L, dtype=bool)

    def run(self, rounds: int, focus: int, stop: Stop | None) -> tuple[SlotArray, FloatArray]:
        """Paired rounds, then focused ones; all layers, and their largest times."""
        for step in range(rounds):
            if not self.settle() or not self.pair_round(step) or (stop is not None and stop()):
                break
        for _ in range(focus):
            if not self.settle() or (stop is not None and stop()):
                break
            self.focus_round()
        self._put_away(np.ones(len(self.layer_A), dtype=bool))
        return self.done, self.done_time

    def settle(self) -> bool:
        """Put layers that are done (or stuck) away; False when none is left."""
        open_A = (self.time.max(axis=1) > self.goal) & ~self.stuck
        if open_A.all():
            return len(open_A) > 0
        self._put_away(~open_A)
        for name in ("layer_A", "expert", "weight", "time", "goal", "stale", "stuck", "held", "barred"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[open_A])
        return bool(open_A.any())

    def _put_away(self, done_A: BoolArray) -> None:
        self.done[self.layer_A[done_A]] = self.expert[done_A]
        self.done_time[self.layer_A[done_A]] = self.time[done_A].max(axis=1)

    def pair_round(self, step: int) -> bool:
        """One swap in each of G // 2 disjoint pairs; False once all layers have tried all pairs in vain."""
        G = self.time.shape[1]
        half = G // 2
        rank = np.argsort(-self.time, axis=1, kind="stable")
        slow = rank[:, :half]
        fast = rank[:, G - 1 - (np.arange(half) + step) % half]
        gained = self._swap(slow, fast)
        self.stale = np.where(gained.any(axis=1), 0, self.stale + 1)
        return bool((self.stale < half).any())

    def focus_round(self) -> None:
        """The best swap between the slowest GPU and any other; a layer without one is stuck."""
        A, G = self.time.shape
        worst = self.time.argmax(axis=1)
        slow = np.repeat(worst[:, None], G, axis=1)
        fast = np.tile(np.arange(G), (A, 1))
        self._swap(slow, fast, only_best=True)

    def _swap(self, slow: IntArray, fast: IntArray, only_best: bool = False) -> BoolArray:
        """Make the best swap of each pair (or of the layer's best pair); returns where there was one."""
        A, P = slow.shape
        C = self.expert.shape[2]
        rows = np.arange(A)[:, None]
        expert_a, expert_b = self.expert[rows, slow], self.expert[rows, fast]
        weight_a, weight_b = self.weight[rows, slow], self.weight[rows, fast]
        time_a, time_b = self.time[rows, slow], self.time[rows, fast]
        inv_a, inv_b = self.inverse_G[slow], self.inverse_G[fast]
        level = (time_a - time_b) / (inv_a + inv_b)  # tokens to shift so that both finish together
        if self.held is not None:
            bar_a = self.held[rows[:, :, None], fast[:, :, None], expert_a]
            bar_b = self.held[rows[:, :, None], slow[:, :, None], expert_b]
        else:
            clash = (expert_a[:, :, :, None] == expert_b[:, :, None, :]) & (expert_a >= 0)[:, :, :, None]
            bar_a, bar_b = clash.any(axis=3), clash.any(axis=2)
        if self.barred is not None:
            bar_a |= self.barred[rows, slow]
            bar_b |= self.barred[rows, fast]
        give = np.where(bar_a, BARRED, weight_a - level[:, :, None])
        take = np.where(bar_b, -BARRED, weight_b)
        miss = give[:, :, :, None] - take[:, :, None, :]
        np.abs(miss, out=miss)
        best = miss.reshape(A, P, C * C).argmin(axis=2)
        i, j = np.divmod(best, C)
        pairs = np.arange(P)
        shift = weight_a[rows, pairs, i] - weight_b[rows, pairs, j]
        new_a, new_b = time_a - shift * inv_a, time_b + shift * inv_b
        later = np.maximum(new_a, new_b)
        later[bar_a[rows, pairs, i] | bar_b[rows, pairs, j]] = np.inf
        gained: BoolArray = later < time_a
        if self.only_late:
            gained &= time_a > self.goal[:, None]
        if only_best:
            pick = later.argmin(axis=1)
            self.stuck = ~gained[np.arange(A), pick]
            gained &= pairs == pick[:, None]
        row, pair = np.nonzero(gained)
        gpu_a, gpu_b = slow[row, pair], fast[row, pair]
        slot_a, slot_b = i[row, pair], j[row, pair]
        out, into = expert_a[row, pair, slot_a], expert_b[row, pair, slot_b]
        self.expert[row, gpu_a, slot_a], self.expert[row, gpu_b, slot_b] = into, out
        self.weight[row, gpu_a, slot_a] = weight_b[row, pair, slot_b]
        self.weight[row, gpu_b, slot_b] = weight_a[row, pair, slot_a]
        self.time[row, gpu_a], self.time[row, gpu_b] = new_a[row, pair], new_b[row, pair]
        if self.held is not None:
            self.held[row, gpu_a, out] = self.held[row, gpu_b, into] = False
            self.held[row, gpu_a, into] = self.held[row, gpu_b, out] = True
            self.held[:, :, -1] = False
        return gained
