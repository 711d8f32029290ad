"""Batched shares against the exact programme; source-aware shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import without_copies
from moeless_opt.solvers.pack.counts import apportion, trim
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph
from moeless_opt.solvers.shares.source import solve_source_shares
from tests.oracles.share_lp import ShareLP, density


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads, a greedy placement planned on other loads, speeds."""
    rng = np.random.default_rng(seed)
    layers, gpus, slots = int(rng.integers(1, 5)), int(rng.integers(2, 10)), int(rng.integers(2, 6))
    experts = int(rng.integers(1, gpus * slots + 1))
    planned_LE = np.exp(rng.normal(0.0, rng.choice([0.5, 1.0, 2.0]), (layers, experts))) * 100.0
    capacity_LG = np.full((layers, gpus), slots)
    total_L = np.full(layers, min(gpus * slots, gpus * experts))
    replicas_LE = trim(planned_LE, apportion(planned_LE, total_L, gpus), capacity_LG)
    speed_G = np.ones(gpus) if seed % 2 else rng.uniform(0.5, 2.0, gpus)
    slots_LGC = pack(planned_LE, replicas_LE, capacity_LG, speed_G)
    load_LE = planned_LE * np.exp(rng.normal(0.0, 0.5, planned_LE.shape))
    load_LE[rng.random(load_LE.shape) < 0.1] = 0.0
    if seed % 5 == 0:
        load_LE[0] = 0.0
    return load_LE, slots_LGC, speed_G


def times(
    load_LE: np.ndarray, slots_LGC: np.ndarray, share_LGC: np.ndarray, speed_G: np.ndarray
) -> np.ndarray:
    filled = slots_LGC >= 0
    rows = np.arange(len(load_LE))[:, None, None]
    return np.where(filled, load_LE[rows, slots_LGC] * share_LGC, 0.0).sum(axis=2) / speed_G


