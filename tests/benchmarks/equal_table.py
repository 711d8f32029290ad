"""Print what an equal-split re-plan moves and takes, compiled and by arrays, alone and beside busy threads.

``python tests/benchmarks/equal_table.py [--data DIR] [--repeats 5] [--rounds N] [--plain] [--busy]`` plans
traffic A from nothing, lets it become B and re-plans all layers to 1.02 or 1.05 of the bound, slots as they
come or all full: measured loads in DIR (``deepseek_v3_counts.npz``), else a drifting lognormal of the same
shape. ``--plain`` times the twin without Numba too, whose plan is the same. Busy: the median beside three
Python threads that count. The last row of each case is EPLB on the new loads: what it moves, its imbalance.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.plan import even_times, new_replicas
from moeless_opt.problems.spec import Fill
from moeless_opt.report import table
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish

ROWS = (
    (32, 9, "prefill_in1024", "prefill_in4096", 0.02),
    (32, 9, "prefill_in1024", "prefill_in4096", 0.05),
    (32, 9, "prefill_in1024", "decode_in1000out1000", 0.02),
    (32, 9, "decode_in1000out1000", "decode_in500out1500", 0.02),
    (64, 5, "prefill_in1024", "prefill_in4096", 0.02),
    (64, 5, "prefill_in1024", "decode_in1000out1000", 0.02),
)


def recorded(folder: Path | None) -> dict[str, np.ndarray]:
    """Loads [58, 256] by name."""
    names = sorted({name for row in ROWS for name in row[2:4]})
    if folder is not None:
        with np.load(folder / "deepseek_v3_counts.npz") as archive:
            counts = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(float), strict=True))
        return {name: counts[name] for name in names}
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 0.8, (58, 256))
    return {name: base * rng.lognormal(0, 0.3, base.shape) for name in names}


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Python threads that hold the interpreter's lock as often as they may."""
    over = threading.Event()

    def work() -> None:
        n = 0
        while not over.is_set():
            n += 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def timed(call: Callable[[], Replanned], repeats: int) -> tuple[Replanned, float, float]:
    """Result, median milliseconds of the clock and of the processor."""
    clock, processor = [], []
    for _ in range(repeats):
        start, begun = time.perf_counter(), time.process_time()
        result = call()
        clock.append((time.perf_counter() - start) * 1e3)
        processor.append((time.process_time() - begun) * 1e3)
    return result, statistics.median(clock), statistics.median(processor)


def eplb(new: np.ndarray, task: ReplanTask) -> tuple[str, ...]:
    """EPLB's cells: what it moves from the live placement, its mean imbalance, its milliseconds."""
    _, gpus, width = task.live_LGC.shape
    topology = mo.uniform(1, gpus, slots=width)
    start, begun = time.perf_counter(), time.process_time()
    slots = mo.plan(new, topology, solver="eplb", split="equal", fill="copies").slots_LGC
    clock, processor = (time.perf_counter() - start) * 1e3, (time.process_time() - begun) * 1e3
    moved = new_replicas(slots, task.live_LGC, new.shape[1]).sum() / task.live_LGC.size
    over = (even_times(new, slots, np.ones(gpus)).max(1) / (new.sum(1) / gpus)).mean()
    return "EPLB", f"{100 * moved:.2f} %", f"{over:.4f}", "", f"{clock:.0f}", f"{processor:.0f}", "", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="of destroying and repairing")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    if not mo.warm_up():
        parser.error("Numba is missing; its twin is what is timed here")
    loads, rows = recorded(args.data), []
    for gpus, width, before, after, tolerance in ROWS:
        old, new = loads[before], loads[after]
        capacity = np.full((len(old), gpus), width)
        live = construct_equal(old, capacity, np.ones(gpus))
        case = f"{gpus} x {width}", f"{before} -> {after}", f"{1 + tolerance:.2f}"
        for fill in Fill:
            task = ReplanTask(new, live, capacity, fill=fill)
            wish = ReplanWish(tolerance=tolerance, rounds=args.rounds)

            def run(backend: str = "numba", task: ReplanTask = task, wish: ReplanWish = wish) -> Replanned:
                return replan_equal(task, wish, backend=backend)

            run()
            plan, clock, processor = timed(run, args.repeats)
            beside = ""
            if args.busy:
                with busy_threads(3):
                    beside = f"{timed(run, args.repeats)[1]:.0f}"
            plain = f"{timed(lambda run=run: run('numpy'), 1)[2]:.0f}" if args.plain else ""
            missed = int((plan.time_L > plan.target_L * (1 + 1e-9)).sum())
            moved = 100 * plan.moves_L.sum() / (len(old) * gpus * width)
            over = (plan.time_L / (new.sum(1) / gpus)).mean()
            figures = f"{moved:.2f} %", f"{over:.4f}", f"{missed}", f"{clock:.0f}", f"{processor:.0f}"
            rows.append((*case, fill.value, *figures, beside, plain))
        rows.append((*case, *eplb(new, task)))
    head = ("GPUs", "A -> B", "to", "fill", "moved", "imbalance", "late")
    print(table((*head, "ms", "ms processor", "ms busy", "ms plain"), rows))


if __name__ == "__main__":
    main()
