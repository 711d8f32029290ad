"""The calls of NCCL that the runtime makes, in a world of one rank that talks to itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moeless_opt.runtime.gpu_check.setting import Setting, milliseconds
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import ExpertGroup

TITLE = "NCCL's calls as the runtime makes them, of one rank to itself; what moves beside products"
LINES = (
    "all-gather",
    "all-to-all",
    "weights sent on a stream of their own",
    "weights sent beside products: hidden",
    "copies from pinned memory beside products: hidden",
    "copies from pinned memory",
    "giving the groups up",
)
SECONDS = 45


class Monologue(ExpertGroup):
    """One rank that does not leave out what it has nobody to do with."""

    talks_to_itself = True


def check(setting: Setting, sheet: Sheet) -> None:
    """Call."""
    device = setting.device
    group = Monologue((0,), 0, device, 30.0, dist.HashStore())  # type: ignore[attr-defined]
    mine = torch.arange(8, device=device)
    sheet.take("all-gather", torch.equal(group.all_gather(mine)[0], mine))
    rows = torch.randn(6, 4, device=device)
    sheet.take("all-to-all", torch.equal(group.all_to_all(rows, [6], [6]), rows))
    weights = torch.randn(1 << (10 if setting.dry else 22), device=device)
    room = torch.zeros_like(weights)
    if setting.dry:  # gloo does not send to itself
        group.wait(group.exchange([], []))
        room.copy_(weights)
    else:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            group.wait(group.exchange([(weights, 0, 0)], [(room, 0, 0)]))
        stream.synchronize()
    sheet.take("weights sent on a stream of their own", torch.equal(room, weights))
    _beside(setting, sheet, group)
    began = time.perf_counter()
    group.close()
    sheet.take("giving the groups up", time.perf_counter() - began, "s", most=20.0)


def _beside(setting: Setting, sheet: Sheet, group: ExpertGroup) -> None:
    """How much of the time of what moves passes while products run, of the shorter of the two."""
    device = setting.device
    size = 16 if setting.dry else 4096
    left = torch.randn((size, size), device=device).to(setting.dtype)
    here = torch.zeros((1 << 10 if setting.dry else 1 << 28,), dtype=torch.uint8, pin_memory=not setting.dry)
    there, room = (torch.zeros(here.shape, dtype=torch.uint8, device=device) for _ in range(2))

    def products() -> None:
        for _ in range(2 if setting.dry else 60):
            torch.mm(left, left)

    def send() -> None:
        if not setting.dry:  # gloo does not send to itself
            group.wait(group.exchange([(there, 0, 0)], [(room, 0, 0)]))

    def copy() -> None:
        there.copy_(here, non_blocking=True)

    stream: Any = None if setting.dry else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(move: Callable[[], None]) -> None:
        if stream is None:
            move()
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            move()

    def both(move: Callable[[], None]) -> None:
        aside(move)
        products()

    for name, move in ((LINES[3], send), (LINES[4], copy)):
        calls = partial(aside, move), products, partial(both, move)
        alone, plain, together = milliseconds(setting, *calls)
        hidden = (alone + plain - together) / min(alone, plain)
        detail = {"alone_ms": alone, "products_ms": plain, "together_ms": together}
        sheet.take(name, max(0.0, min(1.0, hidden)), "of 1", detail=detail)
    sheet.take(LINES[5], here.numel() / alone * 1e-6, "GB/s", least=0.0)
