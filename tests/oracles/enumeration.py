"""Answers by enumeration, for layers so small that all placements can be looked at.

Nothing here uses a solver of the package, nor its evaluation: times of a fractional split come from the
densities of GPU sets, traffic within a time from a linear programme of its own.

Axes: P placements, T scenarios, E experts, G GPUs, N nodes, S sets of GPUs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.time_model import TimeModel

TIGHT = 1e-9


def placements(capacity_G: list[int], experts: int, allowed_EG: BoolArray | None = None) -> BoolArray:
    """All placements of one layer that hold every expert, shape [P, E, G]."""
    contents = []
    for gpu, room in enumerate(capacity_G):
        fits = [e for e in range(experts) if allowed_EG is None or allowed_EG[e, gpu]]
        rows = [c for size in range(min(room, len(fits)) + 1) for c in itertools.combinations(fits, size)]
        held = np.zeros((len(rows), experts), dtype=np.bool_)
        for i, row in enumerate(rows):
            held[i, list(row)] = True
        contents.append(held)
    index = np.stack([i.ravel() for i in np.meshgrid(*(np.arange(len(c)) for c in contents), indexing="ij")])
    found = np.stack([held[i] for held, i in zip(contents, index, strict=True)], axis=2)
    return np.asarray(found[found.any(2).all(1)])


def set_times(held_PEG: BoolArray, load_E: FloatArray, speed_G: FloatArray) -> FloatArray:
    """Least largest GPU time of every placement with free shares, shape [P].

    The largest, over the sets of GPUs, of the tokens that can go nowhere else over the speed of the set.
    """
    best_P = np.zeros(len(held_PEG))
    for inside_G in _sets(held_PEG.shape[2]):
        captive_PE = ~held_PEG[:, :, ~inside_G].any(2)
        best_P = np.maximum(best_P, captive_PE @ load_E / speed_G[inside_G].sum())
    return best_P


def even_times(held_PEG: BoolArray, load_E: FloatArray, speed_G: FloatArray) -> FloatArray:
    """Largest GPU time of every placement with even shares, shape [P]."""
    piece_PE = load_E / held_PEG.sum(2)
    return np.asarray((np.einsum("peg,pe->pg", held_PEG.astype(float), piece_PE) / speed_G).max(1))


def full_counts(capacity_G: list[int], experts: int, *, copies: bool) -> IntArray:
    """All ways to fill every slot of one layer, as slots of each expert on each GPU, shape [P, E, G]."""
    draw = itertools.combinations_with_replacement if copies else itertools.combinations
    contents = [
        np.array([np.bincount(row, minlength=experts) for row in draw(range(experts), room)], dtype=np.int64)
        if room
        else np.zeros((1, experts), dtype=np.int64)
        for room in capacity_G
    ]
    index = np.stack([i.ravel() for i in np.meshgrid(*(np.arange(len(c)) for c in contents), indexing="ij")])
    found = np.stack([rows[i] for rows, i in zip(contents, index, strict=True)], axis=2)
    return np.asarray(found[(found.sum(2) > 0).all(1)])


def even_slot_times(count_PEG: IntArray, load_E: FloatArray, speed_G: FloatArray) -> FloatArray:
    """Largest GPU time of every placement whose experts are divided evenly over their slots, shape [P]."""
    piece_PE = load_E / count_PEG.sum(2)
    return np.asarray((np.einsum("peg,pe->pg", count_PEG.astype(float), piece_PE) / speed_G).max(1))


def clock_times(held_PEG: BoolArray, load_E: FloatArray, speed_G: FloatArray, time: TimeModel) -> FloatArray:
    """Least largest GPU time of every placement by a linear time model, all its replicas in use, shape [P].

    Replicas that are not in use are another placement's matter: take the least over all placements.
    """
    active_E = load_E > 0
    start_PG = time.launch + time.activation_cost * (held_PEG & active_E[:, None]).sum(1)
    best_P = np.zeros(len(held_PEG))
    for inside_G in _sets(len(speed_G)):
        captive_PE = ~held_PEG[:, :, ~inside_G].any(2)
        work_P = start_PG[:, inside_G].sum(1) + time.token_cost * (captive_PE @ load_E)
        best_P = np.maximum(best_P, work_P / speed_G[inside_G].sum())
    return best_P


def curve_time(held_PEG: BoolArray, load_E: FloatArray, speed_G: FloatArray, time: TimeModel) -> float:
    """Least largest GPU time over these placements by a measured curve that rises with both, by halving."""
    assert time.curve_tokens is not None
    total = float(load_E.sum())
    knots = np.unique(np.concatenate([[0.0, total], time.curve_tokens[time.curve_tokens < total]]))
    used_PG = (held_PEG & (load_E > 0)[:, None]).sum(1)
    rows = time.time(knots, np.arange(int(used_PG.max()) + 1)[:, None], 1.0)
    sets = _sets(len(speed_G))
    captive_PS = np.stack([~held_PEG[:, :, ~inside_G].any(2) @ load_E for inside_G in sets], axis=1)

    def fits(limit: float) -> bool:
        room = np.full((len(rows), len(speed_G)), -np.inf)
        for used, row in enumerate(rows):
            room[used] = np.interp(limit * speed_G, row, knots, left=-np.inf)
            if used == 0:
                room[used] = np.where(limit * speed_G >= row[0], 0.0, -np.inf)
        room_PG = room[used_PG, np.arange(len(speed_G))]
        good_P = (room_PG >= 0).all(1)
        for number, inside_G in enumerate(sets):
            good_P &= captive_PS[:, number] <= room_PG[:, inside_G].sum(1) * (1 + 1e-12)
        return bool(good_P.any())

    low, high = 0.0, float(rows.max() / speed_G.min())
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def even_clock(held_PEG: BoolArray, load_E: FloatArray, speed_G: FloatArray, time: TimeModel) -> FloatArray:
    """Largest GPU time of every placement with even shares, by any time model, shape [P]."""
    token_PG = np.einsum("peg,pe->pg", held_PEG.astype(float), load_E / held_PEG.sum(2))
    used_PG = (held_PEG & (load_E > 0)[:, None]).sum(1)
    return np.asarray(time.time(token_PG, used_PG, speed_G).max(1))


def _sets(gpus: int) -> list[BoolArray]:
    """All sets of GPUs but the empty one."""
    return [
        np.array([members >> g & 1 for g in range(gpus)], dtype=np.bool_) for members in range(1, 1 << gpus)
    ]


def least_within_bytes(
    load_LE: FloatArray, speed_G: FloatArray, size_L: IntArray, memory_G: IntArray, split: str
) -> float:
    """Least sum of the layers' times within the bytes of the GPUs; infinite where nothing fits."""
    experts, gpus = load_LE.shape[1], len(speed_G)
    held_PEG = placements([experts] * gpus, experts)
    count_PG = held_PEG.sum(1)
    sums: dict[tuple[int, ...], float] = {(0,) * gpus: 0.0}
    for load_E, size in zip(load_LE, size_L.tolist(), strict=True):
        time_P = (even_times if split == "equal" else set_times)(held_PEG, load_E, speed_G)
        times: dict[tuple[int, ...], float] = {}
        for row, time in zip(count_PG.tolist(), time_P.tolist(), strict=True):
            times[tuple(row)] = min(times.get(tuple(row), np.inf), time)
        further: dict[tuple[int, ...], float] = {}
        for (used, total), (held, time) in itertools.product(sums.items(), times.items()):
            key = tuple(u + size * h for u, h in zip(used, held, strict=True))
            if all(k <= m for k, m in zip(key, memory_G.tolist(), strict=True)):
                further[key] = min(further.get(key, np.inf), total + time)
        sums = further
    return min(sums.values(), default=np.inf)


