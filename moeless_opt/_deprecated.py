"""What goes with the next release: methods that read and write files, now functions of the face."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from moeless_opt.problems.io import load_plan, save_plan
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import Loads

__all__ = ["attach"]


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} goes with the next release: use {new}", DeprecationWarning, stacklevel=3)


def _save(plan: Plan, path: str | PathLike[str]) -> None:
    """Write the plan; `save_plan` does."""
    _warn("Plan.save(path)", "moeless_opt.save_plan(plan, path)")
    save_plan(plan, path)


def _load(path: str | PathLike[str]) -> Plan:
    """Read a plan; `load_plan` does."""
    _warn("Plan.load(path)", "moeless_opt.load_plan(path)")
    return load_plan(path)


def _read(path: str | PathLike[str], **options: Any) -> Loads:
    """Read a recording; `read_loads` does."""
    _warn("Loads.read(path)", "moeless_opt.read_loads(path)")
    return read_loads(path, **options)


def attach() -> None:
    """Give `Plan` and `Loads` the methods that they had."""
    for kind, name, method in (
        (Plan, "save", _save),
        (Plan, "load", staticmethod(_load)),
        (Loads, "read", staticmethod(_read)),
    ):
        setattr(kind, name, method)
