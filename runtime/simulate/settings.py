"""What policies are set up by: their thresholds, and what is assumed of predictors and transfers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import Record, number
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.pool import AdaptiveKeepAlive, KeepAlive
from moeless_opt.runtime.simulate.options import (
    check_fields,
    documented,
    flag,
    name_of,
    option,
    real,
    whole_number,
)

__all__ = ["BELIEVED", "Settings"]

_POLICIES = "policies"

BELIEVED = ("learnt", "linear", "datasheet", "exact")
"""What policies may take for the experts' times; the truth judges."""

#: Microseconds of a layer's search on a host, by experts x GPUs (tests/benchmarks/split_cost.py).
_SEARCH = ((64, 36), (128, 46), (512, 41), (2048, 59), (8192, 128), (16384, 154))
#: Counts to the host and shares back, with what waits for them (assumed); a kernel on the device (published
#: of UltraEP, 64 GPUs x 256 experts: 67 to 78; ours is not measured).
_THERE_AND_BACK, _ON_DEVICE = 30.0, 70.0


def _keeps(where: str, value: Any) -> float | str:
    if value == "adaptive":
        return "adaptive"
    if isinstance(value, str):
        raise ProblemError(where, f"is {value!r}, must be seconds or 'adaptive'")
    return number(where, value)


def _splits(where: str, value: Any) -> float | str:
    if value in ("host", "device"):
        return str(value)
    if isinstance(value, str):
        raise ProblemError(where, f"is {value!r}, must be microseconds, 'host' or 'device'")
    return number(where, value)


def _microseconds(text: str) -> float | str:
    return text if text in ("host", "device") else float(text)


def _seconds(text: str) -> float | str:
    return text if text == "adaptive" else float(text)


@documented
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Settings(Record):
    """What a policy may look at; every value is printed with the results."""

    cv: float = option(0.2, real(), "threshold of MoEless's scaler", group=_POLICIES)
    distance: int = option(
        1, whole_number(1), "how far ahead a prediction looks", unit="layers", group=_POLICIES
    )
    error: float = option(
        0.1,
        real(high=1.0),
        "assumed share of pairs mispredicted at distance 1; at d, 1 - (1 - error)^d",
        group=_POLICIES,
    )
    decide_ms: float = option(
        0.0, real(), "of a predictor and planner, per layer", unit="ms", group=_POLICIES
    )
    split: float | str = option(
        "host",
        (_splits, _microseconds),
        "that a layer waits for live shares: host (measured), device (published for others), or a number",
        unit="us",
        metavar="US",
        group=_POLICIES,
    )
    believed: str = option(
        "learnt",
        name_of(BELIEVED),
        "expert times that policies plan by: linear (a fit, a tenth off), learnt (begins there, corrected by "
        "what GPUs took), datasheet (bare peaks), exact",
        group=_POLICIES,
    )
    charge_once: bool = option(
        False, flag(), "weights outside the experts are charged once, not per copy", group=_POLICIES
    )
    contention: bool = option(False, flag(), "transfers share ports with the all-to-all", group=_POLICIES)
    keep_alive: float | str = option(
        10.0,
        (_keeps, _seconds),
        "how long unused replicas stay, or 'adaptive'",
        unit="seconds",
        metavar="S",
        group=_POLICIES,
    )
    tolerance: float = option(0.1, real(), "balance tolerance of ours-windowed", group=_POLICIES)
    gain: float = option(
        0.02, real(), "share of a layer's time that a load of ours must save", group=_POLICIES
    )
    every: int = option(
        16, whole_number(1), "between plans of windowed policies", unit="passes", group=_POLICIES
    )
    seed: int = option(0, whole_number(), "of everything random", group=_POLICIES)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def error_at_distance(self) -> float:
        """Share of the pairs that the assumed predictor gets wrong."""
        return 1.0 - (1.0 - self.error) ** self.distance

    def split_seconds(self, experts: int, gpus: int) -> float:
        """Seconds that a layer of so many experts on so many GPUs waits for live shares."""
        if self.split == "host":
            pairs, search = zip(*_SEARCH, strict=True)
            return float(np.interp(experts * gpus, pairs, search) + _THERE_AND_BACK) * 1e-6
        return (_ON_DEVICE if isinstance(self.split, str) else self.split) * 1e-6

    def keeps(self) -> KeepAlive | float:
        """A keep-alive policy of one's own for one run."""
        return AdaptiveKeepAlive() if isinstance(self.keep_alive, str) else self.keep_alive

    @property
    def text(self) -> str:
        """In one line, for people."""
        return (
            f"cv {self.cv:g}; predictions {self.distance} layer(s) ahead; keep-alive {self.keep_alive} s; "
            f"planned by times: {self.believed}; live shares: {self.split} "
            f"{'' if isinstance(self.split, str) else 'us '}a layer; "
            f"ours: a load saves at least {self.gain:.2%} of its layer's time; windowed: every {self.every} "
            f"passes, tolerance {self.tolerance:g}; seed {self.seed}"
        )
