"""The controller over a backend that writes down what it is told."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InvalidPlanError, ProblemError
from moeless_opt.problems.spec.placement import contiguous, held_LGE
from moeless_opt.runtime.control.backend import MemoryReport, Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner

L, G, E = 2, 4, 8
TOPOLOGY = mo.uniform(1, G, slots=3)


class Notebook:
    """A backend that applies at once."""

    def __init__(self, loads: list[np.ndarray]) -> None:
        self.loads = loads
        self.layers: Sequence[int] = range(L)
        self.slots_LGC = contiguous(E, np.full((L, G), 3))
        self.applied: list[Any] = []
        self.shares: list[Any] = []

    def observe(self) -> Observation:
        load = self.loads.pop(0)
        none = np.zeros((L, G))
        return Observation(load_LE=load, tokens_LG=none.astype(np.int64), seconds_LG=none, batches=1)

    def apply(self, plan: Any, **limits: Any) -> int:
        self.applied.append(plan)
        self.slots_LGC = getattr(plan, "slots_LGC", plan)
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


def test_the_first_look_may_come_before_the_others() -> None:
    backend = Notebook([skewed(0), skewed(0), skewed(5)])
    controller = Controller(backend, Planner(topology=TOPOLOGY), every=4, first=2)
    decided = [controller.after() for _ in range(10)]
    assert [i for i, d in enumerate(decided) if d is not None] == [1, 5, 9]
    with pytest.raises(ProblemError, match="first"):
        Controller(backend, Planner(topology=TOPOLOGY), first=0)


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
    idle = Controller(backend, Planner(topology=TOPOLOGY)).before(np.zeros((L, E)))
    assert idle.applied is None  # a pass without tokens changes nothing


def test_bad_arguments() -> None:
    backend = Notebook([])
    with pytest.raises(ProblemError, match="lag"):
        Controller(backend, Planner(topology=TOPOLOGY), every=4, lag=4)
    with pytest.raises(ProblemError, match="every"):
        Controller(backend, Planner(topology=TOPOLOGY), every=0)
    with pytest.raises(ProblemError, match="decay"):
        Controller(backend, Planner(topology=TOPOLOGY), decay=1.0)


@pytest.mark.parametrize("wrong", [None, [[0, 1]], np.zeros((G, 2)), np.zeros((G + 1, 2), int), np.int64(3)])
def test_what_is_no_plan_of_a_planner_is_refused(wrong: Any) -> None:
    controller = Controller(Notebook([skewed(0)]), lambda load_LE, slots_LGC: wrong, every=1)
    with pytest.raises(ProblemError, match=r"^planner: returned .*must return a Plan"):
        controller.after()
    other = mo.plan([[1.0] * E], mo.uniform(1, G, slots=3))  # of one layer
    controller = Controller(Notebook([skewed(0)]), lambda load_LE, slots_LGC: other, every=1)
    with pytest.raises(ProblemError, match=r"^planner: returned a plan of \(1, 4\) layers and GPUs"):
        controller.after()
    single = SimpleNamespace(plan_layer=lambda layer, load_E, slots_GC: wrong)
    with pytest.raises(ProblemError, match=r"^planner: returned .*must return whole numbers \[4 GPUs"):
        Controller(Lanes(), single).before_layer(0, skewed(0)[0].astype(float))


class Single:
    """Puts the busiest expert everywhere; knows single layers only."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def plan_layer(self, layer: int, load_E: np.ndarray, slots_GC: np.ndarray) -> np.ndarray:
        self.seen.append((layer, float(load_E.sum())))
        rows = [list(range(g * E // G, (g + 1) * E // G)) for g in range(G)]
        hot = int(load_E.argmax())
        full = [row if hot in row else [*row, hot] for row in rows]
        return np.array([row + [-1] * (3 - len(row)) for row in full], dtype=np.int32)


class Lanes(Notebook):
    """A backend whose layers move by themselves; what it is offered comes at once into force."""

    group = None

    def __init__(self) -> None:
        super().__init__([])
        self.open = threading.Event()
        self.open.set()
        self.offers: list[tuple[int, str]] = []
        self.waiting: set[int] = set()

    def open_layer(self, layer: int) -> Any:
        if layer in self.waiting:
            return None
        self.waiting.add(layer)
        return SimpleNamespace(number=len(self.waiting), layer=layer, base_GC=self.slots_LGC[layer])

    def offer_layer(self, ticket: Any, slots_GC: Any, error: str = "") -> None:
        self.offers.append((ticket.layer, error))
        self.waiting.discard(ticket.layer)
        if not error:
            self.slots_LGC[ticket.layer] = slots_GC

    def apply_layer(self, layer: int, slots_GC: np.ndarray) -> int:
        self.slots_LGC[layer] = slots_GC
        return 7

    def side_group(self) -> Any:
        return SimpleNamespace(sum=lambda load_E: 4 * load_E, close=lambda: None)


def test_layers_have_the_models_own_numbers() -> None:
    backend, planner = Lanes(), Single()
    backend.layers = [3, 5]
    controller = Controller(backend, planner)
    loads = np.eye(E)[:L] * 7
    assert [d.layer for d in controller.before(loads)] == [3, 5]  # type: ignore[union-attr]
    assert [index for index, _ in planner.seen] == [0, 1]
    with pytest.raises(ProblemError, match=r"layer: is 1, must be one of \[3, 5\]"):
        controller.before_layer(1, loads[1])
    assert planner.seen[2:] == []
    controller.close()


class Later:
    """A prediction that takes its time."""

    def __init__(self, load_E: np.ndarray, ready: threading.Event) -> None:
        self.it, self.ready = load_E, ready

    def load_E(self) -> np.ndarray:
        assert self.ready.wait(30)
        if self.it.size == 0:
            raise RuntimeError("the gate is broken")
        return self.it


def test_one_layer_at_a_time_in_the_callers_time() -> None:
    loads = skewed(3).astype(float)
    plain, lanes = Notebook([]), Lanes()
    for backend, number in ((plain, 1), (lanes, 7)):
        controller = Controller(backend, Single())
        decision = controller.before_layer(1, loads[1])
        assert decision is not None
        assert (decision.layer, decision.applied) == (1, number)
        assert (backend.slots_LGC[1] == 3).sum() == G
        assert (backend.slots_LGC[0] == 3).sum() == 1
        again = controller.before_layer(1, loads[1])
        assert again is not None
        assert again.applied is None
        nothing = controller.before_layer(0, np.zeros(E))
        assert nothing is not None
        assert nothing.applied is None
    # All layers of a pass at once, where the planner knows layers alone.
    decisions = Controller(plain, Single()).before(loads)
    assert isinstance(decisions, list)
    assert [d.applied for d in decisions] == [2, None]
    with pytest.raises(ProblemError, match="windowed"):
        Controller(Notebook([skewed(0)]), Single(), every=1).after()
    with pytest.raises(ProblemError, match="plan_layer"):
        Controller(plain, lambda loads, live: None).before_layer(0, loads[0])  # type: ignore[arg-type,return-value]


def test_a_thread_plans_predictions_and_nobody_waits_for_it() -> None:
    ready, backend, planner = threading.Event(), Lanes(), Single()
    controller = Controller(backend, planner)
    loads = skewed(5).astype(float)
    before = backend.slots_LGC.copy()
    assert controller.before_layer(0, Later(loads[0], ready)) is None
    assert controller.before_layer(0, Later(loads[0], ready)) is None  # left alone: its plan is being made
    assert controller.before_layer(1, Later(loads[1], ready), summed=True) is None
    assert (backend.slots_LGC == before).all()
    ready.set()
    controller.drain()
    assert planner.seen == [(0, 4 * loads[0].sum()), (1, loads[1].sum())]
    assert backend.offers == [(0, ""), (1, "")]
    assert (backend.slots_LGC == 5).sum() == L * G
    # What goes wrong in it is told to the backend, which waits for word, and to whoever asks.
    controller.before_layer(0, Later(np.zeros(0), ready))
    controller.drain()
    assert backend.offers[-1] == (0, "RuntimeError: the gate is broken")
    assert controller.layer_decisions[-1].error == "RuntimeError: the gate is broken"
    controller.close()


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0], [2, 3], [4, 5], [6, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 1]],
        [[0, 1, 2, 3, 4], [5, -1, -1, -1, -1], [6, -1, -1, -1, -1], [7, -1, -1, -1, -1]],
    ],
)
def test_no_layer_is_applied_that_does_not_pass_the_verifier(rows: list[list[int]]) -> None:
    backend = Lanes()

    class Wrong:
        topology = TOPOLOGY

        def plan_layer(self, layer: int, load_E: np.ndarray, slots_GC: np.ndarray) -> np.ndarray:
            return np.array(rows, dtype=np.int32)

    controller = Controller(backend, Wrong())
    before = backend.slots_LGC.copy()
    with pytest.raises(InvalidPlanError):
        controller.before_layer(0, skewed(0)[0].astype(float))
    ready = threading.Event()
    ready.set()
    controller.before_layer(1, Later(skewed(0)[1].astype(float), ready))
    controller.close()
    assert "InvalidPlanError" in backend.offers[0][1]
    assert (backend.slots_LGC == before).all()


