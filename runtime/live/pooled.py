"""Slots in one piece of memory per linear, as grouped products want them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank, Weights

__all__ = ["PooledBank"]


class PooledBank(SlotBank):
    """Experts of one layer on one rank, each in a place of a pool: the rows of one tensor per linear.

    The pool is made at once, so that no forward pass allocates for what arrives. An arrival for which there
    is no place gets memory of its own and moves into the pool when it comes to serve; if there is none then
    either, the pool grows.

    Parameters
    ----------
    layer, resident, like, device, meter, on_install
        See `SlotBank`; the tensors in `resident` are copied.
    places : int
        Experts for which there is room.
    """

    def __init__(
        self,
        layer: int,
        resident: dict[int, Weights],
        like: Sequence[Tensor],
        device: torch.device,
        meter: MemoryMeter,
        places: int,
        on_install: Callable[[SlotBank], None] | None = None,
    ) -> None:
        super().__init__(layer, {}, like, device, meter, on_install)
        self._open(places)
        self.resident = {e: self._take(weights) for e, weights in resident.items()}
        self.order = tuple(resident)

    def _open(self, places: int) -> None:
        self.check_room(places)
        #: The pool: [place, outer, inner] of each linear.
        self.stacks = [
            self.meter.track(torch.zeros((places, *shape), dtype=dtype, device=self.device))
            for shape, dtype in self.shapes
        ]
        self._free = list(range(places))[::-1]

    def _place(self) -> Weights:
        place = self._free.pop()
        weights: Weights = [Parameter(stack[place], requires_grad=False) for stack in self.stacks]
        # The list alone: a reference to the bank would keep it, and with it the weights, alive.
        weakref.finalize(weights[0], self._free.append, place).atexit = False
        return weights

    def _take(self, weights: Sequence[Tensor]) -> Weights:
        """Copy an expert into a free place."""
        place = self._place()
        for mine, theirs in zip(place, weights, strict=True):
            mine.data.copy_(theirs)
            mine.requires_grad_(theirs.requires_grad)
        return place

    def allocate(self) -> Weights:
        """Room for one expert; see `SlotBank.allocate`."""
        return self._place() if self._free else super().allocate()

    def place_of(self, expert: int) -> int | None:
        """Where in the pool an expert that serves lies."""
        stack = self.stacks[0]
        offset = self.resident[expert][0].data_ptr() - stack.data_ptr()
        size = stack[0].numel() * stack.element_size()
        return offset // size if 0 <= offset < len(stack) * size else None

    def settle(self) -> None:
        """Take into the pool what serves and lies elsewhere."""
        strays = [e for e in self.order if self.place_of(e) is None]
        if len(strays) > len(self._free):
            self._open(len(self.order) + max(1, len(self.order) // 4))
            strays = list(self.order)
        for e in strays:
            self.resident[e] = self._take(self.resident[e])
