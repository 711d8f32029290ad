"""Whole plans carried out layer by layer: what becomes of a plan's tickets taken together."""

from __future__ import annotations

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.live.lanes import Lanes
from moeless_opt.runtime.live.migrate import MigrationReport
from moeless_opt.runtime.live.slots import SlotTable
from moeless_opt.runtime.live.ticket import Ticket

__all__ = ["LayerPlans"]

#: Plans that are remembered.
REMEMBERED = 256


class LayerPlans:
    """Plans of a model, or of one layer, by tickets.

    Parameters
    ----------
    lanes : Lanes
        Carries the tickets out.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self._applied = 0
        self._tickets: dict[int, list[Ticket]] = {}

    def one(self, index: int, slots_GC: SlotArray, *, serve: bool = True) -> int:
        """Move one layer, or only make its replicas warm; returns the ticket's number.

        Raises
        ------
        ProblemError
            If the slots are no placement.
        """
        SlotTable(slots_GC, self.lanes.experts)
        ticket = self.lanes.open(index, serve=serve)
        self.lanes.offer(ticket, slots_GC)
        return ticket.number

    def all(self, slots_LGC: SlotArray) -> int:
        """Move all layers, each by itself; returns a number below 0."""
        self.lanes.migrator.check(slots_LGC)
        tickets = []
        for index, slots_GC in enumerate(slots_LGC):
            tickets.append(self.lanes.open(index))
            self.lanes.offer(tickets[-1], slots_GC)
        self._applied += 1
        number = -self._applied
        self._tickets[number] = tickets
        self._tickets.pop(number + REMEMBERED, None)
        return number

    @property
    def numbers(self) -> frozenset[int]:
        """Of the tickets of whole plans."""
        return frozenset(ticket.number for tickets in self._tickets.values() for ticket in tickets)

    def report(self, number: int) -> MigrationReport:
        """What became of a plan of all layers."""
        if number not in self._tickets:
            raise MoelessError(f"plan {number} is not known (any more)")
        tickets = self._tickets[number]
        moving = [t for t in tickets if not t.over]
        void = [t for t in tickets if t.status == "void"]
        late = any(t.status == "superseded" for t in tickets)
        over = "aborted" if void else "superseded" if late else "done"
        return MigrationReport(
            number,
            "moving" if moving else over,
            void[0].reason if void else "",
            sum(t.bytes for t in tickets),
            sum(t.cold > 0 for t in tickets),
            sum(t.status == "done" for t in tickets),
            max(t.seconds for t in tickets),
        )
