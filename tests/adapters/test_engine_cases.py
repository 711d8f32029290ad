"""Files in the engines' own formats, kept beside the recordings: all of them read right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.adapters.files import export, read_map, read_placement
from moeless_opt.cli import main
from moeless_opt.problems.errors import ProblemError

GPUS, EXPERTS, LAYERS = 4, 16, (2, 3, 4, 5)


@pytest.fixture
def truth(engine_cases: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((engine_cases / "eplb_triple.json").read_text())
    return found


def test_maps_of_every_engine(engine_cases: Path, truth: dict[str, Any]) -> None:
    wanted = np.array(truth["physical_to_logical_map"]).reshape(4, GPUS, 5)
    for name, more in (
        ("eplb_triple.json", {}),
        ("sglang_init_map.json", {"layers": LAYERS}),
        ("trtllm_moe_load_balancer.yaml", {"layers": LAYERS}),
    ):
        found = read_placement(engine_cases / name, gpus=GPUS, experts=EXPERTS, **more)
        assert (found.slots_LGC == wanted).all(), name
    every = read_placement(engine_cases / "sglang_init_map.json", gpus=GPUS)
    assert len(every.slots_LGC) == 6  # dense layers, too, where nobody says which are wanted
    ascend = read_placement(engine_cases / "ascend_expert_map.json", experts=EXPERTS)
    document = json.loads((engine_cases / "ascend_expert_map.json").read_text())
    for layer, entry in enumerate(document["layer_list"]):
        for gpu, device in enumerate(entry["device_list"]):
            assert ascend.slots_LGC[layer, gpu].tolist() == device["device_expert"]


def test_maps_beside_loads(engine_cases: Path, truth: dict[str, Any]) -> None:
    """vLLM's window and SGLang's recorder files carry the map that was live."""
    found = read_map(engine_cases / "vllm_window.npz")
    with np.load(engine_cases / "vllm_window.npz") as arrays:
        assert (found.map_LS == arrays["physical_to_logical_map"]).all()
    pytest.importorskip("torch")
    for name in ("per_pass_rank0", "per_pass_rank1", "per_token_rank0"):
        found = read_map(engine_cases / f"sglang_recorder_{name}.pt")
        assert found.all_layers
        placement = found.placement(gpus=GPUS, experts=EXPERTS, layers=LAYERS)
        assert (placement.slots_LGC.reshape(4, -1) == np.array(truth["physical_to_logical_map"])).all()
    with pytest.raises(ProblemError, match="holds no map of experts"):
        read_map(engine_cases / "sglang_recorder_stat.pt")


def test_loads_are_no_map(engine_cases: Path) -> None:
    for name in ("sglang_logical_count.json", "metrics.json", "trtllm_statistics/meta_info.json"):
        with pytest.raises(ProblemError, match=f"{name}: document: has the keys"):
            read_map(engine_cases / name)


def test_what_is_written_is_what_stands_there(engine_cases: Path, tmp_path: Path) -> None:
    for engine, name in (("sglang", "sglang_init_map.json"), ("ascend", "ascend_expert_map.json")):
        live = read_placement(engine_cases / name, gpus=GPUS, layers=LAYERS)
        export(live, engine, tmp_path / name, layers=LAYERS)
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, engine_cases))
        assert mine == theirs  # the rows of dense layers as well
    live = read_placement(engine_cases / "trtllm_moe_load_balancer.yaml", gpus=GPUS, layers=LAYERS)
    export(live, "tensorrt-llm", tmp_path / "map.yaml", layers=LAYERS)
    assert (tmp_path / "map.yaml").read_text() == (engine_cases / "trtllm_moe_load_balancer.yaml").read_text()


@pytest.mark.parametrize(
    ("engine", "live"),
    [
        ("sglang", "sglang_init_map.json"),
        ("tensorrt-llm", "trtllm_moe_load_balancer.yaml"),
        ("ascend", "ascend_expert_map.json"),
        ("vllm", "eplb_triple.json"),
        ("eplb", "eplb_triple.json"),
    ],
)
def test_replanned_from_what_is_live(
    engine: str, live: str, engine_cases: Path, truth: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    """Loads drift; the plan moves few replicas, and is as level as the drifted plan beside the case."""
    rows = [
        f"{layer},{expert},{count}"
        for layer, loads in zip(LAYERS, truth["weight_after_drift"], strict=True)
        for expert, count in enumerate(loads)
    ]
    (tmp_path / "drift.csv").write_text("\n".join(["layer,expert,count", *rows]))
    path = tmp_path / (
        "map.yaml" if engine == "tensorrt-llm" else "map.npz" if engine == "eplb" else "map.json"
    )
    argv = [str(tmp_path / "drift.csv"), "--gpus", "2x2", "--slots", "5", "--engine", engine, "-o", str(path)]
    assert main([*argv, "--current", str(engine_cases / live), "--quiet"]) == 0
    after = mo.read_placement(path, gpus=GPUS, experts=EXPERTS, layers=LAYERS)
    before = mo.read_placement(engine_cases / live, gpus=GPUS, experts=EXPERTS, layers=LAYERS)
    shipped = int((after.held_LGE & ~before.held_LGE).sum())
    assert 0 < shipped <= 40
    load_LE = np.array(truth["weight_after_drift"], dtype=float)
    share_LE = load_LE / after.replicas_LE
    tokens_LG = np.stack([row[slots].sum(1) for row, slots in zip(share_LE, after.slots_LGC, strict=True)])
    assert (tokens_LG.max(1) / tokens_LG.mean(1) < 1.35).all()
    if engine != "ascend":
        return
    for layer in range(4):  # its own check of an expert map, restated
        for gpu in range(GPUS):
            old, new = before.slots_LGC[layer, gpu].tolist(), after.slots_LGC[layer, gpu].tolist()
            assert len(set(new)) == len(new)
            assert all(new.index(expert) == old.index(expert) for expert in set(old) & set(new))
