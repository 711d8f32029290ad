"""What a change of the live placement means: what moves, how long that takes, and whether it is worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.api import solve
from moeless_opt.fronts import migration
from moeless_opt.problems.errors import MoelessError
from moeless_opt.problems.plan import HOST, Migration, Plan
from moeless_opt.problems.spec import PRIORITIES, Fill, Limits, Problem, Sizing
from moeless_opt.problems.text import bytes_text
from moeless_opt.report import paragraph, seconds_text

__all__ = ["Change", "change_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From the live placement to a plan.

    Parameters
    ----------
    moves, bytes : int
        Replicas that GPUs must load which do not hold them, and their bytes (0 where sizes are unknown).
    inside, between, cold : int
        Of these: from a GPU of the same node, of another, and from the host.
    missing : int
        Experts that no GPU holds at present: without the change the model cannot serve.
    seconds : float or None
        Time of the ordered transfers; None where sizes are unknown or no order is found.
    before, after : float
        Largest GPU times, summed over the layers; `before` is infinite where experts are missing.
    unit : str
        Of the times.
    """

    moves: int
    bytes: int
    inside: int
    between: int
    cold: int
    missing: int
    seconds: float | None
    before: float
    after: float
    unit: str

    @property
    def gain(self) -> float:
        """Share of the time of the MoE layers that is saved; 1 where they cannot serve at present."""
        if np.isinf(self.before):
            return 1.0
        return 1.0 - self.after / self.before if self.before > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON."""
        figures = {name: getattr(self, name) for name in self.__slots__ if name != "unit"}
        figures["gain"] = self.gain
        finite = {
            key: None if value is None or not np.isfinite(value) else value for key, value in figures.items()
        }
        return finite | {"unit": self.unit}

    def __str__(self) -> str:
        return "\n".join(paragraph(line) for line in (self._moves(), self._time(), self._worth()))

    def _moves(self) -> str:
        if self.moves == 0:
            return "what moves: nothing"
        size = f", {bytes_text(self.bytes)}" if self.bytes else ""
        ways = [
            f"{count} {how}"
            for count, how in (
                (self.inside, "inside their node"),
                (self.between, "from another node"),
                (self.cold, "from the host"),
            )
            if count
        ]
        return f"what moves: {self.moves} replicas{size}: {', '.join(ways)}"

    def _time(self) -> str:
        if self.moves == 0:
            return "how long: no time"
        if self.seconds is None:
            return "how long: unknown; the size of an expert (--model NAME) is needed"
        return f"how long: {seconds_text(self.seconds)} of transfers, one after the other on each link"

    def _worth(self) -> str:
        if self.missing:
            return (
                f"is it worth it: {self.missing} experts have no replica; the model cannot serve without it"
            )
        if not self.gain > 0:
            return "is it worth it: no time is saved"
        text = f"is it worth it: MoE layers take {self.gain:.2%} less time"
        if self.moves == 0:
            return text + ", at no cost"
        if self.seconds is None:
            return text
        return text + f"; the transfers have paid after {seconds_text(self.seconds / self.gain)} of it"


def change_of(problem: Problem, plan: Plan) -> Change:
    """The change from what is live in a problem to a plan of it."""
    assert problem.current is not None
    node_G = problem.topology.node_G
    try:
        schedule: Migration | None = migration(problem, plan)
    except MoelessError:  # no order within the memory; the moves are counted all the same
        schedule = None
    found = schedule.transfers if schedule is not None else ()
    cold = sum(one.source == HOST for one in found)
    inside = sum(one.source != HOST and bool(node_G[one.source] == node_G[one.target]) for one in found)
    missing = int((problem.current.replicas_LE == 0).sum())
    seconds = schedule.seconds if schedule is not None and problem.bytes_L.any() else None
    return Change(
        moves=plan.moves.count,
        bytes=plan.moves.bytes,
        inside=inside,
        between=len(found) - cold - inside,
        cold=cold,
        missing=missing,
        seconds=seconds,
        before=np.inf if missing else _staying(problem),
        after=float(plan.certificate.value_L.sum()),
        unit=plan.unit,
    )


def _staying(problem: Problem) -> float:
    """Largest GPU times of what is live, summed over the layers; not a number where nobody can say."""
    assert problem.current is not None
    ordered = np.sort(problem.current.slots_LGC, axis=2)
    copies = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any()
    bare = problem.replace(
        limits=Limits(),
        fill=Fill.COPIES if copies else Fill.NONE,
        sizing=Sizing(),
        objective=problem.objective.replace(horizon=None, priorities=PRIORITIES),
        known=None,
    )
    try:
        plan = solve(bare, "stay").plan
    except MoelessError:
        plan = None
    return float("nan") if plan is None else float(plan.certificate.value_L.sum())
