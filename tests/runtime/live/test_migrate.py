"""The state machine of whole plans: many ranks in one process, their mail delivered when the test says so."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import moeless_opt.runtime.live.courier as courier  # noqa: E402
from moeless_opt.problems.errors import InfeasibleError, ProblemError  # noqa: E402
from moeless_opt.problems.spec.topology import Topology  # noqa: E402
from moeless_opt.runtime.live.courier import DamagedError, Flight, UnreadableError  # noqa: E402
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank, checksum  # noqa: E402
from moeless_opt.runtime.live.migrate import Header, MigrationReport, Migrator, TransferLimits  # noqa: E402
from moeless_opt.runtime.live.schedule import Shipment, build_schedule  # noqa: E402
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots, static_slots  # noqa: E402
from moeless_opt.solvers.migration.schedule import schedule_migration  # noqa: E402

R, L, E = 3, 2, 6
SIZES = (2, 3)  # numbers of an expert in each layer: 4 bytes each


def value(layer: int, expert: int) -> list[Any]:
    return [torch.arange(SIZES[layer], dtype=torch.float32) + 100 * layer + 10 * expert]


class Post:
    """A courier whose mail lies until it is fetched."""

    stream = None

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.open: list[tuple[Flight, Any, Any]] = []
        self.waits = 0

    def on_stream(self) -> Any:
        return nullcontext()

    def post(self, sends: Any, receives: Any, finish: Any) -> Flight:
        for weights, peer, tag in sends:
            key = (self.rank, peer, tag)
            assert key not in self.world.mail, "two letters of one name at a time"
            read = weights() if callable(weights) else weights
            self.world.mail[key] = [t.clone() for t in read]
        flight = Flight()
        self.open.append((flight, receives, finish))
        return flight

    def fetch(self, fault: int = courier.OK) -> None:
        """The oldest flight ends."""
        flight, receives, finish = self.open.pop(0)
        try:
            for place, peer, tag in receives:
                for mine, theirs in zip(place, self.world.mail.pop((peer, self.rank, tag)), strict=True):
                    mine.data.copy_(theirs)
            finish()
            flight.fault = fault
        except DamagedError as error:
            flight.fault, flight.error = courier.DAMAGED, str(error)
        except UnreadableError as error:
            flight.fault, flight.error = courier.UNREADABLE, str(error)
        flight.done.set()

    def wait(self, flight: Flight, timeout: float) -> None:
        raise AssertionError("nobody waits")

    def close(self) -> None:
        """Nothing to end."""


class Home:
    """Home copies of some experts on one rank."""

    def __init__(self, ranks: dict[int, list[int]]) -> None:
        self.where, self.broken = ranks, False

    def ranks(self, layer: int, expert: int) -> list[int]:
        return self.where.get(expert, [])

    def read(self, layer: int, expert: int) -> Any:
        if self.broken:
            raise OSError("disk")
        return value(layer, expert)


class World:
    """Ranks of one group."""

    def __init__(self, start: Any = None, home: Home | None = None, hard_limit: int | None = None) -> None:
        self.mail: dict[tuple[int, int, int], Any] = {}
        slots = np.stack([static_slots(E, R)] * L) if start is None else start
        self.switched: list[list[int]] = [[] for _ in range(R)]
        self.ranks: list[Migrator] = []
        self.meters = []
        sums = np.array([[checksum(value(x, e)) for e in range(E)] for x in range(L)])
        for r in range(R):
            group: Any = SimpleNamespace(
                rank=r, size=R, node_R=(0, 0, 1), ranks=tuple(range(R)), device=torch.device("cpu")
            )
            meter = MemoryMeter(hard_limit)
            self.meters.append(meter)
            banks = [
                SlotBank(
                    x,
                    {int(e): value(x, int(e)) for e in slots[x, r] if e >= 0},
                    value(x, 0),
                    torch.device("cpu"),
                    meter,
                )
                for x in range(L)
            ]
            tables = [SlotTable(slots[x], E) for x in range(L)]

            def told(layer: int, table: SlotTable, r: int = r) -> None:
                self.switched[r].append(layer)

            migrator = Migrator(group, banks, tables, told, home=home, sums_LE=sums)
            migrator.courier = Post(self, r)  # type: ignore[assignment]
            self.ranks.append(migrator)

    def batch(self, layer: int | None) -> np.ndarray:
        rows = np.array([r.header() for r in self.ranks], dtype=np.int64)
        for r in self.ranks:
            r.agree(layer, rows)
        self.check()
        return rows

    def check(self) -> None:
        """All ranks stand alike; what serves is right."""
        first = self.ranks[0]
        for r in self.ranks:
            assert r.rows_LG == first.rows_LG
            assert r.claims == first.claims
            assert r._staged == first._staged
            assert (r.moving_LGC is None) == (first.moving_LGC is None)
            for x, bank in enumerate(r.banks):
                assert bank.order == r.tables[x].rows[r.group.rank]
                for e, weights in bank.resident.items():
                    assert torch.equal(weights[0], value(x, e)[0])
                if r.idle:
                    assert not bank.staged

    def finish(self, passes: int = 60) -> None:
        for _ in range(passes):
            for r in self.ranks:
                while r.courier.open:  # type: ignore[attr-defined]
                    r.courier.fetch()  # type: ignore[attr-defined]
            self.batch(None)
        assert all(r.idle for r in self.ranks)
        assert not self.mail

    def submit(self, target: Any, limits: TransferLimits | None = None, steps: Any = None) -> int:
        return {r.submit(target, limits, steps) for r in self.ranks}.pop()

    def reports(self, number: int) -> MigrationReport:
        """The report, the same on all ranks but for the clock and details."""
        every = [r.reports[number] for r in self.ranks]
        assert len({(one.status, one.bytes, one.steps, one.switches) for one in every}) == 1
        return every[0]


def random_slots(rng: Any) -> np.ndarray:
    layers = []
    for _ in range(L):
        rows: list[list[int]] = [[] for _ in range(R)]
        for e in rng.permutation(E).tolist():
            for g in rng.permutation(R)[: int(rng.integers(1, 3))].tolist():
                rows[g].append(e)
        layers.append(rows_to_slots(rows, E))
    return np.stack(layers)


def experts_of(slots: Any) -> list[list[list[int]]]:
    return [[[int(e) for e in row if e >= 0] for row in layer] for layer in slots]


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_is_reached_step_by_step(seed: int) -> None:
    """Step for step as the schedule says; a layer switches only in front of its own batch."""
    rng = np.random.default_rng(seed)
    world, target = World(), random_slots(rng)
    limits = TransferLimits(max_step_bytes=12 if seed % 2 else None, max_extra_bytes=12 if seed % 3 else None)
    first = world.ranks[0]
    steps = None
    if seed >= 6:
        before = np.stack([static_slots(E, R)] * L)
        steps = schedule_migration(
            before, target, E, Topology.uniform(1, R, slots=E), bytes_L=np.array(first.bytes_L)
        )
        limits = TransferLimits()
        want = [[(t.layer, t.expert, t.source, t.target) for t in step.transfers] for step in steps.steps]
    else:
        schedule = build_schedule(
            first.rows_LG,
            target,
            first.bytes_L,
            node_G=(0, 0, 1),
            max_step_bytes=limits.max_step_bytes,
            max_extra_bytes=limits.max_extra_bytes,
        )
        want = [[(t.layer, t.expert, t.source, t.destination) for t in step] for step in schedule.steps]
    assert first.idle
    assert first.target_LGC is None
    number = world.submit(target, limits, steps)
    assert not first.idle
    assert first.target_LGC is target
    assert first.moving_LGC is None
    assert world.reports(number).status == "waiting"
    assert world.batch(0)[:, 0].tolist() == [number] * R
    assert first.claims
    assert world.reports(number).status == "moving"
    posted: list[Any] = []
    for turn in range(200):
        if first.idle:
            break
        layer = turn % L
        before_rows = first.rows_LG
        world.batch(layer)
        for x in range(L):
            assert x == layer or first.rows_LG[x] == before_rows[x]
        if first.courier.open:  # type: ignore[attr-defined]
            posted.append(len(world.mail))
            waiting = rng.permutation(R)
            world.ranks[waiting[0]].courier.fetch()  # type: ignore[attr-defined]
            steps_now = first._posted
            world.batch(layer)  # one has it, the others do not: nothing new is posted
            assert first._posted == steps_now
            for r in waiting[1:]:
                world.ranks[r].courier.fetch()  # type: ignore[attr-defined]
    report = world.reports(number)
    assert report.status == "done"
    assert report.reason == ""
    assert report.steps == len(want)
    assert posted == [sum(s != d for _, _, s, d in step) for step in want if step]
    assert report.bytes == sum(first.bytes_L[x] for step in want for x, _, s, d in step if s != d)
    assert all(r.bytes_moved == report.bytes for r in world.ranks)
    assert first.rows_LG == experts_of(target)
    assert report.switches == len(world.switched[0]) == len(world.switched[1])
    assert 0 <= report.seconds < 60
    assert not first.claims
    assert not world.batch(0)[:, 1].any()
    assert first.target_LGC is None


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_all_ranks_stand_alike(seed: int) -> None:
    """Plans late on some ranks, newer ones, mail at any time, damage: an old plan or a new one stands."""
    rng = np.random.default_rng(seed)
    world = World()
    targets: list[np.ndarray] = []
    handed = [0] * R
    fates = set()
    for turn in range(60):
        what = rng.random()
        if what < 0.12:
            targets.append(random_slots(rng))
        for r, migrator in enumerate(world.ranks):
            if handed[r] < len(targets) and rng.random() < 0.5:
                limits = TransferLimits(max_step_bytes=12, max_extra_bytes=24)
                migrator.submit(targets[handed[r]], limits)
                handed[r] += 1
            if migrator.courier.open and rng.random() < 0.5:  # type: ignore[attr-defined]
                fault = courier.DAMAGED if rng.random() < 0.03 else courier.OK
                migrator.courier.fetch(fault)  # type: ignore[attr-defined]
        world.batch(None if rng.random() < 0.2 else turn % L)
    for r, migrator in enumerate(world.ranks):
        while handed[r] < len(targets):
            migrator.submit(targets[handed[r]], TransferLimits(max_step_bytes=12, max_extra_bytes=24))
            handed[r] += 1
    world.finish()
    for number in range(1, len(targets) + 1):
        report = world.ranks[0].reports[number]
        assert report.status in ("done", "superseded", "aborted")
        fates.add(report.status)
    if targets and world.ranks[0].reports[len(targets)].status == "done":
        assert world.ranks[0].rows_LG == experts_of(targets[-1])


def swap() -> np.ndarray:
    """Ranks 0 and 1 of layer 0 change an expert."""
    slots = np.stack([static_slots(E, R)] * L)
    slots[0, 0, 0], slots[0, 1, 0] = slots[0, 1, 0], slots[0, 0, 0]
    return slots


def test_damage_ends_a_plan_with_the_placement_as_it_was() -> None:
    world = World()
    before = world.ranks[0].rows_LG
    number = world.submit(swap())
    world.batch(0)
    while not world.mail:
        world.batch(0)
    letter = next(key for key in world.mail)
    world.mail[letter][0][0] += 1
    world.finish()
    report = world.reports(number)
    assert report.status == "aborted"
    assert world.ranks[0].rows_LG == before
    reasons = {r.reports[number].reason for r in world.ranks}
    assert "checksum mismatch" in reasons
    assert any(" is damaged" in text and "of layer 0 from rank" in text for text in reasons)
    again = world.submit(swap())  # and it can be tried again
    world.finish()
    assert world.reports(again).status == "done"
    assert world.ranks[0].rows_LG == experts_of(swap())


def test_a_rank_without_memory_ends_a_plan_before_anything_is_sent() -> None:
    world = World(hard_limit=4 * 2 * sum(SIZES))
    number = world.submit(swap())
    world.finish()
    report = world.reports(number)
    assert (report.status, report.steps, report.bytes) == ("aborted", 0, 0)
    assert {r.reports[number].reason for r in world.ranks} != {""}
    assert any("memory" in r.reports[number].reason for r in world.ranks)


def test_different_plans_and_too_many_ranks_are_refused() -> None:
    world = World()
    for r, migrator in enumerate(world.ranks):
        migrator.submit(swap() if r else swap()[:, ::-1].copy())
    world.finish()
    for migrator in world.ranks:
        assert migrator.reports[1].status == "aborted"
        assert migrator.reports[1].reason == "the ranks handed in different plans"
    for _ in range(2):
        world.ranks[0].submit(swap(), TransferLimits(max_extra_bytes=99))
    assert world.ranks[0].reports[2].status == "superseded"
    with pytest.raises(ProblemError, match=r"slots_LGC: has \(2, 2\) layers and ranks, the model"):
        world.ranks[1].submit(swap()[:, :2])
    assert world.ranks[1].reports[2].status == "aborted"
    broken = swap()
    broken[1, 0, 0] = 4
    with pytest.raises(ProblemError, match=r"^layer 1"):
        world.ranks[1].submit(broken)
    with pytest.raises(InfeasibleError):
        world.ranks[1].submit(swap(), TransferLimits(max_extra_bytes=0))


def test_the_same_limits_make_the_same_plan() -> None:
    """One rank with another limit: not the same plan."""
    world = World()
    for r, migrator in enumerate(world.ranks):
        migrator.submit(swap(), TransferLimits(max_step_bytes=99 + (r == 2)))
    world.finish()
    assert world.reports(1).status == "aborted"


def test_a_newer_plan_uses_what_has_arrived() -> None:
    """The step that is under way arrives; the rest is dropped, and its copies serve the new plan."""
    world = World()
    old = world.submit(swap(), TransferLimits(max_extra_bytes=8, max_step_bytes=8))
    world.batch(1)
    world.batch(1)
    assert world.reports(old).steps == 1
    sent = world.reports(old).bytes
    new = world.submit(swap())
    world.batch(1)
    assert world.reports(old).status == "moving"  # what is posted arrives first
    assert world.reports(new).status == "waiting"
    for r in world.ranks:
        r.courier.fetch()  # type: ignore[attr-defined]
    world.batch(1)
    assert world.reports(old).status == "superseded"
    assert world.reports(new).status in ("moving", "done")
    world.finish()
    assert world.reports(new).status == "done"
    assert world.reports(new).bytes + sent == 16  # two experts of 8 bytes crossed, once
    assert world.ranks[0].rows_LG == experts_of(swap())


def test_a_plan_waits_while_the_way_is_not_free() -> None:
    world = World()
    free: list[bool] = []
    for r in world.ranks:
        r.way_free = lambda: bool(free)
    number = world.submit(swap())
    for _ in range(3):
        world.batch(0)
        assert world.ranks[0].claims
    assert world.reports(number).status == "waiting"
    free.append(True)
    world.finish()
    assert world.reports(number).status == "done"


def test_home_copies_serve_and_one_that_cannot_be_read_ends_the_plan() -> None:
    home = Home({0: [0], 2: [1]})
    world = World(home=home)
    slots = np.full((L, R, 3), -1, dtype=np.int32)
    slots[:, :, :2] = static_slots(E, R)
    slots[:, 0, 2] = 2
    number = world.submit(slots)
    world.finish()
    assert world.reports(number).status == "done"
    far = np.full((L, R, 3), -1, dtype=np.int32)
    far[:, :, :2] = static_slots(E, R)
    far[:, 2, 2] = 0
    home.broken = True
    for migrator in world.ranks:
        migrator.links = SimpleNamespace(intra_node=1.0, inter_node=1.0, host=9.0)  # type: ignore[assignment]
    home.where = {0: [2]}
    number = world.submit(far)
    world.finish()
    # The disk of rank 2 is its quickest source, and broken.
    assert world.reports(number).status == "aborted"
    assert any("disk" in r.reports[number].reason for r in world.ranks) or any(
        "home copy" in r.reports[number].reason for r in world.ranks
    )
    home.broken = False
    number = world.submit(far)
    world.finish()
    assert world.reports(number).status == "done"
    # Nothing crossed: the copy was at home on the rank that wanted it; others were dropped.
    assert world.reports(number).bytes == 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_home_copy_that_its_rank_cannot_read_is_told_by_both_ends(broken: bool) -> None:
    """Something goes out all the same, so that the receiver does not wait."""
    home = Home({0: [1]})
    world = World(home=home)
    home.broken = broken
    step = [Shipment(0, 0, 1, 2, 8, True)]
    place = world.ranks[2].banks[0].allocate()
    flights = [
        migrator.launch(step, {(0, 0): place} if r == 2 else {}, 0) for r, migrator in enumerate(world.ranks)
    ]
    for migrator in world.ranks:
        migrator.courier.fetch()  # type: ignore[attr-defined]
    faults = [flight.fault for flight in flights]
    if broken:
        assert faults == [courier.OK, courier.UNREADABLE, courier.DAMAGED]
        assert "expert 0 of layer 0, rank 1: OSError: disk" in flights[1].error
    else:
        assert faults == [courier.OK] * 3
        assert torch.equal(place[0], value(0, 0)[0])


@pytest.mark.parametrize("limits", [None, TransferLimits(max_step_bytes=8)])
def test_what_was_lost_comes_back_from_home_while_the_ranks_wait(limits: TransferLimits | None) -> None:
    """Rank 1 has lost its experts of layer 0; their home copies are on rank 2."""
    world = World(home=Home({2: [2], 3: [2]}))
    world.ranks[1].banks[0].install([])
    have = [[[0, 1], [], [4, 5]], [[0, 1], [2, 3], [4, 5]]]
    barrier = threading.Barrier(R, timeout=30)
    box: list[Any] = [None] * R

    def run(rank: int) -> int:
        migrator = world.ranks[rank]

        def gather_ints(values: list[int]) -> list[list[int]]:
            box[rank] = list(values)
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        def wait(flight: Flight, timeout: float) -> None:
            barrier.wait()  # all have posted
            migrator.courier.fetch()  # type: ignore[attr-defined]

        migrator.group.gather_ints = gather_ints  # type: ignore[method-assign]
        migrator.courier.wait = wait  # type: ignore[method-assign]
        return migrator.restore(have, np.stack([static_slots(E, R)] * L), limits)

    with ThreadPoolExecutor(R) as pool:
        assert list(pool.map(run, range(R))) == [16] * R
    world.check()
    assert world.ranks[0].rows_LG == [[[0, 1], [2, 3], [4, 5]]] * L
    assert world.ranks[0].reports[0].steps == (1 if limits is None else 2)


def test_what_a_header_says() -> None:
    world = World()
    assert world.ranks[0].header() == Header(0, 0, 0, 0, 0)
    world.submit(swap())
    rows = world.batch(0)
    assert (rows[:, 1] > 0).all()
    assert len(set(rows[:, 1].tolist())) == 1
    assert world.batch(0).tolist() == [[1, 0, 1, 0, 0]] * R  # room for a step
    assert world.batch(0).tolist() == [[1, 0, 1, 0, 0]] * R  # it is on its way
    for r in world.ranks:
        r.courier.fetch()  # type: ignore[attr-defined]
    rows = world.batch(1)
    assert rows[:, 3].tolist() == [1] * R
    assert not world.switched[0]  # only in front of a batch of its own layer
    world.batch(0)
    assert world.switched == [[0]] * R


@pytest.mark.parametrize("field", ["max_step_bytes", "max_extra_bytes"])
@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), "12", True])
def test_transfer_limits_are_whole_numbers(field: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=field):
        TransferLimits(**{field: value})
