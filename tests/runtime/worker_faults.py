"""Ranks of `test_faults_world`: one is killed, then another; the others go on with the same outputs."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import torch
import worlds

from moeless_opt.runtime.faults import Guard
from moeless_opt.runtime.home import MappedHome, PinnedHome
from moeless_opt.runtime.live import attach

LAYERS = 3


def main() -> None:
    """argv: kind of home, then rank@moment of each death, e.g. ``pinned 2@6 0@20``."""
    rank, size = worlds.join()
    home_kind, *deaths = sys.argv[1:]
    when = {int(r): float(s) for r, s in (d.split("@") for d in deaths)}
    model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
    batches = [worlds.batch(rank, k) for k in range(4)]
    stock = [worlds.forward(model, x) for x in batches]
    live = attach(model, home=PinnedHome(2) if home_kind == "pinned" else None, checksums=True, timeout=6.0)
    if home_kind == "mapped":
        folder = os.environ["WORLD_FOLDER"] + "/home"
        live.save_home(folder)
        live.use_home(MappedHome(folder, size))
    guard = Guard(live, grace=1.0, slots=8)
    death = when.get(rank)
    worst = 0.0
    for step in range(36):

        def work(step: int = step) -> torch.Tensor:
            if death is not None and step == int(death):
                # In the middle of a forward pass: after some layers of it.
                seen = [0]

                def die(dispatcher: object, experts: torch.Tensor) -> None:
                    seen[0] += 1
                    if seen[0] > (death % 1) * 10:
                        os.kill(os.getpid(), signal.SIGKILL)

                for d in live.dispatchers:
                    d.on_batch.append(die)
            return worlds.forward(model, batches[step % 4])

        before = len(guard.recoveries)
        out = guard.run(work)
        worst = max(worst, (out - stock[step % 4]).abs().max().item())
        if len(guard.recoveries) == before and step % 3 == 0:
            # Keep migrations under way, so that deaths meet them too.
            rng = np.random.default_rng(100 + step)
            live.apply(worlds.random_slots(rng, LAYERS, live.group.size), max_step_bytes=200_000)
    live.settle()
    assert worst == 0.0, worst
    worlds.report(
        {
            "worst": worst,
            "ranks": list(live.group.ranks),
            "recoveries": [
                {
                    "lost": r.lost,
                    "seconds": r.seconds,
                    "agree": r.agree_seconds,
                    "repeated": r.repeated,
                    "bytes": r.restored_bytes,
                    "cause": r.cause[:80],
                }
                for r in guard.recoveries
            ],
        }
    )


main()
