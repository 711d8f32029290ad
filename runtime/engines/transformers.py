"""Takes over the experts of a running `transformers` model, through its interface for experts.

`transformers` 5 lets a function compute the experts of every MoE layer (``ALL_EXPERTS_FUNCTIONS``, chosen by
``model.set_experts_implementation``). Ours sends the tokens through a `SlotDispatcher`: the model that
`transformers` loads in one process becomes an expert-parallel one, with any placement. Attention stays data
parallel: each rank has its own requests, and all ranks run the same number of forward passes.

On a CPU the stacked weights stay as they are, as home copies; with GPUs each node keeps one set of those in
the pinned memory of its ranks. The device keeps only the slots' own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.live import (
    Adopted,
    AttachOptions,
    ExpertGroup,
    HomeStore,
    MemoryMeter,
    NodeHome,
    SlotBank,
    Weights,
    pieces,
    static_slots,
)
from moeless_opt.runtime.live.dispatch import SlotDispatcher

__all__ = ["StackedHome", "accepts", "adopt", "moe_parts", "route"]

NAME = "moeless"


class _Served(NamedTuple):
    """What serves an experts module: dispatcher, slots of this rank, and most rows of one product."""

    core: SlotDispatcher
    bank: SlotBank
    most_rows: int | None


_served: weakref.WeakKeyDictionary[Module, _Served] = weakref.WeakKeyDictionary()


class StackedHome:
    """The stacked weights that `transformers` loaded, kept on the host of every rank."""

    def __init__(self, stacks: Sequence[Sequence[Tensor]], gpus: int) -> None:
        self._stacks = stacks
        self._gpus = gpus

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """Every rank has all experts."""
        return range(self._gpus)

    def read(self, layer: int, expert: int) -> Weights:
        """Slices; nothing is copied."""
        return [stack[expert] for stack in self._stacks[layer]]

    def regroup(self, members: Sequence[int]) -> None:
        """Nothing is lost."""
        self._gpus = len(members)


#: Names of the norm in front of a MoE module in a decoder layer.
_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")


def moe_parts(model: Any) -> list[tuple[Any, Any, Any]]:
    """Norm in front, router and experts of every MoE layer of a `transformers` model, in order.

    Raises
    ------
    UnsupportedFeatureError
        If a layer is built differently.
    """
    found = []
    for layer in model.modules():
        for mlp in layer.children():
            experts = getattr(mlp, "experts", None)
            if not _is_experts(experts):
                continue
            norm = next((getattr(layer, n) for n in _NORMS if hasattr(layer, n)), None)
            router = next((getattr(mlp, n) for n in ("gate", "router") if hasattr(mlp, n)), None)
            if norm is None or not isinstance(getattr(router, "weight", None), Tensor):
                raise UnsupportedFeatureError(
                    f"{type(layer).__name__} has no norm or router where transformers' models have them"
                )
            found.append((norm, router, experts))
    return found


@torch.no_grad()
def route(router: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
    """What a router makes of hidden states [..., H] behind the norm.

    Returns
    -------
    logits [T, E], chosen bool [T, E]
    """
    # The router's own forward: calling the module would fire hooks, such as those that record its logits.
    logits, _, index_Tk = router.forward(normed.flatten(0, -2))
    chosen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    return logits, chosen.scatter_(1, index_Tk, True)


def _is_experts(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "down_proj", "num_experts"))


def _names(module: Any) -> list[str]:
    """Names of the stacked parameters of an experts module."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return [
        n
        for base in (first, "down_proj")
        for n in (base, f"{base}_bias")
        if isinstance(getattr(module, n, None), Tensor)
    ]


def _refuse(modules: list[Any]) -> None:
    if not modules:
        raise UnsupportedFeatureError(
            "the model has no experts module that transformers' experts interface serves"
        )
    for module in modules:
        if getattr(module, "_is_expert_parallel", False):
            raise UnsupportedFeatureError(
                "transformers' own expert parallelism is on: load the model without a device mesh"
            )
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedFeatureError(
                f"attach does not support {type(module).__name__} (a norm after each expert) yet"
            )
        for name in _names(module):
            stack = getattr(module, name)
            if stack.dim() < 2 or stack.size(0) != module.num_experts:
                raise UnsupportedFeatureError(
                    f"attach does not support the layout of {type(module).__name__}.{name} yet"
                )


def _expert(module: Any, names: list[str], weights: Weights, x: Tensor) -> Tensor:
    """One expert as the module's own forward computes it, without the router's weight."""
    of = dict(zip(names, weights, strict=True))

    def linear(base: str, value: Tensor) -> Tensor:
        weight = of[base].t() if module.is_transposed else of[base]
        return torch.nn.functional.linear(value, weight, of.get(f"{base}_bias"))

    if module.has_gate:
        return linear("down_proj", module._apply_gate(linear("gate_up_proj", x)))
    return linear("down_proj", module.act_fn(linear("up_proj", x)))


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function: what `transformers` calls for every MoE layer."""
    found = _served.get(module)
    if found is None:
        raise UnsupportedFeatureError(
            "this model is not attached; the implementation 'moeless' is set by attach"
        )
    core, bank, most_rows = found
    # Contributions are summed in the order of the expert ids, as the eager loop over experts does.
    expert_Tk, by = top_k_index.sort(dim=1)
    rows, probs = core.prepare(hidden_states, expert_Tk, top_k_weights.gather(1, by))
    rows, probs = core.send(rows, probs)
    rows, sizes, probs = core.sort_in(rows, probs)
    out = _run(module, bank, rows, sizes.tolist(), probs, most_rows).to(hidden_states.dtype)
    return core.combine(core.send_back(core.sort_out(out)))


def _run(
    module: Any, bank: SlotBank, rows: Tensor, sizes: list[int], probs: Tensor, most: int | None = None
) -> Tensor:
    """Each slot's rows through its expert; slots without tokens cost nothing."""
    names = _names(module)
    experts, sizes = pieces(bank.order, sizes, most)
    parts = [
        _expert(module, names, bank.resident[e], x) * p[:, None]
        for e, x, p in zip(experts, torch.split(rows, sizes), torch.split(probs, sizes), strict=True)
    ]
    return torch.cat(parts) if parts else rows


