"""Replica counts: optimal for the largest piece, under caps, minima and unequal GPUs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.pack.counts import apportion, hostable, largest_piece, trim

LOADS = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1e6)), min_size=1, max_size=5)


def best_piece(load, total, cap, least=1):
    """The smallest possible largest piece, over all counts."""
    options = (c for c in itertools.product(range(least, cap + 1), repeat=len(load)) if sum(c) <= total)
    return min(max(w / r for w, r in zip(load, c, strict=True)) for c in options)


@settings(max_examples=150, deadline=None)
@given(load=LOADS, spare=st.integers(0, 6), cap=st.integers(1, 4))
def test_largest_piece_is_optimal(load, spare, cap):
    total = len(load) + spare
    counts = apportion(np.array([load]), total, cap)
    assert counts.dtype == np.int32
    assert counts.min() >= 1
    assert counts.max() <= cap
    assert counts.sum() == min(total, cap * len(load))
    assert largest_piece(np.array([load]), counts)[0] == best_piece(load, total, cap)


@settings(max_examples=60, deadline=None)
@given(load=LOADS, spare=st.integers(0, 8))
def test_minimum_is_kept_and_paid_for(load, spare):
    total = 2 * len(load) + spare
    counts = apportion(np.array([load]), total, 5, least=2)
    assert counts.min() >= 2
    assert largest_piece(np.array([load]), counts)[0] == best_piece(load, total, 5, least=2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spare=st.integers(0, 200), lean=st.sampled_from([0.0, 0.3, 1.0]))
def test_entering_in_the_middle_changes_nothing(seed, spare, lean):
    """Against the greedy from its very start."""
    load = np.random.default_rng(seed).lognormal(0, 1.5, 20)
    counts = np.ones(20)
    for _ in range(spare):
        key = np.where(counts < 16, load / (counts + lean), -1.0)
        if key.max() >= 0:
            counts[key.argmax()] += 1
    assert (apportion(load[None], 20 + spare, 16, lean=lean)[0] == counts).all()


def test_each_layer_has_its_own_total_and_cap():
    load = np.array([[4.0, 1.0, 1.0], [4.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    counts = apportion(load, [3, 6, 4], np.array([[3], [3], [3]]))
    assert counts.tolist() == [[1, 1, 1], [3, 2, 1], [2, 1, 1]]


def test_published_example():
    """FlashLB's loads: no piece above 120, as in the greedy of EPLB."""
    counts = apportion(np.array([[600, 560, 120, 120, 20, 10, 10, 10.0]]), 16, 8)
    assert counts.tolist() == [[5, 5, 1, 1, 1, 1, 1, 1]]


def test_too_few_slots_are_named():
    with pytest.raises(
        InfeasibleError, match=r"layer 1: 3 experts need at least 3 slots, there are 2: 1 too few"
    ):
        apportion(np.ones((2, 3)), [3, 2])


def brute_hostable(counts, capacity):
    """Try all placements."""
    G = len(capacity)
    rooms = {tuple(capacity)}
    for count in counts:
        rooms = {
            tuple(room - (g in chosen) for g, room in enumerate(rooms_))
            for rooms_ in rooms
            for chosen in itertools.combinations(range(G), count)
            if all(rooms_[g] > 0 for g in chosen)
        }
    return bool(rooms)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    capacity=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
def test_hostable_is_what_a_search_says(counts, capacity):
    assert hostable(np.array([counts]), np.array([capacity]))[0] == brute_hostable(counts, capacity)


@settings(max_examples=100, deadline=None)
@given(load=LOADS, capacity=st.lists(st.integers(0, 5), min_size=2, max_size=4))
def test_trimmed_counts_are_the_best_that_can_be_hosted(load, capacity):
    E, G = len(load), len(capacity)
    load_LE, capacity_LG = np.array([load]), np.array([capacity])
    total = int(np.minimum(capacity, E).sum())
    if total < E:
        return
    counts = trim(load_LE, apportion(load_LE, total, G), capacity_LG)
    assert hostable(counts, capacity_LG)[0]
    options = (c for c in itertools.product(range(1, G + 1), repeat=E) if brute_hostable(c, capacity))
    assert largest_piece(load_LE, counts)[0] == min(
        max(w / r for w, r in zip(load, c, strict=True)) for c in options
    )
