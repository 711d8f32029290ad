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

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray
from moeless_opt.problems.errors import FormatError, SolverUnavailableError
from moeless_opt.problems.files import gunzipped, open_zip, read_bytes, read_limit, text_limit
from moeless_opt.problems.io.recordings.arrays import Array, NpzArray, Value, npy_array, plain_numbers
from moeless_opt.problems.io.recordings.source import LARGEST_LOAD, Found, Source, cut, shape_text
from moeless_opt.problems.io.recordings.tables import TableReader
from moeless_opt.problems.spec import Loads
from moeless_opt.problems.text import bytes_text

__all__ = ["Recording", "frame_loads", "read_loads", "read_recording"]


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
    max_bytes: int | None = None,
    content: bytes | None = None,
) -> Recording:
    """Read a recording of expert loads.

    Parameters
    ----------
    path : path
        The file; ``-`` is standard input. It may be a pipe, and it may be gzipped.
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
    max_bytes : int, optional
        Largest file, after decompression, and largest array as float64. Text (JSON, tables), which takes many
        times its size in memory, is read up to a quarter of it. By default the limit of all readers: 256 MB,
        or what the environment variable ``MOELESS_MAX_READ`` says.
    content : bytes, optional
        The bytes of the file, where they have been read already (a pipe can be read only once).

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
    limit = read_limit() if max_bytes is None else max_bytes
    raw = read_bytes(path, limit=limit) if content is None else content
    reader = _Reader(Source(str(path), key, experts, limit))
    return reader.finish(reader.dispatch(raw), scenario, steps)


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
        return self._from_text(raw)

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
        return self._from_json(text) if start in "{[" else TableReader(self.source).read(text)

    # --- arrays: .npy, .npz ------------------------------------------------------------------------------

    def _from_npy(self, raw: bytes) -> Found:
        if self.source.key is not None:
            raise self.error(f"is a single .npy array and has no key {self.source.key!r}; leave key out")
        return Found(load=npy_array(self.source, raw), format="npy")

    def _from_zip(self, raw: bytes) -> Found:
        archive = open_zip(raw, self.source.path)
        with archive:
            if any(re.search(r"(^|/)data\.pkl$", member) for member in archive.namelist()):
                if sum(info.file_size for info in archive.infolist()) > self.source.max_bytes:
                    raise self.error(
                        f"unpacks to more than {self.source.most}; raise MOELESS_MAX_READ to read it"
                    )
                return self._from_torch(raw)
            members = {m.removesuffix(".npy"): m for m in archive.namelist() if m.endswith(".npy")}
            if not members:
                raise self.error("is a zip archive without arrays; expected .npz or a PyTorch file")
            arrays = {key: NpzArray(self.source, archive, key, member) for key, member in members.items()}
            return self._choose(arrays, "npz")

    # --- PyTorch -----------------------------------------------------------------------------------------

    def _from_torch(self, raw: bytes) -> Found:
        try:
            import torch
        except ImportError:
            raise SolverUnavailableError(
                f"{self.source.path}: reading a PyTorch file needs PyTorch: install moeless-opt[runtime]"
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
            if "records" in content and self.source.key is None:
                return self._from_records(content)
            return self._choose({str(k): Value(self.source, str(k), v) for k, v in content.items()}, "torch")
        if self.source.key is not None:
            raise self.error(f"is a single PyTorch object and has no key {self.source.key!r}; leave key out")
        return Found(load=Value(self.source, "tensor", content).get(), format="torch")

    def _from_records(self, content: Mapping[Any, Any]) -> Found:
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
                Value(
                    self.source, f"records[{i}].global_physical_count", record["global_physical_count"]
                ).get()
            )
            ranks.add(record.get("rank"))
            if physical[i].shape != physical[0].shape:
                raise self.error(
                    f"records[{i}].global_physical_count has shape {shape_text(physical[i].shape)}, "
                    f"the first record's has {shape_text(physical[0].shape)}"
                )
            if (i + 1) * physical[0].size * 8 > self.source.max_bytes:
                raise self.error(
                    f"records take more than {self.source.most}; raise MOELESS_MAX_READ to read them"
                )
        load = self._to_logical(
            np.stack(physical),
            Value(self.source, map_key, content[map_key]).get(),
            "global_physical_count",
            map_key,
        )
        note = f"{len(records)} forward passes of rank(s) {', '.join(sorted(map(str, ranks)))}"
        return Found(load=load, format="sglang-recorder", axis="steps", notes=(note,))

    # --- JSON --------------------------------------------------------------------------------------------

    def _from_json(self, text: str) -> Found:
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
            return self._choose({k: Value(self.source, k, v) for k, v in content.items()}, "json")
        if self.source.key is not None:
            raise self.error(f"is a bare JSON array and has no key {self.source.key!r}; leave key out")
        return Found(load=Value(self.source, "array", content).get(), format="json")

    # --- which array -------------------------------------------------------------------------------------

    def _choose(self, arrays: Mapping[str, Array], container: str) -> Found:
        """Pick the array of loads: the caller's key, a known name, or the only one that can be."""
        if (
            self.source.key is not None
            and self.source.key not in arrays
            and any(c in self.source.key for c in "*?[")
        ):
            return self._stack(arrays, container)
        names = self.source.key or next((n for n in (*_LOGICAL, *_PHYSICAL) if n in arrays), None)
        choices = next((n for n in _CHOICES if n in arrays and len(arrays[n].shape()) == 3), None)
        if names is None and choices is not None:
            return self._count_choices(arrays[choices].get(), choices)
        if names is None:
            able = [k for k in arrays if len(arrays[k].shape()) in (2, 3) and k not in _MAPS]
            if len(able) > 1:
                listed = ", ".join(f"{k} {shape_text(arrays[k].shape())}" for k in able)
                raise self.error(
                    f"has several arrays that could be the loads; choose one by key: {cut(listed)}"
                )
            if not able:
                raise self.error(
                    "has no array [layers, experts] or [scenarios, layers, experts]; its keys: "
                    f"{cut(', '.join(arrays) or 'none')}; expected logical_count, counts or the like"
                )
            names = able[0]
        if names not in arrays:
            raise self.error(f"has no key {names!r}; it has {cut(', '.join(arrays) or 'none')}")
        if names in _CHOICES and self.source.key is not None:
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
            return Found(load=load, format=f"vllm-{container}", axis=axis, notes=(note,))
        kind = f"sglang-{container}" if names == "logical_count" else container
        labels = self._labels(arrays, load.shape[0]) if load.ndim == 3 else ()
        if labels:
            axis = "scenarios"
        return Found(load=load, format=kind, axis=axis, scenarios=labels, notes=(f"loads from {names}",))

    def _labels(self, arrays: Mapping[str, Array], length: int) -> tuple[str, ...]:
        """Names of the leading axis: an array of as many strings."""
        for name in sorted(arrays, key=lambda k: (k not in _NAMES, k)):
            labels = arrays[name].strings()
            if labels is not None and len(labels) == length:
                return labels
        return ()

    def _stack(self, arrays: Mapping[str, Array], container: str) -> Found:
        assert self.source.key is not None
        matching = [k for k in arrays if fnmatchcase(k, self.source.key)]
        if not matching:
            raise self.error(
                f"has no key like {self.source.key!r}; it has {cut(', '.join(arrays) or 'none')}"
            )
        shapes = {k: arrays[k].shape() for k in matching}
        first = shapes[matching[0]]
        for k, shape in shapes.items():
            if len(shape) != 2 or shape != first:
                raise self.error(
                    f"{k} has shape {shape_text(shape)}; arrays stacked by key={self.source.key!r} must all "
                    f"be [layers, experts] and equal, like {matching[0]} {shape_text(first)}"
                )
        if len(matching) * math.prod(first) * 8 > self.source.max_bytes:
            raise self.error(f"the arrays of key={self.source.key!r} take more than {self.source.most}")
        load = np.stack([plain_numbers(self.source, k, arrays[k].get()) for k in matching])
        return Found(
            load=load, format=container, scenarios=tuple(matching), notes=(f"{len(load)} arrays stacked",)
        )

    # --- to logical counts -------------------------------------------------------------------------------

    def _to_logical(
        self, physical: NDArray[Any], to_logical: NDArray[Any], name: str, map_name: str
    ) -> FloatArray:
        """Sum loads [..., layers, physical] to logical experts by the map [layers, physical] (-1: unused)."""
        if physical.ndim not in (2, 3) or 0 in physical.shape:
            raise self.error(
                f"{name} has shape {shape_text(physical.shape)}, must be [(steps,) layers, physical experts]"
            )
        layers, slots = physical.shape[-2:]
        if to_logical.ndim == 1 and to_logical.shape == (slots,):
            to_logical = np.broadcast_to(to_logical, (layers, slots))
        if to_logical.shape != (layers, slots):
            raise self.error(
                f"{map_name} has shape {shape_text(to_logical.shape)}, {name} needs "
                f"[{layers} layers, {slots} slots]"
            )
        load = plain_numbers(self.source, name, physical)
        if to_logical.dtype.kind == "f":
            to_logical = to_logical.astype(np.float64)  # half a float does not reach the limit below
        fits = to_logical.dtype.kind in "iuf" and bool(((to_logical >= -1) & (to_logical < 2**31)).all())
        if not fits or (to_logical.dtype.kind == "f" and (to_logical % 1 != 0).any()):
            raise self.error(f"{map_name} must hold logical experts from 0, or -1 for an unused slot")
        to_logical = to_logical.astype(np.int64)
        count = self.source.expert_count(int(to_logical.max()) + 1, map_name)
        steps = load.shape[0] if load.ndim == 3 else 1
        if steps * layers * count * 8 > self.source.max_bytes:
            raise self.error(
                f"{map_name} names expert {count - 1}: the loads would take over {self.source.most}"
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

    def _count_choices(self, chosen: NDArray[Any], name: str) -> Found:
        """Count how often each expert was chosen in a trace [tokens, layers, top-k] (-1: no token)."""
        if chosen.ndim != 3 or chosen.dtype.kind not in "iu" or chosen.size == 0:
            raise self.error(
                f"{name} has shape {shape_text(chosen.shape)} of {chosen.dtype}; a token trace must be a "
                "non-empty integer array [tokens, layers, top-k]"
            )
        if chosen.min() < -1:
            raise self.error(f"{name} names expert {chosen.min()}; experts count from 0 (-1: none)")
        tokens, layers, top_k = chosen.shape
        count = self.source.expert_count(int(chosen.max()) + 1, name)
        if layers * count * 8 > self.source.max_bytes:
            raise self.error(f"{name} names expert {count - 1}: the loads would take over {self.source.most}")
        load_LE = np.zeros((layers, count))
        for layer in range(layers):
            picks = chosen[:, layer].ravel()
            load_LE[layer] = np.bincount(picks[picks >= 0], minlength=count)
        note = f"{name}: {tokens} tokens counted, top-{top_k}, over {count} experts"
        return Found(load=load_LE, format="token-trace", notes=(note,))

    # --- checks --------------------------------------------------------------------------------------------

    def finish(self, found: Found, scenario: str | int | None, steps: Literal["sum", "keep"]) -> Recording:
        """Check the loads, settle the leading axis, and leave dense layers out."""
        load = plain_numbers(self.source, "loads", found.load)
        if load.ndim not in (2, 3) or 0 in load.shape:
            hint = "; for a single layer save it as [1, experts]" if load.ndim == 1 else ""
            raise self.error(
                f"the loads have shape {shape_text(load.shape)}, must be [layers, experts] or "
                f"[scenarios, layers, experts], none of them 0{hint}"
            )
        want = self.source.experts
        if want is not None and load.shape[-1] != want:
            raise self.error(
                f"has loads of {load.shape[-1]} experts per layer; experts={want} cannot change that"
            )
        self._check_values(load)
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
