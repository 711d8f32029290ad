"""Slot tables, schedules and repairs: plain numpy, no processes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.runtime.control.backend import LoadWindow, Observation
from moeless_opt.runtime.live.repair import repair_slots
from moeless_opt.runtime.live.schedule import Router, Schedule, Shipment, build_schedule, follow_schedule
from moeless_opt.runtime.live.slots import SlotTable, one_each, rows_to_slots, slots_of, static_slots
from moeless_opt.solvers.migration.schedule import schedule_migration

Rows = list[list[int]]


@st.composite
def placements(draw: st.DrawFn, experts: int, ranks: int) -> Rows:
    """Experts of each rank: every expert somewhere, some twice, ranks uneven or empty."""
    rows: Rows = [[] for _ in range(ranks)]
    for e in draw(st.permutations(range(experts))):
        rows[draw(st.integers(0, ranks - 1))].append(e)
    for _ in range(draw(st.integers(0, experts))):
        g, e = draw(st.integers(0, ranks - 1)), draw(st.integers(0, experts - 1))
        if e not in rows[g]:
            rows[g].append(e)
    return rows


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, list[Rows], list[Rows]]:
    """A model's placement before and after."""
    experts, ranks, layers = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    before = [draw(placements(experts, ranks)) for _ in range(layers)]
    after = [draw(placements(experts, ranks)) for _ in range(layers)]
    return experts, before, after


def stacked(rows: list[Rows], experts: int) -> np.ndarray:
    return np.stack([rows_to_slots(r, experts) for r in rows])


def replay(schedule: Schedule, before: list[Rows], experts: int, size: int) -> tuple[list[Rows], int]:
    """Carry a schedule out as the runtime does, checking every rule; returns the end and the bytes sent."""
    now = [[list(row) for row in rows] for rows in before]
    lying: set[tuple[int, int, int]] = set()
    stages = list(schedule.stages)
    sent = 0

    def switch(done: int) -> None:
        for stage in list(stages):
            if stage.last_step >= done:
                continue
            rows = [[int(e) for e in row if e >= 0] for row in stage.slots_GC]
            for g, row in enumerate(rows):
                for e in row:
                    # Nothing serves that is not there.
                    assert e in now[stage.layer][g] or (stage.layer, e, g) in lying
                    lying.discard((stage.layer, e, g))
            now[stage.layer] = rows
            SlotTable(stage.slots_GC, experts)
            stages.remove(stage)

    for s, step in enumerate(schedule.steps):
        switch(s)
        for t in step:
            assert t.from_home or t.expert in now[t.layer][t.source]
            assert t.expert not in now[t.layer][t.destination]
            lying.add((t.layer, t.expert, t.destination))
            sent += t.bytes if t.source != t.destination else 0
        for g in range(len(now[0])):
            held = size * (sum(len(rows[g]) for rows in now) + sum(at == g for _, _, at in lying))
            assert held <= schedule.limit_G[g]
    switch(len(schedule.steps))
    assert not stages
    return now, sent


@given(changes())
def test_a_schedule_reaches_its_target_and_every_expert_is_served_on_the_way(
    change: tuple[int, list[Rows], list[Rows]],
) -> None:
    experts, before, after = change
    target = stacked(after, experts)
    schedule = build_schedule(before, target, [10] * len(before))
    end, sent = replay(schedule, before, experts, 10)
    assert end == after
    new = sum(
        e not in b for x, y in zip(before, after, strict=True) for b, a in zip(x, y, strict=True) for e in a
    )
    assert sent == schedule.bytes == 10 * new
    assert build_schedule(before, target, [10] * len(before)).digest == schedule.digest


@given(changes(), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=200)
def test_limits_hold_at_every_moment(
    change: tuple[int, list[Rows], list[Rows]], extra: int, per_step: int
) -> None:
    experts, before, after = change
    target = stacked(after, experts)
    try:
        schedule = build_schedule(
            before, target, [10] * len(before), max_extra_bytes=10 * extra, max_step_bytes=10 * per_step
        )
    except InfeasibleError:
        return  # too tight: refused, which `test_one_spare_expert...` bounds
    end, _ = replay(schedule, before, experts, 10)
    assert end == after
    for step in schedule.steps:
        for g in range(len(before[0])):
            assert sum(t.bytes for t in step if t.destination == g) <= 10 * per_step
            assert sum(t.bytes for t in step if t.source == g and t.destination != g) <= 10 * per_step


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_one_spare_expert_is_enough_for_any_permutation(
    slots: int, ranks: int, seed: int, data: st.DataObject
) -> None:
    """Ranks that are full before and after exchange everything with room for one arrival each."""
    experts = slots * ranks
    order = np.random.default_rng(seed).permutation(experts)
    before = [static_slots(experts, ranks).tolist()]
    after = [order.reshape(ranks, slots).tolist()]
    schedule = build_schedule(before, stacked(after, slots), [7], max_extra_bytes=7)
    end, _ = replay(schedule, before, experts, 7)
    assert end == after


