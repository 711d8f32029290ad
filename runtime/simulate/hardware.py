"""GPUs by name, machines of one's own, and what models hold beside their experts: data sheets, links, caches.

Peaks are dense ones of 16-bit arithmetic. Links are one direction of one GPU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io import read_json
from moeless_opt.problems.spec import TOPOLOGY_PRESETS, Links, Topology
from moeless_opt.runtime.simulate.options import unknown

__all__ = ["BESIDE", "GPUS", "Beside", "DataSheet", "gpu_of", "topology_of"]


class DataSheet(NamedTuple):
    """Peaks of a GPU: dense 16-bit FLOP/s, bytes/s of memory; its bytes of memory; its links; the source."""

    flops: float
    bandwidth: float
    memory: float
    links: Links
    source: str


def _links(intra: float, inter: float, host: float) -> Links:
    return Links(intra_node=intra * 1e9, inter_node=inter * 1e9, host=host * 1e9)


GPUS: dict[str, DataSheet] = {
    "A6000": DataSheet(
        154.8e12, 768e9, 48e9, _links(56.25, 12.5, 26), "NVIDIA RTX A6000 data sheet; NVLink bridge; PCIe 4"
    ),
    "A100": DataSheet(
        312e12, 2039e9, 80e9, _links(300, 25, 26), "NVIDIA A100 80GB SXM data sheet; NVLink 3; 200 Gb/s a GPU"
    ),
    "H100": DataSheet(
        989e12, 3350e9, 80e9, _links(450, 50, 54), "NVIDIA H100 SXM data sheet; NVLink 4; 400 Gb/s a GPU"
    ),
    "H200": DataSheet(
        989e12, 4800e9, 141e9, _links(450, 50, 54), "NVIDIA H200 SXM data sheet; NVLink 4; 400 Gb/s a GPU"
    ),
    "B200": DataSheet(
        2250e12, 7700e9, 180e9, _links(900, 50, 54), "NVIDIA DGX B200 data sheet, an eighth; NVLink 5"
    ),
    "GB200": DataSheet(
        2500e12, 8000e9, 186e9, _links(900, 50, 190), "NVIDIA GB200 NVL72 data sheet, a 72nd; NVLink 5, C2C"
    ),
    "MI300X": DataSheet(
        1307.4e12,
        5300e9,
        192e9,
        _links(448, 50, 54),
        "AMD Instinct MI300X data sheet; seven links of 64 GB/s",
    ),
}
"""GPUs by name."""


class Beside(NamedTuple):
    """What a model holds beside its routed experts, from its config.json.

    kv_bytes: of one token's keys and values (16 bits) in all layers, per MoE layer; once: weights (16 bits)
    of embeddings and dense layers, which the GPUs share evenly.
    """

    kv_bytes: float
    once: float


#: Of a model that is not listed: 8 heads of 128 for keys and values, nothing else (assumed).
UNKNOWN = Beside(4096.0, 0.0)

BESIDE: dict[str, Beside] = {
    "Mixtral-8x7B": Beside(4096, 0.26e9),
    "Mixtral-8x22B": Beside(4096, 0.40e9),
    "Phi-3.5-MoE": Beside(4096, 0.26e9),
    "Llama-4-Scout": Beside(4096, 2.07e9),
    "Llama-4-Maverick": Beside(8192, 9.7e9),
    "DeepSeek-V3": Beside(1152 * 61 / 58, 3.6e9),
    "Kimi-K2": Beside(1152 * 61 / 60, 2.9e9),
    "Qwen3-30B-A3B": Beside(2048, 0.62e9),
    "Qwen3-235B-A22B": Beside(2048, 1.25e9),
    "Qwen1.5-MoE-A2.7B": Beside(8192, 0.62e9),
    "OLMoE-1B-7B": Beside(8192, 0.21e9),
    "gpt-oss-20b": Beside(2048, 1.16e9),
    "gpt-oss-120b": Beside(2048, 1.16e9),
}
"""Models by name; layers that have no experts count as keys, values and weights of those that have."""

_SHAPE = re.compile(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})(?:x([A-Za-z]\w*))?")


def gpu_of(topology: str | Topology, gpu: str | None) -> str:
    """Name of the GPU that a machine is made of: what its name says, else what is asked for, else H100.

    Raises
    ------
    ProblemError
        If the two differ.
    """
    name = topology.name if isinstance(topology, Topology) else topology
    named = next((known for known in sorted(GPUS, key=len, reverse=True) if known in name), None)
    if gpu is not None and named is not None and gpu != named:
        raise ProblemError("gpu", f"is {gpu!r}, but the topology {name!r} is of {named}")
    return gpu or named or "H100"


def topology_of(text: str, gpu: str | None) -> tuple[Topology, bool]:
    """A machine from a preset's name, a shape, or a file; and whether its slots or memory are its own.

    A shape is ``GPUSxKIND``, ``NODESxGPUS`` or ``NODESxGPUSxKIND``, with the links of that kind of GPU; a
    file is a topology in JSON.

    Raises
    ------
    ProblemError
        If it is none of them.
    """
    if text in TOPOLOGY_PRESETS:
        return Topology.preset(text, slots=1), False
    found = _SHAPE.fullmatch(text)
    if found and (found[1] or found[3]) and (found[3] is None or found[3] in GPUS):
        nodes, per_node = int(found[1] or 1), int(found[2])
        links = GPUS[found[3] or gpu or "H100"].links
        return Topology.uniform(nodes, per_node, slots=1, links=links, name=text), False
    if Path(text).suffix.lower() in (".json", ".gz") or os.sep in text:
        data = read_json(text)
        if isinstance(data, dict) and isinstance(data.get("topology"), dict):
            data = data["topology"]
        try:
            return Topology.from_dict(data), True
        except FormatError as error:
            raise FormatError(text, f"{error.where}: {error.what}") from None
    what = unknown("topology", text, TOPOLOGY_PRESETS).what
    raise ProblemError("topology", f"{what}, or GPUSxKIND, NODESxGPUS, NODESxGPUSxKIND, or a file (.json)")


def slots_of(topology: Topology, slots: int) -> Topology:
    """The same machine with so many slots on every GPU."""
    return topology.replace(slots_G=np.full(topology.gpus, slots))
