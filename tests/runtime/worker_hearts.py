"""Ranks of `test_worlds`: a slow one, one that stands still and comes back, and one that is started anew."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds
from worlds import batch, forward, join, report, tiny_model

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.checkpoint.outside import stand_outside
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.dispatch import BalancedShares
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.home import PinnedHome
from moeless_opt.runtime.live.meeting import EvictedError
from moeless_opt.runtime.live.model import LiveModel

LAYERS, STEPS = 2, 4
FOLDER = Path(os.environ["WORLD_FOLDER"])
worlds.EXPERTS = 9


def flag(name: str) -> None:
    """Tell the other processes."""
    (FOLDER / name).touch()


def until(name: str) -> None:
    """Wait for another process's flag."""
    while not (FOLDER / name).exists():
        time.sleep(0.02)


class Serving:
    """A model under a guard, and the outputs that it ought to give."""

    def __init__(self, rank: int, want: list[Any] | None = None, **options: Any) -> None:
        self.rank, self.model = rank, tiny_model(LAYERS, 2, torch.float64, exact=True)
        self.batches = [batch(rank, k) for k in range(STEPS)]
        self.want = want or [forward(self.model, x) for x in self.batches]
        more = {"home": PinnedHome(2), "checksums": True, "timeout": 120.0, "dead_after": 1.0}
        self.live: LiveModel = attach(self.model, **(more | options))
        self.guard = Guard(self.live, grace=0.5, slots=9)
        self.worst, self.done = 0.0, 0

    def step(self, before: Callable[[], None] = lambda: None) -> None:
        """One step; compares what it gives."""

        def work() -> Any:
            before()
            return forward(self.model, self.batches[self.done % STEPS])

        out = self.guard.run(work)
        self.worst = max(self.worst, (out - self.want[self.done % STEPS]).abs().max().item())
        self.done += 1

    def until_joined(self) -> None:
        """Steps until ranks have come back; the last one is the first of theirs."""
        while not (self.guard.recoveries and self.guard.recoveries[-1].joined):
            self.step()
            time.sleep(0.02)

    def told(self) -> dict[str, Any]:
        """What the test looks at."""
        return {
            "worst": self.worst,
            "ranks": list(self.live.group.ranks),
            "lost": [list(r.lost) for r in self.guard.recoveries],
            "joined": [list(r.joined) for r in self.guard.recoveries],
            "cause": [r.cause for r in self.guard.recoveries],
            "held": [[len(row) for row in rows] for rows in self.live.migrator.rows_LG],
        }


def stopped() -> dict[str, Any]:
    """A rank is slow: nobody minds. It stands still, is left behind, wakes up, and comes back; all detach."""
    rank, _ = join()
    serving = Serving(rank, shares=BalancedShares([1000, 1100, 1200]))
    (FOLDER / f"pid{rank}").write_text(str(os.getpid()))
    serving.step(lambda: time.sleep(2.5 if rank == 1 else 0.0))
    assert not serving.guard.recoveries
    if rank == 1:
        with pytest.raises(EvictedError):
            serving.step(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        serving.guard.rejoin()
    else:
        serving.step()
        assert list(serving.live.group.ranks) == [0, 2]
        assert [d.shares.speed_G for d in serving.live.dispatchers] == [[1000, 1200]] * LAYERS
        if rank == 0:
            os.kill(int((FOLDER / "pid1").read_text()), signal.SIGCONT)
        serving.until_joined()
    for _ in range(2 + (rank == 1)):
        serving.step()
    told = serving.told()
    assert [d.shares.speed_G for d in serving.live.dispatchers] == [[1000, 1100, 1200]] * LAYERS
    serving.live.detach()
    after = forward(serving.model, serving.batches[0])
    return told | {"detached": (after - serving.want[0]).abs().max().item()}


def anew() -> dict[str, Any]:
    """A rank is killed, and another process takes its place."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0 and os.fork() == 0:  # what a launcher does, when it sees the end of a rank
        code = 1
        try:
            until("lost")
            os.environ["RANK"] = "1"
            report(newcomer(size))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    join()
    serving = Serving(rank)
    if rank == 1:  # what the outputs of its successor have to be
        torch.save(serving.want, FOLDER / "want")
    serving.step()
    serving.step(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)
    if rank == 0:
        flag("lost")
    serving.until_joined()
    for _ in range(2):
        serving.step()
    serving.live.settle()
    told = serving.told()
    serving.live.detach()
    flag(f"done{rank}")
    until("done1")
    return told


def newcomer(size: int) -> dict[str, Any]:
    """The process that takes rank 1, with other options at first."""
    torch.set_num_threads(1)
    stand_outside(1, size)
    store = dist.TCPStore(
        "127.0.0.1",
        int(os.environ["STORE_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=60),
    )
    want = torch.load(FOLDER / "want", weights_only=True)
    with pytest.raises(MoelessError, match="came back with other options"):
        Serving(1, want, join=1, store=store, checksums=False)
    serving = Serving(1, want, join=1, store=store)
    for _ in range(3):
        serving.step()
    serving.live.settle()
    told = serving.told()
    serving.live.detach()
    flag("done1")
    return told


if __name__ == "__main__":
    report({"stopped": stopped, "anew": anew}[sys.argv[1]]())
