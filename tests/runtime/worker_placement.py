"""Ranks of `test_placement_world`: outputs under any placement, observation, shares, detach."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
import worlds

from moeless_opt.runtime.live import attach
from moeless_opt.runtime.placement import static_slots

LAYERS = 3


def largest(x: float) -> float:
    t = torch.tensor([float(x)], dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def main() -> None:
    rank, size = worlds.join()
    tokens = [worlds.batch(rank, step) for step in range(3)]
    out = {}
    for name, dtype, topk in (("fp64", torch.float64, 2), ("bf16", torch.bfloat16, 2), ("fp32", torch.float32, 2), ("fp32 k3", torch.float32, 3), ("fp64 k3", torch.float64, 3)):
        model = worlds.tiny_model(LAYERS, topk, dtype, exact=True)
        stock = [worlds.forward(model, t) for t in tokens]
        live = attach(model, shares="balanced", checksums=True)
        rng = np.random.default_rng(7)
        worst = 0.0
        for k in range(8):
            for t, want in zip(tokens, stock, strict=True):
                worst = max(worst, (worlds.forward(model, t) - want).abs().max().item())
            live.set_shares("equal" if k % 2 else "balanced")
            live.apply(worlds.random_slots(rng, LAYERS, size, empty=2 if k == 3 else None))
            if k % 3 == 0:
                live.settle()
        out[name] = largest(worst)
        live.settle()
        live.detach()
        out[name+" detached"] = largest(max((worlds.forward(model, t) - want).abs().max().item() for t, want in zip(tokens, stock, strict=True)))
    if rank == 0: print(out)
    worlds.report(out)


main()
