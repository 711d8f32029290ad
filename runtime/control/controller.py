"""Who decides, on every rank alike: watch the loads, plan, and tell the backend what to change.

The same code runs over a live model and over a simulation: it knows only the protocols of `backend`. Two
modes, which may be mixed:

*windowed*: every so many forward passes it looks at the loads of the passes since, plans, and applies the
plan if it moves anything; shares follow every batch by themselves in the backend. Planning can run in a
thread beside the passes; then a plan is applied a fixed number of passes after the loads that it is made for,
ready or not (it is waited for), so that all ranks switch at the same pass.

*per-layer* (the paper's): at layer l, a prediction of layer l + d is planned for and applied to that layer
alone (`before_layer`). Over a live model nothing of it is on the path of the forward pass: a thread reads the
prediction, sums it over the ranks on a process group of its own, plans, and offers the slots; the ranks bring
them into force in front of the first batch of the layer by which all have them and the weights that they
need, in this pass or a later one. `before` does it for all layers of a pass at once, in the caller's time:
what a simulation needs.

Every rank runs its own controller on the same loads and gets the same plan: solvers are deterministic, and no
plan is ever sent. Every plan has passed a verifier before it is applied.
"""

from __future__ import annotations

import queue
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeless_opt.api import plan as make_plan
from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.verify import check_slots
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.control.backend import Backend, LayerBackend, LoadWindow

__all__ = ["Controller", "Counted", "Decision", "Foreseen", "LayerDecision", "PlanLayer", "Planner"]

#: Decisions of the per-layer mode that are remembered.
REMEMBERED = 4096


class Foreseen(Protocol):
    """A prediction that may still be under way, e.g. `predictor_gates.Pending`."""

    def load_E(self) -> FloatArray:
        """Wait if need be; the loads of a layer, [E]."""
        ...


