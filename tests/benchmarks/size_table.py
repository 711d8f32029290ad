"""How planning grows with the model: seconds and peak memory of whole calls, size by size.

    python tests/benchmarks/size_table.py [--data DIR] [--sizes 128 256 512 1024] [--layers 60] [--slots 2]
    python tests/benchmarks/size_table.py --one-shot [--data DIR]

The first prints, for as many GPUs as experts, what `moeless_opt.plan` takes from nothing and from a live
plan whose loads have drifted (times lognormal noise of sigma 0.3), for both splits: seconds of processor time
and the peak memory of a process of its own, everything included (bounds, verification, certificate), and by
what factor a doubling of the size multiplies the seconds. The second prints one equal split of 58 x 256
experts on 32 x 9 slots: median of many warm calls, compiled and not, of the construction alone and of the
whole call. With ``--data`` the loads are those of DIR/deepseek_v3_counts.npz (workloads side by side where
more experts are wanted, the next workload as the drift), else lognormal.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.plan import even_times
from moeless_opt.report import table
from moeless_opt.solvers.construct import construct_equal
from moeless_opt.solvers.pack import fast

TARGETS = (1.001, 1.0005)  # of the one-shot rows
CASES = ("fractional", "equal", "re-plan fractional", "re-plan equal")


def loads(data: Path | None, layers: int, experts: int) -> tuple[FloatArray, FloatArray]:
    """Loads before and after the drift, shape [layers, experts]."""
    if data is None:
        rng = np.random.default_rng(0)
        before = rng.lognormal(0.0, 1.0, (layers, experts)) * 1000.0
        return before, before * rng.lognormal(0.0, 0.3, before.shape)
    counts = np.load(data / "deepseek_v3_counts.npz")["counts"].astype(np.float64)
    counts /= counts.mean(axis=2, keepdims=True) / 1000.0
    side = -(-experts // counts.shape[2])
    parts = [np.concatenate([counts[(first + k) % len(counts)] for k in range(side)], 1) for first in (0, 1)]
    rows = np.arange(layers) % counts.shape[1]
    return parts[0][rows, :experts], parts[1][rows, :experts]


def measured(
    case: str, data: Path | None, layers: int, size: int, slots: int, compiled: bool
) -> dict[str, Any]:
    """One case in this process: seconds, peak memory in GB (of the whole process), worst imbalance, moves."""
    if compiled:
        fast.warm()
    before, after = loads(data, layers, size)
    topology = mo.uniform(max(size // 8, 1), min(size, 8), slots=slots)
    split = case.split()[-1]
    current = mo.plan(before, topology, split=split) if case.startswith("re-plan") else None
    mo.plan(before[:1, :8], mo.uniform(1, 8, slots=2), split=split)  # imports
    began = time.process_time()
    plan = mo.plan(before if current is None else after, topology, split=split, current=current)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "seconds": seconds,
        "peak": peak,
        "imbalance": float(plan.imbalance_L.mean()),
        "gap": plan.certificate.gap,
        "moves": plan.moves.fraction if current is not None else None,
    }


def grown(arguments: argparse.Namespace) -> str:
    """Table of all sizes and cases, each in a process of its own."""
    rows = []
    for compiled in (False, True) if fast.available() else (False,):
        for case in CASES:
            last = None
            for size in arguments.sizes:
                options = ["--case", case, "--sizes", str(size), *["--compiled"] * compiled]
                for name in ("data", "layers", "slots"):
                    if (value := getattr(arguments, name)) is not None:
                        options += [f"--{name}", str(value)]
                done = subprocess.run(
                    [sys.executable, __file__, *options], check=True, capture_output=True, text=True
                )
                found = json.loads(done.stdout)
                growth = "" if last is None else f"{found['seconds'] / last:.1f}"
                last = found["seconds"]
                moves = "" if found["moves"] is None else f"{found['moves']:.2%}"
                rows.append(
                    [
                        f"{case}, {'Numba' if compiled else 'NumPy'}",
                        str(size),
                        f"{found['seconds']:.2f}",
                        growth,
                        f"{found['peak']:.2f}",
                        f"{found['imbalance']:.5f}",
                        f"{found['gap']:.3%}",
                        moves,
                    ]
                )
                print("\t".join(rows[-1]), file=sys.stderr, flush=True)
    head = ("call", "experts, GPUs", "s", "growth", "peak GB", "imbalance", "gap", "moved")
    return table(head, rows)


def median_ms(call: Callable[[], Any], repeats: int = 200) -> tuple[float, float]:
    """Median and least milliseconds of a warm call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3, min(times) * 1e3


def one_shot(data: Path | None) -> str:
    """Equal splits of 58 layers of 256 experts on 32 GPUs of 9 slots."""
    load_LE, _ = loads(data, 58, 256)
    capacity_LG, speed_G = np.full((58, 32), 9), np.ones(32)
    topology = mo.uniform(4, 8, slots=9)
    rows = []
    for backend in ("numpy", "numba") if fast.available() else ("numpy",):
        if backend == "numba":
            fast.warm()
        for effort in ("quick", "normal"):

            def kernel(effort: str = effort, backend: str = backend) -> Any:
                return construct_equal(load_LE, capacity_LG, speed_G, effort=effort, backend=backend)

            def whole(effort: str = effort) -> Any:
                return mo.plan(load_LE, topology, split="equal", effort=effort)

            ratio_L = even_times(load_LE, kernel(), speed_G).max(axis=1) / load_LE.mean(axis=1) / 8
            for name, call in (("construction", kernel), ("plan()", whole)):
                median, least = median_ms(call)
                ratios = f"{ratio_L.mean():.5f}", f"{ratio_L.max():.5f}"
                rows.append([name, effort, backend, *ratios, f"{median:.2f}", f"{least:.2f}"])
    return table(("call", "effort", "backend", "mean", "worst", "median ms", "least ms"), rows)


def main() -> None:
    """Print a table, or one case of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--one-shot", action="store_true")
    parser.add_argument("--case", choices=CASES, help="one case in this process, as JSON")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    if arguments.one_shot:
        print(one_shot(arguments.data))
    elif arguments.case is not None:
        size, rest = arguments.sizes[0], (arguments.layers, arguments.sizes[0], arguments.slots)
        assert size > 0
        print(json.dumps(measured(arguments.case, arguments.data, *rest, arguments.compiled)))
    else:
        print(grown(arguments))


if __name__ == "__main__":
    main()
