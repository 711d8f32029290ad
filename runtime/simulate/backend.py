"""A serving system in simulated time: the third backend.

`SimulatedBackend` answers the same calls as a live model, so the same `Controller` runs over it. It is given
forward passes (`traffic.Passes`: loads and earliest starts) and computes how long they take on a `Machine`
under the placement in force; passes run one after the other. How replicas share tokens is a rule (`shares`),
what a new placement costs a way of transfer (`transfers`); `drive` gives it traffic.

Axis letters besides the usual ones: B forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray, number, whole
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import TimeModel, replica_keys
from moeless_opt.runtime.control import MemoryReport, Observation
from moeless_opt.runtime.pool import CostMeter, KeepAlive, WarmPool
from moeless_opt.runtime.simulate.beliefs import Beliefs
from moeless_opt.runtime.simulate.early import Early
from moeless_opt.runtime.simulate.machine import LayerTimes, Machine
from moeless_opt.runtime.simulate.report import SimReport
from moeless_opt.runtime.simulate.shares import Placed, ShareRule, SplitCost, share_rule
from moeless_opt.runtime.simulate.traffic import Passes
from moeless_opt.runtime.simulate.transfers import Move, PerPass, Transfers, transfers_of
from moeless_opt.runtime.simulate.waits import stretched, waits

__all__ = ["SimulatedBackend", "Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a simulated system believes, and how it is charged.

    Parameters
    ----------
    believed : TimeModel, optional
        Expert times as the system believes them; the true ones by default.
    learns : bool
        Whether it corrects them by what its GPUs took.
    split_seconds : float, optional
        Seconds that a layer waits for live shares; by default they are free.
    elastic : bool
        Whether the charging rule ``functions`` charges by use.
    charge_once : bool
        Whether weights outside the experts are charged once, however many GPUs hold a copy.
    room : float
        Bytes of experts that each GPU may hold at any moment, replicas on their way included.
    """

    believed: TimeModel | None = None
    learns: bool = False
    split_seconds: float | None = None
    elastic: bool = False
    charge_once: bool = False
    room: float = np.inf


