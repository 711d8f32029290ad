"""Compiled twins of the kernels that take time: the same plans, bit for bit, several times sooner.

Numba is optional (the extra ``fast``) and is imported only when a twin is first asked for. The first call
in a fresh installation compiles each kernel, a few seconds in all; Numba keeps the machine code in
``__pycache__``, and later processes load it in a fraction of a second.

Same results means: the same additions in the same order, the same comparisons, ties to the same index.
Sorting is by a total order (value, then index), and nothing here may be reassociated: no ``fastmath``, no
``parallel``.
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError, SolverUnavailableError

__all__ = [
    "available",
    "choose_backend",
    "hand_out",
    "join_layers",
    "loaded",
    "pack_layers",
    "swap_rounds",
    "warm",
]


@functools.cache
def available() -> bool:
    """Whether Numba is installed (looked up, not imported)."""
    return importlib.util.find_spec("numba") is not None


def loaded() -> bool:
    """Whether the compiled kernels are already in this process, so that using them costs nothing more."""
    return _kernels.cache_info().currsize > 0


def warm() -> bool:
    """Load the kernels (compiling them where that was never done); returns whether they could be.

    A few seconds at the first call in an installation, a few tenths of a second in later processes.
    Afterwards the backend "auto" uses them.
    """
    if not available():
        return False
    weight, ones = np.ones((1, 2)), np.ones((1, 2), dtype=np.int64)
    slots = pack_layers(weight, ones, np.array([[0, 1]]), np.ones(2), 1)
    shape = slots.shape
    hand_out(weight, ones.copy(), ones, np.zeros(1, dtype=np.int64), 0.0)
    usable, one, goal = ones, np.ones(2), np.zeros(1)
    swap_rounds(slots, np.ones(shape), np.ones((1, 2)), usable, one, goal, goal, 2, (1, 1, 1, 1))
    row = np.zeros((1, 1), dtype=np.int64)
    one_each = np.ones((1, 1), dtype=np.int32)
    join_layers(row, np.ones((1, 1)), one_each, row + 1, np.ones(1), np.ones(1), head=0, wave=1, never=1e300)
    return True


def choose_backend(backend: str) -> str:
    """Which twin a backend's name stands for.

    Parameters
    ----------
    backend : {"auto", "numpy", "numba"}
        "auto" is Numba where its kernels are loaded, for they are then faster at no cost, and NumPy
        elsewhere: loading takes several times as long as planning a whole model in NumPy, and the plans are
        the same.

    Returns
    -------
    {"numpy", "numba"}

    Raises
    ------
    SolverUnavailableError
        If Numba is asked for and not installed.
    """
    if backend == "auto":
        return "numba" if loaded() else "numpy"
    if backend not in ("numpy", "numba"):
        raise ProblemError("backend", f"is {backend!r}; it can be 'auto', 'numpy' or 'numba'")
    if backend == "numba" and not available():
        raise SolverUnavailableError('the backend "numba" needs Numba: pip install "moeless-opt[fast]"')
    return backend


def hand_out(load_LE: FloatArray, replicas: IntArray, high: IntArray, left: IntArray, lean: float) -> None:
    """Twin of `counts._hand_out`; changes the replicas in place."""
    _kernels().hand_out(load_LE, replicas, np.ascontiguousarray(high), left, float(lean))


def pack_layers(
    piece_LE: FloatArray, replicas_LE: IntArray, by_piece_LE: IntArray, inverse_G: FloatArray, C: int
) -> SlotArray:
    """Twin of `packing._difference` and `_swap_apart`, on equal GPUs of C slots."""
    kernels = _kernels()
    slots = np.empty((len(piece_LE), len(inverse_G), C), dtype=np.int32)
    kernels.pack_layers(kernels.Pieces(piece_LE, replicas_LE, by_piece_LE, inverse_G), slots)
    return slots


def swap_rounds(
    slots: SlotArray,
    weight: FloatArray,
    time: FloatArray,
    usable: IntArray,
    inverse_G: FloatArray,
    goal: FloatArray,
    near: FloatArray,
    E: int,
    rounds: tuple[int, int, int, int],
) -> None:
    """Twin of the rounds of `swaps.improve`; changes slots, weight and time in place."""
    kernels = _kernels()
    held = np.zeros((len(inverse_G), E + 1), dtype=np.bool_)
    kernels.swap_rounds(kernels.Swaps(slots, weight, time, usable, inverse_G, goal, near, held, *rounds))


def join_layers(
    order_LE: IntArray,
    piece_LE: FloatArray,
    replicas_LE: NDArray[Any],
    capacity_LG: IntArray,
    speed_G: FloatArray,
    same_L: FloatArray,
    *,
    head: int,
    wave: int,
    never: float,
) -> tuple[SlotArray, BoolArray]:
    """Twin of the work of `join.connect`."""
    kernels = _kernels()
    slots = np.full((*capacity_LG.shape, int(capacity_LG.max(initial=1))), -1, dtype=np.int32)
    ok_L = np.ones(len(slots), dtype=bool)
    pace_G = 1.0 / speed_G
    links = kernels.Links(order_LE, piece_LE, replicas_LE, capacity_LG, pace_G, same_L, head, wave, never)
    kernels.connect_layers(links, slots, ok_L)
    return slots, ok_L


@functools.cache
def _kernels() -> Any:
    """Declare the kernels (Numba compiles each at its first call, or loads it from its cache)."""
    from moeless_opt.solvers.pack import _kernels as kernels
    from moeless_opt.solvers.pack import _link_kernels as links

    return SimpleNamespace(**vars(kernels) | vars(links))
