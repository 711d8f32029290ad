"""Time of experts against tokens and activated experts, for the shapes of known models: time models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.io import save_time_models
from moeless_opt.problems.spec import ModelSpec, TimeModel, model_preset
from moeless_opt.runtime.gpu_check.setting import Setting
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.live import GroupedExperts, MemoryMeter, PooledBank, measure_experts

TITLE = "expert time against tokens and activated experts"
MODELS = ("Mixtral-8x7B", "Phi-3.5-MoE", "Llama-4-Scout", "DeepSeek-V3", "Qwen3-235B-A22B", "gpt-oss-120b")
LINES = (*MODELS, "time models")
SECONDS = 120
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ACTIVATED = (1, 2, 4, 8, 16, 32)


def check(setting: Setting, sheet: Sheet) -> None:
    """Measure all models; only what ran on a GPU is kept."""
    found: dict[str, TimeModel] = {}
    for name in MODELS:
        with sheet.guard(name):
            spec = model_preset(name)
            curve = _curve(setting, spec)
            found[f"{name}, {_machine(setting)}"] = curve
            grid = (curve.curve_tokens, curve.curve_activated, curve.curve_time)
            tokens_K, activated_J, time_KJ = (np.asarray(axis) for axis in grid)
            some = {f"{n:g} tokens": t for n, t in zip(tokens_K, time_KJ[:, -1] * 1e6, strict=True)}
            flops = 6.0 * spec.hidden * spec.ffn * tokens_K[-1] / time_KJ[-1, -1]
            detail = {"experts": activated_J[-1], "teraflops_of_the_largest": flops * 1e-12}
            sheet.take(name, some, "us", least=0.0, detail={} if setting.dry else detail)
    kept = 0
    if found and not setting.dry:
        save_time_models(setting.folder / "time_models.json", found)
        kept = len(found)
    sheet.take("time models", kept, "kept in time_models.json", least=0 if setting.dry else len(MODELS))


def _machine(setting: Setting) -> str:
    return "cpu" if setting.dry else torch.cuda.get_device_name(setting.device)


@torch.no_grad()
def _curve(setting: Setting, spec: ModelSpec) -> TimeModel:
    """Of gated experts without biases, in grouped products over a pool, as the runtime computes them."""
    small = 64 if setting.dry else 1
    hidden, inner = (size // small // 16 * 16 for size in (spec.hidden, spec.ffn))
    activated = [n for n in ACTIVATED if n <= (2 if setting.dry else spec.experts)]
    shapes = ((2 * inner, hidden), (hidden, inner))
    made = [torch.randn(shape, device=setting.device) * shape[1] ** -0.5 for shape in shapes]
    one = [t.to(setting.dtype) for t in made]
    like = [torch.empty_like(t, device="meta") for t in one]
    del made
    # The same values in memory of their own each: a cache does not make several look like one.
    bank = PooledBank(
        0, dict.fromkeys(range(activated[-1]), one), like, setting.device, MemoryMeter(), activated[-1]
    )
    experts = GroupedExperts(bank, _gated, probs_on_input=False)
    weight_T = torch.ones(TOKENS[-1], dtype=torch.float32, device=setting.device)

    def run(rows: Tensor, sizes: IntArray) -> None:
        padded = np.pad(sizes, (0, activated[-1] - sizes.size))
        experts(rows, padded, weight_T[: len(rows)])

    curve = measure_experts(
        run,
        hidden,
        activated=activated,
        tokens=(1, 8) if setting.dry else TOKENS,
        device=setting.device,
        dtype=setting.dtype,
        repeats=1 if setting.dry else 9,
    )
    kind = str(setting.dtype).removeprefix("torch.")
    return TimeModel(
        curve_tokens=curve.curve_tokens,
        curve_activated=curve.curve_activated,
        curve_time=curve.curve_time,
        unit="s",
        name=f"experts of {spec.name} in {kind}, grouped, without biases, measured on {_machine(setting)}",
    )


def _gated(x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear
