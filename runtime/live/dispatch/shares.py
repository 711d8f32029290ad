"""How many tokens of a batch each replica serves: policies, all pure functions of the gathered counts."""

from __future__ import annotations

import importlib.util
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, floats, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.live import SlotTable
from moeless_opt.solvers.shares import round_tokens

__all__ = [
    "BalancedShares",
    "EqualShares",
    "PlannedShares",
    "RankShares",
    "SharePolicy",
    "pour",
    "share_policy",
    "split_kernels",
    "warm_split",
    "weighted_quotas",
]


@runtime_checkable
class SharePolicy(Protocol):
    """How many tokens each replica serves. Must be a pure function: every rank calls it and must agree."""

    name: str

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """Tokens for each flat slot (axis P of the table).

        Parameters
        ----------
        index : int
            Of the layer among the model's MoE layers: its place on axis L.
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


class RankShares(ABC):
    """A policy that says something of single ranks: it follows them when others are lost or come back."""

    @abstractmethod
    def check(self, layers: int, ranks: int) -> None:
        """Refuse another number of layers or ranks than it speaks of.

        Raises
        ------
        ProblemError
        """

    @abstractmethod
    def among(self, places: Sequence[int | None]) -> Self:
        """The same for other ranks: where each of them stood before, if it did."""


def check_speeds(speed_G: Sequence[Any] | FloatArray | None, ranks: int) -> None:
    """Refuse speeds of another number of ranks."""
    if speed_G is not None and len(speed_G) != ranks:
        raise ProblemError("speed_G", f"has {len(speed_G)} entries for {ranks} ranks")


def share_policy(shares: str | SharePolicy) -> SharePolicy:
    """A policy by name (``"balanced"``, ``"equal"``), or the policy itself."""
    if not isinstance(shares, str):
        if not isinstance(shares, SharePolicy):
            raise ProblemError(
                "shares", f"is {shares!r}, must be a name, or an object with name and quotas()"
            )
        return shares
    known: dict[str, Callable[[], SharePolicy]] = {"balanced": BalancedShares, "equal": EqualShares}
    if shares not in known:
        raise ProblemError("shares", f"no policy {shares!r}; there are {sorted(known)}, or give an object")
    return known[shares]()


@lru_cache(maxsize=1)
def split_kernels() -> Any:
    """The compiled twins of the splits, loaded by the first call; None without Numba (the extra ``fast``)."""
    if importlib.util.find_spec("numba") is None:
        return None
    from moeless_opt.runtime.live.dispatch import _kernels

    return _kernels


def warm_split() -> bool:
    """Load the compiled kernels of the token split, as every dispatcher does; say whether there are any.

    Some seconds at the first call in an installation, when Numba compiles them. The split is the same with
    and without.
    """
    return split_kernels() is not None


def _whole(array: IntArray) -> IntArray:
    """As the kernels take it."""
    return np.require(array, np.int64, ("C", "W"))


def weighted_quotas(
    load_E: IntArray, weight_P: FloatArray, total_E: FloatArray, table: SlotTable
) -> IntArray:
    """Tokens in proportion to the slots' weights, whole by largest remainders; `total_E` are their sums."""
    if (kernels := split_kernels()) is not None:
        found_P: IntArray = kernels.planned_quotas(
            _whole(load_E), weight_P, total_E, table.replicas_E, table.to_slots_P
        )
        return found_P
    exact_P = load_E[table.expert_P] * weight_P / total_E[table.expert_P]
    return round_tokens(exact_P, table.expert_P, load_E)


class EqualShares:
    """Every replica of an expert serves the same number of tokens, up to one."""

    name = "equal"

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """See `SharePolicy.quotas`; the first replicas take the remainder."""
        if (kernels := split_kernels()) is not None:
            found_P: IntArray = kernels.equal_quotas(_whole(load_E), table.replicas_E, table.to_slots_P)
            return found_P
        nth_P = np.empty_like(table.expert_P)
        order = table.to_slots_P
        starts_E = np.cumsum(table.replicas_E) - table.replicas_E
        nth_P[order] = np.arange(order.size) - starts_E[table.expert_P[order]]
        whole, rest = np.divmod(load_E, table.replicas_E)
        quota_P: IntArray = whole[table.expert_P] + (nth_P < rest[table.expert_P])
        return quota_P


