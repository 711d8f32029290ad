"""The JSON form of problems.

Unknown keys are refused (that catches "topolgy"); where alternatives exist a ``kind`` key says which; large
arrays may lie in an .npz beside the JSON, with its hash.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from moeless_opt.problems.arrays import floats, integers
from moeless_opt.problems.codec import NUMBER, Fields, moved, plain_fields, read_record
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import STDIN, atomic_write, named, read_bytes, read_limit
from moeless_opt.problems.io.files import VERSION, check_header, json_bytes, parse_json, read_arrays
from moeless_opt.problems.io.plans import load_plan
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.io.time_models import time_from_json, time_to_json
from moeless_opt.problems.spec import (
    Fill,
    Groups,
    Known,
    Limits,
    Loads,
    ModelSpec,
    Objective,
    Placement,
    Problem,
    Sizing,
    Topology,
    from_recipe,
    model_preset,
)

__all__ = ["load_problem", "problem_from_json", "problem_to_json", "save_problem"]


def _loads(data: object, where: str, folder: Path) -> Loads:
    entry = Fields(data, where)
    kind = entry.take("kind", str, "inline")
    if kind == "recording":
        path = _beside(folder, entry)
        kinds: dict[str, Any] = {"key": str, "scenario": (str, int), "as": str}
        options = {key: entry.take(key, kind) for key, kind in kinds.items() if key in entry.data}
        entry.asked += kinds
        entry.done()
        with named(entry.path("path")):
            return read_loads(
                path, **{"as_" if key == "as" else key: value for key, value in options.items()}
            )
    if kind == "inline":
        load: Any = entry.take("load", list)
    elif kind == "npz":
        load = _npz_array(entry, folder)
    elif kind == "generated":
        load = _generated(entry)
    else:
        raise FormatError(
            entry.path("kind"), f"is {kind!r}, must be 'inline', 'npz', 'recording' or 'generated'"
        )
    extra = {
        "weight_T": entry.take("weights", list, None),
        "layers": tuple(entry.take("layers", list, ())),
        "scenarios": tuple(entry.take("scenarios", list, ())),
        "skipped": tuple(entry.take("skipped", list, ())),
        "load_TLNE": entry.take("by_node", list, None),
        "load_TLGE": entry.take("by_gpu", list, None),
        "flow_LEE": entry.take("flow", list, None),
        "source": entry.take("source", str, ""),
        "notes": tuple(entry.take("notes", list, ())),
    }
    entry.done()
    for key in ("layers", "skipped"):
        integers(f"{where}.{key}", list(extra[key]))
    try:
        return Loads(load_TLE=load, **extra)
    except ProblemError as error:
        raise moved(error, "loads", f"{where}.load" if error.where.startswith("loads[") else where) from None


def _beside(folder: Path, entry: Fields) -> str:
    """The file that an entry names, looked up in the document's folder; never standard input."""
    path = str(folder / entry.take("path", str))
    return os.path.join(".", path) if path == STDIN else path


def _npz_array(entry: Fields, folder: Path) -> Any:
    path = _beside(folder, entry)
    key = entry.take("key", str, "load")
    want = entry.take("sha256", str)
    with named(entry.path("path")):
        raw = read_bytes(path)
    if (found := hashlib.sha256(raw).hexdigest()) != want:
        raise FormatError(
            entry.path("sha256"), f"{path} has hash {found[:12]}..., the problem names {want[:12]}..."
        )
    with named(entry.path("path")):
        arrays = read_arrays(path, raw)
    if key not in arrays:
        raise FormatError(entry.path("key"), f"{path} has no array {key!r}; it has {sorted(arrays)}")
    return arrays[key]


def _generated(entry: Fields) -> Any:
    recipe = entry.take("recipe", dict)
    drift = recipe.get("drift")
    sizes = [recipe.get("layers"), recipe.get("experts")]
    sizes += [drift.get("steps"), drift.get("domains")] if isinstance(drift, Mapping) else []
    cells = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    if cells > read_limit() // 8:
        raise FormatError(
            entry.path("recipe"), f"asks for {cells} loads; up to {read_limit() // 8} are generated"
        )
    return from_recipe(recipe, entry.path("recipe"))


def _model(data: object, where: str) -> ModelSpec:
    if isinstance(data, str):
        return model_preset(data)
    spec: ModelSpec = read_record(ModelSpec, data, where)
    return spec


def _current(data: object, where: str, folder: Path, problem: Problem) -> Placement:
    entry = Fields(data, where)
    kind = entry.take("kind", str, "inline")
    if kind == "inline":
        slots: Any = entry.take("slots", list)
    elif kind == "plan":
        path = _beside(folder, entry)
        with named(entry.path("path")):
            slots = load_plan(path).slots_LGC
    else:
        raise FormatError(entry.path("kind"), f"is {kind!r}, must be 'inline' or 'plan'")
    repair = entry.take("repair", bool, False)
    entry.done()
    if not repair:
        return Placement.of(slots, problem.experts, where)
    try:
        return Placement.repaired(slots, problem.experts, problem.capacity_LG)
    except ProblemError as error:
        raise moved(error, "current", where) from None


