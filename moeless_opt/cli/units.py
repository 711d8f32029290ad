"""What people type: sizes with a unit, lists of GPUs, one value per GPU."""

from __future__ import annotations

import re

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError

__all__ = ["gpu_list", "per_gpu", "size"]

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str, option: str) -> int:
    """Bytes of ``40GB``, ``64G``, ``38GiB`` or ``38Gi``: without an i, units are powers of 1000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or (found[3] and not found[2]):
        raise ProblemError(option, f"is {text!r}, must be a size such as 40GB, 64G or 38GiB")
    unit = 1024 if found[3] else 1000
    return round(float(found[1]) * float(unit ** _POWERS[found[2]]))


def _span(text: str, gpus: int, option: str) -> range:
    """GPUs of ``3`` or ``8-15``."""
    found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
    if found is None:
        raise ProblemError(option, f"has {text!r}, must be GPUs such as 3,17 or 8-15")
    first = int(found[1])
    last = int(found[2] or first)
    if last < first:
        raise ProblemError(option, f"has {text.strip()}, must go from the smaller number to the larger")
    if last >= gpus:
        raise ProblemError(option, f"names GPU {last}, the last one is {gpus - 1}")
    return range(first, last + 1)


def gpu_list(text: str, gpus: int, option: str) -> IntArray:
    """GPUs of ``3,17`` or ``8-15``, ascending."""
    named = {gpu for part in text.split(",") for gpu in _span(part, gpus, option)}
    return np.array(sorted(named), dtype=np.int64)


def per_gpu(text: str, gpus: int, option: str, base: FloatArray | IntArray | None = None) -> FloatArray:
    """One value per GPU: ``9`` for all, ``9,9,8,8``, ``3=4`` or ``8-15=4`` for some; the rest as `base`."""
    parts = [part for part in text.split(",") if part.strip()]
    plain = [_number(part, option) for part in parts if "=" not in part]
    if len(plain) not in (0, 1, gpus):
        raise ProblemError(
            option, f"has {len(plain)} values, must be one for all, or one for each of the {gpus} GPUs"
        )
    if not parts or (not plain and base is None):
        raise ProblemError(option, f"is {text!r}, must say a value for all GPUs first, such as 9,3=4")
    values = np.array(plain if plain else base, dtype=np.float64)
    values = np.broadcast_to(values, (gpus,)).copy()
    for part in parts:
        if "=" in part:
            which, _, value = part.partition("=")
            span = _span(which, gpus, option)
            values[span.start : span.stop] = _number(value, option)
    return values


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ProblemError(option, f"has {text.strip()!r}, must be numbers such as 9 or 9,9,8,8") from None
