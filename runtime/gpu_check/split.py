"""The token split by kernels: the integers of the host's, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.gpu_check.setting import Setting, synchronise
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import SlotTable, rows_to_slots
from moeless_opt.runtime.live.dispatch import (
    BalancedShares,
    EqualShares,
    PlannedShares,
    SharePolicy,
    SlotDispatcher,
    TimedShares,
)
from moeless_opt.runtime.live.dispatch.device import DeviceSplit, why_not

__all__ = ["SHAPES", "device_microseconds", "some_batches", "some_policies"]

#: Experts, ranks, and replicas more than experts.
SHAPES = ((8, 8, 8), (16, 8, 8), (64, 8, 8), (256, 32, 32), (256, 64, 64))

TITLE = "the token split on the device gives the host's integers, sooner"
KINDS = ("planned", "equal", "balanced", "timed")
LINES = (
    "rows that go elsewhere than by the host's split",
    *(f"{kind}, device" for kind in KINDS),
    "balanced, host",
    "timed, host",
    "one split with what the host is told",
)
SECONDS = 120


def some_batches(experts: int, ranks: int, more: int, kinds: int = 16) -> tuple[SlotTable, list[IntArray]]:
    """A layer's slots, and counts [R, E] of some batches, as they lie in what is gathered.

    2000 choices of each rank over log-normal experts; the heaviest experts have a replica more.
    """
    chance = np.random.default_rng(0)
    load_E = chance.lognormal(0, 1, experts)
    rows = [row.tolist() for row in np.array_split(chance.permutation(experts), ranks)]
    for e in np.argsort(-load_E)[:more].tolist():
        others = [g for g in range(ranks) if e not in rows[g]]
        rows[min(others, key=lambda g: sum(load_E[x] for x in rows[g]))].append(e)
    batches = []
    for _ in range(kinds):
        gathered = np.zeros((ranks, experts + 10), dtype=np.int64)
        gathered[:, :experts] = chance.multinomial(2000, load_E / load_E.sum(), size=ranks)
        batches.append(gathered[:, :experts])
    return SlotTable(rows_to_slots(rows), experts), batches


def some_policies(slots: SlotTable, kicks: int | None = None) -> dict[str, SharePolicy]:
    """One of each, by name; `kicks` of the search."""
    placed = slots.slots()[None]
    share = np.random.default_rng(1).random(placed.shape)
    found: list[SharePolicy] = [
        PlannedShares(share, placed),
        EqualShares(),
        BalancedShares(),
        TimedShares(TimeModel(token_cost=0.2, activation_cost=10.0), kicks=kicks),
    ]
    return {policy.name: policy for policy in found}


def device_microseconds(call: Callable[[], Any], device: torch.device, rounds: int = 50) -> float:
    """Time of a call's kernels: of a graph of them on a GPU, launched at once; else of the call."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)
    call()  # nothing is compiled or sent while it is recorded
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(rounds):
        graph.replay()
    stop.record()
    stop.synchronize()
    return 1e3 * float(start.elapsed_time(stop)) / rounds


def _host(policy: SharePolicy, slots: SlotTable, batches: list[IntArray], group: Any) -> tuple[Any, float]:
    """The host's routes of each batch, and its median time."""
    core = SlotDispatcher(0, slots.experts, 8, slots, group, policy)
    routes, spent = [], []
    for turn in range(3):
        for counts_RE in batches:
            began = time.perf_counter()
            core.split(counts_RE)
            spent.append(1e6 * (time.perf_counter() - began))
            if not turn:
                routes.append(core.sends_RP.copy())
    return routes, float(np.median(spent[len(batches) :]))


def check(setting: Setting, sheet: Sheet) -> None:
    """Split batches of all shapes on both, and compare."""
    reason = why_not(setting.device)
    if reason is not None:
        raise RuntimeError(reason)
    wrong = 0
    device_us: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    host_us: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    told_us = {}
    for experts, ranks, more in SHAPES[:1] if setting.dry else SHAPES:
        slots, batches = some_batches(experts, ranks, more, 1 if setting.dry else 16)
        group: Any = SimpleNamespace(
            size=ranks, rank=ranks // 2, node_R=[r // 8 for r in range(ranks)], device=setting.device
        )
        shape = f"{experts}/{ranks}"
        gathered = torch.zeros((ranks, experts + 10), dtype=torch.int64, device=setting.device)
        for kind, policy in some_policies(slots, 0 if setting.dry else None).items():
            routes, host_us[kind][shape] = _host(policy, slots, batches, group)
            split = DeviceSplit(0, setting.device)

            start = partial(split.start, gathered, policy, slots, group)
            spent = []
            for counts_RE, want_RP in zip(batches, routes, strict=True):
                gathered[:, :experts].copy_(torch.from_numpy(np.ascontiguousarray(counts_RE)))
                spent.append(device_microseconds(start, setting.device))
                wrong += int(np.abs(split.sends_RP.cpu().numpy() - want_RP).sum())
            device_us[kind][shape] = float(np.median(spent))
        # What a forward waits for: launches, kernels, and the copy.
        spent = []
        for _ in range(1 if setting.dry else 100):
            synchronise(setting)
            began = time.perf_counter()
            start()
            split.tell(gathered)
            spent.append(1e6 * (time.perf_counter() - began))
        told_us[shape] = float(np.median(spent))
    sheet.take("rows that go elsewhere than by the host's split", wrong, "rows", most=0)
    for kind in KINDS:
        wish = 40.0 if kind != "timed" else 100.0
        sheet.take(f"{kind}, device", device_us[kind], "us", wish=wish)
    for kind in ("balanced", "timed"):
        sheet.take(f"{kind}, host", host_us[kind], "us", wish=100.0)
    sheet.take("one split with what the host is told", told_us, "us", detail={"shares": KINDS[-1]})
