"""The controller's modes and elastic experts over live models, on real processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

World = Callable[..., list[Any]]


def test_layers_move_one_by_one_and_replicas_scale_to_zero(run_world: World) -> None:
    """The assertions stand in the script; here what all ranks must have alike."""
    results = run_world("worker_lanes.py", 4, "lanes")
    assert all(other == results[0] for other in results[1:])
    assert results[0]["elastic"]["cold"] > 0
    assert results[0]["elastic"]["reuses"] > 2
    assert results[0]["host"] == {"cold": 8, "from_home": 8}


def test_every_pass_plans_its_own_layers(run_world: World) -> None:
    """Predicted, planned and placed alike on all ranks, while the outputs stay those of the stock model."""
    results = run_world("worker_lanes.py", 4, "per-layer")
    assert all(other == results[0] for other in results[1:])
    for run in results[0].values():
        assert run["cold"] > 0
        assert min(run["curve"]) > 0
        assert {"done"} <= {fate[2] for fate in run["fate"]} <= {"done", "superseded"}


def test_the_modes_over_transformers_models(run_world: World) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    results = run_world("worker_lanes_transformers.py", 2)
    assert set(results[0]) > {"mixtral", "deepseek", "gptoss"}
    for name, run in results[0].items():
        # In fp64; the eager experts batch otherwise than we do, so the last bits may differ.
        assert max(run.pop("worst"), results[1][name].pop("worst")) < 1e-12, name
        assert run == results[1][name], name
        assert run["foreseen"], name
    assert any(run["cold"] for run in results[0].values())
