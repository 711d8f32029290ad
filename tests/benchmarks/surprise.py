"""How plans fare when the loads turn out different: placements kept, loads times lognormal noise.

Prints one table per instance: rows are methods, columns the imbalance (largest GPU time over mean, averaged
over layers and draws) at each noise. "re-solved" splits the tokens anew on the actual loads, "fixed" keeps
the planned shares, "equal" divides evenly over the replicas.

Run it as a script: ``python tests/benchmarks/surprise.py --data deepseek_v3_counts.npz --speed``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless_opt.solvers.construct.alias import alias_pack
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.pack.counts import apportion, trim
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.pack.swaps import improve
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracles.share_lp import ShareLP

Floats = NDArray[np.float64]
SIGMAS = (0.0, 0.1, 0.3)


class Instance(NamedTuple):
    """Loads to plan for, and the GPUs."""

    name: str
    load_LE: Floats
    gpus: int
    slots: int


class Placed(NamedTuple):
    """A placement and its planned shares."""

    slots_LGC: NDArray[np.int32]
    share_LGC: Floats


def recorded(path: Path, gpus: int, slots: int, workloads: int | None = None) -> list[Instance]:
    """One instance per workload of a recording with `counts` [workloads, layers, experts]."""
    with np.load(path) as data:
        counts, names = data["counts"].astype(np.float64), data["workloads"]
    return [
        Instance(f"{name}, {gpus} GPUs, {gpus * slots} slots", load_LE, gpus, slots)
        for name, load_LE in list(zip(names, counts, strict=True))[:workloads]
    ]


def generated(layers: int, seed: int) -> list[Instance]:
    """Lognormal (sigma 1) and Zipf (0.8, 1.2) loads in four sizes."""
    found = []
    for family in ("lognormal 1.0", "zipf 0.8", "zipf 1.2"):
        for experts, gpus, slots in ((64, 8, 10), (256, 32, 9), (256, 64, 5), (16, 8, 3)):
            rng = np.random.default_rng(seed)
            name, power = family.split()
            if name == "lognormal":
                load_LE = np.exp(rng.normal(0.0, float(power), (layers, experts))) * 1000.0
            else:
                base_E = np.arange(1, experts + 1) ** -float(power) * 1000.0 * experts
                load_LE = base_E * np.exp(rng.normal(0.0, 0.1, (layers, experts)))
            found.append(Instance(f"{family}, {experts}/{gpus}/{gpus * slots}", load_LE, gpus, slots))
    return found


def equal_shares(slots_LGC: NDArray[np.int32], experts: int) -> Floats:
    """Every replica of an expert takes the same part."""
    share_LGC = np.zeros(slots_LGC.shape)
    for slots_GC, share_GC in zip(slots_LGC, share_LGC, strict=True):
        count_E = np.bincount(slots_GC[slots_GC >= 0], minlength=experts)
        share_GC[slots_GC >= 0] = 1.0 / count_E[slots_GC[slots_GC >= 0]]
    return share_LGC


def greedy(instance: Instance) -> Placed:
    """EPLB-like: greedy replicas, largest piece first onto the emptiest GPU; equal split."""
    load_LE, gpus, slots = instance.load_LE, instance.gpus, instance.slots
    layers, experts = load_LE.shape
    replicas_LE = apportion(load_LE, np.full(layers, gpus * slots), gpus)
    slots_LGC = np.full((layers, gpus, slots), -1, dtype=np.int32)
    for layer in range(layers):
        piece_E = load_LE[layer] / replicas_LE[layer]
        time_G, used_G = np.zeros(gpus), np.zeros(gpus, dtype=np.int64)
        for expert in np.argsort(-piece_E, kind="stable").tolist():
            for _ in range(int(replicas_LE[layer, expert])):
                barred_G = (used_G >= slots) | (slots_LGC[layer] == expert).any(axis=1)
                gpu = int(np.where(barred_G, np.inf, time_G).argmin())
                if barred_G[gpu]:  # nowhere left without a second replica: drop it
                    continue
                slots_LGC[layer, gpu, used_G[gpu]] = expert
                used_G[gpu] += 1
                time_G[gpu] += piece_E[expert]
    return Placed(slots_LGC, equal_shares(slots_LGC, experts))


def swapped(instance: Instance) -> Placed:
    """Greedy replicas, packed and swapped to balance; equal split."""
    load_LE, gpus, slots = instance.load_LE, instance.gpus, instance.slots
    capacity_LG, speed_G = np.full((len(load_LE), gpus), slots), np.ones(gpus)
    replicas_LE = trim(load_LE, apportion(load_LE, capacity_LG.sum(axis=1), gpus), capacity_LG)
    slots_LGC = pack(load_LE, replicas_LE, capacity_LG, speed_G)
    slots_LGC = improve(load_LE, slots_LGC, capacity_LG, speed_G, target=1.0005)
    return Placed(slots_LGC, equal_shares(slots_LGC, load_LE.shape[1]))


def aliased(instance: Instance) -> Placed:
    """Alias packing of every layer."""
    found = [
        alias_pack(load_E, [instance.slots] * instance.gpus, np.ones(instance.gpus))
        for load_E in instance.load_LE
    ]
    packed = [one for one in found if one is not None]
    if len(packed) < len(found):
        raise ValueError(f"{instance.name}: alias packing does not apply")
    return Placed(np.array([one[0] for one in packed]), np.array([one[1] for one in packed]))


def ours(instance: Instance) -> Placed:
    """The product's default."""
    capacity_LG = np.full((len(instance.load_LE), instance.gpus), instance.slots)
    return Placed(*construct_fractional(instance.load_LE, capacity_LG, np.ones(instance.gpus)))


