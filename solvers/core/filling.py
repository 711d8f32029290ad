"""Full slots: what to put into those that a plan leaves empty, where the problem wants every slot full.

A last step, for whatever a method built. With free token shares a further replica changes nothing until
somebody gives it a share, so filling never makes a plan slower; without free shares it changes the load of
every GPU that holds the expert, so the candidate that leaves the slowest GPU least loaded is taken. What a
GPU holds already (live, or as a second copy) crosses no link and comes first where it does as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import least_and_most
from moeless_opt.problems.spec import Fill, Problem, equal_shares, without_copies
from moeless_opt.solvers.core.finish import Built
from moeless_opt.solvers.core.placing import widened
from moeless_opt.solvers.core.slack import only_moves

__all__ = ["empty_slots", "filled", "topped_up", "with_plain_live"]

_SAME = 1e-12  # relative: times this close are equal


def with_plain_live(problem: Problem) -> Problem:
    """The problem with the second copies of its live placement dropped, unless its plans may have some."""
    current = problem.current
    if current is None or problem.fill == Fill.COPIES:
        return problem
    plain_LGC = without_copies(current.slots_LGC)
    if plain_LGC is current.slots_LGC:
        return problem
    return problem.replace(current=current.replace(slots_LGC=plain_LGC))


def empty_slots(problem: Problem, slots_LGC: SlotArray) -> IntArray:
    """Slots of each GPU that are not full, shape [L, G]; negative where there is more than fits."""
    return np.asarray(problem.capacity_LG - np.count_nonzero(slots_LGC >= 0, axis=2))


def topped_up(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """A placement with every slot full where the problem's `fill` asks for it."""
    return filled(problem, Built(slots_LGC=slots_LGC)).slots_LGC


def filled(problem: Problem, built: Built) -> Built:
    """What was built, every slot full where the problem's `fill` asks for it."""
    if problem.fill == Fill.NONE:
        return built
    empty_LG = empty_slots(problem, built.slots_LGC)
    if (empty_LG <= 0).all():
        return built
    wide = max(int(problem.capacity_LG.max()), built.slots_LGC.shape[2])
    slots_LGC = widened(built.slots_LGC, wide)
    open_LEG, most_LE = _open(problem)
    for row in np.flatnonzero((empty_LG > 0).any(1)).tolist():
        _Layer(problem, row, slots_LGC[row], open_LEG[row], most_LE[row]).fill(empty_LG[row])
    if problem.split == "equal":
        return replace(built, slots_LGC=slots_LGC, share_LGC=equal_shares(slots_LGC, problem.experts))
    more = wide - built.slots_LGC.shape[2]

    def shares(given: FloatArray) -> FloatArray:
        return np.pad(given, [(0, 0)] * (given.ndim - 1) + [(0, more)])

    each = built.scenario_share_TLGC
    return replace(
        built,
        slots_LGC=slots_LGC,
        share_LGC=shares(built.shares_LGC),
        scenario_share_TLGC=None if each is None else shares(each),
    )


def _open(problem: Problem) -> tuple[BoolArray, IntArray]:
    """Pairs that may be, shape [L, E, G], and replicas that each expert may have, shape [L, E]."""
    limits, shape = problem.limits, (problem.layers, problem.experts)
    if limits == only_moves(limits):
        everywhere_LEG: BoolArray = np.ones((1, 1, 1), dtype=np.bool_)
        gpus = problem.topology.gpus
        return np.broadcast_to(everywhere_LEG, (*shape, gpus)), np.full(shape, np.iinfo(np.int64).max)
    return ~problem.pairs_LEG("forbidden"), least_and_most(problem)[1]


def _counts(slots_GC: SlotArray, experts: int) -> IntArray:
    """Copies of each expert on each GPU, shape [G, E]."""
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in slots_GC])


class _Layer:
    """The slots of one layer while they are filled, in place."""

    def __init__(
        self, problem: Problem, row: int, slots_GC: SlotArray, open_EG: BoolArray, most_E: IntArray
    ) -> None:
        self.open_EG, self.most_E = open_EG, most_E
        self.load_E, self.speed_G = problem.load_LE[row], problem.topology.speed_G
        self.even, self.copies = problem.split != "fractional", problem.fill == Fill.COPIES
        self.near = problem.split == "nearest"
        self.slots_GC, experts = slots_GC, problem.experts
        self.moves_bound = problem.limits.bounds_moves
        self.count_GE = _counts(slots_GC, experts)
        self.live_GE = None if problem.current is None else _counts(problem.current.slots_LGC[row], experts)

    def fill(self, empty_G: IntArray) -> None:
        """Fill so many slots of each GPU, those of the least busy GPU first, as far as limits let it."""
        left_G = np.maximum(empty_G, 0).copy()
        while left_G.any():
            time_G = self._times()
            gpu = int(np.where(left_G > 0, time_G, np.inf).argmin())
            expert = self._choice(gpu, time_G)
            if expert < 0:
                left_G[gpu] = 0
                continue
            self.slots_GC[gpu, int((self.slots_GC[gpu] < 0).argmax())] = expert
            self.count_GE[gpu, expert] += 1
            left_G[gpu] -= 1

    def _times(self) -> FloatArray:
        """Tokens over speed with an even split."""
        share_E = self.load_E / np.maximum(self.count_GE.sum(0), 1)
        return np.asarray((self.count_GE @ share_E) / self.speed_G)

    def _choice(self, gpu: int, time_G: FloatArray) -> int:
        """The expert for a slot of a GPU; -1 if limits leave none."""
        here_E = self.count_GE[gpu] > 0
        fits_E = self.open_EG[:, gpu] & (self.count_GE.sum(0) < self.most_E)
        if not self.copies:
            fits_E &= ~here_E
        if not fits_E.any():
            return -1
        had_E = np.zeros_like(self.load_E) if self.live_GE is None else self.live_GE[gpu]
        comes_E = ~here_E & (had_E == 0)
        count_E = self.count_GE.sum(0)
        if self.near and self.copies and (here_E & fits_E).any():
            # To senders two copies on a GPU are one place: the loads stay as they are.
            return int(
                np.lexsort((np.arange(len(here_E)), had_E <= self.count_GE[gpu], ~(here_E & fits_E)))[0]
            )
        if not self.even:
            # With free shares a second copy is of no use to the loads; it only costs no transfer, and where
            # nothing is live all do. What was here comes back, what was here twice as well.
            again_E = np.where(had_E > self.count_GE[gpu], 1, 2 if self.live_GE is not None else 4)
            cost_E = np.where(comes_E, 3, np.where(here_E, again_E, 0))
            piece_E = self.load_E / np.maximum(count_E, 1)
            return int(np.lexsort((np.arange(len(here_E)), -piece_E, cost_E, ~fits_E))[0])
        after_EG = (self.count_GE.T * (self.load_E / np.maximum(count_E + 1, 1))[:, None]) - (
            self.count_GE.T * (self.load_E / np.maximum(count_E, 1))[:, None]
        )
        after_EG[:, gpu] += self.load_E / (count_E + 1)
        after_EG = time_G + after_EG / self.speed_G
        top_E = after_EG.max(1)
        now = float(time_G.max())
        rises_E = np.where(top_E <= now * (1 + _SAME), now, top_E)
        costs_E, rest_E = (rises_E, comes_E) if self.moves_bound else (comes_E, rises_E)
        keys = (np.arange(len(here_E)), (after_EG**2).sum(1), costs_E, rest_E, ~fits_E)
        return int(np.lexsort(keys)[0])
