"""Ranks of `test_worlds`: two expert-parallel groups of two ranks each; home copies as the nearer source."""

from __future__ import annotations

import numpy as np
import torch
import worlds

from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.home import PinnedHome


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
    # Another number of forwards in the second group is nobody's business.
    for _ in range(1 + rank // 2):
        assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
    seen = live.observe()
    assert seen.load_LE.shape == (2, worlds.EXPERTS)
    worlds.report([row.tolist() for row in live.slots_LGC[0]])
    live.detach()
    assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
    from_home(model, x, stock)


def from_home(model: torch.nn.Module, x: torch.Tensor, stock: torch.Tensor) -> None:
    """Ranks on different nodes: a rank's own home copies are nearer than another node's GPU."""
    home = PinnedHome(copies=2)
    live = attach(model, node_G=[0, 1], home=home, checksums=True)
    assert home.bytes == 2 * worlds.EXPERTS * live.banks[0].expert_bytes
    swapped = live.slots_LGC[:, ::-1].copy()
    number = live.apply(swapped)
    while live.migration(number).status in ("waiting", "moving"):
        assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
    report = live.migration(number)
    assert (report.status, report.bytes) == ("done", 0), report
    assert (live.slots_LGC == swapped).all()
    # A home copy that went bad on one rank: no rank takes the plan.
    if live.group.rank == 1:
        expert = int(swapped[1, 0, 0])
        home.read(1, expert)[0].view(torch.int64)[0, 0] ^= 1
    number = live.apply(swapped[:, ::-1])
    while live.migration(number).status in ("waiting", "moving"):
        assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0
    assert live.migration(number).status == "aborted"
    assert (live.slots_LGC[1] == swapped[1]).all()
    live.use_home(None)
    live.detach()
    assert (worlds.forward(model, x) - stock).abs().max().item() == 0.0


main()
