"""The split of one layer's batches on the device; what the host has to know of it comes in one copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.arrays import IntArray
from moeless_opt.runtime.live import ExpertGroup, SlotTable, rows_to_slots
from moeless_opt.runtime.live.dispatch import (
    BalancedShares,
    EqualShares,
    PlannedShares,
    SharePolicy,
    TimedShares,
)
from moeless_opt.runtime.live.dispatch.device.launching import interpreted, launch, power, upload
from moeless_opt.runtime.live.dispatch.device.rows import place_ends, warm_rows

__all__ = ["DeviceSplit", "Told", "on_device"]

#: Tries for one division of tokens, and most steps of one descent; as in `_timed_kernels`.
TRIES, STEPS = 8, 1000
#: Least width of what depends on a table: few tables want a kernel of their own.
LEAST = 32
#: Most replicas of an expert for which kernels are made before the first batch.
READY = 8
#: Rows that a program moves at a time.
BLOCK = 1024
#: Sums of speeds up to which nothing exceeds 63 bits, for any batch of up to 2**31 rows.
FAST = 2**31
#: Most shakes of a search: each is a program, whose quotas lie in memory until the best is known.
SHAKEN = 1022


def on_device(policy: SharePolicy) -> bool:
    """Whether there are kernels for a policy; others are computed on the host."""
    if type(policy) is BalancedShares:
        return sum(policy.speed_G or ()) < FAST
    if type(policy) is TimedShares:
        return (policy.kicks or 0) <= SHAKEN and on_device(policy.balanced)
    return type(policy) in (EqualShares, PlannedShares)


class Told(NamedTuple):
    """What the host is told of a split.

    Parameters
    ----------
    headers_RK : array of int64, shape [R, K]
        What the ranks said besides their counts.
    give_R, come_R : array of int64, shape [R]
        Rows that this rank sends to each, and gets from each.
    chunks_RS : array of int64, shape [R, S]
        Rows from each rank for each local slot.
    """

    headers_RK: IntArray
    give_R: IntArray
    come_R: IntArray
    chunks_RS: IntArray


class _Placed:
    """A layer's table as the kernels read it."""

    def __init__(self, table: SlotTable, group: ExpertGroup, device: torch.device) -> None:
        self.table = table
        experts, slots, ranks = table.experts, table.expert_P.size, table.gpus
        self.widest = power(int(table.replicas_E.max()), 2)
        by_expert = table.to_slots_P
        starts_E = np.cumsum(table.replicas_E) - table.replicas_E
        nth_P = np.arange(slots) - starts_E[table.expert_P[by_expert]]
        cell = table.expert_P[by_expert], nth_P
        #: Where a flat slot stands among its expert's.
        self.cell = (table.expert_P, np.empty(slots, dtype=np.int64))
        self.cell[1][by_expert] = nth_P
        slot_EX = np.full((experts, self.widest), 0, dtype=np.int32)
        slot_EX[cell] = by_expert
        rank_EX = np.zeros((experts, self.widest), dtype=np.int32)
        rank_EX[cell] = table.rank_P[by_expert]
        many = np.flatnonzero(table.replicas_E > 1)
        nth_E = np.zeros(experts, dtype=np.int32)
        nth_E[many] = np.arange(many.size)
        place_P = np.empty(slots, dtype=np.int32)
        place_P[by_expert] = np.arange(slots)
        filled_GC = table.slots().astype(np.int32)
        single_GC = np.where(filled_GC >= 0, filled_GC, 0)
        single_GC = np.where((filled_GC >= 0) & (table.replicas_E[single_GC] == 1), filled_GC, -1)

        def there(array: NDArray[Any]) -> Tensor:
            return upload(array.astype(np.int32), device)

        self.slots, self.many_count, self.most = slots, int(many.size), filled_GC.shape[1]
        self.slot_EX, self.rank_EX, self.copies_E = there(slot_EX), there(rank_EX), there(table.replicas_E)
        self.many_S, self.nth_E, self.place_P = there(many), there(nth_E), there(place_P)
        self.single_GC, self.node_R = there(single_GC), there(np.array(group.node_R))
        self.nodes = len(set(group.node_R)) and max(group.node_R) + 1
        self.first_G = there(np.append(table.starts_G, slots))
        mine = len(table.rows[group.rank])
        self.mine, self.first = mine, int(table.starts_G[group.rank])
        self.as_they_stand = there(np.arange(max(mine, 1)))
        new = torch.empty(0, dtype=torch.int64, device=device).new_empty
        self.sends_RP = new((ranks, slots))
        self.load_E = new(experts)
        several = max(self.many_count, 1)
        # Experts with several replicas, heaviest first, and where each of them stands there.
        self.load_S, self.quota_SX = new(several), new((several, self.widest))
        self.place_S, self.copies_S = (new(several).int() for _ in range(2))
        self.rank_SX = new((several, self.widest)).int()
        # Tokens of each rank when it is balanced; those of experts of one replica; how many such are used.
        self.sums_3G = [new(ranks) for _ in range(3)]
        self.tries: tuple[Tensor, ...] = ()

    def tried(self, count: int, device: torch.device) -> tuple[Tensor, ...]:
        """Room for what so many descents leave: quotas, tokens and experts of the ranks, time."""
        if not self.tries or len(self.tries[0]) != count:
            ranks = len(self.sums_3G[0])
            made = [(count, *self.quota_SX.shape), (count, ranks), (count, ranks)]
            whole = (torch.empty(shape, dtype=torch.int64, device=device) for shape in made)
            self.tries = (*whole, torch.empty(count, dtype=torch.float64, device=device))
        return self.tries


