"""Placements that failures seldom break: experts share all of their GPUs with others, as in Lazarus.

A set of failed domains loses an expert if it holds all that the expert is on; so the fewer different such
sets there are, the better. Pods of GPUs in different domains each hold the same experts, one replica on
every GPU of the pod: with p pods there are p sets, the fewest there can be ("maximum rank overlap"). Pods
of n GPUs reach n domains, and domains are paired up so that pods share their sets too. Experts go to
pods, heaviest first, where they leave the largest time least; within a pod an even split is balanced
whatever the loads.

References
----------
Wu et al., "Lazarus: Resilient and Elastic Training of Mixture-of-Experts Models with Adaptive Expert
Placement" (2024), arXiv 2407.04656. There the numbers of replicas follow the loads; here the pods do, by
what they hold.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import Built, Heuristic, NoOptions, Task, keeps_limits

__all__ = ["Lazarus"]


class Lazarus(Heuristic):
    """Pods of GPUs that hold the same experts: few sets of failures lose any."""

    name = "lazarus"
    summary = (
        "pods of GPUs in different domains that hold the same experts: failures seldom lose one (Lazarus)"
    )

    def build(self, task: Task[NoOptions]) -> Built:
        """As many GPUs to a pod as the slots allow."""
        problem = task.problem
        gpus, experts = problem.topology.gpus, problem.experts
        slots = int(problem.capacity_LG.min())
        pods = -(-experts // slots)
        order_G = _in_turn(problem, gpus // pods)
        pod_G = np.empty(gpus, dtype=np.int64)
        pod_G[order_G] = np.minimum(np.arange(gpus) // (gpus // pods), pods - 1)
        left = order_G[pods * (gpus // pods) :]
        pod_G[left] = np.arange(len(left))  # the first pods have one GPU more
        size_P = np.bincount(pod_G, minlength=pods)
        slots_LGC = np.full((problem.layers, gpus, slots), -1, dtype=np.int32)
        for row, load_E in enumerate(problem.load_LE):
            held_P, time_P = np.zeros(pods, dtype=np.int64), np.zeros(pods)
            for expert in np.argsort(-load_E, kind="stable").tolist():
                key_P = np.where(held_P < slots, time_P + load_E[expert] / size_P, np.inf)
                pod = int(key_P.argmin())
                slots_LGC[row, pod_G == pod, held_P[pod]] = expert
                held_P[pod] += 1
                time_P[pod] += load_E[expert] / size_P[pod]
        if not keeps_limits(problem, slots_LGC).all():
            spread = problem.limits.spread
            raise InfeasibleError(
                f"limits.spread: pods of {size_P.min()} GPUs, as many as {gpus} GPUs x {slots} slots allow "
                f"for {experts} experts, do not reach {spread} failure domains"
            )
        return Built(slots_LGC=slots_LGC)


def _in_turn(problem: Problem, size: int) -> IntArray:
    """GPUs so that each pod of `size` in a row is of different domains, and pods share them: [G]."""
    domain_G = np.unique(problem.topology.failure_domain_G, return_inverse=True)[1].reshape(-1)
    rank_G = np.zeros(len(domain_G), dtype=np.int64)  # which of its domain
    domains = int(domain_G.max()) + 1
    for domain in range(domains):
        own = np.flatnonzero(domain_G == domain)
        rank_G[own] = np.arange(len(own))
    block_G = domain_G // size if domains % size == 0 else np.zeros_like(domain_G)
    return np.lexsort((domain_G, rank_G, block_G))
