"""Recordings of one row for each step, layer or batch: JSON lines, lists of objects, and logs.

Axis letters besides the usual ones: P tokens, K choices of a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.io.recordings.arrays import Array, Value, plain_numbers
from moeless_opt.problems.io.recordings.cells import Cells
from moeless_opt.problems.io.recordings.choose import CHOICES, LOGICAL, MAPS, PHYSICAL, Chooser
from moeless_opt.problems.io.recordings.evidence import repeats, whole_numbers
from moeless_opt.problems.io.recordings.source import Found, Source, cut, kind_text, shape_text
from moeless_opt.problems.io.recordings.tables import TableReader

__all__ = ["is_token_log", "json_rows", "read_rows", "read_token_log"]

_STEP = ("step", "iteration", "iter", "forward_pass_id", "batch_id")
_RANK = ("rank", "ep_rank", "global_rank")
_LAYER = ("layer", "layer_id", "layer_idx", "layer_index", "layer_number", "moe_layer")
_LINE = re.compile(r"Rank=(\d+) iter=(\d+) layer=(\S+) tokens_per_expert=\[([^\]]*)\]\s*$")


def json_rows(source: Source, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, each with where it stands."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise source.error(
                f"line {number}: is no valid JSON ({cut(str(error), 80)}); truncated?"
            ) from None
        if not isinstance(row, dict):
            raise source.error(f"line {number}: is {kind_text(row)}, must be an object, as in JSON lines")
        rows.append((f"line {number}", row))
    return rows


def read_rows(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    """Read objects, one for each step, layer or batch."""
    kinds = [_kind(source, row) for _, row in rows]
    known = [kind for kind in kinds if kind]
    if not known:
        first = ", ".join(rows[0][1]) if rows else "nothing"
        raise source.error(
            f"has rows without loads: {cut(first)}; expected layer, expert and count, or arrays such as "
            "tokens_per_expert, expert_load or top_indices"
        )
    if len(set(known)) > 1:
        other = rows[next(i for i, kind in enumerate(kinds) if kind and kind != known[0])][0]
        raise source.error(
            f"{other}: holds {set(known) - {known[0]}} where others hold {known[0]}: two recordings?"
        )
    used = [row for row, kind in zip(rows, kinds, strict=True) if kind]
    notes = () if len(used) == len(rows) else (f"{len(rows) - len(used)} rows without loads left out",)
    if known[0] == "cells":
        found = _table(source, used)
    elif known[0] == "layers":
        found = _by_layer(source, used)
    elif known[0] == "choices":
        found = _by_choice(source, used)
    elif known[0] == "requests":
        found = _by_request(source, used)
    else:
        found = _by_step(source, used)
    return found.with_notes(*notes)


def _kind(source: Source, row: Mapping[str, Any]) -> str:
    """What one row holds."""
    one_layer = any(key in row for key in _LAYER)
    if one_layer and TableReader(source).is_long(list(row)) and not _loads_key(source, row):
        return "cells"
    if one_layer and any(isinstance(row.get(key), list) for key in CHOICES):
        return "choices"
    if not _loads_key(source, row) and not any(isinstance(row.get(key), list) for key in CHOICES):
        return ""
    if one_layer:
        return "layers"
    return "steps" if _loads_key(source, row) else "requests"


def _loads_key(source: Source, row: Mapping[str, Any]) -> str | None:
    names = (source.key,) if source.key is not None else (*LOGICAL, *PHYSICAL)
    return next((name for name in names if isinstance(row.get(name), list)), None)


def _table(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    names = list(rows[0][1])
    for where, row in rows:
        if set(row) != set(names):
            raise source.error(
                f"{where}: has the keys {cut(', '.join(row))}, the first row has {cut(', '.join(names))}"
            )
    reader = TableReader(source)
    return reader.from_columns(names, [[row[name] for _, row in rows] for name in names])


def _whole(
    source: Source, where: str, row: Mapping[str, Any], names: tuple[str, ...], what: str
) -> int | None:
    """A row's step, rank or layer."""
    key = next((name for name in names if name in row), None)
    if key is None:
        return None
    value = row[key]
    if isinstance(value, str) and what == "layer" and len(found := re.findall(r"\d+", value)) == 1:
        value = int(found[0])
    if type(value) is not int or not 0 <= value < 2**31:
        raise source.error(f"{where}: {key} is {cut(repr(value), 40)}, must be a whole number from 0")
    return value


