"""Affinity between layers, counted over tokens on recorded routes.

`Affinity` counts how often a token that chose expert e in layer l chose e' in layer l + d [1]_.

References
----------
.. [1] Yao et al.: Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference
   (ExFlow), 2024, arXiv 2401.08383.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, floats, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.predict.predictor import Context

__all__ = ["Affinity"]


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

    def predict(self, context: Context, distance: int) -> FloatArray:
        """Loads of layer l, each expert's handed on by its row."""
        return np.asarray(context.load_E @ self.chance_EE(context.layer, distance))

    def scores(self, context: Context, distance: int) -> FloatArray:
        """Sum of the rows of a token's experts."""
        if context.experts_TK is None:
            raise ProblemError("context.experts_TK", "is needed for scores of single tokens")
        return np.asarray(self.chance_EE(context.layer, distance)[context.experts_TK].sum(1))

    def observe(self, load_LE: FloatArray) -> None:
        """Nothing: transitions come from tokens, see `learn`."""
