"""Recordings of several files: a folder or a glob with one for each rank, layer or step."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray
from moeless_opt.problems.files import read_bytes
from moeless_opt.problems.io import parse_json
from moeless_opt.problems.io.recordings.arrays import plain_numbers
from moeless_opt.problems.io.recordings.source import Found, Source, cut, shape_text

__all__ = ["is_many", "rank_files", "read_many", "told_by_name"]

_MOST_FILES = 10_000
_BESIDE = re.compile(  # what recorders write beside their counts
    r"\.|.*\.bin$|router_state_rank\d+\.pt$|rank\d+_raw\.safetensors$|rank\d+_numtokens\.json$|meta_info\.json$|.*\.md$"
)
_META = "meta_info.json"  # TensorRT-LLM's


def is_many(path: str) -> bool:
    """Whether a path is a folder, or a pattern that is no file itself."""
    if os.path.isdir(path):
        return True
    return "\0" not in path and not os.path.lexists(path) and glob.has_magic(path) and bool(glob.glob(path))


def told_by_name(name: str, what: str) -> int | None:
    """The number that a file's name gives for what it holds: ``rank``, ``layer`` or ``step``."""
    words = {"rank": "rank|ep_rank", "layer": "layer|layers", "step": "step|iter|iteration|pass|window"}[what]
    found = re.findall(
        rf"(?:^|[^a-z])(?:{words})[_\-.]?(\d{{1,9}})(?![a-z\d])", os.path.basename(name).lower()
    )
    return int(found[0]) if len(found) == 1 else None


def read_many(source: Source, read: Callable[[Source, bytes], Found]) -> Found:
    """Read each file and put them together; a rank that is missing, or there twice, is named."""
    names = _files(source)
    meta = _meta(source, names)
    parts, left = [], source.max_bytes
    for name in names:
        raw = read_bytes(name, limit=left)
        left -= len(raw)
        one = replace(source, path=name, layer=told_by_name(name, "layer"))
        part = read(one, raw)
        rank = told_by_name(name, "rank")
        if part.rank is None:
            part = replace(part, rank=rank)
        elif rank is not None and rank != part.rank:
            raise one.error(f"was written by rank {part.rank}, its name says {rank}")
        parts.append(_in_three(one, part))
    if meta is not None:
        _check_meta(source, meta, parts)
    if len(parts) == 1:
        return _checked_alone(source, names[0], parts[0])
    return _together(source, names, parts)


def rank_files(path: str) -> list[str]:
    """The files of ranks 0, 1, ... of a folder or pattern, one each.

    Raises
    ------
    FormatError
        If a file's name tells no rank, or not each rank has one.
    """
    source = Source(path, None, None, 0)
    found: dict[int, str] = {}
    for name in _files(source):
        rank = told_by_name(name, "rank")
        if rank is None:
            raise source.error(f"{os.path.basename(name)} names no rank, such as rank0 in its name")
        if rank in found:
            raise source.error(f"has several files of rank {rank}: {os.path.basename(name)} and another")
        found[rank] = name
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise source.error(f"the file of rank {missing[0]} is missing")
    return [found[rank] for rank in sorted(found)]


def _checked_alone(source: Source, name: str, part: Found) -> Found:
    missing = [rank for rank in part.ranks if rank != part.rank]
    if part.rank is not None and (part.rank or missing):
        other = missing[0] if missing else 0
        raise source.error(
            f"has only {os.path.basename(name)}, of rank {part.rank}: the file of rank {other} is missing"
        )
    return part


def _files(source: Source) -> list[str]:
    if os.path.isdir(source.path):
        names = [os.path.join(source.path, name) for name in os.listdir(source.path)]
        whole = [name for name in names if os.path.isfile(name)]
        names = [name for name in whole if not _BESIDE.match(os.path.basename(name))]
        names += [name for name in whole if os.path.basename(name) == _META]
    else:
        names = [name for name in glob.glob(source.path) if os.path.isfile(name)]
    if not names:
        raise source.error("is a folder without recordings" if os.path.isdir(source.path) else "fits no file")
    if len(names) > _MOST_FILES:
        raise source.error(f"has {len(names)} files; up to {_MOST_FILES} are read")
    return sorted(names)


def _meta(source: Source, names: list[str]) -> dict[str, object] | None:
    """TensorRT-LLM's word on how many experts and ranks there are; taken out of the names."""
    path = next((name for name in names if os.path.basename(name) == _META), None)
    if path is None:
        beside = os.path.join(os.path.dirname(names[0]), _META)
        path = beside if names[0].endswith(".safetensors") and os.path.isfile(beside) else None
    else:
        names.remove(path)
    if path is None:
        return None
    meta = parse_json(read_bytes(path), path)
    if not isinstance(meta, dict):
        raise source.error(f"{_META} is no object")
    if not names:
        raise source.error(f"has {_META} and no rank*.safetensors beside it")
    return meta


def _check_meta(source: Source, meta: dict[str, object], parts: list[Found]) -> None:
    experts, ranks = meta.get("num_experts"), meta.get("ep_size")
    if type(experts) is int and experts != parts[0].load.shape[-1]:
        raise source.error(
            f"{_META} says {experts} experts, the statistics have {parts[0].load.shape[-1]}: two models?"
        )
    if type(ranks) is int and 0 < ranks <= _MOST_FILES:
        parts[:] = [replace(part, ranks=tuple(range(ranks))) for part in parts]


