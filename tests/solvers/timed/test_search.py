"""Planning by the clock: against brute force, the bound, perfect balance, and itself without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.plan.result import StoppedBy
from moeless_opt.problems.plan.time_bounds import TimeTable, timed_bound
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.solvers.core.stopping import NeverStop
from moeless_opt.solvers.timed.search import timed_plan, timed_shares, warm_timed
from tests.oracles.least_time import least_time

CURVE = TimeModel(
    curve_tokens=np.array([1.0, 64, 256, 1024, 4096]),
    curve_activated=np.array([1.0, 2, 4, 8]),
    curve_time=np.array([1.0, 1.2, 2.0, 6.0, 22.0])[:, None] * np.array([1.0, 1.1, 1.5, 2.4]),
    unit="s",
)
TIMES = [
    TimeModel(),
    TimeModel(token_cost=1.0, activation_cost=40.0),
    TimeModel(token_cost=0.0, activation_cost=1.0, launch=3.0),
    CURVE,
]


def random_layers(seed: int, layers: int, experts: int, gpus: int, slots: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    load_LE = np.floor(rng.lognormal(4, 1.2, (layers, experts)) * (rng.uniform(size=(layers, experts)) < 0.9))
    capacity_LG = np.full((layers, gpus), slots)
    return load_LE, capacity_LG, rng.choice([0.5, 1.0, 1.0, 2.0], gpus)


@pytest.mark.parametrize("time", TIMES)
@given(seed=st.integers(0, 10_000), gpus=st.integers(1, 5), experts=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_plan_keeps_the_rules_and_its_word(time: TimeModel, seed: int, gpus: int, experts: int) -> None:
    slots = -(-experts // gpus) + 1
    load_LE, capacity_LG, speed_G = random_layers(seed, 3, experts, gpus, slots)
    table = TimeTable.of(time, min(slots, experts))
    live_LGC = contiguous(experts, capacity_LG)
    found = timed_plan(load_LE, live_LGC, capacity_LG, speed_G, table, load_G=np.zeros(gpus), kicks=3)
    for load_E, slots_GC, share_GC in zip(load_LE, found.slots_LGC, found.share_LGC, strict=True):
        for row in slots_GC:
            kept = row[row >= 0]
            assert len(set(kept)) == len(kept) <= slots
        held = slots_GC >= 0
        assert set(slots_GC[held]) == set(range(experts))
        np.testing.assert_allclose(np.bincount(slots_GC[held], weights=share_GC[held], minlength=experts), 1)
        assert (share_GC >= 0).all()
        assert load_E.shape == (experts,)
    busy_L = load_LE.sum(1) > 0
    time_L = gpu_times(load_LE, found.slots_LGC, found.share_LGC, speed_G, time).max(1)
    np.testing.assert_allclose(time_L[busy_L], found.value_L[busy_L], rtol=1e-9)
    bound_L = timed_bound(load_LE, capacity_LG, speed_G, table)
    assert (bound_L <= time_L * (1 + 1e-9)).all()
    # Never slower than doing nothing about it.
    share_LGC, still_L = timed_shares(load_LE, live_LGC, speed_G, table, kicks=3)
    assert (time_L[busy_L] <= still_L[busy_L] * (1 + 1e-9)).all()
    again_L = gpu_times(load_LE, live_LGC, share_LGC, speed_G, time).max(1)
    np.testing.assert_allclose(again_L[busy_L], still_L[busy_L], rtol=1e-9)


def test_splitting_pays_only_if_tokens_outweigh_the_activation() -> None:
    slots = np.array([[[0, -1], [0, 1]]], dtype=np.int32)
    load, speed = np.array([[10.0, 1.0]]), np.ones(2)
    cheap = TimeTable.of(TimeModel(activation_cost=1.0), 2)
    share, time = timed_shares(load, slots, speed, cheap)
    np.testing.assert_allclose(share[0], [[0.6, 0.0], [0.4, 1.0]], rtol=1e-3)
    assert time[0] == pytest.approx(7.0, rel=1e-3)
    dear = TimeTable.of(TimeModel(activation_cost=11.0), 2)
    share, _ = timed_shares(load, slots, speed, dear)
    np.testing.assert_allclose(share[0], [[1.0, 0.0], [0.0, 1.0]])


def test_shares_may_start_from_the_plan() -> None:
    load_LE, capacity_LG, speed_G = random_layers(5, 4, 12, 4, 4)
    table = TimeTable.of(CURVE, 4)
    plan = timed_plan(
        load_LE, contiguous(12, capacity_LG), capacity_LG, speed_G, table, load_G=np.zeros(4), kicks=16
    )
    _, time_L = timed_shares(load_LE, plan.slots_LGC, speed_G, table, kicks=0, start_LGC=plan.share_LGC)
    assert (time_L <= plan.value_L * (1 + 1e-9)).all()


def test_a_move_has_to_pay() -> None:
    load = np.array([[400.0, 100, 100, 100]])
    capacity, speed = np.full((1, 2), 3), np.ones(2)
    live = np.array([[[0, 1, -1], [2, 3, -1]]], dtype=np.int32)
    table = TimeTable.of(TimeModel(token_cost=1e-3, unit="s"), 3)
    free = timed_plan(load, live, capacity, speed, table, load_G=np.zeros(2))
    assert free.value_L[0] == pytest.approx(0.35, rel=1e-3)
    assert (free.slots_LGC[0] >= 0).sum() == 5
    hidden = timed_plan(load, live, capacity, speed, table, load_G=np.full(2, 0.5), lead_L=np.array([0.5]))
    np.testing.assert_array_equal(hidden.slots_LGC, free.slots_LGC)
    waits = timed_plan(load, live, capacity, speed, table, load_G=np.full(2, 0.5), lead_L=np.array([0.4]))
    assert waits.value_L[0] == pytest.approx(0.45, rel=1e-3)  # 0.35, and 0.1 for the weights
    dear = timed_plan(load, live, capacity, speed, table, load_G=np.full(2, 0.5))
    np.testing.assert_array_equal(np.sort(dear.slots_LGC), np.sort(live))
    priced = timed_plan(load, live, capacity, speed, table, load_G=np.zeros(2), price_L=np.array([0.2]))
    np.testing.assert_array_equal(np.sort(priced.slots_LGC), np.sort(live))


def brute_force(load_E: np.ndarray, gpus: int, slots: int, caps_A: np.ndarray) -> bool:
    """Whether tokens fit, trying every set of (expert, GPU) pairs: a flow for each."""
    experts = len(load_E)
    for sets in product(range(1, 2**experts), repeat=gpus):
        counts = [bin(x).count("1") for x in sets]
        if max(counts) > slots:
            continue
        # Hall's condition of the transport: every set of experts fits the GPUs that serve any of it.
        if all(
            sum(load_E[e] for e in range(experts) if chosen >> e & 1)
            <= sum(caps_A[n] for x, n in zip(sets, counts, strict=True) if x & chosen) + 1e-9
            for chosen in range(1, 2**experts)
        ):
            return True
    return False


@given(seed=st.integers(0, 10_000), kind=st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_the_exact_model_is_exact(seed: int, kind: int) -> None:
    rng = np.random.default_rng(seed)
    load_E = rng.integers(1, 600, 3).astype(float)
    table = TimeTable.of(TIMES[kind], 2)
    exact = least_time(load_E, np.full(2, 2), np.ones(2), table, rel=2e-3)
    assert exact.bound <= exact.value
    assert brute_force(load_E, 2, 2, table.largest(np.array([exact.value * 1.003]))[0])
    assert not brute_force(load_E, 2, 2, table.largest(np.array([exact.bound * 0.995]))[0])


def test_near_the_exact_optimum() -> None:
    """Eight experts on four GPUs, measured-like curve: within 3 % on average, never below the proof."""
    ratios = []
    for seed in range(8):
        load_LE, capacity_LG, _ = random_layers(seed, 1, 8, 4, 3)
        table, speed_G = TimeTable.of(CURVE, 3), np.ones(4)
        live = contiguous(8, capacity_LG)
        found = timed_plan(load_LE, live, capacity_LG, speed_G, table, load_G=np.zeros(4))
        exact = least_time(load_LE[0], capacity_LG[0], speed_G, table, rel=2e-3, seconds=20)
        assert found.value_L[0] >= exact.bound * (1 - 1e-9)
        assert timed_bound(load_LE, capacity_LG, speed_G, table)[0] <= exact.value * (1 + 1e-9)
        ratios.append(found.value_L[0] / exact.value)
    assert np.mean(ratios) <= 1.03


def test_the_solver_plans_by_time_and_keeps_what_is_live() -> None:
    topology = mo.uniform(1, 4, slots=4)
    loads = np.random.default_rng(1).lognormal(5, 1, (3, 12)).round()
    plan = mo.plan(loads, topology, time=CURVE)
    by_tokens = mo.plan(loads, topology)
    slow_L = gpu_times(loads, by_tokens.slots_LGC, by_tokens.share_LGC, np.ones(4), CURVE).max(1)
    assert (plan.certificate.value_L <= slow_L * (1 + 1e-9)).all()
    assert (plan.certificate.lower_bound_L > 0).all()
    again = mo.plan(loads * 1.01, topology, time=CURVE, current=plan)
    assert again.moves.count == 0


SCRIPT = """
import json, sys
import numpy as np
sys.path.insert(0, {root!r})
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.plan.time_bounds import TimeTable
from moeless_opt.solvers.timed.search import timed_plan, timed_shares, warm_timed
rng = np.random.default_rng(3)
load = np.floor(rng.lognormal(4, 1.2, (3, 10)))
capacity, speed = np.full((3, 4), 4), np.array([1.0, 1, 2, 0.5])
table = TimeTable.of(TimeModel(activation_cost=30.0), 4)
plan = timed_plan(load, contiguous(10, capacity), capacity, speed, table, load_G=np.full(4, 5.0),
                  lead_L=np.full(3, 10.0), price_L=np.full(3, 1.0))
