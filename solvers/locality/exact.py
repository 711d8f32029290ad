"""Balance, moves, traffic, groups and hops of small models to proven optimality: one mixed-integer programme.

::

    x[l,e,g] in {0, 1}     g holds e;  sum over e <= slots, from the least to the most replicas of e
    y[l,e,g]               its share;  y <= x and sum over g = 1, or y = x / r where the split is even
    sum over e of w y <= T[l] s[g]
    q[l,s,e,g] >= 0        tokens of s;  sum over g = those of s,  sum over s = w y;  traffic = cost . q
    b[l,k,n] in {0, 1}     n is the home of group k;  outside = tokens of the group that n does not serve
    h[l,s,e,g] >= 0        tokens that come from s;  sum over g = sum over e' of flow y[l-1,e',s],
                           sum over s = flow into e . y[l,e,g];  hops = cost . h
    u[l,e,B] >= 0          in place of q and h where the costs are a tree: what leaves group B of a level,
                           at least what comes from its GPUs beyond what they serve;  cost of the level . u

The priorities are minimised one after the other, each held to its least value (balance to its tolerance,
layer by layer). Layers that nothing ties together are programmes of their own.

Axes: S sources that pay alike, K groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.plan import cost_levels, source_tokens
from moeless_opt.problems.spec import Fill, Problem
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear
from moeless_opt.solvers.locality.costs import Costs

__all__ = ["Proven", "prove", "size_of_model"]

_SLACK = 1e-8
_GAP = 1e-9
Row = list[tuple[int, float]]


@dataclass(slots=True)
class Proven:
    """What was proven of some layers.

    Parameters
    ----------
    rows : array of int
        Which layers.
    held_XEG, share_XEG : arrays, shape [layers, E, G]
        The placement and its shares.
    time_X : array, shape [layers]
        Proven least tokens over speed of each layer.
    least : dict
        Proven least sum over the layers of each later priority, given those before it.
    """

    rows: IntArray
    held_XEG: BoolArray
    share_XEG: FloatArray
    time_X: FloatArray
    least: dict[str, float] = field(default_factory=dict)


def size_of_model(problem: Problem, *, tied: bool) -> int:
    """Binary variables of the largest programme, more or less."""
    pairs = problem.experts * problem.topology.gpus
    if problem.split == "equal":
        pairs *= problem.topology.gpus
    if problem.groups is not None:
        pairs += problem.groups.count * problem.topology.nodes
    if problem.split == "fractional":
        pairs *= problem.loads.shape[0]  # of shares that are free in each scenario
    return pairs * (problem.layers if tied else 1)


def prove(
    problem: Problem,
    order: tuple[str, ...],
    costs: Costs,
    rows: IntArray,
    *,
    stop: Stop,
    nodes: int | None = None,
    known_X: FloatArray | None = None,
) -> Proven | None:
    """Minimise the priorities one after the other; None where time or a limit leaves no proof.

    Parameters
    ----------
    order : tuple of str
        Balance first.
    rows : array of int
        Layers that are planned together: one, or all of them where hops tie them.
    nodes : int, optional
        Nodes of each programme's search at most.
    known_X : array, shape [layers], optional
        Tokens over speed of a plan that keeps all rules: the search need not look beyond.
    """
    programme = _Programme(problem, order, costs, rows)
    tolerance = problem.objective.balance_tolerance if len(order) > 1 else 0.0
    model = programme.model
    if known_X is not None:
        for top, value in zip(programme.tops, (known_X / programme.unit_X).tolist(), strict=True):
            model.high[top] = value * (1 + _SLACK) + _SLACK
    found: Proven | None = None
    least: dict[str, float] = {}
    for name in order:
        answer = solve_linear(programme.minimising(name), stop=stop, gap=_GAP, nodes=nodes)
        if answer.status != "optimal" or answer.value_V is None:
            return None
        value_V = answer.value_V
        if name == "balance":
            time_X = value_V[programme.tops]
            for top, value in zip(programme.tops, time_X.tolist(), strict=True):
                model.high[top] = value * (1 + tolerance) + _SLACK
        else:
            value = float(value_V[programme.term[name]])
            least[name] = max(value, 0.0) * (1.0 if name == "moves" else programme.scale[name])
            model.high[programme.term[name]] = value + _SLACK
        held, share = programme.read(value_V)
        found = Proven(rows=rows, held_XEG=held, share_XEG=share, time_X=time_X * programme.unit_X)
    assert found is not None
    found.least = least
    return found


class _Programme:
    """The rows; tokens of a layer are scaled so that its mean time is 1."""

    def __init__(self, problem: Problem, order: tuple[str, ...], costs: Costs, rows: IntArray) -> None:
        self.problem, self.costs, self.rows, self.model = problem, costs, rows, LinearModel()
        self.levels = cost_levels(problem)
        """The costs as a tree, where they are one."""
        speed = float(problem.topology.speed_G.sum())
        self.unit_X = np.array([float(problem.load_LE[x].sum()) / speed or 1.0 for x in rows])
        self.place: list[dict[tuple[int, int], Row]] = []
        self.share: list[dict[tuple[int, int], Row]] = []
        self.tops: list[int] = []
        self.term: dict[str, int] = {}
        self.scale: dict[str, float] = {}
        for i, x in enumerate(rows.tolist()):
            self._layer(i, x)
        self._limits()
        if problem.groups is not None and (problem.groups.max_outside < 1 or "groups" in order):
            self._groups("groups" in order)
        if "moves" in order:
            self._moves()
        if "traffic" in order:
            self._traffic()
        if "hops" in order:
            self._hops()

    def minimising(self, name: str) -> LinearModel:
        """The programme with one priority as its cost."""
        self.model.cost = [0.0] * len(self.model.names)
        for v in self.tops if name == "balance" else [self.term[name]]:
            self.model.cost[v] = 1.0
        return self.model

    def read(self, value_V: FloatArray) -> tuple[BoolArray, FloatArray]:
        """Placement and shares, both [layers, E, G]."""
        shape = (len(self.rows), self.problem.experts, self.problem.topology.gpus)
        held, share = np.zeros(shape, dtype=np.bool_), np.zeros(shape)
        for i in range(len(self.rows)):
            for (e, g), row in self.place[i].items():
                held[i, e, g] = sum(c * value_V[v] for v, c in row) > 0.5
                if held[i, e, g]:
                    share[i, e, g] = max(sum(c * value_V[v] for v, c in self.share[i][e, g]), 0.0)
        return held, share / share.sum(2, keepdims=True)

    def _layer(self, i: int, x: int) -> None:
        problem, model = self.problem, self.model
        limits, topology = problem.limits, problem.topology
        load_E = problem.load_LE[x] / self.unit_X[i]
        banned_EG, pinned_EG = problem.pairs_LEG("forbidden")[x], problem.pairs_LEG("pinned")[x]
        place: dict[tuple[int, int], Row] = {}
        share: dict[tuple[int, int], Row] = {}
        usable = np.flatnonzero(problem.capacity_LG[x] > 0)
        most = len(usable) if limits.max_replicas is None else min(limits.max_replicas, len(usable))
        least = max(limits.min_replicas, 1)
        for e in range(problem.experts):
            gpus = [int(g) for g in usable if not banned_EG[e, g]]
            if problem.split == "equal":
                self._even(e, gpus, least, most, place, share)
            else:
                hosts: Row = []
                served: Row = []
                for g in gpus:
                    v = model.variable(0, 1, whole=True)
                    y = model.variable(0, 1)
                    place[e, g], share[e, g] = [(v, 1.0)], [(y, 1.0)]
                    model.row([(y, 1.0), (v, -1.0)], -np.inf, 0.0)
                    hosts.append((v, 1.0))
                    served.append((y, 1.0))
                model.row(hosts, least, most)
                model.row(served, 1.0, 1.0)
            for g in np.flatnonzero(pinned_EG[e]).tolist():
                model.row(place.get((e, g), []), 1.0, 1.0)
        top = model.variable(0, np.inf)
        everything: Row = []
        for g in usable.tolist():
            room = float(min(problem.capacity_LG[x, g], problem.experts))
            held = [part for e in range(problem.experts) for part in place.get((e, g), [])]
            model.row(held, room if problem.fill == Fill.DISTINCT else 0.0, room)
            everything += held
            work = [
                (v, c * float(load_E[e]))
                for e in range(problem.experts)
                for v, c in share.get((e, g), [])
                if load_E[e] > 0
            ]
            model.row([*work, (top, -float(topology.speed_G[g]))], -np.inf, 0.0)
        if problem.loads.shape[0] > 1:
            self._scenarios(i, x, place, share, top)
        if limits.max_layer_replicas is not None:
            model.row(everything, 0.0, float(limits.max_layer_replicas))
        self.place.append(place)
        self.share.append(share)
        self.tops.append(top)

    def _scenarios(
        self,
        i: int,
        x: int,
        place: dict[tuple[int, int], Row],
        share: dict[tuple[int, int], Row],
        top: int,
    ) -> None:
        """Times of each scenario, with shares of its own where they are free, and the risk over them."""
        problem, model, loads, speed_G = (
            self.problem,
            self.model,
            self.problem.loads,
            self.problem.topology.speed_G,
        )
        count = loads.shape[0]
        weight_T = np.full(count, 1 / count) if loads.weight_T is None else loads.weight_T
        tops = [model.variable(0, np.inf) for _ in range(count)]
        for t, time in enumerate(tops):
            load_E = loads.load_TLE[t, x] / self.unit_X[i]
            own = share
            if problem.split == "fractional":
                own = {pair: [(model.variable(0, 1), 1.0)] for pair in place}
                for pair, parts in own.items():
                    model.row([*parts, *((v, -c) for v, c in place[pair])], -np.inf, 0.0)
                for e in range(problem.experts):
                    model.row([part for (a, _), parts in own.items() if a == e for part in parts], 1.0, 1.0)
            for g in range(problem.topology.gpus):
                work = [
                    (v, c * float(load_E[a])) for (a, h), parts in own.items() if h == g for v, c in parts
                ]
                model.row([*work, (time, -float(speed_G[g]))], -np.inf, 0.0)
        pairs = list(zip(tops, weight_T.tolist(), strict=True))
        if problem.objective.risk == "worst":
            for time in tops:
                model.row([(time, 1.0), (top, -1.0)], -np.inf, 0.0)
        elif problem.objective.risk == "expected":
            model.row([*pairs, (top, -1.0)], -np.inf, 0.0)
        else:  # cvar: a threshold, and what is above it
            tail, threshold = 1.0 - problem.objective.cvar_alpha, model.variable(0, np.inf)
            above = [model.variable(0, np.inf) for _ in tops]
            for time, over in zip(tops, above, strict=True):
                model.row([(time, 1.0), (threshold, -1.0), (over, -1.0)], -np.inf, 0.0)
            weighed = [(over, weight / tail) for over, (_, weight) in zip(above, pairs, strict=True)]
            model.row([(threshold, 1.0), *weighed, (top, -1.0)], -np.inf, 0.0)

    def _even(
        self,
        e: int,
        gpus: list[int],
        least: int,
        most: int,
        place: dict[tuple[int, int], Row],
        share: dict[tuple[int, int], Row],
    ) -> None:
        model, chosen = self.model, Row()
        for g in gpus:
            place[e, g], share[e, g] = [], []
        for r in range(least, min(most, len(gpus)) + 1):
            n = model.variable(0, 1, whole=True)
            chosen.append((n, 1.0))
            copies: Row = [(n, -float(r))]
            for g in gpus:
                z = model.variable(0, 1, whole=True)
                model.row([(z, 1.0), (n, -1.0)], -np.inf, 0.0)
                copies.append((z, 1.0))
                place[e, g].append((z, 1.0))
                share[e, g].append((z, 1.0 / r))
            model.row(copies, 0.0, 0.0)
        model.row(chosen, 1.0, 1.0)

    def _count(self, name: str, parts: Row, scale: float) -> None:
        """A priority as the sum of some parts."""
        value = self.model.variable(0, np.inf)
        self.term[name], self.scale[name] = value, scale
        self.model.row([*parts, (value, -1.0)], -np.inf, 0.0)

    def _limits(self) -> None:
        """What may move and be held in all, and the failure domains that experts must reach."""
        problem, model, limits = self.problem, self.model, self.problem.limits
        new: Row = []
        sent: Row = []
        held: Row = []
        for place, x in zip(self.place, self.rows.tolist(), strict=True):
            size = float(problem.bytes_L[x])
            row = self._new(place, x) if limits.bounds_moves and problem.current is not None else []
            if limits.max_layer_moves is not None:
                model.row(row, 0.0, float(limits.max_layer_moves))
            new += row
            sent += [(v, c * size) for v, c in row if size > 0]
            held += [(v, c * size) for parts in place.values() for v, c in parts]
            if limits.spread > 1:
                self._spread(place)
        if limits.max_moves is not None:
            model.row(new, 0.0, float(limits.max_moves))
        if limits.max_move_bytes is not None:
            self._bytes(sent, limits.max_move_bytes)
        if limits.max_total_replicas is not None:
            every = [part for place in self.place for parts in place.values() for part in parts]
            model.row(every, 0.0, float(limits.max_total_replicas))
        if limits.max_total_bytes is not None:
            self._bytes(held, limits.max_total_bytes)

    def _bytes(self, row: Row, most: int) -> None:
        """At most so many bytes, counted in replicas of the largest size."""
        unit = float(self.problem.bytes_L.max())
        if unit > 0:
            self.model.row([(v, c / unit) for v, c in row], 0.0, most / unit)

    def _spread(self, place: dict[tuple[int, int], Row]) -> None:
        model, domain_G = self.model, self.problem.topology.failure_domain_G
        for e in range(self.problem.experts):
            reached: Row = []
            for domain in np.unique(domain_G).tolist():
                inside = [
                    part
                    for (a, g), parts in place.items()
                    if a == e and domain_G[g] == domain
                    for part in parts
                ]
                if inside:
                    d = model.variable(0, 1, whole=True)
                    model.row([*inside, (d, -1.0)], 0.0, np.inf)
                    reached.append((d, 1.0))
            model.row(reached, float(self.problem.limits.spread), np.inf)

    def _new(self, place: dict[tuple[int, int], Row], x: int) -> Row:
        """Replicas of a layer that are not live."""
        live = self.problem.current
        assert live is not None
        held = {(int(e), g) for g, row in enumerate(live.slots_LGC[x]) for e in row if e >= 0}
        return [part for pair, row in place.items() if pair not in held for part in row]

    def _moves(self) -> None:
        parts: Row = []
        for place, x in zip(self.place, self.rows.tolist(), strict=True):
            parts += self._new(place, x)
        self._count("moves", parts, 1.0)

    def _carried(self, tokens_SE: FloatArray, served: dict[tuple[int, int], Row], unit: float) -> Row:
        """Flows from sources whose tokens are known to what GPUs serve; what they cost."""
        model, paid = self.model, Row()
        price_SG = self.costs.price_SG
        for e in range(self.problem.experts):
            sources = np.flatnonzero(tokens_SE[:, e] > 0).tolist()
            gpus = [g for (a, g) in served if a == e]
            into: dict[int, Row] = {g: [] for g in gpus}
            for s in sources:
                out: Row = []
                for g in gpus:
                    q = model.variable(0, np.inf)
                    out.append((q, 1.0))
                    into[g].append((q, 1.0))
                    if price_SG[s, g] > 0:
                        paid.append((q, float(price_SG[s, g])))
                total = float(tokens_SE[s, e] / unit)
                model.row(out, total, total)
            for g in gpus:
                sums = float(tokens_SE[:, e].sum() / unit)
                model.row([*into[g], *((v, -c * sums) for v, c in served[e, g])], 0.0, 0.0)
        return paid

    def _traffic(self) -> None:
        every_LGE, unit, parts = source_tokens(self.problem), float(self.unit_X.max()), Row()
        merged_LSE = self.costs.merge(every_LGE)
        for place, share, x in zip(self.place, self.share, self.rows.tolist(), strict=True):
            if self.levels is None:
                parts += self._carried(merged_LSE[x], share, unit)
                continue
            for e in range(self.problem.experts):
                tokens_G = every_LGE[x, :, e] / unit
                come = [Row() for _ in tokens_G]
                if tokens_G.any():
                    parts += self._leaving(e, come, tokens_G, share, float(tokens_G.sum()), place)
        self._count("traffic", parts, unit)

    def _leaving(
        self,
        e: int,
        come: list[Row],
        tokens_G: FloatArray,
        share: dict[tuple[int, int], Row],
        total: float,
        place: dict[tuple[int, int], Row] | None = None,
    ) -> Row:
        """What an expert's tokens pay on a tree: at every level a group keeps as many as it serves.

        And none where it holds no replica, which says more of fractions of replicas.

        Parameters
        ----------
        come, tokens_G : list of rows, array
            The tokens that come from each GPU: what depends on variables, and what does not.
        total : float
            How many there are.
        """
        model, paid = self.model, Row()
        assert self.levels is not None
        for level in self.levels:
            groups = np.unique(level.group_G).tolist()
            for group in groups if len(groups) > 1 else []:
                inside = np.flatnonzero(level.group_G == group).tolist()
                served = [(v, c * total) for g in inside for v, c in share.get((e, g), [])]
                sent = [(v, -c) for g in inside for v, c in come[g]]
                tokens = float(tokens_G[inside].sum())
                if sent or tokens > 0:
                    leave = model.variable(0, np.inf)
                    model.row([(leave, 1.0), *served, *sent], tokens, np.inf)
                    if place is not None:
                        held = [(v, c * tokens) for g in inside for v, c in place.get((e, g), [])]
                        model.row([(leave, 1.0), *held], tokens, np.inf)
                    paid.append((leave, level.cost))
        return paid

    def _hops(self) -> None:
        flow_LEE = self.problem.loads.flow_LEE
        assert flow_LEE is not None
        paid, unit = Row(), float(flow_LEE.sum()) / max(len(flow_LEE), 1) or 1.0
        none_G = np.zeros(self.problem.topology.gpus)
        for i in range(1, len(self.rows)):
            flow_EE = flow_LEE[i - 1] / unit
            for after in range(self.problem.experts):
                total = float(flow_EE[:, after].sum())
                if total <= 0:
                    continue
                come = [Row() for _ in none_G]
                for (e, g), row in self.share[i - 1].items():
                    if flow_EE[e, after] > 0:
                        come[g] += [(v, c * float(flow_EE[e, after])) for v, c in row]
                if self.levels is None:
                    paid += self._following(after, come, self.share[i], total)
                else:
                    paid += self._leaving(after, come, none_G, self.share[i], total)
        self._count("hops", paid, unit)

    def _following(self, after: int, come: list[Row], share: dict[tuple[int, int], Row], total: float) -> Row:
        """What an expert's tokens pay by any costs, from where they were served before."""
        model, paid, classes = self.model, Row(), self.costs.class_G
        gpus = [g for (a, g) in share if a == after]
        into: dict[int, Row] = {g: [] for g in gpus}
        for s in range(len(self.costs.price_SG)):
            out: Row = []
            for g in gpus:
                h = model.variable(0, np.inf)
                out.append((h, 1.0))
                into[g].append((h, 1.0))
                if self.costs.price_SG[s, g] > 0:
                    paid.append((h, float(self.costs.price_SG[s, g])))
            sent = [(v, -c) for g in np.flatnonzero(classes == s).tolist() for v, c in come[g]]
            model.row([*out, *sent], 0.0, 0.0)
        for g in gpus:
            model.row([*into[g], *((v, -c * total) for v, c in share[after, g])], 0.0, 0.0)
        return paid

    def _groups(self, counted: bool) -> None:
        problem, model, groups = self.problem, self.model, self.problem.groups
        assert groups is not None
        node_G, scale, everything = problem.topology.node_G, float(self.unit_X.max()), Row()
        for i, x in enumerate(self.rows.tolist()):
            load_E, outside = problem.load_LE[x] / self.unit_X[i], Row()
            for k in range(groups.count):
                inside = np.flatnonzero(groups.group_E == k).tolist()
                whole, away, homes = float(load_E[inside].sum()), model.variable(0, np.inf), Row()
                for n in range(problem.topology.nodes):
                    b = model.variable(0, 1, whole=True)
                    homes.append((b, 1.0))
                    here = [
                        (v, c * float(load_E[e]))
                        for e in inside
                        for g in np.flatnonzero(node_G == n).tolist()
                        for v, c in self.share[i].get((e, g), [])
                        if load_E[e] > 0
                    ]
                    model.row([(away, 1.0), *here, (b, -whole)], 0.0, np.inf)
                    if self.problem.loads.shape[0] > 1 and groups.max_outside <= 0:
                        # Shares of a scenario would serve with what is elsewhere.
                        for e, g in itertools.product(inside, np.flatnonzero(node_G == n).tolist()):
                            for v, c in self.place[i].get((e, g), []):
                                model.row([(v, c), (b, -1.0)], -np.inf, 0.0)
                model.row(homes, 1.0, 1.0)
                outside.append((away, 1.0))
            if groups.max_outside < 1:
                model.row(outside, 0.0, groups.max_outside * float(load_E.sum()))
            everything += [(v, c * float(self.unit_X[i]) / scale) for v, c in outside]
        if counted:
            self._count("groups", everything, scale)
