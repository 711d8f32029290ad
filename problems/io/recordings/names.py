"""Loads in dictionaries: by the name or number of a layer, an expert, a step or a rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.io.recordings.arrays import Array, Value, plain_numbers
from moeless_opt.problems.io.recordings.source import Found, Source, cut, shape_text

__all__ = ["named_loads", "names_part"]

_WORDS = {
    "expert": ("expert", "experts", "exp", "e"),
    "layer": ("layer", "layers", "block", "blocks", "moe", "mlp", "l", "h"),
    "step": ("step", "steps", "iteration", "iter", "pass", "window", "t"),
    "rank": ("rank", "ranks", "gpu", "device", "ep"),
}
_BARE = "number"


def named_loads(source: Source, data: Mapping[Any, Any], where: str = "") -> Found | None:
    """Loads in a dictionary whose keys name layers (experts, steps, ranks) by number; None if it has none.

    Keys beside them that hold no numbers (the model's name) are left alone.
    """
    kinds: dict[Any, tuple[str, int]] = {}
    for key, value in data.items():
        kind = _kind(str(key))
        if kind is not None and not isinstance(value, str | bool | None):
            kinds[key] = kind
    said = {kind for kind, _ in kinds.values()}
    if not said or (said == {_BARE} and len(kinds) < len(data)):
        return None
    for key, value in data.items():
        if key not in kinds and not isinstance(value, str | bool | int | float | None):
            raise source.error(
                f"{where or 'it'} has {cut(repr(key), 60)} beside keys that name a {sorted(said)[0]}, "
                "which names "
                "none; leave it out, or give its key"
            )
    if len(said) > 1:
        some = ", ".join(str(key) for key in list(kinds)[:4])
        raise source.error(f"{where or 'it'} has keys of several kinds ({cut(some)}); name layers alone")
    what = said.pop()
    numbered: dict[int, Any] = {}
    for key, (_, number) in kinds.items():
        if number in numbered:
            raise source.error(f"{where or 'it'} names {what} {number} twice, by {key!r} and another key")
        numbered[number] = data[key]
    entries = dict(sorted(numbered.items()))
    if what == "expert":
        return _experts(source, entries, where)
    if what in ("layer", _BARE):
        found = _layers(source, entries, where, sure=what == "layer")
        return (
            None
            if found is None
            else found.with_notes("keys taken as numbers of layers")
            if what == _BARE
            else found
        )
    return _parts(source, entries, what, where)


def names_part(key: str) -> bool:
    """Whether a key names a layer, an expert, a step or a rank by more than a bare number."""
    kind = _kind(key)
    return kind is not None and kind[0] != _BARE


def _kind(key: str) -> tuple[str, int] | None:
    """What a key names, and its number: ``layer_3``, ``model.layers.3.mlp``, ``expert 7``, ``3``."""
    digits = re.findall(r"\d+", key)
    if len(digits) != 1 or len(digits[0]) > 9 or "-" in key:
        return None
    if key.strip() == digits[0]:
        return _BARE, int(digits[0])
    words = re.findall(r"[a-z]+", key.lower())
    if len(words) > 1 or len(words[0]) > 1:
        words = [word for word in words if len(word) > 1]
    found = [kind for kind, known in _WORDS.items() if set(words) & set(known)]
    return (found[0], int(digits[0])) if len(found) == 1 else None


def _layers(source: Source, entries: Mapping[int, Any], where: str, *, sure: bool) -> Found | None:
    """A row [experts] (or rows [steps, experts]) for each layer."""
    rows: list[NDArray[Any]] = []
    sparse = False
    for number, value in entries.items():
        at = f"{where}layer {number}"
        if isinstance(value, Mapping):
            row = _by_expert(source, value, at)
            sparse = True
        else:
            row = _numbers(source, at, value)
        if row.ndim == 2 and not sure:
            return None  # steps, layers or scenarios: the numbers alone do not say
        if row.ndim not in (1, 2) or 0 in row.shape:
            raise source.error(
                f"{at} has shape {shape_text(row.shape)}, must be loads [experts] or [steps, experts]"
            )
        rows.append(row)
    if sparse:
        width = source.expert_count(max(row.shape[-1] for row in rows), "it")
        rows = [np.pad(row, (0, width - len(row))) if row.ndim == 1 else row for row in rows]
    for number, row in zip(entries, rows, strict=True):
        if row.shape != rows[0].shape:
            raise source.error(
                f"layer {number} has shape {shape_text(row.shape)}, the first {shape_text(rows[0].shape)}: "
                "rows must be equal"
            )
    load = np.stack(rows) if rows[0].ndim == 1 else np.stack(rows, axis=1)
    return Found(load=load, format="by-layer", axis="steps", layers=tuple(entries), sparse=sparse)


def _by_expert(source: Source, value: Mapping[Any, Any], at: str) -> NDArray[Any]:
    """A row of loads from a dictionary of experts; those that it does not name have none."""
    found: dict[int, float] = {}
    for key, load in value.items():
        kind = _kind(str(key))
        if kind is None or kind[0] not in ("expert", _BARE):
            raise source.error(f"{at}: {cut(repr(key), 40)} names no expert")
        if kind[1] in found:
            raise source.error(f"{at} names expert {kind[1]} twice")
        if type(load) not in (int, float):
            raise source.error(f"{at}, expert {kind[1]}: the load is no number")
        found[kind[1]] = float(load)
    if not found or max(found) >= 10**6:
        raise source.error(f"{at} names {'no expert' if not found else f'expert {max(found)}'}")
    row = np.zeros(max(found) + 1)
    for expert, load in found.items():
        row[expert] = load
    return row


def _experts(source: Source, entries: Mapping[int, Any], where: str) -> Found:
    """A column [layers] for each expert, or a dictionary by layer."""
    count = source.expert_count(max(entries) + 1, "it")
    columns: dict[int, dict[int, float]] = {}
    for number, value in entries.items():
        at = f"{where}expert {number}"
        if isinstance(value, Mapping):
            kinds = [_kind(str(key)) for key in value]
            if any(kind is None or kind[0] not in ("layer", _BARE) for kind in kinds):
                raise source.error(f"{at}: its keys must name layers")
            row = _numbers(source, at, list(value.values()))
            columns[number] = {
                kind[1]: float(x) for kind, x in zip(kinds, row, strict=True) if kind is not None
            }
        else:
            row = _numbers(source, at, value)
            if row.ndim != 1:
                raise source.error(f"{at} has shape {shape_text(row.shape)}, must be a load for each layer")
            columns[number] = dict(enumerate(row.tolist()))
    layers = sorted(set().union(*columns.values()))
    if not layers or count * len(layers) * 8 > source.max_bytes:
        raise source.error(f"{where}has no layers" if not layers else f"takes over {source.most}")
    load_LE = np.zeros((len(layers), count))
    for expert, column in columns.items():
        for layer, load in column.items():
            load_LE[layers.index(layer), expert] = load
    notes = (
        () if len(columns) == count else (f"{count - len(columns)} experts are not named and taken as idle",)
    )
    return Found(load=load_LE, format="by-expert", layers=tuple(layers), notes=notes, sparse=True)


def _parts(source: Source, entries: Mapping[int, Any], what: str, where: str) -> Found:
    """Steps, or ranks, each of which holds loads of all layers."""
    parts: list[Found] = []
    for number, value in entries.items():
        at = f"{where}{what} {number}, "
        inner = named_loads(source, value, at) if isinstance(value, Mapping) else None
        if inner is None:
            inner = Found(load=_numbers(source, at.rstrip(", "), value), format="json")
        if inner.load.ndim != 2:
            raise source.error(f"{at}loads must be [layers, experts]")
        if parts and (inner.load.shape, inner.layers) != (parts[0].load.shape, parts[0].layers):
            raise source.error(
                f"{at}loads are {shape_text(inner.load.shape)}, those before "
                f"{shape_text(parts[0].load.shape)}"
            )
        parts.append(inner)
    load = np.stack([part.load for part in parts])
    if what == "rank":
        if list(entries) != list(range(len(entries))):
            raise source.error(f"{where}has nothing of rank {_gap(entries)}, but of others")
        return Found(
            load=load.sum(0), format="by-rank", layers=parts[0].layers, notes=(f"{len(load)} ranks added up",)
        )
    steps = tuple(f"step {number}" for number in entries)
    return Found(load=load, format="by-step", axis="steps", layers=parts[0].layers, scenarios=steps)


def _gap(entries: Mapping[int, Any]) -> int:
    return next(number for number in range(len(entries) + 1) if number not in entries)


def _numbers(source: Source, at: str, value: Any) -> NDArray[Any]:
    array = (value if isinstance(value, Array) else Value(source, at, value)).get()
    return plain_numbers(source, at, array)
