"""How simulated replicas share their tokens: rules as objects, asked for the times of passes.

The live counterpart is `runtime.live.dispatch`, whose policies share out whole tokens, batch by batch; here a
rule says what many passes take under one placement (`Placed`). Rules keep nothing between calls, so one
object serves any number of runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from moeless_opt.api import plan
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import equal_shares
from moeless_opt.runtime.simulate.machine import LayerTimes, Machine
from moeless_opt.runtime.simulate.options import unknown
from moeless_opt.runtime.simulate.wide import MANY, WideShares
from moeless_opt.solvers.shares import ReplicaGraph, solve_shares
from moeless_opt.solvers.timed import shares_of_one, timed_plan, timed_shares

__all__ = [
    "SHARES",
    "BalancedRule",
    "EqualRule",
    "FoundRule",
    "PerfectRule",
    "Placed",
    "PlannedRule",
    "ShareRule",
    "SplitCost",
    "TimedRule",
    "share_rule",
]

SEARCHED = 256 * 64
"""Most experts x GPUs of a layer for which shares by time are searched."""


class SplitCost:
    """What it costs to share tokens out in a layer that waits for it, and what it was worth.

    Whoever splits knows, after a pass, what live shares would have saved; in the next pass of about as many
    tokens it pays for them where what they saved of late is well above what they cost. One pass alone says
    little: where a layer takes as long as what the fullest GPU reads, one saves half of it, the next nothing.

    Parameters
    ----------
    seconds : float
        For a layer, after its router and before its all-to-all.
    layers : int
        Layers of a pass.
    """

    FIRST = 0.1
    """Share of a layer's time that live shares are taken to save before anything is known."""

    NEWEST = 0.125
    """Weight of the newest pass in what live shares saved of late."""

    MARGIN = 1.5
    """They are paid for where they saved so many times what they cost: P99 is worth more than the mean."""

    IN_VAIN = 0.4
    """... and in no larger share of the passes of late were not worth what they cost."""

    def __init__(self, seconds: float, layers: int) -> None:
        self.seconds, self.layers = seconds, layers
        self._saved: dict[int, FloatArray] = {}
        self._vain: dict[int, FloatArray] = {}

    def worth_it(
        self, tokens: float, ready_L: FloatArray, live_L: FloatArray, rows: IntArray | None
    ) -> BoolArray:
        """Which layers of a pass to split live, from what it saved of late; remembers what it saves now.

        Parameters
        ----------
        tokens : float
            Token-expert pairs of a layer.
        ready_L, live_L : arrays, shape [L]
            Seconds of each layer with shares that are ready, and with live ones.
        rows : array of int, shape [L], optional
            Which layers these are; all by default.
        """
        size = int(np.log2(max(tokens, 1.0)))
        saved_L = self._saved.setdefault(size, np.full(self.layers, np.nan))
        vain_L = self._vain.setdefault(size, np.zeros(self.layers))
        which = slice(None) if rows is None else rows
        expected_L = np.where(np.isnan(saved_L[which]), self.FIRST * ready_L, saved_L[which])
        saved_L[which] = expected_L + self.NEWEST * (ready_L - live_L - expected_L)
        before_L = vain_L[which]
        vain_L[which] = before_L + self.NEWEST * ((ready_L - live_L < self.seconds) - before_L)
        return np.asarray((expected_L > self.MARGIN * self.seconds) & (before_L <= self.IN_VAIN))


