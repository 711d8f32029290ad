"""Few spare slots: fractional plans beside equal ones, and how much the certificates leave open.

    python tests/benchmarks/scarce_table.py [--data DIR] [--layers N]

With ``--data`` the loads are those of DIR/deepseek_v3_counts.npz (its first recording), else lognormal ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.solvers.core.features import PUBLISHED

SHAPES: list[tuple[str, int, list[int], list[float] | None]] = [
    ("24 x 11", 256, [11] * 24, None),
    ("72 x 4", 256, [4] * 72, None),
    ("96 x 3", 256, [3] * 96, None),
    ("48 x 6", 256, [6] * 48, None),
    ("144 x 2", 256, [2] * 144, None),
    ("24 x 7", 160, [7] * 24, None),
    ("64 x 3", 160, [3] * 64, None),
    ("64 x 4", 240, [4] * 64, None),
    ("64 x 5", 256, [5] * 64, None),
    ("64 x 6", 256, [6] * 64, None),
    ("16 x 4 and 16 x 12", 250, [4, 12] * 16, None),
    ("slots as speed", 256, [4, 8, 16] * 10, [0.5, 1, 2] * 10),
    ("8, speeds 0.25-4", 256, [36] * 8, [0.25, 0.5, 1, 1, 2, 2, 4, 4]),
]
CERTIFICATES: list[tuple[str, list[int]]] = [
    ("32 x 8", [8] * 32),
    ("32 x 8 + 1", [9] + [8] * 31),
    ("32 x 8 + 4", [9] * 4 + [8] * 28),
    ("64 x 4", [4] * 64),
    ("64 x 4 + 8", [5] * 8 + [4] * 56),
    ("64 x 5", [5] * 64),
    ("72 x 4", [4] * 72),
    ("144 x 2", [2] * 144),
]


def loads(data: Path | None, layers: int) -> FloatArray:
    """Loads of 256 experts, one row a layer."""
    if data is None:
        return np.random.default_rng(0).lognormal(0, 1, (layers, 256)) * 1000
    counts = np.load(data / "deepseek_v3_counts.npz")["counts"]
    return np.asarray(counts[0][:layers], dtype=np.float64)


def planned(load_LE: FloatArray, topology: mo.Topology, split: str) -> tuple[mo.Plan, float]:
    """A default plan and its milliseconds."""
    began = time.perf_counter()
    plan = mo.plan(load_LE, topology, split=split)
    return plan, 1000 * (time.perf_counter() - began)


def worse_than_any(load_LE: FloatArray, topology: mo.Topology, free: mo.Plan) -> int:
    """Layers whose fractional plan is slower than a published method's, or than what it started from."""
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology)
    worse_L = np.zeros(len(load_LE), dtype=bool)
    for name in sorted(PUBLISHED):
        try:
            start = mo.solve(problem, name).plan
        except UnsupportedFeatureError:  # it cannot take GPUs of different speed or slots
            continue
        found = mo.solve(problem, initial=start).plan
        assert start is not None
        assert found is not None
        slower = start.certificate.value_L * (1 + 1e-9)
        worse_L |= (free.certificate.value_L > slower) | (found.certificate.value_L > slower)
    return int(worse_L.sum())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    arguments = parser.parse_args()
    load_LE = loads(arguments.data, arguments.layers)
    print(
        "| GPUs x slots | experts | worse than equal | than any other | worst ratio "
        "| fractional gap | equal gap | ms | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, experts, slots, speed in SHAPES:
        speeds = {} if speed is None else {"speed": speed}
        topology = mo.uniform(1, len(slots), slots=slots, **speeds)
        free, free_ms = planned(load_LE[:, :experts], topology, "fractional")
        equal, equal_ms = planned(load_LE[:, :experts], topology, "equal")
        ratio_L = free.certificate.value_L / equal.certificate.value_L
        print(
            f"| {name} | {experts} | {(ratio_L > 1 + 1e-9).sum()} of {len(load_LE)} "
            f"| {worse_than_any(load_LE[:, :experts], topology, free)} | {ratio_L.max():.4f} "
            f"| {free.certificate.gap:.3%} | {equal.certificate.gap:.3%} | {free_ms:.0f} | {equal_ms:.0f} |",
            flush=True,
        )
    print("\n| 256 experts | split | gap | worst layer | bounds |\n|---|---|---|---|---|")
    for name, slots in CERTIFICATES:
        for split in ("equal", "fractional"):
            plan, _ = planned(load_LE, mo.uniform(1, len(slots), slots=slots), split)
            certificate = plan.certificate
            worst = (certificate.value_L / certificate.lower_bound_L).max() - 1
            names = ", ".join(sorted(set(certificate.bound_L)))
            print(f"| {name} | {split} | {certificate.gap:.3%} | {worst:.2%} | {names} |", flush=True)


if __name__ == "__main__":
    main()
