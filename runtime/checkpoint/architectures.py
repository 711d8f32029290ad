"""What each architecture's checkpoint means in megatron-core: configuration, and which tensor goes where.

Every parameter of the model is filled by one or more *pieces*: a tensor on disk (or one entry of it), and the
part of the parameter that it fills. A table (`Names`) says how an architecture spells its tensors; what
differs beyond the names stands in its `Architecture` entry.

Where megatron-core and the checkpoints differ:

- queries, keys and values are one matrix, its rows grouped by key-value head: first the
  queries of the group, then its key, then its value;
- the gate and up projections of a gated layer are one matrix, gate rows first;
- Llama 4 keeps the experts of a layer in one tensor, transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.config import checked_config, wrong
from moeless_opt.runtime.checkpoint.parts import (
    MLATransformerConfig,
    NeutralRouter,
    TransformerConfig,
    ensure_model_parallel,
    neutral_config_fields,
    parallel_state,
    quiet_config,
)
from moeless_opt.runtime.checkpoint.rope import RotarySpec, rotary_spec

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GroupLimitedRouter",
    "Names",
    "Piece",
    "Recipe",
    "Shard",
    "SparseMixerRouter",
    "recipe",
]

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, and the part of a parameter that it fills.

    Parameters
    ----------
    target : str
        The parameter (or buffer) of the megatron-core model.
    source : str
        The tensor's name on disk.
    shape : tuple of int
        Its whole shape there.
    view : callable
        Takes the parameter, returns the part to fill.
    index : int, optional
        Take ``tensor[index]`` (one expert of a fused tensor).
    transpose : bool
        Swap the two axes of what was read.
    cut : (int, int, int), optional
        Take just this part: along this axis, the part of this number, of so many equal ones.
    """

    target: str
    source: str
    shape: tuple[int, ...]
    view: View = lambda parameter: parameter
    index: int | None = None
    transpose: bool = False
    cut: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Shard:
    """The part of a model that one rank holds, beside its experts.

    Parameters
    ----------
    rank, ranks : int
        Which part of what tensor parallelism divides, of how many.
    layers : range, optional
        Layers of this pipeline stage; all by default.
    """

    rank: int = 0
    ranks: int = 1
    layers: range | None = None

    def cut(self, axis: int) -> tuple[int, int, int] | None:
        """The rank's part along an axis of a tensor on disk."""
        return None if self.ranks == 1 else (axis, self.rank, self.ranks)


