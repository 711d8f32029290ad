"""Live shares by the clock: how replicas share each batch, by tokens and activated experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.live import SlotTable
from moeless_opt.runtime.live.dispatch.shares import BalancedShares, weighted_quotas
from moeless_opt.solvers.timed import timed_shares

__all__ = ["TimedShares"]


class TimedShares:
    """Searches, for every batch, shares that make the slowest rank end soon (`solvers.timed`).

    Where reading an expert costs more than its tokens (decode) this uses fewer replicas than there are;
    `BalancedShares` uses them all, and is taken where it is quicker by the model. Ranks agree if their
    processors round alike, as equal machines do: the search is in floating point, the quotas are whole.

    Parameters
    ----------
    time : TimeModel
        Of a rank's experts; the same on every rank.
    per_token : float
        Time of the link per token of the busiest rank, in the same unit.
    speed_G : array, shape [G], optional
        Relative speeds; equal by default.
    kicks : int, optional
        Search effort, see `timed_shares`.
    """

    name = "timed"

    def __init__(
        self,
        time: TimeModel,
        *,
        per_token: float = 0.0,
        speed_G: ArrayLike | None = None,
        kicks: int | None = None,
    ) -> None:
        self.time, self.per_token, self.kicks = time, per_token, kicks
        self.speed_G: FloatArray | None = None if speed_G is None else np.asarray(speed_G, dtype=np.float64)
        mille = (
            None if self.speed_G is None else np.maximum(np.rint(1000 * self.speed_G), 1).astype(int).tolist()
        )
        self._balanced = BalancedShares(mille)
        self._tables: dict[int, TimeTable] = {}
        self._slots: dict[int, tuple[SlotTable, SlotArray]] = {}
        # The search is compiled, or read from the cache, at its first use: which must not be in a forward.
        self.quotas(
            0,
            np.ones(1, dtype=np.int64),
            SlotTable(np.zeros((2 if self.speed_G is None else self.speed_G.size, 1)), 1),
        )

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """See `SharePolicy.quotas`."""
        known = self._slots.get(index)
        if known is None or known[0] is not table:
            known = self._slots[index] = table, table.slots()[None]
        slots_1GC = known[1]
        most = slots_1GC.shape[2]
        if most not in self._tables:
            self._tables[most] = TimeTable.of(self.time, most, per_token=self.per_token)
        speed_G = np.ones(table.gpus) if self.speed_G is None else self.speed_G
        share_1GC, _ = timed_shares(
            load_E[None].astype(np.float64),
            slots_1GC,
            speed_G,
            self._tables[most],
            kicks=self.kicks,
        )
        # Filled slots stand first in a row: the flat slots are the rows one after the other.
        share_P = share_1GC[slots_1GC >= 0]
        searched_P = weighted_quotas(load_E, share_P, np.ones(table.experts), table)
        balanced_P = self._balanced.quotas(index, load_E, table)
        quicker = self._took(searched_P, table, speed_G) <= self._took(balanced_P, table, speed_G)
        return searched_P if quicker else balanced_P

    def _took(self, quota_P: IntArray, table: SlotTable, speed_G: FloatArray) -> float:
        """Time of the slowest rank."""
        tokens_G = np.bincount(table.rank_P, weights=quota_P, minlength=table.gpus)
        used_G = np.bincount(table.rank_P, weights=quota_P > 0, minlength=table.gpus)
        return float((self.time.time(tokens_G, used_G, speed_G) + self.per_token * tokens_G).max())
