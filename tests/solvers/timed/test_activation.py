"""Activated experts: exact against enumeration and maximum flow; shares that pay."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.solvers.timed.activation import fewest_activated, worthwhile_replicas


def random_layer(seed: int, experts: int, gpus: int, density: float) -> Any:
    rng = np.random.default_rng(seed)
    holds = rng.random((experts, gpus)) < density
    holds[np.arange(experts), rng.integers(0, gpus, experts)] = True
    slots = np.full((gpus, experts), -1)
    for g in range(gpus):
        held = rng.permutation(np.flatnonzero(holds[:, g]))
        slots[g, : len(held)] = held
    load = rng.integers(0, 6, experts).astype(float)
    return load, slots, holds


def check(result: Any, load: Any, holds: Any, speed: Any) -> float:
    active = np.flatnonzero(load > 0)
    assert (result.gpu_E[load == 0] == -1).all()
    assert holds[active, result.gpu_E[active]].all()
    count = np.bincount(result.gpu_E[active], minlength=len(speed))
    np.testing.assert_array_equal(count, result.activated_G)
    worst = float((count / speed).max())
    # The proof: more experts have all their hosts among these GPUs than fit at any lower level.
    inside = result.proof_G
    confined = int((~holds[active][:, ~inside].any(axis=1)).sum())
    assert worst == 0 or (np.ceil(worst * speed[inside]) - 1).sum() < confined
    return worst


@given(st.integers(0, 100_000), st.booleans())
@settings(max_examples=400, deadline=None)
def test_fewest_against_enumeration(seed: int, alike: bool) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    load, slots, holds = random_layer(seed, experts, gpus, 0.4)
    speed = np.ones(gpus) if alike else rng.choice([0.5, 1.0, 2.0], gpus)
    active = np.flatnonzero(load > 0)
    choices = itertools.product(*(np.flatnonzero(holds[e]) for e in active))
    best = min(float((np.bincount(np.array(c, int), minlength=gpus) / speed).max()) for c in choices)
    for tokens in (False, True):
        assert check(fewest_activated(load, slots, speed, tokens=tokens), load, holds, speed) == best


@pytest.mark.parametrize("seed", range(8))
def test_fewest_against_maximum_flow(seed: int) -> None:
    load, slots, holds = random_layer(seed, 60, 8, 0.2)
    level = check(fewest_activated(load, slots), load, holds, np.ones(8))
    active = [int(e) for e in np.flatnonzero(load > 0)]

    def feasible(most: float) -> bool:
        graph = nx.DiGraph()
        for e in active:
            graph.add_edge("source", ("expert", e), capacity=1)
            for g in np.flatnonzero(holds[e]):
                graph.add_edge(("expert", e), ("gpu", int(g)), capacity=1)
        for g in range(8):
            graph.add_edge(("gpu", g), "sink", capacity=int(most))
        return bool(nx.maximum_flow_value(graph, "source", "sink") == len(active))

    assert feasible(level)
    assert not feasible(level - 1)


def test_tokens_are_levelled_at_no_extra_activation() -> None:
    slots = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    load = np.array([9.0, 1.0, 8.0, 2.0])
    result = fewest_activated(load, slots)
    assert result.activated_G.tolist() == [2, 2]
    assert sorted(np.bincount(result.gpu_E, weights=load).tolist()) == [10.0, 10.0]


def test_missing_expert() -> None:
    with pytest.raises(InfeasibleError, match="expert 1 has 5 tokens and is on no GPU"):
        fewest_activated([1.0, 5.0], [[0, -1], [0, -1]])
    fewest_activated([1.0, 0.0], [[0, -1], [0, -1]])


def test_more_replicas_can_be_slower() -> None:
    load = np.random.default_rng(0).lognormal(0, 0.3, (3, 8)) * 4
    capacity, speed = np.full((3, 4), 8), np.ones(4)
    dear, time_L = worthwhile_replicas(load, capacity, speed, TimeModel(activation_cost=50.0))
    cheap, _ = worthwhile_replicas(load, capacity, speed, TimeModel(activation_cost=1e-6))
    assert ((dear >= 0).sum(axis=(1, 2)) == 8).all()
    assert ((cheap >= 0).sum(axis=(1, 2)) > 8).all()
    # Two experts per GPU at least, and the tokens of the fullest.
    assert (time_L >= 100 + load.sum(axis=1) / 4).all()
