"""Small random problems under limits, and the truth about them by enumeration.

`draw` makes a problem of one or two layers with any limits on replicas, pairs, domains and moves; `judge`
looks at all its placements and says what a plan is worth beside them. Nothing of the solvers is used.

Axes: P placements, T scenarios, E experts, G GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.arrays import BoolArray, FloatArray
from tests.oracles.enumeration import Enumeration

__all__ = ["Verdict", "draw", "judge", "least_by_layer"]

MOST = 20_000
"""Placements of a layer, before any limit, up to which a problem is drawn."""
NEAR = 1e-6


def draw(rng: np.random.Generator) -> mo.Problem:
    """A problem whose limits may bind or not, or leave no plan at all."""
    while True:
        layers = 2 if rng.random() < 0.2 else 1
        experts, gpus = int(rng.integers(1, 6)), int(rng.integers(1, 5))
        alike = rng.random() < 0.5
        slots_G = np.full(gpus, rng.integers(1, 4)) if alike else rng.integers(1, 4, gpus)
        slots_G = np.minimum(slots_G, experts)
        rows = [sum(_choose(experts, k) for k in range(int(c) + 1)) for c in slots_G]
        if slots_G.sum() >= experts and np.prod(rows) <= MOST:
            break
    speed_G = np.ones(gpus) if alike else rng.choice([0.5, 1.0, 2.0], gpus)
    topology = mo.Topology(
        node_G=np.zeros(gpus, dtype=np.int64),
        speed_G=speed_G,
        slots_G=slots_G,
        domain_G=rng.integers(0, 3, gpus) if rng.random() < 0.7 else None,
    )
    scenarios = 2 if rng.random() < 0.15 else 1
    load_TLE = _loads(rng, (scenarios, layers, experts))
    current = _live(rng, layers, experts, slots_G) if scenarios == 1 and rng.random() < 0.3 else None
    return mo.Problem(
        loads=mo.Loads(load_TLE=load_TLE),
        topology=topology,
        split="equal" if rng.random() < 0.5 else "fractional",
        expert_bytes_L=rng.integers(1, 4, layers) * 10,
        current=current,
        objective=mo.Objective(risk=str(rng.choice(["expected", "worst", "cvar"]))),
        limits=_limits(rng, layers, experts, slots_G, current is not None),
    )


def _choose(n: int, k: int) -> int:
    return int(np.prod([(n - i) / (i + 1) for i in range(k)]) + 0.5)


def _loads(rng: np.random.Generator, shape: tuple[int, int, int]) -> FloatArray:
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(1, 20, shape).astype(float)
    load = rng.lognormal(0, (0.5, 1.0, 1.8)[kind - 1], shape) * 1000
    if rng.random() < 0.2:
        load *= rng.random(shape) < 0.7
    load[..., 0] += 1
    return np.asarray(load)


def _live(rng: np.random.Generator, layers: int, experts: int, slots_G: np.ndarray) -> mo.Placement:
    slots_LGC = np.full((layers, len(slots_G), int(slots_G.max())), -1, dtype=np.int32)
    for layer in range(layers):
        free = slots_G.copy()
        held: list[list[int]] = [[] for _ in slots_G]
        for expert in rng.permutation(experts).tolist():
            gpu = int(rng.choice(np.flatnonzero(free > 0)))
            held[gpu].append(expert)
            free[gpu] -= 1
        for gpu, row in enumerate(held):
            for expert in rng.permutation(experts).tolist():
                if expert not in row and free[gpu] and rng.random() < 0.8:
                    row.append(expert)
                    free[gpu] -= 1
            slots_LGC[layer, gpu, : len(row)] = row
    return mo.Placement(slots_LGC=slots_LGC, experts=experts)


def _limits(
    rng: np.random.Generator, layers: int, experts: int, slots_G: np.ndarray, live: bool
) -> mo.Limits:
    gpus, slots = len(slots_G), int(slots_G.sum())
    kinds = ["max", "min", "layer", "total", "bytes", "spread", "pinned", "forbidden"]
    kinds += ["moves", "layer moves"] if live else []
    some = {str(k) for k in rng.choice(kinds, int(rng.integers(1, 4)), replace=False)}
    pairs = [(x, e, g) for x in (-1, *range(layers)) for e in range(experts) for g in range(gpus)]
    drawn = [pairs[i] for i in rng.permutation(len(pairs))[:6].tolist()]
    pins, bans = int(rng.integers(1, 3)), int(rng.integers(1, 5))
    most = int(rng.integers(experts, slots + 1))
    return mo.Limits(
        min_replicas=2 if "min" in some else 1,
        max_replicas=int(rng.integers(1 + ("min" in some), max(gpus, 2) + 1)) if "max" in some else None,
        max_layer_replicas=most if "layer" in some else None,
        max_total_replicas=int(rng.integers(experts * layers, slots * layers + 1))
        if "total" in some
        else None,
        max_total_bytes=int(rng.integers(10 * experts, 30 * slots)) * layers if "bytes" in some else None,
        spread=2 if "spread" in some else 1,
        spread_experts=(None, 1, 2, ((-1, 0),))[most % 4] if "spread" in some else None,
        pinned=tuple(drawn[:pins]) if "pinned" in some else (),
        forbidden=tuple(drawn[2 : 2 + bans]) if "forbidden" in some else (),
        max_moves=int(rng.integers(0, 2 * experts)) if "moves" in some else None,
        max_layer_moves=int(rng.integers(0, experts + 1)) if "layer moves" in some else None,
    )


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a plan is worth.

    Attributes
    ----------
    value, best : float
        Its time over the layers, in all, and the least of any plan within the limits.
    wanted : float
        The least, or what of it the tolerance allows where moves matter.
    moves, fewest : int
        Replicas that it moves; the fewest of any plan that is as balanced as the tolerance asks for, or as
        this one where that is worse.
    false : list of str
        Claims of its certificate that are not true.
    """

    value: float
    best: float
    wanted: float
    moves: int
    fewest: int
    false: list[str]

    @property
    def excess(self) -> float:
        """Share by which its time is above what is wanted; 0 if it is not."""
        if self.value <= self.wanted * (1 + NEAR) + 1e-12:
            return 0.0
        return self.value / self.wanted - 1 if self.wanted > 0 else np.inf