def thorough(instance: Instance) -> Placed:
    """The same with ``effort="thorough"``."""
    capacity_LG = np.full((len(instance.load_LE), instance.gpus), instance.slots)
    speed_G = np.ones(instance.gpus)
    return Placed(*construct_fractional(instance.load_LE, capacity_LG, speed_G, effort="thorough"))


def imbalance(load_LE: Floats, placed: Placed, *, resolve: bool) -> float:
    """Largest GPU time over the mean, averaged over layers."""
    mean_L = load_LE.sum(axis=1) / placed.slots_LGC.shape[1]
    if resolve:
        return float((solve_shares(load_LE, placed.slots_LGC).time_L / mean_L).mean())
    rows = np.arange(len(load_LE))[:, None, None]
    token_LGC = np.where(placed.slots_LGC >= 0, load_LE[rows, placed.slots_LGC] * placed.share_LGC, 0.0)
    return float((token_LGC.sum(axis=2).max(axis=1) / mean_L).mean())


METHODS: tuple[tuple[str, Callable[[Instance], Placed], bool], ...] = (
    ("greedy + LPT (EPLB-like), equal", greedy, False),
    ("greedy + swap, equal", swapped, False),
    ("greedy + swap, re-solved", swapped, True),
    ("alias, fixed", aliased, False),
    ("alias, re-solved", aliased, True),
    ("ours, fixed", ours, False),
    ("ours, re-solved", ours, True),
    ("ours thorough, re-solved", thorough, True),
)


def surprise_table(instance: Instance, *, draws: int = 3, seed: int = 0) -> list[tuple[str, list[float]]]:
    """Method and imbalance at each of `SIGMAS`, on the same noise for every method."""
    placed: dict[Callable[[Instance], Placed], Placed] = {}
    noisy = {
        sigma: [
            instance.load_LE
            * np.exp(np.random.default_rng([seed, draw]).normal(0.0, sigma, instance.load_LE.shape))
            for draw in range(draws if sigma else 1)
        ]
        for sigma in SIGMAS
    }
    rows = []
    for name, method, resolve in METHODS:
        if method not in placed:
            placed[method] = method(instance)
        found = [
            statistics.fmean(imbalance(load_LE, placed[method], resolve=resolve) for load_LE in noisy[sigma])
            for sigma in SIGMAS
        ]
        rows.append((name, found))
    return rows


