"""What policies are worth on requests that nothing was tuned on: mean and P99.

    python tests/benchmarks/heldout_table.py --data FOLDER [--seconds 30]

Every method is given the same: a few values of its own thresholds (and of the predictor, where it plans
from one; predictors see the traffic that they predict only as it passes). Of these, the one with the lowest
mean and the one with the lowest P99 on the first half of the requests are run on the second half, which
shares no request with the first. What is printed is latency against static's on the second half, and
besides what the same choice promised on the first. gpt-oss-20b: recorded routing of every token, split by
request. OLMoE: its token traces are not at hand, so requests are drawn from its measured popularity by
domain; the halves are other draws (other seeds), not other texts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeless_opt.runtime.simulate.run import simulate
from moeless_opt.runtime.simulate.scenario import Scenario

Setting = dict[str, Any]
#: Values that are tried of each method.
TRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "eplb": {},
    "eplb-window": {"every": (16, 128)},
    "moeless": {"cv": (0.2, 0.6, 1.0), "predictor": ("last", "ewma")},
    "ours-windowed": {"every": (16, 128), "tolerance": (0.1, 0.3, 1.0)},
    "ours": {"gain": (0.02, 0.1, 0.3), "predictor": ("last", "ewma")},
}
MEASURES = {"mean": "mean_ms", "P99": "p99_ms"}


def halves(data: Path, seconds: float) -> Iterator[tuple[str, Scenario, Scenario]]:
    """What is simulated, for tuning and for judging."""
    recorded = Scenario(
        model="gpt-oss-20b", traces=data / "gptoss20b_topk.npz", data=data, slots=5, seconds=seconds
    )
    yield "gpt-oss-20b, decode", recorded.replace(half="first"), recorded.replace(half="second")
    drawn = Scenario(model="OLMoE-1B-7B", data=data, popularity=data / "olmoe_mixtral_domain_counts.npz")
    prompts = drawn.replace(seconds=seconds)
    yield "OLMoE, prompts", prompts.replace(seed=1), prompts.replace(seed=2)
    written = drawn.replace(batching="continuous", seconds=seconds / 3)
    yield "OLMoE, prompts and answers", written.replace(seed=1), written.replace(seed=2)


def settings_of(name: str) -> Iterator[Setting]:
    """All values of a method's thresholds."""
    tried = TRIED[name]
    for values in itertools.product(*tried.values()):
        yield dict(zip(tried, values, strict=True))


def told(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "nothing to tune"


def main() -> None:
    """Tune, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    print("| workload | method | chosen by | setting | first half: mean, P99 | second half: mean, P99 |")
    print("|---|---|---|---|---|---|")
    for workload, first, second in halves(args.data, args.seconds):

        def latency(scenario: Scenario, name: str, setting: Setting) -> dict[str, float]:
            row = simulate(scenario.replace(policies=(name,), **setting)).rows[0]
            return {measure: row[key] for measure, key in MEASURES.items()}  # type: ignore[literal-required]

        static = {id(half): latency(half, "static", {}) for half in (first, second)}

        def against(scenario: Scenario, name: str, setting: Setting) -> dict[str, float]:
            found = latency(scenario, name, setting)
            return {m: found[m] / static[id(scenario)][m] - 1 for m in MEASURES}  # noqa: B023

        for name in TRIED:
            tuned = [(setting, against(first, name, setting)) for setting in settings_of(name)]
            judged: dict[str, dict[str, float]] = {}
            for measure in MEASURES:
                setting, promised = min(tuned, key=lambda one: one[1][measure])
                words = told(setting)
                if words not in judged:
                    judged[words] = against(second, name, setting)
                cells = [", ".join(f"{x[m]:+.1%}" for m in MEASURES) for x in (promised, judged[words])]
                print(f"| {workload} | {name} | {measure} | {words} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
