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

The core knows torch and process groups but no engine; the adapters in `engines` wrap it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.live import ExpertGroup, SlotTable
from moeless_opt.runtime.live.dispatch.routes import source_aware
from moeless_opt.runtime.live.dispatch.shares import SharePolicy, warm_split

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
        self.sends_RP: IntArray = np.zeros((group.size, 0), dtype=np.int64)
        self.batch_counts_RE: IntArray = np.zeros((group.size, experts), dtype=np.int64)
        self.load_E: Tensor | None = None
        self.tokens = 0
        self.seconds = 0.0
        #: Seconds on the host from a batch's counts to its sum, since somebody set it to 0.
        self.layer_seconds = 0.0
        self._entered = 0.0
        self._began = 0.0
        #: What times the experts where there is no CUDA.
        self.clock: Callable[[], float] = time.perf_counter
        self._events: list[tuple[Any, Any]] = []
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

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Experts of this rank's slots, in order."""
        return self.table.rows[self.group.rank]

    # -- 1, 2: counts, agreement, split ------------------------------------------------------------

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
        self._entered = time.perf_counter()
        n_tokens, k = expert_Tk.shape
        if self.valid is not None and self.valid.numel() != n_tokens:
            raise ProblemError("valid", f"marks {self.valid.numel()} tokens, the batch has {n_tokens}")
        if self.valid is not None and self.skip_invalid:
            expert_Tk = torch.where(self.valid[:, None], expert_Tk, self.experts)
        flat = expert_Tk.reshape(-1)
        counts = self._count(flat)
        self._observe(expert_Tk, counts)
        gathered = self._exchange(counts)
        self.batch_counts_RE = counts_RE = gathered[:, : self.experts]
        if self.agree is not None:
            self.agree(self.index, gathered[:, self.experts :])
        self._split(counts_RE)
        order = torch.argsort(flat, stable=True)
        n_rows = int(counts_RE[self.group.rank].sum())
        if n_rows < flat.numel():
            order = order[:n_rows]
        if not self.table.sorted:
            order = order.index_select(0, self._to_slot_order(order.device))
        self._place(order, n_tokens, k)
        return x_TH.index_select(0, order // k), prob_Tk.reshape(-1).index_select(0, order)

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
            counts = torch.zeros(self.experts + 1, dtype=torch.int64, device=flat.device)
            return counts.scatter_add_(0, flat, torch.ones_like(flat))[: self.experts]
        return torch.bincount(flat, minlength=self.experts + 1)[: self.experts]

    def _observe(self, expert_Tk: Tensor, counts: Tensor) -> None:
        if self.valid is not None and not self.skip_invalid:
            kept = torch.where(self.valid[:, None], expert_Tk, self.experts).reshape(-1)
            counts = self._count(kept)
        if self.load_E is None:
            self.load_E = counts.clone()
        else:
            self.load_E += counts
        for callback in self.on_batch:
            callback(self, expert_Tk)

    def _exchange(self, counts: Tensor) -> IntArray:
        extra = self.header(self.index) if self.header is not None else ()
        mine = (
            torch.cat((counts, torch.tensor(extra, dtype=torch.int64).to(counts.device))) if extra else counts
        )
        # The one synchronisation with the host: the all-to-all needs its sizes there.
        result: IntArray = self.group.all_gather(mine).cpu().numpy()
        return result

    def _split(self, counts_RE: IntArray) -> None:
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
        self.sends_RP = sends_RP
        total = np.zeros(table.expert_P.size + 1, dtype=np.int64)
        np.cumsum(sends_RP[self.group.rank], out=total[1:])
        self.to_ranks: list[int] = (total[table.ends_G] - total[table.starts_G]).tolist()
        self.chunks_RS = np.ascontiguousarray(sends_RP[:, self.mine])
        self.from_ranks: list[int] = self.chunks_RS.sum(axis=1).tolist()

    def _to_slot_order(self, device: torch.device) -> Tensor:
        own_P = self.sends_RP[self.group.rank]
        by_expert = self.table.to_slots_P
        sizes = own_P[by_expert]
        starts_P = np.empty_like(own_P)
        starts_P[by_expert] = np.cumsum(sizes) - sizes
        return torch.from_numpy(_ramps(starts_P, own_P)).to(device, non_blocking=True)

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

    def sort_in(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, IntArray, Tensor]:
        """What arrived, by local slot.

        Returns
        -------
        tokens [M, H], tokens of each local slot (array of int64 [S], with padding), weights [M]
        """
        starts_RS = (np.cumsum(self.chunks_RS) - self.chunks_RS.ravel()).reshape(self.chunks_RS.shape)
        sizes_RS, wanted = self.chunks_RS, self.slot_order()
        if wanted is not None:
            starts_RS, sizes_RS = starts_RS[:, wanted], sizes_RS[:, wanted]
        padded_S = -(-sizes_RS.sum(axis=0) // self.row_block) * self.row_block
        self._order_in(starts_RS, sizes_RS, padded_S, rows, sorted_already=wanted is None)
        if self._gather is not None:
            rows, probs = rows.index_select(0, self._gather), probs.index_select(0, self._gather)
        self.tokens += int(sizes_RS.sum())
        self._start_clock(rows)
        return rows, padded_S, probs

    def _order_in(
        self,
        starts_RS: IntArray,
        sizes_RS: IntArray,
        padded_S: IntArray,
        rows: Tensor,
        *,
        sorted_already: bool,
    ) -> None:
        n_rows, sizes_S = rows.size(0), sizes_RS.sum(axis=0)
        padding = int(padded_S.sum()) != n_rows
        if n_rows == 0 or (not padding and (sizes_S.size <= 1 or (self.group.size == 1 and sorted_already))):
            self._gather = self._scatter = None
            return
        arrived = _ramps(starts_RS.T.ravel(), sizes_RS.T.ravel())
        shift_S = np.cumsum(padded_S - sizes_S) - (padded_S - sizes_S)
        stands = np.arange(n_rows) + np.repeat(shift_S, sizes_S)
        gather = np.zeros(int(padded_S.sum()), dtype=np.int64)
        gather[stands] = arrived
        scatter = np.empty(n_rows, dtype=np.int64)
        scatter[arrived] = stands
        self._gather = torch.from_numpy(gather).to(rows.device, non_blocking=True)
        self._scatter = torch.from_numpy(scatter).to(rows.device, non_blocking=True)

    # -- and back ----------------------------------------------------------------------------------

    def sort_out(self, rows: Tensor) -> Tensor:
        """Results in the order in which the tokens arrived."""
        self._stop_clock(rows)
        return rows if self._scatter is None else rows.index_select(0, self._scatter)

    def send_back(self, rows: Tensor) -> Tensor:
        """Results to the ranks whose tokens they are."""
        return self.group.all_to_all(rows, self.to_ranks, self.from_ranks)

    def combine(self, rows: Tensor) -> Tensor:
        """Sum of each token's contributions, in ascending order of its experts."""
        if not self.complete:
            rows = torch.cat((rows, rows.new_zeros(1, rows.size(1))))
        out = rows.index_select(0, self.back_kT[0])
        for place_T in self.back_kT[1:]:
            out += rows.index_select(0, place_T)
        self.layer_seconds += time.perf_counter() - self._entered
        return out

    # -- the clock: seconds in the experts of this layer on this rank -----------------------------

    def _start_clock(self, rows: Tensor) -> None:
        if rows.is_cuda:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            self._events.append((start, torch.cuda.Event(enable_timing=True)))  # type: ignore[no-untyped-call]
        else:
            self._began = self.clock()

    def _stop_clock(self, rows: Tensor) -> None:
        if rows.is_cuda:
            self._events[-1][1].record()
            if len(self._events) > 64:
                self._read_events()
        else:
            self.seconds += self.clock() - self._began

    def _read_events(self) -> None:
        waiting = []
        for start, stop in self._events:
            if stop.query():
                self.seconds += start.elapsed_time(stop) * 1e-3
            else:
                waiting.append((start, stop))
        self._events = waiting

    def take_seconds(self) -> float:
        """Seconds in this layer's experts since the last call; never waits for the device."""
        self._read_events()
        seconds, self.seconds = self.seconds, 0.0
        return seconds
