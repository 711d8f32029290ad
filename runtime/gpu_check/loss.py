"""`Guard` after a kill: two ranks on one GPU, of which one dies in the middle of a pass."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.ranks import MOST, RANKS, apart, smaller, together
from moeless_opt.runtime.gpu_check.setting import Setting, forward, model, synchronise, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import Guard, PinnedHome

TITLE = "a rank is killed in the middle of a pass, and the other goes on"
LINES = (
    "recovered",
    "the survivor's outputs",
    "seconds to recover, of which it waited for the other",
    "bytes restored",
)
SECONDS = 60
GRACE = 0.5


def check(setting: Setting, sheet: Sheet) -> None:
    """Start the ranks and kill one."""
    setting = smaller(setting)
    folder = sheet.path.parent / "ranks"
    found, codes, logs = together(lambda rank: _rank(setting, rank), folder, SECONDS - 10)
    left = found[0]
    if left is None or codes != [0, -signal.SIGKILL]:
        raise RuntimeError(f"the ranks ended with {codes}: {logs}")
    lost = [list(r["lost"]) for r in left["recoveries"]]
    sheet.take("recovered", lost == [[1]], detail={"lost": lost})
    sheet.take("the survivor's outputs", left["worst"], "relative, median token", most=MOST[setting.dtype])
    (one,) = left["recoveries"]
    sheet.take(LINES[2], {"in all": one["seconds"], "waited": one["agreed"]}, "s", most=30.0)
    sheet.take("bytes restored", one["bytes"], "bytes", least=1)


def _rank(setting: Setting, rank: int) -> dict[str, Any]:
    of, batch = model(setting), tokens(setting, setting.prefill)
    live = attach(of, home=PinnedHome(RANKS), checksums=True, timeout=15, staged=True)
    wanted = forward(of, batch)
    guard = Guard(live, grace=GRACE, slots=setting.experts)
    passes, worst = 0, 0.0

    def step() -> torch.Tensor:
        if rank == 1 and passes == 2:
            live.dispatchers[1].on_batch.append(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return forward(of, batch)

    while passes < 5:
        worst = max(worst, apart(guard.run(step), wanted))
        passes += 1
    synchronise(setting)
    recoveries = [
        {"lost": r.lost, "seconds": r.seconds, "agreed": r.agree_seconds, "bytes": r.restored_bytes}
        for r in guard.recoveries
    ]
    return {"worst": worst, "recoveries": recoveries}
