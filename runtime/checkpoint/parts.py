"""Megatron-core parts that run on any device: what a `GPTModel` needs to live on a CPU as well as on a GPU.

Megatron-core (0.16.1 as well as 0.19.2) builds a model without a GPU but cannot run it: some of its modules
name the current CUDA device. The classes here replace just those modules, by subclass and layer
specification; nothing of megatron or torch is patched, and on a GPU the same classes run.

- `TopKRouter.gating` moves its weights to the current CUDA device, and wants TransformerEngine's product;
- `TopKRouter.__init__` puts the expert-bias buffers on the current CUDA device;
- `DotProductAttention` keeps a scratch buffer and a causal mask on CUDA;
- `RotaryEmbedding.get_emb` moves its frequencies to CUDA;
- `MultiLatentAttention` builds its rotary embedding on CUDA, and compares with a class of TransformerEngine;
- `MoEAlltoAllTokenDispatcher` opens CUDA streams and events.

The stand-ins keep the parameter names and shapes of the stock parts, so checkpoints are interchangeable.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.release import check_megatron

check_megatron()
with warnings.catch_warnings():
    # Megatron-core announces at import every accelerator package that it did not find.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import _yarn_get_mscale
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.attention import Attention, SelfAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import (
        get_default_pg_collection,
        permute,
        sort_chunks_by_idxs,
        unpermute,
    )
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MultiLatentAttention
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

__all__ = [
    "GPTModel",
    "MLATransformerConfig",
    "MoELayer",
    "NeutralLatentAttention",
    "NeutralRotary",
    "NeutralRouter",
    "SdpaCoreAttention",
    "SelfAttention",
    "StaticDispatcher",
    "TransformerConfig",
    "build_gpt",
    "causal_positions",
    "cpu_capable_layer_spec",
    "ensure_model_parallel",
    "expert_linears",
    "moe_layers",
    "moe_submodules",
    "neutral_config_fields",
    "parallel_state",
    "quiet_config",
    "stage_layers",
]

#: Configuration fields that keep megatron-core off its CUDA-only paths; safe on a GPU too.
NEUTRAL_CONFIG_FIELDS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "moe_token_dispatcher_type": "allgather",  # the all-to-all dispatcher opens CUDA streams when it is built
    "moe_shared_expert_overlap": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def neutral_config_fields(**overrides: Any) -> dict[str, Any]:
    """Return the `TransformerConfig` fields that every model built here needs, with `overrides` on top."""
    return {**NEUTRAL_CONFIG_FIELDS, **overrides}


def quiet_config(kind: type[Any], **fields: Any) -> Any:
    """Build a configuration without its notes about options that are not used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**fields)


class NeutralRouter(TopKRouter):  # type: ignore[misc]
    """`TopKRouter` that computes where its weights are."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **kwargs: Any) -> None:
        plain = config
        if config.moe_router_enable_expert_bias:
            plain = copy.copy(config)  # the stock constructor would put the bias on CUDA: leave it to us
            plain.moe_router_enable_expert_bias = False
        super().__init__(config=plain, pg_collection=pg_collection, **kwargs)
        self.config = config
        if config.moe_router_enable_expert_bias:
            self.enable_expert_bias = True
            zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=self.weight.device)
            for name, persistent in (("local_tokens_per_expert", False), ("expert_bias", True)):
                delattr(self, name)
                self.register_buffer(name, zeros.clone(), persistent=persistent)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the router's logits, in the precision that `moe_router_dtype` asks for."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]
    """Core attention by torch's `scaled_dot_product_attention`: grouped queries, any value width."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend; tensors are ``[sequence, batch, heads, width]`` and a mask is True where it hides."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        causal = attn_mask_type in (None, AttnMaskType.causal) and attention_mask is None and q.size(2) > 1
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if attention_mask is None else ~attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