class SimulatedBackend:
    """A `Backend` in simulated time.

    Parameters
    ----------
    machine : Machine
        Times.
    slots_LGC : array of int32, shape [L, G, C]
        Placement at the start.
    capacity_LG : array of int, shape [L, G]
        Slots; beyond them a GPU may stage replicas while others are on their way, as far as there is room.
    shares : ShareRule or str
        How replicas share their tokens; a rule or its name (see `shares`).
    transfers : Transfers or str
        How missing weights come; a way or its name (see `transfers`).
    distance : int
        Layers ahead that a prediction is made (``per-pass``).
    keep_alive : KeepAlive or float
        How long replicas stay that are no longer wanted.
    contention : bool
        Whether transfers and the all-to-all share ports (see `waits`).
    decide_seconds : float
        Seconds that a predictor and a planner take for a layer, `distance` layers before it (``per-pass``).
    terms : Terms, optional
        What the system believes, and how it is charged.
    """

    def __init__(
        self,
        machine: Machine,
        slots_LGC: SlotArray,
        capacity_LG: IntArray,
        *,
        shares: ShareRule | str = "balanced",
        transfers: Transfers | str = "overlapped",
        distance: int = 1,
        keep_alive: KeepAlive | float = 0.0,
        contention: bool = False,
        decide_seconds: float = 0.0,
        terms: Terms | None = None,
    ) -> None:
        terms = terms or Terms()
        self.machine = machine
        self.experts = machine.model.experts
        layers, gpus, _ = slots_LGC.shape
        self.layers = range(layers)
        self.bytes_L = np.full(layers, machine.model.expert_bytes, dtype=np.int64)
        self.distance = whole("distance", distance, low=1)
        self.contention = contention
        self.decide_seconds = number("decide_seconds", decide_seconds)
        self.transfers, self.shares = transfers_of(transfers), share_rule(shares)
        self.capacity_LG: IntArray = np.asarray(capacity_LG, dtype=np.int64)
        self.pool = WarmPool(
            slots_LGC,
            self.experts,
            capacity_LG=self.transfers.room_LG(self.capacity_LG),
            bytes_L=self.bytes_L,
            keep_alive=keep_alive,
        )
        copies = machine.topology.gpus if terms.charge_once else 1
        others = (machine.other_bytes - machine.once) / copies + machine.once
        self.meter = CostMeter(self.bytes_L, others, elastic=terms.elastic)
        self.report = SimReport()
        self.now = 0.0
        #: Bytes of experts that each GPU may hold at any moment.
        self.room = terms.room
        #: The most bytes of experts and the KV cache that a GPU has held.
        self.fullest = self._cache = 0.0
        self._peak_G: IntArray = self.bytes_L @ self.pool.held_LG
        self._beside_L: FloatArray = np.zeros(layers)  # replicas of a migration under way, and its peak
        self._staged_G: IntArray = np.zeros(gpus, dtype=np.int64)
        self._served_LGC: BoolArray | None = None
        #: Times by which it plans.
        self.beliefs = Beliefs(
            machine,
            terms.believed,
            learns=terms.learns,
            slots=min(int(np.max(capacity_LG)) + 1, self.experts),
        )
        split = terms.split_seconds
        self._split = None if split is None else SplitCost(number("split_seconds", split), layers)
        self._place(slots_LGC, None)
        self._switch: tuple[float, SlotArray, Any] | None = None
        self._stall = 0.0
        self._cold = (0, 0)  # replicas loaded for the next pass, and their bytes
        self._charged = (0.0, 0.0)
        self._load_L: FloatArray = np.zeros(layers)
        self._previous: FloatArray = np.zeros((2, layers))  # of the last pass: seconds of layers, of networks
        self._network_share = 0.0
        self._seen = self._blank(layers, gpus)
        self._squares = 0.0  # of the pairs of each pass
        self._early: Early | None = None
        if isinstance(self.transfers, PerPass) and self.transfers.patient is not True:
            self._early = Early(
                machine=machine,
                beliefs=self.beliefs,
                pool=self.pool,
                rule=self.shares,
                bytes_L=self.bytes_L,
                patient=self.transfers.patient,
                distance=min(self.distance, layers),
                decide=self.decide_seconds,
                contention=contention,
            )

    # --- the Backend protocol ------------------------------------------------------------------------------

    @property
    def slots_LGC(self) -> SlotArray:
        """The placement in force."""
        if self._early is not None and self.shares.live:
            return self.warm_LGC
        return self._placed.slots_LGC

    @property
    def warm_LGC(self) -> SlotArray:
        """Everything in memory: what is in force, and what is kept alive besides."""
        return self.pool.slots() if self._early is None else self._early.within()

    def observe(self) -> Observation:
        """Loads and times since the last call."""
        load, tokens, seconds, batches = self._seen
        even = load.sum() ** 2 / self._squares if self._squares else float(batches)
        self._squares = 0.0
        self._seen = self._blank(*self.slots_LGC.shape[:2])
        return Observation(
            load_LE=np.rint(load).astype(np.int64),
            tokens_LG=np.rint(tokens).astype(np.int64),
            seconds_LG=seconds,
            batches=batches,
            even=min(float(even), float(batches)),
        )

    def apply(self, plan: Any, **limits: Any) -> int:
        """Start moving to a plan's placement; `limits` go to `schedule_migration`."""
        slots_LGC = np.asarray(getattr(plan, "slots_LGC", plan), dtype=np.int32)
        share_LGC = getattr(plan, "share_LGC", None)
        if not self.shares.live and getattr(plan, "split", "") != "equal":
            share_LGC = None
        report = self.report
        report.plans += 1
        if self._early is not None:
            stretch = stretched(1.0, self._network_share) if self.contention else 1.0
            most = int(min(self.room / self.machine.model.expert_bytes, np.iinfo(np.int32).max))
            slots_LGC, whole = self._early.ask(slots_LGC, self.now, stretch, most)
            self._place(slots_LGC, share_LGC if whole else None)
            return report.plans
        if self._switch is not None:  # what is under way takes the time that it takes
            self._stall += max(self._switch[0] - self.now, 0.0)
            self._switch = (self.now, *self._switch[1:])
            self._finish_switch()
        move = Move(
            machine=self.machine,
            bytes_L=self.bytes_L,
            live_LGC=self.slots_LGC,
            wanted_LGC=slots_LGC,
            now=self.now,
            network_share=self._network_share if self.contention else 0.0,
            limit_G=None if np.isinf(self.room) else np.full(len(self._peak_G), int(self.room)),
            limits=limits,
        )
        try:
            arrival = self.transfers.begin(move, self.pool)
        except InfeasibleError:
            if self.transfers.per_pass:  # it is the plan that is wrong
                raise
            report.refused += 1
            return report.plans
        if arrival.beside_L is not None:
            self._beside_L = arrival.beside_L
            self.pool.beside = float(self._beside_L @ self.bytes_L)
        if arrival.peak_G is not None:
            self._staged_G = arrival.peak_G
            self._held()
        self._count_moves(arrival.cold)
        if arrival.load_L is not None:
            # Layers may be planned one by one: what the others load is not forgotten.
            self._load_L = self._load_L + arrival.load_L
            self._place(slots_LGC, share_LGC)
            return report.plans
        self._stall += arrival.stall
        self._switch = (self.now + (arrival.after or 0.0), slots_LGC, share_LGC)
        if arrival.after is None:
            self._finish_switch()
        return report.plans

    def set_shares(self, shares: Any) -> None:
        """How replicas share their tokens from the next pass on: a rule or its name."""
        self.shares = share_rule(shares)

    def memory(self) -> MemoryReport:
        """Bytes of experts per GPU: in force, and in memory with all that is kept alive or on its way."""
        held_G = self._held()
        live_G = self.bytes_L @ (self.slots_LGC >= 0).sum(2)
        return MemoryReport(live_G=live_G, held_G=held_G, peak_G=self._peak_G)

    def _held(self) -> IntArray:
        """Bytes of experts on each GPU, and of those on their way, shape [G]; remembers what was the most."""
        if self._early is None:
            held_G = np.maximum(self.bytes_L @ self.pool.held_LG, self._staged_G)
        else:
            held_G = self._early.held_G() * self.machine.model.expert_bytes
        self._peak_G = np.maximum(self._peak_G, held_G)
        self.fullest = max(self.fullest, float(held_G.max()) + self._cache)
        return np.asarray(held_G)

    # --- simulated time ------------------------------------------------------------------------------------

    def run(self, passes: Passes) -> None:
        """Run forward passes in order."""
        if self._early is not None:
            for i in range(passes.count):
                self._run_early(passes.part(i, i + 1), self._early)
            return
        low = 0
        while low < passes.count:
            if self._switch is not None and max(passes.start_B[low], self.now) >= self._switch[0]:
                self._finish_switch()
            part = passes.part(low, passes.count)
            found, self._served_LGC = self.shares.times(part.load_BLE, self._placed)
            times, exposed_BL = self._delayed(found)
            seconds_B = (times.layer_BL + 0.0).sum(1) + self.machine.rest(part.tokens_B, part.kv_tokens_B)
            # Each of the passes that one stands for is planned for, and waits, as that one does.
            whole_B = part.weight_B * (seconds_B + exposed_BL.sum(1))
            whole_B[0] += self._stall
            done_B = np.cumsum(whole_B)
            start_B = np.maximum.accumulate(np.maximum(part.start_B, self.now) - (done_B - whole_B))
            start_B += done_B - whole_B
            count = part.count
            if self._switch is not None:
                count = max(int(np.searchsorted(start_B, self._switch[0])), 1)
            self._commit(part, times, exposed_BL, start_B, whole_B, count)
            low += count

    def _run_early(self, part: Passes, early: Early) -> None:
        """One pass that need not wait for all of its weights."""
        start = max(float(part.start_B[0]), self.now)
        times, waits_L, used_LGC = early.run(part, start, self._previous[0], self._placed)
        self._served_LGC = None
        exposed_BL = waits_L[None]
        seconds_B = times.layer_BL.sum(1) + self.machine.rest(part.tokens_B, part.kv_tokens_B)
        whole_B = part.weight_B * (seconds_B + exposed_BL.sum(1))
        # What was loaded for the first of them is loaded anew for each, as far as there is time.
        again = float(part.weight_B[0]) - 1
        early.moved += again * early.begun(self.now, start + float(whole_B[0] / part.weight_B[0]))
        self._commit(part, times, exposed_BL, np.array([start]), whole_B, 1, used_LGC)
        self.report.moved, self.report.moved_bytes = early.moved, early.moved * float(self.bytes_L[0])

    def wait_until(self, start: float) -> None:
        """Let idle time pass, if `start` is not reached yet: kept-alive replicas may go in it."""
        if start > self.now:
            self.now = start
            if self.transfers.per_pass:
                self.pool.advance(start)
                self._let_go()

    def _let_go(self) -> None:
        """Take what the pool has released out of force."""
        if not self.shares.live:
            return
        keys = self.pool.keys if self._early is None else self._early.serving()
        if len(keys) != int((self._placed.slots_LGC >= 0).sum()):
            self._place(self.pool.slots() if self._early is None else self._early.slots(keys), None)

    def _charge_wall(self, kv_byte_seconds: float) -> None:
        byte_seconds, now = self._charged
        self.meter.add_wall(self.pool.byte_seconds - byte_seconds, self.pool.now - now, kv_byte_seconds)
        self._charged = (self.pool.byte_seconds, self.pool.now)

    def _delayed(self, times: LayerTimes) -> tuple[LayerTimes, FloatArray]:
        """The times with what transfers cost, and the waiting in the first of these passes, shape [B, L]."""
        exposed_BL = np.zeros(times.layer_BL.shape)
        if self._switch is not None and self.contention:  # every pass until then has half of the ports
            return replace(times, network_BL=2 * times.network_BL), exposed_BL
        if self._load_L.any() or (self.decide_seconds > 0 and self.transfers.per_pass):
            exposed_BL[0], longer_L = waits(
                self._load_L,
                self._previous,
                np.stack([times.layer_BL[0], times.network_BL[0]]),
                self.distance,
                decide=self.decide_seconds,
                contention=self.contention,
            )
            if self.contention:
                network_BL = times.network_BL.copy()
                network_BL[0] += longer_L
                times = replace(times, network_BL=network_BL)
        return times, exposed_BL

    def _commit(
        self,
        part: Passes,
        times: LayerTimes,
        exposed_BL: FloatArray,
        start_B: FloatArray,
        whole_B: FloatArray,
        count: int,
        used_LGC: SlotArray | None = None,
    ) -> None:
        """Book the first `count` passes."""
        done = slice(0, count)
        report, weight_B = self.report, part.weight_B[done]
        layer_BL = times.layer_BL[done] + exposed_BL[done]
        end = float(start_B[count - 1] + whole_B[count - 1])
        kv_B = self.machine.kv_bytes_of(part.kv_tokens_B[done])
        held_L = self.pool.held_L + self._beside_L
        self._cache = float(kv_B.max()) / len(self._peak_G)
        self._held()
        if report.first_start < 0:
            self._begin(float(start_B[0]))
        seconds_B = whole_B[done] / weight_B
        self.meter.add_passes(held_L, times.used_BL[done], layer_BL, seconds_B, kv_B, weight_B)
        if self.transfers.per_pass:
            # What was loaded for the first of them is loaded anew for each that it stands for.
            report.moved += float(weight_B[0]) * self._cold[0]
            report.moved_bytes += float(weight_B[0]) * self._cold[1]
            self._cold = (0, 0)
            # Where shares are live, what serves no token of a pass is idle in it.
            used_LGC = self.slots_LGC if used_LGC is None else used_LGC
            if self._served_LGC is not None:
                used_LGC = np.where(self._served_LGC, used_LGC, -1)
            start = max(float(start_B[0]), self.pool.now)
            self.pool.use(used_LGC, start, end, there=self._early is not None)
        else:
            self.pool.hold(self.slots_LGC, end)
        self.pool.advance(end)
        if self.transfers.per_pass:
            self._let_go()
        self._charge_wall(float((whole_B[done] * kv_B).sum()))
        busy = float(whole_B[done].sum())
        report.layer_BL.append(layer_BL)
        report.network_BL.append(times.network_BL[done])
        report.exposed_BL.append(exposed_BL[done])
        report.weight_B.append(weight_B)
        report.prefill_B.append(part.prefill_B[done])
        report.largest += float((weight_B[:, None] * times.tokens_BLG[done].max(2)).sum())
        report.mean += float((weight_B[:, None] * times.tokens_BLG[done].mean(2)).sum())
        report.busy += busy
        report.held_seconds += float(held_L.sum()) * busy
        report.lag = float(start_B[count - 1] - part.start_B[count - 1])
        report.end = end
        load, tokens, spent, batches = self._seen
        load += np.tensordot(weight_B, part.load_BLE[done], 1)
        self._squares += float(weight_B @ part.load_BLE[done].sum((1, 2)) ** 2)
        tokens += np.tensordot(weight_B, times.tokens_BLG[done], 1)
        spent += np.tensordot(weight_B, times.seconds_BLG[done], 1)
        self._seen = (load, tokens, spent, batches + round(float(weight_B.sum())))
        if self.beliefs.see(times if count == part.count else times.first(count)):
            self._placed.table, self._placed.believed = self.beliefs.table, self.beliefs.machine
        self.now = end
        self._stall = 0.0
        self._load_L = np.zeros_like(self._load_L)
        self._previous = np.stack([times.layer_BL[count - 1], times.network_BL[count - 1]])
        self._network_share = float(self._previous[1].sum() / max(seconds_B[-1], 1e-30))

    def _begin(self, start: float) -> None:
        """The first pass: what was held before it is not charged."""
        self.report.first_start = start
        self.pool.hold(self.slots_LGC, start)
        self.pool.advance(max(start, self.pool.now))
        self._charged = (self.pool.byte_seconds, self.pool.now)

    def _place(self, slots_LGC: SlotArray, share_LGC: FloatArray | None) -> None:
        self._placed = self._made(slots_LGC, share_LGC)
        self._served_LGC = None

    def _made(self, slots_LGC: SlotArray, share_LGC: FloatArray | None) -> Placed:
        return Placed(
            self.machine,
            self.beliefs.table,
            slots_LGC,
            share_LGC,
            brief=self.transfers.per_pass,
            believed=self.beliefs.machine,
            split=self._split,
        )

    def _finish_switch(self) -> None:
        assert self._switch is not None
        when, slots_LGC, share_LGC = self._switch
        self._switch = None
        when = max(when, self.pool.now)
        self.pool.hold(self.slots_LGC, when)
        self.pool.follow(replica_keys(slots_LGC, self.experts), when)
        self._beside_L, self.pool.beside = np.zeros_like(self._beside_L), 0.0
        self._staged_G = np.zeros_like(self._staged_G)
        self._place(slots_LGC, share_LGC)

    def _count_moves(self, cold: IntArray) -> None:
        layer = cold // (self.machine.topology.gpus * self.experts)
        moved, moved_bytes = len(cold), int(self.bytes_L[layer].sum())
        if self.transfers.per_pass:
            self._cold = (self._cold[0] + moved, self._cold[1] + moved_bytes)
        else:
            self.report.moved += moved
            self.report.moved_bytes += moved_bytes

    def _blank(self, layers: int, gpus: int) -> tuple[FloatArray, FloatArray, FloatArray, int]:
        return np.zeros((layers, self.experts)), np.zeros((layers, gpus)), np.zeros((layers, gpus)), 0
