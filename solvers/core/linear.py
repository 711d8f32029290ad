"""Linear programmes with whole variables: written once, handed to any engine, ended at any moment.

``min cost @ x`` over ``least <= A x <= most``, ``low <= x <= high``, some x whole. Engines by name: HiGHS,
SCIP and others that ortools' MathOpt carries, so that they are always there; and what PuLP finds (CBC, HiGHS,
Gurobi, CPLEX, ...).

They run in a helper process (`_engines`), which is killed when `stop` says so or Ctrl-C comes: HiGHS inside
MathOpt cannot be interrupted, and a thread that was left behind in native code would burn on and might crash
the interpreter's exit. The helper is kept for the next programme.

Statuses are not taken on trust: each is looked at every time, a solution is held against all rows, and a
bound is claimed only where the engine proved one.

Axes: V variables, R rows.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.problems.files import atomic_write, format_of
from moeless_opt.problems.plan import StoppedBy
from moeless_opt.solvers.core import _engines
from moeless_opt.solvers.core.stopping import NeverStop, Stop

__all__ = [
    "GAP",
    "LinearAnswer",
    "LinearModel",
    "check_engine",
    "solve_linear",
    "write_linear",
]


GAP = 1e-7
"""Relative gap asked of the engines; below what is claimed as proven."""

_LOOK = 0.02  # seconds between two looks at `stop`
_GRACE = 0.15  # seconds beyond a time limit that an engine gets to hand over what it has
_BROKEN = 1e-5  # by how much a row may be missed, in units of 1 + its limit


@dataclass(slots=True)
class LinearModel:
    """A programme under construction: variables, then rows over them."""

    names: list[str] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    rows: list[tuple[str, list[int], list[float], float, float]] = field(default_factory=list)

    def variable(
        self,
        low: float,
        high: float,
        *,
        whole: bool = False,
        cost: float = 0.0,
        start: float = 0.0,
        name: str = "",
    ) -> int:
        """Add a variable; return its index."""
        self.names.append(name or f"v{len(self.names)}")
        self.low.append(low)
        self.high.append(high)
        self.whole.append(whole)
        self.cost.append(cost)
        self.start.append(start)
        return len(self.names) - 1

    def row(self, terms: Sequence[tuple[int, float]], low: float, high: float, *, name: str = "") -> None:
        """Add ``low <= sum of factor * variable <= high``; no variable twice."""
        self.rows.append(
            (name or f"r{len(self.rows)}", [v for v, _ in terms], [c for _, c in terms], low, high)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAnswer:
    """What came of a programme.

    Parameters
    ----------
    status : {"optimal", "feasible", "infeasible", "no_solution"}
        Only what was proven is called optimal or infeasible.
    value_V : array of float, shape [V], or None
        The solution.
    bound : float
        No solution costs less; minus infinity if nothing is proven.
    stopped_by : StoppedBy
        Why the engine was ended before it was done, if it was.
    message : str
        The engine's own words.
    """

    status: Literal["optimal", "feasible", "infeasible", "no_solution"]
    value_V: FloatArray | None
    bound: float
    stopped_by: StoppedBy
    message: str


ENGINES = ("highs", "gscip", "cp_sat", "pulp")
_CONTINUOUS = ("glop", "pdlp")  # engines of MathOpt that take no whole variables


def check_engine(engine: object) -> None:
    """Refuse a name that cannot be an engine's.

    Raises
    ------
    ProblemError
        Saying which there are.
    """
    family, _, solver = engine.partition(":") if isinstance(engine, str) else ("", "", "")
    if engine in _CONTINUOUS:
        raise ProblemError("engine", f"is {engine!r}, which takes no whole numbers; must be like 'highs'")
    if family not in ENGINES or (
        isinstance(engine, str) and ":" in engine and (family != "pulp" or not solver)
    ):
        raise ProblemError(
            "engine",
            f"is {engine!r}, must be 'highs', 'gscip', 'cp_sat', 'pulp' or, of those "
            "that PuLP finds, 'pulp:NAME' such as 'pulp:CBC'",
        )


def solve_linear(
    model: LinearModel,
    engine: str = "highs",
    *,
    stop: Stop | None = None,
    threads: int = 1,
    gap: float = GAP,
    seed: int | None = None,
    warm: bool = False,
    nodes: int | None = None,
) -> LinearAnswer:
    """Solve a programme.

    Parameters
    ----------
    model : LinearModel
        The programme.
    engine : str
        ``"highs"``, ``"gscip"`` or another of MathOpt's; ``"pulp"`` for the first solver that PuLP finds,
        ``"pulp:cbc"`` for one of PuLP's by its name.
    stop : Stop, optional
        Asked every few hundredths of a second. At a time limit the engine hands over what it has; told to
        stop otherwise it is ended as it is.
    threads : int
        Threads of the engine; HiGHS is left at its default.
    gap : float
        Relative gap at which it may stop.
    seed : int, optional
        Random seed, for MathOpt's.
    warm : bool
        Whether the variables' `start` is a solution to begin with, for engines that take one.
    nodes : int, optional
        Nodes of the search at most, for MathOpt's: a limit that is the same on every machine.

    Returns
    -------
    LinearAnswer

    Raises
    ------
    SolverUnavailableError
        If nobody knows the engine, or it fails.
    """
    stop = NeverStop() if stop is None else stop
    job = _job(model)
    left = stop.remaining
    job |= {
        "engine": engine,
        "threads": threads,
        "gap": gap,
        "seed": seed,
        "deadline": clock.monotonic() + left - min(0.1, 0.1 * left) if left < np.inf else np.inf,
        "start": np.array(model.start) if warm else None,
        "nodes": nodes,
    }
    if why := stop():
        return LinearAnswer(
            status="no_solution", value_V=None, bound=-np.inf, stopped_by=why, message="not begun"
        )
    found = _ask(job, stop)
    if isinstance(found, StoppedBy):
        words = f"{engine}: ended by {found.value}"
        return LinearAnswer(
            status="no_solution", value_V=None, bound=-np.inf, stopped_by=found, message=words
        )
    if "error" in found:
        raise SolverUnavailableError(f"engine: {found['error']}")
    # The engine was given a little less than the time that is left.
    late = clock.monotonic() > job["deadline"] - _LOOK
    return _judged(job, found, stop() or (StoppedBy.TIME if late else StoppedBy.NOTHING))


def _judged(job: dict[str, Any], found: dict[str, Any], why: StoppedBy) -> LinearAnswer:
    """The engine's words, held against the rows."""
    status, bound, message = found["status"], float(found["bound"]), found["message"]
    value_V = None if found["values"] is None else np.array(found["values"], dtype=np.float64)
    if value_V is not None:
        total_R = np.bincount(
            job["row"], weights=job["factor"] * value_V[job["column"]], minlength=len(job["least"])
        )
        under_R = (job["least"] - total_R) / (1.0 + np.abs(np.nan_to_num(job["least"], neginf=0.0)))
        over_R = (total_R - job["most"]) / (1.0 + np.abs(np.nan_to_num(job["most"], posinf=0.0)))
        miss = float(np.maximum(under_R, over_R).max(initial=0.0))
        if not miss <= _BROKEN:
            status, value_V, bound = "no_solution", None, -np.inf
            message += f"; its solution misses a row by {miss:.2g} and is not used"
    if status == "infeasible" or np.isnan(bound):
        bound = np.inf if status == "infeasible" else -np.inf
    elif status == "no_solution" and bound == np.inf:
        bound = -np.inf
    ended = StoppedBy.NOTHING if status in ("optimal", "infeasible") else why
    return LinearAnswer(status=status, value_V=value_V, bound=bound, stopped_by=ended, message=message)


