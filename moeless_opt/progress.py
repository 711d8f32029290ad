"""What a person sees while a solver works."""

from __future__ import annotations

import math
import sys
import threading
import time
from types import TracebackType
from typing import Any

from moeless_opt.problems.plan import Progress

__all__ = ["PULSE", "Display"]

PULSE = 1.0
"""Seconds of silence after which a person is told that the work goes on."""


class Display:
    """A bar with the expected end on a terminal, rows of time, best, bound and gap elsewhere.

    Nothing is drawn before `delay` seconds: most solves are over by then. Where a solver says nothing for
    `PULSE` seconds, a pulse says that it is still at work.

    Parameters
    ----------
    quiet : bool
        Draw nothing.
    solvers : int
        How many are to run, one after the other.
    limit : float, optional
        Seconds that each of them has.
    delay : float
        Seconds before anything is drawn.
    name : str
        What is at work, for the pulse; without a name there is none.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        solvers: int = 1,
        limit: float | None = None,
        delay: float = 0.5,
        name: str = "",
    ) -> None:
        self.quiet = quiet
        self.limit = limit
        self.solvers = solvers
        self.delay = delay
        self.start = time.monotonic()
        self.bar: Any = None
        self.last = (float("inf"), float("-inf"))
        self.seconds = 0.0
        self.finished = 0
        self.name = name
        self.said = self.start
        self.text = ""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Display:
        if self.name and not self.quiet:
            self._heart = threading.Thread(target=self._pulse, daemon=True, name="progress")
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._heart is not None:
            self._heart.join()
        if self.bar is not None:
            self.bar.close()

    def _pulse(self) -> None:
        """Say now and then, ever more rarely on paper, that something is at work."""
        pause = PULSE
        while not self._over.wait(max(self.said + pause - time.monotonic(), 0.05)):
            now = time.monotonic()
            if now < self.said + pause:
                continue
            with self._lock:
                self.said = now
                if sys.stderr.isatty():
                    self._draw(0.0, self.text or f"{self.name} ...")
                else:
                    each = " for each solver" if self.solvers > 1 else ""
                    of = "" if self.limit is None else f" of {self.limit:g} s{each}"
                    print(
                        f"{now - self.start:9.2f} s{of}  {self.text or self.name + ' ...'}", file=sys.stderr
                    )
                    pause *= 2

    def progress(self, report: Progress) -> None:
        """Draw one report of a solver."""
        if report.seconds < self.seconds:  # the next solver began
            self.finished += 1
            self.last = (float("inf"), float("-inf"))
        self.seconds = report.seconds
        if self.quiet or time.monotonic() - self.start < self.delay:
            return
        gap = report.best / report.bound - 1 if report.bound > 0 else float("inf")
        text = f"best {report.best:.6g}  bound {report.bound:.6g}  gap {gap:.3%}"
        if math.isnan(report.best):  # nothing to tell yet but what is being done
            text = ""
        with self._lock:
            self.text = f"{text}  {report.note}".strip()
            if sys.stderr.isatty():
                self.said = time.monotonic()
                self._draw(
                    report.done or (min(report.seconds / self.limit, 1.0) if self.limit else 0.0), text
                )
            elif (report.best, report.bound) != self.last:
                self.said = time.monotonic()
                print(f"{report.seconds:9.2f} s  {self.text}", file=sys.stderr)
            self.last = (report.best, report.bound)

    def _draw(self, done: float, text: str) -> None:
        """The bar, as far as it has come."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=float(self.solvers), bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
            )
        self.bar.n = max(min(self.finished + done, self.solvers), self.bar.n if done == 0 else 0.0)
        self.bar.set_postfix_str(text, refresh=True)

    def reached(self, name: str, done: float, whole: float, *, unit: str) -> None:
        """Draw how far one of several things has come that have a known end; on a terminal only."""
        if self.quiet or not sys.stderr.isatty() or time.monotonic() - self.start < self.delay:
            return
        if self.bar is None or self.bar.desc != f"{name}: ":
            from tqdm import tqdm

            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(total=round(whole), desc=name, unit=unit, leave=False)
        self.bar.n = min(round(done), self.bar.total)
        self.bar.refresh()
