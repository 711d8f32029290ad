"""GPUs that have failed, or are to leave: plans from what is live, and the order of the transfers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moeless_opt.cli.solving import describe, json_line, schedule_document
from moeless_opt.cli.units import gpu_list
from moeless_opt.elastic import drain, repair
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.files import atomic_write
from moeless_opt.problems.io import plan_to_json, save_plan
from moeless_opt.problems.plan import Migration, Plan
from moeless_opt.problems.spec import Placement, Problem
from moeless_opt.problems.text import bytes_text
from moeless_opt.progress import Display
from moeless_opt.report import ratio_text, show, table
from moeless_opt.signals import Signals
from moeless_opt.terminal import say

__all__ = ["after_loss", "drained"]


def after_loss(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Every expert back first, then balance; returns the exit code."""
    live, lost = _begin(problem, args, args.after_loss, "--after-loss")
    with signals.stopping() as stop, Display(quiet=args.quiet, limit=args.time, name="repairing"):
        found = repair(
            live,
            lost,
            problem=problem,
            max_moves=problem.limits.max_moves,
            solver=args.solver,
            time_limit=args.time,
            seed=args.seed,
            stop=stop,
        )
    asked, kept = problem.limits.spread, found.spread
    if kept < asked and not args.quiet:
        say(f"note: spread {kept} instead of {asked} failure domains: what the GPUs that are left can hold")
    if found.trouble and not args.quiet:
        say(f"note: {found.trouble}")
    stages = [("coverage", found.coverage)]
    if found.plan is not found.coverage:
        stages.append(("balance", found.plan))
    told = {"lost": lost, "missing": found.missing, "spread": found.spread, "trouble": found.trouble}
    title = f"{found.missing} experts have no live replica"
    return _tell(stages, found.schedules(), told, title, args, signals)


def drained(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """A plan for the others, and how they take over; returns the exit code."""
    live, leave = _begin(problem, args, args.drain, "--drain")
    with signals.stopping() as stop, Display(quiet=args.quiet, limit=args.time, name="draining"):
        options = {"solver": args.solver, "time_limit": args.time, "seed": args.seed, "stop": stop}
        found = drain(live, leave, problem=problem, **options)
    return _tell([("drained", found.plan)], (found.schedule,), {"left": leave}, "", args, signals)


def _begin(problem: Problem, args: argparse.Namespace, text: str, option: str) -> tuple[Placement, list[int]]:
    """What is live, and the GPUs that go."""
    if problem.current is None:
        raise ProblemError(option, "needs a live plan to start from: give --current PLAN")
    read = ("max_moves",) if option == "--after-loss" else ()
    for name in ("max_moves", "max_layer_moves", "max_move_bytes", "max_move_seconds"):
        if getattr(problem.limits, name) is not None and name not in read:
            raise ProblemError(f"limits.{name}", f"is not read with {option}: leave it out")
    gpus = gpu_list(text, problem.topology.gpus, option).tolist()
    if len(gpus) == problem.topology.gpus:
        raise ProblemError(option, "names all GPUs; at least one must be left")
    if not args.quiet:
        say(describe(problem))
    return problem.current, gpus


def _tell(
    stages: list[tuple[str, Plan]],
    schedules: tuple[Migration, ...],
    told: dict[str, Any],
    title: str,
    args: argparse.Namespace,
    signals: Signals,
) -> int:
    """Write what was asked for, and show the stages."""
    plan = stages[-1][1]
    assert isinstance(plan.made_for, Problem)
    schedule = schedule_document(plan.made_for, *schedules)
    if len(stages) > 1:
        schedule["coverage_steps"] = len(schedules[0].steps)
    if args.output:
        save_plan(plan, args.output)
    if args.schedule:
        atomic_write(args.schedule, json_line(schedule))
    if args.json:
        rows = [
            {
                "stage": name,
                "moves": one.moves.count,
                "bytes": one.moves.bytes,
                "imbalance_mean": float(one.imbalance_L.mean()),
                "imbalance_worst": float(one.imbalance_L.max()),
            }
            for name, one in stages
        ]
        document = {"format": "moeless-change", "version": 1, **told, "stages": rows, "schedule": schedule}
        print(json.dumps(document | {"plan": plan_to_json(plan)}))
    elif not args.quiet:
        cells = [
            [
                name,
                ratio_text(one.imbalance_L.mean()),
                ratio_text(one.imbalance_L.max()),
                str(one.moves.count),
                bytes_text(one.moves.bytes) if one.moves.bytes else "-",
                str(len(way.transfers)),
                str(len(way.steps)),
            ]
            for (name, one), way in zip(stages, schedules, strict=False)
        ]
        head = ("after", "imbalance", "worst", "moves", "moved", "transfers", "steps")
        show("\n\n".join(filter(None, [title, table(head, cells)])))
    for path in (args.output, args.schedule):
        if path and not args.quiet:
            say(f"wrote {path}")
    return signals.code
