"""Expert replication, placement and migration for mixture-of-experts models.

``plan(loads, topology)`` is the short form; ``solve(problem)`` the full one. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeless_opt import _deprecated
from moeless_opt.api import compare, export_model, plan, recommend_redundancy, solve, warm_up
from moeless_opt.problems.errors import (
    FormatError,
    InfeasibleError,
    InvalidPlanError,
    MoelessError,
    ProblemError,
    SolverUnavailableError,
    UnsupportedFeatureError,
)
from moeless_opt.problems.instances import instance_names, load_instance
from moeless_opt.problems.io import (
    load_plan,
    load_problem,
    load_time_models,
    save_plan,
    save_problem,
    save_time_models,
)
from moeless_opt.problems.io.recordings import read_loads, read_sources
from moeless_opt.problems.plan import (
    Certificate,
    EngineMeasures,
    Payback,
    Plan,
    Progress,
    Result,
    Status,
    Survival,
    engine_measures,
)
from moeless_opt.problems.plan.verify import verify, violations
from moeless_opt.problems.spec import (
    MODEL_PRESETS,
    TOPOLOGY_PRESETS,
    Groups,
    Known,
    Limits,
    Links,
    Loads,
    ModelSpec,
    Objective,
    Placement,
    Priority,
    Problem,
    Risk,
    Sizing,
    SizingPolicy,
    Split,
    TimeModel,
    Topology,
    model_preset,
    uniform,
)
from moeless_opt.solvers.core import get_solver, list_solvers, solver_names
from moeless_opt.solvers.shares import ShareTable, share_table

if TYPE_CHECKING:
    from moeless_opt.adapters import export, read_placement
    from moeless_opt.conflicts import Contradiction
    from moeless_opt.elastic import Repair, Resize, drain, expand, repair, survival
    from moeless_opt.explaining import Explanation, explain
    from moeless_opt.fronts import ParetoFront, migration, pareto
    from moeless_opt.link_view import Traffic, traffic
    from moeless_opt.speeds import measured_speeds

    __version__: str

__all__ = [
    "MODEL_PRESETS",
    "TOPOLOGY_PRESETS",
    "Certificate",
    "Contradiction",
    "EngineMeasures",
    "Explanation",
    "FormatError",
    "Groups",
    "InfeasibleError",
    "InvalidPlanError",
    "Known",
    "Limits",
    "Links",
    "Loads",
    "ModelSpec",
    "MoelessError",
    "Objective",
    "ParetoFront",
    "Payback",
    "Placement",
    "Plan",
    "Priority",
    "Problem",
    "ProblemError",
    "Progress",
    "Repair",
    "Resize",
    "Result",
    "Risk",
    "ShareTable",
    "Sizing",
    "SizingPolicy",
    "SolverUnavailableError",
    "Split",
    "Status",
    "Survival",
    "TimeModel",
    "Topology",
    "Traffic",
    "UnsupportedFeatureError",
    "__version__",
    "compare",
    "drain",
    "engine_measures",
    "expand",
    "explain",
    "export",
    "export_model",
    "get_solver",
    "instance_names",
    "list_solvers",
    "load_instance",
    "load_plan",
    "load_problem",
    "load_time_models",
    "measured_speeds",
    "migration",
    "model_preset",
    "pareto",
    "plan",
    "read_loads",
    "read_placement",
    "read_sources",
    "recommend_redundancy",
    "repair",
    "save_plan",
    "save_problem",
    "save_time_models",
    "share_table",
    "solve",
    "solver_names",
    "survival",
    "traffic",
    "uniform",
    "verify",
    "violations",
    "warm_up",
]

_deprecated.attach()

_LATE = {
    "Contradiction": "moeless_opt.conflicts",
    "Explanation": "moeless_opt.explaining",
    "ParetoFront": "moeless_opt.fronts",
    "Repair": "moeless_opt.elastic",
    "Resize": "moeless_opt.elastic",
    "drain": "moeless_opt.elastic",
    "expand": "moeless_opt.elastic",
    "explain": "moeless_opt.explaining",
    "export": "moeless_opt.adapters",
    "measured_speeds": "moeless_opt.speeds",
    "migration": "moeless_opt.fronts",
    "pareto": "moeless_opt.fronts",
    "read_placement": "moeless_opt.adapters",
    "Traffic": "moeless_opt.link_view",
    "traffic": "moeless_opt.link_view",
    "repair": "moeless_opt.elastic",
    "survival": "moeless_opt.elastic",
}


def __getattr__(name: str) -> Any:
    """Import what few need, and what takes long to import, only when asked for."""
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("moeless-opt")
        except PackageNotFoundError:  # the source tree, not installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
