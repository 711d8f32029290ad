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
from moeless_opt.problems.spec import Problem, span
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
        gpus, experts, speed_G = problem.topology.gpus, problem.experts, problem.topology.speed_G
        room_G = problem.capacity_LG.min(0)
        pod_G = _pods(problem, room_G)
        pods = int(pod_G.max()) + 1
        size_P = np.bincount(pod_G[pod_G >= 0], minlength=pods)
        room_P = np.array([room_G[pod_G == pod].min() for pod in range(pods)])
        # Even parts: a pod is as fast as its slowest GPU.
        rate_P = size_P * np.array([speed_G[pod_G == pod].min() for pod in range(pods)])
        slots_LGC = np.full((problem.layers, gpus, int(room_P.max())), -1, dtype=np.int32)
        for row, load_E in enumerate(problem.load_LE):
            held_P, time_P = np.zeros(pods, dtype=np.int64), np.zeros(pods)
            for expert in np.argsort(-load_E, kind="stable").tolist():
                key_P = np.where(held_P < room_P, time_P + load_E[expert] / rate_P, np.inf)
                pod = int(key_P.argmin())
                slots_LGC[row, pod_G == pod, held_P[pod]] = expert
                held_P[pod] += 1
                time_P[pod] += load_E[expert] / rate_P[pod]
        if not keeps_limits(problem, slots_LGC).all():
            spread, slots = problem.limits.spread, span(np.unique(room_G).tolist())
            raise InfeasibleError(
                f"limits.spread: pods of {size_P.min()} GPUs, as many as {gpus} GPUs x {slots} slots allow "
                f"for {experts} experts, do not reach {spread} failure domains"
            )
        return Built(slots_LGC=slots_LGC)


def _pods(problem: Problem, room_G: IntArray) -> IntArray:
    """Pod of every GPU, -1 of those without slots: as few pods as hold all experts, shape [G]."""
    experts, used = problem.experts, np.flatnonzero(room_G > 0)
    pod_G = np.full(len(room_G), -1, dtype=np.int64)
    if len(used) == len(room_G) and (room_G == room_G[0]).all():
        pods = -(-experts // int(room_G[0]))
        size = len(room_G) // pods
        order_G = _in_turn(problem, size)
        pod_G[order_G] = np.minimum(np.arange(len(room_G)) // size, pods - 1)
        left = order_G[pods * size :]
        pod_G[left] = np.arange(len(left))  # the first pods have one GPU more
        return pod_G
    # A pod holds what its smallest GPU has slots for: GPUs of like room go together.
    for pods in range(-(-experts // int(room_G.max())), len(used) + 1):
        order = _in_turn(problem, max(len(used) // pods, 1))
        order = order[room_G[order] > 0]
        order = order[np.argsort(-room_G[order], kind="stable")]
        parts = np.array_split(order, pods)
        if sum(int(room_G[part].min()) for part in parts) >= experts:
            break
    for pod, part in enumerate(parts):
        pod_G[part] = pod
    return pod_G


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
