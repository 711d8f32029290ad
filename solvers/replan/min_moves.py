"""The proof: the least number of replicas that must move so that a layer meets a wanted time.

Mixed-integer programme of one layer, with the live placement as its origin (which is what breaks the symmetry
between GPUs and makes it solvable where the plain placement programme is hopeless):

    min   sum over (e, g) not live of x[e,g]
    s.t.  sum_g y[e,g] = w[e],   y[e,g] <= w[e] x[e,g],   sum_g x[e,g] >= 1      for every expert
          sum_e y[e,g] <= T speed[g],   sum_e x[e,g] <= capacity[g]              for every GPU
          x binary, y >= 0

Cuts: let S be GPUs whose captive experts (all live replicas inside S) bring an excess over T speed(S).
Replicas of them must be placed outside, and those must be able to carry the excess (a knapsack cover):

    sum over captive e, g outside S of min(w[e], excess) x[e,g] >= excess.

Written for the groups of the minimum cut, for single GPUs and for the unions that replicated experts tie
together. The same argument, counted instead of solved, is `flow_moves_bound`: microseconds, valid for any
size.

The programme of counts (`counts`) comes first: it is an order of magnitude smaller, its bound is mostly the
least, and a plan is looked for among the pairs that it uses before all pairs are.

A known plan enters as a cutoff: ask for a plan that moves fewer. If there is none, the known plan is proven
least. `core.linear` has it solved, by HiGHS unless told otherwise. Statuses are never taken on trust: plans
are re-checked by maximum flow, and what a time limit stopped is called feasible, not optimal.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.core import LinearAnswer, LinearModel, MaxTime, Stop, part_of, solve_linear
from moeless_opt.solvers.replan.counts import MoveCounts, fewest_counts
from moeless_opt.solvers.replan.flow import UNIT, Cut, ExpertGpu, LayerFlow

__all__ = ["FewestMoves", "close_moves_bound", "flow_moves_bound", "min_moves", "min_moves_bound"]

Status = Literal["optimal", "feasible", "infeasible", "no_solution"]
_COUNTING = 0.5  # share of the time that is left for one programme of counts, or of few pairs
_CLASSES = (1, 5)  # classes of weight of the programmes of counts, one after the other
_SLACK = 1e-6  # relative: solvers' feasibility tolerance in units of the mean GPU time


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestMoves:
    """Outcome of a minimum-moves proof.

    Attributes
    ----------
    status : str
        ``optimal`` (proven), ``feasible`` (a plan and a smaller bound), ``infeasible`` (no plan meets the
        time), ``no_solution`` (stopped before it knew).
    moves : int or None
        Moves of the best plan known.
    bound : int
        Proven: no plan meets the time with fewer.
    content : list of list of int, or None
        Experts on each GPU in that plan.
    seconds : float
        Time it took.
    """

    status: Status
    moves: int | None
    bound: int
    content: list[list[int]] | None
    seconds: float


# -- the cheap bound -----------------------------------------------------------------------------------


def flow_moves_bound(state: LayerFlow, cut: Cut) -> int:
    """Moves that any plan needs at least, counted on one minimum cut.

    Parameters
    ----------
    state : LayerFlow
        Live placement at the wanted time.
    cut : Cut
        Its cut.

    Returns
    -------
    int
        The larger of two counts. Leaving: hot groups are disjoint and so are their captive experts; each
        group needs as many new replicas as its heaviest captives take to carry its excess. Arriving: the
        overflow must find room in cool groups, and one that no new replica enters cannot take more than it
        has.
    """
    slack = 4 * state.gpus  # rounding of the rooms
    leave = 0
    for name, excess in cut.excess.items():
        captive = cut.captive[name]
        group = _fewest((state.load[expert] for expert in captive), excess - slack)
        # Its GPUs on their own: what only they hold.
        alone: dict[int, list[int]] = {}
        for expert in captive:
            if len(state.home[expert]) == 1:
                alone.setdefault(state.home[expert][0], []).append(state.load[expert])
        each = sum(_fewest(loads, sum(loads) - state.room[gpu] - slack) for gpu, loads in alone.items())
        leave += max(group, each)
    return max(leave, _fewest(cut.slack.values(), sum(cut.excess.values()) - slack))


def close_moves_bound(state: LayerFlow, cut: Cut, overflow: int) -> int:
    """`flow_moves_bound`, with what each end of a move can carry alone in place of loads and rooms.

    What a set of experts could send, if others served them, is a maximum flow and so submodular in the set:
    together they carry no more than the sum of what each carries alone. The same holds for what reaches a set
    of GPUs. One flow for each hot GPU and each captive expert of several replicas, one for each cool GPU.

    Parameters
    ----------
    state : LayerFlow
        Live placement at the wanted time, solved.
    cut : Cut
        Its cut.
    overflow : int
        What `solve` returned.

    Returns
    -------
    int
        Moves that any plan needs at least.
    """
    load = state.load
    slack = 4 * state.gpus + len(load)  # rounding of loads and rooms, in every flow
    leave = 0
    for name, captive in cut.captive.items():
        relief: dict[int, int] = {}
        alone: list[int] = []
        for expert in captive:
            where = state.home[expert]
            if len(where) > 1:
                alone.append(overflow - state.without(expert))
                continue
            if where[0] not in relief:
                relief[where[0]] = overflow - state.with_room(where[0])
            alone.append(min(load[expert], relief[where[0]]))
        leave += _fewest((size + slack for size in alone if size > 0), cut.excess[name] - slack)
    heaviest = max(load)
    arrive: list[int] = []
    for gpu in cut.group:
        fits = overflow - state.with_source(gpu)
        while fits > 0:  # one arrival brings no more than the heaviest
            arrive.append(min(fits, heaviest) + slack)
            fits -= heaviest
    return max(leave, _fewest(arrive, overflow - slack))


def _fewest(sizes: Iterable[int], wanted: int) -> int:
    """How many of the largest sizes it takes to sum to what is wanted."""
    count = 0
    for size in sorted(sizes, reverse=True):
        if wanted <= 0:
            break
        wanted -= size
        count += 1
    return count


def min_moves_bound(
    load_LE: Any, slots_LGC: Any, speed_G: Any, time_L: Any, *, close: bool = False
) -> IntArray:
    """`flow_moves_bound` of every layer, or `close_moves_bound` where that is more.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    slots_LGC : array of int, shape [L, G, C]
        Live placement; every expert has a replica.
    speed_G : array of float, shape [G]
        Relative speeds.
    time_L : array of float, shape [L]
        Wanted times.
    close : bool
        Whether to take the time for the closer one: a flow for every GPU.

    Returns
    -------
    array of int, shape [L]
        No plan within the wanted time moves fewer replicas.
    """
    load_LE, speed = np.asarray(load_LE, dtype=np.float64), np.asarray(speed_G, dtype=np.float64)
    bounds = []
    for load_E, slots_GC, time in zip(load_LE, np.asarray(slots_LGC), np.asarray(time_L), strict=True):
        state = _state(load_E, slots_GC, speed, float(time), None)
        overflow = state.solve()
        cut = state.cut() if overflow > 0 else None
        least = 0 if cut is None else flow_moves_bound(state, cut)
        if close and cut is not None:
            least = max(least, close_moves_bound(state, cut, overflow))
        bounds.append(least)
    return np.array(bounds, dtype=np.int64)


def _state(
    load_E: FloatArray,
    content: Iterable[Iterable[int]],
    speed_G: FloatArray,
    time: float,
    capacity: list[int] | None,
    slack: float = 1e-10,
) -> LayerFlow:
    unit = float(load_E.sum() / speed_G.sum()) or 1.0
    rows = [[int(expert) for expert in row if expert >= 0] for row in content]
    room = [int(time / unit * by * UNIT * (1.0 + slack)) + 2 for by in speed_G.tolist()]
    load = np.rint(load_E * (UNIT / unit)).astype(np.int64).tolist()
    return LayerFlow(load, rows, capacity or [len(row) for row in rows], room)


# -- the programme -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Moves(LinearModel):
    """The programme, and the variable of each pair of expert and GPU."""

    pair: dict[ExpertGpu, int] = field(default_factory=dict)


def _build(
    load: list[float],
    live: list[list[int]],
    capacity: list[int],
    room: list[float],
    limits: tuple[int, int | None],
    sets: Iterable[frozenset[int]],
    allowed: BoolArray | None,
    stop: Stop,
) -> _Moves | None:
    """Write the programme in units of the mean GPU load; `limits`: least moves, and fewer than so many."""
    experts, gpus = range(len(load)), range(len(live))
    home: list[set[int]] = [set() for _ in experts]
    for gpu, row in enumerate(live):
        for expert in row:
            home[expert].add(gpu)
    model = _Moves()
    serve: dict[ExpertGpu, int] = {}
    by_expert: list[list[int]] = [[] for _ in experts]
    by_gpu: list[list[int]] = [[] for _ in gpus]
    for expert in experts:
        if stop():
            return None
        for gpu in gpus:
            stays = gpu in home[expert]
            if stays or allowed is None or allowed[expert, gpu]:
                has = model.pair[expert, gpu] = model.variable(0.0, 1.0, whole=True, cost=float(not stays))
                tokens = serve[expert, gpu] = model.variable(0.0, load[expert])
                model.row([(tokens, 1.0), (has, -load[expert])], -math.inf, 0.0)
                by_expert[expert].append(gpu)
                by_gpu[gpu].append(expert)
    for expert in experts:
        model.row([(serve[expert, gpu], 1.0) for gpu in by_expert[expert]], load[expert], load[expert])
        model.row([(model.pair[expert, gpu], 1.0) for gpu in by_expert[expert]], 1.0, math.inf)
    for gpu in gpus:
        model.row([(serve[expert, gpu], 1.0) for expert in by_gpu[gpu]], -math.inf, room[gpu])
        model.row([(model.pair[expert, gpu], 1.0) for expert in by_gpu[gpu]], -math.inf, float(capacity[gpu]))
    for inside in sorted(set(sets), key=sorted):
        if stop():
            return None
        captive = [expert for expert in experts if home[expert] and home[expert] <= inside]
        excess = sum(load[expert] for expert in captive) - sum(room[gpu] for gpu in inside)
        if excess > 10 * _SLACK:
            terms = [
                (model.pair[expert, gpu], min(load[expert] / excess, 1.0))
                for expert in captive
                for gpu in by_expert[expert]
                if gpu not in inside
            ]
            model.row(terms, 1.0 - _SLACK, math.inf)
    moves = [(column, 1.0) for column, cost in enumerate(model.cost) if cost > 0.0]
    least, below = limits
    model.row(moves, float(least), math.inf if below is None else float(below - 1))
    return model


# -- the proof -----------------------------------------------------------------------------------------


def min_moves(
    load_E: Any,
    slots_GC: Any,
    capacity_G: Any,
    speed_G: Any,
    time: float,
    *,
    known: Sequence[Sequence[int]] | None = None,
    stop: Stop | None = None,
    engine: str = "highs",
    least: int = 0,
    steps: int = 3,
) -> FewestMoves:
    """Prove the least number of moves with which one layer meets a wanted time, token shares free.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens.
    slots_GC : array of int, shape [G, C]
        Live placement, -1 where empty; an expert may lack a replica.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    time : float
        Wanted largest GPU time, in tokens per speed.
    known : sequence of sequence of int, optional
        Experts on each GPU of a plan that meets the time: the search then asks only for fewer moves.
    stop : Stop, optional
        When to stop; after a minute where none is given.
    engine : str
        ``"highs"``, ``"pulp"``, ...: see `core.linear.solve_linear`.
    least : int
        Moves that are already known to be needed.
    steps : int
        1: by the programme of counts, and plans among the pairs that these use; 2: by classes of weight, too;
        3: and by the programme of all pairs, which may take long.

    Returns
    -------
    FewestMoves
        Status, best plan, proven bound.

    Raises
    ------
    ProblemError
        The known plan breaks a rule or misses the time.
    SolverUnavailableError
        The engine is missing or refuses the programme.
    """
    started = clock.monotonic()
    stop = MaxTime(60.0) if stop is None else stop
    load, speed = np.asarray(load_E, dtype=np.float64), np.asarray(speed_G, dtype=np.float64)
    capacity = np.asarray(capacity_G).tolist()
    live = [[int(expert) for expert in row if expert >= 0] for row in np.asarray(slots_GC)]
    best, moves = None if known is None else [list(row) for row in known], None
    if best is not None:
        _check(load, best, speed, time, capacity, "known")
        moves = _moves(live, best)
    bound, sets, stays = _at_once(load, live, speed, time)
    if stays and all(len(row) <= slots for row, slots in zip(live, capacity, strict=True)):
        best, moves = live, 0
    bound = max(bound, least)
    layer = _Layer(load, live, capacity, speed, time, sets)
    status: Status = "no_solution" if moves is None else "feasible"
    if moves is None or moves > bound:
        status, moves, bound, best = _prove(layer, best, bound, steps, engine, stop)
    return _told(status, moves, bound, best, started)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the programme is written from."""

    load: FloatArray
    live: list[list[int]]
    capacity: list[int]
    speed: FloatArray
    time: float
    sets: list[frozenset[int]]

    @property
    def scaled(self) -> tuple[list[float], list[list[int]], list[int], list[float]]:
        """Loads, contents, slots and rooms; tokens in units of the mean GPU load."""
        unit = float(self.load.sum() / self.speed.sum()) or 1.0
        rooms: list[float] = (self.speed * (self.time / unit)).tolist()
        return (self.load / unit).tolist(), self.live, self.capacity, rooms

    def solved(
        self, limits: tuple[int, int | None], allowed: BoolArray | None, engine: str, stop: Stop
    ) -> tuple[LinearAnswer | None, list[list[int]] | None]:
        """The engine's answer, and the contents of the plan that it found, checked."""
        model = _build(*self.scaled, limits, self.sets, allowed, stop)
        if model is None:
            return None, None
        answer = solve_linear(model, engine, stop=stop)
        if answer.value_V is None:
            return answer, None
        content = _content(model, answer.value_V, len(self.live))
        _check(self.load, content, self.speed, self.time, self.capacity, "solution")
        return answer, content


