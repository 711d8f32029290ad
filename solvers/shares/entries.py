"""Shares in whole multiples of 1/N, for engines whose dispatch table has N entries for an expert.

Rounding each expert by itself (largest remainders) leaves its errors where they fall: half an entry of a
heavy expert on one GPU. `entry_shares` counts entries so that errors of opposite signs meet on a GPU. Where
the replicas of a layer form trees, no counts have a smaller largest time; where they do not, it searches
(`entry_search`).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.solvers.shares import entry_search
from moeless_opt.solvers.shares.entry_search import EntryGraph
from moeless_opt.solvers.shares.rounding import round_tokens
from moeless_opt.solvers.twins import in_cache

__all__ = ["entry_shares", "kernels", "warm_entries"]

_MUCH = 2000  # replicas from which on loading compiled code pays


def entry_shares(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    entries: int,
    speed_G: FloatArray | None = None,
    *,
    extra_LG: FloatArray | None = None,
    idle: bool = True,
    backend: str = "auto",
) -> FloatArray:
    """Round shares to whole multiples of ``1 / entries`` so that the largest GPU time is least.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens.
    slots_LGC : array of int, shape [L, G, C]
        Placement, -1 where empty.
    share_LGC : array, shape [L, G, C]
        Shares to round; an expert's sum to 1. The counts stay as near as the largest time allows.
    entries : int
        Entries of an expert's table.
    speed_G : array, shape [G], optional
        Relative speeds; ones by default.
    extra_LG : array, shape [L, G], optional
        What a GPU's time has beside its tokens, in tokens; nothing by default.
    idle : bool
        Whether a replica whose share is 0 may get entries.
    backend : {"auto", "numpy", "numba"}
        Which twin counts; the shares are the same. "auto" is the compiled one where that costs little.

    Returns
    -------
    array, shape [L, G, C]
        The shares. A replica may be left without any.
    """
    layers, gpus, _ = slots_LGC.shape
    experts = load_LE.shape[1]
    speed_G = np.ones(gpus) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    where_R = np.nonzero(slots_LGC >= 0)
    key_R = where_R[0] * experts + slots_LGC[where_R]
    order_R = np.argsort(key_R, kind="stable")
    where_R = tuple(axis[order_R] for axis in where_R)
    key_R, exact_R = key_R[order_R], share_LGC[where_R] * entries
    count_R = round_tokens(exact_R, key_R, np.full(layers * experts, entries, dtype=np.int64))
    load_R = np.asarray(load_LE, dtype=np.float64).ravel()[key_R]
    free_R = load_R > 0
    if not idle:
        free_R &= share_LGC[where_R] > 0
    replicas_X = np.bincount(key_R[free_R], minlength=layers * experts)
    free_R &= replicas_X[key_R] > 1
    cell_R = where_R[0] * gpus + where_R[1]
    if free_R.any():
        fixed_R = np.where(free_R, 0.0, load_R * (count_R / entries))
        base_LG: FloatArray = _summed(cell_R, fixed_R, layers * gpus).reshape(layers, gpus)
        if extra_LG is not None:
            base_LG = base_LG + extra_LG
        count_R[free_R] = _counted(
            key_R[free_R],
            cell_R[free_R],
            load_R[free_R] / entries,
            exact_R[free_R],
            count_R[free_R],
            (base_LG, speed_G, entries),
            backend,
        )
    rounded_LGC = np.zeros(slots_LGC.shape)
    rounded_LGC[where_R] = count_R / entries
    return rounded_LGC


def _counted(
    key_P: IntArray,
    cell_P: IntArray,
    unit_P: FloatArray,
    exact_P: FloatArray,
    count_P: IntArray,
    layers: tuple[FloatArray, FloatArray, int],
    backend: str,
) -> IntArray:
    """Entries of the replicas that have a choice; `layers` are the other tokens [L, G], speeds, entries."""
    base_LG, speed_G, entries = layers
    cells, gpus = base_LG.size, base_LG.shape[1]
    first_X = np.flatnonzero(np.concatenate([[True], key_P[1:] != key_P[:-1]]))
    expert_P = np.repeat(np.arange(len(first_X)), np.diff(np.append(first_X, len(key_P))))
    nodes, edges, experts = cells + len(first_X), len(key_P), len(first_X)
    tables: list[Any] = [
        cell_P,
        expert_P,
        np.append(first_X, edges),
        np.concatenate([[0], np.cumsum(np.bincount(cell_P, minlength=cells))]),
        np.argsort(cell_P, kind="stable"),
        unit_P[first_X],
        exact_P,
        base_LG.ravel(),
        np.tile(speed_G, len(base_LG)),
        (base_LG / speed_G).max(1),
        count_P.copy(),
        *(np.zeros(size, dtype=np.int64) for size in (nodes, nodes, nodes, edges, edges, experts, experts)),
        *(np.zeros(gpus, dtype=np.int64) for _ in range(3)),
        np.zeros(gpus),
    ]
    twin = kernels(backend, edges)
    if twin is None:
        tables = [table.tolist() for table in tables]
    else:
        tables = [
            np.ascontiguousarray(t, dtype=np.float64 if t.dtype.kind == "f" else np.int64) for t in tables
        ]
    graph = EntryGraph(entries, gpus, *tables)
    (entry_search if twin is None else twin).lower_peaks(graph)
    return np.asarray(graph.count_P, dtype=np.int64)


def _summed(key_R: IntArray, value_R: FloatArray, size: int) -> FloatArray:
    return np.asarray(np.bincount(key_R, weights=value_R, minlength=size), dtype=np.float64)


def kernels(backend: str, work: int) -> Any:
    """The compiled twins for a backend, None for the plain ones; "auto" compiles where that costs little.

    `work` is in replicas whose entries are counted.
    """
    if backend not in ("auto", "numpy", "numba"):
        raise ProblemError("backend", f"is {backend!r}; it can be 'auto', 'numpy' or 'numba'")
    installed = importlib.util.find_spec("numba") is not None
    if backend == "numba" and not installed:
        raise SolverUnavailableError('the backend "numba" needs Numba: pip install "moeless-opt[fast]"')
    if backend == "auto" and not (
        installed and (_loaded() or (work > _MUCH and in_cache(entry_search.compiled_name(), Path(__file__))))
    ):
        return None
    return None if backend == "numpy" else _kernels()


def warm_entries() -> bool:
    """Load the compiled search (compiling it where that was never done); returns whether it could be."""
    if importlib.util.find_spec("numba") is None:
        return False
    slots_LGC = np.array([[[0], [0]]], dtype=np.int32)
    entry_shares(np.ones((1, 1)), slots_LGC, np.full((1, 2, 1), 0.5), 2, backend="numba")
    return True


def _loaded() -> bool:
    return "numba" in sys.modules and _kernels.cache_info().currsize > 0


@functools.cache
def _kernels() -> Any:
    from moeless_opt.solvers.shares import _entry_kernels

    return _entry_kernels
