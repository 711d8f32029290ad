"""How long an unused replica stays in memory: a fixed time, or one learnt from how long replicas were idle.

References
----------
Adaptive keep-alive follows the idle-time histograms of Shahrad et al., "Serverless in the Wild", USENIX
ATC 2020.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = ["AdaptiveKeepAlive", "FixedKeepAlive", "KeepAlive"]


class KeepAlive(Protocol):
    """How long an unused replica stays, by layer."""

    def idle(self, layer: IntArray, seconds: FloatArray) -> None:
        """Learn that replicas of these layers were idle for so long before they were used again."""

    def seconds_L(self, layers: int) -> FloatArray:
        """Keep-alive of each layer, shape [L]."""


class FixedKeepAlive:
    """The same time for every replica.

    Parameters
    ----------
    seconds : float
        At least 0: 0 releases a replica as soon as a pass does without it. May be infinite.
    """

    def __init__(self, seconds: float) -> None:
        if not (isinstance(seconds, int | float) and seconds >= 0):
            raise ProblemError("keep_alive", f"is {seconds!r}, must be a number of seconds of at least 0")
        self.seconds = float(seconds)

    def idle(self, layer: IntArray, seconds: FloatArray) -> None:
        """Learn nothing."""

    def seconds_L(self, layers: int) -> FloatArray:
        """The same for all layers."""
        return np.full(layers, self.seconds)


class AdaptiveKeepAlive:
    """The time within which most idle replicas of the layer were used again.

    Parameters
    ----------
    quantile : float
        Share of re-uses that should find the replica warm, above 0 and at most 1.
    low, high : float
        Range of the keep-alive, in seconds; `high` holds until a layer has shown 16 re-uses.
    bins : int
        Of the histogram of idle times, spaced evenly in the logarithm between 1 ms and 10 `high`.
    """

    LEARNT = 16

    def __init__(
        self, quantile: float = 0.9, *, low: float = 0.05, high: float = 60.0, bins: int = 64
    ) -> None:
        self.quantile = number("keep_alive.quantile", quantile, open_low=True)
        if self.quantile > 1:
            raise ProblemError("keep_alive.quantile", f"is {quantile!r}, must be above 0 and at most 1")
        self.low = number("keep_alive.low", low)
        self.high = number("keep_alive.high", high, low=self.low)
        self.edges = np.geomspace(1e-3, max(10 * self.high, 1e-2), whole("keep_alive.bins", bins, low=2))
        self._seen_LB: IntArray = np.zeros((0, self.edges.size + 1), dtype=np.int64)

    def idle(self, layer: IntArray, seconds: FloatArray) -> None:
        """Count idle times."""
        layers = int(layer.max(initial=-1)) + 1
        if layers > len(self._seen_LB):
            more = np.zeros((layers - len(self._seen_LB), self.edges.size + 1), dtype=np.int64)
            self._seen_LB = np.concatenate([self._seen_LB, more])
        np.add.at(self._seen_LB, (layer, np.searchsorted(self.edges, seconds)), 1)

    def seconds_L(self, layers: int) -> FloatArray:
        """Upper edge of the bin in which the quantile falls."""
        result = np.full(layers, self.high)
        known = min(layers, len(self._seen_LB))
        counts_LB = self._seen_LB[:known]
        total_L = counts_LB.sum(1)
        enough_L = total_L >= self.LEARNT
        reached_LB = np.cumsum(counts_LB, axis=1) >= np.ceil(self.quantile * total_L)[:, None]
        edge = np.append(self.edges, np.inf)[reached_LB.argmax(1)]
        result[:known] = np.where(enough_L, np.clip(edge, self.low, self.high), self.high)
        return result
