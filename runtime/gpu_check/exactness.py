"""An attached model's outputs beside those of the stock one, on one rank."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeless_opt.runtime.checkpoint import moe_layers
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.setting import Setting, forward, model, off, synchronise, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import PinnedHome, can_group

TITLE = "outputs of the attached model are those of the stock one"
LINES = (
    "float64, experts one by one",
    "float32, experts one by one",
    "float32, grouped experts",
    "bfloat16, experts one by one",
    "bfloat16, grouped experts",
    "slots in another order",
    "after detach",
    "memory after detach",
    "tokens that are not real are skipped",
    "checksums and home copies",
)
SECONDS = 90
#: Largest relative distance of a layer's output: some rounding of each type's own.
MOST = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check(setting: Setting, sheet: Sheet) -> None:
    """Compare."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stock = model(setting, dtype)
        wanted = _outputs(setting, stock)
        for how, title in (("loop", "experts one by one"), ("grouped", "grouped experts")):
            if how == "grouped" and not can_group(dtype):
                continue
            name = f"{str(dtype).removeprefix('torch.')}, {title}"
            with sheet.guard(name):
                live = attach(stock, experts=how)
                sheet.take(name, _worst(_outputs(setting, stock), wanted), "relative", most=MOST[dtype])
                live.detach()
        del stock
    _moved(setting, sheet)


@torch.no_grad()
def _outputs(setting: Setting, of: Any) -> list[list[Tensor]]:
    """Each MoE layer's output on its own, and the logits, of a small and a large batch.

    Layer by layer the inputs are the same: in a whole model a rounding error may send a token to another
    expert, and nothing could be told any more.
    """
    out = []
    for name in ("decode", "prefill"):
        batch = tokens(setting, getattr(setting, name))
        seed = torch.Generator().manual_seed(1)
        hidden = torch.randn((batch.size(1), batch.size(0), setting.hidden), generator=seed)
        hidden = hidden.bfloat16().to(setting.device, next(of.parameters()).dtype)
        out.append([*(layer(hidden)[0] for _, layer in moe_layers(of)), forward(of, batch)])
    return out


def _worst(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> float:
    """Largest distance of a layer's output, and of the logits in the detail."""
    return max(
        off(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x[:-1], y[:-1], strict=True)
    )


def _moved(setting: Setting, sheet: Sheet) -> None:
    """What else may not change the outputs."""
    stock, batch = model(setting), tokens(setting, setting.prefill, 1)
    most = MOST[setting.dtype]
    wanted = _outputs(setting, stock)
    synchronise(setting)
    before = _bytes(setting)
    live = attach(stock, home=PinnedHome(1), checksums=True)
    number = live.apply(np.ascontiguousarray(live.slots_LGC[:, :, ::-1]))
    live.settle()
    if live.migration(number).status != "done":
        raise RuntimeError(f"slots were not re-ordered: {live.migration(number).reason}")
    sheet.take("slots in another order", _worst(_outputs(setting, stock), wanted), "relative", most=most)
    live.observe()
    mask = torch.rand(batch.size(1), batch.size(0), generator=torch.Generator().manual_seed(0)) < 0.5
    with live.real_tokens(mask, skip=True):
        forward(stock, batch)
    wrong = int(live.observe().load_LE.sum()) - int(mask.sum()) * setting.topk * setting.layers
    sheet.take("tokens that are not real are skipped", abs(wrong), "tokens too many or few", most=0)
    home = live.home
    assert isinstance(home, PinnedHome)
    same = all(
        torch.equal(copy.to(setting.device), mine)
        for index, bank in enumerate(live.banks)
        for e, weights in bank.resident.items()
        for copy, mine in zip(home.read(index, e), weights, strict=True)
    )
    pinned = home.read(0, 0)[0].is_pinned()
    sheet.take("checksums and home copies", same and (pinned or setting.dry), detail={"pinned": pinned})
    live.detach()
    del live, home
    gc.collect()
    synchronise(setting)
    sheet.take("after detach", _worst(_outputs(setting, stock), wanted), "relative", most=most)
    sheet.take("memory after detach", max(0, _bytes(setting) - before) / 1e6, "MB more than before", most=1.0)


def _bytes(setting: Setting) -> int:
    """What tensors were asked for; blocks of the allocator are larger by what fits there by chance."""
    if setting.dry:
        return 0
    return int(torch.cuda.memory_stats(setting.device)["requested_bytes.all.current"])
