"""Models, machines and kernel timings of one's own; and that nothing is simulated that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import FormatError, InfeasibleError, ProblemError
from moeless_opt.problems.io import save_time_models
from moeless_opt.problems.spec import TimeModel
from moeless_opt.problems.spec.architecture import MODEL_PRESETS, ModelSpec
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.simulate.cli import main
from moeless_opt.runtime.simulate.hardware import BESIDE, GPUS
from moeless_opt.runtime.simulate.model_file import read_model
from moeless_opt.runtime.simulate.run import simulate
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import machine_of

STATIC = ("static",)
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}
SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "interleave_moe_layer_step": 1,
        "vocab_size": 202048,
    },
}


def config(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("content", "preset"),
    [(MIXTRAL, "Mixtral-8x7B"), (DEEPSEEK, "DeepSeek-V3"), (SCOUT, "Llama-4-Scout")],
)
def test_a_config_gives_what_the_preset_has(tmp_path: Path, content: dict[str, Any], preset: str) -> None:
    found, beside = read_model(config(tmp_path, content))
    assert found.replace(name=preset) == MODEL_PRESETS[preset]
    assert beside.kv_bytes == pytest.approx(BESIDE[preset].kv_bytes)
    assert beside.once == pytest.approx(BESIDE[preset].once, rel=0.15)
    assert read_model(tmp_path)[0] == found  # the folder does as well


def dimensions(hidden: int, ffn: int, layers: int, **more: Any) -> dict[str, Any]:
    """What every file has, with grouped queries of 8 heads of 128, and more."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 1000,
        "torch_dtype": "bfloat16",
        **more,
    }


