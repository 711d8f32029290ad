"""What callers do at the edges: passes that end early on one rank, and what detach gives back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from worlds import batch, forward, join, report, tiny_model

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.agreement import OutOfStepError
from moeless_opt.runtime.live.slots import static_slots

LAYERS, PASSES = 4, 4


def early(where: str) -> Any:
    """The forward of rank 0 raises once, in front of a layer's exchange or in its experts."""
    rank, _ = join(timeout=30.0)
    model = tiny_model(layers=LAYERS, exact=True)
    batches = [batch(rank, step) for step in range(PASSES + 2)]
    live = attach(model, timeout=10)
    want = [forward(model, x) for x in batches]
    once = [rank == 0]

    def fail(*_: Any) -> float:
        if once[0]:
            once[0] = False
            raise MemoryError("transient")
        return 0.0

    if where == "observed":
        live.dispatchers[2].on_batch.append(fail)
    else:
        live.dispatchers[2].clock = fail
    seen: list[str] = []
    worst, said = 0.0, ""
    while seen.count("done") < PASSES and "RankLostError" not in seen:
        step = seen.count("done")
        try:
            got = forward(model, batches[step])
        except OutOfStepError as error:
            seen.append("out of step")
            said = str(error)
        except (MemoryError, MoelessError) as error:
            seen.append(type(error).__name__)
        else:
            seen.append("done")
            worst = max(worst, (got - want[step]).abs().max().item())
    return {"seen": seen, "worst": worst, "said": said}


def marks(model: Any) -> dict[str, Any]:
    """What a trainer reads from parameters."""
    names = ("allreduce", "tensor_model_parallel", "partition_dim", "mine")
    return {
        n: (p.requires_grad, [getattr(p, name, None) for name in names]) for n, p in model.named_parameters()
    }


def detached() -> Any:
    """All experts change places and come back: parameters are as they were, those of frozen ones too."""
    _, size = join()
    model = tiny_model(layers=LAYERS)
    for k, (name, p) in enumerate(model.named_parameters()):
        if ".local_experts." in name:
            p.requires_grad_(k % 2 == 0)
            p.mine = k
    before, x = marks(model), batch(0)
    live = attach(model)
    want = forward(model, x)
    live.apply(static_slots(8, size, LAYERS)[:, ::-1].copy())
    live.settle()
    live.detach()
    after = marks(model)
    again = attach(model)
    same = torch.equal(forward(model, x), want)
    again.detach()
    return {"changed": [n for n in before if before[n] != after[n]], "same": same}


if __name__ == "__main__":
    cases: dict[str, Callable[[], Any]] = {"detached": detached}
    what = sys.argv[1]
    report(cases[what]() if what in cases else early(what))