def _prove(
    layer: _Layer,
    best: list[list[int]] | None,
    bound: int,
    steps: int,
    engine: str,
    stop: Stop,
) -> tuple[Status, int | None, int, list[list[int]] | None]:
    """Raise the bound and lower the moves until they meet: counts, few pairs, all pairs."""
    moves = None if best is None else _moves(layer.live, best)
    status: Status = "no_solution" if moves is None else "feasible"
    for classes in _CLASSES[:steps]:
        if moves is not None and moves <= bound:
            break
        counts = fewest_counts(
            *layer.scaled,
            least=bound,
            below=moves,
            sets=layer.sets,
            classes=classes,
            engine=engine,
            stop=part_of(stop, _COUNTING),
        )
        bound = counts.bound
        if counts.infeasible:
            return ("infeasible" if moves is None else status), moves, bound, best
        pairs = _narrow(counts, layer.live, best)
        if pairs is not None and (moves is None or moves > bound):
            found = layer.solved((bound, moves), pairs, engine, part_of(stop, _COUNTING))[1]
            if found is not None:
                best, moves = found, _moves(layer.live, found)
    if steps > len(_CLASSES) and (moves is None or moves > bound):
        answer, found = layer.solved((bound, moves), None, engine, stop)
        if found is not None:
            best, moves = found, _moves(layer.live, found)
        if answer is not None and answer.status == "infeasible":
            bound, status = (bound, "infeasible") if moves is None else (moves, status)
        elif answer is not None and math.isfinite(answer.bound):
            bound = max(bound, math.ceil(answer.bound - 1e-6 * max(1.0, answer.bound)))
    return status, moves, bound, best


