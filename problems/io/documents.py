"""The JSON (and .npz) forms of problems, topologies and plans.

A document names its ``format`` and ``version``; unknown keys are refused (that catches "topolgy"); where
alternatives exist a ``kind`` key says which; large arrays may lie in an .npz beside the JSON, with its
hash. Files are written aside and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moeless_opt.problems.arrays import floats, integers, number
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.plan.plan import Certificate, Moves, Payback, Plan
from moeless_opt.problems.spec.architecture import ModelSpec, model_preset
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.problem import Known, Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.problems.spec.wishes import SPLITS, Limits, Objective, Sizing

__all__ = [
    "MAX_BYTES",
    "VERSION",
    "atomic_write",
    "load_plan",
    "load_problem",
    "plan_from_json",
    "plan_to_json",
    "problem_from_json",
    "problem_to_json",
    "read_json",
    "save_plan",
    "save_problem",
    "schema",
    "topology_from_json",
]

VERSION = 1
MAX_BYTES = 256 * 2**20
"""Largest JSON document that is read; larger arrays belong into an .npz beside it."""
MAX_UNPACKED = 2**30
"""Largest .npz archive that is read, in bytes after decompression."""


class _Fields:
    """The keys of one JSON object: each is taken once, and none may be left over."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise FormatError(where or "document", f"must be an object, got {_kind(data)}")
        self.data = dict(data)
        self.where = where
        self.asked: list[str] = []

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str, kind: type | tuple[type, ...] | None = None, default: Any = ...) -> Any:
        self.asked.append(key)
        if key not in self.data:
            if default is not ...:
                return default
            near = difflib.get_close_matches(key, list(self.data), n=1)
            hint = f"; {near[0]!r} is not a key, was {key!r} meant?" if near else ""
            raise FormatError(self.where or "document", f"{key!r} is missing{hint}")
        value = self.data.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds)
        ):
            want = " or ".join(_NAMES.get(k, str(k)) for k in kinds if k is not None)
            raise FormatError(self.path(key), f"must be {want}, got {_kind(value)}")
        return value

    def done(self) -> None:
        for key in self.data:
            near = difflib.get_close_matches(str(key), self.asked, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(self.asked))}"
            raise FormatError(self.path(key), f"unknown key; {known}")


_NUMBER = (int, float)
_NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return _NAMES.get(bool if isinstance(value, bool) else type(value), type(value).__name__)


def _record(cls: Callable[..., Any], data: object, where: str) -> Any:
    """Build a flat dataclass from an object whose keys are its fields' names."""
    entry = _Fields(data, where)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    given = {name: entry.take(name) for name in names if name in entry.data}
    entry.asked = names
    entry.done()
    try:
        return cls(**given)
    except ProblemError as error:
        raise _moved(error, re.split(r"[.\[]", error.where)[0], where) from None
    except (TypeError, ValueError) as error:
        raise FormatError(where, f"cannot be read: {error}") from None


# --- files -------------------------------------------------------------------------------------------------


