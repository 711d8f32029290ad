"""Plans of single layers, made and carried out while the model runs: the per-layer mode's state machine.

`Migrator` brings a whole model from one placement to another, one plan at a time. Here every layer has a plan
of its own (a *ticket*), many are under way at once, and none waits for another layer's. As there, every rank
runs the same machine on the same numbers, which travel with the token counts of every batch:

* a ticket is *opened* at a point that all ranks pass alike (in front of a layer, between passes), so all have
  the same tickets in the same order; a thread plans it meanwhile, on every rank from the same numbers;
* a rank that has the plan, and memory for what it will receive, says so with the plan's checksum; once all
  have said the same, the ticket is *adopted* at that batch, and its transfers are posted there and then;
* a rank says how many of the posted tickets have arrived; once all have them, the layer *installs* its slots,
  in front of the next split of its own tokens;
* whatever is late is simply seen later. Nobody waits, in no forward pass, for a plan or for weights.

A ticket fails on all ranks or on none: where ranks planned differently, one could not plan or had no memory,
or an arrival was damaged, the layer keeps the placement that it has.

With a warm pool (`elastic`), replicas that a layer gives up stay in memory until the pool lets them go, and
one that is wanted again needs no transfer. The pool's clock is part of what the ranks agree on.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import InfeasibleError, MoelessError, ProblemError
from moeless_opt.runtime.experts import Weights
from moeless_opt.runtime.migrate import OK, REASON, Flight, Migrator
from moeless_opt.runtime.placement import Router, Slots, SlotTable, Transfer

if TYPE_CHECKING:
    from moeless_opt.runtime.elastic import Elastic

__all__ = ["LANE_HEADER", "Lanes", "Ticket"]

#: Tickets about which a rank tells the others at a time.
AHEAD = 4
#: Numbers of `Lanes.header`: checksums of the next tickets, arrived, fault, microseconds.
LANE_HEADER = AHEAD + 3
UNPLANNED, REFUSED = 0, -1
#: Finished tickets that are remembered.
REMEMBERED = 4096


@dataclass(eq=False)
class Ticket:
    """A plan of one layer, from its opening to its end.

    Parameters
    ----------
    number : int
        In order of opening, from 1.
    layer : int
        Index among the MoE layers.
    base_GC : array of int32, shape [G, C]
        Where the layer was heading when it was opened: what to plan from. The same on all ranks.
    serve : bool
        Whether the slots shall serve; else they are only made warm.
    status : str
        ``"open"``, ``"moving"``, ``"ready"``, ``"done"``, ``"superseded"`` or ``"void"``.
    reason : str
        Why it is void.
    cold, from_home, bytes : int
        Replicas that had to be loaded, over all ranks; of these from home copies; and their bytes.
    opened, adopted, ended : int
        Forward passes of the model at these moments.
    seconds : float
        From posting its transfers until those to this rank had arrived.
    """

    number: int
    layer: int
    base_GC: Slots
    serve: bool = True
    status: str = "open"
    reason: str = ""
    cold: int = 0
    from_home: int = 0
    bytes: int = 0
    opened: int = 0
    adopted: int = 0
    ended: int = 0
    seconds: float = 0.0
    slots_GC: Slots | None = field(default=None, repr=False)
    digest: int = field(default=UNPLANNED, repr=False)
    room: dict[tuple[int, int], Weights] = field(default_factory=dict, repr=False)
    flight: Flight | None = field(default=None, repr=False)
    arrivals: frozenset[tuple[int, int, int]] = field(default=frozenset(), repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in ("done", "superseded", "void")


class Lanes:
    """The state machine of one rank; see the module's text.

    Parameters
    ----------
    migrator : Migrator
        Of the same model. Its whole plans go first: while one is under way no ticket is adopted.
    """

    def __init__(self, migrator: Migrator) -> None:
        self.migrator = migrator
        self.elastic: Elastic | None = None
        self.passes = 0
        self.now = 0.0  # seconds of the first rank's clock, as all ranks know it
        self.finished: deque[Ticket] = deque(maxlen=REMEMBERED)
        self._opened = 0
        self._adopted = 0
        self._floor_given = False
        self._clear()
        migrator.way_free = self._give_floor

    def _clear(self) -> None:
        self._open: deque[Ticket] = deque()
        self._posted: deque[Ticket] = deque()
        self._ready: dict[int, Ticket] = {}
        # (layer, expert, rank) of copies in memory that do not serve, on all ranks; `_coming` of these on
        # their way.
        self.extra: set[tuple[int, int, int]] = set()
        self._coming: set[tuple[int, int, int]] = set()
        self._changed = False  # since copies were last let go

    # -- what callers use --------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No ticket is open or under way."""
        return not (self._open or self._posted or self._ready)

    def heading_GC(self, layer: int) -> Slots:
        """Where a layer is heading: its newest adopted slots, or those in force."""
        for ticket in reversed(self._posted):
            if ticket.layer == layer and ticket.serve and ticket.slots_GC is not None:
                return ticket.slots_GC
        ready = self._ready.get(layer)
        if ready is not None and ready.slots_GC is not None:
            return ready.slots_GC
        moving_LGC = self.migrator.moving_LGC
        return self.migrator.tables[layer].slots() if moving_LGC is None else moving_LGC[layer]

    def open(self, layer: int, *, serve: bool = True) -> Ticket:
        """Open a ticket; all ranks do so at the same point.

        Whoever opens one must `offer` slots or an error for it, in the order of opening, from any thread.
        """
        if not 0 <= layer < len(self.migrator.tables):
            raise ProblemError("layer", f"is {layer}, there are {len(self.migrator.tables)} MoE layers")
        if not serve and self.elastic is None:
            raise ProblemError("prewarm", "needs a warm pool: call elastic() first")
        self._opened += 1
        ticket = Ticket(self._opened, layer, self.heading_GC(layer), serve, opened=self.passes)
        self._open.append(ticket)
        return ticket

    def waits(self, layer: int) -> bool:
        """Whether a ticket of the layer is open; the same on all ranks."""
        return any(ticket.layer == layer for ticket in self._open)

    def offer(self, ticket: Ticket, slots_GC: Slots | None, error: str = "") -> None:
        """Give an open ticket its slots, or say why there are none; in any thread."""
        digest = REFUSED
        if slots_GC is not None and not error:
            try:
                slots_GC = np.ascontiguousarray(slots_GC, dtype=np.int32)
                SlotTable(slots_GC, self.migrator.tables[ticket.layer].n_experts)
                if slots_GC.shape[0] != self.migrator.group.size:
                    raise ProblemError(
                        "slots_GC",
                        f"has {slots_GC.shape[0]} ranks, the group has {self.migrator.group.size}",
                    )
                ticket.slots_GC = slots_GC
                rows = repr([[e for e in row if e >= 0] for row in slots_GC.tolist()])
                digest = 1 + zlib.crc32(f"{ticket.number} {ticket.layer} {ticket.serve} {rows}".encode())
            except ProblemError as problem:
                error = str(problem)
        ticket.reason = error
        ticket.digest = digest  # last: from here on the other thread may look

    # -- driven by batches -------------------------------------------------------------------------

    def header(self) -> tuple[int, ...]:
        """What this rank tells the others now."""
        digests = [UNPLANNED] * AHEAD
        if self._open and not self.migrator.claims:
            for k, ticket in enumerate(islice(self._open, AHEAD)):
                digests[k] = self._with_room(ticket)
        arrived = fault = 0
        for ticket in self._posted:
            if ticket.flight is not None:
                if not ticket.flight.done.is_set():
                    break
                if ticket.flight.fault != OK:
                    fault, ticket.reason = ticket.flight.fault, ticket.flight.error
                    break
            arrived += 1
        return (*digests, arrived, fault, time.monotonic_ns() // 1000)

    def _with_room(self, ticket: Ticket) -> int:
        """The ticket's checksum, once there is memory here for what it brings."""
        if ticket.digest <= 0:
            return ticket.digest
        assert ticket.slots_GC is not None
        me, layer, bank = self.migrator.group.rank, ticket.layer, self.migrator.banks[ticket.layer]
        here = self._held_G(layer)[me]
        try:
            for e in ticket.slots_GC[me].tolist():
                if e >= 0 and e not in here and (layer, e) not in ticket.room:
                    ticket.room[layer, e] = bank.allocate()
        except MemoryError as error:
            ticket.room.clear()
            ticket.reason = str(error)
            ticket.digest = REFUSED
        return ticket.digest

    def agree(self, layer: int | None, headers_RK: NDArray[np.int64]) -> None:
        """Act on everybody's numbers, in front of a batch of `layer` (None: between forwards)."""
        if layer == 0:
            self.passes += 1
        self.now = max(self.now, int(headers_RK[0, AHEAD + 2]) * 1e-6)
        if self.elastic is not None:
            self.elastic.at(self.passes, self.now)
        if self._floor_given and not self.migrator.claims:
            self._floor_given = False
            if self.elastic is not None:
                self.elastic.follow(self._slots_LGC())
        for _ in range(int(headers_RK[:, AHEAD].min()) if self._posted else 0):
            self._landed(self._posted.popleft())
        if (fault := int(headers_RK[:, AHEAD + 1].max())) != OK and self._posted:
            self._fail(REASON[fault])  # memory was made for what is missing now: adopt at the next batch
        elif not self.migrator.claims:
            for k in range(AHEAD):
                column_R = headers_RK[:, k]
                if not self._open or not column_R.all():
                    break
                self._decide(self._open.popleft(), column_R)
        for ready in [layer] if layer is not None else sorted(self._ready):
            if ready in self._ready:
                self._install(self._ready.pop(ready))
        if layer in (0, None) and self.elastic is not None and self.extra:
            self.elastic.expire()
            self._changed = True
        if self._changed:
            self._let_go()

    def _decide(self, ticket: Ticket, column_R: NDArray[np.int64]) -> None:
        if (column_R < 0).any():
            self._end(ticket, "void", ticket.reason or "another rank could not carry it out")
        elif (column_R != column_R[0]).any():
            self._end(ticket, "void", "the ranks planned differently")
        else:
            try:
                self._adopt(ticket)
            except InfeasibleError as error:  # no source: everybody finds the same
                self._end(ticket, "void", str(error))

    def _adopt(self, ticket: Ticket) -> None:
        layer = ticket.layer
        assert ticket.slots_GC is not None
        held_G = self._held_G(layer)
        transfers = self._transfers(ticket, held_G)
        ticket.adopted = self.passes
        ticket.arrivals = frozenset((layer, t.expert, t.destination) for t in transfers)
        ticket.cold, ticket.bytes = len(transfers), sum(t.bytes for t in transfers)
        ticket.from_home = sum(t.from_home for t in transfers)
        self.extra |= ticket.arrivals
        self._coming |= ticket.arrivals
        if self.elastic is not None:
            self.elastic.wanted(layer, ticket.slots_GC)
        ticket.status = "moving"
        if transfers:
            me = self.migrator.group.rank
            room = {(layer, t.expert): ticket.room[layer, t.expert] for t in transfers if t.destination == me}
            # Tags apart from those of the migrator, of whose flights none is under way with ours.
            ticket.flight = self.migrator.launch(transfers, room, (8 + self._adopted % 8) * 2**20)
            self._adopted += 1
            self.migrator.bytes_moved += sum(t.bytes for t in transfers if t.source != t.destination)
        ticket.room = {}
        # What stands on copies that are on their way for an older ticket arrives with it.
        if transfers or any(older.layer == layer for older in self._posted):
            self._posted.append(ticket)
        else:
            self._landed(ticket)
        self._pin(layer)
        self._changed = True

    def _transfers(self, ticket: Ticket, held_G: Sequence[set[int]]) -> list[Transfer]:
        assert ticket.slots_GC is not None
        migrator, layer = self.migrator, ticket.layer
        home = None if migrator.home is None else migrator.home.ranks
        router = Router(migrator.group.node_R, home, migrator.links)
        found = []
        for to, row in enumerate(ticket.slots_GC.tolist()):
            for e in row:
                if e >= 0 and e not in held_G[to]:
                    holders = [
                        g for g, held in enumerate(held_G) if e in held and (layer, e, g) not in self._coming
                    ]
                    found.append(router.source(layer, e, holders, to, migrator.bytes_L[layer]))
        return found

    def _held_G(self, layer: int) -> list[set[int]]:
        """What each rank has of a layer, in force, warm, or on its way."""
        held_G = [set(row) for row in self.migrator.tables[layer].rows]
        for at, e, g in self.extra:
            if at == layer:
                held_G[g].add(e)
        return held_G

    def _landed(self, ticket: Ticket) -> None:
        self._coming -= ticket.arrivals
        if ticket.flight is not None:
            ticket.seconds, ticket.flight = ticket.flight.seconds, None
        if self.elastic is not None:
            self.elastic.loaded(ticket)
        if not ticket.serve:
            self._end(ticket, "done")
            return
        ticket.status = "ready"
        older = self._ready.get(ticket.layer)
        self._ready[ticket.layer] = ticket
        if older is not None:
            self._end(older, "superseded")

    def _install(self, ticket: Ticket) -> None:
        layer = ticket.layer
        assert ticket.slots_GC is not None
        before = self._serving(layer)
        new = [[e for e in row if e >= 0] for row in ticket.slots_GC.tolist()]
        if [list(row) for row in self.migrator.tables[layer].rows] != new:
            after = {(layer, e, g) for g, row in enumerate(new) for e in row}
            leaving = before - after
            self.extra -= after
            # What a newer ticket counts on stays.
            needed = self._targets(layer)
            self.extra |= leaving & needed
            if self.elastic is not None:
                self.elastic.pin(layer, after | needed)
                self.extra |= self.elastic.left(leaving)
            keep = [e for _, e, g in sorted(leaving & self.extra) if g == self.migrator.group.rank]
            self.migrator.install(layer, ticket.slots_GC, keep)
        self._end(ticket, "done")

    def _serving(self, layer: int) -> set[tuple[int, int, int]]:
        return {(layer, e, g) for g, row in enumerate(self.migrator.tables[layer].rows) for e in row}

    def _targets(self, layer: int | None = None) -> set[tuple[int, int, int]]:
        """Copies that tickets under way count on."""
        return {
            (t.layer, e, g)
            for t in (*self._posted, *self._ready.values())
            if t.slots_GC is not None and layer in (None, t.layer)
            for g, row in enumerate(t.slots_GC.tolist())
            for e in row
            if e >= 0
        }

    def _pin(self, layer: int) -> None:
        if self.elastic is not None:
            self.elastic.pin(layer, self._serving(layer) | self._targets(layer))

    def _let_go(self) -> None:
        """Free copies that nothing needs: all that do not serve, or what the pool has released."""
        self._changed = False
        gone = self.extra - self._targets() if self.elastic is None else self.elastic.released(self.extra)
        self.extra -= gone
        self._unstage(gone)

    def _unstage(self, gone: set[tuple[int, int, int]]) -> None:
        self._coming -= gone
        for layer, e, g in gone:
            if g == self.migrator.group.rank:
                self.migrator.banks[layer].staged.pop(e, None)

    def _end(self, ticket: Ticket, status: str, reason: str = "") -> None:
        ticket.status, ticket.reason = status, reason
        ticket.room, ticket.ended = {}, self.passes
        self.finished.append(ticket)
        self._pin(ticket.layer)
        self._changed = True

    def _fail(self, reason: str) -> None:
        """Drop everything that is on its way; layers keep the slots that they have."""
        failed = list(self._posted)
        self._posted.clear()
        lost = {copy for ticket in failed for copy in ticket.arrivals}
        self.extra -= lost
        self._unstage(lost)
        if self.elastic is not None:
            self.elastic.lost(lost)
        for ticket in failed:
            self._end(ticket, "void", f"{reason} {ticket.reason}".strip())

    # -- beside whole plans, and after a loss ------------------------------------------------------

    def _give_floor(self) -> bool:
        """Let a whole plan start: with nothing of ours on its way, and no copies that it does not know."""
        if self._posted:
            return False
        for ticket in list(self._ready.values()):
            del self._ready[ticket.layer]
            self._end(ticket, "superseded")
        self._unstage(self.extra)
        self.extra = set()
        self._floor_given = True
        return True

    def drop_open(self, reason: str) -> None:
        """Give up tickets that are not adopted; all ranks do so at the same point."""
        while self._open:
            self._end(self._open.popleft(), "void", reason)

    def reset(self) -> None:
        """Forget everything: ranks were lost."""
        for ticket in (*self._open, *self._posted, *self._ready.values()):
            ticket.status, ticket.reason, ticket.ended = "void", "a rank was lost", self.passes
            self.finished.append(ticket)
        self._clear()
        self._floor_given = False
        self.elastic = None
        numbers = self.migrator.group.gather_ints([self._opened, self._adopted, self.passes])
        self._opened, self._adopted, self.passes = (max(column) for column in zip(*numbers, strict=True))

    def _slots_LGC(self) -> Slots:
        tables = self.migrator.tables
        width = max(len(row) for table in tables for row in table.rows)
        return np.stack([table.slots(width) for table in tables])

    def find(self, number: int) -> Ticket:
        """A ticket by its number, while it is remembered."""
        for group in (self._open, self._posted, self._ready.values(), reversed(self.finished)):
            for ticket in group:
                if ticket.number == number:
                    return ticket
        raise MoelessError(f"ticket {number} is not known (any more)")
