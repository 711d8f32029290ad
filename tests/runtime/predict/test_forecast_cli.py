"""``moeless-forecast``: the table of errors, and a forecast that moeless-solve takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.cli import main as solve
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.spec import Loads
from moeless_opt.runtime.predict import backtest, forecast_next
from moeless_opt.runtime.predict.cli import main


def recorded(folder: Path, *shape: int) -> tuple[str, Any]:
    windows = np.random.default_rng(0).poisson(50, shape).astype(float)
    np.save(folder / "windows.npy", windows)
    return str(folder / "windows.npy"), windows


def test_the_table_is_that_of_the_backtest(tmp_path: Path, capsys: Any) -> None:
    path, windows = recorded(tmp_path, 12, 2, 16)
    assert main([path]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    want = backtest(windows)
    assert [row.split()[-3:] for row in rows] == [
        [f"{one.error:.4f}", f"{one.worst:.4f}", "10"] for one in want
    ]
    assert main([path, "--json", "--begin", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    for one, said in zip(backtest(windows, begin=5), told["tried"], strict=True):
        assert (said["name"], said["error"], said["windows"]) == (one.name, one.error, 7)
        assert said["error_by_layer"] == one.error_L.tolist()
    assert told["chosen"] == told["tried"][0]["name"]


@pytest.mark.parametrize("shape", [(12, 3, 16), (12, 1, 16), (3, 2, 8), (6, 3, 1)])
def test_the_forecast_is_a_recording(shape: tuple[int, ...], tmp_path: Path, capsys: Any) -> None:
    path, windows = recorded(tmp_path, *shape)
    out = str(tmp_path / "next.csv")
    windows[:, 0] = 0 if shape[1] == 3 else windows[:, 0]  # a dense layer
    windows[-1, -1] = windows[-1, -1] if shape[1] == 1 else 0  # and one that was idle at last
    np.save(path, windows)
    kept = [layer for layer in range(shape[1]) if windows[:, layer].any()]
    more = 1 if shape[0] == 3 else 2
    said = [path, "-o", out, "--scenarios", str(more), "--as", "counts"]
    assert main(said) == 0
    found = read_loads(out)
    assert found.layers == tuple(kept)
    want = forecast_next(Loads(load_TLE=windows[:, kept], layers=tuple(kept)), scenarios=more).loads
    np.testing.assert_array_equal(found.load_TLE, want.load_TLE)
    assert found.load_TLE.shape == (1 + more, len(kept), shape[2])
    assert (found.load_TLE.sum(2) > 0).all()
    assert solve([out, "--gpus", "4", "--slots", "5" if shape[2] > 1 else "1", "--quiet"]) == 0


def test_bad_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    two, windows = recorded(tmp_path, 2, 3, 8)
    zero, flat, out = (str(tmp_path / name) for name in ("zero.npy", "flat.npy", "next.csv"))
    np.save(zero, np.zeros((5, 3, 8)))
    np.save(flat, windows[0])
    for said, text in (
        ([two], "has 2 windows, a backtest with --begin 2 needs at least 3"),
        ([flat], "has 1 windows"),
        ([zero], "no load at all"),
        ([two, "--begin", "1", "--scenarios", "2"], "only 1 windows were forecast before"),
        ([two, "--begin", "0"], "--begin"),
        ([two, "--scenarios", "-1"], "--scenarios"),
        ([two, "--begin", "1", "-o", str(tmp_path / "next.npz")], "must end in .csv"),
        ([str(tmp_path / "none.npy")], "cannot be read"),
    ):
        assert main([*said, *([] if "-o" in said else ["-o", out])]) == 2
        shown = capsys.readouterr()
        assert text in shown.err
        assert shown.err.count("\n") == 1
        assert not shown.out
    assert sorted(one.name for one in tmp_path.iterdir()) == ["flat.npy", "windows.npy", "zero.npy"]
    assert main([two, "--begin", "1"]) == 0
