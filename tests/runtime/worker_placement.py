"""Ranks of `test_worlds`: outputs under any placement are those of megatron-core's own dispatcher."""

from __future__ import annotations

import numpy as np
import stock_on_cpu
import torch
import torch.distributed as dist
import worlds

from moeless_opt.runtime.engines.attach import attach

LAYERS = 3
CASES = (
    ("fp64 top-2", torch.float64, 2),
    ("bf16 top-2", torch.bfloat16, 2),
    ("fp32 top-3", torch.float32, 3),
)


def largest(x: float) -> float:
    """Over all ranks."""
    t = torch.tensor([float(x)], dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def main() -> None:
    rank, size = worlds.join()
    stock_on_cpu.install()
    batches = [worlds.batch(rank, step) for step in range(2)]
    out: dict[str, dict[str, float]] = {}
    for name, dtype, topk in CASES:
        model = worlds.tiny_model(LAYERS, topk, dtype, exact=True)
        stock_on_cpu.use_stock_dispatchers(model)
        names = sorted(n for n, _ in model.named_parameters())
        stock = [worlds.forward(model, x) for x in batches]

        def worst(model: torch.nn.Module = model, stock: list[torch.Tensor] = stock) -> float:
            return max(
                (worlds.forward(model, x) - y).abs().max().item() for x, y in zip(batches, stock, strict=True)
            )

        live = attach(model, checksums=True)
        rng = np.random.default_rng(7)
        moving = 0.0
        for k in range(8):
            number = live.apply(worlds.random_slots(rng, LAYERS, size, empty=2 if k == 3 else None))
            live.set_shares("equal" if k % 2 else "balanced")
            while live.migration(number).status in ("waiting", "moving"):
                moving = max(moving, worst())
            assert live.migration(number).status == "done", live.migration(number)
            moving = max(moving, worst())
        live.detach()
        assert sorted(n for n, _ in model.named_parameters()) == names
        out[name] = {
            "moving": largest(moving),
            "detached": largest(worst()),
            "bytes": live.migrator.bytes_moved,
            "waits": largest(live.migrator.courier.waits),
        }
    worlds.report(out)


main()
