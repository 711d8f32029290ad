"""Placement under every limit that a problem can state: counts, pins, bans, failure domains, live replicas.

The fast constructions know slots and speeds only. Here replicas are counted within the limits (greedy
apportionment), the replicas that must exist are placed by augmenting paths, so that no pin, ban or full GPU
leaves an expert out while a placement exists, further ones go where they balance best (warm GPUs first where
moves matter), and swaps that respect all limits even out the rest. Token shares, where they are free, are
then solved exactly.

References
----------
Augmenting paths for assignment: Kuhn (1955). The placing order is longest processing time first: Graham
(1969).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec.placement import held_LGE
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.core.finish import Built
from moeless_opt.solvers.core.options import NoOptions
from moeless_opt.solvers.core.solver import Heuristic, Task
from moeless_opt.solvers.pack.counts import apportion
from moeless_opt.solvers.shares.best import best_shares
from moeless_opt.solvers.sizing.minimal import fewest_for_cv

__all__ = ["Constrained", "count_replicas", "place_within"]

SWAPS = 400
"""Swaps tried per layer at most."""


def count_replicas(problem: Problem) -> IntArray:
    """Replicas of every expert within the limits, shape [L, E]."""
    limits, load_LE = problem.limits, problem.load_LE
    layers, experts = load_LE.shape
    allowed_LEG = _allowed(problem)
    reach_LE = allowed_LEG.sum(2)
    pins_LE = problem.pairs_LEG("pinned").sum(2)
    least_LE = np.maximum(max(limits.min_replicas, limits.spread), pins_LE)
    most_LE = reach_LE if limits.max_replicas is None else np.minimum(reach_LE, limits.max_replicas)
    short = np.argwhere(least_LE > most_LE)
    if short.size:
        layer, expert = (int(i) for i in short[0])
        raise InfeasibleError(
            f"limits: expert {expert} of layer {problem.loads.layers[layer]} needs "
            f"{least_LE[layer, expert]} replicas, "
            f"{most_LE[layer, expert]} are possible (pins, bans, max_replicas, GPUs with slots)"
        )
    room_L = np.minimum(problem.capacity_LG, experts).sum(1)
    if limits.max_layer_replicas is not None:
        room_L = np.minimum(room_L, limits.max_layer_replicas)
    if problem.sizing.policy == "cv":
        cv = fewest_for_cv(
            load_LE, problem.sizing.cv, room_L, max_replicas=limits.max_replicas, ddof=problem.sizing.ddof
        )
        wanted_LE = np.clip(cv.replicas_LE, least_LE, most_LE)
        room_L = np.minimum(room_L, wanted_LE.sum(1))
        counts = np.asarray(np.minimum(wanted_LE, most_LE), dtype=np.int64)
    else:
        counts = np.asarray(apportion(load_LE, room_L, most_LE, least=least_LE), dtype=np.int64)
    budgets = []
    if limits.max_total_replicas is not None:
        budgets.append((limits.max_total_replicas, np.ones(layers, dtype=np.int64), "max_total_replicas"))
    if limits.max_total_bytes is not None:
        budgets.append((limits.max_total_bytes, problem.bytes_L, "max_total_bytes"))
    for budget, cost_L, name in budgets:
        _trim(counts, least_LE, load_LE, cost_L, budget, name)
    return counts


def _trim(
    counts: IntArray, least_LE: IntArray, load_LE: FloatArray, cost_L: IntArray, budget: int, name: str
) -> None:
    """Take replicas back, in place, where the pieces grow least beside their layer's mean."""
    spent = int(counts.sum(1) @ cost_L)
    if spent <= budget:
        return
    mean_L = np.maximum(load_LE.sum(1, keepdims=True), 1e-300)
    while spent > budget:
        piece = np.where(counts > least_LE, load_LE / mean_L / np.maximum(counts - 1, 1), np.inf)
        layer, expert = np.unravel_index(int(piece.argmin()), piece.shape)
        if not np.isfinite(piece[layer, expert]):
            floor = int(least_LE.sum(1) @ cost_L)
            raise InfeasibleError(
                f"limits.{name}: {budget} is {floor - budget} too few; at least {floor} are needed"
            )
        counts[layer, expert] -= 1
        spent -= int(cost_L[layer])


def _allowed(problem: Problem) -> BoolArray:
    """Pairs that no limit rules out, shape [L, E, G]."""
    return ~problem.pairs_LEG("forbidden") & (problem.capacity_LG > 0)[:, None, :]


