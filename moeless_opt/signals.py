"""How Ctrl-C and SIGTERM reach a command: the first asks a search to stop, the next one ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moeless_opt.solvers.core import Interrupt

__all__ = ["Killed", "Signals"]

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Killed(BaseException):
    """A signal ends the command at once.

    Parameters
    ----------
    signum : int
        Which.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)

    @property
    def code(self) -> int:
        """The exit code: 130 for SIGINT, 143 for SIGTERM, as shells have it."""
        return 128 + self.signum


class Signals:
    """What has come in while a command ran."""

    def __init__(self) -> None:
        self.came = 0
        """The signal that asked the search to stop; 0 if none did."""
        self._search: Interrupt | None = None

    @property
    def code(self) -> int:
        """The exit code of a command that ended as it should: 0, or 128 and the signal."""
        return 128 + self.came if self.came else 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._search is None or self.came:
            raise Killed(signum)
        self.came = signum
        self._search.set()
        print("\nstopping with the best found so far (again to give up)", file=sys.stderr)

    @contextmanager
    def stopping(self) -> Iterator[Interrupt]:
        """While inside, the first signal sets the criterion that is handed out."""
        self._search = Interrupt()
        try:
            yield self._search
        finally:
            self._search = None

    @contextmanager
    def watch(self) -> Iterator[Signals]:
        """Take the signals while inside, where this is the main thread; nobody else's may be changed."""
        before = {}
        try:
            for one in WATCHED:
                before[one] = signal.signal(one, self)
        except ValueError:  # not the main thread
            pass
        try:
            yield self
        finally:
            for one, handler in before.items():
                # A handler that was not set from Python reads as None and cannot be put back.
                signal.signal(one, signal.SIG_DFL if handler is None else handler)
