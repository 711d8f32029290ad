"""How near to the oracle any system can come: exact least times of sampled layers, and how near ours comes.

The oracle gives every GPU the same tokens and the fewest experts, whatever the router chose. Here CP-SAT
proves, layer by layer, what the best placement and shares take that serve what the router chose, with the
loads known and every move free; beside it what the planner of the per-layer mode finds in microseconds,
with moves free, and as it plans in the simulator: from what is live, where layers hide only so much loading.

    python tests/benchmarks/oracle_gap.py --data ../shared/data [--samples 24] [--seconds 120]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.runtime.control.layer_planner import LayerPlanner
from moeless_opt.runtime.simulate.figures import PAPER_MODELS
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import scene
from moeless_opt.solvers.timed.search import timed_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracles.least_time import least_time


def layer_seconds(machine: Machine, load_E: FloatArray, slots_GC: SlotArray, share_GC: FloatArray) -> float:
    """Seconds of a layer, without the links' latency (which nothing changes)."""
    times = machine.layers(load_E[None, None], slots_GC[None], share_GC[None, None])
    return float((times.layer_BL - 2 * machine.topology.links.latency).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of recordings, as of moeless-simulate")
    parser.add_argument("--samples", type=int, default=24, help="layers per model (default 24)")
    parser.add_argument("--seconds", type=float, default=120, help="of arrivals (default 120)")
    parser.add_argument("--limit", type=float, default=10, help="seconds for each question (default 10)")
    parser.add_argument("--extra", type=int, default=1, help="slots beyond static's (default 1)")
    options = parser.parse_args()
    print(
        "sums over the samples, of times with the link, over the oracle's (1.000); rows chosen evenly over\n"
        "batches and layers, so that large batches weigh as they do in a mean latency\n"
    )
    print("| model | static | least time, proven | ours, moves free | ours, from what is live | ms a layer |")
    print("|---|---|---|---|---|---|")
    for name in PAPER_MODELS:
        here = scene(Scenario(model=name, data=options.data, seconds=options.seconds))
        experts, gpus = here.machine.model.experts, here.topology.gpus
        topology = here.topology.replace(slots_G=np.full(gpus, -(-experts // gpus) + options.extra))
        machine, speed_G = here.machine, topology.speed_G
        planner = LayerPlanner(topology, machine.model, machine.time, per_token=machine.link_per_token)
        passes = [part for part in here.traffic() if part.load_BLE[0].any()]
        start_LGC = contiguous(experts, planner.capacity_LG)
        live_LGC, total, spent = start_LGC, np.zeros(6), []
        chosen = np.linspace(0, len(passes) - 1, options.samples).round().astype(int)
        for i, part in enumerate(passes):
            load_LE = part.load_BLE[0]
            plan = planner(load_LE, live_LGC)
            live_LGC = plan.slots_LGC
            for k in np.flatnonzero(chosen == i):
                layer = int(k * 7) % len(load_LE)
                load_E = load_LE[layer]
                mean = load_E.sum() / gpus
                link = machine.link_per_token

                oracle = (
                    float(machine.time.time(mean, max((load_E > 0).sum() / gpus, 1.0), 1.0)) + link * mean
                )
                exact = least_time(
                    load_E, planner.capacity_LG[layer], speed_G, planner.table, seconds=options.limit
                )
                began = time.perf_counter()
                free = timed_plan(
                    load_E[None],
                    start_LGC[layer : layer + 1],
                    planner.capacity_LG[layer : layer + 1],
                    speed_G,
                    planner.table,
                    load_G=np.zeros(gpus),
                )
                spent.append(time.perf_counter() - began)
                alone_GC = (start_LGC[layer] >= 0).astype(float)
                total += [
                    oracle,
                    layer_seconds(machine, load_E, start_LGC[layer], alone_GC),
                    exact.value,
                    exact.bound,
                    float(free.value_L[0]),
                    layer_seconds(machine, load_E, plan.slots_LGC[layer], plan.share_LGC[layer]),
                ]
        static, value, bound, free_time, live_time = total[1:] / total[0]
        print(
            f"| {name} | {static:.3f} | {bound:.3f} to {value:.3f} | {free_time:.3f} | {live_time:.3f} | "
            f"{np.median(spent) * 1e3:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