def test_a_simulation_is_planned_layer_by_layer_as_all_at_once() -> None:
    from moeless_opt.problems.spec.architecture import ModelSpec
    from moeless_opt.problems.spec.time_model import TimeModel
    from moeless_opt.runtime.simulate.backend import SimulatedBackend
    from moeless_opt.runtime.simulate.machine import Machine
    from moeless_opt.runtime.simulate.traffic import Passes

    capacity_LG = np.full((L, G), 3)
    machine = Machine(
        topology=TOPOLOGY,
        model=ModelSpec(name="m", layers=L, experts=E, top_k=2, hidden=4096, ffn=8192),
        time=TimeModel(token_cost=1e-6, unit="s"),
        flops=1e12,
        bandwidth=1e11,
    )
    loads = skewed(6).astype(float)
    ran = []
    for one_by_one in (True, False):
        backend = SimulatedBackend(machine, contiguous(E, capacity_LG), capacity_LG, transfers="per-pass")
        controller = Controller(backend, Planner(topology=TOPOLOGY))
        if one_by_one:
            for layer in range(L):
                controller.before_layer(layer, loads[layer])
        else:
            controller.before(loads)
        backend.run(
            Passes(
                start_B=np.zeros(1),
                weight_B=np.ones(1),
                tokens_B=np.ones(1),
                kv_tokens_B=np.zeros(1),
                prefill_B=np.ones(1, dtype=np.bool_),
                load_BLE=loads[None],
            )
        )
        ran.append((held_LGE(backend.slots_LGC, E), backend.report))
    assert np.array_equal(ran[0][0], ran[1][0])
    assert ran[0][1].moved == ran[1][1].moved > 0
    for name in ("layer_BL", "exposed_BL"):
        assert np.allclose(getattr(ran[0][1], name)[0], getattr(ran[1][1], name)[0])
    assert ran[0][1].exposed_BL[0].min() > 0


def test_the_runtime_is_imported_without_torch() -> None:
    code = (
        "import sys, moeless_opt.runtime as r\n"
        "r.Controller, r.Planner\n"
        "assert 'torch' not in sys.modules\n"
        "from moeless_opt.runtime import attach\n"
        "assert 'torch' in sys.modules\n"
    )
    pytest.importorskip("megatron.core")
    import subprocess
    import sys

    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
