"""Read recordings of expert loads, whatever wrote them: the format is found by content, not by name.

==================  =======================================================================================
recording           how it is recognised
==================  =======================================================================================
SGLang, JSON        ``{"logical_count": ...}``, [layers, experts] or [steps, layers, experts]
SGLang, recorder    PyTorch file with ``logical_count`` (mode ``stat``), or with ``records`` that hold
                    ``global_physical_count`` (modes ``per_pass``, ``per_token``), one for each rank
vLLM                physical loads (``expert_load_window``, ``expert_load_pass``, ...) beside their
                    ``physical_to_logical_map``, in JSON, JSON lines, .npz or PyTorch form
TensorRT-LLM        a folder of ``meta_info.json`` and ``rank*.safetensors``, counts under ``ITERATION_LAYER``
Megatron            dumps (``loads``, ``layer_numbers``, ``forward_counts``), one for each rank;
                    ``tokens_per_expert.log``; the router's trace (JSON lines with ``top_indices``)
token trace         experts chosen by each token, [tokens, layers, top-k] (``routed_experts``, ``topk_ids``)
arrays              .npy, .npz, PyTorch or JSON with one array of loads, or the one named by ``key``
dictionaries        by the name or number of a layer, expert, step or rank
rows                JSON lines, or a list of objects, with layer, expert, count or an array of loads
table               CSV, TSV or the like with columns layer, expert, count (and scenario, step, rank), with a
                    column for each expert, or a bare matrix
several files       a folder or a glob with one for each rank, layer or step
==================  =======================================================================================

Each may be gzipped. An axis in front of [layers, experts] is kept as scenarios, unless the format says that
it counts the steps of one run: then the steps are summed (``steps="keep"`` keeps them). Layers without any
load, the dense ones, are left out and named. What can be two things is refused, unless its values say what it
is, or the caller does (``as_``); what they say is in the notes.

Nothing in a file is ever run: NumPy's object arrays and pickles are refused, PyTorch files are loaded with
``weights_only=True``. Sizes are checked before memory is taken for them.

References
----------
SGLang: ``python/sglang/srt/eplb/expert_distribution.py`` (``_StatAccumulator.dump``,
``_DetailAccumulator.dump``). vLLM: ``vllm/distributed/eplb/eplb_state.py`` (``EplbState``).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal
from zipfile import ZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray
from moeless_opt.problems.errors import FormatError, SolverUnavailableError
from moeless_opt.problems.files import gunzipped, open_zip, read_bytes, read_limit, text_limit
from moeless_opt.problems.io.recordings.arrays import Array, NpzArray, Value, npy_array, plain_numbers
from moeless_opt.problems.io.recordings.choose import CHOICES, LOGICAL, MAPS, PHYSICAL, Chooser
from moeless_opt.problems.io.recordings.engines import (
    is_safetensors,
    megatron_dump,
    sglang_records,
    tensorrt_statistics,
)
from moeless_opt.problems.io.recordings.evidence import reading_of
from moeless_opt.problems.io.recordings.folders import is_many, read_many, told_by_name
from moeless_opt.problems.io.recordings.lines import is_token_log, json_rows, read_rows, read_token_log
from moeless_opt.problems.io.recordings.names import named_loads, names_part
from moeless_opt.problems.io.recordings.source import LARGEST_LOAD, As, Found, Source, cut, shape_text
from moeless_opt.problems.io.recordings.tables import TableReader
from moeless_opt.problems.spec import Loads
from moeless_opt.problems.text import bytes_text

__all__ = ["Recording", "frame_loads", "read_loads", "read_recording"]


_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch.save before zip files
_KNOWN_FORMATS = (
    "SGLang or vLLM JSON, a PyTorch recorder file, .npy, .npz, or a CSV table with layer, expert, count"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Loads as recorded.

    Parameters
    ----------
    load_TLE : array of float, shape [T, L, E]
        Token-expert pairs; finite, >= 0, every layer with some load in some scenario. Read-only.
    layers : tuple of int
        The recording's own index of each layer.
    skipped : tuple of int
        Layers of the recording without any load (dense layers), left out.
    scenarios : tuple of str
        Names of the scenarios; empty where the recording does not name them.
    format : str
        What the file was recognised as, e.g. ``"sglang-json"``.
    path : str
        The file.
    notes : tuple of str
        What was assumed, summed or left out, in plain words.
    """

    load_TLE: FloatArray
    layers: tuple[int, ...]
    skipped: tuple[int, ...]
    scenarios: tuple[str, ...]
    format: str
    path: str
    notes: tuple[str, ...]


