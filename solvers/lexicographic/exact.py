"""One small layer, one priority after the other, each solved to optimality by a mixed-integer programme.

``x[e,g] = 1`` puts expert e on GPU g. With free shares f[t,e,g] of its tokens are served there in scenario t;
with even ones ``z[e,r,g] = 1`` if it has r replicas and one is on g, each with ``1 / r`` of the tokens. Every
priority is one variable that its rows bound from below: the first is minimised, then held to what is allowed
of it while the next is minimised, and so on.

    balance >= risk over t of T[t],   speed[g] T[t] >= sum_e f[t,e,g]
    moves    = sum of x[e,g] that are not live,   memory = sum of all x[e,g]
    traffic  = sum_e w[e] - sum_{n,e} k[n,e],   k[n,e] <= tokens of n for e,  k[n,e] <= sum_{g on n} f[e,g]
    survival = sum_F p[F] lost[F],   lost[F] >= 1 - sum of x[e,g] over g that failures F leave

Axes: T scenarios, E experts, G GPUs, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear
from moeless_opt.solvers.lexicographic.survival import Failures

__all__ = ["Exact", "OrderedLayer", "ordered_layer", "size_of", "solve_in_order"]

_SLACK = 1e-8
"""By which a figure may exceed what is allowed of it: the programmes' own tolerance."""

_GAP = 1e-9
_TOKENS = ("balance", "traffic", "survival")
_SELDOM = 1e-7  # failures so much less likely than the likeliest are left out

Row = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedLayer:
    """One layer of a problem, with all its limits; loads are scaled so that the mean GPU time is 1."""

    load_TE: FloatArray
    weight_T: FloatArray
    source_NE: FloatArray
    capacity_G: IntArray
    speed_G: FloatArray
    node_G: IntArray
    domain_G: IntArray
    live_EG: BoolArray
    allowed_EG: BoolArray
    pinned_EG: BoolArray
    equal: bool
    risk: str
    alpha: float
    least_E: IntArray
    most: int
    most_in_all: float
    most_moves: float
    spread_E: IntArray
    fixed: float
    tokens: float
    scale: float
    kept_FG: BoolArray
    weight_F: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """What the programmes found.

    Parameters
    ----------
    held_EG : array of bool, shape [E, G], or None
        The best placement; None if there is none that keeps the limits, or none was found in time.
    limit : float
        Largest risk of the time that the order allows (infinite where balance is no priority).
    best : dict
        Proven least value of every priority, given those before it, as far as the time went.
    proven : bool
        Whether all of them are.
    infeasible : bool
        Whether no placement keeps the limits.
    """

    held_EG: BoolArray | None = None
    limit: float = np.inf
    best: dict[str, float] = field(default_factory=dict)
    proven: bool = False
    infeasible: bool = False


