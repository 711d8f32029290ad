"""Linear programmes: right answers, honest statuses, and an end when told to."""

from __future__ import annotations

import os
import sys
import threading
import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.problems.plan.result import StoppedBy
from moeless_opt.solvers.core import linear
from moeless_opt.solvers.core.linear import LinearModel, solve_linear, write_linear
from moeless_opt.solvers.core.stopping import Interrupt, MaxTime

ENGINES = ("highs", "gscip", "pulp", "pulp:cbc")


def knapsack(weight: Any, value: Any, room: float) -> LinearModel:
    model = LinearModel()
    for one in value:
        model.variable(0, 1, whole=True, cost=-float(one))
    model.row([(v, float(w)) for v, w in enumerate(weight)], -np.inf, room)
    return model


def market_split(rows: int = 5, columns: int = 40) -> LinearModel:
    """Equality knapsacks that no solver settles soon (Cornuejols and Dawande)."""
    rng = np.random.default_rng(0)
    model = LinearModel()
    for _ in range(columns):
        model.variable(0, 1, whole=True)
    for _ in range(rows):
        weight = rng.integers(0, 100, columns)
        over, under = model.variable(0, np.inf, cost=1.0), model.variable(0, np.inf, cost=1.0)
        terms = [*((v, float(w)) for v, w in enumerate(weight)), (over, -1.0), (under, 1.0)]
        half = float(weight.sum() // 2)
        model.row(terms, half, half)
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_knapsacks_against_enumeration(engine: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, value = rng.integers(1, 20, 8), rng.integers(1, 20, 8)
    room = float(weight.sum() // 2)
    picks = (np.arange(256)[:, None] >> np.arange(8)) & 1
    best = (picks @ value)[picks @ weight <= room].max()
    found = solve_linear(knapsack(weight, value, room), engine)
    assert found.status == "optimal"
    assert not found.stopped_by
    assert found.value_V is not None
    assert found.value_V.round() @ value == best
    assert found.bound == pytest.approx(-best, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_infeasible_is_said_and_nothing_else(engine: str) -> None:
    model = knapsack([1, 1], [1, 1], 1.0)
    model.row([(0, 1.0), (1, 1.0)], 2.0, np.inf)
    found = solve_linear(model, engine)
    assert (found.status, found.value_V, found.bound) == ("infeasible", None, np.inf)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_time_limit_is_kept_and_called_by_its_name(engine: str) -> None:
    solve_linear(knapsack([1], [1], 1.0), engine)  # so that the helper runs
    began = clock.monotonic()
    found = solve_linear(market_split(), engine, stop=MaxTime(1.0))
    assert clock.monotonic() - began < 5.0
    assert found.status in ("feasible", "no_solution")
    assert found.stopped_by is StoppedBy.TIME
    if found.value_V is not None:
        assert found.bound <= np.array(market_split().cost) @ found.value_V


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_ends_it_without_a_trace(engine: str) -> None:
    stop = Interrupt()
    threading.Timer(0.5, stop.set).start()
    began = clock.monotonic()
    found = solve_linear(market_split(), engine, stop=stop)
    assert clock.monotonic() - began < 5.0
    assert (found.status, found.stopped_by) == ("no_solution", StoppedBy.INTERRUPT)
    assert solve_linear(knapsack([1], [1], 1.0), engine).status == "optimal"  # by another helper


def test_a_solution_that_breaks_a_row_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = {"status": "optimal", "values": [1.0, 1.0], "bound": -2.0, "message": "trust me"}
    monkeypatch.setattr(linear, "_ask", lambda job, stop: lie)
    found = solve_linear(knapsack([1, 1], [1, 1], 1.0))
    assert (found.status, found.value_V, found.bound) == ("no_solution", None, -np.inf)
    assert "misses a row by 0.5" in found.message


def test_unknown_engines() -> None:
    with pytest.raises(SolverUnavailableError, match="'nobody' is unknown; it can be 'pulp'"):
        solve_linear(knapsack([1], [1], 1.0), "nobody")
    with pytest.raises(SolverUnavailableError, match="PuLP cannot find 'nobody'"):
        solve_linear(knapsack([1], [1], 1.0), "pulp:nobody")


def test_a_broken_helper_is_told_and_replaced() -> None:
    class Kill:
        remaining = float("inf")

        def __call__(self, best: float = 0.0, bound: float = 0.0) -> StoppedBy:
            helper.process.kill()
            return StoppedBy.NOTHING

    solve_linear(knapsack([1], [1], 1.0))
    (helper,) = linear._idle
    with pytest.raises(SolverUnavailableError, match="broke down"):
        solve_linear(market_split(), stop=Kill())
    assert not Path(helper.folder).exists()
    assert solve_linear(knapsack([1], [1], 1.0)).status == "optimal"


def test_files_need_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"\.lp or \.mps"):
        write_linear(knapsack([1], [1], 1.0), tmp_path / "model.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_leaves_its_parents_helper_alone() -> None:
    solve_linear(knapsack([1], [1], 1.0))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(solve_linear(knapsack([1], [1], 1.0)).status != "optimal")
            linear._close_idle()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert solve_linear(knapsack([1], [1], 1.0)).status == "optimal"