def milliseconds(action: Callable[[], object], repeats: int = 15) -> tuple[float, float]:
    """Median and least wall time of a warm call."""
    action()
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took), min(took)


def speed_table(instances: list[Instance], planned: Instance) -> list[tuple[str, float, float]]:
    """Times of construction and of shares, all layers at once: name, median and least milliseconds.

    Shares are timed on a placement planned for `planned` under the loads of each instance in turn.
    """
    rows = []
    capacity_LG = np.full((len(planned.load_LE), planned.gpus), planned.slots)
    speed_G = np.ones(planned.gpus)
    placement = swapped(planned).slots_LGC
    graph = ReplicaGraph(placement, speed_G, planned.load_LE.shape[1])
    rows.append(
        ("prepare a placement", *milliseconds(lambda: ReplicaGraph(placement, speed_G, graph.experts)))
    )
    programmes = [ShareLP(slots_GC, speed_G, graph.experts) for slots_GC in placement]
    for instance in instances:
        load_LE = instance.load_LE
        name = instance.name.split(",")[0]

        def by_lp(load_LE: Floats = load_LE) -> list[float]:
            return [lp.time(load_E) for lp, load_E in zip(programmes, load_LE, strict=True)]

        def by_flow(load_LE: Floats = load_LE) -> object:
            return solve_shares(load_LE, graph)

        def by_descent(load_LE: Floats = load_LE) -> object:
            return solve_shares(load_LE, graph, exact=False, tolerance=0.005)

        def construct(load_LE: Floats = load_LE) -> object:
            return construct_fractional(load_LE, capacity_LG, speed_G)

        optimum_L = np.array(by_lp())
        gap = float((solve_shares(load_LE, graph).time_L / optimum_L - 1.0).max())
        short = float(
            (solve_shares(load_LE, graph, exact=False, tolerance=0.005).time_L / optimum_L - 1.0).max()
        )
        rows.append((f"{name}: shares, descent + flow (gap {gap:.0e})", *milliseconds(by_flow)))
        rows.append((f"{name}: shares, descent alone (gap {short:.1e})", *milliseconds(by_descent)))
        rows.append((f"{name}: shares, persistent GLOP", *milliseconds(by_lp, 5)))
        rows.append((f"{name}: construct_fractional, NumPy", *milliseconds(construct)))
    if fast.warm():

        def compiled(load_LE: Floats = planned.load_LE) -> object:
            return construct_fractional(load_LE, capacity_LG, speed_G)

        rows.append((f"{planned.name.split(',')[0]}: construct_fractional, Numba", *milliseconds(compiled)))
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="npz with `counts` [workloads, layers, experts]")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=30, help="layers of the generated instances")
    parser.add_argument("--speed", action="store_true", help="time construction and shares, too")
    args = parser.parse_args()
    instances = generated(args.layers, args.seed)
    if args.data:
        instances = recorded(args.data, 32, 9) + recorded(args.data, 64, 5, 1) + instances
    for instance in instances:
        print(f"\n{instance.name}")
        print(f"{'':34}" + "".join(f"{'sigma ' + str(sigma):>13}" for sigma in SIGMAS))
        for name, found in surprise_table(instance, draws=args.draws, seed=args.seed):
            print(f"{name:34}" + "".join(f"{value:13.4f}" for value in found))
    if args.speed:
        real = recorded(args.data, 32, 9) if args.data else generated(args.layers, args.seed)[1:2]
        print(f"\n{'milliseconds, all layers':64}{'median':>8}{'least':>8}")
        for name, median, least in speed_table(real, real[0]):
            print(f"{name:64}{median:8.2f}{least:8.2f}")


if __name__ == "__main__":
    main()
