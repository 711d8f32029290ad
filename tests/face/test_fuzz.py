"""The fuzz campaign in small: `python tests/benchmarks/fuzz.py` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeless_opt.cli import main
from tests.fuzz import run_case, whole_files

CASES = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A valid file of every kind."""
    return whole_files(tmp_path_factory.mktemp("whole"))


def test_what_is_mutated_was_whole(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, raw in whole.items():
        Path(name).write_bytes(raw)
    for argv in (
        ["problem.json"],
        ["small.json", "--current", "plan.json"],
        ["small.json", "--check", "plan.npz"],
        ["rec.json", "--topology", "topology.json"],
        ["rec.npz", "--key", "c*", "--topology", "uniform.json"],
        ["vllm.npz", "--topology", "uniform.json"],
    ):
        assert main([*argv, "--quiet"]) == 0, argv


def test_nothing_goes_wrong(whole: dict[str, bytes], tmp_path: Path) -> None:
    found = {number: run_case(1, number, tmp_path, whole) for number in range(CASES)}
    assert {number: one for number, one in found.items() if one.wrong} == {}
    codes = [one.code for one in found.values()]
    assert codes.count(0) > CASES / 10
    assert codes.count(2) > CASES / 10
