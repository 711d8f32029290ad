"""One table of the options: what each is, and which modes read it. What a mode does not read is refused."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moeless_opt
from moeless_opt.adapters import ENGINES
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import FILLS, SPLITS, TOPOLOGY_PRESETS
from moeless_opt.report import BOUND_ROW

__all__ = ["DEFAULT_COMPARISON", "MODES", "OPTIONS", "Option", "parser", "read_arguments"]

DEFAULT_COMPARISON = ("static", "eplb", "moeless", "auto", BOUND_ROW)

MODES: dict[str, str] = {
    "solve": "",
    "compare": "--compare",
    "check": "--check",
    "explain": "--explain",
    "bound": "--bound",
    "pareto": "--pareto",
    "after-loss": "--after-loss",
    "drain": "--drain",
    "recommend": "--recommend",
    "export": "--export",
    "list-solvers": "--list-solvers",
    "list-instances": "--list-instances",
}
"""What one call does, and the option that says so; without any, it solves."""

_LISTS = ("list-solvers", "list-instances")
_ALL = tuple(mode for mode in MODES if mode not in _LISTS)
_RULES = tuple(mode for mode in _ALL if mode != "recommend")  # where slots and limits bind
_PLANS = ("solve", "compare")
_STAGED = ("after-loss", "drain")  # GPUs go: from what is live, with the order of the transfers
_NEAR = ("solve", "compare", "check", "explain", "pareto", *_STAGED)
_LIVE = ("solve", "compare", "check", "explain", "pareto", *_STAGED)


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Parameters
    ----------
    flags : tuple of str
        Its names, the one that messages use first.
    modes : tuple of str
        Those that read it.
    form : mapping
        What argparse is told.
    group : str
        ``""``, or ``"input"`` for what says or overrides what the problem is.
    default : object
        Its value where it is not given.
    """

    flags: tuple[str, ...]
    modes: tuple[str, ...]
    form: Mapping[str, Any]
    group: str = ""
    default: Any = None

    @property
    def dest(self) -> str:
        """Its name among the arguments."""
        long = next(flag for flag in self.flags if flag.startswith("--"))
        return long.removeprefix("--").replace("-", "_")


def _option(*flags: str, modes: Sequence[str], group: str = "", default: Any = None, **form: Any) -> Option:
    return Option(flags, tuple(modes), form, group, default)


def _flag(*flags: str, modes: Sequence[str], group: str = "", **form: Any) -> Option:
    return Option(flags, tuple(modes), form | {"action": "store_true"}, group, False)


def _input(*flags: str, modes: Sequence[str], **form: Any) -> Option:
    return Option(flags, tuple(modes), form, "input")


