"""Swaps, folding, the search of counts, and the construction that puts them together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.solvers.construct.equal import EFFORTS, construct_equal
from moeless_opt.solvers.pack.counts import apportion
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.pack.recount import resize
from moeless_opt.solvers.pack.swaps import improve
from moeless_opt.solvers.pack.two_slots import best_counts, fold, fold_value, quick_fold

FLASHLB = np.array([[600, 560, 120, 120, 20, 10, 10, 10.0]])


def check(slots, capacity, E, counts=None):
    """No expert twice on a GPU, each at least once, no more than the slots, empty slots last."""
    for layer, held_GC in enumerate(slots.tolist()):
        for gpu, held in enumerate(held_GC):
            experts = [e for e in held if e >= 0]
            assert len(set(experts)) == len(experts) <= capacity[layer, gpu]
            assert held == experts + [-1] * (len(held) - len(experts))
        found = np.bincount(slots[layer][slots[layer] >= 0], minlength=E)
        assert found.min() >= 1
        assert counts is None or (found == counts[layer]).all()


def every_packing_value(load, counts, G, C):
    """The best largest load over all placements of some counts on G equal GPUs of C slots."""
    best = {(((), 0.0),) * G: 0.0}
    states = {tuple(((0, 0.0),) * G)}
    for weight, count in zip(load, counts, strict=True):
        piece = weight / count
        states = {
            tuple(sorted((n + (g in chosen), t + piece * (g in chosen)) for g, (n, t) in enumerate(state)))
            for state in states
            for chosen in itertools.combinations(range(G), count)
            if all(state[g][0] < C for g in chosen)
        }
    del best
    return min((max(t for _, t in state) for state in states), default=np.inf)


def optimum(load, G, C):
    """The best over all counts."""
    options = itertools.product(range(1, G + 1), repeat=len(load))
    return min(every_packing_value(load, c, G, C) for c in options if sum(c) <= G * C)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    capacity=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    uneven=st.booleans(),
    target=st.sampled_from([1.0, 1.05]),
)
def test_swaps_never_hurt(seed, capacity, uneven, target):
    rng = np.random.default_rng(seed)
    capacity_LG = np.array([capacity, capacity[::-1]])
    E = int(rng.integers(max(capacity), sum(capacity) + 1))
    load = rng.lognormal(0, 1, (2, E)) * (rng.random((2, E)) < 0.9)
    speed = rng.choice([1.0, 1.5, 3.0], len(capacity)) if uneven else np.ones(len(capacity))
    counts = np.ones((2, E), dtype=int)
    start = pack(load, counts, capacity_LG, speed)
    before = start.copy()
    slots = improve(load, start, capacity_LG, speed, target=target)
    assert (start == before).all()
    check(slots, capacity_LG, E, counts)
    old, new = even_times(load, start, speed).max(axis=1), even_times(load, slots, speed).max(axis=1)
    assert (new <= old * (1 + 1e-12)).all()


def test_swaps_leave_no_improving_swap_of_the_slowest_gpu():
    rng = np.random.default_rng(5)
    load, capacity, speed = rng.lognormal(0, 1, (3, 12)), np.full((3, 4), 4), np.ones(4)
    counts = apportion(load, 16, 4)
    slots = improve(load, pack(load, counts, capacity, speed), capacity, speed, focus=1000)
    for layer in range(3):
        time = even_times(load[layer : layer + 1], slots[layer : layer + 1], speed)[0]
        slow = int(time.argmax())
        for gpu, i, j in itertools.product(range(4), range(4), range(4)):
            a, b = slots[layer, slow, i], slots[layer, gpu, j]
            if gpu == slow or a in slots[layer, gpu] or b in slots[layer, slow]:
                continue
            shift = load[layer, a] / counts[layer, a] - load[layer, b] / counts[layer, b]
            assert max(time[slow] - shift, time[gpu] + shift) >= time[slow] * (1 - 1e-12)


def test_a_move_to_an_empty_slot_is_a_swap():
    load = np.array([[4.0, 3.0, 3.0]])
    start = np.array([[[0, 1, 2], [-1, -1, -1]]])
    slots = improve(load, start, np.array([[3, 3]]), np.ones(2))
    assert even_times(load, slots, np.ones(2)).max() == 6.0
    kept = improve(load, start, np.array([[3, 0]]), np.ones(2))  # those slots do not exist
    assert (kept == start).all()


def test_layers_do_not_influence_each_other():
    rng = np.random.default_rng(2)
    load, capacity, speed = rng.lognormal(0, 1.2, (6, 16)), np.full((6, 8), 3), np.ones(8)
    together = construct_equal(load, capacity, speed)
    apart = np.concatenate([construct_equal(load[i : i + 1], capacity[:1], speed) for i in range(6)])
    assert (together == apart).all()


@settings(max_examples=60, deadline=None)
@given(
    load=st.lists(st.one_of(st.just(0.0), st.floats(0.5, 100.0)), min_size=2, max_size=5),
    G=st.integers(2, 4),
    data=st.data(),
)
def test_folding_is_optimal_for_given_counts(load, G, data):
    if len(load) > 2 * G:
        return
    counts = [1] * len(load)
    for expert in data.draw(st.lists(st.integers(0, len(load) - 1), max_size=2 * G - len(load))):
        counts[expert] += counts[expert] < G
    load_LE, counts_LE = np.array([load]), np.array([counts])
    value = fold_value(load_LE, counts_LE, G)[0]
    slots = fold(load_LE, counts_LE, G)
    check(slots, np.full((1, G), 2), len(load), counts_LE)
    assert even_times(load_LE, slots, np.ones(G)).max() == pytest.approx(value)
    assert value == pytest.approx(every_packing_value(load, counts, G, 2))


@settings(max_examples=25, deadline=None)
@given(load=st.lists(st.floats(0.5, 100.0), min_size=2, max_size=5), G=st.integers(2, 3))
def test_proven_counts_are_optimal(load, G):
    if len(load) > 2 * G:
        return
    load_LE = np.array([load])
    counts, proven = best_counts(load_LE, apportion(load_LE, 2 * G, G), G)
    value = fold_value(load_LE, counts, G)[0]
    assert proven[0] or value <= sum(load) / G * (1 + 1e-12)
    assert value == pytest.approx(optimum(load, G, 2))
    quick = np.array([quick_fold(load, G)])
    check(quick, np.full((1, G), 2), len(load))


def test_flashlb_example_is_solved():
    """Published loads: EPLB ends at 232, FlashLB at 205; the optimum is proven to be 196.667."""
    capacity, speed = np.full((1, 8), 2), np.ones(8)
    greedy = apportion(FLASHLB, 16, 8)
    swapped = improve(FLASHLB, pack(FLASHLB, greedy, capacity, speed), capacity, speed)
    assert even_times(FLASHLB, swapped, speed).max() == pytest.approx(232)
    slots = construct_equal(FLASHLB, capacity, speed)
    check(slots, capacity, 8)
    assert even_times(FLASHLB, slots, speed).max() == pytest.approx(590 / 3)
    assert best_counts(FLASHLB, greedy.astype(np.int64), 8)[1].all()


def test_deepseek_readme_example_is_solved():
    """12 experts, 16 slots, 8 GPUs: EPLB (global) ends at 138.5 and 172; the optima are 136 and 172."""
    load = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27.0],
        ]
    )
    slots = construct_equal(load, np.full((2, 8), 2), np.ones(8))
    assert even_times(load, slots, np.ones(8)).max(axis=1).tolist() == [136.0, 172.0]


def test_counts_are_searched_where_swaps_are_stuck():
    load = np.random.default_rng(3).lognormal(0, 1.5, (4, 16))
    capacity, speed = np.full((4, 8), 3), np.ones(8)
    swapped = improve(load, pack(load, apportion(load, 24, 8), capacity, speed), capacity, speed)
    slots = resize(load, swapped, capacity, speed)
    check(slots, capacity, 16)
    old = even_times(load, swapped, speed).max(axis=1)
    new = even_times(load, slots, speed).max(axis=1)
    assert (new <= old * (1 + 1e-12)).all()
    assert new.sum() < 0.97 * old.sum()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    capacity=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    uneven=st.booleans(),
    effort=st.sampled_from(["quick", "normal"]),
)
def test_construction_is_valid_on_any_gpus(seed, capacity, uneven, effort):
    rng = np.random.default_rng(seed)
    E = int(rng.integers(1, 10))
    capacity_LG = np.stack([rng.permutation(capacity) for _ in range(2)])
    load = rng.lognormal(0, 1.5, (2, E)) * (rng.random((2, E)) < 0.8)
    load[1] *= rng.random() < 0.8
    speed = rng.choice([1.0, 2.0], len(capacity)) if uneven else np.ones(len(capacity))
    if np.minimum(capacity, E).sum() < E:
        with pytest.raises(InfeasibleError):
            construct_equal(load, capacity_LG, speed, effort=effort)
        return
    slots = construct_equal(load, capacity_LG, speed, effort=effort)
    check(slots, capacity_LG, E)
    assert (slots == construct_equal(load, capacity_LG, speed, effort=effort)).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_three_slots_reach_the_optimum(seed):
    load = np.random.default_rng(seed).lognormal(0, 1, (1, 5))
    slots = construct_equal(load, np.full((1, 3), 3), np.ones(3))
    assert even_times(load, slots, np.ones(3)).max() <= (1 + 1e-9) * optimum(load[0], 3, 3)


def test_more_effort_is_never_worse():
    load = np.random.default_rng(8).lognormal(0, 1.2, (3, 16))
    capacity, speed = np.full((3, 8), 3), np.ones(8)
    found = [
        even_times(load, construct_equal(load, capacity, speed, effort=e), speed).max(axis=1) for e in EFFORTS
    ]
    assert (found[1] <= found[0] * 1.0005).all()
    assert (found[2] <= found[1] * 1.0005).all()


def test_real_recording_is_balanced(shared_data):
    with np.load(shared_data / "deepseek_v3_counts.npz") as data:
        load = data["counts"][0].astype(float)
    for G, C, most in ((32, 9, 1.0005), (64, 5, 1.002)):
        capacity, speed = np.full((58, G), C), np.ones(G)
        slots = construct_equal(load, capacity, speed)
        check(slots, capacity, 256)
        time = even_times(load, slots, speed)
        assert (time.max(axis=1) / time.mean(axis=1)).mean() <= most


def test_unknown_effort_is_named():
    with pytest.raises(ProblemError, match=r"effort: is 'hard'; it can be 'quick', 'normal', 'thorough'"):
        construct_equal(FLASHLB, np.full((1, 8), 2), np.ones(8), effort="hard")
