"""Print what following the speeds of ranks is worth: four gloo ranks, one twice as long for a row.

``python tests/benchmarks/speed_watch_table.py`` runs the ranks several times, without and with `SpeedWatch`:
the slowest rank's time in the experts of a pass, its ratio to the mean, the last rank's share of the rows,
and the speed that is believed of it. The last line has the medians over the runs. ``--times 1`` has four
equal ranks.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np

from moeless_opt.report import table

HEAD = ("run", "plain ms", "followed ms", "plain ratio", "followed ratio", "rows before", "after", "believed")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--times", type=float, default=2.0, help="how many times slower the last rank is")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    run_world = importlib.import_module("worlds").run_world
    rows = []
    for _ in range(args.runs):
        plain, followed = run_world("worker_speeds.py", args.ranks, str(args.times), "sleep")[0]
        parts = [(told["makespan_ms"], told["imbalance"], told["share"]) for told in (plain, followed)]
        rows.append([*np.array(parts).T.ravel().tolist(), followed["speed"][-1]])
    rows.append(np.median(rows, axis=0).tolist())
    shown = [
        [name, *(f"{value:.1f}" for value in row[:2]), *(f"{value:.3f}" for value in row[2:])]
        for name, row in zip([*map(str, range(1, args.runs + 1)), "median"], rows, strict=True)
    ]
    print(table(HEAD, shown, words_last=False))


if __name__ == "__main__":
    main()
