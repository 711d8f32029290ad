"""Predictors that need no model: forecasts from the passes before, and corrections by past errors.

`LastWindow`, `Ewma`, `LinearTrend` and `AutoRegressive` forecast each layer's distribution from the passes
before. They know nothing of the pass at hand but its size: the baselines that gates have to beat.
`Calibrated` corrects any predictor by its own past errors.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from moeless_opt.problems.arrays import FloatArray, floats, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.predict.predictor import Context, Predictor

__all__ = ["AutoRegressive", "Calibrated", "Ewma", "HistoryForecast", "LastWindow", "LinearTrend"]


class HistoryForecast:
    """A forecast of each layer's distribution over its experts, scaled to the pass at hand."""

    name = "history"

    def __init__(self) -> None:
        self._share_LE: FloatArray | None = None

    @property
    def share_LE(self) -> FloatArray | None:
        """Forecast of each layer's distribution, shape [L, E]; None before the first pass."""
        return self._share_LE

    def predict(self, context: Context, distance: int) -> FloatArray:
        """Forecast of the layer; before the first pass, an even load."""
        layer = context.layer + whole("distance", distance)
        if self._share_LE is None:
            share_E = np.full(len(context.load_E), 1 / len(context.load_E))
        elif layer >= len(self._share_LE):
            raise ProblemError(
                "distance", f"is {distance}, but layer {context.layer} is of {len(self._share_LE)}"
            )
        else:
            share_E = self._share_LE[layer]
        return np.asarray(share_E * context.load_E.sum())

    def observe(self, load_LE: FloatArray) -> None:
        """Learn from a pass that has ended; a layer without load leaves its forecast as it was."""
        load_LE = floats("load", load_LE)
        total_L1 = load_LE.sum(1, keepdims=True)
        before_LE = np.full_like(load_LE, 1 / load_LE.shape[1]) if self._share_LE is None else self._share_LE
        now_LE = np.where(total_L1 > 0, load_LE / np.where(total_L1 > 0, total_L1, 1), before_LE)
        forecast_LE = np.maximum(self._next(now_LE), 0.0)
        self._share_LE = forecast_LE / forecast_LE.sum(1, keepdims=True)

    def _next(self, now_LE: FloatArray) -> FloatArray:
        raise NotImplementedError


class LastWindow(HistoryForecast):
    """The next pass will be like the last `passes` together (each counts the same)."""

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self._recent: deque[FloatArray] = deque(maxlen=whole("passes", passes, low=1))
        self.name = "last" if passes == 1 else f"last {passes}"

    def _next(self, now_LE: FloatArray) -> FloatArray:
        self._recent.append(now_LE)
        return np.asarray(np.mean(self._recent, axis=0))


class Ewma(HistoryForecast):
    """Exponentially weighted mean of the passes so far.

    Parameters
    ----------
    weight : float in (0, 1]
        Of the newest pass; 1 is `LastWindow`.
    """

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        self.weight = number("weight", weight, open_low=True)
        if self.weight > 1:
            raise ProblemError("weight", f"is {weight}, must be at most 1")
        self._mean_LE: FloatArray | None = None
        self.name = f"ewma {weight:g}"

    def _next(self, now_LE: FloatArray) -> FloatArray:
        mean_LE = now_LE if self._mean_LE is None else self._mean_LE
        self._mean_LE = mean_LE + self.weight * (now_LE - mean_LE)
        return self._mean_LE


class LinearTrend(HistoryForecast):
    """The least-squares line through the last `passes`, one pass ahead."""

    def __init__(self, passes: int = 6) -> None:
        super().__init__()
        self._recent: deque[FloatArray] = deque(maxlen=whole("passes", passes, low=2))
        self.name = f"trend {passes}"

    def _next(self, now_LE: FloatArray) -> FloatArray:
        self._recent.append(now_LE)
        past_PLE = np.stack(self._recent)
        step_P = np.arange(len(past_PLE)) - (len(past_PLE) - 1) / 2
        spread = float(step_P @ step_P)
        slope_LE = np.tensordot(step_P, past_PLE, 1) / spread if spread else np.zeros_like(now_LE)
        # the next pass is half a window and a half step beyond the middle
        return np.asarray(past_PLE.mean(0) + slope_LE * (len(past_PLE) + 1) / 2)


class AutoRegressive(HistoryForecast):
    """AR(1): the last pass, drawn towards the long-run mean as far as past passes were.

    The mean is an exponential one; the coefficient of a layer is its lag-one autocorrelation, pooled over the
    experts and clipped to 0..1.

    Parameters
    ----------
    weight : float in (0, 1]
        Of the newest pass in the long-run mean.
    """

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__()
        self._long = Ewma(weight)
        self._before_LE: FloatArray | None = None
        self._power_L: FloatArray | float = 0.0
        self._product_L: FloatArray | float = 0.0
        self.name = "ar(1)"

    def _next(self, now_LE: FloatArray) -> FloatArray:
        if self._before_LE is not None and self._long._mean_LE is not None:
            old_LE, new_LE = self._before_LE - self._long._mean_LE, now_LE - self._long._mean_LE
            self._power_L = self._power_L + (old_LE**2).sum(1)
            self._product_L = self._product_L + (old_LE * new_LE).sum(1)
        mean_LE = self._long._next(now_LE)
        self._before_LE = now_LE
        power_L = np.broadcast_to(self._power_L, len(now_LE))
        known_L = power_L > 0  # until then: the last pass
        phi_L = np.where(known_L, self._product_L / np.where(known_L, power_L, 1), 1).clip(0, 1)
        return np.asarray(mean_LE + phi_L[:, None] * (now_LE - mean_LE))


class Calibrated:
    """Another predictor, each expert scaled by what it was mispredicted by in the passes before.

    A gate that is replayed too early favours some experts and slights others, steadily: actual over predicted
    load, both as exponentially weighted sums, says by how much.

    Parameters
    ----------
    inner : Predictor
        What is corrected.
    weight : float in (0, 1]
        Of the newest pass.
    caution : float
        Share of a mean expert's load that is added above and below before dividing: experts that are seldom
        seen are hardly corrected.
    """

    def __init__(self, inner: Predictor, *, weight: float = 0.1, caution: float = 0.25) -> None:
        self.inner = inner
        self.weight = number("weight", weight, open_low=True)
        self.caution = number("caution", caution, open_low=True)
        self.name = f"{inner.name} calibrated"
        self._said: dict[tuple[int, int], FloatArray] = {}
        self._sums: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}

    def predict(self, context: Context, distance: int) -> FloatArray:
        """Predict, corrected and with the same total."""
        raw_E = self.inner.predict(context, distance)
        self._said[context.layer, distance] = raw_E
        if (context.layer, distance) not in self._sums:
            return raw_E
        came_E, said_E = self._sums[context.layer, distance]
        some = self.caution * said_E.mean() + 1e-12
        corrected_E = raw_E * (came_E + some) / (said_E + some)
        return np.asarray(corrected_E * (raw_E.sum() / max(float(corrected_E.sum()), 1e-12)))

    def observe(self, load_LE: FloatArray) -> None:
        """Compare what was said with what came."""
        for (layer, distance), said_E in self._said.items():
            pair = (load_LE[layer + distance], said_E)
            if pair[0].sum() > 0 and pair[1].sum() > 0:
                now = [x / x.sum() for x in pair]
                old = self._sums.get((layer, distance), (now[0], now[1]))
                came_E, told_E = (o + self.weight * (n - o) for o, n in zip(old, now, strict=True))
                self._sums[layer, distance] = (came_E, told_E)
        self._said = {}
        self.inner.observe(load_LE)
