"""Ctrl-C in the middle of native solves and after them, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time as clock
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")

LOADS = """
W = np.random.default_rng(0).lognormal(0, 1, (2, 40)) * 1000
two, few = (mo.uniform(1, 8, slots=c) for c in (6, 4))
"""
SOLVES = {
    "cpsat": "mo.plan(W[:1], two, split='equal', solver='cpsat', time_limit={0})",
    "highs": "mo.plan(W[:1], two, split='equal', solver='milp', time_limit={0})",
    "scip": "mo.plan(W[:1], two, split='equal', solver='milp', engine='gscip', time_limit={0})",
    "pulp": "mo.plan(W[:1], two, split='equal', solver='milp', engine='pulp', time_limit={0})",
    "patterns": "mo.plan(W[:1, :20], few, split='equal', solver='patterns', time_limit={0})",
}
START = f"""
import os, signal, sys, threading, time
import numpy as np
import moeless_opt as mo
{LOADS}
"""


def process(code: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", START + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root if (root / "moeless_opt").is_dir() else None,
    )


def told(running: subprocess.Popen[str], seconds: float = 60.0) -> str:
    try:
        out, err = running.communicate(timeout=seconds)
    finally:
        running.kill()
    return out + err


def helpers_of(pid: int) -> list[int]:
    """Processes that `pid` has started, and those of theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry.name), *helpers_of(int(entry.name))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", SOLVES)
def test_ctrl_c_in_the_middle(name: str) -> None:
    code = f"""
def tell():
    time.sleep(2.0)
    print("told", time.monotonic(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=tell, daemon=True).start()
try:
    {SOLVES[name].format(100)}
    print("went on")
except KeyboardInterrupt:
    print("interrupted", time.monotonic())
finally:
    print("cleanup ran")
"""
    running = process(code)
    words = told(running)
    assert "cleanup ran" in words, words
    assert running.returncode == 0
    assert "went on" not in words, "solved before it was told: the instance is too easy"
    times = [
        float(line.split()[1]) for line in words.splitlines() if line.startswith(("told", "interrupted"))
    ]
    assert times[1] - times[0] < 5.0  # half a second on a calm machine


@pytest.mark.parametrize("name", SOLVES)
def test_ctrl_c_afterwards(name: str) -> None:
    code = f"""
{SOLVES[name].format(0.7)}
threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
try:
    time.sleep(30)
    print("nothing happened")
except KeyboardInterrupt:
    print("KeyboardInterrupt")
finally:
    print("cleanup ran")
"""
    running = process(code)
    assert told(running).splitlines() == ["KeyboardInterrupt", "cleanup ran"]
    assert running.returncode == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("engine", ["highs", "pulp"])
def test_nothing_is_left_behind(engine: str, how: int) -> None:
    code = f"""
print("begun", flush=True)
{SOLVES[engine].format(100)}
"""
    running = process(code)
    assert running.stdout is not None
    running.stdout.readline()
    until, helpers = clock.monotonic() + 30, []
    while len(helpers) < (2 if engine == "pulp" else 1) and clock.monotonic() < until:
        clock.sleep(0.05)
        helpers = helpers_of(running.pid)
    clock.sleep(0.5)
    helpers = helpers_of(running.pid)
    assert helpers
    os.kill(running.pid, how)
    told(running)
    until = clock.monotonic() + 10
    while any(alive(one) for one in helpers) and clock.monotonic() < until:
        clock.sleep(0.05)
    assert not [one for one in helpers if alive(one)]