def read_recording(
    path: str | PathLike[str],
    *,
    key: str | None = None,
    scenario: str | int | None = None,
    steps: Literal["sum", "keep"] = "sum",
    experts: int | None = None,
    as_: As | None = None,
    physical_to_logical: ArrayLike | str | PathLike[str] | None = None,
    max_bytes: int | None = None,
    content: bytes | None = None,
    idle: bool = False,
) -> Recording:
    """Read a recording of expert loads.

    Parameters
    ----------
    path : path
        The file; ``-`` is standard input. It may be a pipe, and it may be gzipped. A folder, or a pattern
        like ``run/*.pt``, is a recording of one file for each rank, layer or step.
    key : str, optional
        Array to read, where a file holds several. With ``*`` or ``?`` it stands for all arrays that match:
        equal [layers, experts] arrays, which become scenarios with their keys as names.
    scenario : str or int, optional
        Name or index of the one scenario to keep. Default: all.
    steps : {"sum", "keep"}
        What becomes of the steps of one run: summed to one scenario, or kept as scenarios (steps without any
        load are dropped).
    experts : int, optional
        Experts of a layer, where the file lists only those that were chosen (tables, token traces, physical
        loads). Default: up to the highest that occurs.
    as_ : {"counts", "trace", "physical"}, optional
        What the array is, where it can be several things: loads of experts, the experts that tokens chose
        ([tokens, layers, top-k], or [tokens, layers] of one choice each), or loads of physical slots. By
        default its values and its name decide, or it is refused.
    physical_to_logical : array or path, optional
        Map [layers, slots] (or [slots]) from slots to experts, -1 for an unused one; where the file has none.
    max_bytes : int, optional
        Largest file, after decompression, and largest array as float64. Text (JSON, tables), which takes many
        times its size in memory, is read up to a quarter of it. By default the limit of all readers: 256 MB,
        or what the environment variable ``MOELESS_MAX_READ`` says.
    content : bytes, optional
        The bytes of the file, where they have been read already (a pipe can be read only once).
    idle : bool
        Whether it may be that of a rank without any token, all of whose layers are left out.

    Returns
    -------
    Recording
        Loads and what was found.

    Raises
    ------
    FormatError
        Naming the file, what is wrong, and what would be right.
    SolverUnavailableError
        For PyTorch files where PyTorch is not installed.
    """
    if steps not in ("sum", "keep"):
        raise FormatError("steps", f"must be sum or keep, got {steps!r}")
    if experts is not None and experts < 1:
        raise FormatError("experts", f"must be at least 1, got {experts}")
    if as_ not in (None, "counts", "trace", "physical"):
        raise FormatError("as", f"must be counts, trace or physical, got {as_!r}")
    limit = read_limit() if max_bytes is None else max_bytes
    name = str(path)
    source = Source(name, key, experts, limit, as_, _map(physical_to_logical, limit))
    if content is None and is_many(name):
        return _Reader(source).finish(read_many(source, _read_one), scenario, steps)
    raw = read_bytes(path, limit=limit) if content is None else content
    found = _read_one(source, raw)
    found = replace(found, rank=told_by_name(name, "rank") if found.rank is None else found.rank)
    if found.rank is not None or len(found.ranks) > 1:
        who = "" if found.rank is None else f"of rank {found.rank} "
        known = f"of {len(found.ranks)} " if len(found.ranks) > 1 else ""
        found = found.with_notes(
            f"{who}{known}alone; all ranks' files (a folder, or a glob) are added up".strip()
        )
    return _Reader(source).finish(found, scenario, steps, idle=idle)


