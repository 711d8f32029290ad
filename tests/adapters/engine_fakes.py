"""Small stand-ins for what the plug-ins touch of vLLM and SGLang, with signatures and checks."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

KNUTH = 2654435769


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module in ``sys.modules``, its parents too, for the length of a test."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            made = ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    found = sys.modules[name]
    found.__dict__.update(content)
    return found


# -- vLLM ------------------------------------------------------------------------------------------------


class AbstractEplbPolicy:
    """vLLM's contract of a policy."""


class DefaultEplbPolicy(AbstractEplbPolicy):
    """vLLM's own, never called here."""


def plain_logical_maps(p2l: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of every expert, those with -1 left out, and their number: vLLM's `compute_logical_maps`."""
    assert p2l.device.type == "cpu"
    rows = p2l.reshape(-1, p2l.shape[-1]).tolist()
    lists = [[[s for s, e in enumerate(row) if e == expert] for expert in range(experts)] for row in rows]
    most = max(len(slots) for row in lists for slots in row)
    slots = torch.tensor([[one + [-1] * (most - len(one)) for one in row] for row in lists], dtype=p2l.dtype)
    count = torch.tensor([[len(one) for one in row] for row in lists], dtype=p2l.dtype)
    return (slots[0], count[0]) if p2l.dim() == 1 else (slots, count)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, group: Any = None) -> SimpleNamespace:
    """vLLM's modules: policies, the state's two functions, and the group of ranks where there is one."""
    policy = module(
        monkeypatch,
        "vllm.distributed.eplb.policy",
        AbstractEplbPolicy=AbstractEplbPolicy,
        EPLB_POLICIES={"default": DefaultEplbPolicy},
    )
    state = module(monkeypatch, "vllm.distributed.eplb.eplb_state", compute_logical_maps=plain_logical_maps)

    def commit(model_state: Any, new_physical_to_logical_map: torch.Tensor, layer: int) -> None:
        here = model_state.physical_to_logical_map[layer]
        assert here.shape == new_physical_to_logical_map.shape
        here.copy_(new_physical_to_logical_map)
        experts = model_state.logical_to_physical_map.shape[1]
        slots, count = state.compute_logical_maps(new_physical_to_logical_map, experts)
        room = model_state.logical_to_physical_map.shape[-1] - slots.shape[-1]
        assert room >= 0
        model_state.logical_to_physical_map[layer].copy_(torch.nn.functional.pad(slots, (0, room), value=-1))
        assert count.shape == model_state.logical_replica_count[layer].shape
        model_state.logical_replica_count[layer].copy_(count)

    state.__dict__["_commit_eplb_maps_for_layer"] = commit

    def get_eplb_group() -> Any:
        assert group is not None, "EPLB group is not initialized"
        return group

    module(monkeypatch, "vllm.distributed.parallel_state", get_eplb_group=get_eplb_group)
    return SimpleNamespace(policies=policy.EPLB_POLICIES, state=state)


def model_state(p2l: torch.Tensor, experts: int) -> SimpleNamespace:
    """What vLLM keeps of a model."""
    layers = len(p2l)
    return SimpleNamespace(
        physical_to_logical_map=p2l.clone(),
        logical_to_physical_map=torch.full((layers, experts, 1024), -1),
        logical_replica_count=torch.zeros((layers, experts), dtype=torch.int64),
    )


def routed(load_LE: Any, slots: Any, count: Any, gpus: int, width: int) -> Any:
    """Tokens of every rank by vLLM's router: entry ``hash(token) % count`` of an expert's slots, [L, G]."""
    found = torch.zeros((len(load_LE), gpus), dtype=torch.int64)
    for layer, row in enumerate(load_LE):
        for expert, tokens in enumerate(row):
            hashed = (torch.arange(int(tokens)) * KNUTH) & 0xFFFFFFFF
            slot = slots[layer, expert][hashed % int(count[layer, expert])]
            found[layer] += torch.bincount(slot // width, minlength=gpus)
    return found


# -- SGLang ----------------------------------------------------------------------------------------------


class HookType(enum.Enum):
    """SGLang's ways to hook."""

    AFTER = "after"
    REPLACE = "replace"


class EplbAlgorithm(enum.Enum):
    """Some of SGLang's names."""

    deepseek = enum.auto()
    elasticity_aware = enum.auto()


def fake_sglang(monkeypatch: pytest.MonkeyPatch, dispatch: str = "dynamic") -> SimpleNamespace:
    """SGLang's modules: the registry of hooks, live metadata, configuration and the state of its ranks."""
    hooks: dict[str, tuple[Callable[..., Any], HookType]] = {}

    class HookRegistry:
        @classmethod
        def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
            hooks[target] = (hook, hook_type)

    now = SimpleNamespace(metadata=None, ranks=None)
    moe = SimpleNamespace(ep_dispatch_algorithm=dispatch)
    module(monkeypatch, "sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
    module(
        monkeypatch,
        "sglang.srt.eplb.expert_location",
        get_global_expert_location_metadata=lambda: now.metadata,
    )
    module(monkeypatch, "sglang.srt.runtime_context", get_exec=lambda: SimpleNamespace(moe=moe))
    manager = SimpleNamespace(instance=lambda: now.ranks)
    module(monkeypatch, "sglang.srt.elastic_ep.elastic_ep", ElasticEPStateManager=manager)
    return SimpleNamespace(hooks=hooks, now=now)
