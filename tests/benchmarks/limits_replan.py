"""What a limit costs whole models: ``python tests/benchmarks/limits_replan.py [--data DIR] [--layers N]``.

256 experts on 32 GPUs of 9 slots, planned for one traffic and re-planned for another, without limits and with
each of several: moves, imbalance, layers that differ from the plan without, and the processor's seconds. With
``--data`` the loads are those of DIR/deepseek_v3_counts.npz (decode, then prefill), else lognormal ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray


def loads(data: Path | None, layers: int) -> tuple[FloatArray, FloatArray]:
    """Loads before and after."""
    if data is not None:
        counts = np.load(data / "deepseek_v3_counts.npz")["counts"]
        return counts[0][:layers].astype(float), counts[3][:layers].astype(float)
    rng = np.random.default_rng(0)
    before = rng.lognormal(0, 1, (layers, 256)) * 1000
    return before, before * rng.lognormal(0, 0.3, before.shape)


def some_limits(live: mo.Plan, free: mo.Plan) -> dict[str, mo.Limits]:
    """Limits that cannot bind, that do not, that do in one place, and everywhere."""
    gone = [
        (int(layer), int(expert), int(gpu))
        for layer, gpu in np.ndindex(free.slots_LGC.shape[:2])
        for expert in set(free.slots_LGC[layer, gpu].tolist()) - set(live.slots_LGC[layer, gpu].tolist())
        if expert >= 0
    ]
    absent = next(e for e in range(256) if e not in free.slots_LGC[0, 5].tolist())
    layers = free.layers
    found = {
        "max_replicas = 32": mo.Limits(max_replicas=32),
        "a ban that the plan keeps": mo.Limits(forbidden=((layers[0], absent, 5),)),
        "8 bans in every layer": mo.Limits(forbidden=tuple((-1, e, e % 32) for e in range(8))),
        "4 pins in every layer": mo.Limits(pinned=tuple((-1, e, e) for e in range(4))),
        "max_layer_replicas = 280": mo.Limits(max_layer_replicas=280),
        "max_replicas = 2": mo.Limits(max_replicas=2),
    }
    if gone:
        row, expert, gpu = gone[0]
        found["a ban of what it moves"] = mo.Limits(forbidden=((layers[row], expert, gpu),))
    return found


def main() -> None:
    """Print a table for each split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--splits", nargs="+", default=["fractional", "equal"])
    args = parser.parse_args()
    before, after = loads(args.data, args.layers)
    gpus = mo.uniform(4, 8, slots=9)
    for split in args.splits:
        live = mo.plan(before, gpus, split=split)
        free = mo.plan(after, gpus, split=split, current=live)
        print(f"\n| {split} | moves | imbalance, worst | layers that differ | s | fresh: worst, gap | s |")
        print("|---|---|---|---|---|---|---|")
        for name, limits in {"no limits": mo.Limits(), **some_limits(live, free)}.items():
            began = time.process_time()
            plan = mo.plan(after, gpus, split=split, current=live, limits=limits)
            middle = time.process_time()
            fresh = mo.plan(after, gpus, split=split, limits=limits)
            ended = time.process_time()
            differ = int((plan.slots_LGC != free.slots_LGC).any((1, 2)).sum())
            print(
                f"| {name} | {plan.moves.count} ({plan.moves.fraction:.2%}) | {plan.imbalance_L.mean():.4f}, "
                f"{plan.imbalance_L.max():.4f} | {differ} | {middle - began:.2f} | "
                f"{fresh.imbalance_L.max():.5f}, {fresh.certificate.gap_L.max():.3%} | "
                f"{ended - middle:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
