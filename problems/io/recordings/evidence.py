"""What an array of whole numbers is: loads, or the experts that tokens chose; told by evidence, not guessed.

Axis letters besides the usual ones: P tokens, K choices of a token.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray
from moeless_opt.problems.io.recordings.source import LARGEST_LOAD

__all__ = [
    "Choices",
    "Reading",
    "choices_of",
    "either_way",
    "map_like",
    "reading_of",
    "repeats",
    "whole_numbers",
]

_MOST_CHOICES = 64  # no router chooses more experts for a token
_MOST_EXPERTS = 2**14  # no model has more in a layer
_MOST_LAYERS = 160
_CHANCE = math.log(1e-6)  # what is less probable than this is no chance
_LIKELY = math.log(1e-2)  # the same where there would be more layers than experts


class Reading(NamedTuple):
    """What an array is, and what says so."""

    what: Literal["counts", "trace", "either", "transposed", "swapped"]
    why: str


def whole_numbers(array: NDArray[Any]) -> bool:
    """Whether all entries are whole numbers, of whatever type."""
    if array.dtype.kind in "iu":
        return True
    if array.dtype.kind != "f":
        return False
    with np.errstate(invalid="ignore"):
        return bool((array % 1 == 0).all())


def reading_of(array: NDArray[Any]) -> Reading:
    """What an array of two or three axes is, by its values alone.

    A trace is [tokens, layers, top-k]: no token chooses an expert twice, so a row never repeats a value, save
    where it is padding. Loads are [.., layers, experts]: within a step all layers see the same tokens, so
    their sums are equal. What neither shows by more than chance is ``"either"``.
    """
    if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or not array.any():
        return Reading("counts", "no numbers in two or three axes")
    with np.errstate(invalid="ignore"):
        if not -1 <= float(array.min()) <= float(array.max()) <= LARGEST_LOAD:  # is refused later
            return Reading("counts", "values out of range")
    whole = whole_numbers(array)
    found = _of_choices(array) if whole and array.ndim == 3 else None
    if found is not None and found.what != "either":
        return found
    axes = tuple(range(array.ndim))
    if found is None and _equal_sums(array, axes):
        return Reading("counts", "all layers of a step have one sum")
    for order in permutations(axes):
        turned = array.shape[order[-1]] > array.shape[order[-2]] and array.shape[-1] < array.shape[-2]
        if order[-2:] != axes[-2:] and _equal_sums(array, order, _LIKELY if turned else _CHANCE):
            names = ("steps", "layers", "experts")[-array.ndim :]
            told = ", ".join(names[order.index(axis)] for axis in axes)
            what: Literal["transposed", "swapped"] = "swapped" if order[-1] == axes[-1] else "transposed"
            return Reading(what, f"sums are equal as those of layers are if the axes are [{told}]")
    if found is not None:
        return found
    if array.shape[-1] == 1 < array.shape[-2]:
        return Reading("transposed", "no router chooses among one expert")
    if _MOST_LAYERS < array.shape[-2] > array.shape[-1]:
        return Reading("transposed", f"no model has {array.shape[-2]} layers")
    if whole and array.min() >= -1 and _recurs(array):
        return Reading("either", f"every number from 0 to {array.max():.0f} recurs, as those of experts do")
    return Reading("counts", "values that no choices of experts are")


def _of_choices(array: NDArray[Any]) -> Reading | None:
    """What whole numbers in three axes are by their rows being choices; None if they are none."""
    width = array.shape[-1]
    rows = array.reshape(-1, width)
    rows = rows[(rows != rows[:, :1]).any(1)] if width > 1 else rows
    if not len(rows):
        return Reading("counts", "every row holds one value")
    if rows.max() >= _MOST_EXPERTS:
        return None
    if width > _MOST_CHOICES or rows.min() < -1 or (width > 1 and repeats(rows).any()):
        return None
    if array.min() < 0:
        return Reading("trace", "rows never repeat a value, and -1 stands for none")
    equal = _equal_sums(array, (0, 1, 2))
    if equal and array.max() >= width:
        return None
    if width > 1 and not equal and _log_chance(rows) < _CHANCE:
        return Reading("trace", f"none of {len(rows)} rows repeats a value")
    return Reading("either", "rows never repeat a value, which may be chance")


def _recurs(array: NDArray[Any]) -> bool:
    """Whether all numbers from 0 to the highest occur, four times on average, as in any trace."""
    high = float(array.max())
    return array.size >= 4 * (high + 1) and len(np.unique(array[array >= 0])) == high + 1


def repeats(rows: NDArray[Any]) -> BoolArray:
    """Whether each row holds a value of at least 0 twice."""
    ordered = np.sort(rows, axis=1)
    return np.asarray(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))


def _log_chance(rows: NDArray[Any]) -> float:
    """Log of the probability that no row repeats a value, were its entries drawn from all there are."""
    share = np.unique(rows, return_counts=True)[1] / rows.size
    pairs = len(rows) * rows.shape[1] * (rows.shape[1] - 1) / 2
    return float(pairs) * math.log1p(-min(float((share**2).sum()), 1 - 1e-12))


def _equal_sums(array: NDArray[Any], order: tuple[int, ...], chance: float = _CHANCE) -> bool:
    """Whether the busy layers of every step have one sum, by more than chance, in that order of axes."""
    load_TLE = array.transpose(order).astype(np.float64)
    load_TLE = load_TLE if load_TLE.ndim == 3 else load_TLE[None]
    sums_TL = load_TLE.sum(2)
    same = 0
    for sums_L, load_LE in zip(sums_TL, load_TLE, strict=True):
        found, rows = sums_L[sums_L != 0], load_LE[sums_L != 0]
        if not np.allclose(found, found[:1], rtol=1e-9, atol=0):
            return False
        same += int((rows != rows[:1]).any(1).sum())  # rows that are the same have one sum anyway
    spread = float(load_TLE[sums_TL != 0].std()) * math.sqrt(load_TLE.shape[2]) if sums_TL.any() else 0.0
    return -same * math.log1p(3.5 * spread) < chance


def map_like(array: NDArray[Any], slots: int) -> bool:
    """Whether an array may be a map [.., slots]: every row names all experts of 0 to its highest."""
    if array.ndim not in (1, 2) or array.shape[-1] != slots or not whole_numbers(array):
        return False
    rows = array.reshape(-1, slots)
    high = rows.max(1)
    if not ((high >= 1) & (high < slots) & (rows >= -1).all(1)).all():
        return False
    return all(len(np.unique(row[row >= 0])) == top + 1 for row, top in zip(rows, high, strict=True))


class Choices(NamedTuple):
    """A trace without its padding."""

    valid_PL: BoolArray
    """Rows that are choices, shape [tokens, layers]."""
    wrong: tuple[int, int] | None
    """A token and a layer whose row is neither choices nor padding."""
    notes: tuple[str, ...]


def either_way(chosen_PLK: NDArray[Any]) -> bool:
    """Whether the layers of a trace could as well be the choices, and the choices the layers."""
    _, layers, width = chosen_PLK.shape
    if width == 1 or layers == 1:
        return False
    some = chosen_PLK[:1000]  # more can only tell the same more surely
    rows = some.reshape(-1, width)
    columns = some.transpose(0, 2, 1).reshape(-1, layers)
    rows, columns = (found[(found != found[:, :1]).any(1)] for found in (rows, columns))
    return not repeats(columns).any() and len(rows) > 0 and _log_chance(rows) >= _CHANCE


def choices_of(chosen_PLK: NDArray[Any]) -> Choices:
    """Which rows of a trace are choices; a layer, or a token, whose rows all hold one value is padding."""
    tokens, layers, width = chosen_PLK.shape
    first_PL1 = chosen_PLK[:, :, :1]
    notes = []
    if width == 1:
        high_L = chosen_PLK.max((0, 2))
        busy_L = ((chosen_PLK[:, :, 0] != high_L) & (chosen_PLK[:, :, 0] >= 0)).any(0)
        dense_L = ~busy_L & busy_L.any()
        valid_PL = np.broadcast_to(~dense_L, (tokens, layers))
    else:
        same_PL = (chosen_PLK == first_PL1).all(2)
        dense_L = same_PL.all(0)
        padded_P = same_PL.all(1)
        valid_PL = ~(dense_L[None] | padded_P[:, None])
        if padded_P.any() and not padded_P.all():
            notes.append(f"{int(padded_P.sum())} of {tokens} tokens are padding (one value throughout)")
    if dense_L.any():
        notes.append(
            "layers whose tokens all hold one value (dense) are no choices: "
            + ", ".join(map(str, np.flatnonzero(dense_L)))
        )
    wrong = None
    if width > 1:
        flat = chosen_PLK.reshape(-1, width)
        twice = repeats(flat).reshape(tokens, layers) & valid_PL
        if twice.any():
            at = np.argwhere(twice)[0]
            wrong = (int(at[0]), int(at[1]))
    return Choices(np.asarray(valid_PL), wrong, tuple(notes))
