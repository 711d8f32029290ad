"""The contract of every solver, and the base that keeps it.

A solver says how to build, and nothing else::

    class Mine(Heuristic):
        name, summary = "mine", "what it does, in a line"
        features = frozenset({Feature.EQUAL_SPLIT})     # ours stand in the table of `core.features`
        Options = MyOptions                             # a frozen dataclass

        def build(self, task):
            return Built(slots_LGC=...)                 # or yield better and better ones

The base does the rest, once: options are checked against the dataclass; the clock runs; `stop` is asked
before and between what `build` yields (inside, a long loop asks ``task.stop`` itself, or hands it down); the
best of all that was built and of `initial` is kept, layer by layer where layers are independent; it is
evaluated, bounded and certified; the Result says what ended the search. A search that was stopped before
anything was built says so: a Result without a plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from moeless_opt.problems.errors import InvalidPlanError, ProblemError
from moeless_opt.problems.plan import Plan, Progress, ProgressCallback, Result, Status, StoppedBy, violations
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core.compare import best_of
from moeless_opt.solvers.core.features import FEATURES, Feature
from moeless_opt.solvers.core.filling import filled, with_plain_live
from moeless_opt.solvers.core.finish import Built, finish, kept_in_place
from moeless_opt.solvers.core.options import NoOptions, read_options
from moeless_opt.solvers.core.slack import without_slack
from moeless_opt.solvers.core.stopping import Clock, FirstOf, MaxTime, Stop
from moeless_opt.solvers.core.units import back_in_units, in_usual_units
from moeless_opt.solvers.shares import best_shares

__all__ = ["Heuristic", "Solver", "Task"]

Chosen = TypeVar("Chosen")


@runtime_checkable
class Solver(Protocol):
    """What the registry holds, and what third parties register (entry points ``moeless_opt.solvers``)."""

    name: str
    summary: str
    features: frozenset[Feature]

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Solve, and return the best of what was found and of `initial`, where that is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[Chosen]):
    """What a solver is asked to do.

    Parameters
    ----------
    problem : Problem
        What to solve.
    options : dataclass
        The solver's own, checked.
    stop : Stop
        Ask it in every long loop, or hand it to the kernel that loops.
    seed : int
        For the random parts.
    initial : Built, optional
        A valid plan to start from; the base keeps it where nothing better is built.
    began : Clock
        When the solve began.
    progress : callable, optional
        Where `report` goes.
    """

    problem: Problem
    options: Chosen
    stop: Stop
    seed: int
    initial: Built | None
    began: Clock
    progress: ProgressCallback | None

    def report(self, best: float, bound: float, *, done: float = 0.0, note: str = "") -> None:
        """Tell how far the search is: best value and bound so far, share of the work done."""
        if self.progress is not None:
            self.progress(Progress(seconds=self.began.seconds, best=best, bound=bound, done=done, note=note))


class Heuristic(ABC):
    """Base of the solvers: `build` is theirs, all else is here.

    Parameters
    ----------
    name : str, optional
        What the results are to call it, where that is not its own name.
    """

    name: str
    summary: str
    features: frozenset[Feature] = frozenset()
    Options: ClassVar[type[Any]] = NoOptions
    """The frozen dataclass of its options."""
    refuses_initial: ClassVar[str] = ""
    """Why it takes no plan to start from; empty if it does."""
    patience: ClassVar[float] = float("inf")
    """Seconds after which it ends where nobody gives a limit."""

    def __init_subclass__(cls) -> None:
        """Take the features from the table, where the class does not bring its own."""
        own = cls.__dict__
        if "features" not in own and own.get("name") in FEATURES:
            cls.features = FEATURES[own["name"]]

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            self.name = name

    @abstractmethod
    def build(self, task: Task[Any]) -> Built | Iterable[Built]:
        """Build a placement that is valid for ``task.problem``, or several, one after the other."""

    def unused(self, problem: Problem) -> Mapping[str, str]:
        """Options that are of no use for this problem, and why; given all the same, they are refused."""
        return {}

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Solve a problem.

        Parameters
        ----------
        problem : Problem
            What to solve.
        stop : Stop
            When to end; asked in every long loop.
        seed : int
            For the random parts: the same seed gives the same plan.
        initial : Plan, optional
            A plan to start from and to beat. One that breaks a rule of the problem is left aside.
        progress : callable, optional
            Called with `Progress` objects.
        **options
            Fields of the solver's `Options`.

        Raises
        ------
        ProblemError
            If an option is unknown, out of range or of no use here, or `initial` is not of this problem's
            shape or not taken.
        InfeasibleError
            If the rules leave no placement.
        """
        began = Clock.begin()
        chosen = read_options(self.Options, options, self.name)
        for name, why in self.unused(problem).items():
            if name in options:
                raise ProblemError(name, f"is of no use to solver {self.name!r} {why}")
        start = None if initial is None else self._start(problem, initial)
        if self.patience < float("inf") and stop.remaining == float("inf"):
            stop = FirstOf(stop, MaxTime(self.patience))
        task: Task[Any] = Task(
            problem=with_plain_live(without_slack(problem)),
            options=chosen,
            stop=stop,
            seed=seed,
            initial=start,
            began=began,
            progress=progress,
        )
        best, stopped_by = self._search(task)
        asked = asdict(chosen)
        if best is None:
            return Result(
                problem=problem,
                plan=None,
                status=Status.NO_SOLUTION,
                stopped_by=stopped_by,
                seconds=began.seconds,
                solver=self.name,
                options=asked,
                seed=seed,
                message=f"nothing was found before the search was stopped ({stopped_by})",
            )
        best = kept_in_place(problem, best)
        plan = self.finished(problem, finish(problem, best, solver=self.name, began=began))
        status = plan.certificate.status
        return Result(
            problem=problem,
            plan=plan,
            status=status,
            stopped_by=StoppedBy.NOTHING if status is Status.OPTIMAL else stopped_by,
            seconds=began.seconds,
            solver=self.name,
            options=asked,
            seed=seed,
            message=best.message,
        )

    def placed(self, task: Task[Any], problem: Problem, **options: Any) -> Built:
        """What this solver builds for a problem inside another solver's task: same clock, stop and seed."""
        chosen = read_options(self.Options, options, self.name)
        best = self._best(replace(task, problem=problem, options=chosen, initial=None))[0]
        assert best is not None, f"solver {self.name!r} built nothing"
        return best

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The finished plan, with what only this solver can say of it."""
        return plan

    def _search(self, task: Task[Any]) -> tuple[Built | None, StoppedBy]:
        """The best of what is built and of what was given, and what ended the search."""
        problem, factor = in_usual_units(task.problem)
        task = replace(task, problem=problem)
        best: Built | None = None
        stopped_by = task.stop()
        if not stopped_by:
            best, stopped_by = self._best(task)
        if task.initial is not None:
            best = task.initial if best is None else best_of(task.problem, best, task.initial)
        return None if best is None else back_in_units(best, factor), stopped_by

    def _best(self, task: Task[Any]) -> tuple[Built | None, StoppedBy]:
        """The best of what is built, and what cut that short."""
        best, stopped_by = None, StoppedBy.NOTHING
        for one in self._checked(task):
            best = one if best is None else best_of(task.problem, one, best)
            stopped_by = one.stopped_by or task.stop()
            if stopped_by:
                break
        return best, stopped_by if best is not None else task.stop()

    def _checked(self, task: Task[Any]) -> Iterator[Built]:
        """What `build` gives, one by one, if it is what the contract wants.

        Raises
        ------
        InvalidPlanError
            Naming the solver, and what it gave instead.
        """
        built = self.build(task)
        if not isinstance(built, Built | Iterable):
            raise InvalidPlanError([f"solver {self.name!r} built {type(built).__name__}, must be Built"])
        for one in [built] if isinstance(built, Built) else built:
            if wrong := _malformed(task.problem, one):
                raise InvalidPlanError([f"solver {self.name!r} built {wrong}"])
            one = filled(task.problem, one)
            if task.problem.split == "nearest":  # shares follow from the placement, whoever made it
                one = replace(one, share_LGC=best_shares(task.problem, one.slots_LGC))
            yield one.with_shares(task.problem)

    def _start(self, problem: Problem, initial: Plan) -> Built | None:
        """What was given to start from, for this problem; None if it breaks a rule."""
        if not isinstance(initial, Plan):
            raise ProblemError("initial", f"is {type(initial).__name__}, must be a Plan")
        if self.refuses_initial:
            raise ProblemError("initial", f"is not taken by solver {self.name!r}: {self.refuses_initial}")
        have = (*initial.slots_LGC.shape[:2], initial.experts)
        want = (problem.layers, problem.topology.gpus, problem.experts)
        if have != want:
            raise ProblemError(
                "initial",
                "is for {} layers, {} GPUs and {} experts; the problem has {}, {} and {}".format(
                    *have, *want
                ),
            )
        share_LGC = initial.share_LGC
        if problem.split != "fractional":  # by the rule over the replicas, whatever was merged there
            share_LGC = best_shares(problem, initial.slots_LGC)
        built = Built(slots_LGC=initial.slots_LGC, share_LGC=share_LGC).with_shares(problem)
        plan = finish(problem, built, solver=self.name, began=Clock.begin(), certify=False)
        return None if violations(problem, plan) else built


def _malformed(problem: Problem, built: object) -> str:
    """What is wrong with the form of something built; whether it is a good plan is the verifier's to say."""
    if not isinstance(built, Built):
        return f"{type(built).__name__}, must be Built"
    slots: object = built.slots_LGC
    layers, gpus, experts = problem.layers, problem.topology.gpus, problem.experts
    if not isinstance(slots, np.ndarray) or slots.dtype.kind != "i":
        return f"slots_LGC as {getattr(slots, 'dtype', type(slots).__name__)}, must be an array of integers"
    if slots.ndim != 3 or slots.shape[:2] != (layers, gpus) or not slots.size:
        return f"slots_LGC of shape {list(slots.shape)}, must be [{layers}, {gpus}, slots]"
    low, high = int(slots.min()), int(slots.max())
    if low < -1 or not 0 <= high < experts:
        return f"slots with experts {low} to {high}, must be 0 to {experts - 1}, or -1 where empty"
    return ""
