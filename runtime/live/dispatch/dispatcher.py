"""Sends every token to a replica of its expert, and the results back.

One batch of one layer goes like this on every rank of an expert-parallel group:

1. count the tokens per expert; one all-gather tells everybody who has how many (it also carries the few
   numbers by which the ranks agree on migrations, so that agreeing costs no collective of its own);
2. from the gathered counts every rank computes the same integer split: how many tokens of which expert go
   from which rank to which slot. First the quotas (a `SharePolicy`: how much each replica serves), then the
   routes (own GPU first, own node second, then the rest);
3. tokens are sorted by slot, sent (all-to-all), sorted by local expert, computed, and sent back;
4. the k contributions of a token are added in the order of the expert ids, whatever slots they came from.

Step 4 is what keeps the output the same, bit for bit, under any placement: the stock dispatchers add in that
order too, so moving an expert does not change the order of any sum. The other half is the matrix product
itself: a BLAS may compute the same row differently in batches of different sizes. On CPUs there are sizes
between which it does not (`live.rows`), so `row_block` pads with rows that are thrown away.

Where counts are on a GPU, step 2 and the sorting of rows are kernels there (`dispatch.device`), and the host
waits once in a layer, for the sizes of what is sent; or not at all, where one rank has all experts and
computes them in grouped products, which take their sizes on the device.

The core knows torch and process groups but no engine; the adapters in `engines` wrap it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.live import ExpertGroup, SlotTable
from moeless_opt.runtime.live.dispatch import device
from moeless_opt.runtime.live.dispatch.device import DeviceSplit, on_device, runs_here, upload
from moeless_opt.runtime.live.dispatch.routes import source_aware
from moeless_opt.runtime.live.dispatch.shares import SharePolicy, warm_split
from moeless_opt.runtime.live.dispatch.stopwatch import Stopwatch

__all__ = ["SlotDispatcher", "chosen_experts"]


def chosen_experts(routing_map: Tensor, topk: int) -> Tensor:
    """Expert ids of each token, ascending, from a boolean map.

    Parameters
    ----------
    routing_map : bool tensor, shape [T, E]
    topk : int
        Most experts of a token. Where a token has fewer, the rest is E.

    Returns
    -------
    int64 tensor, shape [T, topk]
    """
    n_tokens, experts = routing_map.shape
    if routing_map.device.type == "cpu":
        hits = routing_map.nonzero()
        if hits.size(0) == n_tokens * topk:
            return hits[:, 1].reshape(n_tokens, topk)
    # No host synchronisation on a GPU, and right for uneven tokens.
    ids = torch.arange(experts, device=routing_map.device).expand(n_tokens, -1)
    return torch.where(routing_map, ids, experts).topk(topk, dim=1, largest=False, sorted=True).values


def _ramps(starts: IntArray, sizes: IntArray) -> IntArray:
    """Concatenation of ``arange(start, start + size)``."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)


