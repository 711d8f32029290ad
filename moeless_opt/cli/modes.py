"""What the command does besides solving: check, explain, bound, trade off, recommend, export, list."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import numpy as np

from moeless_opt.api import export_model, judge, recommend_redundancy
from moeless_opt.cli.solving import find_plan
from moeless_opt.conflicts import Contradiction, contradiction
from moeless_opt.elastic import survival
from moeless_opt.explaining import Explanation, explain
from moeless_opt.link_view import traffic
from moeless_opt.plots import picture_format
from moeless_opt.problems.errors import InfeasibleError, InvalidPlanError, ProblemError
from moeless_opt.problems.files import atomic_write, named
from moeless_opt.problems.instances import instance_names, instance_summary
from moeless_opt.problems.io import load_plan, save_plan
from moeless_opt.problems.plan import Plan, violations
from moeless_opt.problems.spec import Problem
from moeless_opt.problems.text import bytes_text
from moeless_opt.progress import Display
from moeless_opt.report import gap_text, paragraph, ratio_text, show, table
from moeless_opt.signals import Signals
from moeless_opt.solvers.core import FirstOf, MaxTime, Stop, list_solvers, lower_bound
from moeless_opt.terminal import say

__all__ = ["bounds", "check", "export", "instances", "recommend", "solvers", "tell", "trade_off"]


def check(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Verify a plan of this problem; or judge one that was made for other loads."""
    plan = load_plan(args.check)
    digest = problem.digest()
    foreign = bool(plan.problem_digest) and plan.problem_digest != digest
    if foreign:
        return _judge(problem, plan, args)
    found = violations(problem, plan)
    links = None if args.traffic is None or found else traffic(plan, problem)
    if args.json:
        document: dict[str, Any] = {"valid": not found, "violations": found, "same_problem": True}
        if links is not None:
            document["traffic"] = links.to_dict()
        print(json.dumps(document | _survival(problem, plan, args)))
    elif not found and not args.quiet:
        shown = "" if links is None else f"\n\n{links.text(args.traffic)}"
        print(f"valid\n{plan!r}{_survival_text(problem, plan, args)}{shown}")
    for text in found:
        say(f"moeless-solve: {args.check}: {text}")
    return 1 if found else 0


