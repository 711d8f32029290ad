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

The core knows torch and process groups but no engine; `megatron` and `transformers_backend` wrap it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.schedule import Ints, SlotTable
from moeless_opt.solvers.shares.rounding import round_tokens

__all__ = [
    "BalancedShares",
    "EqualShares",
    "PlannedShares",
    "SharePolicy",
    "SlotDispatcher",
    "chosen_experts",
    "source_aware",
]

# ---------------------------------------------------------------------------------------------- shares


@runtime_checkable
class SharePolicy(Protocol):
    """How many tokens each replica serves. Must be a pure function: every rank calls it and must agree."""

    name: str

    def quotas(self, layer: int, load_E: Ints, table: SlotTable) -> Ints:
        """Tokens for each flat slot (axis P of the table).

        Parameters
        ----------
        layer : int
            Index among the model's MoE layers.
        load_E : array of int64, shape [E]
            Tokens of each expert over all ranks of the group in this batch.
        table : SlotTable
            The layer's slots.

        Returns
        -------
        array of int64, shape [P]
            Non-negative; the quotas of an expert's slots add up to its load.
        """
        ...


class EqualShares:
    """Every replica of an expert serves the same number of tokens, up to one."""

    name = "equal"

    def quotas(self, layer: int, load_E: Ints, table: SlotTable) -> Ints:
        """See `SharePolicy.quotas`; the first replicas take the remainder."""
        nth_P = np.empty_like(table.expert_P)
        order = table.to_slots_P
        starts_E = np.cumsum(table.replicas_E) - table.replicas_E
        nth_P[order] = np.arange(order.size) - starts_E[table.expert_P[order]]
        whole, rest = np.divmod(load_E, table.replicas_E)
        quota_P: Ints = whole[table.expert_P] + (nth_P < rest[table.expert_P])
        return quota_P


class PlannedShares:
    """Shares fixed by a plan, rounded to whole tokens (largest remainders first).

    Parameters
    ----------
    share_LGC : array of float, shape [L, G, C]
        Fraction of the expert's tokens for each slot, in the slots' order of the plan that is in force.
    """

    name = "planned"

    def __init__(self, share_LGC: NDArray[np.float64], slots_LGC: NDArray[np.int32]) -> None:
        self._of = [
            {
                (int(e), g): float(s)
                for g, row in enumerate(layer)
                for e, s in zip(row, share[g], strict=True)
                if e >= 0
            }
            for layer, share in zip(slots_LGC, share_LGC, strict=True)
        ]

    def quotas(self, layer: int, load_E: Ints, table: SlotTable) -> Ints:
        """See `SharePolicy.quotas`; slots that the plan does not know share what is left equally."""
        of = self._of[layer]
        pairs = zip(table.expert_P.tolist(), table.rank_P.tolist(), strict=True)
        weight_P = np.array([of.get(pair, 0.0) for pair in pairs])
        total_E = np.bincount(table.expert_P, weights=weight_P, minlength=table.n_experts)
        weight_P = np.where(total_E[table.expert_P] > 0, weight_P, 1.0)
        total_E = np.bincount(table.expert_P, weights=weight_P, minlength=table.n_experts)
        exact_P = load_E[table.expert_P] * weight_P / total_E[table.expert_P]
        return round_tokens(exact_P, table.expert_P, load_E)