def _in_three(source: Source, part: Found) -> Found:
    """A part with a leading axis, and numbers for its layers."""
    load = plain_numbers(source, "loads", part.load)
    if load.ndim == 1 and source.layer is not None:
        load = load[None]
    if load.ndim == 2 and source.layer is not None and not part.layers:
        return replace(part, load=load[:, None], axis="steps", layers=(source.layer,))
    if load.ndim not in (2, 3) or 0 in load.shape:
        raise source.error(f"the loads have shape {shape_text(load.shape)}, must be [layers, experts]")
    load = load if load.ndim == 3 else load[None]
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise source.error("has loads that are no numbers of at least 0")
    layers = part.layers or tuple(range(load.shape[1]))
    return replace(part, load=load, layers=layers)


def _together(source: Source, names: Sequence[str], parts: list[Found]) -> Found:
    """The parts as one: ranks added up, layers and steps set side by side."""
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if part.format != first.format:
            raise source.error(
                f"{os.path.basename(name)} is {part.format}, {os.path.basename(names[0])} {first.format}: "
                "two recordings?"
            )
        if part.load.shape[-1] != first.load.shape[-1] and not (part.sparse and first.sparse):
            raise source.error(
                f"{os.path.basename(name)} has {part.load.shape[-1]} experts, {os.path.basename(names[0])} "
                f"{first.load.shape[-1]}: two models?"
            )
    parts = _with_steps(source, names, parts)
    ranks = sorted({part.rank for part in parts if part.rank is not None})
    if ranks and any(part.rank is None for part in parts):
        name = next(n for n, part in zip(names, parts, strict=True) if part.rank is None)
        raise source.error(f"{os.path.basename(name)} names no rank, other files do")
    _check_ranks(source, ranks, parts)
    layers = sorted({layer for part in parts for layer in part.layers})
    steps = list(dict.fromkeys(step for part in parts for step in part.scenarios))
    width = max(part.load.shape[-1] for part in parts)
    if len(steps) * len(layers) * width * 8 > source.max_bytes:
        raise source.error(f"takes over {source.most} together; raise MOELESS_MAX_READ to read it")
    load_TLE = np.zeros((len(steps), len(layers), width))
    seen_RTL = np.zeros((max(len(ranks), 1), len(steps), len(layers)), dtype=bool)
    for name, part in zip(names, parts, strict=True):
        at = np.ix_(
            [steps.index(step) for step in part.scenarios], [layers.index(layer) for layer in part.layers]
        )
        row = 0 if part.rank is None else ranks.index(part.rank)
        if seen_RTL[row][at].any():
            who = "" if part.rank is None else f" of rank {part.rank}"
            raise source.error(
                f"{os.path.basename(name)} holds what another file{who} holds too: two recordings? "
                "Nothing else tells files apart than rank0, layer3 or step5 in their names"
            )
        seen_RTL[row][at] = True
        load_TLE[at] += np.pad(part.load, ((0, 0), (0, 0), (0, width - part.load.shape[-1])))
    _check_whole(source, parts, ranks, seen_RTL, steps, layers)
    notes = [f"{len(parts)} files", *(first.notes if len({part.notes for part in parts}) == 1 else ())]
    if len(ranks) > 1:
        notes.append(f"ranks {ranks[0]} to {ranks[-1]} added up")
    named = steps if steps != [""] else []
    return Found(
        load=load_TLE,
        format=first.format,
        axis="steps",
        layers=tuple(layers),
        scenarios=tuple(named),
        notes=tuple(notes),
    )


def _with_steps(source: Source, names: Sequence[str], parts: list[Found]) -> list[Found]:
    """The parts with a name for each of their steps: their own, that of the file's name, or a number."""
    made = []
    for name, part in zip(names, parts, strict=True):
        count = len(part.load)
        if part.axis == "scenarios" and part.scenarios:
            raise source.error(
                f"{os.path.basename(name)} holds scenarios by name; read such files one by one"
            )
        step = told_by_name(name, "step")
        if part.scenarios:
            steps = part.scenarios
        elif step is not None:
            part = replace(part, load=part.load.sum(0, keepdims=True))
            steps = (f"step {step}",)
        else:
            steps = tuple(f"step {i}" for i in range(count)) if count > 1 else ("",)
        made.append(replace(part, scenarios=steps))
    return made


def _check_ranks(source: Source, ranks: list[int], parts: list[Found]) -> None:
    """All ranks that the files speak of must be there."""
    if not ranks:
        return
    told = {rank for part in parts for rank in part.ranks}
    missing = sorted((told or set(range(ranks[-1] + 1))) - set(ranks))
    if missing:
        some = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        raise source.error(
            f"the file of rank {some} is missing: there are those of rank "
            f"{cut(', '.join(map(str, ranks)), 60)}"
        )


def _check_whole(
    source: Source,
    parts: list[Found],
    ranks: list[int],
    seen_RTL: BoolArray,
    steps: list[str],
    layers: list[int],
) -> None:
    """Each rank must have all that its group has: every step of every layer."""
    if parts[0].format == "csv" and len(ranks) > 1:  # rows of busy experts alone
        return
    groups = {part.ranks for part in parts if part.ranks} or {tuple(ranks)}
    for group in groups:
        rows = [ranks.index(rank) for rank in group] if ranks else [0]
        want_TL = seen_RTL[rows].any(0)
        want_TL = want_TL if len(groups) > 1 else np.ones_like(want_TL)
        for row in rows:
            if (want_TL & ~seen_RTL[row]).any():
                step, layer = np.argwhere(want_TL & ~seen_RTL[row])[0]
                who = f"rank {ranks[row]} has" if ranks else "there are"
                raise source.error(
                    f"{who} no loads of layer "
                    f"{layers[layer]}{' in ' + steps[step] if steps[step] else ''}, but of "
                    "others: a recording that was cut off, or two"
                )
