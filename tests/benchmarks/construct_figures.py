"""Figures of the equal-split construction: balance and time, by shape and effort.

    python tests/benchmarks/construct_figures.py [deepseek_v3_counts.npz]

Without the recording only the generated families are shown. Balance is the largest GPU load over the mean.
Times are of the processor, the least of several calls, so that neighbours on the machine disturb them little.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.pack.counts import apportion
from moeless_opt.solvers.pack.packing import pack


def milliseconds(call: Callable[..., Any], *args: Any, repeats: int = 5, **options: Any) -> float:
    """Least processor time of a call, each measured over enough calls for the clock."""
    call(*args, **options)
    best = np.inf
    for _ in range(repeats):
        calls, start = 0, time.process_time()
        while time.process_time() - start < 0.02:
            call(*args, **options)
            calls += 1
        best = min(best, (time.process_time() - start) / calls)
    return best * 1e3


def balance(load: Any, slots: Any) -> Any:
    """Largest GPU load over the mean, of each layer."""
    gpus = even_times(load, slots, np.ones(slots.shape[1]))
    return gpus.max(axis=1) / gpus.mean(axis=1)


def recorded(path: Path) -> None:
    """Each workload of the recording."""
    with np.load(path) as data:
        counts, names = data["counts"].astype(float), [str(name) for name in data["workloads"]]
    heads = ("mean", "worst", "packed", "numpy ms", "numba ms")
    print(f"{'workload':32}{'GPUs':>5}{'slots':>6}" + "".join(f"{head:>10}" for head in heads))
    for G, C in ((32, 9), (64, 5)):
        for name, load in zip(names, counts, strict=True):
            capacity, speed = np.full((len(load), G), C), np.ones(G)
            slots = construct_equal(load, capacity, speed, backend="numpy")
            start = balance(load, pack(load, apportion(load, G * C, G), capacity, speed)).mean()
            found = balance(load, slots)
            row = f"{name:32}{G:5}{G * C:6}{found.mean():10.5f}{found.max():10.5f}{start:10.5f}"
            for backend in ("numpy", "numba") if fast.available() else ("numpy",):
                assert (construct_equal(load, capacity, speed, backend=backend) == slots).all()
                row += f"{milliseconds(construct_equal, load, capacity, speed, backend=backend):10.2f}"
            print(row, flush=True)


def family(kind: str, L: int, E: int) -> Any:
    """Lognormal loads of a sigma, or Zipf loads of an exponent with 10 % jitter."""
    rng = np.random.default_rng(0)
    parameter = float(kind.split()[1])
    if kind.startswith("lognormal"):
        return rng.lognormal(0, parameter, (L, E))
    rank = np.tile(np.arange(1, E + 1) ** -parameter, (L, 1))
    return rng.permuted(rank, axis=1) * rng.uniform(0.9, 1.1, (L, E))


def generated(layers: int = 20) -> None:
    """Small and middling shapes, each effort."""
    print(f"\n{'loads':16}{'E/G/slots':>13}  {'packed':>8}", end="")
    for effort in ("quick", "normal"):
        print(f"  {effort + ' median/p90, ms per layer':>34}", end="")
    print()
    for E, G, C in ((8, 8, 2), (16, 8, 3), (64, 8, 10), (256, 64, 5)):
        for kind in ("lognormal 1.0", "lognormal 1.5", "zipf 0.8", "zipf 1.2"):
            load, capacity, speed = family(kind, layers, E), np.full((layers, G), C), np.ones(G)
            start = np.median(balance(load, pack(load, apportion(load, G * C, G), capacity, speed)))
            print(f"{kind:16}{f'{E}/{G}/{G * C}':>13}  {start:8.4f}", end="")
            for effort in ("quick", "normal"):
                found = balance(load, construct_equal(load, capacity, speed, effort=effort, backend="numpy"))
                options = {"effort": effort, "backend": "numpy"}
                spent = milliseconds(construct_equal, load, capacity, speed, repeats=3, **options) / layers
                print(f"  {np.median(found):12.4f} /{np.quantile(found, 0.9):8.4f},{spent:9.3f} ", end="")
            print(flush=True)


def single() -> None:
    """One layer per call: what a caller with a small model waits for."""
    load, capacity, speed = family("lognormal 1.0", 20, 8), np.full((1, 8), 2), np.ones(8)
    print()
    for effort in ("quick", "normal"):
        layers = [load[i : i + 1] for i in range(len(load))]
        spent = [milliseconds(construct_equal, one, capacity, speed, effort=effort) for one in layers]
        print(f"one layer 8/8/16, {effort}: median {np.median(spent):.3f} ms, worst {max(spent):.3f} ms")
    example = np.array([[600, 560, 120, 120, 20, 10, 10, 10.0]])
    slots = construct_equal(example, capacity, speed)
    spent_ms = milliseconds(construct_equal, example, capacity, speed)
    print(f"FlashLB's example: {even_times(example, slots, speed).max():.3f} in {spent_ms:.2f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        recorded(Path(sys.argv[1]))
    generated()
    single()
