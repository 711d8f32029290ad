"""Traffic, groups and affinity on recorded loads, beside methods that look at balance alone.

``python tests/benchmarks/locality_table.py --data DIR [--only groups|replan|hops|small|fronts]``

``groups``: DeepSeek-V3 with 8 groups of 32 experts on 4 nodes of 8 GPUs (288 slots) and on 8 nodes
(320 slots): imbalance and its bound, the share of token-expert pairs that leave their node when
they come evenly from all nodes, and the share that is served outside the node of its group, each with
what no plan is below whose GPUs are as quick.

``replan``: groups kept on a node, planned for one workload and re-planned for the other, with the
moves, what was asked for, and the imbalance of a plan from scratch beside it.

``hops``: gpt-oss-20b's token traces on 2 nodes of 4 GPUs with 40 slots for 32 experts; requests are
split in two, plans are made on one half and measured on the other, every placement with shares for
the other half's loads: hops to the next layer that stay on the GPU and in the node, and tokens that
leave the node at which their request lives (requests are dealt to the nodes in turn).

``fronts``: DeepSeek-V3 on 8 nodes of 8 GPUs, 320 slots: the fronts of balance against traffic and
against groups in 6 points, with the processor time, and the view of the traffic per link.

``small``: how many of some small instances are proven, and how long that takes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.io import TokenTraces
from moeless_opt.problems.plan import hops_L, outside_L, traffic_L
from moeless_opt.solvers.locality import locality_of

WORKLOADS = ("prefill_in1024", "decode_in1000out1000")


def objective(*priorities: str, tolerance: float = 0.01) -> mo.Objective:
    return mo.Objective(priorities=priorities, balance_tolerance=tolerance)


def solved(problem: mo.Problem, solver: str, **options: Any) -> tuple[mo.Plan, float]:
    began = time.process_time()
    plan = mo.solve(problem, solver, **options).plan
    assert plan is not None
    return plan, time.process_time() - began


def groups(data: Path) -> None:
    recorded = np.load(data / "deepseek_v3_counts.npz")
    names = [str(name) for name in recorded["workloads"]]
    for workload in WORKLOADS:
        load_LE = recorded["counts"][names.index(workload)].astype(float)
        for nodes, slots in ((4, 9), (8, 5)):
            print(f"\nDeepSeek-V3, {workload}, {nodes} x 8 GPUs, {nodes * 8 * slots} slots, groups of 32")
            heads = f"{'leave':>8}{'least':>8}{'outside':>9}{'least':>8}{'seconds':>9}"
            print(f"{'':44}{'imbalance':>10}{'bound':>8}{heads}")
            for name, plan, seconds in _grouped(load_LE, mo.uniform(nodes, 8, slots=slots)):
                free = mo.Problem(
                    loads=mo.Loads(load_TLE=load_LE),
                    topology=mo.uniform(nodes, 8, slots=slots),
                    split=plan.split,
                    groups=mo.Groups.even(256, 8, 1.0),
                )
                given = free, plan.slots_LGC, plan.share_LGC
                bound, told = (
                    float((plan.imbalance_L / (1 + plan.certificate.gap_L)).mean()),
                    locality_of(free, plan),
                )
                assert told.outside_bound_L is not None
                parts = traffic_L(*given), told.traffic_bound_L, outside_L(*given), told.outside_bound_L
                leave, least, outside, fewest = (float(part.sum() / load_LE.sum()) for part in parts)
                print(
                    f"{name:44}{plan.imbalance_L.mean():10.4f}{bound:8.4f}"
                    f"{leave:8.2%}{least:8.2%}{outside:9.2%}{fewest:8.2%}{seconds:9.1f}",
                    flush=True,
                )


def _grouped(load_LE: FloatArray, topology: mo.Topology) -> Iterator[tuple[str, mo.Plan, float]]:
    """Plans by name, with the seconds of processor time that each took."""
    loads = mo.Loads(load_TLE=load_LE)
    even = mo.Problem(loads=loads, topology=topology, split="equal", objective=objective("balance"))
    yield "eplb hierarchical, 8 groups", *solved(even, "eplb-hierarchical", groups=8)
    yield "eplb global", *solved(even, "eplb")
    strict, loose = mo.Groups.even(256, 8), mo.Groups.even(256, 8, 1.0)
    for split in ("equal", "fractional"):
        kept = even.replace(split=split, groups=strict)
        yield f"ours, {split}, groups on a node", *solved(kept, "auto")
    for tolerance in (0.01, 0.05, 0.15):
        wish = objective("balance", "groups", "traffic", tolerance=tolerance)
        preferred = even.replace(groups=loose, objective=wish)
        yield f"ours, equal, groups within {tolerance:.0%} of balance", *solved(preferred, "auto")
    for split in ("equal", "fractional"):
        near = even.replace(split=split, objective=objective("balance", "traffic"))
        yield f"ours, {split}, traffic within 1% of balance", *solved(near, "auto")


def replan(data: Path) -> None:
    recorded = np.load(data / "deepseek_v3_counts.npz")
    names = [str(name) for name in recorded["workloads"]]
    before_LE, after_LE = (recorded["counts"][names.index(one)].astype(float) for one in WORKLOADS)
    for (nodes, slots), split in itertools.product(((4, 9), (8, 5)), ("equal", "fractional")):
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=before_LE),
            topology=mo.uniform(nodes, 8, slots=slots),
            split=split,
            groups=mo.Groups.even(256, 8),
            objective=objective("balance"),
        )
        live = solved(problem, "auto")[0]
        then = problem.replace(loads=mo.Loads(load_TLE=after_LE))
        print(f"\n{nodes} x 8 GPUs, {split}, groups kept, prefill -> decode   imbalance   moves  seconds")
        plan, seconds = solved(then, "auto")
        print(f"{'from scratch':52}{plan.imbalance_L.mean():10.4f}{'':8}{seconds:9.1f}", flush=True)
        for most in (None, 2000, 500, 100):
            again = then.replace(
                current=live.placement,
                objective=objective("balance", "moves"),
                limits=mo.Limits(max_moves=most),
            )
            plan, seconds = solved(again, "auto")
            name = "few moves within 1%" if most is None else f"at most {most} moves"
            print(f"{name:52}{plan.imbalance_L.mean():10.4f}{plan.moves.count:8d}{seconds:9.1f}", flush=True)


def _halves(data: Path) -> list[mo.Loads]:
    """Loads, by the node of the requests and with their hops, of each half of the requests."""
    recorded = np.load(data / "gptoss20b_topk.npz")
    traces = TokenTraces(experts_TLK=recorded["experts"], offsets=recorded["offsets"], experts=32)
    found = []
    for half in traces.split(0.5, seed=0):
        by_node = np.stack([traces.load_LE(half[node::2]) for node in (0, 1)], axis=1)[None]
        found.append(
            mo.Loads(
                load_TLE=by_node.sum(2), load_TLNE=by_node, flow_LEE=traces.flow_LEE(half), source="traces"
            )
        )
    return found


def _random(problem: mo.Problem, seed: int) -> mo.Placement:
    """Experts dealt at random, the slots that are left filled at random."""
    rng = np.random.default_rng(seed)
    gpus, slots, experts = problem.topology.gpus, int(problem.capacity_LG.max()), problem.experts
    slots_LGC = np.full((problem.layers, gpus, slots), -1, dtype=np.int32)
    for table in slots_LGC:
        table[:, : experts // gpus] = rng.permutation(experts).reshape(gpus, -1)
        for row in table:
            spare = slots - experts // gpus
            row[experts // gpus :] = rng.choice(np.setdiff1d(np.arange(experts), row), spare, replace=False)
    return mo.Placement(slots_LGC=slots_LGC, experts=experts)


def hops(data: Path) -> None:
    first, second = _halves(data)
    topology = mo.uniform(2, 4, slots=5).with_levels([("gpu", 0.2), ("node", 1)])
    nodes, single = topology.with_levels([("node", 1)]), topology.with_levels([("gpu", 1)])
    problem = mo.Problem(loads=first, topology=topology, objective=objective("balance"))
    plans: dict[str, mo.Placement] = {"random": _random(problem, 0)}
    for name in ("static", "eplb", "construct"):
        plans[name] = solved(problem, name)[0].placement
    for aim in ("hops", "traffic"):
        wish = objective("balance", aim, tolerance=0.005)
        plan, seconds = solved(problem.replace(objective=wish), "locality", effort="thorough")
        plans[f"ours, balance then {aim} ({seconds:.0f} s)"] = plan.placement
    print("\ngpt-oss-20b, 2 x 4 GPUs, 40 slots: planned on half of the requests, measured on the other")
    head = ("imbalance", "worst", "hop: GPU", "node", "leaves", "home: leaves")
    print(f"{'':40}" + "".join(f"{text:>13}" for text in head))
    leaving: dict[str, dict[str, float]] = {"hops": {}, "traffic": {}}
    for name, placement in plans.items():
        cells: list[float] = []
        for aim in ("hops", "traffic"):  # shares for the loads of the other half, nothing moved
            there = mo.Problem(
                loads=second,
                topology=topology,
                current=placement,
                objective=objective("balance", aim, tolerance=0.005),
                limits=mo.Limits(max_moves=0),
            )
            plan = solved(there, "locality", effort="quick")[0]
            given = plan.slots_LGC, plan.share_LGC
            assert second.flow_LEE is not None
            every = float(second.flow_LEE.sum())
            if aim == "hops":
                gpu, node = (
                    float(hops_L(there.replace(topology=one), *given).sum()) / every
                    for one in (single, nodes)
                )
                cells += [plan.imbalance_L.mean(), plan.imbalance_L.max(), 1 - gpu, 1 - node, node]
                leaving[aim][name] = node
            else:
                left = float(traffic_L(there.replace(topology=nodes), *given).sum() / second.load_TLE.sum())
                cells.append(left)
                leaving[aim][name] = left
        print(
            f"{name:40}{cells[0]:13.4f}{cells[1]:13.4f}" + "".join(f"{x:13.2%}" for x in cells[2:]),
            flush=True,
        )
    for aim, of in leaving.items():
        blind = min(value for name, value in of.items() if not name.startswith("ours"))
        ours = min(value for name, value in of.items() if name.startswith(f"ours, balance then {aim}"))
        print(f"{aim}: {ours:.2%} leave the node, {1 - ours / blind:.1%} less than the best of the others")


def small() -> None:
    print("\nsmall instances (2 nodes of 1 GPU with 5 slots, 8 experts): proven, mean seconds")
    for aim in ("traffic", "groups", "hops"):
        for split in ("equal", "fractional"):
            done, began, count = 0, time.perf_counter(), 10
            for seed in range(count):
                rng = np.random.default_rng(seed)
                layers = 2 if aim == "hops" else 1
                by_node = rng.lognormal(3, 1, (1, layers, 2, 8))
                loads = mo.Loads(
                    load_TLE=by_node.sum(2), load_TLNE=by_node, flow_LEE=rng.random((layers - 1, 8, 8)) ** 3
                )
                problem = mo.Problem(
                    loads=loads,
                    topology=mo.uniform(2, 1, slots=5),
                    split=split,
                    groups=mo.Groups.even(8, 4, 1.0) if aim == "groups" else None,
                    objective=objective("balance", aim, tolerance=0.05),
                )
                result = mo.solve(problem, "locality", time_limit=20)
                done += "no plan comes before" in result.message
            print(
                f"{aim:10}{split:12}{done:4d} of {count}{(time.perf_counter() - began) / count:8.2f}",
                flush=True,
            )


def fronts(data: Path) -> None:
    recorded = np.load(data / "deepseek_v3_counts.npz")
    names = [str(name) for name in recorded["workloads"]]
    load_LE = recorded["counts"][names.index(WORKLOADS[0])].astype(float)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE),
        topology=mo.uniform(8, 8, slots=5),
        split="equal",
        groups=mo.Groups.even(256, 8, 1.0),
        objective=objective("balance"),
    )
    for name in ("traffic", "groups"):
        began = time.process_time()
        front = mo.pareto(problem, ("balance", name), points=6)
        print(f"\nbalance against {name}, {time.process_time() - began:.1f} s of processor time\n{front}")
    began = time.process_time()
    view = mo.traffic(front.plans[-1], problem)
    seconds = time.process_time() - began
    print(f"\nview of the links of the last plan, {seconds:.2f} s of processor time\n{view}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument("--only", choices=("groups", "replan", "hops", "fronts", "small"))
    args = parser.parse_args()
    mo.warm_up()
    if args.data is not None and args.only in (None, "groups"):
        groups(args.data)
    if args.data is not None and args.only in (None, "replan"):
        replan(args.data)
    if args.data is not None and args.only in (None, "hops"):
        hops(args.data)
    if args.data is not None and args.only in (None, "fronts"):
        fronts(args.data)
    if args.only in (None, "small"):
        small()


if __name__ == "__main__":
    main()
