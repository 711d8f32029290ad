"""Loads by source rank, from one file for each rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.problems.plan import traffic_L

RANKS, EXPERTS, TOKENS = 4, 8, 12


def traced(folder: Path, ranks: int = RANKS, **row: Any) -> np.ndarray[Any, Any]:
    """Megatron-core's router trace, two layers; returns the loads [layers, ranks, experts]."""
    rng = np.random.default_rng(0)
    load_LRE = np.zeros((2, ranks, EXPERTS))
    folder.mkdir()
    for rank in range(ranks):
        rows = []
        for step in (0, 1):
            for x, layer in enumerate((1, 2)):
                ids = np.argsort(rng.random((TOKENS, EXPERTS)) - 2 * (np.arange(EXPERTS) % ranks == rank))[
                    :, :2
                ]
                load_LRE[x, rank] += np.bincount(ids.ravel(), minlength=EXPERTS)
                one = {"step": step, "layer": layer, "rank": rank, "block": "decoder", "num_tokens": TOKENS}
                rows.append(one | {"topk": 2, "top_indices": ids.tolist()} | row)
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / f"router_trace_rank{rank}.jsonl").write_text(text, encoding="utf-8")
    return load_LRE


def test_a_router_trace_tells_where_tokens_come_from(tmp_path: Path) -> None:
    load_LRE = traced(tmp_path / "trace")
    loads = mo.read_sources(tmp_path / "trace", experts=EXPERTS)
    assert loads.load_TLGE is not None
    np.testing.assert_array_equal(loads.load_TLGE[0], load_LRE)
    np.testing.assert_array_equal(loads.load_LE, mo.read_loads(tmp_path / "trace", experts=EXPERTS).load_LE)
    assert loads.layers == (1, 2)
    topology = mo.uniform(2, 2, slots=3).with_levels([("gpu", 0.1), ("node", 1)])
    near = mo.Objective(priorities=("balance", "traffic"), balance_tolerance=0.5)
    plan = mo.plan(loads, topology, objective=near)
    assert plan.locality is not None
    even = mo.plan(mo.Loads(load_TLE=loads.load_TLE), topology, objective=near)
    given = mo.Problem(loads=loads, topology=topology)
    assert plan.locality.traffic_L.sum() < traffic_L(given, even.slots_LGC, even.share_LGC).sum()


def test_the_command_line_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traced(tmp_path / "trace")
    out = tmp_path / "plan.json"
    argv = [str(tmp_path / "trace"), "--experts", "8", "--gpus", "2x2", "--slots", "3", "--sources"]
    argv += [
        str(tmp_path / "trace"),
        "--priorities",
        "balance,traffic",
        "--solver",
        "locality",
        "-o",
        str(out),
    ]
    assert main(argv) == 0, capsys.readouterr().err
    assert mo.load_plan(out).locality is not None


def test_ranks_without_tokens_in_a_layer_or_in_all_are_read(tmp_path: Path) -> None:
    load_LRE = np.random.default_rng(0).integers(1, 9, (3, RANKS, EXPERTS))
    load_LRE[1, 2], load_LRE[:, 3], load_LRE[2] = 0, 0, 0  # the last layer is dense
    for rank in range(RANKS):
        rows = [{"layer": x + 4, "rank": rank, "loads": load_LRE[x, rank].tolist()} for x in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"loads_rank{rank}.jsonl").write_text(text, encoding="utf-8")
    loads = mo.read_sources(tmp_path)
    assert loads.load_TLGE is not None
    np.testing.assert_array_equal(loads.load_TLGE[0], load_LRE[:2])
    assert (loads.layers, loads.skipped) == ((4, 5), (6,))
    with pytest.raises(mo.FormatError, match="has no load at all"):
        mo.read_loads(tmp_path / "loads_rank3.jsonl")


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    traced(tmp_path / "trace")
    one = tmp_path / "trace" / "router_trace_rank1.jsonl"
    with pytest.raises(mo.FormatError, match="is one file; loads by source are a folder"):
        mo.read_sources(one)
    with pytest.raises(mo.FormatError, match="steps: is not for loads by source"):
        mo.read_sources(tmp_path / "trace", steps="keep")
    text = one.read_text(encoding="utf-8")
    one.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(mo.FormatError, match="rank 1 has no loads"):
        mo.read_sources(tmp_path / "trace")
    one.unlink()
    with pytest.raises(mo.FormatError, match="rank 1 is missing"):
        mo.read_sources(tmp_path / "trace")
    (tmp_path / "trace" / "other.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(mo.FormatError, match="names no rank"):
        mo.read_sources(tmp_path / "trace")
