"""Ranks of `kill_campaign`: ``python`` is not meant to run this by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime"))
import worlds

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.home import PinnedHome
from moeless_opt.runtime.live.model import LiveModel

STEPS, LAYERS = 14, 3


def die(*_: Any) -> Any:
    """End at once, as a process does whose machine is gone."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, live: LiveModel, chance: np.random.Generator) -> None:
    """Let this rank die at the next moment of the kind."""
    if moment == "forward":
        left = [int(chance.integers(0, LAYERS))]

        def count(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                die()

        for dispatcher in live.dispatchers:
            dispatcher.on_batch.append(count)
    elif moment == "migration":
        launch = live.migrator.launch

        def posted(*arguments: Any) -> Any:
            flight = launch(*arguments)
            threading.Timer(float(chance.uniform(0, 0.01)), die).start()
            return flight

        live.migrator.launch = posted  # type: ignore[method-assign]
    elif moment == "refill":
        # Home copies are filled by the waits of the group; attach is over, so this is in a recovery.
        ExpertGroup.wait = die  # type: ignore[method-assign]
    elif moment == "regroup":
        regroup = live.regroup

        def regrouped(group: ExpertGroup) -> None:
            if chance.random() < 0.5:
                regroup(group)
            die()

        live.regroup = regrouped  # type: ignore[method-assign]
    elif moment == "observe":
        observe = live.observe

        def observed() -> Any:
            threading.Timer(float(chance.uniform(0, 0.003)), die).start()
            return observe()

        live.observe = observed  # type: ignore[method-assign]
    else:  # whenever
        threading.Timer(float(chance.uniform(0, 1.5)), die).start()


def main(seed: int, deaths: str) -> dict[str, Any]:
    """Deaths: ``rank@step@moment``, comma-separated. Ends with what a survivor saw."""
    rank, _ = worlds.join(timeout=60.0)
    chance = np.random.default_rng([seed, rank])
    own = {int(r): (int(s), m) for r, s, m in (d.split("@") for d in deaths.split(",") if d)}.get(rank)
    worlds.EXPERTS = 12  # for two to four ranks
    model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
    batches = [worlds.batch(rank, k) for k in range(4)]
    want = [worlds.forward(model, x) for x in batches]
    live = attach(model, home=PinnedHome(2), timeout=15.0, checksums=True)
    guard = Guard(live, grace=1.0, slots=12)
    worst, longest, error, step = 0.0, 0.0, "", 0
    try:
        for step in range(STEPS):
            if own is not None and step == own[0]:
                arm(own[1], live, chance)

            def work(step: int = step) -> torch.Tensor:
                out = worlds.forward(model, batches[step % 4])
                live.observe()
                return out

            began, before = time.monotonic(), len(guard.recoveries)
            out = guard.run(work)
            longest = max(longest, time.monotonic() - began)
            worst = max(worst, (out - want[step % 4]).abs().max().item())
            if len(guard.recoveries) == before:
                rng = np.random.default_rng([seed, step])
                live.apply(worlds.random_slots(rng, LAYERS, live.group.size, 12), max_step_bytes=300_000)
    except MoelessError as problem:
        longest = max(longest, time.monotonic() - began)
        error = f"{type(problem).__name__}: {problem}"
    return {
        "worst": worst,
        "steps": step + (not error),
        "error": error,
        "lost": sum(len(r.lost) for r in guard.recoveries),
        "longest": longest,
    }


if __name__ == "__main__":
    worlds.report(main(int(sys.argv[1]), sys.argv[2]))