OPTIONS: tuple[Option, ...] = (
    _option(
        "--output",
        "-o",
        modes=(*_PLANS, "pareto", *_STAGED),
        metavar="PLAN",
        help="write the plan here (.json, or .npz); of several, the best",
    ),
    _option(
        "--engine",
        modes=_PLANS,
        choices=tuple(ENGINES),
        help="write --output as the placement file of this engine, and plan as it serves",
    ),
    _option("--plan", modes=_PLANS, metavar="PLAN", help="with --engine: write our plan here as well"),
    _option(
        "--solver",
        modes=("solve", "explain", *_STAGED),
        default="auto",
        help="name of the solver (default: auto; see --list-solvers)",
    ),
    _option(
        "--time",
        modes=(*_PLANS, "pareto", "recommend", "explain", *_STAGED),
        type=float,
        metavar="SECONDS",
        help="time limit (of each solver)",
    ),
    _option(
        "--seed",
        modes=(*_PLANS, "pareto", "explain", *_STAGED),
        type=int,
        default=0,
        help="seed of the random parts (default: 0)",
    ),
    _option(
        "--layer",
        modes=("export", "explain"),
        type=int,
        metavar="L",
        help="the layer to export or explain (default: the first; the worst)",
    ),
    _option(
        "--schedule",
        modes=(*_PLANS, *_STAGED),
        metavar="JSON",
        help="write the ordered transfers from the live plan to the new one",
    ),
    _flag("--json", modes=(*_ALL[:-1], *_LISTS), help="print the result as JSON on standard output"),
    _option(
        "--plot",
        modes=(*_PLANS, "pareto"),
        metavar="PNG",
        help="draw the GPUs' loads per layer, before and after; or the front",
    ),
    _option(
        "--failures",
        modes=(*_PLANS, "check"),
        type=int,
        metavar="K",
        help="tell how likely no expert is lost if 1 to K failure domains fail at once",
    ),
    _option(
        "--worst",
        modes=_PLANS,
        type=int,
        default=3,
        metavar="N",
        help="layers to list, worst first (default: 3)",
    ),
    _option(
        "--traffic",
        modes=("solve", "compare", "check"),
        choices=("nodes", "gpus"),
        help="show how many tokens go over which link",
    ),
    _flag("--quiet", modes=_ALL, help="print nothing but errors (and JSON, if asked for)"),
    _input("--gpus", modes=_ALL, metavar="NxG", help="nodes x GPUs per node, e.g. 4x8 (or 8 for one node)"),
    _input(
        "--slots",
        modes=_RULES,
        metavar="C",
        help="replicas that a GPU may hold per layer: 9; or one number per GPU: 9,9,8,8; or 9,3=4 (GPU 3: 4)",
    ),
    _input(
        "--memory",
        modes=_RULES,
        metavar="SIZE",
        help="bytes per GPU for expert weights, e.g. 40GB, 64G or 38GiB (needs --model)",
    ),
    _input(
        "--reserve",
        modes=_RULES,
        metavar="SIZE",
        help="bytes of each GPU to be kept free of experts, e.g. 20GiB: KV cache, activations",
    ),
    _input(
        "--topology",
        modes=_ALL,
        metavar="NAME|JSON",
        help=f"a preset ({', '.join(TOPOLOGY_PRESETS)}) or a JSON file",
    ),
    _input(
        "--speed",
        modes=_ALL,
        metavar="LIST",
        help="relative speeds: one per GPU, or those that differ: 3=0.5,8-15=0.8",
    ),
    _input("--lost", modes=_ALL, metavar="GPUS", help="GPUs that are dead: 3,17 or 8-15"),
    _input("--model", modes=_ALL, help="model preset, for the bytes of an expert (e.g. DeepSeek-V3)"),
    _input(
        "--split", modes=_RULES, choices=SPLITS, help="token shares: free, even, or to the nearest replica"
    ),
    _input(
        "--fill",
        modes=_RULES,
        choices=FILLS,
        help="every slot full: distinct (no expert twice on a GPU) or copies (default: none)",
    ),
    _input(
        "--share-entries",
        modes=_RULES,
        type=int,
        metavar="N",
        help="free shares as multiples of 1/N, for engines whose dispatch table has N entries for an expert",
    ),
    _input(
        "--current",
        modes=_LIVE,
        metavar="PLAN",
        help="what is live now: a plan, or a placement in any engine's own format",
    ),
    _input(
        "--live-gpus",
        modes=_LIVE,
        type=int,
        metavar="N",
        help="GPUs of a live map whose format does not say it and whose slots leave it open",
    ),
    _input(
        "--gone",
        modes=_LIVE,
        metavar="GPUS",
        help="GPUs of the live plan that are no more; the others are numbered anew: 3,17 or 8-15",
    ),
    _input(
        "--model-layers",
        modes=_LIVE,
        metavar="N|LIST",
        help="for engines that count dense layers: the model's layers in all (61), or the numbers of those "
        "that are planned (3-60)",
    ),
    _flag(
        "--repair",
        modes=_LIVE,
        group="input",
        help="mend a live plan that breaks the rules, or has other GPUs, instead of refusing it",
    ),
    _input(
        "--sizing",
        modes=(*_PLANS, "check", "explain", "bound", *_STAGED),
        metavar="RULE",
        help="slots, cv=0.2, makespan=1.05 (an imbalance) or memory",
    ),
    _input(
        "--spread",
        modes=_RULES,
        type=int,
        metavar="D",
        help="failure domains (nodes, unless the topology says more) that every expert must reach",
    ),
    _input(
        "--spread-experts",
        modes=_RULES,
        type=int,
        metavar="K",
        help="--spread for the K experts of each layer with the most tokens; for all by default",
    ),
    _input(
        "--max-moves",
        modes=(*_PLANS, "check", "explain", "after-loss"),
        type=int,
        metavar="N",
        help="replicas that may move in all",
    ),
    _input(
        "--max-move-bytes",
        modes=(*_PLANS, "check", "explain"),
        metavar="SIZE",
        help="bytes that may move in all, e.g. 4GB (needs --model)",
    ),
    _input(
        "--tolerance",
        modes=(*_PLANS, "explain", *_STAGED),
        type=float,
        metavar="X",
        help="balance that may be given up for fewer moves (0.01)",
    ),
    _input(
        "--risk",
        modes=(*_PLANS, "check", "explain", "bound", "pareto", *_STAGED),
        metavar="RULE",
        help="over several scenarios: expected, worst, cvar=0.9, sigma=1 (mean and deviations above it) or "
        "covariance=2 (mean and deviations of each GPU under one split)",
    ),
    _input(
        "--priorities",
        modes=(*_PLANS, "check", "explain", *_STAGED),
        metavar="LIST",
        help="what to minimise, in this order: balance,traffic (also moves, memory, groups, hops, survival)",
    ),
    _input(
        "--failure-rate",
        modes=(*_PLANS, "check", "explain", *_STAGED),
        type=float,
        metavar="P",
        help="with the priority survival: probability that a failure domain fails, each by itself (0.01)",
    ),
    _input(
        "--costs",
        modes=_NEAR,
        metavar="LEVELS|FILE",
        help="cost of a token that leaves its GPU, node or domain: gpu=0.1,node=1; or a matrix (.npy)",
    ),
    _input(
        "--sources",
        modes=_NEAR,
        metavar="PATH",
        help="loads by where they come from: [sources, layers, experts] of every GPU or node, or a "
        "folder with one recording for each rank",
    ),
    _input(
        "--flow",
        modes=_NEAR,
        metavar="NPY",
        help="how often an expert was followed by one in the next layer: [layers - 1, experts, experts]",
    ),
    _input(
        "--groups",
        modes=_NEAR,
        metavar="N[:X]",
        help="N groups of experts, each kept on a node but for a share X of the tokens (8, or 8:0.1)",
    ),
    _input(
        "--scenario",
        "--workload",
        modes=_ALL,
        metavar="NAME",
        help="which of several scenarios (workloads) of a recording",
    ),
    _input(
        "--also",
        modes=_ALL,
        action="append",
        metavar="FILE",
        help="a recording of another workload of the model (decode beside prefill), as a scenario more; of "
        "as many tokens; may be given again",
    ),
    _input(
        "--weights",
        modes=_ALL,
        metavar="LIST",
        help="with --also: what each workload counts, that of the problem first: 0.7,0.3 (default: alike)",
    ),
    _input("--key", modes=_ALL, metavar="NAME", help="which array of a recording that has several"),
    _input(
        "--steps",
        modes=_ALL,
        choices=("sum", "keep"),
        help="sum the steps of a recording, or keep them as scenarios",
    ),
    _input(
        "--experts",
        modes=_ALL,
        type=int,
        metavar="E",
        help="experts per layer, where a recording lists only busy ones",
    ),
    _input(
        "--as",
        modes=_ALL,
        choices=("counts", "trace", "physical"),
        help="what a recording's array is, where it can be several things",
    ),
    _input(
        "--map",
        modes=_ALL,
        metavar="FILE",
        help="map from slots to experts of a recording of physical loads, where it has none",
    ),
)
"""All options but those that choose the mode."""

RECORDINGS = {
    "key": "key", "scenario": "scenario", "steps": "steps", "experts": "experts", "as": "as_",
    "map": "physical_to_logical",
}  # fmt: skip
"""Options of recordings and the reader's names for them; of no use for other problems."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command's parser; what was not given is absent from what it returns."""
    made = _Parser(
        prog="moeless-solve",
        description="Decide how many replicas each expert gets and which GPU holds each of them.",
        epilog="examples: moeless-solve deepseek-v3-zipf   |   moeless-solve loads.json --gpus 4x8 --slots 9 "
        "--compare   |   moeless-solve problem.json -o plan.json --plot plan.png",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument(
        "problem", nargs="?", help="a problem (JSON), a recording of loads, or the name of a shipped instance"
    )
    made.add_argument("--version", action="version", version=f"moeless-solve {moeless_opt.__version__}")
    _add_modes(made.add_argument_group("instead of solving, one of"))
    groups = {
        "": made.add_argument_group("how, and what comes out"),
        "input": made.add_argument_group("for recordings, and to override what a problem says"),
    }
    for option in OPTIONS:
        groups[option.group].add_argument(*option.flags, **option.form)
    return made


def _add_modes(group: Any) -> None:
    add = group.add_argument
    add(
        "--compare",
        nargs="?",
        const=",".join(DEFAULT_COMPARISON),
        metavar="A,B,C",
        help=f"run several solvers side by side (default: {','.join(DEFAULT_COMPARISON)})",
    )
    add("--check", metavar="PLAN", help="verify a plan, and say what it is worth on these loads")
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="PLAN",
        help="why a plan (or the one that is found) is not better, and what would make it so",
    )
    add("--bound", action="store_true", help="print the lower bounds of every layer; solve nothing")
    add(
        "--pareto",
        choices=("moves", "memory", "traffic", "groups", "hops", "survival"),
        metavar="moves|memory|traffic|groups|hops|survival",
        help="plans from cheapest to best balanced (with --plot, a picture of the front)",
    )
    add(
        "--after-loss",
        metavar="GPUS",
        help="GPUs have failed (3,17 or 8-15): every expert back first, by the fewest loads, then balance",
    )
    add("--drain", metavar="GPUS", help="GPUs are to leave: who takes what they hold, while they still serve")
    add(
        "--recommend",
        action="store_true",
        help="how many redundant experts are worth what, and in which layers",
    )
    add("--export", metavar="LP|MPS", help="write a layer's exact model for other solvers (see --layer)")
    add("--list-solvers", action="store_true", help="list the solvers and what they can do")
    add("--list-instances", action="store_true", help="list the shipped instances")


