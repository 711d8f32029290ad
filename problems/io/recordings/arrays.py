"""Arrays inside recordings: looked at before they are loaded, and checked before they take memory."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.io.recordings.source import LARGEST_LOAD, Source, cut, kind_text, shape_text

__all__ = ["Array", "NpzArray", "Value", "npy_array", "plain_numbers"]


class Array:
    """An array inside a file: its shape costs little, its content is taken only when chosen."""

    def shape(self) -> tuple[int, ...]:
        """Return the shape, () for anything that is not an array of numbers."""
        raise NotImplementedError

    def get(self) -> NDArray[Any]:
        """Return the content."""
        raise NotImplementedError

    def strings(self) -> tuple[str, ...] | None:
        """Return the content where it is a list of strings."""
        raise NotImplementedError


class NpzArray(Array):
    """A member of an .npz archive."""

    def __init__(self, source: Source, archive: zipfile.ZipFile, key: str, member: str) -> None:
        self.source, self.archive, self.key, self.member = source, archive, key, member

    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        header: tuple[tuple[int, ...], np.dtype[Any]] = self._opened(
            lambda stream: _npy_header(stream, self.source)
        )
        return header

    def _opened(self, use: Callable[[Any], Any]) -> Any:
        try:
            with self.archive.open(self.member) as stream:
                return use(stream)
        except FormatError:
            raise
        except (
            zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError,
            struct.error,
            ValueError,  # of a seek before the beginning, where the first bytes are lost
        ) as error:  # fmt: skip
            raise self.source.error(f"{self.key} is truncated or damaged ({error})") from None

    def shape(self) -> tuple[int, ...]:
        """Return the shape, without reading the content."""
        shape, dtype = self._header()
        return shape if dtype.kind in "iufbO" else ()

    def get(self) -> NDArray[Any]:
        """Return the content, checked."""
        _check_header(self.source, self.key, self._header(), self.archive.getinfo(self.member).file_size)
        array: NDArray[Any] = self._opened(lambda stream: _read_npy(self.source, stream, self.key))
        return array

    def strings(self) -> tuple[str, ...] | None:
        """Return the content where it is a list of strings."""
        shape, dtype = self._header()
        if len(shape) != 1 or dtype.kind not in "US":
            return None
        return tuple(
            x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in self.get().tolist()
        )


class Value(Array):
    """A value of a JSON or PyTorch dictionary: nested lists, or a tensor."""

    def __init__(self, source: Source, key: str, value: object) -> None:
        self.source, self.key, self.value = source, key, value

    def shape(self) -> tuple[int, ...]:
        """Return the shape, without reading the content."""
        if not isinstance(self.value, list | tuple):
            return tuple(int(n) for n in getattr(self.value, "shape", ()))
        # The first entry of each level is enough to guess; `get` checks the rest.
        shape: list[int] = []
        level: Any = self.value
        while isinstance(level, list | tuple):
            shape.append(len(level))
            level = level[0] if level else None
        return () if isinstance(level, str | bytes | dict) else tuple(shape)

    def get(self) -> NDArray[Any]:
        """Return the content, checked."""
        if isinstance(self.value, list | tuple):
            return _from_nested(self.source, self.key, self.value)
        if type(self.value).__module__.split(".")[0] == "torch" and hasattr(self.value, "numel"):
            return self._from_tensor(self.value)
        raise self.source.error(
            f"{self.key} is {kind_text(self.value)}, must be an array [layers, experts] or "
            "[scenarios, layers, experts]"
        )

    def _from_tensor(self, tensor: Any) -> NDArray[Any]:
        shape = tuple(int(n) for n in tensor.shape)
        if math.prod(shape) * 8 > self.source.max_bytes:
            raise self.source.error(
                f"{self.key} has shape {shape_text(shape)}, more than {self.source.most}; raise "
                "MOELESS_MAX_READ to read it"
            )
        if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_complex():
            raise self.source.error(
                f"{self.key} is a sparse, quantized or complex tensor; save a dense real one"
            )
        plain = tensor.detach()
        try:
            array: NDArray[Any] = (plain.double() if plain.is_floating_point() else plain).cpu().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise self.source.error(f"{self.key} is no plain tensor ({cut(str(error))})") from None
        return array

    def strings(self) -> tuple[str, ...] | None:
        """Return the content where it is a list of strings."""
        value = self.value
        if isinstance(value, list | tuple) and value and all(isinstance(x, str) for x in value):
            return tuple(str(x) for x in value)
        return None


def npy_array(source: Source, raw: bytes) -> NDArray[Any]:
    """Read the bytes of one .npy file."""
    with io.BytesIO(raw) as stream:
        _check_header(source, "array", _npy_header(stream, source), len(raw))
        stream.seek(0)
        return _read_npy(source, stream, "array")


def _check_header(
    source: Source, what: str, header: tuple[tuple[int, ...], np.dtype[Any]], size: int | None
) -> None:
    """Refuse what is too large, truncated or made of Python objects, before memory is taken for it."""
    shape, dtype = header
    if dtype.hasobject:
        raise source.error(
            f"{what} holds Python objects, which could run code when loaded and are never read; save it "
            "as a plain number array (equal row lengths, float64 or int64)"
        )
    items = math.prod(shape)
    if items * max(dtype.itemsize, 8) > source.max_bytes:
        raise source.error(
            f"{what} has shape {shape_text(shape)}, more than {source.most}; raise "
            "MOELESS_MAX_READ to read it"
        )
    if size is not None and items * dtype.itemsize > size:
        raise source.error(
            f"{what} is truncated: shape {shape_text(shape)} of {dtype} needs {items * dtype.itemsize} "
            f"bytes, the file has {size}"
        )


def _read_npy(source: Source, stream: Any, what: str) -> NDArray[Any]:
    """Read an .npy stream from its start."""
    try:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile, struct.error) as error:
        raise source.error(f"{what} is truncated or damaged ({error})") from None
    return array


def _npy_header(stream: Any, source: Source) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise source.error(f"is an .npy file of version {version}; save plain numbers (version 1 or 2)")
    except FormatError:
        raise
    except (
        ValueError,
        EOFError,
        TypeError,
        KeyError,
        struct.error,
        SyntaxError,
        RecursionError,
        TokenError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise source.error(f"has a truncated or damaged .npy header ({cut(reason)})") from None
    if any(n < 0 for n in shape):
        raise source.error(f"has a damaged .npy header: shape {shape_text(shape)}")
    return shape, dtype


def _from_nested(source: Source, key: str, value: Sequence[Any]) -> NDArray[Any]:
    """Turn nested lists to an array; the first row of another length or kind is named."""
    if not value:
        raise source.error(f"{key} is empty, must be [layers, experts] or [scenarios, layers, experts]")
    rows, where = list(value), [f"{key}[{i}]" for i in range(len(value))]
    shape = [len(rows)]
    # Go down one level at a time while the entries are lists.
    while isinstance(rows[0], list | tuple):
        if len(shape) == 3:
            raise source.error(
                f"{key} is nested more than 3 deep, must be [layers, experts] or [scenarios, layers, experts]"
            )
        width = len(rows[0])
        for row, at in zip(rows, where, strict=True):
            if not isinstance(row, list | tuple):
                raise source.error(f"{at} is {kind_text(row)}, must be a list of {width} like the first row")
            if len(row) != width:
                raise source.error(
                    f"{at} has {len(row)} entries, the first row has {width}: rows must be equal"
                )
        shape.append(width)
        if width == 0:
            return np.zeros(shape)
        if not isinstance(rows[0][0], list | tuple):
            return _numbers(source, rows, where).reshape(shape)
        where = [f"{at}[{j}]" for at in where for j in range(width)]
        rows = [entry for row in rows for entry in row]
    return _numbers(source, [rows], [key]).reshape(shape)


def _numbers(source: Source, rows: list[Any], where: list[str]) -> NDArray[Any]:
    """Stack rows of plain numbers; strings, null, booleans and lists among them are named."""
    arrays = []
    for row, at in zip(rows, where, strict=True):
        kinds = set(map(type, row))
        if not kinds <= {int, float}:
            j = next(j for j, entry in enumerate(row) if type(entry) not in (int, float))
            raise source.error(f"{at}[{j}] is {kind_text(row[j])}, must be a number")
        try:
            arrays.append(np.array(row, dtype=np.float64))
        except OverflowError:
            raise source.error(f"{at} has too large a number, must be at most {LARGEST_LOAD:g}") from None
    return np.stack(arrays)


def plain_numbers(source: Source, what: str, array: NDArray[Any]) -> FloatArray:
    """Return an array as float64, or say why it is none."""
    if array.dtype.kind not in "iuf":
        raise source.error(f"{what} has type {array.dtype}, must be numbers")
    if array.size * 8 > source.max_bytes:
        raise source.error(f"{what} has shape {shape_text(array.shape)}, more than {source.most} as float64")
    return array.astype(np.float64)