def _narrow(counts: MoveCounts, live: list[list[int]], known: list[list[int]] | None) -> BoolArray | None:
    """Few pairs among which a plan may be found: of all ends that the counts and the known plan use."""
    if counts.sent_E is None or counts.entered_G is None:
        return None
    sent_E, entered_G = counts.sent_E > 0, counts.entered_G > 0
    for gpu, row in enumerate(known or []):
        new = [expert for expert in row if expert not in live[gpu]]
        sent_E[new] = True
        entered_G[gpu] |= bool(new)
    pairs: BoolArray = sent_E[:, None] & entered_G
    return pairs


def _told(
    status: Status, moves: int | None, bound: int, content: list[list[int]] | None, started: float
) -> FewestMoves:
    if moves is not None:
        bound = min(bound, moves)
        status = "optimal" if bound == moves else "feasible"
    seconds = clock.monotonic() - started
    return FewestMoves(status=status, moves=moves, bound=bound, content=content, seconds=seconds)


def _at_once(
    load_E: FloatArray, live: list[list[int]], speed_G: FloatArray, time: float
) -> tuple[int, list[frozenset[int]], bool]:
    """What one maximum flow tells: a bound, GPU sets to cut on, and whether the live placement will do."""
    sets = [frozenset([gpu]) for gpu in range(len(live))]
    if len(set().union(*live)) < len(load_E):
        return 0, sets, False
    state = _state(load_E, live, speed_G, time, None)
    overflow = state.solve()
    if overflow == 0:
        return 0, sets, True
    cut = state.cut()
    least = max(flow_moves_bound(state, cut), close_moves_bound(state, cut, overflow))
    return least, sets + _hot_sets(state, cut), False