def read_arguments(argv: Sequence[str] | None, into: argparse.Namespace | None = None) -> argparse.Namespace:
    """The arguments, with ``mode``, ``given`` (names of the options that were), and the others' defaults.

    Raises
    ------
    ProblemError
        If an option cannot be read, or the mode has no use for it.
    """
    args = parser().parse_args(argv, into)
    given = set(vars(args))
    modes = [mode for mode, flag in MODES.items() if flag and mode.replace("-", "_") in given]
    if len(modes) > 1:
        raise ProblemError(MODES[modes[1]], f"cannot be given with {MODES[modes[0]]}: one at a time")
    args.mode = modes[0] if modes else "solve"
    args.given = frozenset(given)
    for option in OPTIONS:
        if option.dest not in given:
            setattr(args, option.dest, option.default)
        elif args.mode not in option.modes:
            raise ProblemError(option.flags[0], _unread(option, args.mode))
    if args.mode in _LISTS:
        if "problem" in given:
            raise ProblemError("problem", f"is not read with {MODES[args.mode]}: leave {args.problem!r} out")
    elif "problem" not in given:
        raise ProblemError(
            "problem", "is missing: give a problem, a recording, or an instance (--list-instances)"
        )
    _check(args)
    if args.engine is not None:  # as the engine serves, unless the command line says something else
        args.split = args.split or "equal"
        args.fill = args.fill or ("distinct" if args.engine == "ascend" else "copies")
    return args


def _unread(option: Option, mode: str) -> str:
    where = "without one of the modes that read it" if mode == "solve" else f"with {MODES[mode]}"
    readers = [MODES[one] or "a plain solve" for one in option.modes]
    rather = "" if mode != "recommend" else "; slots and splits for an engine are advised by moeless-advise"
    return f"is not read {where}; it is with {', '.join(readers)}{rather}"


def _check(args: argparse.Namespace) -> None:
    """Refuse options that need another one, and values that mean nothing."""
    if args.worst < 0:
        raise ProblemError("--worst", f"is {args.worst}, must be a whole number of at least 0")
    if args.mode == "compare" and not [name for name in args.compare.split(",") if name.strip()]:
        raise ProblemError("--compare", f"is {args.compare!r}, must name solvers (see --list-solvers)")
    if args.mode == "compare" and "" in [name.strip() for name in args.compare.split(",")]:
        raise ProblemError("--compare", f"is {args.compare!r}: a name between two commas is missing")
    for name in ("live-gpus", "gone"):
        if getattr(args, name.replace("-", "_")) is not None and args.current is None:
            raise ProblemError(f"--{name}", "is about a live placement: give --current PLAN")
    if args.model_layers is not None and args.current is None and args.engine is None:
        raise ProblemError("--model-layers", "is for engines' files: give --engine or --current")
    if args.engine is not None and args.output is None:
        raise ProblemError("--engine", "needs a file to write: give --output FILE")
    if args.plan is not None and args.engine is None:
        raise ProblemError("--plan", "is for --engine; without one --output is the plan")
    if args.repair and args.current is None:
        raise ProblemError("--repair", "needs a live plan to mend: give --current PLAN")
    if args.mode == "explain" and args.explain:
        for name in ("solver", "seed"):
            if name in args.given:
                raise ProblemError(f"--{name}", "is not read with --explain PLAN: nothing is solved for it")
    if args.topology is not None and args.gpus is not None:
        raise ProblemError("--gpus", "cannot be given with --topology; one of them says what the GPUs are")
