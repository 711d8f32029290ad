"""The decoder of a paged pass: megatron-core's modules in its order, without what stands between them.

A pass of a few tokens takes most of its time in the wrappers of layers (checkpoints, offloading, CUDA-
graph captures, profiling ranges), none of which is used here. What computes is called as it stands in the
model: norms, projections, latent attention, routers, dispatchers, experts, with their hooks. Sums are
taken in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeless_opt.runtime.checkpoint import MoELayer, SelfAttention

__all__ = ["LeanDecoder"]


class LeanDecoder:
    """Runs the layers of a `GPTModel`.

    Parameters
    ----------
    model : GPTModel
        Whose core attention is paged.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        self.layers = list(model.decoder.layers)
        self.final_layernorm = model.decoder.final_layernorm
        self.no_rope_L = list(config.no_rope_freq or [0] * len(self.layers))
        self.interleaved = bool(config.rotary_interleaved)
        plain = not (config.multi_latent_attention or getattr(config, "attention_output_gate", False))
        plain = plain and not getattr(config, "rotary_scaling_factor", None)
        self.direct_L = [plain and type(layer.self_attention) is SelfAttention for layer in self.layers]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the layers are of the kind that this runs."""
        return all(
            type(layer.mlp) is not MoELayer
            or not (getattr(model.config, "moe_latent_size", None) or layer.mlp.shared_expert_overlap)
            for layer in model.decoder.layers
        )

    def forward(self, x: Tensor, rotary: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Hidden states behind the last norm.

        Parameters
        ----------
        x : tensor, shape [T, 1, H]
            Embedded tokens.
        rotary : tensor or None
            Angles of the rows (None with latent attention, which has its own).
        turn : pair of tensors or None
            Their cosines and sines.
        """
        for number, layer in enumerate(self.layers):
            still = bool(self.no_rope_L[number])
            normed = layer.input_layernorm(x)
            if self.direct_L[number]:
                out, bias = self._attend(layer.self_attention, normed, None if still else turn)
            else:
                out, bias = layer.self_attention(normed, None, rotary_pos_emb=rotary)
            x = _added(x, out, bias)
            normed = layer.pre_mlp_layernorm(x)
            if type(layer.mlp) is MoELayer:
                x = x + _experts(layer.mlp, normed)
            else:
                x = _added(x, *layer.mlp(normed))
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def _attend(
        self, attention: Any, x: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = attention.get_query_key_value_tensors(x, None)
        if turn is not None:
            query, key = self._turned(query, turn), self._turned(key, turn)
        out = attention.core_attention.forward(query, key, value)
        projected: tuple[Tensor, Tensor | None] = attention.linear_proj(out)
        return projected

    def _turned(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate pairs of channels, as megatron-core does."""
        cos, sin = turn
        width = cos.size(-1)
        rest = None if width == x.size(-1) else x[..., width:]
        x = x if rest is None else x[..., :width]
        if self.interleaved:
            half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            half = torch.cat((-second, first), dim=-1)
        out = x * cos + half * sin
        return out if rest is None else torch.cat((out, rest), dim=-1)


def _added(x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    return x + (out if bias is None else out + bias)


def _experts(layer: Any, x: Tensor) -> Tensor:
    """A MoE layer: shared experts, router, dispatcher, experts."""
    shared = layer.shared_experts(x) if layer.use_shared_expert else None
    probs, routing_map = layer.router(x)
    dispatcher = layer.token_dispatcher
    rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, sizes, weights = dispatcher.dispatch_postprocess(rows, weights)
    rows, _ = layer.experts(rows, sizes, weights)
    rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
    out: Tensor = dispatcher.combine_postprocess(rows)
    return out if shared is None else out + shared
