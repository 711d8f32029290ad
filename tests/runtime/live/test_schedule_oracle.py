"""Parts of a live schedule against their rules in a few words, and how few stages and steps it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.topology import Links
from moeless_opt.runtime.live.schedule import (
    Router,
    Schedule,
    Shipment,
    _pack,
    build_schedule,
    follow_schedule,
)
from moeless_opt.runtime.live.slots import rows_to_slots

Rows = list[list[int]]


def random_rows(rng: Any, experts: int, ranks: int, most: int = 3) -> Rows:
    """Every expert somewhere, some on several ranks."""
    rows: Rows = [[] for _ in range(ranks)]
    for e in rng.permutation(experts).tolist():
        for g in rng.permutation(ranks)[: int(rng.integers(1, most))].tolist():
            rows[g].append(e)
    return rows


def test_a_source_is_on_the_quickest_link_and_has_sent_least() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        ranks = int(rng.integers(1, 6))
        node = rng.integers(0, 2, ranks).tolist()
        rates = rng.choice([1.0, 2.0, 3.0], 3).tolist()
        links = Links(intra_node=rates[0], inter_node=rates[1], host=rates[2])
        copies = {e: rng.permutation(ranks)[: rng.integers(0, 3)].tolist() for e in range(4)}
        router = Router(node, lambda layer, e, copies=copies: copies[e], links)
        sent = [0] * ranks
        for _ in range(12):
            e, to, size = int(rng.integers(4)), int(rng.integers(ranks)), int(rng.integers(1, 9))
            holders = [g for g in rng.permutation(ranks)[: rng.integers(0, 4)].tolist() if g != to]
            ways = [
                (rates[0], [g for g in holders if node[g] == node[to]], False),
                (rates[2], [to] if to in copies[e] else [], True),
                (rates[1], holders, False),
                (min(rates[1:]), copies[e], True),
            ]
            ways = [way for way in ways if way[1]]
            if not ways:
                with pytest.raises(InfeasibleError, match=f"layer 7, expert {e}: no rank holds it"):
                    router.source(7, e, holders, to, size)
                continue
            _, ranks_there, from_home = max(ways, key=lambda way: way[0])  # of equals the first
            best = min(ranks_there, key=lambda g: (sent[g], g))
            assert router.source(7, e, holders, to, size) == Shipment(7, e, best, to, size, from_home)
            if best != to:
                sent[best] += size
            assert router.sent_G == sent
    assert Router([0, 1]).source(0, 0, [1], 0, 5) == Shipment(0, 0, 1, 0, 5)


def test_transfers_go_into_the_first_step_with_room_on_both_ends() -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        gpus, most = int(rng.integers(2, 5)), int(rng.integers(1, 12))
        moves = [
            Shipment(0, k, *rng.permutation(gpus)[:2].tolist(), int(rng.integers(1, 7)))
            for k in range(int(rng.integers(0, 9)))
        ]
        steps: list[list[Shipment]] = []
        for move in moves:
            for step in steps:
                out = sum(one.bytes for one in step if one.source == move.source)
                into = sum(one.bytes for one in step if one.destination == move.destination)
                if max(out, into) + move.bytes <= most:
                    step.append(move)
                    break
            else:
                steps.append([move])
        assert _pack(moves, most, gpus) == [tuple(step) for step in steps]
        assert _pack(moves, None, gpus) == ([tuple(moves)] if moves else [])


def test_stages_and_steps_are_as_few_as_ever() -> None:
    """Figures of 150 schedules in all; they may fall. Layers go in their order, if they fit."""
    rng = np.random.default_rng(2)
    stages = steps = refused = 0
    for _ in range(150):
        ranks, layers, experts = (int(n) for n in rng.integers(1, [5, 3, 7]))
        before = [random_rows(rng, experts, ranks) for _ in range(layers)]
        after = [random_rows(rng, experts, ranks) for _ in range(layers)]
        target = np.stack([rows_to_slots(rows, experts) for rows in after])
        size = rng.integers(2, 5, layers).tolist()
        order = rng.permutation(layers).tolist()
        before, after, size = ([some[x] for x in order] for some in (before, after, size))
        target = target[order]
        extra = int(rng.integers(0, 2))
        node = rng.integers(0, 2, ranks).tolist()
        free = build_schedule(before, target, size, node_G=node)
        assert len(free.stages) == sum(b != a for b, a in zip(before, after, strict=True))  # one each
        assert [s.layer for s in free.stages] == [x for x in range(layers) if before[x] != after[x]]
        try:
            found = build_schedule(
                before,
                target,
                size,
                node_G=node,
                max_extra_bytes=extra,
                max_step_bytes=4,
            )
        except InfeasibleError:
            refused += 1
            continue
        held = [sum(s * len(rows[g]) for s, rows in zip(size, before, strict=True)) for g in range(ranks)]
        goal = [sum(s * len(rows[g]) for s, rows in zip(size, after, strict=True)) for g in range(ranks)]
        assert found.limit_G.tolist() == [max(a, b) + extra for a, b in zip(held, goal, strict=True)]
        stages, steps = stages + len(found.stages), steps + len(found.steps)
        assert found.bytes == free.bytes
    assert stages <= 305
    assert steps <= 280
    assert refused <= 1


def test_what_does_not_fit_names_the_rank_and_what_it_lacks() -> None:
    """Two full ranks that change places, with a byte too few for a third copy."""
    swap = np.array([[[1], [0]]], dtype=np.int32)
    words = "1 layers do not fit: rank 0 has 4 bytes to spare and one expert takes 5"
    with pytest.raises(InfeasibleError, match=words):
        build_schedule([[[0], [1]]], swap, [5], max_extra_bytes=4)
    assert len(build_schedule([[[0], [1]]], swap, [5], max_extra_bytes=5).stages) >= 1


def test_staged_copies_count_as_held_until_they_serve() -> None:
    have: list[Rows] = [[[0], [1]]]
    both = np.array([[[0, 1], [1, 0]]], dtype=np.int32)
    lying = frozenset({(0, 1, 0)})
    found = build_schedule(have, both, [5], staged=lying)
    assert [(t.expert, t.destination) for step in found.steps for t in step] == [(0, 1)]
    # A copy that lies there for nothing takes the room of the one that is wanted: first rank 1, then rank 0.
    swap = np.array([[[1], [0], [2]]], dtype=np.int32)
    alone: list[Rows] = [[[0], [1], [2]]]
    assert len(build_schedule(alone, swap, [5], max_extra_bytes=5).stages) == 1
    found = build_schedule(alone, swap, [5], max_extra_bytes=5, staged=frozenset({(0, 2, 0)}))
    assert [[t.destination for t in step] for step in found.steps] == [[1], [0]]


def transfer(layer: int, expert: int, source: int, target: int) -> Any:
    return SimpleNamespace(layer=layer, expert=expert, source=source, target=target)


def drop(layer: int, expert: int, gpu: int) -> Any:
    return SimpleNamespace(layer=layer, expert=expert, gpu=gpu)


def step(*transfers: Any, before: Any = (), after: Any = ()) -> Any:
    return SimpleNamespace(transfers=transfers, drops_before=before, drops_after=after)


def told(schedule: Schedule) -> list[Any]:
    """Layer, last step and experts of each rank of every stage."""
    rows = [[[e for e in row if e >= 0] for row in one.slots_GC.tolist()] for one in schedule.stages]
    return [(one.layer, one.last_step, row) for one, row in zip(schedule.stages, rows, strict=True)]


def test_steps_of_others_are_carried_out_as_they_say() -> None:
    have: list[Rows] = [[[0, 2], [1, 2]], [[0], [1]]]
    goal = np.array([[[0, 1], [1, 0]], [[1, -1], [0, -1]]], dtype=np.int32)
    steps = [
        step(transfer(0, 1, 1, 0), before=[drop(0, 2, 0)]),
        step(transfer(1, 1, 1, 0), transfer(0, 0, 0, 1), before=[drop(0, 2, 1)]),
        step(transfer(1, 0, 0, 1), after=[drop(1, 0, 0), drop(1, 1, 1)]),
    ]
    found = follow_schedule(steps, have, goal, [5, 3])
    assert [[(t.layer, t.expert, t.source, t.destination, t.bytes) for t in row] for row in found.steps] == [
        [(0, 1, 1, 0, 5)],
        [(1, 1, 1, 0, 3), (0, 0, 0, 1, 5)],
        [(1, 0, 0, 1, 3)],
    ]
    assert told(found) == [
        (0, -1, [[0], [1, 2]]),
        (0, 0, [[0, 1], [1, 2]]),
        (0, 0, [[0, 1], [1]]),
        (0, 1, [[0, 1], [1, 0]]),
        (1, 1, [[0, 1], [1]]),
        (1, 2, [[1], [0]]),
        (0, 2, [[0, 1], [1, 0]]),
        (1, 2, [[1], [0]]),
    ]
    assert found.limit_G.tolist() == [13 + 2**62] * 2


def test_plain_steps_let_go_after_the_last_transfer_of_a_layer() -> None:
    have: list[Rows] = [[[0], [1]], [[0, 1], [1]]]
    goal = np.array([[[1, -1], [0, -1]], [[0, -1], [1, -1]]], dtype=np.int32)
    found = follow_schedule([[transfer(0, 1, 1, 0)], [transfer(0, 0, 0, 1)]], have, goal, [5, 3])
    assert told(found) == [
        (0, 0, [[0, 1], [1]]),
        (0, 1, [[1], [0]]),
        (0, 1, [[1], [0]]),
        (1, 1, [[0], [1]]),
    ]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([step(transfer(0, 1, 0, 1))], r"steps\[0\]\.transfers\[0\]: rank 1 has expert 1 of layer 0 already"),
        (
            [step(transfer(0, 1, 0, 0))],
            r"steps\[0\]\.transfers\[0\]: rank 0 does not hold expert 1 of layer 0",
        ),
        ([step(transfer(0, 1, -1, 0))], r"steps\[0\]\.transfers\[0\]: there is no home copy of expert 1"),
        ([step(), step(before=[drop(0, 1, 0)])], r"steps\[1\]\.drops_before: rank 0 does not hold expert 1"),
        ([step(after=[drop(0, 1, 0)])], r"steps\[0\]\.drops_after: rank 0 does not hold expert 1"),
        (
            [step(transfer(0, 1, 1, 0))],
            r"steps: layer 0: rank 0 would end without experts \[\] and with \[0\]",
        ),
    ],
)
def test_steps_of_others_that_break_a_rule(steps: Any, words: str) -> None:
    goal = np.array([[[1, -1], [0, -1]]], dtype=np.int32)
    with pytest.raises(ProblemError, match=words):
        follow_schedule(steps, [[[0], [1]]], goal, [5])


def test_steps_of_others_keep_to_the_memory() -> None:
    goal = np.array([[[1, -1], [0, -1]]], dtype=np.int32)
    steps = [step(transfer(0, 1, 1, 0)), step(transfer(0, 0, 0, 1), after=[drop(0, 0, 0), drop(0, 1, 1)])]
    with pytest.raises(InfeasibleError, match="step 0 of the migration takes rank 0 1 bytes over its limit"):
        follow_schedule(steps, [[[0], [1]]], goal, [5], max_extra_bytes=4)
    assert follow_schedule(steps, [[[0], [1]]], goal, [5], max_extra_bytes=5).limit_G.tolist() == [10, 10]
    # Another rank may hold more: it has more room.
    wide = np.array([[[1, -1], [0, 2]]], dtype=np.int32)
    with pytest.raises(InfeasibleError, match="takes rank 0 1 bytes over its limit"):
        follow_schedule(steps, [[[0], [1, 2]]], wide, [5], max_extra_bytes=4)
    # A home copy on the rank itself needs no link; else the first that has one sends.
    for home, source in (([1, 0], 0), ([1], 1)):
        found = follow_schedule(
            [step(transfer(0, 1, -1, 0), transfer(0, 0, 0, 1), after=[drop(0, 0, 0), drop(0, 1, 1)])],
            [[[0], [1]]],
            goal,
            [5],
            home=lambda layer, e, home=home: home,
        )
        assert found.steps[0][0] == Shipment(0, 1, source, 0, 5, True)


def test_home_copies_for_others_take_room_of_their_sender_while_they_travel() -> None:
    """Rank 0 has the only (home) copies of experts 2 and 3, which rank 1 wants."""
    have: list[Rows] = [[[0], [1]]]
    wanted = np.array([[[0, -1, -1], [1, 2, 3]]], dtype=np.int32)

    def home(layer: int, expert: int) -> list[int]:
        return [0] if expert > 1 else []

    def destinations(extra: int | None, *, through: bool = True) -> list[int]:
        found = build_schedule(have, wanted, [5], home=home, max_extra_bytes=extra, through=through)
        return [len(step) for step in found.steps]

    assert destinations(None) == [2]
    assert destinations(10) == [2]
    assert destinations(5) == [1, 1]  # one after the other
    assert destinations(0, through=False) == [2]  # read on the host: no room
    words = "rank 0 has 4 bytes to spare, and the home copy of layer 0, expert 2 takes 5 on its way to rank 1"
    with pytest.raises(InfeasibleError, match=words):
        destinations(4)
    steps = [[Shipment(0, e, -1, 1, 5)] for e in (2, 3)]
    assert (
        len(follow_schedule(steps, have, wanted, [5], home=home, max_extra_bytes=5, through=True).steps) == 2
    )
    with pytest.raises(InfeasibleError, match="step 0 of the migration takes rank 0 1 bytes over its limit"):
        follow_schedule(steps, have, wanted, [5], home=home, max_extra_bytes=4, through=True)
