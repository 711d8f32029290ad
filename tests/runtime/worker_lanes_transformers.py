"""Ranks of `test_live_modes`: the controller's modes over `transformers` models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import numpy as np
import torch
import worlds
from worker_transformers import MODELS

import moeless_opt as mo
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.engines.observe import replay_gate, tap_hidden
from moeless_opt.runtime.predict.foresight import GatePredictor
from moeless_opt.runtime.predict.gates import TunedGate, plain_gates
from moeless_opt.runtime.predict.per_layer import PerLayer


def main() -> None:
    rank, size = worlds.join()
    results: dict[str, Any] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval().double()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.1)
        model.set_experts_implementation("eager")
        chance = torch.Generator().manual_seed(rank)
        batches = [torch.randint(0, 128, (2, 16), generator=chance) for _ in range(2)]
        with torch.no_grad():
            want = [model(x).logits for x in batches]
        live = attach(model, checksums=True)
        layers = len(live.banks)
        worst = 0.0

        def run(k: int, model: Any = model, batches: Any = batches, want: Any = want) -> float:
            with torch.no_grad():
                return float((model(batches[k]).logits - want[k]).abs().max())

        # A gate on its own layer's hidden state chooses what the layer's router does, on every rank.
        gates = plain_gates(model)
        seen: dict[int, torch.Tensor] = {}
        tap = tap_hidden(model, lambda layer, hidden, seen=seen: seen.update({layer: hidden}))
        worst = max(worst, run(0))
        tap.close()
        live.observe()
        for layer in range(layers):
            mine = live.dispatchers[layer].batch_counts_RE[rank].tolist()
            assert gates[layer].chosen(seen[layer]).sum(0).tolist() == mine
            assert replay_gate(model, layer, seen[layer]).tolist() == mine
            top = gates[layer].scores(seen[layer]).topk(gates[layer].top_k, dim=-1).indices
            agree = gates[layer].chosen(seen[layer]).gather(1, top).double().mean()
            assert agree == 1.0 or name == "deepseek"  # its groups exclude some of the best
            start = TunedGate.of(gates[layer], width=0)
            assert torch.allclose(
                start(seen[layer]).double(), gates[layer].logits(seen[layer]).double(), atol=1e-4
            )
        # Windowed, planned beside the passes, then layer by layer.
        planner = Planner(topology=mo.uniform(1, size, slots=6))
        controller = Controller(live, planner, every=2, lag=1)
        for _ in range(5):
            worst = max(worst, run(0))
            controller.after()
        controller.close()
        windowed = controller.decisions
        assert len(windowed) == 2
        live.settle()
        elastic = live.elastic(2.0, clock="passes")
        controller = Controller(live, planner)
        with PerLayer(live, controller, GatePredictor(gates), distance=1):
            for k in range(6):
                worst = max(worst, run(k % 2))
        controller.drain()
        live.settle()
        assert not any(d.error for d in controller.layer_decisions)
        assert live.memory().held_G.sum() == elastic.bytes
        results[name] = {
            "worst": worst,
            "windowed": [d.plan.slots_LGC.tolist() for d in windowed],
            "foreseen": [
                [d.layer, d.load_E.tolist(), np.sort(d.slots_GC, axis=1).tolist()]
                for d in controller.layer_decisions
            ],
            "host": elastic.from_home,
            "curve": live.measure((4, 64), repeats=2).time([4, 64], [1, 2], 1.0).tolist(),
            "cold": elastic.cold_starts,
        }
        live.detach()
        controller.close()
        worst_after = run(1)
        assert worst_after == 0.0
    worlds.report(results)


if __name__ == "__main__":
    main()
