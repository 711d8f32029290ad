"""A serving system in simulated time: the third backend, and the loop that drives it with traffic.

`SimulatedBackend` answers the same calls as a live model, so the same `Controller` runs over it. It is given
forward passes (`traffic.Passes`: loads and earliest starts) and computes how long they take on a
`Machine` (`machine`) under the placement in force; passes run one after the other. What a new placement
costs depends on `transfers`:

*overlapped*: the schedule of `schedule_migration` runs beside the passes, which go on with the old placement,
undisturbed (assumed; but see `waits`), and switch when it is done. *exposed*: the passes wait for it.
*per-pass* (the paper's mode): the placement holds from the next pass on; a layer's missing replicas load
while the `distance` layers before it run, and what is left of their loading is waited for.

Axis letters besides the usual ones: B forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.time_bounds import TimeTable
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.runtime.control.backend import MemoryReport, Observation
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.pool.cost import CostMeter
from moeless_opt.runtime.pool.keep_alive import KeepAlive
from moeless_opt.runtime.pool.listed import ReplicaPool
from moeless_opt.runtime.simulate.machine import LayerTimes, Machine
from moeless_opt.runtime.simulate.shares import MANY, WideShares
from moeless_opt.runtime.simulate.traffic import Passes
from moeless_opt.runtime.simulate.waits import stretched, waits
from moeless_opt.solvers.migration.schedule import schedule_migration
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph
from moeless_opt.solvers.timed.activation import shares_of_one
from moeless_opt.solvers.timed.search import timed_shares

__all__ = ["SimReport", "SimulatedBackend", "predicted", "simulate"]

TRANSFERS = ("overlapped", "exposed", "per-pass")
SEARCHED = 256 * 64
"""Most experts x GPUs of a layer for which shares by time are searched."""
SHARES = ("equal", "planned", "balanced", "timed", "oracle")


@dataclass(slots=True)
class SimReport:
    """What a run adds up to; arrays grow pass by pass.

    Parameters
    ----------
    layer_BL, network_BL, exposed_BL : lists of arrays
        Seconds of each MoE layer, of its all-to-all, and of waiting for weights (both part of the first).
    weight_B, prefill_B : lists of arrays
        How many passes each stands for, and whether it reads prompts.
    largest, mean : float
        Sums over passes and layers of the largest and of the mean GPU tokens.
    moved, moved_bytes : int
        Replicas loaded after the start, and their bytes.
    plans : int
        Placements applied.
    held_seconds : float
        Sum of replicas held times seconds of passes.
    busy, first_start, end, lag : float
        Seconds in which passes ran; start of the first and end of the last one; how late the last started.
    """

    layer_BL: list[FloatArray] = field(default_factory=list)
    network_BL: list[FloatArray] = field(default_factory=list)
    exposed_BL: list[FloatArray] = field(default_factory=list)
    weight_B: list[FloatArray] = field(default_factory=list)
    prefill_B: list[BoolArray] = field(default_factory=list)
    largest: float = 0.0
    mean: float = 0.0
    moved: int = 0
    moved_bytes: int = 0
    plans: int = 0
    held_seconds: float = 0.0
    busy: float = 0.0
    first_start: float = -1.0
    end: float = 0.0
    lag: float = 0.0

    def latency(self, prefill: bool | None = None) -> tuple[FloatArray, FloatArray]:
        """Seconds of all MoE layers of the chosen passes, and their weights, both flat."""
        layer_BL = np.concatenate(self.layer_BL)
        weight_B, prefill_B = np.concatenate(self.weight_B), np.concatenate(self.prefill_B)
        chosen = np.ones(weight_B.shape, np.bool_) if prefill is None else prefill_B == prefill
        weight_BL = np.broadcast_to(weight_B[chosen, None], layer_BL[chosen].shape)
        return layer_BL[chosen].ravel(), weight_BL.ravel()

    def mean_latency(self, prefill: bool | None = None) -> float:
        """Mean seconds of a MoE layer; not a number where no such pass ran."""
        seconds, weight = self.latency(prefill)
        return float(seconds @ weight / weight.sum()) if weight.size else float("nan")

    def percentile(self, share: float = 0.99, prefill: bool | None = None) -> float:
        """Seconds that a `share` of the MoE layers do not exceed."""
        seconds, weight = self.latency(prefill)
        if not weight.size:
            return float("nan")
        order = np.argsort(seconds, kind="stable")
        reached = np.searchsorted(np.cumsum(weight[order]), share * weight.sum() * (1 - 1e-12))
        return float(seconds[order[min(int(reached), order.size - 1)]])

    @property
    def imbalance(self) -> float:
        """Sum over passes and layers of the largest GPU tokens over that of the mean."""
        return self.largest / self.mean if self.mean else 1.0

    @property
    def held(self) -> float:
        """Replicas held, mean over the time of the passes."""
        return self.held_seconds / self.busy if self.busy else 0.0


class SimulatedBackend:
    """A `Backend` in simulated time.

    Parameters
    ----------
    machine : Machine
        Times.
    slots_LGC : array of int32, shape [L, G, C]
        Placement at the start.
    capacity_LG : array of int, shape [L, G]
        Replicas that fit; beyond it a GPU may stage replicas while a migration runs.
    shares : str
        ``equal`` over an expert's replicas; ``planned``: the plan's; ``balanced``: solved for every pass and
        layer; ``timed``: searched for by the time model itself (`solvers.timed`), balanced, or one replica
        per expert, whichever is quickest in that pass and layer; ``oracle``: every GPU gets the same,
        whatever it holds (a bound, not a system).
    transfers : str
        ``overlapped``, ``exposed`` or ``per-pass``, see the module.
    distance : int
        Layers ahead that a prediction is made (``per-pass``).
    keep_alive : KeepAlive or float
        How long replicas stay that are no longer wanted.
    elastic : bool
        Whether the charging rule ``functions`` charges by use.
    contention : bool
        Whether transfers and the all-to-all share ports (see `waits`).
    decide_seconds : float
        Seconds that a predictor and a planner take for a layer, `distance` layers before it (``per-pass``).
    """

    def __init__(
        self,
        machine: Machine,
        slots_LGC: SlotArray,
        capacity_LG: IntArray,
        *,
        shares: str = "balanced",
        transfers: str = "overlapped",
        distance: int = 1,
        keep_alive: KeepAlive | float = 0.0,
        elastic: bool = False,
        contention: bool = False,
        decide_seconds: float = 0.0,
    ) -> None:
        for name, value, known in (("shares", shares, SHARES), ("transfers", transfers, TRANSFERS)):
            if value not in known:
                raise ProblemError(name, f"is {value!r}, must be one of {', '.join(known)}")
        self.machine = machine
        self.experts = machine.model.experts
        layers, gpus, _ = slots_LGC.shape
        self.bytes_L = np.full(layers, machine.model.expert_bytes, dtype=np.int64)
        self.distance = whole("distance", distance, low=1)
        self.contention = contention
        self.decide_seconds = number("decide_seconds", decide_seconds)
        self.transfers, self.shares = transfers, shares
        self.capacity_LG: IntArray = np.asarray(capacity_LG, dtype=np.int64)
        # While a migration runs beside the passes, old and new replicas are held: room for both.
        room_LG = capacity_LG if transfers == "per-pass" else 2 * np.asarray(capacity_LG)
        self.pool = ReplicaPool(
            slots_LGC, self.experts, capacity_LG=room_LG, bytes_L=self.bytes_L, keep_alive=keep_alive
        )
        self.meter = CostMeter(self.bytes_L, machine.other_bytes, elastic=elastic)
        self.report = SimReport()
        self.now = 0.0
        self._peak_G: IntArray = self.bytes_L @ self.pool.held_LG
        self._graph: tuple[int, ReplicaGraph] | None = None
        self._wide: WideShares | None = None
        self._alone_LGC: FloatArray | None = None
        self._served_LGC: BoolArray | None = None
        self._table = TimeTable.of(
            machine.time, min(int(np.max(capacity_LG)), self.experts), per_token=machine.link_per_token
        )
        self._place(slots_LGC, None)
        self._switch: tuple[float, SlotArray, Any] | None = None
        self._stall = 0.0
        self._charged = (0.0, 0.0)
        self._load_L: FloatArray = np.zeros(layers)
        self._previous: FloatArray = np.zeros((2, layers))  # of the last pass: seconds of layers, of networks
        self._network_share = 0.0
        self._seen = self._blank(layers, gpus)

    # --- the Backend protocol ------------------------------------------------------------------------------

    @property
    def slots_LGC(self) -> SlotArray:
        """The placement in force."""
        return self._slots_LGC

    @property
    def warm_LGC(self) -> SlotArray:
        """Everything in memory: what is in force, and what is kept alive besides."""
        return self.pool.slots()

    def observe(self) -> Observation:
        """Loads and times since the last call."""
        load, tokens, seconds, batches = self._seen
        self._seen = self._blank(*self._slots_LGC.shape[:2])
        return Observation(
            load_LE=np.rint(load).astype(np.int64),
            tokens_LG=np.rint(tokens).astype(np.int64),
            seconds_LG=seconds,
            batches=batches,
        )

    def apply(self, plan: Any, **limits: Any) -> int:
        """Start moving to a plan's placement; `limits` go to `schedule_migration`."""
        slots_LGC = np.asarray(getattr(plan, "slots_LGC", plan), dtype=np.int32)
        share_LGC = getattr(plan, "share_LGC", None)
        if self.shares != "timed" and getattr(plan, "split", "") != "equal":
            share_LGC = None
        report = self.report
        report.plans += 1
        if self._switch is not None:  # what is under way takes the time that it takes
            self._stall += max(self._switch[0] - self.now, 0.0)
            self._switch = (self.now, *self._switch[1:])
            self._finish_switch()
        if self.transfers == "per-pass":
            before = self.pool.keys.copy()
            cold = self.pool.prewarm(slots_LGC, self.now).cold
            # Layers may be planned one by one: what the others load is not forgotten.
            self._load_L = self._load_L + self.machine.load_seconds(cold, before, self.bytes_L)
            self._count_moves(cold)
            self._place(slots_LGC, share_LGC)
            return report.plans
        migration = schedule_migration(
            self._slots_LGC, slots_LGC, self.experts, self.machine.topology, bytes_L=self.bytes_L, **limits
        )
        self._count_moves(self.pool.prewarm(slots_LGC, self.now).cold)
        seconds = migration.seconds
        if self.transfers == "exposed":  # passes wait, and go on with the new placement
            self._stall += seconds
            self._switch = (self.now, slots_LGC, share_LGC)
            self._finish_switch()
        else:
            seconds = stretched(seconds, self._network_share) if self.contention else seconds
            self._switch = (self.now + seconds, slots_LGC, share_LGC)
        return report.plans

    def set_shares(self, shares: Any) -> None:
        """How replicas share their tokens from the next pass on."""
        if shares not in SHARES:
            raise ProblemError("shares", f"is {shares!r}, must be one of {', '.join(SHARES)}")
        self.shares = shares

    def memory(self) -> MemoryReport:
        """Bytes of experts per GPU: in force, and in memory with all that is kept alive or on its way."""
        held_G = self.bytes_L @ self.pool.held_LG
        live_G = self.bytes_L @ (self._slots_LGC >= 0).sum(2)
        self._peak_G = np.maximum(self._peak_G, held_G)
        return MemoryReport(live_G=live_G, held_G=held_G, peak_G=self._peak_G)

    # --- simulated time ------------------------------------------------------------------------------------

    def run(self, passes: Passes) -> None:
        """Run forward passes in order."""
        low = 0
        while low < passes.count:
            if self._switch is not None and max(passes.start_B[low], self.now) >= self._switch[0]:
                self._finish_switch()
            part = passes.part(low, passes.count)
            times, exposed_BL = self._delayed(self._times(part))
            seconds_B = (times.layer_BL + 0.0).sum(1) + self.machine.rest(part.tokens_B, part.kv_tokens_B)
            # A pass that stands for many is waited on once, however many it stands for.
            whole_B = part.weight_B * seconds_B + exposed_BL.sum(1)
            whole_B[0] += self._stall
            done_B = np.cumsum(whole_B)
            start_B = np.maximum.accumulate(np.maximum(part.start_B, self.now) - (done_B - whole_B))
            start_B += done_B - whole_B
            count = part.count
            if self._switch is not None:
                count = max(int(np.searchsorted(start_B, self._switch[0])), 1)
            self._commit(part, times, exposed_BL, seconds_B, start_B, whole_B, count)
            low += count

    def wait_until(self, start: float) -> None:
        """Let idle time pass, if `start` is not reached yet: kept-alive replicas may go in it."""
        if start > self.now:
            self.now = start
            if self.transfers == "per-pass":
                self.pool.advance(start)
                self._let_go()

    def _let_go(self) -> None:
        """Take what the pool has released out of force."""
        if self.shares == "timed" and len(self.pool.keys) != int((self._slots_LGC >= 0).sum()):
            self._place(self.pool.slots(), None)

    def _charge_wall(self, kv_byte_seconds: float) -> None:
        byte_seconds, now = self._charged
        self.meter.add_wall(self.pool.byte_seconds - byte_seconds, self.pool.now - now, kv_byte_seconds)
        self._charged = (self.pool.byte_seconds, self.pool.now)

    def _times(self, part: Passes) -> LayerTimes:
        if self.shares == "oracle":
            return self._perfect(part.load_BLE)
        if self.shares != "timed" or not self._replicated:
            return self.machine.layers(part.load_BLE, self._slots_LGC, self._shares(part.load_BLE))
        # The quickest of up to three ways; balancing tokens is dear where every pass has its own placement.
        ways = [np.broadcast_to(self._one_each(), self._shape(part))]
        if self._searched:
            passes, layers, experts = part.load_BLE.shape
            share_RGC, _ = timed_shares(
                part.load_BLE.reshape(passes * layers, experts),
                self._slots_LGC,
                self.machine.topology.speed_G,
                self._table,
                start_LGC=self._planned_LGC,
            )
            ways.insert(0, share_RGC.reshape(self._shape(part)))
        if self.transfers != "per-pass" or not self._searched:
            ways.insert(0, self._shares(part.load_BLE))
        times = [self.machine.layers(part.load_BLE, self._slots_LGC, share_BLGC) for share_BLGC in ways]
        best_BL = np.argmin([each.layer_BL for each in times], axis=0)
        # What serves in the last of these passes, of all that is held.
        last = [share_BLGC[-1] for share_BLGC in ways]
        self._served_LGC = np.choose(best_BL[-1][:, None, None], last) > 0
        return _quickest(times, best_BL)

    @property
    def _searched(self) -> bool:
        """Whether shares by time are searched for; on many GPUs tokens are balanced instead."""
        return self.experts * int(self._slots_LGC.shape[1]) <= SEARCHED

    def _shape(self, part: Passes) -> tuple[int, ...]:
        return (part.count, *self._slots_LGC.shape)

    def _shares(self, load_BLE: FloatArray) -> FloatArray:
        """Shares of each pass and layer, shape [B, L, G, C]."""
        passes, layers, experts = load_BLE.shape
        shape = (passes, *self._slots_LGC.shape)
        if self.shares in ("equal", "planned") or not self._replicated:
            share = self._planned_LGC if self.shares == "planned" else self._equal_LGC
            return np.broadcast_to(share, shape)
        if shape[2] > MANY:
            if self._wide is None:
                self._wide = WideShares(self._slots_LGC, self.machine.topology.speed_G, experts)
            return self._wide.of(load_BLE)
        if self._graph is None or self._graph[0] != passes:
            tiled = np.tile(self._slots_LGC, (passes, 1, 1))
            self._graph = (passes, ReplicaGraph(tiled, self.machine.topology.speed_G, experts))
        flat = load_BLE.reshape(passes * layers, experts)
        return solve_shares(flat, self._graph[1]).share_LGC.reshape(shape)

    def _one_each(self) -> FloatArray:
        """Shares that use one replica of each expert, as few experts per GPU as can be, [L, G, C]."""
        if self._alone_LGC is None:
            even_LE = np.ones((len(self._slots_LGC), self.experts))
            self._alone_LGC = shares_of_one(even_LE, self._slots_LGC, self.machine.topology.speed_G)
        return self._alone_LGC

    def _perfect(self, load_BLE: FloatArray) -> LayerTimes:
        """Every GPU serves the same tokens and activates its part of the experts that are used."""
        gpus = self.machine.topology.gpus
        total_BL, active_BL = load_BLE.sum(2), (load_BLE > 0).sum(2)
        tokens_BLG = np.repeat(total_BL[:, :, None] / gpus, gpus, axis=2)
        each_BLG = np.repeat(np.maximum(active_BL / gpus, 1.0)[:, :, None], gpus, axis=2)
        seconds_BLG = self.machine.time.time(tokens_BLG, each_BLG, self.machine.topology.speed_G)
        seconds_BLG = np.where(tokens_BLG > 0, seconds_BLG, 0.0)
        network_BL = self.machine.all_to_all(tokens_BLG.reshape(-1, gpus)).reshape(total_BL.shape)
        return LayerTimes(
            network_BL=network_BL,
            experts_BL=seconds_BLG.max(2),
            mean_BL=seconds_BLG.mean(2),
            tokens_BLG=tokens_BLG,
            seconds_BLG=seconds_BLG,
            used_BL=active_BL.astype(np.float64),
        )

    def _delayed(self, times: LayerTimes) -> tuple[LayerTimes, FloatArray]:
        """The times with what transfers cost, and the waiting in the first of these passes, shape [B, L]."""
        exposed_BL = np.zeros(times.layer_BL.shape)
        if self._switch is not None and self.contention:  # every pass until then has half of the ports
            return replace(times, network_BL=2 * times.network_BL), exposed_BL
        if self._load_L.any() or (self.decide_seconds > 0 and self.transfers == "per-pass"):
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
        seconds_B: FloatArray,
        start_B: FloatArray,
        whole_B: FloatArray,
        count: int,
    ) -> None:
        """Book the first `count` passes."""
        done = slice(0, count)
        report, weight_B = self.report, part.weight_B[done]
        layer_BL = times.layer_BL[done] + exposed_BL[done]
        end = float(start_B[count - 1] + whole_B[count - 1])
        kv_B = self.machine.kv_bytes_of(part.kv_tokens_B[done])
        held_L = self.pool.held_L
        self.meter.add_passes(held_L, times.used_BL[done], layer_BL, seconds_B[done], kv_B, weight_B)
        if self.transfers == "per-pass":
            # Where shares are live, what serves no token of a pass is idle in it.
            used_LGC = self._slots_LGC
            if self._served_LGC is not None:
                used_LGC = np.where(self._served_LGC, used_LGC, -1)
            self.pool.use(used_LGC, max(float(start_B[0]), self.pool.now), end)
        else:
            self.pool.hold(self._slots_LGC, end)
            if self._switch is not None:
                self.pool.hold(self._switch[1], end)
        self.pool.advance(end)
        if self.transfers == "per-pass":
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
        if report.first_start < 0:
            report.first_start = float(start_B[0])
        report.lag = float(start_B[count - 1] - part.start_B[count - 1])
        report.end = end
        load, tokens, spent, batches = self._seen
        load += np.tensordot(weight_B, part.load_BLE[done], 1)
        tokens += np.tensordot(weight_B, times.tokens_BLG[done], 1)
        spent += np.tensordot(weight_B, times.seconds_BLG[done], 1)
        self._seen = (load, tokens, spent, batches + count)
        self.now = end
        self._stall = 0.0
        self._load_L = np.zeros_like(self._load_L)
        self._previous = np.stack([times.layer_BL[count - 1], times.network_BL[count - 1]])
        self._network_share = float(self._previous[1].sum() / max(seconds_B[count - 1], 1e-30))
        self._peak_G = np.maximum(self._peak_G, self.bytes_L @ self.pool.held_LG)

    def _place(self, slots_LGC: SlotArray, share_LGC: FloatArray | None) -> None:
        self._slots_LGC = np.ascontiguousarray(slots_LGC, dtype=np.int32)
        self._equal_LGC = equal_shares(self._slots_LGC, self.experts)
        self._planned_LGC = self._equal_LGC if share_LGC is None else share_LGC
        self._replicated = bool((self._equal_LGC[self._slots_LGC >= 0] < 1).any())
        self._graph = self._wide = None
        self._alone_LGC = None
        self._served_LGC = None

    def _finish_switch(self) -> None:
        assert self._switch is not None
        when, slots_LGC, share_LGC = self._switch
        self._switch = None
        when = max(when, self.pool.now)
        self.pool.hold(self._slots_LGC, when)
        self.pool.hold(slots_LGC, when)
        self.pool.advance(when)
        self.pool.keep_only(slots_LGC)
        self._place(slots_LGC, share_LGC)

    def _count_moves(self, cold: IntArray) -> None:
        layer = cold // (self.machine.topology.gpus * self.experts)
        self.report.moved += len(cold)
        self.report.moved_bytes += int(self.bytes_L[layer].sum())

    def _blank(self, layers: int, gpus: int) -> tuple[FloatArray, FloatArray, FloatArray, int]:
        return np.zeros((layers, self.experts)), np.zeros((layers, gpus)), np.zeros((layers, gpus)), 0