def write_linear(model: LinearModel, path: str | PathLike[str]) -> None:
    """Write a programme as ``.lp`` or ``.mps``, for any solver.

    Parameters
    ----------
    model : LinearModel
        The programme.
    path : path
        Where to; its suffix tells the format, in any case. The file is there whole or not at all.

    Raises
    ------
    FormatError
        If the suffix is neither, or the file cannot be written.
    """
    suffix = format_of(path, (".lp", ".mps"))
    problem, _ = _engines.pulp_problem(_job(model), model.names, [row[0] for row in model.rows])
    with tempfile.TemporaryDirectory() as folder:
        aside = os.path.join(folder, f"model{suffix}")
        (problem.writeLP if suffix == ".lp" else problem.writeMPS)(aside)
        with open(aside, "rb") as file:
            content = file.read()
    atomic_write(path, content)


def _job(model: LinearModel) -> dict[str, Any]:
    """The programme as arrays, entries by row and then by variable."""
    length_R = np.array([len(row[1]) for row in model.rows], dtype=np.int64)
    row = np.repeat(np.arange(len(length_R)), length_R)
    chain = itertools.chain.from_iterable
    column = np.fromiter(chain(row[1] for row in model.rows), dtype=np.int64, count=len(row))
    factor = np.fromiter(chain(row[2] for row in model.rows), dtype=np.float64, count=len(row))
    order = np.lexsort((column, row))
    order = order[factor[order] != 0.0]
    return {
        "low": np.array(model.low, dtype=np.float64),
        "high": np.array(model.high, dtype=np.float64),
        "whole": np.array(model.whole, dtype=bool),
        "cost": np.array(model.cost, dtype=np.float64),
        "row": row[order],
        "column": column[order],
        "factor": factor[order],
        "least": np.array([one[3] for one in model.rows], dtype=np.float64),
        "most": np.array([one[4] for one in model.rows], dtype=np.float64),
    }


