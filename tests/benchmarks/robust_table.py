"""Print how plans bear loads that they were not made for: the imbalance of a kept placement on other traffic.

``python tests/benchmarks/robust_table.py --data DIR`` has four tables (``--tables`` picks some):

- ``third``: DeepSeek-V3 (``deepseek_v3_counts.npz``), 32 GPUs x 9 slots: planned on two recorded workloads,
  served a third. Means over all pairs of prefill workloads, and the worst pair, where the third is prefill
  and where it is decode; on the two themselves; and with a prefill and a decode workload in one placement.
- ``decode``: the same, prefill planned and decode served: chains of pairs alone, over six orders of the
  chain. What the planned workloads tell of decode, and what knowing decode would: for the choice of the
  experts that chain the GPUs (links), for the packing of all others, for both.
- ``next``: Qwen1.5-MoE (``qwen15_moe_iterations.npz``), 8 GPUs x 9 slots: planned on iterations up to t,
  served t + 1.
- ``small``: two scenarios of 6 experts on 3 GPUs x 3 slots, every risk, beside every placement there is.

*even*: tokens divided evenly over replicas, as engines do that cannot weight. *live*: shares re-solved on the
traffic that came. The placements are the same in both columns. ``mean`` plans for the mean of the two;
``expected``, ``worst`` and ``covariance`` (two deviations) for the scenarios by that risk; EPLB for the mean,
as published.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import equal_shares
from moeless_opt.report import table
from moeless_opt.runtime.predict import backtest
from moeless_opt.solvers.core import risk_L
from moeless_opt.solvers.core.chain import chained
from moeless_opt.solvers.shares import solve_shares

RISKS = ("expected", "worst", "covariance")
ORDERS = (0, 5, 11, 17, 23, 27)
"""Where the chain's random orders begin."""


def wish(risk: str) -> mo.Objective:
    """The risk, of two deviations where it takes any number."""
    return mo.Objective(risk=risk, cvar_alpha=0.5, sigma=2 if risk == "covariance" else 1)


def worth(slots_LGC: SlotArray, load_LE: FloatArray) -> tuple[float, float]:
    """Imbalance with even and with live shares, mean over the layers."""
    speed_G = np.ones(slots_LGC.shape[1])
    mean_L = load_LE.sum(1) / len(speed_G)
    even_LGC = equal_shares(slots_LGC, load_LE.shape[1])
    even_L = gpu_times(load_LE, slots_LGC, even_LGC, speed_G).max(1)
    return float((even_L / mean_L).mean()), float((solve_shares(load_LE, slots_LGC).time_L / mean_L).mean())


def planned(load_TLE: FloatArray, topology: mo.Topology) -> Iterator[tuple[str, SlotArray, float]]:
    """Method, placement, seconds of processor time."""
    mean = load_TLE.mean(0)
    ways = {
        "eplb": lambda: mo.plan(mean, topology, split="equal", solver="eplb"),
        "mean, equal split": lambda: mo.plan(mean, topology, split="equal"),
        "mean": lambda: mo.plan(mean, topology),
    } | {
        risk: lambda risk=risk: mo.plan(load_TLE, topology, objective=wish(risk))  # type: ignore[misc]
        for risk in RISKS
    }
    for name, way in ways.items():
        began = time.process_time()
        slots_LGC = way().slots_LGC
        yield name, slots_LGC, time.process_time() - began
    began = time.process_time()
    layers, gpus = mean.shape[0], topology.gpus
    capacity_LG = np.broadcast_to(topology.capacity_LG(np.zeros(layers), mean.shape[1]), (layers, gpus))
    slots_LGC = chained(load_TLE, capacity_LG, topology.speed_G, pairs=True)
    yield "chain of pairs", slots_LGC, time.process_time() - began


