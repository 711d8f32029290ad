"""What a simulated run adds up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray

__all__ = ["SimReport", "SimRow"]


@dataclass(slots=True)
class SimReport:
    """What a run adds up to; arrays grow pass by pass.

    Parameters
    ----------
    layer_BL, network_BL, exposed_BL : lists of arrays
        Seconds of each MoE layer, of its all-to-all, and of waiting for weights (both part of the first).
    weight_B, prefill_B : lists of arrays
        How many passes each stands for, and whether it reads prompts.
    largest, mean : float
        Sums over passes and layers of the largest and of the mean GPU tokens.
    moved, moved_bytes : float
        Replicas loaded after the start, and their bytes; for every pass that one stands for.
    plans, refused : int
        Placements applied, and those that did not fit while replicas change places.
    held_seconds : float
        Sum of replicas held times seconds of passes.
    busy, first_start, end, lag : float
        Seconds in which passes ran; start of the first and end of the last one; how late the last started.
    """

    layer_BL: list[FloatArray] = field(default_factory=list)
    network_BL: list[FloatArray] = field(default_factory=list)
    exposed_BL: list[FloatArray] = field(default_factory=list)
    weight_B: list[FloatArray] = field(default_factory=list)
    prefill_B: list[BoolArray] = field(default_factory=list)
    largest: float = 0.0
    mean: float = 0.0
    moved: float = 0
    moved_bytes: float = 0
    plans: int = 0
    refused: int = 0
    held_seconds: float = 0.0
    busy: float = 0.0
    first_start: float = -1.0
    end: float = 0.0
    lag: float = 0.0

    def latency(self, prefill: bool | None = None) -> tuple[FloatArray, FloatArray]:
        """Seconds of all MoE layers of the chosen passes, and their weights, both flat."""
        layer_BL = np.concatenate(self.layer_BL)
        weight_B, prefill_B = np.concatenate(self.weight_B), np.concatenate(self.prefill_B)
        chosen = np.ones(weight_B.shape, np.bool_) if prefill is None else prefill_B == prefill
        weight_BL = np.broadcast_to(weight_B[chosen, None], layer_BL[chosen].shape)
        return layer_BL[chosen].ravel(), weight_BL.ravel()

    def mean_latency(self, prefill: bool | None = None) -> float:
        """Mean seconds of a MoE layer; not a number where no such pass ran."""
        seconds, weight = self.latency(prefill)
        return float(seconds @ weight / weight.sum()) if weight.size else float("nan")

    def percentile(self, share: float = 0.99, prefill: bool | None = None) -> float:
        """Seconds that a `share` of the MoE layers do not exceed."""
        seconds, weight = self.latency(prefill)
        if not weight.size:
            return float("nan")
        order = np.argsort(seconds, kind="stable")
        reached = np.searchsorted(np.cumsum(weight[order]), share * weight.sum() * (1 - 1e-12))
        return float(seconds[order[min(int(reached), order.size - 1)]])

    @property
    def imbalance(self) -> float:
        """Sum over passes and layers of the largest GPU tokens over that of the mean."""
        return self.largest / self.mean if self.mean else 1.0

    @property
    def held(self) -> float:
        """Replicas held, mean over the time of the passes."""
        return self.held_seconds / self.busy if self.busy else 0.0


class SimRow(TypedDict):
    """The figures of one policy.

    ``mean_ms``, ``p99_ms``, ``wait_ms`` are of a MoE layer in one pass; ``quantiles_ms`` its latency at equal
    steps of the distribution function; ``held`` and ``moved_per_pass`` count replicas; ``cost`` is in GB*s by
    charging rule; ``peak_GB`` is the most that experts, replicas on their way included, and the KV cache took
    on a GPU, of ``room_GB`` that it has for them; ``refused`` counts plans for which there was no room while
    replicas change places; ``foreseen`` is the total-variation distance of
    predicted from actual loads (``_ahead``: over the layers that an earlier one foresees, ``_L``: by layer);
    ``requests`` is of the closed loop;
    ``plan_ms`` and ``seconds`` are of the machine at hand.
    """

    model: str
    variant: str
    policy: str
    mean_ms: float
    p99_ms: float
    imbalance: float
    wait_ms: float
    held: float
    moved_per_pass: float
    moved_GB: float
    peak_GB: float
    room_GB: float
    refused: int
    busy: float
    cost: dict[str, float]
    plan_ms: float
    quantiles_ms: list[float]
    foreseen: float | None
    foreseen_ahead: float | None
    foreseen_L: list[float] | None
    requests: dict[str, Any] | None
    seconds: float
    basis: dict[str, list[str]]
