"""``moeless-solve``: plans from JSON problems, shipped instances, and recordings.

Exit codes: 0 fine, 1 infeasible or nothing found (or a plan that fails its check), 2 bad input, 3 a solver or
package is missing, 130 ended by Ctrl-C and 143 by SIGTERM (with the best plan found until then, if any).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moeless_opt
from moeless_opt.api import compare, export_model, make_problem, recommend_redundancy, solve
from moeless_opt.plots import need_matplotlib, plot_loads
from moeless_opt.problems.errors import (
    FormatError,
    InfeasibleError,
    InvalidPlanError,
    MoelessError,
    ProblemError,
    SolverUnavailableError,
    UnsupportedFeatureError,
)
from moeless_opt.problems.files import atomic_write
from moeless_opt.problems.instances import instance_names, instance_summary, load_instance
from moeless_opt.problems.io import load_plan, load_problem, plan_to_json, read_json, save_plan
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.plan import Plan, violations
from moeless_opt.problems.spec import SPLITS, TOPOLOGY_PRESETS, Limits, Placement, Problem, Sizing, Topology
from moeless_opt.progress import Display
from moeless_opt.report import BOUND_ROW, Comparison, row_of, table, worst_layers
from moeless_opt.signals import Killed, Signals
from moeless_opt.solvers.core import (
    MaxTime,
    get_solver,
    list_solvers,
    lower_bound,
    require,
    required_features,
    solver_names,
)

__all__ = ["main"]

DEFAULT_COMPARISON = ("static", "eplb", "moeless", "auto", BOUND_ROW)
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moeless-solve",
        description="Decide how many replicas each expert gets and which GPU holds each of them.",
        epilog="examples: moeless-solve deepseek-v3-zipf   |   moeless-solve loads.json --gpus 4x8 --slots 9 "
        "--compare   |   moeless-solve problem.json -o plan.json --plot plan.png",
    )
    add = parser.add_argument
    add(
        "problem", nargs="?", help="a problem (JSON), a recording of loads, or the name of a shipped instance"
    )
    add("-o", "--output", metavar="PLAN", help="write the plan here (.json, or .npz)")
    add("--solver", default="auto", help="name of the solver (default: auto; see --list-solvers)")
    add(
        "--compare",
        nargs="?",
        const=",".join(DEFAULT_COMPARISON),
        metavar="A,B,C",
        help=f"run several solvers side by side (default: {','.join(DEFAULT_COMPARISON)})",
    )
    add("--time", type=float, metavar="SECONDS", help="time limit of each solver")
    add("--seed", type=int, default=0, help="seed of the random parts (default: 0)")
    add("--check", metavar="PLAN", help="verify a plan of this problem and say what it is worth")
    add("--bound", action="store_true", help="print the lower bounds of every layer; solve nothing")
    add(
        "--pareto",
        choices=("moves", "memory"),
        metavar="moves|memory",
        help="plans from cheapest to best balanced (with --plot, a picture of the front)",
    )
    add(
        "--recommend",
        action="store_true",
        help="how many redundant experts are worth what, and in which layers",
    )
    add("--export", metavar="LP|MPS", help="write a layer's exact model for other solvers (see --layer)")
    add("--layer", type=int, metavar="L", help="the layer to export (default: the first)")
    add("--schedule", metavar="JSON", help="write the ordered transfers from the live plan to the new one")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--plot", metavar="PNG", help="draw the GPUs' loads per layer, before and after")
    add("--worst", type=int, default=3, metavar="N", help="layers to list, worst first (default: 3)")
    add("--quiet", action="store_true", help="print nothing but errors (and JSON, if asked for)")
    add("--list-solvers", action="store_true", help="list the solvers and what they can do")
    add("--list-instances", action="store_true", help="list the shipped instances")
    add("--version", action="version", version=f"moeless-solve {moeless_opt.__version__}")
    group = parser.add_argument_group("for recordings, and to override what a problem says")
    add = group.add_argument
    add("--gpus", metavar="NxG", help="nodes x GPUs per node, e.g. 4x8 (or 8 for one node)")
    add("--slots", type=int, metavar="C", help="replicas that a GPU may hold per layer")
    add("--memory", metavar="SIZE", help="bytes per GPU for expert weights, e.g. 40GB (needs --model)")
    add("--topology", metavar="NAME|JSON", help=f"a preset ({', '.join(TOPOLOGY_PRESETS)}) or a JSON file")
    add("--model", help="model preset, for the bytes of an expert (e.g. DeepSeek-V3)")
    add("--split", choices=SPLITS, help="free or equal token shares (default: fractional)")
    add("--current", metavar="PLAN", help="the plan that is live now")
    add("--repair", action="store_true", help="mend a live plan that breaks the rules instead of refusing it")
    add("--sizing", metavar="RULE", help="slots, cv=0.2, makespan=1.05 (an imbalance) or memory")
    add("--max-moves", type=int, metavar="N", help="replicas that may move in all")
    add("--max-move-bytes", metavar="SIZE", help="bytes that may move in all, e.g. 4GB (needs --model)")
    add("--tolerance", type=float, metavar="X", help="balance that may be given up for fewer moves (0.01)")
    add(
        "--scenario",
        "--workload",
        metavar="NAME",
        help="which of several scenarios (workloads) of a recording",
    )
    add("--key", metavar="NAME", help="which array of a recording that has several")
    add("--steps", choices=("sum", "keep"), help="sum the steps of a recording, or keep them as scenarios")
    add("--experts", type=int, metavar="E", help="experts per layer, where a recording lists only busy ones")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    signals = Signals()
    try:
        with signals.watch():
            return _run(_parser().parse_args(argv), signals)
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


def _run(args: argparse.Namespace, signals: Signals) -> int:
    if args.list_solvers:
        print(_solvers_table())
        return 0
    if args.list_instances:
        rows = [[name, *instance_summary(name)] for name in instance_names()]
        print(table(("instance", "shape", "optimum known", "source"), rows))
        return 0
    if args.problem is None:
        raise ProblemError(
            "problem", "is missing: give a problem, a recording, or an instance (--list-instances)"
        )
    for path in (args.output, args.plot, args.schedule, args.export):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise FormatError(path, "cannot be written: its folder does not exist")
        if path is not None and Path(path).is_dir():
            raise FormatError(path, "cannot be written: it is a folder")
    if args.plot is not None:
        need_matplotlib()
    problem = _problem(args)
    if args.check is not None:
        return _check(problem, args)
    if args.bound:
        return _bounds(problem, args)
    if args.pareto is not None:
        return _pareto(problem, args)
    if args.recommend:
        return _recommend(problem, args)
    if args.export is not None:
        export_model(problem, args.export, layer=args.layer)
        _say(f"wrote {args.export}")
        return 0
    if args.schedule is not None and problem.current is None:
        raise ProblemError("--schedule", "needs a live plan to start from: give --current PLAN")
    names = [name.strip() for name in args.compare.split(",")] if args.compare else [args.solver]
    for name in names:
        if name != BOUND_ROW or not args.compare:
            get_solver(name)
    return _solve(problem, names, args, signals)


def _solve(problem: Problem, names: list[str], args: argparse.Namespace, signals: Signals) -> int:
    if not args.quiet:
        _say(_describe(problem))
    if not args.compare:
        require(get_solver(names[0]), problem)
    # A lone solver is shown beside what there would be without it.
    shown = names if args.compare or names == ["static"] else _with_reference(problem, names)
    with (
        signals.stopping() as stop,
        Display(quiet=args.quiet, solvers=len(shown), limit=args.time) as display,
    ):
        if len(shown) > 1:
            outcome = compare(
                problem, shown, time_limit=args.time, stop=stop, seed=args.seed, progress=display.progress
            )
        else:
            result = solve(
                problem, names[0], time_limit=args.time, stop=stop, seed=args.seed, progress=display.progress
            )
            outcome = Comparison(problem=problem, rows=(row_of(result),), results={names[0]: result})
    best = _best(outcome, names)
    if best is not None and args.output:
        save_plan(best, args.output)
    if best is not None and args.plot:
        atomic_write(args.plot, plot_loads(problem, best))
    if best is not None and args.schedule:
        atomic_write(args.schedule, _schedule(problem, best))
    if args.json:
        print(json.dumps(_document(outcome, best)))
    elif not args.quiet:
        print(outcome)
        if best is not None and args.worst > 0:
            print(f"\nworst layers of {best.certificate.solver}:\n{worst_layers(best, args.worst)}")
    if signals.came and best is not None:
        _say("interrupted: the best found so far is shown")
    for path in (args.output, args.plot, args.schedule):
        if path and best is not None and not args.quiet:
            _say(f"wrote {path}")
    if best is None and names != [BOUND_ROW]:
        reasons = "; ".join(
            f"{row.solver}: {row.note or row.status}" for row in outcome.rows if row.solver in names
        )
        return _fail(signals.code or 1, f"no plan found ({reasons})")
    return signals.code


def _with_reference(problem: Problem, names: list[str]) -> list[str]:
    reference = "static" if problem.current is None else "stay"
    if reference not in solver_names() or reference in names:
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


def _document(outcome: Comparison, best: Plan | None) -> dict[str, Any]:
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
        },
        "solvers": [
            row.to_dict()
            | {"objective": outcome.results[row.solver].objective if row.solver in outcome.results else {}}
            for row in outcome.rows
        ],
        "plan": None if best is None else plan_to_json(best),
    }


# --- the problem -------------------------------------------------------------------------------------------


def _problem(args: argparse.Namespace) -> Problem:
    name = args.problem
    if not Path(name).exists() and name in instance_names():
        return _override(load_instance(name), args)
    if not Path(name).is_file():
        import difflib

        near = difflib.get_close_matches(name, instance_names(), n=1)
        hint = f"; did you mean the instance {near[0]!r}?" if near else " nor the name of a shipped instance"
        raise FormatError(name, f"is no file{hint}")
    if _is_problem(name):
        return _override(load_problem(name), args)
    asked = {key: getattr(args, key) for key in ("key", "scenario", "steps", "experts")}
    options = {key: value for key, value in asked.items() if value is not None}
    loads = read_loads(name, **options)
    topology = _topology(args)
    if topology is None:
        raise ProblemError(
            "--gpus",
            f"is missing: {name} is a recording and says nothing of the GPUs; give --gpus NxG with --slots C "
            "(or --memory), or --topology",
        )
    return make_problem(
        loads,
        topology,
        current=None if args.current is None else load_plan(args.current),
        model=args.model,
        split=args.split or "fractional",
        balance_tolerance=args.tolerance,
        repair=args.repair,
        limits=_limits(args, None),
        sizing=None if args.sizing is None else _sizing(args.sizing),
        name=Path(name).stem,
    )


def _is_problem(path: str) -> bool:
    """Whether a file is one of our documents (anything else is read as a recording)."""
    with Path(path).open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"{") or b'"format"' not in start:
        return False
    data = read_json(path)
    form = data.get("format") if isinstance(data, dict) else None
    if form == "moeless-plan":
        raise FormatError(path, "is a plan, not a problem; use it with --current or --check")
    return isinstance(form, str)


def _override(problem: Problem, args: argparse.Namespace) -> Problem:
    changes: dict[str, Any] = {}
    if (topology := _topology(args)) is not None:
        changes |= {"topology": topology, "known": None}
    if args.model is not None:
        changes["model"] = moeless_opt.model_preset(args.model)
    if args.split is not None and args.split != problem.split:
        changes |= {"split": args.split, "known": None}
    if args.sizing is not None:
        changes["sizing"] = _sizing(args.sizing)
    if args.max_moves is not None or args.max_move_bytes is not None:
        changes["limits"] = _limits(args, problem.limits)
    if args.tolerance is not None:
        changes["objective"] = problem.objective.replace(balance_tolerance=args.tolerance)
    if args.current is not None:
        live = load_plan(args.current)
        if args.repair:
            bare = problem.replace(**changes)
            changes["current"] = Placement.repaired(live, problem.experts, bare.capacity_LG)
        else:
            changes["current"] = Placement.of(live, problem.experts)
    return problem.replace(**changes) if changes else problem


def _limits(args: argparse.Namespace, given: Limits | None) -> Limits | None:
    """The problem's limits with what the command line says of moves."""
    changes: dict[str, Any] = {}
    if args.max_moves is not None:
        changes["max_moves"] = args.max_moves
    if args.max_move_bytes is not None:
        changes["max_move_bytes"] = _size(args.max_move_bytes, "--max-move-bytes")
    return (given or Limits()).replace(**changes) if changes else given


