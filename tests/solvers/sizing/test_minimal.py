"""Minimal sizing against enumeration and against the paper's greedy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.baselines.moeless import replica_cv, scale
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.sizing.minimal import fewest_for_cv, fewest_for_time


def variation(load: Any, counts: Any, ddof: int, idle: str) -> float:
    pieces = [w / r for w, r in zip(load, counts, strict=True) for _ in range(r) if w > 0 or idle == "count"]
    if len(pieces) < 2 or sum(pieces) == 0:
        return 0.0
    return float(np.std(pieces, ddof=ddof) / np.mean(pieces))


@given(
    load=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    cv=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    extra=st.integers(0, 6),
    most=st.integers(1, 5),
    ddof=st.integers(0, 1),
    idle=st.sampled_from(["count", "ignore"]),
)
@example(load=[12, 16], cv=0.0, extra=5, most=4, ddof=0, idle="count")  # even but for rounding
@settings(max_examples=1000, deadline=None)
def test_minimal_against_enumeration(
    load: Any, cv: float, extra: int, most: int, ddof: int, idle: str
) -> None:
    cap = len(load) + extra
    ranges = [range(1, most + 1) if w else range(1, 2) for w in load]
    every = [c for c in itertools.product(*ranges) if sum(c) <= cap]
    good = [c for c in every if variation(load, c, ddof, idle) <= cv + 1e-9]
    sized = fewest_for_cv([load], cv, cap, max_replicas=most, ddof=ddof, idle=idle)
    counts = sized.replicas_LE[0]
    assert counts.min() >= 1
    assert counts.max() <= most
    assert counts.sum() <= cap
    assert variation(load, counts, ddof, idle) == pytest.approx(sized.cv_L[0], abs=1e-6)
    assert sized.met_L[0] == bool(good)
    if good:
        fewest = min(sum(c) for c in good)
        assert counts.sum() == fewest
        steadiest = min(variation(load, c, ddof, idle) for c in good if sum(c) == fewest)
        assert sized.cv_L[0] == pytest.approx(steadiest, abs=1e-6)
    else:
        assert sized.cv_L[0] == pytest.approx(min(variation(load, c, ddof, idle) for c in every), abs=1e-6)


def test_the_greedys_known_misses() -> None:
    load = [[69.0, 10.0, 9.0, 6.0, 4.0]]
    assert fewest_for_cv(load, 0.2, 16).replicas_LE.sum() == 12
    assert scale(load, 0.2, 16).sum() == 16


@pytest.mark.parametrize("experts", [8, 16, 64])
def test_never_more_than_the_greedy(experts: int) -> None:
    load = np.random.default_rng(experts).lognormal(0, 1, (200, experts))
    minimal = fewest_for_cv(load, 0.2, 4 * experts)
    greedy = scale(load, 0.2, 4 * experts)
    met = replica_cv(load, greedy) <= 0.2
    assert minimal.met_L[met].all()
    assert (minimal.replicas_LE[met].sum(axis=1) <= greedy[met].sum(axis=1)).all()
    assert minimal.replicas_LE[met].sum() < greedy[met].sum()
    np.testing.assert_allclose(replica_cv(load, minimal.replicas_LE), minimal.cv_L, atol=1e-9)


def test_layers_are_independent() -> None:
    load = np.random.default_rng(1).lognormal(0, 1.5, (20, 12))
    cap = np.arange(12, 52, 2)
    together = fewest_for_cv(load, 0.3, cap)
    for layer in range(20):
        alone = fewest_for_cv(load[[layer]], 0.3, int(cap[layer]))
        np.testing.assert_array_equal(alone.replicas_LE[0], together.replicas_LE[layer])


@pytest.mark.parametrize(
    ("options", "word"), [({"cv": -1.0}, "cv"), ({"ddof": 2}, "ddof"), ({"idle": "no"}, "idle")]
)
def test_wrong_arguments(options: Any, word: str) -> None:
    with pytest.raises(ProblemError, match=word):
        fewest_for_cv([[1.0, 2.0]], **options)


def test_cap_below_one_each() -> None:
    with pytest.raises(InfeasibleError, match="cap: layer 0 may have 1"):
        fewest_for_cv([[1.0, 2.0]], cap=1)


def fewest_by_enumeration(load: Any, capacity: Any, speed: Any, time: float) -> int | None:
    sets = [
        [s for k in range(min(len(load), int(c)) + 1) for s in itertools.combinations(range(len(load)), k)]
        for c in capacity
    ]
    best = None
    for hosts in itertools.product(*sets):
        count = np.bincount(list(itertools.chain.from_iterable(hosts)), minlength=len(load))
        if count.min() < 1:
            continue
        worst = max(sum(load[e] / count[e] for e in h) / s for h, s in zip(hosts, speed, strict=True))
        if worst <= time * (1 + 1e-9) and (best is None or count.sum() < best):
            best = int(count.sum())
    return best


@given(
    load=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    gpus=st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=3),
    slack=st.sampled_from([1.0, 1.1, 1.3, 2.0]),
)
@settings(max_examples=200, deadline=None)
def test_fewest_for_a_time_against_enumeration(load: Any, gpus: Any, slack: float) -> None:
    capacity, speed = np.array([c for c, _ in gpus]), np.array([s for _, s in gpus])
    time = slack * sum(load) / speed.sum()
    truth = fewest_by_enumeration(load, capacity, speed, time)
    if np.minimum(capacity, len(load)).sum() < len(load):
        return
    sized = fewest_for_time(np.array([load], float), capacity[None], speed, [time], seconds=20.0)
    assert sized.met_L[0] == (truth is not None)
    if truth is not None:
        assert sized.replicas_L[0] == truth == sized.bound_L[0]
        count = np.bincount(sized.slots_LGC[sized.slots_LGC >= 0], minlength=len(load))
        assert count.min() >= 1
        piece = np.append(np.array(load) / count, 0.0)
        assert (piece[sized.slots_LGC[0]].sum(axis=1) / speed).max() <= time * (1 + 1e-8) + 1e-12


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_fewest_for_an_imbalance_on_many_experts(split: Any) -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (4, 64))
    capacity, speed = np.full((4, 8), 12), np.ones(8)
    time = 1.02 * load.sum(axis=1) / 8
    sized = fewest_for_time(load, capacity, speed, time, split)
    assert sized.met_L.all()
    assert (sized.bound_L <= sized.replicas_L).all()
    assert (sized.replicas_L < 80).all()
    held = sized.slots_LGC >= 0
    tokens = np.where(held, load[np.arange(4)[:, None, None], sized.slots_LGC] * sized.share_LGC, 0.0)
    assert (tokens.sum(axis=2).max(axis=1) <= time * (1 + 1e-8)).all()


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_stopped_at_once_it_takes_all_slots_where_fewer_might_do(split: Any) -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (4, 16))
    capacity, wanted_L = np.full((4, 8), 3), 1.4 * load.sum(axis=1) / 8
    sized = fewest_for_time(load, capacity, np.ones(8), wanted_L, split, stop=MaxTime(0.0))
    assert sized.met_L.all()
    unhurried = fewest_for_time(load, capacity, np.ones(8), wanted_L, split)
    assert (sized.replicas_L == 24).all()
    assert (sized.bound_L <= unhurried.replicas_L).all()
    assert (unhurried.replicas_L < 24).any()