def _read_one(source: Source, raw: bytes) -> Found:
    return _Reader(source).dispatch(raw)


def _map(given: ArrayLike | str | PathLike[str] | None, limit: int) -> NDArray[Any] | None:
    """The map from slots to experts that the caller gives: an array, or a file that holds one."""
    if given is None:
        return None
    if not isinstance(given, str | PathLike):
        array = np.asarray(given)
    else:
        reader = _Reader(Source(str(given), None, None, limit, "counts"))
        array = reader.map_of(read_bytes(given, limit=limit))
    if array.ndim not in (1, 2) or array.size == 0:
        where = str(given) if isinstance(given, str | PathLike) else "physical_to_logical"
        raise FormatError(
            where, f"has shape {shape_text(array.shape)}, must be a map [layers, slots] or [slots]"
        )
    return array


def read_loads(path: str | PathLike[str], **options: Any) -> Loads:
    """Read a recording of any supported format as loads; see `read_recording` for the options."""
    return _as_loads(read_recording(path, **options))


def frame_loads(frame: Any) -> Loads | None:
    """Loads of a data frame with columns for layer, expert and count, as in a table's file; else None.

    Parameters
    ----------
    frame : data frame
        Of pandas, polars or the like: it has ``columns``, and ``frame[name]`` is one of them.

    Raises
    ------
    FormatError
        If a row does not fit.
    """
    source = Source("loads", None, None, read_limit())
    names = [str(name) for name in frame.columns]
    reader = TableReader(source)
    if not reader.is_long(names):
        return None
    found = reader.from_columns(names, [frame[name] for name in frame.columns])
    return _as_loads(_Reader(source).finish(found, None, "sum"))


def _as_loads(recording: Recording) -> Loads:
    return Loads(
        load_TLE=recording.load_TLE,
        layers=recording.layers,
        scenarios=recording.scenarios,
        skipped=recording.skipped,
        source=f"{recording.path} ({recording.format})",
        notes=recording.notes,
    )


