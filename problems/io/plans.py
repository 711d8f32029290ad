"""The JSON (and .npz) form of plans."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, floats, integers, number, whole
from moeless_opt.problems.codec import NUMBER, Fields, kind_name, read_record
from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.files import atomic_write, format_of, named, read_bytes
from moeless_opt.problems.io.files import VERSION, check_header, json_bytes, parse_json, read_arrays
from moeless_opt.problems.plan import Certificate, Locality, Moves, Payback, Plan
from moeless_opt.problems.spec import MOST_ENTRIES, SPLITS, Placement, Split

__all__ = ["load_plan", "load_slots", "plan_format", "plan_from_json", "plan_to_json", "save_plan"]

_Read = TypeVar("_Read")
_ARRAYS = ("slots", "shares", "times", "imbalance")
_SCENARIOS = "scenario_shares"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON form of a plan."""
    certificate = plan.certificate
    return {
        "format": "moeless-plan",
        "version": VERSION,
        "name": plan.name,
        "problem_digest": plan.problem_digest,
        "split": plan.split,
        "share_entries": plan.share_entries,
        "unit": plan.unit,
        "experts": plan.experts,
        "layers": list(plan.layers),
        "slots": plan.slots_LGC.tolist(),
        "shares": plan.share_LGC.tolist(),
        "scenario_shares": None if plan.scenario_share_TLGC is None else plan.scenario_share_TLGC.tolist(),
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
        "locality": None if plan.locality is None else _written(plan.locality),
        "certificate": {
            "status": certificate.status.value,
            "value": certificate.value_L.tolist(),
            "lower_bound": certificate.lower_bound_L.tolist(),
            "gap": certificate.gap_L.tolist(),
            "bound": list(certificate.bound_L),
            "solver": certificate.solver,
            "seconds": certificate.seconds,
            "proof": certificate.proof,
            **(
                {}
                if certificate.loss is None
                else {"loss": certificate.loss, "loss_bound": certificate.loss_bound}
            ),
        },
    }


def _written(locality: Locality) -> dict[str, Any]:
    """What a plan says of its locality: per layer the value and the bound."""
    document = {}
    for name in ("traffic", "outside", "hops"):
        value_L, bound_L = getattr(locality, f"{name}_L"), getattr(locality, f"{name}_bound_L")
        if value_L is not None:
            document[name] = {"value": value_L.tolist(), "lower_bound": bound_L.tolist()}
    return document


def _locality(entry: Fields, layers: int) -> Locality | None:
    data = entry.take("locality", (dict, type(None)), None)
    if data is None:
        return None
    parts, told = Fields(data, entry.path("locality")), dict[str, FloatArray]()
    for name in ("traffic", "outside", "hops"):
        one = parts.take(name, dict, ... if name == "traffic" else None)
        if one is None:
            continue
        part = Fields(one, parts.path(name))
        for key, field in (("value", f"{name}_L"), ("lower_bound", f"{name}_bound_L")):
            told[field] = floats(part.path(key), part.take(key))
            if told[field].shape != (layers,):
                raise FormatError(part.path(key), f"has shape {told[field].shape}, must be ({layers},)")
        part.done()
    parts.done()
    return Locality(**told)


