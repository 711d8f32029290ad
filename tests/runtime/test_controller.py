"""The controller over a backend that writes down what it is told."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.placement import held_LGE
from moeless_opt.runtime.backend import MemoryReport, Observation
from moeless_opt.runtime.controller import Controller, Planner
from moeless_opt.solvers.static import contiguous

L, G, E = 2, 4, 8
TOPOLOGY = mo.uniform(1, G, slots=3)


class Notebook:
    """A backend that applies at once."""

    def __init__(self, loads: list[np.ndarray]) -> None:
        self.loads = loads
        self.slots_LGC = contiguous(E, np.full((L, G), 3))
        self.applied: list[Any] = []
        self.shares: list[Any] = []

    def observe(self) -> Observation:
        load = self.loads.pop(0)
        none = np.zeros((L, G))
        return Observation(load_LE=load, tokens_LG=none.astype(np.int64), seconds_LG=none, batches=1)

    def apply(self, plan: Any, **limits: Any) -> int:
        self.applied.append(plan)
        self.slots_LGC = plan.slots_LGC
        return len(self.applied)

    def set_shares(self, shares: Any) -> None:
        self.shares.append(shares)

    def memory(self) -> MemoryReport:
        raise NotImplementedError


def skewed(hot: int) -> np.ndarray:
    load = np.full((L, E), 10, dtype=np.int64)
    load[:, hot] = 200
    return load


def test_it_plans_every_so_many_passes_from_what_is_live() -> None:
    backend = Notebook([skewed(0), skewed(0), skewed(5)])
    controller = Controller(backend, Planner(topology=TOPOLOGY), every=4, share="balanced")
    assert backend.shares == ["balanced"]
    decided = [controller.after() for _ in range(12)]
    assert [i for i, d in enumerate(decided) if d is not None] == [3, 7, 11]
    first, second, third = (d for d in decided if d is not None)
    assert first.applied == 1
    assert first.plan.imbalance_L.max() < 1.05
    # The same loads again: nothing to move, nothing applied; shares are the backend's business.
    assert second.applied is None
    assert second.plan.moves.count == 0
    assert third.applied == 2
    assert np.array_equal(held_LGE(backend.slots_LGC, E), held_LGE(third.plan.slots_LGC, E))
    assert third.plan.moves.count < third.plan.replicas / 2


def test_several_passes_at_once_and_empty_windows() -> None:
    backend = Notebook([np.zeros((L, E), dtype=np.int64), skewed(1)])
    controller = Controller(backend, Planner(topology=TOPOLOGY), every=10)
    assert controller.after(25) is None  # nothing was routed: nothing is known
    assert controller.after(9) is None
    assert controller.after(1) is not None


def test_old_loads_fade() -> None:
    seen: list[np.ndarray] = []

    def planner(load_LE: np.ndarray, live_LGC: np.ndarray) -> mo.Plan:
        seen.append(load_LE.copy())
        return mo.plan(load_LE, TOPOLOGY, current=live_LGC)

    controller = Controller(Notebook([skewed(0), skewed(1)]), planner, every=1, decay=0.5)
    controller.after()
    controller.after()
    assert np.array_equal(seen[1], 0.5 * skewed(0) + skewed(1))


def test_planning_beside_the_passes_switches_at_a_fixed_pass() -> None:
    release = threading.Event()
    caller = threading.get_ident()
    threads = []

    def planner(load_LE: np.ndarray, live_LGC: np.ndarray) -> mo.Plan:
        threads.append(threading.get_ident())
        release.wait(30)
        return mo.plan(load_LE, TOPOLOGY, current=live_LGC)

    backend = Notebook([skewed(0), skewed(3)])
    controller = Controller(backend, planner, every=5, lag=2)
    try:
        assert [controller.after() for _ in range(6)] == [None] * 6  # planning has begun, nobody waits
        release.set()
        decision = controller.after()  # pass 7: two after the loads were taken
        assert decision is not None
        assert (decision.at_pass, decision.applied) == (5, 1)
        assert threads[0] != caller
    finally:
        release.set()
        controller.close()


def test_the_thread_decides_as_the_caller_would() -> None:
    plans = []
    for lag in (0, 1):
        backend = Notebook([skewed(0), skewed(4), skewed(7)])
        controller = Controller(backend, Planner(topology=TOPOLOGY), every=3, lag=lag)
        controller_plans = [controller.after() for _ in range(11)]
        controller.close()
        plans.append([d.plan.slots_LGC for d in controller_plans if d is not None])
    assert len(plans[0]) == len(plans[1]) == 3
    for a, b in zip(*plans, strict=True):
        assert np.array_equal(a, b)


def test_per_layer_mode_plans_the_prediction() -> None:
    backend = Notebook([])
    controller = Controller(
        backend,
        Planner(
            topology=TOPOLOGY,
            solver="moeless",
            split="equal",
            options={"sizing": mo.Sizing(policy="cv", cv=0.2)},
        ),
    )
    decision = controller.before(skewed(2).astype(float))
    assert decision.applied == 1
    assert (backend.slots_LGC == 2).sum() == L * G  # the hot expert is everywhere
    assert controller.before(skewed(2).astype(float)).applied is None


def test_bad_arguments() -> None:
    backend = Notebook([])
    with pytest.raises(ProblemError, match="lag"):
        Controller(backend, Planner(topology=TOPOLOGY), every=4, lag=4)
    with pytest.raises(ProblemError, match="every"):
        Controller(backend, Planner(topology=TOPOLOGY), every=0)
    with pytest.raises(ProblemError, match="decay"):
        Controller(backend, Planner(topology=TOPOLOGY), decay=1.0)
