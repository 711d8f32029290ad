"""The probability that no expert is lost when failure domains fail.

An expert is lost when all domains that hold it fail together. Which k domains fail at once is taken as
equally likely (Lazarus' measure), for k = 1, 2, ...; with a probability for each domain to fail by
itself, the numbers combine to the probability that nothing is lost.

References
----------
Wu et al., "Lazarus: Resilient and Elastic Training of Mixture-of-Experts Models with Adaptive Expert
Placement" (2024), arXiv 2407.04656.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import IntArray, Record, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import held_LGE

__all__ = ["Survival", "survival_of"]

MOST_SETS = 20_000
"""Sets of failed domains that are looked at one by one; of more, as many are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Survival(Record):
    """How likely it is that every expert of every layer keeps a replica.

    Parameters
    ----------
    domains : int
        Failure domains that hold anything.
    chance_K : tuple of float
        If k = 1, 2, ... of them fail at once, each set of k as likely as any other.
    exact_K : tuple of bool
        Whether all sets of k were looked at; else 20,000 drawn ones.
    alone : int
        Experts, over all layers, that are in one domain only.
    """

    domains: int
    chance_K: tuple[float, ...]
    exact_K: tuple[bool, ...]
    alone: int

    def given(self, probability: float) -> float:
        """At least so likely is it that nothing is lost, if each domain fails alone with a probability.

        More domains at once than were looked at count as a loss.
        """
        p = number("probability", probability)
        if p > 1:
            raise ProblemError("probability", f"is {probability}, must be at most 1")
        chances = (1.0, *self.chance_K)
        parts = [
            comb(self.domains, k) * p**k * (1 - p) ** (self.domains - k) * chance
            for k, chance in enumerate(chances)
        ]
        return float(sum(parts))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "domains": self.domains,
            "chance": list(self.chance_K),
            "exact": list(self.exact_K),
            "experts_in_one_domain": self.alone,
        }

    def __str__(self) -> str:
        told = ", ".join(
            f"{k}: {'' if exact else 'about '}{chance:.4g}"
            for k, (chance, exact) in enumerate(zip(self.chance_K, self.exact_K, strict=True), 1)
        )
        return (
            f"chance that no expert is lost, by how many of {self.domains} failure domains fail at once: "
            f"{told} ({self.alone} experts are in one domain only)"
        )


def survival_of(
    slots_LGC: SlotArray, experts: int, domain_G: IntArray, *, failures: int = 3, seed: int = 0
) -> Survival:
    """The probability that no expert is lost when 1 to `failures` domains fail at once.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The placement.
    experts : int
        Experts per layer.
    domain_G : array of int, shape [G]
        Failure domain of each GPU; those that hold nothing do not count.
    failures : int
        Most domains that fail at once.
    seed : int
        Of the sets that are drawn where there are too many.
    """
    held_LEG = held_LGE(slots_LGC, experts).transpose(0, 2, 1)
    used = np.unique(domain_G[held_LEG.any((0, 1))])
    domains = len(used)
    most = min(whole("failures", failures, low=1), max(domains, 1))
    in_XD = np.stack([held_LEG[:, :, domain_G == domain].any(2) for domain in used], axis=-1)
    sets_XD, times_X = np.unique(in_XD.reshape(-1, domains), return_counts=True, axis=0)
    few = sets_XD.sum(1)
    rng = np.random.default_rng(seed)
    chances, exact = [], []
    for k in range(1, most + 1):
        every = comb(domains, k) <= MOST_SETS
        if every:
            gone = np.array(list(combinations(range(domains), k)))
        else:
            gone = rng.random((MOST_SETS, domains)).argsort(1)[:, :k]
        gone_FD = np.zeros((len(gone), domains), dtype=np.float32)
        np.put_along_axis(gone_FD, gone, 1.0, axis=1)
        # Only experts in at most k domains can be lost: those of which all domains are gone.
        near_XD, need_X = sets_XD[few <= k], few[few <= k]
        lost_F = np.zeros(len(gone), dtype=np.bool_)
        for begin in range(0, len(near_XD), 512):
            part = slice(begin, begin + 512)
            lost_F |= (gone_FD @ near_XD[part].T.astype(np.float32) >= need_X[part] - 0.5).any(1)
        chances.append(float(1 - lost_F.mean()))
        exact.append(every)
    return Survival(
        domains=domains,
        chance_K=tuple(chances),
        exact_K=tuple(exact),
        alone=int(times_X[few == 1].sum()),
    )
