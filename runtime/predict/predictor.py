"""What a predictor of expert loads is, and what it may look at.

A predictor says, when the tokens of a forward pass stand before the MoE layer l, how many of them every
expert of layer l + d will get. It may look at three things: the tokens' hidden states and the experts that
they chose in layer l (both in `Context`), and (by `Predictor.observe`) the loads of the passes before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray

__all__ = ["Context", "Predictor", "TokenPredictor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
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

    def predict(self, context: Context, distance: int) -> FloatArray:
        """Token-expert pairs of the experts of layer ``context.layer + distance`` in this pass, [E]."""

    def observe(self, load_LE: FloatArray) -> None:
        """Take note of the loads of a pass that has ended, [L, E]."""


@runtime_checkable
class TokenPredictor(Predictor, Protocol):
    """Predicts tokens one by one, and loads as their sum."""

    def scores(self, context: Context, distance: int) -> FloatArray:
        """How likely each token is to choose each expert, [T, E]; only the order within a row counts."""
