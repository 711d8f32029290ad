"""Solve and compare: run the solvers, show the table, write the best plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeless_opt.adapters import NUMBERED, export, model_numbers
from moeless_opt.api import compare, solve
from moeless_opt.cli.change import Change, change_of
from moeless_opt.elastic import survival
from moeless_opt.link_view import traffic
from moeless_opt.plots import picture_format, plot_loads
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.files import atomic_write
from moeless_opt.problems.io import plan_to_json, save_plan
from moeless_opt.problems.plan import Migration, Plan, even_times, imbalance
from moeless_opt.problems.spec import Fill, Placement, Problem, Split, span
from moeless_opt.problems.text import printable
from moeless_opt.progress import Display
from moeless_opt.report import BOUND_ROW, Comparison, measured, row_of, show, worst_layers
from moeless_opt.signals import Signals
from moeless_opt.solvers.core import get_solver, require, required_features, solver_names
from moeless_opt.terminal import say

__all__ = ["describe", "find_plan", "json_line", "run_solvers", "schedule_document"]


def run_solvers(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Solve by one or several solvers; returns the exit code."""
    names = [args.solver] if args.mode == "solve" else [name.strip() for name in args.compare.split(",")]
    for name in names:
        if name != BOUND_ROW or args.mode == "solve":
            get_solver(name)
    _check_outputs(problem, names, args)
    if not args.quiet:
        say(describe(problem))
    problem.check_feasible()
    if args.mode == "solve":
        require(get_solver(names[0]), problem)
    outcome = _run(problem, names, args, signals)
    best = _best(outcome, names)
    if best is not None:
        _write(problem, best, args)
    change = None if best is None or problem.current is None else change_of(problem, best)
    if args.json:
        document = _document(outcome, best, change)
        if args.failures is not None and best is not None:
            document["survival"] = survival(best, failures=args.failures).to_dict()
        if best is not None and args.traffic is not None:
            document["traffic"] = traffic(best, problem).to_dict()
        print(json.dumps(document))
    elif not args.quiet:
        worst = best is not None and args.worst > 0
        layers = (
            f"\n\nworst layers of {best.certificate.solver}:\n{worst_layers(best, args.worst)}"
            if best and worst
            else ""
        )
        told = "" if best is None or args.failures is None else str(survival(best, failures=args.failures))
        links = "" if best is None or args.traffic is None else traffic(best, problem).text(args.traffic)
        parts = (measured(outcome.rows), "" if change is None else str(change), told, links)
        show("\n\n".join([f"{outcome}{layers}", *filter(None, parts)]))
    if signals.came and best is not None:
        say("interrupted: the best found so far is shown")
    for path in (args.output, args.plan, args.plot, args.schedule):
        if path and best is not None and not args.quiet:
            say(f"wrote {path}")
    if best is None and names != [BOUND_ROW]:
        return _nothing(outcome, names, signals)
    return signals.code


def find_plan(problem: Problem, args: argparse.Namespace, signals: Signals) -> Plan | None:
    """The plan of the solver that was asked for."""
    require(get_solver(args.solver), problem)
    with signals.stopping() as stop, Display(quiet=args.quiet, limit=args.time, name=args.solver) as display:
        return solve(
            problem, args.solver, time_limit=args.time, stop=stop, seed=args.seed, progress=display.progress
        ).plan


def _check_outputs(problem: Problem, names: list[str], args: argparse.Namespace) -> None:
    """Refuse files that nothing would be written to."""
    if args.engine is not None:
        _check_engine(problem, args)
    if args.schedule is not None and problem.current is None:
        raise ProblemError("--schedule", "needs a live plan to start from: give --current PLAN")
    for option in ("output", "plan", "plot", "schedule"):
        if getattr(args, option) is not None and names == [BOUND_ROW]:
            raise ProblemError(f"--{option}", f"needs a plan; {BOUND_ROW!r} is a bound, no plan")


def _run(problem: Problem, names: list[str], args: argparse.Namespace, signals: Signals) -> Comparison:
    # A lone solver is shown beside what there would be without it.
    alone = args.mode == "compare" or names == ["static"]
    shown = names if alone else _with_reference(problem, names)
    with (
        signals.stopping() as stop,
        Display(quiet=args.quiet, solvers=len(shown), limit=args.time, name="solving") as display,
    ):
        if len(shown) > 1 or args.mode == "compare":
            return compare(
                problem, shown, time_limit=args.time, stop=stop, seed=args.seed, progress=display.progress
            )
        result = solve(
            problem, names[0], time_limit=args.time, stop=stop, seed=args.seed, progress=display.progress
        )
        return Comparison(problem=problem, rows=(row_of(result),), results={names[0]: result})


def _with_reference(problem: Problem, names: list[str]) -> list[str]:
    reference = "static" if problem.current is None else "stay"
    if reference not in solver_names() or reference in names:
        return names
    if problem.current is not None and problem.current.partial:  # what is live cannot stay as it is
        return names
    return names if required_features(problem) - get_solver(reference).features else [reference, *names]


def _best(outcome: Comparison, names: Sequence[str]) -> Plan | None:
    """Of the solvers asked for, the plan with the smallest summed time; the first of equals."""
    plans = [r.plan for name, r in outcome.results.items() if name in names and r.plan is not None]
    if not plans:
        return None
    values = [float(plan.certificate.value_L.sum()) for plan in plans]
    least = min(values)
    return next(plan for plan, value in zip(plans, values, strict=True) if value <= least * (1 + 1e-9))


