"""What it takes to share a layer's tokens out on the host: the figures behind `--split host`.

    python tests/benchmarks/split_cost.py

Processor time of one layer's search (compiled), loads as skewed as the tiny MoE's, best of several rounds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import TimeModel, contiguous
from moeless_opt.solvers.timed import timed_shares

SHAPES = ((8, 8), (16, 8), (32, 8), (64, 8), (128, 16), (256, 32), (256, 64))


def microseconds(experts: int, gpus: int, rounds: int = 7, layers: int = 16) -> float:
    """Of one layer, one replica more on each GPU than static expert parallelism needs."""
    rng = np.random.default_rng(0)
    capacity = np.full((layers, gpus), -(-experts // gpus) + 1)
    slots = contiguous(experts, capacity)
    for layer in range(layers):
        for gpu in range(gpus):
            slots[layer, gpu, -1] = rng.choice(np.setdiff1d(np.arange(experts), slots[layer, gpu]))
    load = rng.multinomial(4000, rng.dirichlet(np.full(experts, 2.0), layers)).astype(float)
    table = TimeTable.of(TimeModel(token_cost=1e-6, activation_cost=1e-4, unit="s"), int(capacity.max()))
    best = np.inf
    for _ in range(rounds):
        began = time.process_time()
        timed_shares(load, slots, np.ones(gpus), table)
        best = min(best, time.process_time() - began)
    return best / layers * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    microseconds(8, 8, rounds=1)
    print("experts  GPUs  us a layer")
    for experts, gpus in SHAPES:
        print(f"{experts:7d} {gpus:5d} {microseconds(experts, gpus):11.0f}", flush=True)


if __name__ == "__main__":
    main()
