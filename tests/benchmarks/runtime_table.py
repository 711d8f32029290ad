"""Prints what the live runtime costs and survives, on four gloo ranks of this machine.

    python tests/benchmarks/runtime_table.py [--quick]

Every world is real processes. Times depend on the machine and on who else uses it: compare them within a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "runtime"))
import worlds  # noqa: E402


def world(*arguments: Any, ranks: int = 4, killed: int = 0) -> list[Any]:
    """One world of `runtime_worker`."""
    script = str(HERE / "runtime_worker.py")
    return worlds.run_world(script, ranks, *map(str, arguments), expect_killed=killed, timeout=900)


def placements(plans: int) -> None:
    """Identical outputs through re-placements; memory."""
    r = world("placements", plans)[0]
    rows = (
        ("carried out", f"{r['done']} of {r['plans']}"),
        ("largest difference from static expert parallelism", f"{r['worst']:g}"),
        ("moved", f"{r['bytes'] / 1e6:.1f} MB in {r['forwards']} forwards"),
        ("forwards in which a rank waited for a transfer", f"{r['waits']}"),
        ("forward, median", f"{r['calm_ms']:.1f} ms; while experts move {r['busy_ms']:.1f} ms"),
        (
            "most memory beyond before and after",
            f"{r['used'] / 1e6:.2f} MB of {r['allowed'] / 1e6:.2f} MB allowed",
        ),
    )
    show("Re-placements under traffic (4 ranks, 4 layers x 8 experts, fp64)", rows)


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title and its lines."""
    print(f"{title}:")
    for name, value in rows:
        print(f"  {name:<52s}{value}")


def grouped() -> None:
    """All experts of a rank in grouped products, against one after the other."""
    (rows,) = world("grouped", 256, 512, ranks=1)
    print("Experts of 256 x 512 on one rank, one thread: processor time, best of 15, in ms:")
    print("      type  experts  tokens    looped   grouped   ratio   difference of the largest value")
    for r in rows:
        loop, group = r["ms"]
        print(
            f"  {r['dtype']:>8s}  {r['experts']:7d}  {r['tokens']:6d}  {loop:8.3f}  {group:8.3f}"
            f"  {group / loop:6.3f}   {r['difference'] / r['scale']:.1e}"
        )


def overhead(rounds: int, experts: str) -> None:
    """Against megatron-core's own dispatcher and experts."""
    print(
        "Attached with the static placement, against stock megatron-core (all-to-all, SequentialMLP), fp32, "
        f"experts {experts}:"
    )
    print("  hidden  tokens     stock  attached  ratio of pairs   processor time (all ranks)    difference")
    for hidden, length in ((64, 16), (128, 64), (256, 128)):
        ranks = world("overhead", rounds, hidden, length, experts)
        ratio = statistics.median(r["ratio"] for r in ranks)
        stock, live = (sum(r["processor_ms"][i] for r in ranks) for i in (0, 1))
        r = ranks[0]
        print(
            f"  {hidden:6d}  {r['tokens']:6d}  {r['stock_ms']:5.1f} ms  {r['live_ms']:5.1f} ms"
            f"  {ratio:14.3f}   "
            f"{stock:6.1f} -> {live:6.1f} ms ({live / stock:.3f})   {r['difference']:.1e}"
        )


def kills(worlds_of_three: int) -> None:
    """Ranks killed at random moments."""
    times: list[float] = []
    agree: list[float] = []
    worst, recovered, wanted, repeated = 0.0, 0, 0, 0
    for seed in range(worlds_of_three):
        wanted += 3
        results = [r for r in world("kills", seed, killed=3) if r]
        (last,) = results
        recovered += len(last["lost"])
        worst = max(worst, last["worst"])
        times += last["seconds"]
        agree += last["agree"]
        repeated += last["repeated"]
    rows = (
        ("recovered", f"{recovered} of {wanted}"),
        ("largest difference of the survivors' outputs", f"{worst:g}"),
        ("time to recover", f"median {statistics.median(times):.2f} s, worst {max(times):.2f} s"),
        ("of it agreeing on who is left (0.5 s of grace)", f"median {statistics.median(agree):.2f} s"),
        ("forwards that a last survivor ran again", f"{repeated}"),
    )
    show("Ranks killed at random moments of a forward, while experts move", rows)


