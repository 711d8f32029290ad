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

import time as clock
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Plan, check_slots
from moeless_opt.runtime.control.backend import Backend, LayerBackend, LoadWindow, SpeedBackend
from moeless_opt.runtime.control.decision import Decision, LayerDecision, same_replicas, stacked
from moeless_opt.runtime.control.foreseer import Foreseen, LayerForeseer
from moeless_opt.runtime.control.planner import PlanLayer, PlanWindow
from moeless_opt.runtime.control.speed_watch import SpeedWatch

__all__ = ["Controller"]

#: Decisions of the per-layer mode that are remembered.
REMEMBERED = 4096


class Controller:
    """Watch, plan, apply.

    Parameters
    ----------
    backend : Backend
        What is controlled.
    planner : callable, or PlanLayer, or PlanWindow
        From loads [L, E] and live slots [L, G, C] to a `Plan` (windowed mode; ``plan_window`` is told of how
        many passes they are), or with ``plan_layer``
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
    first : int, optional
        Forward passes before the first look, by default `every`: a placement made without loads is soon worth
        a plan.
    speeds : SpeedWatch, optional
        Follow how fast the GPUs really are (windowed mode): once a change has lasted, plans are made for the
        new speeds, and balanced shares follow them, too. Without it all are as the planner's topology says.

    Raises
    ------
    ProblemError
        If `lag` is not below `every`, or the planner cannot be told of speeds that are to be followed.
    """

    def __init__(
        self,
        backend: Backend,
        planner: Callable[[FloatArray, SlotArray], Plan] | PlanLayer | PlanWindow,
        *,
        every: int = 64,
        decay: float = 0.0,
        lag: int = 0,
        share: str | None = None,
        first: int | None = None,
        speeds: SpeedWatch | None = None,
    ) -> None:
        if speeds is not None and not callable(getattr(planner, "at_speeds", None)):
            raise ProblemError("planner", "has no at_speeds, which following the GPUs' speeds needs")
        self.speeds = speeds
        self.backend = backend
        self.planner = planner
        if speeds is not None:
            self._begin_with(speeds)
        self.every = whole("every", every, low=1)
        self.lag = whole("lag", lag)
        if self.lag >= self.every:
            raise ProblemError("lag", f"is {lag}, must be below every = {every}")
        self.window = LoadWindow(number("decay", decay))
        self.passes = 0
        self.decisions: list[Decision] = []
        #: The newest decisions of the per-layer mode.
        self.layer_decisions: deque[LayerDecision] = deque(maxlen=REMEMBERED)
        self._foreseer: LayerForeseer | None = None
        self._due = self.every if first is None else whole("first", first, low=1)
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
        seen = self.backend.observe()
        load_LE = self.window.update(seen)
        if self.speeds is not None and self.speeds.see(seen):
            self._follow(self.speeds)
        if not load_LE.any():
            return decision
        slots_LGC, count = self.backend.slots_LGC, self.window.passes
        if self._worker is None:
            return self._decide(self.passes, *self._plan(load_LE, slots_LGC, count))
        self._pending = (
            self.passes,
            self.passes + self.lag,
            self._worker.submit(self._plan, load_LE.copy(), slots_LGC.copy(), count),
        )
        return decision

    def _begin_with(self, speeds: SpeedWatch) -> None:
        """A watch that knows these ranks already is followed at once; a new one believes the topology."""
        told_G = getattr(getattr(self.planner, "topology", None), "speed_G", None)
        if speeds.speed_G is None:
            if told_G is not None:
                speeds.believe(np.asarray(told_G))
        elif told_G is None or len(told_G) == len(speeds.speed_G):
            self._follow(speeds)

    def _follow(self, speeds: SpeedWatch) -> None:
        """Plan, and share, for the GPUs as they are now."""
        assert speeds.speed_G is not None
        planner: Any = self.planner
        self.planner = planner.at_speeds(speeds.speed_G)
        if isinstance(self.backend, SpeedBackend):
            self.backend.set_speeds(speeds.speed_G)

    def before(self, predicted_LE: FloatArray) -> Decision | list[LayerDecision]:
        """Plan for the predicted loads of the next pass and apply it, all layers at once.

        Returns
        -------
        Decision, or list of LayerDecision
            The latter where the planner knows only single layers.
        """
        if callable(self.planner):
            return self._decide(self.passes, *self._plan(predicted_LE, self.backend.slots_LGC, 1.0))
        slots_LGC = self.backend.slots_LGC
        found = [
            self._of_layer(layer, load_E, slots_GC)
            for layer, load_E, slots_GC in zip(self.backend.layers, predicted_LE, slots_LGC, strict=True)
        ]
        wanted_LGC = stacked([decision.slots_GC for decision in found])
        if not same_replicas(wanted_LGC, slots_LGC):
            number = self.backend.apply(wanted_LGC)
            found = [
                decision
                if same_replicas(decision.slots_GC[None], slots_LGC[x][None])
                else replace(decision, applied=number)
                for x, decision in enumerate(found)
            ]
        self.layer_decisions.extend(found)
        return found

    def before_layer(
        self, layer: int, predicted: FloatArray | Foreseen, *, summed: bool = False
    ) -> LayerDecision | None:
        """Plan one layer for a prediction of its loads, and apply it to that layer.

        All ranks call it at the same point of the same pass. Fits `predict.foresight.Foresight` as ``begun``.

        Parameters
        ----------
        layer : int
            The model's own number of it, one of the backend's ``layers``.
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
                self._foreseer = LayerForeseer(self.backend, self._of_layer, self.layer_decisions.append)
            self._foreseer.take(ticket, layer, predicted, summed)
        return None

    def _at_once(self, layer: int, load_E: FloatArray) -> LayerDecision:
        slots_LGC, index = self.backend.slots_LGC, self._index(layer)
        decision = self._of_layer(layer, load_E, slots_LGC[index])
        if not same_replicas(decision.slots_GC[None], slots_LGC[index][None]):
            if isinstance(self.backend, LayerBackend):
                number = self.backend.apply_layer(layer, decision.slots_GC)
            else:
                rows = [decision.slots_GC if x == index else s for x, s in enumerate(slots_LGC)]
                number = self.backend.apply(stacked(rows))
            decision = replace(decision, applied=number)
        self.layer_decisions.append(decision)
        return decision

    def _of_layer(self, layer: int, load_E: FloatArray, slots_GC: SlotArray) -> LayerDecision:
        """Plan and verify; nothing is planned for no tokens."""
        began = clock.perf_counter()
        planner = self.planner
        if not isinstance(planner, PlanLayer):
            raise ProblemError("planner", "has no plan_layer, which the per-layer mode needs")
        load_E, index = np.ascontiguousarray(load_E, dtype=np.float64), self._index(layer)
        wanted_GC = planner.plan_layer(index, load_E, slots_GC) if load_E.any() else slots_GC
        found: object = wanted_GC
        array = found if isinstance(found, np.ndarray) else None
        if array is None or array.dtype.kind != "i" or array.shape[:-1] != (len(slots_GC),):
            text = type(found).__name__ if array is None else f"{array.dtype} {array.shape}"
            raise ProblemError(
                "planner",
                f"returned {text} for a layer, must return whole numbers [{len(slots_GC)} GPUs, slots]",
            )
        check_slots(wanted_GC, load_E.size, self._capacity_G(index, len(slots_GC), load_E.size))
        seconds = clock.perf_counter() - began
        return LayerDecision(layer=layer, load_E=load_E, slots_GC=wanted_GC, applied=None, seconds=seconds)

    def _index(self, layer: int) -> int:
        """Place of a layer on axis L."""
        layers = list(self.backend.layers)
        if layer not in layers:
            raise ProblemError("layer", f"is {layer}, must be one of {layers}")
        return layers.index(layer)

    def _capacity_G(self, index: int, gpus: int, experts: int) -> IntArray:
        """Slots that the planner may use, as far as it tells."""
        capacity_LG = getattr(self.planner, "capacity_LG", None)
        if capacity_LG is not None:
            return np.asarray(capacity_LG[index])
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

    def give_up(self) -> None:
        """End the threads without waiting: they may be waiting for a rank that is gone."""
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
        if self._foreseer is not None:
            self._foreseer.give_up()
            self._foreseer = None

    def _collect(self) -> Decision | None:
        if self._pending is None or self.passes < self._pending[1]:
            return None
        at_pass, _, future = self._pending
        self._pending = None
        return self._decide(at_pass, *future.result())

    def _plan(self, load_LE: FloatArray, slots_LGC: SlotArray, passes: float) -> tuple[Plan, float]:
        began = clock.perf_counter()
        if isinstance(self.planner, PlanWindow):
            plan = self.planner.plan_window(load_LE, slots_LGC, passes)
        elif callable(self.planner):
            plan = self.planner(load_LE, slots_LGC)
        else:
            raise ProblemError("planner", "plans single layers only; the windowed mode needs a callable")
        found: object = plan
        if not isinstance(found, Plan):
            raise ProblemError("planner", f"returned {type(found).__name__}, must return a Plan")
        there = slots_LGC.shape[:2]
        if plan.slots_LGC.shape[:2] != there:
            raise ProblemError(
                "planner", f"returned a plan of {plan.slots_LGC.shape[:2]} layers and GPUs, there are {there}"
            )
        return plan, clock.perf_counter() - began

    def _decide(self, at_pass: int, plan: Plan, seconds: float) -> Decision:
        """Apply a plan that changes anything; shares alone are the backend's own business."""
        changes = plan.moves.count > 0 or not same_replicas(plan.slots_LGC, self.backend.slots_LGC)
        applied = self.backend.apply(plan) if changes else None
        decision = Decision(at_pass=at_pass, plan=plan, applied=applied, seconds=seconds)
        self.decisions.append(decision)
        return decision
