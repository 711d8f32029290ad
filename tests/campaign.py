"""The brute-force campaign: small problems of every kind, drawn by seed, and their plans beside the optimum.

A kind is a function from a random generator to a problem, and the least value that any plan of it has. What
is judged: the plan's value against the optimum, the bound against the optimum (one above is a failure), and
refusals. The whole campaign is ``python tests/benchmarks/campaign.py``; a small one runs with the tests.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.plan import violations
from tests.oracles.enumeration import (
    Enumeration,
    clock_times,
    curve_time,
    even_clock,
    even_times,
    least_within_bytes,
    placements,
    set_times,
)

ABOVE = 1e-6
"""Relative excess from which a plan counts as above the optimum."""

_PLACEMENTS = 20_000


@dataclass(frozen=True, slots=True)
class Case:
    """A problem of one kind.

    Parameters
    ----------
    problem : Problem
    best : float
        Least value of any plan; infinite where there is none.
    value : callable, optional
        The plan's value; by default the sum of its layers' times.
    bound : callable, optional
        The bound on the value that the plan claims; by default the sum of its layers' bounds.
    """

    problem: mo.Problem
    best: float
    value: Callable[[mo.Plan], float] = lambda plan: float(plan.certificate.value_L.sum())
    bound: Callable[[mo.Plan], float] = lambda plan: float(plan.certificate.lower_bound_L.sum())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case.

    Parameters
    ----------
    excess : float
        Value over the optimum, less 1; infinite where a plan was refused that there is.
    loose : float
        The optimum over the certificate's bound, less 1.
    wrong : str
        What must not be: a rule broken, a bound above the optimum, a plan below it, an error; else empty.
    """

    excess: float
    loose: float = 0.0
    wrong: str = ""


def judge(kind: str, seed: int, solver: str = "auto") -> Verdict:
    """Draw a case, solve it, and compare."""
    case = KINDS[kind](np.random.default_rng([zlib.crc32(kind.encode()), seed]))
    problem, best = case.problem, case.best
    try:
        plan = mo.solve(problem, solver).plan
    except mo.InfeasibleError:
        return Verdict(np.inf if np.isfinite(best) else 0.0)
    except Exception as error:  # whatever it is, it is wrong
        return Verdict(np.inf, wrong=f"{type(error).__name__}: {error}")
    assert plan is not None
    if broken := violations(problem, plan):
        return Verdict(np.inf, wrong=broken[0])
    value, bound = case.value(plan), case.bound(plan)
    wrong = ""
    if value < best * (1 - ABOVE):
        wrong = f"a plan of {value:.9g} below the optimum {best:.9g}"
    elif bound > best * (1 + ABOVE):
        wrong = f"a bound of {bound:.9g} above the optimum {best:.9g}"
    return Verdict(
        max(value / best - 1, 0.0) if best > 0 else 0.0, best / bound - 1 if bound > 0 else 0.0, wrong
    )


