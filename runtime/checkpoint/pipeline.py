"""Forward passes of models that are divided over ranks: through pipeline stages, and logits put together.

Megatron-core's own schedules ask for CUDA and for training's iterators; these run on any device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.checkpoint.parts import causal_positions, parallel_state

__all__ = ["pipelined", "whole_logits"]


@torch.no_grad()
def pipelined(model: Any, tokens_BS: Tensor, *, microbatches: int = 1) -> Tensor | None:
    """A forward pass through all pipeline stages; every rank of them calls it with the same tokens.

    Parameters
    ----------
    model : GPTModel
        This rank's stage, wrapped or not, attached or not.
    tokens_BS : int tensor, shape [B, S]
        Token ids; on all stages.
    microbatches : int
        Parts of the batch that follow each other, so that stages work at the same time.

    Returns
    -------
    tensor, shape [B, S, V], or None
        Logits (with tensor parallelism this rank's part of them, see `whole_logits`), on the last stage.
    """
    if microbatches < 1 or tokens_BS.size(0) % microbatches:
        raise ProblemError(
            "microbatches", f"is {microbatches}, must divide the batch of {tokens_BS.size(0)} sequences"
        )
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    stage = dist.get_rank(group)
    inner = model
    while hasattr(inner, "module"):
        inner = inner.module
    config = inner.config
    held = config.tensor_model_parallel_size if config.sequence_parallel else 1
    logits: list[Tensor] = []
    for part in tokens_BS.chunk(microbatches):
        if stage:
            shape = (part.size(1) // held, part.size(0), config.hidden_size)
            hidden = torch.empty(shape, dtype=config.params_dtype, device=tokens_BS.device)
            dist.recv(hidden, ranks[stage - 1], group=group)
            inner.set_input_tensor(hidden)
        out = model(part, causal_positions(part), None)
        if stage + 1 < len(ranks):
            dist.send(out.contiguous(), ranks[stage + 1], group=group)
        else:
            logits.append(out)
    return torch.cat(logits) if logits else None


@torch.no_grad()
def whole_logits(logits_BSV: Tensor) -> Tensor:
    """Logits of the whole vocabulary, from the parts of the tensor-parallel ranks, which all call this."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = dist.get_world_size(group)
    if size == 1:
        return logits_BSV
    # Flat output: gloo refuses the stacked form.
    flat = logits_BSV.new_empty(size * logits_BSV.numel())
    dist.all_gather_into_tensor(flat, logits_BSV.contiguous().view(-1), group=group)
    return torch.cat(list(flat.view(size, *logits_BSV.shape)), dim=-1)
