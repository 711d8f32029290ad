"""Ranks of `test_simulator_live` and of the benchmark: policies over a live model, what they saw and did.

worker_simulator.py '{"hidden": 64, ...}'   (see `DEFAULTS`)
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import worlds
from simulated_twin import planner

from moeless_opt.runtime.control.backend import Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.engines.attach import attach
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
    "measure": False,
    "skew": 3,  # how few tokens of the vocabulary most of the traffic is
    "policies": ["static", "eplb", "windowed", "per-layer"],
}


class Run:
    """One policy over some traffic."""

    def __init__(self, model: Any, name: str, batches: list[Any], setting: dict[str, Any]) -> None:
        self.model, self.name, self.batches, self.setting = model, name, batches, setting
        self.seen: list[Observation] = []
        self.decisions: list[dict[str, Any]] = []

    def forward(self, step: int) -> None:
        worlds.forward(self.model, self.batches[step // self.setting["each"]])

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
        controller = Controller(live, planner(self.name, live.group.size, self.setting["slots"]), every=1)
        self.watch(live)
        if self.name == "per-layer":
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
            self.forward(step)
            if self.name == "static":
                live.observe()
                continue
            decision = controller.after()
            live.settle()
            if decision is not None:
                moved = decision.plan.moves.count
                self.decisions.append({"slots": decision.plan.slots_LGC.tolist(), "moves": moved})


def curve(model: Any, setting: dict[str, Any], size: int) -> dict[str, Any]:
    """Times of the experts, measured as they run."""
    live = attach(model)
    # As many experts on every rank as a policy may put there.
    each = range(0, worlds.EXPERTS, worlds.EXPERTS // size)
    more = [[(first + i) % worlds.EXPERTS for i in range(setting["slots"])] for first in each]
    live.apply(np.array([more] * setting["layers"]))
    live.settle()
    most = setting["sequences"] * setting["length"] * size * 2
    tokens = np.unique(np.geomspace(8, 1.25 * most, 14).round().astype(int) // 4 * 4)
    found = live.measure(tokens[tokens > 0].tolist(), repeats=9, quantile=0, clock=time.thread_time)
    live.detach()
    assert found.curve_tokens is not None
    assert found.curve_activated is not None
    assert found.curve_time is not None
    return {
        "tokens": found.curve_tokens.tolist(),
        "activated": found.curve_activated.tolist(),
        "time": found.curve_time.tolist(),
    }


def main() -> None:
    setting = DEFAULTS | (json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
    rank, size = worlds.join()
    worlds.HIDDEN = setting["hidden"]
    wide = {"moe_ffn_hidden_size": setting["ffn"], "ffn_hidden_size": setting["ffn"]}
    model = worlds.tiny_model(setting["layers"], 2, **wide)
    changes = -(-setting["passes"] // setting["each"])
    batches = [
        worlds.batch(rank, k, setting["sequences"], setting["length"], setting["skew"])
        for k in range(changes)
    ]
    results: dict[str, Any] = {"ranks": size, "setting": setting}
    if setting["measure"]:
        results["curve"] = curve(model, setting, size)
    # In turns, so that a slow moment of the machine does not fall on one policy alone.
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in setting["policies"]}
    for _ in range(setting["repeats"]):
        for name in setting["policies"]:
            runs[name].append(Run(model, name, batches, setting).go())
    for name, several in runs.items():
        for other in several[1:]:
            assert other["loads"] == several[0]["loads"]
            assert other["decisions"] == several[0]["decisions"]
        results[name] = several[0] | {"seconds": [run["seconds"] for run in several]}
    worlds.report(results)


if __name__ == "__main__":
    main()