@dataclass(slots=True)
class Placed:
    """A placement in force, and what follows from it once.

    Parameters
    ----------
    machine : Machine
        Times.
    table : TimeTable
        Its times, as searches take them.
    slots_LGC : array of int32, shape [L, G, C]
        The placement.
    planned_LGC : array, shape [L, G, C], optional
        Shares that came with the plan; equal ones by default.
    brief : bool
        Whether it stays for one pass only.
    believed : Machine, optional
        Times as whoever shares out tokens believes them; the true ones by default.
    split : SplitCost, optional
        What live shares cost, and what they were worth; nothing, by default.
    rows : array of int, shape [L], optional
        Which layers of the model these are, where they are not all.
    """

    machine: Machine
    table: TimeTable
    slots_LGC: SlotArray
    planned_LGC: FloatArray | None = None
    brief: bool = False
    believed: Machine | None = None
    split: SplitCost | None = None
    rows: IntArray | None = None
    equal_LGC: FloatArray = field(init=False)
    replicated: bool = field(init=False)
    _graph: tuple[int, ReplicaGraph] | None = field(init=False, default=None)
    _wide: WideShares | None = field(init=False, default=None)
    _alone_LGC: FloatArray | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.slots_LGC = np.ascontiguousarray(self.slots_LGC, dtype=np.int32)
        self.equal_LGC = equal_shares(self.slots_LGC, self.experts)
        self.replicated = bool((self.equal_LGC[self.slots_LGC >= 0] < 1).any())

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.machine.model.experts

    @property
    def start_LGC(self) -> FloatArray:
        """The plan's shares, equal ones where it brought none, shape [L, G, C]."""
        return self.equal_LGC if self.planned_LGC is None else self.planned_LGC

    def spread(self, share_LGC: FloatArray, passes: int) -> FloatArray:
        """The same shares in every pass, shape [B, L, G, C]."""
        return np.broadcast_to(share_LGC, (passes, *self.slots_LGC.shape))

    def times(self, load_BLE: FloatArray, share_BLGC: FloatArray) -> LayerTimes:
        """What the passes take with these shares."""
        return self.machine.layers(load_BLE, self.slots_LGC, share_BLGC)

    def layer_seconds(self, load_BLE: FloatArray, share_BLGC: FloatArray) -> FloatArray:
        """What each layer takes as whoever shares out tokens believes, shape [B, L]."""
        machine = self.believed or self.machine
        return machine.layers(load_BLE, self.slots_LGC, share_BLGC).layer_BL

    def balanced(self, load_BLE: FloatArray) -> FloatArray:
        """Shares that balance tokens, solved for every pass and layer, shape [B, L, G, C]."""
        passes, layers, experts = load_BLE.shape
        if not self.replicated:
            return self.spread(self.equal_LGC, passes)
        speed_G = self.machine.topology.speed_G
        if self.slots_LGC.shape[1] > MANY:
            if self._wide is None:
                self._wide = WideShares(self.slots_LGC, speed_G, experts)
            return self._wide.of(load_BLE)
        if self._graph is None or self._graph[0] != passes:
            tiled = np.tile(self.slots_LGC, (passes, 1, 1))
            self._graph = (passes, ReplicaGraph(tiled, speed_G, experts))
        flat = load_BLE.reshape(passes * layers, experts)
        return solve_shares(flat, self._graph[1]).share_LGC.reshape(passes, *self.slots_LGC.shape)

    def one_each(self) -> FloatArray:
        """Shares that use one replica of each expert, as few experts per GPU as can be, [L, G, C]."""
        if self._alone_LGC is None:
            even_LE = np.ones((len(self.slots_LGC), self.experts))
            self._alone_LGC = shares_of_one(even_LE, self.slots_LGC, self.machine.topology.speed_G)
        return self._alone_LGC


@runtime_checkable
class ShareRule(Protocol):
    """How replicas share their tokens.

    Attributes
    ----------
    name : str
        For people, and for `share_rule`.
    live : bool
        Whether shares follow each pass by time: then fractional shares of a plan are where the search
        starts, replicas that serve no token of a pass are idle in it, and what the pool releases is out of
        force.
    """

    name: str
    live: bool

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """What passes take, and which slots [L, G, C] serve in the last of them (None: all)."""
        ...


class EqualRule:
    """Equal over an expert's replicas."""

    name, live = "equal", False

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        return placed.times(load_BLE, placed.spread(placed.equal_LGC, len(load_BLE))), None


class PlannedRule:
    """As the plan says."""

    name, live = "planned", False

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        return placed.times(load_BLE, placed.spread(placed.start_LGC, len(load_BLE))), None


class BalancedRule:
    """Tokens balanced, solved for every pass and layer."""

    name, live = "balanced", False

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        return placed.times(load_BLE, placed.balanced(load_BLE)), None


class TimedRule:
    """Searched for by the time model (`solvers.timed`), balanced, one replica per expert, or as planned.

    Whichever is believed to be quickest in that pass and layer. Balancing tokens is dear where every pass has
    its own placement, so there the search stands alone; on many GPUs tokens are balanced instead. Shares that
    follow the actual loads (the first two) cost time (`SplitCost`); those that were ready before do not.
    """

    name, live = "timed", True

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        passes, layers, experts = load_BLE.shape
        if not placed.replicated:
            return placed.times(load_BLE, placed.spread(placed.equal_LGC, passes)), None
        ways = [placed.spread(placed.one_each(), passes)]
        if placed.planned_LGC is not None and placed.split is not None:
            ways.append(placed.spread(placed.planned_LGC, passes))
        ready = len(ways)
        searched = experts * int(placed.slots_LGC.shape[1]) <= SEARCHED
        if searched:
            share_RGC, _ = timed_shares(
                load_BLE.reshape(passes * layers, experts),
                placed.slots_LGC,
                placed.machine.topology.speed_G,
                placed.table,
                start_LGC=placed.start_LGC,
            )
            ways.append(share_RGC.reshape(passes, *placed.slots_LGC.shape))
        if not placed.brief or not searched:
            ways.append(placed.balanced(load_BLE))
        seconds_WBL = np.array([placed.layer_seconds(load_BLE, share_BLGC) for share_BLGC in ways])
        best_BL = seconds_WBL.argmin(0)
        split = placed.split
        if split is not None:
            quick_BL, live_BL = seconds_WBL[:ready].min(0), seconds_WBL[ready:].min(0)
            tokens_B = load_BLE.sum((1, 2)) / layers
            each = zip(tokens_B, quick_BL, live_BL, strict=True)
            pays = np.array([split.worth_it(*one, placed.rows) for one in each])
            live = seconds_WBL[ready:].argmin(0) + ready
            best_BL = np.where(pays & (live_BL < quick_BL), live, seconds_WBL[:ready].argmin(0))
        share_BLGC = np.choose(best_BL[:, :, None, None], ways)
        times = placed.times(load_BLE, share_BLGC)
        if split is not None:
            times = replace(times, split_BL=np.where(pays, split.seconds, 0.0))
        return times, share_BLGC[-1] > 0


