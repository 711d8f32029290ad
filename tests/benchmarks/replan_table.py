"""Print what re-planning moves, row by row of the table that it is held to, and the distance from the least.

``python tests/benchmarks/replan_table.py [--data DIR]`` plans on traffic A by equal-split construction,
lets the traffic become B and re-plans all layers, on the measured loads in DIR
(``deepseek_v3_counts.npz``). With ``--gap`` it compares quick and thorough re-plans with the proven least
number of moves, on synthetic loads and, where DIR is given, on measured ones. ``--own`` starts from our own
fractional plan on A instead.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.report import table
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.core.stopping import MaxTime, Stop
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.min_moves import min_moves
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.equal_table import timed

ROWS = (
    (32, 9, "prefill_in1024", "prefill_in4096", (2.1, 1.8, 1.1, 0.5, 8)),
    (32, 9, "prefill_in1024", "decode_in1000out1000", (5.6, 4.5, 3.0, 2.5, 10)),
    (32, 9, "decode_in1000out1000", "decode_in500out1500", (0.4, 0.35, 0.25, 0.02, 4)),
    (64, 5, "prefill_in1024", "prefill_in4096", (4.7, 4.0, 2.3, 1.0, 16)),
    (64, 5, "prefill_in1024", "decode_in1000out1000", (9.0, 7.5, 5.0, 4.5, 20)),
)


def replanned(
    kernel: Callable[..., Replanned],
    load: Any,
    live: Any,
    capacity: Any,
    speed: Any,
    *,
    stop: Stop | None = None,
    **wish: Any,
) -> Replanned:
    """One kernel's re-plan."""
    return kernel(ReplanTask(load, live, capacity, speed), ReplanWish(**wish), stop=stop)


def milliseconds(call: Callable[[], Replanned], repeats: int) -> tuple[Replanned, str]:
    """Result and median milliseconds: of the clock, and of the processor (less shaken by other work)."""
    result, clock, processor = timed(call, repeats)
    return result, f"{clock:.0f} / {processor:.0f}"


def share(plan: Replanned, slots: int, tolerance: float, bound_L: np.ndarray) -> str:
    """Percent of the slots that moved; a mark where a layer misses the wanted balance."""
    missed = int((plan.time_L > (1 + tolerance) * bound_L * (1 + 1e-6)).sum())
    return f"{100 * plan.moves_L.mean() / slots:.3f}" + (f" ({missed} layers miss)" if missed else "")


