"""Reading within limits, and writing that destroys nothing."""

from __future__ import annotations

import gzip
import io
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from moeless_opt.problems.errors import FormatError, MoelessError, ProblemError
from moeless_opt.problems.files import (
    atomic_write,
    check_archive,
    check_output,
    check_outputs,
    format_of,
    gunzipped,
    named,
    read_bytes,
    read_limit,
    text_limit,
)
from moeless_opt.problems.text import bytes_text, printable

# --- limits ------------------------------------------------------------------------------------------------


def test_sizes_never_read_as_nothing() -> None:
    assert [bytes_text(x) for x in (0, 1, 999, 999.6, 1536, 256e6, 3e9, 1e15)] == [
        "0 B", "1 B", "999 B", "1 kB", "1.54 kB", "256 MB", "3 GB", "1000 TB",
    ]  # fmt: skip


def test_the_limit_is_a_setting(monkeypatch: Any) -> None:
    assert read_limit() == 256 * 10**6
    for text, value in (("1000", 1000), ("2GiB", 2 * 2**30), ("3 g", 3 * 10**9), ("64k", 64000), ("9B", 9)):
        monkeypatch.setenv("MOELESS_MAX_READ", text)
        assert read_limit() == value
        assert text_limit() == value // 4
    for text in ("much", "-1", "1.5G", "1e9", "9" * 30):
        monkeypatch.setenv("MOELESS_MAX_READ", text)
        with pytest.raises(ProblemError, match=r"MOELESS_MAX_READ: is .*, must be a size such as 2GiB"):
            read_limit()


def test_what_is_longer_than_the_limit(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 2000)
    assert len(read_bytes(path, limit=2000)) == 2000
    monkeypatch.setenv("MOELESS_MAX_READ", "1999")
    with pytest.raises(FormatError, match=r"a: has 2 kB, more than the limit of 2 kB; sum its steps"):
        read_bytes(path)
    with pytest.raises(FormatError, match=r"unpacks to more than 2 kB"):
        gunzipped(gzip.compress(b"x" * 1000) * 2, "a")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{i}.npy", b"\0" * 500)
    with pytest.raises(FormatError, match=r"a: unpacks to 2 kB; up to 2 kB are read"):
        check_archive(bomb.getvalue(), "a")
    check_archive(bomb.getvalue(), "a", limit=2000)


