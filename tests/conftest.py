"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Where checks gate a change the same examples run every time; elsewhere new ones are explored.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the measured recordings, which are not part of the project; skips where it is absent."""
    root = Path(os.environ.get("MOELESS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "deepseek_v3_counts.npz").is_file():
        pytest.skip(f"measured recordings not found at {root} (set MOELESS_DATA)")
    return root
