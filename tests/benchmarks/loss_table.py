"""Print what the loss of GPUs costs: experts without a live replica, bytes and imbalance of each stage, time.

``python tests/benchmarks/loss_table.py --data DIR`` reads the recorded loads of DeepSeek-V3 in DIR
(``deepseek_v3_counts.npz``), plans for one workload, and takes GPUs away:

- one GPU of 32 (4 nodes x 8) at 288 slots: every one in turn with ``--all``, else every eighth;
- a node of 4 at 512 slots, planned with every expert on two nodes and without;
- more GPUs than the others can make up for: infeasible, with how much is missing.

*coverage* is `mo.repair`'s first plan, *balance* its second. Peers see the same: ``replan`` (both in
one), EPLB from nothing on the GPUs that are left. Times are the least of three, in milliseconds of one core:
*decide* is the coverage kernel alone, *plan* with shares, bounds and the verification.

``--survival`` instead: how likely no expert is lost at 512 slots, by nodes and by GPUs that fail, for plans
of balance alone, with every expert in two domains, of ``lazarus``, and with survival as a priority.
``--shared``: the loss of one GPU where the layers share the GPUs' bytes (sizing ``memory``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.plan import loss_chance
from moeless_opt.problems.spec import PRIORITIES, Placement
from moeless_opt.report import table
from moeless_opt.solvers.replan.cover import covered

HEAD = (
    *("lost", "split", "missing", "stage", "replicas", "GB", "imbalance", "worst"),
    *("in two domains", "decide ms", "plan ms"),
)

SURVIVAL = (
    *("domains", "split", "plan for", "imbalance", "worst", "1 fails", "2", "3"),
    *("loss at 1 %", "at least", "s"),
)

SHARED = ("split", "missing", "stage", "replicas", "GB", "imbalance", "worst", "plan ms")


def least(action: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """What an action returns, and its least milliseconds of processor time."""
    took, found = [], None
    for _ in range(repeats):
        began = time.process_time()
        found = action()
        took.append((time.process_time() - began) * 1e3)
    return found, min(took)


def rows_of(name: str, live: mo.Plan, lost: list[int], model: str) -> list[list[str]]:
    """Rows of one loss: coverage, balance, and peers."""
    found, first_ms = least(lambda: mo.repair(live, lost, balance=False))
    full, both_ms = least(lambda: mo.repair(live, lost), 1)
    problem = found.coverage.made_for
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    given = load_LE, problem.current.slots_LGC, problem.capacity_LG, speed_G
    _, decide = least(lambda: covered(*given))
    rows = []

    def row(stage: str, plan: mo.Plan, moves: int, decide_ms: str, ms: float) -> None:
        held_LEG = np.zeros((problem.layers, problem.experts, problem.topology.gpus), dtype=bool)
        x, g, c = np.nonzero(plan.slots_LGC >= 0)
        held_LEG[x, plan.slots_LGC[x, g, c], g] = True
        domain_G = problem.topology.failure_domain_G
        reach = sum(held_LEG[:, :, domain_G == d].any(2).astype(int) for d in np.unique(domain_G))
        size = moves * int(problem.bytes_L[0]) / 1e9
        worst = plan.imbalance_L.max()
        told = f"{moves};{size:.1f};{plan.imbalance_L.mean():.4f};{worst:.4f};{(reach >= 2).mean():.0%}"
        rows.append(
            [name, problem.split, str(found.missing), stage, *told.split(";"), decide_ms, f"{ms:.0f}"]
        )

    row("coverage", found.coverage, found.coverage.moves.count, f"{decide:.1f}", first_ms)
    row("balance", full.plan, full.plan.moves.count, "", both_ms - first_ms)
    once, ms = least(lambda: mo.solve(problem, "replan").plan, 1)
    row("replan at once", once, once.moves.count, "", ms)
    left = np.flatnonzero(problem.usable_LG.any(0))
    slots = int(problem.topology.slots_G[left].max())
    small = mo.Problem(
        loads=problem.loads,
        topology=mo.uniform(1, len(left), slots=slots),
        split="equal",
        model=problem.model,
        current=Placement(
            slots_LGC=problem.current.slots_LGC[:, left], experts=problem.experts, partial=True
        ),
    )
    peer, ms = least(lambda: mo.solve(small, "eplb").plan, 1)
    told = f"{peer.moves.count};{peer.moves.bytes / 1e9:.1f};{peer.imbalance_L.mean():.4f}"
    told = f"{told};{peer.imbalance_L.max():.4f};;;{ms:.0f}"
    rows.append([name, "equal", str(found.missing), "eplb on the others", *told.split(";")])
    return rows


def survival_rows(load_LE: np.ndarray, split: str) -> list[list[str]]:
    """Rows of how likely no expert is lost, and at which balance."""
    rows = []
    wide = mo.uniform(4, 8, slots=16)
    for what, topology in (("nodes", wide), ("GPUs", wide.replace(domain_G=np.arange(32)))):
        for name, order, limits, solver in (
            ("balance alone", PRIORITIES, mo.Limits(), "auto"),
            ("in two domains", PRIORITIES, mo.Limits(spread=2), "auto"),
            ("lazarus", PRIORITIES, mo.Limits(), "lazarus"),
            ("survival, balance", ("survival", "balance"), mo.Limits(), "auto"),
            ("balance, survival", ("balance", "survival"), mo.Limits(), "auto"),
        ):
            problem = mo.Problem(
                loads=mo.Loads(load_TLE=load_LE[None]),
                topology=topology,
                split=split,
                limits=limits,
                objective=mo.Objective(priorities=order),
            )
            result, ms = least(lambda p=problem, s=solver: mo.solve(p, s), 1)
            plan = result.plan
            chances = [f"{chance:.4f}" for chance in mo.survival(plan, failures=3).chance_K]
            loss = loss_chance(problem, plan.slots_LGC)
            bound = plan.certificate.loss_bound
            told = f"{plan.imbalance_L.mean():.4f};{plan.imbalance_L.max():.4f}"
            least_loss = f"{bound:.3g}" if bound else ""
            rows.append(
                [what, split, name, *told.split(";"), *chances, f"{loss:.3g}", least_loss, f"{ms / 1e3:.1f}"]
            )
    return rows


def shared_rows(load_LE: np.ndarray, split: str) -> list[list[str]]:
    """Rows of a loss where all layers share the GPUs' bytes."""
    even = mo.plan(load_LE, mo.uniform(4, 8, slots=9), model="DeepSeek-V3", split=split)
    assert isinstance(even.made_for, mo.Problem)
    memory = 9 * int(even.made_for.bytes_L.sum())
    problem = even.made_for.replace(
        topology=mo.uniform(4, 8, memory=memory), sizing=mo.Sizing(policy="memory")
    )
    live = Placement(slots_LGC=even.slots_LGC, experts=even.experts)
    cover, first_ms = least(lambda: mo.repair(live, [8], problem=problem, balance=False))
    full, both_ms = least(lambda: mo.repair(live, [8], problem=problem))
    stages = (("coverage", cover.coverage, first_ms), ("balance", full.plan, both_ms - first_ms))
    return [
        [
            *(split, str(cover.missing), stage, str(plan.moves.count), f"{plan.moves.bytes / 1e9:.1f}"),
            *(f"{plan.imbalance_L.mean():.4f}", f"{plan.imbalance_L.max():.4f}", f"{ms:.0f}"),
        ]
        for stage, plan, ms in stages
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workload", default="prefill_in1024")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth layer")
    parser.add_argument("--all", action="store_true", help="lose every GPU in turn")
    parser.add_argument("--splits", nargs="+", default=["fractional", "equal"])
    parser.add_argument("--survival", action="store_true", help="how likely no expert is lost, instead")
    parser.add_argument("--shared", action="store_true", help="layers that share the GPUs' bytes, instead")
    args = parser.parse_args()
    with np.load(args.data / "deepseek_v3_counts.npz") as archive:
        at = archive["workloads"].tolist().index(args.workload)
        load_LE = archive["counts"][at][:: args.every].astype(np.float64)
    mo.warm_up()
    if args.survival:
        every = [row for split in args.splits for row in survival_rows(load_LE, split)]
        print(table(SURVIVAL, every, words_last=False))
        return
    if args.shared:
        every = [row for split in args.splits for row in shared_rows(load_LE, split)]
        print(table(SHARED, every, words_last=False))
        return
    rows: list[list[str]] = []
    for split in args.splits:
        live = mo.plan(load_LE, mo.uniform(4, 8, slots=9), model="DeepSeek-V3", split=split)
        for gpu in range(0, 32, 1 if args.all else 8):
            rows += rows_of(f"GPU {gpu} of 32", live, [gpu], "DeepSeek-V3")
        for spread in (1, 2):
            limits = mo.Limits(spread=spread)
            wide = mo.uniform(4, 8, slots=16)
            live = mo.plan(load_LE, wide, model="DeepSeek-V3", split=split, limits=limits)
            worth = live.imbalance_L.mean()
            print(f"512 slots, {split}, spread {spread}: imbalance {worth:.4f} before the loss")
            rows += rows_of(f"node 1 of 4, spread {spread}", live, list(range(8, 16)), "DeepSeek-V3")
    print(table(HEAD, rows, words_last=False))
    live = mo.plan(load_LE, mo.uniform(4, 8, slots=9), model="DeepSeek-V3")
    try:
        mo.repair(live, [0, 1, 2, 3, 4])
    except mo.InfeasibleError as error:
        print(f"5 GPUs of 32 at 288 slots: infeasible: {error}")


if __name__ == "__main__":
    main()
