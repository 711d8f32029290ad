"""Print the planner's figures: imbalance and time, beside EPLB in the same run.

``python tests/benchmarks/plan_table.py [--data DIR]`` takes the measured loads in DIR
(``deepseek_v3_counts.npz``); without it, the shipped instances of the same shape.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.plan.evaluate import gpu_times, imbalance
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.wishes import FILLS
from moeless_opt.report import table
from moeless_opt.solvers.baselines import eplb
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.pack import fast


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a warm call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def workloads(data: Path | None) -> dict[str, np.ndarray]:
    """Loads [58, 256] by name."""
    if data is None:
        names = ("deepseek-v3-lognormal", "deepseek-v3-zipf")
        return {name: mo.load_instance(name).load_LE for name in names}
    with np.load(data / "deepseek_v3_counts.npz") as archive:
        return dict(zip(archive["workloads"].tolist(), archive["counts"].astype(np.float64), strict=True))


def duplicates(slots_LGC: np.ndarray) -> int:
    """Slots that repeat an expert of their GPU."""
    ordered = np.sort(slots_LGC, axis=2)
    return int(((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).sum())


def construction(loads: dict[str, np.ndarray], nodes: int, slots: int, repeats: int) -> str:
    """Imbalance (mean over layers of max/mean) and milliseconds for all layers, per workload."""
    gpus = 8 * nodes
    speed = np.ones(gpus)
    rows = []
    for name, load in loads.items():
        capacity = np.full((len(load), gpus), slots)

        def ratio(slots_LGC: np.ndarray, share: np.ndarray, load: np.ndarray = load) -> float:
            return float(imbalance(gpu_times(load, slots_LGC, share, speed), speed).mean())

        def published(load: np.ndarray = load) -> eplb.Rebalanced:
            return eplb.rebalance(load, gpus * slots, 8, nodes, gpus, policy="global")

        def equal(backend: str, load: np.ndarray = load, capacity: np.ndarray = capacity) -> np.ndarray:
            return construct_equal(load, capacity, speed, backend=backend)

        def free(load: np.ndarray = load, capacity: np.ndarray = capacity) -> tuple[np.ndarray, np.ndarray]:
            return construct_fractional(load, capacity, speed)

        slots_LGC = equal("numpy")
        share = equal_shares(slots_LGC, load.shape[1])
        merged = published().merged()
        row = [name, f"{ratio(merged[0], merged[1]):.4f}", f"{median_ms(published, repeats):.1f}"]
        row += [f"{ratio(slots_LGC, share):.5f}", str(duplicates(slots_LGC))]
        row += [f"{median_ms(lambda: equal('numpy'), repeats):.1f}"]
        row += [f"{median_ms(lambda: equal('numba'), repeats):.1f}" if fast.available() else "-"]
        row += [f"{ratio(*free()) - 1:.1e}", f"{median_ms(free, repeats):.1f}"]
        rows.append(row)
    head = ("workload", "EPLB", "ms", "equal", "duplicates", "NumPy ms", "Numba ms", "fractional - 1", "ms")
    return f"{gpus} GPUs, {gpus * slots} slots:\n" + table(head, rows)


def peers(loads: dict[str, np.ndarray]) -> str:
    """EPLB's own figures, both policies."""
    rows = []
    for name, load in loads.items():
        for nodes, slots in ((4, 9), (8, 5)):
            cells = [name, f"{8 * nodes}"]
            for policy in ("global", "hierarchical"):
                found = eplb.rebalance(load, 8 * nodes * slots, 8, nodes, 8 * nodes, policy=policy)
                slots_LGC, share, wasted = found.merged()
                times = gpu_times(load, slots_LGC, share, np.ones(8 * nodes))
                cells += [f"{imbalance(times, np.ones(8 * nodes)).mean():.3f}", str(int(wasted.sum()))]
            rows.append(cells)
    return table(("EPLB", "GPUs", "global", "wasted slots", "hierarchical", "wasted slots"), rows)


def solved(problem: mo.Problem, solver: str = "auto") -> tuple[mo.Plan, float]:
    """The plan of a warm solve, and its milliseconds of processor time."""
    mo.solve(problem, solver)
    start = time.process_time()
    plan = mo.solve(problem, solver).plan
    assert plan is not None
    return plan, (time.process_time() - start) * 1e3


