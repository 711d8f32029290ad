"""Print how solvers do over several scenarios, by the documented objective.

``python tests/benchmarks/scenario_table.py --data DIR`` takes all pairs and triples of the recorded
workloads in DIR (``deepseek_v3_counts.npz``, ``olmoe_mixtral_domain_counts.npz``,
``qwen15_moe_iterations.npz``), each scaled to the same number of tokens. A figure is the mean over the
layers of the layer's time by the risk, over that of a perfect balance in every scenario. Each solver's
placement is judged with the best shares of each scenario where the split is fractional, whoever made it. A
row is the mean over all pairs (triples); ``--each`` prints them one by one. The last columns: our distance
from the best of the others where it is largest, in how many of the pairs (triples) ours is best, and the
seconds of one of our plans.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.report import table

SOLVERS = ("static", "eplb", "eplb-hierarchical", "moeless", "constrained", "auto")


def workloads(data: Path) -> Iterator[tuple[str, mo.Topology, dict[str, np.ndarray]]]:
    """Model, GPUs, and loads [layers, experts] by name of the workload."""
    with np.load(data / "deepseek_v3_counts.npz") as archive:
        names = archive["workloads"].tolist()
        yield (
            "DeepSeek-V3, 32 GPUs x 9",
            mo.uniform(4, 8, slots=9),
            dict(zip(names, archive["counts"].astype(np.float64), strict=True)),
        )
    with np.load(data / "olmoe_mixtral_domain_counts.npz") as archive:
        head = "olmoe__expert_counts__"
        found = {
            key.removeprefix(head): archive[key].astype(np.float64)
            for key in archive.files
            if key.startswith(head)
        }
        yield "OLMoE, 8 GPUs x 10", mo.uniform(1, 8, slots=10), found
    with np.load(data / "qwen15_moe_iterations.npz") as archive:
        found = {key: archive[key].sum(0).astype(np.float64) for key in archive.files}
        yield "Qwen1.5-MoE, 8 GPUs x 9", mo.uniform(1, 8, slots=9), found


def row_of(problem: mo.Problem, solvers: tuple[str, ...] = SOLVERS) -> tuple[dict[str, float], float]:
    """Mean imbalance of every solver by the documented objective; seconds of ours."""
    told: dict[str, float] = {}
    seconds = 0.0
    for name in solvers:
        began = time.process_time()
        plan = mo.solve(problem, name).plan
        seconds = time.process_time() - began
        assert plan is not None
        told[name] = float(plan.imbalance_L.mean())
    return told, seconds


def main() -> None:
    """Print the table, and in how many rows ours is best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=6, help="take every so manyth layer of DeepSeek-V3")
    parser.add_argument("--risks", nargs="+", default=["expected", "worst", "cvar"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3], help="scenarios in a set")
    parser.add_argument("--splits", nargs="+", default=["equal", "fractional"])
    parser.add_argument("--most", type=int, default=1000, help="sets of each size and model")
    parser.add_argument("--each", action="store_true", help="print every set")
    args = parser.parse_args()
    rows = []
    for model, topology, found in workloads(args.data):
        for size, split, risk in itertools.product(args.sizes, args.splits, args.risks):
            told, seconds = [], []
            step = args.every if model.startswith("DeepSeek") else 1
            for names in itertools.islice(itertools.combinations(found, size), args.most):
                load_TLE = np.stack([found[name][::step] / found[name].mean() for name in names])
                problem = mo.Problem(
                    loads=mo.Loads(load_TLE=load_TLE),
                    topology=topology,
                    split=split,
                    objective=mo.Objective(risk=risk, cvar_alpha=0.5),
                )
                one, spent = row_of(problem)
                told.append([one[name] for name in SOLVERS])
                seconds.append(spent)
                if args.each:
                    print(" + ".join(names), split, risk, *(f"{value:.4f}" for value in told[-1]), flush=True)
            value_XS = np.array(told)
            over_X = value_XS[:, -1] / value_XS[:, :-1].min(1) - 1
            rows.append(
                [
                    model,
                    str(size),
                    split,
                    risk,
                    *(f"{value:.4f}" for value in value_XS.mean(0)),
                    f"{over_X.max():+.2%}",
                    f"{int((over_X <= 1e-9).sum())} of {len(over_X)}",
                    f"{np.mean(seconds):.2f}",
                ]
            )
    head = ("model", "scenarios", "split", "risk", *SOLVERS, "to the best other", "best in", "seconds")
    print(table(head, rows, words_last=False))


if __name__ == "__main__":
    main()
