"""The token shares of a placement, as a problem wants them: even, by source, free, or free and near it."""

from __future__ import annotations

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.spec import Problem, equal_shares, nearest_shares
from moeless_opt.solvers.shares.flow import solve_shares

__all__ = ["best_shares"]


def best_shares(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
    """Shares of the expected loads on a placement, shape [L, G, C].

    With an equal split they are even, with one by the nearest replica what goes there. With a fractional one
    they make the largest GPU time least; where the loads are known by source node and traffic counts, they
    then keep as many tokens on their node as the balance tolerance allows (without a tolerance left, as the
    least largest time allows).
    """
    if problem.split == "equal":
        return equal_shares(slots_LGC, problem.experts)
    if problem.split == "nearest":
        return nearest_shares(slots_LGC, problem.experts, problem.topology.node_G, problem.source_parts())
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    by_node = problem.loads.load_LNE
    if by_node is None or "traffic" not in problem.objective.priorities or problem.topology.nodes == 1:
        return solve_shares(load_LE, slots_LGC, speed_G).share_LGC
    from moeless_opt.solvers.shares.source import pooled_shares, solve_source_shares

    # A re-plan has spent its tolerance on moves already.
    slack = problem.objective.balance_tolerance if problem.current is None else 0.0
    found = solve_source_shares(by_node, slots_LGC, problem.topology.node_G, speed_G, slack=max(slack, 1e-9))
    return pooled_shares(found.share_LNGC, by_node, slots_LGC)
