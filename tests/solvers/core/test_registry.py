"""Plug-ins by entry point: a good one is on equal terms, a bad one is a row and a warning."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.solvers.core import registry
from moeless_opt.solvers.core.features import Feature
from moeless_opt.solvers.core.finish import Built
from moeless_opt.solvers.core.solver import Heuristic, Task


class Good(Heuristic):
    """One replica each, in order."""

    name, summary = "good", "in order"
    features = frozenset({Feature.FRACTIONAL})

    def build(self, task: Task[Any]) -> Built:
        problem = task.problem
        slots_LGC = np.full((problem.layers, problem.topology.gpus, problem.capacity_LG.max()), -1, np.int32)
        for expert in range(problem.experts):
            slots_LGC[:, expert % problem.topology.gpus, expert // problem.topology.gpus] = expert
        return Built(slots_LGC=slots_LGC)


class Unfinished(Heuristic):
    """It has no `build`."""

    name, summary = "unfinished", "no build"


class Raises:
    """It cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no licence\nsecond line")


class Nameless:
    """It lacks half of the contract."""

    summary = "no name"
    features = ("equal split",)

    def solve(self, problem: mo.Problem, *, seed: int = 0) -> None:
        """Take no stop."""


PLUGINS = {
    "good": "plugs:Good",
    "unfinished": "plugs:Unfinished",
    "raises": "plugs:Raises",
    "nameless": "plugs:Nameless",
    "absent": "no_such_package_at_all:Solver",
    "misspelt": "plugs:Godo",
    "breaks": "breaks_at_import:Solver",
    "static": "plugs:Raises",  # ours goes first
}


@pytest.fixture
def plugged(monkeypatch: Any, tmp_path: Any) -> None:
    plugs = SimpleNamespace(Good=Good, Unfinished=Unfinished, Raises=Raises, Nameless=Nameless)
    monkeypatch.setitem(sys.modules, "plugs", plugs)
    (tmp_path / "breaks_at_import.py").write_text("raise ZeroDivisionError('at import')")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in PLUGINS.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


SAYS = {
    "unfinished": "cannot be loaded: TypeError: .*abstract",
    "raises": "cannot be loaded: RuntimeError: no licence",
    "nameless": "has no 'name' .*has no 'features' .*has a 'solve' without stop, initial, progress",
    "absent": "needs a package that is missing: No module named 'no_such_package_at_all'",
    "misspelt": "cannot be loaded: AttributeError: .*Godo",
    "breaks": "cannot be loaded: ZeroDivisionError: at import",
}


@pytest.mark.usefixtures("plugged")
def test_a_good_plug_in_is_on_equal_terms() -> None:
    assert mo.solver_names()[-len(PLUGINS) + 1 :] == sorted(set(PLUGINS) - {"static"})
    plan = mo.plan([[4, 3, 2, 1]], mo.uniform(1, 2, slots=2), solver="good")
    assert plan.certificate.solver == "good"
    with pytest.raises(mo.UnsupportedFeatureError, match="'good' does not support equal split"):
        mo.plan([[4, 3, 2, 1]], mo.uniform(1, 2, slots=2), solver="good", split="equal")


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", SAYS)
def test_a_bad_plug_in_is_refused_by_name(name: str) -> None:
    with pytest.raises(mo.SolverUnavailableError, match=f"solver: '{name}' .*{SAYS[name]}"):
        mo.get_solver(name)


@pytest.mark.usefixtures("plugged")
def test_a_bad_plug_in_is_a_row_and_a_warning() -> None:
    with pytest.warns(RuntimeWarning) as warned:
        rows = {row.name: row for row in mo.list_solvers()}
    assert len(warned) == len(SAYS)
    assert rows["good"].summary == "in order"
    assert not rows["good"].problem
    assert not rows["static"].problem
    for name in SAYS:
        assert rows[name].problem
        assert not rows[name].features


@pytest.mark.usefixtures("plugged")
def test_the_command_lists_bad_plug_ins_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-solvers"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        "raises: cannot be used: solver: 'raises' (plugs:Raises) cannot be loaded: RuntimeError: no licence"
        in out
    )
    assert "good: in order" in out
