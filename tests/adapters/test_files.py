"""Placements in engines' files: written as they read them, read as they stand, refused by layer and slot."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.adapters.files import ENGINES, export, model_numbers, read_map, read_placement
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io import save_plan

SUFFIX = [(engine, suffix) for engine, suffixes in ENGINES.items() for suffix in suffixes]
NUMBERED = ("sglang", "tensorrt-llm")


def full_slots(rng: np.random.Generator, layers: int, gpus: int, slots: int, experts: int) -> np.ndarray:
    """Full slots without second copies."""
    found = np.empty((layers, gpus, slots), dtype=np.int64)
    for layer in found:
        layer[:] = (np.arange(gpus * slots) % experts).reshape(gpus, slots)
        layer[:] = rng.permutation(experts)[layer]
    return found


@pytest.fixture
def slots_LGC() -> np.ndarray:
    return full_slots(np.random.default_rng(5), 4, 3, 4, 10)


# --- there and back ----------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("engine", "suffix"), [pair for pair in SUFFIX if pair[1] != ".pt"])
def test_there_and_back(engine: str, suffix: str, tmp_path: Path, data: st.DataObject) -> None:
    layers, gpus, slots = (data.draw(st.integers(1, high)) for high in (4, 5, 4))
    experts = data.draw(st.integers(slots, gpus * slots))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    slots_LGC = full_slots(rng, layers, gpus, slots, experts)
    own = tuple(sorted(rng.choice(2 * layers + 1, layers, replace=False).tolist()))
    path = tmp_path / f"map{suffix}"
    plain = own == tuple(range(layers))
    export(slots_LGC, engine, path, layers=own, model_layers=layers if plain else None)
    told = {"model_layers": layers} if plain else {}
    found = read_placement(path, gpus=gpus, experts=experts, layers=own, **told)
    assert (found.slots_LGC == slots_LGC).all()
    assert found.experts == experts


def test_there_and_back_as_tensors(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    pytest.importorskip("torch")
    export(slots_LGC, "eplb", tmp_path / "map.pt")
    assert (read_placement(tmp_path / "map.pt", gpus=3).slots_LGC == slots_LGC).all()


# --- what stands in the files ------------------------------------------------------------------------------


def test_sglang_has_a_row_for_every_layer(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    export(slots_LGC, "sglang", tmp_path / "map.json", layers=(2, 3, 4, 5))
    document = json.loads((tmp_path / "map.json").read_text())
    assert set(document) == {"physical_to_logical_map"}  # any other key is a TypeError there
    rows = document["physical_to_logical_map"]
    assert [len(row) for row in rows] == [12] * 6
    assert rows[2:] == slots_LGC.reshape(4, 12).tolist()
    assert all(0 <= expert < 10 for row in rows for expert in row)


def test_tensorrt_llm_has_every_layer_by_its_number(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    export(slots_LGC, "tensorrt-llm", tmp_path / "map.yaml", layers=(3, 4, 6, 7), updates=2)
    document = yaml.safe_load((tmp_path / "map.yaml").read_text())
    assert document == {
        "num_slots": 12,
        "initial_global_assignments": dict(zip((3, 4, 6, 7), slots_LGC.reshape(4, 12).tolist(), strict=True)),
        "layer_updates_per_iter": 2,
    }
    with pytest.raises(ProblemError, match="updates: are TensorRT-LLM's"):
        export(slots_LGC, "vllm", tmp_path / "map.json", updates=2)


def test_ascend_has_devices_by_layer(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    export(slots_LGC, "ascend", tmp_path / "map.json")
    document = json.loads((tmp_path / "map.json").read_text())
    assert document["moe_layer_count"] == 4
    for number, layer in enumerate(document["layer_list"]):
        assert (layer["layer_id"], layer["device_count"]) == (number, 3)
        rows = [device["device_expert"] for device in layer["device_list"]]
        assert [device["device_id"] for device in layer["device_list"]] == [0, 1, 2]
        assert rows == slots_LGC[number].tolist()


def test_eplb_has_its_three_arrays(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    export(slots_LGC, "eplb", tmp_path / "map.npz")
    with np.load(tmp_path / "map.npz") as arrays:
        phy2log, log2phy, logcnt = (arrays[name] for name in ("phy2log", "log2phy", "logcnt"))
    assert phy2log.tolist() == slots_LGC.reshape(4, 12).tolist()
    for layer in range(4):
        for expert in range(10):
            there = log2phy[layer, expert][log2phy[layer, expert] >= 0]
            assert len(there) == logcnt[layer, expert] > 0
            assert (phy2log[layer, there] == expert).all()


def test_vllm_has_lists(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    export(slots_LGC, "vllm", tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == slots_LGC.reshape(4, 12).tolist()
    (tmp_path / "one.json").write_text(json.dumps(slots_LGC[0].ravel().tolist()))
    found = read_placement(tmp_path / "one.json", gpus=3, layers=(0, 1, 2))
    assert (found.slots_LGC == slots_LGC[:1]).all()
    assert len(found.slots_LGC) == 3
    (tmp_path / "three.json").write_text(json.dumps(slots_LGC.tolist()))
    assert (read_placement(tmp_path / "three.json").slots_LGC == slots_LGC).all()  # it says how many GPUs


def test_plans_are_read_as_well(tmp_path: Path) -> None:
    plan = mo.plan([[5, 4, 3, 2], [1, 2, 3, 4]], mo.uniform(1, 2, slots=3))
    for name in ("plan.json", "plan.npz", "plan"):
        save_plan(plan, tmp_path / name)
        found = read_placement(tmp_path / name)
        assert found == plan.placement
    packed = gzip.compress((tmp_path / "plan.json").read_bytes())
    (tmp_path / "plan.json.gz").write_bytes(packed)
    assert read_placement(tmp_path / "plan.json.gz", layers=(3, 4)) == plan.placement


@pytest.mark.parametrize("gpus", [3, None])
def test_arrays_alone(tmp_path: Path, slots_LGC: np.ndarray, gpus: int | None) -> None:
    given = slots_LGC if gpus is None else slots_LGC.reshape(4, 12)
    np.save(tmp_path / "map.npy", given)
    np.savez(tmp_path / "map.npz", given)
    np.savez(tmp_path / "loads.npz", loads=given)
    with pytest.raises(ProblemError, match="holds no map of experts"):
        read_map(tmp_path / "loads.npz")
    for name in ("map.npy", "map.npz"):
        assert (read_placement(tmp_path / name, gpus=gpus).slots_LGC == slots_LGC).all()


def test_a_re_plan_from_an_engine_s_file(tmp_path: Path) -> None:
    loads = mo.Loads(load_TLE=np.random.default_rng(0).lognormal(5, 1, (3, 8)), layers=(1, 2, 3))
    topology = mo.uniform(1, 4, slots=3)
    plan = mo.plan(loads, topology, split="equal", fill="copies")
    for engine, suffixes in ENGINES.items():
        if engine != "ascend":
            export(plan, engine, tmp_path / f"{engine}{suffixes[0]}")
            live = str(tmp_path / f"{engine}{suffixes[0]}")
            again = mo.plan(loads, topology, split="equal", fill="copies", current=live)
            assert again.moves.count == 0
            assert (again.slots_LGC == plan.slots_LGC).all()
    with pytest.raises(ProblemError, match=r"vllm.json: layers: are 3 in the map, 1 are wanted"):
        mo.plan([[1.0] * 8], topology, current=tmp_path / "vllm.json")


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_cannot_take(engine: str, tmp_path: Path, slots_LGC: np.ndarray) -> None:
    path, layers = tmp_path / f"map{ENGINES[engine][0]}", (3, 4, 5, 6)
    fill = "distinct" if engine == "ascend" else "copies"
    empty = slots_LGC.copy()
    empty[1, 2, 1] = -1
    empty[1, 2, 3] = empty[1, 2, 0]
    missing = set(range(10)) - set(empty[1].ravel().tolist())
    if missing:
        empty[1, 2, 3] = missing.pop()
    with pytest.raises(ProblemError, match=rf"layer 4, slot 9 \(GPU 2\): is empty; {engine} .*--fill {fill}"):
        export(empty, engine, path, layers=layers)
    uneven = np.concatenate([slots_LGC, np.full((4, 3, 1), -1)], axis=2)
    uneven[:, 1, 4] = slots_LGC[:, 0, 0]
    with pytest.raises(ProblemError, match=rf"GPU 0: has 4 slots, another has 5; {engine} needs as many"):
        export(uneven, engine, path, layers=layers)
    dead = np.full((1, 3, 2), -1)
    dead[0, :2] = [[0, 1], [1, 0]]
    with pytest.raises(ProblemError, match="GPU 2: holds nothing, another has 2"):
        export(dead, engine, path, layers=(3,))
    partial = mo.Placement(slots_LGC=[[[0, 2]]], experts=3, partial=True)
    with pytest.raises(ProblemError, match=r"layer 3: no slot holds expert 1"):
        export(partial, engine, path, layers=(3,))
    with pytest.raises(FormatError, match="must end in"):
        export(slots_LGC, engine, tmp_path / "map.txt", layers=layers)
    with pytest.raises(ProblemError, match="layers: are 1, the placement has 4"):
        export(slots_LGC, engine, path, layers=(3,))
    assert not list(tmp_path.iterdir())


def test_second_copies(tmp_path: Path) -> None:
    slots_LGC = [[[0, 1, 0], [2, 1, 2]]]
    with pytest.raises(ProblemError, match=r"layer 0, slot 2 \(GPU 0\): holds a second copy of expert 0"):
        export(slots_LGC, "ascend", tmp_path / "map.json")
    for engine, suffix in (
        ("vllm", ".json"),
        ("sglang", ".json"),
        ("tensorrt-llm", ".yml"),
        ("eplb", ".npz"),
    ):
        path = tmp_path / f"{engine}{suffix}"
        export(slots_LGC, engine, path, model_layers=1)
        assert read_placement(path, gpus=2).slots_LGC.tolist() == slots_LGC


def test_no_such_engine(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    with pytest.raises(ProblemError, match="engine: is 'trt', must be one of vllm, sglang, tensorrt-llm"):
        export(slots_LGC, "trt", tmp_path / "map.yaml")


# --- which layers they are ---------------------------------------------------------------------------------

V3 = mo.model_preset("DeepSeek-V3")


@pytest.mark.parametrize(
    ("layers", "options", "numbers", "total"),
    [
        ((3, 4, 5), {}, (3, 4, 5), 6),
        ((3, 4, 5), {"told": 8}, (3, 4, 5), 8),
        ((0, 1, 2), {"told": 3}, (0, 1, 2), 3),
        ((0, 1, 2), {"told": "1,3,5"}, (1, 3, 5), 6),
        ((0, 1, 2), {"told": (3, 4, 5)}, (3, 4, 5), 6),
        ((0, 1, 2), {"told": " 3-4, 7"}, (3, 4, 7), 8),
        ((3, 4, 5), {"told": "3-5"}, (3, 4, 5), 6),
        (range(58), {"model": V3}, tuple(range(3, 61)), 61),
        (range(3, 61), {"model": V3}, tuple(range(3, 61)), 61),
        (range(32), {"model": mo.model_preset("Mixtral-8x7B")}, tuple(range(32)), 32),
        ((0, 1), {"sure": False}, (0, 1), 2),
    ],
)
def test_layers_are_numbered(layers: Any, options: Any, numbers: Any, total: int) -> None:
    assert model_numbers(layers, **options) == (numbers, total)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((0, 1, 2), {}, "model-layers: is missing: 3 layers are numbered from 0"),
        ((0, 1, 2), {"told": 6}, "model-layers: is 6, and 3 layers are numbered from 0: .* such as 3-5"),
        ((3, 4), {"told": 4}, "model-layers: is 4, there is a layer 4"),
        ((0, 1), {"told": "3-5"}, "model-layers: names 3 layers, must be 2 rising"),
        ((0, 1), {"told": "5,3"}, "model-layers: names 2 layers, must be 2 rising"),
        ((0, 1), {"told": "x"}, "model-layers: is 'x', must be like 61, 3-60 or 1,3,5"),
        ((2, 4), {"told": "3-4"}, "model-layers: is 3-4, the loads say 2, 4"),
        ((2, 4), {"model": V3}, "layers: name 2, which is dense in DeepSeek-V3"),
        ((0, 1), {"model": V3}, "layers: name 0, which is dense in DeepSeek-V3"),
    ],
)
def test_layers_that_cannot_be_numbered(layers: Any, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        model_numbers(layers, **options)


def test_dense_layers_are_never_taken_for_others(tmp_path: Path, slots_LGC: np.ndarray) -> None:
    """Loads counted from 0 beside a map of every layer: which is which is told, or nothing is read."""
    path = tmp_path / "map.json"
    export(slots_LGC, "sglang", path, layers=(2, 3, 4, 5))
    for layers, more in (((0, 1, 2, 3), {"model_layers": "2-5"}), ((2, 3, 4, 5), {})):
        assert (read_placement(path, gpus=3, layers=layers, **more).slots_LGC == slots_LGC).all()
    with pytest.raises(ProblemError, match=r"map.json: model-layers: is missing"):
        read_placement(path, gpus=3, layers=(0, 1, 2, 3))
    with pytest.raises(ProblemError, match=r"map.json: layer 6: is not in the map, .* 0-5"):
        read_placement(path, gpus=3, layers=(3, 4, 5, 6))
    path = tmp_path / "map.yaml"
    export(slots_LGC, "tensorrt-llm", path, layers=(2, 3, 4, 5))
    assert (
        read_placement(path, gpus=3, layers=(0, 1, 2, 3), model_layers="2-5").slots_LGC == slots_LGC
    ).all()
    with pytest.raises(ProblemError, match=r"map.yaml: layer 0: is not in the map, which has the layers 2-5"):
        read_placement(path, gpus=3, layers=(0, 1, 2, 3))


# --- files that are wrong ----------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "sglang.json": {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]},
    "vllm.json": [[0, 1, 2, 0], [2, 1, 0, 1]],
    "ascend.json": {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": 2,
                "device_list": [{"device_id": g, "device_expert": row} for g, row in enumerate(rows)],
            }
            for layer, rows in enumerate([[[0, 1], [2, 0]], [[2, 1], [0, 1]]])
        ],
    },
    "eplb.json": {"phy2log": [[0, 1, 2, 0], [2, 1, 0, 1]], "logcnt": [[2, 1, 1], [1, 2, 1]]},
    "trt.json": {"num_slots": 4, "initial_global_assignments": {"0": [0, 1, 2, 0], "1": [2, 1, 0, 1]}},
}
WANTED = [[[0, 1], [2, 0]], [[2, 1], [0, 1]]]


@pytest.mark.parametrize("name", GOOD)
def test_written_by_hand(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(GOOD[name]))
    assert read_placement(tmp_path / name, gpus=2, experts=3, layers=(0, 1)).slots_LGC.tolist() == WANTED
    with pytest.raises(ProblemError, match=r"layer 0.*no slot holds expert 3"):
        read_placement(tmp_path / name, gpus=2, experts=4, layers=(0, 1))
    with pytest.raises(ProblemError, match=r"layer 0, slot 2 \(GPU 1\): expert 2 is unknown"):
        read_placement(tmp_path / name, gpus=2, experts=2, layers=(0, 1))
    with pytest.raises(ProblemError, match=r"GPUs cannot have in equal parts|gpus: are 2 in the map"):
        read_placement(tmp_path / name, gpus=3, experts=3, layers=(0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello", "is in no known format"),
        ("{}", "document: has the keys"),
        ("[]", "map: is empty"),
        ("[[]]", "layer 0: is empty"),
        ("[[0, 1], [0]]", "layer 1: has 1 slots, must have 2"),
        ("[[0, 1], [0, true]]", "layer 1, slot 1: is 'True', must be the number of an expert"),
        ("[[0, 1], [0, 1.0]]", "layer 1, slot 1: is '1.0'"),
        ("[[0, 1], [0, -2]]", "layer 1, slot 1: is '-2'"),
        ("[[0, 1], 3]", "layer 1: must be a list of experts, got a whole number"),
        ("[0, [1]]", "map, slot 1: is"),
        ("[0, 99999999999]", "map, slot 1: is '99999999999'"),
        ("[[[0, 1], [2, 3]], [[0, 1, 2, 3]]]", "layer 1: "),
        ('{"physical_to_logical_map": {"0": [1]}}', "must be a list of layers"),
        ('{"moe_layer_count": 2, "layer_list": []}', "moe_layer_count: is 2, layer_list has 0"),
        ('{"moe_layer_count": 1, "layer_list": [{"layer_id": 1}]}', "layer 0: layer_id: is 1, must be 0"),
        ('{"format": "moeless-problem", "version": 1}', "moeless-plan|format"),
        ("num_slots: 2\n", "initial_global_assignments.* is missing"),
        ("num_slots: 2\ninitial_global_assignments: {}\n", "names no layer"),
        ("num_slots: 2\ninitial_global_assignments:\n  0: [0, 1, 2]\n", "layer 0: has 3 slots, must have 2"),
        ("num_slots: 2\ninitial_global_assignments:\n  x: [0, 1]\n", "has the key 'x'"),
        (
            "num_slots: 2\ninitial_global_assignments:\n  0: [0, 1]\n  0: [1, 0]\n",
            "line 4: has the key 0 twice",
        ),
        ("num_slots: 2\ninitial_global_assignments:\n  0: &a [0, 1]\n  1: *a\n", "line 4: has a reference"),
        ("num_slots: 2\ninitial_global_assignments:\n  0: [0, 1]\nother: 1\n", "other: unknown key"),
        ("num_slots: !!python/object:os.system 2\n", "is not YAML"),
        ("num_slots: [\n", "is not YAML"),
    ],
)
def test_what_is_no_map_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.file"
    path.write_text(text)
    with pytest.raises(ProblemError, match=message) as error:
        read_placement(path, gpus=1)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_arrays_that_are_no_map(tmp_path: Path) -> None:
    eye = np.eye(2, dtype=int)
    for name, arrays, message in (
        ("float", {"phy2log": np.eye(2)}, "phy2log: holds float64, a map holds whole numbers"),
        (
            "apart",
            {"phy2log": eye, "physical_to_logical_map": eye[::-1]},
            "differ",
        ),
        ("flat", {"phy2log": np.arange(4)}, "has shape"),
        (
            "counts",
            {"phy2log": np.array([[0, 1]]), "logcnt": np.array([[2, 0]])},
            "logcnt: does not follow from phy2log",
        ),
        ("none", {"a": np.eye(2), "b": np.eye(2)}, "holds no map of experts"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ProblemError, match=message):
            read_map(tmp_path / f"{name}.npz")
    buffer = io.BytesIO()
    np.save(buffer, np.eye(20, dtype=int))
    (tmp_path / "cut.npy").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(ProblemError, match="truncated or damaged"):
        read_map(tmp_path / "cut.npy")