@dataclass(slots=True)
class _Layer:
    """One layer while it is being filled."""

    piece: list[float]
    allowed: BoolArray
    capacity: list[int]
    speed: list[float]
    domain: list[int]
    spread: int
    content: list[set[int]]
    fixed: list[set[int]]
    load: list[float]

    def can_take(self, expert: int, gpu: int) -> bool:
        return bool(self.allowed[expert, gpu]) and expert not in self.content[gpu]

    def put(self, expert: int, gpu: int) -> None:
        self.content[gpu].add(expert)
        self.load[gpu] += self.piece[expert]

    def take(self, expert: int, gpu: int) -> None:
        self.content[gpu].remove(expert)
        self.load[gpu] -= self.piece[expert]

    def domains(self, expert: int) -> set[int]:
        return {self.domain[g] for g, held in enumerate(self.content) if expert in held}

    def choose(self, expert: int, warm: set[int], needed: bool) -> int | None:
        """The GPU for one more replica: with room, in a new domain if one is missing, warm, least loaded."""
        free = [
            g
            for g in range(len(self.content))
            if len(self.content[g]) < self.capacity[g] and self.can_take(expert, g)
        ]
        if needed and self.spread > 1:
            reached = self.domains(expert)
            if len(reached) < self.spread:
                free = [g for g in free if self.domain[g] not in reached]
        if not free:
            return None
        return min(
            free, key=lambda g: (g not in warm, (self.load[g] + self.piece[expert]) / self.speed[g], g)
        )

    def force(self, expert: int) -> bool:
        """Place a replica that must exist by moving others along a shortest augmenting path."""
        reached = self.domains(expert)
        new_domain = self.spread > 1 and len(reached) < self.spread
        starts = [
            g
            for g in range(len(self.content))
            if self.can_take(expert, g)
            and not (new_domain and self.domain[g] in reached)
            and self.capacity[g] > 0
        ]
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(starts)
        queue = deque(starts)
        while queue:
            gpu = queue.popleft()
            if len(self.content[gpu]) < self.capacity[gpu]:
                self._shift(expert, gpu, came)
                return True
            for other in sorted(self.content[gpu] - self.fixed[gpu]):
                for to in range(len(self.content)):
                    if to not in came and self.can_take(other, to) and self._keeps_spread(other, gpu, to):
                        came[to] = (gpu, other)
                        queue.append(to)
        return False

    def _shift(self, expert: int, gpu: int, came: dict[int, tuple[int, int] | None]) -> None:
        while (step := came[gpu]) is not None:
            back, moved = step
            self.take(moved, back)
            self.put(moved, gpu)
            gpu = back
        self.put(expert, gpu)

    def _keeps_spread(self, expert: int, gpu: int, to: int) -> bool:
        if self.spread <= 1 or self.domain[gpu] == self.domain[to]:
            return True
        held = [g for g, content in enumerate(self.content) if expert in content and g != gpu]
        return len({self.domain[g] for g in held} | {self.domain[to]}) >= min(self.spread, len(held) + 1)

    def even_out(self) -> None:
        """Swap replicas of the busiest GPU while the largest time falls."""
        gpus = range(len(self.content))
        for _ in range(SWAPS):
            time = [self.load[g] / self.speed[g] for g in gpus]
            worst = max(gpus, key=lambda g: (time[g], -g))
            best: tuple[float, int, int, int] | None = None
            for a in sorted(self.content[worst] - self.fixed[worst]):
                for g in gpus:
                    if g == worst or not self.can_take(a, g) or not self._keeps_spread(a, worst, g):
                        continue
                    others = [b for b in sorted(self.content[g] - self.fixed[g]) if self.can_take(b, worst)]
                    room = [-1] if len(self.content[g]) < self.capacity[g] else []
                    for b in [*room, *others]:
                        shift = self.piece[a] - (self.piece[b] if b >= 0 else 0.0)
                        if shift <= 0 or (b >= 0 and not self._keeps_spread(b, g, worst)):
                            continue
                        after = max(time[worst] - shift / self.speed[worst], time[g] + shift / self.speed[g])
                        if after < time[worst] * (1 - 1e-9) and (best is None or after < best[0]):
                            best = (after, a, g, b)
            if best is None:
                return
            _, a, g, b = best
            self.take(a, worst)
            if b >= 0:
                self.take(b, g)
                self.put(b, worst)
            self.put(a, g)


