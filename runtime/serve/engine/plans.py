"""Plans in and out of an engine: what is served, judged for its traffic; what others send, verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io import json_bytes, load_plan
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec import Loads, Placement, Problem, Topology
from moeless_opt.solvers.core import Clock
from moeless_opt.solvers.core.finish import Built, check_layers, finish
from moeless_opt.solvers.shares import best_shares

__all__ = ["given_plan", "judged_plan"]


def _problem(
    slots_LGC: SlotArray, load_LE: IntArray, facts: Mapping[str, Any], live_LGC: SlotArray | None
) -> Problem:
    """Today's loads on ranks that have as many slots as the placement uses."""
    layers, ranks, slots = slots_LGC.shape
    load_LE = load_LE if load_LE.any() else np.ones((layers, facts["experts"]), dtype=np.int64)
    return Problem(
        loads=Loads(load_TLE=load_LE.astype(np.float64), layers=tuple(facts["layers"])),
        topology=Topology.uniform(1, ranks, slots=slots),
        expert_bytes_L=np.asarray(facts["expert_bytes"], dtype=np.int64),
        current=None if live_LGC is None else Placement(slots_LGC=live_LGC, experts=facts["experts"]),
        name="served",
    )


def _judged(problem: Problem, slots_LGC: SlotArray, solver: str) -> Plan:
    check_layers(problem, slots_LGC)
    began, share_LGC = Clock.begin(), best_shares(problem, slots_LGC)
    plan = finish(problem, Built(slots_LGC=slots_LGC, share_LGC=share_LGC), solver=solver, began=began)
    verify(problem, plan)
    return plan


def judged_plan(slots_LGC: SlotArray, load_LE: IntArray, facts: Mapping[str, Any]) -> Plan:
    """The placement in force as a plan for the loads of the last window."""
    return _judged(_problem(slots_LGC, load_LE, facts, None), slots_LGC, "served")


def given_plan(
    plan: Plan | Mapping[str, Any], live_LGC: SlotArray, load_LE: IntArray, facts: Mapping[str, Any]
) -> Plan:
    """A plan from elsewhere, judged for what is served here, and verified.

    Parameters
    ----------
    plan : Plan or mapping
        The JSON form as `moeless-solve` writes it; its ``slots`` alone are enough.
    live_LGC, load_LE, facts
        What is served.

    Raises
    ------
    ProblemError, InvalidPlanError
        It is no plan for this model on these ranks.
    """
    if isinstance(plan, Mapping):
        if "slots" not in plan:
            raise ProblemError("slots", "are missing: a plan has [layers][ranks][slots] of experts")
        if "format" in plan:
            slots: Any = load_plan("plan", content=json_bytes(dict(plan))).slots_LGC
        else:
            slots = Placement.of(plan["slots"], facts["experts"], "").slots_LGC
    else:
        slots = plan.slots_LGC
    slots_LGC = np.asarray(slots, dtype=np.int32)
    want = (len(facts["layers"]), live_LGC.shape[1])
    if slots_LGC.shape[:2] != want:
        have = slots_LGC.shape[:2]
        raise ProblemError(
            "slots", f"are of {have[0]} layers and {have[1]} ranks; there are {want[0]} and {want[1]}"
        )
    width = max(slots_LGC.shape[2], live_LGC.shape[2])
    fits = np.full((*want, width), -1, dtype=np.int32)
    fits[:, :, : slots_LGC.shape[2]] = slots_LGC
    judged = _judged(_problem(fits, load_LE, facts, live_LGC), fits, "given")
    return replace(judged, made_for="")
