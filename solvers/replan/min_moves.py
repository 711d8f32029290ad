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

A known plan enters as a cutoff: ask for a plan that moves fewer. If there is none, the known plan is proven
least. HiGHS runs through ortools' MathOpt; PuLP (CBC) is the second backend. Statuses are never taken on
trust: plans are re-checked by maximum flow, and what a time limit stopped is called feasible, not optimal.
"""

from __future__ import annotations

import datetime
import math
import time as clock
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.solvers.replan.flow import UNIT, Cut, LayerFlow, Pair

__all__ = ["MinMoves", "flow_moves_bound", "min_moves", "min_moves_bound"]

Status = Literal["optimal", "feasible", "infeasible", "no_solution"]
_SLACK = 1e-6  # relative: solvers' feasibility tolerance in units of the mean GPU time


@dataclass(frozen=True, slots=True, kw_only=True)
class MinMoves:
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


def _fewest(sizes: Iterable[int], wanted: int) -> int:
    """How many of the largest sizes it takes to sum to what is wanted."""
    count = 0
    for size in sorted(sizes, reverse=True):
        if wanted <= 0:
            break
        wanted -= size
        count += 1
    return count


def min_moves_bound(load_LE: Any, slots_LGC: Any, speed_G: Any, time_L: Any) -> NDArray[np.int64]:
    """`flow_moves_bound` of every layer.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens.
    slots_LGC : int array [layers, GPUs, slots]
        Live placement; every expert has a replica.
    speed_G : float array [GPUs]
        Relative speeds.
    time_L : float array [layers]
        Wanted times.

    Returns
    -------
    int array [layers]
        No plan within the wanted time moves fewer replicas.
    """
    load_LE, speed = np.asarray(load_LE, dtype=np.float64), np.asarray(speed_G, dtype=np.float64)
    bounds = []
    for load_E, slots_GC, time in zip(load_LE, np.asarray(slots_LGC), np.asarray(time_L), strict=True):
        state = _state(load_E, slots_GC, speed, float(time), None)
        bounds.append(flow_moves_bound(state, state.cut()) if state.solve() > 0 else 0)
    return np.array(bounds, dtype=np.int64)


def _state(
    load_E: NDArray[np.float64],
    content: Iterable[Iterable[int]],
    speed_G: NDArray[np.float64],
    time: float,
    capacity: list[int] | None,
    slack: float = 1e-10,
) -> LayerFlow:
    unit = float(load_E.sum() / speed_G.sum()) or 1.0
    rows = [[int(expert) for expert in row if expert >= 0] for row in content]
    room = [int(time / unit * by * UNIT * (1.0 + slack)) + 2 for by in speed_G.tolist()]
    load = np.rint(load_E * (UNIT / unit)).astype(np.int64).tolist()
    return LayerFlow(load, rows, capacity or [len(row) for row in rows], room)


# -- the programme, free of any solver -----------------------------------------------------------------


@dataclass(slots=True)
class _Programme:
    """Variables (upper bound, integer, cost) and rows (terms, lower, upper)."""

    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    rows: list[tuple[list[tuple[int, float]], float, float]] = field(default_factory=list)
    pair: dict[Pair, int] = field(default_factory=dict)

    def variable(self, upper: float, integer: bool, cost: float) -> int:
        self.upper.append(upper)
        self.integer.append(integer)
        self.cost.append(cost)
        return len(self.upper) - 1


def _build(
    load: list[float],
    live: list[list[int]],
    capacity: list[int],
    room: list[float],
    fewer_than: int | None,
    least: int,
    sets: Iterable[frozenset[int]],
    allowed: NDArray[np.bool_] | None,
) -> _Programme:
    """Write the programme in units of the mean GPU load."""
    experts, gpus = range(len(load)), range(len(live))
    home: list[set[int]] = [set() for _ in experts]
    for gpu, row in enumerate(live):
        for expert in row:
            home[expert].add(gpu)
    programme = _Programme()
    serve: dict[Pair, int] = {}
    for expert in experts:
        for gpu in gpus:
            stays = gpu in home[expert]
            if stays or allowed is None or allowed[expert, gpu]:
                has = programme.pair[expert, gpu] = programme.variable(1.0, True, 0.0 if stays else 1.0)
                tokens = serve[expert, gpu] = programme.variable(load[expert], False, 0.0)
                programme.rows.append(([(tokens, 1.0), (has, -load[expert])], -math.inf, 0.0))
    by_expert: list[list[int]] = [[] for _ in experts]
    by_gpu: list[list[int]] = [[] for _ in gpus]
    for expert, gpu in programme.pair:
        by_expert[expert].append(gpu)
        by_gpu[gpu].append(expert)
    for expert in experts:
        programme.rows.append(
            ([(serve[expert, gpu], 1.0) for gpu in by_expert[expert]], load[expert], load[expert])
        )
        programme.rows.append(
            ([(programme.pair[expert, gpu], 1.0) for gpu in by_expert[expert]], 1.0, math.inf)
        )
    for gpu in gpus:
        programme.rows.append(([(serve[expert, gpu], 1.0) for expert in by_gpu[gpu]], -math.inf, room[gpu]))
        programme.rows.append(
            ([(programme.pair[expert, gpu], 1.0) for expert in by_gpu[gpu]], -math.inf, float(capacity[gpu]))
        )
    for inside in sorted(set(sets), key=sorted):
        captive = [expert for expert in experts if home[expert] and home[expert] <= inside]
        excess = sum(load[expert] for expert in captive) - sum(room[gpu] for gpu in inside)
        if excess > 10 * _SLACK:
            terms = [
                (programme.pair[expert, gpu], min(load[expert] / excess, 1.0))
                for expert in captive
                for gpu in by_expert[expert]
                if gpu not in inside
            ]
            programme.rows.append((terms, 1.0 - _SLACK, math.inf))
    moves = [(column, 1.0) for column, cost in enumerate(programme.cost) if cost > 0.0]
    programme.rows.append((moves, float(least), math.inf if fewer_than is None else float(fewer_than - 1)))
    return programme


@dataclass(frozen=True, slots=True)
class _Answer:
    status: Status
    values: list[float] | None
    bound: float


def _with_highs(programme: _Programme, seconds: float) -> _Answer:
    """HiGHS through MathOpt. Its scheduler fails when the thread setting changes, so none is ever set."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    columns = [
        model.add_variable(lb=0.0, ub=upper, is_integer=integer)
        for upper, integer in zip(programme.upper, programme.integer, strict=True)
    ]
    for terms, lower, upper in programme.rows:
        row = model.add_linear_constraint(lb=lower, ub=upper)
        for column, factor in terms:
            row.set_coefficient(columns[column], factor)
    for column, cost in zip(columns, programme.cost, strict=True):
        if cost:
            model.objective.set_linear_coefficient(column, cost)
    limit = datetime.timedelta(seconds=max(seconds, 0.01))
    try:
        result = mathopt.solve(
            model, mathopt.SolverType.HIGHS, params=mathopt.SolveParameters(time_limit=limit)
        )
    except (RuntimeError, ValueError) as error:
        raise SolverUnavailableError(f"HiGHS through MathOpt refused the programme: {error}") from error
    reason = result.termination.reason
    bound = float(result.termination.objective_bounds.dual_bound)
    if reason == mathopt.TerminationReason.INFEASIBLE:
        return _Answer("infeasible", None, math.inf)
    if not result.has_primal_feasible_solution():
        return _Answer("no_solution", None, bound)
    values = [float(value) for value in result.variable_values(columns)]
    status: Status = "optimal" if reason == mathopt.TerminationReason.OPTIMAL else "feasible"
    return _Answer(status, values, bound)


