"""The weights of megatron-core's own experts, whichever of its classes holds them: taken, and given back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeless_opt.problems.errors import UnsupportedFeatureError

__all__ = ["StockWeights", "activation_of"]

#: Linears of single experts that only multiply: what products over a pool may stand for.
PLAIN = ("ColumnParallelLinear", "RowParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear")


class StockWeights:
    """Weights of the local experts of a `SequentialMLP`, `TEGroupedMLP` or `GroupedMLP`.

    Parameters
    ----------
    stock : module
        One of them.

    Raises
    ------
    UnsupportedFeatureError
        If it is none, or has biases or linears of another class.
    """

    def __init__(self, stock: Any) -> None:
        kind = type(stock).__name__
        count = int(getattr(stock, "num_local_experts", 0))
        fused = hasattr(stock, "weight1") and hasattr(stock, "weight2")
        if hasattr(stock, "local_experts"):
            linears = [(m.linear_fc1, m.linear_fc2) for m in stock.local_experts]
            for linear in (x for pair in linears for x in pair):
                if type(linear).__name__ not in PLAIN:
                    raise UnsupportedFeatureError(f"{kind} has linears of class {type(linear).__name__}")
            self._view: Callable[[], list[list[Tensor]]] = lambda: [[a.weight, b.weight] for a, b in linears]
        elif fused:

            def halves() -> list[list[Tensor]]:
                # Stored [inner, outer], all experts side by side.
                first = stock.weight1.view(count, stock.config.hidden_size, -1)
                second = stock.weight2.view(count, -1, stock.config.hidden_size)
                return [[a.t(), b.t()] for a, b in zip(first, second, strict=True)]

            self._view = halves
        elif hasattr(getattr(stock, "linear_fc1", None), "weight0"):
            self._view = lambda: [
                [getattr(linear, f"weight{i}") for linear in (stock.linear_fc1, stock.linear_fc2)]
                for i in range(count)
            ]
        else:
            raise UnsupportedFeatureError(f"{kind} holds its experts in a way that is not known here")
        self.parameters = list(stock.parameters())
        self._shapes = [p.shape for p in self.parameters]
        self.whole = fused  # all experts in one tensor
        if len(self.parameters) != (2 if fused else 2 * len(self._view())):
            raise UnsupportedFeatureError(
                f"{kind} has biases or other parameters beside its experts' weights"
            )

    def read(self) -> list[list[Tensor]]:
        """Weights of each local expert, [outer, inner]: parameters, or views into them."""
        return self._view()

    def alias(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Let the parameters be these tensors, where each is one expert's; frees their own memory."""
        if not self.whole:
            for parameters, tensors in zip(self.read(), weights, strict=True):
                for parameter, tensor in zip(parameters, tensors, strict=True):
                    parameter.data = tensor.data

    def hollow(self) -> None:
        """Let go of the memory."""
        for parameter in self.parameters:
            parameter.data = parameter.data.new_empty(0)

    def write(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Memory of their own again, with these weights; the parameters are the same objects."""
        for parameter, shape in zip(self.parameters, self._shapes, strict=True):
            parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        for mine, theirs in zip(self.read(), weights, strict=True):
            for to, tensor in zip(mine, theirs, strict=True):
                to.data.copy_(tensor)


def activation_of(config: Any) -> Callable[[Tensor], Tensor]:
    """What stands between the two linears of an expert.

    Raises
    ------
    UnsupportedFeatureError
        If it is TransformerEngine's.
    """
    if config.use_te_activation_func:
        raise UnsupportedFeatureError("use_te_activation_func")
    function: Callable[[Tensor], Tensor] = config.activation_func
    if not config.gated_linear_unit:
        return function
    most = getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)

    def gated(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, dim=-1)
        if most is not None:
            gate, linear = gate.clamp(max=most), linear.clamp(min=-most, max=most)
        return function(gate) * (linear + offset if offset else linear)

    return gated