def plan_from_json(data: object, where: str = "") -> Plan:
    """Build a plan from its parsed JSON form (its derived figures are the verifier's to judge).

    Raises
    ------
    FormatError, ProblemError
        Naming the JSON path.
    """
    entry = Fields(data, where)
    check_header(entry, "moeless-plan")
    experts = entry.take("experts", int)
    slots = Placement.of(entry.take("slots"), experts, where).slots_LGC
    arrays = {key: floats(entry.path(key), entry.take(key)) for key in _ARRAYS[1:]}
    each = entry.take("scenario_shares", None, None)
    moves = Fields(entry.take("moves", dict), entry.path("moves"))
    proof = Fields(entry.take("certificate", dict), entry.path("certificate"))
    proof.take("status", str, "")  # derived from the values
    proof.take("gap", None, [])
    loss = proof.take("loss", (*NUMBER, type(None)), None)
    split = entry.take("split", str)
    if split not in SPLITS:
        raise FormatError(entry.path("split"), f"is {split!r}, must be one of {SPLITS}")
    entries = entry.take("share_entries", (int, type(None)), None)
    if entries is not None:
        entries = whole(entry.path("share_entries"), entries, low=1, high=MOST_ENTRIES)
    plan = Plan(
        slots_LGC=slots,
        share_LGC=arrays["shares"],
        experts=experts,
        layers=tuple(integers(entry.path("layers"), entry.take("layers", list)).tolist()),
        split=Split(split),
        share_entries=entries,
        time_LG=arrays["times"],
        imbalance_L=arrays["imbalance"],
        moves=Moves(
            count=moves.take("count", int),
            bytes=moves.take("bytes", int),
            fraction=number(moves.path("fraction"), moves.take("fraction", NUMBER)),
            count_L=integers(moves.path("by_layer"), moves.take("by_layer")),
            cold=moves.take("cold", bool),
        ),
        certificate=Certificate(
            value_L=floats(proof.path("value"), proof.take("value")),
            lower_bound_L=floats(proof.path("lower_bound"), proof.take("lower_bound")),
            bound_L=tuple(str(name) for name in proof.take("bound", list)),
            solver=proof.take("solver", str, ""),
            seconds=number(proof.path("seconds"), proof.take("seconds", NUMBER, 0.0)),
            proof=proof.take("proof", str, ""),
            loss=None if loss is None else number(proof.path("loss"), loss),
            loss_bound=number(proof.path("loss_bound"), proof.take("loss_bound", NUMBER, 0.0)),
        ),
        made_for=entry.take("problem_digest", str, ""),
        unit=entry.take("unit", str, "tokens"),
        name=entry.take("name", str, ""),
        payback=_payback(entry),
        locality=_locality(entry, len(slots)),
        scenario_share_TLGC=None if each is None else floats(entry.path("scenario_shares"), each),
    )
    for part in (moves, proof, entry):
        part.done()
    shape = slots.shape
    for key, array, want in (
        ("shares", plan.share_LGC, shape),
        ("times", plan.time_LG, shape[:2]),
        *(() if plan.scenario_share_TLGC is None else [_scenarios(plan.scenario_share_TLGC, shape)]),
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


def _scenarios(each: FloatArray, shape: tuple[int, ...]) -> tuple[str, FloatArray, tuple[int, ...]]:
    """Name, array and wanted shape of the scenarios' shares, however many scenarios there are."""
    return _SCENARIOS, each, (len(each) if each.ndim else 0, *shape)


def _payback(entry: Fields) -> Payback | None:
    data = entry.take("payback", (dict, type(None)), None)
    if data is None:
        return None
    payback: Payback = read_record(Payback, data, entry.path("payback"))
    return payback


def plan_format(path: str | PathLike[str]) -> str:
    """The format of a plan's file by its name: ``.json`` (also where there is no suffix) or ``.npz``.

    Raises
    ------
    FormatError
        If the suffix is another.
    """
    return format_of(path, (".json", ".npz"), default=".json")


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan: .npz if the path ends so (in any case), JSON if it ends in .json or has no suffix.

    Raises
    ------
    FormatError
        If the suffix is another, or the file cannot be written.
    """
    document = plan_to_json(plan)
    if plan_format(path) == ".json":
        atomic_write(path, json_bytes(document))
        return
    arrays = dict(zip(_ARRAYS, (plan.slots_LGC, plan.share_LGC, plan.time_LG, plan.imbalance_L), strict=True))
    if plan.scenario_share_TLGC is not None:
        arrays[_SCENARIOS] = plan.scenario_share_TLGC
    for key in arrays:
        document.pop(key)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, document=np.frombuffer(json_bytes(document), np.uint8), **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_plan(path: str | PathLike[str], *, content: bytes | None = None) -> Plan:
    """Read a plan that `save_plan` wrote, in either form, from a file, a pipe or standard input (``-``).

    With `content` its bytes have been read already.

    Raises
    ------
    FormatError, ProblemError
        If the file is no plan; naming the file.
    """
    return _read(path, content, plan_from_json)


def load_slots(path: str | PathLike[str], *, content: bytes | None = None) -> tuple[IntArray, int]:
    """The slots of a plan as they stand in its file, whatever rule they break, and its experts per layer.

    Raises
    ------
    FormatError, ProblemError
        If the file is no plan; naming the file.
    """
    return _read(path, content, _slots_from_json)


def _slots_from_json(data: object) -> tuple[IntArray, int]:
    entry = Fields(data, "")
    check_header(entry, "moeless-plan")
    experts = entry.take("experts", int)
    return integers("slots", entry.take("slots"), low=-(2**31), high=2**31 - 1), experts


def _read(path: str | PathLike[str], content: bytes | None, build: Callable[[object], _Read]) -> _Read:
    name, raw = os.fspath(path), read_bytes(path) if content is None else content
    if not raw.startswith(b"PK"):
        with named(name):
            return build(parse_json(raw, name))
    arrays = read_arrays(name, raw)
    if "document" not in arrays:
        raise FormatError(name, f"is no plan: it holds {sorted(arrays)}")
    missing = [key for key in _ARRAYS if key not in arrays]
    if missing:
        raise FormatError(name, f"is no plan archive: it has no array {missing[0]!r}")
    with named(name):
        document = parse_json(arrays["document"].tobytes(), f"{name}: document")
        if not isinstance(document, dict):
            raise FormatError("document", f"must be an object, got {kind_name(document)}")
        keys = (*_ARRAYS, _SCENARIOS) if _SCENARIOS in arrays else _ARRAYS
        return build(document | {key: arrays[key] for key in keys})
