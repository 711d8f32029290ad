"""The check for a GPU, where there is none: it runs in full, makes nothing up, and tells what failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from moeless_opt.runtime.gpu_check.__main__ import main
from moeless_opt.runtime.gpu_check.run import PARTS, check_part
from moeless_opt.runtime.gpu_check.sheet import Sheet, lines_table, read_lines
from moeless_opt.runtime.gpu_check.timeline import (
    MEMORY,
    host_calls,
    host_waits,
    pageable,
    spans_of,
    time_beside,
)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "moeless_opt.runtime.gpu_check"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, check=False)


@pytest.mark.slow
def test_the_dry_run_goes_through_everything_and_measures_nothing(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--seconds", "900", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["machine"]["device"] == "cpu, dry run"
    found = [(line["part"], line["name"]) for line in report["lines"]]
    assert sorted(found) == sorted((name, line) for name in PARTS for line in check_part(name).LINES)
    for line in report["lines"]:
        assert line["status"] == "dry"
        assert line["value"] is None
        assert line["met"] is None
        assert line["on_cpu"] is not None
        assert "no GPU" in line["reason"]
    assert report["counts"] == {"dry": len(found)}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "table.txt"]
    assert f"0 measured, {len(found)} dry, 0 failed" in done.stdout
    exact = {line["name"]: line["on_cpu"] for line in report["lines"] if line["part"] == "staged"}
    assert exact["outputs while experts move"] == 0.0


BROKEN = """
import os, sys, time, types, torch
from pathlib import Path
from moeless_opt.runtime.gpu_check import run, sheet
from moeless_opt.runtime.gpu_check.setting import Setting

def part(name, check, seconds=20):
    module = types.ModuleType(f"moeless_opt.runtime.gpu_check.{name}")
    module.TITLE, module.LINES, module.SECONDS, module.check = name, ("first", "second"), seconds, check
    sys.modules[module.__name__] = module

def raises(setting, sheet):
    sheet.take("first", 1.0)
    raise ValueError("so it goes")

def dies(setting, sheet):
    sheet.take("first", 2, most=1)
    os.kill(os.getpid(), 11)

def hangs(setting, sheet):
    with sheet.guard("first"):
        raise KeyError("lost")
    time.sleep(600)

def fine(setting, sheet):
    sheet.take("first", {"a": 1.0, "b": 2.0}, "s", wish=1.0)
    sheet.take("second", True)

part("raises", raises), part("dies", dies), part("hangs", hangs, 0.5), part("fine", fine)
run.PARTS = ("raises", "dies", "hangs", "fine")
setting = Setting.of("cpu", Path("."))
for line in run.run_parts(setting, run.PARTS):
    print(line.part, line.name, line.status, line.reason, sep="|")
for line in run.run_parts(setting, ("fine",), seconds=0.0):
    print(line.part, line.name, line.status, line.reason, sep="|")
