"""The command ``moeless-serve``: its options, what it refuses, and a whole life with the real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import moeless_opt as mo
from moeless_opt.runtime.serve import Planning, cli
from moeless_opt.runtime.serve.engine import EngineOptions
from moeless_opt.runtime.serve.http import HttpOptions

HOME = Path(mo.__file__).resolve().parents[1]
"""Where the package is that is tested."""


def read(*argv: str) -> tuple[EngineOptions, HttpOptions]:
    """The options of a command line."""
    return cli._read(vars(cli._parser().parse_args(argv)))


def test_every_field_is_an_option_with_help() -> None:
    told = cli._parser().format_help()
    for kind in (EngineOptions, Planning, HttpOptions):
        for part in fields(kind):  # type: ignore[arg-type]
            if part.name != "planning":
                assert cli._flag(part.name) in told, part.name
    assert set(cli.HELP) == {
        part.name
        for kind in (EngineOptions, Planning, HttpOptions)
        for part in fields(kind)  # type: ignore[arg-type]
    } - {"planning"}


def test_nothing_given_is_the_default() -> None:
    assert read() == (EngineOptions(), HttpOptions())


def test_what_is_given_arrives() -> None:
    engine, http = read(
        "--model", "somewhere", "--ranks", "4", "--no-prefix-cache", "--rank-timeout", "2.5", "--policy",
        "eplb",
        "--pause", "--max-moves", "3", "--keep-alive", "5", "--port", "0", "--api-key", "a", "--api-key", "b",
        "--access-log", "--drain-timeout", "7",
    )  # fmt: skip
    planning = Planning(policy="eplb", paused=True, max_moves=3, keep_alive=5.0)
    expected = EngineOptions(model="somewhere", ranks=4, prefix_cache=False, timeout=2.5, planning=planning)
    assert engine == expected
    assert http == HttpOptions(port=0, api_keys=("a", "b"), access_log=True, drain_timeout=7.0)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELESS_API_KEY", "one, two")
    monkeypatch.setenv("MOELESS_ADMIN_KEY", "three")
    assert (read()[1].api_keys, read()[1].admin_keys) == (("one", "two"), ("three",))
    assert read("--api-key", "four")[1].api_keys == ("four",)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--port", "99999"], "--port"),
        (["--port", "http"], "--port"),
        (["--policy", "guess"], "--policy"),
        (["--ranks", "0"], "--ranks"),
        (["--rank-timeout", "0"], "--rank-timeout"),
        (["--keep-alive", "-1"], "--keep-alive"),
        (["--api-key", ""], "--api-key"),
        (["--host", "not a host"], "--host"),
        (["--head-timeout", "0"], "--head-timeout"),
        (["--max-body", "0"], "--max-body"),
        (["--dtype", "int3"], "--dtype"),
        (["--no-such-option"], "--no-such-option"),
        (["extra"], "extra"),
    ],
)
def test_bad_input_ends_with_2_and_names_the_option(argv: list[str], told: str, capsys: Any) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")
def test_manifests_start_the_command_with_options_that_it_has() -> None:
    found = []
    for block in re.findall(
        r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        for document in yaml.safe_load_all(block):
            found.append(document["kind"])
            if document["kind"] == "Deployment":
                spec = document["spec"]["template"]["spec"]
                (container,) = spec["containers"]
                assert container["args"][0] == "moeless-serve"
                _, http = read(*container["args"][1:])
                assert http.port == container["ports"][0]["containerPort"]
                assert spec["terminationGracePeriodSeconds"] > http.drain_timeout
                assert {mount["name"] for mount in container["volumeMounts"]} == {
                    v["name"] for v in spec["volumes"]
                }
    assert found == ["Deployment", "Service", "RayService"]


# ----------------------------------------------------------------------------------- with the real engine

for package in ("fastapi", "torch", "megatron"):
    pytest.importorskip(package, reason="needs the extras 'runtime' and 'serve'")


def test_a_folder_that_is_no_model_ends_with_2(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["--model", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--ranks", "3"], "--ranks: is 3; 16 experts can be spread over 1, 2, 4, 8, 16 ranks at the start"),
        (["--name", " "], "--name: is ' '"),
        (["--model", ""], "--model: is ''"),
        (["--state", ""], "--state: is ''"),
        (["--allowed-host", ""], "--allowed-host: must be names"),
        (["--api-key", " a"], "--api-key: must not begin or end"),
        (["--write-timeout", "1e300"], "--write-timeout: is 1e+300, must be at most 1e+06"),
        (["--rank-timeout", "1e300"], "--rank-timeout: is 1e+300"),
        (["--keep-alive", "1e300"], "--keep-alive: is 1e+300"),
        (["--slots", "99"], "--slots: is 99; a rank holds an expert once, so at most 16 of them"),
        (["--ranks", "2", "--slots", "3"], "--slots: is 3; 16 experts on 2 ranks need at least 8"),
        (["--policy", "static", "--max-moves", "3"], "--max-moves: is for the policy 'windowed'"),
        (["--context-length", "5000"], "--context-length: is 5000, the model goes up to 512"),
        (["--state", "/no/such/folder/state.json"], "/no/such/folder/state.json: cannot be written"),
        (["--dtype", "float64", "--experts", "grouped"], "use experts='loop'"),
    ],
)
def test_what_the_model_or_the_machine_has_not_ends_with_2(argv: list[str], told: str, capsys: Any) -> None:
    """By one line that names the option, before anything is loaded where that can be told then."""
    assert cli.main([*argv, "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_second_signal_ends_it_at_once_and_without_a_traceback() -> None:
    body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
    command = ("-m", "moeless_opt.runtime.serve", "--port", "0")
    with running(*command) as (server, address), post(address, body) as stream:
        assert stream.readline().startswith(b"data: ")
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, 1)  # 0: it was quicker than the second signal
    assert "Traceback" not in "".join(LOGS[-1])


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in processes of its own, and its address."""
    path = f"{HOME}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": path}
    server = subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    LOGS.append(log)
    found = threading.Event()

    def watch() -> None:
        assert server.stderr is not None
        for line in server.stderr:
            log.append(line)
            if "http://" in line:
                found.set()
        found.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert found.wait(240)
        address = re.search(r"http://[\w.:]+", "".join(log))
        assert address, "".join(log)[-3000:]
        yield server, address[0]
    finally:
        server.kill()
        server.wait()
        watcher.join()
        assert server.stderr is not None
        server.stderr.close()


