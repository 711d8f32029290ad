"""An attached model with static placement beside megatron-core's dispatchers, experts grouped in both."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeless_opt.runtime.checkpoint import moe_layers
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.setting import Setting, forward, milliseconds, model, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet

TITLE = "the dispatcher beside megatron-core's all-to-all dispatcher, experts grouped alike"
LINES = (
    "decode",
    "prefill",
    "decode, through all-gather dispatcher",
    "prefill, through all-gather dispatcher",
)
SECONDS = 60


class PlainGrouped(torch.nn.Module):
    """Experts in grouped products and nothing else, for a stock dispatcher: the least that they can cost."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        first, second = zip(
            *((m.linear_fc1.weight, m.linear_fc2.weight) for m in stock.local_experts), strict=True
        )
        self.first, self.second = (torch.stack([w.detach() for w in weights]) for weights in (first, second))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """As of megatron-core's `TEGroupedMLP`."""
        sizes = torch.as_tensor(tokens_per_expert).to(rows.device, non_blocking=True)
        ends = torch.cumsum(sizes, 0).to(torch.int32)
        products = torch.nn.functional.grouped_mm
        gate, linear = products(rows, self.first.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * linear * probs.unsqueeze(-1)
        return products(inner.to(rows.dtype), self.second.transpose(1, 2), offs=ends), None


def check(setting: Setting, sheet: Sheet) -> None:
    """Compare."""
    stock, ours = model(setting), model(setting)
    for _, layer in moe_layers(stock):
        layer.experts = PlainGrouped(layer.experts)
    live = attach(ours, experts="grouped")
    _compare(setting, sheet, stock, ours, LINES[2:])
    with sheet.guard(*LINES[:2]):
        if not setting.dry:  # it opens streams
            _all_to_all(stock)
        _compare(setting, sheet, stock, ours, LINES[:2])
    live.detach()


def _all_to_all(stock: Any) -> None:
    """Give the layers the dispatcher that is usual on GPUs."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    for _, layer in moe_layers(stock):
        layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
            layer.num_local_experts,
            layer.local_expert_indices,
            config=layer.config,
            pg_collection=get_default_pg_collection(),
        )


def _compare(setting: Setting, sheet: Sheet, stock: Any, ours: Any, names: Sequence[str]) -> None:
    for name, shape in zip(names, (setting.decode, setting.prefill), strict=True):
        batch = tokens(setting, shape)
        passes = [functools.partial(forward, of, batch) for of in (stock, ours)]
        theirs, mine = milliseconds(setting, *passes)
        sheet.take(
            name,
            mine / theirs,
            "of stock's time of a forward pass",
            wish=1.05,
            detail={"stock_ms": theirs, "attached_ms": mine, "tokens": batch.numel()},
        )
