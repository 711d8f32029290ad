"""Predictors of expert loads: one interface, and those that need no model: history and affinity.

A predictor says, when the tokens of a forward pass stand before the MoE layer l, how many of them every
expert of layer l + d will get. It may look at three things, all in `Known`: the tokens' hidden states, the
experts that they chose in layer l, and (by `Predictor.observe`) the loads of the passes before. The gates
that look at hidden states are in `predictor_gates`; here are the baselines that they have to beat:

*history*: `LastWindow`, `Ewma`, `LinearTrend` and `AutoRegressive` forecast each layer's distribution from
the passes before. They know nothing of the pass at hand but its size.

*affinity*: `Affinity` counts, on recorded routes, how often a token that chose expert e in layer l chose e'
in layer l + d [1]_.

`Calibrated` corrects any predictor by its own past errors.

References
----------
.. [1] Yao et al.: Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference
   (ExFlow), 2024, arXiv 2401.08383.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, floats, number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = [
    "Affinity",
    "AutoRegressive",
    "Calibrated",
    "Ewma",
    "Known",
    "LastWindow",
    "LinearTrend",
    "Predictor",
    "TokenPredictor",
    "count_loads",
    "load_distance",
    "token_hits",
    "top_load_hits",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a predictor may look at: the pass at hand, at one layer.

    Parameters
    ----------
    layer : int
        Index l among the MoE layers.
    load_E : array [E]
        Token-expert pairs of layer l; of all ranks.
    experts_TK : array of int [T, K], optional
        Experts of each token in layer l.
    hidden : Tensor [..., H], optional
        Residual stream in front of the norm of MoE layer l, tokens in the same order.
    """

    layer: int
    load_E: FloatArray
    experts_TK: NDArray[Any] | None = None
    hidden: Any = None


@runtime_checkable
class Predictor(Protocol):
    """Predicts loads."""

    @property
    def name(self) -> str:
        """For tables."""

    def predict(self, known: Known, distance: int) -> FloatArray:
        """Token-expert pairs of the experts of layer ``known.layer + distance`` in this pass, [E]."""

    def observe(self, load_LE: FloatArray) -> None:
        """Take note of the loads of a pass that has ended, [L, E]."""


@runtime_checkable
class TokenPredictor(Predictor, Protocol):
    """Predicts tokens one by one, and loads as their sum."""

    def scores(self, known: Known, distance: int) -> FloatArray:
        """How likely each token is to choose each expert, [T, E]; only the order within a row counts."""


# ------------------------------------------------------------------------------------------- scores


def count_loads(experts_TLK: NDArray[Any], experts: int) -> FloatArray:
    """Token-expert pairs of each layer and expert, [L, E]."""
    layers = experts_TLK.shape[1]
    cell = experts_TLK.astype(np.int64) + (np.arange(layers) * experts)[:, None]
    return np.bincount(cell.ravel(), minlength=layers * experts).reshape(layers, experts).astype(np.float64)


def load_distance(predicted_E: FloatArray, actual_E: FloatArray) -> float:
    """Total-variation distance of two loads, each as a distribution over the experts.

    0: the same; 1: no expert in common. It is the share of the pairs that would have to be sent elsewhere.
    """
    if not predicted_E.sum() > 0 or not actual_E.sum() > 0:
        return 0.0 if predicted_E.sum() == actual_E.sum() else 1.0
    return float(0.5 * np.abs(predicted_E / predicted_E.sum() - actual_E / actual_E.sum()).sum())


def _top(score_E: FloatArray, k: int) -> NDArray[np.int64]:
    """Indices of the k largest, the smaller index first among equals."""
    return np.argsort(-score_E, axis=-1, kind="stable")[..., :k]


def top_load_hits(predicted_E: FloatArray, actual_E: FloatArray, k: int) -> float:
    """Share of the k most loaded experts that are among the k predicted to be (ties: the smaller index)."""
    return len(set(_top(predicted_E, k).tolist()) & set(_top(actual_E, k).tolist())) / k


def token_hits(score_TE: FloatArray, experts_TK: NDArray[Any]) -> float:
    """Share of the tokens' choices that are among each token's K highest scores."""
    guess_TK = _top(score_TE, experts_TK.shape[1])
    return float((experts_TK[:, :, None] == guess_TK[:, None, :]).any(2).mean())


# ------------------------------------------------------------------------------------------ history


class _History:
    """A forecast of each layer's distribution over its experts, scaled to the pass at hand."""

    name = "history"

    def __init__(self) -> None:
        self._share_LE: FloatArray | None = None

    def predict(self, known: Known, distance: int) -> FloatArray:
        """Forecast of the layer; before the first pass, an even load."""
        layer = known.layer + whole("distance", distance)
        if self._share_LE is None:
            share_E = np.full(len(known.load_E), 1 / len(known.load_E))
        elif layer >= len(self._share_LE):
            raise ProblemError(
                "distance", f"is {distance}, but layer {known.layer} is of {len(self._share_LE)}"
            )
        else:
            share_E = self._share_LE[layer]
        return np.asarray(share_E * known.load_E.sum())

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


