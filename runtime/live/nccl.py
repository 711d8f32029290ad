"""Everything that is NCCL's own: how a communicator is made that can lose a rank, batches, and its end.

By default torch's watchdog ends the whole process when a collective fails or takes too long, and its monitor
does so when the watchdog itself hangs. Survivors of a loss must live. So our groups are made with both off:
losses are noticed by signs of life (`heartbeat`), a communicator is given up by `abort` from there, which
ends its kernels, and the host looks for a loss behind each of its waits (`ExpertGroup.to_host`).

Checked against torch's signatures (`tests/runtime/live/test_heartbeat.py`); no GPU was at hand.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["ENVIRONMENT", "abort", "batch", "make"]

#: What torch's ``ProcessGroupNCCL`` reads from the environment when it is made, and what ours are made with.
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # nobody but us aborts, and nobody ends the process
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # waiting orders the stream, not the host
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # a watchdog that hangs in an abort is no reason to end the process
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """`ENVIRONMENT` for what is made inside; other groups of the process keep the user's."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make(store: Any, rank: int, size: int, timeout: float) -> Any:
    """A communicator that outlives the loss of a rank, as a backend for a `ProcessGroup`."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    with _environment():
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextlib.contextmanager
def batch(group: Any, device: torch.device) -> Iterator[list[Any]]:
    """Point-to-point operations as one batch; the list holds its one work afterwards.

    What raises inside leaves the group as it was before: an open batch would swallow all that follows.
    """
    works: list[Any] = []
    group._start_coalescing(device)
    try:
        yield works
    except BaseException:
        with contextlib.suppress(Exception):
            group._end_coalescing(device)
        raise
    works.append(group._end_coalescing(device))


def abort(group: Any) -> None:
    """Give a communicator up, from any thread: its kernels end, and whoever waits for them goes on."""
    with contextlib.suppress(Exception):
        group.abort()
