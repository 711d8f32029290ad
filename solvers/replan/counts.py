"""A strong lower bound on the moves of one layer: the programme that forgets who goes where.

The programme of `min_moves` has a whole variable for every pair of expert and GPU, 8,192 at 256 experts on
32 GPUs, and its relaxation mixes many half moves. Most of these differ only in the partner. Here a move is
told by its two ends alone: so many new replicas of each expert, so many arrivals on each GPU, as many of the
one as of the other. What leaves the live replicas goes into one pool, and the arrivals take from it:

    min   sum_e z[e]
    s.t.  sum_g y[e,g] + p[e] = w[e],   y[e,g] <= w[e] (1 - d[e,g]),   p[e] <= w[e] z[e]   for every expert
          z[e] >= 1 - live[e] + sum_g d[e,g]                               (it keeps at least one replica)
          sum_e y[e,g] + u[g] <= T speed[g],   u[g] <= max(w) n[g]                          for every GPU
          n[g] - sum_e d[e,g] <= capacity[g] - live[g]
          sum_e p[e] = sum_g u[g],   sum_e z[e] = sum_g n[g]
          z, n whole, d binary: live replicas that are dropped; y over live pairs; p, u, y >= 0

Every plan gives such counts, so no plan moves less. That leaves about 600 whole variables, and HiGHS takes a
tenth of a second for most layers. The counts are often those of a plan, too: with `min_moves`' programme over
the experts that they or a known plan send and the GPUs that these enter, one is found in tenths of a second.

Where the counts are not those of a plan, experts are told apart by weight (`classes`): arrivals, pools and
their balances are then written once for each class, and an arrival brings at most the heaviest of its class.
With a class for every expert it would be the programme of pairs again; five, each down to 0.6 of the one
before, take two or three times as long and close a third of what one leaves open.

This is an aggregation of the design variables of fixed-charge transport (every pair's fixed cost is 1).

References
----------
Balinski (1961), "Fixed-cost transportation problems"; Rogers, Plante, Wong and Evans (1991), "Aggregation and
disaggregation techniques and methodology in optimization".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import IntArray
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear

__all__ = ["MoveCounts", "fewest_counts"]

_WIDER = (
    1e-6  # relative: rooms are this much larger than wanted, so that no engine's tolerance cuts a plan off
)

_RATIO = 0.6  # heaviest load of a class of weight to that of the next


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCounts:
    """What the counts tell.

    Attributes
    ----------
    bound : int
        No plan moves fewer; where there is none at all, `fewer` as it was asked.
    infeasible : bool
        Proven: there are no such counts, so there is no such plan.
    sent_E, entered_G : array of int, or None
        New replicas of each expert and arrivals on each GPU, of the best counts found.
    """

    bound: int
    infeasible: bool = False
    sent_E: IntArray | None = None
    entered_G: IntArray | None = None


def fewest_counts(
    load_E: Sequence[float],
    live: Sequence[Sequence[int]],
    capacity_G: Sequence[int],
    room_G: Sequence[float],
    *,
    least: int,
    below: int | None,
    sets: Sequence[frozenset[int]] = (),
    classes: int = 1,
    engine: str = "highs",
    stop: Stop,
) -> MoveCounts:
    """Solve the programme of counts for one layer.

    Parameters
    ----------
    load_E : sequence of float
        Tokens, in units of the mean GPU load.
    live : sequence of sequence of int
        Experts that each GPU holds now; an expert may lack a replica.
    capacity_G, room_G : sequences
        Slots of each GPU, and the tokens that it may serve.
    least : int
        Moves that are known to be needed.
    below : int, optional
        Only plans with fewer moves than this are asked for.
    sets : sequence of frozenset of int
        Sets of GPUs; where the experts that live inside one alone overload it, a knapsack cover is added.
    classes : int
        Classes of weight that experts are told apart by.
    engine : str
        See `core.linear.solve_linear`.
    stop : Stop
        When to end with what is proven.

    Returns
    -------
    MoveCounts
    """
    model = _Counts.of(load_E, live, capacity_G, [room * (1.0 + _WIDER) for room in room_G], classes)
    model.ask(least, below)
    model.cover(sets)
    answer = solve_linear(model.programme, engine, stop=stop)
    bound = least
    if answer.status == "infeasible":
        return MoveCounts(bound=least if below is None else below, infeasible=True)
    if math.isfinite(answer.bound):
        bound = max(bound, math.ceil(answer.bound - 1e-6 * max(1.0, answer.bound)))
    if answer.value_V is None:
        return MoveCounts(bound=bound)
    whole_V = np.rint(answer.value_V).astype(np.int64)
    return MoveCounts(bound=bound, sent_E=whole_V[model.sent], entered_G=whole_V[model.entered].sum(1))


@dataclass(slots=True)
class _Counts:
    """The programme and what its rows are made of; `entered` by GPU and class of weight."""

    programme: LinearModel
    sent: list[int]
    entered: list[list[int]]
    load: Sequence[float]
    room: Sequence[float]
    home: list[list[int]]

    @classmethod
    def of(
        cls,
        load: Sequence[float],
        live: Sequence[Sequence[int]],
        capacity: Sequence[int],
        room: Sequence[float],
        classes: int,
    ) -> _Counts:
        gpus, experts = len(live), len(load)
        home: list[list[int]] = [[] for _ in load]
        for gpu, row in enumerate(live):
            for expert in row:
                home[expert].append(gpu)
        members = _by_weight(load, classes)
        model = LinearModel()
        sent = [model.variable(0.0, float(gpus - len(where)), whole=True, cost=1.0) for where in home]
        entered = [
            [model.variable(0.0, float(min(slots, experts)), whole=True) for _ in members]
            for slots in capacity
        ]
        out = [model.variable(0.0, tokens) for tokens in load]
        into = [[model.variable(0.0, tokens) for _ in members] for tokens in room]
        drop: dict[tuple[int, int], int] = {}
        serve: dict[tuple[int, int], int] = {}
        for expert, where in enumerate(home):
            tokens = load[expert]
            for gpu in where:
                drop[expert, gpu] = model.variable(0.0, 1.0, whole=True)
                serve[expert, gpu] = model.variable(0.0, tokens)
                model.row([(serve[expert, gpu], 1.0), (drop[expert, gpu], tokens)], -math.inf, tokens)
            model.row([(serve[expert, gpu], 1.0) for gpu in where] + [(out[expert], 1.0)], tokens, tokens)
            model.row([(out[expert], 1.0), (sent[expert], -tokens)], -math.inf, 0.0)
            kept = [(sent[expert], 1.0)] + [(drop[expert, gpu], -1.0) for gpu in where]
            model.row(kept, 1.0 - len(where), math.inf)
        for gpu, row in enumerate(live):
            served = [(serve[expert, gpu], 1.0) for expert in row]
            model.row(served + [(one, 1.0) for one in into[gpu]], -math.inf, room[gpu])
            for one, count, of_class in zip(into[gpu], entered[gpu], members, strict=True):
                most = min(load[of_class[0]], room[gpu])
                model.row([(one, 1.0), (count, -most)], -math.inf, 0.0)
            freed = [(drop[expert, gpu], -1.0) for expert in row]
            slots = float(capacity[gpu] - len(row))
            model.row([(count, 1.0) for count in entered[gpu]] + freed, -math.inf, slots)
        for at, of_class in enumerate(members):
            for ends, starts in ((into, out), (entered, sent)):
                arrivals = [(row[at], -1.0) for row in ends]
                model.row([(starts[expert], 1.0) for expert in of_class] + arrivals, 0.0, 0.0)
        return cls(model, sent, entered, load, room, home)

    def ask(self, least: int, below: int | None) -> None:
        """At least so many moves, and fewer than so many."""
        most = math.inf if below is None else float(below - 1)
        self.programme.row([(one, 1.0) for one in self.sent], float(least), most)

    def cover(self, sets: Sequence[frozenset[int]]) -> None:
        """What lives inside a set alone and is too much for it must send replicas: a knapsack cover."""
        for inside in sorted(set(sets), key=sorted):
            captive = [expert for expert, where in enumerate(self.home) if where and inside.issuperset(where)]
            excess = sum(self.load[expert] for expert in captive) - sum(self.room[gpu] for gpu in inside)
            if excess > 10 * _WIDER:
                terms = [(self.sent[expert], min(self.load[expert] / excess, 1.0)) for expert in captive]
                self.programme.row(terms, 1.0 - _WIDER, math.inf)


def _by_weight(load: Sequence[float], classes: int) -> list[list[int]]:
    """Experts in classes, each heaviest first: down to `_RATIO` of the heaviest, of that, and so on."""
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
    members: list[list[int]] = [[] for _ in range(classes)]
    for expert in order:
        at = 0
        while at < classes - 1 and load[expert] <= load[order[0]] * _RATIO ** (at + 1):
            at += 1
        members[at].append(expert)
    return [one for one in members if one]
