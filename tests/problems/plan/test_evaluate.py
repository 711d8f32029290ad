"""The evaluation against pure-Python oracles, one token count at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.evaluate import (
    activated,
    even_pieces,
    even_times,
    gpu_times,
    gpu_tokens,
    imbalance,
    move_seconds,
    new_replicas,
    node_traffic,
    slot_sums,
)
from moeless_opt.problems.plan.objective import judged, objective_vector, risk
from moeless_opt.problems.plan.plan import count_moves
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.topology import uniform
from moeless_opt.problems.spec.wishes import Objective
from tests.strategies import few, plan_of, planned, random_shares, random_slots, slow_time


def slow_tokens(load_LE: Any, plan: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Tokens and activated replicas of every GPU, replica by replica."""
    layers, gpus, slots = plan.slots_LGC.shape
    tokens = [[0.0] * gpus for _ in range(layers)]
    active = [[0] * gpus for _ in range(layers)]
    for x, g, c in itertools.product(range(layers), range(gpus), range(slots)):
        e = int(plan.slots_LGC[x, g, c])
        if e >= 0:
            served = float(load_LE[x, e]) * float(plan.share_LGC[x, g, c])
            tokens[x][g] += served
            active[x][g] += served > 0
    return tokens, active


def slow_times(problem: Problem, load_LE: Any, plan: Any) -> np.ndarray:
    tokens, active = slow_tokens(load_LE, plan)
    speed_G = problem.topology.speed_G
    return np.array(
        [
            [slow_time(problem.time, t, a, s) for t, a, s in zip(ts, acts, speed_G, strict=True)]
            for ts, acts in zip(tokens, active, strict=True)
        ]
    )


@few
@given(planned())
def test_tokens_and_times(drawn: Any) -> None:
    problem, plan = drawn
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    tokens, active = slow_tokens(load_LE, plan)
    args = (load_LE, plan.slots_LGC, plan.share_LGC)
    np.testing.assert_allclose(gpu_tokens(*args), tokens, rtol=1e-12, atol=1e-9)
    assert activated(*args).tolist() == active
    want = slow_times(problem, load_LE, plan)
    np.testing.assert_allclose(gpu_times(*args, speed_G, problem.time), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gpu_times(*args, speed_G), tokens / speed_G, rtol=1e-12, atol=1e-9)
    # every token is served exactly once
    np.testing.assert_allclose(gpu_tokens(*args).sum(1), load_LE.sum(1), rtol=1e-9, atol=1e-9)


@few
@given(planned())
def test_the_quick_times_of_an_equal_split_are_the_same(drawn: Any) -> None:
    problem, plan = drawn
    slots_LGC, speed_G = plan.slots_LGC, problem.topology.speed_G
    share_LGC = equal_shares(slots_LGC, problem.experts)
    for load_LE in problem.loads.load_TLE:
        want = gpu_times(load_LE, slots_LGC, share_LGC, speed_G)
        np.testing.assert_allclose(even_times(load_LE, slots_LGC, speed_G), want, rtol=1e-12)
        pieces = even_pieces(load_LE, slots_LGC)
        assert (pieces[slots_LGC < 0] == 0).all()
        np.testing.assert_allclose(slot_sums(pieces), gpu_tokens(load_LE, slots_LGC, share_LGC), rtol=1e-12)


@few
@given(planned())
def test_imbalance_is_the_largest_time_over_that_of_perfect_balance(drawn: Any) -> None:
    problem, plan = drawn
    speed_G = problem.topology.speed_G
    tops, works = [], []
    for time_LG in scenario_times(problem, plan):
        tops.append(time_LG.max(1))
        works.append([float(row @ speed_G / speed_G.sum()) for row in time_LG])
    for x in range(problem.layers):
        top, work = (slow_risk(problem, [float(row[x]) for row in rows]) for rows in (tops, works))
        assert plan.imbalance_L[x] == pytest.approx(top / work if work else 1.0, rel=1e-9)
        assert plan.imbalance_L[x] >= 1 - 1e-12


def scenario_times(problem: Problem, plan: Any) -> list[np.ndarray]:
    """Times of the GPUs in every scenario, with its shares."""
    each = plan.scenario_share_TLGC
    return [
        slow_times(problem, load_LE, plan if each is None else plan.replace(share_LGC=each[t]))
        for t, load_LE in enumerate(problem.loads.load_TLE)
    ]


def slow_risk(problem: Problem, values: list[float]) -> float:
    weight_T = problem.loads.weight_T
    weights = [1 / len(values)] * len(values) if weight_T is None else weight_T.tolist()
    return {
        "expected": sum(w * v for w, v in zip(weights, values, strict=True)),
        "worst": max(values),
        "cvar": slow_cvar(values, weights, problem.objective.cvar_alpha),
        "sigma": slow_sigma(values, weights, problem.objective.sigma),
    }[problem.objective.risk]