share, time = timed_shares(load[:, ::-1].copy(), plan.slots_LGC, speed, table, start_LGC=plan.share_LGC)
print(json.dumps([plan.slots_LGC.tolist(), plan.share_LGC.tolist(), plan.value_L.tolist(), time.tolist()]))
"""


def test_interpreted_and_compiled_are_the_same() -> None:
    pytest.importorskip("numba")
    root = os.path.dirname(os.path.dirname(os.path.dirname(mo.__file__ or "")))
    said = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT.format(root=root)],
            env={**os.environ, "NUMBA_DISABLE_JIT": off},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for off in ("0", "1")
    ]
    assert json.loads(said[0]) == json.loads(said[1])


class Late(NeverStop):
    """Stop from the n-th question on, and keep count."""

    def __init__(self, asks: int) -> None:
        self.asks = asks

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        self.asks -= 1
        return StoppedBy.TIME if self.asks < 0 else StoppedBy.NOTHING


def test_a_search_is_told_to_stop_in_its_midst() -> None:
    load_LE, capacity_LG, speed_G = random_layers(3, 4, 128, 16, 9)
    table, live = TimeTable.of(TIMES[1], 9), contiguous(128, capacity_LG)
    wants = {"load_G": np.zeros(16), "kicks": 10_000}  # a minute, if nobody stops it
    stop = Late(3)
    found = timed_plan(load_LE, live, capacity_LG, speed_G, table, stop=stop, **wants)
    assert stop.asks == -1, "asked after it had said so"
    time_L = gpu_times(load_LE, found.slots_LGC, found.share_LGC, speed_G, TIMES[1]).max(1)
    np.testing.assert_allclose(time_L, found.value_L, rtol=1e-9)

    class Angry(NeverStop):
        def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timed_plan(load_LE, live, capacity_LG, speed_G, table, stop=Angry(), **wants)
    still = timed_plan(load_LE, live, capacity_LG, speed_G, table, load_G=np.zeros(16), kicks=2)
    watched = timed_plan(
        load_LE, live, capacity_LG, speed_G, table, load_G=np.zeros(16), kicks=2, stop=NeverStop()
    )
    np.testing.assert_array_equal(still.slots_LGC, watched.slots_LGC)
    np.testing.assert_array_equal(still.share_LGC, watched.share_LGC)


def test_one_compiled_form_serves_all_kinds_of_arrays() -> None:
    """Read-only, narrow and strided arrays compile nothing anew, which takes seconds in a forward pass."""
    if not warm_timed():
        pytest.skip("Numba is not installed")
    from moeless_opt.solvers.timed import _kernels

    table = TimeTable.of(TimeModel(), 3)
    load_LE = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2).T
    slots_LGC = np.array([[[0, 1], [2, 3]]] * 2, dtype=np.int32)
    speed_G = np.ones(2)
    for array in (load_LE, slots_LGC, speed_G):
        array.setflags(write=False)
    capacity_LG = np.full((2, 2), 3, dtype=np.int32)
    found = timed_plan(load_LE, slots_LGC, capacity_LG, speed_G, table, load_G=speed_G, lead_L=speed_G)
    timed_shares(load_LE, found.slots_LGC, speed_G, table, start_LGC=found.share_LGC)
    assert len(_kernels.rows.signatures) == len(_kernels.reserve.signatures) == 1
