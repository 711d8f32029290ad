"""What serving costs in memory times time (GB*s), under charging rules that are stated with every figure.

A published saving of "memory x time" depends more on the rule than on the method: a serverful system is
charged for everything that it holds, a serverless one for what its functions use. So one run is metered
under all rules at once, and the same system can be read under each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray

__all__ = ["RULES", "Cost", "CostMeter"]

GB = 1e9

RULES: dict[str, str] = {
    "resident": (
        "every byte held (experts, kept-alive replicas, the rest of the model, the KV cache), for the whole "
        "wall time from the first pass to the end of the last, idle time included; the same for everybody"
    ),
    "passes": ("every byte held, while passes run; idle time is free; the same for everybody"),
    "functions": (
        "as 'passes' for serverful systems; in an elastic one a replica is charged only while its own layer "
        "runs, in passes where it serves a token, the rest of the model and the KV cache for the whole pass "
        "(closest to what the MoEless paper's savings imply)"
    ),
}
"""Charging rules by name, for the printout."""


@dataclass(frozen=True, slots=True)
class Cost:
    """GB*s of the experts and of the rest (other weights, KV cache)."""

    experts: float
    rest: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.experts + self.rest


class CostMeter:
    """Adds up memory times time.

    Parameters
    ----------
    bytes_L : array of int, shape [L]
        Bytes of one replica in each layer.
    other_bytes : float
        Bytes of everything but the experts, over all GPUs, without the KV cache.
    elastic : bool
        Whether rule ``functions`` may charge by use.
    """

    def __init__(self, bytes_L: ArrayLike, other_bytes: float, *, elastic: bool) -> None:
        self.bytes_L = np.asarray(bytes_L, dtype=np.float64)
        self.other_bytes = float(other_bytes)
        self.elastic = elastic
        self._experts = dict.fromkeys(RULES, 0.0)
        self._rest = dict.fromkeys(RULES, 0.0)

    def add_passes(
        self,
        held_L: FloatArray,
        used_BL: FloatArray,
        layer_seconds_BL: FloatArray,
        pass_seconds_B: FloatArray,
        kv_bytes_B: FloatArray,
        weight_B: FloatArray,
    ) -> None:
        """Charge forward passes.

        Parameters
        ----------
        held_L : array, shape [L]
            Replicas in memory, kept-alive ones included.
        used_BL : array, shape [B, L]
            Replicas that served a token.
        layer_seconds_BL : array, shape [B, L]
            Time of each MoE layer.
        pass_seconds_B, kv_bytes_B, weight_B : arrays, shape [B]
            Time of the whole pass, bytes of the KV cache, and how many passes it stands for.
        """
        weighed_B = weight_B * pass_seconds_B
        seconds = float(weighed_B.sum())
        held = float(held_L @ self.bytes_L) * seconds
        rest = self.other_bytes * seconds + float(weighed_B @ kv_bytes_B)
        used = float((weight_B[:, None] * used_BL * layer_seconds_BL).sum(0) @ self.bytes_L)
        self._experts["passes"] += held
        self._rest["passes"] += rest
        self._experts["functions"] += used if self.elastic else held
        self._rest["functions"] += rest

    def add_wall(self, expert_byte_seconds: float, seconds: float, kv_byte_seconds: float = 0.0) -> None:
        """Charge wall time under rule ``resident``; `expert_byte_seconds` is what was held times how long."""
        self._experts["resident"] += expert_byte_seconds
        self._rest["resident"] += self.other_bytes * seconds + kv_byte_seconds

    def cost(self, rule: str) -> Cost:
        """What was charged under a rule, in GB*s."""
        return Cost(self._experts[rule] / GB, self._rest[rule] / GB)
