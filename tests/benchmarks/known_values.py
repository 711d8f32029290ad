"""Solve the shipped instances as well as we can and record, in their files, what was proven.

``python tests/benchmarks/known_values.py [--time SECONDS] [--write] [NAME ...]``: best largest GPU time and
lower bound of every layer. Without ``--write`` it only prints, and says where a file holds less.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.instances.library import instance_path
from moeless_opt.report import table


def best_known(problem: mo.Problem, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Best value and best bound of every layer, over the file's own, the default's and the exact solvers'."""
    known = problem.known
    best_L = np.array(known.best_L if known and known.best_L else [np.inf] * problem.layers)
    bound_L = np.array(known.bound_L if known and known.bound_L else [0.0] * problem.layers)
    static = (
        problem if problem.loads.shape[0] == 1 else problem.replace(loads=mo.Loads(load_TLE=problem.load_LE))
    )
    for solver, limit in (("construct", None), ("portfolio", seconds)):
        plan = mo.solve(static, solver, time_limit=limit).plan
        if plan is not None:
            best_L = np.minimum(best_L, plan.certificate.value_L)
            bound_L = np.maximum(bound_L, plan.certificate.lower_bound_L)
    return best_L, np.minimum(bound_L, best_L)


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="instances (default: all)")
    parser.add_argument(
        "--time", type=float, default=60.0, help="seconds for the exact solvers, per instance"
    )
    parser.add_argument("--write", action="store_true", help="write the values into the instances' files")
    args = parser.parse_args()
    rows = []
    for name in args.names or mo.instance_names():
        problem = mo.load_instance(name)
        best_L, bound_L = best_known(problem, args.time)
        proven = int((best_L <= bound_L * (1 + 1e-9)).sum())
        gap = float((best_L / bound_L - 1).max())
        rows.append(
            [name, f"{best_L.sum():.8g}", f"{bound_L.sum():.8g}", f"{proven} of {len(best_L)}", f"{gap:.4%}"]
        )
        print(rows[-1], flush=True)
        if args.write:
            path = instance_path(name)
            document = json.loads(path.read_text())
            document["known"] |= {"best": best_L.tolist(), "bound": bound_L.tolist()}
            path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(("instance", "best", "bound", "proven", "worst gap"), rows))


if __name__ == "__main__":
    main()