def risk_of(
    value_TP: FloatArray, weight_T: FloatArray, kind: str, alpha: float, sigma: float = 1.0
) -> FloatArray:
    """The risk measure by its definition; CVaR as the least of Rockafellar and Uryasev's function."""
    if kind == "worst":
        return np.asarray(value_TP.max(0))
    if kind == "expected":
        return np.asarray((weight_T[:, None] * value_TP).sum(0))
    if kind == "sigma":
        means = [sum(w * v for w, v in zip(weight_T, column, strict=True)) for column in value_TP.T]
        squares = [
            sum(w * (v - mean) ** 2 for w, v in zip(weight_T, column, strict=True) if v > mean)
            for column, mean in zip(value_TP.T, means, strict=True)
        ]
        return np.asarray([mean + sigma * square**0.5 for mean, square in zip(means, squares, strict=True)])
    levels = [
        eta + (weight_T[:, None] * np.maximum(value_TP - eta, 0)).sum(0) / (1 - alpha) for eta in value_TP
    ]
    return np.asarray(np.min(levels, axis=0))


@dataclass(slots=True)
class Stage:
    """One priority: its name, the least value that those before it leave, and what is allowed of it."""

    name: str
    best: float
    allowed: float


def wanted_domains(problem: Problem) -> IntArray:
    """Failure domains that each expert has to reach, by the words of `Limits`, shape [L, E]."""
    limits = problem.limits
    wanted_LE: IntArray = np.full((problem.layers, problem.experts), limits.spread, dtype=np.int64)
    which = limits.spread_experts
    for x, layer in enumerate(problem.loads.layers):
        load_E = problem.loads.load_LE[x].tolist()
        ranked = sorted(range(len(load_E)), key=lambda e: (-load_E[e], e))
        for e in range(problem.experts):
            if isinstance(which, int):
                there = e in ranked[:which]
            else:
                there = which is None or (layer, e) in which or (-1, e) in which
            wanted_LE[x, e] = limits.spread if there else 1
    return wanted_LE


