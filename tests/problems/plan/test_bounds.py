"""Bounds against enumeration: never above the optimum, exact where they claim to be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.bounds import (
    best_bound,
    density_bound,
    mean_bound,
    packing_bound,
    replicas_needed,
    slots_bound,
    tau_star,
)
from moeless_opt.problems.spec.time_model import TimeModel

SPLITS = ("equal", "fractional")


def subsets(experts: int, most: int) -> list[tuple[int, ...]]:
    return [s for k in range(min(experts, most) + 1) for s in itertools.combinations(range(experts), k)]


def placements(experts: int, capacity: Any) -> Any:
    """Every way to give each GPU a set of experts within its slots, all experts covered."""
    for hosts in itertools.product(*(subsets(experts, int(c)) for c in capacity)):
        if len(set(itertools.chain.from_iterable(hosts))) == experts:
            yield hosts


def time_of(hosts: Any, load: Any, speed: Any, split: str, time: TimeModel) -> float:
    """The least largest GPU time of a placement; fractional by the density of every set of GPUs."""
    load, speed = np.asarray(load, float), np.asarray(speed, float)
    count = np.bincount(list(itertools.chain.from_iterable(hosts)), minlength=len(load))
    start = [time.launch + time.activation_cost * sum(load[e] > 0 for e in h) for h in hosts]
    if split == "equal":
        return max(
            (start[g] + time.token_cost * sum(load[e] / count[e] for e in h)) / speed[g]
            for g, h in enumerate(hosts)
        )
    worst = 0.0
    for size in range(1, len(hosts) + 1):
        for group in itertools.combinations(range(len(hosts)), size):
            outside = set(itertools.chain.from_iterable(h for g, h in enumerate(hosts) if g not in group))
            inside = sum(load[e] for e in range(len(load)) if e not in outside)
            worst = max(
                worst, (sum(start[g] for g in group) + time.token_cost * inside) / speed[list(group)].sum()
            )
    return worst


def optimum(load: Any, capacity: Any, speed: Any, split: str, time: TimeModel, keep: Any = None) -> float:
    best = np.inf
    for hosts in placements(len(load), capacity):
        if keep is None or keep(hosts):
            best = min(best, time_of(hosts, load, speed, split, time))
    return best


loads = st.lists(st.integers(0, 60), min_size=1, max_size=4)
speeds = st.sampled_from([0.5, 1.0, 1.0, 2.0])


@st.composite
def instances(draw: Any) -> tuple[list[int], list[int], list[float]]:
    load = draw(loads)
    gpus = draw(st.integers(1, 3))
    capacity = draw(st.lists(st.integers(0, 3), min_size=gpus, max_size=gpus))
    speed = draw(st.one_of(st.just([1.0] * gpus), st.lists(speeds, min_size=gpus, max_size=gpus)))
    return load, capacity, speed


@pytest.mark.parametrize("split", SPLITS)
@given(instance=instances(), activation=st.sampled_from([0.0, 0.0, 5.0]), launch=st.sampled_from([0.0, 3.0]))
@settings(max_examples=400, deadline=None)
def test_never_above_the_optimum(split: Any, instance: Any, activation: float, launch: float) -> None:
    load, capacity, speed = instance
    time = TimeModel(launch=launch, activation_cost=activation)
    best = optimum(load, capacity, speed, split, time)
    bound, name = best_bound([load], [capacity], speed, split, time=time)
    assert bound[0] <= best * (1 + 1e-9) + 1e-9, name


def test_a_measured_curve_is_refused() -> None:
    curve = TimeModel(curve_tokens=[0, 1], curve_activated=[0, 1], curve_time=[[1, 1], [1, 2]])
    with pytest.raises(ProblemError, match=r"time: is a measured curve, must be linear here"):
        best_bound([[2.0, 1.0]], [[1, 1]], time=curve)


@pytest.mark.parametrize("split", SPLITS)
@given(instance=instances(), most=st.integers(1, 3), least=st.integers(1, 2), total=st.integers(3, 8))
@settings(max_examples=200, deadline=None)
def test_limits_on_replicas_hold(split: Any, instance: Any, most: int, least: int, total: int) -> None:
    load, capacity, speed = instance

    def keep(hosts: Any) -> bool:
        count = np.bincount(list(itertools.chain.from_iterable(hosts)), minlength=len(load))
        return bool(count.max() <= most and count.min() >= least and count.sum() <= total)

    best = optimum(load, capacity, speed, split, TimeModel(), keep)
    bound, name = best_bound(
        [load], [capacity], speed, split, max_replicas=most, min_replicas=least, replicas_L=[total]
    )
    assert bound[0] <= best * (1 + 1e-9), name


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 30),
    st.integers(1, 6),
)
def test_tau_is_what_greedy_apportionment_reaches(load: list[int], gpus: int, spare: int, most: int) -> None:
    slots = min(len(load) + spare, gpus * len(load))
    count = np.ones(len(load), dtype=int)
    cap = min(gpus, most)
    for _ in range(slots - len(load)):
        heaviest = int(np.argmax(np.array(load) / count))
        if count[heaviest] == cap:
            break
        count[heaviest] += 1
    capacity = np.full((1, gpus), len(load))
    tau = tau_star([load], capacity, max_replicas=most, replicas_L=[slots])
    assert tau[0] == pytest.approx((np.array(load) / count).max())
    assert (replicas_needed([load], tau, np.ones(gpus)) <= cap).all()
    assert replicas_needed([load], tau, np.ones(gpus)).sum() <= slots


def test_a_bound_that_is_known_is_the_askers_own_and_only_for_what_it_was_asked_of() -> None:
    load, slots = np.array([[9.0, 5.0, 2.0]]), np.array([[2, 2]])
    first, name = best_bound(load, slots)
    wanted = float(first[0])
    first[:], name[:] = -1.0, ""
    assert best_bound(load, slots)[0].tolist() == [wanted]
    assert best_bound(load, slots)[1].tolist() != [""]
    load[0, 0] = 90.0  # the same array, other loads
    assert best_bound(load, slots)[0][0] > wanted
    assert best_bound(load, slots, np.array([2.0, 2.0]))[0][0] < best_bound(load, slots)[0][0]
    assert best_bound(load, slots, max_replicas=1)[0][0] > best_bound(load, slots)[0][0]
    assert best_bound(load, slots, time=TimeModel(token_cost=2.0))[0][0] > best_bound(load, slots)[0][0]


def test_layers_are_independent() -> None:
    rng = np.random.default_rng(5)
    load = rng.lognormal(0, 1.5, (30, 9))
    capacity = rng.integers(2, 5, (30, 4))
    speed = rng.choice([0.5, 1.0, 2.0], 4)
    for split in SPLITS:
        together, names = best_bound(load, capacity, speed, split)  # type: ignore[arg-type]
        for layer in range(30):
            alone, name = best_bound(load[[layer]], capacity[[layer]], speed, split)  # type: ignore[arg-type]
            assert alone[0] == pytest.approx(together[layer])
            assert name[0] == names[layer]


def test_each_bound_wins_somewhere() -> None:
    two = [[2, 2, 2, 2]]
    assert best_bound([[5, 4, 3, 2]], two) == (pytest.approx([3.5]), "mean")
    assert best_bound([[90, 1, 1, 1]], [[1, 1, 1, 2]]) == (pytest.approx([45.0]), "tau")
    assert best_bound([[10, 10, 10, 10]], [[2, 2]], [1.0, 9.0]) == (pytest.approx([20.0]), "slots")
    assert best_bound([[10, 10, 10]], [[2, 2]], replicas_L=[3]) == (pytest.approx([20.0]), "packing")
    assert best_bound([[1, 1, 1]], [[1, 1]])[0][0] == np.inf


def test_no_load_and_no_gpu() -> None:
    assert best_bound([[0, 0]], [[1, 1]])[0][0] == 0.0
    assert np.isinf(best_bound([[1, 1]], [[0, 0]])[0][0])
    assert np.isinf(mean_bound([[1, 1]], [[0, 0]])[0])


def test_named_bounds_are_parts_of_the_best() -> None:
    rng = np.random.default_rng(2)
    load = rng.lognormal(0, 2, (50, 10))
    capacity = rng.integers(1, 5, (50, 4)) + np.array([2, 0, 1, 1])
    speed = np.array([1.0, 2.0, 1.0, 0.5])
    parts = np.array(
        [f(load, capacity, speed) for f in (mean_bound, tau_star, slots_bound, packing_bound)]  # type: ignore[operator]
    )
    np.testing.assert_allclose(best_bound(load, capacity, speed)[0], parts.max(axis=0))


@given(st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_density_certifies_a_placement(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    hosts_EG = rng.random((experts, gpus)) < 0.5
    hosts_EG[np.arange(experts), rng.integers(0, gpus, experts)] = True
    slots = np.full((1, gpus, experts), -1, dtype=np.int32)
    share = np.zeros((1, gpus, experts))
    weight_EG = hosts_EG * rng.random((experts, gpus)) * (rng.random((experts, gpus)) < 0.7)
    weight_EG = np.where(weight_EG.sum(axis=1, keepdims=True) > 0, weight_EG, hosts_EG)
    weight_EG = weight_EG / weight_EG.sum(axis=1, keepdims=True)
    for g in range(gpus):
        for c, e in enumerate(np.flatnonzero(hosts_EG[:, g])):
            slots[0, g, c], share[0, g, c] = e, weight_EG[e, g]
    load = rng.integers(0, 50, (1, experts)).astype(float)
    speed = rng.choice([0.5, 1.0, 2.0], gpus)
    hosts = [tuple(np.flatnonzero(hosts_EG[:, g])) for g in range(gpus)]
    best = time_of(hosts, load[0], speed, "fractional", TimeModel())
    assert density_bound(load, slots, share, speed)[0] <= best * (1 + 1e-9) + 1e-12


def test_density_meets_optimal_shares() -> None:
    # Experts 0 and 1 share GPUs 0 and 1 perfectly; expert 2 has GPU 2 for itself.
    slots = np.array([[[0, -1], [0, 1], [2, -1]]], dtype=np.int32)
    share = np.array([[[0.75, 0.0], [0.25, 1.0], [1.0, 0.0]]])
    load = [[8.0, 4.0, 1.0]]
    assert density_bound(load, slots, share)[0] == pytest.approx(6.0)
    assert density_bound(load, slots, share, [1.0, 1.0, 0.1])[0] == pytest.approx(10.0)


@pytest.mark.parametrize("gpus", [32, 64])
def test_mean_settles_recorded_loads(shared_data: Any, gpus: int) -> None:
    counts = np.load(shared_data / "deepseek_v3_counts.npz")["counts"]
    for load in counts:
        bound, name = best_bound(load, np.full((58, gpus), {32: 9, 64: 5}[gpus]))
        assert (name == "mean").all()
        np.testing.assert_allclose(bound, load.sum(axis=1) / gpus)
