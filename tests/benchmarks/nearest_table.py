"""Print what plans are worth where every source GPU sends to the nearest replica.

``python tests/benchmarks/nearest_table.py [--data DIR] [--layers N]`` judges plans for an even split, EPLB's
and ours for the nearest replica by that rule, and re-plans ours when the traffic changes: measured loads in
DIR (``deepseek_v3_counts.npz``), else a drifting lognormal of the same shape. *SGLang* is its static dispatch
by the letter, where a source sends all its tokens of an expert to one replica. Processor seconds, compiled
where Numba is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.adapters import sglang_loads
from moeless_opt.api import judge
from moeless_opt.problems.plan import objective_vector
from moeless_opt.report import table

SHAPES = ((4, 8, 9), (8, 8, 5))
FRESH = ("decode_in1000out1000", "prefill_in1024")
DRIFTS = (
    ("prefill_in1024", "prefill_in4096", 0.02),
    ("prefill_in1024", "prefill_in4096", 0.05),
    ("prefill_in1024", "decode_in1000out1000", 0.02),
)
PLANS = (
    ("even split", "equal", "construct"),
    ("EPLB global", "equal", "eplb"),
    ("EPLB hierarchical", "equal", "eplb-hierarchical"),
    ("ours, nearest", "nearest", "construct"),
)


def recorded(folder: Path | None, layers: int) -> dict[str, np.ndarray]:
    """Loads [layers, 256] by name."""
    names = sorted({*FRESH, *(name for row in DRIFTS for name in row[:2])})
    if folder is not None:
        with np.load(folder / "deepseek_v3_counts.npz") as archive:
            counts = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(float), strict=True))
        return {name: counts[name][:layers] for name in names}
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 0.8, (layers, 256))
    return {name: base * rng.lognormal(0, 0.3, base.shape) for name in names}


def timed(call: Callable[[], mo.Plan]) -> tuple[mo.Plan, float]:
    """The plan, and processor seconds."""
    begun = time.process_time()
    plan = call()
    return plan, time.process_time() - begun


def worth(load_LE: np.ndarray, topology: mo.Topology, plan: mo.Plan) -> list[str]:
    """Cells of a plan that is judged by the nearest replica, and by SGLang's letter."""
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology, split="nearest")
    judged = judge(problem, plan)[0]
    leaves = objective_vector(problem, judged)["traffic"] / load_LE.sum()
    tokens_LG, _ = sglang_loads(load_LE, plan.slots_LGC, topology.nodes)
    ratio_L = tokens_LG.max(1) / tokens_LG.mean(1)
    bound_L = judged.certificate.lower_bound_L / judged.time_LG.mean(1)
    near_L = judged.imbalance_L
    return [
        f"{near_L.mean():.4f}",
        f"{near_L.max():.4f}",
        f"{bound_L.mean():.4f}",
        f"{leaves:.1%}",
        f"{ratio_L.mean():.4f}",
        f"{ratio_L.max():.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    args = parser.parse_args()
    mo.warm_up()
    loads = recorded(args.data, args.layers)
    head = ["GPUs", "loads", "plan", "its split", "nearest", "worst", "bound", "leaves node"]
    rows, again = [], []
    for nodes, each, slots in SHAPES:
        topology = mo.uniform(nodes, each, slots=slots)
        for name in FRESH:
            for title, split, solver in PLANS:
                plan, seconds = timed(
                    lambda split=split, solver=solver, name=name, topology=topology: mo.plan(  # type: ignore[misc]
                        loads[name], topology, split=split, solver=solver, model="DeepSeek-V3"
                    )
                )
                cells = worth(loads[name], topology, plan)
                own = f"{plan.imbalance_L.mean():.4f}"
                rows.append([f"{nodes * each} x {slots}", name, title, own, *cells, f"{seconds:.2f}"])
        for before, after, tolerance in DRIFTS:
            live = mo.plan(loads[before], topology, split="nearest")
            wish = mo.Objective(balance_tolerance=tolerance)
            plan, seconds = timed(
                lambda after=after, live=live, wish=wish, topology=topology: mo.plan(  # type: ignore[misc]
                    loads[after], topology, split="nearest", current=live, objective=wish
                )
            )
            change = f"{before} -> {after} to {1 + tolerance:g}"
            cells = worth(loads[after], topology, plan)
            again.append(
                [f"{nodes * each} x {slots}", change, f"{plan.moves.fraction:.2%}", *cells, f"{seconds:.2f}"]
            )
    print(table([*head, "SGLang", "worst", "cpu s"], rows))
    print()
    last = ["nearest", "worst", "bound", "leaves node", "SGLang", "worst", "cpu s"]
    print(table(["GPUs", "re-plan", "moves", *last], again))


if __name__ == "__main__":
    main()
