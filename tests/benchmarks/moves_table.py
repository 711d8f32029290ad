"""Print how many moves re-plans make over the proven least, by drift, and where the truth lies.

``python tests/benchmarks/moves_table.py --data DIR [--thorough 15] [--proof 10] [--rows tuned|unseen|all]``

Every row plans traffic A by our own fractional plan, lets the traffic become B and re-plans all layers to
1 %: once quickly (the default, no clock) and once with ``time_limit``. The least number of moves of each
layer is then proven as far as ``--proof`` seconds go, from the better of the two plans. Columns:

- stay: imbalance if nothing moves and shares are re-solved; after: mean and worst imbalance of the quick plan
- quick, thorough: moves of all layers; ms of the quick ``plan()``: median of the clock, the processor's least
- says: bound that the quick plan's certificate carries; least: proven at least, of all runs
- quick/least, thorough/least: what is wanted at most 1.15 and 1.03
- truth: layers whose least is proven exactly, and the moves of quick, thorough and of the truth over those

The rows "unseen" were looked at only after the methods were done: recordings of other models, other pairs of
workloads, and lognormal loads.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.report import table
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.replan.min_moves import min_moves, min_moves_bound

TUNED = (("prefill_in1024", "prefill_in4096"), ("prefill_in1024", "decode_in1000out1000"))
UNSEEN = (
    ("prefill_in512", "prefill_in1000out1000"),
    ("decode_in500out1500", "prefill_in1024"),
    ("prefill_in4096", "decode_in500out1500"),
)
SHAPES = ((32, 9), (64, 5))


def rows(folder: Path, chosen: str) -> Iterator[tuple[str, int, int, Any, Any]]:
    """(name, GPUs, slots of each, loads before, loads after)."""
    with np.load(folder / "deepseek_v3_counts.npz") as archive:
        loads = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(np.float64), strict=True))
    for gpus, slots in SHAPES:
        for a, b in (*(TUNED if chosen != "unseen" else ()), *(UNSEEN if chosen != "tuned" else ())):
            yield f"{a} -> {b}", gpus, slots, loads[a], loads[b]
    if chosen == "tuned":
        return
    rng = np.random.default_rng(7)
    before = rng.lognormal(0.0, 1.0, (16, 256))
    after = before * rng.lognormal(0.0, 0.5, before.shape)
    yield "lognormal, drift 0.5 (16 layers)", 32, 9, before, after
    with np.load(folder / "qwen15_moe_iterations.npz") as archive:
        sets = [archive[name].astype(np.float64) for name in sorted(archive.files)]
    sets = [one for one in sets if one.ndim == 3]
    if len(sets) > 1:
        yield "Qwen1.5-MoE, one data set -> another", 8, 9, sets[0].sum(0), sets[1].sum(0)


def contents(slots_GC: Any) -> list[list[int]]:
    """Experts on each GPU."""
    return [[int(expert) for expert in row if expert >= 0] for row in slots_GC]


def measured(row: tuple[str, int, int, Any, Any], repeats: int, thorough: float, proof: float) -> list[str]:
    """One line of the table."""
    name, gpus, slots, before, after = row
    topology = mo.uniform(gpus // 8, 8, slots=slots)
    live = mo.plan(before, topology)
    stay = mo.plan(after, topology, current=live, solver="stay")
    clocks, processor = [], []
    quick = mo.plan(after, topology, current=live)
    for _ in range(repeats):
        start, begun = time.perf_counter(), time.process_time()
        quick = mo.plan(after, topology, current=live)
        clocks.append((time.perf_counter() - start) * 1e3)
        processor.append((time.process_time() - begun) * 1e3)
    slow = mo.plan(after, topology, current=live, time_limit=thorough)
    # What the wanted time is, and the least moves for it: the plans' own bounds, then exact runs.
    wanted_L = quick.certificate.lower_bound_L * 1.01
    speed, capacity = np.ones(gpus), [slots] * gpus
    flow_L = min_moves_bound(after, live.slots_LGC, speed, wanted_L)
    moves = {"quick": moved_L(quick, live), "thorough": moved_L(slow, live)}
    in_time = slow.certificate.value_L <= wanted_L * (1 + 1e-9)
    least_L, truth_L = flow_L.copy(), np.full(len(after), -1)
    for layer in range(len(after)):
        best = slow if in_time[layer] else quick
        if best.certificate.value_L[layer] > wanted_L[layer] * (1 + 1e-6):
            continue  # out of reach for both
        answer = min_moves(
            after[layer],
            live.slots_LGC[layer],
            capacity,
            speed,
            float(max(wanted_L[layer], best.certificate.value_L[layer])),
            known=contents(best.slots_LGC[layer]),
            stop=MaxTime(proof),
        )
        least_L[layer] = max(least_L[layer], answer.bound)
        if answer.status == "optimal":
            truth_L[layer] = answer.bound
    sure = truth_L >= 0
    total = {key: int(value.sum()) for key, value in moves.items()}
    least = max(int(least_L.sum()), 1)
    said = quick.certificate.proof.split()[-1]
    return [
        f"{gpus} x {slots}",
        name,
        f"{stay.imbalance_L.mean():.3f}",
        f"{quick.imbalance_L.mean():.4f} / {quick.imbalance_L.max():.4f}",
        str(total["quick"]),
        f"{statistics.median(clocks):.0f} / {min(processor):.0f}",
        str(total["thorough"]),
        said,
        str(int(least_L.sum())),
        f"{total['quick'] / least:.2f}",
        f"{total['thorough'] / least:.2f}",
        f"{int(sure.sum())} of {len(after)}: "
        f"{moves['quick'][sure].sum()} / {moves['thorough'][sure].sum()} / {truth_L[sure].sum()}",
    ]


def moved_L(plan: Any, live: Any) -> Any:
    """Moves of each layer."""
    return np.array(
        [
            sum(expert not in old for old, new in zip(before, after, strict=True) for expert in new)
            for before, after in zip(
                map(contents, live.slots_LGC), map(contents, plan.slots_LGC), strict=True
            )
        ]
    )


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the recorded loads")
    parser.add_argument("--thorough", type=float, default=15.0, help="seconds of a thorough re-plan")
    parser.add_argument("--proof", type=float, default=10.0, help="seconds of a layer's exact run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", choices=("tuned", "unseen", "all"), default="all")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    head = ("GPUs", "A -> B", "stay", "after", "quick", "ms", "thorough", "says", "least", "quick/least")
    head = (*head, "thorough/least", "truth: quick / thorough / least")
    lines = []
    for row in rows(arguments.data, arguments.rows):
        lines.append(measured(row, arguments.repeats, arguments.thorough, arguments.proof))
        print(" | ".join(lines[-1]), flush=True)
    print(table(head, lines))


if __name__ == "__main__":
    main()
