"""Recordings that engines write by themselves, one file per rank: SGLang, Megatron, TensorRT-LLM."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import SolverUnavailableError
from moeless_opt.problems.io.recordings.arrays import Array, Value, plain_numbers
from moeless_opt.problems.io.recordings.choose import MAPS, Chooser
from moeless_opt.problems.io.recordings.evidence import whole_numbers
from moeless_opt.problems.io.recordings.source import Found, Source, cut, shape_text

__all__ = ["MEGATRON_DUMP", "is_safetensors", "megatron_dump", "sglang_records", "tensorrt_statistics"]

MEGATRON_DUMP = "mcore_ep_load_dump"


# --- SGLang ------------------------------------------------------------------------------------------------


def sglang_records(source: Source, content: Mapping[Any, Any]) -> Found:
    """Read SGLang's modes per_pass and per_token: one rank's forward passes, by physical slot."""
    records = content["records"]
    if not isinstance(records, Sequence) or not records:
        raise source.error("holds no records: the recorder was dumped before any forward pass")
    map_key = next((k for k in MAPS if k in content), None)
    if map_key is None and source.map is None:
        raise source.error(f"has records of physical experts but no map; expected {MAPS[1]} beside them")
    if map_key is None:
        map_key, to_logical = "the given map", source.map
    else:
        to_logical = Value(source, map_key, content[map_key]).get()
    assert to_logical is not None
    load_TLS, ids = [], []
    ranks = set()
    for i, record in enumerate(records):
        load_TLS.append(_record(source, f"records[{i}]", record, to_logical))
        ids.append(str(record.get("forward_pass_id", i)))
        ranks.add(record.get("rank"))
        if load_TLS[i].shape != load_TLS[0].shape:
            raise source.error(
                f"records[{i}].global_physical_count has shape {shape_text(load_TLS[i].shape)}, "
                f"the first record's has {shape_text(load_TLS[0].shape)}"
            )
        if (i + 1) * load_TLS[0].size * 8 > source.max_bytes:
            raise source.error(f"records take more than {source.most}; raise MOELESS_MAX_READ to read them")
    if len(ranks) > 1:
        raise source.error(
            f"has records of several ranks ({cut(', '.join(sorted(map(str, ranks))))}), must be of one"
        )
    rank = ranks.pop()
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise source.error(f"has forward pass {twice} twice; a recording is of one gatherer")
    load = Chooser(source).to_logical(np.stack(load_TLS), to_logical, "global_physical_count", map_key)
    return Found(
        load=load,
        format="sglang-recorder",
        axis="steps",
        scenarios=tuple(f"step {one}" for one in ids),
        notes=(f"{len(records)} forward passes of rank {rank}",),
        rank=rank if type(rank) is int and rank >= 0 else None,
    )


def _record(source: Source, where: str, record: Any, to_logical: NDArray[Any]) -> NDArray[Any]:
    if isinstance(record, Mapping) and "global_physical_count" in record:
        return Value(source, f"{where}.global_physical_count", record["global_physical_count"]).get()
    if not isinstance(record, Mapping) or "topk_ids_of_layer" not in record:
        raise source.error(f"{where} has no global_physical_count")
    chosen = Value(source, f"{where}.topk_ids_of_layer", record["topk_ids_of_layer"]).get()
    slots = to_logical.shape[-1]
    if (
        chosen.ndim != 3
        or not whole_numbers(chosen)
        or chosen.min(initial=0) < -1
        or chosen.max(initial=0) >= slots
    ):
        raise source.error(
            f"{where}.topk_ids_of_layer {shape_text(chosen.shape)} must be slots from 0 to {slots - 1} "
            "(-1: none), "
            "[layers, tokens, top-k]"
        )
    return np.stack([np.bincount(ids[ids >= 0].astype(np.int64), minlength=slots) for ids in chosen])


# --- Megatron ----------------------------------------------------------------------------------------------


def megatron_dump(source: Source, arrays: Mapping[str, Array]) -> Found:
    """Read a rank's dump of loads, [layers, forwards, experts]; unused forwards are not counted.

    What lies behind a layer's ``forward_counts`` is memory that was never written.
    """
    for key in ("loads", "layer_numbers"):
        if key not in arrays:
            raise source.error(f"is a Megatron dump without {key}; it has {cut(', '.join(arrays))}")
    loads, numbers = arrays["loads"].get(), arrays["layer_numbers"].get()
    if loads.ndim != 3 or numbers.shape != loads.shape[:1] or not whole_numbers(numbers) or 0 in loads.shape:
        raise source.error(
            f"loads has shape {shape_text(loads.shape)}, must be [layers, forwards, experts] with a layer "
            "number "
            f"each; layer_numbers has {shape_text(numbers.shape)}"
        )
    layers, forwards, experts = loads.shape
    counts = arrays["forward_counts"].get() if "forward_counts" in arrays else np.full(layers, forwards)
    if counts.shape != (layers,) or not whole_numbers(counts) or counts.min() < 0 or counts.max() > forwards:
        raise source.error(
            f"forward_counts must be {layers} numbers from 0 to the {forwards} forwards of loads"
        )
    if (counts != counts[0]).any():
        raise source.error(
            f"layer {int(numbers[np.argmin(counts)])} has {int(counts.min())} forwards, another "
            f"{int(counts.max())}: "
            "the dump was cut off within a forward"
        )
    alone = {key: _scalar(source, arrays, key) for key in ("global_rank", "ep_rank", "ep_size")}
    wrote = alone["global_rank"]
    named = _scalar(source, arrays, "num_global_physical_experts")
    if named is not None and named != experts:
        raise source.error(f"loads has {experts} experts, num_global_physical_experts says {named}")
    group: tuple[int, ...] = ()
    if "ep_group_ranks" in arrays:
        group = tuple(int(x) for x in np.atleast_1d(arrays["ep_group_ranks"].get()))
        if wrote is not None and wrote not in group:
            raise source.error(f"was written by rank {wrote}, which is not among its ep_group_ranks")
    elif alone["ep_size"] is not None:
        group = tuple(range(alone["ep_size"]))
    load_TLE = plain_numbers(source, "loads", loads[:, : int(counts[0])]).transpose(1, 0, 2)
    order = np.argsort(numbers, kind="stable")
    layer_numbers = tuple(int(x) for x in numbers[order])
    if len(set(layer_numbers)) < layers or layer_numbers[0] < 0:
        raise source.error("layer_numbers names a layer twice, or one below 0")
    notes = [f"{int(counts[0])} forwards"]
    if source.map is not None:
        load_TLE = Chooser(source).to_logical(load_TLE, source.map, "loads", "the given map")
    else:
        notes.append(
            "counted by physical expert: right where no expert has replicas, else give their map (--map)"
        )
    return Found(
        load=load_TLE[:, order],
        format="megatron-dump",
        axis="steps",
        layers=layer_numbers,
        notes=tuple(notes),
        rank=wrote,
        ranks=group,
    )


def _scalar(source: Source, arrays: Mapping[str, Array], key: str) -> int | None:
    if key not in arrays:
        return None
    value = arrays[key].get()
    if value.size != 1 or not whole_numbers(value) or value.min() < 0 or value.max() > 10**6:
        raise source.error(f"{key} must be one whole number")
    return int(value.reshape(-1)[0])


# --- TensorRT-LLM ------------------------------------------------------------------------------------------


def is_safetensors(raw: bytes) -> bool:
    """Whether bytes begin as a safetensors file does: the length of a JSON header, and the header."""
    return len(raw) > 10 and raw[8:9] == b"{" and 2 <= int.from_bytes(raw[:8], "little") <= len(raw) - 8


def tensorrt_statistics(source: Source, raw: bytes) -> Found:
    """Read one rank's expert statistics: counts [experts] under ``ITERATION_LAYER``."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError:
        raise SolverUnavailableError(
            f"{source.path}: reading a safetensors file needs the package safetensors"
        ) from None
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        arrays: dict[str, NDArray[Any]] = load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise source.error(f"is a truncated or damaged safetensors file ({cut(str(error))})") from None
    found: dict[tuple[int, int], NDArray[Any]] = {}
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        match = re.fullmatch(r"(\d{1,9})_(\d{1,6})", name)
        if match is None:
            raise source.error(
                f"has the tensor {cut(name, 60)!r}; expert statistics of TensorRT-LLM are named "
                "ITERATION_LAYER"
            )
        if arrays[name].ndim != 1 or not arrays[name].size:
            raise source.error(
                f"{name} has shape {shape_text(arrays[name].shape)}, must be counts [experts]; the experts "
                "that "
                "each token chose (rank*_raw.safetensors) are no statistics"
            )
        found[int(match[1]), int(match[2])] = plain_numbers(source, name, arrays[name])
    if not found:
        raise source.error("holds no statistics")
    steps, layers = sorted({step for step, _ in found}), sorted({layer for _, layer in found})
    for step in steps:
        for layer in layers:
            if (step, layer) not in found:
                raise source.error(f"has no statistics of layer {layer} in iteration {step}, but of others")
    widths = {row.size for row in found.values()}
    if len(widths) > 1:
        raise source.error(f"has layers of {min(widths)} and of {max(widths)} experts: two models?")
    return Found(
        load=np.array([[found[step, layer] for layer in layers] for step in steps]),
        format="tensorrt-llm",
        axis="steps",
        layers=tuple(layers),
        scenarios=tuple(f"step {step}" for step in steps),
        notes=(f"iterations {steps[0]} to {steps[-1]}",),
    )
