"""Files of time models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.spec.time_model import TimeModel


def test_time_models_come_back_as_they_were(tmp_path: Path) -> None:
    curve = TimeModel(
        curve_tokens=[1, 64],
        curve_activated=[1, 2, 4],
        curve_time=[[1e-5, 2e-5, 4e-5], [3e-5] * 3],
        unit="s",
        name="M",
    )
    linear = TimeModel(token_cost=2.0, launch=1.0)
    path = tmp_path / "models.json"
    mo.save_time_models(path, {"Mixtral-8x7B, a GPU": curve, "line": linear})
    found = mo.load_time_models(path)
    assert list(found) == ["Mixtral-8x7B, a GPU", "line"]
    assert np.array_equal(found["Mixtral-8x7B, a GPU"].curve_time, curve.curve_time)
    assert (found["line"].token_cost, found["line"].launch) == (2.0, 1.0)
    assert found["Mixtral-8x7B, a GPU"].time(1, 2, 1.0) == 2e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "moeless-plan"}, "format: is 'moeless-plan', must be 'moeless-time-models'"),
        ({"version": 2}, "version: is 2, this release reads version 1"),
        ({"models": []}, "models: must be an object, got a list"),
        ({"models": {"a": {"kind": "cubic"}}}, "kind: is 'cubic', must be 'linear' or 'curve'"),
        ({"models": {"a": {"launch": -1}}}, "launch: is -1"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_what_is_no_file_of_time_models_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"format": "moeless-time-models", "version": 1, "models": {}} | change))
    with pytest.raises((FormatError, ProblemError)) as caught:
        mo.load_time_models(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
