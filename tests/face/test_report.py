"""Tables, units, progress."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.result import Progress
from moeless_opt.problems.text import bytes_text
from moeless_opt.progress import Display
from moeless_opt.report import gap_text, ratio_text, row_of, seconds_text, table, worst_layers
from moeless_opt.solvers.core.stopping import Interrupt
from tests.strategies import plan_of


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (352321536, "352 MB"),
        (2.5e9, "2.5 GB"),
        (3.2e15, "3200 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4e-5, "40 us"), (0.0123, "12.3 ms"), (0.9999, "999.9 ms"), (1.5, "1.50 s")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_balance_keeps_its_width() -> None:
    assert [ratio_text(x) for x in (1.0, 12.34567, 2085739812880224256.0)] == [
        "1.0000",
        "12.3457",
        "2.086e+18",
    ]
    assert [gap_text(x) for x in (0.0, 0.02102, 31.0, 121646547.573)] == [
        "0.000%",
        "2.102%",
        "3100.000%",
        "1.216e+10%",
    ]


def test_columns_line_up() -> None:
    text = table(("name", "n", "note"), [["a", "1", "x"], ["longer", "1000", ""]])
    assert text.splitlines() == [
        "name       n  note",
        "------  ----  ----",
        "a          1  x",
        "longer  1000",
    ]


def plan() -> tuple[mo.Problem, mo.Plan]:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=[[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]], layers=(3, 4, 6)),
        topology=mo.uniform(1, 2, slots=2),
        expert_bytes_L=10,
    )
    return problem, plan_of(problem, np.array([[[0, -1], [1, -1]]] * 3, dtype=np.int32))


def test_worst_layers_by_the_models_own_numbers() -> None:
    _, made = plan()
    rows = [line.split() for line in worst_layers(made, 2).splitlines()[2:]]
    assert [row[0] for row in rows] == ["6", "3"]
    assert [row[1] for row in rows] == ["1.8000", "1.5000"]
    assert [row[-1] for row in rows] == ["0", "0"]
    assert len(worst_layers(made, 99).splitlines()) == 5


def test_rows() -> None:
    problem, made = plan()
    row = row_of(
        mo.Result(problem=problem, plan=made, status=mo.Status.FEASIBLE, solver="drawn", seconds=2.0)
    )
    assert (row.solver, row.status, row.replicas, row.moves, row.move_bytes) == (
        "drawn",
        "feasible",
        6,
        6,
        60,
    )
    assert row.imbalance_mean == pytest.approx((1.5 + 1.0 + 1.8) / 3)
    assert row.imbalance_worst == pytest.approx(1.8)
    none = row_of(mo.Result(problem=problem, plan=None, status=mo.Status.INFEASIBLE, message="no room"))
    assert (none.status, none.imbalance_mean, none.note) == ("infeasible", None, "no room")


def test_progress_without_a_terminal_is_rows_that_change(monkeypatch: Any) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Display(delay=0.0) as display:
        display.progress(Progress(seconds=1.0, best=12.0, bound=10.0))
        display.progress(Progress(seconds=2.0, best=12.0, bound=10.0))
        display.progress(Progress(seconds=3.0, best=11.0, bound=10.0, note="swap"))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "best 12  bound 10  gap 20.000%" in lines[0]
    assert lines[1].endswith("gap 10.000%  swap")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Display(delay=0.0, solvers=2, limit=10.0) as display:
        for seconds in (1.0, 5.0, 0.5):  # the second solver began
            display.progress(Progress(seconds=seconds, best=12.0, bound=0.0))
        assert display.bar.n == pytest.approx(1.05)
    assert "best 12" in stream.getvalue()


@pytest.mark.parametrize("kwargs", [{"quiet": True, "delay": 0.0}, {"delay": 1000.0}])
def test_progress_may_stay_silent(monkeypatch: Any, kwargs: dict[str, Any]) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Display(**kwargs) as display:
        display.progress(Progress(seconds=1.0, best=12.0, bound=10.0))
    assert stream.getvalue() == ""


def test_an_interrupt_is_a_stopping_criterion() -> None:
    stop = Interrupt()
    assert stop(1.0, 0.0) == ""
    stop.set()
    assert stop(1.0, 0.0) == "interrupt"
