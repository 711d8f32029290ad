"""Ranks of `test_worlds`: one is killed or hangs, then another; the others go on with the same outputs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import worlds

import moeless_opt as mo
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.home import MappedHome, PinnedHome
from moeless_opt.runtime.live.meeting import EvictedError
from moeless_opt.runtime.predict.foresight import GatePredictor
from moeless_opt.runtime.predict.gates import plain_gates
from moeless_opt.runtime.predict.per_layer import PerLayer

LAYERS = 3


class AnyRanks:
    """Plans layers for however many ranks there are."""

    def plan_layer(self, layer: int, load_E: np.ndarray, slots_GC: np.ndarray) -> np.ndarray:
        topology = mo.uniform(1, len(slots_GC), slots=8)
        return Planner(topology=topology).plan_layer(layer, load_E, slots_GC)


def main() -> None:
    """argv: kind of home, then rank@moment of each death, e.g. ``pinned 2@6 0@20``; ``stop`` to hang only.

    ``3@recovery`` dies in the middle of the recovery from another one.
    """
    rank, size = worlds.join()
    home_kind, *deaths = sys.argv[1:]
    blow = signal.SIGSTOP if deaths[0] == "stop" else signal.SIGKILL
    deaths = [d for d in deaths if "@" in d]
    folder = Path(os.environ["WORLD_FOLDER"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    when = {int(r): float(s) for r, s in (d.split("@") for d in deaths) if s != "recovery"}
    model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
    batches = [worlds.batch(rank, k) for k in range(4)]
    stock = [worlds.forward(model, x) for x in batches]
    live = attach(
        model,
        home=PinnedHome(2) if home_kind in ("pinned", "layered") else None,
        checksums=True,
        timeout=5.0 if blow == signal.SIGSTOP else 20.0,
    )
    if home_kind == "mapped":
        live.save_home(folder / "home")
        live.use_home(MappedHome(folder / "home", size))
    guard = Guard(live, grace=2.0, slots=8)
    layered = home_kind == "layered"
    controller = Controller(live, AnyRanks())
    if layered:
        live.elastic(3.0, clock="passes")
        PerLayer(live, controller, GatePredictor(plain_gates(model))).__enter__()
    death = when.get(rank)
    if f"{rank}@recovery" in deaths:
        recover = live.regroup

        def die_in_it(group: ExpertGroup) -> None:
            recover(group)
            os.kill(os.getpid(), blow)

        live.regroup = die_in_it  # type: ignore[method-assign]
    worst = 0.0
    for step in range(36):

        def work(step: int = step) -> torch.Tensor:
            if death is not None and step == int(death):
                # In the middle of a forward pass: after some layers of it.
                seen = [0]

                def die(dispatcher: object, experts: torch.Tensor) -> None:
                    seen[0] += 1
                    if seen[0] > (death % 1) * 10:
                        os.kill(os.getpid(), blow)

                for d in live.dispatchers:
                    d.on_batch.append(die)
            return worlds.forward(model, batches[step % 4])

        before = len(guard.recoveries)
        try:
            out = guard.run(work)
        except EvictedError:
            worlds.report({"evicted": True})
            return
        worst = max(worst, (out - stock[step % 4]).abs().max().item())
        if len(guard.recoveries) == before and step % 3 == 0 and not layered:
            # Keep migrations under way, so that deaths meet them too.
            rng = np.random.default_rng(100 + step)
            live.apply(worlds.random_slots(rng, LAYERS, live.group.size), max_step_bytes=200_000)
    controller.drain()
    live.settle()
    assert worst == 0.0, worst
    if layered:
        planned = [d for d in controller.layer_decisions if d.slots_GC.shape[0] == live.group.size]
        assert any(d.applied is not None for d in planned)
        assert not any(d.error for d in planned)
    if blow == signal.SIGSTOP and live.group.rank == 0:
        for stopped in when:
            os.kill(int((folder / f"pid{stopped}").read_text()), signal.SIGCONT)
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
                    "migrating": r.migrating,
                    "cause": r.cause[:80],
                }
                for r in guard.recoveries
            ],
        }
    )


main()
