"""Ranks of `test_worlds`: plans handed in at different moments, tight and roomy, newer over older."""

from __future__ import annotations

import numpy as np
import torch
import worlds

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.runtime.engines.attach import attach

LAYERS, PLANS, FORWARDS = 2, 40, 130


def main() -> None:
    rank, size = worlds.join()
    model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
    x = worlds.batch(rank)
    stock = worlds.forward(model, x)
    live = attach(model, checksums=True)
    one = live.banks[0].expert_bytes
    rng = np.random.default_rng(5)
    plans = [
        (
            worlds.random_slots(rng, LAYERS, size),
            int(rng.integers(1, 4)) * one,
            (None, one, 3 * one)[int(rng.integers(3))],
            ("equal", "balanced")[int(rng.integers(2))],
        )
        for _ in range(PLANS)
    ]
    mine = np.random.default_rng(100 + rank)  # every rank has its own haste
    numbers: list[int] = []
    refused = 0
    for forward in range(FORWARDS):
        while len(numbers) + refused < PLANS - 1 and mine.random() < 0.4:
            slots, step, extra, shares = plans[len(numbers) + refused]
            live.set_shares(shares)
            try:
                numbers.append(live.apply(slots, max_step_bytes=step, max_extra_bytes=extra))
            except InfeasibleError:
                refused += 1
        assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
        if forward % 10 == 0:
            # Two ranks may hear of a layer's switch only in the same batch: here nobody is ahead.
            rows = live.group.gather_ints(np.sort(live.slots_LGC, axis=2)[:, :, -3:].ravel().tolist())
            assert all(row == rows[0] for row in rows)
    assert len(numbers) + refused == PLANS - 1, (len(numbers), refused)
    live.settle()
    last = live.apply(plans[-1][0])
    for _ in range(20):
        worlds.forward(model, x)
    assert live.migration(last).status == "done", live.migration(last)
    assert (np.sort(live.slots_LGC, 2)[:, :, -3:] == np.sort(plans[-1][0], 2)[:, :, -3:]).all()
    memory = live.memory()
    assert (memory.held_G == memory.live_G).all(), memory
    fates = [live.migration(n).status for n in numbers]
    worlds.report({"done": fates.count("done"), "superseded": fates.count("superseded"), "refused": refused})


main()
