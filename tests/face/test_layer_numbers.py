"""A layer is called by the model's own number in everything public, whatever row it has in the loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.problems.io.documents import problem_from_json, problem_to_json

LAYERS = (3, 4, 60)
LOADS = mo.Loads(load_TLE=np.random.default_rng(0).integers(1, 50, (3, 6)), layers=LAYERS)
GPUS = mo.uniform(2, 2, slots=3)


def problem(**changes: Any) -> mo.Problem:
    return mo.Problem(loads=LOADS, topology=GPUS, **changes)


def test_pins_and_bans_name_the_models_layers() -> None:
    limits = mo.Limits(pinned=[(60, 5, 3), (-1, 0, 0)], forbidden=[(3, 1, 1)])
    asked = problem(limits=limits)
    assert np.argwhere(asked.pairs_LEG("pinned")).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 5, 3]]
    assert np.argwhere(asked.pairs_LEG("forbidden")).tolist() == [[0, 1, 1]]
    plan = mo.solve(asked).plan
    assert plan is not None
    mo.verify(asked, plan)
    assert 3 in plan.gpus_of(60, 5)
    assert 1 not in plan.gpus_of(3, 1)
    assert problem_from_json(json.loads(json.dumps(problem_to_json(asked)))) == asked
    for layer in (0, 5, 61):  # rows are no layers
        with pytest.raises(mo.ProblemError, match=rf"pinned\[0\]: names layer {layer}, .* layers 3-4, 60"):
            problem(limits=mo.Limits(pinned=[(layer, 0, 0)]))
        with pytest.raises(mo.ProblemError, match=rf"layer: is {layer}, the plan is for the layers 3-4, 60"):
            plan.gpus_of(layer, 0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"pinned": [(60, e, 2) for e in range(4)]}, r"pinned: 4 experts are pinned to GPU 2 in layer 60"),
        ({"forbidden": [(4, 1, g) for g in range(4)]}, r"forbidden: in layer 4, expert 1 may be on 0 GPUs"),
        ({"pinned": [(-1, 2, 2)], "forbidden": [(60, 2, 2)]}, r"forbidden there, layer 60"),
    ],
)
def test_what_cannot_be_names_the_layer(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(mo.InfeasibleError, match=message):
        problem(limits=mo.Limits(**limits)).check_feasible()


def said(asked: mo.Problem, plan: mo.Plan, start: str) -> bool:
    return any(text.startswith(start) for text in mo.violations(asked, plan))


def test_the_verifier_names_the_layer() -> None:
    asked = problem()
    plan = mo.solve(asked).plan
    assert plan is not None
    share = plan.share_LGC.copy()
    share[2] *= 0.5
    assert said(asked, plan.replace(share_LGC=share), "layer 60: the shares")
    strict = asked.replace(limits=mo.Limits(forbidden=[(60, 0, plan.gpus_of(60, 0)[0])]))
    assert said(strict, plan, "layer 60: expert 0 is forbidden")
    slots = plan.slots_LGC.copy()
    slots[2, 0, :2] = 1
    assert said(asked, plan.replace(slots_LGC=slots), "layer 60 GPU 0: expert 1")


def test_a_migration_and_its_document_name_the_layer(tmp_path: Path) -> None:
    first = mo.solve(problem()).plan
    assert first is not None
    moved = problem(current=first.placement).replace(
        loads=LOADS.replace(load_TLE=LOADS.load_TLE[:, :, ::-1]),
        objective=mo.Objective(balance_tolerance=0.0),
    )
    plan = mo.solve(moved).plan
    assert plan is not None
    schedule = mo.migration(moved, plan)
    assert schedule.transfers
    by_layer = dict(zip(LAYERS, plan.moves.count_L.tolist(), strict=True))
    assert {t.layer for t in schedule.transfers} == {layer for layer, count in by_layer.items() if count}
    mo.save_problem(moved, tmp_path / "problem.json")
    files = ["--schedule", str(tmp_path / "schedule.json"), "-o", str(tmp_path / "plan.json")]
    assert main([str(tmp_path / "problem.json"), *files, "--quiet"]) == 0
    steps = json.loads((tmp_path / "schedule.json").read_text())["steps"]
    assert {t[0] for step in steps for t in step["transfers"]} <= set(LAYERS)


def test_the_command_line_names_the_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mo.save_problem(problem(), tmp_path / "problem.json")
    assert main([str(tmp_path / "problem.json"), "--bound", "--json"]) == 0
    assert [row["layer"] for row in json.loads(capsys.readouterr().out)["layers"]] == list(LAYERS)
    assert main([str(tmp_path / "problem.json"), "--export", str(tmp_path / "a.lp"), "--layer", "0"]) == 2
    assert "must be one of the problem's: 3 to 60" in capsys.readouterr().err
