"""How well solvers keep a time limit: ``python tests/benchmarks/limits_table.py [--limits 0.3 1 5]``.

58 layers of 256 experts (lognormal), both splits, every solver that takes a limit; wall seconds, warm.
Wanted: at most a fifth and two tenths of a second beyond the limit; rows beyond are marked.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import moeless_opt as mo
from moeless_opt.solvers.core import FEATURES, PUBLISHED, Feature

ASKS = {
    "sized": {"sizing": mo.Sizing(policy="makespan", imbalance=1.05)},
    "activation": {"time": mo.TimeModel(activation_cost=50.0)},
    "constrained": {"limits": mo.Limits(max_replicas=6)},
    "lexicographic": {"objective": mo.Objective(priorities=("memory", "balance"))},
}


def problems(gpus: int, split: str, layers: int) -> tuple[mo.Problem, mo.Problem]:
    """A problem with nothing live, and one whose loads have drifted from what is live."""
    rng = np.random.default_rng(5)
    load_LE = rng.lognormal(0, 1.2, (layers, 256)) * 1000
    topology = mo.uniform(gpus // 8, 8, slots=256 // gpus + 1)
    fresh = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology, split=split)
    before = load_LE * rng.lognormal(0, 0.5, load_LE.shape)
    live = mo.solve(fresh.replace(loads=mo.Loads(load_TLE=before[None])), "construct").plan
    assert live is not None
    current = mo.Placement(slots_LGC=live.slots_LGC, experts=256)
    return fresh, fresh.replace(current=current)


def main() -> None:
    """Print a row per solver and limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.3, 1.0, 5.0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--layers", type=int, default=58)
    args = parser.parse_args()
    for gpus in args.gpus:
        for split, feature in (("equal", Feature.EQUAL_SPLIT), ("fractional", Feature.FRACTIONAL)):
            fresh, live = problems(gpus, split, args.layers)
            for name, features in FEATURES.items():
                if name in PUBLISHED or feature not in features:
                    continue
                problem = live if name in ("replan", "min-moves", "stay") else fresh
                problem = problem.replace(**ASKS.get(name, {}))
                mo.solve(problem, name, time_limit=args.limits[0])  # warms up
                for limit in args.limits:
                    began = time.perf_counter()
                    result = mo.solve(problem, name, time_limit=limit)
                    took = time.perf_counter() - began
                    late = "LATE" if took > 1.2 * limit + 0.2 else ""
                    print(
                        f"{gpus} GPUs {split:10} {name:14} {limit:4} s: {took:5.2f} s {result.status} {late}"
                    )


if __name__ == "__main__":
    main()
