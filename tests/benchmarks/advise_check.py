"""Is what `moeless-advise` advises as good as the best of a full sweep in the simulator?

    python tests/benchmarks/advise_check.py [--data DIR] [--model Mixtral-8x7B ...]

Every width and number of slots that fits serves the same requests, all there at the start, in the simulator's
closed loop until they are done: `static` without spare slots; with some, EPLB every second (`equal`), or with
live shares (`live`, `fractional`). Tokens of answers per second of all groups together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from moeless_opt.problems.io import Arrivals
from moeless_opt.runtime.simulate.advise import SPARE, _of, _widths, advise
from moeless_opt.runtime.simulate.advise_cli import traffic_of
from moeless_opt.runtime.simulate.drive import drive
from moeless_opt.runtime.simulate.hardware import slots_of
from moeless_opt.runtime.simulate.memory import Room
from moeless_opt.runtime.simulate.policies import POLICIES
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import machine_of
from moeless_opt.runtime.simulate.serving import ClosedLoop
from moeless_opt.runtime.simulate.traffic import RoutingModel

SETTINGS = {
    "Mixtral-8x7B": ("8xH100", None),
    "DeepSeek-V3": ("4x8xH100", "deepseek_v3_counts.npz"),
    "Qwen3-235B-A22B": ("2x8xH100", None),
}
PROMPT, ANSWER, MOST = 512, 32, 32


def served(machine, routing, spare: int, policy: str, requests: int) -> float | None:
    """Tokens per second of one group; None where nothing fits."""
    gpus = machine.topology.gpus
    slots = -(-machine.model.experts // gpus) + spare
    topology = slots_of(machine.topology, slots)
    machine = machine.replace(topology=topology)
    room = Room.of(machine)
    if slots > machine.model.experts or room.tokens(topology) < PROMPT + ANSWER:
        return None
    scenario = Scenario(model=machine.model, topology=topology, gpu=machine.gpu, policies=(policy,))
    run = POLICIES[policy].build(machine, topology, scenario)
    arrivals = Arrivals(
        time_R=np.zeros(requests), prompt_R=np.full(requests, PROMPT), output_R=np.full(requests, ANSWER)
    )
    loop = ClosedLoop(run.backend, routing, arrivals, memory=room.memory, most_requests=MOST * gpus)
    drive(run.backend, loop, run.controller, interval=POLICIES[policy].interval)
    return requests * ANSWER / run.backend.now


def check(model: str, data: Path | None, turns: int) -> None:
    """Sweep, advise, compare."""
    shape, loads = SETTINGS[model]
    file = None if loads is None or data is None else str(data / loads)
    machine = machine_of(Scenario(model=model, topology=shape, policies=("static",)))
    traffic = traffic_of(machine.model, loads=file, prompt=PROMPT, answer=ANSWER, most_requests=MOST)
    routing = RoutingModel(
        popularity_DLE=np.maximum(traffic.share_TLE, 1e-9), concentration=400.0, top_k=machine.model.top_k
    )
    began = time.process_time()
    found = advise(machine, traffic)
    print(f"{model} on {shape}, loads {traffic.source}; advised in {time.process_time() - began:.0f} s")
    best: dict[tuple[int, int, str], float] = {}
    for width in _widths(machine.topology, machine.model.experts):
        part = machine.replace(topology=_of(machine.topology, width))
        for spare in SPARE:
            for split in ("static",) if spare == 0 else ("equal", "live"):
                if width == 1 and spare:
                    continue
                policy = {"static": "static", "equal": "eplb", "live": "eplb-live"}[split]
                got = served(part, routing, spare, policy, turns * MOST * width)
                if got is not None:
                    groups = machine.topology.gpus // width
                    best[width, spare, split] = got * groups
                    print(f"  {width:3d} GPUs, {spare} spare, {split:6s} {got * groups:10,.0f}", flush=True)
    spare = found.best.slots - -(-machine.model.experts // found.best.width)
    split = "live" if found.best.split == "fractional" else found.best.split
    mine, most = best[found.best.width, spare, split], max(best.values())
    print(f"  advised: {found.best.width} GPUs, {spare} spare, {split}: {mine:,.0f}, {mine / most - 1:+.1%}")
    print(f"  best of the sweep: {max(best, key=best.__getitem__)}: {most:,.0f}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", action="append", choices=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=2, help="requests that a slot of the batch serves")
    options = parser.parse_args()
    for model in options.model or SETTINGS:
        check(model, options.data, options.turns)


if __name__ == "__main__":
    main()