def _topology(args: argparse.Namespace) -> Topology | None:
    memory = None if args.memory is None else _size(args.memory)
    if args.topology is not None:
        if args.gpus is not None:
            raise ProblemError(
                "--gpus", "cannot be given with --topology; one of them says what the GPUs are"
            )
        if args.topology in TOPOLOGY_PRESETS:
            return Topology.preset(args.topology, slots=args.slots, memory=memory)
        if Path(args.topology).is_file():
            return Topology.from_dict(read_json(args.topology))
        raise ProblemError(
            "--topology", f"{args.topology!r} is no preset ({', '.join(TOPOLOGY_PRESETS)}) and no file"
        )
    if args.gpus is None:
        if args.slots is not None or memory is not None:
            raise ProblemError("--gpus", "is missing: --slots and --memory need it")
        return None
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)", args.gpus)
    if found is None:
        raise ProblemError("--gpus", f"is {args.gpus!r}, must be like 4x8 (nodes x GPUs per node) or 8")
    return Topology.uniform(int(found[1] or 1), int(found[2]), slots=args.slots, memory=memory)


def _size(text: str, option: str = "--memory") -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ProblemError(option, f"is {text!r}, must be a size such as 40GB or 38GiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


# --- output ------------------------------------------------------------------------------------------------


def _check(problem: Problem, args: argparse.Namespace) -> int:
    plan = load_plan(args.check)
    if plan.problem_digest and plan.problem_digest != problem.digest():
        raise ProblemError(
            args.check,
            f"is a plan of another problem ({plan.problem_digest}); this one is {problem.digest()}",
        )
    found = violations(problem, plan)
    if args.json:
        print(json.dumps({"valid": not found, "violations": found}))
    elif not found:
        print(f"valid\n{plan!r}")
    for text in found:
        print(f"moeless-solve: {args.check}: {text}", file=sys.stderr)
    return 1 if found else 0


def _bounds(problem: Problem, args: argparse.Namespace) -> int:
    problem.check_feasible()
    bound_L, names = lower_bound(problem)
    mean_L = problem.load_LE.sum(1) * problem.time.token_cost / problem.topology.speed_G.sum()
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
        return 0
    rows = [
        [str(layer), f"{value:.8g}", name, f"{value / mean:.4f}" if mean > 0 else "-"]
        for layer, value, name, mean in zip(problem.loads.layers, bound_L, names, mean_L, strict=True)
    ]
    print(table(("layer", f"bound ({problem.time.unit})", "name", "bound / mean"), rows))
    print(f"all layers: {bound_L.sum():.8g} {problem.time.unit}")
    return 0


def _pareto(problem: Problem, args: argparse.Namespace) -> int:
    from moeless_opt.fronts import pareto

    stop = None if args.time is None else MaxTime(args.time)
    front = pareto(problem, ("balance", args.pareto), seed=args.seed, stop=stop)
    if args.output:
        save_plan(front.plans[-1], args.output)
    if args.plot:
        atomic_write(args.plot, front.plot())
    if args.json:
        points = [
            {"imbalance": balance, args.pareto: cost, "moves": plan.moves.count, "replicas": plan.replicas}
            for plan, (balance, cost) in zip(front.plans, front.values, strict=True)
        ]
        print(json.dumps({"format": "moeless-pareto", "version": 1, "points": points}))
    elif not args.quiet:
        print(front)
    return 0


def _recommend(problem: Problem, args: argparse.Namespace) -> int:
    rows = recommend_redundancy(problem.loads, problem.topology, model=problem.model)
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
        return 0
    cells = [
        [
            str(row.spare),
            f"{row.gib:.4g} GiB" if row.gib == row.gib else "-",
            f"{row.imbalance:.4f}",
            f"{row.bound:.4f}",
            f"{row.uniform:.4f}" if row.uniform == row.uniform else "-",
            f"{row.spare_L.min()} to {row.spare_L.max()}",
        ]
        for row in rows
    ]
    print(table(("spare replicas", "memory", "imbalance", "at least", "spent evenly", "per layer"), cells))
    return 0


def _sizing(text: str) -> Sizing:
    """Read ``cv=0.2`` and the like."""
    policy, _, value = text.partition("=")
    field = {"cv": "cv", "makespan": "imbalance"}.get(policy)
    if not value:
        return Sizing(policy=policy)
    try:
        number = float(value)
    except ValueError:
        raise ProblemError("--sizing", f"is {text!r}: {value!r} is no number") from None
    if field is None:
        raise ProblemError("--sizing", f"is {text!r}: {policy!r} takes no value")
    chosen: dict[str, Any] = {"policy": policy, field: number}
    return Sizing(**chosen)


def _schedule(problem: Problem, plan: Plan) -> bytes:
    from moeless_opt.fronts import migration

    found = migration(problem, plan)
    steps = [
        {
            "seconds": step.seconds,
            "drops_before": [[d.layer, d.expert, d.gpu] for d in step.drops_before],
            "transfers": [[t.layer, t.expert, t.source, t.target, t.bytes] for t in step.transfers],
            "drops_after": [[d.layer, d.expert, d.gpu] for d in step.drops_after],
        }
        for step in found.steps
    ]
    document = {
        "format": "moeless-migration",
        "version": 1,
        "problem_digest": problem.digest(),
        "seconds": found.seconds,
        "lower_bound": found.lower_bound,
        "steps": steps,
    }
    return (json.dumps(document) + "\n").encode()


def _describe(problem: Problem) -> str:
    loads, topology = problem.loads, problem.topology
    lines = [f"{problem.name or 'problem'}: {loads!r}", f"on {topology!r}, {problem.split} split"]
    lines += [f"note: {note}" for note in loads.notes]
    if problem.known is not None and problem.known.best_L:
        lines.append(f"best known: {sum(problem.known.best_L):.6g} over all layers ({problem.known.source})")
    return "\n".join(lines)


def _solvers_table() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the row says it
        rows = list_solvers()
    lines = []
    for row in rows:
        if row.problem:
            lines.append(f"{row.name}: cannot be used: {' '.join(row.problem.split())}")
            continue
        features = ", ".join(sorted(feature.value for feature in row.features))
        lines += [f"{row.name}: {row.summary}", f"    can take: {features}"]
        if row.options:
            lines.append(f"    options: {', '.join(row.options)}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
