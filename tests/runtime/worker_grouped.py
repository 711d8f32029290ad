"""Ranks of `test_worlds`: experts in grouped products, their weights from every class of stock experts."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest
import torch
from worlds import EXPERTS, batch, forward, join, random_slots, report, tiny_model

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.parts import moe_layers
from moeless_opt.runtime.engines.attach import attach

LAYERS = 2


class FusedMLP(torch.nn.Module):
    """The weights of megatron-core's `GroupedMLP`, which wants a package for GPUs: two fused ones.

    Its forward views them as [expert, inner, outer], whatever their own shape says.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.config, self.num_local_experts = stock.config, len(stock.local_experts)
        first, second = zip(*(m.parameters() for m in stock.local_experts), strict=True)
        width = stock.config.hidden_size
        self.weight1 = torch.nn.Parameter(torch.stack([w.t() for w in first]).view(width, -1))
        self.weight2 = torch.nn.Parameter(torch.stack([w.t() for w in second]).view(-1, width))


class NumberedLinear(torch.nn.Module):
    """The weights of TransformerEngine's grouped linear: one a expert, by number."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        for i, weight in enumerate(weights):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight.detach().clone()))


class NumberedMLP(torch.nn.Module):
    """The weights of megatron-core's `TEGroupedMLP`."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.config, self.num_local_experts = stock.config, len(stock.local_experts)
        first, second = zip(*(m.parameters() for m in stock.local_experts), strict=True)
        self.linear_fc1, self.linear_fc2 = NumberedLinear(first), NumberedLinear(second)


def case(
    rank: int,
    size: int,
    kind: Any,
    dtype: torch.dtype,
    topk: int,
    *,
    steps: int = 6,
    split: str = "auto",
    **more: Any,
) -> dict[str, float]:
    """Under random placements, and after; the largest differences to the looped experts."""
    model = tiny_model(LAYERS, topk, dtype, **more)
    batches = [batch(rank, step, length=(1, 3, 24)[step % 3]) for step in range(steps)]
    looped = attach(model, experts="loop")
    want = [forward(model, x) for x in batches]
    looped.detach()
    if kind is not None:
        for _, layer in moe_layers(model):
            layer.experts = kind(layer.experts)
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    live = attach(model, experts="grouped", places=6, split=split)
    assert live.row_block == (1, None)
    rng = np.random.default_rng(topk)
    held, moving = live.meter.now, 0.0
    for step, x in enumerate(batches):
        moving = max(moving, (forward(model, x) - want[step]).abs().max().item())
        live.apply(random_slots(rng, LAYERS, size, extra=0 if step % 2 else 2))
    live.settle()
    settled = max((forward(model, x) - w).abs().max().item() for x, w in zip(batches, want, strict=True))
    live.measure([4, 8], repeats=1)
    assert live.meter.now >= held
    live.detach()
    for name, p in model.named_parameters():
        assert p is before[name][0], name
        assert torch.equal(p, before[name][1]), name
        assert p.requires_grad
    return {"moving": moving, "settled": settled, "scale": max(w.abs().max().item() for w in want)}


def main() -> None:
    rank, size = join()
    # Tokens are split by kernels where Triton is, which run on the CPU here.
    kernels = "device" if importlib.util.find_spec("triton") else "auto"
    one, half = torch.float32, torch.bfloat16
    results = {
        "sequential fp32": case(rank, size, None, one, 2),
        "fp32, split by kernels": case(rank, size, None, one, 2, steps=2, split=kernels),
        "sequential bf16 top-8": case(rank, size, None, half, 8),
        "numbered fp32, shared experts": case(
            rank, size, NumberedMLP, one, 3, moe_shared_expert_intermediate_size=32
        ),
        "fused bf16 top-1": case(rank, size, FusedMLP, half, 1, moe_router_pre_softmax=True),
    }
    # What cannot be grouped is said, or looped over if nobody insists.
    model = tiny_model(LAYERS, dtype=torch.float64)
    with pytest.raises(UnsupportedFeatureError, match=r"no grouped products of torch\.float64"):
        attach(model, experts="grouped")
    model = tiny_model(LAYERS, dtype=torch.bfloat16, moe_ffn_hidden_size=36)
    with pytest.raises(UnsupportedFeatureError, match=r"rows of \(64, 36\) x torch\.bfloat16, which are"):
        attach(model, experts="grouped")
    model = tiny_model(LAYERS, exact=True)
    with pytest.raises(UnsupportedFeatureError, match="linears of class RowExact"):
        attach(model, experts="grouped")
    attach(model).detach()
    model = tiny_model(LAYERS, dtype=torch.float64)
    want = forward(model, batch(rank))
    for _, layer in moe_layers(model):
        layer.experts = FusedMLP(layer.experts)
    live = attach(model)
    assert re.search("GroupedExperts", type(model.decoder.layers[0].mlp.experts).__name__)
    off = (forward(model, batch(rank)) - want).abs().max().item()
    assert off < 1e-12, off
    live.apply(random_slots(np.random.default_rng(0), LAYERS, size, EXPERTS))
    live.detach()
    report(results)


main()
