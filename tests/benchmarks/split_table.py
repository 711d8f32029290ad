"""Print what computing the token split of one layer costs: on the host, and by kernels.

``python tests/benchmarks/split_table.py [--repeats 300] [--kernels]``

The split is the dispatcher's own (`SlotDispatcher.split`): from the gathered counts to everybody's tokens
for every slot, quotas and routes, with the check that the quotas add up. Counts are 2000 choices of each rank
over log-normal experts, sixteen draws in turn; the heaviest experts have a replica more, nodes have 8 ranks.
Microseconds, median and least, with Numba's kernels and in NumPy (water-filling and search: Python).

On a GPU (or with ``--kernels``, where Triton is) also the split by kernels: launches, and, compiled for an
H100 whether or not one is here, the instructions, registers and spills of each kernel; on a GPU the
microseconds of its kernels without their launches, after a check that the integers are the host's. The same
in the report of a GPU: ``python -m moeless_opt.runtime.gpu_check --only split``.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from moeless_opt.report import table
from moeless_opt.runtime.gpu_check.split import SHAPES, device_microseconds, some_batches, some_policies
from moeless_opt.runtime.live.dispatch import routes, shares, timed
from moeless_opt.runtime.live.dispatch.device import DeviceSplit, compiled, split
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher

KINDS = 16


def plain_search() -> Any:
    """The search as it is without Numba."""
    from moeless_opt.runtime.live.dispatch import _timed_kernels

    with mock.patch.dict("sys.modules", {"numba": None}):
        spec = importlib.util.spec_from_file_location("plain_timed_kernels", _timed_kernels.__file__)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


def microseconds(run: Any, batches: list[Any], repeats: int) -> str:
    """Median and least of one call."""
    found = []
    for i in range(repeats + KINDS):
        start = time.perf_counter_ns()
        run(batches[i % KINDS])
        found.append((time.perf_counter_ns() - start) / 1e3)
    return f"{np.median(found[KINDS:]):.0f} ({min(found):.0f})"


def host_lines(repeats: int) -> list[list[str]]:
    """Experts by ranks, replicas more, shares, compiled and plain."""
    installed, search = shares.warm_split(), plain_search()
    lines = []
    for experts, ranks, more in SHAPES:
        slots, batches = some_batches(experts, ranks, more, KINDS)
        group: Any = SimpleNamespace(size=ranks, rank=ranks // 2, node_R=[r // 8 for r in range(ranks)])
        for name, policy in some_policies(slots).items():
            dispatcher = SlotDispatcher(0, experts, 8, slots, group, policy)
            here = microseconds(dispatcher.split, batches, repeats) if installed else "-"
            sends = dispatcher.sends_RP
            with (
                mock.patch.object(shares, "split_kernels", return_value=None),
                mock.patch.object(routes, "split_kernels", return_value=None),
                mock.patch.object(timed, "_kernels", return_value=search),
            ):
                plain = microseconds(dispatcher.split, batches, repeats if name != "timed" else 16)
            assert np.array_equal(sends, dispatcher.sends_RP)
            lines.append([f"{experts} x {ranks}", str(more), name, here, plain])
    return lines


def kernel_lines() -> list[list[str]]:
    """Experts by ranks, shares, launches; of each kernel instructions, registers, spills; microseconds."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    lines = []
    for experts, ranks, more in SHAPES:
        slots, batches = some_batches(experts, ranks, more, 1)
        group: Any = SimpleNamespace(
            size=ranks, rank=ranks // 2, node_R=[r // 8 for r in range(ranks)], device=device
        )
        gathered = torch.from_numpy(np.ascontiguousarray(batches[0])).to(device)
        for name, policy in some_policies(slots).items():
            launched: list[tuple[str, dict[str, Any]]] = []
            one = DeviceSplit(0, device)

            def note(kernel: str, _grid: Any, *_: Any, launched: Any = launched, **sizes: Any) -> None:
                launched.append((kernel, sizes))

            with mock.patch.object(split, "launch", note):
                one.start(gathered, policy, slots, group)
            took = "-"
            if gpu:
                start = partial(one.start, gathered, policy, slots, group)
                took = f"{device_microseconds(start, device):.0f}"
                core = SlotDispatcher(0, experts, 8, slots, group, policy)
                core.split(batches[0])
                assert np.array_equal(core.sends_RP, one.sends_RP.cpu().numpy())
            made = [compiled(kernel, **sizes) for kernel, sizes in launched]
            told = ", ".join(f"{m.name} {m.instructions} / {m.registers} / {m.spills}" for m in made)
            lines.append([f"{experts} x {ranks}", name, str(len(launched)), told, took])
    return lines


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("Token split of one layer on the host, microseconds: median (least)")
    heads = ("experts x ranks", "replicas more", "shares", "compiled", "plain")
    print(table(heads, host_lines(-(-options.repeats // KINDS) * KINDS)))
    import torch

    if torch.cuda.is_available() or options.kernels:
        print("By kernels, compiled for an H100")
        heads = ("experts x ranks", "shares", "launches", "instructions / registers / spills", "us")
        print(table(heads, kernel_lines()))


if __name__ == "__main__":
    main()
