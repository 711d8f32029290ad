"""Takes over the experts of a running megatron-core `GPTModel`.

Two attributes of each `MoELayer` are replaced, ``token_dispatcher`` and ``experts``; the router, the shared
experts and everything around them stay as they are, and nothing of megatron-core is patched. Both attributes
and the six stages of a dispatcher are the same from megatron-core 0.16.1 to 0.19.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.problems.spec.topology import Links
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher, chosen_experts
from moeless_opt.runtime.live.dispatch.shares import SharePolicy
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank, SlotExperts, meta_shell
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.home import HomeStore
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.live.slots import SlotTable, static_slots

with warnings.catch_warnings():
    # Megatron-core announces at import every accelerator package that it did not find.
    warnings.simplefilter("ignore")
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

__all__ = ["MegatronDispatcher", "attach", "unwrap"]


def unwrap(model: Any) -> Any:
    """The GPTModel inside its wrappers (Float16Module, data parallel)."""
    inner = model
    while not hasattr(inner, "decoder") and hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, "decoder"):
        raise UnsupportedFeatureError(
            f"{type(model).__name__} has no decoder: a megatron-core GPTModel is needed"
        )
    return inner


def _refuse(config: Any, layers: list[Any]) -> None:
    """Name the first thing that would go wrong.

    Raises
    ------
    UnsupportedFeatureError
    """
    first = layers[0].token_dispatcher
    checks = (
        (first.tp_size > 1, "expert tensor parallelism (expert_tensor_parallel_size > 1)"),
        (config.tensor_model_parallel_size > 1, "tensor parallelism (tensor_model_parallel_size > 1)"),
        (config.pipeline_model_parallel_size > 1, "pipeline parallelism (pipeline_model_parallel_size > 1)"),
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
    )
    for used, name in checks:
        if used:
            raise UnsupportedFeatureError(f"attach does not support {name} yet")
    for layer in layers:
        if not hasattr(layer.experts, "local_experts"):
            kind = type(layer.experts).__name__
            raise UnsupportedFeatureError(
                f"attach does not support {kind} (fused expert weights) yet: "
                "build the model with SequentialMLP (moe_grouped_gemm=False)"
            )
        if isinstance(layer.token_dispatcher, MegatronDispatcher):
            raise UnsupportedFeatureError("the model is attached already: detach it first")


class MegatronDispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """The six stages of megatron-core over a `SlotDispatcher`."""

    def __init__(self, stock: Any, core: SlotDispatcher) -> None:
        groups = SimpleNamespace(ep=stock.ep_group, expt_tp=stock.tp_group, tp_ep=stock.tp_ep_group)
        super().__init__(config=stock.config, pg_collection=groups)
        self.core = core

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count, agree, split, sort by destination."""
        self.hidden_shape = hidden_states.shape
        expert_Tk = chosen_experts(routing_map, self.core.topk)
        prob_Tk = probs.gather(1, expert_Tk.clamp(max=self.core.experts - 1))
        return self.core.prepare(hidden_states.reshape(-1, self.hidden_shape[-1]), expert_Tk, prob_Tk)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send."""
        return self.core.send(hidden_states, probs)

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, NDArray[Any], Tensor]:
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
        return self.core.combine(hidden_states).view(self.hidden_shape)


def attach(
    model: Any,
    *,
    shares: str | SharePolicy = "balanced",
    home: HomeStore | None = None,
    checksums: bool = False,
    row_block: int | None = None,
    timeout: float = 600.0,
    node_G: Any = None,
    memory_limit: int | None = None,
    links: Links | None = None,
) -> LiveModel:
    """Take over the experts of a megatron-core model; see `live.attach`.

    Parameters
    ----------
    model : GPTModel
        May be wrapped. With expert data parallelism each expert-parallel group is attached by itself and has
        its own placement.
    shares : str or SharePolicy
        ``"balanced"`` (water-filling for every batch), ``"equal"``, or a policy.
    home : HomeStore, optional
        Second source of experts; a `PinnedHome` is filled here.
    checksums : bool
        Check arrivals before they serve.
    row_block : int, optional
        Rows to which expert batches are padded; by default what makes results independent of the split
        (tried out on a CPU, see `live.rows`; 1 on a GPU).
    timeout : float
        Seconds after which a collective of a batch fails; bounds how late a dead rank is noticed.
    node_G : sequence of int, optional
        Node of each rank; by host name when absent.
    memory_limit : int, optional
        Bytes of experts that this rank may hold at any moment.
    links : Links, optional
        Bandwidths, by which sources of a replica are chosen; by default NVLink, then the rank's own host
        memory, then the network.

    Returns
    -------
    LiveModel
    """
    inner = unwrap(model)
    layers = [block.mlp for block in inner.decoder.layers if isinstance(block.mlp, MoELayer)]
    if not layers:
        raise UnsupportedFeatureError("the model has no MoE layer")
    _refuse(inner.config, layers)
    experts = int(inner.config.num_moe_experts)
    example = next(layers[0].experts.parameters())
    device = example.device
    ep_group = layers[0].ep_group
    ranks = dist.get_process_group_ranks(ep_group) if dist.is_initialized() else None
    group = ExpertGroup.create(ranks, device=device, timeout=timeout, node_R=node_G)
    slots_GC = static_slots(experts, group.size)
    first = group.rank * slots_GC.shape[1]
    meter = MemoryMeter(memory_limit)
    banks: list[SlotBank] = []
    owned: list[SlotExperts] = []
    for index, layer in enumerate(layers):
        stock = layer.experts
        modules = {first + i: module for i, module in enumerate(stock.local_experts)}
        own = SlotExperts(meta_shell(stock.local_experts[0]), bool(layer.config.moe_apply_probs_on_input))
        own.train(stock.training)
        for expert, module in modules.items():
            own.adopt(expert, module)
        resident = {e: list(m.parameters()) for e, m in modules.items()}
        bank = SlotBank(index, resident, list(stock.local_experts[0].parameters()), device, meter, own.follow)
        own.follow(bank)
        banks.append(bank)
        owned.append(own)
    parts = [(layer, layer.experts, layer.token_dispatcher) for layer in layers]

    def restore(live: LiveModel) -> None:
        for (layer, stock, dispatcher), own, bank in zip(parts, owned, live.banks, strict=True):
            stock.local_experts = torch.nn.ModuleList(own.unit(e) for e in bank.order)
            layer.experts, layer.token_dispatcher = stock, dispatcher

    live = LiveModel(
        group=group,
        banks=banks,
        tables=[SlotTable(slots_GC, experts) for _ in layers],
        topk=int(inner.config.moe_router_topk),
        meter=meter,
        restore=restore,
        shares=shares,
        row_block=row_block,
        home=home,
        checksums=checksums,
        model=model,
        hidden=int(inner.config.hidden_size),
        run_experts=lambda i, rows, sizes: owned[i](rows, sizes, rows.new_ones(len(rows))),
        links=links,
    )
    for (layer, stock, dispatcher), own, core in zip(parts, owned, live.dispatchers, strict=True):
        # The stock bank must not keep weights alive that have moved away.
        stock.local_experts = torch.nn.ModuleList()
        own.most_rows = live.row_block.most
        layer.experts, layer.token_dispatcher = own, MegatronDispatcher(dispatcher, core)
    return live
