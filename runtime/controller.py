"""Who decides, on every rank alike: watch the loads, plan, and tell the backend what to change.

The same code runs over a live model and over a simulation: it knows only the `Backend` protocol. Two modes:

*windowed*: every so many forward passes it looks at the loads of the passes since, plans, and applies the
plan if it moves anything; shares follow every batch by themselves in the backend. Planning can run in a
thread beside the passes; then a plan is applied a fixed number of passes after the loads that it is made for,
ready or not (it is waited for), so that all ranks switch at the same pass.

*per-layer* (the paper's): before every pass, a prediction of its loads is planned for and applied.

Every rank runs its own controller on the same loads and gets the same plan: solvers are deterministic,
nothing is sent.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeless_opt.api import plan as make_plan
from moeless_opt.problems.arrays import FloatArray, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.placement import Placement
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.topology import Topology
from moeless_opt.runtime.backend import Backend, LoadWindow

__all__ = ["Controller", "Decision", "Planner"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a controller decided.

    Parameters
    ----------
    at_pass : int
        Forward passes seen when the loads were taken.
    plan : Plan
        What was planned.
    applied : int or None
        The backend's number; None if nothing moved and nothing was applied.
    seconds : float
        Time of planning.
    """

    at_pass: int
    plan: Plan
    applied: int | None
    seconds: float


class Controller:
    """Watch, plan, apply.

    Parameters
    ----------
    backend : Backend
        What is controlled.
    planner : callable
        From loads [L, E] and live slots [L, G, C] to a `Plan`; usually a `Planner`.
    every : int
        Forward passes between two looks at the loads.
    decay : float
        What is left of older loads at each look, see `LoadWindow`; 0: the last window alone.
    lag : int
        Passes after which a plan is applied. 0: at once, planned in the caller's time. Above 0: planned in a
        thread, beside those passes.
    share : {"balanced", "equal"} or None
        Tell the backend how replicas share tokens, once, at the start; None leaves it to the plans.

    Raises
    ------
    ProblemError
        If `lag` is not below `every`.
    """

    def __init__(
        self,
        backend: Backend,
        planner: Callable[[FloatArray, SlotArray], Plan],
        *,
        every: int = 64,
        decay: float = 0.0,
        lag: int = 0,
        share: str | None = None,
    ) -> None:
        self.backend = backend
        self.planner = planner
        self.every = whole("every", every, low=1)
        self.lag = whole("lag", lag)
        if self.lag >= self.every:
            raise ProblemError("lag", f"is {lag}, must be below every = {every}")
        self.window = LoadWindow(number("decay", decay))
        self.passes = 0
        self.decisions: list[Decision] = []
        self._due = self.every
        self._pending: tuple[int, int, Future[tuple[Plan, float]]] | None = None
        self._worker = ThreadPoolExecutor(1, "moeless-planner") if self.lag else None
        if share is not None:
            backend.set_shares(share)

    def after(self, passes: int = 1) -> Decision | None:
        """Say, between passes and on every rank, that `passes` more have run.

        Returns
        -------
        Decision or None
            What was decided now, if anything.
        """
        self.passes += whole("passes", passes)
        decision = self._collect()
        if self.passes < self._due:
            return decision
        self._due = self.passes + self.every
        load_LE = self.window.update(self.backend.observe())
        if not load_LE.any():
            return decision
        slots_LGC = self.backend.slots_LGC
        if self._worker is None:
            return self._decide(self.passes, *self._plan(load_LE, slots_LGC))
        self._pending = (
            self.passes,
            self.passes + self.lag,
            self._worker.submit(self._plan, load_LE.copy(), slots_LGC.copy()),
        )
        return decision

    def before(self, predicted_LE: FloatArray) -> Decision:
        """Plan for the predicted loads of the next pass and apply it (per-layer mode)."""
        return self._decide(self.passes, *self._plan(predicted_LE, self.backend.slots_LGC))

    def close(self) -> None:
        """Wait for the thread and end it; a plan that is not applied yet is dropped."""
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown()

    def _collect(self) -> Decision | None:
        if self._pending is None or self.passes < self._pending[1]:
            return None
        at_pass, _, future = self._pending
        self._pending = None
        return self._decide(at_pass, *future.result())

    def _plan(self, load_LE: FloatArray, slots_LGC: SlotArray) -> tuple[Plan, float]:
        began = clock.perf_counter()
        plan = self.planner(load_LE, slots_LGC)
        return plan, clock.perf_counter() - began

    def _decide(self, at_pass: int, plan: Plan, seconds: float) -> Decision:
        """Apply a plan that changes anything; shares alone are the backend's own business."""
        changes = plan.moves.count > 0 or not _same(plan.slots_LGC, self.backend.slots_LGC)
        applied = self.backend.apply(plan) if changes else None
        decision = Decision(at_pass=at_pass, plan=plan, applied=applied, seconds=seconds)
        self.decisions.append(decision)
        return decision


def _same(a_LGC: SlotArray, b_LGC: SlotArray) -> bool:
    """Whether two placements hold the same experts on the same GPUs."""
    width = max(a_LGC.shape[2], b_LGC.shape[2])

    def ordered(slots_LGC: SlotArray) -> SlotArray:
        padded = np.full((*slots_LGC.shape[:2], width), -1, dtype=np.int32)
        padded[:, :, : slots_LGC.shape[2]] = slots_LGC
        return np.sort(padded, axis=2)

    return a_LGC.shape[:2] == b_LGC.shape[:2] and np.array_equal(ordered(a_LGC), ordered(b_LGC))
