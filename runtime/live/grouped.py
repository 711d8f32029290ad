"""All experts of a rank in two grouped matrix products, over the pools of a `PooledBank`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, ParameterList

from moeless_opt.problems.arrays import IntArray
from moeless_opt.runtime.live.dispatch.device import place_ends, upload
from moeless_opt.runtime.live.experts import SlotBank
from moeless_opt.runtime.live.pooled import PooledBank

__all__ = ["GroupedExperts", "can_group"]

#: Types that `torch.nn.functional.grouped_mm` multiplies.
TYPES = (torch.bfloat16, torch.float32, torch.float16)


def can_group(dtype: torch.dtype, *widths: int) -> bool:
    """Whether this torch has grouped products of the type, and of rows of these widths (whole 16 bytes)."""
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return hasattr(torch.nn.functional, "grouped_mm") and dtype in TYPES and aligned


class GroupedExperts(Module):
    """Runs the experts of a `PooledBank`; takes the place of an engine's own experts.

    Rows come sorted by place in the pool (`slot_order`); places that nobody serves have none of them.

    Parameters
    ----------
    bank : PooledBank
        Of two linears: into the inner width (twice that with a gate), and back.
    activation : callable
        Between the two.
    probs_on_input : bool
        Scale the input rather than the activations by the router's weight.
    """

    def __init__(
        self, bank: PooledBank, activation: Callable[[Tensor], Tensor], probs_on_input: bool
    ) -> None:
        super().__init__()
        # Kept out of the module tree: a bank is no module.
        self.__dict__["bank"] = bank
        self.activation = activation
        self.probs_on_input = probs_on_input
        self.grouped = can_group(bank.shapes[0][1], *(shape[-1] for shape, _ in bank.shapes))
        self._layout: tuple[IntArray, IntArray | None] | None = None
        self._at: Tensor | None = None
        self._views: tuple[list[Tensor], list[list[Tensor]]] | None = None
        self.follow(bank)

    def follow(self, bank: SlotBank) -> None:
        """Serve what the bank holds."""
        self._layout = self._at = self._views = None
        self.weights = ParameterList(t for e in bank.order for t in bank.resident[e])

    def _placed(self) -> tuple[IntArray, IntArray | None]:
        """Places of the slots, ascending, and the slots in that order (None: as they stand)."""
        if self._layout is None:
            bank: PooledBank = self.__dict__["bank"]
            place_S = np.array([bank.place_of(e) for e in bank.order], dtype=np.int64)
            slot_S = np.argsort(place_S)
            rising = bool((np.diff(place_S) > 0).all())
            self._layout = place_S[slot_S], None if rising else slot_S
            self.weights = ParameterList(t for e in bank.order for t in bank.resident[e])
        return self._layout

    def slot_order(self) -> IntArray | None:
        """In which order the slots' rows are wanted; None: as the slots stand."""
        return self._placed()[1]

    def forward(self, tokens: Tensor, tokens_per_expert: Any, probs: Tensor) -> tuple[Tensor, None]:
        """Each slot's rows, in `slot_order`, through its expert."""
        if not len(tokens):
            return tokens, None
        if self.probs_on_input:
            tokens = (probs.unsqueeze(-1) * tokens).to(tokens.dtype)
            probs = torch.ones_like(probs)
        bank: PooledBank = self.__dict__["bank"]
        if tokens.device.type == "cpu" and not isinstance(tokens_per_expert, Tensor):
            return self._by_expert(bank, tokens, np.asarray(tokens_per_expert), probs), None
        first, second = bank.stacks
        ends = self._ends(tokens_per_expert, len(first), tokens.device)
        inner = self._between(self._product(tokens, first, ends), probs)
        return self._product(inner, second, ends), None

    def _between(self, inner: Tensor, probs: Tensor) -> Tensor:
        out = self.activation(inner)
        return torch.mul(out, probs.unsqueeze(-1), out=torch.empty_like(out))

    def _by_expert(self, bank: PooledBank, tokens: Tensor, size_S: IntArray, probs: Tensor) -> Tensor:
        """The same products one after the other, those of experts without rows left out.

        On a CPU torch's grouped product does that, too, but for all places of the pool.
        """
        at = self._placed()[0]
        if self._views is None or self._views[0] is not bank.stacks:
            self._views = bank.stacks, [[w.t() for w in stack] for stack in bank.stacks]
        active = np.flatnonzero(size_S)
        sizes, places = size_S[active].tolist(), at[active].tolist()
        out = tokens
        for number, views in enumerate(self._views[1]):
            if number:
                out = self._between(out, probs)
            into = tokens.new_empty((len(tokens), views[0].size(1)))
            for rows, place, to in zip(
                torch.split(out, sizes), places, torch.split(into, sizes), strict=True
            ):
                torch.mm(rows, views[place], out=to)
            out = into
        return out

    def _ends(self, sizes: Any, places: int, device: torch.device) -> Tensor:
        """Where the rows of each place of the pool end; on the device, from sizes there or here."""
        at = self._placed()[0]
        if not isinstance(sizes, Tensor):
            size_P = np.zeros(places, dtype=np.int64)
            size_P[at] = np.asarray(sizes)
            return upload(np.cumsum(size_P, dtype=np.int32), device)
        if self._at is None:
            self._at = upload(at.astype(np.int32), device)
        return place_ends(sizes, self._at, places)

    def _product(self, rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
        if self.grouped:
            return torch.nn.functional.grouped_mm(rows, stack.transpose(1, 2), offs=ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(torch.split(rows, sizes), stack, strict=True)
        return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts if len(part)])
