"""Methods that read and write files still work for one release, and say what to call instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo


def test_methods_of_old_warn_and_work(tmp_path: Path) -> None:
    plan: Any = mo.plan([[4, 3, 2, 1]], mo.uniform(1, 2, slots=2))
    old: Any = mo.Plan
    with pytest.warns(DeprecationWarning, match=r"Plan\.save.*save_plan\(plan, path\)") as found:
        plan.save(tmp_path / "plan.json")
    assert found[0].filename == __file__
    assert mo.load_plan(tmp_path / "plan.json") == plan
    with pytest.warns(DeprecationWarning, match=r"Plan\.load.*load_plan\(path\)"):
        assert old.load(tmp_path / "plan.json") == plan
    np.save(tmp_path / "loads.npy", [[4.0, 3.0]])
    loads: Any = mo.Loads
    with pytest.warns(DeprecationWarning, match=r"Loads\.read.*read_loads\(path\)"):
        assert loads.read(tmp_path / "loads.npy") == mo.read_loads(tmp_path / "loads.npy")
