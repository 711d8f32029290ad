"""Models, machines and kernel timings of one's own; and that nothing is simulated that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeless_opt.problems.errors import FormatError, InfeasibleError, ProblemError
from moeless_opt.problems.spec.architecture import MODEL_PRESETS, ModelSpec
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.simulate.cli import main
from moeless_opt.runtime.simulate.hardware import BESIDE, GPUS
from moeless_opt.runtime.simulate.model_file import read_model
from moeless_opt.runtime.simulate.run import simulate
from moeless_opt.runtime.simulate.scenario import Scenario

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


@pytest.mark.parametrize(
    ("change", "said"),
    [
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
