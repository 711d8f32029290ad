"""Tokens between GPUs: trees, matrices and graphs, flows, and what the verifier makes of claims."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.plan import (
    cost_levels,
    hop_sources,
    levels_of,
    link_costs,
    objective_vector,
    source_tokens,
    token_flows,
    traffic_L,
    tree_below,
)
from moeless_opt.problems.plan.verify_locality import _cost, _sent


def random_shares(rng: np.random.Generator, layers: int, gpus: int, experts: int) -> FloatArray:
    held = rng.random((layers, gpus, experts)) * (rng.random((layers, gpus, experts)) < 0.5)
    held[:, 0] += 0.01
    return np.asarray(held / held.sum(1, keepdims=True))


def tree(rng: np.random.Generator) -> mo.Topology:
    return mo.uniform(3, 2, slots=8).with_levels(
        [("gpu", rng.choice([0.1, 0.5])), ("node", 1.0), ([0, 0, 0, 0, 1, 1], rng.choice([1.5, 4.0]))]
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["nodes", "tree", "matrix"])
def test_costs_are_those_of_a_transport_problem(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    topology = mo.uniform(3, 2, slots=8) if kind == "nodes" else tree(rng)
    if kind == "matrix":
        topology = topology.with_costs(np.where(np.eye(6), 0, rng.random((6, 6))))
    load = rng.integers(0, 50, (2, 5)).astype(float)
    problem = mo.Problem(loads=mo.Loads(load_TLE=load), topology=topology)
    assert (cost_levels(problem) is None) == (kind == "matrix")
    share = random_shares(rng, 2, 6, 5)
    source = rng.dirichlet(np.ones(6), (2, 5)).transpose(0, 2, 1) * load[:, None]
    served = share * load[:, None]
    np.testing.assert_allclose(
        link_costs(problem, source, served), _cost(problem, source, served), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("seed", range(3))
def test_flows_add_up_and_cost_what_the_traffic_says(seed: int, split: str) -> None:
    rng = np.random.default_rng(seed)
    topology = (mo.uniform(3, 2, slots=8), tree(rng), mo.uniform(2, 3, slots=8))[seed]
    by_gpu = rng.random((1, 2, 6, 5)) * 10
    loads = mo.Loads(load_TLE=by_gpu.sum(2), load_TLGE=by_gpu)
    problem = mo.Problem(loads=loads, topology=topology, split=split)
    plan = mo.solve(problem.replace(objective=mo.Objective(priorities=("balance",))), "construct").plan
    assert plan is not None
    flow = token_flows(problem, plan.slots_LGC, plan.share_LGC)
    np.testing.assert_allclose(flow.sum(2), source_tokens(problem).sum(2), rtol=1e-9)
    if split != "nearest":  # within a node, that rule counts its tokens as evenly spread
        served = (plan.share_LGE * problem.load_LE[:, None]).sum(2)
        np.testing.assert_allclose(flow.sum(1), served, rtol=1e-9)
    cost_GG = topology.cost_GG
    if cost_GG is None:
        cost_GG = (topology.node_G[:, None] != topology.node_G) * 1.0
    np.testing.assert_allclose(
        (flow * cost_GG).sum((1, 2)), traffic_L(problem, plan.slots_LGC, plan.share_LGC), rtol=1e-6, atol=1e-9
    )
    if split == "nearest" and topology.cost_GG is not None:
        share_LEG = plan.share_LGE.transpose(0, 2, 1)
        np.testing.assert_allclose(
            _sent(problem, share_LEG, source_tokens(problem)), (flow * cost_GG).sum((1, 2)), rtol=1e-9
        )


def test_levels_matrix_and_graph_are_the_same_costs() -> None:
    levels = mo.uniform(2, 2, slots=2).with_levels([("gpu", 2.0), ("node", 6.0)])
    graph = nx.Graph()
    for g, node in enumerate(levels.node_G.tolist()):
        graph.add_edge(("gpu", g), ("switch", node), cost=1)
        graph.add_edge(("switch", node), "spine", cost=2)
    assert levels.cost_GG is not None
    np.testing.assert_array_equal(levels.with_costs(graph).cost_GG, levels.cost_GG)
    assert levels.with_costs(levels.cost_GG) == levels
    found = levels_of(levels.cost_GG)
    assert found is not None
    assert [level.cost for level in found] == [2.0, 4.0]
    assert mo.Topology.from_dict(levels.to_dict()) == levels
    assert levels.without([0]).cost_GG is not None


def test_a_tree_below_is_a_tree_and_below() -> None:
    cost = np.random.default_rng(1).random((7, 7))
    np.fill_diagonal(cost, 0)
    low = tree_below(cost)
    assert (low <= cost + 1e-15).all()
    assert levels_of(low) is not None
    assert (tree_below(low) == low).all()


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([[0, 1]], r"topology.cost: has shape \(1, 2\), must be \(4, 4\)"),
        (np.ones((4, 4)), r"topology.cost\[0\]\[0\]: is 1, must be 0"),
        (-np.ones((4, 4)), r"topology.cost\[0\]\[0\]: is -1"),
        (nx.path_graph(3), r"graph without a vertex \('gpu', 3\) or 3"),
        (nx.Graph([(0, 1), (2, 3)]), "no path from GPU 0 to GPU 2"),
    ],
)
def test_bad_costs(costs: object, message: str) -> None:
    with pytest.raises(mo.ProblemError, match=message):
        mo.uniform(2, 2, slots=2).with_costs(costs)  # type: ignore[arg-type]


def test_bad_levels() -> None:
    topology = mo.uniform(2, 2, slots=2)
    with pytest.raises(mo.ProblemError, match=r"levels\[0\]: is of 'rack', must be of 'gpu', 'node'"):
        topology.with_levels([("rack", 1)])
    with pytest.raises(mo.ProblemError, match=r"levels\[1\].group: has shape \(2,\)"):
        topology.with_levels([("gpu", 1), ([0, 1], 2)])
    with pytest.raises(mo.ProblemError, match=r"levels\[0\].cost: is -1"):
        topology.with_levels([("gpu", -1)])


def test_hops_by_hand() -> None:
    """All tokens take expert 0 and then 1; half of expert 0's are served beside expert 1."""
    flow = np.zeros((1, 2, 2))
    flow[0, 0, 1] = 8
    share = np.array([[[0.5, 0.0], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    come, serve = hop_sources(flow, share)
    assert come[1, :, 1].tolist() == [4, 4]
    assert serve[1, :, 1].tolist() == [0, 8]
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((2, 2)), flow_LEE=flow), topology=mo.uniform(2, 1, slots=2)
    )
    assert link_costs(problem, come, serve).tolist() == [0, 4]


def test_claims_on_locality_are_checked() -> None:
    rng = np.random.default_rng(0)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=rng.random((2, 8)), flow_LEE=rng.random((1, 8, 8))),
        topology=mo.uniform(2, 2, slots=3),
        split="equal",
        groups=mo.Groups.even(8, 4, 0.5),
        objective=mo.Objective(priorities=("balance", "traffic", "hops")),
    )
    plan = mo.solve(problem, effort="quick").plan
    assert plan is not None
    told = plan.locality
    assert told is not None
    assert told.hops_L is not None
    assert told.outside_L is not None
    for name, changed in (
        ("traffic", told.replace(traffic_L=told.traffic_L * 0.9)),
        ("hops", told.replace(hops_L=told.hops_L + 1)),
        ("outside", told.replace(outside_L=told.outside_L + 1)),
        ("bound on traffic", told.replace(traffic_bound_L=told.traffic_L * 2)),
        ("hops where the problem has none, or lacks", told.replace(hops_L=None, hops_bound_L=None)),
    ):
        found = mo.violations(problem, plan.replace(locality=changed))
        assert len(found) == 1, name
        assert name in found[0]
    strict = problem.replace(groups=mo.Groups.even(8, 4, 0.01))
    found = mo.violations(strict, plan)
    assert any("served outside their group's node, at most 1.0000% may be" in text for text in found)
    vector = objective_vector(problem, plan)
    assert vector["hops"] == pytest.approx(told.hops_L.sum())


