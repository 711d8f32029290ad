"""The verifier's part for survival: the probability that a plan claims for the loss of an expert.

By other code than ``failures``: the domains of every expert as a set, of these the ones that hold no other,
and around each all sets of failures that contain it, once each.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from moeless_opt.problems.plan.failures import most_at_once
from moeless_opt.problems.plan.plan import PROVEN, Plan
from moeless_opt.problems.spec import Problem

__all__ = ["survival_violations"]

_NEAR = 1e-6


def survival_violations(problem: Problem, plan: Plan) -> list[str]:
    """Claims on the loss of experts that are not so."""
    told, bound = plan.certificate.loss, plan.certificate.loss_bound
    if told is None:
        return ["the certificate bounds the loss of experts and does not tell it"] if bound else []
    right = _chance(problem, plan)
    if not abs(told - right) <= _NEAR * right:
        return [f"the certificate's probability of a loss is {told:.9g}, that of its slots is {right:.9g}"]
    if not 0 <= bound <= told * (1 + PROVEN):
        return [
            f"the certificate's bound on a loss, {bound:.9g}, is above the plan's own {told:.9g}, or none"
        ]
    return []


def _chance(problem: Problem, plan: Plan) -> float:
    domain_G = problem.topology.failure_domain_G.tolist()
    room_G = problem.capacity_LG.max(0).tolist()
    every = sorted({d for d, room in zip(domain_G, room_G, strict=True) if room > 0})
    on: dict[tuple[int, int], set[int]] = {}
    for layer, gpu, slot in np.argwhere(plan.slots_LGC >= 0).tolist():
        on.setdefault((layer, int(plan.slots_LGC[layer, gpu, slot])), set()).add(domain_G[gpu])
    most = most_at_once(len(every))
    alike = sorted({frozenset(held) for held in on.values() if len(held) <= most}, key=len)
    least: list[frozenset[int]] = []
    for held in alike:
        if not any(inner <= held for inner in least):
            least.append(held)
    lost: set[frozenset[int]] = set()
    for held in least:
        others = [d for d in every if d not in held]
        for more in range(most - len(held) + 1):
            lost.update(held.union(extra) for extra in combinations(others, more))
    rate, count = problem.objective.failure_rate, len(every)
    lost_k = [0] * (most + 1)
    for gone in lost:
        lost_k[len(gone)] += 1
    lost_k += [comb(count, k) for k in range(most + 1, count + 1)]
    return float(sum(n * rate**k * (1 - rate) ** (count - k) for k, n in enumerate(lost_k)))
