"""The campaign against misreading in small: `python tests/benchmarks/misread.py` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.misreading import run_case


def test_nothing_is_misread(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = {number: run_case(1, number, tmp_path) for number in range(80)}
    assert {number: one for number, one in found.items() if one.wrong} == {}
    assert sum(one.read for one in found.values()) > 20