class _Layer:
    """All placements of one layer: what they take, hold and move."""

    def __init__(self, problem: mo.Problem, row: int) -> None:
        number = problem.loads.layers[row]
        limits = problem.limits
        current = problem.current
        alone = problem.replace(
            loads=problem.loads.select([number]),
            topology=problem.topology.replace(slots_G=problem.capacity_LG[row], memory_G=None),
            expert_bytes_L=problem.bytes_L[row : row + 1],
            model=None,
            current=None if current is None else current.replace(slots_LGC=current.slots_LGC[row : row + 1]),
            limits=limits.replace(
                pinned=tuple((number, e, g) for x, e, g in limits.pinned if x in (-1, number)),
                forbidden=tuple((number, e, g) for x, e, g in limits.forbidden if x in (-1, number)),
            ),
        )
        self.oracle = Enumeration(alone)
        held_PEG = self.oracle.held_PEG
        time_P = self.oracle.time_P
        self.live_EG = np.zeros(held_PEG.shape[1:], dtype=np.bool_)
        if current is not None:
            for gpu, slots in enumerate(current.slots_LGC[row].tolist()):
                self.live_EG[[e for e in slots if e >= 0], gpu] = True
        count_P = held_PEG.sum((1, 2))
        moves_P = (held_PEG & ~self.live_EG).sum((1, 2))
        if limits.max_layer_moves is not None:
            few = moves_P <= limits.max_layer_moves
            time_P, count_P, moves_P = time_P[few], count_P[few], moves_P[few]
        self.time_P, self.count_P, self.moves_P = time_P, count_P, moves_P

    def value(self, slots_GC: np.ndarray) -> tuple[float, int]:
        """Time and moves of one placement."""
        held_EG: BoolArray = np.zeros_like(self.live_EG)
        for gpu, slots in enumerate(slots_GC.tolist()):
            held_EG[[e for e in slots if e >= 0], gpu] = True
        at = int((self.oracle.held_PEG == held_EG).all((1, 2)).argmax())
        assert (self.oracle.held_PEG[at] == held_EG).all(), "breaks a limit"
        return float(self.oracle.time_P[at]), int((held_EG & ~self.live_EG).sum())


