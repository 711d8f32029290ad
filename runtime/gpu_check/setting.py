"""Where the check runs and with which shapes; the models that it runs."""

from __future__ import annotations

import platform
import re
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeless_opt.runtime.checkpoint import (
    GPTModel,
    TransformerConfig,
    build_gpt,
    causal_positions,
    ensure_model_parallel,
    neutral_config_fields,
    parallel_state,
    quiet_config,
)

__all__ = [
    "DRY_RUN",
    "Setting",
    "forward",
    "milliseconds",
    "model",
    "off",
    "synchronise",
    "tokens",
    "wide_model",
]

DRY_RUN = "cpu, dry run"
"""The device in the report of one."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run on what.

    Parameters
    ----------
    device : torch.device
        A GPU, or the CPU for a dry run.
    folder : path
        For files that belong to the report.
    hidden, inner, experts, topk, layers, vocab : int
        Of the model.
    decode, prefill : (int, int)
        Sequences, and tokens of each, of the two batches.
    rounds : int
        Repetitions of what is timed.
    traces : bool
        Keep what the profiler saw.
    """

    device: torch.device
    folder: Path
    hidden: int = 2048
    inner: int = 1408
    experts: int = 64
    topk: int = 8
    layers: int = 4
    vocab: int = 512
    decode: tuple[int, int] = (32, 1)
    prefill: tuple[int, int] = (4, 1024)
    rounds: int = 30
    traces: bool = False

    @classmethod
    def of(cls, device: str, folder: Path, traces: bool = False) -> Setting:
        """The shapes for a device."""
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        full = cls(device=where, folder=folder, traces=traces)
        if not full.dry:
            return full
        return replace(
            full,
            hidden=32,
            inner=48,
            experts=8,
            topk=2,
            layers=3,
            vocab=64,
            decode=(4, 1),
            prefill=(2, 12),
            rounds=3,
        )

    @property
    def dry(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type != "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What models are served in."""
        return torch.float32 if self.dry else torch.bfloat16

    def trace(self, name: str) -> Path | None:
        """Where the trace of what is so called is kept, if it is."""
        return self.folder / f"trace_{re.sub(r'[^a-z0-9]+', '_', name)}.json.gz" if self.traces else None

    def machine(self) -> dict[str, Any]:
        """What it runs on, for the report."""
        import megatron.core

        told: dict[str, Any] = {
            "device": DRY_RUN if self.dry else torch.cuda.get_device_name(self.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
        }
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            told |= {
                "cuda": str(torch.version.cuda),
                "nccl": list(torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        return told


def model(setting: Setting, dtype: torch.dtype | None = None) -> GPTModel:
    """A model with random weights, the same whatever the number of ranks."""
    ensure_model_parallel()
    kind = dtype or setting.dtype
    ranks = parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * (setting.experts // ranks)
    config = quiet_config(
        TransformerConfig,
        **neutral_config_fields(
            num_layers=setting.layers,
            hidden_size=setting.hidden,
            num_attention_heads=8,
            num_moe_experts=setting.experts,
            moe_router_topk=setting.topk,
            moe_ffn_hidden_size=setting.inner,
            ffn_hidden_size=setting.inner,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            params_dtype=kind,
            bf16=kind is torch.bfloat16,
            expert_model_parallel_size=ranks,
            perform_initialization=False,
        ),
    )
    made = build_gpt(config, setting.vocab, 4096)
    for parameter in made.parameters():
        parameter.data = torch.empty(parameter.shape, dtype=kind, device=setting.device)
    made = made.to(setting.device)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            key = name
            if ".local_experts." in name:
                head, tail = name.split(".local_experts.")
                index, rest = tail.split(".", 1)
                key = f"{head}.expert.{first + int(index)}.{rest}"
            seed = torch.Generator(setting.device).manual_seed(zlib.crc32(key.encode()))
            if parameter.dim() > 1:
                # In one type first: the same model in each.
                drawn = torch.randn(parameter.shape, generator=seed, device=setting.device)
                scale = 1.0 if "router" in key else parameter.shape[-1] ** -0.5
                parameter.copy_((drawn * scale).bfloat16())
            else:
                parameter.fill_(1)
    return made


def wide_model(setting: Setting, dtype: torch.dtype) -> GPTModel:
    """The same in another type, of fewer experts where that would not fit beside others."""
    return model(replace(setting, layers=min(setting.layers, 2)), dtype)


def tokens(setting: Setting, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A batch: sequences of tokens, some more frequent than others."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn**3 * setting.vocab).long().clamp(max=setting.vocab - 1).to(setting.device)


@torch.no_grad()
def forward(of: Any, batch: Tensor) -> Tensor:
    """Logits."""
    out: Tensor = of(batch, causal_positions(batch), None)
    return out


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of two outputs."""
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm())


def synchronise(setting: Setting) -> None:
    """Wait for the device."""
    if not setting.dry:
        torch.cuda.synchronize(setting.device)


def milliseconds(setting: Setting, *calls: Callable[[], Any]) -> list[float]:
    """Median time of each call until the device has done it; measured in turns."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(setting.rounds + 3):
        for i in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            synchronise(setting)
            began = time.perf_counter()
            calls[i]()
            synchronise(setting)
            if turn >= 3:
                spent[i].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(times) for times in spent]