def test_many_members_cost_nothing() -> None:
    """Each of millions of empty members would take half a kilobyte, and gzip members a copy of the rest."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i in range(10_001):
            archive.writestr(str(i), b"")
    with pytest.raises(FormatError, match="more than 10000 members"):
        check_archive(packed.getvalue(), "a")
    one = gzip.compress(b"", mtime=0)
    assert gunzipped(one * 9_999 + gzip.compress(b"end"), "a") == b"end"
    with pytest.raises(FormatError, match="more than 10000 gzip members"):
        gunzipped(one * 10_001, "a")


# --- what can be read --------------------------------------------------------------------------------------


def test_devices_and_their_kind_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        for path in ("/dev/zero", "/dev/null", "/dev/full", tmp_path / "socket"):
            with pytest.raises(FormatError, match=f"^{path}: cannot be read: it is a device or a socket"):
                read_bytes(path)
    os.symlink("loop", tmp_path / "loop")
    os.symlink("/dev/zero", tmp_path / "zero")
    for name, reason in (
        ("loop", "Too many levels"),
        ("zero", "it is a device"),
        (".", "Is a directory"),
        ("absent", "No such file"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(FormatError, match=f"cannot be read: {reason}"):
            read_bytes(tmp_path / name)
    with pytest.raises(FormatError, match=r"a\\x00b: is no path: embedded null"):
        read_bytes("a\0b")


def test_a_pipe_on_which_nothing_comes(tmp_path: Path, monkeypatch: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("MOELESS_READ_SECONDS", "0.2")
    with pytest.raises(FormatError, match=r"pipe: is a pipe, and nothing came for 0.2 s"):
        read_bytes(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDWR)  # a writer that stops in the middle
    os.write(handle, b"half")
    try:
        with pytest.raises(FormatError, match=r"nothing came for 0.2 s"):
            read_bytes(tmp_path / "pipe")
    finally:
        os.close(handle)
    for text in ("soon", "0", "nan", "inf"):
        monkeypatch.setenv("MOELESS_READ_SECONDS", text)
        with pytest.raises(ProblemError, match="MOELESS_READ_SECONDS: is"):
            read_bytes(tmp_path / "pipe")


def test_a_slow_writer_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with open(tmp_path / "pipe", "wb", buffering=0) as file:
            for part in (b"on", b"e ", b"by one"):
                time.sleep(0.05)
                file.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_bytes(tmp_path / "pipe") == b"one by one"
    writer.join(10)


class _Stdin:
    def __init__(self, raw: bytes) -> None:
        self.buffer = io.BytesIO(raw)


def test_standard_input(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", _Stdin(b"hello"))
    assert read_bytes("-") == b"hello"
    monkeypatch.setattr(sys, "stdin", _Stdin(b"hello"))
    with pytest.raises(FormatError, match="-: has 5 B, more than the limit of 4 B"):
        read_bytes("-", limit=4)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FormatError, match="-: is standard input, which is closed"):
        read_bytes("-")


# --- what can be written -----------------------------------------------------------------------------------


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    atomic_write(path, b"one")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    long = tmp_path / ("x" * 250 + ".json")  # as long as a name may be
    atomic_write(long, b"three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", long.name]


@pytest.mark.parametrize("broken", ["replace", "fchmod", "write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: Any, broken: str, error: BaseException
) -> None:
    path = tmp_path / "out.json"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if broken == "write":
        real = open

        def opened(handle: Any, mode: str) -> Any:
            file = real(handle, mode, buffering=0)
            return _Failing(file, error)

        monkeypatch.setattr("moeless_opt.problems.files.open", opened, raising=False)
    else:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises(FormatError if isinstance(error, OSError) else KeyboardInterrupt):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


class _Failing:
    def __init__(self, file: Any, error: BaseException) -> None:
        self.file, self.error = file, error

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:1])
        raise self.error


def test_links_stay_and_their_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_bytes(b"old")
    for name, target in (("link", "there/a"), ("dangling", "there/b"), ("loop", "loop"), ("to", "link")):
        os.symlink(target, tmp_path / name)
    atomic_write(tmp_path / "to", b"new")
    assert (tmp_path / "to").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a").read_bytes() == b"new"
    atomic_write(tmp_path / "dangling", b"made")
    assert (tmp_path / "there" / "b").read_bytes() == b"made"
    with pytest.raises(FormatError, match="loop: cannot be written: Too many levels"):
        check_output(tmp_path / "loop")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["a", "b"]


def test_devices_and_pipes_are_written_to_and_stay(tmp_path: Path, monkeypatch: Any) -> None:
    before = os.stat("/dev/null")
    atomic_write("/dev/null", b"x" * 3_000_000)
    os.symlink("/dev/null", tmp_path / "null")
    atomic_write(tmp_path / "null", b"x")
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)
    with pytest.raises(FormatError, match="/dev/full: cannot be written: No space left"):
        atomic_write("/dev/full", b"x")
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    atomic_write(tmp_path / "pipe", b"x" * 300_000)
    reader.join(10)
    assert len(got[0]) == 300_000
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    monkeypatch.setenv("MOELESS_READ_SECONDS", "0.1")
    with pytest.raises(FormatError, match="pipe: cannot be written: No such device"):  # nobody reads
        atomic_write(tmp_path / "pipe", b"x")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        with pytest.raises(FormatError, match="it is a block device or a socket"):
            check_output(tmp_path / "socket")


def test_standard_output_as_a_file(tmp_path: Path) -> None:
    """Whatever it is: what was printed before and comes after stays, in order."""
    code = (
        "from moeless_opt.problems.files import atomic_write; print('a'); "
        "atomic_write('/dev/stdout', b'b\\n'); print('c')"
    )
    path = tmp_path / "out"
    with path.open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert path.read_bytes() == piped == b"a\nb\nc\n"
    assert os.listdir(tmp_path) == ["out"]


def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("folder", "it is a folder"),
        ("absent/a", "its folder does not exist"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(FormatError, match=f"cannot be written: {reason}"):
            check_output(tmp_path / name)
    for name in ("", "a\0b"):
        with pytest.raises(FormatError, match="is no path"):
            check_output(name)
    with pytest.raises(FormatError, match="it names a folder"):
        check_output(f"{tmp_path}/new/")
    with pytest.raises(FormatError, match="-: is no file name; /dev/stdout is standard output"):
        check_output("-")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FormatError, match="Not a directory"):
        check_output(tmp_path / "file" / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_read_only_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(FormatError, match="file: cannot be written: it is read-only"):
        atomic_write(tmp_path / "file", b"new")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(FormatError, match="new: cannot be written: its folder is read-only"):
            check_output(tmp_path / "new")
    finally:
        tmp_path.chmod(0o755)


def test_outputs_that_fall_on_each_other_or_on_inputs(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"{}")
    os.symlink("a.json", tmp_path / "link.json")
    os.link(path, tmp_path / "hard.json")
    for name in ("a.json", "link.json", "hard.json"):
        with pytest.raises(FormatError, match=f"{name}: is read by problem; -o needs another name"):
            check_outputs({"-o": tmp_path / name, "--plot": None}, {"problem": path, "--current": None})
    for one, two in (("new", "new"), ("new", "./new"), ("a.json", "link.json")):
        with pytest.raises(FormatError, match="is written by -o; --plot needs another name"):
            check_outputs({"-o": tmp_path / one, "--plot": f"{tmp_path}/{two}"}, {"problem": "absent"})
    check_outputs({"-o": "/dev/null", "--plot": "/dev/null"}, {"problem": "/dev/null"})
    with pytest.raises(ProblemError, match="--current: is standard input, which problem reads already"):
        check_outputs({}, {"problem": "-", "--current": "-"})


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    known = (".json", ".npz")
    assert [format_of(x, known) for x in ("a.json", "a.JSON", "a.b.Npz")] == [".json", ".json", ".npz"]
    assert format_of("plan", known, default=".json") == ".json"
    os.mkfifo(tmp_path / "a.pipe")
    assert format_of(tmp_path / "a.pipe", known, default=".json") == ".json"
    for name in ("a.txt", "a.json.gz", "a.npy", "a.json~"):
        with pytest.raises(FormatError, match=r"must end in \.json or \.npz"):
            format_of(name, known, default=".json")
    with pytest.raises(FormatError, match=r"a: must end in \.lp$"):
        format_of("a", (".lp",))


# --- words -------------------------------------------------------------------------------------------------


def test_errors_name_the_file_once() -> None:
    with pytest.raises(ProblemError, match=r"^p\.json: loads: is bad$"), named("p.json"):
        raise ProblemError("loads", "is bad")
    with pytest.raises(FormatError, match=r"^p\.json: is bad$"), named("p.json"):
        raise FormatError("p.json", "is bad")


def test_nothing_in_a_name_commands_the_terminal() -> None:
    name = "\x1b[31mred\x07\r\x9b2J\u202eabc\ud800\nend"
    text = printable(name)
    assert text == "\\x1b[31mred\\x07\\r\\x9b2J\\u202eabc\\ud800\\nend"
    assert printable("größe 模型 plain") == "größe 模型 plain"
    for error in (ProblemError(name, name), MoelessError(name)):
        assert str(error).isprintable()
    assert len(str(ProblemError("x" * 10**7, "is bad"))) < 2100
    assert str(ProblemError("x" * 10**7, "is bad")).endswith("is bad")
