"""Colours of replicated experts: none shares a GPU with another of its colour, and all have one."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.solvers.shares.graph import ReplicaGraph
from tests.strategies import random_slots


def check(slots_LGC: Any, experts: int) -> None:
    layers, gpus, _ = slots_LGC.shape
    graph = ReplicaGraph(slots_LGC, np.ones(gpus), experts)
    for x in range(layers):
        home = {e: {g for g in range(gpus) if e in slots_LGC[x, g]} for e in range(experts)}
        several = sorted(e for e in range(experts) if len(home[e]) > 1)
        seen: list[int] = []
        for colour in graph.colours:
            members = [int(graph.expert_LX[x, m]) for m in colour.member_LM[x] if m < graph.width]
            used = [g for e in members for g in home[e]]
            assert len(used) == len(set(used))
            cells = sorted(
                int(c) % (gpus + 1) for c in colour.cell_RLM[:, x].ravel() if int(c) % (gpus + 1) < gpus
            )
            assert cells == sorted(used)
            seen += members
        assert sorted(seen) == several


def test_experts_of_one_colour_share_no_gpu() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        layers, gpus, slots = (int(n) for n in rng.integers(1, [4, 7, 5]))
        experts = int(rng.integers(1, gpus * slots + 1))
        capacity = np.full((layers, gpus), min(slots, experts))
        check(
            random_slots(rng, capacity, min(experts, int(capacity[0].sum()))),
            min(experts, int(capacity[0].sum())),
        )


def test_a_layer_of_many_colours_beside_one_of_few() -> None:
    """More colours than a machine word has bits, in one of two layers."""
    slots_LGC = np.full((2, 71, 70), -1, dtype=np.int32)
    slots_LGC[0, 0] = np.arange(70)
    slots_LGC[:, 1:, 0] = np.arange(70)
    slots_LGC[1, 0, :2] = [3, 5]
    check(slots_LGC, 70)