def _survival(problem: Problem, plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """How likely no expert is lost, for JSON, where that is asked for."""
    if args.failures is None:
        return {}
    return {"survival": survival(plan, failures=args.failures, topology=problem.topology).to_dict()}


def _survival_text(problem: Problem, plan: Plan, args: argparse.Namespace) -> str:
    """The same, for people."""
    if args.failures is None:
        return ""
    return "\n" + paragraph(str(survival(plan, failures=args.failures, topology=problem.topology)))


def _judge(problem: Problem, plan: Plan, args: argparse.Namespace) -> int:
    """What a plan for other loads is worth on these: with its own token shares, and with the best ones."""
    rows: list[tuple[str, Plan]] = []
    try:
        kept, best = judge(problem, plan)
        found = violations(problem, kept)
        rows = [("its own shares", kept), ("best shares", best)]
        if problem.split != "fractional":
            rows = [("even shares" if problem.split == "equal" else "to the nearest replica", best)]
    except InvalidPlanError as error:
        found = error.violations
    if args.json:
        worth = {name.replace(" ", "_"): _worth(one) for name, one in rows}
        document = {"valid": not found, "violations": found, "same_problem": False, "on_these_loads": worth}
        if args.traffic is not None and rows:
            document["traffic"] = traffic(rows[-1][1], problem).to_dict()
        print(json.dumps(document | _survival(problem, plan, args)))
    elif not found and not args.quiet:
        cells = [
            [
                name,
                ratio_text(one.imbalance_L.mean()),
                ratio_text(one.imbalance_L.max()),
                str(one.layers[int(one.imbalance_L.argmax())]),
                gap_text(one.certificate.gap),
            ]
            for name, one in rows
        ]
        show(
            f"valid as a placement; made for another problem ({plan.problem_digest}), judged on this one\n"
            + table(("with", "imbalance", "worst", "layer", "gap"), cells, words_last=False)
            + _survival_text(problem, plan, args)
            + ("" if args.traffic is None else f"\n\n{traffic(rows[-1][1], problem).text(args.traffic)}")
        )
    for text in found:
        say(f"moeless-solve: {args.check}: {text}")
    return 1 if found else 0


def _worth(plan: Plan) -> dict[str, float]:
    return {
        "imbalance_mean": float(plan.imbalance_L.mean()),
        "imbalance_worst": float(plan.imbalance_L.max()),
        "balance": float(plan.certificate.value_L.sum()),
        "lower_bound": float(plan.certificate.lower_bound_L.sum()),
        "gap": plan.certificate.gap,
    }


def tell(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Why a plan is not better; or which rules of the problem contradict each other."""
    _check_time(args)
    plan: Plan | None = None
    told: Explanation | Contradiction
    try:
        problem.check_feasible()
        plan = _given(problem, args.explain) if args.explain else find_plan(problem, args, signals)
    except InfeasibleError as error:
        told = _contradicted(problem, error, args, signals)
    else:
        if plan is None:
            say("moeless-solve: no plan was found before the search was stopped")
            return signals.code or 1
        with signals.stopping() as stop, Display(quiet=args.quiet, name="explaining"):
            told = explain(plan, problem, layer=args.layer, stop=_until(args, stop))
    if args.json:
        print(json.dumps(told.to_dict()))
    elif not args.quiet:
        show(str(told))
    return signals.code or (1 if plan is None else 0)


def _given(problem: Problem, path: str) -> Plan:
    """A plan of this problem from its file; one that was made for other loads, as it is at best on these."""
    plan = load_plan(path)
    if not plan.problem_digest or plan.problem_digest == problem.digest():
        return plan
    say(f"note: {path} was made for another problem; explained on this one, with the best token shares")
    with named(path):
        return judge(problem, plan)[1]


def _contradicted(
    problem: Problem, error: InfeasibleError, args: argparse.Namespace, signals: Signals
) -> Contradiction:
    with signals.stopping() as stop, Display(quiet=args.quiet, name="explaining"):
        found = contradiction(problem, stop=_until(args, stop))
    if found is None:  # a rule that is not looked at, or it took too long
        raise error
    return found


def bounds(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """The lower bounds of every layer."""
    problem.check_feasible()
    bound_L, names = lower_bound(problem)
    speed_L = np.where(problem.usable_LG, problem.topology.speed_G, 0.0).sum(1)
    mean_L = problem.load_LE.sum(1) * problem.time.token_cost / speed_L
    if args.json:
        layers = [
            {"layer": layer, "bound": value, "name": name}
            for layer, value, name in zip(problem.loads.layers, bound_L.tolist(), names, strict=True)
        ]
        print(
            json.dumps(
                {"format": "moeless-bounds", "version": 1, "unit": problem.time.unit, "layers": layers}
            )
        )
    elif not args.quiet:
        rows = [
            [str(layer), f"{value:.8g}", name, f"{value / mean:.4f}" if mean > 0 else "-"]
            for layer, value, name, mean in zip(problem.loads.layers, bound_L, names, mean_L, strict=True)
        ]
        text = table(("layer", f"bound ({problem.time.unit})", "name", "bound / mean"), rows)
        show(f"{text}\nall layers: {bound_L.sum():.8g} {problem.time.unit}")
    return 0


def _until(args: argparse.Namespace, stop: Stop) -> Stop:
    return stop if args.time is None else FirstOf(stop, MaxTime(args.time))


def _check_time(args: argparse.Namespace) -> None:
    if args.time is not None and not args.time > 0:
        raise ProblemError("--time", f"is {args.time}, must be above 0 (seconds)")


def trade_off(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Plans from cheapest to best balanced."""
    from moeless_opt.fronts import pareto

    _check_time(args)
    with signals.stopping() as stop, Display(quiet=args.quiet, limit=args.time, name="pareto") as display:
        front = pareto(
            problem,
            ("balance", args.pareto),
            seed=args.seed,
            stop=_until(args, stop),
            progress=display.progress,
        )
    if args.output:
        save_plan(front.plans[-1], args.output)
    if args.plot:
        atomic_write(args.plot, front.plot(form=picture_format(args.plot)))
    if args.json:
        points = [
            {"imbalance": balance, args.pareto: cost, "moves": plan.moves.count, "replicas": plan.replicas}
            for plan, (balance, cost) in zip(front.plans, front.values, strict=True)
        ]
        print(json.dumps({"format": "moeless-pareto", "version": 1, "points": points}))
    elif not args.quiet:
        show(str(front))
    if signals.came:
        say("interrupted: the plans found so far are shown")
    for path in (args.output, args.plot):
        if path and not args.quiet:
            say(f"wrote {path}")
    return signals.code


def recommend(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """How many redundant experts are worth what."""
    _check_time(args)
    if problem.loads.shape[0] > 1 and not args.quiet:
        say(f"note: by the mean loads of the {problem.loads.shape[0]} scenarios")
    with signals.stopping() as stop, Display(quiet=args.quiet, limit=args.time, name="recommend") as display:
        rows = recommend_redundancy(
            problem.loads,
            problem.topology,
            model=problem.model,
            stop=_until(args, stop),
            progress=display.progress,
        )
    if args.json:
        entries = [
            {
                "spare": row.spare,
                "by_layer": row.spare_L.tolist(),
                "imbalance": row.imbalance,
                "bound": row.bound,
                "uniform": None if row.uniform != row.uniform else row.uniform,
            }
            for row in rows
        ]
        print(json.dumps({"format": "moeless-redundancy", "version": 1, "totals": entries}))
    elif not args.quiet:
        cells = [
            [
                str(row.spare),
                bytes_text(row.gib * 2**30) if row.gib == row.gib else "-",
                f"{row.imbalance:.4f}",
                f"{row.bound:.4f}",
                f"{row.uniform:.4f}" if row.uniform == row.uniform else "-",
                f"{row.spare_L.min()} to {row.spare_L.max()}",
            ]
            for row in rows
        ]
        show(table(("spare replicas", "memory", "imbalance", "at least", "spent evenly", "per layer"), cells))
        say(
            "note: with an equal split, whatever the slots are. What an engine is to be told, by memory, KV "
            "cache, time and split: moeless-advise"
        )
    if signals.came:
        say("interrupted: the totals looked at so far are shown")
    return signals.code


def export(problem: Problem, args: argparse.Namespace, signals: Signals) -> int:
    """Write a layer's exact model."""
    export_model(problem, args.export, layer=args.layer)
    if not args.quiet:
        say(f"wrote {args.export}")
    return 0


def instances(args: argparse.Namespace) -> int:
    """List the shipped instances."""
    rows = [[name, *instance_summary(name)] for name in instance_names()]
    if args.json:
        print(
            json.dumps(
                [dict(zip(("name", "shape", "optimum_known", "source"), row, strict=True)) for row in rows]
            )
        )
    else:
        lines = []
        for name, shape, known, source in rows:
            lines += [paragraph(f"{name}: {shape}; best known {known}"), paragraph(source, "    ")]
        show("\n".join(lines))
    return 0


def solvers(args: argparse.Namespace) -> int:
    """List the solvers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the row says it
        rows = list_solvers()
    if args.json:
        print(json.dumps([_solver_entry(row) for row in rows]))
        return 0
    lines = []
    for row in rows:
        if row.problem:
            lines.append(f"{row.name}: cannot be used: {' '.join(row.problem.split())}")
            continue
        features = ", ".join(sorted(feature.value for feature in row.features))
        lines += [paragraph(f"{row.name}: {row.summary}"), paragraph(f"can take: {features}", "    ")]
        if row.options:
            lines.append(paragraph(f"options: {', '.join(row.options)}", "    "))
    show("\n".join(lines))
    return 0


def _solver_entry(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "summary": row.summary,
        "features": sorted(feature.value for feature in row.features),
        "options": list(row.options),
        "problem": row.problem,
    }
