"""Schedules: their bound by its definition, the order of priorities, and how few steps they take in all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan.migration import Migration, migration_violations
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.solvers.migration import schedule as module
from moeless_opt.solvers.migration.greedy import schedule_greedily
from moeless_opt.solvers.migration.schedule import migration_bound, schedule_migration
from tests.strategies import random_slots

LINKS = (
    Links(intra_node=100.0, inter_node=10.0, host=5.0, latency=0.25),
    Links(intra_node=10.0, inter_node=20.0, host=4.0, latency=0.0),
)


def drawn(rng: Any, most_gpus: int = 8) -> tuple[Any, Any, int, Topology, Any]:
    """Two placements, now and then with experts that nobody holds, on one to three nodes of uneven size."""
    nodes = int(rng.integers(1, 4))
    gpus, layers, slots = int(rng.integers(nodes, most_gpus + 1)), *(int(n) for n in rng.integers(1, 4, 2))
    node_G = np.sort(np.r_[np.arange(nodes), rng.integers(0, nodes, gpus - nodes)])
    topology = Topology(
        node_G=node_G, speed_G=np.ones(gpus), slots_G=np.full(gpus, slots), links=LINKS[rng.integers(2)]
    )
    experts = int(rng.integers(1, gpus * slots + 1))
    capacity = np.full((layers, gpus), min(slots, experts))
    experts = min(experts, int(capacity[0].sum()))
    before, after = random_slots(rng, capacity, experts), random_slots(rng, capacity, experts)
    if rng.random() < 0.3:
        before[before == rng.integers(experts)] = -1
    return before, after, experts, topology, rng.integers(1, 5, layers)


def least_seconds(before: Any, after: Any, experts: int, topology: Topology, size_L: Any) -> float:
    """The busiest port by its own sum; the doublings of one expert."""
    links, node = topology.links, topology.node_G.tolist()
    gpus, many = range(topology.gpus), topology.nodes > 1
    ports = 2 if many else 1
    into, across, from_host, out = (dict.fromkeys(gpus, 0.0) for _ in range(4))
    entering = dict.fromkeys(range(topology.nodes), 0.0)
    longest = 0.0
    for x, e in np.ndindex(len(before), experts):
        live = [g for g in gpus if e in before[x, g]]
        new = [g for g in gpus if e in after[x, g] and g not in live]
        if not new:
            continue
        size = int(size_L[x])
        quick = links.latency + size / max(links.intra_node, links.inter_node)
        slow = links.latency + size / links.inter_node
        if not live:
            if len(new) == 1:  # others could get theirs from the first
                from_host[new[0]] += links.latency + size / links.host
            continue
        doublings = math.ceil(math.log2(1 + len(new) / len(live)))
        longest = max(longest, quick * math.ceil(doublings / ports))
        if len(live) == 1:
            out[live[0]] += quick
        homes = {node[g] for g in live}
        for g in new:
            into[g] += quick
            if node[g] not in homes and sum(node[h] == node[g] for h in new) == 1:
                across[g] += slow
        for n in {node[g] for g in new} - homes:
            entering[n] += slow
    return max(
        max(into.values()) / ports,
        max(out.values()) / ports,
        max(across.values()),
        max(from_host.values()),
        max(took / node.count(n) for n, took in entering.items()),
        longest,
    )


def test_the_bound_is_the_busiest_port() -> None:
    rng = np.random.default_rng(0)
    for _ in range(250):
        before, after, experts, topology, size_L = drawn(rng)
        bound = migration_bound(before, after, experts, topology, size_L)
        assert bound == pytest.approx(least_seconds(before, after, experts, topology, size_L), rel=1e-12)
        quick = schedule_greedily(before, after, experts, topology, size_L)
        assert quick.lower_bound <= quick.seconds * (1 + 1e-12)
        assert quick.lower_bound == pytest.approx(greedy_bound(before, after, topology, size_L), rel=1e-12)


def greedy_bound(before: Any, after: Any, topology: Topology, size_L: Any) -> float:
    """What the busiest receiver gets, at the fastest link, on all of its ports at once."""
    links, gpus = topology.links, range(topology.gpus)
    cells = [(x, g) for x in range(len(after)) for g in gpus]
    new = [(x, g, e) for x, g in cells for e in after[x, g] if e >= 0 and e not in before[x, g]]
    lost = any(e not in before[x] for x, _, e in new)
    rate = max(links.intra_node, links.inter_node, links.host if lost else 0.0)
    ports = 3 if lost else 1 if topology.nodes == 1 else 2
    each = {g: sum(links.latency + size_L[x] / rate for x, h, _ in new if h == g) for g in gpus}
    return max(each.values()) / ports


def spent(found: list[Migration]) -> tuple[int, int, float]:
    return (
        sum(len(one.steps) for one in found),
        sum(one.staged for one in found),
        sum(one.seconds for one in found),
    )


def test_no_more_steps_than_ever() -> None:
    """Figures of 120 schedules in all; they may fall."""
    rng = np.random.default_rng(1)
    free, tight, quick = [], [], []
    for _ in range(120):
        before, after, experts, topology, size_L = drawn(rng)
        free.append(schedule_migration(before, after, experts, topology, bytes_L=size_L))
        quick.append(schedule_greedily(before, after, experts, topology, size_L))
        limit_G = (size_L @ (np.maximum((before >= 0).sum(2), (after >= 0).sum(2)))).astype(np.int64)
        limit_G += int(rng.integers(0, 3))
        try:
            found = schedule_migration(before, after, experts, topology, bytes_L=size_L, limit_G=limit_G)
        except InfeasibleError:
            continue
        assert (
            migration_violations(found, before, after, experts, topology, bytes_L=size_L, limit_G=limit_G)
            == []
        )
        tight.append(found)
    assert len(tight) >= 101  # room was found for so many
    for found, most in ((free, (304, 0, 120.35)), (tight, (363, 5, 149.35)), (quick, (313, 0, 124.2))):
        assert all(spends <= figure for spends, figure in zip(spent(found), most, strict=True)), spent(found)


def test_layers_of_priority_go_first() -> None:
    """Every layer wants the same ports: with room for one a step, they go in the order of priority."""
    topology = Topology.uniform(1, 2, slots=2, links=LINKS[0])
    before = np.array([[[0, -1], [1, -1]]] * 4, dtype=np.int32)
    after = np.array([[[0, -1], [1, 0]]] * 4, dtype=np.int32)
    for priority in ([3, 1, 2, 0], [0, 5, 1, 9], [-3, -1, -4, -2]):
        found = schedule_migration(before, after, 2, topology, priority_L=np.array(priority))
        order = [transfer.layer for transfer in found.transfers]
        assert order == sorted(range(4), key=lambda x: -priority[x])


def test_the_busiest_receiver_goes_before_a_layer_of_priority() -> None:
    """One port sends: three replicas to a GPU, and one of a layer of priority to another GPU."""
    topology = Topology.uniform(1, 3, slots=4, links=LINKS[0])
    before = np.full((2, 3, 4), -1, dtype=np.int32)
    before[:, 0] = np.arange(4)
    after = before.copy()
    after[0, 1, :3] = [0, 1, 2]
    after[1, 2, 0] = 3
    found = schedule_migration(before, after, 4, topology, priority_L=np.array([0, 5]))
    assert [(one.layer, one.target) for one in found.transfers] == [(0, 1), (0, 1), (1, 2), (0, 1)]


@pytest.mark.parametrize("most", [4, 7, 9, 30])
def test_steps_within_their_bytes_are_not_wasted(most: int) -> None:
    """Eight GPUs each send one replica of 4 bytes on: as many at once as the bytes allow."""
    topology = Topology.uniform(1, 8, slots=2, links=LINKS[0])
    before = np.full((1, 8, 2), -1, dtype=np.int32)
    before[0, :, 0] = np.arange(8)
    after = before.copy()
    after[0, :, 1] = np.roll(np.arange(8), 1)
    found = schedule_migration(before, after, 8, topology, bytes_L=np.array([4]), max_step_bytes=most)
    each = min(most // 4, 8)
    assert [len(step.transfers) for step in found.steps] == [each] * (8 // each) + [8 % each] * (8 % each > 0)


def test_a_gpu_that_is_over_its_limit_to_begin_with_is_named() -> None:
    topology = Topology.uniform(1, 3, slots=2, links=LINKS[0])
    slots = np.array([[[0, -1], [1, 2], [3, 4]]], dtype=np.int32)
    with pytest.raises(InfeasibleError, match="GPU 1 already holds 14 bytes, its limit is 7"):
        schedule_migration(slots, slots, 5, topology, bytes_L=np.array([7]), limit_G=np.array([7, 7, 8]))


def test_many_transfers_without_a_limit_are_ordered_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    for name, nodes in (("MANY", 1), ("MANY_ACROSS", 2)):
        topology = Topology.uniform(nodes, 4, slots=3, links=LINKS[0])
        capacity = np.full((2, topology.gpus), 3)
        before, after = random_slots(rng, capacity, 9), random_slots(rng, capacity, 9)
        size_L = np.ones(2, dtype=np.int64)
        moves = len(schedule_migration(before, after, 9, topology).transfers)
        greedy = schedule_greedily(before, after, 9, topology, size_L)
        calls: list[int] = []

        def spy(*args: Any, greedy: Migration = greedy, calls: list[int] = calls) -> Migration:
            calls.append(1)
            return greedy

        monkeypatch.setattr(module, "schedule_greedily", spy)
        monkeypatch.setattr(module, name, moves)
        schedule_migration(before, after, 9, topology)
        assert not calls
        monkeypatch.setattr(module, name, moves - 1)
        assert schedule_migration(before, after, 9, topology) is greedy
        for limit in (
            {"limit_G": np.full(topology.gpus, 99)},
            {"max_step_bytes": 99},
            {"priority_L": np.zeros(2, dtype=np.int64)},
        ):
            assert schedule_migration(before, after, 9, topology, **limit) is not greedy
        monkeypatch.undo()


def test_many_transfers_within_limits_are_safe_and_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is done where there are many, done to few: replayed, and beside what the flow makes of them."""
    rng = np.random.default_rng(3)
    flows, greedy = [], []
    for _ in range(150):
        before, after, experts, topology, size_L = drawn(rng)
        limit_G = (size_L @ (np.maximum((before >= 0).sum(2), (after >= 0).sum(2)))).astype(np.int64)
        limits = {
            "limit_G": limit_G + int(rng.integers(0, 5)),
            "max_step_bytes": int(rng.integers(size_L.max(), 20)) if rng.random() < 0.3 else None,
            "priority_L": rng.integers(0, 3, len(size_L)) if rng.random() < 0.3 else None,
        }
        given = (before, after, experts, topology)
        try:
            flow = schedule_migration(*given, bytes_L=size_L, **limits)
        except InfeasibleError:
            continue
        monkeypatch.setattr(module, "MANY", -1)
        monkeypatch.setattr(module, "WINDOW", int(rng.integers(1, 4)))
        found = schedule_migration(*given, bytes_L=size_L, **limits)
        monkeypatch.undo()
        broken = migration_violations(found, *given, bytes_L=size_L, limit_G=limits["limit_G"])
        assert broken == []
        most = limits["max_step_bytes"]
        assert most is None or all(sum(t.bytes for t in step.transfers) <= most for step in found.steps)
        flows.append(flow)
        greedy.append(found)
    assert len(flows) > 110
    assert spent(greedy)[0] <= 1.15 * spent(flows)[0], (spent(greedy), spent(flows))
