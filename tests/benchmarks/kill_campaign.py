"""Kills ranks at random moments and tells how the others ended: recovered, with one error, or not at all.

    python tests/benchmarks/kill_campaign.py [--kills 50] [--seed 0]

Worlds of two to four ranks on this machine; forwards, migrations, refills of home copies, regroupings,
observations, and whenever. Every survivor must give the outputs of the stock model, difference 0, in all
steps, or end with one clear error, within the time that the timeouts add up to. Exit code 1 else.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "runtime"))
import worlds  # noqa: E402

MOMENTS = ("forward", "migration", "refill", "regroup", "observe", "whenever")
#: In a recovery from another rank's death.
SECOND = ("refill", "regroup")
#: Seconds in which a step with its recoveries has to end: a few times the group's timeout of 15 s.
LIMIT = 60.0


def drawn(chance: np.random.Generator) -> tuple[int, list[tuple[int, int, str]]]:
    """Ranks of a world, and who dies when."""
    ranks = int(chance.integers(2, 5))
    deaths: list[tuple[int, int, str]] = []
    for rank in chance.permutation(ranks)[: int(chance.integers(1, ranks))].tolist():
        fitting = [m for m in MOMENTS if deaths or m not in SECOND]
        moment = str(chance.choice(fitting))
        # A second death in the recovery from the first one, or at a step of its own.
        step = deaths[-1][1] if moment in SECOND else int(chance.integers(2, 12))
        deaths.append((rank, step, moment))
    return ranks, deaths


def main() -> int:
    """Run worlds until so many ranks were told to die; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    told: collections.Counter[str] = collections.Counter()
    ends: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    longest, bad, began, seed = 0.0, 0, time.monotonic(), args.seed
    while told.total() < args.kills:
        ranks, deaths = drawn(np.random.default_rng(seed))
        told.update(moment for _, _, moment in deaths)
        text = ",".join(f"{rank}@{step}@{moment}" for rank, step, moment in deaths)
        try:
            results = worlds.run_world(
                str(HERE / "kill_worker.py"), ranks, str(seed), text, expect_killed=None, timeout=180.0
            )
        except AssertionError as error:
            bad += 1
            print(f"seed {seed}: {ranks} ranks, {text}: {str(error)[:2000]}", flush=True)
            results = []
        for result in (r for r in results if r):
            longest = max(longest, result["longest"])
            wrong = result["worst"] != 0.0 or result["longest"] > LIMIT
            wrong |= not result["error"] and result["steps"] < 14
            bad += wrong
            if wrong:
                print(f"seed {seed}: {ranks} ranks, {text}: {result}")
            ends["one error" if result["error"] else "went on" if result["lost"] else "not touched"] += 1
            if result["error"]:
                errors[result["error"].split(":")[0] + result["error"].split(":", 1)[1][:60]] += 1
        seed += 1
        print(f"{told.total():3d} told to die, {bad} bad ends, {time.monotonic() - began:.0f} s", flush=True)
    show(told, ends, errors)
    print(f"longest step with its recoveries {longest:.1f} s (limit {LIMIT:g} s; timeout 15 s, grace 1 s)")
    print(f"{bad} bad ends in {seed - args.seed} worlds, {time.monotonic() - began:.0f} s")
    return int(bad > 0)


def show(*tables: Any) -> None:
    """Counts, one table after the other."""
    for title, table in zip(("told to die", "survivors", "errors"), tables, strict=True):
        print(f"{title}: {', '.join(f'{name} {count}' for name, count in sorted(table.items())) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
