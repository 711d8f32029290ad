"""The simulation against live models: same controller and traffic, so the same loads and plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moeless_opt.problems.spec.time_model import TimeModel

RANKS = 4


def test_the_simulation_decides_as_the_live_model(
    run_world: Callable[..., list[Any]], simulated_twin: Any
) -> None:
    results = run_world("worker_simulator.py", RANKS)
    live, setting = results[0], results[0]["setting"]
    time = TimeModel(token_cost=1e-6, unit="s")
    for name in setting["policies"]:
        run = live[name]
        for other in results[1:]:  # every rank saw and decided the same
            assert all(other[name][key] == run[key] for key in ("start", "loads", "tokens", "decisions"))
        twin = simulated_twin.simulate(name, run, setting, RANKS, time)
        assert twin.loads.tolist() == run["loads"]
        # Placements do not change what the routers choose.
        assert run["loads"] == live["static"]["loads"]
        if name == "per-layer":
            lived = [[simulated_twin.filled(d["slots"]) for d in one["layers"]] for one in run["decisions"]]
            assert any(lived)
            assert twin.slots == lived
        elif name != "static":
            # The same replicas on each GPU; the live pools keep slots of their own.
            made, lived = (
                [[simulated_twin.filled(layer) for layer in slots] for slots in both]
                for both in (twin.slots, [d["slots"] for d in run["decisions"]])
            )
            assert made == lived
            assert twin.moves == [d["moves"] for d in run["decisions"]]
            assert any(twin.moves)
        # Rows per rank: the live dispatcher sends whole tokens of several sources, the simulation fractions.
        largest, lived_most = twin.tokens_BLG.max(2), np.array(run["tokens"]).max(2)
        assert (np.abs(largest - lived_most) <= 2 + 0.05 * lived_most).all(), name
    static, ours = (np.array(live[name]["tokens"]).max(2).mean() for name in ("static", "windowed"))
    assert ours < static