class Enumeration:
    """All plans of a problem of one layer, ranked by any order of priorities.

    Parameters
    ----------
    problem : Problem
        One layer, times in tokens, no limits but on replicas, pairs and domains.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.layers == 1
        self.problem = problem
        self.node_G = problem.topology.node_G
        self.nodes = int(self.node_G.max()) + 1
        self.speed_G = problem.topology.speed_G
        self.load_TE = problem.loads.load_TLE[:, 0]
        count = len(self.load_TE)
        given = problem.loads.weight_T
        self.weight_T = np.full(count, 1 / count) if given is None else given / given.sum()
        self.load_E = self.weight_T @ self.load_TE
        by_node = problem.loads.load_TLNE
        if by_node is None:
            self.source_NE = np.tile(self.load_E / self.nodes, (self.nodes, 1))
        else:
            self.source_NE = np.einsum("t,tne->ne", self.weight_T, by_node[:, 0])
        self.held_PEG = self._allowed(placements(problem.capacity_LG[0].tolist(), problem.experts))
        self.equal = problem.split == "equal"
        self.time_P = self._risk_P(self.held_PEG)

    def _risk_P(self, held_PEG: BoolArray) -> FloatArray:
        time = even_times if self.equal else set_times
        time_TP = np.array([time(held_PEG, load_E, self.speed_G) for load_E in self.load_TE])
        wish = self.problem.objective
        return risk_of(time_TP, self.weight_T, wish.risk, wish.cvar_alpha, wish.sigma)

    def risk_of_plan(self, plan: Plan) -> float:
        """Risk of a plan's largest GPU time, with the best shares in every scenario."""
        held_EG = np.zeros((self.problem.experts, len(self.speed_G)), dtype=np.bool_)
        for gpu, row in enumerate(plan.slots_LGC[0].tolist()):
            held_EG[[e for e in row if e >= 0], gpu] = True
        return float(self._risk_P(held_EG[None])[0])

    def _allowed(self, held_PEG: BoolArray) -> BoolArray:
        limits, count_PE = self.problem.limits, held_PEG.sum(2)
        good = (count_PE >= limits.min_replicas).all(1)
        if limits.max_replicas is not None:
            good &= (count_PE <= limits.max_replicas).all(1)
        if limits.max_layer_replicas is not None:
            good &= count_PE.sum(1) <= limits.max_layer_replicas
        if limits.spread > 1:
            domain_G = self.problem.topology.failure_domain_G
            reached_DPE = [held_PEG[:, :, domain_G == d].any(2) for d in set(domain_G.tolist())]
            good &= (np.sum(reached_DPE, axis=0) >= wanted_domains(self.problem)[0]).all(1)
        for _, expert, gpu in limits.pinned:
            good &= held_PEG[:, expert, gpu]
        for _, expert, gpu in limits.forbidden:
            good &= ~held_PEG[:, expert, gpu]
        return np.asarray(held_PEG[good])

    def best_time(self) -> float:
        """Least risk of the largest GPU time."""
        return float(self.time_P.min())

    def order(self, priorities: tuple[str, ...], tolerance: float) -> list[Stage]:
        """The least value of every priority, one after the other, and what a right plan may have of it."""
        alive = np.arange(len(self.held_PEG))
        limit, first_traffic = np.inf, False
        stages = []
        for place, name in enumerate(priorities):
            value = self._value(name, alive, limit, first_traffic)
            best = float(value.min())
            last = place == len(priorities) - 1
            allowed = best * (1 + (0.0 if last or name != "balance" else tolerance))
            stages.append(Stage(name, best, allowed))
            alive = alive[value <= allowed * (1 + TIGHT) + TIGHT]
            if name == "balance":
                limit = allowed
            first_traffic |= name == "traffic" and not np.isfinite(limit)
        return stages

    def _value(self, name: str, alive: np.ndarray, limit: float, first_traffic: bool) -> FloatArray:
        held = self.held_PEG[alive]
        if name == "memory":
            return np.asarray(held.sum((1, 2)), dtype=np.float64)
        if name == "moves":
            current = self.problem.current
            live_EG = np.zeros(held.shape[1:], dtype=np.bool_)
            if current is not None:
                for gpu, row in enumerate(current.slots_LGC[0].tolist()):
                    live_EG[[e for e in row if e >= 0], gpu] = True
            return np.asarray((held & ~live_EG).sum((1, 2)), dtype=np.float64)
        if name == "balance":
            if first_traffic and not self.equal:
                return self._time_near(held)
            return np.asarray(self.time_P[alive])
        if name == "survival":
            return self._loss(held)
        if self.equal:
            return self._even_traffic(held)
        if not np.isfinite(limit):
            return self._least_traffic(held)
        return np.array([self._traffic_within(one, limit) for one in held])

    def _loss(self, held_PEG: BoolArray) -> FloatArray:
        """Probability that the domains that fail hold all replicas of an expert, over all of their sets."""
        domain_G = self.problem.topology.failure_domain_G
        every = sorted({int(domain_G[g]) for g in np.flatnonzero(self.problem.capacity_LG[0])})
        rate, value_P = self.problem.objective.failure_rate, np.zeros(len(held_PEG))
        for states in itertools.product((False, True), repeat=len(every)):
            gone_G = np.isin(domain_G, [d for d, fails in zip(every, states, strict=True) if fails])
            chance = np.prod([rate if fails else 1 - rate for fails in states])
            value_P += chance * ~held_PEG[:, :, ~gone_G].any(2).all(1)
        return value_P

    def _on_node(self, held_PEG: BoolArray) -> BoolArray:
        return np.stack([held_PEG[:, :, self.node_G == n].any(2) for n in range(self.nodes)], axis=1)

    def _even_traffic(self, held_PEG: BoolArray) -> FloatArray:
        piece_PE = self.load_E / held_PEG.sum(2)
        served = np.stack(
            [held_PEG[:, :, self.node_G == n].sum(2) * piece_PE for n in range(self.nodes)], axis=1
        )
        return np.asarray(self.load_E.sum() - np.minimum(served, self.source_NE).sum((1, 2)))

    def _least_traffic(self, held_PEG: BoolArray) -> FloatArray:
        """Every node that has a replica serves all of its own tokens; the others' leave."""
        return np.asarray((~self._on_node(held_PEG) * self.source_NE).sum((1, 2)))

    def _time_near(self, held_PEG: BoolArray) -> FloatArray:
        """Least largest time where every node serves its own tokens, wherever it can."""
        on_PNE = self._on_node(held_PEG)
        count, _, gpus = held_PEG.shape
        parts = [held_PEG & (self.node_G == n) for n in range(self.nodes)]  # own tokens: on their own node
        value = np.zeros(count)
        for i in range(count):  # the loads differ from placement to placement
            own_NE = on_PNE[i] * self.source_NE
            rest_E = self.load_E - own_NE.sum(0)
            held = np.concatenate([*(part[i] for part in parts), held_PEG[i]])
            load = np.concatenate([*own_NE, rest_E])
            some = load > 0
            value[i] = set_times(held[some].reshape(1, -1, gpus), load[some], self.speed_G)[0]
        return value

    def _traffic_within(self, held_EG: BoolArray, limit: float) -> float:
        """Least traffic of one placement with times up to a limit, by a linear programme."""
        from ortools.linear_solver import pywraplp

        solver = pywraplp.Solver.CreateSolver("GLOP")
        experts, gpus = held_EG.shape
        flow = {
            (e, g): solver.NumVar(0, 1e30, "") for e in range(experts) for g in range(gpus) if held_EG[e, g]
        }
        for e in range(experts):
            solver.Add(sum(v for (x, _), v in flow.items() if x == e) == float(self.load_E[e]))
        for g in range(gpus):
            work = [v for (_, x), v in flow.items() if x == g]
            if work:
                solver.Add(sum(work) <= float(limit * self.speed_G[g] * (1 + TIGHT)))
        stays = []
        for n in range(self.nodes):
            for e in range(experts):
                near = [v for (x, g), v in flow.items() if x == e and self.node_G[g] == n]
                if near:
                    kept = solver.NumVar(0, float(self.source_NE[n, e]), "")
                    solver.Add(kept <= sum(near))
                    stays.append(kept)
        solver.Maximize(sum(stays))
        assert solver.Solve() == pywraplp.Solver.OPTIMAL
        return float(self.load_E.sum() - solver.Objective().Value())
