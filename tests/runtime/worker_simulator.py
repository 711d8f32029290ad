"""Ranks of `test_simulator_live`: a controller over a live model; what it saw and what it decided."""

from __future__ import annotations

from typing import Any

import worlds

import moeless_opt as mo
from moeless_opt.runtime.backend import Observation
from moeless_opt.runtime.controller import Controller, Planner
from moeless_opt.runtime.live import attach

LAYERS, PASSES, SLOTS = 3, 8, 4


def main() -> None:
    rank, size = worlds.join()
    model = worlds.tiny_model(LAYERS, 2)
    live = attach(model)
    seen: list[Observation] = []
    observe = live.observe

    def remembered() -> Observation:
        seen.append(observe())
        return seen[-1]

    live.observe = remembered  # type: ignore[method-assign]
    controller = Controller(live, Planner(topology=mo.uniform(1, size, slots=SLOTS)), every=1)
    start = live.slots_LGC.tolist()
    decisions: list[dict[str, Any]] = []
    for step in range(PASSES):
        worlds.forward(model, worlds.batch(rank, step // 3))
        decision = controller.after()
        live.settle()
        assert decision is not None
        decisions.append({"slots": decision.plan.slots_LGC.tolist(), "moves": decision.plan.moves.count})
    live.detach()
    worlds.report(
        {
            "start": start,
            "loads": [one.load_LE.tolist() for one in seen],
            "tokens": [one.tokens_LG.tolist() for one in seen],
            "decisions": decisions,
        }
    )


if __name__ == "__main__":
    main()
