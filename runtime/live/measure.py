"""How long experts take on this machine: a measured curve for the planner and the simulator.

A kernel's time is no straight line in its rows: launches, tiles, caches and the reading of weights all show.
So the time of a rank's experts is measured on a grid of rows and of experts that they are for, and becomes a
`TimeModel`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.arrays import FloatArray, IntArray, integers, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import TimeModel

__all__ = ["in_turn", "measure_experts"]

#: Cycles of the device, about half a millisecond.
HEAD_START = 1_000_000
#: Bytes of cache of a core, at most, that others do not share.
CORE_CACHE = 8 * 2**20
RunExperts = Callable[[Tensor, IntArray], Any]


def in_turn(experts: Sequence[Callable[[Tensor], Any]]) -> RunExperts:
    """Experts that run one after the other, for `measure_experts`."""

    def run(rows: Tensor, sizes: IntArray) -> None:
        for expert, part in zip(experts, torch.split(rows, sizes.tolist()), strict=False):
            expert(part)

    return run


@torch.no_grad()
def measure_experts(
    run: RunExperts,
    hidden: int,
    *,
    activated: Sequence[int],
    tokens: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
    quantile: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
    flush: int | None = None,
) -> TimeModel:
    """Time experts on this machine.

    Parameters
    ----------
    run : callable
        ``run(rows, sizes)`` puts rows [N, H] through experts, ``sizes[i]`` rows through the i-th; see
        `in_turn`. They should have weights of their own each, or caches make several look like one.
    hidden : int
        H.
    activated : sequence of int
        Numbers of experts, ascending, at least two.
    tokens : sequence of int
        Numbers of rows in all, ascending, at least two. Spread evenly over the experts.
    device, dtype
        Of the rows. On CUDA events on the stream are timed (the device's time, without pauses in which it
        waits for the host), else `clock`.
    repeats : int
        Measurements of each point. They are taken in turns, all points each time, so that a slow moment of
        the machine does not fall on one point alone.
    quantile : float
        Which of them counts: the median, or 0, the quickest, where others disturb the machine.
    clock : callable
        Seconds; `time.thread_time` on a machine that others use, too.
    flush : int, optional
        Bytes that are written between two measurements: in a pass other layers come between, and weights are
        read anew. From warm caches one more expert looks too cheap. By default more than the caches hold that
        are a core's or the GPU's own; 0: nothing.

    Returns
    -------
    TimeModel
        In seconds, never falling with rows.
    """
    device = torch.device(device)
    grid_K = integers("tokens", tokens, low=1)
    grid_J = integers("activated", activated, low=1)
    for name, grid in (("tokens", grid_K), ("activated", grid_J)):
        if grid.size < 2 or (np.diff(grid) <= 0).any():
            raise ProblemError(name, f"is {grid.tolist()}, must be at least two rising numbers")
    if number("quantile", quantile) > 1:
        raise ProblemError("quantile", f"is {quantile}, must be from 0 to 1")
    if flush is None:
        flush = 2 * _cache(device)
    other = torch.zeros(whole("flush", flush), dtype=torch.uint8, device=device)
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(int(grid_K[-1]), hidden, generator=chance).to(device, dtype)
    points = [(k, j) for k in range(grid_K.size) for j in range(grid_J.size)]
    seconds: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for turn in range(1 + whole("repeats", repeats, low=1)):
        for k, j in points if turn % 2 else points[::-1]:
            n, parts = int(grid_K[k]), int(grid_J[j])
            sizes = np.full(parts, n // parts)
            sizes[: n % parts] += 1
            _cool(other)
            took = _timed(run, rows[:n], sizes[sizes > 0], device, clock)
            if turn:  # the first one warms up
                seconds[k, j].append(took)
    time_KJ: FloatArray = np.zeros((grid_K.size, grid_J.size))
    for (k, j), all_of_it in seconds.items():
        time_KJ[k, j] = np.quantile(all_of_it, quantile)
    return TimeModel(
        curve_tokens=grid_K.astype(np.float64),
        curve_activated=grid_J.astype(np.float64),
        curve_time=np.maximum.accumulate(time_KJ, axis=0),
        unit="s",
        name=f"measured on this {device.type}",
    )


def _cache(device: torch.device) -> int:
    """Bytes of the cache that keeps weights from one call to the next: a GPU's second level, or some MB."""
    if device.type != "cuda":
        return CORE_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _cool(other: Tensor) -> None:
    """Write it, so that caches hold nothing else."""
    other += 1


def _timed(
    run: RunExperts, rows: Tensor, sizes: IntArray, device: torch.device, clock: Callable[[], float]
) -> float:
    if device.type != "cuda":
        began = clock()
        run(rows, sizes)
        return clock() - began
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    # The device is kept busy until the host has launched everything: its pauses are no time of the experts.
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    run(rows, sizes)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3
