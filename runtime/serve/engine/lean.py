"""The decoder of a paged pass: megatron-core's modules in its order, without what stands between them.

A pass of a few tokens takes most of its time in the wrappers of layers (checkpoints, offloading, CUDA-
graph captures, profiling ranges), none of which is used here, and in small operations. What computes is
called as it stands in the model: norms, projections, latent attention, routers, dispatchers, experts, with
their hooks. Sums are taken in the same order. Two things are put together where a model allows it: queries
and keys are normalised and turned as one tensor, and what a router chooses goes to the dispatcher as
indices, without the dense maps between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeless_opt.runtime.checkpoint import MoELayer, SelfAttention
from moeless_opt.runtime.engines import RouterChoice, hooked

__all__ = ["LeanDecoder", "through_experts"]


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
        interleaved = bool(config.rotary_interleaved)
        plain = not (config.multi_latent_attention or getattr(config, "attention_output_gate", False))
        plain = plain and not getattr(config, "rotary_scaling_factor", None)
        self._attend_L = [
            _Attend(layer.self_attention, interleaved)
            if plain and type(layer.self_attention) is SelfAttention
            else None
            for layer in self.layers
        ]
        self._routes_L = [
            RouterChoice(layer.mlp.router) if type(layer.mlp) is MoELayer else None for layer in self.layers
        ]
        self._experts: Callable[[Any, RouterChoice, Tensor], Tensor] = _experts
        self._parts = [
            part
            for layer in self.layers
            for name, part in layer.named_modules()
            if ".experts." not in f".{name}."
        ]
        ends = getattr(model, "embedding", None), self.final_layernorm  # a last stage embeds nothing
        self._parts += [part for one in ends if one is not None for part in one.modules()]

    @property
    def plain(self) -> bool:
        """Whether all routers choose as they are asked here."""
        return all(routes is None or routes.plain for routes in self._routes_L)

    def watched(self) -> bool:
        """Whether somebody looks at a module, or asks a router for more than its choice."""
        return hooked(*self._parts) or any(one is not None and one.asked() for one in self._routes_L)

    def served(self) -> bool:
        """Whether all experts take any number of rows as indices: attached, and no rows are marked."""
        moe = (layer.mlp for layer, one in zip(self.layers, self._routes_L, strict=True) if one is not None)
        return all(
            hasattr(one.token_dispatcher, "dispatch_chosen") and one.token_dispatcher.core.valid is None
            for one in moe
        )

    @contextmanager
    def experts_by(self, run: Callable[[Any, RouterChoice, Tensor], Tensor]) -> Iterator[None]:
        """Let ``run(layer, routes, normed)`` stand for router and experts meanwhile."""
        self._experts = run
        try:
            yield
        finally:
            self._experts = _experts

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
            Their cosines and sines, [T, 1, width].
        """
        for number, layer in enumerate(self.layers):
            still = bool(self.no_rope_L[number])
            normed = layer.input_layernorm(x)
            attend, routes = self._attend_L[number], self._routes_L[number]
            if attend is not None:
                out, bias = attend(normed, None if still else turn)
            else:
                out, bias = layer.self_attention(normed, None, rotary_pos_emb=rotary)
            x = _added(x, out, bias)
            normed = layer.pre_mlp_layernorm(x)
            if routes is not None:
                x = x + self._experts(layer.mlp, routes, normed)
            else:
                x = _added(x, *layer.mlp(normed))
        return x if self.final_layernorm is None else self.final_layernorm(x)


class _Attend:
    """Self-attention of one layer: projection, norms of queries and keys, rotation, core attention.

    Parameters
    ----------
    attention : SelfAttention
        Without output gate.
    interleaved : bool
        Pairs that are turned are neighbouring channels, else the two halves.
    """

    def __init__(self, attention: Any, interleaved: bool) -> None:
        self.attention, self.interleaved = attention, interleaved
        self.groups = int(attention.num_query_groups_per_partition)
        self.each = int(attention.num_attention_heads_per_partition) // self.groups
        self.width = int(attention.hidden_size_per_attention_head)
        norms = attention.q_layernorm, attention.k_layernorm
        plain = all(type(norm) is torch.nn.RMSNorm for norm in norms) and norms[0].eps == norms[1].eps
        self.normed = plain and all(tuple(norm.normalized_shape) == (self.width,) for norm in norms)
        config = attention.config
        whole = int(config.num_query_groups or self.groups) == self.groups and not config.test_mode
        self.joint = whole and (self.normed or norms == (None, None))
        self._scale: tuple[Any, Tensor] | None = None

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        attention = self.attention
        if self.joint and not (self.normed and hooked(attention.q_layernorm, attention.k_layernorm)):
            query, key, value = self._together(x, turn)
        else:
            query, key, value = (t[:, 0] for t in attention.get_query_key_value_tensors(x, None))
            if turn is not None:
                query, key = self._turned(query, turn), self._turned(key, turn)
        out = attention.core_attention.attend(query, key, value)
        projected: tuple[Tensor, Tensor | None] = attention.linear_proj(out)
        return projected

    def _together(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [T, heads, width]; a group's queries stand in front of its key."""
        mixed = self.attention.linear_qkv(x)[0].view(len(x), self.groups, self.each + 2, self.width)
        both, value = mixed[:, :, : self.each + 1], mixed[:, :, self.each + 1]
        if self.normed:
            norm = self.attention.q_layernorm
            both = F.rms_norm(both, (self.width,), None, norm.eps) * self._scales()
        if turn is not None:
            both = self._turned(both, (turn[0][:, None], turn[1][:, None]))
        query = both[:, :, : self.each].reshape(len(x), -1, self.width)
        return query, both[:, :, self.each], value

    def _scales(self) -> Tensor:
        """Weights of both norms, [queries of a group + 1, width]."""
        query, key = self.attention.q_layernorm.weight, self.attention.k_layernorm.weight
        known = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in (query, key))
        if self._scale is None or self._scale[0] != known:
            self._scale = known, torch.stack([query] * self.each + [key]).detach()
        return self._scale[1]

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


def _experts(layer: Any, routes: RouterChoice, x: Tensor) -> Tensor:
    """A MoE layer: shared experts, router, dispatcher, experts."""
    shared = layer.shared_experts(x) if layer.use_shared_expert else None
    dispatcher = layer.token_dispatcher
    if routes.asked() or not hasattr(dispatcher, "dispatch_chosen"):
        probs, routing_map = layer.router(x)
        rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
        out = _combined(layer, rows, weights)
    else:
        out = through_experts(layer, x, *routes(x))
    return out if shared is None else out + shared


def through_experts(layer: Any, x: Tensor, expert_Tk: Tensor, prob_Tk: Tensor) -> Tensor:
    """Tokens through the experts that were chosen for them, ascending, and back."""
    return _combined(layer, *layer.token_dispatcher.dispatch_chosen(x, expert_Tk, prob_Tk))


def _combined(layer: Any, rows: Tensor, weights: Tensor) -> Tensor:
    dispatcher = layer.token_dispatcher
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, sizes, weights = dispatcher.dispatch_postprocess(rows, weights)
    rows, _ = layer.experts(rows, sizes, weights)
    rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
    out: Tensor = dispatcher.combine_postprocess(rows)
    return out
