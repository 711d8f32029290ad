"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# Triton's kernels run on the CPU in tests; it looks when it is first imported, by whomever.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Where checks gate a change the same examples run every time; elsewhere new ones are explored.
settings.register_profile("ci", derandomize=True, deadline=None)
# For benchmarks/mutants.py: that a test fails is enough, its smallest example is not looked for.
settings.register_profile(
    "mutants", derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate]
)
# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the measured recordings, which are not part of the project; skips where it is absent."""
    root = Path(os.environ.get("MOELESS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "deepseek_v3_counts.npz").is_file():
        pytest.skip(f"measured recordings not found at {root} (set MOELESS_DATA)")
    return root


@pytest.fixture(scope="session")
def engine_cases() -> Path:
    """Folder of small files in the engines' own formats, which are not part of the project; skips without."""
    data = Path(os.environ.get("MOELESS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    root = data.parent / "cases" / "engines"
    if not (root / "eplb_triple.json").is_file():
        pytest.skip(f"engines' files not found at {root} (set MOELESS_DATA)")
    return root
