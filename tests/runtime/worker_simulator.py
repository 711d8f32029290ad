"""Ranks of `test_simulator_live` and of the benchmark: policies over a live model, what they saw and did.

worker_simulator.py '{"hidden": 64, ...}'   (see `DEFAULTS`)
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import worlds
from simulated_twin import LAYERED, believed, planner

from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.control.backend import Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.engines.observe import moe_blocks
from moeless_opt.runtime.live.dispatch.timed import TimedShares
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.predict.foresight import GatePredictor
from moeless_opt.runtime.predict.gates import plain_gates
from moeless_opt.runtime.predict.per_layer import PerLayer

DEFAULTS: dict[str, Any] = {
    "layers": 3,
    "hidden": 64,
    "ffn": 96,
    "sequences": 2,
    "length": 24,
    "passes": 8,
    "each": 3,  # passes until the traffic changes
    "slots": 4,
    "repeats": 1,
    "twice": False,  # every pass, of which the second is timed, as the per-layer mode has it
    "measure": False,
    "turns": 9,  # of the measurement
    "skew": 3,  # how few tokens of the vocabulary most of the traffic is
    "bias": 0.0,  # spread of the routers' biases, drawn anew when the traffic changes; 0: they have none
    "policies": ["static", "eplb", "windowed", "per-layer"],
}


def prefer(model: Any, domain: int, spread: float) -> None:
    """Let each layer's router prefer some experts: in part always the same ones, in part by domain.

    Those that it always prefers are neighbours in half of the layers: the worst for static placement.
    """
    for at, block in enumerate(moe_blocks(model)):
        chance = np.random.default_rng([at, domain])
        always = -np.linspace(-1.5, 1.5, worlds.EXPERTS)
        if at % 2:
            always = np.random.default_rng(at).permutation(always)
        bias = spread * (0.8 * always + 0.6 * chance.standard_normal(worlds.EXPERTS))
        block.mlp.router.expert_bias.copy_(torch.from_numpy(bias))


class Run:
    """One policy over some traffic; `time` is what its planner believes of the experts, where it asks."""

    def __init__(
        self, model: Any, name: str, batches: list[Any], setting: dict[str, Any], time: TimeModel | None
    ) -> None:
        self.model, self.name, self.batches, self.setting, self.time = model, name, batches, setting, time
        self.seen: list[Observation] = []
        self.decisions: list[dict[str, Any]] = []

    def forward(self, step: int) -> None:
        domain = step // self.setting["each"]
        if self.setting["bias"]:
            prefer(self.model, domain, self.setting["bias"])
        worlds.forward(self.model, self.batches[domain])

    def watch(self, live: LiveModel) -> None:
        observe = live.observe

        def remembered() -> Observation:
            self.seen.append(observe())
            return self.seen[-1]

        live.observe = remembered  # type: ignore[method-assign]

    def go(self) -> dict[str, Any]:
        live = attach(self.model)
        if self.setting["measure"]:
            for dispatcher in live.dispatchers:
                dispatcher.experts_watch.clock = time.thread_time
        start = live.slots_LGC.tolist()
        if self.name == "timed":
            assert self.time is not None
            live.set_shares(TimedShares(self.time))
        controller = Controller(live, planner(self.name, live.group.size, self.setting, self.time), every=1)
        self.watch(live)
        if self.name in LAYERED:
            self.layered(live, controller)
        else:
            self.windowed(live, controller)
        live.detach()
        controller.close()
        return {
            "start": start,
            "loads": [one.load_LE.tolist() for one in self.seen],
            "tokens": [one.tokens_LG.tolist() for one in self.seen],
            "seconds": [one.seconds_LG.tolist() for one in self.seen],
            "decisions": self.decisions,
        }

    def layered(self, live: LiveModel, controller: Controller) -> None:
        """Every pass twice: foreseen and planned, then under what was planned for it."""
        predictor = GatePredictor(plain_gates(self.model))
        for step in range(self.setting["passes"]):
            with PerLayer(live, controller, predictor):
                self.forward(step)
                controller.drain()
                live.settle()
            live.observe()
            self.seen.pop()
            self.forward(step)
            live.observe()
            of_pass = list(controller.layer_decisions)
            controller.layer_decisions.clear()
            assert not any(d.error for d in of_pass)
            made = [
                {"layer": d.layer, "load": d.load_E.tolist(), "slots": d.slots_GC.tolist()} for d in of_pass
            ]
            self.decisions.append({"layers": made})

    def windowed(self, live: LiveModel, controller: Controller) -> None:
        for step in range(self.setting["passes"]):
            if self.setting["twice"]:
                self.forward(step)
                live.observe()
                self.seen.pop()
            self.forward(step)
            if self.name == "static":
                live.observe()
                continue
            decision = controller.after()
            live.settle()
            if decision is not None:
                moved = decision.plan.moves.count
                self.decisions.append({"slots": decision.plan.slots_LGC.tolist(), "moves": moved})


def curve(model: Any, setting: dict[str, Any], size: int) -> TimeModel:
    """Times of the experts, measured as they run."""
    live = attach(model)
    # As many experts on every rank as a policy may put there.
    each = range(0, worlds.EXPERTS, worlds.EXPERTS // size)
    more = [[(first + i) % worlds.EXPERTS for i in range(setting["slots"])] for first in each]
    live.apply(np.array([more] * setting["layers"]))
    live.settle()
    most = setting["sequences"] * setting["length"] * size * 2
    tokens = np.unique(np.geomspace(1, 1.25 * most, 20).round().astype(int))
    found = live.measure(tokens.tolist(), repeats=setting["turns"], clock=time.thread_time)
    live.detach()
    return found


def main() -> None:
    setting = DEFAULTS | (json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
    rank, size = worlds.join()
    worlds.HIDDEN = setting["hidden"]
    wide = {"moe_ffn_hidden_size": setting["ffn"], "ffn_hidden_size": setting["ffn"]}
    if setting["bias"]:
        wide |= {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model = worlds.tiny_model(setting["layers"], 2, **wide)
    changes = -(-setting["passes"] // setting["each"])
    batches = [
        worlds.batch(rank, k, setting["sequences"], setting["length"], setting["skew"])
        for k in range(changes)
    ]
    results: dict[str, Any] = {"ranks": size, "setting": setting}
    found = None
    if setting["measure"]:
        measured = curve(model, setting, size)
        found = believed(measured)
        results["curve"] = {
            key: getattr(measured, f"curve_{key}").tolist() for key in ("tokens", "activated", "time")
        }
        costs = ("token_cost", "activation_cost", "launch")
        results["believed"] = {key: getattr(found, key) for key in costs}
    # In turns, so that a slow moment of the machine does not fall on one policy alone.
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in setting["policies"]}
    for _ in range(setting["repeats"]):
        for name in setting["policies"]:
            runs[name].append(Run(model, name, batches, setting, found).go())
    if setting["measure"]:
        after = curve(model, setting, size).curve_time
        assert after is not None
        results["curve"]["after"] = after.tolist()
    for name, several in runs.items():
        for other in several[1:]:
            assert other["loads"] == several[0]["loads"]
            assert other["decisions"] == several[0]["decisions"]
        results[name] = several[0] | {"seconds": [run["seconds"] for run in several]}
    worlds.report(results)


if __name__ == "__main__":
    main()
