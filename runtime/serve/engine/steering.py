"""The controller under traffic: policies that change while it serves, what they did, and what it cost.

All ranks steer alike: every method is called by all of them at the same point between passes. Whatever fails
in planning (but not the loss of a rank) ends the planning, not the serving: the placement stays as it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import Limits, ModelSpec, TimeModel, Topology, held_LGE
from moeless_opt.runtime.control import Controller, LayerPlanner, MemoryReport, Observation, Planner, stacked
from moeless_opt.runtime.live import LiveModel, RankLostError, rows_to_slots
from moeless_opt.runtime.pool import RULES, CostMeter
from moeless_opt.runtime.predict import GatePredictor, PerLayer, load_distance, plain_gates
from moeless_opt.runtime.serve import PlanEvent, Planning
from moeless_opt.solvers.core import mended

__all__ = ["Steering", "check_planning", "ranks_as_topology"]

#: Passes between two looks at the loads, whoever plans.
LOOK = 16
#: Passes that a plan of the windowed mode is made beside.
LAG = 2
#: Events that are remembered.
EVENTS = 200
#: Rows for which the experts are timed, for the planner of single layers.
MEASURED = (1, 4, 16, 64, 256)
#: How often each of them is.
REPEATS = 3


def ranks_as_topology(live: LiveModel, slots: int | None) -> Topology:
    """The ranks as a topology with so many slots each; by default one more than every expert once takes."""
    group = live.group
    least = -(-live.experts // group.size)
    slots = min(least + 1 if slots is None else slots, live.experts)
    nodes = max(group.node_R) + 1
    if (
        nodes > 1
        and len({group.node_R.count(node) for node in range(nodes)}) == 1
        and list(group.node_R) == sorted(group.node_R)
    ):
        return Topology.uniform(nodes, group.size // nodes, slots=slots)
    return Topology.uniform(1, group.size, slots=slots)


def check_planning(planning: Planning, experts: int, ranks: int, expert_bytes: int = 0) -> None:
    """Refuse settings that contradict each other, or this model.

    Parameters
    ----------
    planning : Planning
        Asked for.
    experts, ranks : int
        Of a layer; that serve it.
    expert_bytes : int
        Of the largest expert, once that is known.

    Raises
    ------
    ProblemError
    """
    least = -(-experts // ranks)
    if planning.slots is not None and planning.slots < least:
        raise ProblemError(
            "slots", f"is {planning.slots}; {experts} experts on {ranks} ranks need at least {least}"
        )
    if planning.slots is not None and planning.slots > experts:
        raise ProblemError(
            "slots", f"is {planning.slots}; a rank holds an expert once, so at most {experts} of them"
        )
    if planning.max_moves is not None and planning.policy != "windowed":
        raise ProblemError(
            "max_moves", f"is for the policy 'windowed'; {planning.policy!r} knows no such limit"
        )
    if planning.max_step_bytes is not None and planning.max_step_bytes < expert_bytes:
        raise ProblemError(
            "max_step_bytes", f"is {planning.max_step_bytes}, less than one expert, {expert_bytes} bytes"
        )
    if planning.max_step_bytes is not None and planning.keep_alive is not None:
        raise ProblemError("max_step_bytes", "is not for elastic experts: leave keep_alive out")
    if planning.max_step_bytes is not None and planning.policy in ("per-layer", "moeless"):
        raise ProblemError("max_step_bytes", f"is for whole plans; {planning.policy!r} moves single layers")


class _Watched:
    """A live model that tells what is asked of it; a `Backend` and a `LayerBackend`."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    @property
    def live(self) -> LiveModel:
        """Behind it."""
        return self._steering.live

    @property
    def group(self) -> Any:
        """Its ranks."""
        return self.live.group

    @property
    def layers(self) -> tuple[int, ...]:
        """See `Backend.layers`."""
        return self.live.layers

    @property
    def slots_LGC(self) -> SlotArray:
        """Where the placement is heading: on its way it may hold more than the ranks have slots."""
        return self.live.target_LGC

    def observe(self) -> Observation:
        """What was seen since the controller last asked."""
        return self._steering.taken()

    def apply(self, plan: Any, **_: Any) -> int:
        """Move to a plan; what went wrong is told and changes nothing."""
        return self._steering.applied(plan)

    def set_shares(self, shares: Any) -> None:
        """See `Backend.set_shares`."""
        self.live.set_shares(shares)

    def memory(self) -> MemoryReport:
        """See `Backend.memory`."""
        return self.live.memory()

    def open_layer(self, layer: int) -> Any:
        """See `LayerBackend.open_layer`."""
        return self.live.open_layer(layer)

    def offer_layer(self, ticket: Any, slots_GC: SlotArray | None, error: str = "") -> None:
        """See `LayerBackend.offer_layer`."""
        self.live.offer_layer(ticket, slots_GC, error)

    def apply_layer(self, layer: int, slots_GC: SlotArray) -> int:
        """See `LayerBackend.apply_layer`."""
        return self.live.apply_layer(layer, slots_GC)

    def side_group(self) -> Any:
        """See `LayerBackend.side_group`."""
        return self.live.side_group()