#: Fields as these families spell them; layers with experts, the first of them, experts, top k, width, shared
#: experts, and in how many layers keys and values are kept.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "qwen2_moe": (
        dimensions(
            2048, 5632, 24, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632, decoder_sparse_step=1, mlp_only_layers=[],
        ),
        (24, 0, 60, 4, 1408, 4, 24),
    ),
    "qwen3_moe": (
        dimensions(
            4096, 12288, 94, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
            decoder_sparse_step=1, mlp_only_layers=[0, 93],
        ),
        (92, 1, 128, 8, 1536, 0, 94),
    ),
    "qwen3_next": (
        dimensions(
            2048, 5120, 48, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
            shared_expert_intermediate_size=512, decoder_sparse_step=1, mlp_only_layers=[],
            full_attention_interval=4,
        ),
        (48, 0, 512, 10, 512, 1, 12),
    ),
    "deepseek_v2": (
        dimensions(
            5120, 12288, 60, n_routed_experts=160, num_experts_per_tok=6, moe_intermediate_size=1536,
            n_shared_experts=2, n_group=8, first_k_dense_replace=1, moe_layer_freq=1,
        ),
        (59, 1, 160, 6, 1536, 2, 60),
    ),
    "gpt_oss": (
        dimensions(
            2880, 2880, 24, num_local_experts=32, num_experts_per_tok=4, experts_per_token=4,
            layer_types=["sliding_attention", "full_attention"] * 12,
            quantization_config={"quant_method": "mxfp4"},
        ),
        (24, 0, 32, 4, 2880, 0, 24),
    ),
    "llama4_text": (
        dimensions(
            5120, 8192, 48, num_local_experts=128, num_experts_per_tok=1, intermediate_size_mlp=16384,
            interleave_moe_layer_step=2,
        ),
        (24, 1, 128, 1, 8192, 1, 48),
    ),
    "olmoe": (
        dimensions(2048, 1024, 16, num_experts=64, num_experts_per_tok=8),
        (16, 0, 64, 8, 1024, 0, 16),
    ),
    "phimoe": (
        dimensions(4096, 6400, 32, num_local_experts=16, num_experts_per_tok=2),
        (32, 0, 16, 2, 6400, 0, 32),
    ),
    "glm4_moe": (
        dimensions(
            5120, 12288, 92, n_routed_experts=160, num_experts_per_tok=8, moe_intermediate_size=1536,
            n_shared_experts=1, n_group=1, first_k_dense_replace=3,
        ),
        (89, 3, 160, 8, 1536, 1, 92),
    ),
    "granitemoehybrid": (
        dimensions(
            1536, 512, 40, num_local_experts=62, num_experts_per_tok=6, shared_intermediate_size=1024,
            layer_types=(["mamba"] * 9 + ["attention"]) * 4,
        ),
        (40, 0, 62, 6, 512, 2, 4),
    ),
    "jamba": (
        dimensions(
            4096, 14336, 32, num_experts=16, num_experts_per_tok=2, expert_layer_period=2,
            expert_layer_offset=1, attn_layer_period=8, attn_layer_offset=4,
        ),
        (16, 1, 16, 2, 14336, 0, 4),
    ),
    "ernie4_5_moe": (
        dimensions(
            2560, 12288, 28, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
            moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_interval=1,
        ),
        (27, 1, 64, 6, 1536, 2, 28),
    ),
    "lfm2_moe": (
        dimensions(
            2048, 7168, 24, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=1792,
            num_dense_layers=2, layer_types=["conv", "conv", "full_attention"] * 8,
        ),
        (22, 2, 32, 4, 1792, 0, 8),
    ),
    "mimo": (
        dimensions(
            4096, 16384, 48, n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048,
            moe_layer_freq=[0] + [1] * 47,
        ),
        (47, 1, 256, 8, 2048, 0, 48),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_as_they_spell_their_fields(tmp_path: Path, family: str) -> None:
    """Layers without experts of Jamba, and Granite's shared expert, were read as if there were none."""
    content, (layers, first, experts, top_k, ffn, shared, attending) = FAMILIES[family]
    found, beside = read_model(config(tmp_path, {"model_type": family, **content}))
    assert (found.layers, found.first_moe_layer) == (layers, first)
    assert (found.experts, found.top_k, found.ffn, found.shared_experts) == (experts, top_k, ffn, shared)
    assert found.bias == (family == "gpt_oss")
    assert beside.kv_bytes * layers == pytest.approx(2 * 2 * 8 * 128 * attending)
    row = simulate(
        Scenario(model=str(tmp_path), topology="8x8xH200", seconds=2, rate=1, policies=STATIC)
    ).rows[0]
    assert row["mean_ms"] > 0


def test_bits_are_those_that_the_file_says(tmp_path: Path) -> None:
    for change, bits in (({}, 4.25), ({"bits": 8}, 8.25)):
        path = config(tmp_path, {**MIXTRAL, "quantization_config": {"quant_method": "gptq", **change}})
        assert read_model(path)[0].bits == bits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"hybrid_override_pattern": "M-E*"},
            "'hybrid_override_pattern': of an architecture that is not read",
        ),
        ({"moe_layers": [1, 32]}, "has experts in layer 32 of 32"),
        ({"moe_topk": [2, 2], "num_experts_per_tok": None}, "'moe_topk' is [2, 2], must be a whole number"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "x"}}, "'bits' is 'x', must be"),
        ({"num_local_experts": None}, "'num_local_experts' is missing"),
        ({"hidden_size": -1}, "'hidden_size' is -1, must be a whole number of at least 1"),
        ({"num_experts_per_tok": 9}, "top_k"),
        ({"torch_dtype": "int3"}, "'torch_dtype' is 'int3'"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization 'x' is not known"),
        ({"moe_layers": [], "first_k_dense_replace": 32}, "no layer with experts"),
    ],
)
def test_a_bad_config_is_one_line(
    tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, {**MIXTRAL, **change})
    with pytest.raises(FormatError, match=r"config\.json") as caught:
        read_model(path)
    assert said in str(caught.value)
    assert main(["--model", str(path), "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_model_of_ones_own_is_simulated_like_the_preset(tmp_path: Path) -> None:
    path = config(tmp_path, {**MIXTRAL, "vocab_size": 32500})
    own, preset = (
        simulate(Scenario(model=model, seconds=3, policies=STATIC)).rows[0]
        for model in (str(path), "Mixtral-8x7B")
    )
    assert own["mean_ms"] == preset["mean_ms"]
    assert own["cost"]["passes"] == pytest.approx(preset["cost"]["passes"], rel=1e-3)


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_gpu_has_a_source_and_runs(gpu: str) -> None:
    assert GPUS[gpu].source
    scenario = Scenario(model="Mixtral-8x7B", topology=f"8x{gpu}", seconds=3, policies=STATIC)
    assert scenario.gpu_name == gpu
    found = simulate(scenario)
    assert f"{GPUS[gpu].links.intra_node / 1e9:.4g} GB/s in the node" in found.text[1]
    assert f"an {gpu}'s" in found.text[1]


def test_the_name_of_a_machine_says_its_gpus() -> None:
    """It was the A6000 whatever the topology's name said."""
    times = {
        name: simulate(Scenario(model="Mixtral-8x7B", topology=name, seconds=3, policies=STATIC)).rows[0]
        for name in ("8xA6000", "8xH100", "8xH200")
    }
    assert times["8xA6000"]["mean_ms"] > 2 * times["8xH100"]["mean_ms"]
    assert times["8xH100"]["mean_ms"] > times["8xH200"]["mean_ms"]
    assert Scenario(topology="4x8").gpu_name == "H100"
    assert Scenario(topology="4x8", gpu="B200").gpu_name == "B200"
    assert Scenario(topology="GB200-NVL72").gpu_name == "GB200"
    with pytest.raises(ProblemError, match="gpu: is 'A6000', but the topology '4x8xH100' is of H100"):
        Scenario(topology="4x8xH100", gpu="A6000")


def test_a_topology_of_ones_own_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(
        json.dumps(
            {"kind": "uniform", "nodes": 2, "gpus_per_node": 2, "slots": 3, "links": {"inter_node": 1e9}}
        )
    )
    found = simulate(
        Scenario(model="Mixtral-8x7B", topology=str(path), gpu="H200", seconds=3, policies=STATIC)
    )
    assert "4 GPUs, 450 GB/s in the node, 1 between nodes" in found.text[1]
    assert "up to 3 replicas" in found.text[0]
    path.write_text('{"kind": "uniform", "nodes": 2, "gpus": 0}')
    with pytest.raises(FormatError, match=r"machine\.json"):
        Scenario(topology=str(path))
    with pytest.raises(ProblemError, match=r"none\.json"):
        Scenario(topology=str(tmp_path / "none.json"))


def test_timings_are_of_the_expert_that_was_timed(tmp_path: Path) -> None:
    rows = ["layer_name,input,latency(ns)"]
    rows += [f"expert.w{i},{n},{100_000 * n}" for n in (1, 64, 4096) for i in (1, 2, 3)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    base = Scenario(model="Mixtral-8x7B", seconds=3, policies=STATIC, timings=tmp_path / "t.csv")
    own, small = (simulate(base.replace(timed=timed)) for timed in (None, (4096, 7168)))
    assert "an expert of 4096 x 14336" in own.text[1]
    assert small.rows[0]["mean_ms"] > 1.8 * own.rows[0]["mean_ms"]
    with pytest.raises(ProblemError, match=r"timed: is .*no timings are given"):
        Scenario(timed=(1, 1))
    with pytest.raises(ProblemError, match="timed"):
        base.replace(timed=(0, 1))


def test_times_of_all_experts_together_are_read_from_json(tmp_path: Path) -> None:
    curve = TimeModel(
        curve_tokens=np.array([1.0, 100.0]),
        curve_activated=np.array([1.0, 8.0]),
        curve_time=np.array([[1e-4, 8e-4], [2e-4, 9e-4]]),
        unit="s",
        name="measured",
    )
    path = tmp_path / "times.json"
    save_time_models(path, {"Mixtral-8x7B, a GPU": curve, "DeepSeek-V3, a GPU": curve})
    base = Scenario(model="Mixtral-8x7B", seconds=2, policies=STATIC, timings=path)
    machine = machine_of(base)
    assert machine.time.time(np.array([100.0]), np.array([8.0]), 1.0)[0] == pytest.approx(9e-4)
    assert "times.json: measured" in machine.basis
    for bad, why in (
        ({"timed": (64, 32)}, "timed: is for tables of one expert's kernels"),
        ({"in_turn": True}, "in_turn: is for tables of one expert's kernels"),
        ({"model": "Phi-3.5-MoE"}, r"has 0 times of Phi-3.5-MoE.*it has Mixtral-8x7B, a GPU, DeepSeek-V3"),
    ):
        with pytest.raises(ProblemError, match=why):
            machine_of(base.replace(**bad))
    large = machine_of(base.replace(model="Phi-3.5-MoE", sizes="DeepSeek-V3"))
    assert "times.json: measured" in large.basis
    with pytest.raises(FormatError, match="has 0 times of OLMoE-1B-7B"):  # its experts are smaller
        machine_of(base.replace(sizes="OLMoE-1B-7B"))
    save_time_models(path, {"Mixtral-8x7B, NVIDIA H100 80GB HBM3": curve})
    assert machine_of(base.replace(gpu="H100")).gpu == "H100"
    with pytest.raises(FormatError, match="has times of an H100, the machine is of A6000s; say gpu H100"):
        machine_of(base)
    save_time_models(path, {"Mixtral-8x7B, a GPU": curve.replace(unit="tokens")})
    with pytest.raises(FormatError, match="must be in seconds"):
        machine_of(base)


# ---------------------------------------------------------------------------------------------- memory


def test_what_does_not_fit_is_refused_and_says_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Three slots of Llama-4-Scout take 55 GB of an A6000, which has 48."""
    arguments = ["--model", "Llama-4-Scout", "--seconds", "3", "--policies", "static", "--quiet"]
    assert main([*arguments, "--spare", "1"]) == 1
    printed = capsys.readouterr().err
    assert "36.2 GB of experts and 18.9 GB of other weights do not fit in 45.6 GB" in printed
    assert "2 slots per GPU and layer do" in printed
    assert printed.count("\n") == 1
    assert main(arguments) == 0  # nothing is asked for, so what fits is taken
    assert "up to 2 replicas" in capsys.readouterr().out
    assert main([*arguments, "--spare", "1", "--memory", "60"]) == 0
    assert main([*arguments, "--memory", "30"]) == 1
    assert "not even one copy" in capsys.readouterr().err


def test_the_cache_has_to_fit_in_every_mode() -> None:
    model = ModelSpec(name="small", layers=2, experts=8, top_k=2, hidden=2048, ffn=1024)
    base = Scenario(model=model, seconds=4, rate=20, policies=STATIC)
    weights = 2 * (2 * model.expert_bytes + 5 * 2048**2)
    for change in ({}, {"batching": "continuous"}, {"decode_every": 64}):
        simulate(base.replace(memory=(weights + 2e8) / 1e9, **change))
        with pytest.raises(InfeasibleError, match=r"memory: the KV cache of .* tokens does not fit"):
            simulate(base.replace(memory=(weights + 2e6) / 1e9, **change))
    topology = Topology.uniform(1, 4, memory=10**12)
    with pytest.raises(InfeasibleError, match="do not fit"):
        simulate(base.replace(topology=topology, memory=0.01))


# ------------------------------------------------------------------------------ what the paper leaves open


def test_skew_and_charging_once() -> None:
    base = Scenario(model="Mixtral-8x7B", seconds=4, policies=STATIC)
    plain, skewed, once = (
        simulate(base.replace(**change)).rows[0] for change in ({}, {"skew": 2.0}, {"charge_once": True})
    )
    assert skewed["imbalance"] > 1.1 * plain["imbalance"]
    assert once["mean_ms"] == plain["mean_ms"]
    # Per layer 2.5 hidden^2 weights of two bytes on 8 GPUs: seven of eight copies are not charged.
    saved = 7 * 32 * 5 * 4096**2 / 1e9
    ran = (plain["cost"]["passes"] - once["cost"]["passes"]) / saved
    held = (plain["cost"]["resident"] - once["cost"]["resident"]) / saved
    assert ran / held == pytest.approx(plain["busy"])
