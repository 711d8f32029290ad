"""The predictor's stream: what gates foresee beside a forward pass, and what that costs it."""

from __future__ import annotations

import torch

from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.setting import Setting, forward, milliseconds, model, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.gpu_check.timeline import host_waits, time_beside, timeline
from moeless_opt.runtime.predict import Foresight, GatePredictor, plain_gates

TITLE = "gates look ahead on a stream of their own, and nothing waits for them"
LINES = (
    "counts are those of the gates run in place",
    "waits of the host that the predictor adds",
    "on a stream of its own",
    "of its time beside the model's kernels",
    "forward pass with the predictor",
)
SECONDS = 60


def check(setting: Setting, sheet: Sheet) -> None:
    """Predict."""
    of = model(setting)
    live = attach(of)
    batch = tokens(setting, setting.prefill)
    gates = plain_gates(of)
    predictor = GatePredictor(gates)
    rows = torch.randn(
        (64, 1, setting.hidden), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(setting.device, setting.dtype)
    wrong = 0.0
    for layer in range(setting.layers - 1):
        counted = gates[layer + 1].chosen(rows).sum(0, dtype=torch.float32).cpu().numpy()
        wrong = max(wrong, float(abs(predictor.start(rows, layer, 1).load_E() - counted).max()))
    sheet.take("counts are those of the gates run in place", wrong, "tokens off", most=0)

    def plain() -> None:
        forward(of, batch)

    def foreseen() -> None:
        with Foresight(of, predictor, 1):
            forward(of, batch)

    for call in (plain, *[foreseen] * 4):  # a gate is recorded when it has seen a shape some times
        call()
    base = timeline(plain, setting.device)
    spans = timeline(foreseen, setting.device, setting.trace("predictor"))
    more = sum(host_waits(spans).values()) - sum(host_waits(base).values())
    sheet.take("waits of the host that the predictor adds", max(0, more), "per pass", most=0)
    kernels = [s for s in spans if s.kind == "kernel"]
    usual = {s.stream for s in base if s.kind == "kernel"}
    own = [s for s in kernels if s.stream not in usual]
    sheet.take("on a stream of its own", bool(setting.dry or own), detail={"kernels": len(own)})
    total, shared = time_beside(own, [s for s in kernels if s.stream in usual])
    sheet.take(
        "of its time beside the model's kernels",
        shared / total if total else 0.0,
        "of 1",
        detail={"us": total},
    )
    without, with_it = milliseconds(setting, plain, foreseen)
    sheet.take(
        "forward pass with the predictor",
        with_it / without,
        "of that without",
        wish=1.05,
        detail={"without_ms": without, "with_ms": with_it},
    )
    live.detach()