def check_shares(slots_LGC: np.ndarray, share_LGC: np.ndarray, experts: int) -> None:
    assert (share_LGC >= 0.0).all()
    for slots_GC, share_GC in zip(slots_LGC, share_LGC, strict=True):
        filled = slots_GC >= 0
        assert (share_GC[~filled] == 0.0).all()
        total_E = np.bincount(slots_GC[filled], weights=share_GC[filled], minlength=experts)
        np.testing.assert_allclose(total_E, 1.0, atol=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_exact_equals_the_linear_programme(seed: int) -> None:
    load_LE, slots_LGC, speed_G = random_problem(seed)
    found = solve_shares(load_LE, slots_LGC, speed_G)
    check_shares(slots_LGC, found.share_LGC, load_LE.shape[1])
    time_LG = times(load_LE, slots_LGC, found.share_LGC, speed_G)
    np.testing.assert_allclose(time_LG, found.time_LG, rtol=1e-9, atol=1e-9)
    for layer, load_E in enumerate(load_LE):
        optimum = ShareLP(slots_LGC[layer], speed_G, len(load_E)).solve(load_E).time
        assert time_LG[layer].max() == pytest.approx(optimum, rel=1e-8, abs=1e-6)
        chosen = np.flatnonzero(found.critical_LG[layer]).tolist()
        proof = density(load_E, slots_LGC[layer], speed_G, chosen)
        assert proof == pytest.approx(found.bound_L[layer], rel=1e-9, abs=1e-9)
        assert proof == pytest.approx(optimum, rel=1e-8, abs=1e-6)
    assert found.gap_L.max() < 1e-8


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_descent_is_within_what_it_proves(seed: int) -> None:
    load_LE, slots_LGC, speed_G = random_problem(seed)
    optimum_L = solve_shares(load_LE, slots_LGC, speed_G).time_L
    found = solve_shares(load_LE, slots_LGC, speed_G, exact=False, tolerance=1e-3, max_sweeps=4000)
    check_shares(slots_LGC, found.share_LGC, load_LE.shape[1])
    time_L = times(load_LE, slots_LGC, found.share_LGC, speed_G).max(axis=1)
    assert (found.bound_L <= optimum_L * (1.0 + 1e-9) + 1e-9).all()
    assert (time_L <= optimum_L * (1.0 + found.gap_L) + 1e-6).all()
    assert (time_L <= optimum_L * 1.005 + 1e-6).all()


def test_a_graph_serves_many_loads() -> None:
    load_LE, slots_LGC, speed_G = random_problem(3)
    graph = ReplicaGraph(slots_LGC, speed_G, load_LE.shape[1])
    for factor in (1.0, 2.0, 0.5):
        one, two = solve_shares(load_LE * factor, graph), solve_shares(load_LE * factor, slots_LGC, speed_G)
        np.testing.assert_array_equal(one.share_LGC, two.share_LGC)


def test_no_replicated_expert() -> None:
    found = solve_shares(np.array([[3.0, 1.0]]), np.array([[[0], [1]]]))
    assert found.share_LGC.tolist() == [[[1.0], [1.0]]]
    assert found.bound_L.tolist() == [3.0]


def test_gpu_overfull_on_its_own_sets_the_bound() -> None:
    # GPU 2 has no replicated expert and the largest load; the others could be level below it.
    found = solve_shares(np.array([[4.0, 9.0, 0.0]]), np.array([[[0, 2], [0, -1], [1, -1]]]))
    assert found.bound_L[0] == 9.0
    assert found.critical_LG[0].tolist() == [False, False, True]


def test_many_colours() -> None:
    """A GPU that holds a replica of 70 experts: more colours than a machine word has bits."""
    slots_LGC = np.full((1, 71, 70), -1, dtype=np.int32)
    slots_LGC[0, 0] = np.arange(70)
    slots_LGC[0, 1:, 0] = np.arange(70)
    load_LE = np.arange(1.0, 71.0)[None]
    found = solve_shares(load_LE, slots_LGC)
    assert found.gap_L[0] < 1e-9
    assert len(ReplicaGraph(slots_LGC, np.ones(71), 70).colours) == 70


def test_missing_expert_is_named() -> None:
    with pytest.raises(ProblemError, match="layer 0: expert 1 has no replica"):
        solve_shares(np.ones((1, 2)), np.array([[[0]]]))


def crossing_by_lp(load_NE: np.ndarray, slots_GC: np.ndarray, node_G: np.ndarray, cap_G: np.ndarray) -> float:
    """Fewest tokens that leave their node with every GPU within its cap, by a plain linear programme."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("GLOP")
    scale = max(load_NE.sum() / len(cap_G), 1e-9)
    rows = [solver.Constraint(-solver.infinity(), cap / scale) for cap in cap_G.tolist()]
    for node, load_E in enumerate(load_NE.tolist()):
        for expert, load in enumerate(load_E):
            total = solver.Constraint(load / scale, load / scale)
            for gpu in np.flatnonzero((slots_GC == expert).any(axis=1)).tolist():
                tokens = solver.NumVar(0.0, solver.infinity(), "")
                total.SetCoefficient(tokens, 1.0)
                rows[gpu].SetCoefficient(tokens, 1.0)
                solver.Objective().SetCoefficient(tokens, float(node_G[gpu] != node))
    assert solver.Solve() == solver.OPTIMAL
    return float(solver.Objective().Value()) * scale


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_source_aware_shares_keep_most_tokens_at_home(seed: int) -> None:
    load_LE, slots_LGC, speed_G = random_problem(seed)
    rng = np.random.default_rng(seed)
    layers, gpus = slots_LGC.shape[:2]
    nodes = int(rng.integers(1, min(4, gpus) + 1))
    node_G = np.sort(np.r_[np.arange(nodes), rng.integers(0, nodes, gpus - nodes)])
    part_LNE = rng.dirichlet(np.ones(nodes), size=load_LE.shape).transpose(0, 2, 1)
    load_LNE = part_LNE * load_LE[:, None, :]
    found = solve_source_shares(load_LNE, slots_LGC, node_G, speed_G)
    optimum_L = solve_shares(load_LE, slots_LGC, speed_G).time_L
    np.testing.assert_allclose(found.time_LG.max(axis=1), optimum_L, rtol=1e-7, atol=1e-6)
    for node in range(nodes):
        check_shares(slots_LGC, found.share_LNGC[:, node], load_LE.shape[1])
    for layer in range(layers):
        cap_G = found.time_LG[layer].max() * (1.0 + 1e-7) * speed_G
        least = crossing_by_lp(load_LNE[layer], slots_LGC[layer], node_G, cap_G)
        assert found.crossing_L[layer] == pytest.approx(
            least, rel=1e-4, abs=1e-4 * load_LE[layer].sum() + 1e-6
        )


def test_sources_can_be_ranks() -> None:
    load_LSE = np.array([[[2.0], [1.0], [1.0], [0.0]]])
    slots_LGC = np.array([[[0], [0]]])
    found = solve_source_shares(load_LSE, slots_LGC, np.array([0, 1]), node_S=np.array([0, 0, 1, 1]))
    assert found.time_LG.max() == pytest.approx(2.0)
    assert found.crossing_L[0] == pytest.approx(1.0, rel=1e-6)  # 3 tokens on node 0, of which 2 can stay
    with pytest.raises(ProblemError, match="has 4 sources"):
        solve_source_shares(load_LSE, slots_LGC, np.array([0, 1]))


def test_slack_buys_locality() -> None:
    load_LNE = np.array([[[3.0], [1.0]]])
    slots_LGC = np.array([[[0], [0]]])
    tight = solve_source_shares(load_LNE, slots_LGC, np.array([0, 1]))
    loose = solve_source_shares(load_LNE, slots_LGC, np.array([0, 1]), slack=0.5)
    assert tight.crossing_L[0] == pytest.approx(1.0, rel=1e-6)
    assert loose.crossing_L[0] == pytest.approx(0.0, abs=1e-6)


def test_recorded_loads_are_solved_exactly(shared_data: Path) -> None:
    counts = np.load(shared_data / "deepseek_v3_counts.npz")["counts"].astype(float)[:, ::6]
    layers, experts = counts.shape[1:]
    capacity_LG = np.full((layers, 32), 9)
    replicas_LE = trim(counts[0], apportion(counts[0], np.full(layers, 288), 32), capacity_LG)
    graph = ReplicaGraph(pack(counts[0], replicas_LE, capacity_LG, np.ones(32)), np.ones(32), experts)
    programmes = [ShareLP(slots_GC, np.ones(32), experts) for slots_GC in graph.slots_LGC]
    for load_LE in counts:
        found = solve_shares(load_LE, graph)
        optimum_L = [lp.time(load_E) for lp, load_E in zip(programmes, load_LE, strict=True)]
        np.testing.assert_allclose(found.time_L, optimum_L, rtol=1e-9)
        assert found.gap_L.max() < 1e-9


def test_second_copies_on_a_gpu_are_one_place() -> None:
    """Slots drawn with copies: the least time of the placement without them, in truth and as claimed."""
    rng = np.random.default_rng(4)
    tried = 0
    while tried < 60:
        gpus, experts = int(rng.integers(2, 5)), int(rng.integers(1, 5))
        slots_LGC = rng.integers(-1, experts, (1, gpus, 3)).astype(np.int32)
        if len(np.unique(slots_LGC[slots_LGC >= 0])) < experts:
            continue
        tried += 1
        load_LE, speed_G = rng.lognormal(0, 1, (1, experts)), rng.choice([1.0, 2.0], gpus)
        found = solve_shares(load_LE, slots_LGC, speed_G)
        plain = solve_shares(load_LE, without_copies(slots_LGC), speed_G)
        check_shares(slots_LGC, found.share_LGC, experts)
        top = times(load_LE, slots_LGC, found.share_LGC, speed_G).max()
        assert found.time_L == pytest.approx(top, rel=1e-9)
        assert top == pytest.approx(float(plain.time_L[0]), rel=1e-9)
