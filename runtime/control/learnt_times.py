"""Expert times learnt from what GPUs took: a time model that is corrected while it plans.

A planner starts with a model that somebody had before: a fit after profiling, a data sheet. Every layer of
every pass then says how long a GPU took for so many tokens of so many experts. What is learnt is the ratio of
that to the prior model, on a grid of tokens an expert (32 points an octave, because kernels step) and of
activated experts: a mean that forgets after `MEMORY` observations of a point, so that noise settles and
clocks that change are followed. Points that were never seen take the ratios of those that were, near ones
first; times never fall with more tokens. Nothing is drawn by chance, and no clock is read: the same
observations give the same model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, floats, whole
from moeless_opt.problems.spec import TimeModel

__all__ = ["LearntTimes"]

MEMORY = 64.0
"""Observations of a point after which older ones are forgotten."""

PER_OCTAVE = 32
"""Points of the grid for each doubling of the tokens an expert."""

OCTAVES = 24
"""The largest number of tokens an expert that is told apart, as a power of two."""

FAR = 2.0
"""Octaves (of tokens an expert, or of experts) over which a ratio loses half of its weight to the prior."""

MOST = 64
"""Most activated experts that are told apart."""


class LearntTimes:
    """A prior time model, and what GPUs took by it.

    Parameters
    ----------
    prior : TimeModel
        What is believed before anything was seen.
    experts : int
        Most experts that a GPU activates in a layer.
    """

    def __init__(self, prior: TimeModel, experts: int) -> None:
        self.prior = prior
        most = min(whole("experts", experts, low=1), MOST)
        self.grid_X: FloatArray = np.arange(OCTAVES * PER_OCTAVE + 1) / PER_OCTAVE
        self.seen_XA: FloatArray = np.zeros((self.grid_X.size, most))
        self.ratio_XA: FloatArray = np.ones((self.grid_X.size, most))
        self._time: TimeModel | None = prior

    def see(
        self, tokens: ArrayLike, activated: ArrayLike, seconds: ArrayLike, speed: ArrayLike = 1.0
    ) -> None:
        """GPUs that served `tokens` with `activated` experts took `seconds`; arrays that broadcast together.

        `speed` is relative, as of a topology. Idle GPUs are passed over.
        """
        parts = np.broadcast_arrays(tokens, activated, seconds, speed)
        tokens_N, used_N, took_N, speed_N = (floats("seen", part).ravel() for part in parts)
        busy = (tokens_N > 0) & (used_N > 0) & (took_N > 0)
        if not busy.any():
            return
        tokens_N, used_N, took_N = tokens_N[busy], used_N[busy], took_N[busy] * speed_N[busy]
        ratio_N = took_N / np.maximum(self.prior.time(tokens_N, used_N, 1.0), 1e-300)
        at_N = np.clip(np.log2(tokens_N / used_N), 0.0, OCTAVES) * PER_OCTAVE
        low_N = np.minimum(at_N.astype(np.int64), self.grid_X.size - 2)
        column_N = np.minimum(used_N, self.seen_XA.shape[1]).astype(np.int64) - 1
        weight_XA, sum_XA = np.zeros_like(self.seen_XA), np.zeros_like(self.seen_XA)
        for step, part_N in ((0, 1 - (at_N - low_N)), (1, at_N - low_N)):
            np.add.at(weight_XA, (low_N + step, column_N), part_N)
            np.add.at(sum_XA, (low_N + step, column_N), part_N * ratio_N)
        all_XA = self.seen_XA + weight_XA
        known = all_XA > 0
        mean_XA = (self.seen_XA * self.ratio_XA + sum_XA)[known] / all_XA[known]
        self.ratio_XA[known] = mean_XA
        self.seen_XA = np.minimum(all_XA, MEMORY)
        self._time = None

    @property
    def time(self) -> TimeModel:
        """The model as it is known by now."""
        if self._time is None:
            self._time = self._made()
        return self._time

    def _made(self) -> TimeModel:
        most = self.seen_XA.shape[1]
        used_A = np.arange(1, most + 1, dtype=np.float64)
        grid_K = np.r_[0.0, 2.0**self.grid_X]
        ratio_XA = self._filled(used_A)
        prior_KA = self.prior.time(grid_K[:, None], used_A[None], 1.0)
        each_KA = np.log2(np.maximum(grid_K[:, None] / used_A, 1.0))
        ratio_KA = np.stack(
            [np.interp(each_KA[:, a], self.grid_X, ratio_XA[:, a]) for a in range(most)], axis=1
        )
        time_KA = prior_KA * ratio_KA
        # Between rising and falling hulls: noise does not make more tokens quicker.
        up_KA = np.maximum.accumulate(time_KA, axis=0)
        down_KA = np.minimum.accumulate(time_KA[::-1], axis=0)[::-1]
        time_KA = 0.5 * (up_KA + down_KA)
        if most == 1:  # a grid has two columns at least
            used_A, time_KA = np.array([1.0, 2.0]), np.repeat(time_KA, 2, axis=1)
        return TimeModel(
            curve_tokens=grid_K,
            curve_activated=used_A,
            curve_time=time_KA,
            unit=self.prior.unit,
            name=f"{self.prior.name}, learnt",
        )

    def _filled(self, used_A: FloatArray) -> FloatArray:
        """Ratios of all points: where nothing was seen, those of the nearest that were, and the prior's."""
        seen = np.argwhere(self.seen_XA > 0)
        if not len(seen):
            return self.ratio_XA
        filled_XA = np.empty_like(self.ratio_XA)
        octave_A = np.log2(used_A)
        for a, octave in enumerate(octave_A):
            weight_X, sum_X = np.full(self.grid_X.size, 0.0), np.zeros(self.grid_X.size)
            nearest_X = np.full(self.grid_X.size, np.inf)
            for b in np.unique(seen[:, 1]):
                known = self.seen_XA[:, b] > 0
                at_N = self.grid_X[known]
                value_X = np.interp(self.grid_X, at_N, self.ratio_XA[known, b])
                next_X = np.searchsorted(at_N, self.grid_X)
                left_X, right_X = at_N[np.maximum(next_X - 1, 0)], at_N[np.minimum(next_X, len(at_N) - 1)]
                away_X = np.minimum(abs(self.grid_X - left_X), abs(self.grid_X - right_X))
                away_X += abs(octave_A[b] - octave)
                near_X = 1.0 / (1e-9 + away_X**4)
                weight_X += near_X
                sum_X += near_X * value_X
                nearest_X = np.minimum(nearest_X, away_X)
            trust_X = 0.5 ** (nearest_X / FAR)
            filled_XA[:, a] = trust_X * sum_X / weight_X + (1 - trust_X)
        return filled_XA
