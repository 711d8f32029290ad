"""Reading a folder of safetensors files tensor by tensor, straight into the memory where a tensor shall live.

A safetensors file is eight bytes of header length, a JSON header (name -> dtype, shape, byte range), and the
bytes. So a tensor, or one row of it, can be read by one `preadv` into the destination: nothing is mapped, and
no copy of a file or of a whole model is ever held. A sharded checkpoint has an index file that says which
file holds a tensor.

References
----------
The safetensors format: https://huggingface.co/docs/safetensors (section "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moeless_opt.problems.errors import FormatError

__all__ = ["SafetensorsFolder", "TensorInfo", "read_config"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: Headers of real checkpoints have at most a few MB; more is a damaged file, not a header.
_LARGEST_HEADER = 100_000_000
#: Linux reads at most 2 GiB at once.
_LARGEST_READ = 1 << 30


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, element type, shape and first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse and check one file's header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise FormatError(str(file), "not a safetensors file: its header would be longer than the file")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise FormatError(
                str(file), f"not a safetensors file: its header is not JSON ({error})"
            ) from error
    if not isinstance(header, dict):
        raise FormatError(str(file), "not a safetensors file: its header is no JSON object")
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        where = f"{file}: tensor {name!r}"
        try:
            dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, end = (int(x) for x in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(where, "its header entry needs dtype, shape and data_offsets") from error
        if not isinstance(dtype, str) or min(begin, *shape) < 0:
            raise FormatError(where, f"has dtype {dtype!r}, shape {list(shape)}, first byte {begin}")
        if dtype not in _DTYPES:
            raise FormatError(where, f"unknown dtype {dtype!r}; known are {', '.join(_DTYPES)}")
        info = TensorInfo(file, _DTYPES[dtype], shape, 8 + length + begin)
        if end - begin != info.nbytes:
            raise FormatError(
                where, f"{end - begin} bytes, but {dtype} of shape {list(shape)} has {info.nbytes}"
            )
        if 8 + length + end > size:
            raise FormatError(where, f"ends at byte {8 + length + end}, the file at {size}: it is truncated")
        infos[name] = info
    return infos


class SafetensorsFolder:
    """The tensors of a checkpoint folder, sharded or not.

    Parameters
    ----------
    folder : path
        With ``model.safetensors.index.json`` and the files that it names, or one ``model.safetensors``; or a
        single safetensors file.

    Raises
    ------
    FormatError
        No such folder, index or file, or a file that is not what it should be.

    Notes
    -----
    Headers are read when a file is first asked for. Use it as a context manager, or call `close`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._open: dict[Path, int] = {}
        self.bytes_read = 0
        if self.folder.is_file():
            self._files = dict.fromkeys(self._header(self.folder), self.folder)
            return
        if not self.folder.is_dir():
            raise FormatError(str(self.folder), "no such folder; expected a Hugging Face checkpoint folder")
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._files = self._read_index(index)
        elif single.is_file():
            self._files = dict.fromkeys(self._header(single), single)
        else:
            raise FormatError(
                str(self.folder), "has neither model.safetensors.index.json nor model.safetensors"
            )

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(str(index), "needs a JSON object with 'weight_map'") from error
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FormatError(str(index), "'weight_map' must be an object: tensor name to file name")
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not (self.folder / name).is_file():
                raise FormatError(str(index), f"names the file {name!r}, which is not in the folder")
        return {tensor: self.folder / name for tensor, name in weight_map.items()}

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        if file not in self._headers:
            self._headers[file] = _read_header(file)
        return self._headers[file]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def info(self, name: str) -> TensorInfo:
        """Say where `name` lies.

        Raises
        ------
        FormatError
            The checkpoint has no such tensor, or its index is wrong.
        """
        if name not in self._files:
            raise FormatError(str(self.folder), f"tensor {name!r} is missing")
        header = self._header(self._files[name])
        if name not in header:
            raise FormatError(
                str(self._files[name]), f"tensor {name!r} is missing, though the index says it is here"
            )
        return header[name]

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def read_into(
        self, name: str, out: torch.Tensor, *, index: int | None = None, rows: range | None = None
    ) -> None:
        """Read a tensor, or one entry along its first axis, into `out` without any copy between.

        Parameters
        ----------
        name : str
            Of the tensor.
        out : Tensor
            On the CPU, contiguous, with the type and number of elements of what is read.
        index : int, optional
            Read ``tensor[index]`` only.
        rows : range, optional
            Read ``tensor[rows.start : rows.stop]`` only.
        """
        info = self.info(name)
        begin, size = info.begin, info.nbytes
        if index is not None:
            size //= info.shape[0]
            begin += index * size
        elif rows is not None:
            row = size // info.shape[0]
            begin, size = begin + rows.start * row, len(rows) * row
        if (
            out.dtype != info.dtype
            or out.nbytes != size
            or not out.is_contiguous()
            or out.device.type != "cpu"
        ):
            raise ValueError(f"read_into: {name!r} wants {size} contiguous bytes of {info.dtype} on the CPU")
        if not size:
            return
        bytes_of_out: Any = out.detach().view(-1).view(torch.uint8).numpy()
        buffer = memoryview(bytes_of_out)
        descriptor, done = self._descriptor(info.file), 0
        while done < size:
            got = os.preadv(descriptor, [buffer[done : done + _LARGEST_READ]], begin + done)
            if got == 0:
                raise FormatError(str(info.file), f"ends inside tensor {name!r}: it was cut while being read")
            done += got
        self.bytes_read += size

    def read(self, name: str, *, index: int | None = None, rows: range | None = None) -> torch.Tensor:
        """Read a tensor, ``tensor[index]``, or some of its rows, in the type that it has on disk."""
        info = self.info(name)
        shape = info.shape if index is None else info.shape[1:]
        if rows is not None:
            shape = (len(rows), *info.shape[1:])
        out = torch.empty(shape, dtype=info.dtype)
        self.read_into(name, out, index=index, rows=rows)
        return out

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the folder's ``config.json``.

    Raises
    ------
    FormatError
        It is absent or no JSON object.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FormatError(str(file), "no such file; expected a Hugging Face checkpoint folder")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise FormatError(str(file), f"is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise FormatError(str(file), "must hold a JSON object")
    return config
