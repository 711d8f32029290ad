"""The commands as processes: pipes, full devices, strange names; an exit code and one line for what comes."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.problems.io.documents import save_problem
from moeless_opt.runtime.simulate.cli import main as simulate
from moeless_opt.terminal import guarded

LOAD = [[60.0, 56.0, 12.0, 12.0, 2.0, 1.0, 1.0, 1.0], [5.0, 1.0, 9.0, 4.0, 3.0, 3.0, 8.0, 7.0]]
ANSI = "\x1b[31mred\x1b[0m\x07\x9b line1\nline2 \u202e \ud800"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder to work in, with a problem and a recording."""
    monkeypatch.chdir(tmp_path)
    save_problem(
        mo.Problem(loads=mo.Loads(load_TLE=LOAD), topology=mo.uniform(1, 4, slots=3), name="small"),
        "problem.json",
    )
    np.save("loads.npy", LOAD)
    return tmp_path


def run(*argv: str, command: str = "moeless_opt.cli", **options: Any) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(mo.__file__).parents[1])} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", command, *argv],
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
        env=env,
        **{"stdout": subprocess.PIPE, **options},
    )


# --- what is read ------------------------------------------------------------------------------------------


def test_what_comes_by_a_pipe_or_standard_input(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    assert main(["problem.json", "-o", "plan.npz", "--quiet"]) == 0
    want = mo.load_plan("plan.npz")
    for name, options in (("problem.json", []), ("loads.npy", ["--gpus", "4", "--slots", "3"])):
        raw = Path(name).read_bytes()
        given(monkeypatch, raw)
        assert main(["-", *options, "-o", "stdin.json", "--quiet"]) == 0
        read, write = os.pipe()
        os.write(write, raw)
        os.close(write)
        assert main([f"/dev/fd/{read}", *options, "-o", "pipe.json", "--quiet"]) == 0
        os.close(read)
        for got in ("stdin.json", "pipe.json"):
            assert (mo.load_plan(got).slots_LGC == want.slots_LGC).all()
    plan = Path("plan.npz").read_bytes()
    given(monkeypatch, plan)
    assert main(["problem.json", "--check", "-"]) == 0
    assert capsys.readouterr().out.startswith("valid")
    given(monkeypatch, plan)
    assert main(["problem.json", "--current", "-", "-o", "next.json", "--quiet"]) == 0
    assert mo.load_plan("next.json").moves.count == 0
    assert main(["-", "--current", "-"]) == 2
    assert "--current: is standard input, which problem reads already" in capsys.readouterr().err


def given(monkeypatch: Any, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_a_path_that_is_none(folder: Path, capsys: Any) -> None:
    os.symlink("loop.json", "loop.json")
    for name in ("loop.json", "/dev/zero", "a\0b", "x" * 5000, ""):
        assert main([name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert main(["problem.json", "-o", name]) == (0 if name == "/dev/zero" else 2)
        capsys.readouterr()
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)


# --- what is written ---------------------------------------------------------------------------------------


def test_outputs_are_refused_before_any_work(folder: Path, capsys: Any) -> None:
    save_problem(mo.load_instance("deepseek-v3-lognormal"), "big.json")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for argv, message in (
        (["-o", "big.json"], "big.json: is read by problem; --output needs another name"),
        (["-o", "plan.txt"], "plan.txt: must end in .json or .npz"),
        (["--plot", "plan.gif"], "plan.gif: must end in .png, .svg or .pdf"),
        (["--export", "layer.txt"], "layer.txt: must end in .lp or .mps"),
        (["-o", "a.json", "--plot", "./a.json"], "./a.json: is written by --output; --plot needs"),
        (["-o", "-"], "-: is no file name; /dev/stdout is standard output"),
    ):
        assert main(["big.json", *argv]) == 2
        assert capsys.readouterr().err.startswith(f"moeless-solve: {message}")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("name", "start"), [("a.PNG", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.Pdf", b"%PDF")])
def test_pictures_are_what_their_names_say(folder: Path, name: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(Path("problem.json").read_text()) | {"name": "$\\frac{ 模型 \x1b[31m"}
    Path("named.json").write_text(json.dumps(data))
    assert main(["named.json", "--plot", name, "--quiet"]) == 0
    assert Path(name).read_bytes().startswith(start)


def test_a_plan_on_standard_output(folder: Path) -> None:
    done = run("-", "-o", "/dev/stdout", "--quiet", input=Path("problem.json").read_bytes())
    assert json.loads(done.stdout)["format"] == "moeless-plan"
    assert done.stderr == b""
    assert main(["problem.json", "-o", "/dev/null", "--quiet"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("argv", [["problem.json"], ["--help"]])
def test_a_full_device_is_one_line(folder: Path, argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*argv, stdout=full)
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last == "moeless-solve: standard output: cannot be written: No space left on device"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("--list-solvers", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_other_command_keeps_the_same_rules(folder: Path, capsys: Any) -> None:
    for argv, message in (
        (["--plot", "x.foo"], "x.foo: must end in .png, .svg or .pdf"),
        (["--plot", "absent/x.png"], "absent/x.png: cannot be written: its folder does not exist"),
        (["--data", "/nope"], "--data: /nope is no folder"),
        (["--arrivals", "/dev/zero"], "/dev/zero: cannot be read: it is a device"),
        (["--timings", "loads.npy"], "loads.npy: is no UTF-8 text"),
        (["--model", "tiny-moe", "--traces", "loads.npy"], "loads.npy: is no .npz archive"),
    ):
        assert simulate([*argv, "--quiet"]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"moeless-simulate: {message}")
        assert line.count("\n") == 1


# --- what is printed ---------------------------------------------------------------------------------------


def test_nothing_in_a_name_reaches_the_terminal(folder: Path, capfd: Any) -> None:
    data = json.loads(Path("problem.json").read_text())
    data["name"] = ANSI
    data["loads"] |= {"source": ANSI, "notes": [ANSI]}
    data["known"] = {"source": ANSI, "best": [1.0, 1.0]}
    Path("ansi.json").write_text(json.dumps(data))
    Path("bad.json").write_text(json.dumps(data | {ANSI: 1}))
    name = "\x1b[31m\udcff.json"
    os.link("ansi.json", name)
    for argv in (
        ["ansi.json", "-o", "plan.json"],
        ["ansi.json", "--check", "plan.json"],
        ["ansi.json", "--compare"],
        ["bad.json"],
        [name],
        [name, "--current", name],
        ["ansi.json", "--solver", ANSI],
    ):
        code = main(argv)
        text = "".join(capfd.readouterr())
        assert code in (0, 2), text
        assert text.replace("\n", "").isprintable(), text
        assert code == 0 or text.count("\n") == 1
        assert "\\x1b[31m" in text or "valid" in text
    # What the terminal's encoding lacks is spelled out, too.
    done = run("ansi.json", name, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (done.returncode, done.stderr.isascii()) == (2, True)
    problem = mo.load_problem("ansi.json")
    for shown in (repr(problem), repr(problem.loads), repr(mo.solve(problem).plan)):
        assert shown.replace("\n", "").isprintable()


def test_whatever_stops_a_command_is_an_exit_code(capsys: Any, monkeypatch: Any) -> None:
    errors: list[tuple[BaseException, int]] = [
        (mo.InfeasibleError("x"), 1),
        (mo.ProblemError("x", "is wrong"), 2),
        (mo.SolverUnavailableError("needs a package"), 3),
        (mo.SolverUnavailableError("no such"), 2),
        (mo.InvalidPlanError(["x"]), 1),
        (MemoryError(), 2),
        (OSError(28, "No space left on device"), 2),
        (BrokenPipeError(), 0),
    ]
    monkeypatch.setattr("moeless_opt.terminal._silence", lambda: None)
    for error, code in errors:

        def body(signals: Any, error: BaseException = error) -> int:
            raise error

        assert guarded("command", body) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (code != 0)
        assert all(line.startswith("command: ") for line in lines)
    monkeypatch.setattr(sys, "stdout", None)
    assert guarded("command", lambda signals: 0) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert guarded("command", lambda signals: print("模\x1b") or 7) == 7
    sys.stdout.seek(0)
    assert sys.stdout.read() == "\\u6a21\\x1b\n"