class PlannedShares(RankShares):
    """Shares fixed by a plan, rounded to whole tokens (largest remainders first).

    Parameters
    ----------
    share_LGC : array of float, shape [L, G, C]
        Fraction of the expert's tokens for each slot, in the slots' order of the plan that is in force.
    """

    name = "planned"

    def __init__(self, share_LGC: FloatArray, slots_LGC: SlotArray) -> None:
        share_LGC = floats("share_LGC", share_LGC)
        if share_LGC.ndim != 3 or share_LGC.shape != np.shape(slots_LGC):
            shapes = f"has shape {share_LGC.shape}, the slots have {np.shape(slots_LGC)}"
            raise ProblemError("share_LGC", f"{shapes}; both need [L, G, C]")
        self._ranks = share_LGC.shape[1]
        #: Tells these shares from others.
        self.digest = zlib.crc32(np.asarray(slots_LGC).tobytes(), zlib.crc32(np.asarray(share_LGC).tobytes()))
        self._of = [
            {
                (int(e), g): float(s)
                for g, row in enumerate(layer)
                for e, s in zip(row, share[g], strict=True)
                if e >= 0
            }
            for layer, share in zip(slots_LGC, share_LGC, strict=True)
        ]
        self._known: dict[int, tuple[SlotTable, FloatArray, FloatArray]] = {}

    def check(self, layers: int, ranks: int) -> None:
        """See `RankShares.check`."""
        if (len(self._of), self._ranks) != (layers, ranks):
            raise ProblemError(
                "share_LGC",
                f"has {len(self._of)} layers and {self._ranks} ranks, the model has {layers} and {ranks}",
            )

    def among(self, places: Sequence[int | None]) -> Self:
        """See `RankShares.among`."""
        now = {before: g for g, before in enumerate(places)}
        made = copy(self)
        made._of = [{(e, now[g]): s for (e, g), s in of.items() if g in now} for of in self._of]
        made._ranks, made._known = len(places), {}
        return made

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """See `SharePolicy.quotas`; slots that the plan does not know share what is left equally."""
        weight_P, total_E = self.weights(index, table)
        return weighted_quotas(load_E, weight_P, total_E, table)

    def weights(self, index: int, table: SlotTable) -> tuple[FloatArray, FloatArray]:
        """Weight of each slot, and their sum for each expert; worked out when a layer's table changes."""
        known = self._known.get(index)
        if known is not None and known[0] is table:
            return known[1:]
        of = self._of[index]
        pairs = zip(table.expert_P.tolist(), table.rank_P.tolist(), strict=True)
        weight_P: FloatArray = np.array([of.get(pair, 0.0) for pair in pairs])
        total_E = np.bincount(table.expert_P, weights=weight_P, minlength=table.experts)
        weight_P[total_E[table.expert_P] <= 0] = 1.0
        sum_E = np.bincount(table.expert_P, weights=weight_P, minlength=table.experts)
        weighted = table, weight_P, sum_E.astype(np.float64)
        self._known[index] = weighted
        return weighted[1:]


class BalancedShares(RankShares):
    """Water-filling: the replicas of each expert top up the least loaded of their GPUs.

    Expert after expert, heaviest first, an expert's tokens are taken back and poured again over the GPUs that
    hold it, until a sweep over all experts no longer lowers the fullest GPU. All arithmetic is on integers,
    so ranks cannot disagree by a rounding.

    Parameters
    ----------
    speed_G : sequence of int, optional
        Relative speeds of the group's ranks as whole numbers (e.g. per mille); equal by default.
    sweeps : int
        Most sweeps over the experts, at least one.
    """

    name = "balanced"

    def __init__(self, speed_G: Sequence[int] | None = None, sweeps: int = 4) -> None:
        self.speed_G = None if speed_G is None else [whole("speed_G", s, low=1) for s in speed_G]
        self.sweeps = whole("sweeps", sweeps, low=1, high=2**31 - 1)

    def check(self, layers: int, ranks: int) -> None:
        """See `RankShares.check`."""
        check_speeds(self.speed_G, ranks)

    def among(self, places: Sequence[int | None]) -> Self:
        """See `RankShares.among`; a rank of unknown speed counts as one of the mean speed."""
        if self.speed_G is None:
            return self
        mean = max(1, round(sum(self.speed_G) / len(self.speed_G)))
        return type(self)([mean if p is None else self.speed_G[p] for p in places], self.sweeps)

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """See `SharePolicy.quotas`."""
        check_speeds(self.speed_G, table.gpus)
        speed = self.speed_G or [1] * table.gpus
        # The compiled twin's numbers have 63 bits.
        small = int(load_E.sum()) * max(2**20, sum(speed)) < 2**62
        if small and (kernels := split_kernels()) is not None:
            found_P: IntArray = kernels.balanced_quotas(
                _whole(load_E),
                table.replicas_E,
                table.to_slots_P,
                table.rank_P,
                np.array(speed, dtype=np.int64),
                self.sweeps,
            )
            return found_P
        quota_P = load_E[table.expert_P]
        several = [int(e) for e in np.flatnonzero((table.replicas_E > 1) & (load_E > 0))]
        several.sort(key=lambda e: (-int(load_E[e]), e))
        one_P = table.replicas_E[table.expert_P] == 1
        busy: list[int] = (
            np.bincount(table.rank_P[one_P], weights=quota_P[one_P], minlength=table.gpus)
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
