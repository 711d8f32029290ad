"""Each engine's own measure of one table of loads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.engine_measures import engine_measures

TABLE = [[4.0, 2, 2, 0], [1, 1, 1, 1]]


def test_a_table_by_hand() -> None:
    found = engine_measures(TABLE)
    assert found.vllm_balancedness == pytest.approx(3 / 5)
    assert found.sglang_balancedness == pytest.approx((0.5 + 1) / 2, rel=1e-5)
    assert found.tensorrt_llm_imbalance == pytest.approx(0.5)
    assert (found.ascend_mean, found.ascend_worst) == (1.5, 2.0)
    assert engine_measures(TABLE, dense=2).sglang_balancedness == pytest.approx((0.5 + 1 + 2) / 4, rel=1e-5)
    alive = engine_measures(TABLE, usable=[True, True, True, False])
    assert alive.ascend_worst == pytest.approx(1.5)
    assert alive.vllm_balancedness == pytest.approx((8 / 3 + 1) / 5)


def test_passes_are_means_of_ratios() -> None:
    passes = [[[4.0, 0]], [[0, 4]], [[0, 0]]]  # each uneven, together even; one without tokens
    found = engine_measures(passes)
    assert found.vllm_balancedness == 0.5
    assert found.sglang_balancedness == pytest.approx(0.5, rel=1e-4)
    assert found.tensorrt_llm_imbalance == 1.0
    assert found.ascend_worst == 1.0
    idle = engine_measures([[0.0, 0.0]])
    assert (idle.vllm_balancedness, idle.sglang_balancedness, idle.tensorrt_llm_imbalance) == (1, 1, 0)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"tokens": [1.0, 2.0]}, "tokens"),
        ({"tokens": [[-1.0, 2.0]]}, "tokens"),
        ({"tokens": TABLE, "dense": -1}, "dense"),
        ({"tokens": TABLE, "usable": [True]}, "usable"),
        ({"tokens": TABLE, "usable": [False] * 4}, "usable"),
    ],
)
def test_bad_arguments(options: dict[str, object], where: str) -> None:
    with pytest.raises(ProblemError, match=where):
        engine_measures(**options)  # type: ignore[arg-type]


def test_a_plan_is_measured_without_dead_gpus() -> None:
    load = np.random.default_rng(0).integers(1, 99, (3, 8)).astype(float)
    topology = mo.Topology.from_dict({"gpus_per_node": 4, "slots": [4, 4, 0, 4]})
    loads = mo.Loads(load_TLE=load, layers=(1, 2, 3), skipped=(0,))
    plan = mo.plan(loads, topology, split="equal")
    found = mo.engine_measures(plan)
    assert found.ascend_mean == pytest.approx(plan.imbalance_L.mean())
    assert found.ascend_worst == pytest.approx(plan.imbalance_L.max())
    with pytest.raises(ProblemError, match="without its problem"):
        mo.engine_measures(dataclasses.replace(plan, made_for="abc"))
    ratio = (1 / plan.imbalance_L).sum()
    assert found.sglang_balancedness == pytest.approx((ratio + 1) / 4, rel=1e-5)


def test_values_of_the_engines() -> None:
    path = Path(os.environ.get("MOELESS_DATA", "/nowhere")).parent / "cases" / "engines" / "metrics.json"
    if not path.is_file():
        pytest.skip("the folder of cases is not here")
    want = json.loads(path.read_text())
    found = engine_measures(want["tokens_per_rank"])
    assert found.vllm_balancedness == pytest.approx(want["vllm_balancedness"])
    assert found.sglang_balancedness == pytest.approx(want["sglang_balancedness"])
    assert found.tensorrt_llm_imbalance == pytest.approx(np.mean(want["trtllm_imbalance_ratio_per_layer"]))
    assert [found.ascend_mean, found.ascend_worst] == pytest.approx(want["ascend_mean_max"])
