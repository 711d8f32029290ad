"""What planning may do to serving: nothing; and states of other ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Plan, check_slots
from moeless_opt.problems.spec import Topology
from moeless_opt.runtime.control import Controller, Planner
from moeless_opt.runtime.serve import PlanEvent, Planning, Sampling, ServeRequest
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet
from moeless_opt.runtime.serve.engine.channel import queue_channels
from moeless_opt.runtime.serve.engine.restarts import Restarts
from moeless_opt.runtime.serve.engine.state import ServeState, read_state, slots_for, write_state
from moeless_opt.runtime.serve.engine.steering import _Fitting, _Watched, check_planning
from moeless_opt.runtime.serve.engine.worker import Worker
from moeless_opt.runtime.tiny_moe import model as tiny
from tests.runtime.worlds import run_world


def broken(load_LE: FloatArray, slots_LGC: SlotArray) -> Plan:
    raise RuntimeError("the planner broke")


def test_a_planner_that_breaks_ends_planning_and_not_serving() -> None:
    front, back = queue_channels()
    worker = Worker(EngineOptions(kv_blocks=16, context_length=64), back, 64, frozenset())
    steering = worker.steering
    steering._controller = Controller(_Watched(steering), broken, every=2)
    prompt = tiny.encode("And")
    rule = Sampling(temperature=0, max_tokens=8, ignore_end=True)
    front.send(("submit", (ServeRequest(id="x", prompt=tuple(prompt), sampling=rule), len(prompt))))
    tokens: list[int] = []
    while len(tokens) < 8:
        worker.step()
        for kind, content in front.take(0):
            if kind == "tokens":
                tokens += [pick.token for _, pick, _, _ in content]
    assert tokens == list(tiny.generate(tiny.load(), "And", 8))
    assert [e.kind for e in steering.events] == ["failed"]
    assert "the planner broke" in steering.events[0].detail
    assert steering.planning.paused
    front.send(("order", (1, "planning", Planning(every=3))))
    worker.step()
    assert not steering.planning.paused


def test_lost_ranks_are_started_anew_ever_later_and_not_for_ever() -> None:
    now = 0.0
    restarts = Restarts(4, clock=lambda: now)
    assert [restarts.next(2) for _ in range(6)] == [0.0, 1.0, 2.0, 4.0, None, None]
    assert restarts.next(1) == 0.0, "each rank by itself"
    restarts.serves(1)
    now = 299.0
    assert restarts.next(1) == 1.0, "it has not served long enough"
    restarts.serves(1)
    now = 599.0
    assert restarts.next(1) == 0.0
    assert restarts.count == 7
    assert Restarts(0).next(0) is None


def test_planners_take_a_placement_that_is_wider_than_their_slots() -> None:
    topology = Topology.uniform(1, 4, slots=5)
    planner = _Fitting(Planner(topology=topology, solver="eplb", split="equal"), topology)
    load_LE = np.arange(32.0).reshape(2, 16)
    wide_LGC = np.stack([np.stack([np.roll(np.arange(16), -g)[:9] for g in range(0, 16, 4)])] * 2)
    plan = planner(load_LE, wide_LGC.astype(np.int32))
    for slots_GC in (*plan.slots_LGC, planner.plan_layer(0, load_LE[0], wide_LGC[0].astype(np.int32))):
        check_slots(slots_GC, 16, np.full(4, 5))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_state_serves_any_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    slots = np.stack([np.stack([np.arange(9), np.arange(7, 16)])] * 3).astype(np.int32)
    load = np.arange(48).reshape(3, 16)
    state = ServeState(
        model="m", experts=16, slots_LGC=slots, load_LE=load, planning=Planning(every=9), asked=Planning()
    )
    file = str(tmp_path / "state.json")
    write_state(file, state)
    again = read_state(file, "m", 3, 16)
    assert again is not None
    assert np.array_equal(again.slots_LGC, slots)
    assert again.planning == state.planning
    found = slots_for(again, ranks, None)
    assert found.shape[:2] == (3, ranks)
    for slots_GC in found:
        check_slots(slots_GC, 16, np.full(ranks, 16))
    assert (ranks != 2) or np.array_equal(found, slots)


def test_a_state_that_cannot_be_used_is_said_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "state.json"
    assert read_state(str(file), "m", 3, 16) is None
    assert not caplog.records
    for text in ("", "{", "[]", '{"format": "moeless-plan", "version": 1}'):
        file.write_text(text)
        assert read_state(str(file), "m", 3, 16) is None
        assert not file.exists()
        assert max(tmp_path.iterdir(), key=lambda one: (len(one.name), one.name)).read_text() == text
    good = ServeState(
        model="m",
        experts=2,
        slots_LGC=np.array([[[0, 1]]], dtype=np.int32),
        load_LE=np.ones((1, 2), dtype=np.int64),
        planning=Planning(),
        asked=Planning(),
    )
    write_state(str(file), good)
    for model, layers, experts in (("other", 1, 2), ("m", 2, 2), ("m", 1, 3)):
        write_state(str(file), good)
        assert read_state(str(file), model, layers, experts) is None
    assert len(caplog.records) == 7


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"slots": 7}, "slots"),
        ({"policy": "eplb", "max_moves": 3}, "max_moves"),
        ({"max_step_bytes": 9, "keep_alive": 1.0}, "max_step_bytes"),
        ({"policy": "per-layer", "max_step_bytes": 9}, "max_step_bytes"),
        ({"policy": "windowed", "max_step_bytes": 9}, "max_step_bytes: is 9, less than one expert"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ProblemError, match=f"^{field}"):
        check_planning(Planning(**settings), 16, 2, 1000)  # type: ignore[arg-type]


def test_who_changes_one_setting_undoes_nobodys_change_of_another() -> None:
    engine, (front, _) = Fleet(EngineOptions()), queue_channels()
    fleet: Any = engine
    fleet._crew, fleet._ready, fleet._alive = (
        SimpleNamespace(channels=[front]),
        {0: {"expert_bytes": [1]}},
        [1],
    )

    def ask(**change: Any) -> threading.Thread:
        asker = threading.Thread(target=engine.set_planning, kwargs=change, daemon=True)
        asker.start()
        return asker

    def ordered(number: int) -> Planning:
        end = time.monotonic() + 30
        while fleet._ordered < number:
            assert time.monotonic() < end
            time.sleep(0.01)
        return next(planning for order, _, planning in fleet._orders if order == number)

    def carry_out(number: int) -> None:
        planning = ordered(number)
        event = PlanEvent(number=number, at=0.0, passes=0, kind="settings")
        told = {"events": [], "answers": [(number, event)], "carried_out": number, "planning": planning}
        with fleet._changed:
            fleet._heard(told)
            fleet._changed.notify_all()

    askers = [ask(every=7), ask(policy="static")]
    time.sleep(0.2)  # both have asked before either is answered
    carry_out(1)
    carry_out(2)
    assert engine.planning() == Planning(every=7, policy="static")
    # An order that nobody waits for any more is carried out all the same, once the ranks can.
    fleet._order("planning", Planning(every=9))
    askers.append(ask(policy="eplb"))
    assert ordered(4) == Planning(every=9, policy="eplb")
    carry_out(4)
    for asker in askers:
        asker.join(30)
        assert not asker.is_alive()
    assert engine.planning() == Planning(every=9, policy="eplb")


@pytest.mark.slow
def test_a_planner_that_breaks_on_one_rank_alone_ends_planning_on_all() -> None:
    one, other = run_world("worker_serve.py", 2)
    assert one == other
    assert one["tokens"] == [list(tiny.generate(tiny.load(), "And", 12))] * 3
