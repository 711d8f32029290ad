"""Tables for people: comparisons, the worst layers, solvers, instances."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.plan import EngineMeasures, Plan, Result, StoppedBy, engine_measures
from moeless_opt.problems.spec import Problem
from moeless_opt.problems.text import bytes_text, html_table, printable
from moeless_opt.solvers.core import perfect_tokens

__all__ = [
    "BOUND_ROW",
    "Comparison",
    "Row",
    "bound_row",
    "gap_text",
    "measured",
    "paragraph",
    "ratio_text",
    "row_of",
    "seconds_text",
    "show",
    "table",
    "terminal_width",
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
    engines : EngineMeasures, optional
        The balance as engines measure it, where there is a plan.
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
    engines: EngineMeasures | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"engines": None if self.engines is None else self.engines.to_dict()}


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
        engines=engine_measures(plan),
    )


def bound_row(problem: Problem) -> Row:
    """Perfect balance, whatever the slots: no plan, but the line that others are measured against.

    It is the "oracle" of MoEless (arXiv 2603.06350).
    """
    time = problem.time
    perfect = float(perfect_tokens(problem).sum())
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
        live = self.problem.current is not None
        head = [name for name in _HEAD if live or name not in _LIVE]
        rows = [_cells(row, live) for row in self.rows]
        whole = table(
            (*head, "status"), [[*cells, _ended(row)] for row, cells in zip(self.rows, rows, strict=True)]
        )
        if max(map(len, whole.splitlines())) <= terminal_width():
            return whole
        short = [[*cells, row.status] for row, cells in zip(self.rows, rows, strict=True)]
        notes = [paragraph(f"{row.solver}: {row.note}") for row in self.rows if row.note]
        return "\n".join([table((*head, "status"), short, width=terminal_width()), *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        live = self.problem.current is not None
        head = [name for name in _HEAD if live or name not in _LIVE]
        whole = html_table((*head, "status"), [[*_cells(row, live), _ended(row)] for row in self.rows])
        told = [(row.solver, *_measures(row.engines)) for row in self.rows if row.engines is not None]
        return whole + html_table(("solver", *_MEASURES), told, "As engines measure it") if told else whole


_HEAD = ("solver", "imbalance", "worst", "gap", "replicas", "moves", "moved", "time")
_LIVE = ("moves", "moved")  # told where something is live


def _cells(row: Row, live: bool) -> list[str]:
    moves = [_number(row.moves, "d"), bytes_text(row.move_bytes) if row.move_bytes else "-"]
    return [
        row.solver,
        "-" if row.imbalance_mean is None else ratio_text(row.imbalance_mean),
        "-" if row.imbalance_worst is None else ratio_text(row.imbalance_worst),
        "-" if row.gap is None else gap_text(row.gap),
        _number(row.replicas, "d"),
        *(moves if live else []),
        seconds_text(row.seconds),
    ]


def _ended(row: Row) -> str:
    return row.status + (f": {row.note}" if row.note else "")


_MEASURES = ("vLLM balancedness", "SGLang balancedness", "TensorRT-LLM ratio", "Ascend mean", "Ascend worst")
"""What engines call their measures of balance, in the order of `_measures`."""


def _measures(found: EngineMeasures) -> list[str]:
    """The balance as engines measure it, as cells of a table."""
    return [ratio_text(value) for value in found.to_dict().values()]


def measured(rows: Sequence[Row]) -> str:
    """The balance of the plans of some rows as engines measure it, as a table; empty without any plan."""
    cells = [[row.solver, *_measures(row.engines)] for row in rows if row.engines is not None]
    if not cells:
        return ""
    head = ("solver", "vLLM", "SGLang", "TensorRT-LLM", "Ascend", "worst")
    return f"balance as engines measure it:\n{table(head, cells, words_last=False, width=terminal_width())}"


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def ratio_text(value: float) -> str:
    """Render an imbalance: of a width that stays, however large."""
    return f"{value:.4f}" if value < 1e5 else f"{value:.4g}"


def gap_text(value: float) -> str:
    """Render a gap in per cent, of a width that stays."""
    return f"{value:.3%}" if value < 1e3 else f"{value * 100:.4g}%"


def seconds_text(seconds: float) -> str:
    """Render a duration with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def paragraph(text: str, indent: str = "") -> str:
    """A paragraph in the terminal's width, its further lines indented by two more."""
    further = indent + "  "
    return textwrap.fill(
        text,
        max(terminal_width(), 40),
        initial_indent=indent,
        subsequent_indent=further,
        break_on_hyphens=False,
    )


def show(text: str) -> None:
    """Print; in a pager where a person's screen is too small for it."""
    text = printable(text, keep="\n")
    screen = shutil.get_terminal_size((80, 24)).lines
    if text.count("\n") + 2 > screen and sys.stdout.isatty() and sys.stdin.isatty():
        import pydoc

        os.environ.setdefault("LESS", "FRX")
        pydoc.pager(text)
    else:
        print(text)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, words_last: bool = True, width: int | None = None
) -> str:
    """Lay out cells in columns: the first left, the last left (if it holds words), figures right.

    With a width, columns are drawn together where it is too narrow, and words in the last one are wrapped.
    """
    rows = [[printable(cell) for cell in line] for line in rows]
    last = len(head) - 1
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    left = (0, last) if words_last else (0,)
    gap = 2
    if width is not None and sum(widths) + gap * last > width:
        gap = 1
        room = max(width - sum(widths[:-1]) - last, 16)
        if words_last and room < widths[-1]:
            widths[-1] = room

    def line(cells: Sequence[str]) -> list[str]:
        parts = (
            textwrap.wrap(cells[last], widths[last]) if words_last and len(cells[last]) > widths[last] else []
        )
        parts = parts or [cells[last]]
        first = [*cells[:last], parts[0]]
        laid = [
            cell.ljust(wide) if i in left else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(first, widths, strict=True))
        ]
        start = " " * (sum(widths[:-1]) + gap * last)
        return [(" " * gap).join(laid).rstrip(), *(start + part for part in parts[1:])]

    rule = (" " * gap).join("-" * wide for wide in widths)
    return "\n".join([*line(head), rule, *(one for row in rows for one in line(row))])


def worst_layers(plan: Plan, count: int = 3) -> str:
    """A table of the layers with the largest imbalance, and what they are bound by."""
    order = np.argsort(-plan.imbalance_L, kind="stable")[:count]
    gap_L = plan.certificate.gap_L
    rows = [
        [
            str(plan.layers[i]),
            ratio_text(plan.imbalance_L[i]),
            f"{plan.certificate.value_L[i]:.6g}",
            f"{plan.certificate.lower_bound_L[i]:.6g}",
            gap_text(gap_L[i]),
            plan.certificate.bound_L[i],
            str(int(plan.time_LG[i].argmax())),
        ]
        for i in order
    ]
    return table(
        ("layer", "imbalance", f"max ({plan.unit})", "bound", "gap", "bound by", "busiest GPU"),
        rows,
        width=terminal_width(),
    )
