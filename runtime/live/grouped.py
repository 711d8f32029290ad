"""All experts of a rank in two grouped matrix products, over the pools of a `PooledBank`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, ParameterList

from moeless_opt.problems.arrays import IntArray
from moeless_opt.runtime.live.experts import SlotBank
from moeless_opt.runtime.live.pooled import PooledBank

__all__ = ["GroupedExperts", "can_group"]

#: Types that `torch.nn.functional.grouped_mm` multiplies.
TYPES = (torch.bfloat16, torch.float32, torch.float16)


def can_group(dtype: torch.dtype) -> bool:
    """Whether this torch has grouped products of the type."""
    return hasattr(torch.nn.functional, "grouped_mm") and dtype in TYPES


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
        self.grouped = can_group(bank.shapes[0][1])
        self._layout: tuple[IntArray, IntArray | None] | None = None
        self.follow(bank)

    def follow(self, bank: SlotBank) -> None:
        """Serve what the bank holds."""
        self._layout = None
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
        first, second = bank.stacks
        size_P = np.zeros(len(first), dtype=np.int64)
        size_P[self._placed()[0]] = np.asarray(tokens_per_expert)
        inner = self.activation(self._product(tokens, first, size_P))
        inner = (inner * probs.unsqueeze(-1)).to(inner.dtype)
        return self._product(inner, second, size_P), None

    def _product(self, rows: Tensor, stack: Tensor, size_P: IntArray) -> Tensor:
        if self.grouped:
            ends = torch.from_numpy(np.cumsum(size_P, dtype=np.int32)).to(rows.device, non_blocking=True)
            return torch.nn.functional.grouped_mm(rows, stack.transpose(1, 2), offs=ends)
        parts = zip(torch.split(rows, size_P.tolist()), stack, strict=True)
        return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts if len(part)])
