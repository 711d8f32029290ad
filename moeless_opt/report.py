"""Tables for people: comparisons, the worst layers, solvers, instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.plan import Plan, Result, StoppedBy
from moeless_opt.problems.spec import Problem

__all__ = [
    "BOUND_ROW",
    "Comparison",
    "Row",
    "bound_row",
    "bytes_text",
    "row_of",
    "seconds_text",
    "table",
    "worst_layers",
]

BOUND_ROW = "oracle"
"""What a comparison calls its row of perfect balance."""


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one solver on one problem; None where there is no plan.

    Parameters
    ----------
    solver, status : str
        Who, and how it ended.
    imbalance_mean, imbalance_worst : float
        max / mean GPU time over the layers.
    gap : float
        Distance of the summed largest GPU times from the lower bound, relative.
    replicas, moves : int
        Replicas in all, and those that have to be shipped.
    move_bytes : int
        Their bytes.
    seconds : float
        Time of the solve.
    stopped_by : StoppedBy
        The limit that ended it; empty if none did.
    note : str
        Why there is no plan, or what else to know.
    """

    solver: str
    status: str
    imbalance_mean: float | None
    imbalance_worst: float | None
    gap: float | None
    replicas: int | None
    moves: int | None
    move_bytes: int | None
    seconds: float
    stopped_by: StoppedBy = StoppedBy.NOTHING
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def row_of(result: Result) -> Row:
    """The figures of one Result."""
    plan = result.plan
    if plan is None:
        return Row(
            solver=result.solver,
            status=result.status.value,
            imbalance_mean=None,
            imbalance_worst=None,
            gap=None,
            replicas=None,
            moves=None,
            move_bytes=None,
            seconds=result.seconds,
            stopped_by=result.stopped_by,
            note=result.message,
        )
    return Row(
        solver=result.solver,
        status=result.status.value,
        imbalance_mean=float(plan.imbalance_L.mean()),
        imbalance_worst=float(plan.imbalance_L.max()),
        gap=plan.certificate.gap,
        replicas=plan.replicas,
        moves=plan.moves.count,
        move_bytes=plan.moves.bytes,
        seconds=result.seconds,
        stopped_by=result.stopped_by,
        note=result.message,
    )


def bound_row(problem: Problem) -> Row:
    """Perfect balance, whatever the slots: no plan, but the line that others are measured against.

    It is the "oracle" of MoEless (arXiv 2603.06350).
    """
    time = problem.time
    perfect = float(problem.load_LE.sum() / problem.topology.speed_G.sum())
    unit = "tokens"
    if time.counts_tokens_only:
        perfect, unit = perfect * time.token_cost, time.unit
    return Row(
        solver=BOUND_ROW,
        status="bound",
        imbalance_mean=1.0,
        imbalance_worst=1.0,
        gap=None,
        replicas=None,
        moves=None,
        move_bytes=None,
        seconds=0.0,
        note=f"a bound, not a plan: {perfect:.6g} {unit} over all layers",
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several solvers on one problem; prints as a table.

    Parameters
    ----------
    problem : Problem
        What was solved.
    rows : tuple of Row
        One per solver, in the order asked for.
    results : mapping of str to Result
        The whole Results.
    """

    problem: Problem
    rows: tuple[Row, ...]
    results: Mapping[str, Result]

    def __str__(self) -> str:
        return table(_HEAD, [_cells(row, self.problem) for row in self.rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in _cells(row, self.problem)) + "</tr>"
            for row in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


_HEAD = ("solver", "imbalance", "worst", "gap", "replicas", "moves", "moved", "time", "status")


def _cells(row: Row, problem: Problem) -> list[str]:
    cold = problem.current is None
    return [
        row.solver,
        _number(row.imbalance_mean, ".4f"),
        _number(row.imbalance_worst, ".4f"),
        _number(row.gap, ".3%"),
        _number(row.replicas, "d"),
        "cold" if cold and row.moves is not None else _number(row.moves, "d"),
        bytes_text(row.move_bytes) if row.move_bytes else "-",
        seconds_text(row.seconds),
        row.status + (f": {row.note}" if row.note else ""),
    ]


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def bytes_text(count: int | float) -> str:
    """Render bytes with a unit."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def seconds_text(seconds: float) -> str:
    """Render a duration with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words_last: bool = True) -> str:
    """Lay out cells in columns: the first left, the last left (if it holds words), figures right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    left = (0, len(head) - 1) if words_last else (0,)

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def worst_layers(plan: Plan, count: int = 3) -> str:
    """A table of the layers with the largest imbalance, and what they are bound by."""
    order = np.argsort(-plan.imbalance_L, kind="stable")[:count]
    gap_L = plan.certificate.gap_L
    rows = [
        [
            str(plan.layers[i]),
            f"{plan.imbalance_L[i]:.4f}",
            f"{plan.time_LG[i].max():.6g}",
            f"{plan.certificate.lower_bound_L[i]:.6g}",
            f"{gap_L[i]:.3%}",
            plan.certificate.bound_L[i],
            str(int(plan.time_LG[i].argmax())),
        ]
        for i in order
    ]
    return table(
        ("layer", "imbalance", f"max ({plan.unit})", "bound", "gap", "bound by", "busiest GPU"), rows
    )
