"""A running model whose experts can be moved: what `attach` returns, whichever engine it runs on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, SlotArray, number
from moeless_opt.problems.errors import MoelessError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.control import MemoryReport, Observation, stacked
from moeless_opt.runtime.live import watch
from moeless_opt.runtime.live.adopt import Adopted, AttachOptions
from moeless_opt.runtime.live.agreement import Agreement, digest, same_everywhere
from moeless_opt.runtime.live.dispatch import BalancedShares, PlannedShares, SharePolicy, SlotDispatcher
from moeless_opt.runtime.live.elastic import Elastic, become_elastic
from moeless_opt.runtime.live.groups import ExpertGroup, SideGroup
from moeless_opt.runtime.live.home import HomeStore, PinnedHome, save_experts
from moeless_opt.runtime.live.lanes import Lanes
from moeless_opt.runtime.live.layer_plans import LayerPlans
from moeless_opt.runtime.live.migrate import MigrationReport, Migrator, TransferLimits
from moeless_opt.runtime.live.rows import RowBlock, default_row_block
from moeless_opt.runtime.live.slots import SlotTable, one_each, slots_of, static_slots
from moeless_opt.runtime.live.ticket import Ticket
from moeless_opt.runtime.pool import KeepAlive

__all__ = ["LiveModel"]


class LiveModel:
    """The experts of a running model; a `Backend`.

    The model itself is used as before: its forward pass is the same call. Everything below is called by all
    ranks of the expert-parallel group, between the same forward passes, unless it says otherwise. A `layer`
    is the model's own number of it, one of `layers`.

    Parameters
    ----------
    adopted : Adopted
        What the engine handed over.
    options : AttachOptions
        How it was asked to.
    """

    def __init__(self, adopted: Adopted, options: AttachOptions) -> None:
        self.adopted = adopted
        self.options = options
        self.model = adopted.model
        self.layers = tuple(adopted.layers)
        self.experts = adopted.experts
        self.group = adopted.group
        self.banks = list(adopted.banks)
        self.meter = adopted.meter
        self.home = adopted.home if options.home is None else options.home
        self.attached = True
        #: Called by `close`.
        self.on_close: list[Callable[[], None]] = []
        self._sized = self.group.size
        self._hooks: list[Any] = []
        kinds = {(*shape, dtype) for bank in self.banks for shape, dtype in bank.shapes if len(shape) == 2}
        turned = adopted.transposed
        products = [(a, b, dtype) if turned else (b, a, dtype) for a, b, dtype in kinds]
        self.row_block = RowBlock(options.row_block or 1)
        if options.row_block is None and adopted.row_exact:
            self.row_block = default_row_block(self.group.device, products, transposed=turned)
        self._agreement = Agreement(self.group, self.layers, options.shares)
        self._told = {**adopted.told(), **options.told()}
        if not self.group.outside:
            same_everywhere(self.group, self._told)
        watch.note_queues(self.group.device)
        tables = [SlotTable(static_slots(self.experts, self.group.size), self.experts) for _ in self.banks]
        self.dispatchers = [
            SlotDispatcher(
                index,
                self.experts,
                adopted.topk,
                table,
                self.group,
                self._agreement.policy,
                row_block=self.row_block.rows,
                header=self._agreement.header,
                agree=self._agreement.agree,
            )
            for index, table in enumerate(tables)
        ]
        for dispatcher, bank in zip(self.dispatchers, self.banks, strict=True):
            dispatcher.experts_train = bank.trains
            dispatcher.split_on(options.split, adopted.hidden, bank.shapes[0][1])
        self.migrator = Migrator(
            self.group, self.banks, tables, self._switched, home=self.home, links=options.links
        )
        self.lanes = Lanes(self.migrator)
        self._plans = LayerPlans(self.lanes)
        self._agreement.drive(self.migrator, self.lanes)
        self._agreement.on_policy = self._share_by
        if self.group.outside:
            return
        self.refill_home()
        if options.checksums:
            self.refresh_checksums()

    def _switched(self, index: int, table: SlotTable) -> None:
        self.dispatchers[index].set_table(table)

    def _share_by(self, policy: SharePolicy) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.shares = policy

    def _index(self, layer: int) -> int:
        """Place of a layer on axis L."""
        if not self.attached:
            raise MoelessError("the model was detached")
        if layer not in self.layers:
            raise ProblemError(
                "layer", f"is {layer}, there are {len(self.layers)} MoE layers: {list(self.layers)}"
            )
        return self.layers.index(layer)

    # -- placement ---------------------------------------------------------------------------------

    @property
    def slots_LGC(self) -> SlotArray:
        """The placement in force, padded with -1."""
        return stacked(table.slots() for table in self.migrator.tables)

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
            number = self._plans.all(slots_of(plan))
        split = getattr(plan, "split", None)
        wanted = {"equal": "equal", "fractional": "balanced"}.get(str(split))
        asked = self._agreement.newest.name
        if wanted is not None and asked in ("equal", "balanced") and wanted != asked:
            self.set_shares(wanted)
        return number

    def migration(self, number: int) -> MigrationReport:
        """What became of a plan; on this rank, at any time."""
        return self.migrator.reports[number] if number > 0 else self._plans.report(number)

    def settle(self, timeout: float = 600.0) -> None:
        """Finish what is under way without traffic.

        Raises
        ------
        MoelessError
            On all ranks, if one was handed a plan that others were not.
        """
        self._alive()
        deadline = time.monotonic() + number("timeout", timeout)
        while self._agreement.round(last=True):
            time.sleep(0.0005)
            if time.monotonic() > deadline:
                raise MoelessError(f"the migrations did not end within {timeout:g} s")

    def tick(self, *, last: bool = False) -> None:
        """One round of agreement without traffic: an idle model's experts move on, and kept-alive ones go.

        Parameters
        ----------
        last : bool
            Nothing more will be handed in: what not all ranks were handed is dropped.

        Raises
        ------
        MoelessError
            On all ranks, if something was.
        """
        self._alive()
        self._agreement.round(last=last)

    def set_shares(self, shares: str | SharePolicy) -> None:
        """Use another policy from the first batch on that all ranks know of it."""
        self._agreement.ask(shares)

    def set_speeds(self, speed_G: FloatArray) -> None:
        """Balance tokens by these relative speeds of the ranks, shape [G]; other policies stay."""
        newest = self._agreement.newest
        if isinstance(newest, BalancedShares):
            per_mille = [max(1, round(1000 * float(speed))) for speed in speed_G]
            self.set_shares(BalancedShares(per_mille, newest.sweeps))

    def set_planned_shares(self, plan: Any) -> None:
        """Use a plan's own ``share_LGC`` instead of solving for every batch."""
        share_LGC = getattr(plan, "share_LGC", None)
        if share_LGC is None:
            raise ProblemError("plan", f"is a {type(plan).__name__}, which has no share_LGC")
        self.set_shares(PlannedShares(np.asarray(share_LGC, dtype=np.float64), slots_of(plan)))

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
        index = self._index(layer)
        return None if self.lanes.waits(index) else self.lanes.open(index)

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
        return self._plans.one(self._index(layer), slots_GC)

    def prewarm_layer(self, layer: int, slots_GC: SlotArray) -> int:
        """Load these replicas ahead of their use, without using them yet; the keep-alive runs from now."""
        return self._plans.one(self._index(layer), slots_GC, serve=False)

    def drop_layers(self, reason: str) -> None:
        """Give up plans of single layers that are still being made; all ranks do so at the same point."""
        self.lanes.drop_open(reason, self._plans.numbers)

    def layer_plan(self, number: int) -> Ticket:
        """What became of a plan of one layer; on this rank, at any time."""
        return self.lanes.find(number)

    def side_group(self) -> SideGroup:
        """One more group of the same ranks, for a thread of its own; all of them call this together."""
        return self.group.side()

    def last_load_E(self, layer: int) -> FloatArray:
        """Tokens of each expert in the layer's last batch, over all ranks; the same on all of them."""
        counts_RE = self.dispatchers[self._index(layer)].batch_counts_RE
        return np.asarray(counts_RE.sum(axis=0), dtype=np.float64)

    # -- elastic experts ---------------------------------------------------------------------------

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
        made = become_elastic(
            self.group,
            self.dispatchers,
            self.banks,
            keep_alive=keep_alive,
            clock=clock,
            slots=slots,
            other_bytes=watch.other_bytes(self.adopted),
            kv_bytes=kv_bytes,
        )
        self.lanes.elastic = made
        self._hooks = [
            self.model.register_forward_pre_hook(made.begin_pass),
            self.model.register_forward_hook(made.end_pass),
        ]
        return made

    def inelastic(self) -> None:
        """Let kept replicas go and carry whole plans out as such again; all ranks, between passes."""
        self.settle()
        self._unhook()
        self.lanes.end_elastic()

    def scale_to_zero(self) -> int:
        """Give up every replica but one of each expert; all ranks call it together, between passes.

        Their memory is freed when their keep-alive is over (at once where there is none).

        Returns
        -------
        int
            For `migration`.
        """
        return self.apply(stacked(one_each(t.rows, self.experts) for t in self.migrator.tables))

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
        with watch.real_tokens(self.dispatchers, valid, skip):
            yield

    def observe(self) -> Observation:
        """Loads and times since the last call."""
        self._alive()
        batches, self._agreement.batches = self._agreement.batches, 0
        return watch.observe(self.dispatchers, self.group, batches)

    def memory(self) -> MemoryReport:
        """Bytes of experts per rank."""
        return watch.memory(self.adopted, self.group)

    def measure(self, tokens: Sequence[int], *, layer: int | None = None, **how: Any) -> TimeModel:
        """Time curve of these experts on these ranks: what planners and simulations want.

        All ranks call it together, between passes, and get the same curve: the mean of what they measure.

        Parameters
        ----------
        tokens : sequence of int
            Rows of one rank in one layer, ascending.
        layer : int, optional
            Whose experts are timed, by default all layers' in turn; each rank should hold at least two.
        **how
            ``repeats``, ``quantile``, ``clock``, ``flush``, as of `measure_experts`.
        """
        indices = list(range(len(self.layers))) if layer is None else [self._index(layer)]
        same_everywhere(self.group, {"tokens": list(tokens), "layers": indices})
        return watch.measure(self.adopted, self.group, indices, tokens, row_block=self.row_block.rows, **how)

    # -- home copies and checksums -----------------------------------------------------------------

    def refresh_checksums(self) -> None:
        """Take the weights as they are now for right; call it again after changing them."""
        self._alive()
        self.migrator.sums_LE = watch.checksums(self.adopted, self.group, self.migrator.rows_LG)

    def save_home(self, folder: str | Path) -> None:
        """Write the experts where `MappedHome` finds them."""
        save_experts(folder, self.group, self.banks, self.migrator.rows_LG)

    def use_home(self, home: HomeStore | None) -> None:
        """Use another second source."""
        self.home = home
        self.refill_home()
        self.migrator.home = home

    def refill_home(self) -> None:
        """Bring the home copies to their number again."""
        if isinstance(self.home, PinnedHome):
            self.home.fill(self.group, self.banks, self.migrator.rows_LG)

    # -- the end, and faults -----------------------------------------------------------------------

    def _alive(self) -> None:
        if not self.attached:
            raise MoelessError("the model was detached")

    @property
    def knocks(self) -> int:
        """Ranks that have asked to be let in so far, as all ranks know since the last batch."""
        return self._agreement.knocks

    def told_digest(self) -> int:
        """Checksum of what has to be the same on all ranks, but for the policy of shares."""
        return digest({**self._told, "shares": None})

    def policy_digest(self) -> int:
        """Checksum of the policy of shares that is in force."""
        return self._agreement.policy_digest

    def named_policy(self) -> int:
        """A number of the policy of shares in force, if it is one that has but a name; else below 0."""
        return self._agreement.named

    def take_policy(self, named: int) -> None:
        """Use the policy with this number, as the ranks do among which this one is new."""
        self._agreement.take_named(named)

    def share_sums(self, giver: int, *, new: bool) -> None:
        """Give ranks that are new the checksums of a rank that has them; a collective."""
        if new and self.options.checksums:
            shape = (len(self.banks), self.experts)
            mine = self.migrator.sums_LE
            told = (np.zeros(shape, dtype=np.int64) if mine is None else mine).ravel().tolist()
            rows = self.group.gather_ints(told)
            self.migrator.sums_LE = np.asarray(rows[giver], dtype=np.int64).reshape(shape)

    def hollow(self) -> None:
        """Let all experts of this rank go: they come back from elsewhere; used by `faults`."""
        for bank in self.banks:
            bank.drop_staged()
            bank.install(())

    def regroup(self, group: ExpertGroup) -> None:
        """Go on with other ranks; used by `faults`, which restores a placement next."""
        self.group = group
        for dispatcher in self.dispatchers:
            dispatcher.group = group
            dispatcher.load_E = None
        if self.home is not None:
            self.home.regroup(group.ranks)
        if isinstance(self.home, PinnedHome):
            self.home.learn(group, self.banks)
        self.migrator.reset(group)
        self.lanes.reset()
        self._unhook()
        self._agreement.regroup(group)

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
        self.adopted.restore()
        self.close()

    def close(self) -> None:
        """Free what runs in the background; the model keeps the parts that it has."""
        self.attached = False
        self._unhook()
        for callback in self.on_close:
            callback()
        self.migrator.close()
        self.group.close()
