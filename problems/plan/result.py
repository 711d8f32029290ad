"""What came of a solve: the plan, its status, and why the search ended; and the lines told meanwhile."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeless_opt.problems.arrays import Record
from moeless_opt.problems.plan.objective import objective_vector
from moeless_opt.problems.plan.plan import Plan, Status
from moeless_opt.problems.spec import Problem
from moeless_opt.problems.text import html_facts

__all__ = ["Progress", "ProgressCallback", "Result", "StoppedBy"]


class StoppedBy(enum.StrEnum):
    """What ended a search before it ended by itself; falsy where nothing did."""

    NOTHING = ""
    TIME = "time"
    GAP = "gap"
    INTERRUPT = "interrupt"
    CALLER = "caller"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Progress(Record):
    """One line of a solver's report: time so far, best value, bound."""

    seconds: float
    best: float
    bound: float
    done: float = 0.0
    """Share of the work that is done, 0 to 1, or 0 where nobody can tell."""
    note: str = ""


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result(Record):
    """How a solve went.

    Parameters
    ----------
    problem : Problem
        What was solved.
    plan : Plan or None
        The best plan found; None if there is none.
    status : Status
        How it ended.
    stopped_by : StoppedBy
        The limit that ended it: ``""`` (it finished), ``"time"``, ``"interrupt"``, ``"gap"``, ...
    seconds : float
        Wall time.
    solver : str
        Name in the registry.
    options : mapping
        Options that the solver was called with.
    seed : int
        Random seed.
    message : str
        For people, such as which cap binds.
    """

    problem: Problem
    plan: Plan | None
    status: Status
    stopped_by: StoppedBy = StoppedBy.NOTHING
    seconds: float = 0.0
    solver: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    message: str = ""

    def __repr__(self) -> str:
        title = f" on {self.problem.name}" if self.problem.name else ""
        ended = f", stopped by {self.stopped_by}" if self.stopped_by else ""
        what = f": {self.message}" if self.message else ""
        if self.plan is not None:
            what = f", imbalance {self.plan.imbalance_L.mean():.4f}, gap {self.gap:.3%}{what}"
        return f"Result({self.solver}{title}: {self.status.value}{ended}{what} in {self.seconds:.3g} s)"

    def _repr_html_(self) -> str:
        facts = [("status", self.status.value), ("time", f"{self.seconds:.3g} s")]
        if self.stopped_by:
            facts.append(("stopped by", self.stopped_by.value))
        if self.plan is not None:
            facts += [
                ("imbalance, mean", f"{self.plan.imbalance_L.mean():.4f}"),
                ("imbalance, worst", f"{self.plan.imbalance_L.max():.4f}"),
                ("gap to the bound", f"{self.gap:.3%}"),
            ]
            facts += [(name, f"{value:.6g}") for name, value in self.objective.items()]
        if self.message:
            facts.append(("note", self.message))
        return html_facts(facts, f"Result of {self.solver} {self.problem.name}".rstrip())

    @property
    def objective(self) -> dict[str, float]:
        """The whole vector: balance, moves, traffic, memory (see `objective_vector`)."""
        if self.plan is None:
            return {}
        return objective_vector(self.problem, self.plan)

    @property
    def lower_bound(self) -> float:
        """Bound on the sum over the layers of the largest GPU time."""
        return float("nan") if self.plan is None else float(self.plan.certificate.lower_bound_L.sum())

    @property
    def gap(self) -> float:
        """Relative distance of the plan from the bound, at most."""
        return float("nan") if self.plan is None else self.plan.certificate.gap
