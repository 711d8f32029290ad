"""Policies over traffic without a GPU: the same controller over a simulated machine.

``simulate(Scenario(...))`` compares policies; `drive.drive` gives a `SimulatedBackend` traffic of one's own.

May import `predict`, `control`, `pool`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeless_opt.runtime.simulate.policies import Policy, policy_names
    from moeless_opt.runtime.simulate.run import Simulation, simulate
    from moeless_opt.runtime.simulate.scenario import Scenario

__all__ = ["Policy", "Scenario", "Simulation", "policy_names", "simulate"]

_HOMES = {
    "Policy": "policies",
    "Scenario": "scenario",
    "Simulation": "run",
    "policy_names": "policies",
    "simulate": "run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
