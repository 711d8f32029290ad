"""GPUs that fail, leave and join: what is live on the others, what to load first, and the order of it.

`repair` answers a failure in two plans: the first brings back every expert that nobody holds, by the fewest
loads, and is there in milliseconds; the second balances. `drain` empties GPUs that are to leave while they
still serve, so that their experts come from them and not from the host; `expand` takes new GPUs in.

GPUs keep their numbers: one that is lost or drained has no slots any more, and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.api import as_loads, solve
from moeless_opt.fronts import checked_schedule
from moeless_opt.problems.arrays import IntArray, Record, SlotArray, integers
from moeless_opt.problems.errors import InfeasibleError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.plan import Migration, Plan, Survival, survival_of
from moeless_opt.problems.spec import Limits, Loads, Placement, Problem, Sizing, SizingPolicy, Topology, span
from moeless_opt.problems.text import bytes_text
from moeless_opt.report import ratio_text
from moeless_opt.solvers.core import Clock, but_moves

__all__ = ["Repair", "Resize", "drain", "expand", "limits_left", "repair", "survival"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repair(Record):
    """What a failure asks for: coverage first, then balance.

    Parameters
    ----------
    lost : tuple of int
        GPUs that are gone.
    missing : int
        Experts, over all layers, that have no live replica.
    spread : int
        Failure domains that every expert is to reach on the GPUs that are left; less than was asked for where
        they have no room or are too few.
    coverage : Plan
        Every expert back, by the fewest moves; of ``coverage.made_for``.
    plan : Plan
        Balanced, from there; of ``plan.made_for``. The same as `coverage` where balance was not asked for,
        or there is none.
    seconds : (float, float)
        Time to plan each.
    trouble : str
        Why there is no balanced plan though one was asked for; or that coverage alone leaves groups aside.
    """

    lost: tuple[int, ...]
    missing: int
    spread: int
    coverage: Plan
    plan: Plan
    seconds: tuple[float, float]
    trouble: str = ""

    def schedules(self) -> tuple[Migration, Migration]:
        """The order of the transfers that restore coverage, and of those that balance, each checked."""
        first = _order(self.coverage)
        if self.plan is self.coverage:
            return first, Migration(steps=(), seconds=0.0, lower_bound=0.0, peak_G=first.peak_G)
        return first, _order(self.plan)

    def __str__(self) -> str:
        which = f"GPU {span(self.lost)} is" if len(self.lost) == 1 else f"GPUs {span(self.lost)} are"
        lines = [f"{which} lost: {self.missing} experts have no live replica"]
        stages = [("coverage", self.coverage), ("balance", self.plan)]
        for (name, plan), seconds in zip(stages, self.seconds, strict=True):
            size = f" ({bytes_text(plan.moves.bytes)})" if plan.moves.bytes else ""
            lines.append(
                f"{name}: {plan.moves.count} replicas{size} to move, imbalance "
                f"{ratio_text(plan.imbalance_L.mean())} (worst layer {ratio_text(plan.imbalance_L.max())}), "
                f"planned in {seconds * 1e3:.3g} ms"
            )
            if self.plan is self.coverage:
                break
        lines += [self.trouble] if self.trouble else []
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resize(Record):
    """A plan for more GPUs or fewer, and the way there.

    Parameters
    ----------
    plan : Plan
        On the GPUs that there will be; of ``plan.made_for``.
    schedule : Migration
        The ordered transfers; GPUs that leave serve as sources until the end.
    """

    plan: Plan
    schedule: Migration

    def __str__(self) -> str:
        return f"{self.plan!r}\n{self.schedule!r}"


def repair(
    plan: Plan | Placement,
    lost: Sequence[int],
    *,
    problem: Problem | None = None,
    loads: ArrayLike | Loads | None = None,
    balance: bool = True,
    max_moves: int | None = None,
    **options: Any,
) -> Repair:
    """Plan again after the loss of some GPUs: coverage first, by the fewest bytes, then balance.

    Parameters
    ----------
    plan : Plan or Placement
        What was live when they failed.
    lost : sequence of int
        The GPUs that are gone.
    problem : Problem, optional
        What the plan is for; needed for a placement, and where the plan was read from a file.
    loads : array [L, E] or Loads, optional
        Loads to plan for; the problem's by default.
    balance : bool
        Whether to balance after coverage is restored.
    max_moves : int, optional
        Replicas that balancing may move.
    **options
        To the solver that balances (``solver``, ``time_limit``, ``seed``, ...; see `solve`).

    Returns
    -------
    Repair

    Raises
    ------
    InfeasibleError
        If the GPUs that are left cannot hold every expert; it says how many are too many.
    ProblemError
        If an argument is malformed.

    Examples
    --------
    >>> import moeless_opt as mo
    >>> live = mo.plan([[4, 3, 2, 1]], mo.uniform(1, 4, slots=2))
    >>> found = mo.repair(live, [2])
    >>> int((found.plan.slots_LGC[0, 2] >= 0).sum()), found.plan.moves.count >= 0
    (0, True)
    """
    began = Clock.begin()
    given = _problem_of(plan, problem, loads)
    gone_X = _gpus("lost", lost, high=given.topology.gpus - 1)
    slots_LGC = plan.slots_LGC.copy()
    slots_LGC[:, gone_X] = -1
    left = _without(given, gone_X)
    live = Placement(slots_LGC=slots_LGC, experts=given.experts, partial=True)
    missing = int((live.replicas_LE == 0).sum())
    live = live if missing else live.replace(partial=False)
    limits = left.limits.replace(max_moves=max_moves)
    balanced = left.replace(limits=limits, known=None)
    coverage = _covered(left, balanced.replace(current=live), options)
    covered_after = began.seconds
    found, trouble = coverage, ""
    if balance:
        current = Placement(slots_LGC=coverage.slots_LGC, experts=given.experts)
        try:
            found = _solved(balanced.replace(current=current), **options)
        except InfeasibleError as error:  # coverage there is all the same
            trouble = f"no balanced plan: {error}"
    elif left.groups is not None and left.groups.max_outside < 1:
        trouble = "coverage does not look at groups: they come home when it is balanced"
    return Repair(
        lost=tuple(np.unique(gone_X).tolist()),
        missing=missing,
        spread=left.limits.spread,
        coverage=coverage,
        plan=found,
        seconds=(covered_after, began.seconds - covered_after),
        trouble=trouble,
    )


def _covered(left: Problem, whole: Problem, options: dict[str, Any]) -> Plan:
    """Every expert back; where that needs a place for everything at once, by the plan of the `whole`."""
    assert whole.current is not None
    aid = _first_aid(left, whole.current)
    if aid.sizing.policy != SizingPolicy.MEMORY:
        return _solved(aid, solver="cover")
    try:
        return _solved(aid, solver="cover")
    except (InfeasibleError, UnsupportedFeatureError):  # replicas may have to make room for one another
        return _solved(whole, **options)


def _first_aid(left: Problem, live: Placement) -> Problem:
    """What coverage is of.

    Nothing of nearness (groups come home, and costs count, when there is time to balance), nor of how many
    replicas are worth their bytes.
    """
    return left.replace(
        current=live,
        sizing=left.sizing if left.sizing.policy in (SizingPolicy.FILL, SizingPolicy.MEMORY) else Sizing(),
        objective=left.objective.replace(horizon=None, priorities=("balance", "moves")),
        groups=None,
        known=None,
    )


def drain(
    plan: Plan | Placement,
    gpus: Sequence[int],
    *,
    problem: Problem | None = None,
    loads: ArrayLike | Loads | None = None,
    **options: Any,
) -> Resize:
    """Plan for the others, and the order in which some GPUs hand over what they hold before they leave.

    Parameters
    ----------
    plan : Plan or Placement
        What is live.
    gpus : sequence of int
        The GPUs that are to leave.
    problem, loads
        As in `repair`.
    **options
        To `solve`.

    Raises
    ------
    InfeasibleError
        If the others cannot hold every expert, or have no room to receive what has to come.
    """
    given = _problem_of(plan, problem, loads)
    leave_X = _gpus("gpus", gpus, high=given.topology.gpus - 1)
    slots_LGC = plan.slots_LGC.copy()
    slots_LGC[:, leave_X] = -1
    left = _without(given, leave_X)
    live = Placement(slots_LGC=slots_LGC, experts=given.experts, partial=True)
    if live.replicas_LE.all():
        live = live.replace(partial=False)
    found = _solved(left.replace(current=live, known=None), **options)
    # Until they leave, they hold and send what they have.
    return Resize(plan=found, schedule=_way(given, plan.slots_LGC, found.slots_LGC))


def expand(
    plan: Plan | Placement,
    topology: Topology,
    *,
    problem: Problem | None = None,
    loads: ArrayLike | Loads | None = None,
    **options: Any,
) -> Resize:
    """Plan for more GPUs, with few moves from what is live, and the order of the transfers.

    Parameters
    ----------
    plan : Plan or Placement
        What is live.
    topology : Topology
        The GPUs as they will be: those of the plan first, in order, then the new ones.
    problem, loads
        As in `repair`.
    **options
        To `solve`.

    Raises
    ------
    ProblemError
        If the topology has fewer GPUs than the plan.
    """
    if not isinstance(topology, Topology):
        raise ProblemError("topology", f"is {type(topology).__name__}, must be a Topology")
    given = _problem_of(plan, problem, loads)
    before, after = plan.slots_LGC.shape[1], topology.gpus
    if after < before:
        raise ProblemError(
            "topology", f"has {after} GPUs, what is live has {before}: `drain` is for those that leave"
        )
    layers, _, wide = plan.slots_LGC.shape
    slots_LGC = np.full((layers, after, wide), -1, dtype=np.int32)
    slots_LGC[:, :before] = plan.slots_LGC
    current = Placement(slots_LGC=slots_LGC, experts=given.experts)
    found = _solved(given.replace(topology=topology, current=current, known=None), **options)
    assert not isinstance(found.made_for, str)
    return Resize(plan=found, schedule=_way(found.made_for, slots_LGC, found.slots_LGC))


def survival(plan: Plan, *, failures: int = 3, topology: Topology | None = None, seed: int = 0) -> Survival:
    """The probability that no expert is lost when failure domains fail, 1 to `failures` of them at once.

    Parameters
    ----------
    plan : Plan
        The placement.
    failures : int
        Most domains that fail at once.
    topology : Topology, optional
        The GPUs and their failure domains; needed where the plan was read from a file. With each GPU a domain
        (``domain_G=range(G)``) single GPUs fail.
    seed : int
        Of the sets of domains that are drawn where there are too many to look at.

    Examples
    --------
    >>> import moeless_opt as mo
    >>> topology = mo.uniform(2, 2, slots=3)
    >>> plan = mo.plan([[4, 3, 2, 1]], topology, limits=mo.Limits(spread=2))
    >>> mo.survival(plan, failures=2).chance_K
    (1.0, 0.0)
    """
    if topology is None:
        if isinstance(plan.made_for, str):
            raise ProblemError("topology", "is missing: a plan that was read from a file does not have it")
        topology = plan.made_for.topology
    if topology.gpus != plan.slots_LGC.shape[1]:
        raise ProblemError(
            "topology", f"has {topology.gpus} GPUs, the plan {plan.slots_LGC.shape[1]}; must be the same"
        )
    given = plan.slots_LGC, plan.experts, topology.failure_domain_G
    return survival_of(*given, failures=failures, seed=seed)


def _gpus(where: str, gpus: object, high: int) -> IntArray:
    if isinstance(gpus, str) or not isinstance(gpus, Iterable):
        raise ProblemError(where, f"is {gpus!r}, must be a list of GPUs")
    return integers(where, list(gpus), high=high)


def _problem_of(plan: Plan | Placement, problem: Problem | None, loads: ArrayLike | Loads | None) -> Problem:
    """What a plan is for, without anything live, with other loads where they are given."""
    if not isinstance(plan, Plan | Placement):
        raise ProblemError("plan", f"is {type(plan).__name__}, must be a Plan or a Placement")
    given = plan.made_for if problem is None and isinstance(plan, Plan) else problem
    if not isinstance(given, Problem):
        raise ProblemError(
            "problem",
            "is missing: a plan that was read from a file (or a placement) does not have its problem",
        )
    want, have = (given.layers, given.topology.gpus, given.experts), (*plan.slots_LGC.shape[:2], plan.experts)
    if want != have:
        raise ProblemError(
            "plan",
            "is for {} layers, {} GPUs and {} experts; the problem has {}, {} and {}".format(*have, *want),
        )
    given = given.replace(current=None, limits=but_moves(given.limits), known=None)
    return given if loads is None else given.replace(loads=as_loads(loads))


def _without(problem: Problem, gone_X: IntArray) -> Problem:
    """The problem on the GPUs that are left: no slots on the others, no more domains than have room."""
    topology = problem.topology
    if np.unique(gone_X).size == topology.gpus:
        raise InfeasibleError("topology.gpus: all GPUs are gone; at least one must remain")
    changes: dict[str, Any] = {}
    for key in ("slots_G", "memory_G"):
        if getattr(topology, key) is not None:
            room_G = getattr(topology, key).copy()
            room_G[gone_X] = 0
            changes[key] = room_G
    left = problem.replace(topology=topology.replace(**changes))
    return left.replace(limits=limits_left(left))


def limits_left(problem: Problem) -> Limits:
    """The limits of a problem some of whose GPUs are dead, as far as the others can keep them.

    Without pins on dead GPUs; `spread` and `min_replicas` are as large as asked for, or as the GPUs that are
    left have domains and slots for.
    """
    limits, alive_G = problem.limits, np.asarray(problem.usable_LG.any(0))
    if not alive_G.any():
        return limits
    room_L = np.minimum(problem.capacity_LG, problem.experts).sum(1)
    each = int(room_L.min()) // problem.experts
    least = max(1, min(limits.min_replicas, int(alive_G.sum()), each))
    domain_G = problem.topology.failure_domain_G
    room_LD = np.stack(
        [problem.capacity_LG[:, domain_G == d].sum(1) for d in np.unique(domain_G[alive_G])], 1
    )
    hot_LE = problem.spread_LE > 1
    hot_L = hot_LE.sum(1)
    # An expert counts once in a domain, however many slots there are.
    reach_L = np.minimum(room_LD, hot_L[:, None]).sum(1)
    spread = limits.spread
    while spread > 1:
        need_L = np.maximum(np.where(hot_LE, spread, 1), least).sum(1)
        if spread <= room_LD.shape[1] and (need_L <= room_L).all() and (spread * hot_L <= reach_L).all():
            break
        spread -= 1
    return limits.replace(
        spread=spread,
        min_replicas=least,
        pinned=tuple(pair for pair in limits.pinned if alive_G[pair[2]]),
    )


def _solved(problem: Problem, **options: Any) -> Plan:
    result = solve(problem, **options)
    if result.plan is None:
        raise InfeasibleError(result.message or "no plan was found")
    return result.plan


def _order(plan: Plan) -> Migration:
    problem = plan.made_for
    assert not isinstance(problem, str)
    assert problem.current is not None
    return _way(problem, problem.current.slots_LGC, plan.slots_LGC)


def _way(problem: Problem, before_LGC: SlotArray, after_LGC: SlotArray) -> Migration:
    return checked_schedule(problem, before_LGC, after_LGC).named(problem.loads.layers)
