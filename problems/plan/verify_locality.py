"""The verifier's part for locality: groups that are kept on a node, and what a plan claims of its traffic.

By other code than ``links``: tokens are gathered expert by expert from the problem and the plan's slots; a
tree of costs is followed threshold by threshold, and other costs are settled by a linear programme.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.plan.plan import PROVEN, Plan
from moeless_opt.problems.spec import Problem

__all__ = ["locality_violations"]

_NEAR = 1e-6


def locality_violations(problem: Problem, plan: Plan) -> list[str]:
    """Rules on groups that the plan breaks, and claims on its locality that are not so."""
    if problem.groups is None and plan.locality is None:
        return []
    share_LEG = _by_expert(problem, plan, plan.share_LGC)
    found = [] if problem.groups is None else _groups(problem, plan, share_LEG)
    return found if plan.locality is None else [*found, *_claims(problem, plan, share_LEG)]


def _by_expert(problem: Problem, plan: Plan, share_LGC: FloatArray) -> FloatArray:
    share_LEG = np.zeros((problem.layers, problem.experts, problem.topology.gpus))
    for layer, gpu, slot in np.argwhere(plan.slots_LGC >= 0):
        share_LEG[layer, plan.slots_LGC[layer, gpu, slot], gpu] += share_LGC[layer, gpu, slot]
    return share_LEG


def _served(problem: Problem, share_LEG: FloatArray, load_LE: FloatArray) -> FloatArray:
    """Tokens of each group that each node serves, shape [L, K, N]."""
    groups, node_G = problem.groups, problem.topology.node_G
    assert groups is not None
    table_LKN = np.zeros((problem.layers, groups.count, problem.topology.nodes))
    for layer, expert, gpu in np.argwhere(share_LEG > 0):
        tokens = share_LEG[layer, expert, gpu] * load_LE[layer, expert]
        table_LKN[layer, groups.group_E[expert], node_G[gpu]] += tokens
    return table_LKN


def _outside(problem: Problem, share_LEG: FloatArray) -> FloatArray:
    """Tokens served outside their group's home, shape [L]."""
    table_LKN = _served(problem, share_LEG, problem.load_LE)
    return np.asarray((table_LKN.sum(2) - table_LKN.max(2)).sum(1))


def _groups(problem: Problem, plan: Plan, share_LEG: FloatArray) -> list[str]:
    """Layers that serve too much elsewhere; with shares by scenario, by these, around one home."""
    assert problem.groups is not None
    most = problem.groups.max_outside
    if most >= 1:
        return []
    total_L, outside_L = problem.load_LE.sum(1), _outside(problem, share_LEG)
    if plan.scenario_share_TLGC is not None:
        load_TLE, weight_T = problem.loads.load_TLE, problem.loads.weight_T
        weight_T = np.full(len(load_TLE), 1 / len(load_TLE)) if weight_T is None else weight_T
        table_LKN = np.zeros((problem.layers, problem.groups.count, problem.topology.nodes))
        for weight, load_LE, share_LGC in zip(weight_T, load_TLE, plan.scenario_share_TLGC, strict=True):
            table_LKN += weight * _served(problem, _by_expert(problem, plan, share_LGC), load_LE)
        outside_L = np.maximum(outside_L, (table_LKN.sum(2) - table_LKN.max(2)).sum(1))
    over = np.flatnonzero(outside_L > total_L * (most + _NEAR))
    return [
        f"layer {problem.loads.layers[x]}: {outside_L[x] / total_L[x]:.4%} of the tokens are served outside "
        f"their group's node, at most {most:.4%} may be"
        for x in over[:5]
    ]


def _claims(problem: Problem, plan: Plan, share_LEG: FloatArray) -> list[str]:
    told, load_LE = plan.locality, problem.load_LE
    assert told is not None
    source_LSE = _sources(problem)
    if problem.split == "nearest" and problem.topology.cost_GG is not None:
        right = {"traffic": _sent(problem, share_LEG, source_LSE)}
    else:
        right = {"traffic": _cost(problem, source_LSE, (share_LEG * load_LE[:, :, None]).transpose(0, 2, 1))}
    if problem.groups is not None:
        right["outside"] = _outside(problem, share_LEG)
    flow_LEE = problem.loads.flow_LEE
    if flow_LEE is not None:
        from_LGE, to_LGE = np.zeros_like(source_LSE), np.zeros_like(source_LSE)
        for x, flow_EE in enumerate(flow_LEE, start=1):
            from_LGE[x] = np.einsum("eg,ef->gf", share_LEG[x - 1], flow_EE)
            to_LGE[x] = np.einsum("fg,ef->gf", share_LEG[x], flow_EE)
        right["hops"] = _cost(problem, from_LGE, to_LGE)
    found = []
    dearest = 1.0 if problem.topology.cost_GG is None else float(problem.topology.cost_GG.max())
    for name in ("traffic", "outside", "hops"):
        value_L, bound_L = getattr(told, f"{name}_L"), getattr(told, f"{name}_bound_L")
        if (value_L is None) != (name not in right) or (value_L is None) != (bound_L is None):
            found.append(f"the plan's locality has {name} where the problem has none, or lacks it")
            continue
        if value_L is None:
            continue
        scale_L = load_LE.sum(1) * max(dearest, 1.0)
        if name == "hops" and flow_LEE is not None:
            scale_L = np.concatenate([[0.0], flow_LEE.sum((1, 2))]) * max(dearest, 1.0)
        if value_L.shape != scale_L.shape or bound_L.shape != scale_L.shape:
            found.append(f"the plan's locality does not cover {name} in every layer")
        elif (~(np.abs(value_L - right[name]) <= _NEAR * scale_L)).any():
            found.append(f"the plan's {name} is not that of its shares")
        elif not (bound_L >= 0).all() or (bound_L > value_L * (1 + PROVEN) + PROVEN * scale_L).any():
            found.append(f"a bound on {name} is above the plan's own value, or no number of at least 0")
    return found


