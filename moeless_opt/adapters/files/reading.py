"""Read a placement from any engine's file: the format is found by content, not by name.

============  =============================================================================================
format        how it is recognised
============  =============================================================================================
ours          a plan (JSON or .npz)
SGLang        JSON or PyTorch file with ``physical_to_logical_map`` alone; recorder files with ``records``
TensorRT-LLM  YAML (or JSON) with ``initial_global_assignments``
ascend        JSON with ``layer_list``
EPLB          ``phy2log`` and the like in .npz, PyTorch or JSON form; an .npy array
vLLM          a JSON list: [slots] for all layers alike, [layers][slots], or [layers][GPUs][slots]
============  =============================================================================================

Each may be gzipped. Nothing in a file is ever run.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from moeless_opt.adapters import EngineMap, map_of_slots
from moeless_opt.adapters.files import ascend, eplb, sglang, tensorrt_llm, vllm
from moeless_opt.adapters.files.layers import model_numbers
from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.codec import kind_name
from moeless_opt.problems.errors import FormatError, SolverUnavailableError
from moeless_opt.problems.files import check_archive, gunzipped, named, open_zip, read_bytes, text_limit
from moeless_opt.problems.io import load_plan, load_slots, parse_json, read_arrays
from moeless_opt.problems.spec import ModelSpec, Placement
from moeless_opt.problems.text import bytes_text

__all__ = ["OURS", "read_map", "read_placement", "wanted_layers"]

OURS = "plan"
"""What a map that was read from a plan is called instead of an engine's name."""
_KNOWN = "a plan, or a map of SGLang, TensorRT-LLM, vllm-ascend, EPLB or vLLM"


def read_placement(
    path: str | PathLike[str],
    *,
    gpus: int | None = None,
    experts: int | None = None,
    layers: Sequence[int] | None = None,
    model: ModelSpec | None = None,
    model_layers: int | str | Sequence[int] | None = None,
    partial: bool = False,
) -> Placement:
    """Read a placement from a plan's file, or from one of any engine.

    Parameters
    ----------
    path : path
        The file; ``-`` is standard input. It may be a pipe, and it may be gzipped.
    gpus : int, optional
        GPUs; needed where the file has a map of slots alone (SGLang, TensorRT-LLM, vLLM, EPLB).
    experts : int, optional
        Experts per layer, checked; without it as many as the file names.
    layers : sequence of int, optional
        The layers that are wanted, as `Loads.layers` numbers them; all by default. Where a format has no
        numbers its rows are taken to be these, in order.
    model, model_layers : optional
        For formats that count dense layers, see `export`.
    partial : bool
        Whether experts may be missing.

    Returns
    -------
    Placement
        As it stands in the file, slot by slot, second copies of an expert on a GPU included.

    Raises
    ------
    FormatError, ProblemError
        Naming the file, and the layer and slot where it is wrong.
    """
    found = read_map(path)
    with named(path):
        wanted = wanted_layers(found, layers, model, model_layers)
        return found.placement(gpus=gpus, experts=experts, layers=wanted, partial=partial)


