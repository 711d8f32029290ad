"""The calls of NCCL that the runtime makes, in a world of one rank that talks to itself."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from moeless_opt.runtime.gpu_check.setting import Setting
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import ExpertGroup

TITLE = "NCCL's calls as the runtime makes them, of one rank to itself"
LINES = ("all-gather", "all-to-all", "weights sent on a stream of their own", "giving the groups up")
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
    began = time.perf_counter()
    group.close()
    sheet.take("giving the groups up", time.perf_counter() - began, "s", most=20.0)