def some_loads(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Loads of one of several makes, never all 0: skewed, even, in whole numbers, with ties and zeros."""
    make = int(rng.integers(5))
    if make == 0:
        load = rng.lognormal(0, rng.choice([0.5, 1.0, 2.0]), shape) * 100
    elif make == 1:
        load = rng.permuted(
            1000.0 / np.arange(1, shape[-1] + 1) ** rng.choice([0.8, 1.2]) * np.ones(shape), axis=-1
        )
    elif make == 2:
        load = rng.integers(0, 12, shape).astype(float)
    elif make == 3:
        load = rng.integers(1, 1000, shape).astype(float)
    else:
        load = np.where(rng.random(shape) < 0.3, 0.0, rng.exponential(50, shape))
    load[..., 0] = np.maximum(load[..., 0], 1.0)
    return np.asarray(load)


def some_gpus(rng: np.random.Generator, *, most: int = 4) -> tuple[list[int], list[float]]:
    """Slots and speeds of a few GPUs, alike or not."""
    gpus = int(rng.integers(1, most + 1))
    slots = [int(rng.integers(1, 4))] * gpus if rng.random() < 0.5 else rng.integers(1, 5, gpus).tolist()
    speed = [1.0] * gpus if rng.random() < 0.5 else rng.choice([0.25, 0.5, 1.0, 2.0, 4.0], gpus).tolist()
    return slots, speed


def ways(slots: list[int], experts: int) -> int:
    """Contents of the GPUs, multiplied out."""
    counts = [
        sum(1 for k in range(min(c, experts) + 1) for _ in itertools.combinations(range(experts), k))
        for c in slots
    ]
    return int(np.prod(counts))


def some_shape(rng: np.random.Generator) -> tuple[int, list[int], list[float], str]:
    """Experts, slots and speeds that can be enumerated, and a split."""
    while True:
        slots, speed = some_gpus(rng)
        experts = int(rng.integers(1, 8))
        if sum(min(c, experts) for c in slots) >= experts and ways(slots, experts) <= _PLACEMENTS:
            return experts, slots, speed, str(rng.choice(["equal", "fractional"]))


def some_clock(rng: np.random.Generator, most: int) -> mo.TimeModel:
    """A linear model with a cost per activated expert, or a curve that rises with both."""
    if rng.random() < 0.6:
        return mo.TimeModel(
            token_cost=float(rng.choice([0.5, 1.0, 2.0])),
            activation_cost=float(rng.choice([1.0, 10.0, 40.0, 200.0])),
            launch=float(rng.choice([0.0, 5.0])),
        )
    tokens = np.array([0.0, 8, 64, 512]) if rng.random() < 0.5 else np.array([1.0, 16, 128, 1024])
    used = np.array([0.0, 1, 2, 4]) if most > 1 else np.array([0.0, 1])
    rise_KJ = rng.uniform(0.1, 10, (tokens.size, used.size)) * np.array([1, 1, 5, 30])[:, None]
    return mo.TimeModel(
        curve_tokens=tokens, curve_activated=used, curve_time=rise_KJ.cumsum(0).cumsum(1), unit="s"
    )


def plain(rng: np.random.Generator) -> Case:
    """One layer, time is tokens."""
    experts, slots, speed, split = some_shape(rng)
    load_LE = some_loads(rng, 1, experts)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE[None]),
        topology=mo.uniform(1, len(slots), slots=slots, speed=speed),
        split=split,
    )
    return Case(problem, Enumeration(problem).best_time())


def timed(rng: np.random.Generator) -> Case:
    """One layer, time by activated experts and tokens."""
    experts, slots, speed, split = some_shape(rng)
    load_LE, time = some_loads(rng, 1, experts), some_clock(rng, max(slots))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE[None]),
        topology=mo.uniform(1, len(slots), slots=slots, speed=speed),
        split=split,
        time=time,
    )
    held_PEG, speed_G = placements(slots, experts), np.array(speed)
    if split == "equal":
        best = float(even_clock(held_PEG, load_LE[0], speed_G, time).min())
    elif time.has_curve:
        best = curve_time(held_PEG, load_LE[0], speed_G, time)
    else:
        best = float(clock_times(held_PEG, load_LE[0], speed_G, time).min())
    return Case(problem, best)


def scenarios(rng: np.random.Generator) -> Case:
    """One layer under several loads, time by a risk measure."""
    experts, slots, speed, split = some_shape(rng)
    count = int(rng.integers(2, 4))
    problem = mo.Problem(
        loads=mo.Loads(
            load_TLE=some_loads(rng, count, 1, experts), weight_T=rng.integers(1, 4, count).astype(float)
        ),
        topology=mo.uniform(1, len(slots), slots=slots, speed=speed),
        split=split,
        objective=mo.Objective(risk=str(rng.choice(["expected", "worst", "cvar"])), cvar_alpha=0.5),
    )
    known = Enumeration(problem)
    # The shares follow the traffic: a plan's value is its placement's, each scenario with its own shares.
    return Case(problem, known.best_time(), known.risk_of_plan, lambda plan: 0.0)


def makespan(rng: np.random.Generator) -> Case:
    """The fewest replicas for an imbalance that can be reached, or just not."""
    experts, slots, speed, split = some_shape(rng)
    load_LE = some_loads(rng, 1, experts)
    topology = mo.uniform(1, len(slots), slots=slots, speed=speed)
    held_PEG, speed_G = placements(slots, experts), np.array(speed)
    time_P = (even_times if split == "equal" else set_times)(held_PEG, load_LE[0], speed_G)
    mean = float(load_LE.sum() / speed_G.sum())
    least = float(time_P.min()) / mean
    wanted = max(least * float(rng.choice([0.98, 1.0, 1.0, 1.02, 1.1, 1.3])), 1.0)
    in_time_P = time_P <= wanted * mean * (1 + 1e-9)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE[None]),
        topology=topology,
        split=split,
        sizing=mo.Sizing(policy="makespan", imbalance=wanted),
    )
    best = float(held_PEG.sum((1, 2))[in_time_P].min()) if in_time_P.any() else np.inf
    return Case(
        problem,
        best,
        lambda plan: float((plan.slots_LGC >= 0).sum()),
        lambda plan: float(re.findall(r"no plan has fewer than (\d+)", plan.certificate.proof)[0]),
    )


def memory(rng: np.random.Generator) -> Case:
    """Bytes that one to three layers share."""
    gpus = int(rng.integers(2, 4))
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 5 if gpus < 3 else 4))
    load_LE, size_L = some_loads(rng, layers, experts), rng.integers(1, 4, layers)
    need = experts * int(size_L.sum())
    if rng.random() < 0.5:
        memory_G = np.full(gpus, int(need * rng.uniform(1, 1.7) / gpus) + 1)
    else:
        memory_G = rng.multinomial(int(need * rng.uniform(1, 1.8)), np.ones(gpus) / gpus) + 1
    speed_G = np.ones(gpus) if rng.random() < 0.6 else rng.choice([0.5, 1.0, 2.0], gpus)
    split = str(rng.choice(["equal", "fractional"]))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE[None]),
        topology=mo.uniform(1, gpus, memory=memory_G.tolist(), speed=speed_G.tolist()),
        split=split,
        sizing=mo.Sizing(policy="memory"),
        expert_bytes_L=size_L,
    )
    return Case(problem, least_within_bytes(load_LE, speed_G, size_L, memory_G, split))


KINDS: dict[str, Callable[[np.random.Generator], Case]] = {
    "makespan": makespan,
    "memory": memory,
    "plain": plain,
    "scenarios": scenarios,
    "timed": timed,
}