def place_within(problem: Problem, counts_LE: IntArray) -> SlotArray:
    """Place replicas within all limits, shape [L, G, C].

    Parameters
    ----------
    problem : Problem
        Limits, GPUs, live placement.
    counts_LE : array of int, shape [L, E]
        Replicas wanted; those beyond the least number are left out where they do not fit.

    Raises
    ------
    InfeasibleError
        If a replica that must exist finds no place.
    """
    layers, experts = counts_LE.shape
    topology, limits = problem.topology, problem.limits
    pinned_LEG, allowed_LEG = problem.pairs_LEG("pinned"), _allowed(problem)
    least_LE = np.maximum(max(limits.min_replicas, limits.spread), pinned_LEG.sum(2))
    warm_LGE = np.zeros((layers, topology.gpus, experts), dtype=np.bool_)
    if problem.current is not None and "moves" in problem.objective.priorities:
        warm_LGE = held_LGE(problem.current.slots_LGC, experts)
    width = int(problem.capacity_LG.max())
    slots_LGC = np.full((layers, topology.gpus, width), -1, dtype=np.int32)
    for layer in range(layers):
        board = _Layer(
            piece=(problem.load_LE[layer] / counts_LE[layer]).tolist(),
            allowed=allowed_LEG[layer],
            capacity=problem.capacity_LG[layer].tolist(),
            speed=topology.speed_G.tolist(),
            domain=topology.failure_domain_G.tolist(),
            spread=limits.spread,
            content=[set() for _ in range(topology.gpus)],
            fixed=[set() for _ in range(topology.gpus)],
            load=[0.0] * topology.gpus,
        )
        _fill(
            board,
            problem.loads.layers[layer],
            counts_LE[layer],
            least_LE[layer],
            pinned_LEG[layer],
            warm_LGE[layer],
        )
        for gpu, content in enumerate(board.content):
            kept = [] if problem.current is None else problem.current.slots_LGC[layer, gpu].tolist()
            slots_LGC[layer, gpu, : len(content)] = _in_order(content, kept)
    return slots_LGC


def _fill(
    board: _Layer,
    layer: int,
    count_E: IntArray,
    least_E: IntArray,
    pinned_EG: BoolArray,
    warm_GE: BoolArray,
) -> None:
    for expert, gpu in np.argwhere(pinned_EG):
        if len(board.content[gpu]) >= board.capacity[gpu]:
            raise InfeasibleError(
                f"limits.pinned: layer {layer}, GPU {gpu} has {board.capacity[gpu]} slots, "
                "more experts are pinned to it"
            )
        board.put(int(expert), int(gpu))
        board.fixed[gpu].add(int(expert))
    placed_E = pinned_EG.sum(1)
    warm = [set(np.flatnonzero(warm_GE[:, e]).tolist()) for e in range(len(count_E))]
    heavy_first = sorted(range(len(count_E)), key=lambda e: (-board.piece[e], e))
    for needed in (True, False):
        goal_E = least_E if needed else count_E
        for expert in heavy_first:
            while placed_E[expert] < goal_E[expert]:
                gpu = board.choose(expert, warm[expert], needed)
                if gpu is not None:
                    board.put(expert, gpu)
                elif not needed:
                    break
                elif not board.force(expert):
                    raise InfeasibleError(
                        f"limits: layer {layer}: no GPU was found for replica {placed_E[expert] + 1} of "
                        f"{goal_E[expert]} of expert {expert} (slots, pins, bans, failure domains)"
                    )
                placed_E[expert] += 1
    # Pieces of experts that got fewer replicas than counted are larger now.
    held = [sum(e in content for content in board.content) for e in range(len(count_E))]
    total = [piece * int(count) for piece, count in zip(board.piece, count_E, strict=True)]
    board.piece = [one / max(number, 1) for one, number in zip(total, held, strict=True)]
    board.load = [sum(board.piece[e] for e in sorted(content)) for content in board.content]
    if not any(warm):
        board.even_out()


def _in_order(content: set[int], kept: list[int]) -> list[int]:
    """Experts that stay keep their order, new ones follow."""
    stay = [expert for expert in kept if expert in content]
    return stay + sorted(content.difference(stay))


class Constrained(Heuristic):
    """Every limit honoured: replica limits, pins, bans, failure domains, the cv sizing."""

    name = "constrained"
    summary = "placement under replica limits, pins, bans, failure domains and cv sizing"

    def build(self, task: Task[NoOptions]) -> Built:
        """Count, place, even out, share."""
        problem = task.problem
        slots_LGC = place_within(problem, count_replicas(problem))
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))
