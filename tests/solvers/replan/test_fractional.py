"""Re-planning with free token shares: the flow network, the search, budgets, repairs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.core.stopping import MaxTime, Stop
from moeless_opt.solvers.replan.fill import fill_overflow
from moeless_opt.solvers.replan.flow import UNIT, LayerFlow, least_time
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.live import mend_content, moves_between
from moeless_opt.solvers.replan.shake import Shaker
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish
from moeless_opt.solvers.shares.flow import solve_shares
from tests.strategies import After


def replanned(
    load: Any, live: Any, capacity: Any, speed: Any = None, *, stop: Stop | None = None, **wish: Any
) -> Replanned:
    return replan_fractional(ReplanTask(load, live, capacity, speed), ReplanWish(**wish), stop=stop)


def random_live(seed: int, experts: int, gpus: int, width: int) -> np.ndarray:
    """A valid random placement of one layer: every expert once, then random replicas."""
    rng = np.random.default_rng(seed)
    content: list[list[int]] = [[] for _ in range(gpus)]
    for expert in range(experts):
        open_ones = [gpu for gpu in range(gpus) if len(content[gpu]) < width]
        content[int(rng.choice(open_ones))].append(expert)
    for gpu in range(gpus):
        others = [expert for expert in rng.permutation(experts).tolist() if expert not in content[gpu]]
        content[gpu] += others[: int(rng.integers(0, width - len(content[gpu]) + 1))]
    return np.array([row + [-1] * (width - len(row)) for row in content], dtype=np.int32)


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loads [1, E], live [1, G, C], capacity [1, G], speeds [G]."""
    gpus = draw(st.integers(2, 5))
    width = draw(st.integers(2, 4))
    experts = draw(st.integers(2, gpus * width))
    seed = draw(st.integers(0, 10_000))
    load = draw(st.lists(st.integers(0, 1000).map(float), min_size=experts, max_size=experts))
    speeds = draw(st.sampled_from([[1.0] * gpus, [1.0 + 0.5 * (gpu % 2) for gpu in range(gpus)]]))
    live = random_live(seed, experts, gpus, width)
    return np.array([load]), live[None], np.full((1, gpus), width), np.array(speeds)


def assert_valid(slots_LGC: np.ndarray, capacity_LG: np.ndarray, experts: int) -> None:
    for slots_GC, capacity_G in zip(slots_LGC, capacity_LG, strict=True):
        for row, capacity in zip(slots_GC.tolist(), capacity_G.tolist(), strict=True):
            full = [expert for expert in row if expert >= 0]
            assert len(full) == len(set(full)) <= capacity
            assert row[: len(full)] == full, "an empty slot stands between full ones"
        assert set(slots_GC[slots_GC >= 0].tolist()) == set(range(experts))


def assert_consistent(plan, load_LE: np.ndarray, live_LGC: np.ndarray, speed_G: np.ndarray) -> None:
    """Recompute moves and times from the arrays alone."""
    L, G, _ = plan.slots_LGC.shape
    for layer in range(L):
        moved = 0
        token_G = np.zeros(G)
        given_E = np.zeros(load_LE.shape[1])
        for gpu in range(G):
            was = set(live_LGC[layer, gpu].tolist())
            for expert, share in zip(plan.slots_LGC[layer, gpu], plan.share_LGC[layer, gpu], strict=True):
                if expert >= 0:
                    moved += int(expert) not in was
                    token_G[gpu] += share * load_LE[layer, expert]
                    given_E[expert] += share
        assert plan.moves_L[layer] == moved
        np.testing.assert_allclose(given_E, 1.0, atol=1e-9)
        np.testing.assert_allclose((token_G / speed_G).max(), plan.time_L[layer], rtol=1e-6, atol=1e-9)


# -- the network ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(instances(), st.floats(0.6, 1.5))
def test_overflow_is_the_worst_excess_of_any_set_of_gpus(problem, time: float) -> None:
    load_LE, live_LGC, capacity_LG, _ = problem
    load = np.rint(load_LE[0] * 1000).astype(int).tolist()
    content = [[expert for expert in row if expert >= 0] for row in live_LGC[0].tolist()]
    room = [int(time * sum(load) / len(content))] * len(content)
    state = LayerFlow(load, content, capacity_LG[0].tolist(), room)
    worst = 0
    for size in range(1, len(content) + 1):
        for inside in itertools.combinations(range(len(content)), size):
            captive = [e for e in range(len(load)) if all(g in inside for g in state.home[e])]
            worst = max(worst, sum(load[e] for e in captive) - sum(room[g] for g in inside))
    assert state.solve() == worst
    if worst:
        cut = state.cut()
        assert sum(cut.excess.values()) == worst
        for name, experts in cut.captive.items():
            group = {g for e in experts for g in state.home[e]}
            assert name in group or not experts