def third(data: Path, every: int) -> str:
    """Two workloads planned, a third one served."""
    with np.load(data / "deepseek_v3_counts.npz") as archive:
        names, counts = archive["workloads"].tolist(), archive["counts"][:, ::every].astype(np.float64)
    counts /= counts.sum(2, keepdims=True) / 1e6
    topology = mo.uniform(4, 8, slots=9)
    is_decode = [name.startswith("decode") for name in names]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for pair in itertools.combinations(range(len(names)), 2):
        decodes = sum(is_decode[i] for i in pair)
        if decodes == 2:
            continue
        for method, slots_LGC, seconds in planned(counts[list(pair)], topology):
            kinds = found.setdefault(method, {})
            kinds.setdefault("seconds", []).append((seconds, seconds))
            for k in range(len(names)):
                kind = "the two" if k in pair else "decode" if is_decode[k] else "prefill"
                kinds.setdefault(f"{decodes} {kind}", []).append(worth(slots_LGC, counts[k]))
    heads = {
        "0 the two": "own two", "0 prefill": "a third prefill", "0 decode": "decode",
        "1 the two": "prefill + decode: own", "1 prefill": "other prefill", "1 decode": "other decode",
    }  # fmt: skip
    rows = []
    for method, kinds in found.items():
        row = [method]
        for kind in heads:
            even, live = np.array(kinds[kind]).T
            row.append(f"{even.mean():.4f} {live.mean():.4f} ({live.max():.4f})")
        rows.append([*row, f"{np.mean(kinds['seconds']):.2f}"])
    title = "DeepSeek-V3, planned on two workloads; even, live (live, worst pair)\n"
    return title + table(("planned for", *heads.values(), "s"), rows, words_last=False)


def to_decode(data: Path, every: int) -> str:
    """Chains of pairs planned on prefill, decode served with live shares; and with parts of it known."""
    with np.load(data / "deepseek_v3_counts.npz") as archive:
        names, counts = archive["workloads"].tolist(), archive["counts"][:, ::every].astype(np.float64)
    counts /= counts.sum(2, keepdims=True) / 1e6
    decodes = [i for i, name in enumerate(names) if name.startswith("decode")]
    prefills = [i for i in range(len(names)) if i not in decodes]
    capacity_LG, speed_G = np.full((counts.shape[1], 32), 9), np.ones(32)

    def chains(load_TLE: FloatArray, links_LE: FloatArray) -> Iterator[SlotArray]:
        for begin in ORDERS:  # an order is drawn for each layer by its number
            load, links = np.roll(load_TLE, begin, 1), np.roll(links_LE, begin, 0)
            made = chained(load, capacity_LG, speed_G, pairs=True, links_LE=links)
            yield np.roll(made, -begin, 0)

    found: dict[str, list[list[float]]] = {}
    for pair in itertools.combinations(prefills, 2):
        for name, planned in (("two prefills", counts[list(pair)]), ("all four prefills", counts[prefills])):
            for deviations in (0, 2, 5):
                links_LE = planned.mean(0) + deviations * planned.std(0)
                for slots_LGC in chains(planned, links_LE):
                    row = [worth(slots_LGC, counts[k])[1] for k in decodes]
                    found.setdefault(f"{name}, links by the mean + {deviations} sd", []).append(row)
        for k in decodes:
            two, then = counts[list(pair)], counts[[k]]
            for name, load_TLE, links in (
                ("two prefills, links of decode", two, then),
                ("packed by decode, links of two prefills", then, two),
                ("decode", then, then),
            ):
                for slots_LGC in chains(load_TLE, links.mean(0)):
                    found.setdefault(name, []).append([worth(slots_LGC, counts[k])[1]])
    rows = []
    for name, values in found.items():
        mean_O = np.mean(values, axis=1).reshape(-1, len(ORDERS)).mean(0)
        rows.append([name, f"{mean_O.mean():.4f}", f"{mean_O.std():.4f}"])
    title = "DeepSeek-V3, chains of pairs, decode served with live shares\n"
    return title + table(("planned", "decode", "+- over orders"), rows, words_last=False)


