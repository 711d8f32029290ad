"""Print what computing the token split of one layer costs on the host.

``python tests/benchmarks/split_table.py [--repeats 300]``

The split is the dispatcher's own (`SlotDispatcher._split`): from the gathered counts to everybody's tokens
for every slot, quotas and routes, with the check that the quotas add up. Counts are 2000 choices of each rank
over log-normal experts, sixteen draws in turn; the heaviest experts have a replica more, nodes have 8 ranks.
Microseconds, median and least, with Numba's kernels and in NumPy (water-filling: Python).
"""

from __future__ import annotations

import argparse
import platform
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from moeless_opt.problems.spec import TimeModel
from moeless_opt.report import table
from moeless_opt.runtime.live.dispatch import routes, shares
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher
from moeless_opt.runtime.live.dispatch.timed import TimedShares
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots

SHAPES = ((8, 8, 8), (16, 8, 8), (64, 8, 8), (256, 32, 32), (256, 64, 64))
KINDS = 16


def layer(experts: int, ranks: int, more: int) -> tuple[SlotTable, list[Any]]:
    """A layer's slots, and counts [R, E] of some batches, as they lie in what is gathered."""
    chance = np.random.default_rng(0)
    load_E = chance.lognormal(0, 1, experts)
    rows = [row.tolist() for row in np.array_split(chance.permutation(experts), ranks)]
    for e in np.argsort(-load_E)[:more].tolist():
        others = [g for g in range(ranks) if e not in rows[g]]
        rows[min(others, key=lambda g: sum(load_E[x] for x in rows[g]))].append(e)
    batches = []
    for _ in range(KINDS):
        gathered = np.zeros((ranks, experts + 10), dtype=np.int64)
        gathered[:, :experts] = chance.multinomial(2000, load_E / load_E.sum(), size=ranks)
        batches.append(gathered[:, :experts])
    return SlotTable(rows_to_slots(rows), experts), batches


def policies(slots: SlotTable) -> list[Any]:
    """One of each."""
    placed = slots.slots()[None]
    share = np.random.default_rng(1).random(placed.shape)
    time_model = TimeModel(token_cost=0.2, activation_cost=10.0)
    return [
        shares.PlannedShares(share, placed),
        shares.EqualShares(),
        shares.BalancedShares(),
        TimedShares(time_model),
    ]


def microseconds(run: Any, batches: list[Any], repeats: int) -> str:
    """Median and least of one call."""
    found = []
    for i in range(repeats + KINDS):
        start = time.perf_counter_ns()
        run(batches[i % KINDS])
        found.append((time.perf_counter_ns() - start) / 1e3)
    return f"{np.median(found[KINDS:]):.0f} ({min(found):.0f})"


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    installed = shares.warm_split()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("Token split of one layer, microseconds: median (least)")
    lines = []
    for experts, ranks, more in SHAPES:
        slots, batches = layer(experts, ranks, more)
        group: Any = SimpleNamespace(size=ranks, rank=ranks // 2, node_R=[r // 8 for r in range(ranks)])
        for policy in policies(slots):
            dispatcher = SlotDispatcher(0, experts, 8, slots, group, policy)
            compiled = microseconds(dispatcher._split, batches, repeats) if installed else "-"
            sends = dispatcher.sends_RP
            with (
                mock.patch.object(shares, "split_kernels", return_value=None),
                mock.patch.object(routes, "split_kernels", return_value=None),
            ):
                plain = microseconds(dispatcher._split, batches, repeats)
            assert np.array_equal(sends, dispatcher.sends_RP)
            lines.append([f"{experts} x {ranks}", str(more), policy.name, compiled, plain])
    print(table(("experts x ranks", "replicas more", "shares", "compiled", "plain"), lines))


if __name__ == "__main__":
    main()
