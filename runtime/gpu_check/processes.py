"""Processes of the check: forked from one that has not used the GPU."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["gpu_here", "start", "stop_all", "wait_for"]


def start(work: Callable[[], None], log: Path | None = None) -> int:
    """Do this in a process of its own; returns its number.

    It is forked, which saves it the imports, and ends without the interpreter's own end: threads may wait in
    gloo for a rank that is gone. Nobody may have used the GPU before: its state does not outlive a fork.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    failed = 1
    try:
        if log is not None:
            out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
        gc.freeze()
        work()
        failed = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)


def gpu_here() -> bool:
    """Whether torch finds a GPU; asked in a process of its own, because asking may begin to use it."""
    import torch

    def ask() -> None:
        os._exit(0 if torch.cuda.is_available() else 3)

    child = start(ask)
    codes = wait_for([child], 60.0)
    stop_all([child], codes)
    return codes == [0]


def wait_for(children: Sequence[int], seconds: float) -> list[int | None]:
    """Exit codes (below 0: the signal) in that time; None for those that are still there."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return [codes.get(child) for child in children]


def stop_all(children: Sequence[int], codes: Sequence[int | None]) -> None:
    """End those that are still there, with what they have started."""
    for child, code in zip(children, codes, strict=True):
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