def _sources(problem: Problem) -> FloatArray:
    """Tokens by source GPU, layer by layer, shape [L, G, E]."""
    topology, loads = problem.topology, problem.loads
    if loads.load_LGE is not None:
        return loads.load_LGE
    source_LGE = np.zeros((problem.layers, topology.gpus, problem.experts))
    by_node = loads.load_LNE
    for x in range(problem.layers):
        alive_G = problem.capacity_LG[x] > 0
        for node in range(topology.nodes):
            inside_G = topology.node_G == node
            senders_G = inside_G & alive_G if (inside_G & alive_G).any() else inside_G
            tokens_E = problem.load_LE[x] / topology.nodes
            if by_node is not None:
                tokens_E = by_node[x, node]
            if problem.split == "nearest":
                even_E = problem.load_LE[x] * (inside_G & alive_G).sum() / max(alive_G.sum(), 1)
                tokens_E = even_E if by_node is None else np.where(by_node[x].sum(0) > 0, tokens_E, 0.0)
            source_LGE[x, senders_G] = tokens_E / senders_G.sum()
    return source_LGE


def _cost(problem: Problem, from_LGE: FloatArray, to_LGE: FloatArray) -> FloatArray:
    """Least cost of bringing tokens from GPUs to GPUs, shape [L]."""
    topology = problem.topology
    cost_GG = topology.cost_GG
    if cost_GG is None:
        cost_GG = (topology.node_G[:, None] != topology.node_G).astype(np.float64)
    step_GG = np.minimum(cost_GG, cost_GG.T)
    for middle in range(len(step_GG)):
        step_GG = np.minimum(step_GG, np.maximum(step_GG[:, [middle]], step_GG[[middle], :]))
    if not np.allclose(step_GG, cost_GG, rtol=1e-12, atol=0):
        pairs = zip(from_LGE, to_LGE, strict=True)
        return np.array([_programme(cost_GG, source_GE, served_GE) for source_GE, served_GE in pairs])
    total_L, paid = np.zeros(len(from_LGE)), 0.0
    for price in sorted({float(c) for c in cost_GG.ravel()} - {0.0}):
        # A token pays this step if it ends on a GPU at this price or a dearer one.
        together = {tuple(np.flatnonzero(row < price)) for row in cost_GG}
        for members in together:
            kept = np.minimum(from_LGE[:, members].sum(1), to_LGE[:, members].sum(1))
            total_L += (price - paid) * (from_LGE[:, members].sum(1) - kept).sum(1)
        paid = price
    return total_L


def _programme(cost_GG: FloatArray, source_GE: FloatArray, served_GE: FloatArray) -> float:
    """The same for any costs and one layer: an expert on one GPU has no choice, others are a programme."""
    from ortools.linear_solver import pywraplp

    total = 0.0
    for e in range(source_GE.shape[1]):
        targets, sources = np.flatnonzero(served_GE[:, e] > 0), np.flatnonzero(source_GE[:, e] > 0)
        if not len(targets) or not len(sources):
            continue
        if len(targets) == 1:
            total += float(source_GE[:, e] @ cost_GG[:, targets[0]])
            continue
        solver = pywraplp.Solver.CreateSolver("GLOP")
        scale = float(source_GE[:, e].sum())
        room = served_GE[targets, e] / served_GE[targets, e].sum()
        sent = {(s, g): solver.NumVar(0, 1, "") for s in range(len(sources)) for g in range(len(targets))}
        for s, source in enumerate(sources):
            solver.Add(sum(sent[s, g] for g in range(len(targets))) == source_GE[source, e] / scale)
        for g in range(len(targets)):
            solver.Add(sum(sent[s, g] for s in range(len(sources))) <= float(room[g]) + 1e-9)
        solver.Minimize(sum(float(cost_GG[sources[s], targets[g]]) * flow for (s, g), flow in sent.items()))
        if solver.Solve() != pywraplp.Solver.OPTIMAL:
            return float("nan")
        total += solver.Objective().Value() * scale
    return total


def _sent(problem: Problem, share_LEG: FloatArray, source_LSE: FloatArray) -> FloatArray:
    """Cost of the tokens that go to the nearest replica, source by source, shape [L]."""
    cost_GG, node_G = problem.topology.cost_GG, problem.topology.node_G
    assert cost_GG is not None
    total_L = np.zeros(problem.layers)
    for x, source in np.argwhere(source_LSE.sum(2) > 0):
        for expert in np.flatnonzero(source_LSE[x, source] > 0):
            hosts = np.flatnonzero(share_LEG[x, expert] > 0)
            near = hosts[node_G[hosts] == node_G[source]]
            if source in hosts:
                continue
            goal = near if len(near) else hosts
            total_L[x] += source_LSE[x, source, expert] * cost_GG[source, goal].mean()
    return total_L
