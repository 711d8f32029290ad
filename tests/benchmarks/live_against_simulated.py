"""How well the simulator tells what policies save: real ranks under several policies, and their twins.

    python tests/benchmarks/live_against_simulated.py [--case NAME] [--quick]

Live: megatron-core layers on gloo ranks of one thread each, whose routers prefer some experts (in part
always the same, in part by domain; the domain changes every two passes). Each policy runs over the same
traffic; after every pass what was decided is carried out, so that a pass has one placement. A pass runs
twice and the second run is timed: in the per-layer modes the first is foreseen and planned (with both at
once on two cores planning slows the experts down, which no simulated GPU shows), and no weights are in
their first use. A rank's time in a layer's experts is the processor time of its thread, the median of
several runs in turns with the other policies; the layer's is that of the slower rank. Memory that is freed
is kept, as the allocators of GPUs do.

Simulated: the same controller over the loads that the live model saw, judged by the time curve of these
experts, measured by `LiveModel.measure` on the same ranks before and after. ``timed`` plans and shares by
another one: a straight line through the first, tokens a tenth too dear and experts a tenth too cheap; the
others plan by tokens. Loads and plans must be equal: it is checked. What is compared is the share of
static's expert time that a policy saves; the range is the middle 95 % over drawings of the live runs.
``even`` is what the simulator says if a rank's tokens are taken to spread evenly over its experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "runtime")]
import simulated_twin  # noqa: E402
import worlds  # noqa: E402

from moeless_opt.problems.spec.time_model import TimeModel  # noqa: E402

BASE: dict[str, Any] = {
    "layers": 4,
    "hidden": 256,
    "ffn": 512,
    "passes": 6,
    "each": 2,
    "slots": 6,
    "repeats": 8,
    "measure": True,
    "twice": True,
    "policies": ["static", "eplb", "windowed", "per-layer", "timed"],
}
#: Ranks, and what differs: sequences x length tokens on each rank; bias: spread of the routers' preferences.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "prefill, mild skew": (2, {"sequences": 4, "length": 96, "bias": 0.15}),
    "prefill, strong skew": (2, {"sequences": 4, "length": 96, "bias": 0.6}),
    "long prefill": (2, {"sequences": 8, "length": 128, "bias": 0.6, "passes": 4, "repeats": 6}),
    "prefill, 4 ranks": (4, {"sequences": 2, "length": 96, "bias": 0.6, "slots": 3}),
    "decode, 32 tokens": (2, {"sequences": 32, "length": 1, "bias": 0.6, "repeats": 12}),
    "decode, 4 tokens": (2, {"sequences": 4, "length": 1, "bias": 0.6, "repeats": 12}),
}
#: Of glibc: nothing is given back to the system.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26)}
DRAWN = 2000


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="by default all")
    parser.add_argument("--quick", action="store_true", help="fewer passes and repeats")
    args = parser.parse_args()
    os.environ |= KEEP
    told: list[tuple[float, float, bool]] = []
    for name in args.case or CASES:
        ranks, differs = CASES[name]
        setting = BASE | differs | ({"passes": 2, "repeats": 2} if args.quick else {})
        results = worlds.run_world("worker_simulator.py", ranks, json.dumps(setting), timeout=1200)
        told += report(name, results)
    live, simulated, clear = (np.array(column) for column in zip(*told, strict=True))
    wrong = 100 * (simulated - live)
    points = (np.median(wrong), wrong.min(), wrong.max(), np.abs(wrong).mean())
    print("\nsimulated less live, points: median {:+.1f}, {:+.1f} to {:+.1f}, {:.1f} in size".format(*points))
    other = (np.sign(live) != np.sign(simulated)) & clear
    print(
        f"{len(told)} savings, {clear.sum()} of a clear sign, {other.sum()} of these simulated with the other"
    )


def curve(measured: dict[str, Any]) -> TimeModel:
    """What the ranks measured, before and after, on average."""
    return TimeModel(
        curve_tokens=np.array(measured["tokens"]),
        curve_activated=np.array(measured["activated"], dtype=float),
        curve_time=np.mean([measured["time"], measured["after"]], axis=0),
        unit="s",
        name="measured on the ranks",
    )


def check(name: str, run: dict[str, Any], twin: simulated_twin.Twin) -> None:
    """Loads and plans are equal."""
    filled = simulated_twin.filled
    assert twin.loads.tolist() == run["loads"], name
    if name in simulated_twin.LAYERED:
        lived = [[filled(d["slots"]) for d in one["layers"]] for one in run["decisions"]]
        assert twin.slots == lived, name
    else:
        lived = [[filled(layer) for layer in d["slots"]] for d in run["decisions"]]
        assert [[filled(layer) for layer in slots] for slots in twin.slots] == lived, name


def total(seconds_NBLR: np.ndarray) -> float:
    """Expert time of a run: of each rank the median of N runs, of a layer the slower rank."""
    return float(np.median(seconds_NBLR, 0).max(2).sum())


def report(case: str, results: list[dict[str, Any]]) -> list[tuple[float, float, bool]]:
    """Print the comparison of a case; savings live and simulated, and whether the live sign is clear."""
    live, setting, ranks = results[0], results[0]["setting"], len(results)
    time, thought = curve(live["curve"]), TimeModel(**live["believed"], unit="s")
    runs = {name: np.array(live[name]["seconds"]) for name in setting["policies"]}
    chance, told, lines = np.random.default_rng(0), [], []
    draws = chance.integers(0, setting["repeats"], (DRAWN, setting["repeats"]))
    first: dict[bool, float] = {}
    for name in setting["policies"]:
        run = live[name]
        assert all(other[name]["decisions"] == run["decisions"] for other in results)
        simulated = {}
        for in_turn in (True, False):
            twin = simulated_twin.simulate(name, run, setting, ranks, time, thought, in_turn=in_turn)
            check(name, run, twin)
            first.setdefault(in_turn, twin.experts_BL.sum())
            simulated[in_turn] = 1 - twin.experts_BL.sum() / first[in_turn]
        if name == "static":
            tokens, absolute = twin.tokens_BLG, first[True] / total(runs[name])
            continue
        saved = 1 - total(runs[name]) / total(runs["static"])
        drawn = [1 - total(runs[name][draw]) / total(runs["static"][draw]) for draw in draws]
        low, high = np.quantile(drawn, (0.025, 0.975))
        told.append((saved, simulated[True], bool(low * high > 0)))
        lines.append(
            f"| {case} | {name} | {saved:+.1%} ({low:+.1%} to {high:+.1%}) | {simulated[True]:+.1%} | "
            f"{100 * (simulated[True] - saved):+.1f} | {simulated[False]:+.1%} |"
        )
    print(
        f"\n{case}: {ranks} ranks, {setting['layers']} layers x 8 experts top-2 ({setting['hidden']} x "
        f"{setting['ffn']}, fp32), {setting['slots']} slots, {setting['sequences'] * setting['length']} "
        f"tokens per rank, {setting['passes']} passes, {setting['repeats']} runs; rows of static's fullest "
        f"rank over the mean {(tokens.max(2) / tokens.mean(2)).mean():.2f}; simulated over live seconds of "
        f"static {absolute:.2f}"
    )
    print("| case | policy | saved live (95 %) | saved simulated | error, points | even |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)
    return told


if __name__ == "__main__":
    main()