LOGS: list[list[str]] = []
"""What the servers said."""


def post(address: str, body: dict[str, Any]) -> Any:
    sent = json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/completions", sent, {"Content-Type": "application/json"}),
        timeout=120,
    )


PROMPT, LENGTH = "Die Freiheit ist ", 24


ALONE = "der Menschen der Mensche"
"""What the model says to it alone, without batches and caches (`tiny_moe.model.generate`)."""


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="one process"),
        pytest.param(
            ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            id="torchrun, two ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_server_answers_and_loses_nothing_when_it_ends(launcher: tuple[str, ...]) -> None:
    with running(*launcher, "-m", "moeless_opt.runtime.serve", "--port", "0") as (server, address):
        with post(address, {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}) as answer:
            told = json.load(answer)
        assert told["choices"][0]["text"] == ALONE
        with urllib.request.urlopen(f"{address}/v1/status", timeout=60) as answer:
            assert json.load(answer)["ranks"] == (2 if launcher else 1)
        with post(address, {"prompt": PROMPT, "max_tokens": 80, "temperature": 0, "stream": True}) as stream:
            assert stream.readline().startswith(b"data: ")
            server.send_signal(signal.SIGTERM)
            rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        code = server.wait(60)
        assert launcher or code == 0
        end = time.monotonic() + 30
        while launcher and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{address}/healthz", timeout=5).close()
            except OSError:
                break
            time.sleep(0.1)