class NeutralRotary(RotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding whose frequencies follow the model's device and stay in float32.

    Parameters
    ----------
    inverse_frequencies : Tensor, shape [width / 2]
        Angle per position of each pair of channels.
    interleaved : bool
        Pairs are neighbouring channels (else the two halves).
    long_frequencies, switch_length : optional
        Frequencies for sequences longer than `switch_length` (LongRoPE).
    cp_group : optional
        Context-parallel group.
    """

    def __init__(
        self,
        inverse_frequencies: torch.Tensor,
        *,
        interleaved: bool = False,
        long_frequencies: torch.Tensor | None = None,
        switch_length: int | None = None,
        cp_group: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq = inverse_frequencies.float()
        self.long_inv_freq = None if long_frequencies is None else long_frequencies.float()
        self.switch_length = switch_length
        self.rotary_interleaved = interleaved
        self.seq_len_interpolation_factor = None
        self.cp_group = cp_group
        self._tables: dict[tuple[int, int], torch.Tensor] = {}

    @classmethod
    def plain(
        cls, width: int, base: float, *, interleaved: bool = False, cp_group: Any = None
    ) -> NeutralRotary:
        """Build the usual embedding: angles fall geometrically from 1 to 1 / `base`."""
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return cls(1.0 / (base**exponents), interleaved=interleaved, cp_group=cp_group)

    def _apply(self, fn: Any, recurse: bool = True) -> NeutralRotary:
        # Follow a move to another device, but not a cast: angles in bf16 would be useless.
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        self.inv_freq = self.inv_freq.to(device)
        if self.long_inv_freq is not None:
            self.long_inv_freq = self.long_inv_freq.to(device)
        self._tables.clear()
        super()._apply(fn, recurse)
        return self

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles of positions `offset` to `offset + max_seq_len`, shape [length, 1, 1, width]."""
        frequencies = self.inv_freq
        if self.long_inv_freq is not None and offset + max_seq_len > (self.switch_length or 0):
            frequencies = self.long_inv_freq
        position = torch.arange(max_seq_len, device=frequencies.device, dtype=torch.float32) + offset
        angle = torch.outer(position, frequencies)
        if self.rotary_interleaved:
            angle = torch.stack((angle, angle), dim=-1).flatten(1)
        else:
            angle = torch.cat((angle, angle), dim=-1)
        return angle[:, None, None, :]

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Return `get_emb`, kept for the last lengths used (the stock cache keeps whole models alive)."""
        group = self.cp_group if cp_group is None else cp_group
        if group is not None and group.size() > 1:
            return super().forward.__wrapped__(self, max_seq_len, offset, packed_seq, cp_group)  # type: ignore[no-any-return]
        key = (max_seq_len, offset)
        if key not in self._tables:
            if len(self._tables) >= 32:
                self._tables.clear()
            self._tables[key] = self.get_emb(max_seq_len, offset)
        return self._tables[key]


class _NeutralLatentBase(MultiLatentAttention):  # type: ignore[misc]
    """The constructor of `MultiLatentAttention` without its two CUDA-only lines."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **newer: Any,
    ) -> None:
        Attention.__init__(
            self,
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attention_type=attention_type,
            attn_mask_type=attn_mask_type,
            pg_collection=pg_collection,
            **newer,
        )
        self.query_projection_size = config.v_head_dim * config.num_attention_heads
        self.q_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.key_hidden_size = self.q_head_dim
        self.val_hidden_size = config.v_head_dim
        self.recompute_up_proj = (
            config.recompute_granularity == "selective" and "mla_up_proj" in config.recompute_modules
        )
        self.qkv_up_checkpoint = None
        if config.rope_type != "rope":
            raise UnsupportedFeatureError(
                f"rope_type {config.rope_type!r}: build with 'rope' and give the bent frequencies (rotary=)"
            )
        mscale = _yarn_get_mscale(config.rotary_scaling_factor, config.mscale_all_dim)
        self.softmax_scale = mscale * mscale / math.sqrt(self.q_head_dim)
        self.cache_mla_latents = config.cache_mla_latents
        self.rotary_pos_emb = NeutralRotary.plain(
            config.qk_pos_emb_head_dim, config.rotary_base, cp_group=self.pg_collection.cp
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            softmax_scale=self.softmax_scale,
            k_channels=self.q_head_dim,
            v_channels=config.v_head_dim,
            cp_comm_type=cp_comm_type,
            pg_collection=self.pg_collection,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            self.query_projection_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.pg_collection.tp,
        )


