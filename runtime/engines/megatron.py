"""Takes over the experts of a running megatron-core `GPTModel`.

Two attributes of each `MoELayer` are replaced, ``token_dispatcher`` and ``experts``; the router, the shared
experts and everything around them stay as they are, and nothing of megatron-core is patched. Both attributes
and the six stages of a dispatcher are the same in megatron-core 0.16.1 and 0.19.2, which are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.checkpoint import check_megatron, moe_layers
from moeless_opt.runtime.engines.stock_experts import StockWeights, activation_of
from moeless_opt.runtime.engines.tensor_parallel import TokenPart
from moeless_opt.runtime.live import (
    Adopted,
    AttachOptions,
    GroupedExperts,
    MemoryMeter,
    PooledBank,
    SlotBank,
    SlotExperts,
    can_group,
    meta_shell,
)
from moeless_opt.runtime.live.dispatch import SlotDispatcher

check_megatron()
with warnings.catch_warnings():
    # Megatron-core announces at import every accelerator package that it did not find.
    warnings.simplefilter("ignore")
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

__all__ = ["MegatronDispatcher", "accepts", "adopt", "unwrap"]


def _inner(model: Any) -> Any:
    """What has a decoder inside a model's wrappers, or None."""
    inner = model
    while not hasattr(inner, "decoder") and hasattr(inner, "module"):
        inner = inner.module
    return inner if hasattr(inner, "decoder") else None


def unwrap(model: Any) -> Any:
    """The GPTModel inside its wrappers (Float16Module, data parallel)."""
    inner = _inner(model)
    if inner is None:
        raise UnsupportedFeatureError(
            f"{type(model).__name__} has no decoder: a megatron-core GPTModel is needed"
        )
    return inner


def _refuse(config: Any, layers: list[Any], options: AttachOptions) -> None:
    """Name the first thing that would go wrong.

    Raises
    ------
    UnsupportedFeatureError
    """
    first = layers[0].token_dispatcher
    checks = (
        (first.tp_size > 1, "expert tensor parallelism (expert_tensor_parallel_size > 1)"),
        (config.context_parallel_size > 1, "context parallelism (context_parallel_size > 1)"),
        (
            config.virtual_pipeline_model_parallel_size is not None,
            "interleaved pipeline stages (virtual_pipeline_model_parallel_size)",
        ),
        (
            getattr(config, "cuda_graph_impl", "none") not in ("none", None)
            or getattr(config, "enable_cuda_graph", False)
            or getattr(config, "external_cuda_graph", False),
            "CUDA graphs (cuda_graph_impl), which would replay an old placement",
        ),
        (config.moe_expert_capacity_factor is not None, "dropping tokens (moe_expert_capacity_factor)"),
        (config.moe_shared_expert_overlap, "overlapped shared experts (moe_shared_expert_overlap)"),
        (bool(config.fp8) or bool(getattr(config, "fp4", None)), "fp8 and fp4"),
        (getattr(config, "moe_router_padding_for_quantization", False), "padding for quantization"),
        (getattr(config, "overlap_moe_expert_parallel_comm", False), "overlap_moe_expert_parallel_comm"),
        # Of megatron-core from 0.17 on.
        (
            getattr(config, "moe_latent_size", None),
            "experts of another width than the model (moe_latent_size)",
        ),
        (
            getattr(config, "transformer_impl", "") == "inference_optimized",
            "the inference-optimized layers (transformer_impl)",
        ),
    )
    if options.join is None and (options.ranks is not None or options.store is not None):
        raise UnsupportedFeatureError(
            "ranks and store are for engines without groups of their own: a megatron-core model has its "
            "expert-parallel groups"
        )
    for used, name in checks:
        if used:
            raise UnsupportedFeatureError(f"attach does not support {name} yet")
    for layer in layers:
        if isinstance(layer.token_dispatcher, MegatronDispatcher):
            raise UnsupportedFeatureError("the model is attached already: detach it first")


class MegatronDispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """The six stages of megatron-core over a `SlotDispatcher`."""

    def __init__(self, stock: Any, core: SlotDispatcher, part: TokenPart) -> None:
        groups = SimpleNamespace(ep=stock.ep_group, expt_tp=stock.tp_group, tp_ep=stock.tp_ep_group)
        super().__init__(config=stock.config, pg_collection=groups)
        self.core, self.part = core, part

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count, agree, split, sort by destination."""
        return self.dispatch_chosen(hidden_states, *self.core.chosen(routing_map, probs))

    def dispatch_chosen(
        self, hidden_states: Tensor, expert_Tk: Tensor, prob_Tk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from indices: experts of each token, ascending, and their weights."""
        self.hidden_shape = hidden_states.shape
        rows, marks = hidden_states.reshape(-1, self.hidden_shape[-1]), self.core.valid
        if self.part.cuts:
            run = self.part.run(len(rows))
            rows, expert_Tk, prob_Tk = rows[run], expert_Tk[run], prob_Tk[run]
        self.core.valid = self.part.own(marks)
        try:
            return self.core.prepare(rows, expert_Tk, prob_Tk)
        finally:
            self.core.valid = marks

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send."""
        return self.core.send(hidden_states, probs)

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, NDArray[Any] | Tensor, Tensor]:
        """Sort by local slot."""
        return self.core.sort_in(hidden_states, probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Back to the order of arrival."""
        return self.core.sort_out(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send back."""
        return self.core.send_back(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up."""
        out = self.core.combine(hidden_states)
        if self.part.cuts:
            out = self.part.gather(out, self.hidden_shape[:-1].numel())
        return out.view(self.hidden_shape)


def accepts(model: Any) -> bool:
    """Whether it is a megatron-core `GPTModel`, wrapped or not."""
    inner = _inner(model)
    return inner is not None and hasattr(inner, "config") and hasattr(inner.decoder, "layers")


def adopt(model: Any, options: AttachOptions) -> Adopted:
    """Take over the experts of a megatron-core model; see `Engine.adopt`.

    With expert data parallelism each expert-parallel group is adopted by itself and has its own placement,
    and so has each pipeline stage: it knows its own layers, by the model's own numbers.
    """
    inner = unwrap(model)
    layers = dict(moe_layers(inner))
    if not layers:
        stages = inner.config.pipeline_model_parallel_size
        raise UnsupportedFeatureError(
            f"this pipeline stage (of {stages}) has no MoE layer: attach the others"
            if stages > 1
            else "the model has no MoE layer"
        )
    _refuse(inner.config, list(layers.values()), options)
    first = next(iter(layers.values()))
    device = next(first.experts.parameters()).device
    group = options.group(
        device, dist.get_process_group_ranks(first.ep_group) if dist.is_initialized() else None
    )
    experts = int(inner.config.num_moe_experts)
    begin = group.rank * (experts // group.size)
    meter = MemoryMeter(options.memory_limit)
    parted = inner.config.tensor_model_parallel_size > 1
    part = TokenPart(first.router.tp_group if parted else None, bool(inner.config.sequence_parallel))
    owned = [_own(layer, number, begin, device, meter, options) for number, layer in layers.items()]

    def install(dispatchers: Sequence[SlotDispatcher], most_rows: int | None) -> None:
        for one, core in zip(owned, dispatchers, strict=True):
            one.install(core, most_rows, part)

    def restore() -> None:
        for one in owned:
            one.restore()

    return Adopted(
        model=model,
        group=group,
        layers=list(layers),
        experts=experts,
        topk=int(inner.config.moe_router_topk),
        hidden=int(inner.config.hidden_size),
        banks=[one.bank for one in owned],
        meter=meter,
        run_experts=lambda i, rows, sizes: owned[i].experts(rows, sizes, rows.new_ones(len(rows))),
        install=install,
        restore=restore,
        row_exact=not any(isinstance(one, _Pooled) for one in owned),
        counted=part.counted,
        divided=_divided(inner.config),
    )


def _divided(config: Any) -> str:
    """What a rank alone holds a part of, beside its experts."""
    if config.tensor_model_parallel_size > 1:
        return "tensor parallelism"
    return "pipeline parallelism" if config.pipeline_model_parallel_size > 1 else ""


def _own(
    layer: Any, number: int, begin: int, device: torch.device, meter: MemoryMeter, options: AttachOptions
) -> _Owned | _Pooled:
    """Take a layer over, its experts to be computed as asked."""
    single = hasattr(layer.experts, "local_experts")
    dtype = next(layer.experts.parameters()).dtype
    widths = int(layer.config.hidden_size), int(layer.config.moe_ffn_hidden_size)
    if options.experts == "grouped" and not can_group(dtype, *widths):
        why = (
            f"{dtype}" if not can_group(dtype) else f"rows of {widths} x {dtype}, which are no whole 16 bytes"
        )
        raise UnsupportedFeatureError(f"attach: there are no grouped products of {why}; use experts='loop'")
    group = options.experts == "grouped" or (device.type == "cuda" and options.experts == "auto")
    if single and not (group and can_group(dtype, *widths)):
        return _Owned(layer, number, begin, device, meter)
    try:
        stock, activation = StockWeights(layer.experts), activation_of(layer.config)
    except UnsupportedFeatureError as error:
        if single and options.experts == "auto":
            return _Owned(layer, number, begin, device, meter)
        raise UnsupportedFeatureError(f"attach cannot group the experts of layer {number}: {error}") from None
    read = stock.read()
    places = options.places or len(read) + max(2, len(read) // 4)
    resident: dict[int, list[Tensor]] = {begin + i: list(weights) for i, weights in enumerate(read)}
    like = [torch.empty_like(t, memory_format=torch.contiguous_format, device="meta") for t in read[0]]
    bank = PooledBank(number, resident, like, device, meter, max(places, len(read)))
    experts = GroupedExperts(bank, activation, bool(layer.config.moe_apply_probs_on_input))
    if options.experts == "loop":
        experts.grouped = False
    bank.on_install = experts.follow
    stock.alias([bank.resident[e] for e in bank.order])
    return _Pooled(layer, bank, experts, stock)


class _Pooled:
    """One MoE layer whose experts' weights were taken into a pool.

    Parameters
    ----------
    layer : MoELayer
        In its stock state.
    bank, experts, stock
        The pool, what computes, and what the weights were taken from.
    """

    def __init__(self, layer: Any, bank: PooledBank, experts: GroupedExperts, stock: StockWeights) -> None:
        self.layer, self.dispatcher, self.module = layer, layer.token_dispatcher, layer.experts
        self.bank, self.experts, self.stock = bank, experts, stock
        self.experts.train(self.module.training)

    def install(self, core: SlotDispatcher, most_rows: int | None, part: TokenPart) -> None:
        """Let the core dispatch for the layer."""
        self.stock.hollow()
        core.slot_order, core.sizes_there = self.experts.slot_order, self.experts.grouped
        self.layer.experts = self.experts
        self.layer.token_dispatcher = MegatronDispatcher(self.dispatcher, core, part)

    def restore(self) -> None:
        """Give the layer its stock parts again."""
        self.stock.write([self.bank.resident[e] for e in self.bank.order])
        self.layer.experts, self.layer.token_dispatcher = self.module, self.dispatcher


class _Owned:
    """One MoE layer that was taken over: its stock parts, and what stands in their place.

    Parameters
    ----------
    layer : MoELayer
        In its stock state.
    number : int
        The model's own number of it.
    begin : int
        Expert of the first stock module of this rank.
    """

    def __init__(self, layer: Any, number: int, begin: int, device: torch.device, meter: MemoryMeter) -> None:
        self.layer, self.stock, self.dispatcher = layer, layer.experts, layer.token_dispatcher
        # Weights that travel arrive in new parameters, which are to have what trainers read from the old.
        self.marks = [
            [(p.requires_grad, dict(vars(p))) for p in module.parameters()]
            for module in self.stock.local_experts
        ]
        modules = {begin + i: module for i, module in enumerate(self.stock.local_experts)}
        like = self.stock.local_experts[0]
        self.experts = SlotExperts(meta_shell(like), bool(layer.config.moe_apply_probs_on_input))
        self.experts.train(self.stock.training)
        for expert, module in modules.items():
            self.experts.adopt(expert, module)
        resident = {e: list(m.parameters()) for e, m in modules.items()}
        follow = self.experts.follow
        self.bank = SlotBank(number, resident, list(like.parameters()), device, meter, follow)
        follow(self.bank)

    def install(self, core: SlotDispatcher, most_rows: int | None, part: TokenPart) -> None:
        """Let the core dispatch for the layer."""
        # The stock bank must not keep weights alive that have moved away.
        self.stock.local_experts = torch.nn.ModuleList()
        self.experts.most_rows = most_rows
        self.layer.experts = self.experts
        self.layer.token_dispatcher = MegatronDispatcher(self.dispatcher, core, part)

    def restore(self) -> None:
        """Give the layer its stock parts again."""
        units = [self.experts.unit(e) for e in self.bank.order]
        for unit, marks in zip(units, self.marks, strict=True):
            for parameter, (trains, own) in zip(unit.parameters(), marks, strict=True):
                parameter.requires_grad_(trains)
                vars(parameter).update(own)
        self.stock.local_experts = torch.nn.ModuleList(units)
        self.layer.experts, self.layer.token_dispatcher = self.stock, self.dispatcher
