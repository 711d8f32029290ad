"""``moeless-solve``: plans from JSON problems, shipped instances, and recordings.

Exit codes: 0 fine, 1 infeasible or nothing found (or a plan that fails its check), 2 bad input, 3 a solver or
package is missing, 130 ended by Ctrl-C and 143 by SIGTERM (with the best plan found until then, if any).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from moeless_opt.adapters import check_name
from moeless_opt.cli import leaving, modes
from moeless_opt.cli.inputs import read_problem
from moeless_opt.cli.options import read_arguments
from moeless_opt.cli.solving import run_solvers
from moeless_opt.plots import need_matplotlib, picture_format
from moeless_opt.problems.files import check_outputs, format_of
from moeless_opt.problems.io import plan_format
from moeless_opt.problems.spec import Problem
from moeless_opt.signals import Signals
from moeless_opt.terminal import guarded

__all__ = ["main", "run"]

_MODES: dict[str, Callable[[Problem, argparse.Namespace, Signals], int]] = {
    "solve": run_solvers,
    "compare": run_solvers,
    "check": modes.check,
    "explain": modes.tell,
    "bound": modes.bounds,
    "pareto": modes.trade_off,
    "after-loss": leaving.after_loss,
    "drain": leaving.drained,
    "recommend": modes.recommend,
    "export": modes.export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return guarded("moeless-solve", lambda signals: run(read_arguments(argv), signals))


def run(args: argparse.Namespace, signals: Signals) -> int:
    """Do what the arguments of `read_arguments` ask for; returns the exit code."""
    if args.mode == "list-solvers":
        return modes.solvers(args)
    if args.mode == "list-instances":
        return modes.instances(args)
    files = {"problem": args.problem, "--current": args.current, "--topology": args.topology}
    files["--map"] = args.map
    made = {"--output": args.output, "--plan": args.plan, "--plot": args.plot, "--schedule": args.schedule}
    if args.mode == "check":
        files["--check"] = args.check
    if args.mode == "explain" and args.explain:
        files["--explain"] = args.explain
    if args.mode == "export":
        made["--export"] = args.export
    check_outputs(made, files)
    if args.mode == "export":
        format_of(args.export, (".lp", ".mps"))
    if args.output is not None and args.engine is not None:
        check_name(args.engine, args.output)
    for path in (args.output if args.engine is None else None, args.plan):
        if path is not None:
            plan_format(path)
    if args.plot is not None:
        picture_format(args.plot)
        need_matplotlib()
    return _MODES[args.mode](read_problem(args), args, signals)
