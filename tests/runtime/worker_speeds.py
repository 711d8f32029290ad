"""Ranks of `test_worlds`: one is slower in its experts than the others, and the controller plans for it."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import worlds

from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.control.backend import Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.control.speed_watch import SpeedWatch
from moeless_opt.runtime.engines.attach import attach

LAYERS, EVERY, LOOKS = 2, 2, 9
ROW = 2e-4
"""Seconds of a row on a nominal rank."""


class Noted:
    """The live model, and what it was seen to do."""

    def __init__(self, live: Any) -> None:
        self.live = live
        self.seen: list[Observation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.live, name)

    def observe(self) -> Any:
        self.seen.append(self.live.observe())
        return self.seen[-1]


def slowed(live: Any, seconds: float, sleeps: bool) -> None:
    """Let rows of the experts take so long by their stopwatch: truly, or by a clock that only rows move."""
    for dispatcher in live.dispatchers:
        rest, now = dispatcher.sort_out, [0.0]
        if not sleeps:
            dispatcher.experts_watch.clock = lambda now=now: now[0]

        def sort_out(rows: torch.Tensor, rest: Any = rest, now: list[float] = now) -> torch.Tensor:
            now[0] += len(rows) * seconds
            if sleeps:
                time.sleep(len(rows) * seconds)
            return rest(rows)  # type: ignore[no-any-return]

        dispatcher.sort_out = sort_out


def main() -> None:
    """argv: how many times slower the last rank is; ``sleep`` to be so by the clock on the wall.

    Reports what it is like without and with the watch.
    """
    rank, size = worlds.join()
    times = float(sys.argv[1])
    model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
    x = worlds.batch(rank)
    stock = worlds.forward(model, x)
    live = attach(model, row_block=1)
    slowed(live, ROW * (times if rank == size - 1 else 1.0), "sleep" in sys.argv)
    told = []
    for watch in (None, SpeedWatch(least=0.1)):
        backend = Noted(live)
        topology = Topology.uniform(1, size, slots=worlds.EXPERTS // size + 2)
        controller = Controller(backend, Planner(topology=topology), every=EVERY, speeds=watch)
        for _ in range(EVERY * LOOKS):
            assert (worlds.forward(model, x) - stock).abs().max().item() < 1e-9
            controller.after()
        live.settle()
        controller.close()
        speed = None if watch is None or watch.speed_G is None else watch.speed_G.tolist()
        every: list[object] = [None] * size
        dist.all_gather_object(every, [live.slots_LGC.tolist(), speed])
        assert all(one == every[0] for one in every)  # the same plan, by the same speeds
        told.append({"speed": speed, **figures(backend.seen[-3:])})
    worlds.report(told)


def figures(seen: list[Observation]) -> dict[str, float]:
    """Of the last looks: the slowest rank's time for a pass, over the mean, and the last rank's rows."""
    seconds_LG = np.sum([one.seconds_LG for one in seen], axis=0)
    tokens_LG = np.sum([one.tokens_LG for one in seen], axis=0)
    return {
        "makespan_ms": float(seconds_LG.max(1).sum() * 1e3 / (len(seen) * EVERY)),
        "imbalance": float((seconds_LG.max(1) / seconds_LG.mean(1)).mean()),
        "share": float(tokens_LG[:, -1].sum() / tokens_LG.sum()),
    }


main()