def test_loads_by_gpu_are_folded_by_node() -> None:
    by_gpu = np.arange(24.0).reshape(1, 1, 4, 6)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=by_gpu.sum(2), load_TLGE=by_gpu), topology=mo.uniform(2, 2, slots=3)
    )
    assert problem.loads.load_LNE is not None
    np.testing.assert_array_equal(problem.loads.load_LNE[0, 0], by_gpu[0, 0, :2].sum(0))
    with pytest.raises(mo.ProblemError, match=r"loads.by_gpu: has 4 GPUs, the topology has 3"):
        mo.Problem(
            loads=mo.Loads(load_TLE=by_gpu.sum(2), load_TLGE=by_gpu), topology=mo.uniform(1, 3, slots=3)
        )
    with pytest.raises(mo.ProblemError, match=r"loads.by_gpu: does not sum"):
        mo.Loads(load_TLE=by_gpu.sum(2) + 1, load_TLGE=by_gpu)
    with pytest.raises(mo.ProblemError, match=r"loads.flow: has shape \(2, 6, 6\), must be \[0, 6, 6\]"):
        mo.Loads(load_TLE=by_gpu.sum(2), flow_LEE=np.ones((2, 6, 6)))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([0, 2], "groups.group: must be numbered from 0 without gaps; 1 has no expert"),
        ([[0]], "groups.group: has shape"),
        ([-1, 0], r"groups.group\[0\]: is -1"),
    ],
)
def test_bad_groups(group: object, message: str) -> None:
    with pytest.raises(mo.ProblemError, match=message):
        mo.Groups(group_E=group)  # type: ignore[arg-type]


def test_bad_even_groups() -> None:
    with pytest.raises(mo.ProblemError, match=r"groups\.count: is 3, must divide the 8 experts"):
        mo.Groups.even(8, 3)
    with pytest.raises(mo.ProblemError, match=r"groups\.max_outside: is 1.5"):
        mo.Groups.even(8, 2, 1.5)
    loads = mo.Loads(load_TLE=np.ones((1, 4)))
    with pytest.raises(mo.ProblemError, match=r"groups\.group: is for 8 experts, the loads have 4"):
        mo.Problem(loads=loads, topology=mo.uniform(2, 1, slots=2), groups=mo.Groups.even(8, 2))
    with pytest.raises(mo.ProblemError, match=r"loads\.flow: is missing: the priorities name 'hops'"):
        mo.Problem(
            loads=loads, topology=mo.uniform(2, 1, slots=2), objective=mo.Objective(priorities=("hops",))
        )


def test_what_one_more_gpu_would_buy_is_told_with_costs_and_sources_by_gpu() -> None:
    by_gpu = np.random.default_rng(0).random((1, 1, 4, 6))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=by_gpu.sum(2), load_TLGE=by_gpu),
        topology=mo.uniform(2, 2, slots=2).with_levels([("gpu", 0.5), ("node", 1)]),
        objective=mo.Objective(priorities=("balance",)),
    )
    plan = mo.solve(problem).plan
    assert plan is not None
    assert "one more" in str(mo.explain(plan))