def _by_layer(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    """One layer's loads [experts] in each row."""
    cells = Cells(source)
    for where, row in rows:
        key = _loads_key(source, row)
        assert key is not None
        if key in PHYSICAL or any(name in row for name in MAPS) or source.as_ == "physical":
            arrays = {
                name: Value(source, name, _as_layer(value))
                for name, value in row.items()
                if isinstance(value, list)
            }
            load_E = Chooser(source).choose(arrays, "jsonl").load[0]
        else:
            load_E = plain_numbers(
                source, f"{where}: {key}", Value(source, f"{where}: {key}", row[key]).get()
            )
        if load_E.ndim != 1:
            raise source.error(f"{where}: {key} must be loads [experts] of the row's layer")
        if source.as_ is None and key not in PHYSICAL and row.get("num_experts", len(load_E)) != len(load_E):
            raise source.error(
                f"{where}: {key} has {len(load_E)} loads, num_experts says {row['num_experts']}"
            )
        cells.add(where, *_place(source, where, row), load_E)
    return cells.found("json-lines")


def _as_layer(value: list[Any]) -> list[Any]:
    return value if value and isinstance(value[0], list) else [value]


def _place(source: Source, where: str, row: Mapping[str, Any]) -> tuple[int | None, int | None, int]:
    layer = _whole(source, where, row, _LAYER, "layer")
    assert layer is not None
    return _whole(source, where, row, _RANK, "rank"), _whole(source, where, row, _STEP, "step"), layer


def _by_choice(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    """The experts that a layer's tokens chose, [tokens, top-k]: megatron-core's router trace."""
    cells = Cells(source, grows=True, adds=True)
    width, extra, tokens = None, 0, 0
    for where, row in rows:
        if "mtp_idx" in row or row.get("block", "decoder") != "decoder":
            extra += 1
            continue
        key = next(name for name in CHOICES if isinstance(row.get(name), list))
        if not row[key]:  # a rank without tokens in this step
            cells.add(where, *_place(source, where, row), np.zeros(1))
            continue
        chosen = Value(source, f"{where}: {key}", row[key]).get()
        if chosen.ndim != 2 or not whole_numbers(chosen) or chosen.min() < -1 or chosen.max() >= 2**31:
            raise source.error(
                f"{where}: {key} must be the experts of each token, [tokens, top-k], from 0 (-1: none)"
            )
        for name, have in (("num_tokens", len(chosen)), ("topk", chosen.shape[1])):
            if row.get(name, have) != have:
                raise source.error(f"{where}: {name} is {row[name]}, {key} has {have}")
        width = chosen.shape[1] if width is None else width
        if chosen.shape[1] != width:
            raise source.error(
                f"{where}: {chosen.shape[1]} choices for each token, the first row has {width}"
            )
        ids = chosen.astype(np.int64)
        if (twice := repeats(ids)).any():
            raise source.error(
                f"{where}: token {int(np.argmax(twice))} chooses an expert twice, which no router does"
            )
        cells.add(where, *_place(source, where, row), _counted(source, ids, f"{where}: {key}"))
        tokens += len(ids)
    notes = [f"{tokens} rows of tokens counted, top-{width}"]
    if extra:
        notes.append(f"{extra} rows of multi-token prediction layers left out")
    if cells.empty:
        raise source.error("has no rows of decoder layers with tokens")
    return cells.found("router-trace").with_notes(*notes)


def _counted(source: Source, ids: NDArray[Any], where: str) -> NDArray[Any]:
    """How often each expert occurs; the number of experts grows with what is seen, unless it is given."""
    return np.bincount(ids[ids >= 0], minlength=source.expert_count(int(ids.max(initial=0)) + 1, where))


def _by_step(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    """Loads of all layers in each row: each read like a file of its own."""
    chooser = Chooser(source)
    cells = Cells(source)
    form, notes = "", tuple[str, ...]()
    for i, (where, row) in enumerate(rows):
        arrays: dict[str, Array] = {name: Value(source, f"{where}: {name}", x) for name, x in row.items()}
        found = chooser.choose(arrays, "jsonl")
        form, notes = found.format, found.notes
        load = plain_numbers(source, where, found.load)
        if load.ndim == 3:
            load = load.sum(0)
        if load.ndim != 2 or form == "token-trace":
            raise source.error(f"{where}: must be loads [layers, experts] as in other rows")
        step, rank = _whole(source, where, row, _STEP, "step"), _whole(source, where, row, _RANK, "rank")
        for layer, load_E in enumerate(load):
            cells.add(where, rank, i if step is None else step, layer, load_E)
    return cells.found(form).with_notes(*notes)


def _by_request(source: Source, rows: list[tuple[str, dict[str, Any]]]) -> Found:
    """A request's trace [tokens, layers, top-k] in each row: one trace of all of them."""
    parts: list[NDArray[Any]] = []
    for where, row in rows:
        key = next(name for name in CHOICES if isinstance(row.get(name), list))
        if not row[key]:
            continue
        part = Value(source, f"{where}: {key}", row[key]).get()
        if part.ndim != 3 or (parts and part.shape[1:] != parts[0].shape[1:]):
            first = f", like the first {shape_text(parts[0].shape)}" if parts else ""
            raise source.error(
                f"{where}: {key} {shape_text(part.shape)} must be [tokens, layers, top-k]{first}"
            )
        parts.append(part)
    if not parts:
        raise source.error("holds no tokens")
    found = Chooser(source).count_choices(np.concatenate(parts), key, by_name=True)
    return found.with_notes(f"{len(parts)} requests")


# --- Megatron-LM's log -------------------------------------------------------------------------------------


def is_token_log(text: str) -> bool:
    """Whether a text is Megatron-LM's ``tokens_per_expert.log``."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return first.startswith("Rank=") and "tokens_per_expert=" in first


def read_token_log(source: Source, text: str) -> Found:
    """Read what each rank's own experts got, ``Rank=r iter=i layer=l tokens_per_expert=[..]``.

    A line lists the experts that live on the rank, after the dispatch: those of one expert-parallel group's
    ranks stand beside each other, and several groups add up. How many experts there are says which.
    """
    rows = list(_log_rows(source, text))
    ranks = sorted({rank for rank, *_ in rows})
    width = len(rows[0][3])
    experts = source.experts or (width if len(ranks) == 1 else None)
    if experts is None:
        raise source.error(
            f"lists {width} experts on each of {len(ranks)} ranks: they can be {width * len(ranks)} "
            "experts in one "
            f"expert-parallel group, or fewer in several; say how many a layer has (--experts, or --model)"
        )
    if experts % width:
        raise source.error(
            f"lists {width} experts on each rank, which {experts} experts per layer do not divide into"
        )
    group = experts // width
    sums: dict[tuple[int, int, int], NDArray[Any]] = {}
    for rank, step, layer, row in rows:
        key = (rank, step, layer)
        sums[key] = sums[key] + row if key in sums else row  # micro-batches
    cells = Cells(source)
    _check_group(source, ranks, group)
    for (rank, step, layer), row in sums.items():
        load_E = np.zeros(experts)
        load_E[rank % group * width : (rank % group + 1) * width] = row
        cells.add(f"rank {rank}", rank, step, layer, load_E)
    note = f"experts of {group} ranks side by side, {len(ranks) // group} groups added up"
    return cells.found("megatron-log", by_stage=group).with_notes(note)


def _check_group(source: Source, ranks: list[int], group: int) -> None:
    """All ranks of each expert-parallel group: neighbours, as Megatron numbers them."""
    for rank in ranks:
        first = rank - rank % group
        for other in range(first, first + group):
            if other not in ranks:
                raise source.error(
                    f"has no line of rank {other}, which is in one expert-parallel group with rank {rank}"
                )


def _log_rows(source: Source, text: str) -> Iterator[tuple[int, int, int, NDArray[Any]]]:
    width = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        layer = re.findall(r"\d+", match[3]) if match else []
        if match is None or len(layer) != 1:
            raise source.error(f"line {number}: {cut(line, 60)!r} is no line of tokens per expert; cut off?")
        try:
            row = np.array([float(cell) for cell in match[4].split(",")])
        except ValueError:
            raise source.error(f"line {number}: tokens_per_expert must be numbers") from None
        width = len(row) if width is None else width
        if len(row) != width:
            raise source.error(f"line {number}: {len(row)} experts, the first line has {width}: two models?")
        yield int(match[1]), int(match[2]), int(layer[0]), row
