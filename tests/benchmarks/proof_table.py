"""Measure the proofs: exact solvers, bounds, minimal sizing, the budget over layers, activated experts.

    python tests/benchmarks/proof_table.py [SECTION ...]

Sections: published, shipped, certificates, spares, sizing, budget, activation (default: all). Those on
recorded loads need the folder that MOELESS_DATA names, and are left out without it. Times are medians on the
machine at hand.
"""

from __future__ import annotations

import os
import statistics
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.instances.library import instance_names, load_instance
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.solvers.baselines.moeless import replica_cv, scale
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.exact.solver import Portfolio
from moeless_opt.solvers.pack.counts import apportion
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.sizing.budget import plan_budget, redundancy_rows
from moeless_opt.solvers.sizing.minimal import fewest_for_cv
from moeless_opt.solvers.timed.activation import fewest_activated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.spares import fewest_spares

ROOT = Path(os.environ.get("MOELESS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def timed(run: Callable[..., Any], *arguments: Any, repeats: int = 1, **options: Any) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = clock.perf_counter()
        result = run(*arguments, **options)
        seconds.append(clock.perf_counter() - start)
    return statistics.median(seconds), result


def counts() -> Any:
    path = ROOT / "deepseek_v3_counts.npz"
    if not path.is_file():
        print(f"(left out: no recorded loads at {ROOT}; set MOELESS_DATA)")
        return None
    return np.load(path)


def published() -> None:
    """Published examples, proven by the portfolio."""
    for name in (n for n in instance_names() if n.startswith(("flashlb", "deepseek-readme"))):
        problem = load_instance(name)
        Portfolio().solve(problem, stop=MaxTime(30))
        seconds, result = timed(Portfolio().solve, problem, stop=MaxTime(30), repeats=3)
        sheet = result.plan.certificate
        print(
            f"{name:28} {seconds:7.3f} s  {result.status:9} value {sheet.value_L.round(4)} by {sheet.bound_L}"
        )


def shipped() -> None:
    """Mixtral-, Phi- and Scout-shaped layers with equal split, one at a time, 10 s each at most."""
    names = [n for n in instance_names() if n.startswith(("mixtral", "phi", "scout")) and n.endswith("equal")]
    for name in names:
        problem = load_instance(name)
        first = Construct().solve(problem, stop=MaxTime(60)).plan
        assert first is not None
        seconds, gaps, better = [], [], 0
        for layer in range(problem.layers):
            taken, outcome = timed(_prove, problem, first, layer)
            seconds.append(taken)
            gaps.append(outcome[0])
            better += outcome[1]
        proven = sum(g <= 1e-6 for g in gaps)
        print(
            f"{name:28} {proven}/{problem.layers} layers proven; median {statistics.median(seconds):.3f} s, "
            f"longest {max(seconds):.2f} s; largest gap {max(gaps):.3%}; heuristic beaten in {better}"
        )


def _prove(problem: Any, first: Any, layer: int) -> tuple[float, bool]:
    from moeless_opt.solvers.pack.patterns import solve_patterns

    value = float(first.certificate.value_L[layer])
    result = solve_patterns(
        problem.load_LE[layer],
        problem.capacity_LG[layer],
        problem.topology.speed_G,
        upper=value,
        lower=float(first.certificate.lower_bound_L[layer]),
        stop=MaxTime(10),
    )
    return result.upper / result.lower - 1, result.upper < value * (1 - 1e-9)


def certificates() -> None:
    """Gap of the one-shot plans to the bound, every layer of every recorded workload."""
    data = counts()
    if data is None:
        return
    for gpus, slots in ((32, 9), (64, 5)):
        capacity, speed = np.full((58, gpus), slots), np.ones(gpus)
        for split, effort in (("equal", "normal"), ("equal", "thorough"), ("fractional", "normal")):
            worst, seconds, bounding = 0.0, [], []
            for load in data["counts"].astype(float):
                if split == "equal":
                    taken, plan = timed(construct_equal, load, capacity, speed, effort=effort)
                    time_L = even_times(load, plan, speed).max(axis=1)
                else:
                    taken, (plan, share) = timed(construct_fractional, load, capacity, speed)
                    tokens = np.where(plan >= 0, load[np.arange(58)[:, None, None], plan] * share, 0.0)
                    time_L = tokens.sum(axis=2).max(axis=1)
                bound_time, (bound_L, _) = timed(best_bound, load, capacity, speed, split, repeats=5)
                worst = max(worst, float((time_L / bound_L - 1).max()))
                seconds.append(taken)
                bounding.append(bound_time)
            plan_ms, bound_ms = (statistics.median(x) * 1e3 for x in (seconds, bounding))
            print(
                f"{gpus} GPUs, {gpus * slots} slots, {split}, {effort}: largest gap {worst:.4%}; "
                f"plan {plan_ms:.1f} ms, bound {bound_ms:.2f} ms"
            )


def spares() -> None:
    """UltraEP's setting: 64 GPUs, 256 experts, 4 home and 2 spare slots, imbalance at most 1.01."""
    home = np.arange(256) // 4
    for peak, theirs in ((1.51, 38), (2.01, 46), (3.03, 51)):
        once, best = [], []
        for seed in range(10):
            load = _zipf(peak, seed)
            limit = 1.01 * load.sum() / 64
            spare = np.full(64, 2)
            once.append(timed(fewest_spares, load, home, spare, time=limit, tries=1))
            best.append(timed(fewest_spares, load, home, spare, time=limit))
        used, quick = ([len(f.expert_R) for _, f in some] for some in (best, once))
        bound = statistics.median(f.bound for _, f in best)
        slow_ms, fast_us = (statistics.median(t for t, _ in some) for some in (best, once))
        print(
            f"max/mean {peak}: published {theirs}; ours median {statistics.median(used):g} "
            f"({min(used)}-{max(used)}) in {slow_ms * 1e3:.1f} ms, bound {bound:g}; "
            f"plain rule {statistics.median(quick):g} in {fast_us * 1e6:.0f} us"
        )


def _zipf(peak: float, seed: int) -> Any:
    """Zipf loads in random order, so steep that the fullest of 64 home GPUs is ``peak`` times the mean."""
    order = np.random.default_rng(seed).permutation(256)
    low, high = 0.0, 3.0
    for _ in range(60):
        power = (low + high) / 2
        load = (np.arange(1, 257) ** -power)[order]
        tokens = load.reshape(64, 4).sum(axis=1)
        low, high = (power, high) if tokens.max() < peak * tokens.mean() else (low, power)
    return load


def sizing() -> None:
    """CV 0.2 on 1,000 random layers (lognormal, sigma 1), at most 4 replicas per expert on average."""
    for experts in (8, 16, 64):
        load = np.random.default_rng(experts).lognormal(0, 1, (1000, experts))
        cap = 4 * experts
        seconds, minimal = timed(fewest_for_cv, load, 0.2, cap, repeats=5)
        theirs, greedy = timed(scale, load, 0.2, cap, repeats=3)
        met = replica_cv(load, greedy) <= 0.2 * (1 + 1e-9)
        ours, used = minimal.replicas_LE.sum(axis=1), greedy.sum(axis=1)
        both = met & minimal.met_L
        print(
            f"{experts:3} experts: met {minimal.met_L.sum()} (greedy {met.sum()}); "
            f"replicas {ours[both].sum()} against {used[both].sum()} "
            f"(+{used[both].sum() / ours[both].sum() - 1:.1%}), fewer in {(ours < used)[both].sum()}, "
            f"greedy's worst +{(used[both] / ours[both]).max() - 1:.0%}; "
            f"{seconds:.4f} ms per layer (greedy {theirs:.4f})"
        )


def budget() -> None:
    """One budget over all 58 layers against the same number in each."""
    data = counts()
    if data is None:
        return
    for index, name in enumerate(data["workloads"]):
        if str(name) not in ("prefill_in1024", "decode_in1000out1000"):
            continue
        load = data["counts"][index].astype(float)
        for gpus in (32, 64):
            for total in (58, 116, 232, 464, 928, 1856):
                seconds, plan = timed(plan_budget, load, np.ones(gpus), total)
                row = redundancy_rows(load, np.ones(gpus), totals=[total])[0]
                print(
                    f"{name} on {gpus} GPUs, {total:4} spare: imbalance {row.imbalance:.5f} "
                    f"(bound {row.bound:.5f}, uniform {row.uniform:.5f}), "
                    f"used {plan.spare_L.sum()}, {seconds:.2f} s"
                )


def activation() -> None:
    """Fewest activated experts per GPU in one layer, two tokens per expert on average."""
    for experts, gpus, slots in ((128, 8, 18), (128, 8, 20), (256, 32, 9), (256, 64, 5)):
        plain, levelled, best = [], [], 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            load = rng.lognormal(0, 1, (1, experts))
            placed = pack(
                load,
                apportion(load, np.array([gpus * slots]), gpus),
                np.full((1, gpus), slots),
                np.ones(gpus),
            )[0]
            tokens = rng.poisson(load[0] / load.sum() * experts * 2).astype(float)
            seconds, _ = timed(fewest_activated, tokens, placed, tokens=False, repeats=3)
            plain.append(seconds)
            seconds, result = timed(fewest_activated, tokens, placed, repeats=3)
            levelled.append(seconds)
            best += int(result.activated_G.max()) == -(-int((tokens > 0).sum()) // gpus)
        print(
            f"{experts} experts on {gpus} GPUs x {slots}: exact {statistics.median(plain) * 1e6:.0f} us, "
            f"with tokens levelled {statistics.median(levelled) * 1e6:.0f} us; perfectly even in {best}/40"
        )


SECTIONS = (published, shipped, certificates, spares, sizing, budget, activation)


def main(names: list[str]) -> None:
    for section in SECTIONS:
        if not names or section.__name__ in names:
            print(f"== {section.__name__}: {(section.__doc__ or '').splitlines()[0]}", flush=True)
            section()


if __name__ == "__main__":
    main(sys.argv[1:])
