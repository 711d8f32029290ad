"""Time models as JSON: in a problem, and as files of several, by name: what measurements leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from moeless_opt.problems.codec import Fields, plain_fields, read_record
from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.files import atomic_write, named
from moeless_opt.problems.io.files import VERSION, check_header, json_bytes, read_json
from moeless_opt.problems.spec import TimeModel

__all__ = ["load_time_models", "save_time_models", "time_from_json", "time_to_json"]

FORMAT = "moeless-time-models"


def time_from_json(data: object, where: str) -> TimeModel:
    """Build a time model from its parsed JSON form; `where` begins the paths in error messages."""
    entry = Fields(data, where)
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
    model: TimeModel = read_record(TimeModel, given, where)
    return model


def time_to_json(time: TimeModel) -> dict[str, Any]:
    """A time model as JSON."""
    return {"kind": "curve" if time.has_curve else "linear", **plain_fields(time)}


def load_time_models(path: str | PathLike[str]) -> dict[str, TimeModel]:
    """Read time models by their names, as `runtime.gpu_check` measures them on a GPU.

    Parameters
    ----------
    path : path
        Written by `save_time_models`.

    Returns
    -------
    dict of str to TimeModel
        In the order of the file.

    Raises
    ------
    FormatError
        Naming the file, and the JSON path in it.
    """
    with named(path):
        entry = Fields(read_json(path), "")
        check_header(entry, FORMAT)
        models = entry.take("models", dict)
        entry.done()
        return {name: time_from_json(one, f"models[{name!r}]") for name, one in models.items()}


def save_time_models(path: str | PathLike[str], models: Mapping[str, TimeModel]) -> None:
    """Write time models by name; the file appears whole or not at all."""
    document = {name: time_to_json(one) for name, one in models.items()}
    atomic_write(path, json_bytes({"format": FORMAT, "version": VERSION, "models": document}))
