"""Model presets against what their files are known to weigh."""

from __future__ import annotations

from typing import Any

import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.architecture import MODEL_PRESETS, ModelSpec, model_preset

# Parameters of all routed experts, in billions: the totals of the models' cards less the dense parts.
ROUTED_BILLIONS = {
    "Mixtral-8x7B": 45.1,
    "Phi-3.5-MoE": 40.3,
    "DeepSeek-V3": 653.9,
    "Qwen3-30B-A3B": 29.0,
    "gpt-oss-20b": 19.1,
    "gpt-oss-120b": 114.7,
    "OLMoE-1B-7B": 6.44,
}


@pytest.mark.parametrize(("name", "billions"), ROUTED_BILLIONS.items())
def test_routed_parameters(name: str, billions: float) -> None:
    spec = MODEL_PRESETS[name]
    count = spec.layers * spec.experts * spec.matrices * spec.hidden * spec.ffn / 1e9
    assert count == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_bytes_of_an_expert(name: str) -> None:
    spec = MODEL_PRESETS[name]
    assert spec.name == name
    weights = spec.matrices * spec.hidden * spec.ffn
    plain = weights * spec.bits / 8
    assert plain <= spec.expert_bytes <= plain * 1.01 + 1
    assert isinstance(spec.expert_bytes, int)


def test_known_sizes() -> None:
    assert MODEL_PRESETS["Mixtral-8x7B"].expert_bytes == 3 * 4096 * 14336 * 2
    # fp8 weights and one fp32 scale per 128 x 128 block
    assert MODEL_PRESETS["DeepSeek-V3"].expert_bytes == 3 * 7168 * 2048 + 3 * 56 * 16 * 4
    # biases of the gated unit are bf16
    spec = ModelSpec(name="b", layers=1, experts=2, top_k=1, hidden=8, ffn=4, bias=True)
    assert spec.expert_bytes == (3 * 8 * 4 + 2 * 4 + 8) * 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", 0, r"model\.layers: is 0, must be a whole number from 1"),
        ("experts", "8", r"model\.experts: is '8'"),
        ("hidden", True, r"model\.hidden: is True"),
        ("ffn", 10**12, r"model\.ffn: is 1000000000000, must be a whole number from 1 to"),
        ("top_k", 9, r"model\.top_k: is 9, must be at most experts = 8"),
        ("bits", 0, r"model\.bits: is 0, must be a finite number above 0"),
        ("bits", "fp8", r"model\.bits: is 'fp8'"),
        ("bits", 65, r"model\.bits: is 65.0, must be at most 64"),
        ("shared_experts", -1, r"model\.shared_experts: is -1"),
        ("first_moe_layer", 1.5, r"model\.first_moe_layer: is 1.5"),
        ("bias", "no", r"model\.bias: is 'no', must be a bool"),
        ("name", 5, r"model\.name: is 5, must be a str"),
    ],
)
def test_malformed_models(key: str, value: Any, message: str) -> None:
    good: dict[str, Any] = {"name": "m", "layers": 2, "experts": 8, "top_k": 2, "hidden": 16, "ffn": 32}
    with pytest.raises(ProblemError, match="^" + message):
        ModelSpec(**good | {key: value})


def test_presets_by_name() -> None:
    assert model_preset("deepseek-v3") is MODEL_PRESETS["DeepSeek-V3"]
    with pytest.raises(ProblemError, match="model: 'GPT-5' is unknown; there are Mixtral-8x7B"):
        model_preset("GPT-5")
    assert MODEL_PRESETS["Mixtral-8x7B"].experts == 8
    assert MODEL_PRESETS["DeepSeek-V3"].layers == 58
    assert MODEL_PRESETS["DeepSeek-V3"].first_moe_layer == 3


# Layers with experts, experts, experts per token, shared ones, first such layer, groups: as published.
PUBLISHED = {
    "Mixtral-8x7B": (32, 8, 2, 0, 0, 1),
    "Mixtral-8x22B": (56, 8, 2, 0, 0, 1),
    "Phi-3.5-MoE": (32, 16, 2, 0, 0, 1),
    "Llama-4-Scout": (48, 16, 1, 1, 0, 1),
    "Llama-4-Maverick": (24, 128, 1, 1, 0, 1),
    "DeepSeek-V3": (58, 256, 8, 1, 3, 8),
    "Kimi-K2": (60, 384, 8, 1, 1, 1),
    "Qwen3-30B-A3B": (48, 128, 8, 0, 0, 1),
    "Qwen3-235B-A22B": (94, 128, 8, 0, 0, 1),
    "Qwen1.5-MoE-A2.7B": (24, 60, 4, 4, 0, 1),
    "OLMoE-1B-7B": (16, 64, 8, 0, 0, 1),
    "gpt-oss-20b": (24, 32, 4, 0, 0, 1),
    "gpt-oss-120b": (36, 128, 4, 0, 0, 1),
}


def test_shapes_are_as_published() -> None:
    for name, figures in PUBLISHED.items():
        spec = MODEL_PRESETS[name]
        assert figures == (
            spec.layers,
            spec.experts,
            spec.top_k,
            spec.shared_experts,
            spec.first_moe_layer,
            spec.groups,
        )
        assert spec.bias == name.startswith("gpt-oss")