def _quickest(times: list[LayerTimes], best_BL: IntArray) -> LayerTimes:
    """Of several ways to share, the one chosen in each pass and layer."""
    wide_BL1 = best_BL[:, :, None]

    def chosen(name: str) -> FloatArray:
        parts = [getattr(each, name) for each in times]
        return np.choose(best_BL if parts[0].ndim == 2 else wide_BL1, parts)

    return LayerTimes(**{item.name: chosen(item.name) for item in fields(LayerTimes)})


def predicted(
    load_BLE: FloatArray, mean_LE: FloatArray, error: float, rng: np.random.Generator
) -> FloatArray:
    """Loads as an imperfect predictor sees them, shape [B, L, E].

    A share `error` of every layer's pairs is put where pairs went on average until now, by chance; the rest
    is right. A model of a predictor, for where none is at hand (assumed).
    """
    if error <= 0:
        return load_BLE
    total_BL = load_BLE.sum(2)
    wrong_BL = np.rint(error * total_BL).astype(np.int64)
    weight_LE = mean_LE + 1e-9
    share_LE = weight_LE / weight_LE.sum(1, keepdims=True)
    guess = rng.multinomial(wrong_BL, np.broadcast_to(share_LE, load_BLE.shape))
    return np.asarray((1 - error) * load_BLE + guess)