class NeutralLatentAttention(MLASelfAttention, _NeutralLatentBase):  # type: ignore[misc]
    """Multi-head latent attention on any device.

    `MLASelfAttention.__init__` calls the next constructor in the resolution order, which is the one above
    instead of the stock one: the rest of the class is megatron-core's own.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Take the norms and projections that the specification has.

        Since megatron-core 0.17 a norm of the keys alone wants TransformerEngine's fused projection else.
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class StaticDispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """Plain expert parallelism on any device: expert `e` lives on rank ``e // (E / ranks)`` and nowhere else.

    What `MoEAlltoAllTokenDispatcher` does, without CUDA streams; for inference (its exchange has no gradient
    when there is more than one rank). The yardstick for every placement that does better.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_size != 1:
            raise UnsupportedFeatureError("StaticDispatcher: expert tensor parallelism is not supported")
        self.local = config.num_moe_experts // self.ep_size
        self.first = dist.get_rank(self.ep_group) * self.local

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens of every expert on every rank, and sort the own tokens by expert."""
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, self.hidden_shape[-1])
        self.routing_map, self.flat_shape = routing_map, tokens.shape
        mine_E = routing_map.sum(0)
        counts_RE = mine_E[None]
        if self.ep_size > 1:  # flat output: gloo refuses the stacked form
            flat = mine_E.new_empty(self.ep_size * mine_E.numel())
            dist.all_gather_into_tensor(flat, mine_E.contiguous(), group=self.ep_group)
            counts_RE = flat.view(self.ep_size, -1)
        host_RE = counts_RE.cpu()
        rank = self.first // self.local
        self.input_splits = host_RE[rank].view(self.ep_size, self.local).sum(1).tolist()
        self.chunks_RS = host_RE[:, self.first : self.first + self.local].contiguous()
        self.output_splits = self.chunks_RS.sum(1).tolist()
        rows = int(host_RE[rank].sum())
        # Two more values since megatron-core 0.17.
        sorted_tokens, sorted_probs, self.order, *_ = permute(
            tokens, routing_map, probs=probs, num_out_tokens=rows
        )
        return sorted_tokens, sorted_probs

    def _exchange(self, x: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
        if self.ep_size == 1:
            return x
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.ep_group)
        return out

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send every token to the rank of its expert."""
        return tuple(self._exchange(x, self.output_splits, self.input_splits) for x in (hidden_states, probs))  # type: ignore[return-value]

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Regroup what came from [rank][expert] to [expert][rank]."""
        if self.ep_size > 1 and self.local > 1:
            order = torch.arange(self.ep_size * self.local).view(self.ep_size, self.local).T.ravel()
            hidden_states, probs = sort_chunks_by_idxs(
                hidden_states, self.chunks_RS.ravel(), order, probs=probs
            )
        return hidden_states, self.chunks_RS.sum(0), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo the regrouping."""
        if self.ep_size > 1 and self.local > 1:
            order = torch.arange(self.ep_size * self.local).view(self.local, self.ep_size).T.ravel()
            hidden_states, _ = sort_chunks_by_idxs(hidden_states, self.chunks_RS.T.ravel(), order)
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send the results back."""
        return self._exchange(hidden_states, self.input_splits, self.output_splits)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Add up each token's experts, in its old place."""
        out = unpermute(
            hidden_states, self.order, restore_shape=self.flat_shape, routing_map=self.routing_map
        )
        combined: torch.Tensor = out.view(self.hidden_shape)
        return combined


def ensure_model_parallel(
    expert_parallel_size: int | None = None,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> None:
    """Make `torch.distributed` and megatron's groups ready, if they are not yet.

    Parameters
    ----------
    expert_parallel_size : int, optional
        Ranks of one expert-parallel group; by default all ranks of a pipeline stage.
    tensor_parallel_size : int
        Ranks over which attention, embedding and dense layers are divided; experts never are.
    pipeline_parallel_size : int
        Stages of the pipeline.

    Notes
    -----
    Without an initialised process group a group of this one process is made (gloo, no network). Groups that
    the caller has made are left as they are.
    """
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        # This tracker's fork() is a null context: the stock one wants the state of a CUDA generator.
        initialize_rng_tracker(inference_rng_tracker=True)
        stage = dist.get_world_size() // pipeline_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel_size,
            pipeline_model_parallel_size=pipeline_parallel_size,
            expert_model_parallel_size=stage if expert_parallel_size is None else expert_parallel_size,
            expert_tensor_parallel_size=1,
        )


def _moe_pattern(config: TransformerConfig) -> list[bool]:
    """Which layers have experts, from `moe_layer_freq`."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [i % freq == 0 for i in range(config.num_layers)]
    return [bool(x) for x in freq]


def stage_layers(config: TransformerConfig) -> range:
    """Numbers of the layers of this pipeline stage, from 0 over all stages."""
    if config.pipeline_model_parallel_size == 1:
        return range(config.num_layers)
    first = int(get_transformer_layer_offset(config))
    return range(first, first + int(get_num_layers_to_build(config)))


def moe_submodules(layer_spec: Any) -> Any:
    """What the MoE layer of a layer's specification is built from: router, experts, shared experts.

    Megatron-core 0.16 has it as an attribute; since 0.17 layers are functions with arguments.
    """
    return _submodules(layer_spec.submodules.mlp)


def expert_linears(layer_spec: Any) -> Any:
    """What the experts of a layer's specification are built from: the classes of their linears."""
    return _submodules(moe_submodules(layer_spec).experts)


def _submodules(builder: Any) -> Any:
    return builder.keywords["submodules"] if isinstance(builder, functools.partial) else builder.submodules


def _of_class(builder: Any, kind: type[Any]) -> Any:
    """The same builder for another class."""
    if isinstance(builder, functools.partial):
        partial: Any = functools.partial
        return partial(kind, **builder.keywords)
    builder.module = kind
    return builder


