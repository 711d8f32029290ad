"""Planning beside an engine: in a process of its own, so that no thread of the engine waits for our lock.

Every rank that asks has its own process, and all answer the same, for an answer depends on the question
alone. A process that dies is no reason for another answer: what it was asked is planned by the calling
thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapAnswer, MapTask, answer
from moeless_opt.api import warm_up

__all__ = ["PlannerProcess", "serve"]

_START = "import sys; sys.path[:] = sys.argv[1:]; from moeless_opt.adapters.planner import serve; serve()"


def serve() -> None:
    """Answer questions on the standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # what a library prints is no answer
    warm_up()
    with contextlib.suppress(EOFError, OSError):
        while True:
            given = pickle.load(source)
            try:
                found: object = answer(*given)
            except Exception as error:
                found = error
            pickle.dump(found, sink, protocol=5)
            sink.flush()


class PlannerProcess:
    """What plans for one engine worker.

    Parameters
    ----------
    options : PolicyOptions
        How; with ``planner="thread"`` there is no process.
    warn : callable
        Called with a line where the process fails.
    """

    def __init__(self, options: PolicyOptions, warn: Callable[[str], None]) -> None:
        self.options, self._warn = options, warn
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._owner = threading.Lock(), 0

    def begin(self) -> None:
        """Start the process, which then loads what it needs, compiled code too, while the engine goes on."""
        with self._lock:
            self._started()

    def plan(self, task: MapTask, split: str) -> MapAnswer:
        """The answer to a task: waits for it, without the interpreter's lock.

        Raises
        ------
        MoelessError
            Whatever `answer` raises.
        """
        with self._lock:
            process = self._started()
            found = None if process is None else self._asked(process, (task, self.options, split))
        if found is None:
            return answer(task, self.options, split)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, MapAnswer)
        return found

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork of ours: not ours to end
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _started(self) -> subprocess.Popen[bytes] | None:
        if self.options.planner != "process" or not sys.executable:
            return None
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self.close()
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *(path for path in sys.path if path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # a Ctrl-C in the terminal is the engine's to handle
                )
            except OSError as error:
                self._warn(
                    f"the planner's process cannot be started ({error}): planning in the calling thread"
                )
                return None
            self._owner = os.getpid()
            atexit.register(self.close)
        return self._process

    def _asked(self, process: subprocess.Popen[bytes], question: object) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(question, process.stdin, protocol=5)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            self.close()
            self._warn(f"the planner's process ended ({error!r}): planning in the calling thread")
            return None
