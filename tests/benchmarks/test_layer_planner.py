"""Planning a layer from what is live: pytest tests/benchmarks/test_layer_planner.py --benchmark-enable."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.spec.architecture import model_preset
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.control.layer_planner import LayerPlanner

pytest.importorskip("numba")


@pytest.mark.parametrize("tokens", [64, 4096])
@pytest.mark.parametrize(
    ("model", "nodes", "slots"), [("Mixtral-8x7B", 1, 2), ("Phi-3.5-MoE", 1, 3), ("DeepSeek-V3", 4, 9)]
)
def test_plan_layer(benchmark: Any, model: str, nodes: int, slots: int, tokens: int) -> None:
    """Loads drift from plan to plan; each starts from the one before; checked against the rules."""
    spec = model_preset(model)
    time = TimeModel.roofline(spec, flops=0.6 * 989e12, bandwidth=0.75 * 3.35e12)
    planner = LayerPlanner(mo.uniform(nodes, 8, slots=slots), spec, time)
    rng = np.random.default_rng(0)
    weight_E = rng.lognormal(0, 1, spec.experts)
    loads = []
    for _ in range(16):
        share_E = weight_E * rng.lognormal(0, 0.3, spec.experts)
        loads.append(rng.multinomial(tokens * spec.top_k, share_E / share_E.sum()).astype(np.float64))
    turn = cycle(loads)
    live_GC = contiguous(spec.experts, planner.capacity_LG)[0]

    def plan() -> np.ndarray:
        nonlocal live_GC
        live_GC = planner.plan_layer(0, next(turn), live_GC)
        return live_GC

    plan()
    assert set(benchmark(plan)[live_GC >= 0].tolist()) == set(range(spec.experts))
