"""The live side: plans applied to running models, and a simulator of it.

``attach(model)`` takes over a model's experts; a `Controller` with a `Planner` keeps them balanced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeless_opt.runtime.control.controller import Controller
    from moeless_opt.runtime.control.planner import Planner
    from moeless_opt.runtime.engines.attach import attach

__all__ = ["Controller", "Planner", "attach"]


def __getattr__(name: str) -> Any:
    """Import the parts when they are asked for: `attach` needs torch, the package does not."""
    homes = {"attach": "engines.attach", "Controller": "control.controller", "Planner": "control.planner"}
    if name in homes:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
