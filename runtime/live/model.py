"""A running model whose experts can be moved: what `attach` returns, whichever engine it runs on."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import MoelessError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links
from moeless_opt.runtime.control.backend import MemoryReport, Observation
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher
from moeless_opt.runtime.live.dispatch.shares import PlannedShares, SharePolicy, share_policy
from moeless_opt.runtime.live.elastic import Elastic
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank, checksum
from moeless_opt.runtime.live.groups import ExpertGroup, SideGroup
from moeless_opt.runtime.live.home import HomeStore, PinnedHome, save_experts
from moeless_opt.runtime.live.lanes import LaneHeader, Lanes
from moeless_opt.runtime.live.measure import measure_experts
from moeless_opt.runtime.live.migrate import Header, MigrationReport, Migrator, TransferLimits
from moeless_opt.runtime.live.rows import RowBlock, default_row_block
from moeless_opt.runtime.live.slots import SlotTable, one_each, slots_of, static_slots
from moeless_opt.runtime.live.ticket import Ticket
from moeless_opt.runtime.pool.keep_alive import KeepAlive

__all__ = ["LiveModel", "attach"]

#: Plans carried out layer by layer that are remembered.
REMEMBERED = 256


def attach(model: Any, **options: Any) -> LiveModel:
    """Take over the experts of a running model.

    Parameters
    ----------
    model : GPTModel or transformers model
        Unmodified, in evaluation mode, with its weights loaded. Every rank of each expert-parallel group
        calls this at the same time.
    **options
        As of `megatron.attach` and `transformers_backend.attach`.

    Returns
    -------
    LiveModel

    Raises
    ------
    UnsupportedFeatureError
        Naming what the model uses and this does not support.
    """
    if hasattr(model, "set_experts_implementation"):
        from moeless_opt.runtime.engines import transformers as transformers_backend

        return transformers_backend.attach(model, **options)
    from moeless_opt.runtime.engines import megatron

    return megatron.attach(model, **options)


class LiveModel:
    """The experts of a running model; a `Backend`.

    The model itself is used as before: its forward pass is the same call. Everything below is called by all
    ranks of the expert-parallel group, between the same forward passes, unless it says otherwise.

    Parameters
    ----------
    group : ExpertGroup
        Ranks that hold the experts between them.
    banks, tables : sequences, one per MoE layer
        Slots of this rank; placement in force.
    topk : int
        Experts per token.
    meter : MemoryMeter
        Counts the weights.
    restore : callable
        Gives the engine back its stock parts; called by `detach`.
    shares : str or SharePolicy
        How replicas share tokens.
    row_block : int, optional
        Rows to which batches of experts are padded; by default what is tried out (`live.rows`).
    transposed : bool
        Whether the experts' matrices are stored [in, out].
    home : HomeStore, optional
        Second source of experts.
    checksums : bool
        Check what arrives.
    model : module, optional
        Whose experts these are.
    hidden : int
        Width of a token.
    run_experts : callable, optional
        ``run_experts(layer, rows, sizes)`` puts rows through this rank's experts of a layer, as many through
        each as its size says.
    links : Links, optional
        Bandwidths, which decide where a replica comes from; see `schedule.Router`.
    """

    def __init__(
        self,
        *,
        group: ExpertGroup,
        banks: Sequence[SlotBank],
        tables: Sequence[SlotTable],
        topk: int,
        meter: MemoryMeter,
        restore: Callable[[LiveModel], None],
        shares: str | SharePolicy = "balanced",
        row_block: int | None = None,
        transposed: bool = False,
        home: HomeStore | None = None,
        checksums: bool = False,
        model: Any = None,
        hidden: int = 0,
        run_experts: Callable[[int, torch.Tensor, IntArray], Any] | None = None,
        links: Links | None = None,
    ) -> None:
        self.model = model
        self.hidden = hidden
        self._run_experts = run_experts
        self.group = group
        self.banks = list(banks)
        self.experts = tables[0].experts
        self.topk = topk
        self.meter = meter
        self.home = home
        self.batches = 0
        self.attached = True
        self._restore = restore
        # Policies as they were asked for; the ranks agree on how many of them all know.
        self._policies = [share_policy(shares)]
        self.row_block = self._tried(transposed) if row_block is None else RowBlock(row_block)
        self._in_force = 0
        self._sized = group.size
        self.on_close: list[Callable[[], None]] = []
        self._hooks: list[Any] = []
        self._by_layer: dict[int, list[Ticket]] = {}
        self._applied_by_layer = 0
        self.dispatchers = [
            SlotDispatcher(
                layer,
                self.experts,
                topk,
                table,
                group,
                self._policies[0],
                row_block=self.row_block.rows,
                header=self._header,
                agree=self._agree,
            )
            for layer, table in enumerate(tables)
        ]
        self.migrator = Migrator(group, self.banks, tables, self._switched, home=home, links=links)
        self.lanes = Lanes(self.migrator)
        if isinstance(home, PinnedHome):
            home.fill(group, self.banks, self.migrator.rows_LG)
        if checksums:
            self.refresh_checksums()

    def _tried(self, transposed: bool) -> RowBlock:
        """Sizes of products in which this machine gives each row the same bits."""
        kinds = {(*shape, dtype) for bank in self.banks for shape, dtype in bank.shapes if len(shape) == 2}
        products = [(a, b, dtype) if transposed else (b, a, dtype) for a, b, dtype in kinds]
        return default_row_block(self.group.device, products, transposed=transposed)

    # -- agreement ---------------------------------------------------------------------------------

    def _header(self) -> tuple[int, ...]:
        return (*self.migrator.header(), *self.lanes.header(), len(self._policies) - 1)

    def _agree(self, layer: int | None, headers_RK: IntArray) -> None:
        if layer == 0:
            self.batches += 1
        plans, lanes = len(Header._fields), len(LaneHeader._fields)
        self.migrator.agree(layer, headers_RK[:, :plans])
        self.lanes.agree(layer, headers_RK[:, plans : plans + lanes])
        known = int(headers_RK[:, -1].min())
        if known > self._in_force:
            self._use_policy(known)

    def _use_policy(self, number: int) -> None:
        self._in_force = number
        for dispatcher in self.dispatchers:
            dispatcher.shares = self._policies[number]

    def _switched(self, layer: int, table: SlotTable) -> None:
        self.dispatchers[layer].set_table(table)

    # -- placement ---------------------------------------------------------------------------------

    @property
    def slots_LGC(self) -> SlotArray:
        """The placement in force, padded with -1."""
        tables = self.migrator.tables
        width = max(len(row) for table in tables for row in table.rows)
        return np.stack([table.slots(width) for table in tables])

    @property
    def target_LGC(self) -> SlotArray:
        """Where the placement is heading: the newest plan's slots, or those in force if nothing is under way.

        On its way a placement may hold more replicas than a rank has slots; plan from the target, which does
        not.
        """
        target = self.migrator.target_LGC
        return self.slots_LGC if target is None else target

    def apply(
        self,
        plan: Any,
        *,
        max_step_bytes: int | None = None,
        max_extra_bytes: int | None = None,
        steps: Any = None,
    ) -> int:
        """Start moving to a plan's placement; the model goes on meanwhile.

        Parameters
        ----------
        plan : object or array
            With ``slots_LGC`` (a Plan, a Placement), or the array [L, G, C] itself. If it has ``share_LGC``
            and says ``split == "equal"``, the split becomes equal; else shares are solved for every batch.
        max_step_bytes : int, optional
            Bytes that a rank may send, or receive, in one step.
        max_extra_bytes : int, optional
            Bytes of experts that a rank may hold beyond the larger of before and after.
        steps : Migration or sequence of steps, optional
            A schedule made elsewhere, e.g. by `moeless_opt.solvers.migration.schedule.schedule_migration`.

        Returns
        -------
        int
            For `migration`; below 0 where experts are elastic and layers move by themselves.

        Raises
        ------
        ProblemError, InfeasibleError
            If the plan cannot be carried out; the placement stays as it is.
        """
        self._alive()
        if self.lanes.elastic is None:
            limits = TransferLimits(max_step_bytes, max_extra_bytes)
            number = self.migrator.submit(slots_of(plan), limits, steps)
        else:
            if not (steps is None and max_step_bytes is None and max_extra_bytes is None):
                raise ProblemError("limits", "of steps and bytes are not for elastic experts")
            number = self._apply_by_layer(slots_of(plan))
        split = getattr(plan, "split", None)
        wanted = {"equal": "equal", "fractional": "balanced"}.get(str(split))
        asked = self._policies[-1].name
        if wanted is not None and asked in ("equal", "balanced") and wanted != asked:
            self.set_shares(wanted)
        return number

    def _apply_by_layer(self, slots_LGC: SlotArray) -> int:
        shape = (len(self.banks), self.group.size)
        if slots_LGC.shape[:2] != shape:
            raise ProblemError(
                "slots_LGC", f"has {slots_LGC.shape[:2]} layers and ranks, the model has {shape}"
            )
        for layer, slots_GC in enumerate(slots_LGC):
            try:
                SlotTable(slots_GC, self.experts)
            except ProblemError as error:
                raise ProblemError(f"layer {layer}: {error.where}", error.what) from None
        tickets = []
        for layer, slots_GC in enumerate(slots_LGC):
            tickets.append(self.lanes.open(layer))
            self.lanes.offer(tickets[-1], slots_GC)
        self._applied_by_layer += 1
        number = -self._applied_by_layer
        self._by_layer[number] = tickets
        self._by_layer.pop(number + REMEMBERED, None)
        return number

    def migration(self, number: int) -> MigrationReport:
        """What became of a plan; on this rank, at any time."""
        if number > 0:
            return self.migrator.reports[number]
        if number not in self._by_layer:
            raise MoelessError(f"plan {number} is not known (any more)")
        tickets = self._by_layer[number]
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

    def settle(self, timeout: float = 600.0) -> None:
        """Finish what is under way without traffic."""
        self._alive()
        deadline = time.monotonic() + timeout
        while self._round():
            time.sleep(0.0005)
            if time.monotonic() > deadline:
                raise MoelessError(f"the migrations did not end within {timeout:g} s")

    def tick(self) -> None:
        """One round of agreement without traffic: an idle model's experts move on, and kept-alive ones go."""
        self._alive()
        self._round()

    def _round(self) -> bool:
        """Agree outside a forward; whether anything was under way on any rank before."""
        busy = not (self.migrator.idle and self.lanes.idle)
        rows = np.asarray(self.group.gather_ints([*self._header(), int(busy)]), dtype=np.int64)
        self._agree(None, rows[:, :-1])
        return bool(rows[:, -1].any())

    def set_shares(self, shares: str | SharePolicy) -> None:
        """Use another policy from the first batch on that all ranks know of it."""
        self._policies.append(share_policy(shares))

    def set_planned_shares(self, plan: Any) -> None:
        """Use a plan's own ``share_LGC`` instead of solving for every batch."""
        self.set_shares(PlannedShares(np.asarray(plan.share_LGC, dtype=np.float64), slots_of(plan)))

    # -- layer by layer ----------------------------------------------------------------------------

    def open_layer(self, layer: int) -> Ticket | None:
        """Begin a plan of one layer, to be made elsewhere: `Ticket.base_GC` is what to plan from.

        All ranks call it at the same point of the same forward pass (or between passes), and every rank
        gives the ticket its slots by `offer_layer`, from any thread, when it has them. They come into force
        in front of the first batch of the layer by which all ranks have them and the weights that they need.

        Returns
        -------
        Ticket or None
            None while an earlier plan of the layer is still being made.
        """
        self._alive()
        return None if self.lanes.waits(layer) else self.lanes.open(layer)

    def offer_layer(self, ticket: Ticket, slots_GC: SlotArray | None, error: str = "") -> None:
        """Give a ticket its slots [G, C], the same on all ranks, or say why there are none; in any thread."""
        self.lanes.offer(ticket, slots_GC, error)

    def apply_layer(self, layer: int, slots_GC: SlotArray) -> int:
        """Move one layer to these slots; all ranks call it at the same point.

        Returns
        -------
        int
            For `layer_plan`.

        Raises
        ------
        ProblemError
            If they are no placement.
        """
        self._alive()
        SlotTable(slots_GC, self.experts)
        ticket = self.lanes.open(layer)
        self.lanes.offer(ticket, slots_GC)
        return ticket.number

    def prewarm_layer(self, layer: int, slots_GC: SlotArray) -> int:
        """Load these replicas ahead of their use, without using them yet; the keep-alive runs from now."""
        self._alive()
        SlotTable(slots_GC, self.experts)
        ticket = self.lanes.open(layer, serve=False)
        self.lanes.offer(ticket, slots_GC)
        return ticket.number

    def layer_plan(self, number: int) -> Ticket:
        """What became of a plan of one layer; on this rank, at any time."""
        return self.lanes.find(number)

    def side_group(self) -> SideGroup:
        """One more group of the same ranks, for a thread of its own; all of them call this together."""
        return self.group.side()

    def last_load_E(self, layer: int) -> IntArray:
        """Tokens of each expert in the layer's last batch, over all ranks; the same on all of them."""
        load_E: IntArray = self.dispatchers[layer].batch_counts_RE.sum(axis=0)
        return load_E

    def elastic(
        self,
        keep_alive: KeepAlive | float = 10.0,
        *,
        clock: str = "seconds",
        slots: int | Sequence[int] | None = None,
        kv_bytes: Callable[[], float] | None = None,
    ) -> Elastic:
        """Keep replicas warm that a layer gives up; all ranks call it together, between passes.

        From here on plans, whole ones too, are carried out layer by layer, and the costs are metered.

        Parameters
        ----------
        keep_alive : KeepAlive or float
            How long such a replica stays; an adaptive one learns on all ranks alike.
        clock : {"seconds", "passes"}
            What that is counted in: the first rank's seconds, or forward passes.
        slots : int or sequence of int, optional
            Replicas of a layer that each rank keeps, warm ones included; all experts by default.
        kv_bytes : callable, optional
            Bytes of the KV cache of all ranks, for the cost meter.

        Returns
        -------
        Elastic
        """
        self.settle()
        self._unhook()
        layers = len(self.banks)
        kept_G = np.broadcast_to(np.asarray(self.experts if slots is None else slots), (self.group.size,))
        keeps = float(keep_alive) if isinstance(keep_alive, int | float) else vars(keep_alive)
        asked = zlib.crc32(repr((clock, kept_G.tolist(), keeps)).encode())
        rows = self.group.gather_ints([asked, self._other_bytes()])
        if any(row[0] != asked for row in rows):
            raise ProblemError("elastic", "was called with different arguments on different ranks")
        made = Elastic(
            self.slots_LGC,
            self.experts,
            capacity_LG=np.broadcast_to(kept_G.astype(np.int64), (layers, self.group.size)),
            bytes_L=np.array([bank.expert_bytes for bank in self.banks], dtype=np.int64),
            keep_alive=keep_alive,
            clock=clock,
            other_bytes=float(sum(row[1] for row in rows)),
            dispatchers=self.dispatchers,
            kv_bytes=kv_bytes,
        )
        self.lanes.elastic = made
        if self.model is not None:
            self._hooks = [
                self.model.register_forward_pre_hook(made.begin_pass),
                self.model.register_forward_hook(made.end_pass),
            ]
        return made

    def scale_to_zero(self) -> int:
        """Give up every replica but one of each expert; all ranks call it together, between passes.

        Their memory is freed when their keep-alive is over (at once where there is none).

        Returns
        -------
        int
            For `migration`.
        """
        layers = [one_each(table.rows, self.experts) for table in self.migrator.tables]
        width = max(slots_GC.shape[1] for slots_GC in layers)
        pads = [((0, 0), (0, width - slots_GC.shape[1])) for slots_GC in layers]
        return self.apply(
            np.stack([np.pad(s, pad, constant_values=-1) for s, pad in zip(layers, pads, strict=True)])
        )

    def _other_bytes(self) -> int:
        if self.model is None:
            return 0
        experts = {id(t) for bank in self.banks for w in bank.resident.values() for t in w}
        return sum(
            p.numel() * p.element_size()
            for p in self.model.parameters()
            if id(p) not in experts and p.device.type != "meta"
        )

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- observation -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def real_tokens(self, valid: torch.Tensor | ArrayLike | None, *, skip: bool = False) -> Iterator[None]:
        """In this context only the marked tokens count; on this rank alone.

        Parameters
        ----------
        valid : bool tensor, shape [T], or None
            In the order in which the MoE layers see the tokens (megatron-core: sequence-major, ``[s, b]``
            flattened). False for padding and for the dummy token of an idle rank.
        skip : bool
            Do not send the others to experts at all; the layers then give zeros for them.
        """
        mark = None if valid is None else torch.as_tensor(valid, device=self.group.device).reshape(-1).bool()
        for dispatcher in self.dispatchers:
            dispatcher.valid, dispatcher.skip_invalid = mark, skip
        try:
            yield
        finally:
            for dispatcher in self.dispatchers:
                dispatcher.valid, dispatcher.skip_invalid = None, False

    def observe(self) -> Observation:
        """Loads and times since the last call."""
        self._alive()
        layers, experts = len(self.dispatchers), self.experts
        loads, rest = [], []
        for d in self.dispatchers:
            loads.append(d.load_E if d.load_E is not None else torch.zeros(experts, dtype=torch.int64))
            d.load_E = None
            rest += [d.tokens, round(d.take_seconds() * 1e9)]
            d.tokens = 0
        mine = torch.cat([x.to("cpu") for x in loads]).tolist()
        batches, self.batches = self.batches, 0
        rows = np.asarray(self.group.gather_ints([*mine, *rest]), dtype=np.int64)
        load_GLE = rows[:, : layers * experts].reshape(-1, layers, experts)
        rest_GL2 = rows[:, layers * experts :].reshape(-1, layers, 2)
        return Observation(
            load_LE=load_GLE.sum(axis=0),
            tokens_LG=np.ascontiguousarray(rest_GL2[:, :, 0].T),
            seconds_LG=np.ascontiguousarray(rest_GL2[:, :, 1].T * 1e-9, dtype=np.float64),
            batches=batches,
        )

    def memory(self) -> MemoryReport:
        """Bytes of experts per rank."""
        live = sum(len(bank.resident) * bank.expert_bytes for bank in self.banks)
        rows = np.asarray(self.group.gather_ints([live, self.meter.now, self.meter.peak]), dtype=np.int64)
        return MemoryReport(live_G=rows[:, 0], held_G=rows[:, 1], peak_G=rows[:, 2])

    def measure(
        self,
        tokens: Sequence[int],
        *,
        layer: int = 0,
        repeats: int = 7,
        quantile: float = 0.5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> TimeModel:
        """Time curve of these experts on these ranks: what planners and simulations want.

        All ranks call it together, between passes, and get the same curve: the mean of what they measure.

        Parameters
        ----------
        tokens : sequence of int
            Rows of one rank in one layer, ascending.
        layer : int
            Whose experts are timed; each rank should hold at least two.
        repeats, quantile, clock
            As of `measure_experts`.
        """
        self._alive()
        run, bank = self._run_experts, self.banks[layer]
        if run is None:
            raise UnsupportedFeatureError("this engine does not run experts by themselves")
        held = min(row[0] for row in self.group.gather_ints([len(bank.order)]))

        def some(rows: torch.Tensor, sizes: IntArray) -> None:
            run(layer, rows, np.pad(sizes, (0, len(bank.order) - sizes.size)))

        mine = measure_experts(
            some,
            self.hidden,
            activated=range(1, held + 1),
            tokens=tokens,
            device=self.group.device,
            dtype=bank.shapes[0][1],
            repeats=repeats,
            quantile=quantile,
            clock=clock,
        )
        assert mine.curve_time is not None
        rows = self.group.gather_ints(np.rint(mine.curve_time.ravel() * 1e9).astype(int).tolist())
        return replace(
            mine,
            curve_time=np.mean(rows, axis=0).reshape(mine.curve_time.shape) * 1e-9,
            name=f"measured on {self.group.size} ranks",
        )

    # -- home copies and checksums -----------------------------------------------------------------

    def refresh_checksums(self) -> None:
        """Take the weights as they are now for right; call it again after changing them."""
        self._alive()
        rows_LG = self.migrator.rows_LG
        sums = np.zeros((len(self.banks), self.experts), dtype=np.int64)
        for layer, bank in enumerate(self.banks):
            first = {e: g for g in reversed(range(self.group.size)) for e in rows_LG[layer][g]}
            for e, weights in bank.resident.items():
                if first[e] == self.group.rank:
                    sums[layer, e] = checksum(weights)
        everybody = np.asarray(self.group.gather_ints(sums.ravel().tolist()), dtype=np.int64)
        self.migrator.sums_LE = everybody.sum(axis=0).reshape(sums.shape)

    def save_home(self, folder: str | Path) -> None:
        """Write the experts where `MappedHome` finds them."""
        save_experts(folder, self.group, self.banks, self.migrator.rows_LG)

    def use_home(self, home: HomeStore | None) -> None:
        """Use another second source."""
        if isinstance(home, PinnedHome):
            home.fill(self.group, self.banks, self.migrator.rows_LG)
        self.home = self.migrator.home = home

    # -- the end, and faults -----------------------------------------------------------------------

    def _alive(self) -> None:
        if not self.attached:
            raise MoelessError("the model was detached")

    def regroup(self, group: ExpertGroup) -> None:
        """Go on with other ranks; used by `faults`, which restores a placement next."""
        self.group = group
        for dispatcher in self.dispatchers:
            dispatcher.group = group
            dispatcher.load_E = None
        self.batches = 0
        if self.home is not None:
            self.home.regroup(group.ranks)
        self.migrator.reset(group)
        self.lanes.reset()
        self._unhook()
        # Some may have switched in the batch that failed, and others not: take what all have.
        self._use_policy(min(row[0] for row in group.gather_ints([len(self._policies) - 1])))

    def refill_home(self) -> None:
        """Bring the home copies to their number again."""
        if isinstance(self.home, PinnedHome):
            self.home.fill(self.group, self.banks, self.migrator.rows_LG)

    def detach(self, timeout: float = 600.0) -> None:
        """Bring every expert back to its stock place and give the model its stock layers again.

        Raises
        ------
        UnsupportedFeatureError
            If ranks were lost: the stock layout needs all of them.
        """
        if not self.attached:
            return
        if self.group.size != self._sized:
            raise UnsupportedFeatureError(
                f"detach needs all {self._sized} ranks back, {self.group.size} are left"
            )
        static = static_slots(self.experts, self.group.size, len(self.banks))
        self.lanes.drop_open("the model is being detached")
        self.migrator.submit(static)
        self.settle(timeout)
        if not np.array_equal(self.slots_LGC, static):
            report = self.migrator.reports[max(self.migrator.reports)]
            raise MoelessError(f"the experts could not be brought back: {report.reason or report.status}")
        self._restore(self)
        self.close()

    def close(self) -> None:
        """Free what runs in the background; the model keeps the parts that it has."""
        self.attached = False
        self._unhook()
        for callback in self.on_close:
            callback()
        self.migrator.close()
        self.group.close()
