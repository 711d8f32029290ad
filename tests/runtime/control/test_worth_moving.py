"""Layers of a window's plan change only where drawn passes end sooner for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import ModelSpec, TimeModel, Topology
from moeless_opt.runtime.control import (
    Controller,
    LoadWindow,
    Observation,
    Planner,
    PlanWindow,
    SpeedWatch,
    WorthMoving,
)
from moeless_opt.runtime.control.decision import same_replicas

MODEL = ModelSpec(name="small", layers=3, experts=8, top_k=2, hidden=64, ffn=64)
TOPOLOGY = Topology.uniform(1, 4, slots=3)
LIVE = np.tile(np.array([[0, 1, -1], [2, 3, -1], [4, 5, -1], [6, 7, -1]], dtype=np.int32), (3, 1, 1))
READS = TimeModel(token_cost=1e-7, activation_cost=1e-4, unit="s")  # decode: what is read counts
COUNTS = TimeModel(token_cost=1e-6, activation_cost=1e-9, unit="s")  # prompts: tokens count


def planner() -> Planner:
    return Planner(topology=TOPOLOGY, options={"model": MODEL})


def paying(time: TimeModel, **more: float) -> WorthMoving:
    return WorthMoving(planner(), TOPOLOGY, MODEL, lambda: time, **more)


def loads(heavy: float) -> FloatArray:
    """One layer with a hot expert, two even ones."""
    load = np.full((3, 8), 100.0)
    load[0, 0] = heavy
    return load


def changed(plan: Plan) -> list[bool]:
    return [not same_replicas(plan.slots_LGC[x][None], LIVE[x][None]) for x in range(3)]


def test_a_window_of_short_passes_moves_nothing_that_only_reads_more() -> None:
    load = loads(400.0)
    assert planner()(load, LIVE).moves.count > 0  # by tokens it would
    plan = paying(READS).plan_window(load, LIVE, 64)
    assert plan.moves.count == 0
    assert changed(plan) == [False] * 3


def test_layers_that_gain_change_and_others_stay() -> None:
    plan = paying(COUNTS).plan_window(loads(5000.0), LIVE, 1)
    assert changed(plan) == [True, False, False]
    np.testing.assert_allclose(
        [
            [plan.share_LGC[x][plan.slots_LGC[x] == e].sum() for e in range(8)]
            for x in range(3)
        ], 1.0
    )  # fmt: skip


def test_sharing_that_costs_more_than_it_saves_pays_for_no_move() -> None:
    load = loads(5000.0)
    assert any(changed(paying(COUNTS, split=1e-4).plan_window(load, LIVE, 1)))
    assert not any(changed(paying(COUNTS, split=1.0).plan_window(load, LIVE, 1)))
    assert not any(changed(paying(COUNTS, gain=0.9).plan_window(load, LIVE, 1)))


def test_draws_are_the_same_each_time_and_nothing_is_drawn_of_nothing() -> None:
    load = np.array([[3.0, 0, 1, 1, 1, 1, 1, 0]] * 3)
    once, again = (paying(COUNTS, gain=0.2).plan_window(load, LIVE, 1).slots_LGC for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert paying(COUNTS, gain=0.2).plan_window(np.zeros((3, 8)), LIVE, 4).moves.count == 0


def test_the_controller_says_how_many_passes_a_window_had() -> None:
    class Told:
        def __init__(self) -> None:
            self.passes: list[float] = []

        def plan_window(self, load_LE: FloatArray, live_LGC: SlotArray, passes: float) -> Plan:
            self.passes.append(passes)
            return planner()(load_LE, live_LGC)

    class Still:
        layers = range(3)
        slots_LGC = LIVE

        def observe(self) -> Observation:
            ones = np.ones((3, 4))
            return Observation(
                load_LE=np.full((3, 8), 4), tokens_LG=ones.astype(int), seconds_LG=ones, batches=6
            )

        def apply(self, plan: Plan, **limits: object) -> int:
            return 1

    told = Told()
    assert isinstance(told, PlanWindow)
    controller = Controller(Still(), told, every=6, decay=0.5)  # type: ignore[arg-type]
    for _ in range(2):
        controller.after(6)
    assert told.passes == [6, 9]


def test_what_makes_no_sense_is_named() -> None:
    with pytest.raises(ProblemError, match="draws"):
        WorthMoving(planner(), TOPOLOGY, MODEL, lambda: READS, draws=1)
    with pytest.raises(ProblemError, match="gain"):
        paying(READS, gain=-0.1)


def test_a_slow_gpu_is_worth_moves_once_it_is_known() -> None:
    load, worth = np.full((3, 8), 1000.0), paying(COUNTS)
    assert changed(worth.plan_window(load, LIVE, 1)) == [False] * 3
    assert worth.at_speeds is not None
    slow = worth.at_speeds(np.array([0.25, 1.0, 1.0, 1.0]))
    plan = slow.plan_window(load, LIVE, 1)
    assert changed(plan) == [True] * 3
    rows_G = (1000.0 * plan.share_LGC).sum((0, 2))
    assert rows_G[0] < 0.5 * rows_G[1:].min()
    # A layer that stays is shared by these speeds as well.
    spread = np.concatenate([LIVE[:, :, :2], np.roll(LIVE[:, :, :1], -1, axis=1)], axis=2)
    stays = paying(COUNTS, gain=9.0).at_speeds
    assert stays is not None
    kept = stays(np.array([0.25, 1.0, 1.0, 1.0])).plan_window(load, spread, 1)
    assert kept.moves.count == 0
    assert (1000.0 * kept.share_LGC).sum((0, 2)).argmin() == 0
    assert changed(worth.plan_window(load, LIVE, 1)) == [False] * 3, "the first one is as it was"


def test_speeds_are_followed_or_refused() -> None:
    class Idle:
        slots_LGC = LIVE

    Controller(Idle(), paying(COUNTS), speeds=SpeedWatch())  # type: ignore[arg-type]
    deaf = WorthMoving(lambda load, live: planner()(load, live), TOPOLOGY, MODEL, lambda: COUNTS)
    with pytest.raises(ProblemError, match="planner: has no at_speeds"):
        Controller(Idle(), deaf, speeds=SpeedWatch())  # type: ignore[arg-type]


def test_passes_of_different_sizes_are_drawn_as_large_as_most_of_their_tokens_see_them() -> None:
    """A prompt among fifteen passes that write: what it takes is what there is to save."""
    load = loads(5000.0)
    none = np.zeros((3, 4))
    window, even = LoadWindow(decay=0.0), LoadWindow(decay=0.0)
    seen = Observation(load_LE=load.astype(int), tokens_LG=none.astype(int), seconds_LG=none, batches=64)
    even.update(seen)
    window.update(replace(seen, even=1.1))
    assert (even.passes, window.passes) == (64, 1.1)
    wanted = LIVE.copy()
    wanted[0, 1:, 2] = 0  # the hot expert everywhere
    both = paying(TimeModel(token_cost=1e-6, activation_cost=2e-3, unit="s"))
    assert both._pays(load, LIVE, wanted, even.passes).tolist() == [False] * 3
    assert both._pays(load, LIVE, wanted, window.passes).tolist() == [True, False, False]