"""


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    done = run(code=BROKEN)
    assert done.returncode == 0, done.stderr
    rows = [tuple(line.split("|")) for line in done.stdout.splitlines() if line.count("|") == 3]
    dry = "no GPU: small shapes on a CPU"
    assert [row[:3] for row in rows] == [
        ("raises", "first", "dry"),
        ("raises", "second", "failed"),
        ("dies", "first", "failed"),
        ("dies", "second", "failed"),
        ("hangs", "first", "failed"),
        ("hangs", "second", "failed"),
        ("fine", "first", "dry"),
        ("fine", "second", "dry"),
        ("fine", "first", "failed"),
        ("fine", "second", "failed"),
    ]
    reasons = [row[3] for row in rows]
    assert reasons[1].startswith("ValueError: so it goes (")
    assert reasons[2:4] == ["is 2, may be 1 at most", "the part's process ended with -11"]
    assert reasons[4].startswith("KeyError: 'lost' (")
    assert reasons[5] == "the part was ended after 2 s"
    assert reasons[6:8] == [dry, dry]
    assert reasons[8] == "not begun: the 0 s for all parts were over"
    assert "ValueError: so it goes" in done.stderr


def test_bad_usage_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["--only", "nothing", "--out", str(out)]) == 2
    assert "part: 'nothing' is unknown; there are exactness" in capsys.readouterr().err
    monkeypatch.setattr("moeless_opt.runtime.gpu_check.processes.gpu_here", lambda: False)
    assert main(["--device", "cuda", "--out", str(out)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "under")]) == 2
    assert main(["--list", "--out", str(out)]) == 0
    assert "recovered" in capsys.readouterr().out
    assert not out.exists()


def sheet_of(path: Path, dry: bool = False) -> Sheet:
    return Sheet("part", dry, path / "sheet")


def test_what_is_measured_is_held_to_what_must_be_and_to_what_is_wanted(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path)
    sheet.take("quick", {"a": 3.0, "b": 4.5}, "us", wish=4.0, detail={"n": 3})
    sheet.take("right", 0, most=0)
    sheet.take("wrong", 2e-3, "relative", most=1e-3)
    sheet.take("few", 0, "bytes", least=1)
    sheet.take("broken", float("nan"))
    sheet.take("no", False)
    sheet.end()
    lines = {line.name: line for line in read_lines("part", ("right", "never"), tmp_path / "sheet", "")}
    assert [line.status for line in lines.values()].count("measured") == 2
    assert lines["quick"].value == {"a": 3.0, "b": 4.5}
    assert (lines["quick"].wish, lines["quick"].met, lines["quick"].on_cpu) == ("<= 4 us", False, None)
    assert lines["right"].value == 0
    assert lines["wrong"].reason == "is 0.002 relative, may be 0.001 at most"
    assert lines["few"].reason == "is 0 bytes, must be 1 at least"
    assert {lines[name].status for name in ("wrong", "few", "broken", "no", "never")} == {"failed"}
    assert lines["never"].reason == "the part ended without this line"
    text = lines_table(list(lines.values()))
    assert "measured  quick  a 3, b 4.5 us  [wanted <= 4 us, missed]" in text
    assert "failed    never  the part ended without this line" in text


def test_a_dry_run_fails_where_the_sums_are_wrong(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, dry=True)
    sheet.take("equal", 1, "integers", most=0)
    (line,) = read_lines("part", (), tmp_path / "sheet", "")
    assert (line.status, line.value, line.on_cpu) == ("failed", None, 1)


def event(kind: str, name: str, begin: float, dur: float, stream: Any = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": dur, "args": {"stream": stream}}


def test_what_a_trace_says() -> None:
    """The form in which torch's profiler writes what CUDA tells it."""
    trace = {
        "traceEvents": [
            event("kernel", "gemm", 0, 10),
            event("kernel", "gemm", 8, 10),
            event("kernel", "gemm", 30, 10),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 15, 20, 9),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 50, 1),
            event("cuda_runtime", "cudaStreamSynchronize", 1, 2),
            event("user_annotation", "moeless gpu_check", 0, 50),
            event("cuda_runtime", "cudaMalloc_v3020", 40, 2),
            event("cuda_runtime", "cudaMemcpyAsync", 40, 2),
            event("cuda_runtime", "cudaDeviceSynchronize", 60, 2),
            event("cpu_op", "aten::cudaStreamSynchronize", 60, 2),
            {"ph": "M", "name": "process_name"},
        ]
    }
    spans = spans_of(trace)
    assert len(spans) == 10
    assert host_waits(spans) == {"cudaStreamSynchronize": 1}  # the last one is not the call's
    assert host_calls(spans, MEMORY) == {"cudaMalloc": 1}
    assert pageable(spans) == 1
    kernels = [s for s in spans if s.kind == "kernel"]
    assert time_beside([s for s in spans if s.stream == 9], kernels) == (20.0, 8.0)
    assert time_beside([], kernels) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(
    seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--seconds", seconds, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "argument --seconds: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["report.json", "table.txt", "time_models.json"])
def test_a_report_that_could_not_be_written_is_known_first(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).mkdir()
    assert main(["--device", "cpu", "--only", "collectives", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert file in said.err
    assert not said.out


def test_a_dry_run_keeps_what_a_gpu_has_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"machine": {"device": "NVIDIA H100"}})
    (tmp_path / "report.json").write_text(text)
    assert main(["--device", "cpu", "--only", "collectives", "--out", str(tmp_path)]) == 2
    assert "was measured on NVIDIA H100" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.json", text)]


def test_a_part_named_twice_runs_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--list", "--only", "waits", "waits"]) == 0
    assert capsys.readouterr().out.count("waits:") == 1