class DeviceSplit:
    """Counts to routes of one layer, by kernels.

    Parameters
    ----------
    index : int
        Of the layer among the model's MoE layers.
    device : torch.device
        Where the counts are.
    """

    def __init__(self, index: int, device: torch.device) -> None:
        self.index, self.device = index, device
        self.group: ExpertGroup
        self._placed: _Placed | None = None
        self._weights: tuple[SlotTable, SharePolicy, Tensor, Tensor] | None = None
        self._speeds: tuple[SharePolicy, Tensor] | None = None
        self._times: tuple[SlotTable, SharePolicy, tuple[Tensor, ...]] | None = None
        self._nothing = torch.zeros(1, dtype=torch.float64, device=device)
        self._wanted: tuple[bytes, Tensor] | None = None
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)

    def warm(
        self,
        policy: SharePolicy,
        experts: int,
        group: ExpertGroup,
        *,
        topk: int = 1,
        width: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Compile what a forward may want, or read it from Triton's cache; some seconds, once on a machine.

        Parameters
        ----------
        policy : SharePolicy
            Besides those by name.
        experts : int
            Of a layer.
        group : ExpertGroup
            The ranks.
        topk : int
            Experts of a token.
        width, dtype
            Of the rows, where they are known.
        """
        if interpreted():
            return
        if dtype is not None:
            warm_rows(experts, topk, width, dtype, self.device)
        gathered = torch.zeros((group.size, experts), dtype=torch.int64, device=self.device)
        order = torch.zeros(1, dtype=torch.int64, device=self.device)
        copies = 1
        while copies <= min(READY, group.size):
            rows = [list(row) for row in np.array_split(np.arange(experts), group.size)]
            for g in range(copies):
                rows[g] += [0] * (0 not in rows[g])
            table = SlotTable(rows_to_slots(rows), experts)
            for one in (EqualShares(), BalancedShares(), policy):
                if on_device(one):
                    self.start(gathered, one, table, group)
            self.tell(gathered)
            self.by_slot(order, order.clone())
            if self._at().mine:
                self.by_local_slot(None, 1, 1, 1)
                for counted in (False, True):
                    place_ends(self.sizes(None, counted), self._at().as_they_stand, 1)
            copies *= 2

    # -- launches ----------------------------------------------------------------------------------

    @property
    def sends_RP(self) -> Tensor:
        """Who sends how many rows to which slot; int64 [R, P], of the last split."""
        return self._at().sends_RP

    def _at(self) -> _Placed:
        assert self._placed is not None
        return self._placed

    def start(self, gathered: Tensor, policy: SharePolicy, table: SlotTable, group: ExpertGroup) -> None:
        """Launch the split of a batch; the host waits for nothing.

        Parameters
        ----------
        gathered : int64 tensor, shape [R, E + K]
            Every rank's counts, and what else it says.
        policy : SharePolicy
            One that `on_device` knows.
        table : SlotTable
            The layer's slots.
        group : ExpertGroup
            The ranks.
        """
        if self._placed is None or self._placed.table is not table or self.group is not group:
            self.group = group
            self._placed = _Placed(table, group, self.device)
        at, ranks = self._at(), self.group.size
        counts, stride = gathered, gathered.stride(0)
        kind, weight_EX, total_E = 2, self._nothing, self._nothing
        quotas, times = at.quota_SX, self._nothing
        if type(policy) is EqualShares or table.single:
            kind = 0
        elif type(policy) is PlannedShares:
            kind, (weight_EX, total_E) = 1, self._weighted(policy, table)
        elif isinstance(policy, TimedShares):
            self._balance(counts, policy.balanced)
            quotas, times = self._search(policy, table)
        else:
            assert isinstance(policy, BalancedShares)
            self._balance(counts, policy)
        tile = power(ranks) * at.widest
        launch(
            "split",
            (table.experts,),
            counts,
            stride,
            at.slot_EX,
            at.rank_EX,
            at.copies_E,
            at.nth_E,
            weight_EX,
            total_E,
            at.place_S,
            quotas,
            times,
            at.node_R,
            at.sends_RP,
            ranks,
            at.slots,
            len(at.load_S),
            at.nodes,
            len(times),
            RB=power(ranks),
            X=at.widest,
            NB=power(len(times), LEAST),
            POLICY=kind,
            warps=min(8, power(tile // 256)),
        )

    def _balance(self, counts: Tensor, policy: BalancedShares) -> None:
        at, ranks = self._at(), self.group.size
        SB = power(at.many_count, LEAST)
        launch(
            "order",
            (at.table.experts,),
            counts,
            counts.stride(0),
            at.many_S,
            at.copies_E,
            at.nth_E,
            at.rank_EX,
            at.load_E,
            at.place_S,
            at.load_S,
            at.copies_S,
            at.rank_SX,
            ranks,
            at.many_count,
            RB=power(ranks),
            SB=SB,
            X=at.widest,
        )
        policy.check(1, ranks)
        if self._speeds is None or self._speeds[0] is not policy or len(self._speeds[1]) != ranks:
            speed_G = np.array(policy.speed_G or [1] * ranks, dtype=np.int64)
            self._speeds = policy, upload(speed_G, self.device)
        launch(
            "pour",
            (1,),
            at.load_E,
            at.load_S,
            at.copies_S,
            at.rank_SX,
            at.single_GC,
            self._speeds[1],
            *at.sums_3G,
            at.quota_SX,
            policy.sweeps,
            ranks,
            at.most,
            at.many_count,
            GB=power(ranks),
            CB=power(at.most, 8),
            SB=SB,
            X=at.widest,
            UNIT=policy.speed_G is None,
            warps=1,
        )

    def _search(self, policy: TimedShares, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Quotas of all descents, and the time of each."""
        known = self._times
        if known is None or known[0] is not table or known[1] is not policy:
            times = policy.times(table)
            parts = (policy.rates(table), times[0], *times[1])
            known = self._times = table, policy, tuple(upload(part, self.device) for part in parts)
        at, (rate_G, knot_K, table_AK, slope_AK) = self._at(), known[2]
        busy_G, base_G, alone_G = at.sums_3G
        kicks = policy.effort(table)
        tries = at.tried(2 + kicks, self.device)
        SB = power(at.many_count, LEAST)
        first = 0
        for count in (2, kicks - kicks // 2, kicks // 2):
            if not count:
                continue
            launch(
                "search",
                (count,),
                at.load_S,
                at.copies_S,
                at.rank_SX,
                base_G,
                alone_G,
                busy_G,
                at.quota_SX,
                rate_G,
                knot_K,
                table_AK,
                slope_AK,
                *tries,
                first,
                self.group.size,
                at.many_count,
                len(knot_K),
                len(table_AK),
                GB=power(self.group.size),
                SB=SB,
                X=at.widest,
                NB=power(len(tries[-1]), LEAST),
                TRIES=TRIES,
                STEPS=STEPS,
                LOG=power(len(knot_K) - 1).bit_length() - 1,
                UNIT=policy.speed_G is None,
                warps=max(1, min(8, SB * at.widest // 128)),
            )
            first += count
        return tries[0], tries[-1]

    def _weighted(self, policy: PlannedShares, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Weights of the slots by expert, and their sums; sent when plan or table change."""
        known = self._weights
        if known is None or known[0] is not table or known[1] is not policy:
            weight_P, total_E = policy.weights(self.index, table)
            at = self._at()
            weight_EX = np.zeros((table.experts, at.widest))
            weight_EX[at.cell] = weight_P
            known = table, policy, upload(weight_EX, self.device), upload(total_E, self.device)
            self._weights = known
        return known[2:]

    def tell(self, gathered: Tensor) -> Told:
        """What the host must know of the split; waits for it: the one synchronisation of a layer."""
        at, ranks = self._at(), self.group.size
        experts = at.table.experts
        extra = gathered.size(1) - experts
        out = gathered.new_empty((ranks, extra + 2 + at.mine))
        launch(
            "pack",
            (ranks,),
            gathered,
            gathered.stride(0),
            experts,
            extra,
            at.sends_RP,
            at.first_G,
            out,
            ranks,
            at.slots,
            self.group.rank,
            at.mine,
            KB=power(extra, LEAST),
            SB=power(at.mine, LEAST),
            warps=1,
        )
        if out.is_cuda:
            here = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            here.copy_(out, non_blocking=True)
            # The host waits here, and nowhere else in a layer.
            torch.cuda.current_stream(out.device).synchronize()
            out = here
        found: IntArray = out.numpy()
        return Told(
            found[:, :extra],
            found[:, extra],
            found[:, extra + 1],
            np.ascontiguousarray(found[:, extra + 2 :]),
        )

    # -- orders of rows ----------------------------------------------------------------------------

    def sizes(self, wanted_S: IntArray | None, counted: bool = False) -> Tensor:
        """Rows for each local slot, in an order of the slots; int64 [S] on the device.

        Those that are counted are told by `take_tokens`.
        """
        at = self._at()
        size_S = at.sends_RP.new_empty(at.mine)
        if at.mine:
            launch(
                "sizes",
                (1,),
                at.sends_RP,
                self._wanting(wanted_S),
                size_S,
                self._tokens,
                self.group.size,
                at.slots,
                at.first,
                at.mine,
                SB=power(at.mine, LEAST),
                COUNT=counted,
            )
        return size_S

    def take_tokens(self) -> int:
        """Rows that were counted since the last call; waits for the device."""
        tokens = int(self._tokens)
        self._tokens.zero_()
        return tokens

    def _wanting(self, wanted_S: IntArray | None) -> Tensor:
        """An order of the slots, sent when it changes."""
        if wanted_S is None:
            return self._at().as_they_stand
        key = wanted_S.tobytes()
        if self._wanted is None or self._wanted[0] != key:
            self._wanted = key, upload(wanted_S.astype(np.int32), self.device)
        return self._wanted[1]

    def by_slot(self, order: Tensor, back: Tensor) -> Tensor:
        """Rows of this rank in the order of the flat slots, from that by expert; what is over stays.

        ``back[i]`` becomes where row i stands.
        """
        at = self._at()
        out = order.clone()
        launch(
            "fill",
            (at.slots,),
            at.sends_RP,
            at.place_P,
            order,
            out,
            back,
            at.slots,
            self.group.rank,
            PB=power(at.slots, power(2 * at.table.experts)),
            BLOCK=BLOCK,
            warps=4,
        )
        return out

    def by_local_slot(
        self, wanted_S: IntArray | None, rows: int, padded: int, block: int, *, fewer: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Whence the rows come, slot by slot (0 where padded), and where each that arrives will stand.

        Parameters
        ----------
        wanted_S : array of int64, shape [S], optional
            Order of the slots; None: as they stand.
        rows, padded : int
            Rows that arrive, and how many they are with the padding.
        block : int
            Each slot's are padded to a multiple of so many.
        fewer : bool
            Fewer rows may arrive; the rest is 0.
        """
        at = self._at()
        # Where every place is written, nothing stays as it is made.
        gather = (torch.zeros if fewer or padded > rows else torch.empty)(
            padded, dtype=torch.int64, device=self.device
        )
        scatter = (torch.zeros if fewer else torch.empty)(rows, dtype=torch.int64, device=self.device)
        RB, SB = power(self.group.size), power(at.mine, LEAST)
        launch(
            "arrange",
            (self.group.size, at.mine),
            at.sends_RP,
            self._wanting(wanted_S),
            gather,
            scatter,
            self.group.size,
            at.slots,
            at.first,
            at.mine,
            block,
            RB=RB,
            SB=SB,
            BLOCK=BLOCK,
            warps=min(8, power(RB * SB // 256)),
        )
        return gather, scatter
