"""The planner of the per-layer mode: rules, price of loading, one layer as all, refusals."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InvalidPlanError, ProblemError
from moeless_opt.problems.plan.verify import check_slots
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.control.layer_planner import LayerPlanner

MODEL = ModelSpec(name="small", layers=4, experts=8, top_k=2, hidden=512, ffn=1024)
TIME = TimeModel(token_cost=2e-6, activation_cost=1e-4, unit="s")


def planner(**options: float) -> LayerPlanner:
    topology = mo.uniform(1, 4, slots=3)
    return LayerPlanner(topology, MODEL, TIME, **options)  # type: ignore[arg-type]


def loads(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(6, 1, (MODEL.layers, MODEL.experts)).round()


def test_plans_beat_what_is_live() -> None:
    plan_by = planner()
    live = contiguous(8, plan_by.capacity_LG)
    load_LE = loads()
    found = plan_by(load_LE, live)
    still = mo.plan(load_LE, plan_by.topology, current=live, time=TIME, solver="activation")
    assert found.moves.count > 0
    static = mo.plan(load_LE, plan_by.topology, time=TIME, solver="static")
    assert (found.certificate.value_L <= static.certificate.value_L + 1e-12).all()
    assert found.certificate.value_L.sum() < 0.9 * static.certificate.value_L.sum()
    assert still.certificate.value_L.shape == found.certificate.value_L.shape


def test_a_layer_alone_as_among_all() -> None:
    """Even loads make every layer hide as much loading as any other: then one layer is planned as in all."""
    plan_by = planner(distance=2)
    live = contiguous(8, plan_by.capacity_LG)
    load_LE = loads(1)
    load_LE *= load_LE.sum() / MODEL.layers / load_LE.sum(1, keepdims=True)
    whole = plan_by(load_LE, live)
    for layer in range(MODEL.layers):
        alone = plan_by.plan_layer(layer, load_LE[layer], live[layer])
        np.testing.assert_array_equal(alone, whole.slots_LGC[layer])


def test_slow_links_stop_moves() -> None:
    live = contiguous(8, planner().capacity_LG)
    topology = mo.uniform(1, 4, slots=3)
    slow = topology.replace(links=topology.links.replace(intra_node=1e5))
    still = LayerPlanner(slow, MODEL, TIME)(loads(), live)
    assert still.moves.count == 0


def test_gain_and_distance() -> None:
    live = contiguous(8, planner().capacity_LG)
    moved = {gain: planner(gain=gain)(loads(), live).moves.count for gain in (0.0, 0.05, 10.0)}
    assert moved[0.0] >= moved[0.05] >= moved[10.0] == 0


def test_no_load_no_change() -> None:
    plan_by = planner()
    live = contiguous(8, plan_by.capacity_LG)
    assert plan_by(np.zeros((4, 8)), live).moves.count == 0
    np.testing.assert_array_equal(np.sort(plan_by.plan_layer(0, np.zeros(8), live[0])), np.sort(live[0]))


def test_refusals() -> None:
    with pytest.raises(ProblemError, match="must be 's'"):
        LayerPlanner(mo.uniform(1, 4, slots=3), MODEL, TimeModel())
    good = np.array([[0, 1], [2, -1]], dtype=np.int32)
    check_slots(good, 3, np.array([2, 2]))
    with pytest.raises(InvalidPlanError, match="twice"):
        check_slots(np.array([[0, 0], [1, 2]]), 3, np.array([2, 2]))
    with pytest.raises(InvalidPlanError, match="expert 2 has no replica"):
        check_slots(np.array([[0, 1], [1, -1]]), 3, np.array([2, 2]))
    with pytest.raises(InvalidPlanError, match="more replicas than fit"):
        check_slots(good, 3, np.array([1, 2]))
    # An expert that is none would be counted as an empty slot of the next GPU.
    for wrong in ([[0, 3], [1, 2]], [[0, 1], [2, 3]], [[0, 1], [2, -2]]):
        with pytest.raises(InvalidPlanError, match=r"an expert outside -1\.\.2"):
            check_slots(np.array(wrong), 3, np.array([2, 2]))