def cpu_capable_layer_spec(
    config: TransformerConfig,
    *,
    qk_l2_norm: bool | Sequence[bool] = False,
    router: type[Any] = NeutralRouter,
    experts: type[Any] | None = None,
) -> TransformerBlockSubmodules:
    """Specify a decoder of megatron-core's own layers that runs on any device: this pipeline stage's layers.

    Parameters
    ----------
    config : TransformerConfig
        The model; `moe_layer_freq`, `qk_layernorm`, `normalization` and `multi_latent_attention` are
        followed.
    qk_l2_norm : bool or sequence of bool, one per layer of all stages
        Normalise queries and keys by their length (Llama 4, on its rotary layers).
    router : type
        Class of the routers.
    experts : type, optional
        Class of the expert banks instead of `SequentialMLP`.

    Returns
    -------
    TransformerBlockSubmodules
        To be given to `GPTModel` as `transformer_layer_spec`.
    """
    l2 = [qk_l2_norm] * config.num_layers if isinstance(qk_l2_norm, bool) else list(qk_l2_norm)
    latent = bool(config.multi_latent_attention)
    specs = []
    kinds = list(zip(_moe_pattern(config), l2, strict=True))
    for has_experts, use_l2 in (kinds[layer] for layer in stage_layers(config)):
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if has_experts else None,
            normalization=config.normalization,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=latent,
            qk_l2_norm=use_l2,
        )
        attention = spec.submodules.self_attention
        attention.submodules.core_attention = SdpaCoreAttention
        if latent:
            attention.module = NeutralLatentAttention
            if config.q_lora_rank is None:
                attention.submodules.q_layernorm = IdentityOp
        if has_experts:
            parts = moe_submodules(spec)
            parts.router = router
            if experts is not None:
                parts.experts = _of_class(parts.experts, experts)
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=WrappedTorchNorm)


def build_gpt(
    config: TransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    *,
    rotary_base: float = 10_000.0,
    rotary: NeutralRotary | None = None,
    layer_spec: TransformerBlockSubmodules | None = None,
    share_embeddings: bool = False,
    pg_collection: Any = None,
) -> GPTModel:
    """Build a `GPTModel` with rotary positions that runs where its weights are.

    Parameters
    ----------
    config : TransformerConfig
        With the fields of `neutral_config_fields`.
    vocab_size, max_sequence_length : int
        Size of the vocabulary and longest input, in tokens.
    rotary_base : float
        Base of the rotary angles; unused when `rotary` is given.
    rotary : NeutralRotary, optional
        The rotary embedding itself (scaled ones).
    layer_spec : optional
        From `cpu_capable_layer_spec`, which is called when this is absent.
    share_embeddings : bool
        One matrix for embedding and output.
    pg_collection : optional
        Process groups; megatron's global ones by default (made by `ensure_model_parallel` when missing).

    Returns
    -------
    GPTModel
        On the CPU, in evaluation mode. With several expert-parallel ranks its layers have a
        `StaticDispatcher`. With several pipeline stages it is this rank's stage (see `pipeline`); with tensor
        parallelism its logits are this rank's part of the vocabulary.
    """
    ensure_model_parallel()
    groups = get_default_pg_collection() if pg_collection is None else pg_collection
    stage, stages = 0, config.pipeline_model_parallel_size
    if stages > 1:
        stage = dist.get_rank(
            groups.pp if pg_collection else parallel_state.get_pipeline_model_parallel_group()
        )
        if share_embeddings:
            raise UnsupportedFeatureError(
                "pipeline parallelism of a model whose output matrix is its embedding: they are on two stages"
            )
    with warnings.catch_warnings():
        # The stock constructors call each other in ways that they deprecate.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = GPTModel(
            config,
            layer_spec or cpu_capable_layer_spec(config),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type="rope",
            rotary_base=rotary_base,
            share_embeddings_and_output_weights=share_embeddings,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            pg_collection=pg_collection,
        ).eval()
    if config.multi_latent_attention:
        if rotary is not None:
            for layer in model.decoder.layers:
                layer.self_attention.rotary_pos_emb = rotary
    else:
        model.rotary_pos_emb = rotary or NeutralRotary.plain(
            config.kv_channels,
            rotary_base,
            interleaved=config.rotary_interleaved,
            cp_group=model.pg_collection.cp,
        )
    if groups.ep.size() > 1:
        for _, layer in moe_layers(model):
            layer.token_dispatcher = StaticDispatcher(layer.config, groups)
    return model


def moe_layers(model: GPTModel) -> list[tuple[int, MoELayer]]:
    """List the layers with experts: (the model's own number of it, from 0 over all stages; the MoE layer)."""
    return [(x.layer_number - 1, x.mlp) for x in model.decoder.layers if isinstance(x.mlp, MoELayer)]


def causal_positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return the positions 0, 1, ... of every sequence, in the shape of `tokens_BS`."""
    return torch.arange(tokens_BS.size(1), device=tokens_BS.device)[None].expand_as(tokens_BS)
