"""The split by the nearest replica beside a simulation that sends every source's tokens by its words."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.problems.plan.objective import objective_vector, source_loads
from moeless_opt.problems.plan.verify import violations
from moeless_opt.problems.spec.nearest import nearest_shares, source_parts
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.solvers.core.finish import lower_bound
from moeless_opt.solvers.shares.best import best_shares
from tests.strategies import few, loads, plan_of, random_slots, topologies


def sent(problem: mo.Problem, slots_GC: Any, row: int, load_E: Any, load_NE: Any) -> tuple[Any, Any]:
    """Tokens of every GPU [G], and those that leave their node, as fractions; source GPU by source GPU."""
    node_G = problem.topology.node_G.tolist()
    alive = [g for g, room in enumerate(problem.capacity_LG[row]) if room > 0]
    holders = [{g for g, row_C in enumerate(slots_GC.tolist()) if e in row_C} for e in range(problem.experts)]
    tokens, leave = [Fraction(0)] * len(node_G), Fraction(0)
    for e, load in enumerate(load_E):
        flows: list[tuple[int, int | None, Fraction]] = []  # node, GPU (None: all are dead), tokens
        if load_NE is None or load == 0:
            flows = [(node_G[g], g, Fraction(load) / len(alive)) for g in alive]
        else:
            for node, part in enumerate(load_NE[:, e]):
                own = [g for g in alive if node_G[g] == node]
                flows += [(node, g, Fraction(part) / len(own)) for g in own] or [(node, None, Fraction(part))]
        for node, source, part in flows:
            near = {g for g in holders[e] if node_G[g] == node}
            to = {source} if source in holders[e] else near or holders[e]
            for g in to:
                assert g is not None
                tokens[g] += part / len(to)
            leave += part * sum(node_G[g] != node for g in to if g is not None) / len(to)
    return tokens, leave


@st.composite
def cases(draw: Any, *, scenarios: int = 1) -> tuple[mo.Problem, np.ndarray]:
    topology = draw(topologies())
    experts = draw(st.integers(1, 6))
    dead = draw(st.integers(-1, topology.gpus - 1))
    slots_G = topology.slots_G + (experts + topology.gpus - 1) // topology.gpus
    if dead >= 0 and topology.gpus > 1:
        slots_G = np.where(np.arange(topology.gpus) == dead, 0, slots_G + experts)
    nodes = topology.nodes if draw(st.booleans()) else 0
    traffic = draw(loads(2, experts, max_scenarios=scenarios, nodes=nodes))
    problem = mo.Problem(loads=traffic, topology=topology.replace(slots_G=slots_G), split="nearest")
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return problem, random_slots(rng, problem.capacity_LG, experts)


@few
@given(cases())
def test_loads_and_traffic_are_those_of_the_tokens_sent_one_by_one(case: Any) -> None:
    problem, slots_LGC = case
    plan = plan_of(problem, slots_LGC, best_shares(problem, slots_LGC))
    total = Fraction(0)
    for row in range(problem.layers):
        by_node = problem.loads.load_LNE
        one = None if by_node is None else by_node[row]
        tokens, leave = sent(problem, slots_LGC[row], row, problem.load_LE[row], one)
        total += leave
        times = [float(t) / s for t, s in zip(tokens, problem.topology.speed_G, strict=True)]
        assert plan.time_LG[row] == pytest.approx(times, rel=1e-9, abs=1e-9)
    scale = float(problem.load_LE.sum())
    assert objective_vector(problem, plan)["traffic"] == pytest.approx(float(total), abs=1e-9 * scale)
    assert violations(problem, plan) == []


@few
@given(cases(scenarios=3), st.integers(0, 10**6))
def test_the_verifier_knows_where_tokens_go(case: Any, seed: int) -> None:
    problem, slots_LGC = case
    several = problem.loads.shape[0] > 1 and problem.loads.load_TLNE is not None
    each = None
    if several:
        parts = [problem.source_parts(t) for t in range(problem.loads.shape[0])]
        node_G = problem.topology.node_G
        each = np.array([nearest_shares(slots_LGC, problem.experts, node_G, part) for part in parts])
    share_LGC = best_shares(problem, slots_LGC)
    plan = plan_of(problem, slots_LGC, share_LGC, each)
    assert violations(problem, plan) == []
    twice = np.argwhere(plan.replicas_LE > 1)
    if not len(twice):
        return
    layer, expert = twice[seed % len(twice)]
    first, second = np.argwhere(slots_LGC[layer] == expert)[:2]
    for where in ("expected", "scenario")[: 2 if several else 1]:
        wrong, others = share_LGC.copy(), None if each is None else each.copy()
        part_GC = wrong[layer] if where == "expected" or others is None else others[-1, layer]
        moved = 0.01 if part_GC[tuple(first)] >= 0.5 else -0.01
        part_GC[tuple(first)] -= moved
        part_GC[tuple(second)] += moved
        if part_GC.min() < 0:
            continue
        assert any(
            "nearest" in text for text in violations(problem, plan_of(problem, slots_LGC, wrong, others))
        )
    if several:
        assert "missing" in violations(problem, plan_of(problem, slots_LGC, share_LGC))[0]


@few
@given(cases())
def test_one_node_divides_evenly_and_one_replica_takes_all(case: Any) -> None:
    problem, slots_LGC = case
    share_LGC = best_shares(problem, slots_LGC)
    even_LGC = equal_shares(slots_LGC, problem.experts)
    alone = slots_LGC >= 0
    assert share_LGC.min() >= 0
    assert not share_LGC[~alone].any()
    one_node = problem.topology.replace(node_G=np.zeros(problem.topology.gpus, dtype=int))
    free = problem.loads.replace(load_TLNE=None)
    together = problem.replace(topology=one_node, loads=free)
    assert best_shares(together, slots_LGC) == pytest.approx(even_LGC)
    single = np.take_along_axis(
        np.pad(mo.Placement(slots_LGC=slots_LGC, experts=problem.experts).replicas_LE == 1, ((0, 0), (0, 1))),
        slots_LGC.reshape(len(slots_LGC), -1),
        axis=1,
    ).reshape(slots_LGC.shape)
    assert share_LGC[single & alone] == pytest.approx(1.0)


def test_several_copies_on_a_gpu_are_one_place() -> None:
    slots_LGC = np.array([[[0, 0, 0], [1, -1, -1], [0, 2, -1]]], dtype=np.int32)
    node_G = np.array([0, 0, 1])
    share_LGC = nearest_shares(slots_LGC, 3, node_G, source_parts(node_G, np.ones((1, 3), dtype=bool)))
    assert share_LGC[0, 0] == pytest.approx([2 / 9] * 3)
    assert share_LGC[0, 2] == pytest.approx([1 / 3, 1.0, 0.0])


def test_a_dead_gpu_is_no_source_and_a_node_of_dead_ones_sends_to_all() -> None:
    node_G, alive_LG = np.array([0, 0, 1, 1]), np.array([[True, False, True, True]])
    assert source_parts(node_G, alive_LG)[0, :, 0] == pytest.approx([1 / 3, 2 / 3])
    loads_ = mo.Loads(load_TLE=np.array([[[8.0]]]), load_TLNE=np.array([[[[6.0], [2.0]]]]))
    topology = mo.uniform(2, 2, slots=1).replace(slots_G=[0, 0, 1, 1])
    problem = mo.Problem(loads=loads_, topology=topology, split="nearest")
    plan = mo.solve(problem, "construct").plan
    assert plan is not None
    assert plan.time_LG.tolist() == [[0.0, 0.0, 4.0, 4.0]]
    assert source_loads(problem) is not None


@few
@given(cases())
def test_no_plan_is_below_the_bound(case: Any) -> None:
    problem, slots_LGC = case
    bound_L, _ = lower_bound(problem)
    value_L = plan_of(problem, slots_LGC, best_shares(problem, slots_LGC)).time_LG.max(1)
    assert (bound_L <= value_L * (1 + 1e-9) + 1e-12).all()
