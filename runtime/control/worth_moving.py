"""Which layers of a plan are worth their moves: passes drawn from a window's loads, timed before and after.

A window of a few short passes (decode) says little of the next ones: its loads are sums of few tokens, and a
plan that fits the sums moves half of the slots for nothing. So passes are drawn from the loads, with as many
tokens as the window's had (multinomially; where sizes differ, as many as the pass of a token has, since large
passes are what takes the time), and both placements serve each of them as well as they can: with shares
searched for by time, which cost what sharing costs, or with one replica of each expert, which is ready. A
layer changes where the mean saving is a share of its time, and well above what chance makes of it; all others
stay as they are. No clock is read and the draws are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, SlotArray, number, whole
from moeless_opt.problems.plan import Plan, TimeTable
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec import Loads, ModelSpec, Placement, Problem, TimeModel, Topology
from moeless_opt.runtime.control.decision import same_replicas
from moeless_opt.solvers.core import Clock, widened
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.timed import shares_of_one, timed_shares

__all__ = ["WorthMoving"]


class WorthMoving:
    """A planner whose plans change only the layers that gain.

    Parameters
    ----------
    planner : callable
        From loads [L, E] and live slots [L, G, C] to a `Plan`.
    topology, model : Topology, ModelSpec
        What plans are for.
    time : callable
        Gives the experts' times as they are believed at the moment, in any unit.
    per_token : float
        Time of the link for each token-expert pair of the GPU that serves most.
    split : float
        What a layer waits for shares that follow its loads, in the same unit.
    gain : float
        Share of its time that a layer has to save.
    draws : int
        Passes that are drawn.
    """

    SURE = 2.0
    """Standard errors that a saving has to lie above nothing."""

    def __init__(
        self,
        planner: Callable[[FloatArray, SlotArray], Plan],
        topology: Topology,
        model: ModelSpec,
        time: Callable[[], TimeModel],
        *,
        per_token: float = 0.0,
        split: float = 0.0,
        gain: float = 0.02,
        draws: int = 16,
    ) -> None:
        self.planner, self.topology, self.model, self.time = planner, topology, model, time
        self.per_token, self.split = number("per_token", per_token), number("split", split)
        self.gain, self.draws = number("gain", gain), whole("draws", draws, low=2)

    @property
    def at_speeds(self) -> Callable[[FloatArray], WorthMoving] | None:
        """Makes the same for GPUs of relative speeds [G]; None if the planner cannot be told of them."""
        told = getattr(self.planner, "at_speeds", None)
        if not callable(told):
            return None

        def made(speed_G: FloatArray) -> WorthMoving:
            found = copy(self)
            found.planner, found.topology = told(speed_G), self.topology.replace(speed_G=speed_G)
            return found

        return made

    def plan_window(self, load_LE: FloatArray, live_LGC: SlotArray, passes: float) -> Plan:
        """Plan from the loads of so many passes; verified."""
        began = Clock.begin()
        wanted = self.planner(load_LE, live_LGC)
        if same_replicas(wanted.slots_LGC, live_LGC):
            return wanted
        rows = np.array([not same_replicas(a[None], b[None]) for a, b in _layers(wanted.slots_LGC, live_LGC)])
        pays_L = rows.copy()
        pays_L[rows] = self._pays(load_LE[rows], live_LGC[rows], wanted.slots_LGC[rows], passes)
        if pays_L.all():
            return wanted
        width = max(wanted.slots_LGC.shape[2], live_LGC.shape[2])
        slots_LGC, live = widened(wanted.slots_LGC, width), widened(live_LGC, width)
        share_LGC = np.zeros(slots_LGC.shape)
        share_LGC[:, :, : wanted.share_LGC.shape[2]] = wanted.share_LGC
        stays_L = ~pays_L
        slots_LGC[stays_L] = live[stays_L]
        share_LGC[stays_L], _ = timed_shares(
            load_LE[stays_L] / passes, live[stays_L], self.topology.speed_G, self._table(live_LGC)
        )
        problem = Problem(
            loads=Loads(load_TLE=load_LE),
            topology=self.topology,
            model=self.model,
            current=Placement(slots_LGC=live_LGC, experts=load_LE.shape[1]),
        )
        built = Built(slots_LGC=slots_LGC, share_LGC=share_LGC)
        plan = finish(problem, built, solver="worth-moving", began=began, certify=False)
        verify(problem, plan)
        return plan

    def _table(self, slots_LGC: SlotArray) -> TimeTable:
        most = min(slots_LGC.shape[2], self.model.experts)
        return TimeTable.of(self.time(), most, per_token=self.per_token)

    def _pays(
        self, load_LE: FloatArray, live_LGC: SlotArray, wanted_LGC: SlotArray, passes: float
    ) -> BoolArray:
        """Which layers end sooner by the wanted placement in drawn passes, shape [L]."""
        total_L = load_LE.sum(1)
        tokens_L = np.maximum(np.rint(total_L / passes), np.minimum(total_L, 1.0)).astype(np.int64)
        share_LE = load_LE / np.where(total_L > 0, total_L, 1.0)[:, None]
        share_LE[total_L <= 0, 0] = 1.0
        chance = np.random.default_rng(0)
        drawn = chance.multinomial(tokens_L, share_LE, size=(self.draws, len(load_LE))).astype(np.float64)
        before_DL, after_DL = (self._seconds(drawn, slots) for slots in (live_LGC, wanted_LGC))
        saved_DL = before_DL - after_DL
        error_L = saved_DL.std(0, ddof=1) / np.sqrt(self.draws)
        return np.asarray(saved_DL.mean(0) > np.maximum(self.gain * before_DL.mean(0), self.SURE * error_L))

    def _seconds(self, load_DLE: FloatArray, slots_LGC: SlotArray) -> FloatArray:
        """Time of the slowest GPU in each drawn pass, shape [D, L]."""
        draws, layers, experts = load_DLE.shape
        table, speed_G = self._table(slots_LGC), self.topology.speed_G
        flat = load_DLE.reshape(-1, experts)
        _, live_R = timed_shares(flat, slots_LGC, speed_G, table)
        even_LE = np.ones((layers, experts))
        alone_LGC = shares_of_one(even_LE, slots_LGC, speed_G) > 0
        one_LGC = np.where(alone_LGC, slots_LGC, -1).astype(np.int32)
        _, ready_R = timed_shares(flat, one_LGC, speed_G, table, kicks=0)
        return np.minimum(live_R + self.split, ready_R).reshape(draws, layers)


def _layers(a_LGC: SlotArray, b_LGC: SlotArray) -> list[tuple[SlotArray, SlotArray]]:
    return list(zip(a_LGC, b_LGC, strict=True))