class SlotDispatcher:
    """Carries the tokens of one layer to slots and back; see the module's text.

    Parameters
    ----------
    index : int
        Of the layer among the model's MoE layers.
    experts, topk : int
        Of the router.
    table : SlotTable
        The placement in force.
    group : ExpertGroup
        The ranks.
    shares : SharePolicy
        Quotas of replicas.
    row_block : int
        Pad every expert's batch to a multiple of so many rows.
    header : callable, optional
        ``header(index)`` gives the whole numbers that this rank tells the others with its counts.
    agree : callable, optional
        ``agree(index, headers_RK)`` is called with everybody's; it may change the table by `set_table`.

    Notes
    -----
    The object keeps the state of one batch between its stages, as megatron-core's dispatchers do: one batch
    of a layer at a time.
    """

    def __init__(
        self,
        index: int,
        experts: int,
        topk: int,
        table: SlotTable,
        group: ExpertGroup,
        shares: SharePolicy,
        *,
        row_block: int = 1,
        header: Callable[[int], Sequence[int]] | None = None,
        agree: Callable[[int, IntArray], None] | None = None,
    ) -> None:
        self.index = index
        self.experts = experts
        self.topk = topk
        self.group = group
        self.shares = shares
        self.row_block = row_block
        self.header = header
        self.agree = agree
        # Real tokens of the next batches: bool [T], or None for all. What is masked out is not observed.
        self.valid: Tensor | None = None
        self.skip_invalid = False
        #: Order in which the experts want the rows of the local slots; None: as the slots stand.
        self.slot_order: Callable[[], IntArray | None] = lambda: None
        #: Whether the experts' weights want gradients.
        self.experts_train: Callable[[], bool] = lambda: False
        self.on_batch: list[Callable[[SlotDispatcher, Tensor], None]] = []
        #: Whether the experts take the sizes of their batches on the device.
        self.sizes_there = False
        self.load_E: Tensor | None = None
        self._tokens = 0
        #: Seconds in the experts, and from a batch's counts to its sum.
        self.experts_watch, self.layer_watch = Stopwatch(), Stopwatch()
        self._there: DeviceSplit | None = None
        # Of the last batch: what was gathered, where it was split, and whether the host knows nothing of it.
        self._gathered: Tensor | None = None
        self._sends_RP: IntArray | None = np.zeros((group.size, 0), dtype=np.int64)
        self._unseen = False
        self._gather: Tensor | None = None
        self._scatter: Tensor | None = None
        # Whether the last batch was sorted for the experts at once, and what that follows from.
        self._sorted_here = False
        self._key_E: tuple[SlotTable, IntArray | None, IntArray] | None = None
        self.to_ranks: list[int] = []
        self.from_ranks: list[int] = []
        self.set_table(table)
        # A kernel must not be compiled, nor Numba imported, in the first forward.
        warm_split()

    def set_table(self, table: SlotTable) -> None:
        """Use another placement from the next split on."""
        if table.gpus != self.group.size:
            raise ProblemError("slots_GC", f"has {table.gpus} ranks, the group has {self.group.size}")
        self.table = table
        me = self.group.rank
        self.mine = slice(int(table.starts_G[me]), int(table.ends_G[me]))

    def split_on(self, where: str, width: int = 0, dtype: torch.dtype | None = None) -> None:
        """Split on the ``"host"``, on the ``"device"``, or by kernels if counts are on a GPU (``"auto"``).

        The integers are the same, so ranks need not agree. Policies without kernels are computed on the host.
        Where there are kernels, rows are sorted, gathered and added up by them as well; those for rows of
        this width and type are made at once.

        Raises
        ------
        UnsupportedFeatureError
            Where there can be no kernels.
        """
        there = runs_here(where, self.group.device)
        if self._there is not None:
            # What was counted and sent there is asked for later.
            self._tokens += self._there.take_tokens()
            self._sends_RP = self.sends_RP
        self._there = DeviceSplit(self.index, self.group.device) if there else None
        if self._there is not None and self.index == 0:
            # All layers have the same kernels.
            self._there.warm(self.shares, self.experts, self.group, topk=self.topk, width=width, dtype=dtype)

    @property
    def sends_RP(self) -> IntArray:
        """Who sent how many rows to which slot in the last batch: int64 [R, P]."""
        if self._sends_RP is None:
            assert self._there is not None
            self._sends_RP = self._there.sends_RP.cpu().numpy().copy()
        return self._sends_RP

    @property
    def batch_rows_G(self) -> IntArray | None:
        """Rows of each rank's experts in the last batch, int64 [G]; None where the host knows them not."""
        if self._sends_RP is None or not self._sends_RP.shape[1]:
            return None
        upto: IntArray = np.zeros(self._sends_RP.shape[1] + 1, dtype=np.int64)
        np.cumsum(self._sends_RP.sum(axis=0), out=upto[1:])
        return upto[self.table.ends_G] - upto[self.table.starts_G]

    @property
    def batch_counts_RE(self) -> IntArray:
        """Tokens of each expert on each rank in the last batch: int64 [R, E]."""
        if self._gathered is None:
            return np.zeros((self.group.size, self.experts), dtype=np.int64)
        counts_RE: IntArray = self._gathered[:, : self.experts].cpu().numpy()
        return counts_RE

    def used_slots(self) -> Tensor:
        """How many slots served tokens in the last batch: int64 tensor [1], where the split was."""
        if self._sends_RP is None:
            assert self._there is not None
            return (self._there.sends_RP > 0).any(0).sum()[None]
        return torch.tensor([int((self._sends_RP > 0).any(axis=0).sum())])

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Experts of this rank's slots, in order."""
        return self.table.rows[self.group.rank]

    # -- 1, 2: counts, agreement, split ------------------------------------------------------------

    def chosen(self, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, ascending, and their weights, from a router's maps.

        Parameters
        ----------
        routing_map : bool tensor, shape [T, E]
        probs : tensor, shape [T, E]

        Returns
        -------
        int64 tensor [T, k] (E where a token has fewer), tensor [T, k]
        """
        if self._there is not None and not (torch.is_grad_enabled() and probs.requires_grad):
            return device.chosen_of(routing_map, probs, self.topk)
        expert_Tk = chosen_experts(routing_map, self.topk)
        return expert_Tk, probs.gather(1, expert_Tk.clamp(max=self.experts - 1))

    def prepare(self, x_TH: Tensor, expert_Tk: Tensor, prob_Tk: Tensor) -> tuple[Tensor, Tensor]:
        """Count, agree, split, and sort the tokens by destination.

        Parameters
        ----------
        x_TH : tensor, shape [T, H]
            Tokens of this rank.
        expert_Tk : int64 tensor, shape [T, k]
            Their experts, ascending in each row; ids of E or more mean none.
        prob_Tk : tensor, shape [T, k]
            Their weights.

        Returns
        -------
        tokens [N, H], weights [N], sorted by destination rank and slot
        """
        if torch.is_grad_enabled():
            self._refuse_gradients(x_TH, prob_Tk)
        self.layer_watch.start(x_TH.is_cuda)
        n_tokens, k = expert_Tk.shape
        if self.valid is not None and self.valid.numel() != n_tokens:
            raise ProblemError("valid", f"marks {self.valid.numel()} tokens, the batch has {n_tokens}")
        if self.skip_invalid:
            expert_Tk = self.real_choice(expert_Tk)
        here = self.group.size == 1 and not x_TH.is_cuda and self._there is None
        self._sorted_here = here and self.row_block == 1
        if self._sorted_here:
            return self._prepare_here(x_TH, expert_Tk, prob_Tk)
        if self._there is not None:
            return self._prepare_there(x_TH, expert_Tk, prob_Tk)
        flat = expert_Tk.reshape(-1)
        counts = self._count(flat)
        self._observe(expert_Tk, counts)
        self._share_out(counts)
        order = torch.argsort(flat, stable=True)
        n_rows = sum(self.to_ranks)
        if n_rows < flat.numel():
            order = order[:n_rows]
        if not self.table.sorted:
            order = self._to_slot_order(order)
        self._place(order, n_tokens, k)
        return x_TH.index_select(0, order // k), prob_Tk.reshape(-1).index_select(0, order)

    def _prepare_there(self, x_TH: Tensor, expert_Tk: Tensor, prob_Tk: Tensor) -> tuple[Tensor, Tensor]:
        """By kernels, as few as can be: a small batch waits for their launches."""
        n_tokens, k = expert_Tk.shape
        counts, order, back = device.sort_rows(expert_Tk.reshape(-1), self.experts)
        self._observe(expert_Tk, counts)
        self._share_out(counts)
        if not self.table.sorted:
            if self._sends_RP is None:
                assert self._there is not None
                order = self._there.by_slot(order, back)
            else:
                order = self._to_slot_order(order[: sum(self.to_ranks)])
                back[order] = torch.arange(order.numel(), device=order.device)
        if not self._unseen:
            order = order[: sum(self.to_ranks)]
        self.back_kT = back.view(n_tokens, k).t()
        return device.gather_rows(x_TH, prob_Tk.reshape(-1), order, k)

    def _prepare_here(self, x_TH: Tensor, expert_Tk: Tensor, prob_Tk: Tensor) -> tuple[Tensor, Tensor]:
        """One rank on a CPU: every row has one place to go, and is put there at once (`sort_in` leaves it).

        On the host's arrays: for a few rows torch takes longer to begin than to count and sort.
        """
        n_tokens, k = expert_Tk.shape
        flat = np.ascontiguousarray(expert_Tk.numpy()).reshape(-1)
        counts_E = np.bincount(flat, minlength=self.experts + 1)[: self.experts].astype(np.int64, copy=False)
        counts = torch.from_numpy(counts_E)
        self._observe(expert_Tk, counts)
        if self.header is not None:
            extra = self.header(self.index)
            if self.agree is not None:
                self.agree(self.index, np.array([extra], dtype=np.int64))
        self._gathered, self._unseen = counts[None], False
        sends_P = counts_E[self.table.expert_P]
        self._sends_RP = self.chunks_RS = sends_P[None]
        n_rows = int(sends_P.sum())
        self.to_ranks = self.from_ranks = [n_rows]
        order = np.argsort(self._row_key_E()[flat], kind="stable")[:n_rows]
        back = np.full(n_tokens * k, n_rows, dtype=np.int64)
        back[order] = np.arange(n_rows)
        self.back_kT = torch.from_numpy(np.ascontiguousarray(back.reshape(n_tokens, k).T))
        self.complete = n_rows == n_tokens * k
        rows = torch.from_numpy(order)
        return x_TH.index_select(0, torch.from_numpy(order // k)), prob_Tk.reshape(-1).index_select(0, rows)

    def _row_key_E(self) -> IntArray:
        """Where the rows of each expert stand among those of the others; E, for none, behind all."""
        wanted = self.slot_order()
        if self._key_E is None or self._key_E[0] is not self.table or self._key_E[1] is not wanted:
            expert_S: IntArray = self.table.expert_P if wanted is None else self.table.expert_P[wanted]
            key_E: IntArray = np.full(self.experts + 1, len(expert_S), dtype=np.int64)
            key_E[expert_S] = np.arange(len(expert_S))
            self._key_E = (self.table, wanted, key_E)
            return key_E
        return self._key_E[2]

    def _refuse_gradients(self, x_TH: Tensor, prob_Tk: Tensor) -> None:
        wanting = (
            (x_TH.requires_grad, "hidden states"),
            (prob_Tk.requires_grad, "router"),
            (self.experts_train(), "experts"),
        )
        for wants, what in wanting:
            if wants:
                raise UnsupportedFeatureError(
                    "training through a live placement is not supported, and gradients are on for the "
                    f"{what} of MoE layer {self.index} (counted from 0): run under torch.no_grad()"
                )

    def _count(self, flat: Tensor) -> Tensor:
        if flat.is_cuda:
            # bincount would wait for the device to learn the largest id.
            flat = flat.long()
            counts = torch.zeros(self.experts + 1, dtype=torch.int64, device=flat.device)
            return counts.scatter_add_(0, flat, torch.ones_like(flat))[: self.experts]
        return torch.bincount(flat, minlength=self.experts + 1)[: self.experts]

    def real_choice(self, expert_Tk: Tensor) -> Tensor:
        """Experts of a batch's tokens, [T, k]; E of those that are masked."""
        return expert_Tk if self.valid is None else torch.where(self.valid[:, None], expert_Tk, self.experts)

    def real_counts(self, expert_Tk: Tensor) -> Tensor:
        """Tokens of each expert, int64 [E], of a batch's tokens that are not masked; where the batch is."""
        return self._count(self.real_choice(expert_Tk).reshape(-1))

    def _observe(self, expert_Tk: Tensor, counts: Tensor) -> None:
        if self.valid is not None and not self.skip_invalid:
            counts = self.real_counts(expert_Tk)
        if self.load_E is None:
            self.load_E = counts.clone()
        else:
            self.load_E += counts
        for callback in self.on_batch:
            callback(self, expert_Tk)

    def _share_out(self, counts: Tensor) -> None:
        """From this rank's counts to everybody's rows for every slot."""
        extra = self.header(self.index) if self.header is not None else ()
        agree = self.agree
        if self.group.size == 1:
            # Nobody to wait for: what the rank tells itself does not leave the host.
            if agree is not None:
                agree(self.index, np.array([extra], dtype=np.int64))
            agree, gathered = None, counts[None]
        else:
            told = upload(np.array(extra, dtype=np.int64), counts.device)
            gathered = self.group.all_gather(torch.cat((counts, told)) if extra else counts)
        self._gathered, self._unseen = gathered, False
        if self._there is None or not on_device(self.shares):
            # The one synchronisation with the host: the all-to-all needs its sizes there.
            host: IntArray = self.group.to_host(gathered).numpy()
            if agree is not None:
                agree(self.index, host[:, self.experts :])
            self.split(host[:, : self.experts])
            return
        self._sends_RP = None
        table, policy = self.table, self.shares
        self._there.start(gathered, policy, table, self.group)
        if self.group.size == 1 and self.sizes_there and self.row_block == 1:
            self._unseen = True
            return
        with self.group.host_wait():
            seen = self._there.tell(gathered)
        if agree is not None:
            agree(self.index, seen.headers_RK)
        if self.table is not table or self.shares is not policy:
            # It came into force with this batch.
            if not on_device(self.shares):
                self.split(self.group.to_host(gathered)[:, : self.experts].numpy())
                return
            self._there.start(gathered, self.shares, self.table, self.group)
            with self.group.host_wait():
                seen = self._there.tell(gathered)
        self.to_ranks, self.from_ranks = seen.give_R.tolist(), seen.come_R.tolist()
        self.chunks_RS = seen.chunks_RS

    def split(self, counts_RE: IntArray) -> None:
        """Quotas and routes on the host."""
        table = self.table
        if table.single:
            sends_RP = counts_RE[:, table.expert_P]
        else:
            load_E = counts_RE.sum(axis=0)
            quota_P = self.shares.quotas(self.index, load_E, table)
            if not np.array_equal(
                np.bincount(table.expert_P, weights=quota_P, minlength=self.experts).astype(np.int64),
                load_E,
            ):
                raise ProblemError(
                    "shares", f"policy {self.shares.name!r} gave quotas that do not add up to the loads"
                )
            sends_RP = source_aware(counts_RE, quota_P, table, self.group.node_R)
        self._sends_RP = sends_RP
        total = np.zeros(table.expert_P.size + 1, dtype=np.int64)
        np.cumsum(sends_RP[self.group.rank], out=total[1:])
        self.to_ranks = (total[table.ends_G] - total[table.starts_G]).tolist()
        self.chunks_RS = np.ascontiguousarray(sends_RP[:, self.mine])
        self.from_ranks = self.chunks_RS.sum(axis=1).tolist()

    def _to_slot_order(self, order: Tensor) -> Tensor:
        own_P = self.sends_RP[self.group.rank]
        by_expert = self.table.to_slots_P
        sizes = own_P[by_expert]
        starts_P = np.empty_like(own_P)
        starts_P[by_expert] = np.cumsum(sizes) - sizes
        return order.index_select(0, upload(_ramps(starts_P, own_P), order.device))

    def _place(self, order: Tensor, n_tokens: int, k: int) -> None:
        """Where the contributions of each token will stand when they come back."""
        back = torch.full((n_tokens * k,), order.numel(), dtype=torch.int64, device=order.device)
        back[order] = torch.arange(order.numel(), device=order.device)
        self.back_kT = back.view(n_tokens, k).t().contiguous()
        self.complete = order.numel() == n_tokens * k

    # -- 3: to the slots ---------------------------------------------------------------------------

    def send(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and weights to the ranks that hold their slots."""
        return self.group.all_to_all(rows, self.from_ranks, self.to_ranks), self.group.all_to_all(
            probs, self.from_ranks, self.to_ranks
        )

    def sort_in(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, IntArray | Tensor, Tensor]:
        """What arrived, by local slot.

        Returns
        -------
        tokens [M, H], tokens of each local slot (int64 [S], with padding; a tensor if `sizes_there` and the
        split was on the device), weights [M]
        """
        wanted, sizes_S = self.slot_order(), self._sizes_there()
        if self._sorted_here:
            padded_S: IntArray = self.chunks_RS[0] if wanted is None else self.chunks_RS[0, wanted]
            self._tokens = self._tokens + rows.size(0)
            self._gather = self._scatter = None
        elif self._unseen:
            self._gather = self._scatter = None
            if wanted is not None and rows.size(0):
                self._order_there(wanted, rows.size(0), rows.size(0))
        else:
            starts_RS = (np.cumsum(self.chunks_RS) - self.chunks_RS.ravel()).reshape(self.chunks_RS.shape)
            sizes_RS = self.chunks_RS
            if wanted is not None:
                starts_RS, sizes_RS = starts_RS[:, wanted], sizes_RS[:, wanted]
            padded_S = -(-sizes_RS.sum(axis=0) // self.row_block) * self.row_block
            self._order_in(starts_RS, sizes_RS, padded_S, rows, wanted)
            self._tokens = self._tokens + int(sizes_RS.sum())
        if self._gather is not None and self._there is not None:
            rows, probs = device.gather_rows(rows, probs, self._gather, 1)
        elif self._gather is not None:
            rows, probs = rows.index_select(0, self._gather), probs.index_select(0, self._gather)
        self.experts_watch.start(rows.is_cuda)
        return rows, padded_S if sizes_S is None else sizes_S, probs

    def _sizes_there(self) -> Tensor | None:
        """Rows of each local slot on the device, if they are wanted and known there."""
        if self._sends_RP is not None or not self.sizes_there or self.row_block > 1 or self._there is None:
            return None
        return self._there.sizes(self.slot_order(), counted=self._unseen)

    def _order_there(self, wanted: IntArray | None, rows: int, padded: int) -> None:
        assert self._there is not None
        self._gather, self._scatter = self._there.by_local_slot(
            wanted, rows, padded, self.row_block, fewer=self._unseen
        )

    def _order_in(
        self,
        starts_RS: IntArray,
        sizes_RS: IntArray,
        padded_S: IntArray,
        rows: Tensor,
        wanted: IntArray | None,
    ) -> None:
        n_rows, sizes_S = rows.size(0), sizes_RS.sum(axis=0)
        padding = int(padded_S.sum()) != n_rows
        if n_rows == 0 or (not padding and (sizes_S.size <= 1 or (self.group.size == 1 and wanted is None))):
            self._gather = self._scatter = None
            return
        if self._sends_RP is None:
            self._order_there(wanted, n_rows, int(padded_S.sum()))
            return
        arrived = _ramps(starts_RS.T.ravel(), sizes_RS.T.ravel())
        shift_S = np.cumsum(padded_S - sizes_S) - (padded_S - sizes_S)
        stands = np.arange(n_rows) + np.repeat(shift_S, sizes_S)
        gather = np.zeros(int(padded_S.sum()), dtype=np.int64)
        gather[stands] = arrived
        scatter = np.empty(n_rows, dtype=np.int64)
        scatter[arrived] = stands
        self._gather, self._scatter = upload(gather, rows.device), upload(scatter, rows.device)

    # -- and back ----------------------------------------------------------------------------------

    def sort_out(self, rows: Tensor) -> Tensor:
        """Results in the order in which the tokens arrived."""
        self.experts_watch.stop(rows.is_cuda)
        return rows if self._scatter is None else rows.index_select(0, self._scatter)

    def send_back(self, rows: Tensor) -> Tensor:
        """Results to the ranks whose tokens they are."""
        return self.group.all_to_all(rows, self.to_ranks, self.from_ranks)

    def combine(self, rows: Tensor) -> Tensor:
        """Sum of each token's contributions, in ascending order of its experts."""
        if self._there is not None:
            out = device.combine_rows(rows, self.back_kT.t().reshape(-1), len(self.back_kT))
        else:
            if not self.complete:
                rows = torch.cat((rows, rows.new_zeros(1, rows.size(1))))
            out = rows.index_select(0, self.back_kT[0])
            for place_T in self.back_kT[1:]:
                out += rows.index_select(0, place_T)
        self.layer_watch.stop(out.is_cuda)
        return out

    def take_tokens(self) -> int:
        """Rows that this rank's experts of the layer computed since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens if self._there is None else tokens + self._there.take_tokens()