def traffic(steps: int) -> None:
    """Static EP, equal split, shares, shares and re-plans."""
    print("Own model on its recorded traffic, a new domain every few steps (4 ranks; 5 slots, static EP 4):")
    print("                         mean imbalance   worst layer, step   moved        logits differ by")
    for name, r in world("traffic", steps, 5)[0].items():
        moved = r["bytes"] / 1e6
        figures = f"{r['mean']:14.3f} {r['worst']:19.3f}   {moved:6.1f} MB    {r['difference']:.1e}"
        print(f"  {name:<22s} {figures}")


def modes(steps: int) -> None:
    """The controller's modes: static EP, windowed, per layer."""
    print(
        f"Own model on text that it writes, a new domain every {steps} passes (4 ranks; 6 slots, static 4)."
    )
    print("In force: plans with loads that came into force in the pass in which they were begun.")
    print("                        imbalance       cold  warm  in force     plan  forward  GB*s charged")
    print(
        "                       mean   worst   starts again                ms       ms  resident  functions"
    )
    worst, waits, errors = 0.0, 0, 0
    for name, r in world("modes", steps, 6)[0].items():
        force = f"{r['same']} of {r['moved']}" if r["moved"] else ""
        print(
            f"  {name:<19s} {r['mean']:6.3f} {r['worst']:7.3f} {r['cold']:8d} {r['reuses']:5d} {force:>10s} "
            f"{r['plan_ms']:7.2f} {r['forward_ms']:8.0f} {r['cost'][0]:9.3f} {r['cost'][2]:10.3f}"
        )
        worst, waits, errors = max(worst, r["difference"]), waits + r["waits"], errors + r["errors"]
    print(
        f"  Logits differ from static expert parallelism's by {worst:g}; {waits} waits, {errors} failed plans"
    )


def lanes() -> None:
    """What the per-layer mode's agreement costs a batch, apart from the plans and the transfers."""
    import numpy as np
    import test_lanes

    from moeless_opt.runtime.live.elastic import Elastic
    from moeless_opt.runtime.live.slots import rows_to_slots, static_slots

    print(
        "Agreement in the per-layer mode, every layer planned in every pass, microseconds per layer (median):"
    )
    print("  layers  ranks  experts    slots stay   two replicas move   the same, elastic")
    for layers, ranks, experts in ((32, 8, 8), (26, 8, 64), (58, 32, 256)):
        test_lanes.L, test_lanes.R, test_lanes.E = layers, ranks, experts
        chance = np.random.default_rng(0)
        figures = []
        for moves, elastic in ((0, False), (2, False), (2, True)):
            rank = test_lanes.Rank(None, 0)
            static_GC = static_slots(experts, ranks)
            width = static_GC.shape[1] + 1
            if elastic:
                rank.lanes.elastic = Elastic(
                    np.stack([static_GC] * layers),
                    experts,
                    capacity_LG=np.full((layers, ranks), width + 1),
                    bytes_L=np.full(layers, 4),
                    keep_alive=3.0,
                    clock="passes",
                )
            spent = []
            for layer in list(range(layers)) * 5:
                rows = static_GC.tolist()
                for g in chance.choice(ranks, moves, replace=False):
                    rows[g].append(next(e for e in chance.permutation(experts).tolist() if e not in rows[g]))
                if not rank.lanes.waits(layer):
                    rank.lanes.offer(rank.lanes.open(layer), rows_to_slots(rows, width))
                began = time.perf_counter()
                header = rank.header()
                rank.agree(layer, np.array([header] * ranks))
                spent.append(time.perf_counter() - began)
                while rank.flights:
                    rank.arrive()
            figures.append(1e6 * statistics.median(spent))
        print(
            f"  {layers:6d} {ranks:6d} {experts:8d} {figures[0]:13.0f} {figures[1]:19.0f} {figures[2]:19.0f}"
        )


def microseconds(call: Callable[[], object]) -> float:
    """Median of 100 calls."""
    seconds = []
    for _ in range(100):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--only",
        choices=("placements", "overhead", "grouped", "kills", "traffic", "modes", "lanes"),
    )
    args = parser.parse_args()
    if args.only in (None, "placements"):
        placements(12 if args.quick else 60)
    if args.only in (None, "overhead"):
        overhead(20 if args.quick else 100, "loop")
    if args.only in (None, "grouped"):
        grouped()
        overhead(20 if args.quick else 100, "grouped")
    if args.only in (None, "traffic"):
        traffic(2 if args.quick else 6)
    if args.only in (None, "modes"):
        modes(4 if args.quick else 12)
    if args.only in (None, "lanes"):
        lanes()
    if args.only in (None, "kills"):
        kills(1 if args.quick else 7)


if __name__ == "__main__":
    main()
