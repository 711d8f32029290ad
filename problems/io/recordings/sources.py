"""Loads by the rank that sent the tokens, from recordings of one file for each rank."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any

import numpy as np

from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.io.recordings.folders import is_many, rank_files
from moeless_opt.problems.io.recordings.read import read_recording
from moeless_opt.problems.spec import Loads

__all__ = ["read_sources"]

_NEAR = 1e-9


def read_sources(path: str | PathLike[str], **options: Any) -> Loads:
    """Read a folder, or a pattern, of one file for each rank as loads by source GPU.

    Megatron-core's router trace is one (``router_trace_rank*.jsonl``): each rank writes what the tokens that
    live on it chose. So are its dumps, and all files that `read_loads` takes and that a rank is named by.

    Parameters
    ----------
    path : path
        A folder or a pattern such as ``run/*.jsonl``.
    **options
        Those of `read_loads`, but ``scenario`` and ``steps``: steps are summed.

    Returns
    -------
    Loads
        With `load_TLGE`, GPU r that of rank r.

    Raises
    ------
    FormatError
        Naming the file, what is wrong, and what would be right.
    """
    name = str(path)
    if not is_many(name):
        raise FormatError(
            name, "is one file; loads by source are a folder or a pattern with one for each rank"
        )
    for key in ("scenario", "steps", "content"):
        if key in options:
            raise FormatError(key, "is not for loads by source, whose steps are summed")
    whole = read_recording(name, **options)
    if whole.load_TLE.shape[0] > 1:
        raise FormatError(name, f"has {whole.load_TLE.shape[0]} scenarios; loads by source are of one")
    experts, files = whole.load_TLE.shape[2], rank_files(name)
    every = {*whole.layers, *whole.skipped}
    load_LRE = np.zeros((len(whole.layers), len(files), experts))
    for rank, file in enumerate(files):
        part = read_recording(file, **options | {"experts": experts}, idle=True)
        if part.load_TLE.shape[0] > 1 or {*part.layers, *part.skipped} != every:
            raise FormatError(
                file,
                f"of rank {rank} has {len(part.layers) + len(part.skipped)} layers, all ranks together "
                f"{len(every)}: pipeline stages? loads by source need every layer of every rank",
            )
        rows = [
            whole.layers.index(layer) for layer in part.layers
        ]  # one that it had no tokens in is left out
        load_LRE[rows, rank] = part.load_TLE[0]
    if not np.allclose(load_LRE.sum(1), whole.load_TLE[0], rtol=_NEAR, atol=_NEAR):
        raise FormatError(
            name,
            "has ranks whose loads do not add up to those of all: every rank wrote the sum? loads by source "
            "are of each rank's own tokens",
        )
    return Loads(
        load_TLE=load_LRE.sum(1)[None],
        load_TLGE=load_LRE[None],
        layers=whole.layers,
        skipped=whole.skipped,
        source=os.path.basename(os.path.normpath(name)),
        notes=(*whole.notes, f"by source rank, 0 to {len(files) - 1}"),
    )
