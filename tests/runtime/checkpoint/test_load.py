"""The streaming loader against `transformers`: same files, same logits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

import torch

from moeless_opt.problems.errors import FormatError, MoelessError, ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.architectures import recipe
from moeless_opt.runtime.checkpoint.files import SafetensorsFolder
from moeless_opt.runtime.checkpoint.load import CheckpointHome, ExpertSource, load_checkpoint, recipe_of
from moeless_opt.runtime.checkpoint.parts import causal_positions, moe_layers
from moeless_opt.runtime.live.experts import bind_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Stock megatron-core modules call each other in ways that they deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

VOCABULARY = 96

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}

#: Class names and configurations, by the name that the tests use.
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 8, "rms_norm_eps": 1e-6},
    ),
    "qwen3": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "phi": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_local_experts": 8,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "intermediate_size": 48,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
    "deepseek": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_mtp_layers": 0,
        },
    ),
}


def randomise(model: Any) -> None:
    """Fill a model so that every part matters: norms and biases off their neutral values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.5 if "gate.weight" in name or "router" in name else 0.08)
            elif "norm" in name and "bias" not in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.1)


def write_checkpoint(
    name: str, folder: Path, *, shards: str = "60KB", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Save a small random model of that kind below `folder`; return it, in evaluation mode."""
    import transformers

    config_name, model_name, fields = CHECKPOINTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, config_name)(**{**_SMALL, **fields, **changes})
        model = getattr(transformers, model_name)(config).to(dtype).eval()
        randomise(model)
        model.save_pretrained(folder, max_shard_size=shards)
    return model


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    return model(tokens_BS, causal_positions(tokens_BS), None)


@torch.no_grad()
def difference(reference: Any, model: Any, length: int = 40) -> float:
    t = tokens(length)
    return float((reference(t).logits - logits(model, t)).abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """One checkpoint of every kind, sharded, and the model that wrote it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: (root / name, write_checkpoint(name, root / name)) for name in CHECKPOINTS}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, reference = folders[name]
    assert (folder / "model.safetensors.index.json").is_file()
    assert difference(reference, load_checkpoint(folder)) < 1e-5


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("qwen3", {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []}),
        ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
        ("phi", {"rope_parameters": {**LONG, "rope_theta": 1e4}, "lm_head_bias": False}),
        ("llama4", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "interleave_moe_layer_step": 1}),
        ("llama4", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0, "rope_theta": 5e5}}),
        ("llama4", {"use_qk_norm": False, "moe_layers": [0, 3]}),
        ("deepseek", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}}),
        ("deepseek", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
        # The best two experts rate a group, however many a token takes of the groups.
        ("deepseek", {"num_experts_per_tok": 3}),
        ("deepseek", {"num_experts_per_tok": 8, "topk_group": 2}),
        ("deepseek", {"num_experts_per_tok": 1, "n_group": 8, "topk_group": 1}),
    ],
)
def test_variants_of_the_architectures(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = write_checkpoint(name, tmp_path, **changes)
    assert difference(reference, load_checkpoint(tmp_path)) < 1e-5


def test_positions_matter(tmp_path: Path) -> None:
    """The variants above would be no test if the rotary description did not change the logits."""
    reference = write_checkpoint(
        "deepseek",
        tmp_path,
        rope_parameters={**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(reference, load_checkpoint(tmp_path)) > 1e-2


def test_the_older_spelling_of_rope(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Files written before transformers 5 have rope_theta and rope_scaling instead of rope_parameters."""
    reference = write_checkpoint("llama4", tmp_path, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(reference, load_checkpoint(tmp_path)) < 1e-5


def test_longrope_uses_the_long_factors_for_long_inputs(tmp_path: Path) -> None:
    """As published; transformers 5.23 works out Phi-3.5-MoE's long factors but rotates by the short ones."""
    write_checkpoint("phi", tmp_path, rope_parameters={**LONG, "rope_theta": 1e4})
    model = load_checkpoint(tmp_path)
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    for length, factors in ((64, LONG["short_factor"]), (65, LONG["long_factor"])):
        angle = model.rotary_pos_emb(length)[-1, 0, 0, :8]
        torch.testing.assert_close(angle, (length - 1) * plain / torch.tensor(factors))


def as_multimodal(folder: Path, out: Path) -> None:
    """Rewrite Llama 4's text checkpoint as published: nested configuration, prefixed names, a vision part."""
    from safetensors.torch import save_file

    out.mkdir()
    with SafetensorsFolder(folder) as files:
        tensors = {f"language_model.{name}": files.read(name) for name in files}
    tensors["vision_model.class_embedding"] = torch.zeros(3)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(3)
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    outer = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": config,
    }
    (out / "config.json").write_text(json.dumps(outer))


def test_llama4_as_published(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, reference = folders["llama4"]
    as_multimodal(folder, tmp_path / "published")
    assert difference(reference, load_checkpoint(tmp_path / "published")) < 1e-5


def test_dtypes(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = folders["mixtral"]
    single = load_checkpoint(folder)
    for dtype in (torch.bfloat16, torch.float64):
        model = load_checkpoint(folder, dtype=dtype)
        for (name, a), (_, b) in zip(single.named_parameters(), model.named_parameters(), strict=True):
            assert b.dtype == dtype, name
            assert torch.equal(a.to(dtype), b), name
        assert logits(model, tokens()).dtype == dtype


def test_dtype_of_the_configuration(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    shutil.copytree(folders["mixtral"][0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    assert {p.dtype for p in load_checkpoint(tmp_path).parameters()} == {torch.bfloat16}


def test_the_expert_bias_of_deepseek_stays_float32(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, reference = folders["deepseek"]
    model = load_checkpoint(folder, dtype=torch.bfloat16)
    for i, layer in moe_layers(model):
        assert layer.router.expert_bias.dtype == torch.float32
        assert torch.equal(
            layer.router.expert_bias, reference.model.layers[i].mlp.gate.e_score_correction_bias
        )


def quantise(folder: Path, out: Path) -> None:
    """Rewrite a checkpoint's projections as DeepSeek-V3 has them: FP8, one scale per block of 128 x 128."""
    from safetensors.torch import save_file

    tensors = {}
    with SafetensorsFolder(folder) as files:
        for name in files:
            value = files.read(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = value
                continue
            scale = torch.empty(-(-value.size(0) // 128), -(-value.size(1) // 128))
            small = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
            for i in range(scale.size(0)):
                for j in range(scale.size(1)):
                    block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
                    scale[i, j] = value[block].abs().max() / 448
                    small[block] = (value[block] / scale[i, j]).to(torch.float8_e4m3fn)
            tensors[name], tensors[name + "_scale_inv"] = small, scale
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (out / "config.json").write_text(json.dumps(config))


def test_fp8_blocks(tmp_path: Path) -> None:
    reference = write_checkpoint("deepseek", tmp_path / "a", hidden_size=192, moe_intermediate_size=160)
    quantise(tmp_path / "a", tmp_path / "b")
    exact, rounded = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    assert difference(reference, exact) < 1e-5
    for (name, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        # e4m3 has three bits after the leading one: within 1/16 of a value, and of the block's step near zero
        assert ((a - b).abs() <= a.abs() / 16 + a.abs().max() / 448 / 64).all(), name
    assert any(not torch.equal(a, b) for a, b in zip(exact.parameters(), rounded.parameters(), strict=True))


# ---------------------------------------------------------------------------------------- parts of a model


def test_every_byte_is_read_once(folders: dict[str, tuple[Path, Any]]) -> None:
    for name, (folder, _) in folders.items():
        report = load_checkpoint(folder).load_report
        with SafetensorsFolder(folder) as files:
            assert report.bytes_read == sum(files.info(t).nbytes for t in files), name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_expert_source(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = folders[name]
    model, source = load_checkpoint(folder), ExpertSource(folder)
    layer, moe = moe_layers(model)[-1]
    for expert in (0, source.recipe.experts - 1):
        wanted = moe.experts.local_experts[expert]
        spare = bind_weights(wanted, [torch.zeros_like(p) for p in wanted.parameters()])
        size = source.fill(layer, expert, spare)
        assert size == sum(p.nbytes for p in spare.parameters())
        half = source.read(layer, expert, torch.bfloat16)
        for a, b, c in zip(wanted.parameters(), spare.parameters(), half, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.bfloat16(), c)
    source.close()


def test_expert_source_refuses_what_is_not_there(folders: dict[str, tuple[Path, Any]]) -> None:
    source = ExpertSource(folders["deepseek"][0])
    with pytest.raises(FormatError, match="0 is not a layer with experts"):
        source.fill(0, 0, torch.nn.Module())
    with pytest.raises(FormatError, match="16 is not one of the 16 experts"):
        source.fill(1, 16, torch.nn.Module())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_loaded_model_can_be_taken_over(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    """Attached, it computes the same; and the folder is a home for all of its experts."""
    from moeless_opt.runtime.engines.attach import attach

    folder, reference = folders[name]
    model = load_checkpoint(folder)
    live = attach(model)
    assert difference(reference, model) < 1e-5
    home = CheckpointHome(folder, gpus=3)
    for layer, bank in enumerate(live.banks):
        for expert in (0, live.experts - 1):
            assert list(home.ranks(layer, expert)) == [0, 1, 2]
            for a, b in zip(bank.weights(expert), home.read(layer, expert), strict=True):
                assert torch.equal(a, b)
    home.regroup([0, 2])
    assert list(home.ranks(0, 0)) == [0, 1]
    live.close()


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist, warnings
warnings.simplefilter("ignore")
root, rank, size, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore("store", size), rank=rank, world_size=size)
from moeless_opt.runtime.checkpoint.parts import causal_positions, ensure_model_parallel
from moeless_opt.runtime.checkpoint.load import load_checkpoint
from moeless_opt.runtime.checkpoint.parts import parallel_state
from moeless_opt.runtime.checkpoint.pipeline import pipelined, whole_logits
ensure_model_parallel()
mine, results = torch.load("tokens")[rank : rank + 1], {}
for name in names:
    model = load_checkpoint(f"{root}/{name}")
    with torch.no_grad():
        logits = model(mine, causal_positions(mine), None)
    experts = sum("linear_fc1" in n and "local_experts" in n for n, _ in model.named_parameters())
    results[name] = {"logits": logits, "bytes": model.load_report.bytes_read, "experts": experts}
for tensor, stages in ((2, 1), (1, 2)):
    parallel_state.destroy_model_parallel()
    ensure_model_parallel(2 // stages, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    for name in names:
        if name == ("deepseek" if tensor > 1 else "qwen3"):
            continue  # refused: latent attention in parts, an output matrix that is the embedding
        model = load_checkpoint(f"{root}/{name}")
        logits = pipelined(model, torch.load("tokens"))
        kind = "tensor" if tensor > 1 else "pipeline"
        results[name][kind] = None if logits is None else whole_logits(logits)
        results[name][kind + " bytes"] = model.load_report.bytes_read
torch.save(results, f"results.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def child(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a Python process that finds the package."""
    root = str(Path(__file__).resolve().parents[3])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], env=env, text=True, **options)


@pytest.fixture(scope="module")
def by_rank(
    folders: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two expert-parallel ranks loaded and computed, for all checkpoints."""
    where = tmp_path_factory.mktemp("ranks")
    torch.save(tokens(), where / "tokens")
    root = str(next(iter(folders.values()))[0].parent)
    ranks = [child("-c", RANK_SCRIPT, root, str(r), "2", *folders, cwd=where) for r in range(2)]
    assert [r.wait(timeout=600) for r in ranks] == [0, 0]
    return [torch.load(where / f"results.{r}") for r in range(2)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_rank_loads_only_its_experts(
    name: str, folders: dict[str, tuple[Path, Any]], by_rank: list[dict[str, Any]]
) -> None:
    folder, reference = folders[name]
    results = [r[name] for r in by_rank]
    with torch.no_grad():
        wanted = reference(tokens()).logits
    assert (torch.cat([r["logits"] for r in results]) - wanted).abs().max() < 1e-5
    whole = load_checkpoint(folder)
    expert_bytes = sum(p.nbytes for n, p in whole.named_parameters() if "local_experts" in n)
    expert_count = sum(len(m.experts.local_experts) for _, m in moe_layers(whole))
    for result in results:
        assert result["experts"] == expert_count // 2
        assert result["bytes"] == whole.load_report.bytes_read - expert_bytes // 2


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_rank_loads_only_its_part_and_its_stage(
    name: str, folders: dict[str, tuple[Path, Any]], by_rank: list[dict[str, Any]]
) -> None:
    folder, reference = folders[name]
    first, last = (r[name] for r in by_rank)
    whole = load_checkpoint(folder)
    mine = logits(whole, tokens())
    with torch.no_grad():
        wanted = reference(tokens()).logits
    if name != "qwen3":  # whose output matrix is its embedding
        assert first["pipeline"] is None
        assert torch.equal(last["pipeline"], mine)  # the same sums in the same order
        assert first["pipeline bytes"] + last["pipeline bytes"] == whole.load_report.bytes_read
    if name == "deepseek":  # whose attention is latent
        return
    assert torch.equal(first["tensor"], last["tensor"])
    assert (first["tensor"] - wanted).abs().max() < 1e-5  # sums over ranks: rounding
    assert first["tensor bytes"] == last["tensor bytes"]
    assert first["tensor bytes"] < 0.8 * whole.load_report.bytes_read


MEMORY_SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from moeless_opt.runtime.checkpoint.load import load_checkpoint
def anonymous():  # memory of the process that no file backs
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
def look(_):
    global peak
    peak = max(peak, anonymous())
for dtype in (torch.float32, torch.bfloat16):
    model, peak, before = None, 0, anonymous()
    model = load_checkpoint(sys.argv[1], dtype=dtype, on_progress=look)
    print(peak - before, sum(p.nbytes for p in model.parameters()), model.load_report.scratch_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_no_second_copy_of_the_model(tmp_path: Path) -> None:
    """One file of 51 MB: loading takes the model itself, one tensor, and what an empty model takes."""
    write_checkpoint("mixtral", tmp_path, shards="10GB", hidden_size=256, intermediate_size=1024)
    process = child("-c", MEMORY_SCRIPT, str(tmp_path), stdout=subprocess.PIPE)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    for line in printed.splitlines():
        grown, model_bytes, scratch = (int(x) for x in line.split())
        assert scratch <= 1024 * 256 * 4
        assert grown < model_bytes + scratch + 16e6, (grown, model_bytes)
    assert len(printed.splitlines()) == 2


# --------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def broken(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of the Mixtral checkpoint, to be damaged."""
    shutil.copytree(folders["mixtral"][0], tmp_path / "broken")
    return tmp_path / "broken"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_index(folder: Path, change: Any) -> None:
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    change(document["weight_map"])
    index.write_text(json.dumps(document))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: no such file"):
        load_checkpoint(tmp_path / "nowhere")


def test_no_weights(broken: Path) -> None:
    for file in broken.glob("model*"):
        file.unlink()
    with pytest.raises(FormatError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        load_checkpoint(broken)


def test_missing_shard(broken: Path) -> None:
    next(iter(sorted(broken.glob("*.safetensors")))).unlink()
    with pytest.raises(FormatError, match=r"names the file 'model-00001.*which is not in the folder"):
        load_checkpoint(broken)


def test_missing_tensor(broken: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    edit_index(broken, lambda weight_map: weight_map.pop(name))
    with pytest.raises(FormatError, match=r"tensor 'model\.layers\.1\..*\.5\.w2\.weight' is missing"):
        load_checkpoint(broken)


def test_wrong_index(broken: Path) -> None:
    def swap(weight_map: dict[str, str]) -> None:
        here = weight_map["lm_head.weight"]
        weight_map["lm_head.weight"] = next(file for file in weight_map.values() if file != here)

    edit_index(broken, swap)
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is missing, though the index says"):
        load_checkpoint(broken)


def test_wrong_shape(broken: Path) -> None:
    edit(broken / "config.json", intermediate_size=100)
    with pytest.raises(FormatError, match=r"experts\.0\.w1.* has shape \[96, 64\].*asks for \[100, 64\]"):
        load_checkpoint(broken)


def test_leftover_tensor(broken: Path) -> None:
    edit(broken / "config.json", num_local_experts=4)
    with pytest.raises(FormatError, match=r"24 tensors are not part of Mixtral as configured.*experts\.4\."):
        load_checkpoint(broken)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_more_layers_than_configured(name: str, folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """A layer that is not loaded is an error in every architecture, also where layers that draft are."""
    shutil.copytree(folders[name][0], tmp_path, dirs_exist_ok=True)
    layers = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] - 1
    lists = dict.fromkeys(("no_rope_layers", "moe_layers"))
    edit(tmp_path / "config.json", num_hidden_layers=layers, num_nextn_predict_layers=1, **lists)
    with pytest.raises(
        FormatError, match=rf"are not part of .* configured, e\.g\. 'model\.layers\.{layers}\."
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("drafting", "configured"), [(1, 1), (2, 2), (2, 1), (1, 0)])
def test_layers_that_draft_are_left_out(
    drafting: int, configured: int, folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """As many as the configuration has; DeepSeek-V3 is published with one behind its 61 layers."""
    from safetensors.torch import save_file

    folder, reference = folders["deepseek"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", num_mtp_layers=None, num_nextn_predict_layers=configured)
    names = [
        f"model.layers.{3 + i}.{name}.weight"
        for i in range(drafting)
        for name in ("eh_proj", "enorm", "embed_tokens", "mlp.experts.0.up_proj")
    ]
    save_file({name: torch.zeros(3) for name in names}, tmp_path / "drafts.safetensors")
    edit_index(tmp_path, lambda weight_map: weight_map.update(dict.fromkeys(names, "drafts.safetensors")))
    if drafting == configured:
        assert difference(reference, load_checkpoint(tmp_path)) < 1e-5
    else:
        with pytest.raises(FormatError, match=rf"'model\.layers\.{3 + configured}\."):
            load_checkpoint(tmp_path)


def test_replayed_routes_of_limited_groups(folders: dict[str, tuple[Path, Any]]) -> None:
    from moeless_opt.runtime.engines.observe import replay_routes

    model = load_checkpoint(folders["deepseek"][0])
    told = torch.arange(80)[:, None, None].add(torch.tensor([0, 1, 2, 4])).remainder(16).expand(80, 2, 4)
    seen: list[torch.Tensor] = []
    for _, layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, inputs, out: seen.append(out[1]))
    with replay_routes(model) as replay:
        replay.load(told.numpy())
        logits(model, tokens())
    for chosen, wanted in zip(seen, told.unbind(1), strict=True):
        assert torch.equal(chosen, torch.zeros(80, 16, dtype=torch.bool).scatter(1, wanted, True))


@pytest.mark.parametrize(
    "weight_map", [["a"], {"a": 1}, None, {"lm_head.weight": "../model.safetensors"}, {"a": ["b"]}]
)
def test_an_index_that_is_none(weight_map: Any, broken: Path) -> None:
    shutil.copy(next(broken.glob("*.safetensors")), broken.parent / "model.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json: "):
        load_checkpoint(broken)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}},
    ],
)
def test_a_header_that_is_none(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_types_and_places_that_cannot_be(broken: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"dtype torch\.int32 is not supported"):
        load_checkpoint(broken, dtype=torch.int32)
    with pytest.raises(ProblemError, match="device: 'nowhere' cannot be used here"):
        load_checkpoint(broken, device="nowhere")
    with pytest.raises(ProblemError, match="max_sequence_length: is 0"):
        load_checkpoint(broken, max_sequence_length=0)


def test_sizes_out_of_proportion_are_seen_before_memory_is_taken(broken: Path) -> None:
    edit(broken / "config.json", vocab_size=2**24, hidden_size=2**20)
    with pytest.raises(FormatError, match=r"embed_tokens.*asks for"):
        load_checkpoint(broken)


def test_truncated_file(broken: Path) -> None:
    file = sorted(broken.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match="truncated"):
        load_checkpoint(broken)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), (40).to_bytes(8, "little") + b"{" * 40])
def test_not_a_safetensors_file(content: bytes, broken: Path) -> None:
    for file in broken.glob("model*"):
        file.unlink()
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="not a safetensors file"):
        load_checkpoint(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; known are Mixtral",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization 'awq'"),
    ],
)
def test_unsupported_features_are_named(changes: dict[str, Any], message: str, broken: Path) -> None:
    edit(broken / "config.json", **changes)
    with pytest.raises(UnsupportedFeatureError, match=message):
        load_checkpoint(broken)


def test_longer_inputs_than_the_attention_allows(folders: dict[str, tuple[Path, Any]], broken: Path) -> None:
    edit(broken / "config.json", sliding_window=128)
    assert recipe_of(broken).max_sequence_length == 128
    with pytest.raises(UnsupportedFeatureError, match="beyond 128 the model needs sliding-window"):
        load_checkpoint(broken, max_sequence_length=129)
    assert recipe_of(folders["llama4"][0]).max_sequence_length == 8191


@pytest.mark.parametrize(
    ("kind", "ranks", "changes", "message"),
    [
        ("expert_tensor", 2, {}, r"expert tensor parallelism \(2 ranks\)"),
        ("context", 2, {}, r"context parallelism \(2 ranks\)"),
        ("tensor_model", 3, {}, "tensor parallelism: 4 attention heads over 3 ranks"),
        ("tensor_model", 4, {}, "tensor parallelism: 2 key-value heads over 4 ranks"),
        ("pipeline_model", 3, {}, "pipeline parallelism: 2 layers in 3 stages"),
        ("pipeline_model", 2, {"tie_word_embeddings": True}, "model whose output matrix is its embedding"),
    ],
)
def test_other_parallelism_is_refused(
    kind: str,
    ranks: int,
    changes: dict[str, Any],
    message: str,
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moeless_opt.runtime.checkpoint import architectures as loader_models

    edit(broken / "config.json", **changes)
    monkeypatch.setattr(loader_models.parallel_state, f"get_{kind}_parallel_world_size", lambda: ranks)
    with pytest.raises(UnsupportedFeatureError, match=message):
        load_checkpoint(broken)


def test_tensor_parallel_latent_attention_is_refused(
    folders: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeless_opt.runtime.checkpoint import architectures as loader_models

    monkeypatch.setattr(loader_models.parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(UnsupportedFeatureError, match="of multi-head latent attention"):
        load_checkpoint(folders["deepseek"][0])


def test_missing_field(broken: Path) -> None:
    edit(broken / "config.json", num_local_experts=None)
    with pytest.raises(FormatError, match="'num_local_experts': is missing"):
        load_checkpoint(broken)


# --------------------------------------------------------------------------------- the published checkpoints

_DEEPSEEK_ROPE = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
#: The fields of the published config.json files that matter, and how many parameters the text models have.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mistralai/Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "microsoft/Phi-3.5-MoE-instruct": (
        {
            "architectures": ["PhiMoEForCausalLM"],
            "attention_bias": True,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "lm_head_bias": True,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "short_mscale": 1.243163121016122,
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 10000.0,
            "router_jitter_noise": 0.01,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        41_873_153_344,
    ),
    "Qwen/Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
    "meta-llama/Llama-4-Scout-17B-16E": (
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": {
                "attention_bias": False,
                "attention_chunk_size": 8192,
                "attn_temperature_tuning": True,
                "floor_scale": 8192,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "interleave_moe_layer_step": 1,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "max_position_embeddings": 10485760,
                "no_rope_layers": [],
                "num_attention_heads": 40,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "num_local_experts": 16,
                "rms_norm_eps": 1e-05,
                "rope_scaling": {**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0},
                "rope_theta": 500000.0,
                "use_qk_norm": True,
                "vocab_size": 202048,
            },
            "torch_dtype": "bfloat16",
        },
        107_769_861_120,
    ),
    "deepseek-ai/DeepSeek-V3": (
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "first_k_dense_replace": 3,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "rms_norm_eps": 1e-06,
            "rope_scaling": _DEEPSEEK_ROPE,
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671_026_419_200,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_published_size(name: str) -> None:
    """The tensors that the loader asks for add up to the parameters that the model is known to have."""
    from math import prod

    config, parameters = PUBLISHED[name]
    plan = recipe(config)
    shapes = {p.source: p.shape for p in plan.pieces(lambda layer: list(range(plan.experts)))}
    assert sum(map(prod, shapes.values())) == parameters


#: What a damaged or careless configuration may have in a field.
ODD = [-1, 0, 1, 3, 1.5, 10**30, float("nan"), True, "", "64", [], [-1], ["a"], [10**9], {}, {"a": 1}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_odd_configurations_end_in_one_clear_error(name: str) -> None:
    """Every field left out, or an odd value in its place: a model comes of it, or the field is named."""
    config, _ = PUBLISHED[name]
    nested = "text_config" in config
    inner = config.get("text_config", config)
    scaling = inner.get("rope_scaling") or {}
    cases = [{**inner, key: value} for key in inner for value in ODD]
    cases += [{k: v for k, v in inner.items() if k != key} for key in inner]
    cases += [
        {**inner, "rope_scaling": {**scaling, key: value}} for key in [*scaling, "partial"] for value in ODD
    ]
    accepted = 0
    for case in cases:
        with contextlib.suppress(MoelessError):
            plan = recipe({**config, "text_config": case} if nested else case)
            plan.transformer_config(torch.bfloat16)
            next(iter(plan.pieces(lambda layer: [0])))
            accepted += 1
    assert 20 < accepted < len(cases) / 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "'num_experts_per_tok': is 9, there are 8 experts"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 in Mixtral is not supported"),
        ("mixtral", {"num_key_value_heads": 3}, "'num_key_value_heads': is 3, must divide the 4"),
        ("mixtral", {"vocab_size": None}, "'vocab_size': is missing"),
        ("mixtral", {"hidden_size": "64"}, "'hidden_size': is '64', must be a whole number"),
        ("mixtral", {"architectures": "MixtralForCausalLM"}, "'architectures': is 'Mixtral"),
        ("mixtral", {"rope_parameters": "linear"}, "'rope_parameters': is 'linear', must be an object"),
        ("qwen3", {"mlp_only_layers": [7]}, "'mlp_only_layers': names layer 7; there are 3"),
        ("qwen3", {"head_dim": 31}, "'head_dim': is 31, must be even"),
        ("qwen3", {"mlp_only_layers": [0, 1, 2]}, "none of these layers has experts"),
        ("llama4", {"no_rope_layers": [1, 0]}, r"'no_rope_layers': is \[1, 0\], must have a 0 or 1 for each"),
        ("deepseek", {"n_group": 5}, "'n_group': is 5: 16 experts do not divide into groups"),
        ("deepseek", {"topk_group": 5}, "'topk_group': is 5, must be from 1 to 4"),
        ("deepseek", {"num_experts_per_tok": 9}, "'num_experts_per_tok': is 9; 2 groups have 8 experts"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    name: str, changes: dict[str, Any], message: str, folders: dict[str, tuple[Path, Any]]
) -> None:
    config = json.loads((folders[name][0] / "config.json").read_text())
    with pytest.raises((FormatError, UnsupportedFeatureError), match=message):
        recipe({**config, **changes})
