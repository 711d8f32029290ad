"""The face: `plan`, `solve` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.adapters import OURS, read_map, wanted_layers
from moeless_opt.problems.errors import (
    InfeasibleError,
    ProblemError,
    SolverUnavailableError,
    UnsupportedFeatureError,
)
from moeless_opt.problems.files import named
from moeless_opt.problems.io.recordings import frame_loads, read_loads
from moeless_opt.problems.plan import Plan, ProgressCallback, Result, Status
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec import (
    PRIORITIES,
    Groups,
    Limits,
    Loads,
    ModelSpec,
    Objective,
    Placement,
    Problem,
    Sizing,
    TimeModel,
    Topology,
    model_preset,
)
from moeless_opt.report import BOUND_ROW, Comparison, bound_row, row_of
from moeless_opt.solvers.core import (
    PUBLISHED,
    Clock,
    FirstOf,
    MaxTime,
    NeverStop,
    Solver,
    Stop,
    get_solver,
    require,
)
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.shares import best_shares

if TYPE_CHECKING:
    from moeless_opt.solvers.sizing import Redundancy

__all__ = [
    "as_loads",
    "compare",
    "export_model",
    "judge",
    "make_problem",
    "plan",
    "recommend_redundancy",
    "solve",
]


def as_loads(loads: ArrayLike | Loads | str | PathLike[str]) -> Loads:
    """Whatever `plan` accepts as loads: an array, a `Loads`, or the path of a recording.

    A data frame (pandas, polars) with columns for layer, expert and count is a table as in a CSV file, any
    other a row for each layer. What an array masks is no load.
    """
    if isinstance(loads, Loads):
        return loads
    if isinstance(loads, str | PathLike):
        return read_loads(loads)
    if hasattr(loads, "columns"):
        table = frame_loads(loads)
        if table is not None:
            return table
    given: Any = loads.filled(0) if isinstance(loads, np.ma.MaskedArray) else loads
    return Loads(load_TLE=given)


def make_problem(
    loads: ArrayLike | Loads | str | PathLike[str],
    topology: Topology | str | Mapping[str, Any],
    *,
    current: Any = None,
    model: ModelSpec | str | None = None,
    split: str = "fractional",
    fill: str = "none",
    share_entries: int | None = None,
    balance_tolerance: float | None = None,
    objective: Objective | None = None,
    limits: Limits | None = None,
    groups: Groups | None = None,
    sizing: Sizing | str | None = None,
    time: TimeModel | None = None,
    expert_bytes: ArrayLike | None = None,
    name: str = "",
    repair: bool = False,
) -> Problem:
    """The `Problem` that `plan` with the same arguments solves."""
    spec = model_preset(model) if isinstance(model, str) else model
    if spec is not None and isinstance(loads, str | PathLike):
        loads = read_loads(loads, experts=spec.experts)
    load = as_loads(loads)
    if spec is not None and load.source and load.shape[1] != spec.layers:
        load = load.replace(
            notes=(*load.notes, f"{load.shape[1]} layers, {spec.name} has {spec.layers} with experts")
        )
    if isinstance(topology, str):
        topology = Topology.preset(topology)
    elif isinstance(topology, Mapping):
        topology = Topology.from_dict(topology)
    elif not isinstance(topology, Topology):
        raise ProblemError(
            "topology",
            f"is {type(topology).__name__}, must be a Topology, the name of a preset, or its JSON form",
        )
    if isinstance(current, str | PathLike):
        spec = model_preset(model) if isinstance(model, str) else model
        current = _live_from(current, load, topology, spec, broken=repair)
    extra: dict[str, Any] = {}
    if objective is not None or balance_tolerance is not None:
        wanted = Objective() if objective is None else objective
        if not isinstance(wanted, Objective):
            raise ProblemError("objective", f"is {type(wanted).__name__}, must be an Objective")
        extra["objective"] = (
            wanted if balance_tolerance is None else wanted.replace(balance_tolerance=balance_tolerance)
        )
    if limits is not None:
        extra["limits"] = limits
    if groups is not None:
        extra["groups"] = groups
    if sizing is not None:
        extra["sizing"] = Sizing.of(sizing) if isinstance(sizing, str) else sizing
    if time is not None:
        extra["time"] = time
    if expert_bytes is not None:
        extra["expert_bytes_L"] = expert_bytes
    if current is not None and not repair:
        extra["current"] = Placement.of(current, load.shape[2])
    problem = Problem(
        loads=load,
        topology=topology,
        model=spec,
        split=split,
        fill=fill,
        share_entries=share_entries,
        name=name,
        **extra,
    )
    if current is None or not repair:
        return problem
    return problem.replace(current=Placement.repaired(current, problem.experts, problem.capacity_LG))


def _live_from(
    path: str | PathLike[str], loads: Loads, topology: Topology, model: ModelSpec | None, *, broken: bool
) -> Any:
    """What is live, from the file of a plan or of any engine."""
    found = read_map(path, broken=broken)
    with named(path):
        layers = wanted_layers(found, loads.layers, model)
        gpus = topology.gpus if found.gpus is None else found.gpus
        if broken:
            return found.slots(gpus=gpus, layers=layers)[0]
        experts = found.experts if found.engine == OURS else loads.shape[2]
        return found.placement(gpus=gpus, experts=experts, layers=layers)


def plan(
    loads: ArrayLike | Loads | str | PathLike[str],
    topology: Topology | str | Mapping[str, Any],
    *,
    current: Any = None,
    model: ModelSpec | str | None = None,
    split: str = "fractional",
    fill: str = "none",
    share_entries: int | None = None,
    solver: str = "auto",
    balance_tolerance: float | None = None,
    objective: Objective | None = None,
    limits: Limits | None = None,
    groups: Groups | None = None,
    sizing: Sizing | str | None = None,
    time: TimeModel | None = None,
    expert_bytes: ArrayLike | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    name: str = "",
    repair: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Plan:
    """Decide how many replicas each expert gets, where they live, and which share of the tokens each serves.

    Parameters
    ----------
    loads : array [L, E] or [T, L, E], data frame, Loads, or path
        Token-expert pairs per layer and expert, of one forward pass or window; with a leading axis,
        several scenarios. A path is read as a recording (see `read_loads`); a data frame with columns layer,
        expert and count is a table.
    topology : Topology, str or mapping
        The GPUs; a preset's name; or the JSON form.
    current : Plan, Placement, array [L, G, C] or path (of a plan or an engine's map), optional
        What is live now: the plan then moves as little as it can.
    model : ModelSpec or str, optional
        Gives the bytes of an expert.
    split : {"fractional", "equal"}
        Whether token shares are free, or even over the replicas of an expert.
    fill : {"none", "distinct", "copies"}
        Whether every slot must be full: without an expert twice on a GPU, or with second copies allowed. With
        an equal split each of an expert's n slots serves one n-th of its tokens.
    share_entries : int, optional
        Free shares are to be multiples of one in so many, for an engine whose dispatch table has so many
        entries for an expert (see `share_table`).
    solver : str
        Name in the registry.
    balance_tolerance : float, default 0.01
        A layer's largest GPU time may be this share above its lower bound where another objective
        gains by it (fewer moves, when `current` is given).
    objective, limits, groups, sizing, time : optional
        See `Objective`, `Limits`, `Sizing` and `TimeModel`.
    expert_bytes : int or array [L], optional
        Bytes of one replica; overrides the model's.
    time_limit : float, optional
        Seconds. Without one the solver ends by itself, quickly.
    seed : int
        For the random parts; the same seed gives the same plan on every machine.
    name : str
        For people.
    repair : bool
        Accept a `current` that breaks the rules (an unknown expert, more than fits, an expert without a
        replica) and mend it with the least change, instead of refusing it.
    progress : callable, optional
        Called with `Progress` objects.
    **options
        Passed to the solver.

    Returns
    -------
    Plan
        Verified independently of the solver.

    Raises
    ------
    ProblemError
        If an argument is malformed.
    InfeasibleError
        If no placement fits the caps.

    Examples
    --------
    >>> import moeless_opt as mo
    >>> best = mo.plan([[600, 560, 120, 120, 20, 10, 10, 10]], mo.uniform(1, 8, slots=2))
    >>> float(best.imbalance_L[0].round(6)), best.certificate.status.value
    (1.0, 'optimal')
    """
    problem = make_problem(
        loads,
        topology,
        current=current,
        model=model,
        split=split,
        fill=fill,
        share_entries=share_entries,
        balance_tolerance=balance_tolerance,
        objective=objective,
        limits=limits,
        groups=groups,
        sizing=sizing,
        time=time,
        expert_bytes=expert_bytes,
        name=name,
        repair=repair,
    )
    result = solve(problem, solver, time_limit=time_limit, seed=seed, progress=progress, **options)
    if result.plan is None:
        raise InfeasibleError(result.message or f"solver {solver!r} found no plan ({result.status.value})")
    return result.plan


def solve(
    problem: Problem,
    solver: str | Solver = "auto",
    *,
    time_limit: float | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    initial: Plan | None = None,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Result:
    """Solve a problem and verify the plan.

    Parameters
    ----------
    problem : Problem
        What to solve.
    solver : str or Solver
        Name in the registry (``solver_names()``), or a solver itself.
    time_limit : float, optional
        Seconds.
    stop : Stop, optional
        A further stopping criterion.
    seed : int
        For the random parts.
    initial : Plan, optional
        A plan to start from and to beat: what is returned is never worse by the problem's objective. One that
        breaks a rule of the problem is left aside; the published baselines take none.
    progress : callable, optional
        Called with `Progress` objects.
    **options
        Passed to the solver.

    Returns
    -------
    Result

    Raises
    ------
    InfeasibleError
        If the caps leave no room, before anything is solved.
    ProblemError
        If an argument is malformed or an option is none of the solver's.
    UnsupportedFeatureError
        If the solver lacks a feature that the problem needs.
    SolverUnavailableError
        If there is no such solver.
    InvalidPlanError
        If the plan fails verification (a bug in the solver).
    """
    if not isinstance(problem, Problem):
        raise ProblemError("problem", f"is {type(problem).__name__}, must be a Problem")
    _check_run(time_limit, stop, seed, progress)
    chosen = _solver_of(solver)
    if problem.limits.bounds_moves and problem.current is None:
        raise ProblemError("limits", "bound moves, but nothing is live to move from: give `current`")
    if problem.objective.horizon is not None and problem.current is None:
        raise ProblemError(
            "objective.horizon", "weighs moves against time, but nothing is live to move from: give `current`"
        )
    require(chosen, problem)
    problem.check_feasible()
    stops: list[Stop] = [] if stop is None else [stop]
    if time_limit is not None:
        stops.append(MaxTime(time_limit))
    until: Stop = stops[0] if len(stops) == 1 else FirstOf(*stops) if stops else NeverStop()
    result = chosen.solve(problem, stop=until, seed=int(seed), initial=initial, progress=progress, **options)
    if result.plan is not None:
        verify(problem, result.plan)
    return result


def _check_run(time_limit: object, stop: object, seed: object, progress: object) -> None:
    """Refuse arguments of a solve that are of another kind."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ProblemError("seed", f"is {seed!r}, must be a whole number of at least 0")
    good = isinstance(time_limit, int | float | np.integer | np.floating) and not isinstance(time_limit, bool)
    if time_limit is not None and not (good and time_limit > 0):  # type: ignore[operator]
        raise ProblemError("time_limit", f"is {time_limit!r}, must be above 0 (seconds)")
    if stop is not None and not (callable(stop) and hasattr(stop, "remaining")):
        raise ProblemError("stop", f"is {type(stop).__name__}, must be a Stop: callable, with `remaining`")
    if progress is not None and not callable(progress):
        raise ProblemError("progress", f"is {type(progress).__name__}, must be callable")


def _solver_of(solver: str | Solver) -> Solver:
    if isinstance(solver, str):
        return get_solver(solver)
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise ProblemError("solver", f"is {solver!r}, must be a name of `solver_names()` or a Solver object")
    return solver


def compare(
    problem: Problem,
    solvers: Iterable[str | Solver] = ("static", "eplb", "moeless", "auto", BOUND_ROW),
    *,
    time_limit: float | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Solve a problem with several solvers, side by side.

    A solver that cannot take the problem gets a row that says why.

    Parameters
    ----------
    problem : Problem
        What to solve.
    solvers : iterable of str or Solver
        Names in the registry, or solvers themselves; ``"oracle"`` for a row of perfect balance, which is a
        bound and no plan.
    time_limit : float, optional
        Seconds for each.
    stop, seed, progress
        As in `solve`.

    Returns
    -------
    Comparison
        Prints as a table; ``.rows`` has the figures, ``.results`` the Results by name.
    """
    _check_run(time_limit, stop, seed, progress)
    asked_for = list(solvers)
    for one in asked_for:
        if one != BOUND_ROW:
            _solver_of(one)  # a wrong name is an error of the caller, not a row
    problem.check_feasible()
    results: dict[str, Result] = {}
    rows = []
    for one in asked_for:
        name = one if isinstance(one, str) else one.name
        if name == BOUND_ROW:
            rows.append(bound_row(problem))
            continue
        try:
            asked = _without_order(problem) if name in PUBLISHED else problem
            result = solve(asked, one, time_limit=time_limit, stop=stop, seed=seed, progress=progress)
            if asked is not problem and result.plan is not None:
                result = result.replace(problem=problem, plan=result.plan.replace(made_for=problem))
        except (UnsupportedFeatureError, SolverUnavailableError, ProblemError, InfeasibleError) as error:
            proven = isinstance(error, InfeasibleError)
            status = Status.INFEASIBLE if proven else Status.NO_SOLUTION
            result = Result(problem=problem, plan=None, status=status, solver=name, message=str(error))
        results[name] = result
        rows.append(row_of(result))
    return Comparison(problem=problem, rows=tuple(rows), results=results)


def _without_order(problem: Problem) -> Problem:
    """The problem for a published method: refused any order elsewhere, it is here to be held against."""
    if problem.objective.priorities == PRIORITIES:
        return problem
    return problem.replace(objective=problem.objective.replace(priorities=PRIORITIES))


def warm_up() -> bool:
    """Load the compiled kernels of constructions and re-plans; later ones use them where that is quicker.

    Some minutes at the first call in an installation, when Numba compiles them; a second or two in later
    processes. Plans are the same with and without.

    Returns
    -------
    bool
        Whether there is Numba (the extra ``fast``).
    """
    from moeless_opt.solvers.locality import warm_locality
    from moeless_opt.solvers.nearest import warm_nearest
    from moeless_opt.solvers.pack import fast
    from moeless_opt.solvers.replan import warm_equal
    from moeless_opt.solvers.shares import warm_entries
    from moeless_opt.solvers.timed import warm_timed

    warm = (fast.warm, warm_equal, warm_entries, warm_nearest, warm_locality, warm_timed)
    return all(one() for one in warm)


def recommend_redundancy(
    loads: ArrayLike | Loads | str | PathLike[str],
    topology: Topology | str | Mapping[str, Any],
    *,
    model: ModelSpec | str | None = None,
    totals: Iterable[int] | None = None,
    stop: Stop | None = None,
    progress: ProgressCallback | None = None,
) -> list[Redundancy]:
    """How many redundant experts a model is worth, in which layers, and what they buy.

    Parameters
    ----------
    loads, topology, model
        As in `plan`; slots and memory of the topology are not looked at, they are what is asked for. Of
        several scenarios the mean loads count.
    totals : iterable of int, optional
        Totals of spare replicas over all layers to look at; by default half a replica per layer, doubling.
    stop : Stop, optional
        When to be content with the totals looked at so far (the first one is in any case).
    progress : callable, optional
        Called with `Progress` objects.

    Returns
    -------
    list of Redundancy
        Per total: where the replicas go (``spare_L``), their memory, the imbalance with an equal split, the
        least that any spending could have, and the imbalance if every layer got the same number.
    """
    from moeless_opt.solvers.sizing import redundancy_rows

    problem = make_problem(loads, topology, model=model)
    sized = problem.bytes_L if problem.bytes_L.any() else None
    wanted = None if totals is None else list(totals)
    alive_G = problem.capacity_LG.max(0) > 0
    speed_G = problem.topology.speed_G[alive_G]
    return redundancy_rows(
        problem.load_LE, speed_G, bytes_L=sized, totals=wanted, stop=stop, progress=progress
    )


def judge(problem: Problem, plan: Plan) -> tuple[Plan, Plan]:
    """What a plan that was made for other loads is worth on these.

    Parameters
    ----------
    problem : Problem
        Today's loads, with the GPUs that the plan is live on.
    plan : Plan
        What is live.

    Returns
    -------
    as_it_is, at_best : Plan
        The same placement with the plan's own token shares, and with the best ones for these loads.
        Neither is verified: `violations` tells what rules of the problem they break.

    Raises
    ------
    ProblemError
        If the plan is for other layers, GPUs or experts than the problem.
    """
    have = (*plan.slots_LGC.shape[:2], plan.experts)
    want = (problem.layers, problem.topology.gpus, problem.experts)
    if have != want:
        raise ProblemError(
            "plan",
            "is for {} layers, {} GPUs and {} experts; the problem has {}, {} and {}".format(*have, *want),
        )
    slots_LGC, began = plan.slots_LGC, Clock.begin()
    name = plan.certificate.solver
    shares = (plan.share_LGC, best_shares(problem, slots_LGC))
    if problem.split != "fractional":
        shares = (shares[1],) * 2
    kept, best = (
        finish(problem, Built(slots_LGC=slots_LGC, share_LGC=share_LGC), solver=name, began=began)
        for share_LGC in shares
    )
    return kept, best


def export_model(problem: Problem, path: str | PathLike[str], *, layer: int | None = None) -> None:
    """Write one layer's exact mixed-integer model as ``.lp`` or ``.mps``, for any solver.

    Parameters
    ----------
    problem : Problem
        What is to be solved.
    path : path
        Where to; its suffix tells the format.
    layer : int, optional
        The model's own index of the layer; the first by default.

    Raises
    ------
    ProblemError
        If there is no such layer, the suffix is neither, the file cannot be written, slots must be
        full, or shares whole entries.
    """
    from moeless_opt.solvers.exact import layer_of, write_model

    if problem.fill != "none":
        raise ProblemError("fill", f"is {problem.fill!r}, must be 'none': the model may leave slots empty")
    if problem.share_entries is not None:
        raise ProblemError("share_entries", f"is {problem.share_entries}, must be None: the model's are free")
    layers = problem.loads.layers
    if layer is not None and layer not in layers:
        raise ProblemError("layer", f"is {layer}, must be one of the problem's: {layers[0]} to {layers[-1]}")
    row = 0 if layer is None else layers.index(layer)
    one = layer_of(
        problem.load_LE[row],
        problem.capacity_LG[row],
        problem.topology.speed_G,
        problem.split,
        max_replicas=problem.limits.max_replicas,
        min_replicas=problem.limits.min_replicas,
    )
    write_model(one, path)
