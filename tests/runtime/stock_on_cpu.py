"""Lets megatron-core's own all-to-all dispatcher run on a CPU, for comparison only.

The product patches nothing. The yardstick has to: megatron-core 0.16.1 asks for CUDA streams and the current
CUDA device in its dispatcher. What is patched here does nothing on the paths that are timed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class _Stream:
    """Stands for streams and events."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return self

    def synchronize(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def use_stock_dispatchers(model: Any) -> None:
    """Give every MoE layer megatron-core's own all-to-all dispatcher."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    for block in model.decoder.layers:
        layer = block.mlp
        if isinstance(layer, MoELayer):
            layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
                layer.num_local_experts,
                layer.local_expert_indices,
                config=layer.config,
                pg_collection=get_default_pg_collection(),
            )


def install() -> None:
    """Patch this process; call it before a stock dispatcher is built."""
    if torch.cuda.is_available():
        return
    one = _Stream()
    cuda: Any = torch.cuda
    cuda.Stream = _Stream
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda *_: one
    cuda.stream = lambda _: contextlib.nullcontext()
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def as_lists(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    modules: tuple[Any, ...] = (moe_utils, token_dispatcher)
    for module in modules:
        module.maybe_move_tensor_to_cpu = as_lists
