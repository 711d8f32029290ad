"""The probability that failures lose an expert: what the priority ``survival`` makes least.

Every failure domain with room for experts fails with a probability of its own, alike and independently
(``Objective.failure_rate``). A set of failed domains loses an expert if it holds all that the expert is on;
the probability that some expert of some layer is lost is the sum over the sets that lose one. Looked at are
all sets up to a size; more failures at once count as a loss.

Axes: F sets of domains, D domains, L layers, X sets that experts are on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from math import comb

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import Problem, held_LGE

__all__ = ["MOST_FAILURES", "FailureSets", "failure_sets", "loss_chance", "lost_sets", "most_at_once"]

MOST_FAILURES = 40_000
"""Sets of failed domains that are looked at, at most (single domains in any case)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureSets:
    """The failures that are looked at.

    Parameters
    ----------
    domain_G : array of int, shape [G]
        Which of the D domains a GPU is in, -1 where it has no room for experts in any layer.
    gone_FD : array of bool, shape [F, D]
        Domains that fail, small sets first.
    chance_F : array, shape [F]
        Probability that just these fail.
    beyond : float
        Probability that more fail than are looked at.
    """

    domain_G: IntArray
    gone_FD: BoolArray
    chance_F: FloatArray
    beyond: float


def most_at_once(domains: int) -> int:
    """Most domains of a set that is looked at: all, or as many as keep the sets within `MOST_FAILURES`."""
    total = 0
    for size in range(1, domains + 1):
        total += comb(domains, size)
        if total > MOST_FAILURES:
            return max(size - 1, 1)
    return domains


def failure_sets(problem: Problem) -> FailureSets:
    """The failures of a problem's domains."""
    topology = problem.topology
    alive_G = problem.usable_LG.any(0)
    domain_G = np.full(topology.gpus, -1, dtype=np.int64)
    used = np.unique(topology.failure_domain_G[alive_G])
    domain_G[alive_G] = np.searchsorted(used, topology.failure_domain_G[alive_G])
    gone_FD, chance_F, beyond = _sets(len(used), problem.objective.failure_rate)
    return FailureSets(domain_G=domain_G, gone_FD=gone_FD, chance_F=chance_F, beyond=beyond)


@lru_cache(maxsize=8)
def _sets(domains: int, rate: float) -> tuple[BoolArray, FloatArray, float]:
    sizes = range(1, most_at_once(domains) + 1)
    members = list(chain.from_iterable(combinations(range(domains), size) for size in sizes))
    gone_FD = np.zeros((len(members), domains), dtype=np.bool_)
    for row, gone in enumerate(members):
        gone_FD[row, list(gone)] = True
    size_F = gone_FD.sum(1)
    chance_F = rate**size_F * (1 - rate) ** (domains - size_F)
    left = (
        comb(domains, k) * rate**k * (1 - rate) ** (domains - k) for k in range(sizes[-1] + 1, domains + 1)
    )
    for array in (gone_FD, chance_F):
        array.setflags(write=False)
    return gone_FD, chance_F, float(sum(left))


def lost_sets(sets: FailureSets, slots_LGC: SlotArray, experts: int) -> BoolArray:
    """Failures that lose an expert of a layer, shape [L, F]."""
    held_LEG = held_LGE(slots_LGC, experts).transpose(0, 2, 1)
    domains = sets.gone_FD.shape[1]
    on_LED = np.stack([held_LEG[:, :, sets.domain_G == d].any(2) for d in range(domains)], axis=-1)
    most = int(sets.gone_FD.sum(1).max())
    stays_FB = np.packbits(~sets.gone_FD, axis=1)
    lost_LF = np.zeros((len(slots_LGC), len(sets.gone_FD)), dtype=np.bool_)
    for layer, on_ED in enumerate(on_LED):
        on_XB = np.packbits(np.unique(on_ED[on_ED.sum(1) <= most], axis=0), axis=1)
        for on_B in on_XB:
            lost_LF[layer] |= ~(stays_FB & on_B).any(1)
    return lost_LF


def loss_chance(problem: Problem, slots_LGC: SlotArray) -> float:
    """Probability that failures lose some expert of some layer."""
    sets = failure_sets(problem)
    lost_F = lost_sets(sets, slots_LGC, problem.experts).any(0)
    return float(sets.chance_F[lost_F].sum()) + sets.beyond