class PerfectRule:
    """Every GPU gets the same, whatever it holds, and its part of the experts used: a bound, no system."""

    name, live = "oracle", False

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        machine = placed.machine
        gpus = machine.topology.gpus
        total_BL, active_BL = load_BLE.sum(2), (load_BLE > 0).sum(2)
        tokens_BLG = np.repeat(total_BL[:, :, None] / gpus, gpus, axis=2)
        each_BLG = np.repeat(np.maximum(active_BL / gpus, 1.0)[:, :, None], gpus, axis=2)
        seconds_BLG = machine.time.time(tokens_BLG, each_BLG, machine.topology.speed_G)
        seconds_BLG = np.where(tokens_BLG > 0, seconds_BLG, 0.0)
        network_BL = machine.all_to_all(tokens_BLG.reshape(-1, gpus)).reshape(total_BL.shape)
        times = LayerTimes(
            network_BL=network_BL,
            experts_BL=seconds_BLG.max(2),
            split_BL=np.zeros(total_BL.shape),
            mean_BL=seconds_BLG.mean(2),
            tokens_BLG=tokens_BLG,
            seconds_BLG=seconds_BLG,
            activated_BLG=each_BLG,
            used_BL=active_BL.astype(np.float64),
        )
        return times, None


class FoundRule:
    """Placed anew for every pass and layer by its own loads and the true times, nothing paid for: no system.

    What the slots allow, as far as a long search finds it; `PerfectRule` asks for a balance that whole
    replicas in so many slots cannot have.
    """

    name, live = "found", False
    KICKS = 64
    """Shakes of each layer: within 1 % of what is proven possible (tests/benchmarks/oracle_gap.py)."""

    def times(self, load_BLE: FloatArray, placed: Placed) -> tuple[LayerTimes, BoolArray | None]:
        """See `ShareRule`."""
        machine = placed.machine
        bytes_L = np.full(load_BLE.shape[1], machine.model.expert_bytes, dtype=np.int64)
        capacity_LG = machine.topology.capacity_LG(bytes_L, machine.model.experts)
        most = min(int(capacity_LG.max()), machine.model.experts)
        table = TimeTable.of(machine.time, most, per_token=machine.link_per_token)
        return LayerTimes.joined(
            [self._best(load_LE, placed, capacity_LG, table) for load_LE in load_BLE]
        ), None

    def _best(
        self, load_LE: FloatArray, placed: Placed, capacity_LG: IntArray, table: TimeTable
    ) -> LayerTimes:
        """The quicker of two searches for each layer: from what stands, and from balanced tokens."""
        machine = placed.machine
        starts = [placed.slots_LGC]
        if load_LE.any():
            starts.append(plan(load_LE, machine.topology, model=machine.model, solver="construct").slots_LGC)
        found = [
            timed_plan(
                load_LE,
                slots_LGC,
                capacity_LG,
                machine.topology.speed_G,
                table,
                load_G=np.zeros(machine.topology.gpus),
                kicks=self.KICKS,
            )
            for slots_LGC in starts
        ]
        best_L = np.argmin([one.value_L for one in found], axis=0)[:, None, None]
        slots_LGC = np.choose(best_L, [one.slots_LGC for one in found])
        share_LGC = np.choose(best_L, [one.share_LGC for one in found])
        return machine.layers(load_LE[None], slots_LGC, share_LGC[None])


SHARES: dict[str, ShareRule] = {
    rule.name: rule
    for rule in (EqualRule(), PlannedRule(), BalancedRule(), TimedRule(), PerfectRule(), FoundRule())
}  # fmt: skip
"""The rules by name."""


def share_rule(shares: ShareRule | str) -> ShareRule:
    """A rule, or the one of that name.

    Raises
    ------
    ProblemError
        If there is none.
    """
    if isinstance(shares, str):
        if shares not in SHARES:
            raise unknown("shares", shares, SHARES)
        return SHARES[shares]
    return shares