def _least(
    problem: mo.Problem, layers: list[_Layer], within_L: list[float] | None = None
) -> tuple[float, int]:
    """Least time of all layers together within the limits that tie them, and fewest moves within times."""
    limits, bytes_L = problem.limits, problem.bytes_L.tolist()
    caps = (limits.max_total_replicas, limits.max_total_bytes, limits.max_moves)
    # (replicas, bytes, moves) -> least time, layer after layer.
    states: dict[tuple[int, int, int], float] = {(0, 0, 0): 0.0}
    for layer, (one, size) in enumerate(zip(layers, bytes_L, strict=True)):
        rows: dict[tuple[int, int], float] = {}
        for time, count, moves in zip(
            one.time_P.tolist(), one.count_P.tolist(), one.moves_P.tolist(), strict=True
        ):
            if within_L is not None and time > within_L[layer] * (1 + NEAR):
                continue
            if time < rows.get((count, moves), np.inf):
                rows[count, moves] = time
        following: dict[tuple[int, int, int], float] = {}
        for (replicas, held, moved), spent in states.items():
            for (count, moves), time in rows.items():
                key = (replicas + count, held + count * size, moved + moves)
                if any(cap is not None and part > cap for part, cap in zip(key, caps, strict=True)):
                    continue
                if spent + time < following.get(key, np.inf):
                    following[key] = spent + time
        states = following
    return min(states.values(), default=np.inf), min((key[2] for key in states), default=-1)


def judge(problem: mo.Problem) -> Verdict | None:
    """Judge the plan of the default solver; None where there is none and it says so.

    Raises
    ------
    AssertionError
        If it refuses what has a plan, or its plan breaks a limit.
    """
    try:
        layers = [_Layer(problem, row) for row in range(problem.layers)]
    except mo.ProblemError:  # pinned in all layers and forbidden in one
        layers, best = [], np.inf
    else:
        best, _ = _least(problem, layers)
    try:
        plan = mo.solve(problem).plan
    except mo.InfeasibleError:
        assert not np.isfinite(best), "refused, and there is a plan"
        return None
    assert plan is not None
    assert np.isfinite(best), "no plan keeps the limits"
    found = [one.value(slots_GC) for one, slots_GC in zip(layers, plan.slots_LGC, strict=True)]
    value, moves = sum(time for time, _ in found), sum(count for _, count in found)
    live = problem.current is not None and problem.limits.max_moves is None
    tolerance = problem.objective.balance_tolerance if problem.current is not None else 0.0
    fewest = moves
    if live:
        tied = problem.limits.max_total_replicas is not None or problem.limits.max_total_bytes is not None
        within_L = [
            max(time, 0.0 if tied else float(one.time_P.min()) * (1 + tolerance))
            for one, (time, _) in zip(layers, found, strict=True)
        ]
        fewest = _least(problem, layers, within_L)[1]
    false = _false_claims(problem, plan, layers, found)
    return Verdict(
        value=value, best=best, wanted=best * (1 + tolerance), moves=moves, fewest=fewest, false=false
    )


def least_by_layer(problem: mo.Problem) -> FloatArray | None:
    """Least time of each layer, the others only keeping the limits, shape [L]; None if nothing keeps them."""
    try:
        layers = [_Layer(problem, row) for row in range(problem.layers)]
    except mo.ProblemError:  # pinned in all layers and forbidden in one
        return None
    least_L = np.array([_alone(problem, layers, row) for row in range(len(layers))])
    return least_L if np.isfinite(least_L).all() else None


def _false_claims(
    problem: mo.Problem, plan: mo.Plan, layers: list[_Layer], found: list[tuple[float, int]]
) -> list[str]:
    false = []
    certificate = plan.certificate
    for row in range(len(layers)):
        if problem.loads.shape[0] > 1:
            break  # the certificate is about the expected loads
        bound, least = float(certificate.lower_bound_L[row]), _alone(problem, layers, row)
        if bound > least * (1 + NEAR):
            false.append(f"layer {row}: {certificate.bound_L[row]} {bound:.6g} is above {least:.6g}")
    said = re.search(r"as balanced moves at least (\d+)", certificate.proof)
    if said:
        within_L = [time for time, _ in found]
        fewest = _least(problem, layers, within_L)[1]
        if int(said[1]) > fewest:
            false.append(f"{certificate.proof}, but {fewest} do")
    return false


def _alone(problem: mo.Problem, layers: list[_Layer], row: int) -> float:
    """Least time of one layer where the others only keep to the limits that tie all."""
    zero = [one if i == row else _Still(one) for i, one in enumerate(layers)]
    return _least(problem, zero)[0]  # type: ignore[arg-type]


class _Still:
    """A layer whose time does not matter."""

    def __init__(self, layer: _Layer) -> None:
        self.time_P = np.zeros(len(layer.time_P))
        self.count_P, self.moves_P = layer.count_P, layer.moves_P
