"""The replay of a schedule against a second one that writes down every holding: the same words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.migration import (
    HOST,
    Drop,
    Migration,
    Step,
    Transfer,
    migration_violations,
    port_kind,
    transfer_seconds,
)
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.solvers.migration.schedule import schedule_migration
from tests.strategies import random_slots

LINKS = Links(intra_node=100.0, inter_node=10.0, host=4.0, latency=0.5)
Held = set[tuple[int, int, int]]


def held_of(slots_LGC: Any) -> Held:
    return {
        (x, g, int(e))
        for x, row in enumerate(slots_LGC)
        for g, held in enumerate(row)
        for e in held
        if e >= 0
    }


def link(topology: Topology, move: Transfer) -> tuple[str, float]:
    """Port and bytes a second."""
    if move.source == HOST:
        return "host", LINKS.host
    near = topology.node_G[move.source] == topology.node_G[move.target]
    return ("intra", LINKS.intra_node) if near else ("inter", LINKS.inter_node)


def weight(held: Held, gpu: int, size_L: Any) -> int:
    return sum(int(size_L[x]) for x, g, _ in held if g == gpu)


def judged(
    migration: Migration, before: Any, after: Any, topology: Topology, size_L: Any, limit_G: Any
) -> list[str]:
    """All that is wrong with a schedule."""
    held, said = held_of(before), []
    gpus = range(topology.gpus)
    peak = [weight(held, g, size_L) for g in gpus]

    def drop(where: str, gone: Drop) -> None:
        key = (gone.layer, gone.gpu, gone.expert)
        if key not in held:
            said.append(f"{where}: GPU {gone.gpu} does not hold expert {gone.expert} of row {gone.layer}")
            return
        held.remove(key)
        if not any((x, e) == (gone.layer, gone.expert) for x, _, e in held):
            said.append(f"{where}: expert {gone.expert} of row {gone.layer} has no live replica")

    for number, step in enumerate(migration.steps):
        where = f"step {number}"
        for gone in step.drops_before:
            drop(where, gone)
        ports: Counter[tuple[str, str, int]] = Counter()
        seconds, coming = [0.0], set[tuple[int, int, int]]()
        for move in step.transfers:
            port, rate = link(topology, move)
            seconds.append(LINKS.latency + move.bytes / rate)
            assert transfer_seconds(topology, move.source, move.target, move.bytes) == seconds[-1]
            assert port_kind(topology, move.source, move.target) == port
            if move.source != HOST and (move.layer, move.source, move.expert) not in held:
                said.append(f"{where}: GPU {move.source} sends expert {move.expert}, which it does not hold")
            if (move.layer, move.target, move.expert) in held | coming:
                said.append(f"{where}: GPU {move.target} already holds expert {move.expert}")
            coming.add((move.layer, move.target, move.expert))
            for end, gpu in (("out", move.source), ("in", move.target)):
                ports[port, end, gpu] += 1
                if gpu != HOST and ports[port, end, gpu] > 1:
                    said.append(f"{where}: GPU {gpu} uses its {port} port ({end}) twice")
        held |= coming
        peak = [max(top, weight(held, g, size_L)) for g, top in enumerate(peak)]
        if abs(max(seconds) - step.seconds) > 1e-9 + 1e-6 * max(seconds):
            said.append(f"{where}: claims {step.seconds} s, takes {max(seconds)} s")
        for gone in step.drops_after:
            drop(where, gone)
    if held != held_of(after):
        said.append("the schedule does not end in the new placement")
    over = [g for g in gpus if limit_G is not None and peak[g] > limit_G[g]]
    if over:
        gpu = max(over, key=lambda g: (peak[g] - limit_G[g], -g))
        said.append(f"GPU {gpu} would hold {peak[gpu]} at its peak, its limit is {limit_G[gpu]}")
    if peak != migration.peak_G.tolist():
        said.append("the claimed peak memory is not that of the schedule")
    if migration.seconds < migration.lower_bound * (1 - 1e-9):
        said.append("the schedule claims to be quicker than its lower bound")
    if (
        abs(migration.seconds - sum(step.seconds for step in migration.steps))
        > 1e-9 + 1e-6 * migration.seconds
    ):
        said.append("the steps' times do not add up")
    return said


def broken(rng: Any, migration: Migration, gpus: int, experts: int) -> Migration:
    """A schedule with something changed."""
    steps = list(migration.steps)
    kind = int(rng.integers(10))
    near = float(rng.choice([1 - 3e-6, 1 - 3e-7, 1 + 3e-7, 1 + 3e-6, 0.5]))
    if kind == 0:
        return migration.replace(peak_G=migration.peak_G + (np.arange(gpus) == rng.integers(gpus)))
    if kind == 1:
        return migration.replace(seconds=migration.seconds * near)
    if kind == 2:
        return migration.replace(lower_bound=migration.seconds * (1 + float(rng.choice([1e-6, 1e-12]))))
    if not steps:
        return migration
    at = int(rng.integers(len(steps)))
    step = steps[at]
    if kind == 3:
        steps[at] = replace(step, seconds=step.seconds * near)
    elif kind == 4 and at + 1 < len(steps):  # two steps in one
        after = steps.pop(at + 1)
        steps[at] = replace(
            step,
            transfers=step.transfers + after.transfers,
            drops_before=step.drops_before + after.drops_before,
            drops_after=step.drops_after + after.drops_after,
            seconds=max(step.seconds, after.seconds),
        )
    elif kind == 5:
        steps[at] = replace(step, drops_before=step.drops_before + step.drops_after, drops_after=())
    elif kind == 6:
        steps.pop(at)
    elif kind == 7 and step.transfers:
        moves = list(step.transfers)
        one = int(rng.integers(len(moves)))
        changes = [
            {"source": int(rng.integers(-1, gpus))},
            {"target": int(rng.integers(gpus))},
            {"expert": int(rng.integers(experts))},
        ]
        moves[one] = replace(moves[one], **changes[rng.integers(3)])
        steps[at] = replace(step, transfers=tuple(moves))
    elif kind == 8:
        gone = Drop(0, int(rng.integers(experts)), int(rng.integers(gpus)))
        steps[at] = replace(step, drops_after=(*step.drops_after, gone))
    else:
        steps[at] = replace(step, transfers=step.transfers * 2)
    return migration.replace(steps=tuple(steps))


def test_the_same_words_as_a_second_replay() -> None:
    rng = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    for _ in range(500):
        nodes, each = (int(n) for n in rng.integers(1, 4, 2))
        gpus, layers, slots = nodes * each, int(rng.integers(1, 4)), int(rng.integers(1, 4))
        experts = int(rng.integers(1, min(gpus * slots, 8) + 1))
        topology = Topology.uniform(nodes, each, slots=slots, links=LINKS)
        capacity = np.full((layers, gpus), min(slots, experts))
        if capacity[0].sum() < experts:
            continue
        before = random_slots(rng, capacity, experts)
        if rng.random() < 0.3:
            before[before == rng.integers(experts)] = -1  # lost: it comes from the host
        after = random_slots(rng, capacity, experts)
        bytes_L = [None, rng.integers(0, 5, layers), np.zeros(layers, dtype=np.int64)][rng.integers(3)]
        size_L = np.ones(layers, dtype=np.int64) if bytes_L is None or not bytes_L.any() else bytes_L
        found = schedule_migration(before, after, experts, topology, bytes_L=bytes_L)
        limit_G = found.peak_G - rng.integers(0, 2, gpus) if rng.random() < 0.4 else None
        if rng.random() < 0.7:
            found = broken(rng, found, gpus, experts)
        said = migration_violations(found, before, after, experts, topology, bytes_L=bytes_L, limit_G=limit_G)
        assert said == judged(found, before, after, topology, size_L, limit_G)
        kinds.update([" ".join(word for word in text.split() if word.isalpha()) for text in said] or ["none"])
    assert len(kinds) > 10, kinds
    assert kinds["none"] > 100


def test_what_a_schedule_is_called() -> None:
    step = Step(
        drops_before=(Drop(1, 2, 0),),
        transfers=(Transfer(0, 3, HOST, 1, 5), Transfer(1, 2, 1, 0, 7)),
        drops_after=(Drop(0, 0, 1),),
        seconds=0.5,
    )
    more = Step(drops_before=(), transfers=(Transfer(1, 0, 0, 1, 7),), drops_after=(), seconds=0.25)
    peak = np.array([1, 2])
    migration = Migration(steps=(step, more), seconds=0.75, lower_bound=0.5, peak_G=peak, staged=2)
    assert migration.transfers == (*step.transfers, *more.transfers)
    assert migration.bytes == 19
    named = migration.named((3, 7))
    assert [(one.layer, one.expert) for one in named.transfers] == [(3, 3), (7, 2), (7, 0)]
    assert named.steps[0].drops_before == (Drop(7, 2, 0),)
    assert named.steps[0].drops_after == (Drop(3, 0, 1),)
    assert [one.seconds for one in named.steps] == [0.5, 0.25]
    assert (named.seconds, named.lower_bound, named.staged) == (0.75, 0.5, 2)
    for told, words in (
        (migration, ("3 transfers, 19 B in 2 steps, 750 ms", "at least 500 ms", "2 by way of a third GPU")),
        (migration.replace(seconds=0.0, staged=0), ("3 transfers, 19 B in 2 steps, 0 ms)",)),
    ):
        for part in words:
            assert part in repr(told)
    assert "third GPU" not in repr(migration.replace(staged=0))


@pytest.mark.parametrize("source", [HOST, 0, 1, 2])
def test_seconds_of_a_transfer(source: int) -> None:
    topology = Topology.uniform(2, 2, slots=1, links=LINKS)
    rate = {HOST: 4.0, 0: 100.0, 1: 100.0, 2: 10.0}[source]
    assert transfer_seconds(topology, source, 1, 200) == 0.5 + 200 / rate
