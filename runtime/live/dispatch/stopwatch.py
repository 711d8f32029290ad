"""Seconds of stretches of work, on the host or on the stream that the work is launched on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Stopwatch", "mark"]


def mark() -> Any:
    """A point in time of the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Stopwatch:
    """Adds stretches up. On a GPU they are between events: the host is long gone when the work is done.

    Parameters
    ----------
    clock : callable
        What times on the host.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = 0.0
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self, on_gpu: bool) -> None:
        """A stretch begins."""
        self._began = mark() if on_gpu else self.clock()

    def stop(self, on_gpu: bool) -> None:
        """It ends."""
        if not on_gpu:
            self.seconds += self.clock() - self._began
            return
        self._spans.append((self._began, mark()))
        if len(self._spans) > 64:
            self.read()

    def over(self, *, wait: bool = False) -> bool:
        """Whether the last stretch is."""
        if self._spans and wait:
            self._spans[-1][1].synchronize()
        return not self._spans or bool(self._spans[-1][1].query())

    def read(self) -> None:
        """Add what is over by now; never waits for the device."""
        waiting = []
        for start, stop in self._spans:
            if stop.query():
                self.seconds += start.elapsed_time(stop) * 1e-3
            else:
                waiting.append((start, stop))
        self._spans = waiting

    def take(self) -> float:
        """Seconds of what is over, since the last call."""
        self.read()
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def take_spans(self) -> Stopwatch:
        """All since the last call, also what is not over: as a stopwatch of its own."""
        taken = Stopwatch(self.clock)
        taken.seconds, self.seconds = self.seconds, 0.0
        taken._spans, self._spans = self._spans, []
        return taken