def fillings(loads: dict[str, np.ndarray]) -> str:
    """Full slots: EPLB's second copies and ours, one shot with an even split, judged by the same verifier."""
    sizes = (mo.uniform(4, 8, slots=9), mo.uniform(8, 8, slots=5))
    cases = [(name, load, topology) for topology in sizes for name, load in loads.items()]
    mixtral = mo.load_instance("mixtral-lognormal").load_LE
    cases += [("mixtral-lognormal", mixtral, mo.uniform(1, gpus, slots=16 // gpus)) for gpus in (8, 4)]
    rows = []
    for name, load, topology in cases:
        problem = mo.Problem(loads=mo.Loads(load_TLE=load), topology=topology, split="equal")
        row = [f"{name}, {topology.gpus} x {int(topology.slots_G.max())}"]
        for fill, solver in (("copies", "eplb"), *((fill, "auto") for fill in FILLS)):
            plan, ms = solved(problem.replace(fill=fill), solver)
            row += [f"{plan.imbalance_L.mean():.5f}", f"{ms:.0f}"]
        rows.append(row)
    return table(("equal split", "EPLB", "ms", *(word for fill in FILLS for word in (str(fill), "ms"))), rows)


def refilled(loads: dict[str, np.ndarray]) -> str:
    """What a fractional re-plan moves with and without full slots, from our plan and from EPLB's."""
    before, after = ("prefill_in1024", "prefill_in4096") if "prefill_in1024" in loads else tuple(loads)[:2]
    rows = []
    for nodes, slots in ((4, 9), (8, 5)):
        topology = mo.uniform(nodes, 8, slots=slots)
        for whose, solver, split in (("ours", "auto", "fractional"), ("EPLB's", "eplb", "equal")):
            live = mo.plan(loads[before], topology, split=split, fill="copies", solver=solver)
            problem = mo.Problem(
                loads=mo.Loads(load_TLE=loads[after]), topology=topology, current=live.placement
            )
            row = [f"{8 * nodes} x {slots}, from {whose}"]
            for fill in FILLS:
                plan, ms = solved(problem.replace(fill=fill))
                row += [f"{plan.moves.fraction:.2%} to {plan.imbalance_L.mean():.4f}", f"{ms:.0f}"]
            rows.append(row)
    return table(("re-plan, fractional", *(word for fill in FILLS for word in (str(fill), "ms"))), rows)


def small(repeats: int) -> str:
    """One layer from a warm Python call, and the published examples."""
    topology = mo.uniform(1, 8, slots=2)
    layer = mo.load_instance("mixtral-lognormal").load_LE[:1]
    rows = []
    for split in ("fractional", "equal"):
        ms = median_ms(lambda split=split: mo.plan(layer, topology, split=split), 20 * repeats)
        quick = (
            median_ms(lambda split=split: mo.plan(layer, topology, split=split, effort="quick"), 20 * repeats)
            if split == "equal"
            else ms
        )
        best = mo.plan(layer, topology, split=split)
        rows.append(
            [
                f"plan(), 8 experts on 8 GPUs x 2, {split}",
                f"{best.imbalance_L[0]:.4f}",
                f"{ms:.3f}",
                f"{quick:.3f}",
            ]
        )
    for name in (
        "flashlb-equal",
        "flashlb-fractional",
        "deepseek-readme-equal",
        "deepseek-readme-fractional",
    ):
        problem = mo.load_instance(name)
        result = mo.solve(problem)
        assert result.plan is not None
        values = ", ".join(f"{value:.3f}" for value in result.plan.certificate.value_L)
        rows.append(
            [name, values, f"{median_ms(lambda problem=problem: mo.solve(problem), repeats):.2f}", "-"]
        )
    return table(("one call", "result", "ms", "quick ms"), rows)


def commands(repeats: int) -> str:
    """Seconds of fresh processes."""
    rows = []
    for title, command in (
        ("import moeless_opt", [sys.executable, "-c", "import moeless_opt"]),
        ("python -c pass", [sys.executable, "-c", "pass"]),
        (
            "moeless-solve deepseek-v3-lognormal",
            [sys.executable, "-m", "moeless_opt.cli", "deepseek-v3-lognormal"],
        ),
    ):
        times = []
        for _ in range(max(repeats // 2, 3)):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        rows.append([title, f"{statistics.median(times):.2f}"])
    return table(("fresh process", "s"), rows)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the measured recordings")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    loads = workloads(args.data)
    print(
        f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}; medians, warm\n"
    )
    for nodes, slots in ((4, 9), (8, 5)):
        print(construction(loads, nodes, slots, args.repeats), end="\n\n")
    print(peers(loads), end="\n\n")
    print(fillings(loads), end="\n\n")
    print(refilled(loads), end="\n\n")
    print(small(args.repeats), end="\n\n")
    print(commands(args.repeats))


if __name__ == "__main__":
    main()