class BalancedShares:
    """Water-filling: the replicas of each expert top up the least loaded of their GPUs.

    Expert after expert, heaviest first, an expert's tokens are taken back and poured again over the GPUs that
    hold it, until a sweep over all experts no longer lowers the fullest GPU. All arithmetic is on integers,
    so ranks cannot disagree by a rounding.

    Parameters
    ----------
    speed_G : sequence of int, optional
        Relative speeds as whole numbers (e.g. per mille); equal by default.
    sweeps : int
        Most sweeps over the experts.
    """

    name = "balanced"

    def __init__(self, speed_G: Sequence[int] | None = None, sweeps: int = 4) -> None:
        if speed_G is not None and any(int(s) != s or s < 1 for s in speed_G):
            raise ProblemError("speed_G", f"must be whole numbers from 1, got {list(speed_G)}")
        self.speed_G = None if speed_G is None else [int(s) for s in speed_G]
        self.sweeps = sweeps

    def quotas(self, layer: int, load_E: Ints, table: SlotTable) -> Ints:
        """See `SharePolicy.quotas`."""
        quota_P = load_E[table.expert_P]
        speed = self.speed_G or [1] * table.n_ranks
        several = [int(e) for e in np.flatnonzero((table.replicas_E > 1) & (load_E > 0))]
        several.sort(key=lambda e: (-int(load_E[e]), e))
        one_P = table.replicas_E[table.expert_P] == 1
        busy: list[int] = (
            np.bincount(table.rank_P[one_P], weights=quota_P[one_P], minlength=table.n_ranks)
            .astype(int)
            .tolist()
        )
        ends_E = np.cumsum(table.replicas_E)
        slots = {e: table.to_slots_P[ends_E[e] - table.replicas_E[e] : ends_E[e]].tolist() for e in several}
        ranks = {e: table.rank_P[slots[e]].tolist() for e in several}
        given: dict[int, list[int]] = {}
        best = -1
        for sweep in range(self.sweeps):
            for e in several:
                at = ranks[e]
                for g, n in zip(at, given.get(e, ()), strict=False):
                    busy[g] -= n
                given[e] = pour(int(load_E[e]), [busy[g] for g in at], [speed[g] for g in at])
                for g, n in zip(at, given[e], strict=True):
                    busy[g] += n
            fullest = max((b * 2**20 // s for b, s in zip(busy, speed, strict=True)), default=0)
            if sweep and fullest >= best:
                break
            best = fullest
        for e in several:
            quota_P[slots[e]] = given[e]
        return quota_P


def pour(tokens: int, busy: list[int], speed: list[int]) -> list[int]:
    """Split `tokens` over vessels filled to ``busy / speed`` so that the highest level is least.

    Whole tokens; exact up to one token per vessel. Ties go to the first vessel.
    """
    if len(busy) == 2 and speed[0] == speed[1]:
        # By far the most frequent case.
        level = busy[0] + busy[1] + tokens
        first = min(tokens, max(0, (level + (busy[0] <= busy[1])) // 2 - busy[0]))
        return [first, tokens - first]
    order = sorted(range(len(busy)), key=lambda i: (busy[i] * 2**20 // speed[i], i))
    level, width = tokens, 0
    used = 0
    for used, i in enumerate(order):
        # Level of the first `used` vessels alone, against the bottom of the next one.
        if used and level * speed[i] <= busy[i] * width:
            break
        level, width = level + busy[i], width + speed[i]
    else:
        used = len(order)
    parts = [0] * len(busy)
    rest = []
    left = tokens
    for i in order[:used]:
        exact = level * speed[i]
        parts[i] = max(0, exact // width - busy[i])
        left -= parts[i]
        rest.append((-(exact % width), i))
    rest.sort()
    k = 0
    while left:
        step = 1 if left > 0 else -1
        i = rest[k % len(rest)][1]
        if parts[i] + step >= 0:
            parts[i] += step
            left -= step
        k += 1
    return parts


def source_aware(counts_RE: Ints, quota_P: Ints, table: SlotTable, node_R: Sequence[int]) -> Ints:
    """Who sends how many tokens to which slot: own GPU first, own node second, then the others.

    Parameters
    ----------
    counts_RE : array of int64, shape [R, E]
        Tokens of each expert on each rank of the group.
    quota_P : array of int64, shape [P]
        Tokens that each flat slot serves.
    table : SlotTable
        The layer's slots.
    node_R : sequence of int
        Node of each rank.

    Returns
    -------
    array of int64, shape [R, P]
        Rows add up (by expert) to the counts, columns to the quotas.

    Notes
    -----
    For the given quotas this keeps the most tokens on their GPU, and of the rest the most in their node: the
    matching inside a group is min(supply, demand) per expert, which no other choice can exceed.
    """
    sends_RP = np.zeros((counts_RE.shape[0], quota_P.size), dtype=np.int64)
    supply_RE, demand_P = counts_RE.copy(), quota_P.copy()
    slots = np.arange(quota_P.size)
    # An expert with one replica leaves no choice.
    one_P = table.replicas_E[table.expert_P] == 1
    sends_RP[:, one_P] = counts_RE[:, table.expert_P[one_P]]
    demand_P[one_P] = 0
    own_P = np.minimum(supply_RE[table.rank_P, table.expert_P], demand_P)
    sends_RP[table.rank_P, slots] += own_P
    supply_RE[table.rank_P, table.expert_P] -= own_P
    demand_P -= own_P
    nodes = sorted(set(node_R))
    if len(nodes) > 1:
        node = np.asarray(node_R)
        for n in nodes:
            _match(sends_RP, supply_RE, demand_P, table, np.flatnonzero(node == n), node[table.rank_P] == n)
    _match(sends_RP, supply_RE, demand_P, table, np.arange(len(node_R)), np.ones(quota_P.size, dtype=bool))
    return sends_RP


def _match(
    sends_RP: Ints,
    supply_RE: Ints,
    demand_P: Ints,
    table: SlotTable,
    ranks: NDArray[np.intp],
    inside_P: NDArray[np.bool_],
) -> None:
    """Serve what can be served inside one group of ranks, in order of rank and slot (north-west corner)."""
    open_P = inside_P & (demand_P > 0)
    order = table.to_slots_P[open_P[table.to_slots_P]]
    if not order.size:
        return
    expert = table.expert_P[order]
    need = demand_P[order]
    # Demand and supply of an expert as intervals on one line; overlaps are what flows.
    total = np.cumsum(need)
    first = np.flatnonzero(np.r_[True, expert[1:] != expert[:-1]])
    base = np.repeat((total - need)[first], np.diff(np.r_[first, expert.size]))
    high_P = total - base
    have = supply_RE[ranks]
    high_RE = np.cumsum(have, axis=0)
    flow = np.minimum(high_RE[:, expert], high_P) - np.maximum((high_RE - have)[:, expert], high_P - need)
    np.maximum(flow, 0, out=flow)
    sends_RP[np.ix_(ranks, order)] += flow
    demand_P[order] -= flow.sum(axis=0)
    supply_RE[np.ix_(ranks, expert[first])] -= np.add.reduceat(flow, first, axis=1)


# ---------------------------------------------------------------------------------------------- tensors


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
    n_tokens, n_experts = routing_map.shape
    if routing_map.device.type == "cpu":
        hits = routing_map.nonzero()
        if hits.size(0) == n_tokens * topk:
            return hits[:, 1].reshape(n_tokens, topk)
    # No host synchronisation on a GPU, and right for uneven tokens.
    ids = torch.arange(n_experts, device=routing_map.device).expand(n_tokens, -1)
    return torch.where(routing_map, ids, n_experts).topk(topk, dim=1, largest=False, sorted=True).values


def _ramps(starts: Ints, sizes: Ints) -> Ints:
    """Concatenation of ``arange(start, start + size)``."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)


class SlotDispatcher:
    """Carries the tokens of one layer to slots and back; see the module's text.

    Parameters
    ----------
    layer : int
        Index among the model's MoE layers.
    n_experts, topk : int
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
        Gives the whole numbers that this rank tells the others with its counts.
    agree : callable, optional
        ``agree(layer, headers_RK)`` is called with everybody's; it may change the table by `set_table`.

    Notes
    -----
    The object keeps the state of one batch between its stages, as megatron-core's dispatchers do: one batch
    of a layer at a time.
    """

    def __init__(
        self,
        layer: int,
        n_experts: int,
        topk: int,
        table: SlotTable,
        group: ExpertGroup,
        shares: SharePolicy,
        *,
        row_block: int = 1,
        header: Callable[[], Sequence[int]] | None = None,
        agree: Callable[[int, NDArray[np.int64]], None] | None = None,
    ) -> None:
        self.layer = layer
        self.n_experts = n_experts
        self.topk = topk
        self.group = group
        self.shares = shares
        self.row_block = row_block
        self.header = header
        self.agree = agree
        # Real tokens of the next batches: bool [T], or None for all. What is masked out is not observed.
        self.valid: Tensor | None = None
        self.skip_invalid = False
        self.on_batch: list[Callable[[SlotDispatcher, Tensor], None]] = []
        self.sends_RP: Ints = np.zeros((group.size, 0), dtype=np.int64)
        self.batch_counts_RE: Ints = np.zeros((group.size, n_experts), dtype=np.int64)
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

    def set_table(self, table: SlotTable) -> None:
        """Use another placement from the next split on."""
        if table.n_ranks != self.group.size:
            raise ProblemError("slots_GC", f"has {table.n_ranks} ranks, the group has {self.group.size}")
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
        if torch.is_grad_enabled() and x_TH.requires_grad:
            raise UnsupportedFeatureError(
                "training through a live placement is not supported: run under torch.no_grad()"
            )
        self._entered = time.perf_counter()
        n_tokens, k = expert_Tk.shape
        if self.valid is not None and self.valid.numel() != n_tokens:
            raise ProblemError("valid", f"marks {self.valid.numel()} tokens, the batch has {n_tokens}")
        if self.valid is not None and self.skip_invalid:
            expert_Tk = torch.where(self.valid[:, None], expert_Tk, self.n_experts)
        flat = expert_Tk.reshape(-1)
        counts = self._count(flat)
        self._observe(expert_Tk, counts)
        gathered = self._exchange(counts)
        self.batch_counts_RE = counts_RE = gathered[:, : self.n_experts]
        if self.agree is not None:
            self.agree(self.layer, gathered[:, self.n_experts :])
        self._split(counts_RE)
        order = torch.argsort(flat, stable=True)
        n_rows = int(counts_RE[self.group.rank].sum())
        if n_rows < flat.numel():
            order = order[:n_rows]
        if not self.table.sorted:
            order = order.index_select(0, self._to_slot_order(order.device))
        self._place(order, n_tokens, k)
        return x_TH.index_select(0, order // k), prob_Tk.reshape(-1).index_select(0, order)

    def _count(self, flat: Tensor) -> Tensor:
        if flat.is_cuda:
            # bincount would wait for the device to learn the largest id.
            counts = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=flat.device)
            return counts.scatter_add_(0, flat, torch.ones_like(flat))[: self.n_experts]
        return torch.bincount(flat, minlength=self.n_experts + 1)[: self.n_experts]

    def _observe(self, expert_Tk: Tensor, counts: Tensor) -> None:
        if self.valid is not None and not self.skip_invalid:
            kept = torch.where(self.valid[:, None], expert_Tk, self.n_experts).reshape(-1)
            counts = self._count(kept)
        if self.load_E is None:
            self.load_E = counts.clone()
        else:
            self.load_E += counts
        for callback in self.on_batch:
            callback(self, expert_Tk)

    def _exchange(self, counts: Tensor) -> Ints:
        extra = self.header() if self.header is not None else ()
        mine = (
            torch.cat((counts, torch.tensor(extra, dtype=torch.int64).to(counts.device))) if extra else counts
        )
        # The one synchronisation with the host: the all-to-all needs its sizes there.
        result: Ints = self.group.all_gather(mine).cpu().numpy()
        return result

    def _split(self, counts_RE: Ints) -> None:
        table = self.table
        if table.single:
            sends_RP = counts_RE[:, table.expert_P]
        else:
            load_E = counts_RE.sum(axis=0)
            quota_P = self.shares.quotas(self.layer, load_E, table)
            if not np.array_equal(
                np.bincount(table.expert_P, weights=quota_P, minlength=self.n_experts).astype(np.int64),
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

    def sort_in(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Ints, Tensor]:
        """What arrived, by local slot.

        Returns
        -------
        tokens [M, H], tokens of each local slot (array of int64 [S], with padding), weights [M]
        """
        sizes_S = self.chunks_RS.sum(axis=0)
        padded_S = -(-sizes_S // self.row_block) * self.row_block
        self._order_in(sizes_S, padded_S, rows)
        if self._gather is not None:
            rows, probs = rows.index_select(0, self._gather), probs.index_select(0, self._gather)
        self.tokens += int(sizes_S.sum())
        self._start_clock(rows)
        return rows, padded_S, probs

    def _order_in(self, sizes_S: Ints, padded_S: Ints, rows: Tensor) -> None:
        n_rows = rows.size(0)
        padding = int(padded_S.sum()) != n_rows
        if n_rows == 0 or (not padding and (sizes_S.size <= 1 or self.group.size == 1)):
            self._gather = self._scatter = None
            return
        sizes_RS = self.chunks_RS
        starts_RS = (np.cumsum(sizes_RS) - sizes_RS.ravel()).reshape(sizes_RS.shape)
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