def _pulp_problem(pulp: Any, programme: _Programme) -> tuple[Any, list[Any]]:
    """The programme as PuLP has it, and its variables."""
    problem = pulp.LpProblem("min_moves", pulp.LpMinimize)
    columns = [
        pulp.LpVariable(f"v{column}", 0.0, upper, pulp.LpInteger if integer else pulp.LpContinuous)
        for column, (upper, integer) in enumerate(zip(programme.upper, programme.integer, strict=True))
    ]
    problem += pulp.LpAffineExpression(
        [(column, cost) for column, cost in zip(columns, programme.cost, strict=True) if cost]
    )
    for terms, lower, upper in programme.rows:
        row = pulp.LpAffineExpression([(columns[column], factor) for column, factor in terms])
        if lower == upper:
            problem += row == lower
            continue
        if lower > -math.inf:
            problem += row >= lower
        if upper < math.inf:
            problem += row <= upper
    return problem, columns


def _with_pulp(programme: _Programme, seconds: float) -> _Answer:
    """PuLP's first available solver. When time ran out, `status` still says Optimal; `sol_status` doesn't."""
    import pulp

    names = [
        name for name in ("PULP_CBC_CMD", "COIN_CMD", "HiGHS", "GLPK_CMD") if name in pulp.listSolvers(True)
    ]
    if not names:
        raise SolverUnavailableError("PuLP finds no solver (CBC or HiGHS)")
    with warnings.catch_warnings():
        # 3.x announces 4.0's way to make variables and drops the bundled CBC; this works in both.
        warnings.simplefilter("ignore", DeprecationWarning)
        problem, columns = _pulp_problem(pulp, programme)
        problem.solve(pulp.getSolver(names[0], msg=False, timeLimit=max(seconds, 0.01)))

    if problem.sol_status == pulp.LpSolutionInfeasible:
        return _Answer("infeasible", None, math.inf)
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return _Answer("no_solution", None, -math.inf)
    values = [float(column.value() or 0.0) for column in columns]
    moves = sum(cost * value for cost, value in zip(programme.cost, values, strict=True))
    if problem.sol_status == pulp.LpSolutionOptimal:
        return _Answer("optimal", values, moves)
    return _Answer("feasible", values, -math.inf)


_BACKENDS = {"highs": _with_highs, "pulp": _with_pulp}


