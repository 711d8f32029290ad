"""How far a prediction is from what came: of loads, of the most loaded experts, of single tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray

__all__ = ["count_loads", "load_distance", "token_hits", "top_load_hits"]


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


def _top(score_E: FloatArray, k: int) -> IntArray:
    """Indices of the k largest, the smaller index first among equals."""
    return np.argsort(-score_E, axis=-1, kind="stable")[..., :k]


def top_load_hits(predicted_E: FloatArray, actual_E: FloatArray, k: int) -> float:
    """Share of the k most loaded experts that are among the k predicted to be (ties: the smaller index)."""
    return len(set(_top(predicted_E, k).tolist()) & set(_top(actual_E, k).tolist())) / k


def token_hits(score_TE: FloatArray, experts_TK: NDArray[Any]) -> float:
    """Share of the tokens' choices that are among each token's K highest scores."""
    guess_TK = _top(score_TE, experts_TK.shape[1])
    return float((experts_TK[:, :, None] == guess_TK[:, None, :]).any(2).mean())