# -- the helper process ----------------------------------------------------------------------------------

_START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_idle: list[_Helper] = []


class _Helper:
    """A process that solves one programme after another."""

    def __init__(self) -> None:
        if not sys.executable:
            raise SolverUnavailableError("engine: linear programmes need a Python to run beside this one")
        self.owner = os.getpid()
        self.folder = tempfile.mkdtemp(prefix="moeless-opt-")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(_engines.__file__), *(p for p in sys.path if p)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": self.folder},
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
        self.thread: threading.Thread | None = None

    def ask(self, job: dict[str, Any], stop: Stop) -> dict[str, Any] | StoppedBy | None:
        """Its answer; or why it was not waited for; or None if it died."""
        replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._exchange, args=(job, replies), daemon=True)
        self.thread.start()
        late = np.inf
        while True:
            with contextlib.suppress(queue.Empty):
                return replies.get(timeout=_LOOK)
            why = stop()
            if why is StoppedBy.TIME:
                late = min(late, clock.monotonic() + _GRACE)
            if why and (why is not StoppedBy.TIME or clock.monotonic() > late):
                return why

    def _exchange(self, job: dict[str, Any], replies: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(job, self.process.stdin, protocol=5)
            self.process.stdin.flush()
            replies.put(pickle.load(self.process.stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            replies.put(None)

    def close(self) -> None:
        """End it, and whatever it has started, at once."""
        if self.owner != os.getpid():  # a fork of ours: not ours to end
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        if self.thread is not None:
            self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _ask(job: dict[str, Any], stop: Stop) -> dict[str, Any] | StoppedBy:
    """Have an idle helper, or a new one, solve a job."""
    helper = None
    while _idle and helper is None:
        helper = _idle.pop()
        if helper.owner != os.getpid() or helper.process.poll() is not None:
            helper.close()
            helper = None
    helper = _Helper() if helper is None else helper
    found: dict[str, Any] | StoppedBy | None = None
    try:
        found = helper.ask(job, stop)
    finally:
        if isinstance(found, dict) and not _idle:
            _idle.append(helper)
        else:
            helper.close()
    if found is None:
        raise SolverUnavailableError(
            f"engine: {job['engine']!r} broke down (its process ended with {helper.process.returncode})"
        )
    return found


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()
