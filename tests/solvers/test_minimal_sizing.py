"""Minimal sizing against enumeration and against the paper's greedy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.minimal_sizing import fewest_for_cv
from moeless_opt.solvers.moeless import replica_cv, scale


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
