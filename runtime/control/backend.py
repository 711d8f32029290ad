"""What a controller needs from whatever runs the experts: a live model or a simulation. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError

__all__ = ["Backend", "LayerBackend", "LoadWindow", "MemoryReport", "Observation", "SpeedBackend"]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an expert-parallel group did since it was last asked.

    Parameters
    ----------
    load_LE : array of int64, shape [L, E]
        Real tokens routed to each expert, over all ranks; padding and dummies are left out.
    tokens_LG : array of int64, shape [L, G]
        Rows that each rank's experts were given, for whatever tokens (also padding and dummies).
    seconds_LG : array of float, shape [L, G]
        Time that each rank spent in the experts of each layer.
    batches : int
        Forward passes.
    even : float, optional
        How many passes of one size would be as these: all their pairs, squared, over the squares of each's.
        `batches` where a backend does not know.
    """

    load_LE: IntArray
    tokens_LG: IntArray
    seconds_LG: FloatArray
    batches: int
    even: float | None = None

    @property
    def imbalance_L(self) -> FloatArray:
        """Largest over mean rows per rank, by layer (1 is perfect)."""
        mean_L = self.tokens_LG.mean(axis=1)
        result: FloatArray = np.where(mean_L > 0, self.tokens_LG.max(axis=1) / np.maximum(mean_L, 1e-12), 1.0)
        return result


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes of experts on each rank.

    Parameters
    ----------
    live_G : array of int64
        Experts in force.
    held_G, peak_G : array of int64
        Measured: everything that is alive now, and the most since the peak was last reset.
    """

    live_G: IntArray
    held_G: IntArray
    peak_G: IntArray


class LoadWindow:
    """Loads with an exponentially fading memory.

    Parameters
    ----------
    decay : float
        What is left of the past after each update, from 0 (only the last observation) to below 1.
    """

    def __init__(self, decay: float = 0.5) -> None:
        if not 0 <= decay < 1:
            raise ProblemError("decay", f"is {decay}, must be at least 0 and below 1")
        self.decay = decay
        self.load_LE: FloatArray | None = None
        self.seconds_LG: FloatArray | None = None
        self.tokens_LG: FloatArray | None = None
        #: Passes of one size that the loads are of, see `Observation`.
        self.passes = 0.0

    def update(self, seen: Observation) -> FloatArray:
        """Add an observation; returns the faded loads."""
        for name in ("load_LE", "seconds_LG", "tokens_LG"):
            new = getattr(seen, name).astype(np.float64)
            old = getattr(self, name)
            # After the loss of a rank the per-rank axes are shorter: their past means nothing then.
            setattr(self, name, new if old is None or old.shape != new.shape else self.decay * old + new)
        self.passes = self.decay * self.passes + (seen.batches if seen.even is None else seen.even)
        assert self.load_LE is not None
        return self.load_LE

    def speed_G(self) -> FloatArray:
        """Relative speed of each rank: rows per second over the mean of the ranks (1 where nothing ran)."""
        if self.tokens_LG is None or self.seconds_LG is None:
            return np.ones(0)
        rows, seconds = self.tokens_LG.sum(axis=0), self.seconds_LG.sum(axis=0)
        rate = np.where((rows > 0) & (seconds > 0), rows / np.maximum(seconds, 1e-12), np.nan)
        if np.isnan(rate).all():
            return np.ones(rate.size)
        return np.where(np.isnan(rate), 1.0, rate / np.nanmean(rate))


@runtime_checkable
class Backend(Protocol):
    """The one interface between a controller and what it controls.

    All calls are made by every rank of the group, between the same forward passes, with the same arguments.
    """

    @property
    def layers(self) -> Sequence[int]:
        """The model's own numbers of the layers on axis L."""
        ...

    @property
    def slots_LGC(self) -> SlotArray:
        """The placement in force."""
        ...

    def observe(self) -> Observation:
        """Loads and times since the last call; one small collective."""
        ...

    def apply(self, plan: Any, **limits: Any) -> int:
        """Start moving to the placement of a plan (or the array itself); returns a number at once."""
        ...

    def set_shares(self, shares: Any) -> None:
        """How replicas share their tokens: a policy or its name."""
        ...

    def memory(self) -> MemoryReport:
        """Bytes of experts per rank."""
        ...


@runtime_checkable
class SpeedBackend(Protocol):
    """What a controller needs besides, for shares that follow how fast the ranks are."""

    def set_speeds(self, speed_G: FloatArray) -> None:
        """Balance tokens by these relative speeds, shape [G], where they are balanced at all."""
        ...


@runtime_checkable
class LayerBackend(Protocol):
    """What a controller needs besides, to move single layers while a forward pass runs."""

    def open_layer(self, layer: int) -> Any:
        """Begin a plan of a layer: something with ``number`` and ``base_GC``, the slots to plan from.

        None while an earlier plan of the layer is being made. At the same point on all ranks.
        """
        ...

    def offer_layer(self, ticket: Any, slots_GC: SlotArray | None, error: str = "") -> None:
        """Give it its slots, or say why there are none; from any thread."""
        ...

    def apply_layer(self, layer: int, slots_GC: SlotArray) -> int:
        """Both at once; returns the plan's number."""
        ...

    def side_group(self) -> Any:
        """Something with ``sum(array)`` over the ranks and ``close()``, for a thread of its own."""
        ...
