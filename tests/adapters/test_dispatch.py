"""SGLang's static dispatch by the letter, beside the split by the nearest replica."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.adapters import sglang_loads, sglang_targets

SLOTS = np.array([[[0, 1], [0, 2], [3, 1], [0, -1]]], dtype=np.int32)


def test_own_gpu_then_the_first_of_the_node_then_a_fair_draw() -> None:
    target_GLE = sglang_targets(SLOTS, 4, 2)
    assert target_GLE[:, 0, 0].tolist() == [0, 1, 3, 3]
    assert target_GLE[:, 0, 1].tolist() == [0, 0, 2, 2]
    assert target_GLE[:, 0, 2].tolist() == [1] * 4
    one = np.array([[[0], [0], [1], [2]]], dtype=np.int32)
    assert sorted(sglang_targets(one, 3, 2)[2:, 0, 0].tolist()) == [0, 1]
    assert sglang_targets(one, 3, 2)[:2, 0, 0].tolist() == [0, 1]


def test_tokens_are_those_of_the_targets() -> None:
    load_LE = np.array([[4.0, 8.0, 12.0, 16.0]])
    tokens_LG, leave_L = sglang_loads(load_LE, SLOTS, 2)
    assert tokens_LG.tolist() == [[1 + 4, 1 + 12, 4 + 16, 2]]
    assert leave_L.tolist() == [6 + 8]
    with pytest.raises(mo.ProblemError, match="nodes: are 3, 4 GPUs"):
        sglang_loads(load_LE, SLOTS, 3)


def test_one_replica_on_a_node_is_no_choice_and_both_rules_agree() -> None:
    load_LE = np.floor(np.random.default_rng(0).lognormal(3, 1, (1, 6)))
    slots = np.array([[[0, 1], [2, 3], [0, 4], [5, 1]]], dtype=np.int32)
    topology = mo.uniform(2, 2, slots=2)
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology, split="nearest")
    plan = mo.solve(problem.replace(current=mo.Placement(slots_LGC=slots, experts=6)), "stay").plan
    assert plan is not None
    assert sglang_loads(load_LE, slots, 2)[0] == pytest.approx(plan.time_LG)


def test_recorded_decode_loads_are_worth_what_was_measured(shared_data: Path) -> None:
    with np.load(shared_data / "deepseek_v3_counts.npz") as archive:
        row = archive["workloads"].tolist().index("decode_in1000out1000")
        load_LE = archive["counts"][row, :12].astype(float)
    topology = mo.uniform(4, 8, slots=9)

    def worth(split: str, solver: str) -> tuple[float, float, float]:
        plan = mo.plan(load_LE, topology, split=split, solver=solver, model="DeepSeek-V3")
        tokens_LG, leave_L = sglang_loads(load_LE, plan.slots_LGC, 4)
        ratio_L = tokens_LG.max(1) / tokens_LG.mean(1)
        return float(ratio_L.mean()), float(ratio_L.max()), float(leave_L.sum() / load_LE.sum())

    assert worth("equal", "construct") == pytest.approx((1.044, 1.146, 0.69), abs=0.006)
    assert worth("equal", "eplb") == pytest.approx((1.038, 1.15, 0.73), abs=0.006)
    assert worth("equal", "eplb-hierarchical")[::2] == pytest.approx((1.269, 0.75), abs=0.003)
    mean, worst, _ = worth("nearest", "construct")
    assert mean < 1.02 < worst + 0.02
