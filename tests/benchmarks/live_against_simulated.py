"""How well the simulator tells a live run's times: two real ranks under several policies, and their twins.

    python tests/benchmarks/live_against_simulated.py [--quick]

Live: megatron-core layers on two gloo ranks of one thread each. Each policy runs over the same traffic; after
every pass what was decided is carried out, so that a pass has one placement. In the per-layer mode a pass
runs twice, once to be foreseen and planned, once timed under these plans: with both at once on two cores the
planning slows the experts down, which no simulated GPU shows. A rank's time in a layer's experts is the
processor time of its thread in its quickest run out of several (others may use the machine, which only ever
slows it down); the layer's is that of the slower rank.

Simulated: the same controller over the loads that the live model saw, with the time curve of these experts,
measured by `LiveModel.measure` on the same ranks at the start. Loads and plans must be equal: it is checked.
Compared are expert times of layers as ratios, each policy's over static's in the same pass and layer, and
each layer's over the mean of its pass: no absolute time is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "runtime"))
import simulated_twin  # noqa: E402
import worlds  # noqa: E402

from moeless_opt.problems.spec.time_model import TimeModel  # noqa: E402

RANKS = 2


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer passes and repeats")
    quick = parser.parse_args().quick
    setting: dict[str, Any] = {
        "layers": 4,
        "hidden": 256,
        "ffn": 512,
        "sequences": 4,
        "length": 96,
        "passes": 8 if quick else 16,
        "each": 2 if quick else 4,
        "slots": 6,
        "repeats": 3 if quick else 7,
        "measure": True,
        "skew": 40,
    }
    results = worlds.run_world("worker_simulator.py", RANKS, json.dumps(setting), timeout=900)
    live, setting = results[0], results[0]["setting"]
    time = curve(live["curve"])
    twins, lived = {}, {}
    for name in setting["policies"]:
        run = live[name]
        assert all(other[name]["decisions"] == run["decisions"] for other in results)
        twins[name] = simulated_twin.simulate(name, run, setting, RANKS, time)
        # Of each rank its quickest run, then the slower rank.
        lived[name] = np.array(run["seconds"]).min(0).max(2)
        check(name, run, twins[name])
    report(setting, time, twins, lived)


def curve(measured: dict[str, Any]) -> TimeModel:
    """What the ranks measured."""
    return TimeModel(
        curve_tokens=np.array(measured["tokens"]),
        curve_activated=np.array(measured["activated"], dtype=float),
        curve_time=np.array(measured["time"]),
        unit="s",
        name="measured on the ranks",
    )


def check(name: str, run: dict[str, Any], twin: simulated_twin.Twin) -> None:
    """Loads and plans are equal."""
    assert twin.loads.tolist() == run["loads"], name
    if name == "per-layer":
        lived = [[simulated_twin.filled(d["slots"]) for d in one["layers"]] for one in run["decisions"]]
    else:
        lived = [d["slots"] for d in run["decisions"]]
    assert twin.slots == lived, name


def report(
    setting: dict[str, Any],
    time: TimeModel,
    twins: dict[str, simulated_twin.Twin],
    lived: dict[str, np.ndarray],
) -> None:
    """Print the comparison."""
    tokens = setting["sequences"] * setting["length"]
    repeats, passes = setting["repeats"], setting["passes"]
    print(
        f"{RANKS} ranks, {setting['layers']} layers x 8 experts top-2 ({setting['hidden']} x "
        f"{setting['ffn']}, fp32), {tokens} tokens per rank, {passes} passes, best of {repeats} runs"
    )
    shown = time.time([tokens // 4, tokens, 2 * tokens, 4 * tokens], [4, 4, 4, 4], 1.0) * 1e3
    counts = (tokens // 4, tokens, 2 * tokens, 4 * tokens)
    print(
        "measured curve, 4 experts: "
        + ", ".join(f"{n} rows {t:.2f} ms" for n, t in zip(counts, shown, strict=True))
    )
    rows = twins["static"].tokens_BLG
    print(
        f"static placement: rows of the fuller rank over the mean {(rows.max(2) / rows.mean(2)).mean():.3f}"
    )
    print("loads and plans: equal for every policy\n")
    print(f"{'policy':<12}{'expert time of a layer, over static':^40}{'layer over its pass':^28}")
    print(f"{'':<12}{'live':>8}{'sim.':>8}{'error: median':>16}{'90 %':>8}{'error: median':>18}{'90 %':>8}")
    for name, twin in twins.items():
        over = lived[name] / lived["static"]
        simulated = twin.experts_BL / twins["static"].experts_BL
        first = np.abs(simulated / over - 1)
        within = lived[name] / lived[name].mean(1, keepdims=True)
        of_it = twin.experts_BL / twin.experts_BL.mean(1, keepdims=True)
        second = np.abs(of_it / within - 1)
        print(
            f"{name:<12}{over.mean():>8.3f}{simulated.mean():>8.3f}"
            f"{np.median(first):>15.1%} {np.quantile(first, 0.9):>7.1%}"
            f"{np.median(second):>17.1%} {np.quantile(second, 0.9):>7.1%}"
        )
    ratio = np.concatenate([(twins[n].experts_BL / lived[n]).ravel() for n in twins])
    print(f"\nabsolute, not compared: simulated over live {np.median(ratio):.3f} in the median")


if __name__ == "__main__":
    main()
