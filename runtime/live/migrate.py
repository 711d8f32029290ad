"""Moves experts between ranks while the model runs, and switches placements without anybody waiting.

Every rank of an expert-parallel group runs the same state machine. What drives it are a few numbers that the
ranks add to the token counts which they gather for every batch of every layer anyway: which plan they were
given, how many steps of it they have memory for, how many have arrived, and whether something went wrong.
Everybody sees the same numbers and so takes the same decisions at the same batch of the same layer:

* a step of transfers is posted when all ranks have finished the step before and have room for this one;
* a layer switches to its new slots when everything it needs has arrived everywhere, in front of the split of
  the batch that carried the news: no rank ever uses a placement that another does not use;
* if any rank reports a fault (damaged data, no memory, a peer that is gone), all ranks drop the plan; layers
  that have switched stay so, the others keep the placement that they have;
* a newer plan lets the posted steps arrive and drops the rest; what lies there already is used if it fits.

Nothing here waits for a transfer during a forward pass. A thread does the waiting (on gloo for the operations
themselves, on CUDA for an event behind them on a stream of their own), and the passes look at its flag.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from moeless_opt.problems.arrays import IntArray, SlotArray, whole
from moeless_opt.problems.errors import InfeasibleError, MoelessError, ProblemError
from moeless_opt.problems.spec import Links
from moeless_opt.runtime.live.courier import (
    LOST,
    NO_MEMORY,
    OK,
    REASON,
    Courier,
    DamagedError,
    Flight,
    Letter,
    UnreadableError,
)
from moeless_opt.runtime.live.experts import SlotBank, Weights, checksum
from moeless_opt.runtime.live.groups import ExpertGroup, RankLostError
from moeless_opt.runtime.live.home import HomeStore
from moeless_opt.runtime.live.schedule import Schedule, Shipment, build_schedule, follow_schedule
from moeless_opt.runtime.live.slots import SlotTable

__all__ = ["Header", "MigrationReport", "Migrator", "TransferLimits"]


class Header(NamedTuple):
    """What one rank tells the others: numbers, or a column [R] of each, as they were gathered.

    Parameters
    ----------
    number, digest : int
        The newest plan that was handed in, and its checksum (0: none waits).
    ready, done : int
        Steps for which there is memory here, and steps that have arrived.
    fault : int
        What went wrong, see `courier`.
    """

    number: Any
    digest: Any
    ready: Any
    done: Any
    fault: Any


@dataclass(frozen=True)
class TransferLimits:
    """What a migration may use.

    Parameters
    ----------
    max_step_bytes : int, optional
        Bytes that one rank sends, or receives, in one step.
    max_extra_bytes : int, optional
        Bytes of experts that a rank may hold beyond the larger of before and after.

    Raises
    ------
    ProblemError
        If one is no whole number: of at least 1, and 0.
    """

    max_step_bytes: int | None = None
    max_extra_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_step_bytes", 1), ("max_extra_bytes", 0)):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else whole(name, given, low=low))


@dataclass
class MigrationReport:
    """What became of a plan.

    Parameters
    ----------
    number : int
        As `Migrator.submit` returned it.
    status : str
        ``"waiting"``, ``"moving"``, ``"done"``, ``"superseded"`` or ``"aborted"``.
    reason : str
        Why it was aborted.
    bytes : int
        Sent between ranks by posted steps, over the whole group.
    steps, switches : int
        Posted, and done.
    seconds : float
        From its first step to its end.
    """

    number: int
    status: str = "waiting"
    reason: str = ""
    bytes: int = 0
    steps: int = 0
    switches: int = 0
    seconds: float = 0.0
    began: float = field(default=0.0, repr=False)


@dataclass
class _Request:
    """A plan as it was handed in, before it is known from where it will start."""

    number: int
    target_LGC: SlotArray
    limits: TransferLimits
    steps: Any
    digest: int
    schedule: Schedule | None = None
    version: int = -1


class Migrator:
    """The state machine of one rank; see the module's text.

    Parameters
    ----------
    group : ExpertGroup
        The ranks.
    banks : sequence of SlotBank
        This rank's slots, by layer.
    tables : sequence of SlotTable
        The placement in force, by layer.
    on_switch : callable
        ``on_switch(layer, table)``: tell the layer's dispatcher.
    home : HomeStore, optional
        Second source.
    sums_LE : array of int64, shape [L, E], optional
        Checksums of all experts; arrivals are checked when given.
    links : Links, optional
        Bandwidths, which decide between sources.
    """

    def __init__(
        self,
        group: ExpertGroup,
        banks: Sequence[SlotBank],
        tables: Sequence[SlotTable],
        on_switch: Callable[[int, SlotTable], None],
        *,
        home: HomeStore | None = None,
        sums_LE: IntArray | None = None,
        links: Links | None = None,
    ) -> None:
        self.links = links
        self.group = group
        self.banks = banks
        self.tables = list(tables)
        self.on_switch = on_switch
        self.home = home
        self.sums_LE = sums_LE
        self.courier = Courier(group)
        self.reports: dict[int, MigrationReport] = {}
        self.bytes_moved = 0
        self.bytes_L = [bank.expert_bytes for bank in banks]
        self._request: _Request | None = None
        self._number = 0
        self._digest = 0
        self._started = 0  # the plan under way, or the last one
        self._seen = 0  # the newest number that all ranks had
        self._version = 0  # counts changes of the placement
        #: Whether a plan is under way or about to be, as all ranks know; set by `agree`.
        self.claims = False
        #: Asked before a plan starts; must give the same answer on all ranks.
        self.way_free: Callable[[], bool] = lambda: True
        self._stopping = False
        self._clear()

    def _clear(self) -> None:
        self._target: SlotArray | None = None
        self._schedule: Schedule | None = None
        self._posted = 0
        self._done = 0
        self._ready = 0
        self._fault = OK
        self._room: dict[Shipment, Weights] = {}
        self._flights: list[Flight] = []
        self._switched = 0
        self._waiting_stages: list[int] = []
        # (layer, expert, rank) of copies on their way or arrived but not in force, on all ranks.
        self._staged: set[tuple[int, int, int]] = set()

    # -- what callers use --------------------------------------------------------------------------

    @property
    def rows_LG(self) -> list[list[list[int]]]:
        """Experts in force, by layer and rank."""
        return [[list(row) for row in table.rows] for table in self.tables]

    @property
    def target_LGC(self) -> SlotArray | None:
        """The placement that is being reached, or waits to be; None if there is none."""
        return self._target if self._request is None else self._request.target_LGC

    @property
    def moving_LGC(self) -> SlotArray | None:
        """The placement that is being reached, as all ranks know; None if no plan is under way."""
        return self._target

    @property
    def idle(self) -> bool:
        """No plan is under way or waiting."""
        return self._schedule is None and self._request is None

    @property
    def quiet(self) -> bool:
        """Idle, and nobody has anything to learn of it."""
        return self.idle and self._number == self._seen and not self.claims

    def submit(
        self,
        target_LGC: SlotArray,
        limits: TransferLimits | None = None,
        steps: Any = None,
    ) -> int:
        """Hand in a placement; every rank of the group does so with the same one.

        It starts when all ranks have it, and replaces whatever was under way. Ranks may hand it in at
        different moments: the others just go on as before.

        Parameters
        ----------
        target_LGC : array of int32, shape [L, G, C]
            Wanted slots.
        limits : TransferLimits, optional
            Bytes per step and beyond.
        steps : Migration or sequence of steps, optional
            A schedule that starts from the placement in force (see `follow_schedule`); worked out here when
            absent.

        Returns
        -------
        int
            Number under which `reports` tells its fate.

        Raises
        ------
        ProblemError, InfeasibleError
            If it cannot be carried out from the placement in force; nothing changes then.
        """
        target = np.asarray(target_LGC)
        self._number += 1
        try:
            request = self._request_for(target, limits or TransferLimits(), steps)
        except MoelessError as error:
            # The number is spent all the same: it must mean the same plan on every rank.
            self.reports[self._number] = MigrationReport(self._number, "aborted", str(error))
            raise
        if self._request is not None:
            self.reports[self._request.number].status = "superseded"
        self._request, self._digest = request, request.digest
        self.reports[request.number] = MigrationReport(request.number)
        return request.number

    def check(self, target_LGC: SlotArray) -> None:
        """Refuse what is no placement of this model.

        Raises
        ------
        ProblemError
        """
        if target_LGC.shape[:2] != (len(self.banks), self.group.size):
            raise ProblemError(
                "slots_LGC",
                f"has {target_LGC.shape[:2]} layers and ranks, "
                f"the model has {(len(self.banks), self.group.size)}",
            )
        for bank, table, slots_GC in zip(self.banks, self.tables, target_LGC, strict=True):
            try:
                SlotTable(slots_GC, table.experts)
            except ProblemError as error:
                raise ProblemError(f"layer {bank.layer}: {error.where}", error.what) from None

    def _request_for(self, target: SlotArray, limits: TransferLimits, steps: Any) -> _Request:
        self.check(target)
        text = f"{limits} {getattr(steps, 'steps', steps)!r}".encode()
        digest = zlib.crc32(text, zlib.crc32(np.ascontiguousarray(target, dtype=np.int32).tobytes()))
        request = _Request(self._number, target, limits, steps, 1 + (digest & 0x7FFFFFFE))
        if self._schedule is None:
            # Refuse at once what cannot work.
            request.schedule, request.version = self._plan(request), self._version
        return request

    def _plan(self, request: _Request) -> Schedule:
        if request.steps is not None and not self._staged:
            return follow_schedule(
                request.steps,
                self.rows_LG,
                request.target_LGC,
                self.bytes_L,
                max_extra_bytes=request.limits.max_extra_bytes,
                home=None if self.home is None else self.home.ranks,
                through=self.stages,
            )
        return build_schedule(
            self.rows_LG,
            request.target_LGC,
            self.bytes_L,
            node_G=self.group.node_R,
            links=self.links,
            max_step_bytes=request.limits.max_step_bytes,
            max_extra_bytes=request.limits.max_extra_bytes,
            home=None if self.home is None else self.home.ranks,
            staged=frozenset(self._staged),
            through=self.stages,
        )

    # -- driven by batches -------------------------------------------------------------------------

    def header(self) -> Header:
        """What this rank tells the others now."""
        if self._schedule is not None:
            self._look()
            self._make_room()
        return Header(self._number, self._digest, self._ready, self._done, self._fault)

    def agree(self, layer: int | None, headers_RK: IntArray) -> None:
        """Act on everybody's numbers, in front of a batch of `layer` (None: between forwards)."""
        told_R = Header(*headers_RK.T)
        numbers = told_R.number
        self.claims = False
        if self._schedule is None and self._request is None and (numbers == self._seen).all():
            return
        if self._request is not None:
            late = [self.group.ranks[g] for g in np.flatnonzero(numbers < self._request.number)]
            self.reports[self._request.number].reason = f"not handed in on ranks {late} yet" if late else ""
        # A newer number that everybody has, and the same plan behind it (none: all refused it).
        newer = int(numbers.min()) > self._seen and bool((numbers == numbers[0]).all())
        same = bool((told_R.digest == told_R.digest[0]).all())
        wanted = newer and same and self._request is not None
        if self._schedule is not None:
            self._stopping = wanted  # post nothing more of the old one
            if (worst := int(told_R.fault.max())) != OK:
                self._abort(REASON[worst])
            else:
                self._advance(layer, int(told_R.ready.min()), int(told_R.done.min()))
        if wanted:
            self._supersede(int(told_R.done.min()))
        elif newer:
            # Never raise in the middle of somebody's batch: the placement in force stays in force.
            if self._request is not None:
                report = self.reports[self._request.number]
                report.status, report.reason = "aborted", "the ranks handed in different plans"
            self._request, self._digest, self._seen = None, 0, self._number
        self.claims = self._schedule is not None or (wanted and self._request is not None)

    def _look(self) -> None:
        while self._done < self._posted and self._flights[self._done].done.is_set():
            flight = self._flights[self._done]
            if flight.fault != OK:
                self._fault = flight.fault
                self.reports[self._started].reason = flight.error
                return
            self._done += 1

    def _make_room(self) -> None:
        """Allocate the next step's arrivals, so that a rank which cannot says so before anybody sends."""
        schedule = self._schedule
        assert schedule is not None
        if (
            self._ready > self._posted
            or self._ready >= len(schedule.steps)
            or self._fault
            or not self._fits()
        ):
            return
        try:
            # From the pool of the computing stream: what left a layer makes room for what arrives.
            for t in schedule.steps[self._ready]:
                if t.destination == self.group.rank:
                    self._room[t] = self.banks[t.layer].allocate()
        except MemoryError as error:
            self._room.clear()
            self._fault = NO_MEMORY
            self.reports[self._started].reason = str(error)
            return
        self._ready += 1

    def _fits(self) -> bool:
        """Whether the next step keeps every rank within its limit; all ranks reckon the same."""
        assert self._schedule is not None
        held_G = np.zeros(self.group.size, dtype=np.int64)
        for layer, table in enumerate(self.tables):
            held_G += np.array([len(row) for row in table.rows], dtype=np.int64) * self.bytes_L[layer]
        for layer, _, g in self._staged:
            held_G[g] += self.bytes_L[layer]
        for t in self._schedule.steps[self._posted]:
            held_G[t.destination] += t.bytes
            held_G[t.source] += t.bytes * (self.stages and t.from_home and t.source != t.destination)
        return bool((held_G <= self._schedule.limit_G).all())

    def _advance(self, layer: int | None, ready: int, done: int) -> None:
        schedule = self._schedule
        assert schedule is not None
        self._switch(layer, done)
        if self._schedule is None:
            return
        if not self._stopping and done >= self._posted and ready > self._posted:
            self._post(schedule.steps[self._posted])

    def _post(self, step: Sequence[Shipment]) -> None:
        if self._posted == 0:
            self.reports[self._started].began = time.perf_counter()
        self._staged |= {(t.layer, t.expert, t.destination) for t in step}
        room = {(t.layer, t.expert): self._room.pop(t) for t in step if t.destination == self.group.rank}
        # Tags: unique in a plan; NCCL goes by the order, which is the same everywhere.
        self._flights.append(self.launch(step, room, (self._posted % 8) * 2**20))
        self._posted += 1
        report = self.reports[self._started]
        report.steps += 1
        moved = sum(t.bytes for t in step if t.source != t.destination)
        report.bytes += moved
        self.bytes_moved += moved

    def launch(
        self, step: Sequence[Shipment], room: dict[tuple[int, int], Weights], first_tag: int
    ) -> Flight:
        """Start transfers, at the same point and in the same order on all ranks; returns at once.

        Parameters
        ----------
        step : sequence of Shipment
            What travels.
        room : dict of (layer, expert) to Weights
            Memory for what arrives on this rank; it is staged from now on.
        first_tag : int
            Of the messages; no two flights at a time may share tags.
        """
        me = self.group.rank
        sends: list[Letter] = []
        receives: list[tuple[Weights, int, int]] = []
        loads: list[tuple[Shipment, Weights]] = []
        arrived: list[tuple[Shipment, Weights]] = []
        unread: list[UnreadableError] = []
        for k, t in enumerate(step):
            bank = self.banks[t.layer]
            if t.destination == me:
                place = room[t.layer, t.expert]
                arrived.append((t, place))
                if t.source == me:
                    loads.append((t, place))
                else:
                    receives.append((place, t.source, first_tag + k))
                bank.staged[t.expert] = place
            elif t.source == me and t.from_home:
                # Read by the courier: it may come from a disk, and a forward pass is waiting here.
                sends.append((functools.partial(self._staged_copy, t, unread), t.destination, first_tag + k))
            elif t.source == me:
                sends.append((bank.weights(t.expert), t.destination, first_tag + k))

        def finish() -> None:
            if unread:
                raise unread[0]
            for t, place in loads:
                for mine, theirs in zip(place, self._copy(t), strict=True):
                    mine.data.copy_(theirs, non_blocking=True)
            if self.sums_LE is not None:
                for t, place in arrived:
                    if checksum(place) != int(self.sums_LE[t.layer, t.expert]):
                        raise DamagedError(
                            f"expert {t.expert} of layer {t.layer} from rank {t.source} is damaged"
                        )

        return self.courier.post(sends, receives, finish)

    def _copy(self, t: Shipment) -> Weights:
        """The home copy that is to be sent or loaded."""
        assert self.home is not None
        try:
            return self.home.read(t.layer, t.expert)
        except Exception as error:  # whatever a store may raise: the ranks must hear of it, not one alone
            raise UnreadableError(
                f"expert {t.expert} of layer {self.banks[t.layer].layer}, rank {self.group.ranks[t.source]}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _staged_copy(self, t: Shipment, unread: list[UnreadableError]) -> Weights:
        """A home copy, where it can be sent from."""
        bank = self.banks[t.layer]
        try:
            copy = self._copy(t)
        except UnreadableError as error:
            # Something must go out all the same, or the receiver waits; nobody will use it.
            unread.append(error)
            return [torch.zeros(s, dtype=d, device=bank.device) for s, d in bank.shapes]
        if not self.stages:
            return copy
        return [bank.meter.track(c.to(self.group.device, non_blocking=True)) for c in copy]

    @property
    def stages(self) -> bool:
        """Whether a home copy that is sent to another rank takes memory of the sender's device meanwhile."""
        return self.courier.stream is not None and not self.group.staged

    def _switch(self, layer: int | None, done: int) -> None:
        schedule = self._schedule
        assert schedule is not None
        blocked: set[int] = set()
        for index in list(self._waiting_stages):
            stage = schedule.stages[index]
            if (
                stage.last_step >= done
                or (layer is not None and stage.layer != layer)
                or stage.layer in blocked
            ):
                blocked.add(stage.layer)  # the stages of a layer come in order
                continue
            self.install(stage.layer, stage.slots_GC)
            self._waiting_stages.remove(index)
            self.reports[self._started].switches += 1
        if not self._waiting_stages and self._posted == done == len(schedule.steps):
            self._end("done")

    def install(self, layer: int, slots_GC: SlotArray, keep: Sequence[int] = ()) -> None:
        """Put a layer's slots in force; what they need lies here. `keep`: see `SlotBank.install`."""
        old = self.tables[layer]
        table = SlotTable(slots_GC, old.experts)
        bank = self.banks[layer]
        # The host has seen the arrivals complete, so the kernels that it launches next may read them.
        bank.install(table.rows[self.group.rank], keep)
        self.tables[layer] = table
        self._version += 1
        self._staged -= {(layer, e, g) for g, row in enumerate(table.rows) for e in row}
        self.on_switch(layer, table)

    def _end(self, status: str, reason: str = "") -> None:
        report = self.reports[self._started]
        report.status = status
        report.reason = report.reason or reason
        report.seconds = time.perf_counter() - report.began
        staged, keep = self._staged, status == "superseded"
        self._clear()
        self._stopping = False
        if keep:
            self._staged = staged
        else:
            for bank in self.banks:
                bank.drop_staged()

    def _abort(self, reason: str) -> None:
        self._end("aborted", reason)

    def _supersede(self, done: int) -> None:
        """Start the newest plan, or first let the posted steps of the old one arrive."""
        if self._schedule is not None:
            if done < self._posted:
                return
            self._end("superseded")
        elif not self.way_free():
            return
        request = self._request
        assert request is not None
        self._request, self._digest = None, 0
        self._started, self._seen = request.number, self._number
        report = self.reports[request.number]
        report.began = time.perf_counter()
        try:
            fresh = request.schedule if request.version == self._version and not self._staged else None
            schedule = fresh or self._plan(request)
        except (InfeasibleError, ProblemError) as error:
            # It was possible from where the ranks stood when it was handed in; everybody finds the same now.
            report.status, report.reason = "aborted", str(error)
            self._forget_staged()
            return
        wanted = {
            (i, int(e), g)
            for i, layer in enumerate(request.target_LGC)
            for g, row in enumerate(layer)
            for e in row
        }
        self._staged &= wanted
        for layer, bank in enumerate(self.banks):
            bank.drop_staged([e for (i, e, g) in self._staged if i == layer and g == self.group.rank])
        self._schedule, self._target = schedule, request.target_LGC
        self._waiting_stages = list(range(len(schedule.stages)))
        report.status = "moving"
        if not schedule.stages:
            self._end("done")

    def _forget_staged(self) -> None:
        self._staged = set()
        for bank in self.banks:
            bank.drop_staged()

    def forget(self, number: int, reason: str) -> None:
        """Drop what waits to be started; all ranks do so, and count on from this number."""
        if self._request is not None:
            report = self.reports[self._request.number]
            report.status, report.reason = "aborted", reason
        self._request, self._digest, self._number = None, 0, number

    # -- after a loss ------------------------------------------------------------------------------

    def reset(self, group: ExpertGroup) -> None:
        """Drop every plan and go on with other ranks; `restore` must follow."""
        for report in self.reports.values():
            if report.status in ("waiting", "moving"):
                report.status, report.reason = "aborted", "a rank was lost"
        self.courier.close()
        self.group = group
        self.courier = Courier(group)
        self._request = None
        # Numbers go on: every rank handed in the same plans or is told so here.
        self._stopping = False
        self._clear()
        self._number = max([self._number, *(row[0] for row in group.gather_ints([self._number]))])
        self._digest, self._started, self._seen = 0, self._number, self._number
        for bank in self.banks:
            bank.drop_staged()

    def restore(
        self,
        have_LG: Sequence[Sequence[Sequence[int]]],
        target_LGC: SlotArray,
        limits: TransferLimits | None = None,
        timeout: float = 600.0,
    ) -> int:
        """Reach a placement at once, with the ranks waiting; returns the bytes that were fetched.

        Parameters
        ----------
        have_LG : nested sequences
            What the ranks really hold; experts may be missing if they have a home copy.
        target_LGC : array of int32, shape [L, G, C]
            Wanted slots.

        Raises
        ------
        InfeasibleError
            If an expert has no source or the memory is too small.
        MoelessError
            If a transfer fails, on all ranks.
        """
        limits = limits or TransferLimits()
        schedule = build_schedule(
            have_LG,
            target_LGC,
            self.bytes_L,
            node_G=self.group.node_R,
            links=self.links,
            max_step_bytes=limits.max_step_bytes,
            max_extra_bytes=limits.max_extra_bytes,
            home=None if self.home is None else self.home.ranks,
            through=self.stages,
        )
        self.reports.setdefault(self._started, MigrationReport(self._started, "done"))
        self._schedule = schedule
        stages = list(schedule.stages)
        for s, step in enumerate(schedule.steps):
            mine = [t for t in step if t.destination == self.group.rank]
            self._room = self._reserved(mine)
            self._post(step)
            self.courier.wait(self._flights[s], timeout)
            fault = self._flights[s].fault if self._flights[s].done.is_set() else LOST
            faults = {row[0] for row in self.group.gather_ints([fault])} - {OK}
            if faults:
                # What is lost can be tried again with those who are left; what is damaged stays so.
                worst = LOST if LOST in faults else max(faults)
                failed = RankLostError if worst == LOST else MoelessError
                here = f": {self._flights[s].error}" if self._flights[s].error else ""
                raise failed(f"restoring failed: {REASON[worst]}{here}")
            while stages and stages[0].last_step <= s:
                stage = stages.pop(0)
                self.banks[stage.layer].install([int(e) for e in stage.slots_GC[self.group.rank] if e >= 0])
        moved = sum(t.bytes for step in schedule.steps for t in step)
        self._clear()
        for layer, slots_GC in enumerate(target_LGC):
            self.install(layer, slots_GC)
        return moved

    def _reserved(self, mine: Sequence[Shipment]) -> dict[Shipment, Weights]:
        """Memory for a step's arrivals, or one error on all ranks before anybody sends; a collective."""
        room: dict[Shipment, Weights] = {}
        lacking = ""
        try:
            room = {t: self.banks[t.layer].allocate() for t in mine}
        except MemoryError as error:
            lacking = f": {error}"
        rows = self.group.gather_ints([int(bool(lacking))])
        short = [rank for rank, row in zip(self.group.ranks, rows, strict=True) if row[0]]
        if short:
            raise MoelessError(f"restoring failed: no memory for an arrival on ranks {short}{lacking}")
        return room

    def close(self) -> None:
        """End the thread."""
        self.courier.close()
