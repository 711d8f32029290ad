"""What a person sees while a solver works."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from moeless_opt.problems.plan import Progress

__all__ = ["Display"]


class Display:
    """A bar with the expected end on a terminal, rows of time, best, bound and gap elsewhere.

    Nothing is drawn before `delay` seconds: most solves are over by then.
    """

    def __init__(
        self, *, quiet: bool = False, solvers: int = 1, limit: float | None = None, delay: float = 0.5
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

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

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
        if not sys.stderr.isatty():
            if (report.best, report.bound) != self.last:
                print(f"{report.seconds:9.2f} s  {text}  {report.note}".rstrip(), file=sys.stderr)
            self.last = (report.best, report.bound)
            return
        done = report.done or (min(report.seconds / self.limit, 1.0) if self.limit else 0.0)
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=float(self.solvers), bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
            )
        self.bar.n = min(self.finished + done, self.solvers)
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
