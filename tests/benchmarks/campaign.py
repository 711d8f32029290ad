"""Small problems of every kind beside their optimum, by enumeration.

    python tests/benchmarks/campaign.py [--kind KIND ...] [--cases N] [--first SEED] [--solver NAME]

A row per kind: cases, plans above the optimum with their median and worst excess, plans wrongly refused, the
median of what the certificates leave open, and what must not be (each told in full).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaign import ABOVE, KINDS, judge


def main() -> int:
    """Print the table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kind", nargs="+", default=sorted(KINDS), choices=sorted(KINDS))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--tell", action="store_true", help="the seed of every plan above the optimum")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    failures = []
    print("| kind | cases | above | median | worst | refused | certificate | wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.kind:
        seeds = range(arguments.first, arguments.first + arguments.cases)
        found = [judge(kind, seed, arguments.solver) for seed in seeds]
        excess = np.array([one.excess for one in found])
        loose = np.array([one.loose for one in found])
        above = excess[np.isfinite(excess) & (excess > ABOVE)]
        refused = sum(np.isinf(one.excess) and not one.wrong for one in found)
        wrong = [f"{kind} {seed}: {one.wrong}" for seed, one in zip(seeds, found, strict=True) if one.wrong]
        failures += wrong
        if arguments.tell:
            for seed in (seed for seed, one in zip(seeds, excess, strict=True) if one > ABOVE):
                print(f"  {kind} {seed}: {excess[seed - arguments.first]:.4%}")
        print(
            f"| {kind} | {len(found)} | {len(above) / len(found):.1%} "
            f"| {np.median(above if above.size else [0.0]):.2%} | {above.max(initial=0.0):.1%} "
            f"| {refused} | {np.median(loose):.2%} | {len(wrong)} |",
            flush=True,
        )
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
