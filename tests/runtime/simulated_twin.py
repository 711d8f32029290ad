"""A live run again, in the simulator: the same controller over the loads that the live model saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.traffic import Passes


def planner(name: str, ranks: int, slots: int) -> Planner:
    """The planner of a policy, live and simulated."""
    topology = mo.uniform(1, ranks, slots=slots)
    if name == "eplb":
        return Planner(topology=topology, solver="eplb", split="equal")
    return Planner(topology=topology)


def passes(load_LE: np.ndarray) -> Passes:
    """One forward pass of traffic."""
    return Passes(
        start_B=np.zeros(1),
        weight_B=np.ones(1),
        tokens_B=load_LE[:1].sum(1) / 2,
        kv_tokens_B=np.zeros(1),
        prefill_B=np.ones(1, dtype=np.bool_),
        load_BLE=load_LE[None],
    )


def filled(slots_GC: list[list[int]]) -> list[list[int]]:
    """What each GPU holds: empty slots, and the order of the others, may differ between the two worlds."""
    return [sorted(e for e in row if e >= 0) for row in slots_GC]


@dataclass
class Twin:
    """What the simulation did, pass by pass.

    loads [B, L, E], tokens_BLG, experts_BL (seconds of the expert phase), slots of every decision, its moves.
    """

    loads: np.ndarray
    tokens_BLG: np.ndarray
    experts_BL: np.ndarray
    slots: list[Any]
    moves: list[int]


def machine(setting: dict[str, Any], ranks: int, time: TimeModel) -> Machine:
    """The ranks as a machine."""
    return Machine(
        topology=mo.uniform(1, ranks, slots=setting["slots"]),
        model=ModelSpec(
            name="tiny",
            layers=setting["layers"],
            experts=8,
            top_k=2,
            hidden=setting["hidden"],
            ffn=setting["ffn"],
        ),
        time=time,
        flops=1e12,
        bandwidth=1e11,
    )


def simulate(name: str, live: dict[str, Any], setting: dict[str, Any], ranks: int, time: TimeModel) -> Twin:
    """Run a policy over the loads of a live run."""
    backend = SimulatedBackend(
        machine(setting, ranks, time),
        np.array(live["start"], dtype=np.int32),
        np.full((setting["layers"], ranks), setting["slots"]),
        shares="equal" if name == "eplb" else "balanced",
        transfers="exposed",
    )
    seen: list[Any] = []
    observe = backend.observe

    def remembered() -> Any:
        seen.append(observe())
        return seen[-1]

    backend.observe = remembered  # type: ignore[method-assign]
    controller = Controller(backend, planner(name, ranks, setting["slots"]), every=1)
    slots: list[Any] = []
    moves: list[int] = []
    for step, load_LE in enumerate(np.array(live["loads"], dtype=float)):
        if name == "per-layer":
            made = []
            for lived in live["decisions"][step]["layers"]:
                decided = controller.before_layer(lived["layer"], np.array(lived["load"]))
                assert decided is not None
                made.append(filled(decided.slots_GC.tolist()))
            slots.append(made)
        backend.run(passes(load_LE))
        if name in ("static", "per-layer"):
            backend.observe()
        elif (decision := controller.after()) is not None:
            slots.append(decision.plan.slots_LGC.tolist())
            moves.append(decision.plan.moves.count)
    report = backend.report
    experts_BL = (
        np.concatenate(report.layer_BL)
        - np.concatenate(report.network_BL)
        - np.concatenate(report.exposed_BL)
    )
    return Twin(
        loads=np.array([one.load_LE for one in seen]),
        tokens_BLG=np.array([one.tokens_LG for one in seen]),
        experts_BL=experts_BL,
        slots=slots,
        moves=moves,
    )
