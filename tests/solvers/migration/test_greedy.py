"""Large migrations, ordered greedily: safe, complete, and not much longer than with a flow for every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.plan.migration import migration_violations
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.spec.topology import TOPOLOGY_PRESETS, Topology
from moeless_opt.solvers.migration import schedule as migration
from moeless_opt.solvers.migration.greedy import schedule_greedily

LINKS = TOPOLOGY_PRESETS["4x8xH100"][3]


def placement(rng: np.random.Generator, layers: int, gpus: int, slots: int, experts: int) -> np.ndarray:
    """Every expert once, the rest of the slots at random (some empty)."""
    out = np.full((layers, gpus, slots), -1, dtype=np.int32)
    for layer in range(layers):
        for number, expert in enumerate(rng.permutation(experts).tolist()):
            out[layer, number % gpus, number // gpus] = expert
        for gpu in range(gpus):
            for slot in np.flatnonzero(out[layer, gpu] < 0):
                others = [e for e in range(experts) if e not in out[layer, gpu]]
                if others and rng.uniform() < 0.8:
                    out[layer, gpu, slot] = rng.choice(others)
    return np.take_along_axis(out, np.argsort(out < 0, axis=2, kind="stable"), axis=2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_greedy_schedules_are_safe_and_complete(
    seed: int, nodes: int, per_node: int, slots: int, layers: int
) -> None:
    rng = np.random.default_rng(seed)
    gpus = nodes * per_node
    experts = max(gpus * slots * 3 // 4, 1)
    topology = Topology.uniform(nodes, per_node, slots=slots, links=LINKS)
    before = placement(rng, layers, gpus, slots, experts)
    after = placement(rng, layers, gpus, slots, experts)
    if seed % 3 == 0:  # lost experts come from the host
        before[:, 0] = -1
    size_L = rng.integers(1, 5, layers) * 10**6
    found = schedule_greedily(before, after, experts, topology, size_L)
    lost = migration_violations(found, before, after, experts, topology, bytes_L=size_L)
    assert [text for text in lost if "without" not in text or seed % 3] == []
    assert found.seconds >= found.lower_bound * (1 - 1e-9)


def test_a_whole_model_takes_hardly_longer_than_with_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    topology = Topology.uniform(1, 8, slots=3, links=LINKS)
    after = placement(rng, 24, 8, 3, 8)
    size_L = np.full(24, 10**7)
    for before in (placement(rng, 24, 8, 3, 8), contiguous(8, np.full((24, 8), 3))):
        greedy = migration.schedule_migration(before, after, 8, topology, bytes_L=size_L)
        monkeypatch.setattr(migration, "MANY", 10**9)
        flow = migration.schedule_migration(before, after, 8, topology, bytes_L=size_L)
        monkeypatch.undo()
        assert len(flow.transfers) == len(greedy.transfers) > migration.MANY
        assert flow.lower_bound <= greedy.seconds <= 1.1 * flow.seconds


def test_a_hot_expert_spreads_by_doubling() -> None:
    topology = Topology.uniform(1, 32, slots=1, links=LINKS)
    before = np.full((1, 32, 1), -1, dtype=np.int32)
    before[0, 0, 0] = 0
    after = np.zeros((1, 32, 1), dtype=np.int32)
    found = schedule_greedily(before, after, 1, topology, np.array([10**6]))
    assert [len(step.transfers) for step in found.steps] == [1, 2, 4, 8, 16]


def test_the_own_node_is_asked_first() -> None:
    topology = Topology.uniform(2, 2, slots=1, links=LINKS)
    before = np.array([[[0], [1], [0], [-1]]], dtype=np.int32)
    after = np.array([[[0], [1], [0], [0]]], dtype=np.int32)
    found = schedule_greedily(before, after, 2, topology, np.array([10**6]))
    assert [(move.source, move.target) for move in found.transfers] == [(2, 3)]
