"""How long a GPU takes for its part of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, Record, floats, number
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.architecture import ModelSpec

__all__ = ["TOKENS", "TimeModel"]


_MOST = 1e30  # products with loads and sums of them still are finite


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TimeModel(Record):
    """Time of one GPU in one layer from its tokens and the experts that it activates.

    ``time = (launch + activation_cost * activated + token_cost * tokens) / speed``,
    or a measured curve over (tokens, activated experts) in place of the bracket.

    Parameters
    ----------
    token_cost : float
        Per token-expert pair. The default, 1 with all else 0, counts tokens only.
    activation_cost : float
        Per replica that serves at least one token: in decode, reading an expert's weights costs
        more than its few tokens.
    launch : float
        Per layer, paid even by an idle GPU.
    curve_tokens, curve_activated : array, shapes [K], [J], optional
        Grid of a measured curve, increasing.
    curve_time : array, shape [K, J], optional
        Measured times on the grid. Between grid points bilinear; beyond the last token count the
        last segment is continued; counts of activated experts are clipped to the grid.
    unit : str
        ``"tokens"`` or ``"s"``: what a time is measured in.
    name : str
        Where the figures come from.
    """

    token_cost: float = 1.0
    activation_cost: float = 0.0
    launch: float = 0.0
    curve_tokens: FloatArray | None = None
    curve_activated: FloatArray | None = None
    curve_time: FloatArray | None = None
    unit: str = "tokens"
    name: str = "tokens"

    def __post_init__(self) -> None:
        for key in ("token_cost", "activation_cost", "launch"):
            value = number(f"time.{key}", getattr(self, key))
            if value > _MOST:
                raise ProblemError(f"time.{key}", f"is {value:g}, must be at most {_MOST:g}")
            object.__setattr__(self, key, value)
        if not isinstance(self.name, str):
            raise ProblemError("time.name", f"is {self.name!r}, must be a string")
        if self.unit not in ("tokens", "s"):
            raise ProblemError("time.unit", f"is {self.unit!r}, must be 'tokens' or 's'")
        curve = (self.curve_tokens, self.curve_activated, self.curve_time)
        if all(part is None for part in curve):
            if self.token_cost == 0 and self.activation_cost == 0:
                raise ProblemError("time.token_cost", "is 0 with no activation cost; one must be above 0")
            return
        if any(part is None for part in curve):
            raise ProblemError("time.curve", "needs all of curve_tokens, curve_activated and curve_time")
        if (self.token_cost, self.activation_cost, self.launch) != (1.0, 0.0, 0.0):
            raise ProblemError(
                "time.curve", "replaces token_cost, activation_cost and launch; give one or the other"
            )
        for key in ("curve_tokens", "curve_activated", "curve_time"):
            object.__setattr__(self, key, floats(f"time.{key}", getattr(self, key)))
        tokens, activated, time = self._curve()
        for key, array in (("curve_tokens", tokens), ("curve_activated", activated), ("curve_time", time)):
            if array.size and float(array.max()) > _MOST:
                raise ProblemError(f"time.{key}", f"reaches {array.max():g}, must be at most {_MOST:g}")
        for key, axis in (("curve_tokens", tokens), ("curve_activated", activated)):
            if axis.ndim != 1 or axis.size < 2 or not (np.diff(axis) > 0).all():
                raise ProblemError(f"time.{key}", "must be a strictly increasing list of at least 2 numbers")
        if time.shape != (tokens.size, activated.size):
            raise ProblemError(
                "time.curve_time", f"has shape {time.shape}, must be {(tokens.size, activated.size)}"
            )

    @classmethod
    def roofline(cls, model: ModelSpec, *, flops: float, bandwidth: float, launch: float = 0.0) -> TimeModel:
        """Times in seconds from a GPU's attained speed: arithmetic per token, one read of each used expert.

        A model of first order, for when nothing was measured: a token costs its multiply-adds, an activated
        expert the reading of its weights.

        Parameters
        ----------
        model : ModelSpec
            Gives an expert's weights and bytes.
        flops : float
            Floating-point operations per second that the GPU attains on expert matrices.
        bandwidth : float
            Bytes per second that it reads from its memory.
        launch : float
            Seconds per layer for launching kernels.
        """
        floats("time.flops", flops, open_low=True)
        floats("time.bandwidth", bandwidth, open_low=True)
        return cls(
            token_cost=2.0 * model.matrices * model.hidden * model.ffn / flops,
            activation_cost=model.expert_bytes / bandwidth,
            launch=launch,
            unit="s",
            name=f"{model.name} at {flops:.3g} FLOP/s and {bandwidth:.3g} B/s",
        )

    def _curve(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        assert self.curve_tokens is not None
        assert self.curve_activated is not None
        assert self.curve_time is not None
        return self.curve_tokens, self.curve_activated, self.curve_time

    @property
    def has_curve(self) -> bool:
        """Whether a measured curve replaces the linear form."""
        return self.curve_time is not None

    @property
    def counts_tokens_only(self) -> bool:
        """Whether time is proportional to tokens, so that perfect token balance is perfect balance."""
        return not self.has_curve and self.activation_cost == 0 and self.launch == 0

    def linear(self, tokens: float) -> TimeModel:
        """The linear model nearest to a measured curve up to so many tokens; a linear model is its own."""
        if not self.has_curve:
            return self
        grid_K, grid_J, time_KJ = self._curve()
        used, read = np.meshgrid(grid_J, grid_K[grid_K <= max(tokens, float(grid_K[1]))])
        columns = np.stack([np.ones(read.size), used.ravel(), read.ravel()], axis=1)
        (launch, activation, token), *_ = np.linalg.lstsq(columns, time_KJ[: len(read)].ravel(), rcond=None)
        return TimeModel(
            token_cost=max(float(token), 1e-12),
            activation_cost=max(float(activation), 0.0),
            launch=max(float(launch), 0.0),
            unit=self.unit,
            name=f"{self.name}, made linear",
        )

    def time(self, tokens: ArrayLike, activated: ArrayLike, speed: ArrayLike) -> FloatArray:
        """Times of GPUs, elementwise over arrays that broadcast together.

        Parameters
        ----------
        tokens : array of float
            Token-expert pairs that the GPU serves.
        activated : array of int
            Replicas on the GPU that serve at least one token.
        speed : array of float
            Relative speed.

        Returns
        -------
        array of float
            In the model's `unit`.
        """
        tokens = np.asarray(tokens, dtype=np.float64)
        if self.counts_tokens_only:
            work: Any = tokens if self.token_cost == 1.0 else self.token_cost * tokens
        elif not self.has_curve:
            work = self.launch + self.activation_cost * np.asarray(activated) + self.token_cost * tokens
        else:
            work = self._interpolate(tokens, np.asarray(activated, dtype=np.float64))
        result: FloatArray = work / np.asarray(speed, dtype=np.float64)
        return result

    def _interpolate(self, tokens: FloatArray, activated: FloatArray) -> FloatArray:
        grid_K, grid_J, time_KJ = self._curve()
        tokens, activated = np.broadcast_arrays(tokens, activated)
        k = np.clip(np.searchsorted(grid_K, tokens, side="right") - 1, 0, grid_K.size - 2)
        j = np.clip(np.searchsorted(grid_J, activated, side="right") - 1, 0, grid_J.size - 2)
        # Below the first grid point the first value holds; above the last, the last slope goes on.
        along_K = np.maximum((tokens - grid_K[k]) / (grid_K[k + 1] - grid_K[k]), 0.0)
        along_J = np.clip((activated - grid_J[j]) / (grid_J[j + 1] - grid_J[j]), 0.0, 1.0)
        low = time_KJ[k, j] * (1 - along_J) + time_KJ[k, j + 1] * along_J
        high = time_KJ[k + 1, j] * (1 - along_J) + time_KJ[k + 1, j + 1] * along_J
        result: FloatArray = low + (high - low) * along_K
        return result


TOKENS = TimeModel()
"""Time is tokens over speed: the default."""
