"""What callers do at the edges: passes that end early on one rank, and what detach gives back."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worlds import EXPERTS, batch, forward, join, report, tiny_model

from moeless_opt.problems.errors import MoelessError, ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.parts import causal_positions
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.agreement import OutOfStepError
from moeless_opt.runtime.live.dispatch import BalancedShares
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.home import PinnedHome
from moeless_opt.runtime.live.model import LiveModel
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
        live.dispatchers[2].experts_watch.clock = fail
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


def uneven() -> Any:
    """What one rank alone is told: heard of at once, on all ranks, and all is well afterwards."""
    rank, size = join(timeout=30.0)
    model, x = tiny_model(layers=2, exact=True), batch(rank)
    for name, options in (
        ("shares", {"shares": "equal" if rank else "balanced"}),
        ("node_G", {"node_G": [0, rank]}),
        ("home", {"home": PinnedHome(1 + rank)}),
        ("checksums", {"checksums": rank == 0}),
    ):
        with pytest.raises(ProblemError, match=rf"{name}: is another one on ranks \[1\] than on rank 0"):
            attach(model, timeout=20, **options)
    live = attach(model, timeout=20)
    want = forward(model, x)
    swap = static_slots(EXPERTS, size, 2)[:, ::-1].copy()
    waits = ""
    if rank == 0:
        number = live.apply(swap)
        swap_again = live.apply(swap)
        assert live.migration(number).status == "superseded"
    assert torch.equal(forward(model, x), want)
    if rank == 0:
        waits = live.migration(swap_again).reason
        assert live.migration(swap_again).status == "waiting"
    with pytest.raises(MoelessError, match=r"ranks \[0\] were handed a plan that ranks \[1\] were not"):
        live.settle()
    if rank == 0:
        assert live.migration(swap_again).status == "aborted"
    live.settle()
    number = live.apply(swap)
    live.settle()
    assert live.migration(number).status == "done"
    # A layer's plan, which all have to open at the same point: within a pass, and between passes.
    layer = live.layers[1]
    back = live.slots_LGC[1][::-1]
    alone = live.apply_layer(layer, back) if rank == 1 else None
    assert torch.equal(forward(model, x), want)
    if alone is not None:
        ticket = live.layer_plan(alone)
        assert (ticket.status, ticket.reason) == ("void", "ranks [0] did not open it at the same point")
    if rank == 0:
        live.apply_layer(layer, back)
    with pytest.raises(MoelessError, match=r"ranks \[0\] were handed a plan of a layer that ranks \[1\]"):
        live.settle()
    together = live.apply_layer(layer, back)
    live.settle()
    assert live.layer_plan(together).status == "done"
    # Other shares on every rank would send tokens to where nobody waits for them.
    live.apply([[[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]] * 2)
    live.settle()
    live.set_shares("equal" if rank else "balanced")
    with pytest.raises(MoelessError, match=r"ranks \[1\] were asked for other shares than rank 0"):
        forward(model, x)
    assert torch.equal(forward(model, x), want)
    if rank == 0:
        live.set_shares("equal")
    with pytest.raises(
        MoelessError, match=r"ranks \[0\] were handed a share policy that ranks \[1\] were not"
    ):
        live.settle()
    assert torch.equal(forward(model, x), want)
    # What was dropped is forgotten: the next policy is one that all were given.
    live.set_shares(BalancedShares([2, 3]))
    assert torch.equal(forward(model, x), want)
    assert [d.shares.speed_G for d in live.dispatchers] == [[2, 3]] * 2  # type: ignore[attr-defined]
    with pytest.raises(ProblemError, match="plan: is a NoneType, which has no share_LGC"):
        live.set_planned_shares(None)
    with pytest.raises(ProblemError, match="timeout: is -1"):
        live.settle(-1)
    for slots in ("a", 0, [8, 8, 8]):
        with pytest.raises(ProblemError, match="slots"):
            live.elastic(slots=slots)
    with pytest.raises(ProblemError, match="speed_G: has 3 entries for 2 ranks"):
        live.set_shares(BalancedShares([1, 2, 3]))
    if rank == 1:
        live.apply(swap)
    with pytest.raises(ProblemError, match="tokens: is another one"):
        live.measure([1 + rank, 8])
    with pytest.raises(MoelessError, match=r"ranks \[1\] were handed a plan"):
        live.detach()
    live.detach()
    return waits


def alone() -> Any:
    """One rank has no memory for what attach makes; the others hear of it, and the model is as before."""
    rank, _ = join(timeout=30.0)
    model, x = tiny_model(layers=2), batch(rank)
    want = forward(model, x)
    with pytest.raises(MemoryError if rank else MoelessError) as caught:
        attach(model, experts="grouped", memory_limit=1000 if rank else None)
    assert torch.equal(forward(model, x), want)
    attach(model, timeout=20).detach()
    assert torch.equal(forward(model, x), want)
    return str(caught.value)


def gradients() -> Any:
    """Refused by name wherever something of a MoE layer wants them, also where the hidden states do not."""
    rank, size = join(timeout=30.0)
    model, x = tiny_model(layers=2), batch(rank)
    live = attach(model, timeout=20)

    def refusal() -> str:
        try:
            model(x, causal_positions(x), None)
        except UnsupportedFeatureError as error:
            return str(error).split("gradients are on for ")[1].split(" (")[0]
        return ""

    said = [refusal()]
    model.requires_grad_(False)
    said.append(refusal())
    router, experts = model.decoder.layers[1].mlp.router, model.decoder.layers[1].mlp.experts
    router.requires_grad_(True)
    said.append(refusal())
    router.requires_grad_(False)
    experts.requires_grad_(True)
    said.append(refusal())
    # Experts that come from elsewhere are no less trained than those that were here.
    live.apply(static_slots(EXPERTS, size, 2)[:, ::-1].copy())
    live.settle()
    said.append(refusal())
    # A rank that has given all its experts away does not refuse what the others were told is frozen.
    empty = [[list(range(EXPERTS)), [-1] * EXPERTS]] * 2
    live.apply(empty)
    live.settle()
    model.requires_grad_(False)
    said.append(refusal())
    model.output_layer.requires_grad_(True)
    model(x, causal_positions(x), None).sum().backward()
    assert model.output_layer.weight.grad is not None
    live.detach()
    return said


def guarded(home: PinnedHome, prepare: Callable[[int, LiveModel], None] = lambda rank, live: None) -> Any:
    """Rank 2 is killed in the second pass, the others go on under a guard."""
    rank, _ = join(timeout=30.0)
    model, x = tiny_model(layers=3, exact=True), batch(rank)
    live = attach(model, home=home, timeout=8)
    want = forward(model, x)
    prepare(rank, live)
    guard = Guard(live, grace=5, slots=8)

    def work() -> Any:
        if rank == 2 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(model, x)

    worst = 0.0
    for step in range(4):
        try:
            worst = max(worst, (guard.run(work) - want).abs().max().item())
        except MoelessError as error:
            return {"step": step, "error": f"{type(error).__name__}: {error}"}
    copies = [home.ranks(layer, expert) for layer in range(3) for expert in range(8)]
    return {"worst": worst, "ranks": list(live.group.ranks), "copies": sorted(map(len, copies))}


class Unreadable(PinnedHome):
    """Has copies and cannot read them, as a damaged disk."""

    def read(self, layer: int, expert: int) -> Any:
        raise OSError(5, "Input/output error")


def cramped() -> Any:
    """One survivor has no memory for what it is to take over."""

    def prepare(rank: int, live: LiveModel) -> None:
        live.meter.hard_limit = live.meter.now if rank == 1 else None

    return guarded(PinnedHome(3), prepare)


def refill() -> Any:
    """A second rank dies while the recovery from the first death refills home copies."""

    def prepare(rank: int, live: LiveModel) -> None:
        if rank == 3:
            # Its copies are posted, some ranks have theirs.
            ExpertGroup.wait = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]

    return guarded(PinnedHome(3), prepare)


if __name__ == "__main__":
    cases: dict[str, Callable[[], Any]] = {
        "detached": detached,
        "unreadable": lambda: guarded(Unreadable(3)),
        "refill": refill,
        "cramped": cramped,
        "uneven": uneven,
        "alone": alone,
        "gradients": gradients,
    }
    what = sys.argv[1]
    report(cases[what]() if what in cases else early(what))