# -- the proof -----------------------------------------------------------------------------------------


def min_moves(
    load_E: Any,
    slots_GC: Any,
    capacity_G: Any,
    speed_G: Any,
    time: float,
    *,
    known: Sequence[Sequence[int]] | None = None,
    time_limit: float = 60.0,
    backend: Literal["highs", "pulp"] = "highs",
    allowed_EG: Any = None,
) -> MinMoves:
    """Prove the least number of moves with which one layer meets a wanted time, token shares free.

    Parameters
    ----------
    load_E : float array [experts]
        Tokens.
    slots_GC : int array [GPUs, slots]
        Live placement, -1 where empty; an expert may lack a replica.
    capacity_G : int array [GPUs]
        Slots.
    speed_G : float array [GPUs]
        Relative speeds.
    time : float
        Wanted largest GPU time, in tokens per speed.
    known : sequence of sequence of int, optional
        Experts on each GPU of a plan that meets the time: the search then asks only for fewer moves.
    time_limit : float
        Seconds.
    backend : {"highs", "pulp"}
        HiGHS through ortools, or PuLP's first available solver.
    allowed_EG : bool array [experts, GPUs], optional
        New pairs that may be used. With it the result is a plan, not a proof: the bound then holds only
        among plans of these pairs.

    Returns
    -------
    MinMoves
        Status, best plan, proven bound.

    Raises
    ------
    ProblemError
        The known plan breaks a rule or misses the time.
    SolverUnavailableError
        The backend is missing or refuses the programme.
    """
    started = clock.monotonic()
    if backend not in _BACKENDS:
        raise ProblemError("backend", f"is {backend!r}, would need one of {sorted(_BACKENDS)}")
    load, speed = np.asarray(load_E, dtype=np.float64), np.asarray(speed_G, dtype=np.float64)
    capacity = [int(slots) for slots in capacity_G]
    live = [[int(expert) for expert in row if expert >= 0] for row in np.asarray(slots_GC)]
    held = [frozenset(row) for row in live]
    moves: int | None = None
    best = None if known is None else [list(row) for row in known]
    if best is not None:
        _check(load, best, speed, time, capacity, "known")
        moves = _moves(held, best)
    covered = len(set().union(*live)) == len(load)
    fits = all(len(row) <= slots for row, slots in zip(live, capacity, strict=True))
    bound, sets = 0, [frozenset([gpu]) for gpu in range(len(live))]
    if covered:
        state = _state(load, live, speed, time, None)
        if state.solve() > 0:
            cut = state.cut()
            bound = flow_moves_bound(state, cut)
            sets += _hot_sets(state, cut)
        elif fits:
            return MinMoves(
                status="optimal", moves=0, bound=0, content=live, seconds=clock.monotonic() - started
            )
    if moves is not None and moves <= bound:
        return MinMoves(
            status="optimal", moves=moves, bound=moves, content=best, seconds=clock.monotonic() - started
        )
    unit = float(load.sum() / speed.sum()) or 1.0
    room = (speed * (time / unit)).tolist()
    allowed = None if allowed_EG is None else np.asarray(allowed_EG, dtype=bool)
    programme = _build((load / unit).tolist(), live, capacity, room, moves, bound, sets, allowed)
    answer = _BACKENDS[backend](programme, time_limit - (clock.monotonic() - started))
    if answer.values is not None:
        found = _content(programme, answer.values, len(live))
        _check(load, found, speed, time, capacity, "solution")
        best, moves = found, _moves(held, found)
    elif answer.status == "infeasible" and moves is not None:
        answer = _Answer("optimal", None, moves)
    if math.isfinite(answer.bound):
        bound = max(bound, math.ceil(answer.bound - 1e-6))
    status: Status = answer.status
    if moves is not None:
        bound = moves if status == "optimal" else min(bound, moves)
        status = "optimal" if bound == moves else "feasible"
    return MinMoves(
        status=status, moves=moves, bound=bound, content=best, seconds=clock.monotonic() - started
    )


def _moves(held: Sequence[frozenset[int]], content: Sequence[Sequence[int]]) -> int:
    return sum(expert not in row for row, now in zip(held, content, strict=True) for expert in now)


def _content(programme: _Programme, values: list[float], gpus: int) -> list[list[int]]:
    content: list[list[int]] = [[] for _ in range(gpus)]
    for (expert, gpu), column in programme.pair.items():
        if values[column] > 0.5:
            content[gpu].append(expert)
    return content


def _hot_sets(state: LayerFlow, cut: Cut) -> list[frozenset[int]]:
    """GPU sets that a cover cut is written for: hot groups, everything hot, everything that isn't cool."""
    groups = [
        frozenset(gpu for expert in cut.captive[name] for gpu in state.home[expert]) for name in cut.excess
    ]
    return [*groups, frozenset(state.hot()), frozenset(range(state.gpus)) - frozenset(cut.group)]


def _check(
    load_E: NDArray[np.float64],
    content: list[list[int]],
    speed_G: NDArray[np.float64],
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
