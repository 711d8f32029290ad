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
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, MoelessError, ProblemError
from moeless_opt.problems.spec import held_LGE
from moeless_opt.runtime.control import stacked
from moeless_opt.runtime.live.courier import OK, REASON
from moeless_opt.runtime.live.elastic import Elastic
from moeless_opt.runtime.live.migrate import Migrator
from moeless_opt.runtime.live.schedule import Router, Shipment
from moeless_opt.runtime.live.slots import SlotTable
from moeless_opt.runtime.live.ticket import REFUSED, UNPLANNED, Ticket

__all__ = ["LaneHeader", "Lanes"]

#: Tickets about which a rank tells the others at a time.
AHEAD = 4
#: Finished tickets that are remembered.
REMEMBERED = 4096


class LaneHeader(NamedTuple):
    """What one rank tells the others: numbers, or a column [R] of each, as they were gathered.

    Parameters
    ----------
    next1, next2, next3, next4 : int
        Checksums of the next open tickets; see `ticket.UNPLANNED`.
    arrived : int
        Posted tickets that have arrived, in order.
    fault : int
        What went wrong, see `courier`.
    clock : int
        Microseconds of this rank's clock.
    opened : int
        Tickets that were ever opened.
    """

    next1: Any
    next2: Any
    next3: Any
    next4: Any
    arrived: Any
    fault: Any
    clock: Any
    opened: Any


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
        self._me = migrator.group.rank
        self._clear()
        migrator.way_free = self._give_floor

    def _clear(self) -> None:
        self._open: deque[Ticket] = deque()
        self._posted: deque[Ticket] = deque()
        self._ready: dict[int, Ticket] = {}
        self._me = self.migrator.group.rank
        # On all ranks: copies that serve, copies in memory that do not, and of these those on their way.
        self._serving_LGE: BoolArray = held_LGE(self._slots_LGC(), self.migrator.tables[0].experts)
        self._extra_LGE: BoolArray = np.zeros_like(self._serving_LGE)
        self._coming_LGE: BoolArray = np.zeros_like(self._serving_LGE)
        self._changed: set[int] = set()  # layers of which copies may be let go

    # -- what callers use --------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No ticket is open or under way."""
        return not (self._open or self._posted or self._ready)

    @property
    def rests(self) -> bool:
        """Idle, with nothing to let go and no copies that are kept for a time."""
        return self.idle and self.elastic is None and not (self._floor_given or self._changed)

    def quiet(self, layer: int | None) -> None:
        """A batch of a layer in which nothing is decided."""
        self.passes += layer == 0
        self.now = max(self.now, time.monotonic_ns() // 1000 * 1e-6)

    @property
    def extra(self) -> set[tuple[int, int, int]]:
        """Copies in memory that do not serve: (layer, expert, rank)."""
        return {(int(x), int(e), int(g)) for x, g, e in np.argwhere(self._extra_LGE)}

    def heading_GC(self, layer: int) -> SlotArray:
        """Where a layer is heading: its newest adopted slots, or those in force."""
        for ticket in reversed(self._posted):
            if ticket.index == layer and ticket.serve and ticket.slots_GC is not None:
                return ticket.slots_GC
        ready = self._ready.get(layer)
        if ready is not None and ready.slots_GC is not None:
            return ready.slots_GC
        moving_LGC = self.migrator.moving_LGC
        return self.migrator.tables[layer].slots() if moving_LGC is None else moving_LGC[layer]

    @property
    def experts(self) -> int:
        """Of a layer."""
        return self.migrator.tables[0].experts

    def open(self, index: int, *, serve: bool = True) -> Ticket:
        """Open a ticket; all ranks do so at the same point.

        Whoever opens one must `offer` slots or an error for it, in the order of opening, from any thread.
        """
        if not serve and self.elastic is None:
            raise ProblemError("prewarm", "needs a warm pool: call elastic() first")
        self._opened += 1
        ticket = Ticket(
            self._opened,
            self.migrator.banks[index].layer,
            self.heading_GC(index),
            index=index,
            serve=serve,
            opened=self.passes,
        )
        self._open.append(ticket)
        return ticket

    def waits(self, layer: int) -> bool:
        """Whether a ticket of the layer is open; the same on all ranks."""
        return any(ticket.index == layer for ticket in self._open)

    def offer(self, ticket: Ticket, slots_GC: SlotArray | None, error: str = "") -> None:
        """Give an open ticket its slots, or say why there are none; in any thread."""
        digest = REFUSED
        if slots_GC is not None and not error:
            try:
                slots_GC = np.ascontiguousarray(slots_GC, dtype=np.int32)
                SlotTable(slots_GC, self.migrator.tables[ticket.index].experts)
                if slots_GC.shape[0] != self.migrator.group.size:
                    raise ProblemError(
                        "slots_GC",
                        f"has {slots_GC.shape[0]} ranks, the group has {self.migrator.group.size}",
                    )
                ticket.slots_GC = slots_GC
                experts = self.migrator.tables[ticket.index].experts
                ticket.wanted_GE = held_LGE(slots_GC[None], experts)[0]
                rows = repr([[e for e in row if e >= 0] for row in slots_GC.tolist()])
                digest = 1 + zlib.crc32(f"{ticket.number} {ticket.index} {ticket.serve} {rows}".encode())
            except ProblemError as problem:
                error = str(problem)
        ticket.reason = error
        ticket.digest = digest  # last: from here on the other thread may look

    # -- driven by batches -------------------------------------------------------------------------

    def header(self) -> LaneHeader:
        """What this rank tells the others now."""
        digests = [UNPLANNED] * AHEAD
        if self._open and not (self.migrator.claims or self._floor_given):
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
        return LaneHeader._make((*digests, arrived, fault, time.monotonic_ns() // 1000, self._opened))

    def _with_room(self, ticket: Ticket) -> int:
        """The ticket's checksum, once there is memory here for what it brings."""
        if ticket.digest <= 0:
            return ticket.digest
        assert ticket.wanted_GE is not None
        layer, bank = ticket.index, self.migrator.banks[ticket.index]
        here_E = self._serving_LGE[layer, self._me] | self._extra_LGE[layer, self._me]
        try:
            for e in np.flatnonzero(ticket.wanted_GE[self._me] & ~here_E).tolist():
                if (layer, e) not in ticket.room:
                    ticket.room[layer, e] = bank.allocate()
        except MemoryError as error:
            ticket.room.clear()
            ticket.reason = str(error)
            ticket.digest = REFUSED
        return ticket.digest

    def agree(self, layer: int | None, headers_RK: IntArray) -> None:
        """Act on everybody's numbers, in front of a batch of `layer` (None: between forwards)."""
        told_R = LaneHeader(*headers_RK.T)
        if (told_R.opened != told_R.opened[0]).any():
            self._drop_uneven(told_R.opened)
        if layer == 0:
            self.passes += 1
        self.now = max(self.now, int(told_R.clock[0]) * 1e-6)
        if self.elastic is not None:
            self.elastic.at(self.passes, self.now)
        if self._floor_given and not self.migrator.claims:
            self._floor_given = False
            self._serving_LGE = held_LGE(self._slots_LGC(), self._serving_LGE.shape[2])
            self._extra_LGE = np.zeros_like(self._serving_LGE)  # there may be fewer ranks than before
            self._coming_LGE = np.zeros_like(self._serving_LGE)
            if self.elastic is not None:
                self.elastic.follow(self._serving_LGE)
        for _ in range(int(told_R.arrived.min()) if self._posted else 0):
            self._landed(self._posted.popleft())
        if (fault := int(told_R.fault.max())) != OK and self._posted:
            self._fail(REASON[fault])  # memory was made for what is missing now: adopt at the next batch
        elif not self.migrator.claims:
            for column_R in told_R[:AHEAD]:
                if not self._open or not column_R.all():
                    break
                self._decide(self._open.popleft(), column_R)
        for ready in [layer] if layer is not None else sorted(self._ready):
            if ready in self._ready:
                self._install(self._ready.pop(ready))
        if self.elastic is not None:
            # Each layer's time goes on at its own batches.
            for one in [layer] if layer is not None else range(len(self._extra_LGE)):
                if self._extra_LGE[one].any():
                    self.elastic.expire(one)
                    self._changed.add(one)
        while self._changed:
            self._let_go(self._changed.pop())

    def _drop_uneven(self, opened_R: IntArray) -> None:
        """Void the tickets that not all ranks have opened, and count alike from here."""
        fewest = int(opened_R.min())
        late = [self.migrator.group.ranks[g] for g in np.flatnonzero(opened_R < opened_R.max())]
        while self._open and self._open[-1].number > fewest:
            self._end(self._open.pop(), "void", f"ranks {late} did not open it at the same point")
        self._opened = int(opened_R.max())

    def _decide(self, ticket: Ticket, column_R: IntArray) -> None:
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
        layer = ticket.index
        assert ticket.wanted_GE is not None
        assert ticket.slots_GC is not None
        ticket.adopted = self.passes
        posted = any(older.index == layer for older in self._posted)
        if not posted and layer not in self._ready and ticket.serve and self._in_force(ticket):
            self._end(ticket, "done", changed=False)
            return
        held_GE = self._serving_LGE[layer] | self._extra_LGE[layer]
        ticket.arrivals_GE = ticket.wanted_GE & ~held_GE
        transfers = self._transfers(ticket, held_GE & ~self._coming_LGE[layer])
        ticket.cold, ticket.bytes = len(transfers), sum(t.bytes for t in transfers)
        ticket.from_home = sum(t.from_home for t in transfers)
        self._extra_LGE[layer] |= ticket.arrivals_GE
        self._coming_LGE[layer] |= ticket.arrivals_GE
        if self.elastic is not None:
            self.elastic.wanted(layer, ticket.wanted_GE)
        ticket.status = "moving"
        if transfers:
            room = {
                (layer, t.expert): ticket.room[layer, t.expert]
                for t in transfers
                if t.destination == self._me
            }
            # Tags apart from those of the migrator, of whose flights none is under way with ours.
            ticket.flight = self.migrator.launch(transfers, room, (8 + self._adopted % 8) * 2**20)
            self._adopted += 1
            self.migrator.bytes_moved += sum(t.bytes for t in transfers if t.source != t.destination)
        ticket.room = {}
        # What stands on copies that are on their way for an older ticket arrives with it.
        if transfers or posted:
            self._posted.append(ticket)
        else:
            self._landed(ticket)
        self._pin(layer)
        self._changed.add(layer)

    def _in_force(self, ticket: Ticket) -> bool:
        """Whether the layer serves just these slots."""
        assert ticket.slots_GC is not None
        rows = self.migrator.tables[ticket.index].rows
        return all(
            list(row) == [e for e in new if e >= 0]
            for row, new in zip(rows, ticket.slots_GC.tolist(), strict=True)
        )

    def _transfers(self, ticket: Ticket, ready_GE: BoolArray) -> list[Shipment]:
        assert ticket.arrivals_GE is not None
        migrator, layer = self.migrator, ticket.index
        home = None if migrator.home is None else migrator.home.ranks
        router = Router(migrator.group.node_R, home, migrator.links)
        size = migrator.bytes_L[layer]
        return [
            router.source(layer, e, np.flatnonzero(ready_GE[:, e]).tolist(), to, size)
            for to, e in np.argwhere(ticket.arrivals_GE).tolist()
        ]

    def _landed(self, ticket: Ticket) -> None:
        if ticket.arrivals_GE is not None:
            self._coming_LGE[ticket.index] &= ~ticket.arrivals_GE
        if ticket.flight is not None:
            ticket.seconds, ticket.flight = ticket.flight.seconds, None
        if self.elastic is not None:
            self.elastic.loaded(ticket.bytes, ticket.seconds, ticket.from_home)
        if not ticket.serve:
            self._end(ticket, "done")
            return
        ticket.status = "ready"
        older = self._ready.get(ticket.index)
        self._ready[ticket.index] = ticket
        if older is not None:
            self._end(older, "superseded")

    def _install(self, ticket: Ticket) -> None:
        layer, after_GE = ticket.index, ticket.wanted_GE
        assert ticket.slots_GC is not None
        assert after_GE is not None
        if not self._in_force(ticket):
            leaving_GE = self._serving_LGE[layer] & ~after_GE
            # What a newer ticket counts on stays.
            needed_GE = self._targets(layer)
            kept_GE = leaving_GE & needed_GE
            if self.elastic is not None:
                self.elastic.pin(layer, after_GE | needed_GE)
                kept_GE |= self.elastic.left(layer, leaving_GE)
            self._extra_LGE[layer] &= ~after_GE
            self._extra_LGE[layer] |= kept_GE
            self._serving_LGE[layer] = after_GE
            self.migrator.install(layer, ticket.slots_GC, np.flatnonzero(kept_GE[self._me]).tolist())
        self._end(ticket, "done")

    def _targets(self, layer: int) -> BoolArray:
        """Copies of a layer that tickets under way count on, [G, E]."""
        targets_GE: BoolArray = np.zeros_like(self._serving_LGE[layer])
        for ticket in (*self._posted, *self._ready.values()):
            if ticket.index == layer and ticket.wanted_GE is not None:
                targets_GE |= ticket.wanted_GE
        return targets_GE

    def _pin(self, layer: int) -> None:
        if self.elastic is not None:
            self.elastic.pin(layer, self._serving_LGE[layer] | self._targets(layer))

    def _let_go(self, layer: int) -> None:
        """Free copies that nothing needs: all that do not serve, or what the pool has released."""
        extra_GE = self._extra_LGE[layer]
        if not extra_GE.any():
            return
        if self.elastic is None:
            gone_GE = extra_GE & ~self._targets(layer)
        else:
            gone_GE = extra_GE & ~self.elastic.warm_GE(layer)
        self._unstage(layer, gone_GE)

    def _unstage(self, layer: int, gone_GE: BoolArray) -> None:
        self._extra_LGE[layer] &= ~gone_GE
        self._coming_LGE[layer] &= ~gone_GE
        for e in np.flatnonzero(gone_GE[self._me]).tolist():
            self.migrator.banks[layer].staged.pop(e, None)

    def _end(self, ticket: Ticket, status: str, reason: str = "", *, changed: bool = True) -> None:
        ticket.status, ticket.reason = status, reason
        ticket.room, ticket.ended = {}, self.passes
        ticket.wanted_GE = ticket.arrivals_GE = None  # many are remembered
        self.finished.append(ticket)
        if changed:
            self._pin(ticket.index)
            self._changed.add(ticket.index)

    def _fail(self, reason: str) -> None:
        """Drop everything that is on its way; layers keep the slots that they have."""
        failed = list(self._posted)
        self._posted.clear()
        for ticket in failed:
            if ticket.arrivals_GE is not None:
                if self.elastic is not None:
                    self.elastic.lost(ticket.index, ticket.arrivals_GE)
                self._unstage(ticket.index, ticket.arrivals_GE)
        for ticket in failed:
            self._end(ticket, "void", f"{reason} {ticket.reason}".strip())

    # -- beside whole plans, and after a loss ------------------------------------------------------

    def _give_floor(self) -> bool:
        """Let a whole plan start: with nothing of ours on its way, and no copies that it does not know."""
        if self._posted:
            return False
        for ticket in list(self._ready.values()):
            del self._ready[ticket.index]
            self._end(ticket, "superseded")
        for layer, extra_GE in enumerate(self._extra_LGE):
            self._unstage(layer, extra_GE.copy())
        self._floor_given = True
        return True

    def end_elastic(self) -> None:
        """Keep nothing warm any more; all ranks do so at the same point, with nothing on its way."""
        self.elastic = None
        for layer in range(len(self._extra_LGE)):
            self._let_go(layer)

    def drop_open(self, reason: str, keep: frozenset[int] = frozenset()) -> None:
        """Give up tickets that are not adopted, but for these numbers; all ranks do so at the same point."""
        kept = [ticket for ticket in self._open if ticket.number in keep]
        dropped = [ticket for ticket in self._open if ticket.number not in keep]
        self._open = deque(kept)
        for ticket in dropped:
            self._end(ticket, "void", reason)

    def reset(self) -> None:
        """Forget everything: ranks were lost."""
        for ticket in (*self._open, *self._posted, *self._ready.values()):
            ticket.status, ticket.reason, ticket.ended = "void", "a rank was lost", self.passes
            self.finished.append(ticket)
        self._clear()
        self._floor_given = True  # the placement comes next
        self.now = 0.0  # another rank's clock may be the first now
        self.elastic = None
        numbers = self.migrator.group.gather_ints([self._opened, self._adopted, self.passes])
        self._opened, self._adopted, self.passes = (max(column) for column in zip(*numbers, strict=True))

    def _slots_LGC(self) -> SlotArray:
        return stacked(table.slots() for table in self.migrator.tables)

    def find(self, number: int) -> Ticket:
        """A ticket by its number, while it is remembered."""
        for group in (self._open, self._posted, self._ready.values(), reversed(self.finished)):
            for ticket in group:
                if ticket.number == number:
                    return ticket
        raise MoelessError(f"ticket {number} is not known (any more)")
