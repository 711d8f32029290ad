"""Array types, and the checks that every array of a problem passes once.

Axis letters, used as suffixes of names throughout the package: T load scenarios, L layers, E experts,
G GPUs, C slots of a GPU, N nodes. ``load_TLE`` is indexed ``[scenario, layer, expert]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from dataclasses import replace as _replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.errors import ProblemError

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "Record",
    "SingleArray",
    "SlotArray",
    "WordArray",
    "floats",
    "frozen",
    "integers",
    "number",
    "whole",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
SlotArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
WordArray = NDArray[np.uint64]
SingleArray = NDArray[np.float32]


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view of `array`; the caller's own array stays writable."""
    if not array.flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _numeric(where: str, value: ArrayLike) -> NDArray[Any]:
    given: Any = value
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise ProblemError(where, "has masked entries; say what they are (`.filled(...)`)")
    try:
        if hasattr(given, "detach"):  # a torch tensor: on a GPU, with gradients, of a type that NumPy lacks
            given = given.detach()
            given = (given.double() if given.is_floating_point() else given).cpu().numpy()
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError) as error:
        raise ProblemError(where, f"not an array of numbers ({error})") from None
    if array.dtype.kind == "V" and array.dtype.names is None and "float" in array.dtype.name:
        return array.astype(np.float64)  # bfloat16 and its like, as JAX has them
    if array.dtype.kind == "O":
        array = _unboxed(where, array)
    if array.dtype.kind not in "iufb":
        raise ProblemError(where, f"must hold numbers, got {array.dtype} ({type(value).__name__})")
    return array


def _unboxed(where: str, array: NDArray[Any]) -> NDArray[Any]:
    """Python's numbers in an array of objects as an array of numbers; anything else comes back as it is."""
    kinds = set(map(type, array.flat))
    if not array.size or not all(issubclass(kind, int | float | np.integer | np.floating) for kind in kinds):
        return array
    whole_numbers = all(issubclass(kind, int | np.integer) for kind in kinds)
    try:
        return array.astype(np.int64 if whole_numbers else np.float64)
    except OverflowError:
        raise ProblemError(where, "holds a number too large for 64 bits") from None


def _shown(value: object) -> str:
    """A value in a message: of a length to read, and no number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"an {type(value).__name__} of thousands of digits"
    return text if len(text) <= 200 else text[:197] + "..."


def floats(where: str, value: ArrayLike, *, low: float = 0.0, open_low: bool = False) -> FloatArray:
    """A read-only float64 array with every entry finite and at least (or above) `low`.

    Raises
    ------
    ProblemError
        Naming the first offending entry by its index.
    """
    with np.errstate(over="ignore"):  # what float64 cannot hold is infinite, and refused below
        array = _numeric(where, value).astype(np.float64, copy=True)
    # One reduction settles the usual case: NaN and infinity both fail it.
    if array.size:
        least, most = float(array.min()), float(array.max())
        if not (least > low if open_low else least >= low) or not most < np.inf:
            bad = ~np.isfinite(array) | (array <= low if open_low else array < low)
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            need = f"finite and {'above' if open_low else 'at least'} {low:g}"
            raise ProblemError(where + "".join(f"[{i}]" for i in at), f"is {array[at]}, must be {need}")
    array.flags.writeable = False
    return array


def integers(where: str, value: ArrayLike, *, low: int = 0, high: int | None = None) -> IntArray:
    """A read-only int64 array with every entry whole and within ``[low, high]``."""
    array = _numeric(where, value)
    kind = array.dtype.kind
    if kind == "b" or (kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all())):
        raise ProblemError(where, "must hold whole numbers")
    if kind != "i" and array.size and not -(2.0**63) <= float(array.min()) <= float(array.max()) < 2.0**63:
        raise ProblemError(where, "holds a number too large for 64 bits")
    result = array.astype(np.int64, copy=True)
    if result.size:
        bad = result < low
        if high is not None:
            bad |= result > high
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            need = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ProblemError(where + "".join(f"[{i}]" for i in at), f"is {result[at]}, must be {need}")
    result.flags.writeable = False
    return result


def number(where: str, value: object, *, low: float = 0.0, open_low: bool = False) -> float:
    """A single finite number of at least (or above) `low`, as a float."""
    good = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        result = float(value) if good else np.nan  # type: ignore[arg-type]
    except OverflowError:
        result = np.inf
    if not ((result > low if open_low else result >= low) and result < np.inf):
        need = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
        raise ProblemError(where, f"is {_shown(value)}, must be {need}")
    return result


def whole(where: str, value: object, *, low: int = 0, high: int = 2**62) -> int:
    """A single whole number from `low` to `high`, as an int."""
    good = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not good or not low <= value <= high or int(value) != value:  # type: ignore[operator, call-overload]
        need = f"of at least {low}" if high >= 2**62 else f"from {low} to {high}"
        raise ProblemError(where, f"is {_shown(value)}, must be a whole number {need}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and bool(np.array_equal(a, b))
    return bool(a == b)


def _rebuild(kind: type[Any], values: dict[str, Any]) -> Any:
    record = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(record, name, frozen(value) if isinstance(value, np.ndarray) else value)
    return record


class Record:
    """Base of the frozen dataclasses: equality that understands arrays, ``replace``, and pickling."""

    __slots__ = ()

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed, validated again."""
        known = {f.name for f in fields(self) if f.init}  # type: ignore[arg-type]
        for key in changes:
            if key not in known:
                raise ProblemError(key, f"{type(self).__name__} has no such field; it has {sorted(known)}")
        return _replace(self, **changes)  # type: ignore[type-var]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = (f.name for f in fields(self) if f.compare)  # type: ignore[arg-type]
        return all(_same(getattr(self, n), getattr(other, n)) for n in names)

    def __hash__(self) -> int:
        # Arrays count by their shape alone: cheap, and equal records hash equal.
        values = (getattr(self, f.name) for f in fields(self) if f.compare)  # type: ignore[arg-type]
        return hash((type(self), *(_key(v) for v in values)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy such that the arrays come out read-only again."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return _rebuild, (type(self), values)


def _key(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.shape
    return tuple(sorted(map(str, value))) if isinstance(value, Mapping) else value
