"""``moeless-simulate``: the paper's comparison, ablations and sweeps, in simulated time.

The options are made from the fields of `Scenario`. Exit codes: 0 fine, 1 infeasible, 2 bad input, 3 a package
is missing, 130 ended by Ctrl-C and 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TextIO

from moeless_opt.plots import need_matplotlib, picture_format
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.files import check_output
from moeless_opt.progress import Display
from moeless_opt.report import table
from moeless_opt.runtime.simulate.drawing import Drawn, distributions, save_drawing
from moeless_opt.runtime.simulate.figures import FIGURES, PAPER_MODELS, Figure
from moeless_opt.runtime.simulate.options import by_default, in_unit, option_of, unknown
from moeless_opt.runtime.simulate.policies import POLICIES, Policy, list_policies
from moeless_opt.runtime.simulate.report import SimRow
from moeless_opt.runtime.simulate.run import LEGEND, simulate
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.signals import Signals
from moeless_opt.solvers.pack import fast
from moeless_opt.terminal import guarded

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body(signals: Signals) -> int:
        try:
            return _run(_parser().parse_args(argv))
        except ProblemError as error:
            # What Python calls by the field is called by the option here.
            known = {part.name for part in fields(Scenario)}
            raise type(error)(
                _flag(error.where) if error.where in known else error.where, error.what
            ) from None

    return guarded("moeless-simulate", body)


# -------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moeless-simulate",
        description="Compare policies on simulated GPUs: MoE-layer latency, cost, replicas, bytes moved.",
        epilog="Policies (others by --list-policies): "
        + "; ".join(f"{policy.name}: {policy.summary}" for policy in POLICIES.values()),
    )
    add = parser.add_argument
    add("--figure", metavar="NAME", help=f"a figure of the paper, and its drawing: {', '.join(FIGURES)}")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the figure, or the latencies' distributions",
    )
    add(
        "--sweep",
        nargs="+",
        metavar=("OPTION", "VALUE"),
        help="one table per value of an option below, for example: --sweep cv 0.2 0.4",
    )
    add("--json", action="store_true", help="figures as JSON on stdout, tables on stderr")
    add("--quiet", action="store_true", help="no progress")
    add("--list-policies", action="store_true", help="list the policies and what they are")
    groups: dict[str, Any] = {}
    for part in sorted(fields(Scenario), key=_order):
        group = option_of(part).group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(_flag(part.name), **_argument(part))
    return parser


def _order(part: Field[Any]) -> bool:
    """The world first, then what policies are set to."""
    return option_of(part).group == "policies"


def _argument(part: Field[Any]) -> dict[str, Any]:
    """What argparse is told of a field; nothing is set that is not on the command line."""
    option = option_of(part)
    told = f"{option.text}{in_unit(option)}{by_default(part)}"
    if part.name == "model":
        told = f"{option.text}; may be given several times (default {', '.join(PAPER_MODELS)})"
    rest: dict[str, Any] = {"default": argparse.SUPPRESS, "help": told.replace("%", "%%")}
    if option.parse is None:
        return {**rest, "action": "store_true"}
    kinds = {int: "N", float: "X", Path: "FILE"}
    metavar = option.metavar or kinds.get(option.parse, "NAME")  # type: ignore[call-overload]
    if part.name == "model":
        rest["action"] = "append"
    return {**rest, "type": option.parse, "metavar": metavar}


def _scenarios(options: argparse.Namespace) -> Iterator[tuple[str, Scenario]]:
    """Every run that the command line asks for, each with the label of its variant."""
    names = {part.name for part in fields(Scenario)}
    given = {name: value for name, value in vars(options).items() if name in names}
    models = given.pop("model", None)
    figure = _figure(options)
    if models is None:
        models = PAPER_MODELS if figure is None else figure.models or (figure.scenario.model,)
    variants = list(_variants(options, figure))
    for model in models:
        here = {**given, "model": model}
        base = Scenario(**here) if figure is None else figure.varied(here)
        for label, changes in variants:
            yield label, base.replace(**changes)


def _figure(options: argparse.Namespace) -> Figure | None:
    if options.figure is None:
        return None
    if options.figure not in FIGURES:
        raise unknown("--figure", options.figure, FIGURES)
    return FIGURES[options.figure]


def _variants(options: argparse.Namespace, figure: Figure | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels, and the fields that they change: those of a sweep or a figure, else one of no label."""
    if not options.sweep:
        yield from [(label, dict(changes)) for label, changes in figure.variants] if figure else []
        if figure is None or not figure.variants:
            yield "", {}
        return
    name, *values = options.sweep
    name = name.removeprefix("--").replace("-", "_")
    parts = {p.name: option_of(p) for p in fields(Scenario) if option_of(p).parse is not None}
    parts = {known: option for known, option in parts.items() if known not in ("model", "policies")}
    if name not in parts:
        raise unknown("--sweep", name, parts)
    if not values:
        raise ProblemError("--sweep", f"needs at least one value for {name}")
    parse = parts[name].parse
    assert parse is not None
    for text in values:
        try:
            value = parse(text)
        except ValueError:
            raise ProblemError("--sweep", f"{text!r} is no value for {name}") from None
        yield f"{name} = {text}", {name: value}


# ----------------------------------------------------------------------------------------------- runs


def _run(options: argparse.Namespace) -> int:
    out = sys.stderr if options.json else sys.stdout
    if options.list_policies:
        print(_policies(), file=out)
        return 0
    if options.plot is not None:
        picture_format(options.plot)
        check_output(options.plot)
        need_matplotlib()
    figure = _figure(options)
    runs = list(_scenarios(options))
    if figure is not None:
        print(f"figure: {figure.text}", file=out)
    policies = runs[0][1].chosen
    if not fast.available() and any(policy.shares.live for policy in policies):
        print(
            "note: Numba is not installed, so planning by time is interpreted: the same figures, many times "
            'slower (pip install "moeless-opt[fast]")',
            file=sys.stderr,
        )
    rows = _tables(runs, out, quiet=options.quiet)
    print(LEGEND, file=out)
    if options.plot is not None:
        drawn = Drawn(rows, policies)
        if figure is not None:
            save_drawing(figure.draw, drawn, options.plot, size=figure.size)
        else:
            save_drawing(distributions, drawn, options.plot)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    return 0


def _tables(runs: Sequence[tuple[str, Scenario]], out: TextIO, *, quiet: bool) -> list[SimRow]:
    """Simulate one after the other, and print what each is of, rests on and gives."""
    rows: list[SimRow] = []
    said: set[str] = set()
    for label, scenario in runs:
        if label:
            print(f"== {label}", file=out)

        def say(line: str) -> None:
            if line not in said:  # of a sweep, only what changes
                print(line, file=out, flush=True)
                said.add(line)

        with Display(quiet=quiet) as display:
            found = simulate(
                scenario,
                variant=label,
                say=say,
                progress=lambda name, now, end: display.reached(name, now, end, unit="s simulated"),
            )
        print(f"{found.table()}\n", file=out, flush=True)
        rows += found.rows
    return rows


def _policies() -> str:
    """A table of all policies; of one that cannot be used, why."""
    cells = [
        [name, found.summary if isinstance(found, Policy) else f"cannot be used: {found}"]
        for name, found in list_policies().items()
    ]
    return table(("policy", "what it is"), cells)


if __name__ == "__main__":
    raise SystemExit(main())
