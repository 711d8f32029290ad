"""The state machine of single layers' plans: many ranks in one process, and every order of events.

Real processes (`test_live_modes`) meet few orders. Here plans come late on some ranks, arrivals on others,
some fail, whole plans come between; after every step the ranks agree, and nobody serves what is not there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from moeless_opt.runtime.live.courier import DAMAGED, Flight  # noqa: E402
from moeless_opt.runtime.live.elastic import Elastic  # noqa: E402
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank  # noqa: E402
from moeless_opt.runtime.live.lanes import LaneHeader, Lanes  # noqa: E402
from moeless_opt.runtime.live.migrate import Header, Migrator  # noqa: E402
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots, static_slots  # noqa: E402
from moeless_opt.runtime.live.ticket import Ticket  # noqa: E402

L, R, E = 3, 3, 6


class Rank:
    """One rank: real lanes, migrator and banks; transfers end when the test says so."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        group: Any = SimpleNamespace(rank=rank, size=R, node_R=(0,) * R, device=torch.device("cpu"))
        group.gather_ints = lambda values: [list(values)] * R
        self.meter = MemoryMeter()
        slots_GC = static_slots(E, R)
        like = [torch.zeros(1)]
        self.banks = [
            SlotBank(
                layer,
                {int(e): [torch.full((1,), float(100 * layer + e))] for e in slots_GC[rank]},
                like,
                torch.device("cpu"),
                self.meter,
            )
            for layer in range(L)
        ]
        tables = [SlotTable(slots_GC, E) for _ in range(L)]
        self.migrator = Migrator(group, self.banks, tables, lambda layer, table: None)
        self.migrator.launch = self.launch  # type: ignore[method-assign]
        self.lanes = Lanes(self.migrator)
        self.flights: list[tuple[Flight, list[Any]]] = []
        self.planned: list[tuple[Ticket, Any, str]] = []

    def launch(self, step: Any, room: Any, first_tag: int) -> Flight:
        flight = Flight()
        copies = []
        for t in step:
            bank = self.banks[t.layer]
            if t.destination == self.rank:
                place = room[t.layer, t.expert]
                place[0].data.fill_(-1.0)
                bank.staged[t.expert] = place
                copies.append((place, float(100 * t.layer + t.expert)))
            if t.source == self.rank:
                bank.weights(t.expert)  # it must be here
                assert t.expert not in {e for e, w in bank.staged.items() if float(w[0]) < 0}
        self.flights.append((flight, copies))
        return flight

    def arrive(self, fault: int = 0) -> None:
        """The oldest flight ends."""
        if self.flights:
            flight, copies = self.flights.pop(0)
            for place, value in copies:
                place[0].data.fill_(value)
            flight.fault = fault
            flight.done.set()

    def plan(self) -> None:
        """The thread plans the oldest ticket."""
        if self.planned:
            self.lanes.offer(*self.planned.pop(0))

    def header(self) -> list[int]:
        return [*self.migrator.header(), *self.lanes.header()]

    def agree(self, layer: int | None, rows: np.ndarray) -> None:
        self.migrator.agree(layer, rows[:, : len(Header._fields)])
        self.lanes.agree(layer, rows[:, len(Header._fields) :])


class World:
    """The ranks, and passes through their layers."""

    def __init__(self, keep_alive: float | None) -> None:
        self.ranks = [Rank(self, r) for r in range(R)]
        self.tickets: list[list[Ticket]] = []
        if keep_alive is not None:
            for r in self.ranks:
                r.lanes.elastic = Elastic(
                    np.stack([static_slots(E, R)] * L),
                    E,
                    capacity_LG=np.full((L, R), 3),
                    bytes_L=np.full(L, 4),
                    keep_alive=keep_alive,
                    clock="passes",
                )

    def batch(self, layer: int | None) -> None:
        rows = np.array([r.header() for r in self.ranks], dtype=np.int64)
        assert rows.shape[1] == len(Header._fields) + len(LaneHeader._fields)
        for r in self.ranks:
            r.agree(layer, rows)
        self.check()

    def open(self, layer: int, slots: np.ndarray, wrong: int | None = None, error: int | None = None) -> None:
        if self.ranks[0].lanes.waits(layer):
            assert all(r.lanes.waits(layer) for r in self.ranks)
            return
        made = []
        for r in self.ranks:
            ticket = r.lanes.open(layer)
            made.append(ticket)
            mine = np.roll(slots, 1, axis=0) if wrong == r.rank else slots
            r.planned.append((ticket, None if error == r.rank else mine, "broken" if error == r.rank else ""))
        assert len({(t.number, t.base_GC.tobytes()) for t in made}) == 1
        self.tickets.append(made)

    def check(self) -> None:
        first = self.ranks[0]
        for r in self.ranks:
            assert r.migrator.rows_LG == first.migrator.rows_LG
            assert r.lanes.extra == first.lanes.extra
            assert len(r.lanes._posted) == len(first.lanes._posted)
            assert sorted(r.lanes._ready) == sorted(first.lanes._ready)
            for layer, bank in enumerate(r.banks):
                assert bank.order == r.migrator.tables[layer].rows[r.rank]
                for e, weights in bank.resident.items():  # what serves has arrived
                    assert float(weights[0]) == 100 * layer + e
                if r.migrator._schedule is None:
                    extra = {e for at, e, g in r.lanes.extra if (at, g) == (layer, r.rank)}
                    assert set(bank.staged) == extra
            if r.lanes.elastic is not None and not r.lanes._floor_given:
                warm = {(int(x), int(e), int(g)) for x, g, e in np.argwhere(r.lanes.elastic.warm_LGE)}
                serving = {
                    (x, e, g)
                    for x, table in enumerate(r.migrator.tables)
                    for g, row in enumerate(table.rows)
                    for e in row
                }
                assert warm == serving | r.lanes.extra

    def finish(self) -> None:
        """Everything that was begun comes to an end."""
        for _ in range(60):
            for r in self.ranks:
                while r.planned:
                    r.plan()
                while r.flights:
                    r.arrive()
            self.batch(None)
        for r in self.ranks:
            assert r.lanes.idle
            assert r.migrator.idle
        for tickets in self.tickets:
            assert {t.status for t in tickets} <= {"done", "superseded", "void"}
            assert len({t.status for t in tickets}) == 1


