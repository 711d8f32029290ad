"""How often the host waits for the device in a forward pass, by the profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.setting import Setting, forward, model, synchronise, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.gpu_check.timeline import MEMORY, host_calls, host_waits, pageable, timeline

TITLE = "the host waits at most once per MoE layer"
LINES = (
    "stock, decode",
    "attached, decode",
    "attached, prefill",
    "attached, slots in another order",
    "pageable copies",
    "memory taken from the driver",
)
SECONDS = 60


def check(setting: Setting, sheet: Sheet) -> None:
    """Count."""
    of = model(setting)
    decode, prefill = tokens(setting, setting.decode), tokens(setting, setting.prefill)
    copies, taken = 0, 0

    def look(name: str, call: Callable[[], Any], wish: float | None = 1.0) -> None:
        nonlocal copies, taken
        for _ in range(3):
            call()
        synchronise(setting)
        spans = timeline(call, setting.device, setting.trace(f"waits {name}"))
        found = host_waits(spans)
        here = pageable(spans)
        memory = host_calls(spans, MEMORY)
        if wish is not None:
            copies, taken = max(copies, here), max(taken, sum(memory.values()))
        detail = {"calls": found, "pageable": here, "memory": memory, "spans": len(spans)}
        sheet.take(
            name, sum(found.values()) / setting.layers, "waits per MoE layer", wish=wish, detail=detail
        )

    look("stock, decode", lambda: forward(of, decode), None)
    live = attach(of)
    look("attached, decode", lambda: forward(of, decode))
    look("attached, prefill", lambda: forward(of, prefill))
    live.apply(np.ascontiguousarray(live.slots_LGC[:, :, ::-1]))
    live.settle()
    look("attached, slots in another order", lambda: forward(of, prefill))
    sheet.take("pageable copies", copies / setting.layers, "per MoE layer", wish=0)
    sheet.take("memory taken from the driver", taken, "calls in a warm forward pass", wish=0)
