"""Ranks of `test_worlds`: two expert-parallel groups of two ranks each, with plans of their own."""

from __future__ import annotations

import numpy as np
import torch
import worlds

from moeless_opt.runtime.live import attach


def main() -> None:
    rank, _ = worlds.join(expert_parallel=2)
    model = worlds.tiny_model(2, 2, torch.float64, exact=True)
    x = worlds.batch(rank)
    stock = worlds.forward(model, x)
    live = attach(model)
    assert live.group.ranks == ((0, 1) if rank < 2 else (2, 3)), live.group.ranks
    rng = np.random.default_rng(11 + rank // 2)
    for _ in range(3):
        wanted = worlds.random_slots(rng, 2, 2)
        number = live.apply(wanted)
        while live.migration(number).status in ("waiting", "moving"):
            assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
        assert live.migration(number).status == "done"
    # The second group trains on nothing that the first one does: another number of forwards is fine.
    for _ in range(1 + rank // 2):
        assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
    seen = live.observe()
    assert seen.load_LE.shape == (2, worlds.EXPERTS)
    worlds.report([row.tolist() for row in live.slots_LGC[0]])
    live.detach()
    assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0


main()
