"""Documents as files: read within limits, written whole or not at all, in the envelope that all have.

A document names its ``format`` and ``version``. Files are written aside and renamed, so that a reader never
sees half of one.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from moeless_opt.problems.codec import Fields
from moeless_opt.problems.errors import FormatError, ProblemError

__all__ = [
    "MAX_BYTES",
    "MAX_UNPACKED",
    "VERSION",
    "atomic_write",
    "check_header",
    "check_unpacked",
    "json_bytes",
    "read_json",
    "schema",
]

VERSION = 1
MAX_BYTES = 256 * 2**20
"""Largest JSON document that is read; larger arrays belong into an .npz beside it."""
MAX_UNPACKED = 2**30
"""Largest .npz archive that is read, in bytes after decompression."""


def read_json(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON file, refusing what is too large, not JSON, or holds NaN.

    Raises
    ------
    FormatError
        Naming the file and what would be right.
    """
    name = os.fspath(path)
    try:
        size = os.stat(name).st_size
        if size > max_bytes:
            raise FormatError(
                name,
                f"is {size / 2**20:.0f} MiB; JSON is read up to {max_bytes / 2**20:.0f} MiB: "
                "keep large arrays in an .npz",
            )
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FormatError(name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(name, "is not JSON: not even UTF-8 text") from None

    def refuse(token: str) -> NoReturn:
        raise FormatError(name, f"holds {token}, which is no JSON number; loads must be finite")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise FormatError(name, f"has the key {twice!r} twice in one object; once is enough")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(
            name, f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise FormatError(name, "is nested too deeply to be one of ours") from None
    except ValueError as error:  # a number of thousands of digits
        raise FormatError(name, f"holds a number that cannot be read: {error}") from None


def atomic_write(path: str | PathLike[str], data: bytes) -> None:
    """Write a file aside and rename it, so that it is there whole or not at all."""
    target = Path(path)
    try:
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise FormatError(str(target), f"cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, target)
    except BaseException as error:
        Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FormatError(str(target), f"cannot be written: {error.strerror}") from None
        raise


def schema(name: str) -> dict[str, Any]:
    """The published JSON schema (draft 2020-12) of a ``problem``, ``plan`` or ``topology``.

    The schema of a problem refers to that of a topology by its ``$id``.

    Raises
    ------
    ProblemError
        If there is none of that name.
    """
    if name not in ("problem", "plan", "topology"):
        raise ProblemError("schema", f"{name!r} is unknown; there are problem, plan, topology")
    path = Path(__file__).parents[1] / "schema" / f"{name}.schema.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def check_header(entry: Fields, want: str) -> None:
    """Take format and version, and refuse what this release does not read."""
    found = entry.take("format", str)
    if found != want:
        raise FormatError(entry.path("format"), f"is {found!r}, must be {want!r}")
    version = entry.take("version", int)
    if version != VERSION:
        raise FormatError(entry.path("version"), f"is {version}, this release reads version {VERSION}")


def json_bytes(document: Any) -> bytes:
    """A document as it lies in a file."""
    return (json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n").encode()


def check_unpacked(file: Any, name: str) -> None:
    """Refuse an archive that unpacks to more than is sensible, before anything is unpacked."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_UNPACKED:
        raise FormatError(
            name, f"unpacks to {size / 2**20:.0f} MiB; up to {MAX_UNPACKED / 2**20:.0f} MiB are read"
        )
