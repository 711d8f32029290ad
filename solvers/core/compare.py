"""Which of two placements is better by the problem's objective: the one order, and the best of both.

A layer's rank is a list of figures, the first weighs most; smaller is better. A sizing policy that wants few
replicas comes before all: whether its target is met, then how many there are. Then, where something is live
and moves matter, a time within the balance tolerance of the bound is good enough and fewer moves win; the
time itself decides between equals. An order of priorities that is not among the usual ones is followed as it
stands.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray
from moeless_opt.problems.plan import (
    judged,
    loss_chance,
    new_replicas,
    node_traffic,
    order_of,
    source_loads,
    usual_order,
    violations,
)
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core.finish import Built, finish, lower_bound
from moeless_opt.solvers.core.scenarios import perfect_tokens
from moeless_opt.solvers.core.stopping import Clock

__all__ = ["best_of", "better_L", "layer_values", "ranks"]

EQUAL = 1e-9
"""Relative difference below which two figures are the same."""


def layer_values(problem: Problem, built: Built) -> FloatArray:
    """Largest GPU time of each layer, over the scenarios by the objective's risk, shape [L]."""
    built = built.with_shares(problem)
    return judged(problem, built.slots_LGC, built.shares_LGC, built.scenario_share_TLGC).value_L


def ranks(problem: Problem, built: Built) -> list[FloatArray]:
    """Figures of each layer, the weightiest first, each of shape [L]; smaller is better."""
    value_L = layer_values(problem, built)
    held_L = np.count_nonzero(built.slots_LGC >= 0, axis=(1, 2)).astype(np.float64)
    order: list[FloatArray] = []
    if problem.sizing.policy == "makespan":
        order += [
            np.maximum(value_L, problem.sizing.imbalance * problem.time.token_cost * perfect_tokens(problem)),
            held_L,
        ]
    elif problem.sizing.policy == "cv":
        order.append(held_L)
    current = problem.current
    if current is not None and "moves" in problem.objective.priorities:
        enough_L = lower_bound(problem)[0] * (1 + problem.objective.balance_tolerance)
        moved = new_replicas(built.slots_LGC, current.slots_LGC, problem.experts).sum((1, 2))
        order += [np.maximum(value_L, enough_L), np.asarray(moved, dtype=np.float64)]
    order.append(value_L)
    return [*order, held_L] if "memory" in problem.objective.priorities else order


def _in_order(problem: Problem, found: Built, other: Built) -> tuple[list[FloatArray], list[FloatArray]]:
    """Ranks of two by an order of the problem's own; a time in the tolerance of the better one is enough."""
    topology, order = problem.topology, order_of(problem)
    pair: list[list[FloatArray]] = []
    for built in (found, other):
        figures = {
            "balance": layer_values(problem, built),
            "memory": np.count_nonzero(built.slots_LGC >= 0, axis=(1, 2)).astype(np.float64),
            "traffic": node_traffic(
                problem.load_LE, built.slots_LGC, built.shares_LGC, topology.node_G, source_loads(problem)
            ),
        }
        if problem.current is not None:
            new = new_replicas(built.slots_LGC, problem.current.slots_LGC, problem.experts)
            figures["moves"] = new.sum((1, 2)).astype(np.float64)
        if "survival" in order:  # of all layers together
            chance = loss_chance(problem, built.slots_LGC)
            figures["survival"] = np.full(problem.layers, chance / problem.layers)
        pair.append([figures[name] for name in order])
    if "balance" in order[:-1]:
        place = order.index("balance")
        best_L = np.maximum(np.minimum(pair[0][place], pair[1][place]), lower_bound(problem)[0])
        enough_L = best_L * (1 + problem.objective.balance_tolerance)
        for figure in pair:
            figure[place] = np.maximum(figure[place], enough_L)
    return pair[0], pair[1]


def better_L(new: list[FloatArray], old: list[FloatArray]) -> BoolArray:
    """Layers whose new rank comes before the old one, shape [L]."""
    better = np.zeros(len(new[0]), dtype=np.bool_)
    open_L = ~better
    for a_L, b_L in zip(new, old, strict=True):
        better |= open_L & (a_L < b_L - EQUAL * np.abs(b_L))
        open_L &= np.abs(a_L - b_L) <= EQUAL * np.maximum(np.abs(a_L), np.abs(b_L))
    return better


def best_of(problem: Problem, found: Built, other: Built) -> Built:
    """The better of two in every layer where the layers can be mixed, else the better as a whole.

    Both must be valid plans of the problem. Of equals the first stays.
    """
    if usual_order(problem):
        found_rank, other_rank = ranks(problem, found), ranks(problem, other)
    else:
        found_rank, other_rank = _in_order(problem, found, other)
    take_L = better_L(other_rank, found_rank)
    if not take_L.any():
        return found
    apart = problem.limits.max_move_seconds is None and "survival" not in order_of(problem)
    whole = replace(other, bound=other.bound if found.bound is None else found.bound)
    if take_L.all():
        return whole
    if apart and not _broken(problem, mixed := _mixed(found, other, take_L)):
        return mixed
    total = better_L(
        [figure_L.sum(keepdims=True) for figure_L in other_rank],
        [figure_L.sum(keepdims=True) for figure_L in found_rank],
    )
    return whole if total[0] else found


def _broken(problem: Problem, built: Built) -> list[str]:
    plan = finish(problem, built, solver="", began=Clock.begin(), certify=False)
    return violations(problem, plan)


def _mixed(first: Built, second: Built, take_L: BoolArray) -> Built:
    """The layers of `second` where wanted, else those of `first`."""
    wide = max(first.slots_LGC.shape[2], second.slots_LGC.shape[2])
    parts = []
    for built in (first, second):
        room = ((0, 0), (0, 0), (0, wide - built.slots_LGC.shape[2]))
        parts.append((np.pad(built.slots_LGC, room, constant_values=-1), np.pad(built.shares_LGC, room)))
    (slots_LGC, share_LGC), (other_LGC, other_share) = parts
    slots_LGC[take_L], share_LGC[take_L] = other_LGC[take_L], other_share[take_L]
    scenario_share_TLGC = None
    if first.scenario_share_TLGC is not None and second.scenario_share_TLGC is not None:
        scenario_share_TLGC, other_TLGC = (
            np.pad(part, ((0, 0), (0, 0), (0, 0), (0, wide - part.shape[3])))
            for part in (first.scenario_share_TLGC, second.scenario_share_TLGC)
        )
        scenario_share_TLGC[:, take_L] = other_TLGC[:, take_L]
    return Built(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        scenario_share_TLGC=scenario_share_TLGC,
        bound=first.bound,
        stopped_by=first.stopped_by,
        message=first.message,
    )