def simulate(
    backend: SimulatedBackend,
    traffic: Iterable[Passes],
    controller: Controller | None = None,
    *,
    per_pass: bool = False,
    error: float = 0.1,
    foresight: Callable[[Passes], FloatArray] | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> SimReport:
    """Drive a backend with traffic under a controller.

    Parameters
    ----------
    backend : SimulatedBackend
        What serves.
    traffic : iterable of Passes
        What is served.
    controller : Controller, optional
        Who plans; nobody by default.
    per_pass : bool
        Ask the controller before every pass, with a prediction of its loads.
    error : float
        Share of the pairs that the assumed prediction gets wrong (see `predicted`).
    foresight : callable, optional
        Predicts instead: given the next passes, in order, what was foreseen of each, [B, L, E] (see
        `foresight`).
    seed : int
        For the prediction's errors.
    progress : callable, optional
        Told the simulated time.

    Returns
    -------
    SimReport
        The backend's own.
    """
    rng = np.random.default_rng(seed)
    past_LE: FloatArray = np.zeros((len(backend.bytes_L), backend.experts))
    for passes in traffic:
        if controller is None or not per_pass:
            backend.run(passes)
            if controller is not None:
                controller.after(passes.count)
        else:
            if foresight is not None:
                foreseen_BLE = foresight(passes)
            else:
                foreseen_BLE = predicted(passes.load_BLE, past_LE, error, rng)
            for i in range(passes.count):
                backend.wait_until(float(passes.start_B[i]))
                if foreseen_BLE[i].any():
                    controller.before(foreseen_BLE[i])
                backend.run(passes.part(i, i + 1))
                controller.passes += 1
            past_LE += passes.load_BLE.sum(0)
        if progress is not None:
            progress(float(passes.start_B[-1]))
    return backend.report