def following(data: Path) -> str:
    """Iterations up to t planned, t + 1 served."""
    topology, rows = mo.uniform(1, 8, slots=9), []
    with np.load(data / "qwen15_moe_iterations.npz") as archive:
        sets = {name: archive[name].astype(np.float64) for name in archive.files}
    for name, load_TLE in sets.items():
        found: dict[str, list[tuple[float, float]]] = {}
        for t in range(3, len(load_TLE) - 1, 3):
            seen, then = load_TLE[: t + 1], load_TLE[t + 1]
            ways = {
                "eplb, last": mo.plan(seen[-1], topology, split="equal", solver="eplb"),
                "eplb, mean": mo.plan(seen.mean(0), topology, split="equal", solver="eplb"),
                "ours, mean, equal split": mo.plan(seen.mean(0), topology, split="equal"),
                "ours, mean": mo.plan(seen.mean(0), topology),
                "ours, last 4 as scenarios": mo.plan(seen[-4:], topology),
            }
            for way, plan in ways.items():
                found.setdefault(way, []).append(worth(plan.slots_LGC, then))
        rows += [[name, way, *(f"{x:.4f}" for x in np.mean(each, axis=0))] for way, each in found.items()]
    title = "Qwen1.5-MoE, planned on iterations up to t, served t + 1\n"
    text = title + table(("data", "planned for", "even", "live"), rows, words_last=False)
    tried = [
        [name, one.name, f"{one.error:.4f}", f"{one.worst:.4f}"]
        for name, load_TLE in sets.items()
        for one in backtest(load_TLE, begin=4)
    ]
    head = ("data", "forecaster", "total variation", "worst window")
    return f"{text}\n\nforecasts of t + 1, best first\n" + table(head, tried, words_last=False)


def every_placement(experts: int, gpus: int, slots: int) -> SlotArray:
    """All placements of a layer with full slots, no expert twice on a GPU, up to the GPUs' order."""
    rows = list(itertools.combinations(range(experts), slots))
    found = [
        choice
        for choice in itertools.combinations_with_replacement(rows, gpus)
        if len(set().union(*choice)) == experts
    ]
    return np.array(found, dtype=np.int32)


def small(instances: int) -> str:
    """The best of every placement there is, and ours."""
    slots_XGC, rows = every_placement(6, 3, 3), []
    for split, risk in itertools.product(
        ("fractional", "equal"), ("expected", "worst", "cvar", "sigma", "covariance")
    ):
        over, gap, best = [], [], 0
        for seed in range(instances):
            load_TE = np.random.default_rng(seed).lognormal(0, 0.8, (2, 6))
            one = mo.Problem(
                loads=mo.Loads(load_TLE=load_TE[:, None]),
                topology=mo.uniform(1, 3, slots=3),
                split=split,
                objective=wish(risk),
            )
            many = one.replace(loads=mo.Loads(load_TLE=np.repeat(load_TE[:, None], len(slots_XGC), 1)))
            least = float(risk_L(many, slots_XGC).min())
            plan = mo.solve(one).plan
            assert plan is not None
            value = float(plan.certificate.value_L[0])
            over.append(value / least - 1)
            gap.append(plan.certificate.gap)
            best += value <= least * (1 + 1e-9)
        told = f"{np.mean(over):.4%};{np.max(over):.4%};{best} of {instances};{np.mean(gap):.2%}"
        rows.append([split, risk, *told.split(";")])
    title = f"6 experts, 3 GPUs x 3 slots, 2 scenarios: beside all {len(slots_XGC)} placements\n"
    head = ("split", "risk", "above the best, mean", "worst", "best", "gap to the certificate's bound")
    return title + table(head, rows, words_last=False)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="take every so manyth layer of DeepSeek-V3")
    parser.add_argument("--instances", type=int, default=30, help="small instances of each kind")
    parser.add_argument("--tables", nargs="+", default=["third", "decode", "next", "small"])
    args = parser.parse_args()
    mo.warm_up()
    made = {
        "third": lambda: third(args.data, args.every),
        "decode": lambda: to_decode(args.data, args.every),
        "next": lambda: following(args.data),
        "small": lambda: small(args.instances),
    }
    for name in args.tables:
        print(made[name](), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