def test_sources_are_near_and_take_turns() -> None:
    have = [[[0], [0, 1], [1], []]]
    target = np.array([[[0, -1], [0, 1], [1, 0], [0, 1]]], dtype=np.int32)
    schedule = build_schedule(have, target, [5], node_G=[0, 0, 1, 1])
    moves = {(t.expert, t.destination): t.source for step in schedule.steps for t in step}
    assert moves[1, 3] == 2  # the same node
    assert {moves[0, 2], moves[0, 3]} == {0, 1}  # no holder in the node: both holders share the work


def test_home_copies_serve_what_nobody_holds() -> None:
    target = np.array([[[0], [1]]], dtype=np.int32)
    with pytest.raises(InfeasibleError, match="expert 1"):
        build_schedule([[[0], []]], target, [5])
    schedule = build_schedule([[[0], []]], target, [5], home=lambda layer, expert: [0])
    assert schedule.steps == ((Shipment(0, 1, 0, 1, 5, True),),)
    own = build_schedule([[[0], []]], target, [5], home=lambda layer, expert: [0, 1])
    assert own.steps == ((Shipment(0, 1, 1, 1, 5, True),),)
    assert own.bytes == 0


def test_what_lies_there_already_is_not_sent_again() -> None:
    target = np.array([[[0, 1], [1, 0]]], dtype=np.int32)
    schedule = build_schedule([[[0], [1]]], target, [5], staged=frozenset({(0, 1, 0)}))
    assert [(t.expert, t.destination) for step in schedule.steps for t in step] == [(0, 1)]


@given(changes())
def test_the_planners_schedules_are_followed(change: tuple[int, list[Rows], list[Rows]]) -> None:
    experts, before, after = change
    target = stacked(after, experts)
    sizes = np.full(len(before), 10)
    migration = schedule_migration(
        stacked(before, experts),
        target,
        experts,
        Topology.uniform(1, len(before[0]), slots=experts),
        bytes_L=sizes,
    )
    schedule = follow_schedule(migration, before, target, sizes.tolist())
    end, sent = replay(schedule, before, experts, 10)
    assert end == after
    assert sent == migration.bytes


def test_somebody_elses_steps_are_checked() -> None:
    have = [[[0], [1]], [[0], [1]]]
    target = np.array([[[1], [0]], [[0], [1]]], dtype=np.int32)
    good = [
        [SimpleNamespace(layer=0, expert=1, source=1, destination=0)],
        [SimpleNamespace(layer=0, expert=0, source=0, destination=1)],
    ]
    schedule = follow_schedule(good, have, target, [5, 5])
    assert replay(schedule, have, 2, 5)[0] == [[[1], [0]], [[0], [1]]]
    with pytest.raises(ProblemError, match="would end without experts"):
        follow_schedule(good[:1], have, target, [5, 5])
    with pytest.raises(ProblemError, match="has expert 1 of layer 1 already"):
        follow_schedule([*good, [Shipment(1, 1, 0, 1, 5)]], have, target, [5, 5])
    with pytest.raises(ProblemError, match="does not hold"):
        follow_schedule([[Shipment(0, 1, 0, 0, 5)]], have, target, [5, 5])
    with pytest.raises(ProblemError, match="steps: is 3"):
        follow_schedule(3, have, target, [5, 5])
    with pytest.raises(ProblemError, match="no home copy"):
        follow_schedule([[Shipment(0, 1, -1, 0, 5)]], have, target, [5, 5])
    with pytest.raises(InfeasibleError, match="over its limit"):
        follow_schedule(good, have, target, [5, 5], max_extra_bytes=0)


@pytest.mark.parametrize(
    ("slots", "word"),
    [
        ([[0, 1], [1, -1]], "experts \\[2\\] have no replica"),
        ([[0, 1, 2], [3, -1, -1]], "names expert 3 of 3"),
        ([[0, 0], [1, 2]], "stand twice on rank 0"),
        ([0, 1, 2], "must be \\[rank, slot\\]"),
    ],
)
def test_bad_slots_are_named(slots: list[list[int]], word: str) -> None:
    with pytest.raises(ProblemError, match=word):
        SlotTable(slots, 3)


