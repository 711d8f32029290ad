"""What the command line says of where tokens come from, what links cost, and what belongs together."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, floats
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import named, read_bytes
from moeless_opt.problems.io import read_arrays
from moeless_opt.problems.io.recordings import is_many, read_sources
from moeless_opt.problems.spec import Groups, Priority, Problem, Topology, span

__all__ = ["with_nearness"]


def with_nearness(problem: Problem, args: argparse.Namespace) -> Problem:
    """The problem with what the command line says of nearness, and of the order of priorities."""
    changes: dict[str, Any] = {}
    loads = problem.loads
    if args.costs is not None:
        changes["topology"] = _costs(args.costs, problem.topology)
    if args.sources is not None:
        loads = loads.replace(**{"load_TLNE": None, "load_TLGE": None} | _sources(args.sources, problem))
    if args.flow is not None:
        loads = loads.replace(flow_LEE=_array(args.flow, "--flow"))
    if loads is not problem.loads:
        changes["loads"] = loads
    if args.groups is not None:
        changes["groups"] = _groups(args.groups, problem.experts)
    if args.priorities is not None:
        names = tuple(name.strip() for name in args.priorities.split(","))
        changes["objective"] = problem.objective.replace(priorities=names)
    if args.failure_rate is not None:
        wish = changes.get("objective", problem.objective)
        if "survival" not in wish.priorities:
            raise ProblemError(
                "--failure-rate", "is for the priority survival: give --priorities survival,..."
            )
        changes["objective"] = wish.replace(failure_rate=args.failure_rate)
    asked = changes.get("objective", problem.objective).priorities
    traded = args.mode == "pareto" and args.pareto == Priority.HOPS
    if args.flow is not None and Priority.HOPS not in asked and not traded:
        way = "--pareto hops" if args.mode == "pareto" else "add --priorities balance,hops"
        raise ProblemError("--flow", f"is for the priority hops, which is not asked for: {way}")
    return problem.replace(**changes, known=None) if changes else problem


def _array(path: str, option: str) -> FloatArray:
    """The one array of a ``.npy`` or ``.npz`` file."""
    with named(path):
        raw = read_bytes(path)
        arrays = read_arrays(path, raw) if raw.startswith(b"PK") else {"": _npy(raw)}
        if len(arrays) != 1:
            raise FormatError(option, f"{path} has the arrays {sorted(arrays)}, must have one")
        return floats(option, next(iter(arrays.values())))


def _npy(raw: bytes) -> Any:
    import io

    try:
        return np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError("array", f"is no .npy file ({error})") from None


def _costs(text: str, topology: Topology) -> Topology:
    if "=" not in text or os.path.lexists(text):
        return topology.with_costs(_array(text, "--costs"))
    levels = []
    for part in text.split(","):
        name, _, cost = part.partition("=")
        try:
            levels.append((name.strip(), float(cost)))
        except ValueError:
            raise ProblemError(
                "--costs", f"is {text!r}, must be like gpu=0.1,node=1, or a file of [GPUs, GPUs]"
            ) from None
    return topology.with_levels(levels)


def _sources(path: str, problem: Problem) -> dict[str, FloatArray]:
    """Loads by source, ``[sources, layers, experts]``: of every GPU, or of every node."""
    load_SLE = _array(path, "--sources") if not is_many(path) else _by_rank(path, problem)
    want, topology = problem.load_LE.shape, problem.topology
    if (
        load_SLE.ndim != 3
        or load_SLE.shape[1:] != want
        or len(load_SLE) not in (topology.gpus, topology.nodes)
    ):
        raise ProblemError(
            "--sources",
            f"{path} has shape {load_SLE.shape}, must be [{topology.gpus} GPUs or {topology.nodes} nodes, "
            f"{want[0]} layers, {want[1]} experts]",
        )
    if problem.loads.shape[0] > 1:
        raise ProblemError("--sources", "is for one scenario; choose one with --scenario")
    by_source = np.moveaxis(load_SLE, 0, 1)[None]
    key = "load_TLGE" if len(load_SLE) == topology.gpus else "load_TLNE"
    return {"load_TLE": by_source.sum(2), key: by_source}


def _by_rank(path: str, problem: Problem) -> FloatArray:
    """A folder or pattern of one recording for each rank, ``[ranks, layers, experts]``."""
    loads = read_sources(path, experts=problem.experts)
    assert loads.load_TLGE is not None
    if loads.layers != problem.loads.layers:
        raise ProblemError(
            "--sources", f"{path} has the layers {span(loads.layers)}, the loads {span(problem.loads.layers)}"
        )
    return np.moveaxis(loads.load_TLGE[0], 1, 0)


def _groups(text: str, experts: int) -> Groups:
    count, _, outside = text.partition(":")
    try:
        return Groups.even(experts, int(count), float(outside or 0))
    except ValueError:
        raise ProblemError(
            "--groups", f"is {text!r}, must be a number of groups, such as 8, or 8:0.1 (10 % outside)"
        ) from None