def test_a_layer_without_tokens_is_in_balance() -> None:
    assert imbalance(np.array([[0.0, 0.0], [3.0, 1.0]]), np.ones(2)).tolist() == [1.0, 1.5]


@few
@given(planned(), st.integers(0, 2**32 - 1))
def test_moves(drawn: Any, seed: int) -> None:
    problem, plan = drawn
    before = random_slots(np.random.default_rng(seed), problem.capacity_LG, problem.experts)
    size_L = np.arange(1, problem.layers + 1) * 7
    moves = count_moves(plan.slots_LGC, before, problem.experts, size_L)
    new = new_replicas(plan.slots_LGC, before, problem.experts)
    count_L = []
    for x in range(problem.layers):
        fresh = [
            (g, e)
            for g in range(problem.topology.gpus)
            for e in plan.slots_LGC[x, g].tolist()
            if e >= 0 and e not in before[x, g]
        ]
        count_L.append(len(fresh))
        assert [(g, plan.slots_LGC[x, g, c]) for g, c in np.argwhere(new[x])] == fresh
    assert moves.count_L.tolist() == count_L
    assert moves.count == sum(count_L)
    assert moves.bytes == sum(n * 7 * (x + 1) for x, n in enumerate(count_L))
    assert moves.fraction == pytest.approx(sum(count_L) / plan.replicas)
    assert not moves.cold
    stay = count_moves(before, before, problem.experts, size_L)
    assert (stay.count, stay.bytes, stay.fraction) == (0, 0, 0.0)
    cold = count_moves(plan.slots_LGC, None, problem.experts, size_L)
    assert cold.cold
    assert cold.count == plan.replicas
    assert cold.fraction == 1.0


@few
@given(planned(), st.integers(0, 2**32 - 1))
def test_seconds_of_moves(drawn: Any, seed: int) -> None:
    problem, plan = drawn
    topology = problem.topology
    before = random_slots(np.random.default_rng(seed), problem.capacity_LG, problem.experts)
    size_L = np.arange(1, problem.layers + 1) * 10**6
    got = move_seconds(topology, plan.slots_LGC, before, problem.experts, size_L)
    for x in range(problem.layers):
        took = 0.0
        for g, e in itertools.product(range(topology.gpus), range(problem.experts)):
            if e in plan.slots_LGC[x, g] and e not in before[x, g]:
                nodes = {topology.node_G[h] for h in range(topology.gpus) if e in before[x, h]}
                near = topology.node_G[g] in nodes
                took += topology.links.latency
                took += size_L[x] / (topology.links.intra_node if near else topology.links.inter_node)
        assert got[x] == pytest.approx(took, rel=1e-9)


def test_a_replica_that_nobody_has_comes_from_the_host() -> None:
    slots, before = np.array([[[0], [1]]], np.int32), np.array([[[0], [-1]]], np.int32)
    got = move_seconds(uniform(1, 2, slots=1), slots, before, 2, np.array([55 * 10**9]))
    assert got.tolist() == [pytest.approx(1.0 + 10e-6)]


def test_a_replica_that_changes_its_slot_does_not_move() -> None:
    before = np.array([[[0, 1], [2, -1]]], dtype=np.int32)
    after = np.array([[[1, 0], [-1, 2]]], dtype=np.int32)
    assert count_moves(after, before, 3, np.array([5])).count == 0


@few
@given(planned())
def test_traffic_leaves_a_node_only_where_it_must(drawn: Any) -> None:
    problem, plan = drawn
    node_G = problem.topology.node_G
    layers, experts = problem.load_LE.shape
    nodes = int(node_G.max()) + 1
    by_node = None if problem.loads.load_TLNE is None else problem.loads.load_TLNE[0]
    load_LE = problem.load_LE if by_node is None else by_node.sum(1)
    got = node_traffic(load_LE, plan.slots_LGC, plan.share_LGC, node_G, by_node)
    for x in range(layers):
        leaves = 0.0
        for e, n in itertools.product(range(experts), range(nodes)):
            source = load_LE[x, e] / nodes if by_node is None else by_node[x, n, e]
            here = sum(
                load_LE[x, e] * plan.share_LGC[x, g, c]
                for g in np.flatnonzero(node_G == n)
                for c in np.flatnonzero(plan.slots_LGC[x, g] == e)
            )
            leaves += max(source - here, 0.0)
        assert got[x] == pytest.approx(leaves, rel=1e-9, abs=1e-6)
    assert (got <= load_LE.sum(1) * (1 + 1e-9)).all()


def test_traffic_by_hand() -> None:
    # expert 0 on both nodes, 1 on node 0 alone
    slots = np.array([[[0, 1], [0, -1]]], dtype=np.int32)
    share = np.array([[[0.5, 1.0], [0.5, 0.0]]])
    load = np.array([[8.0, 4.0]])
    assert node_traffic(load, slots, share, np.array([0, 1])).tolist() == [2.0]
    source = np.array([[[8.0, 0.0], [0.0, 4.0]]])
    assert node_traffic(load, slots, share, np.array([0, 1]), source).tolist() == [8.0]
    assert node_traffic(load, slots, share, np.array([0, 0])).tolist() == [0.0]


