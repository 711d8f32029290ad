"""The problem that the arguments tell of: a document, an instance or a recording, with what they change."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.adapters import OURS, EngineMap, read_map, wanted_layers
from moeless_opt.api import make_problem
from moeless_opt.cli.nearness import with_nearness
from moeless_opt.cli.options import RECORDINGS
from moeless_opt.cli.units import gpu_list, per_gpu, size
from moeless_opt.elastic import limits_left
from moeless_opt.problems.arrays import IntArray, integers, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import STDIN, gunzipped, named, read_bytes
from moeless_opt.problems.instances import instance_names, load_instance
from moeless_opt.problems.io import parse_json, problem_from_json, read_json
from moeless_opt.problems.io.recordings import is_many, read_loads
from moeless_opt.problems.spec import (
    PRIORITIES,
    TOPOLOGY_PRESETS,
    Limits,
    Loads,
    Objective,
    Placement,
    Problem,
    Risk,
    Sizing,
    Topology,
    held_LGE,
    model_preset,
    risk_rule,
    span,
)
from moeless_opt.problems.text import bytes_text
from moeless_opt.terminal import say

__all__ = ["read_problem"]


def read_problem(args: argparse.Namespace) -> Problem:
    """The problem, with all that the command line says of it.

    Raises
    ------
    ProblemError
        If a file cannot be read, or an option is of no use for it.
    """
    name = args.problem
    if name != STDIN and not os.path.lexists(name.replace("\0", "?")) and not is_many(name):
        if name not in instance_names():
            near = difflib.get_close_matches(name, instance_names(), n=1)
            hint = (
                f"; did you mean the instance {near[0]!r}?" if near else " nor the name of a shipped instance"
            )
            raise FormatError(name or "problem", f"is no file{hint}")
        problem = _override(load_instance(name), args, f"{name} is a shipped instance")
    else:
        raw = None if is_many(name) else read_bytes(name)  # once: it may be a pipe
        document = None if raw is None else _document(raw, name)
        if document is None:
            problem = _recorded(raw, args)
        else:
            with named(name):
                problem = problem_from_json(document, folder=Path(name).parent)
            problem = _override(problem, args, f"{name} is a problem")
    if args.lost is not None:
        problem = _lowered(problem, args)
    problem = _with_live(with_nearness(problem, args), args)
    if args.risk is not None and problem.loads.shape[0] == 1 and problem.objective.risk != Risk.EXPECTED:
        raise ProblemError(
            "--risk", f"is {args.risk}, and the loads are of one scenario; give more of them (--also FILE)"
        )
    for key in ("max_moves", "max_move_bytes"):
        if getattr(args, key) is not None and problem.current is None:
            option = "--" + key.replace("_", "-")
            raise ProblemError(option, "needs a live plan to move from: give --current PLAN")
    if args.tolerance is not None and _all_for_balance(problem):
        raise ProblemError(
            "--tolerance", "gives balance up for fewer moves, and nothing is live: give --current"
        )
    if args.max_move_bytes is not None and not problem.bytes_L.any():
        raise ProblemError("--max-move-bytes", "needs the size of an expert: give --model NAME")
    return problem


def _all_for_balance(problem: Problem) -> bool:
    """Whether nothing but balance is planned for: slots cost nothing, and nothing is live to move from."""
    slots = problem.topology.slots_G is not None and problem.sizing.policy in ("slots", "fill")
    return problem.current is None and slots and problem.objective.priorities == PRIORITIES


def _document(raw: bytes, name: str) -> Any:
    """One of our documents; None where the file is none (and is read as a recording)."""
    start = gunzipped(raw, name)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"{") or b'"format"' not in start:
        return None
    data = parse_json(raw, name)
    form = data.get("format") if isinstance(data, dict) else None
    if form == "moeless-plan":
        raise FormatError(name, "is a plan, not a problem; use it with --current, --check or --explain")
    return data if isinstance(form, str) else None


def _recorded(raw: bytes | None, args: argparse.Namespace) -> Problem:
    options = {read: getattr(args, key) for key, read in RECORDINGS.items() if getattr(args, key) is not None}
    if args.experts is None and args.model is not None:
        options["experts"] = model_preset(args.model).experts
    loads = read_loads(args.problem, content=raw, **options)
    if args.also is not None:
        loads = _together(loads, args, options)
    elif args.weights is not None:
        raise ProblemError("--weights", "are those of several workloads: give --also FILE")
    topology = _topology(args, None)
    if topology is None:
        raise ProblemError(
            "--gpus",
            f"is missing: {args.problem} is a recording and says nothing of the GPUs; give --gpus NxG with "
            "--slots C (or --memory), or --topology",
        )
    return make_problem(
        loads,
        topology,
        model=args.model,
        split=args.split or "fractional",
        fill=args.fill or "none",
        share_entries=args.share_entries,
        balance_tolerance=args.tolerance,
        objective=None if args.risk is None else Objective(**risk_rule(args.risk)),
        limits=_limits(args, None),
        sizing=args.sizing,
        name=Path(args.problem).stem,
    )


def _together(loads: Loads, args: argparse.Namespace, options: dict[str, Any]) -> Loads:
    """The recording and those of ``--also``, each a scenario of as many tokens."""
    files, weights = [args.problem, *args.also], None
    if args.weights is not None:
        try:
            weights = [float(part) for part in args.weights.split(",")]
        except ValueError:
            raise ProblemError("--weights", f"is {args.weights!r}, must be numbers such as 0.7,0.3") from None
        if len(weights) != len(files):
            raise ProblemError("--weights", f"has {len(weights)} numbers, there are {len(files)} workloads")
    parts = [loads, *(read_loads(file, **options) for file in args.also)]
    return Loads.together(parts, names=files, weights=weights)


def _override(problem: Problem, args: argparse.Namespace, what: str) -> Problem:
    for key in (*RECORDINGS, "also", "weights"):
        if getattr(args, key) is not None:
            raise ProblemError(f"--{key}", f"is for recordings; {what}")
    changes: dict[str, Any] = {}
    topology = _topology(args, problem.topology)
    if topology is not None and topology != problem.topology:
        changes |= {"topology": topology, "known": None}
    if args.model is not None:
        changes["model"] = model_preset(args.model)
    if args.split is not None and args.split != problem.split:
        changes |= {"split": args.split, "known": None}
    if args.fill is not None and args.fill != problem.fill:
        changes |= {"fill": args.fill, "known": None}
    if args.share_entries is not None and args.share_entries != problem.share_entries:
        changes |= {"share_entries": args.share_entries, "known": None}
    if args.sizing is not None:
        changes["sizing"] = Sizing.of(args.sizing)
    if any(
        one is not None for one in (args.max_moves, args.max_move_bytes, args.spread, args.spread_experts)
    ):
        changes["limits"] = _limits(args, problem.limits)
    wish: dict[str, Any] = {} if args.risk is None else risk_rule(args.risk)
    if args.tolerance is not None:
        wish["balance_tolerance"] = args.tolerance
    if wish:
        changes["objective"] = problem.objective.replace(**wish)
    if not changes:
        return problem
    if args.current is not None or topology is None or problem.current is None:
        return problem.replace(**changes | ({"current": None} if args.current is not None else {}))
    return _relive(problem.replace(**changes | {"current": None}), problem.current.slots_LGC, args)


def _lowered(problem: Problem, args: argparse.Namespace) -> Problem:
    """The problem with limits that the GPUs that are not lost can keep, as `repair` has them."""
    limits, kept = problem.limits, limits_left(problem)
    domains = np.unique(problem.topology.failure_domain_G).size
    if limits.spread > domains:  # never could be
        kept = kept.replace(spread=limits.spread)
    said = [
        f"{name} {getattr(kept, name)} instead of {getattr(limits, name)}"
        for name in ("spread", "min_replicas")
        if getattr(kept, name) != getattr(limits, name)
    ]
    if len(kept.pinned) < len(limits.pinned):
        said.append(f"{len(limits.pinned) - len(kept.pinned)} pins on lost GPUs dropped")
    if said and not args.quiet:
        say(f"note: {', '.join(said)}: what the GPUs that are left can hold")
    return problem.replace(limits=kept) if said else problem


# --- what is live ------------------------------------------------------------------------------------------


def _with_live(problem: Problem, args: argparse.Namespace) -> Problem:
    """The problem with the live placement of ``--current``: a plan, or a map in an engine's own format."""
    if args.current is None:
        return problem
    found = read_map(args.current, broken=args.repair)
    with named(args.current):
        wanted = wanted_layers(found, problem.loads.layers, problem.model, args.model_layers)
        gpus = _live_gpus(found, problem, args)
        same = gpus == problem.topology.gpus and args.gone is None
        if args.repair or (found.experts == problem.experts and not (same and args.lost is None)):
            slots_LGC, _ = found.slots(gpus=gpus, layers=wanted)
            return _relive(problem.replace(current=None), slots_LGC, args)
        experts = problem.experts if found.engine != OURS else found.experts
        live = found.placement(gpus=gpus, experts=experts, layers=wanted)
        if same and args.lost is None:
            return problem.replace(current=live)
        return _relive(problem.replace(current=None), live.slots_LGC, args)