def wanted_layers(
    found: EngineMap,
    layers: Sequence[int] | None,
    model: ModelSpec | None = None,
    told: int | str | Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """The wanted layers by the numbers that a map has them under; None for all."""
    if layers is None:
        return None
    if found.engine == OURS and found.layers is not None and len(found.layers) == len(layers):
        return found.layers  # plans are for the layers in order
    if found.layers is None and not found.all_layers:
        return tuple(layers)
    same = len(found.map_LS) == len(layers)
    return model_numbers(layers, model=model, told=told, sure=found.all_layers and not same)[0]


def read_map(path: str | PathLike[str], *, content: bytes | None = None, broken: bool = False) -> EngineMap:
    """Read a file as `read_placement` does, as the map of slots that stands in it.

    Parameters
    ----------
    path : path
        The file.
    content : bytes, optional
        Its bytes, where they have been read already.
    broken : bool
        Read the slots of a plan that breaks rules, too (to be repaired).

    Raises
    ------
    FormatError, ProblemError
        Naming the file.
    """
    name = str(path)
    raw = gunzipped(read_bytes(path) if content is None else content, name)
    if _is_plan(raw, name):
        return _plan(raw, name, broken=broken)
    with named(name):
        if raw.startswith(b"\x93NUMPY"):
            return eplb.parse({"array": _npy(raw)})
        if raw.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return _archive(raw, name)
        if raw.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."):
            return _tensors(_torch(raw, name))
        return _text(raw, name)


def _npy(raw: bytes) -> Any:
    try:
        return np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen kinds on damaged arrays
        raise FormatError("array", f"is truncated or damaged ({type(error).__name__})") from None


def _archive(raw: bytes, name: str) -> EngineMap:
    with open_zip(raw, name) as archive:
        members = archive.namelist()
    if any(member == "data.pkl" or member.endswith("/data.pkl") for member in members):
        check_archive(raw, name)
        return _tensors(_torch(raw, name))
    return eplb.parse(read_arrays(name, raw))


def _torch(raw: bytes, name: str) -> Any:
    try:
        import torch
    except ImportError:
        raise SolverUnavailableError(
            f"{name}: reading a PyTorch file needs PyTorch: install moeless-opt[runtime]"
        ) from None
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers meet
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FormatError(
            name, f"is damaged, or holds objects beside tensors, which are never read ({reason})"
        ) from None


def _tensors(content: Any) -> EngineMap:
    """The map of what a PyTorch file holds."""
    if hasattr(content, "detach"):
        content = {"tensor": content}
    if not isinstance(content, Mapping):
        raise FormatError("content", f"is {type(content).__name__}, must be a tensor or a dict of tensors")
    arrays = {}
    for key, value in content.items():
        if hasattr(value, "detach"):
            kept = value.detach().cpu()
            arrays[str(key)] = (kept.double() if kept.is_floating_point() else kept).numpy()
        elif str(key) in eplb.MAPS:
            arrays[str(key)] = np.asarray(value)
    found = eplb.parse(arrays)
    recorded = "records" in content or set(arrays) == {"last_physical_to_logical_map"}
    if recorded or set(content) == {sglang.KEY}:
        return found.replace(engine="sglang", all_layers=True)
    return found


def _text(raw: bytes, name: str) -> EngineMap:
    if not raw.strip():
        raise FormatError("content", f"is empty; it must be {_KNOWN}")
    start = raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" or start == b"{":
        document = parse_json(raw, name)
    else:
        if len(raw) > text_limit():
            raise FormatError("content", f"is text of {bytes_text(len(raw))}: too long to be a map")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FormatError("content", f"is in no known format; it must be {_KNOWN}") from None
        if "num_slots" not in text and "initial_global_assignments" not in text:
            raise FormatError("content", f"is in no known format; it must be {_KNOWN}")
        return tensorrt_llm.parse(tensorrt_llm.parse_yaml(text, name))
    if isinstance(document, list):
        return vllm.parse(document)
    return _document(document)


def _document(document: Mapping[str, Any]) -> EngineMap:
    if "layer_list" in document or "moe_layer_count" in document:
        return ascend.parse(document)
    if "initial_global_assignments" in document or "num_slots" in document:
        return tensorrt_llm.parse(_numbered(document))
    if set(document) == {sglang.KEY}:
        return sglang.parse(document)
    given = [key for key in eplb.MAPS if key in document]
    if not given:
        raise FormatError("document", f"has the keys {sorted(document)[:8]}; it must be {_KNOWN}")
    arrays: dict[str, Any] = {}
    for key in given:
        found = document[key]
        if not isinstance(found, list):
            raise FormatError(key, f"must be a list of layers, got {kind_name(found)}")
        arrays[key] = vllm.parse(found).map_LS
    for key in eplb.DERIVED:
        if key in document:
            try:
                arrays[key] = np.array(document[key])
            except ValueError:
                raise FormatError(key, "is no array: its rows differ in length") from None
    return eplb.parse(arrays)


def _numbered(document: Mapping[str, Any]) -> dict[str, Any]:
    """TensorRT-LLM's document where it is JSON, whose keys are texts."""
    given = document.get("initial_global_assignments")
    if not isinstance(given, Mapping):
        return dict(document)
    by_layer = {int(key) if key.isascii() and key.isdigit() else key: row for key, row in given.items()}
    return dict(document) | {"initial_global_assignments": by_layer}


def _is_plan(raw: bytes, name: str) -> bool:
    """Whether bytes are one of our documents."""
    if raw.startswith(b"PK"):
        with open_zip(raw, name) as archive:
            return "document.npy" in archive.namelist()
    start = raw[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{") and b'"format"' in start


def _plan(raw: bytes, name: str, *, broken: bool) -> EngineMap:
    layers: tuple[int, ...] | None = None
    if broken:
        found, experts = load_slots(name, content=raw)
        slots: IntArray = np.where((found >= 0) & (found < 2**31), found, -1)
    else:
        plan = load_plan(name, content=raw)
        slots, experts, layers = plan.slots_LGC.astype(np.int64), plan.experts, plan.layers
    map_LS = map_of_slots(slots)
    return EngineMap(map_LS=map_LS, engine=OURS, gpus=slots.shape[1], layers=layers, experts=experts)
