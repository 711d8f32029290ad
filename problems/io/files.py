"""Documents: parsed within limits, in the envelope that all have: a ``format`` and a ``version``."""

from __future__ import annotations

import io
import json
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.codec import Fields
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import check_archive, gunzipped, read_bytes, text_limit
from moeless_opt.problems.text import bytes_text

__all__ = [
    "VERSION",
    "check_header",
    "json_bytes",
    "parse_json",
    "read_arrays",
    "read_json",
    "schema",
]

VERSION = 1


def read_json(path: str | PathLike[str]) -> Any:
    """Parse a JSON file (a pipe, ``-``), refusing what is too large, not JSON, or holds NaN.

    Raises
    ------
    FormatError
        Naming the file and what would be right.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(raw: bytes, name: str) -> Any:
    """Parse the bytes of a JSON file, gzipped or not; errors name the file.

    Raises
    ------
    FormatError
        If it is too large, not JSON, or holds NaN or a key twice.
    """
    raw = gunzipped(raw, name)
    if len(raw) > text_limit():
        raise FormatError(
            name,
            f"is JSON of {bytes_text(len(raw))}; up to {bytes_text(text_limit())} are read: keep large "
            "arrays in an .npz, or raise MOELESS_MAX_READ to four times its size",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(name, "is not JSON: not even UTF-8 text") from None

    def refuse(token: str) -> NoReturn:
        raise FormatError(name, f"holds {token}, which is no JSON number; loads must be finite")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
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


def read_arrays(path: str | PathLike[str], raw: bytes | None = None) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz archive, within the limit; no Python objects.

    Parameters
    ----------
    path : path
        The file.
    raw : bytes, optional
        Its content, where that has been read already.

    Raises
    ------
    FormatError
        Naming the file, if it is no such archive.
    """
    name = str(path)
    raw = read_bytes(path) if raw is None else raw
    if not raw.startswith(b"PK"):
        raise FormatError(name, "is no .npz archive")
    check_archive(raw, name)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile and numpy raise a dozen kinds on damaged archives
        raise FormatError(name, f"is no .npz archive: {error}") from None
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise FormatError(name, f"is no .npz archive: {key!r} is no array")
    return arrays


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
