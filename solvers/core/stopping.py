"""When a solve ends: stopping criteria as small objects, asked inside every long loop."""

from __future__ import annotations

import threading
import time as clock
from dataclasses import dataclass
from typing import Protocol

from moeless_opt.problems.plan import StoppedBy

__all__ = ["Clock", "FirstOf", "Interrupt", "MaxGap", "MaxTime", "NeverStop", "Stop", "part_of"]


class Stop(Protocol):
    """A stopping criterion: asked again and again, it answers why to stop, or falsy to go on."""

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Answer for the best value so far and its lower bound (neither need be known)."""

    @property
    def remaining(self) -> float:
        """Seconds that are left; infinite without a time limit, 0 once it has been interrupted."""


class NeverStop:
    """Run until the method ends by itself."""

    remaining = float("inf")

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Go on."""
        return StoppedBy.NOTHING


class MaxTime:
    """Stop after some seconds, counted from the making of the object."""

    def __init__(self, seconds: float) -> None:
        self.end = clock.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return max(self.end - clock.monotonic(), 0.0)

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Stop once the time is up."""
        return StoppedBy.NOTHING if self.remaining > 0 else StoppedBy.TIME


class MaxGap:
    """Stop when the best value is proven to be within a relative gap of the optimum."""

    remaining = float("inf")

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Stop once ``best <= bound * (1 + gap)``."""
        return StoppedBy.GAP if best <= bound * (1 + self.gap) else StoppedBy.NOTHING


class Interrupt:
    """Stop when told to, from another thread or a signal handler."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def set(self) -> None:
        """Tell the search to end with the best that it has."""
        self._told.set()

    @property
    def remaining(self) -> float:
        """Nothing once it was told."""
        return 0.0 if self._told.is_set() else float("inf")

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Stop once told."""
        return StoppedBy.INTERRUPT if self._told.is_set() else StoppedBy.NOTHING


class FirstOf:
    """Stop with the first of several criteria."""

    def __init__(self, *stops: Stop) -> None:
        self.stops = stops

    @property
    def remaining(self) -> float:
        """Seconds that are left by the shortest limit."""
        return min((stop.remaining for stop in self.stops), default=float("inf"))

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        """Ask each in turn."""
        return next((why for stop in self.stops if (why := stop(best, bound))), StoppedBy.NOTHING)


def part_of(stop: Stop, share: float) -> Stop:
    """Stop earlier: after a share of the time that is left, where that is limited."""
    left = stop.remaining
    return stop if left == float("inf") else FirstOf(stop, MaxTime(share * left))


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since a solve began."""

    start: float

    @classmethod
    def begin(cls) -> Clock:
        """Start now."""
        return cls(clock.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return clock.perf_counter() - self.start
