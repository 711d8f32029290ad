"""The simulation against a live model: same controller and traffic, so the same loads and plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.models import ModelSpec
from moeless_opt.problems.time_model import TimeModel
from moeless_opt.runtime.controller import Controller, Planner
from moeless_opt.runtime.sim_time import Machine
from moeless_opt.runtime.sim_traffic import Passes
from moeless_opt.runtime.simulator import SimulatedBackend, simulate

RANKS, SLOTS, LAYERS, EXPERTS = 4, 4, 3, 8


def traffic(load_BLE: np.ndarray) -> list[Passes]:
    """One item per pass."""
    return [
        Passes(
            start_B=np.zeros(1),
            weight_B=np.ones(1),
            tokens_B=load_LE[:1].sum(1) / 2,
            kv_tokens_B=np.zeros(1),
            prefill_B=np.ones(1, dtype=np.bool_),
            load_BLE=load_LE[None],
        )
        for load_LE in load_BLE
    ]


def test_the_simulation_decides_as_the_live_model(run_world: Callable[..., list[Any]]) -> None:
    results = run_world("worker_simulator.py", RANKS)
    live = results[0]
    assert all(other == live for other in results[1:])  # every rank saw and decided the same
    load_BLE = np.array(live["loads"], dtype=float)
    topology = mo.uniform(1, RANKS, slots=SLOTS)
    machine = Machine(
        topology=topology,
        model=ModelSpec(name="tiny", layers=LAYERS, experts=EXPERTS, top_k=2, hidden=64, ffn=96),
        time=TimeModel(token_cost=1e-6, unit="s"),
        flops=1e12,
        bandwidth=1e11,
    )
    start = np.array(live["start"], dtype=np.int32)
    backend = SimulatedBackend(
        machine, start, np.full((LAYERS, RANKS), SLOTS), shares="balanced", transfers="exposed"
    )
    rows: list[np.ndarray] = []
    observe = backend.observe

    def remembered() -> Any:
        seen = observe()
        rows.append(seen.tokens_LG)
        return seen

    backend.observe = remembered  # type: ignore[method-assign]
    controller = Controller(backend, Planner(topology=topology), every=1)
    simulate(backend, traffic(load_BLE), controller)
    assert len(controller.decisions) == len(live["decisions"])
    for simulated, lived in zip(controller.decisions, live["decisions"], strict=True):
        assert simulated.plan.slots_LGC.tolist() == lived["slots"]
        assert simulated.plan.moves.count == lived["moves"]
    assert any(decision["moves"] for decision in live["decisions"])
    # Rows per rank: the live dispatcher sends whole tokens of several sources, the simulation fractions.
    largest = np.array(rows).max(2)
    lived = np.array(live["tokens"]).max(2)
    assert (np.abs(largest - lived) <= 2 + 0.05 * lived).all()