def problem_from_json(data: object, *, folder: str | PathLike[str] = ".", where: str = "") -> Problem:
    """Build a problem from its parsed JSON form.

    Parameters
    ----------
    data : object
        The parsed document.
    folder : path
        Where files that the document names are looked up.
    where : str
        Prefix of the paths in error messages.

    Raises
    ------
    FormatError, ProblemError
        Naming the JSON path.
    """
    entry = Fields(data, where)
    check_header(entry, "moeless-problem")
    base = Path(folder)
    loads = _loads(entry.take("loads", dict), entry.path("loads"), base)
    topology = Topology.from_dict(entry.take("topology", dict), entry.path("topology"))
    optional: dict[str, Any] = {}
    readers: dict[str, tuple[Any, Callable[[Any, str], Any]]] = {
        "model": ((str, dict), _model),
        "sizing": (dict, lambda d, w: read_record(Sizing, d, w)),
        "time": (dict, time_from_json),
        "objective": (dict, lambda d, w: read_record(Objective, d, w)),
        "limits": (dict, lambda d, w: read_record(Limits, d, w)),
        "known": (dict, _known),
    }
    for key, (kind, read) in readers.items():
        value = entry.take(key, kind, None)
        if value is not None:
            optional[key] = read(value, entry.path(key))
    size = entry.take("expert_bytes", (int, list), None)
    if size is not None:
        optional["expert_bytes_L"] = integers(entry.path("expert_bytes"), size, low=1)
    split = entry.take("split", str, "fractional")
    fill = entry.take("fill", str, "none")
    entries = entry.take("share_entries", (int, type(None)), None)
    name = entry.take("name", str, "")
    live = entry.take("current", dict, None)
    groups = entry.take("groups", dict, None)
    if groups is not None:
        optional["groups"] = _groups(groups, entry.path("groups"), loads.shape[2])
    entry.done()
    optional |= {"share_entries": entries, "name": name}
    problem = Problem(loads=loads, topology=topology, split=split, fill=fill, **optional)
    if live is None:
        return problem
    return problem.replace(current=_current(live, entry.path("current"), base, problem))


def _groups(data: object, where: str, experts: int) -> Groups:
    entry = Fields(data, where)
    outside = entry.take("max_outside", NUMBER, 0.0)
    if ("count" in entry.data) == ("group" in entry.data):
        raise FormatError(
            where, "needs 'count' (groups of as many experts) or 'group' (one number per expert)"
        )
    try:
        if "count" in entry.data:
            groups = Groups.even(experts, entry.take("count", int), outside)
        else:
            groups = Groups(group_E=entry.take("group", list), max_outside=outside)
    except ProblemError as error:
        raise moved(error, "groups", where) from None
    entry.asked += ("count", "group")
    entry.done()
    return groups


def _known(data: object, where: str) -> Known:
    entry = Fields(data, where)
    known = Known(
        source=entry.take("source", str),
        best_L=tuple(floats(entry.path("best"), entry.take("best", list, [])).tolist()),
        bound_L=tuple(floats(entry.path("bound"), entry.take("bound", list, [])).tolist()),
    )
    entry.done()
    return known


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """The JSON form of a problem, arrays inline."""
    loads = problem.loads
    entry: dict[str, Any] = {"kind": "inline", "load": loads.load_TLE.tolist()}
    if loads.layers != tuple(range(problem.layers)):
        entry["layers"] = list(loads.layers)
    for key, value in (
        ("weights", None if loads.weight_T is None else loads.weight_T.tolist()),
        ("scenarios", list(loads.scenarios)),
        ("skipped", list(loads.skipped)),
        ("by_node", None if loads.load_TLNE is None else loads.load_TLNE.tolist()),
        ("by_gpu", None if loads.load_TLGE is None else loads.load_TLGE.tolist()),
        ("flow", None if loads.flow_LEE is None else loads.flow_LEE.tolist()),
        ("source", loads.source),
        ("notes", list(loads.notes)),
    ):
        if value:
            entry[key] = value
    document: dict[str, Any] = {"format": "moeless-problem", "version": VERSION}
    if problem.name:
        document["name"] = problem.name
    document |= {"loads": entry, "topology": problem.topology.to_dict(), "split": problem.split}
    if problem.fill != Fill.NONE:
        document["fill"] = problem.fill
    if problem.share_entries is not None:
        document["share_entries"] = problem.share_entries
    if problem.model is not None:
        document["model"] = plain_fields(problem.model)
    if problem.expert_bytes_L is not None:
        document["expert_bytes"] = problem.expert_bytes_L.tolist()
    if problem.current is not None:
        document["current"] = {"kind": "inline", "slots": problem.current.slots_LGC.tolist()}
        if problem.current.partial:
            document["current"]["repair"] = True
    if plain_fields(problem.time):
        document["time"] = time_to_json(problem.time)
    for key, record in (
        ("sizing", problem.sizing),
        ("objective", problem.objective),
        ("limits", problem.limits),
    ):
        if part := plain_fields(record):
            document[key] = part
    if problem.groups is not None:
        group = {"group": problem.groups.group_E.tolist(), "max_outside": problem.groups.max_outside}
        document["groups"] = group
    if problem.known is not None:
        known = problem.known
        document["known"] = {"source": known.source, "best": list(known.best_L), "bound": list(known.bound_L)}
    return document


def load_problem(path: str | PathLike[str]) -> Problem:
    """Read a problem from a JSON file, a pipe or standard input (``-``).

    Raises
    ------
    FormatError, ProblemError
        Naming the file, and the JSON path in it.
    """
    with named(path):
        return problem_from_json(parse_json(read_bytes(path), str(path)), folder=Path(path).parent)


def save_problem(problem: Problem, path: str | PathLike[str]) -> None:
    """Write a problem as JSON; the file appears whole or not at all."""
    atomic_write(path, json_bytes(problem_to_json(problem)))
