"""Where kernels can run, and their launches."""

from __future__ import annotations

import importlib.util
import threading
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.errors import UnsupportedFeatureError

__all__ = ["interpreted", "launch", "power", "runs_here", "upload", "why_not"]


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it: from pinned memory, which torch keeps for the next."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """All kernels by name, which import Triton."""
    from moeless_opt.runtime.live.dispatch.device import _kernels, _row_kernels

    return SimpleNamespace(
        **{name: getattr(room, name) for room in (_kernels, _row_kernels) for name in room.__all__}
    )


def interpreted() -> bool:
    """Whether kernels run on the CPU."""
    found: bool = _kernels().interpreted()
    return found


def why_not(device: torch.device) -> str | None:
    """What is missing for splits on a device; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and not interpreted():
        return (
            f"kernels do not run on {device.type}; for a trial, slowly, start Python with TRITON_INTERPRET=1 "
            "in the environment"
        )
    return None


def runs_here(split: str, device: torch.device) -> bool:
    """Whether splits shall be on the device, by the option `split` of `attach`.

    Raises
    ------
    UnsupportedFeatureError
        If they were asked for and cannot be.
    """
    reason = why_not(device)
    if split == "device" and reason is not None:
        raise UnsupportedFeatureError(f"split='device': {reason}; or use split='host'")
    return split == "device" or (split == "auto" and device.type == "cuda" and reason is None)


#: The interpreter of kernels keeps its place in globals.
_one_at_a_time = threading.Lock()
#: Compiled kernels, by what they were compiled for.
_ready: dict[tuple[Any, ...], Any] = {}


def launch(name: str, grid: tuple[int, ...], *arguments: Any, warps: int = 1, **sizes: int) -> None:
    """Run a kernel; products and sums stay apart, as they are on the host.

    Triton looks at every argument of every launch, to find the kernel that was compiled for such ones; a
    small batch waits for that. What it looks at is little here: types of tensors and whether they begin at
    16 bytes. Whole numbers are below 2**31.
    """
    kernel = getattr(_kernels(), name)
    if interpreted():
        with _one_at_a_time:
            kernel[grid](*arguments, **sizes, num_warps=warps, enable_fp_fusion=False)
        return
    key = (
        name,
        warps,
        torch.cuda.current_device(),
        *sizes.items(),
        *[(a.dtype, a.data_ptr() % 16) for a in arguments if isinstance(a, Tensor)],
    )
    found = _ready.get(key)
    if found is None:
        with _one_at_a_time:
            _ready[key] = kernel[grid](*arguments, **sizes, num_warps=warps, enable_fp_fusion=False)
        return
    order = kernel.arg_names[len(arguments) :]
    found[(*grid, 1, 1)[:3]](*arguments, *[sizes[one] for one in order])


def power(size: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << max(size - 1, 0).bit_length())