def _moves(live: Sequence[Sequence[int]], content: Sequence[Sequence[int]]) -> int:
    return sum(expert not in row for row, now in zip(live, content, strict=True) for expert in now)


def _content(model: _Moves, value_V: FloatArray, gpus: int) -> list[list[int]]:
    content: list[list[int]] = [[] for _ in range(gpus)]
    for (expert, gpu), column in model.pair.items():
        if value_V[column] > 0.5:
            content[gpu].append(expert)
    return content


def _hot_sets(state: LayerFlow, cut: Cut) -> list[frozenset[int]]:
    """GPU sets that a cover cut is written for: hot groups, everything hot, everything that isn't cool."""
    groups = [
        frozenset(gpu for expert in cut.captive[name] for gpu in state.home[expert]) for name in cut.excess
    ]
    return [*groups, frozenset(state.hot()), frozenset(range(state.gpus)) - frozenset(cut.group)]


def _check(
    load_E: FloatArray,
    content: list[list[int]],
    speed_G: FloatArray,
    time: float,
    capacity: list[int],
    where: str,
) -> None:
    """Recheck a plan by the rules and by maximum flow."""
    for gpu, row in enumerate(content):
        if len(row) > capacity[gpu] or len(set(row)) < len(row):
            raise ProblemError(
                where, f"GPU {gpu} holds {row}, would need at most {capacity[gpu]} distinct experts"
            )
    if len(set().union(*content)) < len(load_E):
        raise ProblemError(where, "an expert has no replica, would need one each")
    if _state(load_E, content, speed_G, time, None, slack=10 * _SLACK).solve() > 0:
        raise ProblemError(where, f"cannot keep every GPU within the wanted time {time}")