class _Reader:
    """The readers of each format, for one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.error = source.error

    # --- which format ----------------------------------------------------------------------------------

    def dispatch(self, raw: bytes) -> Found:
        """Recognise the format by the first bytes and read it."""
        if not raw:
            raise self.error(f"is empty; known formats: {_KNOWN_FORMATS}")
        raw = gunzipped(raw, self.source.path, limit=self.source.max_bytes)
        if not raw:
            raise self.error(f"is empty inside its gzip; known formats: {_KNOWN_FORMATS}")
        if raw.startswith(b"\x93NUMPY"):
            return self._from_npy(raw)
        if raw.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return self._from_zip(raw)
        if raw.startswith(_TORCH_LEGACY):
            return self._from_torch(raw)
        if len(raw) > 2 and raw[0] == 0x80 and raw[1] in range(2, 6):
            raise self.error(
                "is a bare Python pickle, which could run code when loaded and is never read; save the array "
                "with numpy.save, numpy.savez, torch.save or as JSON"
            )
        if is_safetensors(raw):
            return tensorrt_statistics(self.source, raw)
        return self._from_text(raw)

    def map_of(self, raw: bytes) -> NDArray[Any]:
        """The map from slots to experts in a file: the array by one of its names, or the only one."""
        raw = gunzipped(raw, self.source.path, limit=self.source.max_bytes)
        if raw.startswith(b"\x93NUMPY"):
            return npy_array(self.source, raw)
        if raw.startswith(b"PK"):
            with open_zip(raw, self.source.path) as archive:
                if not any(member.endswith("data.pkl") for member in archive.namelist()):
                    return self._map_among(self._members(archive))
        if raw.lstrip()[:1] in (b"{", b"["):
            content = self._parsed(raw.decode("utf-8", "replace"))
            return self._map_among(content if isinstance(content, dict) else {"array": content})
        content = self._torch_content(raw)
        return self._map_among(content if isinstance(content, Mapping) else {"tensor": content})

    def _map_among(self, found: Mapping[Any, Any]) -> NDArray[Any]:
        name = next((name for name in MAPS if name in found), None)
        if name is None and len(found) == 1:
            name = next(iter(found))
        if name is None:
            raise self.error(f"has no {MAPS[0]}; it has {cut(', '.join(map(str, found)) or 'nothing')}")
        value = found[name]
        return value.get() if isinstance(value, Array) else Value(self.source, str(name), value).get()

    def _from_text(self, raw: bytes) -> Found:
        try:
            text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError:
            raise self.error(f"is binary in no known format; known: {_KNOWN_FORMATS}") from None
        start = text.lstrip()[:1]
        if not start:
            raise self.error(f"holds only white space; known formats: {_KNOWN_FORMATS}")
        most = text_limit(self.source.max_bytes)
        if len(raw) > most:
            raise self.error(
                f"is text of {bytes_text(len(raw))}; text takes many times its size in memory and is read up "
                f"to {bytes_text(most)}: sum its steps first, save it as .npz, or raise MOELESS_MAX_READ"
            )
        if "\0" in text:
            raise self.error(f"is binary in no known format; known: {_KNOWN_FORMATS}")
        if start in "{[":
            return self._from_json(text)
        if re.match(r"num_slots\s*:", text.lstrip()):
            raise self.error("is a placement (TensorRT-LLM's moe_load_balancer) and holds no loads")
        if is_token_log(text):
            return read_token_log(self.source, text)
        return TableReader(self.source).read(text)

    # --- arrays: .npy, .npz ------------------------------------------------------------------------------

    def _from_npy(self, raw: bytes) -> Found:
        if self.source.key is not None:
            raise self.error(f"is a single .npy array and has no key {self.source.key!r}; leave key out")
        return self._one_array(npy_array(self.source, raw), "array", "npy")

    def _one_array(self, array: NDArray[Any], name: str, form: str) -> Found:
        """Read a file's only array; of two axes it may be steps of the layer that the file is named by."""
        if self.source.layer is not None and array.ndim in (1, 2):
            return Found(load=array, format=form)
        return Chooser(self.source).read_array(array, name, form)

    def _from_zip(self, raw: bytes) -> Found:
        archive = open_zip(raw, self.source.path)
        with archive:
            if any(re.search(r"(^|/)data\.pkl$", member) for member in archive.namelist()):
                if sum(info.file_size for info in archive.infolist()) > self.source.max_bytes:
                    raise self.error(
                        f"unpacks to more than {self.source.most}; raise MOELESS_MAX_READ to read it"
                    )
                return self._from_torch(raw)
            return self._choose(self._members(archive), "npz")

    def _members(self, archive: ZipFile) -> dict[str, Array]:
        members = {m.removesuffix(".npy"): m for m in archive.namelist() if m.endswith(".npy")}
        if not members:
            raise self.error("is a zip archive without arrays; expected .npz or a PyTorch file")
        return {key: NpzArray(self.source, archive, key, member) for key, member in members.items()}

    # --- PyTorch -----------------------------------------------------------------------------------------

    def _from_torch(self, raw: bytes) -> Found:
        content = self._torch_content(raw)
        if isinstance(content, Mapping):
            if "records" in content and self.source.key is None:
                return sglang_records(self.source, content)
            return self._choose({str(k): Value(self.source, str(k), v) for k, v in content.items()}, "torch")
        if self.source.key is not None:
            raise self.error(f"is a single PyTorch object and has no key {self.source.key!r}; leave key out")
        return self._one_array(Value(self.source, "tensor", content).get(), "tensor", "torch")

    def _torch_content(self, raw: bytes) -> Any:
        try:
            import torch
        except ImportError:
            raise SolverUnavailableError(
                f"{self.source.path}: reading a PyTorch file needs PyTorch: install moeless-opt[runtime]"
            ) from None
        import pickle

        try:
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise self.error(
                "holds Python objects beside tensors and plain containers; they could run code when loaded "
                "and are never read. Save a dict of tensors with torch.save"
            ) from None
        except Exception as error:  # torch raises whatever its C++ reader meets
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise self.error(f"is a truncated or damaged PyTorch file ({reason})") from None

    # --- JSON --------------------------------------------------------------------------------------------

    def _from_json(self, text: str) -> Found:
        content = self._parsed(text)
        if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
            return read_rows(self.source, [(f"[{i}]", row) for i, row in enumerate(content)])
        if isinstance(content, dict):
            return self._from_object(content)
        if self.source.key is not None:
            raise self.error(f"is a bare JSON array and has no key {self.source.key!r}; leave key out")
        return self._one_array(Value(self.source, "array", content).get(), "array", "json")

    def _from_object(self, content: dict[str, Any]) -> Found:
        if str(content.get("format", "")).startswith("moeless-"):
            raise self.error(f"is a {content['format']} document, not a recording of loads")
        if "layer_list" in content and "moe_layer_count" in content:
            raise self.error("is a placement (vllm-ascend's expert map) and holds no loads")
        rows = content.get("_rows")
        if rows is not None:
            return read_rows(self.source, rows)
        if "top_indices" in content:
            return read_rows(self.source, [("line 1", content)])
        return self._choose({k: Value(self.source, k, v) for k, v in content.items()}, "json")

    def _parsed(self, text: str) -> Any:
        """The JSON document; several behind each other (JSON lines) come as the rows of one object."""

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
                raise self.error(f"has the key {cut(repr(twice), 60)} twice in one object; once is enough")
            return found

        try:
            return json.loads(text, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data" and text.lstrip().startswith("{"):
                return {"_rows": json_rows(self.source, text)}
            end = " (the file ends there: truncated?)" if error.pos >= len(text.rstrip()) - 1 else ""
            raise self.error(
                f"is no valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{end}"
            ) from None
        except FormatError:
            raise
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.error(f"is no usable JSON: {reason}") from None

    # --- which array -------------------------------------------------------------------------------------

    def _choose(self, arrays: Mapping[str, Array], container: str) -> Found:
        """Read the array of loads; or what the arrays are together: a dump, a dictionary of layers."""
        if self.source.key is None:
            if {"loads", "layer_numbers"} <= arrays.keys():
                return megatron_dump(self.source, arrays)
            found = self._named(arrays)
            if found is not None:
                return found
        return Chooser(self.source).choose(arrays, container)

    def _named(self, arrays: Mapping[str, Array]) -> Found | None:
        """Loads in dictionaries by layer, expert, step or rank: of the file itself, or under a known name."""
        plain: dict[str, Any] = {}
        for name, array in arrays.items():
            value = getattr(array, "value", None)
            if name in LOGICAL and isinstance(value, Mapping):
                found = named_loads(self.source, value, f"{name}, ")
                if found is not None:
                    return found
            if not hasattr(array, "value") or isinstance(value, Mapping | list) or array.shape():
                plain[name] = value if isinstance(value, Mapping) else array
        known = next((name for name in (*LOGICAL, *PHYSICAL, *CHOICES) if name in arrays), None)
        if known is not None:
            other = next((name for name in plain if name not in MAPS and names_part(name)), None)
            if other is not None:
                raise self.error(f"has {known} and beside it {other}; choose one by key (--key)")
            return None
        return named_loads(self.source, plain)

    # --- checks --------------------------------------------------------------------------------------------

    def finish(
        self,
        found: Found,
        scenario: str | int | None,
        steps: Literal["sum", "keep"],
        *,
        idle: bool = False,
    ) -> Recording:
        """Check the loads, settle the leading axis, and leave dense layers out."""
        load = plain_numbers(self.source, "loads", found.load)
        if load.ndim not in (2, 3) or 0 in load.shape:
            hint = "; for a single layer save it as [1, experts]" if load.ndim == 1 else ""
            raise self.error(
                f"the loads have shape {shape_text(load.shape)}, must be [layers, experts] or "
                f"[scenarios, layers, experts], none of them 0{hint}"
            )
        want = self.source.experts
        if want is not None and found.sparse and load.shape[-1] < want:
            load = np.pad(load, [(0, 0)] * (load.ndim - 1) + [(0, want - load.shape[-1])])
        if want is not None and load.shape[-1] != want:
            raise self.error(
                f"has loads of {load.shape[-1]} experts per layer; experts={want} cannot change that "
                "(another model?)"
            )
        self._check_values(load)
        if self.source.as_ is None and found.format != "token-trace":
            what, why = reading_of(load)
            if what == "transposed":
                raise self.error(
                    f"its loads {shape_text(load.shape)} have their axes in another order than [(steps,) "
                    "layers, "
                    f"experts]: {why}; transpose them, or give --as counts (as_='counts') to take them as "
                    "they are"
                )
        load_TLE = load if load.ndim == 3 else load[None]
        scenarios, notes = found.scenarios, list(found.notes)
        if found.axis == "steps" and len(load_TLE) > 1:
            live: BoolArray = np.asarray(load_TLE.any(axis=(1, 2)))
            if steps == "sum":
                notes.append(f"{int(live.sum())} steps summed")
                load_TLE, scenarios = load_TLE.sum(axis=0, keepdims=True), ()
            elif not live.all() and live.any():
                notes.append(f"{int((~live).sum())} of {len(live)} steps without any load dropped")
                load_TLE = load_TLE[live]
                kept = np.flatnonzero(live)
                scenarios = (
                    tuple(scenarios[i] for i in kept) if scenarios else tuple(f"step {i}" for i in kept)
                )
        elif found.axis == "steps":
            scenarios = ()
        if scenario is not None:
            at = self._scenario(scenario, scenarios, len(load_TLE))
            load_TLE = load_TLE[at : at + 1]
            scenarios = scenarios[at : at + 1]
        busy_L: BoolArray = np.asarray(load_TLE.any(axis=(0, 2)))
        if not busy_L.any() and not idle:
            raise self.error("has no load at all: every count is 0")
        layers = found.layers or tuple(range(load_TLE.shape[1]))
        skipped = tuple(layer for layer, busy in zip(layers, busy_L, strict=True) if not busy)
        if skipped:
            notes.append(f"layers without any load (dense) left out: {', '.join(map(str, skipped))}")
        busy_E: BoolArray = np.asarray(load_TLE.any(axis=(0, 1)))
        if len(busy_E) > 2 and not busy_E[0] and busy_E[1:].all():
            notes.append("expert 0 has no load, every other one has: are they numbered from 1?")
        load_TLE = np.ascontiguousarray(load_TLE[:, busy_L])
        load_TLE.flags.writeable = False
        return Recording(
            load_TLE=load_TLE,
            layers=tuple(layer for layer, busy in zip(layers, busy_L, strict=True) if busy),
            skipped=skipped,
            scenarios=scenarios,
            format=found.format,
            path=self.source.path,
            notes=tuple(notes),
        )

    def _check_values(self, load: FloatArray) -> None:
        least, most = float(load.min()), float(load.max())
        if least >= 0 and most <= LARGEST_LOAD:  # NaN fails the first
            return
        at = tuple(int(i) for i in np.argwhere(~((load >= 0) & (load <= LARGEST_LOAD)))[0])
        names = ("scenario", "layer", "expert")[-load.ndim :]
        where = ", ".join(f"{name} {i}" for name, i in zip(names, at, strict=True))
        raise self.error(f"{where}: the load is {load[at]:g}, must be a number from 0 to {LARGEST_LOAD:g}")

    def _scenario(self, wanted: str | int, names: tuple[str, ...], count: int) -> int:
        if wanted in names:
            return names.index(str(wanted))
        text = str(wanted)
        if (isinstance(wanted, int) or text.isdecimal()) and 0 <= int(text) < count:
            return int(text)
        known = ", ".join(names) if names else f"numbers 0 to {count - 1}"
        raise self.error(f"has no scenario {text!r}; it has {cut(known)}")
