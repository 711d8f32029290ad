"""Read recordings of expert loads, whatever wrote them: the format is found by content, not by name.

==================  =======================================================================================
recording           how it is recognised
==================  =======================================================================================
SGLang, JSON        ``{"logical_count": ...}``, [layers, experts] or [steps, layers, experts]
SGLang, recorder    PyTorch file with ``logical_count`` (mode ``stat``), or with ``records`` that hold
                    ``global_physical_count`` (modes ``per_pass``, ``per_token``)
vLLM                physical loads (``expert_load_window``, ``expert_load_pass``, ...) beside their
                    ``physical_to_logical_map``, in JSON, .npz or PyTorch form; summed to logical experts
token trace         experts chosen by each token, [tokens, layers, top-k] (``experts``, ``topk_ids``); counted
arrays              .npy, .npz, PyTorch or JSON with one array of loads, or the one named by ``key``
table               CSV, TSV or the like with columns layer, expert, count (and scenario), or a bare matrix
==================  =======================================================================================

Each may be gzipped. An axis in front of [layers, experts] is kept as scenarios, unless the format says that
it counts the steps of one run: then the steps are summed (``steps="keep"`` keeps them). Layers without any
load, the dense ones, are left out and named.

Nothing in a file is ever run: NumPy's object arrays and pickles are refused, PyTorch files are loaded with
``weights_only=True``. Sizes are checked before memory is taken for them.

References
----------
SGLang: ``python/sglang/srt/eplb/expert_distribution.py`` (``_StatAccumulator.dump``,
``_DetailAccumulator.dump``). vLLM: ``vllm/distributed/eplb/eplb_state.py`` (``EplbState``).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from os import PathLike
from tokenize import TokenError
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import FormatError, SolverUnavailableError

__all__ = ["DEFAULT_MAX_BYTES", "Recording", "read_recording"]

Floats = NDArray[np.float64]

DEFAULT_MAX_BYTES = 256 * 2**20

# Names of arrays that hold loads of logical experts, the likelier first. Those of `_STEPPED` have a leading
# axis of steps of one run, where they have one at all.
_LOGICAL = (
    "logical_count", "global_expert_load_window", "global_expert_load", "logical_expert_load_window",
    "load_TLE", "load_LE", "loads", "load", "counts", "count", "expert_counts", "expert_count",
    "expert_load", "tokens_per_expert", "tokens", "weight", "weights", "hist", "histogram",
)  # fmt: skip
_PHYSICAL = (
    "expert_load_window", "expert_load_pass", "expert_load_view", "global_physical_count",
    "global_physical_count_of_buffered_step", "physical_count", "physical_load", "physical_loads",
)  # fmt: skip
_STEPPED = frozenset(
    ("logical_count", "global_expert_load_window", "logical_expert_load_window", "expert_load_window",
     "global_physical_count_of_buffered_step")
)  # fmt: skip
_MAPS = (
    "physical_to_logical_map", "last_physical_to_logical_map", "physical_to_logical", "phy2log",
    "physical_to_logical_map_cpu",
)  # fmt: skip
_CHOICES = ("experts", "topk_ids", "topk", "topk_indices", "expert_ids", "router_indices", "selected_experts")
_NAMES = ("workloads", "scenarios", "names", "datasets", "domains", "labels")

_LAYER = ("layer", "layer_id", "layer_idx", "layer_index", "layer_no", "moe_layer", "layer_name", "l")
_EXPERT = ("expert", "expert_id", "expert_idx", "expert_index", "expert_no", "logical_expert", "e")
_COUNT = (
    "count", "counts", "tokens", "token_count", "num_tokens", "n_tokens", "load", "loads", "value", "hits",
    "frequency", "freq", "activations", "n",
)  # fmt: skip
_SCENARIO = ("scenario", "workload", "dataset", "data_set", "domain", "task", "category")
_STEP = ("step", "iteration", "iter", "forward_pass_id", "pass", "window")

_KNOWN_FORMATS = (
    "SGLang or vLLM JSON, a PyTorch recorder file, .npy, .npz, or a CSV table with layer, expert, count"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Loads as recorded.

    Parameters
    ----------
    load_TLE : float64 [scenarios, layers, experts]
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

    load_TLE: Floats
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
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Recording:
    """Read a recording of expert loads.

    Parameters
    ----------
    path : path
        The file. It may be a pipe, and it may be gzipped.
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
    max_bytes : int
        Largest file, after decompression, and largest array as float64. Text (JSON, tables), which takes many
        times its size in memory, is read up to a quarter of it.

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
    name = os.fspath(path)
    if steps not in ("sum", "keep"):
        raise FormatError("steps", f"must be sum or keep, got {steps!r}")
    if experts is not None and experts < 1:
        raise FormatError("experts", f"must be at least 1, got {experts}")
    reader = _Reader(name, key, experts, max_bytes)
    found = reader.dispatch(_read_bytes(name, max_bytes))
    return reader.finish(found, scenario, steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Loads before checks: what one format's reader hands on.

    `axis` says what the leading axis of a 3-D array is: "steps" of one run, or "scenarios".
    """

    load: NDArray[Any]
    format: str
    axis: Literal["steps", "scenarios"] = "scenarios"
    layers: tuple[int, ...] = ()
    scenarios: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Reader:
    """One file being read: its name for messages, the caller's options, and the readers of each format."""

    def __init__(self, path: str, key: str | None, experts: int | None, max_bytes: int) -> None:
        self.path, self.key, self.experts, self.max_bytes = path, key, experts, max_bytes

    def error(self, what: str) -> FormatError:
        return FormatError(self.path, what)

    # --- which format ----------------------------------------------------------------------------------

    def dispatch(self, raw: bytes) -> _Found:
        """Recognise the format by the first bytes and read it."""
        if not raw:
            raise self.error(f"is empty; known formats: {_KNOWN_FORMATS}")
        if raw.startswith(b"\x1f\x8b"):
            raw = self._gunzip(raw)
            if raw.startswith(b"\x1f\x8b"):
                raise self.error("is gzipped twice; once is enough")
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
        return self._from_text(raw)

    def _gunzip(self, raw: bytes) -> bytes:
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            text = inflater.decompress(raw, self.max_bytes + 1)
        except zlib.error as error:
            raise self.error(f"is a damaged gzip file ({error})") from None
        if len(text) > self.max_bytes:
            raise self.error(
                f"unpacks to more than {_mib(self.max_bytes)}; raise max_bytes to read it anyway"
            )
        if not inflater.eof:
            raise self.error("is a truncated gzip file: its end is missing")
        return text

    def _from_text(self, raw: bytes) -> _Found:
        try:
            text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError:
            raise self.error(f"is binary in no known format; known: {_KNOWN_FORMATS}") from None
        start = text.lstrip()[:1]
        if not start:
            raise self.error(f"holds only white space; known formats: {_KNOWN_FORMATS}")
        if len(raw) > self.max_bytes // 4:
            raise self.error(
                f"is text of {_mib(len(raw))}; text takes many times its size in memory and is read up to "
                f"{_mib(self.max_bytes // 4)}: sum its steps first, save it as .npz, or raise max_bytes"
            )
        if "\0" in text:
            raise self.error(f"is binary in no known format; known: {_KNOWN_FORMATS}")
        return self._from_json(text) if start in "{[" else self._from_table(text)

    # --- arrays: .npy, .npz ------------------------------------------------------------------------------

    def _from_npy(self, raw: bytes) -> _Found:
        if self.key is not None:
            raise self.error(f"is a single .npy array and has no key {self.key!r}; leave key out")
        with io.BytesIO(raw) as stream:
            self._check_header("array", _npy_header(stream, self), len(raw))
            stream.seek(0)
            return _Found(load=self._npy(stream, "array"), format="npy")

    def _from_zip(self, raw: bytes) -> _Found:
        try:
            archive = zipfile.ZipFile(io.BytesIO(raw))
        except (zipfile.BadZipFile, ValueError, OSError, struct.error) as error:
            raise self.error(f"is a truncated or damaged zip archive ({error})") from None
        with archive:
            if any(re.search(r"(^|/)data\.pkl$", member) for member in archive.namelist()):
                if sum(info.file_size for info in archive.infolist()) > self.max_bytes:
                    raise self.error(
                        f"unpacks to more than {_mib(self.max_bytes)}; raise max_bytes to read it anyway"
                    )
                return self._from_torch(raw)
            members = {m.removesuffix(".npy"): m for m in archive.namelist() if m.endswith(".npy")}
            if not members:
                raise self.error("is a zip archive without arrays; expected .npz or a PyTorch file")
            arrays = {key: _NpzArray(self, archive, key, member) for key, member in members.items()}
            return self._choose(arrays, "npz")

    def _check_header(
        self, what: str, header: tuple[tuple[int, ...], np.dtype[Any]], size: int | None
    ) -> None:
        shape, dtype = header
        if dtype.hasobject:
            raise self.error(
                f"{what} holds Python objects, which could run code when loaded and are never read; save it "
                "as a plain number array (equal row lengths, float64 or int64)"
            )
        items = math.prod(shape)
        if items * max(dtype.itemsize, 8) > self.max_bytes:
            raise self.error(
                f"{what} has shape {_shape(shape)}, more than {_mib(self.max_bytes)}; raise max_bytes to "
                "read it anyway"
            )
        if size is not None and items * dtype.itemsize > size:
            raise self.error(
                f"{what} is truncated: shape {_shape(shape)} of {dtype} needs {items * dtype.itemsize} "
                f"bytes, the file has {size}"
            )

    def _npy(self, stream: BinaryIO | Any, what: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile, struct.error) as error:
            raise self.error(f"{what} is truncated or damaged ({error})") from None
        return array

    # --- PyTorch -----------------------------------------------------------------------------------------

    def _from_torch(self, raw: bytes) -> _Found:
        try:
            import torch
        except ImportError:
            raise SolverUnavailableError(
                f"{self.path}: reading a PyTorch file needs PyTorch: install moeless-opt[runtime]"
            ) from None
        import pickle

        try:
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise self.error(
                "holds Python objects beside tensors and plain containers; they could run code when loaded "
                "and are never read. Save a dict of tensors with torch.save"
            ) from None
        except Exception as error:  # torch raises whatever its C++ reader meets
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise self.error(f"is a truncated or damaged PyTorch file ({reason})") from None
        if isinstance(content, Mapping):
            if "records" in content and self.key is None:
                return self._from_records(content)
            return self._choose({str(k): _Value(self, str(k), v) for k, v in content.items()}, "torch")
        if self.key is not None:
            raise self.error(f"is a single PyTorch object and has no key {self.key!r}; leave key out")
        return _Found(load=_Value(self, "tensor", content).get(), format="torch")

    def _from_records(self, content: Mapping[Any, Any]) -> _Found:
        """Read SGLang's modes per_pass and per_token: a record for each forward pass, by physical slot."""
        records = content["records"]
        if not isinstance(records, Sequence) or not records:
            raise self.error("holds no records: the recorder was dumped before any forward pass")
        map_key = next((k for k in _MAPS if k in content), None)
        if map_key is None:
            raise self.error(f"has records of physical experts but no map; expected {_MAPS[1]} beside them")
        physical, ranks = [], set()
        for i, record in enumerate(records):
            if not isinstance(record, Mapping) or "global_physical_count" not in record:
                raise self.error(f"records[{i}] has no global_physical_count")
            physical.append(
                _Value(self, f"records[{i}].global_physical_count", record["global_physical_count"]).get()
            )
            ranks.add(record.get("rank"))
            if physical[i].shape != physical[0].shape:
                raise self.error(
                    f"records[{i}].global_physical_count has shape {_shape(physical[i].shape)}, "
                    f"the first record's has {_shape(physical[0].shape)}"
                )
            if (i + 1) * physical[0].size * 8 > self.max_bytes:
                raise self.error(
                    f"records take more than {_mib(self.max_bytes)}; raise max_bytes to read them"
                )
        load = self._to_logical(
            np.stack(physical),
            _Value(self, map_key, content[map_key]).get(),
            "global_physical_count",
            map_key,
        )
        note = f"{len(records)} forward passes of rank(s) {', '.join(sorted(map(str, ranks)))}"
        return _Found(load=load, format="sglang-recorder", axis="steps", notes=(note,))

    # --- JSON --------------------------------------------------------------------------------------------

    def _from_json(self, text: str) -> _Found:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            end = " (the file ends there: truncated?)" if error.pos >= len(text.rstrip()) - 1 else ""
            raise self.error(
                f"is no valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{end}"
            ) from None
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.error(f"is no usable JSON: {reason}") from None
        if isinstance(content, dict):
            if str(content.get("format", "")).startswith("moeless-"):
                raise self.error(f"is a {content['format']} document, not a recording of loads")
            return self._choose({k: _Value(self, k, v) for k, v in content.items()}, "json")
        if self.key is not None:
            raise self.error(f"is a bare JSON array and has no key {self.key!r}; leave key out")
        return _Found(load=_Value(self, "array", content).get(), format="json")

    # --- which array -------------------------------------------------------------------------------------

    def _choose(self, arrays: Mapping[str, _Array], container: str) -> _Found:
        """Pick the array of loads: the caller's key, a known name, or the only one that can be."""
        if self.key is not None and self.key not in arrays and any(c in self.key for c in "*?["):
            return self._stack(arrays, container)
        names = self.key or next((n for n in (*_LOGICAL, *_PHYSICAL) if n in arrays), None)
        choices = next((n for n in _CHOICES if n in arrays and len(arrays[n].shape()) == 3), None)
        if names is None and choices is not None:
            return self._count_choices(arrays[choices].get(), choices)
        if names is None:
            able = [k for k in arrays if len(arrays[k].shape()) in (2, 3) and k not in _MAPS]
            if len(able) > 1:
                listed = ", ".join(f"{k} {_shape(arrays[k].shape())}" for k in able)
                raise self.error(
                    f"has several arrays that could be the loads; choose one by key: {_cut(listed)}"
                )
            if not able:
                raise self.error(
                    "has no array [layers, experts] or [scenarios, layers, experts]; its keys: "
                    f"{_cut(', '.join(arrays) or 'none')}; expected logical_count, counts or the like"
                )
            names = able[0]
        if names not in arrays:
            raise self.error(f"has no key {names!r}; it has {_cut(', '.join(arrays) or 'none')}")
        if names in _CHOICES and self.key is not None:
            return self._count_choices(arrays[names].get(), names)
        load = arrays[names].get()
        axis: Literal["steps", "scenarios"] = "steps" if names in _STEPPED else "scenarios"
        if names in _PHYSICAL:
            map_key = next((k for k in _MAPS if k in arrays), None)
            if map_key is None:
                raise self.error(
                    f"{names} counts physical experts, and the map to logical ones is missing; expected "
                    f"physical_to_logical_map [layers, physical experts] beside it"
                )
            load = self._to_logical(load, arrays[map_key].get(), names, map_key)
            note = f"{names} summed to logical experts by {map_key}"
            return _Found(load=load, format=f"vllm-{container}", axis=axis, notes=(note,))
        kind = f"sglang-{container}" if names == "logical_count" else container
        labels = self._labels(arrays, load.shape[0]) if load.ndim == 3 else ()
        if labels:
            axis = "scenarios"
        return _Found(load=load, format=kind, axis=axis, scenarios=labels, notes=(f"loads from {names}",))

    def _labels(self, arrays: Mapping[str, _Array], length: int) -> tuple[str, ...]:
        """Names of the leading axis: an array of as many strings."""
        for name in sorted(arrays, key=lambda k: (k not in _NAMES, k)):
            labels = arrays[name].strings()
            if labels is not None and len(labels) == length:
                return labels
        return ()

    def _stack(self, arrays: Mapping[str, _Array], container: str) -> _Found:
        assert self.key is not None
        matching = [k for k in arrays if fnmatchcase(k, self.key)]
        if not matching:
            raise self.error(f"has no key like {self.key!r}; it has {_cut(', '.join(arrays) or 'none')}")
        shapes = {k: arrays[k].shape() for k in matching}
        first = shapes[matching[0]]
        for k, shape in shapes.items():
            if len(shape) != 2 or shape != first:
                raise self.error(
                    f"{k} has shape {_shape(shape)}; arrays stacked by key={self.key!r} must all be "
                    f"[layers, experts] and equal, like {matching[0]} {_shape(first)}"
                )
        if len(matching) * math.prod(first) * 8 > self.max_bytes:
            raise self.error(f"the arrays of key={self.key!r} take more than {_mib(self.max_bytes)}")
        load = np.stack([_plain_numbers(self, k, arrays[k].get()) for k in matching])
        return _Found(
            load=load, format=container, scenarios=tuple(matching), notes=(f"{len(load)} arrays stacked",)
        )

    # --- to logical counts -------------------------------------------------------------------------------

    def _to_logical(
        self, physical: NDArray[Any], to_logical: NDArray[Any], name: str, map_name: str
    ) -> NDArray[np.float64]:
        """Sum loads [..., layers, physical] to logical experts by the map [layers, physical] (-1: unused)."""
        if physical.ndim not in (2, 3):
            raise self.error(
                f"{name} has shape {_shape(physical.shape)}, must be [(steps,) layers, physical experts]"
            )
        layers, slots = physical.shape[-2:]
        if to_logical.ndim == 1 and to_logical.shape == (slots,):
            to_logical = np.broadcast_to(to_logical, (layers, slots))
        if to_logical.shape != (layers, slots):
            raise self.error(
                f"{map_name} has shape {_shape(to_logical.shape)}, {name} needs "
                f"[{layers} layers, {slots} slots]"
            )
        load = _plain_numbers(self, name, physical)
        if to_logical.dtype.kind == "f" and np.isfinite(to_logical).all() and (to_logical % 1 == 0).all():
            to_logical = to_logical.astype(np.int64)
        if to_logical.dtype.kind not in "iu" or to_logical.min() < -1:
            raise self.error(f"{map_name} must hold logical experts from 0, or -1 for an unused slot")
        count = self._expert_count(int(to_logical.max()) + 1, map_name)
        steps = load.shape[0] if load.ndim == 3 else 1
        if steps * layers * count * 8 > self.max_bytes:
            raise self.error(
                f"{map_name} names expert {count - 1}: the loads would take over {_mib(self.max_bytes)}"
            )
        load_TLP = load.reshape(steps, layers, slots)
        used_LP = to_logical >= 0
        if load_TLP[:, ~used_LP].any():
            layer = int(np.argwhere(load_TLP.any(axis=0) & ~used_LP)[0, 0])
            raise self.error(f"{name}: layer {layer} has load on a slot that {map_name} calls unused (-1)")
        at = (np.arange(layers)[:, None] * count + to_logical)[used_LP]
        logical = [
            np.bincount(at, weights=load_LP[used_LP], minlength=layers * count) for load_LP in load_TLP
        ]
        return np.stack(logical).astype(np.float64).reshape(*physical.shape[:-1], count)

    def _count_choices(self, chosen: NDArray[Any], name: str) -> _Found:
        """Count how often each expert was chosen in a trace [tokens, layers, top-k] (-1: no token)."""
        if chosen.ndim != 3 or chosen.dtype.kind not in "iu" or chosen.size == 0:
            raise self.error(
                f"{name} has shape {_shape(chosen.shape)} of {chosen.dtype}; a token trace must be a "
                "non-empty integer array [tokens, layers, top-k]"
            )
        if chosen.min() < -1:
            raise self.error(f"{name} names expert {chosen.min()}; experts count from 0 (-1: none)")
        tokens, layers, top_k = chosen.shape
        count = self._expert_count(int(chosen.max()) + 1, name)
        if layers * count * 8 > self.max_bytes:
            raise self.error(
                f"{name} names expert {count - 1}: the loads would take over {_mib(self.max_bytes)}"
            )
        load_LE = np.zeros((layers, count))
        for layer in range(layers):
            picks = chosen[:, layer].ravel()
            load_LE[layer] = np.bincount(picks[picks >= 0], minlength=count)
        note = f"{name}: {tokens} tokens counted, top-{top_k}, over {count} experts"
        return _Found(load=load_LE, format="token-trace", notes=(note,))

    def _expert_count(self, seen: int, where: str) -> int:
        if self.experts is None:
            return max(seen, 1)
        if seen > self.experts:
            raise self.error(
                f"{where} names expert {seen - 1}; experts={self.experts} allows 0 to {self.experts - 1}"
            )
        return self.experts

    # --- tables --------------------------------------------------------------------------------------------

    def _from_table(self, text: str) -> _Found:
        rows = self._rows(text)
        first = next(rows, None)
        if first is None:
            raise self.error("is a table without rows")
        line, cells = first
        if any(_number(cell) is None for cell in cells):
            columns = self._columns(cells)
            return self._from_long(rows, columns, len(cells), ())
        if len(cells) > 3:
            return self._from_matrix(chain([first], rows))
        if len(cells) != 3:
            raise self.error(
                f"line {line}: {len(cells)} columns without a header; expected layer, expert, count or one "
                "row per layer with a column per expert"
            )
        note = "no header: columns taken as layer, expert, count"
        return self._from_long(chain([first], rows), {"layer": 0, "expert": 1, "count": 2}, 3, (note,))

    def _rows(self, text: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (line number, cells) of the rows that are neither blank nor comments."""
        first = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
        delimiter = max(",;\t|", key=first.count)
        if first.count(delimiter) == 0:
            delimiter = " "
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter == " "
        )
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells) and not cells[0].startswith("#"):
                    trimmed = [cell.strip() for cell in cells]
                    yield reader.line_num, [c for c in trimmed if c] if delimiter == " " else trimmed
        except csv.Error as error:
            raise self.error(f"line {reader.line_num}: no readable table ({error})") from None

    def _columns(self, names: list[str]) -> dict[str, int]:
        header = [_canonical(name) for name in names]
        columns: dict[str, int] = {}
        roles = {"layer": _LAYER, "expert": _EXPERT, "count": _COUNT, "scenario": _SCENARIO, "step": _STEP}
        for role, known in roles.items():
            known = (self.key, *known) if role == "count" and self.key is not None else known
            found = next(
                (header.index(_canonical(name)) for name in known if _canonical(name) in header), None
            )
            if found is not None:
                columns[role] = found
        missing = [role for role in ("layer", "expert", "count") if role not in columns]
        if missing:
            raise self.error(
                f"is a table without a column for {' and '.join(missing)}; its first row is "
                f"{_cut(', '.join(names))!r}; expected a header with layer, expert, count"
            )
        return columns

    def _from_long(
        self,
        rows: Iterable[tuple[int, list[str]]],
        columns: dict[str, int],
        width: int,
        notes: tuple[str, ...],
    ) -> _Found:
        """One row for each (scenario or step,) layer and expert; repeated rows add up, absent ones are 0."""
        total: dict[tuple[str, int, int], float] = {}
        repeated = 0
        lead: Literal["steps", "scenarios"] = "scenarios" if "scenario" in columns else "steps"
        lead_column = columns.get("scenario", columns.get("step"))
        for line, cells in rows:
            if len(cells) != width:
                raise self.error(f"line {line}: {len(cells)} cells, the first row has {width}")
            layer = self._index(line, "layer", cells[columns["layer"]])
            expert = self._index(line, "expert", cells[columns["expert"]])
            count = _number(cells[columns["count"]])
            if count is None or not math.isfinite(count) or count < 0:
                raise self.error(
                    f"line {line}: count is {_cut(cells[columns['count']], 40)!r}, must be a number >= 0"
                )
            at = ("" if lead_column is None else cells[lead_column], layer, expert)
            repeated += at in total
            total[at] = total.get(at, 0.0) + count
        if not total:
            raise self.error("is a table with a header and no rows")
        scenarios = list(dict.fromkeys(scenario for scenario, _, _ in total))
        layers = sorted({layer for _, layer, _ in total})
        experts = self._expert_count(max(expert for _, _, expert in total) + 1, "the table")
        if len(scenarios) * len(layers) * experts * 8 > self.max_bytes:
            raise self.error(
                f"names expert {experts - 1} of {len(layers)} layers in {len(scenarios)} scenarios, over "
                f"{_mib(self.max_bytes)}; raise max_bytes to read it anyway"
            )
        load_TLE = np.zeros((len(scenarios), len(layers), experts))
        scenario_at = {name: i for i, name in enumerate(scenarios)}
        layer_at = {layer: i for i, layer in enumerate(layers)}
        for (scenario, layer, expert), count in total.items():
            load_TLE[scenario_at[scenario], layer_at[layer], expert] = count
        if repeated:
            notes = (*notes, f"{repeated} repeated rows added up")
        return _Found(
            load=load_TLE,
            format="csv",
            axis=lead,
            layers=tuple(layers),
            scenarios=() if lead_column is None else tuple(scenarios),
            notes=notes,
        )

    def _from_matrix(self, rows: Iterable[tuple[int, list[str]]]) -> _Found:
        """Read a bare matrix: a row for each layer, a column for each expert."""
        if self.key is not None:
            raise self.error(f"is a table without a header and has no column {self.key!r}; leave key out")
        loads: list[list[float]] = []
        for line, cells in rows:
            values = [_number(cell) for cell in cells]
            if loads and len(cells) != len(loads[0]):
                raise self.error(f"line {line}: {len(cells)} cells, the first row has {len(loads[0])}")
            if None in values:
                column = values.index(None)
                raise self.error(
                    f"line {line}, column {column + 1}: {_cut(cells[column], 40)!r} is no number"
                )
            loads.append([value for value in values if value is not None])
        note = "no header: a row for each layer, a column for each expert"
        return _Found(load=np.array(loads), format="csv-matrix", notes=(note,))

    def _index(self, line: int, role: str, cell: str) -> int:
        """Return the index in a cell: a number, or a name that has one, like "model.layers.3.mlp"."""
        value = _number(cell)
        if value is not None and value == int(value if math.isfinite(value) else -1) and 0 <= value < 2**31:
            return int(value)
        digits = re.findall(r"\d+", cell) if value is None else []
        if len(digits) == 1 and len(digits[0]) < 10 and "-" not in cell:
            return int(digits[0])
        raise self.error(f"line {line}: {role} is {_cut(cell, 40)!r}, must be a whole number from 0")

    # --- checks --------------------------------------------------------------------------------------------

    def finish(self, found: _Found, scenario: str | int | None, steps: Literal["sum", "keep"]) -> Recording:
        """Check the loads, settle the leading axis, and leave dense layers out."""
        load = _plain_numbers(self, "loads", found.load)
        if load.ndim not in (2, 3) or 0 in load.shape:
            hint = "; for a single layer save it as [1, experts]" if load.ndim == 1 else ""
            raise self.error(
                f"the loads have shape {_shape(load.shape)}, must be [layers, experts] or "
                f"[scenarios, layers, experts], none of them 0{hint}"
            )
        self._check_values(load)
        load_TLE = load if load.ndim == 3 else load[None]
        scenarios, notes = found.scenarios, list(found.notes)
        if found.axis == "steps" and len(load_TLE) > 1:
            live: NDArray[np.bool_] = np.asarray(load_TLE.any(axis=(1, 2)))
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
        busy_L: NDArray[np.bool_] = np.asarray(load_TLE.any(axis=(0, 2)))
        if not busy_L.any():
            raise self.error("has no load at all: every count is 0")
        layers = found.layers or tuple(range(load_TLE.shape[1]))
        skipped = tuple(layer for layer, busy in zip(layers, busy_L, strict=True) if not busy)
        if skipped:
            notes.append(f"layers without any load (dense) left out: {', '.join(map(str, skipped))}")
        load_TLE = np.ascontiguousarray(load_TLE[:, busy_L])
        load_TLE.flags.writeable = False
        return Recording(
            load_TLE=load_TLE,
            layers=tuple(layer for layer, busy in zip(layers, busy_L, strict=True) if busy),
            skipped=skipped,
            scenarios=scenarios,
            format=found.format,
            path=self.path,
            notes=tuple(notes),
        )

    def _check_values(self, load: Floats) -> None:
        least, most = float(load.min()), float(load.max())
        if least >= 0 and most <= _LARGEST:  # NaN fails the first
            return
        at = tuple(int(i) for i in np.argwhere(~((load >= 0) & (load <= _LARGEST)))[0])
        names = ("scenario", "layer", "expert")[-load.ndim :]
        where = ", ".join(f"{name} {i}" for name, i in zip(names, at, strict=True))
        raise self.error(f"{where}: the load is {load[at]:g}, must be a number from 0 to {_LARGEST:g}")

    def _scenario(self, wanted: str | int, names: tuple[str, ...], count: int) -> int:
        if wanted in names:
            return names.index(str(wanted))
        text = str(wanted)
        if (isinstance(wanted, int) or text.isdecimal()) and 0 <= int(text) < count:
            return int(text)
        known = ", ".join(names) if names else f"numbers 0 to {count - 1}"
        raise self.error(f"has no scenario {text!r}; it has {_cut(known)}")


# --- arrays of a container, looked at before they are loaded -----------------------------------------------


class _Array:
    """An array inside a file: its shape costs little, its content is taken only when chosen."""

    def shape(self) -> tuple[int, ...]:
        """Return the shape, () for anything that is not an array of numbers."""
        raise NotImplementedError

    def get(self) -> NDArray[Any]:
        """Return the content."""
        raise NotImplementedError

    def strings(self) -> tuple[str, ...] | None:
        """Return the content where it is a list of strings."""
        raise NotImplementedError


class _NpzArray(_Array):
    def __init__(self, reader: _Reader, archive: zipfile.ZipFile, key: str, member: str) -> None:
        self.reader, self.archive, self.key, self.member = reader, archive, key, member

    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        header: tuple[tuple[int, ...], np.dtype[Any]] = self._opened(
            lambda stream: _npy_header(stream, self.reader)
        )
        return header

    def _opened(self, use: Callable[[Any], Any]) -> Any:
        try:
            with self.archive.open(self.member) as stream:
                return use(stream)
        except (
            zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, struct.error
        ) as error:  # fmt: skip
            raise self.reader.error(f"{self.key} is truncated or damaged ({error})") from None

    def shape(self) -> tuple[int, ...]:
        shape, dtype = self._header()
        return shape if dtype.kind in "iufbO" else ()

    def get(self) -> NDArray[Any]:
        self.reader._check_header(self.key, self._header(), self.archive.getinfo(self.member).file_size)
        array: NDArray[Any] = self._opened(lambda stream: self.reader._npy(stream, self.key))
        return array

    def strings(self) -> tuple[str, ...] | None:
        shape, dtype = self._header()
        if len(shape) != 1 or dtype.kind not in "US":
            return None
        return tuple(
            x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in self.get().tolist()
        )


class _Value(_Array):
    """A value of a JSON or PyTorch dictionary: nested lists, or a tensor."""

    def __init__(self, reader: _Reader, key: str, value: object) -> None:
        self.reader, self.key, self.value = reader, key, value

    def shape(self) -> tuple[int, ...]:
        if not isinstance(self.value, list | tuple):
            return tuple(int(n) for n in getattr(self.value, "shape", ()))
        # The first entry of each level is enough to guess; `get` checks the rest.
        shape: list[int] = []
        level: Any = self.value
        while isinstance(level, list | tuple):
            shape.append(len(level))
            level = level[0] if level else None
        return () if isinstance(level, str | bytes | dict) else tuple(shape)

    def get(self) -> NDArray[Any]:
        if isinstance(self.value, list | tuple):
            return _from_nested(self.reader, self.key, self.value)
        if type(self.value).__module__.split(".")[0] == "torch" and hasattr(self.value, "numel"):
            return self._from_tensor(self.value)
        raise self.reader.error(
            f"{self.key} is {_kind(self.value)}, must be an array [layers, experts] or "
            "[scenarios, layers, experts]"
        )

    def _from_tensor(self, tensor: Any) -> NDArray[Any]:
        shape = tuple(int(n) for n in tensor.shape)
        if math.prod(shape) * 8 > self.reader.max_bytes:
            raise self.reader.error(
                f"{self.key} has shape {_shape(shape)}, more than {_mib(self.reader.max_bytes)}; raise "
                "max_bytes to read it anyway"
            )
        if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_complex():
            raise self.reader.error(
                f"{self.key} is a sparse, quantized or complex tensor; save a dense real one"
            )
        plain = tensor.detach()
        try:
            array: NDArray[Any] = (plain.double() if plain.is_floating_point() else plain).cpu().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise self.reader.error(f"{self.key} is no plain tensor ({_cut(str(error))})") from None
        return array

    def strings(self) -> tuple[str, ...] | None:
        value = self.value
        if isinstance(value, list | tuple) and value and all(isinstance(x, str) for x in value):
            return tuple(str(x) for x in value)
        return None


# --- small helpers -----------------------------------------------------------------------------------------

_LARGEST = 1e200  # sums and products of loads must stay finite
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch.save before zip files


def _read_bytes(path: str, max_bytes: int) -> bytes:
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(max_bytes + 1) if size <= max_bytes else b""
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise FormatError(repr(path), f"is no path: {error}") from None
    size = max(size, len(raw))
    if size > max_bytes:
        raise FormatError(
            path,
            f"has {_mib(size)}, more than the limit of {_mib(max_bytes)}; sum its steps first, save it as "
            ".npz, or raise max_bytes",
        )
    return raw


def _npy_header(stream: Any, reader: _Reader) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise reader.error(f"is an .npy file of version {version}; save plain numbers (version 1 or 2)")
    except FormatError:
        raise
    except (
        ValueError,
        EOFError,
        TypeError,
        KeyError,
        struct.error,
        SyntaxError,
        RecursionError,
        TokenError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise reader.error(f"has a truncated or damaged .npy header ({_cut(reason)})") from None
    if any(n < 0 for n in shape):
        raise reader.error(f"has a damaged .npy header: shape {_shape(shape)}")
    return shape, dtype


def _from_nested(reader: _Reader, key: str, value: Sequence[Any]) -> NDArray[Any]:
    """Turn nested lists to an array; the first row of another length or kind is named."""
    if not value:
        raise reader.error(f"{key} is empty, must be [layers, experts] or [scenarios, layers, experts]")
    rows, where = list(value), [f"{key}[{i}]" for i in range(len(value))]
    shape = [len(rows)]
    # Go down one level at a time while the entries are lists.
    while isinstance(rows[0], list | tuple):
        if len(shape) == 3:
            raise reader.error(
                f"{key} is nested more than 3 deep, must be [layers, experts] or [scenarios, layers, experts]"
            )
        width = len(rows[0])
        for row, at in zip(rows, where, strict=True):
            if not isinstance(row, list | tuple):
                raise reader.error(f"{at} is {_kind(row)}, must be a list of {width} like the first row")
            if len(row) != width:
                raise reader.error(
                    f"{at} has {len(row)} entries, the first row has {width}: rows must be equal"
                )
        shape.append(width)
        if width == 0:
            return np.zeros(shape)
        if not isinstance(rows[0][0], list | tuple):
            return _numbers(reader, rows, where).reshape(shape)
        where = [f"{at}[{j}]" for at in where for j in range(width)]
        rows = [entry for row in rows for entry in row]
    return _numbers(reader, [rows], [key]).reshape(shape)


def _numbers(reader: _Reader, rows: list[Any], where: list[str]) -> NDArray[Any]:
    """Stack rows of plain numbers; strings, null, booleans and lists among them are named."""
    arrays = []
    for row, at in zip(rows, where, strict=True):
        kinds = set(map(type, row))
        if not kinds <= {int, float}:
            j = next(j for j, entry in enumerate(row) if type(entry) not in (int, float))
            raise reader.error(f"{at}[{j}] is {_kind(row[j])}, must be a number")
        try:
            arrays.append(np.array(row, dtype=np.float64))
        except OverflowError:
            raise reader.error(f"{at} has a number that is too large, must be at most {_LARGEST:g}") from None
    return np.stack(arrays)


def _plain_numbers(reader: _Reader, what: str, array: NDArray[Any]) -> Floats:
    if array.dtype.kind not in "iuf":
        raise reader.error(f"{what} has type {array.dtype}, must be numbers")
    if array.size * 8 > reader.max_bytes:
        raise reader.error(
            f"{what} has shape {_shape(array.shape)}, more than {_mib(reader.max_bytes)} as float64"
        )
    return array.astype(np.float64)


def _number(cell: str) -> float | None:
    # float() also takes "1_000" and other scripts' digits; a table of counts has neither.
    if "_" in cell or not cell.isascii():
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _canonical(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name.strip()).lower()).strip("_")


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "str": "a string",
        "dict": "an object",
        "list": "a list",
    }
    name = type(value).__name__
    return names.get(name, f"a {name}")


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size} bytes"


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