def accepts(model: Any) -> bool:
    """Whether it is a model of `transformers` 5, whose experts a function can compute."""
    return hasattr(model, "set_experts_implementation")


def adopt(model: Any, options: AttachOptions) -> Adopted:
    """Take over the experts of a `transformers` model, which every rank has in full; see `Engine.adopt`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if options.places is not None:
        raise ProblemError("places", "is for grouped experts of megatron-core; these have no pool")
    found = [(name, m) for name, m in model.named_modules() if _is_experts(m)]
    modules = [m for _, m in found]
    _refuse(modules)
    stacks: list[list[Parameter]] = [[getattr(m, n) for n in _names(m)] for m in modules]
    experts = int(modules[0].num_experts)
    device = stacks[0][0].device
    group = options.group(device)
    if experts % group.size:
        raise UnsupportedFeatureError(f"{experts} experts do not divide among {group.size} ranks")
    numbers = _numbers([name for name, _ in found])
    meter = MemoryMeter(options.memory_limit)
    mine = [int(e) for e in static_slots(experts, group.size)[group.rank]]
    banks = []
    for number, stack in zip(numbers, stacks, strict=True):
        # Copies: a slice would keep its whole stack alive on the device.
        resident: dict[int, Weights] = {
            e: [Parameter(s.detach()[e].clone(), requires_grad=s.requires_grad) for s in stack] for e in mine
        }
        banks.append(SlotBank(number, resident, [s.detach()[0] for s in stack], device, meter))
    home, hosts = _home(stacks, group, experts)
    before = model.config._experts_implementation

    def install(dispatchers: Sequence[SlotDispatcher], most_rows: int | None) -> None:
        if NAME not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
        for module, stack, core, bank in zip(modules, stacks, dispatchers, banks, strict=True):
            _served[module] = _Served(core, bank, most_rows)
            for name, parameter in zip(_names(module), stack, strict=True):
                # The shape stays for whoever asks; the memory goes (on a CPU it is the home copy).
                hollow = torch.empty_like(parameter, device="meta")
                setattr(module, name, Parameter(hollow, requires_grad=False))
                parameter.data = parameter.data.new_empty(0)
        model.set_experts_implementation(NAME)

    def restore() -> None:
        for i, (module, stack) in enumerate(zip(modules, stacks, strict=True)):
            core, bank, _ = _served.pop(module)
            whole = _gathered(bank, core.group) if hosts is None else hosts[i]
            for name, parameter, kept in zip(_names(module), stack, whole, strict=True):
                parameter.data = kept
                setattr(module, name, parameter)
        model.set_experts_implementation(before)

    text = model.config.get_text_config()
    return Adopted(
        model=model,
        group=group,
        layers=numbers,
        experts=experts,
        topk=int(getattr(text, "num_experts_per_tok", 0)),
        hidden=int(text.hidden_size),
        banks=banks,
        meter=meter,
        run_experts=lambda i, rows, sizes: _run(
            modules[i], banks[i], rows, sizes.tolist(), rows.new_ones(len(rows))
        ),
        install=install,
        restore=restore,
        home=home,
        transposed=bool(modules[0].is_transposed),
    )


def shares_home(device: torch.device) -> bool:
    """Whether each rank keeps a share of the home copies, not the whole model that it has anyway."""
    return device.type == "cuda"


def _home(
    stacks: Sequence[Sequence[Tensor]], group: ExpertGroup, experts: int
) -> tuple[HomeStore, list[list[Tensor]] | None]:
    """Home copies, and the whole stacks if they are these."""
    if not shares_home(stacks[0][0].device):
        hosts = [[s.detach() for s in stack] for stack in stacks]
        return StackedHome(hosts, group.size), hosts
    home = NodeHome(group, experts)
    for layer, stack in enumerate(stacks):
        for expert in home.share:
            home.put(layer, expert, [s.detach()[expert] for s in stack])
    return home, None


def _gathered(bank: SlotBank, group: ExpertGroup) -> list[Tensor]:
    """The stacks of all ranks' experts, each in its first place; a collective."""
    whole = []
    for i, (shape, dtype) in enumerate(bank.shapes):
        mine = torch.stack([bank.resident[e][i].detach() for e in bank.order])
        # As bytes: not every type can be sent.
        rows = group.all_gather(mine.reshape(-1).view(torch.uint8))
        whole.append(rows.reshape(-1).view(dtype).view(-1, *shape))
    return whole


def _numbers(names: Sequence[str]) -> list[int]:
    """The model's own numbers of layers, from the modules' names (``model.layers.3.mlp.experts``)."""
    numbers = [[int(part) for part in name.split(".") if part.isdigit()][-1:] for name in names]
    flat = [n for some in numbers for n in some]
    return flat if len(set(flat)) == len(names) else list(range(len(names)))
