"""Fixtures of the runtime's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_world() -> Callable[..., list[Any]]:
    """`worlds.run_world`: real processes for a script beside this file."""
    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("worlds", Path(__file__).with_name("worlds.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner: Callable[..., list[Any]] = module.run_world
    return runner


@pytest.fixture(scope="session")
def simulated_twin() -> Any:
    """The module beside this file."""
    spec = importlib.util.spec_from_file_location(
        "simulated_twin", Path(__file__).with_name("simulated_twin.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulated_twin"] = module  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module
