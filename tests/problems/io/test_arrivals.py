"""Arrivals and lengths: read, drawn, cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io.arrivals import Arrivals, Lengths, poisson_arrivals, read_arrivals, read_lengths

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n{}"


def test_azure_and_mooncake(tmp_path: Path) -> None:
    text = AZURE.format("2023-11-16 18:15:47.5000000,10,3\n2023-11-16 18:15:46.2500000,20,0\n")
    for name, data in (("a.csv", text.encode()), ("a.csv.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        found = read_arrivals(tmp_path / name)
        assert found.time_R.tolist() == [0.0, 1.25]
        assert found.prompt_R.tolist() == [20, 10]
        assert found.output_R.tolist() == [1, 3]  # who writes nothing still takes a pass
    lines = [{"timestamp": t, "input_length": 5, "output_length": 7, "hash_ids": []} for t in (0, 1500)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_arrivals(tmp_path / "m.jsonl")
    assert found.time_R.tolist() == [0.0, 1.5]
    assert found.seconds == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("when,what\n1,2\n", "no column 'TIMESTAMP'"),
        (AZURE.format("yesterday,1,2\n"), "line 2.*no time stamp"),
        (AZURE.format("2023-11-16 18:15:47,x,2\n"), "line 2.*'x' is no whole number"),
        (AZURE.format("2023-11-16 18:15:47,-4,2\n"), "line 2.*-4 tokens"),
        (AZURE.format("2023-11-16 18:15:47\n"), "line 2.*1 columns"),
        (AZURE.format(""), "no lines"),
        ('{"timestamp": 0}\n', "line 1.*input_length"),
    ],
)
def test_bad_arrivals_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_arrivals(tmp_path / "x.csv")
    with pytest.raises(FormatError, match="cannot be read"):
        read_arrivals(tmp_path / "absent.csv")


def test_lengths_are_drawn_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("num_prefill_tokens,num_decode_tokens\n7,8\n9,0\n")
    lengths = read_lengths(tmp_path / "l.csv")
    arrivals = poisson_arrivals(10, 5, seed=3)
    a, b = (arrivals.with_lengths(lengths, seed=4) for _ in range(2))
    assert np.array_equal(a.prompt_R, b.prompt_R)
    assert set(zip(a.prompt_R.tolist(), a.output_R.tolist(), strict=True)) == {(7, 8), (9, 1)}
    assert np.array_equal(a.time_R, arrivals.time_R)
    with pytest.raises(ProblemError, match="lengths"):
        Lengths(prompt_R=np.array([1]), output_R=np.array([1, 2]))


def test_arrivals_in_order_and_cut() -> None:
    with pytest.raises(ProblemError, match=r"time\[2\]"):
        Arrivals(time_R=np.array([0, 2, 1.0]), prompt_R=np.ones(3), output_R=np.ones(3))
    arrivals = Arrivals(time_R=np.array([0, 1, 2.0]), prompt_R=np.ones(3), output_R=np.ones(3))
    assert arrivals.first(1.5).requests == 2
    mean = np.mean([poisson_arrivals(4.0, 100.0, seed=s).requests - 1 for s in range(20)])
    assert abs(mean - 400) < 5 * 20 / 20**0.5
