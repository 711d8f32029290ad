"""Print how many moves re-plans with an even split make over what any method needs at least.

``python tests/benchmarks/even_moves_table.py --data DIR [--seconds 2] [--step 6] [--small 40]``

Recorded DeepSeek-V3 loads: every row plans prefill_in1024 with an even split, lets the traffic become another
and re-plans all layers to the tolerance. Of every ``--step``-th layer the least number of moves is bounded
(`fewest_even_moves`, ``--seconds`` each), for the time that the re-plan reached. With second copies the bound
is that of free shares.

Then small layers, where the programme of pairs tells the truth: moves of the re-plan, bound, truth.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.report import table
from moeless_opt.solvers.core import MaxTime
from moeless_opt.solvers.replan.even_counts import fewest_even_moves

ROWS = (
    (32, 9, "prefill_in4096", 0.02),
    (32, 9, "prefill_in4096", 0.05),
    (32, 9, "decode_in1000out1000", 0.02),
    (64, 5, "decode_in1000out1000", 0.02),
)
FILLS = ("none", "distinct", "copies")


def bounded(load_LE: Any, live: mo.Plan, plan: mo.Plan, fill: str, layers: Any, seconds: float) -> Any:
    """Moves, bound, and whether the bound is reached, of some layers."""
    gpus, slots = live.slots_LGC.shape[1:]
    moves_L, least, proven = plan.moves.count_L, [], 0
    for x in layers:
        found = fewest_even_moves(
            load_LE[x],
            live.slots_LGC[x],
            np.full(gpus, slots),
            np.ones(gpus),
            float(plan.certificate.value_L[x]),
            fill=fill,
            below=int(moves_L[x]) if moves_L[x] else None,
            stop=MaxTime(seconds),
        )
        least.append(found.bound)
        proven += found.bound >= moves_L[x]
    return int(moves_L[layers].sum()), int(sum(least)), proven


def large(folder: Path, seconds: float, step: int) -> None:
    """The rows of recorded loads."""
    with np.load(folder / "deepseek_v3_counts.npz") as archive:
        loads = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(np.float64), strict=True))
    before = loads["prefill_in1024"]
    lines = []
    for gpus, slots, name, tolerance in ROWS:
        topology = mo.uniform(gpus // 8, 8, slots=slots)
        for fill in FILLS:
            live = mo.plan(before, topology, split="equal", fill=fill)
            plan = mo.plan(
                loads[name], topology, current=live, split="equal", fill=fill, balance_tolerance=tolerance
            )
            layers = np.arange(0, len(before), step)
            moves, least, proven = bounded(loads[name], live, plan, fill, layers, seconds)
            lines.append(
                [
                    f"{gpus} x {slots}",
                    name,
                    f"{1 + tolerance}",
                    fill,
                    f"{plan.imbalance_L.mean():.4f}",
                    f"{plan.moves.fraction:.2%}",
                    f"{moves} / {least}",
                    f"{moves / max(least, 1):.2f}",
                    f"{proven} of {len(layers)}",
                ]
            )
            print(" | ".join(lines[-1]), flush=True)
    head = (
        "GPUs",
        "prefill_in1024 ->",
        "wanted",
        "fill",
        "reached",
        "moved",
        "moves / bound",
        "ratio",
        "proven",
    )
    print(table(head, lines))


def small(tries: int) -> None:
    """Random layers of 10 experts on 4 GPUs: moves of the re-plan, bound and truth."""
    topology = mo.uniform(1, 4, slots=4)
    for fill in FILLS[:2]:
        moved = bound = truth = best = 0
        for seed in range(tries):
            rng = np.random.default_rng(seed)
            before = rng.lognormal(0, 1, (1, 10))
            after = before * rng.lognormal(0, 0.5, before.shape)
            live = mo.plan(before, topology, split="equal", fill=fill)
            plan = mo.plan(after, topology, current=live, split="equal", fill=fill, balance_tolerance=0.05)
            given = (after[0], live.slots_LGC[0], np.full(4, 4), np.ones(4))
            time, moves = float(plan.certificate.value_L[0]), plan.moves.count
            counts = fewest_even_moves(*given, time, fill=fill, stop=MaxTime(20))
            exact = fewest_even_moves(*given, time, fill=fill, exact=True, stop=MaxTime(60))
            assert counts.bound <= exact.bound <= moves
            moved, bound, truth = moved + moves, bound + counts.bound, truth + exact.bound
            best += exact.bound == moves
        print(
            f"fill {fill}, {tries} layers of 10 experts on 4 GPUs x 4: {moved} moves, bound {bound}, "
            f"truth {truth}; fewest in {best}"
        )


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the recorded loads")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the bound of a layer")
    parser.add_argument("--step", type=int, default=6, help="one layer in so many is bounded")
    parser.add_argument("--small", type=int, default=40, help="small layers")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    small(arguments.small)
    large(arguments.data, arguments.seconds, arguments.step)


if __name__ == "__main__":
    main()
