"""Two ranks on the one GPU, which NCCL refuses: what they exchange goes through host memory (`staged`)."""

from __future__ import annotations

import datetime
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.runtime.gpu_check.processes import start, stop_all, wait_for
from moeless_opt.runtime.gpu_check.setting import Setting
from moeless_opt.runtime.live import static_slots

__all__ = ["MOST", "RANKS", "apart", "everywhere", "replicated", "smaller", "together"]

RANKS = 2
#: Largest relative distance of the median token: a few tokens may go to other experts by rounding alone.
MOST = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def smaller(setting: Setting) -> Setting:
    """Fewer experts: what two ranks move goes through host memory."""
    return setting if setting.dry else replace(setting, experts=16, topk=2)


def together(
    work: Callable[[int], dict[str, Any]], folder: Path, seconds: float
) -> tuple[list[dict[str, Any] | None], list[int | None], str]:
    """Run the ranks, each in a process of its own.

    Parameters
    ----------
    work : callable
        Gets the rank; the default process group is there. What it returns is handed over as JSON.
    folder : path
        For what they leave.
    seconds : float
        After which they are ended.

    Returns
    -------
    results (None where a rank left none), exit codes, ends of the logs
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(RANKS):
        children.append(start(functools.partial(_rank, work, rank, folder), folder / f"log{rank}"))
    # Only now: a store has threads, which do not outlive a fork.
    limit = datetime.timedelta(seconds=60)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit
    )
    draft = folder / "port.part"
    draft.write_text(str(store.port))
    draft.rename(folder / "port")
    codes = wait_for(children, seconds)
    stop_all(children, codes)
    results = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    logs = [(folder / f"log{rank}").read_text(errors="replace")[-600:] for rank in range(RANKS)]
    found = [json.loads(path.read_text()) if path.exists() else None for path in results]
    return found, codes, "\n".join(logs)


def _rank(work: Callable[[int], dict[str, Any]], rank: int, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not (folder / "port").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("no store to meet at")
        time.sleep(0.01)
    limit = datetime.timedelta(seconds=60)
    port = int((folder / "port").read_text())
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False, timeout=limit
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    found = work(rank)
    draft = folder / f"rank{rank}.part"
    draft.write_text(json.dumps(found))
    os.replace(draft, folder / f"rank{rank}.json")


def everywhere(done: bool) -> bool:
    """Whether it is so on all ranks."""
    flag = torch.tensor([int(done)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def replicated(setting: Setting, seed: int, more: int) -> SlotArray:
    """The static placement with so many experts of each rank and layer on the other rank, too."""
    chance = np.random.default_rng(seed)
    static_LGC = static_slots(setting.experts, RANKS, setting.layers)
    out = np.full((*static_LGC.shape[:2], static_LGC.shape[2] + more), -1, np.int32)
    out[:, :, : static_LGC.shape[2]] = static_LGC
    for layer in range(setting.layers):
        for gpu in range(RANKS):
            out[layer, gpu, -more:] = chance.choice(static_LGC[layer, 1 - gpu], more, replace=False)
    return out


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of the median token's logits."""
    a, b = found.flatten(0, -2).double(), wanted.flatten(0, -2).double()
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).median())