def _live_gpus(found: EngineMap, problem: Problem, args: argparse.Namespace) -> int:
    """GPUs of a live map, which many formats leave out: by the slots that each has."""
    now, slots = problem.topology.gpus, found.map_LS.shape[1]
    given: int | None = args.live_gpus
    if found.gpus is not None:
        if given is not None and given != found.gpus:
            raise ProblemError("--live-gpus", f"is {given}, the map says {found.gpus}")
        return found.gpus
    if given is not None:
        return whole("--live-gpus", given, low=1)
    if args.gone is None and slots == int(problem.capacity_LG.max()) * now:
        return now
    each = int(problem.capacity_LG.max())
    fit = sorted({now} if slots % now == 0 and slots // now <= each else set())
    if each and slots % each == 0:
        fit = sorted({*fit, slots // each})
    if len(fit) != 1:
        either = f": {' or '.join(map(str, fit))} GPUs fit" if fit else ""
        raise ProblemError(
            "gpus", f"of {slots} slots per layer are not in the map{either}; say how many with --live-gpus N"
        )
    return fit[0]


def _relive(problem: Problem, slots_LGC: Any, args: argparse.Namespace) -> Problem:
    """The problem with what is left of a live placement: nothing on lost GPUs; mended if that is asked."""
    slots = integers("current", slots_LGC, low=-(2**31), high=2**31 - 1)
    layers, gpus, experts = problem.layers, problem.topology.gpus, problem.experts
    if slots.ndim != 3 or len(slots) != layers:
        raise ProblemError("current", f"has shape {slots.shape}, must be [{layers}, GPUs, slots]")
    before = int((slots >= 0).sum())
    slots = _same_gpus(slots, gpus, args)
    if args.lost:
        slots[:, gpu_list(args.lost, gpus, "--lost")] = -1
    if args.repair:
        live = Placement.repaired(slots, experts, problem.capacity_LG)
    else:
        missing = not held_LGE(slots.astype(np.int32), experts).any(1).all()
        live = Placement(slots_LGC=slots.astype(np.int32), experts=experts, partial=bool(missing))
    gone = before - int((live.slots_LGC >= 0).sum())
    alone = int((live.replicas_LE == 0).sum())
    notes = [f"{gone} of {before} live replicas are lost or dropped"] if gone else []
    notes += [f"{alone} experts are left without a replica"] if alone else []
    if notes and not args.quiet:
        say(f"note: {'; '.join(notes)}")
    return problem.replace(current=live)


def _same_gpus(slots_LGC: IntArray, gpus: int, args: argparse.Namespace) -> IntArray:
    """A live placement on the GPUs that there are now: without those that are gone, new ones empty."""
    slots_LGC, notes = slots_LGC.copy(), []
    if args.gone is not None:
        gone = gpu_list(args.gone, slots_LGC.shape[1], "--gone")
        slots_LGC = np.delete(slots_LGC, gone, axis=1)
        notes.append(
            f"taken without the GPUs that are gone ({span(gone.tolist())}), the others numbered anew in order"
        )
    have = slots_LGC.shape[1]
    if have > gpus and not args.repair:
        raise ProblemError(
            "current",
            f"is for {have} GPUs, the problem has {gpus}: say which are gone (such as --gone "
            f"{span(range(gpus, have))}), or keep them all and name the dead ones (--lost)",
        )
    if have > gpus:
        slots_LGC = slots_LGC[:, :gpus]
        notes.append(f"for {have} GPUs, taken as the first {gpus}")
    if have < gpus:
        more = np.full((len(slots_LGC), gpus - have, slots_LGC.shape[2]), -1, dtype=slots_LGC.dtype)
        slots_LGC = np.concatenate([slots_LGC, more], axis=1)
        which = f"GPU {have} is" if have + 1 == gpus else f"GPUs {have}-{gpus - 1} are"
        notes.append(f"for {have} GPUs; {which} new and empty")
    for note in notes if not args.quiet else []:
        say(f"note: {args.current or 'the live placement'} is {note}")
    return slots_LGC


def _limits(args: argparse.Namespace, given: Limits | None) -> Limits | None:
    """The problem's limits with what the command line says of moves and domains."""
    changes: dict[str, Any] = {}
    if args.max_moves is not None:
        changes["max_moves"] = args.max_moves
    if args.spread is not None:
        changes["spread"] = args.spread
    if args.spread_experts is not None:
        if args.spread is None and (given is None or given.spread == 1):
            raise ProblemError("--spread", "is missing: --spread-experts says which experts it is for")
        changes["spread_experts"] = args.spread_experts
    if args.max_move_bytes is not None:
        changes["max_move_bytes"] = size(args.max_move_bytes, "--max-move-bytes")
    return (given or Limits()).replace(**changes) if changes else given


# --- the GPUs ----------------------------------------------------------------------------------------------


def _topology(args: argparse.Namespace, given: Topology | None) -> Topology | None:
    """The GPUs of the command line, or the problem's with what the command line changes; None if neither."""
    memory = None if args.memory is None else size(args.memory, "--memory")
    base, room = _base(args, given, memory)
    if base is None:
        for option in ("slots", "memory", "reserve", "speed", "lost"):
            if getattr(args, option) is not None:
                raise ProblemError("--gpus", f"is missing: --{option} needs it, or --topology")
        return None
    changes: dict[str, Any] = {}
    if args.slots is not None:
        values_G = per_gpu(args.slots, base.gpus, "--slots", base.slots_G)
        changes["slots_G"] = integers("topology.slots", values_G)
    if memory is not None:
        room = np.full(base.gpus, memory, dtype=np.int64)
        changes["memory_G"] = room
    if args.reserve is not None:
        changes["memory_G"] = _reserved(size(args.reserve, "--reserve"), room)
    if args.speed is not None:
        changes["speed_G"] = per_gpu(args.speed, base.gpus, "--speed", base.speed_G)
    made = base.replace(**changes) if changes else base
    return made if args.lost is None else _without(made, args.lost)


def _base(
    args: argparse.Namespace, given: Topology | None, memory: int | None
) -> tuple[Topology | None, Any]:
    """The GPUs before slots, memory and speeds of the command line; and the memory that each has in all."""
    if args.topology is not None:
        if args.topology in TOPOLOGY_PRESETS:
            # With slots alone the memory does not bind, as before anything was said of it.
            one = 1 if args.slots is not None and memory is None else None
            base = Topology.preset(args.topology, slots=one)
            return base, np.full(base.gpus, TOPOLOGY_PRESETS[args.topology][2] * 10**9, dtype=np.int64)
        if args.topology != STDIN and not os.path.lexists(args.topology.replace("\0", "?")):
            raise ProblemError(
                "--topology", f"{args.topology!r} is no preset ({', '.join(TOPOLOGY_PRESETS)}) and no file"
            )
        with named(args.topology):
            base = Topology.from_dict(read_json(args.topology))
        return base, base.memory_G
    if args.gpus is None:
        return given, None if given is None else given.memory_G
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)", args.gpus)
    if found is None:
        raise ProblemError("--gpus", f"is {args.gpus!r}, must be like 4x8 (nodes x GPUs per node) or 8")
    # What is recommended is how many slots there should be: any number will do.
    any_slots = 1 if args.mode == "recommend" or args.slots is not None else None
    return Topology.uniform(int(found[1] or 1), int(found[2]), slots=any_slots, memory=memory), None


def _reserved(reserve: int, room_G: Any) -> Any:
    if room_G is None:
        raise ProblemError(
            "--reserve",
            "needs the memory of the GPUs to take it from: give --memory, or a preset as --topology",
        )
    if (room_G <= reserve).any():
        raise ProblemError(
            "--reserve",
            f"is {bytes_text(reserve)}, the GPUs have {bytes_text(int(room_G.min()))}: none is left",
        )
    return room_G - reserve


def _without(topology: Topology, text: str) -> Topology:
    """The topology with dead GPUs: they keep their numbers and have no room."""
    lost = gpu_list(text, topology.gpus, "--lost")
    if len(lost) == topology.gpus:
        raise ProblemError("--lost", "names all GPUs; at least one must be left")
    changes: dict[str, Any] = {}
    for key in ("slots_G", "memory_G"):
        array = getattr(topology, key)
        if array is not None:
            changes[key] = np.where(np.isin(np.arange(topology.gpus), lost), 0, array)
    return topology.replace(name=f"{topology.name} without {text}", **changes)