@st.composite
def placements(draw: st.DrawFn) -> np.ndarray:
    rows: list[list[int]] = [[] for _ in range(R)]
    for e in range(E):
        holders = draw(st.sets(st.integers(0, R - 1), min_size=1, max_size=2))
        for g in sorted(holders):
            rows[g].append(e)
    return rows_to_slots(rows, E)


some_ranks = st.sampled_from([(0, 1, 2)] * 8 + [(0, 1), (1, 2), (0, 2), (0,), (1,), (2,), ()])
#: Between two batches: plans that are opened, where planning and transfers end, and what goes wrong.
steps = st.tuples(
    st.lists(st.tuples(st.integers(0, L - 1), placements()), max_size=2),
    some_ranks,
    some_ranks,
    st.sampled_from(["", "", "", "", "", "", "wrong", "error", "damage", "full", "whole"]),
    st.integers(0, R - 1),
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([None, 0.0, 2.0]), st.lists(steps, min_size=12, max_size=24), placements())
def test_ranks_agree_whatever_happens_when(
    keep_alive: float | None, story: list[Any], whole: np.ndarray
) -> None:
    world = World(keep_alive)
    for batch, (opened, planned, arrived, trouble, where) in enumerate(story):
        for layer, slots in opened:
            world.open(layer, slots, **({trouble: where} if trouble in ("wrong", "error") else {}))
        if trouble == "whole":
            for r in world.ranks:
                r.migrator.submit(np.stack([whole] * L))
        if trouble == "full":
            meter = world.ranks[where].meter
            meter.hard_limit = meter.now if meter.hard_limit is None else None
        for g in planned:
            world.ranks[g].plan()
        for g in arrived:
            world.ranks[g].arrive(DAMAGED if trouble == "damage" and g == where else 0)
        world.batch(batch % L)
    for r in world.ranks:
        r.meter.hard_limit = None
    world.finish()
    for r in world.ranks:  # nothing is kept but what serves, or what the pool keeps
        kept = {c for c in r.lanes.extra if r.lanes.elastic is not None}
        assert r.lanes.extra == kept
        assert r.meter.now == 4 * (
            sum(len(bank.resident) for bank in r.banks) + len([c for c in kept if c[2] == r.rank])
        )


def test_the_newest_plan_of_a_layer_wins_and_in_one_pass_where_nothing_moves() -> None:
    world = World(None)
    static = static_slots(E, R)
    more = rows_to_slots([[0, 1, 2], [2, 3], [4, 5]])
    world.open(1, more)
    for r in world.ranks:
        r.plan()
    world.batch(0)  # adopted and posted
    world.batch(1)  # nothing has arrived: the old slots serve
    assert world.ranks[0].migrator.tables[1].rows[0] == (0, 1)
    for r in world.ranks:
        r.arrive()
    world.batch(2)  # another layer's batch: seen, not installed
    assert world.ranks[0].migrator.tables[1].rows[0] == (0, 1)
    world.batch(0)
    world.batch(1)
    assert world.ranks[0].migrator.tables[1].rows[0] == (0, 1, 2)
    # Giving up a replica moves nothing: planned in front of layer 0, in force at layer 1 of the same pass.
    world.open(1, static)
    for r in world.ranks:
        r.plan()
    world.batch(0)
    world.batch(1)
    assert world.ranks[0].migrator.tables[1].rows[0] == (0, 1)
    (first, second) = world.tickets
    assert [t[0].status for t in world.tickets] == ["done", "done"]
    assert (first[0].cold, second[0].cold) == (1, 0)
    assert second[0].opened + 1 == second[0].ended  # opened before pass 3 began
    assert world.ranks[0].lanes.find(2) is second[0]


@pytest.mark.parametrize("keep_alive", [None, 0.0, 2.0])
def test_what_the_next_plan_counts_on_survives_the_switch_before(keep_alive: float | None) -> None:
    world = World(keep_alive)
    # Expert 1 leaves rank 0; then it is back there, and rank 1 needs expert 4, which has to travel.
    before = rows_to_slots([[0], [1, 2, 3], [4, 5]])
    after = rows_to_slots([[0, 1], [2, 3, 4], [5]])
    world.open(1, before)
    for r in world.ranks:
        r.plan()
    world.batch(0)
    for r in world.ranks:
        r.arrive()
    world.batch(2)  # all have it, but it is not the layer's turn
    world.open(1, after)
    for r in world.ranks:
        r.plan()
    world.batch(0)  # adopted while expert 1 still serves on rank 0: nothing is loaded there
    world.batch(1)  # the first plan comes into force: expert 1 leaves, and must stay in memory
    assert world.ranks[0].migrator.tables[1].rows == ((0,), (1, 2, 3), (4, 5))
    assert (1, 1, 0) in world.ranks[0].lanes.extra
    for r in world.ranks:
        r.arrive()
    world.batch(2)
    world.batch(0)
    world.batch(1)
    assert world.ranks[0].migrator.tables[1].rows == ((0, 1), (2, 3, 4), (5,))
    assert [t[0].cold for t in world.tickets] == [1, 1]
    world.finish()
