"""Print what shares in multiples of 1/N cost in balance and moves, on re-plans of recorded DeepSeek-V3 loads.

``python tests/benchmarks/entries_table.py --data DIR [--entries 16,64,256,1024]``

Every block plans prefill_in1024 by our own fractional plan, lets the traffic become another and re-plans all
layers to 1 %. Columns, for N entries:

- by remainders, by search: mean imbalance of the re-plan made for free shares, its shares rounded by
  largest remainders and by `entry_shares`
- ms: processor time of that search, the compiled twin and the plain one
- planned: mean and worst imbalance of ``plan(share_entries=N)``, which judges the tolerance when rounded
- bound: mean over the layers of the certificate's lower bound over perfect balance
- moved: share of the replicas, and ms of the whole ``plan()``, processor time
- table: ms of `share_table` of that plan, and how far the first 32 and 128 tokens of a batch are from the
  shares: largest difference over all experts of two or more entries
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.plan import gpu_times
from moeless_opt.report import table
from moeless_opt.solvers.shares import entry_shares, round_tokens

SHAPES = ((32, 9), (64, 5))
DRIFTS = ("prefill_in4096", "decode_in1000out1000")
KNUTH = 2654435769


def by_remainders(load_LE: Any, slots_LGC: Any, share_LGC: Any, entries: int) -> Any:
    """Shares rounded expert by expert."""
    where = np.nonzero(slots_LGC >= 0)
    key = where[0] * load_LE.shape[1] + slots_LGC[where]
    rounded = np.zeros(slots_LGC.shape)
    rounded[where] = round_tokens(share_LGC[where] * entries, key, np.full(load_LE.size, entries)) / entries
    return rounded


def imbalance(load_LE: Any, slots_LGC: Any, share_LGC: Any) -> float:
    """Mean of max / mean over the layers."""
    time_LG = gpu_times(load_LE, slots_LGC, share_LGC, np.ones(slots_LGC.shape[1]))
    return float((time_LG.max(1) / time_LG.mean(1)).mean())


def timed(run: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """Result, and the least milliseconds of the processor."""
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        found = run()
        least = min(least, (time.process_time() - start) * 1e3)
    return found, least


def off_by(found: mo.ShareTable, tokens: int) -> float:
    """How far the first tokens of a batch are from the shares."""
    hashed = np.arange(tokens, dtype=np.uint64) * np.uint64(KNUTH) & np.uint64(0xFFFFFFFF)
    worst = 0.0
    for x, expert in np.argwhere(found.count_LE > 1).tolist():
        count = int(found.count_LE[x, expert])
        row = found.slot_LEN[x, expert, :count]
        met = row[(hashed % np.uint64(count)).astype(np.int64)]
        worst = max(worst, *(abs(float((met == s).mean() - (row == s).mean())) for s in np.unique(row)))
    return worst


def measured(load_LE: Any, topology: mo.Topology, live: mo.Plan, free: mo.Plan, entries: int) -> list[str]:
    """One line of the table."""
    rounded = imbalance(
        load_LE, free.slots_LGC, by_remainders(load_LE, free.slots_LGC, free.share_LGC, entries)
    )

    def search(backend: str) -> Any:
        return entry_shares(load_LE, free.slots_LGC, free.share_LGC, entries, backend=backend)

    found, quick = timed(lambda: search("numba"))
    same, slow = timed(lambda: search("numpy"), 1)
    assert np.array_equal(found, same)
    plan, whole = timed(lambda: mo.plan(load_LE, topology, current=live, share_entries=entries), 1)
    sheet, (spread, laid) = plan.certificate, timed(lambda: mo.share_table(plan, entries), 1)
    perfect_L = load_LE.sum(1) / topology.gpus
    return [
        str(entries),
        f"{rounded:.4f}",
        f"{imbalance(load_LE, free.slots_LGC, found):.4f}",
        f"{quick:.0f} / {slow:.0f}",
        f"{plan.imbalance_L.mean():.4f} / {plan.imbalance_L.max():.4f}",
        f"{float((sheet.lower_bound_L / perfect_L).mean()):.4f}",
        f"{plan.moves.fraction:.2%}",
        f"{whole:.0f}",
        f"{laid:.0f}",
        f"{off_by(spread, 32):.3f} / {off_by(spread, 128):.3f}",
    ]


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the recorded loads")
    parser.add_argument("--entries", default="16,64,256,1024")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    mo.warm_up()
    with np.load(arguments.data / "deepseek_v3_counts.npz") as archive:
        loads = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(np.float64), strict=True))
    head = ("N", "by remainders", "by search", "ms", "planned", "bound", "moved", "ms", "table ms", "off")
    for gpus, slots in SHAPES:
        topology = mo.uniform(gpus // 8, 8, slots=slots)
        live = mo.plan(loads["prefill_in1024"], topology)
        for name in DRIFTS:
            free, spent = timed(partial(mo.plan, loads[name], topology, current=live), 1)
            print(
                f"{gpus} x {slots}, prefill_in1024 -> {name}; free shares: {free.imbalance_L.mean():.4f} / "
                f"{free.imbalance_L.max():.4f}, {free.moves.fraction:.2%} moved, {spent:.0f} ms"
            )
            lines = [
                measured(loads[name], topology, live, free, int(entries))
                for entries in arguments.entries.split(",")
            ]
            print(table(head, lines), flush=True)


if __name__ == "__main__":
    main()
