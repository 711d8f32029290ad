"""Launches of a function recorded once, to be launched again as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaRecorder", "EndPiece", "LaunchRecorder"]

#: Hands a piece's outputs over to the experts; returns where their results will be.
EndPiece = Callable[[tuple[Tensor, ...], Tensor], Tensor]


class LaunchRecorder(Protocol):
    """Records what a function launches, in pieces."""

    def record(self, call: Callable[[EndPiece], Tensor]) -> tuple[list[Callable[[], None]], Tensor]:
        """Run ``call(cut)``; returns what launches each piece again, and the result.

        A call of `cut` ends a piece.
        """


class CudaRecorder:
    """Pieces as CUDA graphs, which share their memory.

    Parameters
    ----------
    device : torch.device
        A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[EndPiece], Tensor]) -> tuple[list[Callable[[], None]], Tensor]:
        """See `LaunchRecorder.record`; nothing is computed."""
        graphs: list[Any] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            # Other threads move weights meanwhile.
            graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def cut(_outputs: tuple[Tensor, ...], made: Tensor) -> Tensor:
            graphs[-1].capture_end()
            begin()
            return made

        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            begin()
            try:
                result = call(cut)
            finally:
                graphs[-1].capture_end()
        return [graph.replay for graph in graphs], result
