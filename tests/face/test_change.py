"""The person on call: a lost GPU, a new node, an engine's map; what moves, how long, is it worth it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.adapters import ENGINES
from moeless_opt.cli import main
from moeless_opt.cli.change import change_of

LOAD = np.random.default_rng(3).lognormal(5, 1, (3, 8)).round()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"{layer},{e},{LOAD[layer - 2, e]:.0f}" for layer in (2, 3, 4) for e in range(8)]
    Path("loads.csv").write_text("\n".join(["layer,expert,count", *rows]))
    return tmp_path


def slots_of(path: str, gpus: int) -> np.ndarray:
    return mo.read_placement(path, gpus=gpus, layers=(2, 3, 4)).slots_LGC


@pytest.mark.parametrize("engine", ENGINES)
def test_from_a_recording_to_a_file_and_on(folder: Path, engine: str, capsys: Any) -> None:
    path, after = f"a{ENGINES[engine][0]}", f"b{ENGINES[engine][0]}"
    common = ["loads.csv", "--slots", "3", "--engine", engine]
    assert main([*common, "--gpus", "4", "-o", path, "--plan", "plan.json"]) == 0
    capsys.readouterr()
    slots_LGC = slots_of(path, 4)
    assert slots_LGC.shape == (3, 4, 3)
    assert (slots_LGC >= 0).all()
    plan = mo.load_plan("plan.json")
    assert (plan.slots_LGC == slots_LGC).all()
    assert plan.split == "equal"
    # the same loads: nothing to do, and every expert keeps its slot
    assert main([*common, "--gpus", "4", "--current", path, "-o", after]) == 0
    assert "what moves: nothing" in capsys.readouterr().out
    assert (slots_of(after, 4) == slots_LGC).all()
    # one of four is gone for good, or dead: the file has ranks for three
    for loss in (["--gpus", "3", "--gone", "1"], ["--gpus", "4", "--lost", "1"]):
        argv = [*common, *loss, "--current", path, "--live-gpus", "4", "-o", after]
        assert main(argv[:-4] + argv[-2:] if engine == "ascend" else argv) == 0
        assert (slots_of(after, 3) >= 0).all()
    capsys.readouterr()
    # a fifth comes: it is empty at first
    argv = [*common, "--gpus", "5", "--current", path, "-o", after]
    assert main([*argv, *([] if engine == "ascend" else ["--live-gpus", "4"])]) == 0
    assert "GPU 4 is new and empty" in capsys.readouterr().err
    assert slots_of(after, 5).shape == (3, 5, 3)


def test_a_map_of_slots_for_two_numbers_of_gpus(folder: Path, capsys: Any) -> None:
    argv = ["loads.csv", "--engine", "vllm", "-o", "map.json", "--quiet"]
    assert main([*argv, "--gpus", "6", "--slots", "2"]) == 0
    asked = ["loads.csv", "--current", "map.json", "--quiet", "--slots"]
    assert main([*asked, "4", "--gpus", "4"]) == 2
    assert "of 12 slots per layer are not in the map: 3 or 4 GPUs fit; say how" in capsys.readouterr().err
    assert main([*asked, "5", "--gpus", "4", "--live-gpus", "6"]) == 2
    assert "map.json: current: is for 6 GPUs, the problem has 4" in capsys.readouterr().err
    assert main([*asked, "3", "--gpus", "6", "--live-gpus", "6"]) == 0
    assert main([*asked, "7", "--gpus", "5"]) == 2
    assert "map.json: gpus: of 12 slots per layer are not in the map; say how many" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_shares_that_a_map_of_slots_cannot_hold_are_told(split: str, folder: Path, capsys: Any) -> None:
    argv = [
        "loads.csv",
        "--engine",
        "vllm",
        "-o",
        "map.json",
        "--gpus",
        "4",
        "--slots",
        "3",
        "--split",
        split,
    ]
    assert main(argv) == 0
    told = "map.json holds slots and no shares" in capsys.readouterr().err
    assert told == (split == "fractional")


def test_a_map_of_another_model(folder: Path, capsys: Any) -> None:
    for name, rows, message in (
        ("unknown", [[0, 1, 2, 3, 4, 5, 6, 9]] * 3, "layer 2, slot 7 (GPU 3): expert 9 is unknown"),
        (
            "lacking",
            [[0, 1, 2, 3, 4, 5, 6, 7]] * 2 + [[0, 1, 2, 3, 4, 5, 6, 6]],
            "layer 4: no slot holds expert 7",
        ),
        ("layers", [[0, 1, 2, 3, 4, 5, 6, 7]] * 4, "layers: are 4 in the map, 3 are wanted"),
        ("ranks", [[0, 1, 2, 3, 4, 5, 6, 7, 0]] * 3, "gpus: of 9 slots per layer are not in the map"),
    ):
        Path(f"{name}.json").write_text(json.dumps(rows))
        argv = ["loads.csv", "--gpus", "4", "--slots", "2", "--current", f"{name}.json", "-o", "next.json"]
        assert main(argv) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith(f"moeless-solve: {name}.json: {message}")
        assert not Path("next.json").exists()


def test_a_broken_map_is_repaired(folder: Path, capsys: Any) -> None:
    Path("map.json").write_text(json.dumps([[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 99], [-1] * 8]))
    argv = ["loads.csv", "--gpus", "4", "--slots", "2", "--current", "map.json"]
    assert main(argv) == 2
    assert main([*argv, "--repair", "-o", "next.json", "--max-moves", "10"]) == 0
    assert "experts are left without a replica" in capsys.readouterr().err


def test_dense_layers_on_the_command_line(folder: Path, capsys: Any) -> None:
    np.save("loads.npy", LOAD)
    common = ["loads.npy", "--gpus", "4", "--slots", "3", "--quiet", "--engine", "sglang"]
    assert main([*common, "-o", "map.json"]) == 2
    assert "model-layers: is missing: 3 layers are numbered from 0" in capsys.readouterr().err
    assert main([*common, "-o", "map.json", "--model-layers", "2-4"]) == 0
    assert len(json.loads(Path("map.json").read_text())["physical_to_logical_map"]) == 5
    live = ["loads.npy", "--gpus", "4", "--slots", "3", "--quiet", "--current", "map.json"]
    assert main(live) == 2
    assert main([*live, "--model-layers", "2-4"]) == 0


def test_what_a_change_means() -> None:
    topology = mo.uniform(2, 2, slots=3)
    first = mo.plan(LOAD, topology)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=LOAD[:, ::-1]),
        topology=topology,
        current=first.placement,
        model=mo.model_preset("Mixtral-8x7B"),
    )
    plan = mo.solve(problem).plan
    assert plan is not None
    change = change_of(problem, plan)
    held = problem.current.held_LGE if problem.current is not None else None
    assert held is not None
    new = plan.placement.held_LGE & ~held
    assert change.moves == new.sum() == change.inside + change.between + change.cold
    assert change.bytes == change.moves * mo.model_preset("Mixtral-8x7B").expert_bytes
    assert change.missing == 0
    stay = mo.solve(problem, "stay").plan
    assert stay is not None
    assert change.before == pytest.approx(stay.certificate.value_L.sum())
    assert change.gain == pytest.approx(1 - plan.certificate.value_L.sum() / change.before)
    assert change.seconds == pytest.approx(mo.migration(problem, plan).seconds)
    text = str(change)
    assert f"what moves: {change.moves} replicas" in text
    assert "the transfers have paid after" in text.replace("\n  ", " ")
    lost = first.slots_LGC.copy()
    lost[:, 0] = -1
    partial = mo.Placement(slots_LGC=lost, experts=8, partial=True)
    hurt = problem.replace(current=partial, model=None)
    plan = mo.solve(hurt).plan
    assert plan is not None
    change = change_of(hurt, plan)
    assert change.missing == (partial.replicas_LE == 0).sum() > 0
    assert change.to_dict()["before"] is None
    assert "experts have no replica" in str(change)
    assert "how long: unknown" in str(change)


def test_the_change_is_in_the_json(folder: Path, capsys: Any) -> None:
    argv = ["loads.csv", "--gpus", "4", "--slots", "3", "--json", "--quiet"]
    assert main([*argv, "-o", "plan.json"]) == 0
    assert json.loads(capsys.readouterr().out)["change"] is None
    assert main([*argv, "--current", "plan.json", "--lost", "0"]) == 0
    change = json.loads(capsys.readouterr().out)["change"]
    assert change["moves"] == change["inside"] + change["between"] + change["cold"]