def ordered_layer(
    problem: Problem, layer: int, source_NE: FloatArray, failures: Failures | None
) -> OrderedLayer:
    """One layer of a problem; `layer` is a row."""
    loads, topology, limits, time = problem.loads, problem.topology, problem.limits, problem.time
    load_TE = loads.load_TLE[:, layer]
    count = len(load_TE)
    weight_T = np.full(count, 1 / count) if loads.weight_T is None else loads.weight_T
    live_EG = np.zeros((problem.experts, topology.gpus), dtype=np.bool_)
    if problem.current is not None:
        for gpu, row in enumerate(problem.current.slots_LGC[layer].tolist()):
            live_EG[[e for e in row if e >= 0], gpu] = True
    scale = float(load_TE.sum(1).max() / topology.speed_G.sum()) or 1.0
    caps = [c for c in (limits.max_layer_replicas, limits.max_total_replicas) if c is not None]
    size = int(problem.bytes_L[layer])
    if limits.max_total_bytes is not None and size:
        caps.append(limits.max_total_bytes // size)
    moves = [c for c in (limits.max_layer_moves, limits.max_moves) if c is not None]
    if limits.max_move_bytes is not None and size:
        moves.append(limits.max_move_bytes // size)
    gpus = int((problem.capacity_LG[layer] > 0).sum())
    kept_FG, weight_F = np.zeros((0, topology.gpus), dtype=np.bool_), np.zeros(0)
    if failures is not None:
        often_F = failures.weight_F > _SELDOM * failures.sets.chance_F.max()
        weight_F = failures.weight_F[often_F]
        kept_FG = ~failures.sets.gone_FD[often_F][:, failures.sets.domain_G]
    return OrderedLayer(
        load_TE=load_TE / scale,
        weight_T=weight_T,
        source_NE=source_NE / scale,
        capacity_G=problem.capacity_LG[layer],
        speed_G=topology.speed_G,
        node_G=topology.node_G,
        domain_G=topology.failure_domain_G,
        live_EG=live_EG,
        allowed_EG=~problem.pairs_LEG("forbidden")[layer] & (problem.capacity_LG[layer] > 0),
        pinned_EG=problem.pairs_LEG("pinned")[layer],
        equal=problem.split == "equal",
        risk=problem.objective.risk,
        alpha=problem.objective.cvar_alpha,
        least_E=np.maximum(problem.spread_LE[layer], limits.min_replicas),
        most=gpus if limits.max_replicas is None else min(gpus, limits.max_replicas),
        most_in_all=min(caps, default=np.inf),
        most_moves=min(moves, default=np.inf),
        spread_E=problem.spread_LE[layer],
        tokens=scale,
        fixed=time.launch / float(topology.speed_G.max()) / (scale * time.token_cost),
        scale=scale * time.token_cost,
        kept_FG=kept_FG,
        weight_F=weight_F,
    )


def size_of(layer: OrderedLayer) -> int:
    """Binary variables of the programme, and failures, each of which is a row for every expert."""
    pairs, failures = int(layer.allowed_EG.sum()), len(layer.kept_FG)
    if not layer.equal:
        return pairs + failures
    return failures + int((layer.allowed_EG.sum(1) * np.maximum(layer.most - layer.least_E + 1, 0)).sum())


def solve_in_order(
    layer: OrderedLayer, order: tuple[str, ...], tolerance: float, *, stop: Stop, upper: float = np.inf
) -> Exact:
    """Minimise the priorities one after the other.

    Parameters
    ----------
    layer : OrderedLayer
        The layer.
    order : tuple of str
        The priorities.
    tolerance : float
        Share by which balance may be above its least for the sake of those after it.
    stop : Stop
        Ends the search; what was found by then is told, unproven.
    upper : float
        A value of the first priority that some placement is known to reach, where that is balance or
        survival: it cuts the search.
    """
    programme = _Programme(layer, order)
    if order[0] in ("balance", "survival"):
        programme.cap(order[0], upper / programme.unit[order[0]] * (1 + _SLACK) + _SLACK)
    held_EG: BoolArray | None = None
    limit, best = np.inf, dict[str, float]()
    for i, name in enumerate(order):
        found = solve_linear(programme.minimising(name), stop=stop, gap=_GAP)
        if found.value_V is not None:
            held_EG = programme.read(found.value_V)
        if found.value_V is None or found.status != "optimal":
            infeasible = found.status == "infeasible" and i == 0 and not np.isfinite(upper)
            return Exact(held_EG=held_EG, limit=limit, best=best, infeasible=infeasible)
        value = float(found.value_V[programme.term[name]])
        if value <= _SLACK:
            value = 0.0  # nothing to serve: what is left is the slack of the cap
        allowed = value if name in _TOKENS else float(round(value))
        best[name] = allowed * programme.unit.get(name, 1.0)
        if name == "balance":
            allowed *= 1 + (tolerance if i + 1 < len(order) else 0.0)
            limit = allowed * layer.scale
        programme.cap(name, allowed + _SLACK)
    return Exact(held_EG=held_EG, limit=limit, best=best, proven=True)


class _Programme:
    """The rows, and where to find placements and priorities among the variables."""

    def __init__(self, layer: OrderedLayer, order: tuple[str, ...]) -> None:
        self.layer = layer
        self.model = LinearModel()
        self.term: dict[str, int] = {}
        self.unit = {"balance": layer.scale, "traffic": layer.tokens}  # of a term's value
        self.place: dict[tuple[int, int], Row] = {}  # (e, g): sum of these is 1 if e is on g
        self.tokens: list[dict[tuple[int, int], Row]] = [{} for _ in layer.load_TE]  # by t: (e, g) -> tokens
        for e in range(layer.load_TE.shape[1]):
            (self._even_expert if layer.equal else self._free_expert)(e)
        self._limits()
        if "balance" in order:
            self._balance()
        for name, of in (("moves", ~layer.live_EG), ("memory", np.ones_like(layer.live_EG))):
            if name in order:
                self._count(name, of)
        if "traffic" in order:
            self._traffic()
        if "survival" in order:
            self._survival()

    def minimising(self, name: str) -> LinearModel:
        """The programme with one priority as its cost."""
        self.model.cost = [0.0] * len(self.model.names)
        self.model.cost[self.term[name]] = 1.0
        return self.model

    def cap(self, name: str, high: float) -> None:
        """Hold a priority to at most a value."""
        index = self.term[name]
        self.model.high[index] = high

    def read(self, values: FloatArray) -> BoolArray:
        """The placement of a solution, shape [E, G]."""
        held = np.zeros(self.layer.allowed_EG.shape, dtype=np.bool_)
        for (e, g), row in self.place.items():
            held[e, g] = sum(c * values[v] for v, c in row) > 0.5
        return held

    def _gpus(self, expert: int) -> list[int]:
        return [int(g) for g in np.flatnonzero(self.layer.allowed_EG[expert])]

    def _free_expert(self, e: int) -> None:
        model, layer = self.model, self.layer
        hosts: Row = []
        for g in self._gpus(e):
            x = model.variable(float(layer.pinned_EG[e, g]), 1, whole=True, name=f"x_{e}_{g}")
            self.place[e, g] = [(x, 1.0)]
            hosts.append((x, 1.0))
        model.row(hosts, float(layer.least_E[e]), layer.most, name=f"copies_{e}")
        for t, load_E in enumerate(layer.load_TE):
            self._serve(f"{t}_{e}", e, float(load_E[e]), self.tokens[t])

    def _serve(self, name: str, e: int, load: float, tokens: dict[tuple[int, int], Row]) -> None:
        served: Row = []
        if load == 0:
            return
        for g in self._gpus(e):
            f = self.model.variable(0, load, name=f"f_{name}_{g}")
            tokens[e, g] = [(f, 1.0)]
            (x, _), *_ = self.place[e, g]
            self.model.row([(f, 1.0), (x, -load)], -np.inf, 0.0, name=f"if_{name}_{g}")
            served.append((f, 1.0))
        self.model.row(served, load, load, name=f"served_{name}")

    def _even_expert(self, e: int) -> None:
        model, layer = self.model, self.layer
        chosen: Row = []
        for r in range(int(layer.least_E[e]), layer.most + 1):
            n = model.variable(0, 1, whole=True, name=f"n_{e}_{r}")
            chosen.append((n, 1.0))
            copies: Row = [(n, -float(r))]
            for g in self._gpus(e):
                z = model.variable(0, 1, whole=True, name=f"z_{e}_{r}_{g}")
                copies.append((z, 1.0))
                model.row([(z, 1.0), (n, -1.0)], -np.inf, 0.0, name=f"if_{e}_{r}_{g}")
                self.place.setdefault((e, g), []).append((z, 1.0))
                for t, load_E in enumerate(layer.load_TE):
                    if load_E[e] > 0:
                        self.tokens[t].setdefault((e, g), []).append((z, float(load_E[e]) / r))
            model.row(copies, 0.0, 0.0, name=f"copies_{e}_{r}")
        model.row(chosen, 1.0, 1.0, name=f"count_{e}")
        for g in np.flatnonzero(layer.pinned_EG[e]).tolist():
            model.row(self.place.get((e, g), []), 1.0, 1.0, name=f"pin_{e}_{g}")

    def _limits(self) -> None:
        model, layer = self.model, self.layer
        everything: Row = []
        for g in range(len(layer.capacity_G)):
            held = [part for (_, at), row in self.place.items() if at == g for part in row]
            everything += held
            if held:
                model.row(held, -np.inf, float(layer.capacity_G[g]), name=f"slots_{g}")
        if np.isfinite(layer.most_in_all):
            model.row(everything, -np.inf, layer.most_in_all, name="replicas")
        if np.isfinite(layer.most_moves):
            new = [part for pair, row in self.place.items() if not layer.live_EG[pair] for part in row]
            model.row(new, -np.inf, layer.most_moves, name="moved")
        for e in np.flatnonzero(layer.spread_E > 1).tolist():
            reached: Row = []
            for domain in np.unique(layer.domain_G).tolist():
                inside = [p for g in self._gpus(e) if layer.domain_G[g] == domain for p in self.place[e, g]]
                if inside:
                    d = model.variable(0, 1, name=f"d_{e}_{domain}")
                    model.row(
                        [(d, 1.0), *((v, -c) for v, c in inside)], -np.inf, 0.0, name=f"reach_{e}_{domain}"
                    )
                    reached.append((d, 1.0))
            model.row(reached, float(layer.spread_E[e]), np.inf, name=f"spread_{e}")

    def _balance(self) -> None:
        model, layer = self.model, self.layer
        tops = []
        for t, tokens in enumerate(self.tokens):
            floor = float(layer.load_TE[t].sum() / layer.speed_G.sum()) + layer.fixed
            top = model.variable(floor, np.inf, name=f"T_{t}")
            tops.append(top)
            self._within(f"time_{t}", tokens, top)
        value = model.variable(0, np.inf, name="balance")
        self.term["balance"] = value
        weights = [float(w) for w in layer.weight_T]
        if layer.risk == "worst" or len(tops) == 1:
            for t, top in enumerate(tops):
                model.row([(top, 1.0), (value, -1.0)], -np.inf, 0.0, name=f"risk_{t}")
        elif layer.risk == "expected":
            mean = [(top, w) for top, w in zip(tops, weights, strict=True)]
            model.row([*mean, (value, -1.0)], -np.inf, 0.0, name="risk")
        else:  # the least eta + mean excess over eta / (1 - alpha): Rockafellar and Uryasev (2000)
            eta = model.variable(0, np.inf, name="eta")
            row: Row = [(eta, 1.0), (value, -1.0)]
            for t, (top, w) in enumerate(zip(tops, weights, strict=True)):
                over = model.variable(0, np.inf, name=f"over_{t}")
                model.row([(top, 1.0), (eta, -1.0), (over, -1.0)], -np.inf, 0.0, name=f"over_{t}")
                row.append((over, w / (1 - layer.alpha)))
            model.row(row, -np.inf, 0.0, name="risk")

    def _within(self, name: str, tokens: dict[tuple[int, int], Row], top: int) -> None:
        """No GPU works longer than the time of a variable."""
        for g, speed in enumerate(self.layer.speed_G.tolist()):
            work = [part for (_, at), row in tokens.items() if at == g for part in row]
            if work:
                self.model.row([*work, (top, -speed)], -np.inf, -self.layer.fixed * speed, name=f"{name}_{g}")

    def _count(self, name: str, of_EG: BoolArray) -> None:
        counted = [part for pair, row in self.place.items() if of_EG[pair] for part in row]
        value = self.model.variable(0, np.inf, name=name)
        self.term[name] = value
        self.model.row([*counted, (value, -1.0)], -np.inf, 0.0, name=f"is_{name}")

    def _survival(self) -> None:
        model, layer = self.model, self.layer
        value = model.variable(0, np.inf, name="survival")
        self.term["survival"] = value
        unit = self.unit["survival"] = float(layer.weight_F.max(initial=0.0)) or 1.0
        total: Row = [(value, -1.0)]
        for row, (kept_G, weight) in enumerate(zip(layer.kept_FG, layer.weight_F.tolist(), strict=True)):
            lost = model.variable(0, 1, name=f"lost_{row}")
            total.append((lost, weight / unit))
            for e in range(layer.load_TE.shape[1]):
                left = [part for g in self._gpus(e) if kept_G[g] for part in self.place[e, g]]
                model.row([*left, (lost, 1.0)], 1.0, np.inf, name=f"left_{row}_{e}")
        model.row(total, -np.inf, 0.0, name="is_survival")

    def _traffic(self) -> None:
        model, layer = self.model, self.layer
        load_E = layer.source_NE.sum(0)
        tokens = self.tokens[0]
        if len(self.tokens) > 1:
            # The plan's shares are for the expected loads; their time keeps to what is allowed of the risk.
            tokens = {}
            for e, load in enumerate(load_E.tolist()):
                if layer.equal:
                    for g in self._gpus(e):
                        counts = range(int(layer.least_E[e]), layer.most + 1)
                        row = zip(self.place[e, g], counts, strict=True)
                        tokens[e, g] = [(z, load / r) for (z, _), r in row]
                else:
                    self._serve(f"mean_{e}", e, load, tokens)
            if "balance" in self.term and not layer.equal:
                self._within("time_mean", tokens, self.term["balance"])
        value = model.variable(0, np.inf, name="traffic")
        self.term["traffic"] = value
        total: Row = [(value, 1.0)]
        for n, source_E in enumerate(layer.source_NE):
            for e, source in enumerate(source_E.tolist()):
                near = [p for g in self._gpus(e) if layer.node_G[g] == n for p in tokens.get((e, g), [])]
                if near and source > 0:
                    k = model.variable(0, source, name=f"k_{n}_{e}")
                    model.row([(k, 1.0), *((v, -c) for v, c in near)], -np.inf, 0.0, name=f"kept_{n}_{e}")
                    total.append((k, 1.0))
        model.row(total, float(load_E.sum()), np.inf, name="is_traffic")