@runtime_checkable
class PlanLayer(Protocol):
    """A planner for single layers, e.g. `layer_planner.LayerPlanner` or `Planner`."""

    def plan_layer(self, layer: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """Slots [G, C] of one layer from its loads [E] and what each GPU holds [G, C]."""
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

    def plan_layer(self, layer: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """Plan one layer as a problem of its own."""
        return np.asarray(self(load_E[None], slots_GC[None]).slots_LGC[0])


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecision:
    """What a controller decided for one layer.

    Parameters
    ----------
    layer : int
        Which.
    load_E : array, shape [E]
        What was foreseen, over all ranks.
    slots_GC : array of int32, shape [G, C]
        What was planned.
    applied : int or None
        The backend's number; None where the slots stay as they are.
    seconds : float
        Time of planning.
    error : str
        Why there is no plan; the layer then stays as it is.
    """

    layer: int
    load_E: FloatArray
    slots_GC: SlotArray
    applied: int | None
    seconds: float
    error: str = ""


class Controller:
    """Watch, plan, apply.

    Parameters
    ----------
    backend : Backend
        What is controlled.
    planner : callable, or PlanLayer
        From loads [L, E] and live slots [L, G, C] to a `Plan` (windowed mode), or with ``plan_layer``
        (per-layer mode); `Planner` and `layer_planner.LayerPlanner` are both.
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
        planner: Callable[[FloatArray, SlotArray], Plan] | PlanLayer,
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
        #: The newest decisions of the per-layer mode.
        self.layer_decisions: deque[LayerDecision] = deque(maxlen=REMEMBERED)
        self._foreseer: _Foreseer | None = None
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

    def before(self, predicted_LE: FloatArray) -> Decision | list[LayerDecision]:
        """Plan for the predicted loads of the next pass and apply it, all layers at once.

        Returns
        -------
        Decision, or list of LayerDecision
            The latter where the planner knows only single layers.
        """
        if callable(self.planner):
            return self._decide(self.passes, *self._plan(predicted_LE, self.backend.slots_LGC))
        slots_LGC = self.backend.slots_LGC
        found = [self._of_layer(x, load_E, slots_LGC[x]) for x, load_E in enumerate(predicted_LE)]
        wanted_LGC = _stacked([decision.slots_GC for decision in found])
        if not _same(wanted_LGC, slots_LGC):
            number = self.backend.apply(wanted_LGC)
            found = [
                decision
                if _same(decision.slots_GC[None], slots_LGC[x][None])
                else replace(decision, applied=number)
                for x, decision in enumerate(found)
            ]
        self.layer_decisions.extend(found)
        return found

    def before_layer(
        self, layer: int, predicted: FloatArray | Foreseen, *, summed: bool = False
    ) -> LayerDecision | None:
        """Plan one layer for a prediction of its loads, and apply it to that layer.

        All ranks call it at the same point of the same pass. Fits `predictor_gates.Foresight` as ``begun``.

        Parameters
        ----------
        layer : int
            Which.
        predicted : array, shape [E], or Foreseen
            Loads over all ranks: planned at once, in the caller's time. Or a prediction under way of this
            rank's own tokens: read, summed over the ranks, planned and offered by a thread, over a backend
            that can move single layers; the call returns at once.
        summed : bool
            Whether a prediction is of all ranks' tokens already.

        Returns
        -------
        LayerDecision or None
            None where a thread decides (`layer_decisions` has it later), and where the layer is left alone
            because its last plan is still being made.
        """
        if isinstance(predicted, np.ndarray):
            return self._at_once(layer, predicted)
        if not isinstance(self.backend, LayerBackend):
            return self._at_once(layer, predicted.load_E())
        ticket = self.backend.open_layer(layer)
        if ticket is not None:
            group = getattr(self.backend, "group", None)
            if self._foreseer is not None and self._foreseer.group is not group:  # a rank was lost
                self._foreseer.give_up()
                self._foreseer = None
            if self._foreseer is None:
                self._foreseer = _Foreseer(self, self.backend)
            self._foreseer.take(ticket, layer, predicted, summed)
        return None

    def _at_once(self, layer: int, load_E: FloatArray) -> LayerDecision:
        slots_LGC = self.backend.slots_LGC
        decision = self._of_layer(layer, load_E, slots_LGC[layer])
        if not _same(decision.slots_GC[None], slots_LGC[layer][None]):
            if isinstance(self.backend, LayerBackend):
                number = self.backend.apply_layer(layer, decision.slots_GC)
            else:
                rows = [decision.slots_GC if x == layer else s for x, s in enumerate(slots_LGC)]
                number = self.backend.apply(_stacked(rows))
            decision = replace(decision, applied=number)
        self.layer_decisions.append(decision)
        return decision

    def _of_layer(self, layer: int, load_E: FloatArray, slots_GC: SlotArray) -> LayerDecision:
        """Plan and verify; nothing is planned for no tokens."""
        began = clock.perf_counter()
        planner = self.planner
        if not isinstance(planner, PlanLayer):
            raise ProblemError("planner", "has no plan_layer, which the per-layer mode needs")
        load_E = np.ascontiguousarray(load_E, dtype=np.float64)
        wanted_GC = planner.plan_layer(layer, load_E, slots_GC) if load_E.any() else slots_GC
        check_slots(wanted_GC, load_E.size, self._capacity_G(layer, len(slots_GC), load_E.size))
        seconds = clock.perf_counter() - began
        return LayerDecision(layer=layer, load_E=load_E, slots_GC=wanted_GC, applied=None, seconds=seconds)

    def _capacity_G(self, layer: int, gpus: int, experts: int) -> IntArray:
        """Slots that the planner may use, as far as it tells."""
        capacity_LG = getattr(self.planner, "capacity_LG", None)
        if capacity_LG is not None:
            return np.asarray(capacity_LG[layer])
        slots_G = getattr(getattr(self.planner, "topology", None), "slots_G", None)
        return np.full(gpus, experts) if slots_G is None else np.minimum(slots_G, experts)

    def drain(self) -> None:
        """Wait until the thread has planned what it was given."""
        if self._foreseer is not None:
            self._foreseer.drain()

    def close(self) -> None:
        """Wait for the threads and end them; a windowed plan that is not applied yet is dropped."""
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown()
        if self._foreseer is not None:
            self._foreseer.close()
            self._foreseer = None

    def _collect(self) -> Decision | None:
        if self._pending is None or self.passes < self._pending[1]:
            return None
        at_pass, _, future = self._pending
        self._pending = None
        return self._decide(at_pass, *future.result())

    def _plan(self, load_LE: FloatArray, slots_LGC: SlotArray) -> tuple[Plan, float]:
        began = clock.perf_counter()
        if not callable(self.planner):
            raise ProblemError("planner", "plans single layers only; the windowed mode needs a callable")
        plan = self.planner(load_LE, slots_LGC)
        return plan, clock.perf_counter() - began

    def _decide(self, at_pass: int, plan: Plan, seconds: float) -> Decision:
        """Apply a plan that changes anything; shares alone are the backend's own business."""
        changes = plan.moves.count > 0 or not _same(plan.slots_LGC, self.backend.slots_LGC)
        applied = self.backend.apply(plan) if changes else None
        decision = Decision(at_pass=at_pass, plan=plan, applied=applied, seconds=seconds)
        self.decisions.append(decision)
        return decision


class Counted:
    """Loads that are known already, in the place of a prediction."""

    def __init__(self, load_E: FloatArray) -> None:
        self._load_E = load_E

    def load_E(self) -> FloatArray:
        """The loads."""
        return self._load_E


class _Foreseer:
    """The thread of the per-layer mode: reads predictions, sums them over the ranks, plans, offers.

    The threads of all ranks take the same tickets in the same order, because tickets are opened so.
    """

    def __init__(self, controller: Controller, backend: LayerBackend) -> None:
        self._controller, self._backend = controller, backend
        self.group = getattr(backend, "group", None)
        self._side = backend.side_group()
        self._queue: queue.Queue[tuple[Any, int, Foreseen, bool] | None] = queue.Queue()
        # Not an executor's: the interpreter must not wait at its end for ranks that are gone.
        self._thread = threading.Thread(target=self._run, name="moeless-foresight", daemon=True)
        self._thread.start()

    def take(self, ticket: Any, layer: int, predicted: Foreseen, summed: bool) -> None:
        """Return at once; the rest is the thread's."""
        self._queue.put((ticket, layer, predicted, summed))

    def drain(self) -> None:
        self._queue.join()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._side.close()

    def give_up(self) -> None:
        """End without waiting: the thread may be waiting for a rank that is gone."""
        self._queue.put(None)
        self._side.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._foresee(*item)
            self._queue.task_done()
        self._queue.task_done()

    def _foresee(self, ticket: Any, layer: int, predicted: Foreseen, summed: bool) -> None:
        base_GC, load_E = ticket.base_GC, np.zeros(0)
        try:
            load_E = predicted.load_E()
            if not summed:
                load_E = self._side.sum(load_E)
            decision = self._controller._of_layer(layer, load_E, base_GC)
        except Exception as error:  # whatever it was: the other ranks wait for word of this ticket
            text = f"{type(error).__name__}: {error}"
            decision = LayerDecision(
                layer=layer, load_E=load_E, slots_GC=base_GC, applied=None, seconds=0.0, error=text
            )
        if not decision.error and not _same(decision.slots_GC[None], base_GC[None]):
            decision = replace(decision, applied=ticket.number)
        # Unchanged slots are offered as they stand: another order of the same experts would be a switch.
        slots_GC = base_GC if decision.applied is None else decision.slots_GC
        self._controller.layer_decisions.append(decision)
        self._backend.offer_layer(ticket, slots_GC, decision.error)


def _stacked(rows: Sequence[SlotArray]) -> SlotArray:
    width = max(slots_GC.shape[1] for slots_GC in rows)
    out = np.full((len(rows), rows[0].shape[0], width), -1, dtype=np.int32)
    for layer, slots_GC in enumerate(rows):
        out[layer, :, : slots_GC.shape[1]] = slots_GC
    return out


def _same(a_LGC: SlotArray, b_LGC: SlotArray) -> bool:
    """Whether two placements hold the same experts on the same GPUs."""
    width = max(a_LGC.shape[2], b_LGC.shape[2])

    def ordered(slots_LGC: SlotArray) -> SlotArray:
        padded = np.full((*slots_LGC.shape[:2], width), -1, dtype=np.int32)
        padded[:, :, : slots_LGC.shape[2]] = slots_LGC
        return np.sort(padded, axis=2)

    return a_LGC.shape[:2] == b_LGC.shape[:2] and np.array_equal(ordered(a_LGC), ordered(b_LGC))
