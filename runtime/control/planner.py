"""How a controller's plans are made: what it asks of a planner, and the one over all solvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeless_opt.api import plan as make_plan
from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import Placement, Topology

__all__ = ["PlanLayer", "PlanWindow", "Planner"]


@runtime_checkable
class PlanLayer(Protocol):
    """A planner for single layers, e.g. `layer_planner.LayerPlanner` or `Planner`."""

    def plan_layer(self, index: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """Slots [G, C] of one layer, by its place on axis L, from its loads [E] and what GPUs hold [G, C]."""
        ...


@runtime_checkable
class PlanWindow(Protocol):
    """A planner that looks at how many passes loads are of, e.g. `worth_moving.WorthMoving`."""

    def plan_window(self, load_LE: FloatArray, live_LGC: SlotArray, passes: float) -> Plan:
        """Plan from the loads of a window of so many passes and the live placement."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """How plans are made.

    Parameters
    ----------
    topology : Topology
        GPUs and their slots or memory.
    solver : str
        Name in the registry.
    split : {"fractional", "equal"}
        As in `moeless_opt.plan`.
    options : mapping
        Further arguments of `moeless_opt.plan` (``model``, ``limits``, ``sizing``, ``objective``, ...).
    """

    topology: Topology
    solver: str = "auto"
    split: str = "fractional"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        """Plan from the live placement."""
        current = Placement(slots_LGC=live_LGC, experts=load_LE.shape[1])
        return make_plan(
            load_LE, self.topology, current=current, solver=self.solver, split=self.split, **self.options
        )

    def at_speeds(self, speed_G: FloatArray) -> Planner:
        """The same for GPUs of these relative speeds, shape [G]."""
        return replace(self, topology=self.topology.replace(speed_G=speed_G))

    def plan_layer(self, index: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """Plan one layer as a problem of its own."""
        return np.asarray(self(load_E[None], slots_GC[None]).slots_LGC[0])