class LastWindow(_History):
    """The next pass will be like the last `passes` together (each counts the same)."""

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self._recent: deque[FloatArray] = deque(maxlen=whole("passes", passes, low=1))
        self.name = "last" if passes == 1 else f"last {passes}"

    def _next(self, now_LE: FloatArray) -> FloatArray:
        self._recent.append(now_LE)
        return np.asarray(np.mean(self._recent, axis=0))


class Ewma(_History):
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


class LinearTrend(_History):
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


class AutoRegressive(_History):
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


# ----------------------------------------------------------------------------------------- affinity


class Affinity:
    """Transition counts between layers: P(expert e' in layer l + d | expert e in layer l).

    Parameters
    ----------
    layers, experts : int
        Of the model.
    furthest : int
        Largest distance.
    smoothing : float
        Pairs added to every row, spread as layer l + d's experts are used in all: a rare expert falls back on
        the average.
    """

    name = "affinity"

    def __init__(self, layers: int, experts: int, *, furthest: int = 5, smoothing: float = 16.0) -> None:
        self.layers = whole("layers", layers, low=1)
        self.experts = whole("experts", experts, low=1)
        self.furthest = whole("furthest", furthest, low=1)
        self.smoothing = number("smoothing", smoothing)
        self._count_DLEE = np.zeros((self.furthest, self.layers, self.experts, self.experts))
        self._chance: dict[tuple[int, int], FloatArray] = {}

    @classmethod
    def counted(cls, count_DLEE: NDArray[Any], *, smoothing: float = 16.0) -> Affinity:
        """From transitions that were counted before: `transitions_DLEE` of another."""
        furthest, layers, experts, _ = count_DLEE.shape
        affinity = cls(layers, experts, furthest=furthest, smoothing=smoothing)
        affinity._count_DLEE = floats("transitions", count_DLEE).copy()
        return affinity

    @property
    def transitions_DLEE(self) -> FloatArray:
        """Counts from expert to expert, at distance D + 1 from layer L."""
        return self._count_DLEE

    def learn(self, experts_TLK: NDArray[Any], *, decay: float = 1.0) -> Affinity:
        """Count the transitions of recorded tokens; older counts first shrink by `decay`.

        Raises
        ------
        ProblemError
            If the routes are of another model.
        """
        if experts_TLK.ndim != 3 or experts_TLK.shape[1] != self.layers:
            raise ProblemError("experts", f"must be [tokens, {self.layers}, K], got {experts_TLK.shape}")
        if experts_TLK.size and not 0 <= int(experts_TLK.min()) <= int(experts_TLK.max()) < self.experts:
            raise ProblemError("experts", f"must lie in 0..{self.experts - 1}")
        self._count_DLEE *= number("decay", decay)
        self._chance = {}
        routes = experts_TLK.astype(np.int64)
        for d in range(1, min(self.furthest, self.layers - 1) + 1):
            for layer in range(self.layers - d):
                cell = routes[:, layer, :, None] * self.experts + routes[:, layer + d, None, :]
                count = np.bincount(cell.ravel(), minlength=self.experts**2)
                self._count_DLEE[d - 1, layer] += count.reshape(self.experts, self.experts)
        return self

    def chance_EE(self, layer: int, distance: int) -> FloatArray:
        """P(next | now), rows sum to 1; even where nothing was learned."""
        if not 1 <= distance <= self.furthest or not 0 <= layer < self.layers - distance:
            raise ProblemError("distance", f"{distance} from layer {layer} of {self.layers} was not learned")
        if (layer, distance) not in self._chance:
            count_EE = self._count_DLEE[distance - 1, layer]
            use_E = count_EE.sum(0) + 1e-9
            smooth_EE = count_EE + max(self.smoothing, 1e-9) * use_E / use_E.sum()
            self._chance[layer, distance] = smooth_EE / smooth_EE.sum(1, keepdims=True)
        return self._chance[layer, distance]

    def predict(self, known: Known, distance: int) -> FloatArray:
        """Loads of layer l, each expert's handed on by its row."""
        return np.asarray(known.load_E @ self.chance_EE(known.layer, distance))

    def scores(self, known: Known, distance: int) -> FloatArray:
        """Sum of the rows of a token's experts."""
        if known.experts_TK is None:
            raise ProblemError("known.experts_TK", "is needed for scores of single tokens")
        return np.asarray(self.chance_EE(known.layer, distance)[known.experts_TK].sum(1))

    def observe(self, load_LE: FloatArray) -> None:
        """Nothing: transitions come from tokens, see `learn`."""


# -------------------------------------------------------------------------------------- calibration


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

    def predict(self, known: Known, distance: int) -> FloatArray:
        """Predict, corrected and with the same total."""
        raw_E = self.inner.predict(known, distance)
        self._said[known.layer, distance] = raw_E
        if (known.layer, distance) not in self._sums:
            return raw_E
        came_E, said_E = self._sums[known.layer, distance]
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