@settings(max_examples=60, deadline=None)
@given(instances(), st.randoms(use_true_random=False))
def test_a_trial_foretells_what_applying_gives(problem, random) -> None:
    load_LE, live_LGC, capacity_LG, _ = problem
    load = np.rint(load_LE[0] * 1000).astype(int).tolist()
    content = [[expert for expert in row if expert >= 0] for row in live_LGC[0].tolist()]
    room = [int(1.05 * sum(load) / len(content))] * len(content)
    state = LayerFlow(load, content, capacity_LG[0].tolist(), room)
    for _ in range(6):
        before = state.solve()
        expert = random.randrange(len(load))
        gpu = random.randrange(len(content))
        if gpu in state.home[expert]:
            continue
        spare = [e for e in state.content[gpu] if len(state.home[e]) > 1]
        drops = [(random.choice(spare), gpu)] if spare else []
        if random.random() < 0.5:
            drops.append((expert, state.home[expert][0]))
        foretold = state.trial([(expert, gpu)], drops)
        assert state.solve() == before, "a trial left a trace"
        state.apply([(expert, gpu)], drops)
        fresh = LayerFlow(load, state.content, capacity_LG[0].tolist(), room)
        assert foretold == state.solve() == fresh.solve()


def test_the_network_grows_as_experts_become_replicated() -> None:
    load = [3 + expert % 5 for expert in range(64)]
    content = [list(range(gpu * 8, gpu * 8 + 8)) for gpu in range(8)]
    room = [sum(load) // 8 - 2] * 8
    state = LayerFlow(load, content, [64] * 8, room)
    for expert in range(64):
        for step in (1, 2, 3):
            gpu = (expert // 8 + step) % 8
            foretold = state.trial([(expert, gpu)], [])
            state.apply([(expert, gpu)], [])
            assert state.solve() == foretold
    assert state.solve() == LayerFlow(load, state.content, [64] * 8, room).solve() == sum(load) - sum(room)


@settings(max_examples=40, deadline=None)
@given(instances())
def test_least_time_is_the_optimum_of_the_shares(problem) -> None:
    load_LE, live_LGC, capacity_LG, speed_G = problem
    if load_LE.sum() < 1.0:
        return
    unit = load_LE.sum() / speed_G.sum()
    load = np.rint(load_LE[0] / unit * UNIT).astype(int).tolist()
    content = [[expert for expert in row if expert >= 0] for row in live_LGC[0].tolist()]
    state = LayerFlow(load, content, capacity_LG[0].tolist(), [0] * len(content))
    exact = solve_shares(load_LE, live_LGC, speed_G).time_L[0]
    assert least_time(state, speed_G.tolist()) * unit == pytest.approx(exact, rel=1e-6)


# -- the re-plan ---------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(instances(), st.sampled_from([0.0, 0.01, 0.1]))
def test_replan_is_valid_counts_its_moves_and_is_never_worse(problem, tolerance: float) -> None:
    load_LE, live_LGC, capacity_LG, speed_G = problem
    plan = replanned(load_LE, live_LGC, capacity_LG, speed_G, tolerance=tolerance)
    assert_valid(plan.slots_LGC, capacity_LG, load_LE.shape[1])
    assert_consistent(plan, load_LE, live_LGC, speed_G)
    stay = solve_shares(load_LE, live_LGC, speed_G).time_L
    assert plan.time_L[0] <= stay[0] * (1 + 1e-6) + 1e-9
    if stay[0] <= plan.target_L[0]:
        assert plan.moves_L[0] == 0
    if plan.time_L[0] <= plan.target_L[0]:
        assert plan.least_moves_L[0] <= plan.moves_L[0]
    again = replanned(load_LE, live_LGC, capacity_LG, speed_G, tolerance=tolerance)
    np.testing.assert_array_equal(plan.slots_LGC, again.slots_LGC)


def test_one_new_replica_lets_the_overload_out() -> None:
    # GPU 0 is busy with experts 0 and 1; expert 3 has a spare replica on GPU 1 that can yield.
    live = np.array([[[0, 1], [2, 3], [3, 4]]])
    plan = replanned([[8.0, 4.0, 2.0, 2.0, 2.0]], live, [[2, 2, 2]], tolerance=0.01)
    assert plan.time_L[0] == pytest.approx(6.0, rel=0.011)
    assert plan.least_moves_L[0] >= 1
    assert plan.moves_L[0] >= plan.least_moves_L[0]


def test_rounds_never_move_more_and_are_deterministic() -> None:
    rng = np.random.default_rng(5)
    before = rng.lognormal(0, 1, (4, 64))
    after = before * rng.lognormal(0, 0.6, before.shape)
    capacity = np.full((4, 16), 5)
    live = construct_equal(before, capacity, np.ones(16))
    quick = replanned(after, live, capacity)
    better = replanned(after, live, capacity, rounds=12, seed=3)
    assert (better.time_L <= better.target_L * (1 + 1e-6)).all()
    assert (better.moves_L <= quick.moves_L).all()
    assert better.moves_L.sum() < quick.moves_L.sum()
    again = replanned(after, live, capacity, rounds=12, seed=3)
    np.testing.assert_array_equal(better.slots_LGC, again.slots_LGC)
    timed = replanned(after, live, capacity, until_stopped=True, stop=MaxTime(0.5))
    assert (timed.moves_L <= quick.moves_L).all()


def test_layers_without_load_stay() -> None:
    live = np.array([[[0, 1], [2, -1]]] * 2)
    plan = replanned([[0.0, 0.0, 0.0], [1.0, 1.0, 4.0]], live, [[2, 2]] * 2)
    assert plan.moves_L[0] == 0
    assert plan.time_L[0] == 0.0
    np.testing.assert_array_equal(plan.slots_LGC[0], live[0])


def test_faster_gpus_get_more() -> None:
    live = np.array([[[0, 1, -1], [2, 3, -1]]])
    plan = replanned([[3.0, 3.0, 3.0, 3.0]], live, [[3, 3]], [1.0, 3.0], tolerance=0.4)
    token_G = (np.array([3.0] * 4)[plan.slots_LGC[0]] * plan.share_LGC[0]).sum(axis=1)
    assert token_G[1] > token_G[0]
    assert plan.time_L[0] <= 3.0 * 1.4 * (1 + 1e-9)


def test_out_of_reach_gives_the_best_found() -> None:
    # Two slots, two experts: nothing can be split, so 1 % is out of reach.
    live = np.array([[[0], [1]]])
    plan = replanned([[3.0, 1.0]], live, [[1, 1]], bound_L=[2.0])
    assert plan.time_L[0] == pytest.approx(3.0)
    assert plan.moves_L[0] == 0


def test_shaking_takes_back_a_needless_move() -> None:
    live = [frozenset({0, 1}), frozenset({2, 3})]
    needless = [[0, 1, 2], [3, 2]]
    shaker = Shaker([UNIT // 2] * 4, live, needless, [3, 3], [UNIT + 10] * 2)
    assert shaker.moves == 1
    for _ in range(3):
        if not shaker.done:
            shaker.round()
    assert shaker.moves == 0
    assert moves_between(live, shaker.content) == 0


def test_fill_respects_a_budget_of_pairs() -> None:
    rng = np.random.default_rng(1)
    load = np.rint(rng.lognormal(0, 1, 24) * UNIT / 4).astype(int).tolist()
    content = [list(range(gpu * 4, gpu * 4 + 4)) for gpu in range(6)]
    room = [int(1.01 * sum(load) / 6)] * 6
    state = LayerFlow(load, content, [6] * 6, room)
    fill_overflow(state, budget=2)
    assert moves_between([frozenset(row) for row in content], state.content) <= 2


# -- budgets -------------------------------------------------------------------------------------------


def test_a_budget_goes_where_it_gains_most() -> None:
    rng = np.random.default_rng(11)
    before = rng.lognormal(0, 1, (6, 64))
    after = before * rng.lognormal(0, 0.5, before.shape)
    capacity = np.full((6, 16), 5)
    live = construct_equal(before, capacity, np.ones(16))
    free = replanned(after, live, capacity)
    total = int(free.moves_L.sum())
    assert total > 6
    last = np.inf
    for budget in (0, total // 4, total // 2, total - 1, total):
        plan = replanned(after, live, capacity, max_moves=budget)
        assert plan.moves_L.sum() <= budget
        served = np.maximum(plan.time_L, plan.target_L).sum()
        assert served <= last * (1 + 1e-9)
        last = served
    assert last == pytest.approx(np.maximum(free.time_L, free.target_L).sum(), rel=1e-6)


def test_a_budget_counts_the_cost_of_each_layer() -> None:
    rng = np.random.default_rng(12)
    before = rng.lognormal(0, 1, (3, 32))
    after = before * rng.lognormal(0, 0.6, before.shape)
    capacity = np.full((3, 8), 5)
    live = construct_equal(before, capacity, np.ones(8))
    cost = [1000, 10, 10]
    plan = replanned(after, live, capacity, max_moves=900, cost_L=cost)
    assert (plan.moves_L * cost).sum() <= 900
    assert plan.moves_L[0] == 0


@pytest.mark.parametrize("budget", [None, 9])
def test_whenever_it_is_stopped_the_plan_is_valid_and_no_worse(budget: int | None) -> None:
    rng = np.random.default_rng(8)
    before = rng.lognormal(0, 1, (3, 32))
    after = before * rng.lognormal(0, 0.5, before.shape)
    capacity = np.full((3, 8), 5)
    live = construct_equal(before, capacity, np.ones(8))
    stay = solve_shares(after, live, np.ones(8)).time_L
    whole = replanned(after, live, capacity, rounds=3, max_moves=budget)
    counts = []
    for asks in (0, 1, 2, 3, 5, 9, 17, 40, 90, 10**6):
        plan = replanned(after, live, capacity, rounds=3, max_moves=budget, stop=After(asks))
        assert_valid(plan.slots_LGC, capacity, 32)
        assert (plan.time_L <= stay * (1 + 1e-6)).all()
        assert budget is None or plan.moves_L.sum() <= budget
        counts.append(int(plan.moves_L.sum()))
        assert asks or plan.cut_L.all()
    assert counts[0] == 0
    assert not plan.cut_L.any()
    assert counts[-1] > 0
    np.testing.assert_array_equal(plan.slots_LGC, whole.slots_LGC)


def test_a_lost_gpu_is_mended_even_without_time() -> None:
    live = np.array([[[0, 1, 2], [3, 4, 2], [5, 2, -1]]])
    plan = replanned([[1.0] * 6], live, [[3, 0, 3]], repair=True, stop=After(0))
    assert plan.moves_L.tolist() == [2]
    assert set(plan.slots_LGC[plan.slots_LGC >= 0].tolist()) == set(range(6))


# -- the live placement --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "capacity", "words"),
    [
        ([[0, 0], [1, 2]], [2, 2], "held twice"),
        ([[0, 9], [1, 2]], [2, 2], "unknown"),
        ([[0, 1], [1, 2]], [1, 2], "at most its 1 slots"),
        ([[0, 1], [1, -1]], [2, 2], "has no replica"),
    ],
)
def test_a_broken_live_placement_is_named_or_mended(slots, capacity, words: str) -> None:
    load = [[3.0, 2.0, 1.0]]
    with pytest.raises(ProblemError, match=words):
        replanned(load, [slots], [capacity])
    plan = replanned(load, [slots], [capacity], repair=True)
    assert_valid(plan.slots_LGC, np.array([capacity]), 3)
    assert_consistent(plan, np.array(load), np.array([slots]), np.ones(2))


def test_a_lost_gpu_is_repaired_within_the_least_budget() -> None:
    live = np.array([[[0, 1, 2], [3, 4, 2], [5, 2, -1]]])
    load = [[1.0] * 6]
    capacity = [[3, 0, 3]]
    plan = replanned(load, live, capacity, repair=True)
    assert plan.forced_L[0] == 2, "experts 3 and 4 lived on the lost GPU alone"
    assert_valid(plan.slots_LGC, np.array(capacity), 6)
    with pytest.raises(InfeasibleError, match="least budget that would is 2"):
        replanned(load, live, capacity, repair=True, max_moves=1)
    within = replanned(load, live, capacity, repair=True, max_moves=2)
    assert within.moves_L.sum() == 2


def test_too_few_slots_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="cannot hold 3 experts"):
        mend_content([1, 1, 1], [[0], [1]], [1, 1], [1.0, 1.0], repair=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load": [1.0, 2.0]}, "would need 2: layers, experts"),
        ({"load": [[-1.0, 2.0]]}, "negative or non-finite"),
        ({"live": [[0, 1]]}, "has shape"),
        ({"capacity": [[1, 1, 1]]}, "has shape"),
        ({"capacity": [[3, 1]]}, "outside"),
        ({"speed": [1.0, 0.0]}, "positive"),
        ({"tolerance": -0.1}, "at least 0"),
    ],
)
def test_bad_arguments_are_named(change, words: str) -> None:
    good = {"load": [[1.0, 2.0]], "live": [[[0], [1]]], "capacity": [[1, 1]]}
    with pytest.raises(ProblemError, match=words):
        replanned(**{**good, **change})


def test_measured_drift_moves_no_more_than_promised(shared_data: Path) -> None:
    with np.load(shared_data / "deepseek_v3_counts.npz") as archive:
        loads = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(float), strict=True))
    capacity = np.full((58, 32), 9)
    live = construct_equal(loads["prefill_in1024"], capacity, np.ones(32))
    for after, percent in (("prefill_in4096", 1.8), ("decode_in1000out1000", 4.5)):
        plan = replanned(loads[after], live, capacity)
        mean_L = loads[after].sum(axis=1) / 32
        assert (plan.time_L <= 1.01 * mean_L * (1 + 1e-9)).all()
        assert 100 * plan.moves_L.mean() / 288 <= percent
