"""What is observed of a live model: loads and times, memory, and which tokens count."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import IntArray, integers
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.control import MemoryReport, Observation
from moeless_opt.runtime.live.adopt import Adopted
from moeless_opt.runtime.live.dispatch import SlotDispatcher
from moeless_opt.runtime.live.experts import checksum
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.measure import measure_experts

__all__ = ["checksums", "measure", "memory", "note_queues", "observe", "other_bytes", "real_tokens"]


def note_queues(device: torch.device) -> None:
    """Warn of a setting by which transfers and products of a GPU wait for each other."""
    if device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warnings.warn(
            "CUDA_DEVICE_MAX_CONNECTIONS is 1: all streams share one queue of the GPU, so forward passes "
            "wait for experts that move; unset it, or set 8 or more, where no training wants it",
            RuntimeWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def real_tokens(
    dispatchers: Sequence[SlotDispatcher], valid: torch.Tensor | ArrayLike | None, skip: bool
) -> Iterator[None]:
    """See `LiveModel.real_tokens`."""
    device = dispatchers[0].group.device
    mark = None if valid is None else torch.as_tensor(valid, device=device).reshape(-1).bool()
    for dispatcher in dispatchers:
        dispatcher.valid, dispatcher.skip_invalid = mark, skip
    try:
        yield
    finally:
        for dispatcher in dispatchers:
            dispatcher.valid, dispatcher.skip_invalid = None, False


def observe(dispatchers: Sequence[SlotDispatcher], group: ExpertGroup, batches: int) -> Observation:
    """Loads and times since the last call; a collective."""
    layers, experts = len(dispatchers), dispatchers[0].experts
    loads, rest = [], []
    for d in dispatchers:
        loads.append(d.load_E if d.load_E is not None else torch.zeros(experts, dtype=torch.int64))
        d.load_E = None
        rest += [d.take_tokens(), round(d.experts_watch.take() * 1e9)]
    mine = torch.cat([x.to("cpu") for x in loads]).tolist()
    rows = np.asarray(group.gather_ints([*mine, *rest]), dtype=np.int64)
    load_GLE = rows[:, : layers * experts].reshape(-1, layers, experts)
    rest_GL2 = rows[:, layers * experts :].reshape(-1, layers, 2)
    return Observation(
        load_LE=load_GLE.sum(axis=0),
        tokens_LG=np.ascontiguousarray(rest_GL2[:, :, 0].T),
        seconds_LG=np.ascontiguousarray(rest_GL2[:, :, 1].T * 1e-9, dtype=np.float64),
        batches=batches,
    )


def memory(adopted: Adopted, group: ExpertGroup) -> MemoryReport:
    """Bytes of experts per rank; a collective."""
    meter = adopted.meter
    live = sum(len(bank.resident) * bank.expert_bytes for bank in adopted.banks)
    rows = np.asarray(group.gather_ints([live, meter.now, meter.peak]), dtype=np.int64)
    return MemoryReport(live_G=rows[:, 0], held_G=rows[:, 1], peak_G=rows[:, 2])


def other_bytes(adopted: Adopted) -> int:
    """Bytes of what is no expert on this rank."""
    experts = {id(t) for bank in adopted.banks for w in bank.resident.values() for t in w}
    return sum(
        p.numel() * p.element_size()
        for p in adopted.model.parameters()
        if id(p) not in experts and p.device.type != "meta"
    )


def measure(
    adopted: Adopted,
    group: ExpertGroup,
    indices: Sequence[int],
    tokens: Sequence[int],
    *,
    repeats: int = 7,
    quantile: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
    flush: int | None = None,
    row_block: int = 1,
) -> TimeModel:
    """Time curve of the experts of some layers in turn; a collective, see `LiveModel.measure`.

    One layer alone would stay in caches that all layers of a pass share. Layers that hold fewer than most, or
    fewer than two, are passed over where there are others.
    An expert's rows are padded to multiples of `row_block`, as in a pass: a single one takes as long as all.
    """
    here_L = [len(adopted.banks[index].order) for index in indices]
    least_L = np.min(group.gather_ints(here_L), axis=0)
    some_L = least_L >= min(max(int(np.median(least_L)), 2), int(least_L.max()))
    held = int(least_L[some_L].min())
    turn = cycle([index for index, some in zip(indices, some_L, strict=True) if some])
    dtype = adopted.banks[indices[0]].shapes[0][1]
    most = int(integers("tokens", tokens, low=1).max(initial=1)) + held * row_block
    longest = torch.ones(most, adopted.hidden, dtype=dtype, device=group.device)

    def some(rows: torch.Tensor, sizes: IntArray) -> None:
        padded: IntArray = -(-sizes // row_block) * row_block
        rows = rows if len(rows) == padded.sum() else longest[: int(padded.sum())]
        index = next(turn)
        idle = len(adopted.banks[index].order) - sizes.size
        adopted.run_experts(index, rows, np.pad(padded, (0, idle)))

    mine = measure_experts(
        some,
        adopted.hidden,
        activated=range(1, held + 1),
        tokens=tokens,
        device=group.device,
        dtype=dtype,
        repeats=repeats,
        quantile=quantile,
        clock=clock,
        flush=flush,
    )
    assert mine.curve_time is not None
    rows = group.gather_ints(np.rint(mine.curve_time.ravel() * 1e9).astype(int).tolist())
    return replace(
        mine,
        curve_time=np.mean(rows, axis=0).reshape(mine.curve_time.shape) * 1e-9,
        name=f"measured on {group.size} ranks",
    )


def checksums(adopted: Adopted, group: ExpertGroup, rows_LG: Sequence[Sequence[Sequence[int]]]) -> IntArray:
    """Checksums of all experts [L, E], each by the first rank that serves it; a collective."""
    sums_LE = np.zeros((len(adopted.banks), adopted.experts), dtype=np.int64)
    for index, bank in enumerate(adopted.banks):
        first = {e: g for g in reversed(range(group.size)) for e in rows_LG[index][g]}
        for e, weights in bank.resident.items():
            if first[e] == group.rank:
                sums_LE[index, e] = checksum(weights)
    everybody = np.asarray(group.gather_ints(sums_LE.ravel().tolist()), dtype=np.int64)
    return np.asarray(everybody.sum(axis=0).reshape(sums_LE.shape))
