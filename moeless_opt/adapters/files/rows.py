"""Rows of experts as files hold them, each entry checked where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import IntArray, integers
from moeless_opt.problems.codec import kind_name
from moeless_opt.problems.errors import FormatError

__all__ = ["listed_map", "stored_map", "whole_row"]

_LARGEST = 2**31 - 1


def whole_row(value: object, where: str, *, slots: int | None = None) -> list[int]:
    """A list of experts; -1 is an empty slot.

    Raises
    ------
    FormatError
        Naming the slot.
    """
    if not isinstance(value, list):
        raise FormatError(where, f"must be a list of experts, got {kind_name(value)}")
    if slots is not None and len(value) != slots:
        raise FormatError(where, f"has {len(value)} slots, must have {slots}")
    if not value:
        raise FormatError(where, "is empty; it must list the expert of each slot")
    for slot, expert in enumerate(value):
        if type(expert) is not int or not -1 <= expert <= _LARGEST:
            raise FormatError(
                f"{where}, slot {slot}", f"is {str(expert)[:50]!r}, must be the number of an expert"
            )
    return value


def listed_map(value: object, where: str, layers: Sequence[int] | None = None) -> IntArray:
    """A map [L, S] from lists of lists; `layers` are the rows' names."""
    if not isinstance(value, list) or not value:
        raise FormatError(where, "must be a list of layers, each a list of experts")
    rows: list[list[int]] = []
    for number, row in enumerate(value):
        layer = number if layers is None else layers[number]
        rows.append(whole_row(row, f"{where}: layer {layer}", slots=len(rows[0]) if rows else None))
    return np.array(rows, dtype=np.int64)


def stored_map(array: NDArray[Any], where: str) -> tuple[IntArray, int | None]:
    """A map [L, S] from an array of it or of slots [L, G, C]; and the number of GPUs, where that is known."""
    if array.dtype.kind not in "iu":
        raise FormatError(where, f"holds {array.dtype}, a map holds whole numbers")
    found = integers(where, array, low=-1, high=_LARGEST)
    if found.ndim not in (2, 3) or 0 in found.shape:
        raise FormatError(
            where, f"has shape {found.shape}, must be [layers, slots] or [layers, GPUs, slots of a GPU]"
        )
    gpus = found.shape[1] if found.ndim == 3 else None
    return found.reshape(len(found), -1), gpus
