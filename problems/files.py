"""Files and streams: read within limits, written whole or not at all, and nothing destroyed that is no file.

One limit, ``MOELESS_MAX_READ`` (256 MB; a number of bytes, or one with a unit such as ``2GiB``), holds for
everything that a reader takes into memory: a file, what its compression unpacks to, the arrays in it. Text
takes many times its size when it is parsed and is read up to a quarter of it. The next byte of a pipe is
waited for ``MOELESS_READ_SECONDS`` (60).
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import select
import stat
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.text import bytes_text

__all__ = [
    "GZIP",
    "STDIN",
    "atomic_write",
    "check_archive",
    "check_output",
    "check_outputs",
    "format_of",
    "gunzipped",
    "named",
    "open_zip",
    "read_bytes",
    "read_limit",
    "read_text",
    "text_limit",
]

STDIN = "-"
"""The name of standard input where a file is to be read."""
GZIP = b"\x1f\x8b"
_MAX_READ = 256 * 10**6
_SECONDS = 60.0
_CHUNK = 2**20
_MEMBERS = 10_000
"""Most members of an archive: each costs half a kilobyte before anything of it is read."""


def read_limit() -> int:
    """Bytes that a reader takes into memory at most: ``MOELESS_MAX_READ``, or 256 MB.

    Raises
    ------
    ProblemError
        If the variable holds no size.
    """
    text = os.environ.get("MOELESS_MAX_READ", "").strip()
    if not text:
        return _MAX_READ
    found = re.fullmatch(r"(\d{1,18})\s*(?:([kmgt])(i?)b?|b)?", text.lower())
    if found is None:
        raise ProblemError("MOELESS_MAX_READ", f"is {text!r}, must be a size such as 2GiB")
    power = " kmgt".index(found[2] or " ")
    base = 1024 if found[3] else 1000
    return int(found[1]) * int(base**power)


def text_limit(limit: int | None = None) -> int:
    """Bytes of text that are parsed at most: a quarter of the limit."""
    return (read_limit() if limit is None else limit) // 4


def _patience() -> float:
    text = os.environ.get("MOELESS_READ_SECONDS", "").strip()
    try:
        seconds = float(text) if text else _SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ProblemError("MOELESS_READ_SECONDS", f"is {text!r}, must be a number of seconds above 0")
    return seconds


@contextmanager
def named(path: str | PathLike[str]) -> Iterator[None]:
    """Errors about the content of a file that is being read name the file."""
    try:
        yield
    except ProblemError as error:
        name = _name(path)
        if error.where.startswith(name):
            raise
        raise type(error)(f"{name}: {error.where}", error.what) from None


def _name(path: str | PathLike[str]) -> str:
    name: str | bytes = os.fspath(path)
    return os.fsdecode(name)


# --- reading -----------------------------------------------------------------------------------------------


def read_bytes(path: str | PathLike[str], *, limit: int | None = None) -> bytes:
    """The bytes of a file, of a pipe, or of standard input (``-``).

    Parameters
    ----------
    path : path
        What to read. Folders and devices are refused: a device may have no end.
    limit : int, optional
        Bytes that are read at most; by default `read_limit`.

    Raises
    ------
    FormatError
        Naming the file: if it cannot be read, is longer than the limit, or is a pipe on which nothing comes.
    """
    name, most = _name(path), read_limit() if limit is None else limit
    if not name:
        raise FormatError(repr(name), "is no path")
    try:
        if name == STDIN:
            return _read_stdin(most)
        _refuse_kind(name, os.stat(name).st_mode)
        handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            found = os.fstat(handle)
            _refuse_kind(name, found.st_mode)  # what stands there now
            if found.st_size > most:
                raise _too_long(name, found.st_size, most)
            return _read_all(name, handle, most, waits=not stat.S_ISREG(found.st_mode))
        finally:
            os.close(handle)
    except OSError as error:
        raise FormatError(name, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, ProblemError):
            raise
        raise FormatError(name, f"is no path: {error}") from None


def read_text(path: str | PathLike[str]) -> str:
    """The text of a file, gzipped or not, within the limit of what is parsed.

    Raises
    ------
    FormatError
        Naming the file.
    """
    name = _name(path)
    raw = gunzipped(read_bytes(path), name)
    if len(raw) > text_limit():
        raise FormatError(
            name,
            f"is text of {bytes_text(len(raw))}; text takes many times its size in memory and is read up to "
            f"{bytes_text(text_limit())}, a quarter of MOELESS_MAX_READ",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(name, "is no UTF-8 text") from None


def _refuse_kind(name: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise FormatError(name, "cannot be read: Is a directory")
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        return
    if stat.S_ISCHR(mode) and name.startswith(("/dev/stdin", "/dev/fd/", "/dev/tty")):
        return
    raise FormatError(name, "cannot be read: it is a device or a socket, must be a file or a pipe")


def _too_long(name: str, size: int, most: int) -> FormatError:
    return FormatError(
        name,
        f"has {bytes_text(size)}, more than the limit of {bytes_text(most)}; sum its steps, save arrays as "
        ".npz, or raise MOELESS_MAX_READ",
    )


def _read_all(name: str, handle: int, most: int, *, waits: bool) -> bytes:
    parts: list[bytes] = []
    left, patience = most, _patience()
    while True:
        if waits and not _ready(handle, select.POLLIN, patience):
            raise FormatError(
                name,
                f"is a pipe, and nothing came for {patience:g} s (MOELESS_READ_SECONDS: how long to wait)",
            )
        part = os.read(handle, min(_CHUNK, left + 1))
        if not part:
            return b"".join(parts)
        left -= len(part)
        if left < 0:
            raise _too_long(name, most + 1, most)
        parts.append(part)


def _read_stdin(most: int) -> bytes:
    if sys.stdin is None:
        raise FormatError(STDIN, "is standard input, which is closed")
    raw = sys.stdin.buffer.read(most + 1)
    if len(raw) > most:
        raise _too_long(STDIN, len(raw), most)
    return raw


def _ready(handle: int, event: int, seconds: float) -> bool:
    """Whether a stream can be read or written within that time."""
    poll = select.poll()
    poll.register(handle, event)
    return bool(poll.poll(seconds * 1e3))


def gunzipped(raw: bytes, name: str, *, limit: int | None = None) -> bytes:
    """The content of a gzip file, all members of it; bytes that are no gzip file come back as they are.

    Raises
    ------
    FormatError
        If it is damaged, gzipped twice, or unpacks to more than the limit.
    """
    if not raw.startswith(GZIP):
        return raw
    most = read_limit() if limit is None else limit
    parts: list[bytes] = []
    view, at, left, members = memoryview(raw), 0, most, 0
    while view[at : at + 2] == GZIP:
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        members += 1
        if members > _MEMBERS:
            raise FormatError(name, f"has more than {_MEMBERS} gzip members; pack it as one")
        while not inflater.eof:
            piece = view[at : at + 2**16]  # what is behind the member's end is copied, so not the whole rest
            if not piece:
                raise FormatError(name, "is a truncated gzip file: its end is missing")
            try:
                parts.append(inflater.decompress(piece, left + 1))
            except zlib.error as error:
                raise FormatError(name, f"is a damaged gzip file ({error})") from None
            at += len(piece) - len(inflater.unused_data)
            left -= len(parts[-1])
            if left < 0:
                raise FormatError(
                    name, f"unpacks to more than {bytes_text(most)}; raise MOELESS_MAX_READ to read it"
                )
    if raw[at:].strip(b"\0"):
        raise FormatError(name, "is a damaged gzip file: bytes follow its end")
    found = b"".join(parts)
    if found.startswith(GZIP):
        raise FormatError(name, "is gzipped twice; once is enough")
    return found


def open_zip(raw: bytes, name: str) -> zipfile.ZipFile:
    """The zip archive that bytes are.

    Raises
    ------
    FormatError
        Naming the file, if it is damaged or has too many members.
    """
    if raw.count(b"PK\x01\x02") > _MEMBERS:
        raise FormatError(name, f"is an archive of more than {_MEMBERS} members; up to {_MEMBERS} are read")
    try:
        return zipfile.ZipFile(io.BytesIO(raw))
    except Exception as error:  # zipfile raises half a dozen kinds on damaged archives
        raise FormatError(name, f"is a truncated or damaged zip archive ({error})") from None


def check_archive(raw: bytes, name: str, *, limit: int | None = None) -> None:
    """Refuse a zip archive (the bytes of one) that unpacks to more than the limit, before it is unpacked.

    Raises
    ------
    FormatError
        Naming the file; also if it is no archive at all.
    """
    most = read_limit() if limit is None else limit
    with open_zip(raw, name) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > most:
        raise FormatError(
            name, f"unpacks to {bytes_text(size)}; up to {bytes_text(most)} are read (MOELESS_MAX_READ)"
        )


# --- writing -----------------------------------------------------------------------------------------------


def format_of(path: str | PathLike[str], known: Sequence[str], *, default: str = "") -> str:
    """The format that a file name's suffix stands for, in any case; `default` where there is no suffix.

    What is there and is no regular file (``/dev/stdout``, a pipe) has no suffix.

    Raises
    ------
    FormatError
        If the suffix is none of `known`.
    """
    name = _name(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in known:
        return suffix
    if default and (not suffix or (os.path.exists(name) and not os.path.isfile(name))):
        return default
    *others, last = known
    raise FormatError(name, f"must end in {', '.join(others)}{' or ' if others else ''}{last}")


def check_output(path: str | PathLike[str]) -> None:
    """Refuse, before any work is done for it, a file that cannot be written.

    Raises
    ------
    FormatError
        Naming the file, and why.
    """
    name = _name(path)
    try:
        _destination(name)
    except OSError as error:
        raise FormatError(name, f"cannot be written: {error.strerror or error}") from None


def check_outputs(
    outputs: Mapping[str, str | PathLike[str] | None], inputs: Mapping[str, str | PathLike[str] | None]
) -> None:
    """Refuse, before any work, outputs that cannot be written, fall on each other, or on what is read.

    Parameters
    ----------
    outputs, inputs : mapping of str to path or None
        Files by the option that names them; None where it is not given.

    Raises
    ------
    FormatError, ProblemError
        Naming the file or the option.
    """
    read = {option: path for option, path in inputs.items() if path is not None}
    streams = [option for option, path in read.items() if _name(path) == STDIN]
    if len(streams) > 1:
        raise ProblemError(streams[1], f"is standard input, which {streams[0]} reads already")
    taken = {_identity(_name(path)): option for option, path in read.items()}
    for option, path in outputs.items():
        if path is None:
            continue
        check_output(path)
        name = _name(path)
        if os.path.exists(name) and not os.path.isfile(name):
            continue  # a device or a pipe takes any number
        mine = _identity(name)
        if mine in taken:
            other = taken[mine]
            what = "is read by" if other in read else "is written by"
            raise FormatError(name, f"{what} {other}; {option} needs another name")
        taken[mine] = option


def _identity(name: str) -> tuple[int, int] | str:
    """What a name stands for, so that two names of one file are the same."""
    try:
        found = os.fstat(0) if name == STDIN else os.stat(name)
    except (OSError, ValueError):
        return os.path.realpath(name) if "\0" not in name else name
    return found.st_dev, found.st_ino


def _destination(name: str) -> tuple[str, int | None, int | None]:
    """Where to write: a file to be replaced, or a stream; its open descriptor, the mode of what is there.

    Links are followed: what they point to is replaced, not they.
    """
    if not name or "\0" in name:
        raise FormatError(repr(name), "is no path")
    if name == STDIN:
        raise FormatError(name, "is no file name; /dev/stdout is standard output")
    try:
        found = os.stat(name)
    except FileNotFoundError:
        real = os.path.realpath(name)
        folder = os.path.dirname(real)
        if not os.path.isdir(folder):
            raise FormatError(name, "cannot be written: its folder does not exist") from None
        if name.endswith(os.sep):
            raise FormatError(name, "cannot be written: it names a folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FormatError(name, "cannot be written: its folder is read-only") from None
        return real, None, None
    if stat.S_ISDIR(found.st_mode):
        raise FormatError(name, "cannot be written: it is a folder")
    for handle in (1, 2):
        if _same_open(found, handle):
            return name, handle, None
    if stat.S_ISREG(found.st_mode):
        if _same_open(found, 0):
            raise FormatError(name, "is what standard input reads; give another name")
        real = os.path.realpath(name)
        if not os.access(real, os.W_OK):
            raise FormatError(name, "cannot be written: it is read-only")
        if not os.access(os.path.dirname(real), os.W_OK | os.X_OK):
            raise FormatError(name, "cannot be written: its folder is read-only")
        return real, None, stat.S_IMODE(found.st_mode)
    if not (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        raise FormatError(name, "cannot be written: it is a block device or a socket")
    return name, -1, None


def _same_open(found: os.stat_result, handle: int) -> bool:
    try:
        return os.path.samestat(found, os.fstat(handle))
    except OSError:
        return False


def atomic_write(path: str | PathLike[str], data: bytes) -> None:
    """Write a file aside and rename it, so that it is there whole or not at all.

    Only a regular file is replaced, with the permissions that it had; a link stays, and the file that it
    points to is replaced. Devices and pipes (``/dev/stdout``, ``/dev/null``) are written to.

    Raises
    ------
    FormatError
        Naming the file, and why it cannot be written; what was there is as it was.
    """
    name = _name(path)
    try:
        real, stream, mode = _destination(name)
        if stream is None:
            _replace(real, data, mode)
        else:
            _pour(name, stream, data)
    except OSError as error:
        raise FormatError(name, f"cannot be written: {error.strerror or error}") from None


def _replace(real: str, data: bytes, mode: int | None) -> None:
    aside = os.path.join(os.path.dirname(real), f".moeless-{secrets.token_hex(8)}")
    # What is new gets the permissions that any new file gets.
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, mode)
            file.write(data)
        os.replace(aside, real)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise


def _pour(name: str, stream: int, data: bytes) -> None:
    """Write to what is no file: an open stream of ours, else a device or pipe that is opened for it."""
    if stream >= 0:
        for text in (sys.stdout, sys.stderr):
            if text is not None:
                text.flush()
        handle = os.dup(stream)
    else:
        handle = _open_stream(name)
    try:
        view = memoryview(data)
        while view:
            if not _ready(handle, select.POLLOUT, _patience()):
                raise FormatError(name, "cannot be written: it is a pipe, and nobody reads it")
            view = view[os.write(handle, view[:_CHUNK]) :]
    finally:
        os.close(handle)


def _open_stream(name: str) -> int:
    end = time.monotonic() + _patience()
    while True:
        try:
            return os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:  # a pipe that nobody reads yet
                raise
        time.sleep(0.02)