def _write(problem: Problem, best: Plan, args: argparse.Namespace) -> None:
    if args.engine:
        _write_engine(problem, best, args)
    elif args.output:
        save_plan(best, args.output)
    if args.plan:
        save_plan(best, args.plan)
    if args.plot:
        atomic_write(args.plot, plot_loads(problem, best, form=picture_format(args.plot)))
    if args.schedule:
        from moeless_opt.fronts import migration

        atomic_write(args.schedule, json_line(schedule_document(problem, migration(problem, best))))


def _write_engine(problem: Problem, best: Plan, args: argparse.Namespace) -> None:
    """Write the engine's file; GPUs that are dead have no rank in it."""
    alive_G = problem.usable_LG.any(axis=0)
    if not alive_G.all() and not args.quiet:
        dead = span(np.flatnonzero(~alive_G).tolist())
        say(f"note: {args.output} has {int(alive_G.sum())} ranks: the GPUs but {dead}, in order")
    placement = Placement(slots_LGC=best.slots_LGC[:, alive_G], experts=best.experts)
    if problem.split == Split.FRACTIONAL and not args.quiet:
        say(_shares_left_out(problem, best, args.output))
    told = args.model_layers
    export(placement, args.engine, args.output, layers=best.layers, model=problem.model, model_layers=told)


def _shares_left_out(problem: Problem, best: Plan, path: str) -> str:
    """What an engine's file, which holds slots alone, makes of a plan of free shares."""
    even_LG = even_times(problem.loads.load_LE, best.slots_LGC, problem.topology.speed_G)
    even = imbalance(even_LG, problem.topology.speed_G, problem.usable_LG).mean()
    planned = best.imbalance_L.mean()
    return (
        f"note: {path} holds slots and no shares: divided evenly over an expert's slots its tokens give an "
        f"imbalance of {even:.4f}, by the plan's shares {planned:.4f}; --plan FILE keeps the shares"
    )


def _check_engine(problem: Problem, args: argparse.Namespace) -> None:
    """Refuse, before anything is solved, what the engine's file could not hold."""
    if args.engine in NUMBERED:
        model_numbers(problem.loads.layers, model=problem.model, told=args.model_layers)
    elif args.model_layers is not None and args.current is None:
        raise ProblemError("--model-layers", f"is of no use for {args.engine}, whose rows are the MoE layers")
    slots_LG = problem.capacity_LG[:, problem.usable_LG.any(axis=0)]
    if (slots_LG != slots_LG[0, 0]).any():
        raise ProblemError(
            "--engine",
            f"{args.engine} needs as many slots on every GPU, they are {slots_LG.min()} to {slots_LG.max()}: "
            "give --slots C",
        )
    if problem.fill == Fill.NONE:
        raise ProblemError("--fill", f"is none, and {args.engine} needs every slot filled: leave it out")
    if args.engine == "ascend" and problem.fill == Fill.COPIES:
        raise ProblemError("--fill", "is copies, and vllm-ascend takes no second copy on an NPU: distinct")


def _nothing(outcome: Comparison, names: list[str], signals: Signals) -> int:
    """Say that there is no plan; returns the exit code."""
    rows = [row for row in outcome.rows if row.solver in names and row.solver != BOUND_ROW]
    if all(row.status == "infeasible" for row in rows) and len(rows) == 1:
        raise InfeasibleError(rows[0].note)
    reasons = "; ".join(f"{row.solver}: {row.note or row.status}" for row in rows)
    say(f"moeless-solve: no plan found ({' '.join(reasons.split())})")
    return signals.code or 1


def _document(outcome: Comparison, best: Plan | None, change: Change | None) -> dict[str, Any]:
    problem = outcome.problem
    return {
        "format": "moeless-result",
        "version": 1,
        "problem": {
            "name": problem.name,
            "digest": problem.digest(),
            "layers": problem.layers,
            "experts": problem.experts,
            "gpus": problem.topology.gpus,
            "split": problem.split,
            "fill": problem.fill,
            "share_entries": problem.share_entries,
        },
        "solvers": [
            row.to_dict()
            | {"objective": outcome.results[row.solver].objective if row.solver in outcome.results else {}}
            for row in outcome.rows
        ],
        "change": None if change is None else change.to_dict(),
        "plan": None if best is None else plan_to_json(best),
    }


def schedule_document(problem: Problem, *found: Migration) -> dict[str, Any]:
    """Transfers in order, of one migration after another, as JSON."""
    steps = [
        {
            "seconds": step.seconds,
            "drops_before": [[d.layer, d.expert, d.gpu] for d in step.drops_before],
            "transfers": [[t.layer, t.expert, t.source, t.target, t.bytes] for t in step.transfers],
            "drops_after": [[d.layer, d.expert, d.gpu] for d in step.drops_after],
        }
        for one in found
        for step in one.steps
    ]
    return {
        "format": "moeless-migration",
        "version": 1,
        "problem_digest": problem.digest(),
        "seconds": sum(one.seconds for one in found),
        "lower_bound": sum(one.lower_bound for one in found),
        "steps": steps,
    }


def json_line(document: dict[str, Any]) -> bytes:
    """A document as a file's content."""
    return (json.dumps(document) + "\n").encode()


def describe(problem: Problem) -> str:
    """The problem in a few lines."""
    loads, topology = problem.loads, problem.topology
    full = "" if problem.fill == "none" else f", every slot full ({problem.fill})"
    table = "" if problem.share_entries is None else f" in {problem.share_entries} entries"
    lines = [
        f"{printable(problem.name) or 'problem'}: {loads!r}",
        f"on {topology!r}, {problem.split} split{table}{full}",
    ]
    lines += [f"note: {printable(note)}" for note in loads.notes]
    if problem.known is not None and problem.known.best_L:
        lines.append(
            f"best known: {sum(problem.known.best_L):.6g} over all layers ({printable(problem.known.source)})"
        )
    return "\n".join(lines)