class _Fitting:
    """A planner that may find more replicas than there are slots: a rank has left, or `slots` were lowered.

    It plans from what would be left of them: every expert somewhere, no rank over its slots.

    Parameters
    ----------
    planner : Planner or LayerPlanner
        Of `topology`.
    """

    def __init__(self, planner: Any, topology: Topology) -> None:
        self.planner, self.topology = planner, topology
        assert topology.slots_G is not None
        self._slots_G = [int(slots) for slots in topology.slots_G]

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Any:
        """See `Planner`."""
        fits = [self._fit(load_E, slots_GC) for load_E, slots_GC in zip(load_LE, live_LGC, strict=True)]
        return self.planner(load_LE, stacked(fits))

    def plan_layer(self, index: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """See `PlanLayer`."""
        found: SlotArray = self.planner.plan_layer(index, load_E, self._fit(load_E, slots_GC))
        return found

    def _fit(self, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        if ((slots_GC >= 0).sum(1) <= self._slots_G).all():
            return slots_GC
        rows = [row[row >= 0].tolist() for row in slots_GC]
        return rows_to_slots(mended(load_E.tolist(), rows, self._slots_G))


class Steering:
    """Who plans on this rank, and the books of it.

    Parameters
    ----------
    live : LiveModel
        Attached.
    planning : Planning
        At first.
    kv_bytes : callable
        Bytes that requests hold in this rank's KV pool now.
    new : bool
        This rank takes the place of one that was lost: nothing is done with the others before `regrouped`.
    """

    def __init__(
        self, live: LiveModel, planning: Planning, kv_bytes: Callable[[], float], *, new: bool = False
    ) -> None:
        self.live, self.planning, self._kv_bytes = live, planning, kv_bytes
        self.events: deque[PlanEvent] = deque(maxlen=EVENTS)
        self.numbered = 0
        self.passes = 0
        self.plans = self.bytes_moved = self.cold_starts = 0
        self.plan_seconds = self.wait_seconds = 0.0
        self.recoveries = 0
        self.failed = False
        self._curve: TimeModel | None = None
        self._controller: Controller | None = None
        self._layers: PerLayer | None = None
        self._elastic: Any = None
        self._asleep: SlotArray | None = None
        self._cold = (0, 0, 0.0)
        self.largest_rows = self.mean_rows = 0.0
        self._open: dict[int, PlanEvent] = {}
        self._errors: deque[float] = deque(maxlen=64)
        self._meter: CostMeter | None = None
        self._past: dict[str, tuple[float, float]] = dict.fromkeys(RULES, (0.0, 0.0))
        if not new:
            self._fresh()
            self.apply_settings(planning, first=True)

    def _fresh(self) -> None:
        """Books that depend on the ranks begin anew."""
        live = self.live
        shape = (len(live.layers), live.group.size)
        self.load_LE: IntArray = np.zeros((len(live.layers), live.experts), dtype=np.int64)
        self.tokens_LG: IntArray = np.zeros(shape, dtype=np.int64)
        self.imbalance_L: FloatArray = np.ones(len(live.layers))
        self._pending: Observation | None = None
        own = {id(t) for bank in live.banks for w in bank.resident.values() for t in w}
        rest = sum(
            p.numel() * p.element_size()
            for p in live.model.parameters()
            if id(p) not in own and p.device.type != "meta"
        )
        everybody = sum(row[0] for row in live.group.gather_ints([rest]))
        self._bytes_L = np.array([bank.expert_bytes for bank in live.banks], dtype=np.float64)
        self._meter = CostMeter(self._bytes_L, float(everybody), elastic=False)
        self._charged = time.perf_counter()

    def _put_by(self, meter: Any) -> None:
        """Keep what another meter has charged."""
        for rule in RULES:
            cost, past = meter.cost(rule), self._past[rule]
            self._past[rule] = (past[0] + cost.experts, past[1] + cost.rest)

    def cost(self) -> dict[str, tuple[float, float]]:
        """GB*s of experts and of the rest under each rule."""
        meters = [] if self._meter is None else [self._meter]
        meters += [] if self._elastic is None else [self._elastic.meter]
        out = dict(self._past)
        for rule in RULES:
            for meter in meters:
                cost = meter.cost(rule)
                out[rule] = (out[rule][0] + cost.experts, out[rule][1] + cost.rest)
        return out

    # -- settings ----------------------------------------------------------------------------------

    def apply_settings(self, planning: Planning, *, first: bool = False) -> PlanEvent | None:
        """Plan by these settings from now on; what is told of it."""
        before, self.planning = self.planning, planning
        self._stop()
        if first or planning.keep_alive != before.keep_alive:
            self._set_elastic(planning.keep_alive)
        self.failed = False
        self._start()
        if first:
            return None
        return self.tell(
            "settings", detail=f"policy {planning.policy}{', paused' if planning.paused else ''}"
        )

    def _set_elastic(self, keep_alive: float | None) -> None:
        if self._elastic is not None:
            self._put_by(self._elastic.meter)
            self._elastic = None
        if keep_alive is not None:
            self._elastic = self.live.elastic(keep_alive, kv_bytes=self._kv_bytes)
        elif self.live.lanes.elastic is not None:
            self.live.inelastic()
        self._cold = (0, 0, 0.0)
        self._charged = time.perf_counter()

    def _start(self) -> None:
        """Make the controller that the settings ask for; one rank alone has nothing to decide."""
        planning = self.planning
        if planning.paused or self.live.group.size == 1 or planning.policy == "static":
            return
        try:
            if planning.policy in ("windowed", "eplb"):
                self._controller = self._by_windows(planning)
            else:
                self._controller = self._by_layers(planning)
                self._layers = PerLayer(
                    self.live, self._controller, GatePredictor(plain_gates(self.live.model))
                )
                self._layers.__enter__()
        except RankLostError:
            raise
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")

    def _topology(self, planning: Planning) -> Topology:
        """What is planned for: the ranks that there are now."""
        slots, live = planning.slots, self.live
        if slots is not None and slots * live.group.size < live.experts:  # until lost ranks are back
            slots = None
        return ranks_as_topology(live, slots)

    def _by_windows(self, planning: Planning) -> Controller:
        topology, backend = self._topology(planning), _Watched(self)
        if planning.policy == "eplb":
            published = _Fitting(Planner(topology=topology, solver="eplb", split="equal"), topology)
            return Controller(backend, published, every=planning.every, share="equal")
        options: dict[str, Any] = {"expert_bytes": self._bytes_L.astype(np.int64)}
        if planning.max_moves is not None:
            options["limits"] = Limits(max_moves=planning.max_moves)
        planner, live = _Fitting(Planner(topology=topology, options=options), topology), self.live
        # What a first plan loads is loaded now, and not beside the passes.
        with suppress(MoelessError):
            planner(np.ones((len(live.layers), live.experts)), live.target_LGC)
        lag = min(LAG, planning.every - 1)
        first = min(LOOK, planning.every)
        return Controller(backend, planner, every=planning.every, lag=lag, share="balanced", first=first)

    def _by_layers(self, planning: Planning) -> Controller:
        topology, backend = self._topology(planning), _Watched(self)
        if planning.policy == "moeless":
            published = Planner(topology=topology, solver="moeless", split="equal")
            return Controller(backend, _Fitting(published, topology), share="equal")
        if self._curve is None:
            self._curve = self._measured()
        planner = LayerPlanner(topology, self._model_spec(), self._curve)
        return Controller(backend, _Fitting(planner, topology), share="balanced")

    def _measured(self) -> TimeModel:
        """How long experts take here; by their rows alone where a rank holds too few to compare."""
        held = min(row[0] for row in self.live.group.gather_ints([len(self.live.banks[0].order)]))
        if held < 2:
            return TimeModel()
        return self.live.measure(MEASURED, repeats=REPEATS)

    def _model_spec(self) -> ModelSpec:
        live = self.live
        bank, adopted = live.banks[0], live.adopted
        outer, inner = (shape.numel() for shape, _ in bank.shapes)
        matrices, ffn = outer // inner + 1, inner // adopted.hidden
        bits = bank.expert_bytes * 8 / (matrices * adopted.hidden * ffn)
        return ModelSpec(
            name="served",
            layers=len(live.layers),
            experts=live.experts,
            top_k=adopted.topk,
            hidden=adopted.hidden,
            ffn=ffn,
            bits=bits,
            matrices=matrices,
        )

    def _stop(self, *, lost: bool = False) -> None:
        """End the planning, at the same point on all ranks.

        What is being planned is waited for by nobody: a planner may take long (the first time it loads, or
        compiles, what it needs), and serving goes on meanwhile.
        """
        if self._layers is not None:
            self._layers.__exit__()
            self._layers = None
        controller, self._controller = self._controller, None
        if controller is None:
            return
        controller.give_up()
        if not lost:
            self.live.drop_layers("planning was changed")

    def close(self) -> None:
        """End the planning."""
        self._stop(lost=True)

    # -- passes ------------------------------------------------------------------------------------

    def after_pass(self, seconds: float) -> None:
        """A forward pass has run on all ranks."""
        self.passes += 1
        for dispatcher in self.live.dispatchers if self.live.group.size > 1 else ():
            row_G = dispatcher.batch_rows_G
            if row_G is not None:
                self.largest_rows += float(row_G.max())
                self.mean_rows += float(row_G.mean())
        self._charge(seconds)
        controller = self._controller
        if controller is not None and self._layers is None and not self.failed:
            try:
                decision = controller.after()
            except RankLostError:
                raise
            except Exception as error:
                self.fail(f"{type(error).__name__}: {error}")
            else:
                if decision is not None:
                    self.plan_seconds += decision.seconds
        if self.passes % LOOK == 0:
            self._look()

    def fail(self, reason: str) -> None:
        """Planning has failed: serve on with the placement in force. The other ranks are told by `failed`."""
        self.failed = True
        self.tell("failed", detail=reason)

    def halt(self) -> None:
        """Some rank's planning has failed; all call this at the same point."""
        self._stop()
        if not self.failed:
            self.tell("failed", detail="planning failed on another rank")
        self.failed = False
        self.planning = replace(self.planning, paused=True)
        try:  # a plan that those have which did not fail is dropped
            self.live.tick(last=True)
        except RankLostError:
            raise
        except MoelessError as error:
            self.tell("failed", detail=str(error))

    def taken(self) -> Observation:
        """Everything seen since this was last called."""
        self._look()
        seen, self._pending = self._pending, None
        assert seen is not None
        return seen

    def _look(self) -> None:
        seen = self.live.observe()
        if seen.load_LE.any():
            self.load_LE, self.tokens_LG = seen.load_LE, seen.tokens_LG
            self.imbalance_L = seen.imbalance_L
        old = self._pending
        self._pending = (
            seen
            if old is None
            else Observation(
                load_LE=old.load_LE + seen.load_LE,
                tokens_LG=old.tokens_LG + seen.tokens_LG,
                seconds_LG=old.seconds_LG + seen.seconds_LG,
                batches=old.batches + seen.batches,
            )
        )
        self._follow()

    def _follow(self) -> None:
        """What became of plans, and of the layers that moved by themselves."""
        for number in list(self._open):
            try:
                report = self.live.migration(number)
            except (KeyError, MoelessError):  # so old that it is forgotten
                self._open.pop(number)
                continue
            if report.status in ("done", "superseded", "aborted"):
                event = self._open.pop(number)
                self.bytes_moved += report.bytes if self._elastic is None else 0
                if report.status == "aborted":
                    self.tell("failed", detail=f"plan {event.number} was given up: {report.reason}")
        if self._layers is not None and self._controller is not None:
            self._follow_layers(self._controller)
        if self._elastic is not None:
            report = self._elastic.report()
            now = (report.cold_starts, report.cold_bytes, report.cold_seconds)
            before, self._cold = self._cold, now
            self.cold_starts += now[0] - before[0]
            self.bytes_moved += now[1] - before[1]
            self.wait_seconds += now[2] - before[2]

    def _follow_layers(self, controller: Controller) -> None:
        done = [d for d in list(controller.layer_decisions) if d.applied is not None]
        errors = [d.error for d in list(controller.layer_decisions) if d.error]
        self.plan_seconds += sum(d.seconds for d in list(controller.layer_decisions))
        for decision in list(controller.layer_decisions)[-len(self.live.layers) :]:
            true_E = self.load_LE[self.live.layers.index(decision.layer)]
            if decision.load_E.any() and true_E.any():
                self._errors.append(load_distance(decision.load_E, true_E.astype(np.float64)))
        controller.layer_decisions.clear()
        errors = [error for error in errors if not error.startswith(RankLostError.__name__)]
        if errors and not self.failed:
            self.fail(errors[-1])
        if not done:
            return
        moved = cold = 0
        for decision in done:
            assert decision.applied is not None
            ticket = self.live.layer_plan(decision.applied)
            moved += ticket.bytes
            cold += ticket.cold
        self.plans += len(done)
        if self._elastic is None:
            self.bytes_moved += moved
            self.cold_starts += cold
        self.tell(
            "plan",
            moves=cold,
            bytes=moved,
            seconds=sum(d.seconds for d in done),
            imbalance_before=float(self.imbalance_L.mean()),
            imbalance_after=float(self.imbalance_L.mean()),
            detail=f"{len(done)} layers by themselves",
        )

    # -- plans -------------------------------------------------------------------------------------

    def applied(self, plan: Any, kind: str = "plan") -> int:
        """Move to a plan."""
        limits = {}
        if self.planning.max_step_bytes is not None and self._elastic is None:
            limits["max_step_bytes"] = self.planning.max_step_bytes
        experts = self.live.experts
        before_LGE = held_LGE(self.live.target_LGC, experts)
        number = self.live.apply(plan, **limits)
        arrivals_LGE = held_LGE(getattr(plan, "slots_LGC", plan), experts) & ~before_LGE
        moves_L = arrivals_LGE.sum((1, 2))
        self._asleep = None
        self.plans += 1
        judged = isinstance(plan, Plan)
        event = self.tell(
            kind,
            moves=int(moves_L.sum()),
            bytes=int(moves_L @ self._bytes_L),
            seconds=plan.certificate.seconds if judged else 0.0,
            imbalance_before=float(self.imbalance_L.mean()),
            imbalance_after=float(plan.imbalance_L.mean()) if judged else 1.0,
        )
        self._open[number] = event
        return number

    def event_of(self, number: int) -> PlanEvent:
        """What was told of a plan that has just been handed in."""
        return self._open[number]

    def sleep(self) -> None:
        """Without traffic: give up every replica but one of each expert."""
        if self._asleep is not None or self.live.group.size == 1:
            return
        before = self.live.target_LGC
        number = self.live.scale_to_zero()
        self._asleep = before
        self._open[number] = self.tell("idle", detail="one replica of each expert is left")

    def wake(self) -> None:
        """Traffic is back: what served the last traffic is the best guess for the next."""
        before, self._asleep = self._asleep, None
        if before is not None:
            try:
                self.applied(before, "plan")
            except RankLostError:
                raise
            except MoelessError as error:  # the same on all ranks
                self.tell("failed", detail=f"the last placement does not come back: {error}")

    @property
    def asleep(self) -> bool:
        """Whether the replicas were given up."""
        return self._asleep is not None

    @property
    def moving(self) -> bool:
        """Whether rounds without traffic bring anything on."""
        return bool(self._open) or self._elastic is not None

    def tick(self) -> None:
        """One round without traffic."""
        self.live.tick()
        self._charge(0.0)
        self._follow()

    def tell(self, kind: str, **facts: Any) -> PlanEvent:
        """Write an event down."""
        self.numbered += 1
        event = PlanEvent(number=self.numbered, at=time.time(), passes=self.passes, kind=kind, **facts)
        self.events.append(event)
        return event

    # -- ranks and costs ---------------------------------------------------------------------------

    def books(self) -> dict[str, Any]:
        """What other ranks take over from this one when ranks have left or come back."""
        return {
            "planning": asdict(self.planning),
            "passes": self.passes,
            "numbered": self.numbered,
            "plans": self.plans,
            "bytes_moved": int(self.bytes_moved),
            "cold_starts": self.cold_starts,
            "plan_seconds": self.plan_seconds,
            "wait_seconds": self.wait_seconds,
            "recoveries": self.recoveries,
            "past": self.cost(),
            "given": [event.number for event in self._open.values() if event.kind in ("given", "restored")],
        }

    def regrouped(self, books: Mapping[str, Any], detail: str, *, lost: bool, new: bool) -> None:
        """Ranks have left or come back: go on from one rank's books, and plan for those that there are.

        Parameters
        ----------
        books : mapping
            Of `books`, the same on all ranks; all counters that decide on collectives are from here on, too.
        detail : str
            What has happened.
        lost, new : bool
            Whether ranks have left, and whether some are new.
        """
        self._stop(lost=True)
        self._elastic = None
        self._open.clear()
        self._asleep = None
        self.failed = False
        for name in ("passes", "numbered", "plans", "bytes_moved", "cold_starts", "recoveries"):
            setattr(self, name, int(books[name]))
        self.plan_seconds, self.wait_seconds = float(books["plan_seconds"]), float(books["wait_seconds"])
        self._past = {rule: (float(past[0]), float(past[1])) for rule, past in books["past"].items()}
        self.planning = Planning(**books["planning"])
        self.recoveries += lost
        if new:
            self._curve = None
        self._fresh()
        if self.planning.keep_alive is not None:
            self._set_elastic(self.planning.keep_alive)
        self.tell("ranks", detail=detail)
        for number in books["given"]:
            self.tell("failed", detail=f"plan {number} was given up: the ranks changed under it")
        self._start()

    def _charge(self, seconds: float) -> None:
        """Charge memory times time where experts are not elastic (those have a meter of their own)."""
        now = time.perf_counter()
        wall, self._charged = now - self._charged, now
        if self._elastic is not None or self._meter is None:
            return
        live = self.live
        held_L = np.array(
            [sum(len(row) for row in table.rows) for table in live.migrator.tables], dtype=np.float64
        )
        kv = self._kv_bytes() * live.group.size
        self._meter.add_wall(float(held_L @ self._bytes_L) * wall, wall, kv * wall)
        if seconds:
            used_L = torch.cat([d.used_slots() for d in live.dispatchers]).tolist()
            layer_L = [d.layer_watch.take() for d in live.dispatchers]
            self._meter.add_passes(
                held_L,
                np.array([used_L], dtype=np.float64),
                np.array([layer_L]),
                np.array([seconds]),
                np.array([kv]),
                np.ones(1),
            )

    @property
    def prediction_error(self) -> float | None:
        """Mean distance of the last predictions."""
        return float(np.mean(self._errors)) if self._errors else None
