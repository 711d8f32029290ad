"""A plan's shares as a dispatch table: of every expert a list of slots, each as often as its share says.

An engine that sends token i of a batch to entry ``hash(i) % count`` of such a list serves any shares, though
it knows replicas of equal weight alone. Two things decide how soon a small batch meets the shares:

- which entries the tokens 0, 1, 2, ... of a batch meet: ``(i * 2654435769 mod 2**32) % count`` in vLLM (0.33,
  ``fused_moe/router/base_router.py``; Knuth 1973, section 6.4), which for a power of two is a permutation;
- in which order the slots stand there: as a schedule that at no time has given a slot one token too many or
  too few (Tijdeman 1980, "The chairman assignment problem"). With two replicas it is never off by more than
  half a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import MOST_ENTRIES, Problem, replica_counts
from moeless_opt.solvers.shares.entries import entry_shares, kernels
from moeless_opt.solvers.shares.rounding import round_tokens

__all__ = ["ShareTable", "share_table"]

_MULTIPLIER = 2654435769
_LOOKED = 64  # times as many tokens as entries are looked at for the order in which the entries are met


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShareTable:
    """Slots of every expert, each as often as its share says.

    Attributes
    ----------
    slot_LEN : array of int32, shape [L, E, N]
        Physical slots (GPU times slots per GPU, plus the slot's place there); -1 from the count on.
    count_LE : array of int32, shape [L, E]
        Entries in use: the fewest that give these shares, 1 for an expert with one serving replica.
    """

    slot_LEN: SlotArray
    count_LE: SlotArray


def share_table(plan: Plan, entries: int | None = None) -> ShareTable:
    """The dispatch table of a plan.

    Parameters
    ----------
    plan : Plan
        With an equal split every slot stands there once. A fractional split's shares are taken as they are
        where they are multiples of ``1 / entries``, and are rounded to such where they are not: so that the
        largest GPU time is least where the plan knows its problem, else by largest remainders.
    entries : int, optional
        Entries of an expert, N. Without it those of the plan's problem, or with an equal split as many as
        its most replicated expert has replicas.

    Returns
    -------
    ShareTable
        Token 0, 1, 2, ... of a batch meets the entries in an order that keeps to the shares from the first.

    Raises
    ------
    ProblemError
        If `entries` is missing, out of range, or fewer than the replicas of an evenly split expert.
    """
    slots_LGC, experts = plan.slots_LGC, plan.experts
    layers = len(slots_LGC)
    even = plan.split != "fractional"
    most = int(replica_counts(slots_LGC, experts).max())
    if entries is None:
        entries = most if even else plan.share_entries
    if entries is None:
        raise ProblemError("entries", "is missing: a fractional split needs a number of entries")
    entries = whole("entries", entries, low=1, high=MOST_ENTRIES)
    if even and entries < most:
        raise ProblemError("entries", f"is {entries}, must be at least {most}, the replicas of an expert")
    where_R = np.nonzero(slots_LGC >= 0)
    key_R = where_R[0] * experts + slots_LGC[where_R]
    order_R = np.argsort(key_R, kind="stable")
    where_R, key_R = tuple(axis[order_R] for axis in where_R), key_R[order_R]
    slot_R = where_R[1] * slots_LGC.shape[2] + where_R[2]
    count_R = np.ones_like(key_R) if even else _whole_counts(plan, entries, where_R, key_R)
    slot_KR, count_KR = _rows(key_R, slot_R, count_R, layers * experts)
    count_KR //= np.gcd.reduce(count_KR, axis=1)[:, None]
    total_K = count_KR.sum(1)
    table_KN = np.full((layers * experts, entries), -1, dtype=np.int32)
    for total in np.unique(total_K).tolist():
        rows = np.flatnonzero(total_K == total)
        pick_TK = _schedule(count_KR[rows], total)
        table_KN[rows[:, None], met_order(total)[None, :]] = slot_KR[rows[:, None], pick_TK.T]
    return ShareTable(
        slot_LEN=table_KN.reshape(layers, experts, entries),
        count_LE=total_K.reshape(layers, experts).astype(np.int32),
    )


def _whole_counts(plan: Plan, entries: int, where_R: tuple[IntArray, ...], key_R: IntArray) -> IntArray:
    """Entries of each replica of a fractional split."""
    exact_R = plan.share_LGC[where_R] * entries
    count_R = np.rint(exact_R).astype(np.int64)
    if (np.abs(exact_R - count_R) <= 1e-6).all():
        return count_R
    problem = plan.made_for
    if isinstance(problem, Problem):
        speed_G = problem.topology.speed_G
        share_LGC = entry_shares(problem.load_LE, plan.slots_LGC, plan.share_LGC, entries, speed_G)
        return np.rint(share_LGC[where_R] * entries).astype(np.int64)
    return round_tokens(exact_R, key_R, np.full(len(plan.slots_LGC) * plan.experts, entries, dtype=np.int64))


def _rows(key_R: IntArray, slot_R: IntArray, count_R: IntArray, rows: int) -> tuple[IntArray, IntArray]:
    """Slots and counts by expert, [layers x experts, replicas].

    The replicas are rotated from one expert to the next: of equal ones the first is served first, and that
    shall not always be the one on the first GPU.
    """
    replicas_K = np.bincount(key_R, minlength=rows)
    start_K = np.cumsum(replicas_K) - replicas_K
    turn_K = np.cumsum(replicas_K > 1)
    place_R = (np.arange(len(key_R)) - start_K[key_R] + turn_K[key_R]) % replicas_K[key_R]
    slot_KR, count_KR = np.zeros((2, rows, int(replicas_K.max())), dtype=np.int64)
    slot_KR[key_R, place_R], count_KR[key_R, place_R] = slot_R, count_R
    return slot_KR, count_KR


def _schedule(count_KR: IntArray, total: int) -> IntArray:
    """Which replica is served at each step, shape [total, K]; at no step is one off by a whole token."""
    twin = kernels("auto", count_KR.size * total // 8)  # a step is about an eighth of a replica's search
    if twin is not None:
        pick_TK = np.zeros((total, len(count_KR)), dtype=np.int64)
        twin.schedule(np.ascontiguousarray(count_KR), total, pick_TK)
        return pick_TK
    given_KR = np.zeros_like(count_KR)
    spread_K1 = np.maximum(2 * (count_KR > 0).sum(1, keepdims=True) - 2, 1)
    pick_TK = np.zeros((total, len(count_KR)), dtype=np.int64)
    row_K = np.arange(len(count_KR))
    ahead_KR = (1.0 - 1.0 / spread_K1) * total / np.maximum(count_KR, 1)
    pace_KR = total / np.maximum(count_KR, 1)
    for step in range(1, total + 1):
        ready_KR = spread_K1 * (count_KR * step - given_KR * total) >= total
        due_KR: FloatArray = np.where(ready_KR & (count_KR > 0), given_KR * pace_KR + ahead_KR, np.inf)
        pick_TK[step - 1] = due_KR.argmin(1)
        given_KR[row_K, pick_TK[step - 1]] += 1
    return pick_TK


def met_order(count: int) -> IntArray:
    """Entries in the order in which the tokens 0, 1, 2, ... of a batch first meet them, shape [count]."""
    token = np.arange(_LOOKED * count, dtype=np.uint64)
    met = (token * np.uint64(_MULTIPLIER) & np.uint64(0xFFFFFFFF)) % np.uint64(count)
    entry, first = np.unique(met.astype(np.int64), return_index=True)
    missed = np.setdiff1d(np.arange(count), entry)
    return np.concatenate([entry[np.argsort(first)], missed])
