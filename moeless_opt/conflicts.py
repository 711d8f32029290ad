"""Which limits of a problem contradict each other: a smallest set of them that no placement satisfies.

Whether some of the limits can be kept together is a programme with whole variables: which GPU has which
expert, in every layer that is not like another one. QuickXplain asks it for few sets of limits.

References
----------
Junker, "QUICKXPLAIN: preferred explanations and relaxations for over-constrained problems", AAAI 2004.

Axes: L layers, E experts, G GPUs, D failure domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Limits, Problem
from moeless_opt.problems.text import bytes_text, html_facts
from moeless_opt.report import paragraph
from moeless_opt.solvers.core import LinearModel, NeverStop, Stop, solve_linear

__all__ = ["Contradiction", "Rule", "contradiction", "keepable", "rules"]

MOST_PAIRS = 200_000
"""Pairs of expert and GPU, in layers that differ, beyond which only counts are looked at."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a problem demands.

    Parameters
    ----------
    name : str
        The field, such as ``limits.spread`` or ``limits.pinned[3]``.
    text : str
        What it demands.
    drop : callable
        The problem without it.
    """

    name: str
    text: str
    drop: Callable[[Problem], Problem]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Contradiction:
    """Rules that cannot be kept together, none of which can be left out of the contradiction.

    Parameters
    ----------
    problem : Problem
        That has no plan.
    rules : tuple of Rule
        Without any one of them the others can be kept.
    proven : bool
        Whether all of that was decided (and not too large, or cut short).
    """

    problem: Problem
    rules: tuple[Rule, ...]
    proven: bool

    def to_dict(self) -> dict[str, Any]:
        """The contradiction as JSON."""
        return {
            "format": "moeless-contradiction",
            "version": 1,
            "proven": self.proven,
            "rules": [{"name": rule.name, "text": rule.text} for rule in self.rules],
        }

    def _facts(self) -> list[tuple[str, str]]:
        return [(rule.name, rule.text) for rule in self.rules]

    def __str__(self) -> str:
        every = f"{self.problem.experts} experts need a replica each in every layer"
        if len(self.rules) == 1:
            head = f"no plan keeps this rule ({every}):"
        else:
            count = len(self.rules)
            head = f"no plan keeps these {count} rules; without any one of them there are plans ({every}):"
        if not self.proven:
            head = f"these rules contradict each other; perhaps fewer of them do ({every}):"
        return "\n".join([paragraph(head), *(paragraph(f"{n}: {text}", "  ") for n, text in self._facts())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_facts(self._facts(), "Rules that contradict each other")


def contradiction(problem: Problem, *, stop: Stop | None = None) -> Contradiction | None:
    """A smallest set of a problem's rules that no placement satisfies; None if there is a placement.

    ``max_move_seconds`` is not looked at: the time of a schedule is no linear matter.
    """
    stop = stop or NeverStop()
    undecided: list[bool] = []
    every = rules(problem)

    def bad(kept: Sequence[Rule]) -> bool:
        left = problem
        for rule in every:
            if rule not in kept:
                left = rule.drop(left)
        answer = keepable(left, stop=stop)
        undecided.append(answer is None)
        return answer is False

    if not bad(every):
        return None
    undecided.clear()
    least = _least(bad, [], False, every)
    kept = tuple(rule for rule in every if rule in least)
    return Contradiction(problem=problem, rules=kept, proven=not any(undecided))


def _least(
    bad: Callable[[Sequence[Rule]], bool], base: list[Rule], fresh: bool, open_: list[Rule]
) -> list[Rule]:
    """QuickXplain: of the open rules, the least that are bad together with the base."""
    if fresh and bad(base):
        return []
    if len(open_) <= 1:
        return open_
    first, second = open_[: len(open_) // 2], open_[len(open_) // 2 :]
    late = _least(bad, base + first, bool(first), second)
    early = _least(bad, base + late, bool(late), first)
    return early + late


# --- the rules ---------------------------------------------------------------------------------------------

_NAMED = {
    "min_replicas": "every expert has at least {} replicas",
    "max_replicas": "no expert has more than {} replicas",
    "max_layer_replicas": "no layer has more than {} replicas",
    "max_total_replicas": "all layers together have at most {} replicas",
    "max_total_bytes": "all replicas together take at most {}",
    "spread": "every expert is in at least {} failure domains",
    "max_moves": "at most {} replicas move",
    "max_move_bytes": "at most {} move",
    "max_layer_moves": "at most {} replicas move in a layer",
}


def rules(problem: Problem) -> list[Rule]:
    """All that a problem demands and that could be dropped."""
    topology, limits = problem.topology, problem.limits
    found = []
    dead = tuple(np.flatnonzero(_dead(problem)).tolist())
    if dead and len(dead) < topology.gpus:
        text = f"no room on the lost GPUs {', '.join(map(str, dead))}"
        found.append(Rule("topology: lost GPUs", text, _revived))
    if topology.slots_G is not None:
        room = int(np.minimum(topology.slots_G, problem.experts).sum())
        text = f"the {topology.gpus - len(dead)} GPUs have {room} slots per layer"
        found.append(Rule("topology.slots", text, _roomy))
    if topology.memory_G is not None and problem.bytes_L.any():
        have, one = bytes_text(int(topology.memory_G.sum()), 5), bytes_text(int(problem.bytes_L.sum()), 5)
        text = f"the GPUs have {have} for experts, a replica in every layer takes {one}"
        found.append(Rule("topology.memory", text, _unsized))
    default = Limits()
    for name, form in _NAMED.items():
        value = getattr(limits, name)
        if value != getattr(default, name):
            text = form.format(bytes_text(value, 5) if "bytes" in name else value)
            if name == "spread" and limits.spread_experts is not None:
                which = limits.spread_experts
                those = f"{which}" if isinstance(which, int) else f"{len(which)} listed"
                text = f"of {those} experts each is in at least {value} failure domains"
            found.append(Rule(f"limits.{name}", text, _without(name, getattr(default, name))))
    for key, form in (
        ("pinned", "expert {} must be on GPU {}"),
        ("forbidden", "expert {} must not be on GPU {}"),
    ):
        for i, (layer, expert, gpu) in enumerate(getattr(limits, key)):
            where = "in every layer" if layer < 0 else f"in layer {layer}"
            text = f"{form.format(expert, gpu)} {where}"
            found.append(Rule(f"limits.{key}[{i}]", text, _unpaired(key, (layer, expert, gpu))))
    return found


def _without(name: str, value: Any) -> Callable[[Problem], Problem]:
    return lambda problem: problem.replace(limits=problem.limits.replace(**{name: value}))


def _unpaired(key: str, pair: tuple[int, int, int]) -> Callable[[Problem], Problem]:
    def drop(problem: Problem) -> Problem:
        left = tuple(one for one in getattr(problem.limits, key) if one != pair)
        return problem.replace(limits=problem.limits.replace(**{key: left}))

    return drop


def _dead(problem: Problem) -> BoolArray:
    """GPUs without slots or without memory."""
    topology = problem.topology
    dead_G = np.zeros(topology.gpus, dtype=np.bool_)
    for array_G in (topology.slots_G, topology.memory_G):
        if array_G is not None:
            dead_G |= array_G == 0
    return dead_G


def _revived(problem: Problem) -> Problem:
    """The lost GPUs are like the best of the others."""
    changes: dict[str, Any] = {}
    for key in ("slots_G", "memory_G"):
        array_G = getattr(problem.topology, key)
        if array_G is not None:
            changes[key] = np.where(_dead(problem), array_G.max(), array_G)
    return problem.replace(topology=problem.topology.replace(**changes))


def _roomy(problem: Problem) -> Problem:
    """Slots for all experts on every GPU that has any."""
    dead_G = _dead(problem)
    slots_G = np.where(dead_G & ~dead_G.all(), 0, problem.experts)
    return problem.replace(topology=problem.topology.replace(slots_G=slots_G))


def _unsized(problem: Problem) -> Problem:
    """Memory for all experts on every GPU that has any."""
    topology, dead_G = problem.topology, _dead(problem)
    slots_G = np.full(topology.gpus, problem.experts) if topology.slots_G is None else topology.slots_G
    everything = problem.experts * int(problem.bytes_L.sum())
    memory_G = np.where(dead_G & ~dead_G.all(), 0, everything)
    return problem.replace(topology=topology.replace(memory_G=memory_G, slots_G=slots_G))


# --- whether rules can be kept -----------------------------------------------------------------------------


def keepable(problem: Problem, *, stop: Stop | None = None) -> bool | None:
    """Whether some placement satisfies all rules of a problem but ``max_move_seconds``; None: undecided."""
    try:
        problem.check_feasible()
    except InfeasibleError:
        return False
    rows, count = _kinds(problem)
    if len(rows) * problem.experts * problem.topology.gpus > MOST_PAIRS:
        return None
    found = solve_linear(_model(problem, rows, count), stop=stop)
    return {"optimal": True, "feasible": True, "infeasible": False}.get(found.status)


def _kinds(problem: Problem) -> tuple[list[int], list[int]]:
    """One row of each kind of layers that the rules do not tell apart, and how many of its kind there are."""
    limits = problem.limits
    tells = bool(limits.pinned or limits.forbidden) or (problem.current is not None and limits.bounds_moves)
    tells |= problem.sizing.policy == "memory"  # layers alike may divide the bytes unlike
    keys: dict[tuple[Any, ...], list[int]] = {}
    for row in range(problem.layers):
        key: tuple[Any, ...] = (
            problem.capacity_LG[row].tobytes(),
            int(problem.bytes_L[row]),
            np.sort(problem.spread_LE[row]).tobytes(),
        )
        keys.setdefault((*key, row) if tells else key, []).append(row)
    return [rows[0] for rows in keys.values()], [len(rows) for rows in keys.values()]


def _model(problem: Problem, rows: list[int], count: list[int]) -> LinearModel:
    """Which GPU has which expert, in the layers of these rows; each stands for so many like it."""
    limits, model = problem.limits, LinearModel()
    pinned_LEG, forbidden_LEG = problem.pairs_LEG("pinned"), problem.pairs_LEG("forbidden")
    domain_G = np.unique(problem.topology.failure_domain_G, return_inverse=True)[1]
    total: list[tuple[int, float]] = []
    moved: list[tuple[int, float]] = []
    for row, weight in zip(rows, count, strict=True):
        var_EG = _pairs(model, pinned_LEG[row], forbidden_LEG[row])
        for expert_G, wanted in zip(var_EG.tolist(), problem.spread_LE[row].tolist(), strict=True):
            most = limits.max_replicas or problem.topology.gpus
            model.row([(v, 1.0) for v in expert_G], limits.min_replicas, most)
            _spread(model, expert_G, domain_G, wanted)
        for gpu, room in enumerate(problem.capacity_LG[row].tolist()):
            model.row([(v, 1.0) for v in var_EG[:, gpu].tolist()], 0, room)
        every = [(int(v), 1.0) for v in var_EG.ravel()]
        if limits.max_layer_replicas is not None:
            model.row(every, 0, limits.max_layer_replicas)
        total += [(v, float(weight)) for v, _ in every]
        if problem.current is not None:
            new_EG = ~problem.current.held_LGE[row].T
            new = [(int(v), float(weight)) for v in var_EG[new_EG]]
            if limits.max_layer_moves is not None and new:
                model.row([(v, 1.0) for v, _ in new], 0, limits.max_layer_moves)
            moved += new
    _sums(model, problem, rows, total, moved)
    return model


def _pairs(model: LinearModel, pinned_EG: BoolArray, forbidden_EG: BoolArray) -> Any:
    low_EG, high_EG = pinned_EG.astype(float), 1.0 - forbidden_EG
    low_EG = np.minimum(low_EG, 1.0)
    var_EG = np.empty(low_EG.shape, dtype=np.int64)
    for (expert, gpu), low in np.ndenumerate(low_EG):
        var_EG[expert, gpu] = model.variable(0.0, 1.0, whole=True)
        if low > 0 or high_EG[expert, gpu] < 1:
            model.row([(int(var_EG[expert, gpu]), 1.0)], float(low), float(high_EG[expert, gpu]))
    return var_EG


def _spread(model: LinearModel, expert_G: list[int], domain_G: Any, wanted: int) -> None:
    """The expert is in so many failure domains."""
    if wanted <= 1:
        return
    there = []
    for domain in range(int(domain_G.max()) + 1):
        reached = model.variable(0.0, 1.0, whole=True)
        inside = [(v, 1.0) for v, d in zip(expert_G, domain_G.tolist(), strict=True) if d == domain]
        model.row([(reached, -1.0), *inside], 0.0, float(len(inside)))
        there.append((reached, 1.0))
    model.row(there, wanted, len(there))


def _sums(
    model: LinearModel,
    problem: Problem,
    rows: list[int],
    total: list[tuple[int, float]],
    moved: list[tuple[int, float]],
) -> None:
    """Limits over all layers together."""
    limits, size_L = problem.limits, problem.bytes_L[rows]
    gpus, experts = problem.topology.gpus, problem.experts
    each = experts * gpus

    def sized(terms: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(v, weight * float(size_of[v])) for v, weight in terms]

    size_of: dict[int, int] = {}
    for number, size in enumerate(size_L.tolist()):
        for v, _ in total[number * each : (number + 1) * each]:
            size_of[v] = size
    if limits.max_total_replicas is not None:
        model.row(total, 0, limits.max_total_replicas)
    if limits.max_total_bytes is not None and size_L.any():
        model.row(sized(total), 0, limits.max_total_bytes)
    if limits.max_moves is not None and moved:
        model.row(moved, 0, limits.max_moves)
    if limits.max_move_bytes is not None and moved and size_L.any():
        model.row(sized(moved), 0, limits.max_move_bytes)
    memory_G = problem.topology.memory_G
    if problem.sizing.policy == "memory" and memory_G is not None:
        for gpu in range(gpus):
            model.row(sized(total[gpu::gpus]), 0, int(memory_G[gpu]))
