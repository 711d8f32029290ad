"""Live shares by the clock: how replicas share each batch, by tokens and activated experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray, floats, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.live import SlotTable
from moeless_opt.runtime.live.dispatch.shares import BalancedShares, RankShares, check_speeds

__all__ = ["TimedShares"]

#: Relative speeds that are taken.
SLOWEST, FASTEST = 1e-100, 1e15


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """The search, compiled (or read from the cache) where Numba is: which must not be in a forward."""
    from moeless_opt.runtime.live.dispatch import _timed_kernels

    return _timed_kernels


def shakes(experts: int) -> int:
    """How often the search is shaken by default: more often where a layer has few experts."""
    return min(16, max(4, 128 // experts))


class TimedShares(RankShares):
    """Searches, for every batch, quotas that make the slowest rank end soon.

    Where reading an expert costs more than its tokens (decode) this uses fewer replicas than there are;
    `BalancedShares` uses them all, and is what the search starts from, beside whole experts: it never takes
    longer, by the model. It is the search of `solvers.timed` for whole tokens and for experts that have a
    choice. Ranks agree if their processors round alike, as all with IEEE 754 do.

    Parameters
    ----------
    time : TimeModel
        Of a rank's experts; the same on every rank.
    per_token : float
        Time of the link per token of the busiest rank, in the same unit.
    speed_G : array, shape [G], optional
        Relative speeds; equal by default.
    kicks : int, optional
        Search effort: how often the best is shaken and improved again; 4 to 16 by default.
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
        if not isinstance(time, TimeModel):
            raise ProblemError("time", f"is {time!r}, must be a TimeModel")
        self.time, self.per_token = time, number("per_token", per_token)
        self.kicks = None if kicks is None else whole("kicks", kicks, high=2**31 - 1)
        self.speed_G: FloatArray | None = None
        if speed_G is not None:
            self.speed_G = floats("speed_G", speed_G, open_low=True).copy()  # kernels take no read-only ones
            if self.speed_G.ndim != 1:
                raise ProblemError("speed_G", f"has {self.speed_G.ndim} axes, must have one")
            for g, speed in enumerate(self.speed_G):
                # Times must be finite, and thousandths whole numbers of 64 bits.
                if not SLOWEST <= speed <= FASTEST:
                    between = f"is {speed}, must be from {SLOWEST:g} to {FASTEST:g}: speeds are relative"
                    raise ProblemError(f"speed_G[{g}]", between)
        mille = (
            None if self.speed_G is None else np.maximum(np.rint(1000 * self.speed_G), 1).astype(int).tolist()
        )
        self.balanced = BalancedShares(mille)
        self._tables: dict[int, tuple[FloatArray, FloatArray]] = {}
        _kernels()

    def check(self, layers: int, ranks: int) -> None:
        """See `RankShares.check`."""
        check_speeds(self.speed_G, ranks)

    def among(self, places: Sequence[int | None]) -> Self:
        """See `RankShares.among`; a rank of unknown speed counts as one of the mean speed."""
        known = self.speed_G
        if known is None:
            return self
        speed_G = [known.mean() if p is None else known[p] for p in places]
        return type(self)(self.time, per_token=self.per_token, speed_G=speed_G, kicks=self.kicks)

    def quotas(self, index: int, load_E: IntArray, table: SlotTable) -> IntArray:
        """See `SharePolicy.quotas`."""
        knot_K, table_2AK = self.times(table)
        found_P: IntArray = _kernels().timed_quotas(
            np.require(load_E, np.int64, ("C", "W")),
            self.balanced.quotas(index, load_E, table),
            table.replicas_E,
            table.to_slots_P,
            table.rank_P,
            self.rates(table),
            knot_K,
            table_2AK,
            self.effort(table),
        )
        return found_P

    def times(self, table: SlotTable) -> tuple[FloatArray, FloatArray]:
        """The time model, up to the most experts that a rank of the table can activate.

        Returns
        -------
        array, shape [K]
            Tokens at the knots.
        array, shape [2, A, K]
            Times of A activated experts (from 0) there, and slopes behind them.
        """
        most = max(map(len, table.rows))
        if most not in self._tables:
            times = TimeTable.of(self.time, most, per_token=self.per_token)
            slope_AK = np.diff(times.table_AK, axis=1) / np.diff(times.knot_K)
            # Behind the last knot the last slope goes on.
            slope_AK = np.concatenate((slope_AK, slope_AK[:, -1:]), axis=1)
            # The kernels take no read-only arrays, which those of a curve are.
            self._tables[most] = times.knot_K.astype(np.float64), np.stack((times.table_AK, slope_AK))
        return self._tables[most]

    def rates(self, table: SlotTable) -> FloatArray:
        """Relative speeds of the table's ranks."""
        check_speeds(self.speed_G, table.gpus)
        return np.ones(table.gpus) if self.speed_G is None else self.speed_G

    def effort(self, table: SlotTable) -> int:
        """How often the best is shaken."""
        return shakes(table.experts) if self.kicks is None else self.kicks