def read_json(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON file, refusing what is too large, not JSON, or holds NaN.

    Raises
    ------
    FormatError
        Naming the file and what would be right.
    """
    name = os.fspath(path)
    try:
        size = os.stat(name).st_size
        if size > max_bytes:
            raise FormatError(
                name,
                f"is {size / 2**20:.0f} MiB; JSON is read up to {max_bytes / 2**20:.0f} MiB: "
                "keep large arrays in an .npz",
            )
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FormatError(name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(name, "is not JSON: not even UTF-8 text") from None

    def refuse(token: str) -> NoReturn:
        raise FormatError(name, f"holds {token}, which is no JSON number; loads must be finite")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise FormatError(name, f"has the key {twice!r} twice in one object; once is enough")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(
            name, f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise FormatError(name, "is nested too deeply to be one of ours") from None
    except ValueError as error:  # a number of thousands of digits
        raise FormatError(name, f"holds a number that cannot be read: {error}") from None


def atomic_write(path: str | PathLike[str], data: bytes) -> None:
    """Write a file aside and rename it, so that it is there whole or not at all."""
    target = Path(path)
    try:
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise FormatError(str(target), f"cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, target)
    except BaseException as error:
        Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FormatError(str(target), f"cannot be written: {error.strerror}") from None
        raise


def schema(name: str) -> dict[str, Any]:
    """The published JSON schema (draft 2020-12) of a ``problem``, ``plan`` or ``topology``.

    The schema of a problem refers to that of a topology by its ``$id``.

    Raises
    ------
    ProblemError
        If there is none of that name.
    """
    if name not in ("problem", "plan", "topology"):
        raise ProblemError("schema", f"{name!r} is unknown; there are problem, plan, topology")
    path = Path(__file__).parents[1] / "schema" / f"{name}.schema.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _header(entry: _Fields, want: str) -> None:
    found = entry.take("format", str)
    if found != want:
        raise FormatError(entry.path("format"), f"is {found!r}, must be {want!r}")
    version = entry.take("version", int)
    if version != VERSION:
        raise FormatError(entry.path("version"), f"is {version}, this release reads version {VERSION}")


# --- parts of a problem ------------------------------------------------------------------------------------


def topology_from_json(data: object, where: str = "topology") -> Topology:
    """Read a topology of kind ``uniform``, ``preset`` or ``explicit``."""
    entry = _Fields(data, where)
    kind = entry.take("kind", str, "explicit" if "gpus" in entry.data else "uniform")
    links_data = entry.take("links", dict, None)
    links = None if links_data is None else _record(Links, links_data, f"{where}.links")
    try:
        if kind == "uniform":
            topology = Topology.uniform(
                entry.take("nodes", int, 1),
                entry.take("gpus_per_node", int),
                slots=entry.take("slots", (int, list), None),
                memory=entry.take("memory", (int, list), None),
                speed=entry.take("speed", (int, float, list), 1.0),
                links=links,
                name=entry.take("name", str, ""),
            )
        elif kind == "preset":
            topology = Topology.preset(
                entry.take("name", str),
                slots=entry.take("slots", int, None),
                memory=entry.take("memory", int, None),
                expert_memory=entry.take("expert_memory", _NUMBER, 0.6),
            )
            topology = topology if links is None else topology.replace(links=links)
        elif kind == "explicit":
            topology = _explicit(entry, links or Links())
        else:
            raise FormatError(entry.path("kind"), f"is {kind!r}, must be 'uniform', 'preset' or 'explicit'")
    except ProblemError as error:
        raise _moved(error, "topology", where) from None
    entry.done()
    return topology


def _explicit(entry: _Fields, links: Links) -> Topology:
    gpus = entry.take("gpus", list)
    columns: dict[str, list[Any]] = {"node": [], "speed": [], "slots": [], "memory": [], "domain": []}
    for i, gpu in enumerate(gpus):
        part = _Fields(gpu, f"{entry.where}.gpus[{i}]")
        columns["node"].append(part.take("node", int, 0))
        columns["speed"].append(part.take("speed", _NUMBER, 1.0))
        for key in ("slots", "memory", "domain"):
            columns[key].append(part.take(key, int, None))
        part.done()
    for key in ("slots", "memory", "domain"):
        missing = [i for i, value in enumerate(columns[key]) if value is None]
        if missing and len(missing) < len(gpus):
            raise FormatError(f"{entry.where}.gpus[{missing[0]}]", f"{key!r} is missing; other GPUs have it")
    return Topology(
        node_G=integers(f"{entry.where}.node", columns["node"]),
        speed_G=floats(f"{entry.where}.speed", columns["speed"]),
        **{
            f"{key}_G": None
            if not gpus or columns[key][0] is None
            else integers(f"{entry.where}.{key}", columns[key])
            for key in ("slots", "memory", "domain")
        },
        links=links,
        name=entry.take("name", str, ""),
    )


def _moved(error: ProblemError, old: str, new: str) -> ProblemError:
    """The same error at the place where the document has it."""
    return type(error)(error.where.replace(old, new, 1), error.what)


def _loads(data: object, where: str, folder: Path) -> Loads:
    entry = _Fields(data, where)
    kind = entry.take("kind", str, "inline")
    if kind == "recording":
        path = folder / entry.take("path", str)
        kinds: dict[str, Any] = {"key": str, "scenario": (str, int)}
        options = {key: entry.take(key, kind) for key, kind in kinds.items() if key in entry.data}
        entry.asked += kinds
        entry.done()
        return Loads.read(path, **options)
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
        "source": entry.take("source", str, ""),
        "notes": tuple(entry.take("notes", list, ())),
    }
    entry.done()
    for key in ("layers", "skipped"):
        integers(f"{where}.{key}", list(extra[key]))
    try:
        return Loads(load_TLE=load, **extra)
    except ProblemError as error:
        raise _moved(error, "loads", f"{where}.load" if error.where.startswith("loads[") else where) from None


def _npz_array(entry: _Fields, folder: Path) -> Any:
    path = folder / entry.take("path", str)
    key = entry.take("key", str, "load")
    want = entry.take("sha256", str)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(entry.path("path"), f"{path} cannot be read: {error.strerror}") from None
    if (found := hashlib.sha256(raw).hexdigest()) != want:
        raise FormatError(
            entry.path("sha256"), f"{path} has hash {found[:12]}..., the problem names {want[:12]}..."
        )
    try:
        _check_size(io.BytesIO(raw), str(path))
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            if key not in archive:
                raise FormatError(entry.path("key"), f"{path} has no array {key!r}; it has {sorted(archive)}")
            return archive[key]
    except ProblemError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen kinds on damaged archives
        raise FormatError(entry.path("path"), f"{path} is no .npz archive: {error}") from None


def _check_size(file: Any, name: str) -> None:
    """Refuse an archive that unpacks to more than is sensible, before anything is unpacked."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_UNPACKED:
        raise FormatError(
            name, f"unpacks to {size / 2**20:.0f} MiB; up to {MAX_UNPACKED / 2**20:.0f} MiB are read"
        )


def _generated(entry: _Fields) -> Any:
    from moeless_opt.problems.spec.generators import from_recipe

    recipe = entry.take("recipe", dict)
    drift = recipe.get("drift")
    sizes = [recipe.get("layers"), recipe.get("experts")]
    sizes += [drift.get("steps"), drift.get("domains")] if isinstance(drift, Mapping) else []
    cells = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    if cells > MAX_UNPACKED // 8:
        raise FormatError(
            entry.path("recipe"), f"asks for {cells} loads; up to {MAX_UNPACKED // 8} are generated"
        )
    return from_recipe(recipe, entry.path("recipe"))


def _model(data: object, where: str) -> ModelSpec:
    if isinstance(data, str):
        return model_preset(data)
    spec: ModelSpec = _record(ModelSpec, data, where)
    return spec


def _current(data: object, where: str, folder: Path, problem: Problem) -> Placement:
    entry = _Fields(data, where)
    kind = entry.take("kind", str, "inline")
    if kind == "inline":
        slots: Any = entry.take("slots", list)
    elif kind == "plan":
        slots = load_plan(folder / entry.take("path", str)).slots_LGC
    else:
        raise FormatError(entry.path("kind"), f"is {kind!r}, must be 'inline' or 'plan'")
    repair = entry.take("repair", bool, False)
    entry.done()
    if not repair:
        return Placement.of(slots, problem.experts, where)
    try:
        return Placement.repaired(slots, problem.experts, problem.capacity_LG)
    except ProblemError as error:
        raise _moved(error, "current", where) from None


def _time(data: object, where: str) -> TimeModel:
    entry = _Fields(data, where)
    kind = entry.take("kind", str, "linear")
    if kind not in ("linear", "curve"):
        raise FormatError(entry.path("kind"), f"is {kind!r}, must be 'linear' or 'curve'")
    allowed = {
        "linear": ("token_cost", "activation_cost", "launch"),
        "curve": ("curve_tokens", "curve_activated", "curve_time"),
    }
    given = {key: entry.take(key) for key in (*allowed[kind], "unit", "name") if key in entry.data}
    entry.asked += allowed[kind]
    entry.done()
    if kind == "curve":
        for key in allowed[kind]:
            if key not in given:
                raise FormatError(where, f"{key!r} is missing")
    model: TimeModel = _record(TimeModel, given, where)
    return model


# --- problems ----------------------------------------------------------------------------------------------


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
    entry = _Fields(data, where)
    _header(entry, "moeless-problem")
    base = Path(folder)
    loads = _loads(entry.take("loads", dict), entry.path("loads"), base)
    topology = topology_from_json(entry.take("topology", dict), entry.path("topology"))
    optional: dict[str, Any] = {}
    readers: dict[str, tuple[Any, Callable[[Any, str], Any]]] = {
        "model": ((str, dict), _model),
        "sizing": (dict, lambda d, w: _record(Sizing, d, w)),
        "time": (dict, _time),
        "objective": (dict, lambda d, w: _record(Objective, d, w)),
        "limits": (dict, lambda d, w: _record(Limits, d, w)),
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
    name = entry.take("name", str, "")
    live = entry.take("current", dict, None)
    entry.done()
    problem = Problem(loads=loads, topology=topology, split=split, name=name, **optional)
    if live is None:
        return problem
    return problem.replace(current=_current(live, entry.path("current"), base, problem))


def _known(data: object, where: str) -> Known:
    entry = _Fields(data, where)
    known = Known(
        source=entry.take("source", str),
        best_L=tuple(floats(entry.path("best"), entry.take("best", list, [])).tolist()),
        bound_L=tuple(floats(entry.path("bound"), entry.take("bound", list, [])).tolist()),
    )
    entry.done()
    return known


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a flat dataclass that differ from their defaults."""
    result = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if value != field.default:
            result[field.name] = value
    return result


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
        ("source", loads.source),
        ("notes", list(loads.notes)),
    ):
        if value:
            entry[key] = value
    document: dict[str, Any] = {"format": "moeless-problem", "version": VERSION}
    if problem.name:
        document["name"] = problem.name
    document |= {"loads": entry, "topology": problem.topology.to_dict(), "split": problem.split}
    if problem.model is not None:
        document["model"] = _plain(problem.model)
    if problem.expert_bytes_L is not None:
        document["expert_bytes"] = problem.expert_bytes_L.tolist()
    if problem.current is not None:
        document["current"] = {"kind": "inline", "slots": problem.current.slots_LGC.tolist()}
        if problem.current.partial:
            document["current"]["repair"] = True
    if time := _plain(problem.time):
        document["time"] = {"kind": "curve" if problem.time.has_curve else "linear", **time}
    for key, record in (
        ("sizing", problem.sizing),
        ("objective", problem.objective),
        ("limits", problem.limits),
    ):
        if part := _plain(record):
            document[key] = part
    if problem.known is not None:
        known = problem.known
        document["known"] = {"source": known.source, "best": list(known.best_L), "bound": list(known.bound_L)}
    return document


def load_problem(path: str | PathLike[str]) -> Problem:
    """Read a problem from a JSON file.

    Raises
    ------
    FormatError, ProblemError
        Naming the file or the JSON path.
    """
    return problem_from_json(read_json(path), folder=Path(path).parent)


def save_problem(problem: Problem, path: str | PathLike[str]) -> None:
    """Write a problem as JSON; the file appears whole or not at all."""
    atomic_write(path, _dump(problem_to_json(problem)))


def _dump(document: Any) -> bytes:
    return (json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n").encode()


# --- plans -------------------------------------------------------------------------------------------------

_ARRAYS = ("slots", "shares", "times", "imbalance")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON form of a plan."""
    certificate = plan.certificate
    return {
        "format": "moeless-plan",
        "version": VERSION,
        "name": plan.name,
        "problem_digest": plan.problem_digest,
        "split": plan.split,
        "unit": plan.unit,
        "experts": plan.experts,
        "layers": list(plan.layers),
        "slots": plan.slots_LGC.tolist(),
        "shares": plan.share_LGC.tolist(),
        "times": plan.time_LG.tolist(),
        "imbalance": plan.imbalance_L.tolist(),
        "moves": {
            "count": plan.moves.count,
            "bytes": plan.moves.bytes,
            "fraction": plan.moves.fraction,
            "by_layer": plan.moves.count_L.tolist(),
            "cold": plan.moves.cold,
        },
        "payback": None
        if plan.payback is None
        else {"saved_per_pass": plan.payback.saved_per_pass, "cost": plan.payback.cost},
        "certificate": {
            "status": certificate.status.value,
            "value": certificate.value_L.tolist(),
            "lower_bound": certificate.lower_bound_L.tolist(),
            "gap": certificate.gap_L.tolist(),
            "bound": list(certificate.bound_L),
            "solver": certificate.solver,
            "seconds": certificate.seconds,
            "proof": certificate.proof,
        },
    }


def plan_from_json(data: object, where: str = "") -> Plan:
    """Build a plan from its parsed JSON form (its derived figures are the verifier's to judge).

    Raises
    ------
    FormatError, ProblemError
        Naming the JSON path.
    """
    entry = _Fields(data, where)
    _header(entry, "moeless-plan")
    experts = entry.take("experts", int)
    slots = Placement.of(entry.take("slots"), experts, where).slots_LGC
    arrays = {key: floats(entry.path(key), entry.take(key)) for key in _ARRAYS[1:]}
    moves = _Fields(entry.take("moves", dict), entry.path("moves"))
    proof = _Fields(entry.take("certificate", dict), entry.path("certificate"))
    proof.take("status", str, "")  # derived from the values
    proof.take("gap", None, [])
    split = entry.take("split", str)
    if split not in SPLITS:
        raise FormatError(entry.path("split"), f"is {split!r}, must be 'fractional' or 'equal'")
    plan = Plan(
        slots_LGC=slots,
        share_LGC=arrays["shares"],
        experts=experts,
        layers=tuple(integers(entry.path("layers"), entry.take("layers", list)).tolist()),
        split=split,
        time_LG=arrays["times"],
        imbalance_L=arrays["imbalance"],
        moves=Moves(
            count=moves.take("count", int),
            bytes=moves.take("bytes", int),
            fraction=number(moves.path("fraction"), moves.take("fraction", _NUMBER)),
            count_L=integers(moves.path("by_layer"), moves.take("by_layer")),
            cold=moves.take("cold", bool),
        ),
        certificate=Certificate(
            value_L=floats(proof.path("value"), proof.take("value")),
            lower_bound_L=floats(proof.path("lower_bound"), proof.take("lower_bound")),
            bound_L=tuple(str(name) for name in proof.take("bound", list)),
            solver=proof.take("solver", str, ""),
            seconds=number(proof.path("seconds"), proof.take("seconds", _NUMBER, 0.0)),
            proof=proof.take("proof", str, ""),
        ),
        made_for=entry.take("problem_digest", str, ""),
        unit=entry.take("unit", str, "tokens"),
        name=entry.take("name", str, ""),
        payback=_payback(entry),
    )
    for part in (moves, proof, entry):
        part.done()
    shape = slots.shape
    for key, array, want in (
        ("shares", plan.share_LGC, shape),
        ("times", plan.time_LG, shape[:2]),
        ("imbalance", plan.imbalance_L, shape[:1]),
        ("moves.by_layer", plan.moves.count_L, shape[:1]),
        ("certificate.value", plan.certificate.value_L, shape[:1]),
        ("certificate.lower_bound", plan.certificate.lower_bound_L, shape[:1]),
        ("certificate.bound", np.empty(len(plan.certificate.bound_L)), shape[:1]),
        ("layers", np.empty(len(plan.layers)), shape[:1]),
    ):
        if array.shape != want:
            raise FormatError(entry.path(key), f"has shape {array.shape}, must be {want}")
    return plan


def _payback(entry: _Fields) -> Payback | None:
    data = entry.take("payback", (dict, type(None)), None)
    if data is None:
        return None
    payback: Payback = _record(Payback, data, entry.path("payback"))
    return payback


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan: .npz if the path ends so, JSON otherwise."""
    document = plan_to_json(plan)
    if Path(path).suffix != ".npz":
        atomic_write(path, _dump(document))
        return
    for key in _ARRAYS:
        document.pop(key)
    arrays = dict(zip(_ARRAYS, (plan.slots_LGC, plan.share_LGC, plan.time_LG, plan.imbalance_L), strict=True))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, document=np.frombuffer(_dump(document), np.uint8), **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_plan(path: str | PathLike[str]) -> Plan:
    """Read a plan that `save_plan` wrote.

    Raises
    ------
    FormatError, ProblemError
        If the file is no plan.
    """
    if Path(path).suffix != ".npz":
        return plan_from_json(read_json(path))
    try:
        _check_size(path, os.fspath(path))
        with np.load(path, allow_pickle=False) as archive:
            if "document" not in archive:
                raise FormatError(os.fspath(path), f"is no plan: it holds {sorted(archive)}")
            document = json.loads(archive["document"].tobytes())
            return plan_from_json(document | {key: archive[key] for key in _ARRAYS})
    except ProblemError:
        raise
    except OSError as error:
        raise FormatError(os.fspath(path), f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zipfile and numpy raise a dozen kinds on damaged archives
        raise FormatError(os.fspath(path), f"is no plan archive: {error}") from None