def slow_sigma(values: list[float], weights: list[float], sigma: float) -> float:
    """The mean, and so many deviations of what lies above it."""
    pairs = list(zip(values, weights, strict=True))
    mean = sum(w * v for v, w in pairs)
    return mean + sigma * sum(w * (v - mean) ** 2 for v, w in pairs if v > mean) ** 0.5


def slow_cvar(values: list[float], weights: list[float], alpha: float) -> float:
    """Mean over the worst (1 - alpha) of the weight, taking whole scenarios and a part of the last."""
    left, total = 1 - alpha, 0.0
    for value, weight in sorted(zip(values, weights, strict=True), reverse=True):
        part = min(left, weight)
        total += part * value
        left -= part
    return total / (1 - alpha)


@few
@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from((0.0, 0.3, 0.5, 0.9, 0.99)),
)
def test_risk(rows: Any, alpha: float) -> None:
    top_TL = np.array([row[:2] for row in rows])
    weights = [row[2] / sum(r[2] for r in rows) for row in rows]
    for weight_T, ws in ((np.array(weights), weights), (None, [1 / len(rows)] * len(rows))):
        for x in range(2):
            values = top_TL[:, x].tolist()
            mean = sum(w * v for w, v in zip(ws, values, strict=True))
            cvar = slow_cvar(values, ws, alpha)
            for measure, want in (("expected", mean), ("worst", max(values)), ("cvar", cvar)):
                got = risk(top_TL, weight_T, Objective(risk=measure, cvar_alpha=alpha))[x]
                assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
            assert mean - 1e-9 <= cvar <= max(values) + 1e-9


@few
@given(planned())
def test_objectives(drawn: Any) -> None:
    problem, plan = drawn
    tops = [time_LG.max(1) for time_LG in scenario_times(problem, plan)]
    want = sum(slow_risk(problem, [float(top[x]) for top in tops]) for x in range(problem.layers))
    told = judged(problem, plan.slots_LGC, plan.share_LGC, plan.scenario_share_TLGC)
    assert told.value_L.sum() == pytest.approx(want, rel=1e-9, abs=1e-9)
    vector = objective_vector(problem, plan)
    assert vector["balance"] == pytest.approx(want, rel=1e-9, abs=1e-9)
    held_L = [(plan.slots_LGC[x] >= 0).sum() for x in range(problem.layers)]
    if problem.expert_bytes_L is None:
        assert vector["memory"] == sum(held_L) == plan.replicas
        assert vector["moves"] == plan.moves.count
    else:
        assert vector["memory"] == sum(n * b for n, b in zip(held_L, problem.bytes_L.tolist(), strict=True))
        assert vector["moves"] == plan.moves.bytes


def test_traffic_objective_uses_the_source_nodes() -> None:
    node = np.array([[[[8.0, 0.0], [0.0, 4.0]]], [[[0.0, 4.0], [8.0, 0.0]]]])
    loads = Loads(load_TLE=node.sum(2), load_TLNE=node, weight_T=[3, 1])
    problem = Problem(loads=loads, topology=uniform(2, 1, slots=2))
    plan = plan_of(problem, np.array([[[0, -1], [1, -1]]], dtype=np.int32))
    # three quarters of the weight stay at home, the last quarter all crosses
    assert objective_vector(problem, plan)["traffic"] == pytest.approx(0.25 * 12)


@few
@given(planned(plain=True), st.integers(0, 2**32 - 1))
def test_shares_move_time_not_tokens(drawn: Any, seed: int) -> None:
    problem, plan = drawn
    other = random_shares(np.random.default_rng(seed), plan.slots_LGC, problem.experts)
    tokens = gpu_tokens(problem.load_LE, plan.slots_LGC, other)
    np.testing.assert_allclose(tokens.sum(1), problem.load_LE.sum(1), rtol=1e-9)


def test_sigma_is_the_mean_and_what_lies_above_it_and_never_falls() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        value, weight = rng.random((4, 3)), rng.dirichlet(np.ones(4))
        wish = Objective(risk="sigma", sigma=float(rng.random()))
        found = risk(value, weight, wish)
        mean = weight @ value
        above = [[max(v - m, 0.0) ** 2 for v, m in zip(row, mean, strict=True)] for row in value]
        np.testing.assert_allclose(found, mean + wish.sigma * np.sqrt(weight @ np.array(above)))
        slower = value.copy()
        slower[rng.integers(4), rng.integers(3)] += rng.random()
        assert (risk(slower, weight, wish) >= found - 1e-12).all()
    with pytest.raises(ProblemError, match=r"objective.sigma: is 1.5, must be at least 0 and at most 1"):
        Objective(risk="sigma", sigma=1.5)
