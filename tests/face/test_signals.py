"""SIGINT and SIGTERM in the middle of every long solve, in real processes, before and after CP-SAT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.spec import contiguous

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]

ROOT = Path(mo.__file__).resolve().parents[1]

RUN = """
import json, os, signal, sys, threading, time
import numpy as np
import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.solvers.core.solver import Heuristic

number, cpsat, solver, *arguments = sys.argv[1:]
if cpsat == "after":
    load = np.random.default_rng(0).lognormal(0, 1, (1, 16))
    mo.plan(load, mo.uniform(1, 8, slots=3), split="equal", solver="cpsat", time_limit=0.5)

told = []

def tell():
    time.sleep(0.1 if solver == "replan" else 1.0)  # compiled, it is over after 0.3 s
    told.append(time.monotonic())
    os.kill(os.getpid(), int(number))

best = Heuristic._best

def begin(self, task):
    if self.name in (solver, "auto") and not told:
        told.append(0.0)
        threading.Thread(target=tell, daemon=True).start()
    return best(self, task)

Heuristic._best = begin
if arguments[0] == "api":
    problem = mo.load_problem(arguments[1])
    try:
        mo.solve(problem, solver)
        code = 0
    except KeyboardInterrupt:
        code = 130
else:
    code = main([arguments[0], "--solver", solver, *arguments[1:]])
print(json.dumps({"code": code, "seconds": time.monotonic() - told[-1], "told": len(told)}))
"""


def problem_for(solver: str) -> mo.Problem:
    """A problem on which a solver is busy for much longer than a second."""
    rng = np.random.default_rng(5)
    asked: dict[str, Any] = {}
    split, layers, experts, gpus = "equal", 58, 256, 64
    if solver in ("portfolio", "auto"):  # CP-SAT in the end
        layers, experts, gpus = 8, 36, 16
    load_LE = rng.lognormal(0, 1.2, (layers, experts)) * 1000
    topology = mo.uniform(gpus // 8, 8, slots=-(-experts // gpus) + 1)
    if solver in ("replan", "min-moves"):
        split = "fractional" if solver == "min-moves" else "equal"
        before = load_LE * rng.lognormal(0, 0.5, load_LE.shape)
        asked["current"] = mo.plan(before, topology, split=split, solver="construct")
    return make_problem(load_LE, topology, split=split, **asked)


LONG = ["replan", "min-moves", "patterns", "cpsat", "milp", "portfolio", "auto"]


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer["told"] == 2, f"the solve was over before it was told to stop: {done.stderr}"
    return answer, done.stderr


@pytest.mark.parametrize(("number", "cpsat"), [(signal.SIGINT, "after"), (signal.SIGTERM, "before")])
@pytest.mark.parametrize("solver", LONG)
def test_the_command_ends_with_the_best_so_far(solver: str, number: int, cpsat: str, tmp_path: Path) -> None:
    problem = problem_for(solver)
    mo.save_problem(problem, tmp_path / "problem.json")
    plan = tmp_path / "plan.npz"
    limit = ["--time", "60"] if solver == "auto" else []
    answer, said = run(
        str(int(number)), cpsat, solver, str(tmp_path / "problem.json"), "-o", str(plan), *limit
    )
    assert answer["code"] == 128 + number, said
    assert answer["seconds"] < 8.0  # one on a calm machine
    mo.verify(problem, mo.load_plan(plan))


@pytest.mark.parametrize("solver", sorted(set(LONG) - {"auto", "portfolio"}))
def test_control_c_reaches_a_caller_from_python(solver: str, tmp_path: Path) -> None:
    mo.save_problem(problem_for(solver), tmp_path / "problem.json")
    answer, said = run(str(int(signal.SIGINT)), "after", solver, "api", str(tmp_path / "problem.json"))
    assert answer["code"] == 130, said
    assert answer["seconds"] < 8.0


MODES = """
import json, os, signal, sys, threading, time
from moeless_opt.cli import main
from moeless_opt.signals import Signals

told = []
stopping = Signals.stopping

def tell():
    time.sleep(float(sys.argv[1]))
    told.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

def begin(self):
    if not told:
        told.append(0.0)
        threading.Thread(target=tell, daemon=True).start()
    return stopping(self)

Signals.stopping = begin
code = main(sys.argv[2:])
print(json.dumps({"code": code, "seconds": time.monotonic() - told[-1], "told": len(told)}))
"""


@pytest.mark.parametrize("mode", [["--pareto", "moves"], ["--recommend"]], ids=lambda m: m[0])
def test_other_modes_end_with_what_they_have(mode: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    load_LE = rng.lognormal(0, 1.2, (58, 256)) * 1000
    topology = mo.uniform(16, 8, slots=3)
    live = mo.Placement(slots_LGC=contiguous(256, np.full((58, 128), 3)), experts=256)
    problem = make_problem(load_LE, topology, split="equal", current=live)
    mo.save_problem(problem, tmp_path / "problem.json")
    done = subprocess.run(
        [sys.executable, "-c", MODES, "0.5", str(tmp_path / "problem.json"), "--json", *mode],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        timeout=300,
    )
    *shown, last = done.stdout.splitlines()
    answer = json.loads(last)
    assert answer["told"] == 2, f"it was over before it was told to stop: {done.stderr}"
    assert answer["code"] == 130, done.stderr
    assert answer["seconds"] < 8.0  # one on a calm machine
    (document,) = map(json.loads, shown)
    assert document["points" if mode[0] == "--pareto" else "totals"]