def print_table(loads: dict[str, np.ndarray], repeats: int, limit: float) -> None:
    """Measured beside wanted, per row."""
    print(
        "percent of slots moved: measured (wanted at most); ms of all layers, clock / processor, median of",
        repeats,
    )
    print(
        "| GPUs, slots | A -> B | stay, shares only | quick 1 % | ms | thorough 1 % | proven at least "
        "| quick 5 % | ms | equal split 2 % | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for gpus, width, before, after, wanted in ROWS:
        old, new = loads[before], loads[after]
        L, slots = len(old), gpus * width
        capacity, speed = np.full((L, gpus), width), np.ones(gpus)
        live = construct_equal(old, capacity, speed)
        mean_L = new.sum(axis=1) / gpus

        def fractional(
            new: np.ndarray = new,
            live: np.ndarray = live,
            capacity: np.ndarray = capacity,
            speed: np.ndarray = speed,
            **options: Any,
        ) -> Replanned:
            return replanned(replan_fractional, new, live, capacity, speed, **options)

        stay = fractional(tolerance=1e6)
        quick, quick_ms = milliseconds(fractional, repeats)
        loose, loose_ms = milliseconds(lambda run=fractional: run(tolerance=0.05), repeats)
        thorough = fractional(until_stopped=True, stop=MaxTime(limit))
        equal, equal_ms = milliseconds(
            lambda new=new, live=live, capacity=capacity, speed=speed: replanned(
                replan_equal, new, live, capacity, speed, tolerance=0.02
            ),
            1,
        )
        cells = (
            f"{gpus}, {slots}",
            f"{before} -> {after}",
            f"{(stay.time_L / mean_L).mean():.3f}",
            f"{share(quick, slots, 0.01, mean_L)} ({wanted[1]})",
            quick_ms,
            f"{share(thorough, slots, 0.01, mean_L)} ({wanted[2]})",
            f"{100 * quick.least_moves_L.mean() / slots:.3f}",
            f"{share(loose, slots, 0.05, mean_L)} ({wanted[3]})",
            loose_ms,
            f"{share(equal, slots, 0.02, mean_L)} ({wanted[4]})",
            equal_ms,
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def drifted(experts: int, layers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lognormal loads (sigma 1) and the same after noise (sigma 0.3)."""
    rng = np.random.default_rng(seed)
    before = rng.lognormal(0.0, 1.0, (layers, experts))
    return before, before * rng.lognormal(0.0, 0.3, (layers, experts))


def families(
    loads: dict[str, np.ndarray] | None, scale: float
) -> Iterator[tuple[str, int, int, np.ndarray, np.ndarray]]:
    """(name, GPUs, slots of each, loads before, loads after)."""
    for experts, gpus, width, synthetic, real in (
        (64, 8, 10, 50, 58),
        (128, 16, 10, 25, 25),
        (256, 32, 9, 10, 58),
    ):
        before, after = drifted(experts, max(1, round(synthetic * scale)), seed=experts)
        yield f"{experts}/{gpus} lognormal, drift 0.3", gpus, width, before, after
        if loads is not None:
            chosen = np.arange(0, 58, max(1, round(58 / (real * scale))))
            before, after = loads["prefill_in1024"][chosen], loads["prefill_in4096"][chosen]
            name = f"{experts}/{gpus} DeepSeek-V3" + (
                "" if experts == 256 else f", its first {experts} experts"
            )
            yield name, gpus, width, before[:, :experts], after[:, :experts]


def print_gap(loads: dict[str, np.ndarray] | None, limit: float, seconds: float, scale: float) -> None:
    """Quick and thorough against the proven least number of moves, layer by layer."""
    print(f"tolerance 1 %; thorough: {seconds} s a layer; proof: at most {limit} s a layer")
    print(
        "| loads | layers | proven | thorough equal | thorough worst | quick equal | quick above (mean) "
        "| unproven |"
    )
    print("|---|---|---|---|---|---|---|---|")
    everything: list[tuple[int, int, int, bool]] = []
    for name, gpus, width, before, after in families(loads, scale):
        L = len(before)
        capacity, speed = np.full((L, gpus), width), np.ones(gpus)
        live = construct_equal(before, capacity, speed)
        quick = replanned(replan_fractional, after, live, capacity, speed)
        best = replanned(
            replan_fractional,
            after,
            live,
            capacity,
            speed,
            until_stopped=True,
            stop=MaxTime(seconds * L),
        )
        records = []
        for layer in range(L):
            reached = best.time_L[layer] <= best.target_L[layer] * (1 + 1e-9)
            if not reached:
                print(f"# {name}, layer {layer}: the wanted time wasn't reached, left out")
                continue
            known = [[int(e) for e in row if e >= 0] for row in best.slots_LGC[layer]]
            proof = min_moves(
                after[layer],
                live[layer],
                capacity[layer],
                speed,
                float(best.target_L[layer]),
                known=known,
                stop=MaxTime(limit),
            )
            proven = proof.status == "optimal"
            records.append((int(quick.moves_L[layer]), int(best.moves_L[layer]), proof.bound, proven))
        everything += records
        print(gap_row(name, records), flush=True)
    print(gap_row("all", everything))


def gap_row(name: str, records: list[tuple[int, int, int, bool]]) -> str:
    """One line: counts over layers whose least number of moves is proven, and the rest told apart."""
    proven = [(quick, best, least) for quick, best, least, sure in records if sure]
    rest = [(best, bound) for _, best, bound, sure in records if not sure]
    equal = sum(best == least for _, best, least in proven)
    quick_equal = sum(quick == least for quick, _, least in proven)
    worst = max(proven, key=lambda row: (row[1] - row[2], row[1]), default=(0, 0, 0))
    above = statistics.mean(quick - least for quick, _, least in proven) if proven else 0.0
    open_ones = ", ".join(f"{best} (>= {bound})" for best, bound in rest) or "none"
    return (
        f"| {name} | {len(records)} | {len(proven)} | {equal} | {worst[1]} vs {worst[2]} "
        f"| {quick_equal} | {above:.2f} | {open_ones} |"
    )


def print_own(loads: dict[str, Any], repeats: int) -> None:
    """The same rows through ``plan()``, from our own fractional plan on A instead of an equal-split one."""
    head = ("GPUs, slots", "A -> B", "stay", "1 %", "proven at least", "ms", "5 %")
    rows = []
    for gpus, slots, a, b, _ in ROWS:
        topology = mo.uniform(gpus // 8, 8, slots=slots)
        live = mo.plan(loads[a], topology)
        stay = mo.plan(loads[b], topology, current=live, solver="stay")
        times = []
        for _repeat in range(repeats):
            start = time.perf_counter()
            again = mo.plan(loads[b], topology, current=live)
            times.append((time.perf_counter() - start) * 1e3)
        coarse = mo.plan(loads[b], topology, current=live, balance_tolerance=0.05)
        least = int(again.certificate.proof.split()[-1]) / again.replicas
        cells = [f"{gpus}, {gpus * slots}", f"{a} -> {b}", f"{stay.imbalance_L.mean():.3f}"]
        cells += [f"{again.moves.fraction:.3%}", f"{least:.3%}", f"{statistics.median(times):.0f}"]
        rows.append([*cells, f"{coarse.moves.fraction:.3%}"])
    print(table(head, rows))


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of deepseek_v3_counts.npz")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--thorough", type=float, default=30.0, help="seconds for all layers in thorough mode"
    )
    parser.add_argument("--gap", action="store_true", help="compare with the proven least number of moves")
    parser.add_argument("--own", action="store_true", help="start from our own fractional plans")
    parser.add_argument("--proof", type=float, default=60.0, help="seconds of a layer's proof")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the gap's layers to take")
    arguments = parser.parse_args()
    loads = None
    if arguments.data is not None:
        with np.load(arguments.data / "deepseek_v3_counts.npz") as archive:
            loads = dict(
                zip(archive["workloads"].tolist(), archive["counts"].astype(np.float64), strict=True)
            )
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    if arguments.own:
        if loads is None:
            parser.error("the table needs the measured loads: --data DIR")
        print_own(loads, arguments.repeats)
    elif arguments.gap:
        print_gap(loads, arguments.proof, arguments.thorough / 58, arguments.scale)
    elif loads is None:
        parser.error("the table needs the measured loads: --data DIR")
    else:
        print_table(loads, arguments.repeats, arguments.thorough)


if __name__ == "__main__":
    main()
