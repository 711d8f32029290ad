"""A live run again, in the simulator: the same controller over the loads that the live model saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.layer_planner import LayerPlanner
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.simulate.backend import SimulatedBackend, Terms
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.traffic import Passes

LAYERED = ("per-layer", "timed")
"""Policies that plan layer by layer, from a prediction."""


def believed(measured: TimeModel) -> TimeModel:
    """Times that a policy plans by: not those that judge it, but a line through them, a tenth off."""
    fit = measured.linear(1e5)
    return fit.replace(token_cost=1.1 * fit.token_cost, activation_cost=0.9 * fit.activation_cost)


def spec(setting: dict[str, Any]) -> ModelSpec:
    """The live model's dimensions."""
    return ModelSpec(
        name="tiny",
        layers=setting["layers"],
        experts=8,
        top_k=2,
        hidden=setting["hidden"],
        ffn=setting["ffn"],
    )


def planner(
    name: str, ranks: int, setting: dict[str, Any], time: TimeModel | None = None
) -> Planner | LayerPlanner:
    """The planner of a policy, live and simulated."""
    topology = mo.uniform(1, ranks, slots=setting["slots"])
    if name == "eplb":
        return Planner(topology=topology, solver="eplb", split="equal")
    if name == "timed":
        assert time is not None
        return LayerPlanner(topology, spec(setting), time)
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


def machine(setting: dict[str, Any], ranks: int, time: TimeModel, in_turn: bool = True) -> Machine:
    """The ranks as a machine."""
    return Machine(
        topology=mo.uniform(1, ranks, slots=setting["slots"]),
        model=spec(setting),
        time=time,
        in_turn=in_turn,
        flops=1e12,
        bandwidth=1e11,
    )


def simulate(
    name: str,
    live: dict[str, Any],
    setting: dict[str, Any],
    ranks: int,
    time: TimeModel,
    thought: TimeModel | None = None,
    *,
    in_turn: bool = True,
) -> Twin:
    """Run a policy over the loads of a live run: what takes `time`, and plans by `thought`."""
    backend = SimulatedBackend(
        machine(setting, ranks, time, in_turn),
        np.array(live["start"], dtype=np.int32),
        np.full((setting["layers"], ranks), setting["slots"]),
        shares={"eplb": "equal", "timed": "timed"}.get(name, "balanced"),
        transfers="exposed",
        terms=Terms(believed=thought),
    )
    seen: list[Any] = []
    observe = backend.observe

    def remembered() -> Any:
        seen.append(observe())
        return seen[-1]

    backend.observe = remembered  # type: ignore[method-assign]
    controller = Controller(backend, planner(name, ranks, setting, thought), every=1)
    slots: list[Any] = []
    moves: list[int] = []
    for step, load_LE in enumerate(np.array(live["loads"], dtype=float)):
        if name in LAYERED:
            made = []
            for lived in live["decisions"][step]["layers"]:
                decided = controller.before_layer(lived["layer"], np.array(lived["load"]))
                assert decided is not None
                made.append(filled(decided.slots_GC.tolist()))
            slots.append(made)
        backend.run(passes(load_LE))
        if name in ("static", *LAYERED):
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
