"""Live shares by the clock: how replicas share each batch, by tokens and activated experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.time_model import TimeModel
from moeless_opt.runtime.dispatch import whole_quotas
from moeless_opt.runtime.placement import SlotTable
from moeless_opt.solvers.timed import TimeTable, timed_shares

__all__ = ["TimedShares"]

Ints = NDArray[np.int64]


class TimedShares:
    """Searches, for every batch, shares that make the slowest rank end soon (`solvers.timed`).

    Where reading an expert costs more than its tokens (decode) this uses fewer replicas than there are;
    `BalancedShares` uses them all. Ranks agree if their processors round alike, as equal machines do: the
    search is in floating point, the quotas are whole.

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
        self.speed_G = None if speed_G is None else np.asarray(speed_G, dtype=np.float64)
        self._tables: dict[int, TimeTable] = {}

    def quotas(self, layer: int, load_E: Ints, table: SlotTable) -> Ints:
        """See `SharePolicy.quotas`."""
        most = max(len(row) for row in table.rows)
        if most not in self._tables:
            self._tables[most] = TimeTable.of(self.time, most, per_token=self.per_token)
        speed_G = np.ones(table.n_ranks) if self.speed_G is None else self.speed_G
        share_1GC, _ = timed_shares(
            load_E[None].astype(np.float64),
            table.slots()[None],
            speed_G,
            self._tables[most],
            kicks=self.kicks,
        )
        # Filled slots stand first in a row: the flat slots are the rows one after the other.
        share_P = np.concatenate([share_1GC[0, g, : len(row)] for g, row in enumerate(table.rows)])
        return whole_quotas(load_E[table.expert_P] * share_P, load_E, table)
