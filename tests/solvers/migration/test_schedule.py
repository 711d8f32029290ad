"""Migration schedules: replayed replica by replica by an independent check."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.migration import HOST, Migration, migration_violations
from moeless_opt.problems.spec.placement import held_LGE
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.solvers.migration.schedule import migration_graph, schedule_migration, staging_limit

LINKS = Links(intra_node=100.0, inter_node=10.0, host=5.0, latency=0.0)


def random_slots(rng: np.random.Generator, layers: int, gpus: int, slots: int, experts: int) -> np.ndarray:
    """A valid placement: every expert once somewhere, the other slots at random, none twice on a GPU."""
    result = np.full((layers, gpus, slots), -1, dtype=np.int32)
    for layer in range(layers):
        room = np.repeat(np.arange(gpus), slots)
        rng.shuffle(room)
        fill = [0] * gpus
        for expert, gpu in enumerate(room[:experts]):
            result[layer, gpu, fill[gpu]] = expert
            fill[gpu] += 1
        for gpu in room[experts:]:
            extra = rng.integers(experts)
            if extra not in result[layer, gpu] and rng.random() < 0.8:
                result[layer, gpu, fill[gpu]] = extra
                fill[gpu] += 1
    return result


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 4),
    slots=st.integers(1, 4),
    layers=st.integers(1, 3),
    spare=st.integers(0, 3),
)
def test_any_schedule_is_safe(
    seed: int, nodes: int, per_node: int, slots: int, layers: int, spare: int
) -> None:
    rng = np.random.default_rng(seed)
    gpus = nodes * per_node
    experts = int(rng.integers(1, gpus * slots + 1))
    before = random_slots(rng, layers, gpus, slots, experts)
    after = random_slots(rng, layers, gpus, slots, experts)
    topology = Topology.uniform(nodes, per_node, slots=slots, links=LINKS)
    size_L = rng.integers(1, 4, layers)
    limit_G = np.full(gpus, int(size_L.sum() * slots + spare))
    try:
        migration = schedule_migration(before, after, experts, topology, bytes_L=size_L, limit_G=limit_G)
    except InfeasibleError:
        assert spare < size_L.max()  # a whole spare replica on every GPU always suffices
        return
    problems = migration_violations(
        migration, before, after, experts, topology, bytes_L=size_L, limit_G=limit_G
    )
    assert problems == []
    moved = (held_LGE(after, experts) & ~held_LGE(before, experts)).sum()
    assert len(migration.transfers) == moved + migration.staged


def test_nothing_to_do_is_an_empty_schedule() -> None:
    slots = np.array([[[0, 1], [2, 3]]], dtype=np.int32)
    migration = schedule_migration(slots, slots[:, :, ::-1], 4, Topology.uniform(1, 2, slots=2))
    assert migration.steps == ()
    assert migration.seconds == migration.lower_bound == 0


def test_a_ring_without_room_parks_one_replica() -> None:
    """Three full GPUs pass their only experts on; the fourth has room to park one."""
    topology = Topology.uniform(1, 4, slots=1, links=LINKS)
    before = np.array([[[0], [1], [2], [-1]]], dtype=np.int32)
    after = np.array([[[2], [0], [1], [-1]]], dtype=np.int32)
    limit = np.ones(4, dtype=np.int64)
    migration = schedule_migration(before, after, 3, topology, limit_G=limit)
    assert migration.staged == 1
    assert migration_violations(migration, before, after, 3, topology, limit_G=limit) == []
    with pytest.raises(InfeasibleError, match="1 spare bytes"):
        schedule_migration(
            before[:, :3], after[:, :3], 3, Topology.uniform(1, 3, slots=1, links=LINKS), limit_G=limit[:3]
        )


def test_a_hot_expert_spreads_by_doubling() -> None:
    topology = Topology.uniform(1, 8, slots=2, links=LINKS)
    before = np.full((1, 8, 2), -1, dtype=np.int32)
    before[0, :, 0] = np.arange(8)
    after = before.copy()
    after[0, 1:, 1] = 0
    migration = schedule_migration(before, after, 8, topology)
    assert len(migration.steps) == 3
    assert migration.seconds == pytest.approx(migration.lower_bound)


def test_nearest_source_and_host_for_lost_experts() -> None:
    topology = Topology.uniform(2, 2, slots=2, links=LINKS)
    before = np.array([[[0, -1], [-1, -1], [0, -1], [-1, -1]]], dtype=np.int32)
    after = np.array([[[0, -1], [1, -1], [0, -1], [0, -1]]], dtype=np.int32)
    migration = schedule_migration(before, after, 2, topology)
    sources = {(t.expert, t.target): t.source for t in migration.transfers}
    assert sources == {(1, 1): HOST, (0, 3): 2}
    kinds = {data["kind"] for _, _, data in migration_graph(migration, topology).edges(data=True)}
    assert kinds == {"host", "intra"}


def test_permutation_of_full_gpus_takes_one_step_per_replica() -> None:
    """Every GPU passes its whole bank to the next: each port is busy in every step, no step is wasted."""
    topology = Topology.uniform(1, 6, slots=3, links=LINKS)
    before = np.arange(18, dtype=np.int32).reshape(1, 6, 3)
    after = np.roll(before, 1, axis=1)
    limit = np.full(6, 4)
    migration = schedule_migration(before, after, 18, topology, limit_G=limit)
    assert len(migration.steps) == 3
    assert migration_violations(migration, before, after, 18, topology, limit_G=limit) == []


def test_step_bytes_are_limited() -> None:
    topology = Topology.uniform(1, 4, slots=2, links=LINKS)
    before = np.array([[[0, -1], [1, -1], [2, -1], [3, -1]]], dtype=np.int32)
    after = np.array([[[0, 1], [1, 2], [2, 3], [3, 0]]], dtype=np.int32)
    size = np.array([10])
    migration = schedule_migration(before, after, 4, topology, bytes_L=size, max_step_bytes=20)
    assert max(sum(t.bytes for t in step.transfers) for step in migration.steps) == 20
    with pytest.raises(ProblemError, match="max_step_bytes"):
        schedule_migration(before, after, 4, topology, bytes_L=size, max_step_bytes=9)


def test_limits_of_memory_and_of_slots() -> None:
    size_L = np.array([5, 7])
    capacity = np.full((2, 3), 2)
    by_slots = staging_limit(Topology.uniform(1, 3, slots=2), size_L, capacity, None)
    assert by_slots.tolist() == [31, 31, 31]
    by_bytes = staging_limit(Topology.uniform(1, 3, memory=40), size_L, capacity, None)
    assert by_bytes.tolist() == [40, 40, 40]


def test_the_check_sees_a_broken_schedule() -> None:
    topology = Topology.uniform(1, 2, slots=2, links=LINKS)
    before = np.array([[[0, 1], [2, -1]]], dtype=np.int32)
    after = np.array([[[0, -1], [2, 1]]], dtype=np.int32)
    good = schedule_migration(before, after, 3, topology)
    assert migration_violations(good, before, after, 3, topology) == []
    backwards = Migration(
        steps=good.steps[::-1] + good.steps, seconds=1.0, lower_bound=2.0, peak_G=good.peak_G + 1
    )
    text = " ".join(migration_violations(backwards, before, after, 3, topology))
    for rule in ("already holds", "quicker than", "peak", "add up"):
        assert rule in text
