"""``moeless-solve``: plans from JSON problems, shipped instances, and recordings.

Exit codes: 0 fine, 1 infeasible or nothing found (or a plan that fails its check), 2 bad input, 3 a solver or
package is missing, 130 ended by Ctrl-C and 143 by SIGTERM (with the best plan found until then, if any).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from moeless_opt.cli import modes
from moeless_opt.cli.inputs import read_problem
from moeless_opt.cli.options import read_arguments
from moeless_opt.cli.solving import run_solvers
from moeless_opt.plots import need_matplotlib, picture_format
from moeless_opt.problems.errors import (
    InfeasibleError,
    InvalidPlanError,
    MoelessError,
    ProblemError,
    SolverUnavailableError,
    UnsupportedFeatureError,
)
from moeless_opt.problems.files import check_outputs
from moeless_opt.problems.io import plan_format
from moeless_opt.problems.spec import Problem
from moeless_opt.signals import Killed, Signals

__all__ = ["main", "run"]

_MODES: dict[str, Callable[[Problem, argparse.Namespace, Signals], int]] = {
    "solve": run_solvers,
    "compare": run_solvers,
    "check": modes.check,
    "bound": modes.bounds,
    "pareto": modes.trade_off,
    "recommend": modes.recommend,
    "export": modes.export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    signals = Signals()
    try:
        with signals.watch():
            return run(read_arguments(argv), signals)
    except Killed as signal:
        return _fail(signal.code, f"ended by {signal}")
    except InfeasibleError as error:
        return _fail(1, f"infeasible: {error}")
    except InvalidPlanError as error:
        return _fail(1, str(error))
    except SolverUnavailableError as error:
        return _fail(3 if "needs a package" in str(error) else 2, str(error))
    except (ProblemError, UnsupportedFeatureError) as error:
        return _fail(2, str(error))
    except MoelessError as error:
        return _fail(1, str(error))
    except MemoryError:
        return _fail(2, "out of memory: the problem is too large for this machine")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(code: int, message: str) -> int:
    print(f"moeless-solve: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(args: argparse.Namespace, signals: Signals) -> int:
    """Do what the arguments of `read_arguments` ask for; returns the exit code."""
    if args.mode == "list-solvers":
        return modes.solvers(args)
    if args.mode == "list-instances":
        return modes.instances(args)
    files = {"problem": args.problem, "--current": args.current, "--topology": args.topology}
    made = {"--output": args.output, "--plot": args.plot, "--schedule": args.schedule}
    if args.mode == "check":
        files["--check"] = args.check
    if args.mode == "export":
        made["--export"] = args.export
    check_outputs(made, files)
    if args.output is not None:
        plan_format(args.output)
    if args.plot is not None:
        picture_format(args.plot)
        need_matplotlib()
    return _MODES[args.mode](read_problem(args), args, signals)