def test_plans_and_placements_are_taken_by_their_slots() -> None:
    slots = static_slots(4, 2, 3)
    assert slots.shape == (3, 2, 2)
    holder = SimpleNamespace(slots_LGC=slots)
    for plan in (slots, slots.tolist(), holder, SimpleNamespace(placement=holder)):
        assert (slots_of(plan) == slots).all()
    with pytest.raises(ProblemError, match="slots_LGC"):
        slots_of(slots[0])
    with pytest.raises(ProblemError, match="do not divide"):
        static_slots(5, 2)


@given(changes(), st.data())
def test_a_repair_keeps_what_is_there_and_places_what_is_lost(
    change: tuple[int, list[Rows], list[Rows]], data: st.DataObject
) -> None:
    experts, before, _ = change
    if len(before[0]) < 2:
        return
    left = [rows[1:] for rows in before]
    ranks = len(left[0])
    room = data.draw(st.integers(1, experts))
    if room * ranks < experts:
        with pytest.raises(InfeasibleError, match="slots"):
            repair_slots(left, experts, np.full((len(left), ranks), room))
        return
    slots = repair_slots(left, experts, np.full((len(left), ranks), room))
    for layer, rows in enumerate(left):
        table = SlotTable(slots[layer], experts)
        assert all(len(row) <= room for row in table.rows)
        for g, row in enumerate(rows):
            fits = all(len(r) <= room for r in rows)
            if fits and {x for r in rows for x in r} == set(range(experts)):
                assert set(table.rows[g]) == set(row)  # nothing lost: nothing moves


def test_planning_parts_do_not_import_torch() -> None:
    modules = "moeless_opt.runtime.live.schedule, moeless_opt.runtime.control.backend"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loads_fade_and_survive_a_change_of_ranks() -> None:
    def seen(load: int, ranks: int) -> Observation:
        return Observation(
            load_LE=np.full((1, 2), load),
            tokens_LG=np.full((1, ranks), 10),
            seconds_LG=np.arange(1.0, ranks + 1)[None],
            batches=1,
        )

    window = LoadWindow(decay=0.5)
    window.update(seen(8, 2))
    assert window.update(seen(4, 2)).tolist() == [[8.0, 8.0]]
    assert window.speed_G() == pytest.approx([4 / 3, 2 / 3])
    assert window.update(seen(0, 1)).tolist() == [[4.0, 4.0]]  # loads go on, times start anew
    assert window.speed_G() == pytest.approx([1.0])
    assert seen(1, 2).imbalance_L.tolist() == [1.0]
    with pytest.raises(ProblemError, match="decay"):
        LoadWindow(decay=1.0)


@pytest.mark.parametrize(
    ("links", "near", "far"),
    [
        (Links(), (1, False), (3, True)),  # NVLink, the own host, the network
        (Links(host=1e9), (1, False), (2, False)),  # a slow host link
        (Links(host=900e9), (0, True), (3, True)),  # a quick one
        (Links(host=900e9, inter_node=2e12), (2, False), (2, False)),  # a network quicker than all
    ],
)
def test_the_quickest_link_decides_between_sources(
    links: Links, near: tuple[int, bool], far: tuple[int, bool]
) -> None:
    # Ranks 0 and 1 on one node, 2 and 3 alone on theirs; every rank has a home copy.
    def source(to: int, holders: list[int]) -> tuple[int, bool]:
        t = Router([0, 0, 1, 2], lambda layer, expert: range(4), links).source(0, 0, holders, to, 5)
        assert (t.destination, t.bytes) == (to, 5)
        return t.source, t.from_home

    assert source(0, [1] if near[0] == 1 else [2]) == near
    assert source(3, [2]) == far


def test_one_replica_of_each_stays_where_it_is() -> None:
    rows = [[0, 1, 2, 3], [0, 1], [2], [3, 0]]
    kept = one_each(rows, 4)
    assert sorted(kept[kept >= 0].tolist()) == [0, 1, 2, 3]
    for g, row in enumerate(kept.tolist()):
        assert set(row) - {-1} <= set(rows[g])
    assert (kept >= 0).sum(1).max() == 1


def test_a_plan_for_a_table_of_entries_is_refused() -> None:
    plan = mo.plan([[4.0, 3.0, 2.0, 1.0]], mo.uniform(1, 2, slots=3), share_entries=8)
    with pytest.raises(ProblemError, match="share_entries: is 8: a live model divides every batch"):
        slots_of(plan)