@dataclass(frozen=True)
class Names:
    """How an architecture spells its tensors inside ``model.layers.N.``; empty where it has none."""

    mlp: str
    router: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router_bias: str = ""
    shared: str = ""
    fused_experts: bool = False
    #: Tensors that the text model does not use: beginnings of their names.
    unused: tuple[str, ...] = ()
    #: A module by which the layers that draft tokens, behind the model's own, are known.
    draft: str = ""
    #: Put in front of every name (multimodal checkpoints).
    prefix: str = ""


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build one checkpoint's model and to fill it.

    Parameters
    ----------
    architecture : Architecture
        Its entry in the table.
    hf : dict
        The text model's part of ``config.json``.
    names : Names
        How the tensors are spelled in this checkpoint.
    rotary : RotarySpec
        Positions.
    fields : dict
        Arguments of the megatron-core configuration.
    moe_L : tuple of bool
        Which layers have experts.
    qk_l2_L : tuple of bool
        Which layers divide queries and keys by their length.
    max_sequence_length : int
        Longest input for which the model is right.
    """

    architecture: Architecture
    hf: dict[str, Any]
    names: Names
    rotary: RotarySpec
    fields: dict[str, Any]
    moe_L: tuple[bool, ...]
    qk_l2_L: tuple[bool, ...]
    max_sequence_length: int

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.moe_L)

    @property
    def experts(self) -> int:
        """Routed experts of a layer that has any."""
        return int(self.fields["num_moe_experts"])

    @property
    def latent(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.architecture.latent

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return bool(self.hf.get("tie_word_embeddings", False))

    @property
    def output_bias(self) -> bool:
        """Whether the output layer has a bias."""
        return bool(self.hf.get("lm_head_bias", False))

    @property
    def attention_bias(self) -> bool:
        """Whether the attention's projections have biases."""
        return bool(self.fields.get("add_qkv_bias", False))

    def transformer_config(self, dtype: torch.dtype) -> TransformerConfig:
        """Build megatron-core's configuration, for parameters of type `dtype`."""
        ensure_model_parallel()
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        for kind, ranks in (
            ("expert tensor", parallel_state.get_expert_tensor_parallel_world_size()),
            ("context", parallel_state.get_context_parallel_world_size()),
        ):
            _refuse(ranks > 1, f"{kind} parallelism ({ranks} ranks)")
        self._divisible(tensor, stages)
        size = parallel_state.get_expert_model_parallel_world_size()
        if self.experts % size:
            raise UnsupportedFeatureError(
                f"{self.experts} experts cannot be divided evenly among {size} expert-parallel ranks"
            )
        fields = neutral_config_fields(
            **self.fields,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            perform_initialization=False,
            expert_model_parallel_size=size,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=stages,
            expert_tensor_parallel_size=1,
            pipeline_dtype=dtype if stages > 1 else None,
            num_layers_in_last_pipeline_stage=self._last_stage(stages) if self.layers % stages else None,
        )
        return quiet_config(MLATransformerConfig if self.latent else TransformerConfig, **fields)

    def _divisible(self, tensor: int, stages: int) -> None:
        """Refuse divisions that do not come out even, or that are not supported.

        Raises
        ------
        UnsupportedFeatureError
        """
        if tensor > 1:
            _refuse(self.latent, f"tensor parallelism ({tensor} ranks) of multi-head latent attention")
            sizes = {
                "attention heads": self.fields["num_attention_heads"],
                "key-value heads": self.fields["num_query_groups"],
                "tokens of the vocabulary": self.hf["vocab_size"],
                "channels of the dense layers": 0 if all(self.moe_L) else self._dense_width(),
                "channels of the shared experts": self.fields.get("moe_shared_expert_intermediate_size") or 0,
            }
            for what, count in sizes.items():
                _refuse(count % tensor > 0, f"tensor parallelism: {count} {what} over {tensor} ranks")
        if stages > 1:
            _refuse(
                self._last_stage(stages) < 1, f"pipeline parallelism: {self.layers} layers in {stages} stages"
            )
            _refuse(
                self.tied,
                f"pipeline parallelism ({stages} stages) of a model whose output matrix is its embedding",
            )

    def _last_stage(self, stages: int) -> int:
        """Layers of the last pipeline stage; the others have as many each, and no fewer."""
        return self.layers - (stages - 1) * -(-self.layers // stages)

    # ------------------------------------------------------------------------------------------- pieces

    def pieces(
        self, local_experts: Callable[[int], list[int]], shard: Shard | None = None
    ) -> Iterator[Piece]:
        """List all pieces of a rank's model, in the order of the layers.

        Parameters
        ----------
        local_experts : callable
            The experts that the rank holds of a layer (given its index), in the order of its modules.
        shard : Shard, optional
            What the rank holds of the rest; all by default.
        """
        held = shard or Shard()
        vocab, width = self.hf["vocab_size"], self.hf["hidden_size"]
        model = self.names.prefix + "model."
        mine = held.layers or range(self.layers)
        if mine.start == 0:
            source = model + "embed_tokens.weight"
            yield Piece("embedding.word_embeddings.weight", source, (vocab, width), cut=held.cut(0))
        for layer in mine:
            target = f"decoder.layers.{layer - mine.start}."
            yield from self._attention(layer, target, held)
            yield from self._norms(layer, target)
            if self.moe_L[layer]:
                yield from self._moe_shared(layer, target + "mlp.", held)
                for slot, expert in enumerate(local_experts(layer)):
                    module = f"{target}mlp.experts.local_experts.{slot}."
                    yield from self.expert_pieces(layer, expert, module)
            else:
                yield from self._gated(target + "mlp.", self._mlp(layer), self._dense_width(), held)
        if mine.stop == self.layers:
            yield from self._norm("decoder.final_layernorm.", model + "norm.", width)
            head = self.names.prefix + "lm_head."
            if not self.tied:
                yield Piece("output_layer.weight", head + "weight", (vocab, width), cut=held.cut(0))
            if self.output_bias:
                yield Piece("output_layer.bias", head + "bias", (vocab,), cut=held.cut(0))

    def expert_pieces(self, layer: int, expert: int, module: str = "") -> Iterator[Piece]:
        """List the pieces of one expert; targets begin with `module` (empty: relative to the expert)."""
        width, inner = self.hf["hidden_size"], self.fields["moe_ffn_hidden_size"]
        base = self._mlp(layer) + "experts."
        if not self.names.fused_experts:
            yield from self._gated(module, f"{base}{expert}.", inner)
            return
        E = self.experts
        for target, source, shape in (
            ("linear_fc1", "gate_up_proj", (E, width, 2 * inner)),
            ("linear_fc2", "down_proj", (E, inner, width)),
        ):
            yield Piece(f"{module}{target}.weight", base + source, shape, index=expert, transpose=True)

    def _layer(self, layer: int) -> str:
        return f"{self.names.prefix}model.layers.{layer}."

    def _mlp(self, layer: int) -> str:
        return self._layer(layer) + self.names.mlp

    def _dense_width(self) -> int:
        return int(self.fields["ffn_hidden_size"])

    def _norm(self, target: str, source: str, width: int) -> Iterator[Piece]:
        yield Piece(target + "weight", source + "weight", (width,))
        if self.fields.get("normalization") == "LayerNorm":
            yield Piece(target + "bias", source + "bias", (width,))

    def _norms(self, layer: int, target: str) -> Iterator[Piece]:
        width = self.hf["hidden_size"]
        yield from self._norm(target + "input_layernorm.", self._layer(layer) + "input_layernorm.", width)
        yield from self._norm(
            target + "pre_mlp_layernorm.", self._layer(layer) + "post_attention_layernorm.", width
        )

    def _gated(self, target: str, source: str, inner: int, held: Shard | None = None) -> Iterator[Piece]:
        """Gate and up projection side by side, and the down projection; tensor parallelism divides each."""
        width, names, held = self.hf["hidden_size"], self.names, held or Shard()
        fc1, shape, half = target + "linear_fc1.weight", (inner, width), inner // held.ranks
        yield Piece(fc1, f"{source}{names.gate}.weight", shape, lambda p: p[:half], cut=held.cut(0))
        yield Piece(fc1, f"{source}{names.up}.weight", shape, lambda p: p[half:], cut=held.cut(0))
        down = f"{source}{names.down}.weight"
        yield Piece(target + "linear_fc2.weight", down, (width, inner), cut=held.cut(1))

    def _moe_shared(self, layer: int, target: str, held: Shard) -> Iterator[Piece]:
        """The router and the shared experts of a layer."""
        E, width = self.experts, self.hf["hidden_size"]
        router = self._mlp(layer) + self.names.router
        yield Piece(target + "router.weight", router + ".weight", (E, width))
        if self.names.router_bias:
            yield Piece(target + "router.expert_bias", f"{router}.{self.names.router_bias}", (E,))
        if self.names.shared:
            inner = self.fields["moe_shared_expert_intermediate_size"]
            shared = self._mlp(layer) + self.names.shared
            yield from self._gated(target + "shared_experts.", shared, inner, held)

    def _attention(self, layer: int, target: str, held: Shard) -> Iterator[Piece]:
        target, source = target + "self_attention.", self._layer(layer) + "self_attn."
        if self.latent:
            yield from self._latent_attention(target, source)
        else:
            yield from self._grouped_attention(target, source, held)

    def _grouped_attention(self, target: str, source: str, held: Shard) -> Iterator[Piece]:
        f, hidden = self.fields, self.hf["hidden_size"]
        groups, channels = f["num_query_groups"], f["kv_channels"]
        queries = f["num_attention_heads"] // groups * channels  # rows of one group
        parts = {
            "q": (0, queries),
            "k": (queries, queries + channels),
            "v": (queries + channels, queries + 2 * channels),
        }
        for name, (first, last) in parts.items():
            rows = groups * (last - first)

            def rows_of_groups(p: torch.Tensor, a: int = first, b: int = last) -> torch.Tensor:
                return p.view(groups // held.ranks, -1, *p.shape[1:])[:, a:b]

            for kind, shape in (("weight", (rows, hidden)), ("bias", (rows,))):
                if kind == "weight" or self.attention_bias:
                    to, of = f"{target}linear_qkv.{kind}", f"{source}{name}_proj.{kind}"
                    yield Piece(to, of, shape, rows_of_groups, cut=held.cut(0))
        heads = f["num_attention_heads"] * channels
        proj = source + "o_proj.weight"
        yield Piece(target + "linear_proj.weight", proj, (hidden, heads), cut=held.cut(1))
        if self.attention_bias:
            yield Piece(target + "linear_proj.bias", source + "o_proj.bias", (hidden,))
        if f.get("qk_layernorm"):
            for name in "qk":
                yield Piece(f"{target}{name}_layernorm.weight", f"{source}{name}_norm.weight", (channels,))

    def _latent_attention(self, target: str, source: str) -> Iterator[Piece]:
        f, hidden, heads = self.fields, self.hf["hidden_size"], self.fields["num_attention_heads"]
        q_width = heads * (f["qk_head_dim"] + f["qk_pos_emb_head_dim"])
        kv_rank, q_rank = f["kv_lora_rank"], f["q_lora_rank"]
        table: list[tuple[str, str, tuple[int, ...]]] = [
            ("linear_kv_down_proj", "kv_a_proj_with_mqa", (kv_rank + f["qk_pos_emb_head_dim"], hidden)),
            ("kv_layernorm", "kv_a_layernorm", (kv_rank,)),
            ("linear_kv_up_proj", "kv_b_proj", (heads * (f["qk_head_dim"] + f["v_head_dim"]), kv_rank)),
            ("linear_proj", "o_proj", (hidden, heads * f["v_head_dim"])),
        ]
        if q_rank is None:
            table.append(("linear_q_proj", "q_proj", (q_width, hidden)))
        else:
            table += [
                ("linear_q_down_proj", "q_a_proj", (q_rank, hidden)),
                ("q_layernorm", "q_a_layernorm", (q_rank,)),
                ("linear_q_up_proj", "q_b_proj", (q_width, q_rank)),
            ]
        for ours, theirs, shape in table:
            yield Piece(f"{target}{ours}.weight", f"{source}{theirs}.weight", shape)


class SparseMixerRouter(NeutralRouter):
    """Phi-3.5-MoE's routing: the second expert is chosen, and weighted, as if the first did not exist.

    Each choice's weight is a soft-max over the experts whose logit is within ``2 * jitter`` of the best one,
    relatively; the two weights do not add up to one.

    References
    ----------
    Liu et al.: GRIN: GRadient-INformed MoE, arXiv:2409.12136 (evaluation mode of its SparseMixer-v2).
    """

    jitter = 0.01

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dense probabilities and the map of chosen experts, both [tokens, experts]."""
        if self.training:
            raise UnsupportedFeatureError("SparseMixerRouter routes for inference only: call model.eval()")
        scores = logits.reshape(-1, self.config.num_moe_experts).float()
        left = scores
        probs = torch.zeros_like(scores)
        for _ in range(self.topk):
            best, chosen = left.max(-1, keepdim=True)
            far = (best - scores) / scores.abs().clamp(min=best) > 2 * self.jitter
            weight = torch.softmax(left.masked_fill(far, float("-inf")), -1).gather(1, chosen)
            probs.scatter_(1, chosen, weight)
            left = left.scatter(1, chosen, float("-inf"))
        return probs.type_as(logits), left.isneginf()


class GroupLimitedRouter(NeutralRouter):
    """DeepSeek-V3's routing: experts of the groups whose two best experts are the best.

    Megatron-core rates a group by its best ``topk / groups chosen`` experts, which is the same for
    DeepSeek-V3 itself (8 of 4 groups) and not for other limits, and leaves the weight of a single expert.

    References
    ----------
    DeepSeek-AI: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2, and the released code.
    """

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dense probabilities and the map of chosen experts, both [tokens, experts]."""
        if self.training:
            raise UnsupportedFeatureError("GroupLimitedRouter routes for inference only: call model.eval()")
        config = self.config
        scores = torch.sigmoid(logits.reshape(-1, config.num_moe_experts).float())
        limits = (config.moe_router_num_groups, config.moe_router_group_topk)
        # A replay (megatron-core's own class) gives back what it was told in place of the choice.
        choose = _best_of_groups if self.router_replay is None else self.router_replay.get_replay_topk
        given = () if self.router_replay is None else (_best_of_groups,)
        _, chosen = choose(scores + self.expert_bias, self.topk, *limits, *given)
        weight = scores.gather(1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * config.moe_router_topk_scaling_factor
        probs = torch.zeros_like(scores).scatter(1, chosen, weight)
        return probs.type_as(logits), torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def _best_of_groups(
    scores: torch.Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best experts [tokens, topk] of the best groups, with their scores."""
    if num_groups is not None and group_topk is not None:
        grouped = scores.view(len(scores), num_groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(group_topk, dim=-1, sorted=False).indices
        out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, False)
        scores = grouped.masked_fill(out[..., None], float("-inf")).view(scores.shape)
    values, indices = scores.topk(topk, dim=-1)
    return values, indices


# ------------------------------------------------------------------------------------- config.json to fields


def _get(hf: dict[str, Any], name: str) -> Any:
    if hf.get(name) is None:
        raise wrong(name, "is missing")
    return hf[name]


def _refuse(condition: object, what: str) -> None:
    if condition:
        raise UnsupportedFeatureError(f"{what} is not supported by the loader")


def _common(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields that all architectures read alike."""
    _refuse(hf.get("hidden_act", "silu") != "silu", f"hidden_act {hf.get('hidden_act')!r} (only 'silu')")
    return {
        "num_layers": _get(hf, "num_hidden_layers"),
        "hidden_size": _get(hf, "hidden_size"),
        "ffn_hidden_size": _get(hf, "intermediate_size"),
        "num_attention_heads": _get(hf, "num_attention_heads"),
        "moe_router_topk": _get(hf, "num_experts_per_tok"),
        "layernorm_epsilon": _get(hf, "rms_norm_eps"),
        "moe_router_load_balancing_type": "none",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


def _grouped(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of grouped-query attention."""
    heads, width = _get(hf, "num_attention_heads"), _get(hf, "hidden_size")
    groups = hf.get("num_key_value_heads", heads)
    if heads % groups:
        raise wrong("num_key_value_heads", f"is {groups}, must divide the {heads} attention heads")
    if "head_dim" not in hf and width % heads:
        raise wrong(
            "num_attention_heads", f"is {heads}, must divide hidden_size {width} where head_dim is missing"
        )
    return {"num_query_groups": groups, "kv_channels": hf.get("head_dim", width // heads)}


def _mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf.get("attention_bias"), "attention_bias in Mixtral")
    # Its one weight would be 1; megatron-core has a soft-max over all experts there.
    _refuse(_get(hf, "num_experts_per_tok") == 1, "num_experts_per_tok 1 in Mixtral")
    inner = {
        "moe_ffn_hidden_size": _get(hf, "intermediate_size"),
        "num_moe_experts": _get(hf, "num_local_experts"),
    }
    return _common(hf) | _grouped(hf) | inner


def _phimoe(hf: dict[str, Any]) -> dict[str, Any]:
    fields = _mixtral({**hf, "attention_bias": False})
    _refuse(
        fields["moe_router_topk"] != 2,
        f"num_experts_per_tok {fields['moe_router_topk']} in Phi-3.5-MoE (only 2)",
    )
    return fields | {"normalization": "LayerNorm", "add_qkv_bias": bool(hf.get("attention_bias"))}


def _qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf.get("attention_bias"), "attention_bias in Qwen3-MoE")
    _refuse(
        _get(hf, "num_experts_per_tok") == 1 and hf.get("norm_topk_prob", False),
        "num_experts_per_tok 1 with norm_topk_prob in Qwen3-MoE",
    )
    return (
        _common(hf)
        | _grouped(hf)
        | {
            "moe_ffn_hidden_size": _get(hf, "moe_intermediate_size"),
            "num_moe_experts": hf.get("num_experts") or _get(hf, "num_local_experts"),
            "qk_layernorm": True,
            # Weights that are not renormalised over the chosen experts: soft-max before the choice.
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        }
    )


def _llama4(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf.get("attention_bias"), "attention_bias in Llama 4")
    top_k = _get(hf, "num_experts_per_tok")
    _refuse(top_k != 1, f"num_experts_per_tok {top_k} in Llama 4 (only 1)")
    inner = _get(hf, "intermediate_size")
    return (
        _common(hf)
        | _grouped(hf)
        | {
            "ffn_hidden_size": hf.get("intermediate_size_mlp") or inner,
            "moe_ffn_hidden_size": inner,
            "moe_shared_expert_intermediate_size": inner,
            "num_moe_experts": _get(hf, "num_local_experts"),
            "moe_router_score_function": "sigmoid",
            "moe_apply_probs_on_input": True,
            "rotary_interleaved": True,
            "no_rope_freq": [int(not rotates) for rotates in _llama4_rope_layers(hf)],
        }
    )


def _llama4_rope_layers(hf: dict[str, Any]) -> list[int]:
    """1 where a layer has rotary positions."""
    interval, layers = hf.get("no_rope_layer_interval") or 4, _get(hf, "num_hidden_layers")
    listed = list(hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)])
    if len(listed) != layers or not set(listed) <= {0, 1}:
        raise wrong("no_rope_layers", f"is {listed}, must have a 0 or 1 for each of the {layers} layers")
    return listed


def _deepseek(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf.get("attention_bias"), "attention_bias in DeepSeek-V3")
    _refuse(not hf.get("rope_interleave", True), "rope_interleave = false in DeepSeek-V3")
    _refuse(not hf.get("norm_topk_prob", True), "norm_topk_prob = false in DeepSeek-V3")
    scoring, method = hf.get("scoring_func", "sigmoid"), hf.get("topk_method", "noaux_tc")
    _refuse(scoring != "sigmoid", f"scoring_func {scoring!r} in DeepSeek-V3 (only 'sigmoid')")
    _refuse(method != "noaux_tc", f"topk_method {method!r} in DeepSeek-V3 (only 'noaux_tc')")
    groups, experts = hf.get("n_group") or 1, _get(hf, "n_routed_experts")
    fields = _common(hf) | {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": _get(hf, "kv_lora_rank"),
        "qk_head_dim": _get(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": _get(hf, "qk_rope_head_dim"),
        "v_head_dim": _get(hf, "v_head_dim"),
        "moe_ffn_hidden_size": _get(hf, "moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": _get(hf, "moe_intermediate_size")
        * _get(hf, "n_shared_experts"),
        "num_moe_experts": experts,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": _get(hf, "routed_scaling_factor"),
        "moe_router_dtype": "fp32",
        "rope_type": "rope",  # the frequencies come from the checkpoint's own description
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    if groups > 1:
        chosen = _get(hf, "topk_group")
        if experts % groups or experts // groups < 2:
            raise wrong("n_group", f"is {groups}: {experts} experts do not divide into groups of two or more")
        if not 1 <= chosen <= groups:
            raise wrong("topk_group", f"is {chosen}, must be from 1 to {groups}, the number of groups")
        if fields["moe_router_topk"] > chosen * (experts // groups):
            raise wrong(
                "num_experts_per_tok",
                f"is {fields['moe_router_topk']}; "
                f"{chosen} groups have {chosen * (experts // groups)} experts",
            )
        fields |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    return fields


# --------------------------------------------------------------------------------------------- the five


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    Parameters
    ----------
    title : str
        For messages.
    fields : callable
        ``config.json`` to megatron-core's configuration fields.
    names : Names
        How its tensors are spelled.
    theta : float
        Rotary base where the file gives none.
    latent : bool
        Multi-head latent attention.
    router : type
        Class of its routers.
    """

    title: str
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    names: Names
    theta: float = 10_000.0
    latent: bool = False
    router: type[NeutralRouter] = field(default=NeutralRouter)


#: By the names in the ``architectures`` field of ``config.json``.
ARCHITECTURES: dict[str, Architecture] = {
    "MixtralForCausalLM": Architecture(
        "Mixtral", _mixtral, Names("block_sparse_moe.", "gate", gate="w1", up="w3", down="w2"), theta=1e6
    ),
    "PhimoeForCausalLM": Architecture(
        "Phi-3.5-MoE",
        _phimoe,
        Names("block_sparse_moe.", "gate", gate="w1", up="w3", down="w2"),
        theta=1e6,
        router=SparseMixerRouter,
    ),
    "Qwen3MoeForCausalLM": Architecture("Qwen3-MoE", _qwen3, Names("mlp.", "gate")),
    "Llama4ForCausalLM": Architecture(
        "Llama 4",
        _llama4,
        Names("feed_forward.", "router", shared="shared_expert.", fused_experts=True),
        theta=5e5,
    ),
    "Llama4ForConditionalGeneration": Architecture(
        "Llama 4 (text)",
        _llama4,
        Names(
            "feed_forward.",
            "router",
            shared="shared_expert.",
            fused_experts=True,
            prefix="language_model.",
            unused=("vision_model.", "multi_modal_projector."),
        ),
        theta=5e5,
    ),
    "DeepseekV3ForCausalLM": Architecture(
        "DeepSeek-V3",
        _deepseek,
        Names(
            "mlp.", "gate", router_bias="e_score_correction_bias", shared="shared_experts.", draft="eh_proj"
        ),
        latent=True,
        router=GroupLimitedRouter,
    ),
}
# Microsoft's own files of Phi-3.5-MoE spell it so.
ARCHITECTURES["PhiMoEForCausalLM"] = ARCHITECTURES["PhimoeForCausalLM"]


def _moe_layers(title: str, hf: dict[str, Any]) -> tuple[bool, ...]:
    layers = range(_get(hf, "num_hidden_layers"))
    for name in ("mlp_only_layers", "moe_layers"):
        if beyond := [i for i in hf.get(name) or () if i >= len(layers)]:
            raise wrong(name, f"names layer {beyond[0]}; there are {len(layers)}, counted from 0")
    if title == "Qwen3-MoE":
        dense, step = set(hf.get("mlp_only_layers") or ()), hf.get("decoder_sparse_step") or 1
        return tuple(i not in dense and (i + 1) % step == 0 for i in layers)
    if title.startswith("Llama 4"):
        step = hf.get("interleave_moe_layer_step") or 1
        listed = hf.get("moe_layers")
        chosen = set(range(step - 1, len(layers), step) if listed is None else listed)
        return tuple(i in chosen for i in layers)
    if title == "DeepSeek-V3":
        first, step = hf.get("first_k_dense_replace") or 0, hf.get("moe_layer_freq") or 1
        return tuple(i >= first and i % step == 0 for i in layers)
    return tuple(True for _ in layers)


def _longest_input(title: str, hf: dict[str, Any]) -> int:
    """Longest input on which attention is plain causal attention, as it is computed here."""
    longest = int(_get(hf, "max_position_embeddings"))
    windowed = hf.get("use_sliding_window", True)
    if hf.get("sliding_window") and windowed:
        longest = min(longest, int(hf["sliding_window"]))
    if title.startswith("Llama 4"):
        if hf.get("attention_chunk_size"):
            longest = min(longest, int(hf["attention_chunk_size"]))
        if hf.get("attn_temperature_tuning", True):  # from this position on, queries are scaled
            longest = min(longest, int(hf.get("floor_scale") or 8192) - 1)
    return longest


def recipe(config: dict[str, Any], max_sequence_length: int | None = None) -> Recipe:
    """Work out how a checkpoint is to be built and filled.

    Parameters
    ----------
    config : dict
        The content of its ``config.json``.
    max_sequence_length : int, optional
        Longest input that will be used; by default the longest for which the loaded model is right.

    Returns
    -------
    Recipe
        Everything but the tensors.

    Raises
    ------
    UnsupportedFeatureError
        An architecture or a feature that is not known, by name.
    FormatError
        A field is missing or wrong.
    """
    listed = config.get("architectures") or ["none"]
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise wrong("architectures", f"is {listed!r}, must be a list of names")
    found = next((ARCHITECTURES[x] for x in listed if x in ARCHITECTURES), None)
    if found is None:
        raise UnsupportedFeatureError(
            f"architecture {', '.join(listed)} is not supported; known are {', '.join(ARCHITECTURES)}"
        )
    text = config.get("text_config")
    hf = checked_config({**config, **text} if isinstance(text, dict) else config)
    _get(hf, "vocab_size")
    fields = found.fields(hf)
    if fields["moe_router_topk"] > fields["num_moe_experts"]:
        raise wrong(
            "num_experts_per_tok",
            f"is {fields['moe_router_topk']}, there are {fields['num_moe_experts']} experts",
        )
    width = fields["qk_pos_emb_head_dim"] if found.latent else fields["kv_channels"]
    if width % 2:
        raise wrong("qk_rope_head_dim" if found.latent else "head_dim", f"is {width}, must be even")
    rotary = rotary_spec(hf, width, found.theta)
    if found.latent:
        _refuse(
            abs(rotary.logit_scale - 1) > 1e-12,
            f"an attention factor of {rotary.logit_scale:.4g} on the rotated channels of latent attention",
        )
        if rotary.channel_scale is not None:
            factor, weight = rotary.channel_scale
            fields |= {"rotary_scaling_factor": factor, "mscale_all_dim": weight}
    elif rotary.logit_scale != 1.0:
        fields["softmax_scale"] = rotary.logit_scale**2 / fields["kv_channels"] ** 0.5
    moe_L = _moe_layers(found.title, hf)
    if not any(moe_L):
        raise wrong("num_hidden_layers", f"is {len(moe_L)}, and none of these layers has experts")
    fields["moe_layer_freq"] = [int(x) for x in moe_L]
    longest = _longest_input(found.title, hf)
    if max_sequence_length is not None:
        max_sequence_length = whole("max_sequence_length", max_sequence_length, low=1)
    if max_sequence_length is not None and max_sequence_length > longest:
        raise UnsupportedFeatureError(
            f"{found.title}: inputs of {max_sequence_length} tokens; beyond {longest} the model needs "
            "sliding-window or chunked attention, scaled queries or more positions, which is not built here"
        )
    qk_l2 = (False,) * len(moe_L)
    if found.title.startswith("Llama 4") and hf.get("use_qk_norm", True):
        qk_l2 = tuple(bool(x) for x in _llama4_rope_layers(hf))
        fields["qk_l2_norm"] = any(qk_l2)
    return Recipe(
        architecture=found,
        hf=hf,
        names=found.names,
        rotary=rotary,
        fields=fields,
        moe_L=moe_L,
        qk_l2_L=qk_l2,
        max_sequence_length=max_sequence_length or longest,
    )
