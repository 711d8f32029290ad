"""How many replicas every expert gets within the limits, where every slot may be used."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.limits.rules import Rules
from moeless_opt.solvers.pack import apportion

__all__ = ["apportioned", "budgets", "within_budgets", "within_caps"]


def apportioned(load_LE: FloatArray, rules: list[Rules]) -> IntArray:
    """Replicas by greedy apportionment within the rules, shape [L, E]."""
    experts = load_LE.shape[1]
    room_L = [min(one.total, int(np.minimum(one.capacity_G, experts).sum())) for one in rules]
    most_LE = np.stack([one.most_E for one in rules])
    least_LE = np.stack([one.least_E for one in rules])
    return np.asarray(apportion(load_LE, np.array(room_L), most_LE, least=least_LE), dtype=np.int64)


def budgets(problem: Problem) -> list[tuple[str, int, IntArray]]:
    """Limits on all layers together: name, amount, and what a replica of each layer takes of it."""
    limits = problem.limits
    found = []
    if limits.max_total_replicas is not None:
        ones_L: IntArray = np.ones(problem.layers, dtype=np.int64)
        found.append(("max_total_replicas", limits.max_total_replicas, ones_L))
    if limits.max_total_bytes is not None:
        found.append(("max_total_bytes", limits.max_total_bytes, problem.bytes_L))
    return found


def within_caps(problem: Problem, count_L: IntArray) -> bool:
    """Whether layers of so many replicas keep the limits on all layers together."""
    return all(int(count_L @ cost_L) <= budget for _, budget, cost_L in budgets(problem))


def within_budgets(
    problem: Problem, counts_LE: IntArray, least_LE: IntArray, load_LE: FloatArray
) -> IntArray:
    """Counts with replicas taken back, within the limits on all layers, where that costs least.

    Raises
    ------
    InfeasibleError
        If the least replicas are too many.
    """
    counts_LE = counts_LE.copy()
    for name, budget, cost_L in budgets(problem):
        _trim(counts_LE, least_LE, load_LE, cost_L, budget, name)
    return counts_LE


def _trim(
    counts: IntArray, least_LE: IntArray, load_LE: FloatArray, cost_L: IntArray, budget: int, name: str
) -> None:
    """Take replicas back, in place, where the pieces grow least beside their layer's mean."""
    spent = int(counts.sum(1) @ cost_L)
    if spent <= budget:
        return
    mean_L = np.maximum(load_LE.sum(1, keepdims=True), 1e-300)
    while spent > budget:
        piece = np.where(counts > least_LE, load_LE / mean_L / np.maximum(counts - 1, 1), np.inf)
        layer, expert = np.unravel_index(int(piece.argmin()), piece.shape)
        if not np.isfinite(piece[layer, expert]):
            floor = int(least_LE.sum(1) @ cost_L)
            raise InfeasibleError(
                f"limits.{name}: {budget} is {floor - budget} too few; at least {floor} are needed"
            )
        counts[layer, expert] -= 1
        spent -= int(cost_L[layer])
