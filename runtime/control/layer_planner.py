"""Plans for the next pass, or for one layer of it, in microseconds: the planner of the per-layer mode.

It plans by the time model itself (tokens, activated experts and the link), from what each GPU holds. A
replica is loaded only if the layer ends sooner for it: loading is hidden behind the layers that run before
it, what is left is waited for, and besides a load has to save a share of the layer's time (`gain`), because
the forecast may be wrong and bytes are not free.

Stateless: the same loads and the same placement give the same plan, on every rank. It knows slots (or
memory), speeds and links; limits such as pins or failure domains are for `moeless_opt.plan`.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import Plan, TimeTable
from moeless_opt.problems.plan.verify import check_slots, verify
from moeless_opt.problems.spec import Loads, ModelSpec, Placement, Problem, TimeModel, Topology
from moeless_opt.solvers.core import Clock
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.timed import timed_plan, warm_timed

__all__ = ["LayerPlanner"]


class LayerPlanner:
    """Plan by time from what is live.

    Parameters
    ----------
    topology : Topology
        GPUs, slots or memory, links.
    model : ModelSpec
        Gives the experts and their bytes.
    time : TimeModel
        Of a GPU's experts, in seconds.
    per_token : float
        Seconds of the link for each token-expert pair of the GPU that serves most.
    distance : int
        Layers that run between a prediction and the layer that it is for: they hide loading.
    gain : float
        Share of its time that a layer has to save for each replica that is loaded.
    kicks : int, optional
        Search effort, see `timed_plan`.

    Raises
    ------
    ProblemError
        If times are not in seconds.
    """

    name = "per-layer"

    def __init__(
        self,
        topology: Topology,
        model: ModelSpec,
        time: TimeModel,
        *,
        per_token: float = 0.0,
        distance: int = 1,
        gain: float = 0.02,
        kicks: int | None = None,
    ) -> None:
        self.topology, self.model = topology, model
        self.distance = whole("distance", distance, low=1)
        self.gain = number("gain", gain)
        self.kicks = None if kicks is None else whole("kicks", kicks)
        bytes_L = np.full(model.layers, model.expert_bytes, dtype=np.int64)
        self.capacity_LG: IntArray = topology.capacity_LG(bytes_L, model.experts)
        self.per_token = number("per_token", per_token)
        self.plan_by(time)
        links = topology.links
        slowest = links.inter_node if topology.nodes > 1 else links.intra_node
        self.load_G: FloatArray = np.full(topology.gpus, links.latency + model.expert_bytes / slowest)
        warm_timed()  # compiled kernels load (or compile) now, not in front of the first batch

    def plan_by(self, time: TimeModel) -> None:
        """Plan by these times from now on: what was learnt since (see `learnt_times`), in seconds."""
        if time.unit != "s":
            raise ProblemError("time.unit", f"is {time.unit!r}, must be 's': loading is weighed against time")
        most = min(int(self.capacity_LG.max()), self.model.experts)
        self.time, self.table = time, TimeTable.of(time, most, per_token=self.per_token)

    def expected_L(self, load_LE: FloatArray) -> FloatArray:
        """Seconds of layers in perfect balance: what hides the loading of the layers after them."""
        total_L = load_LE.sum(1)
        mean_L = total_L / self.topology.gpus
        each = max(self.model.experts // self.topology.gpus, 1)
        each = min(each, len(self.table.table_AK) - 1)
        speed = float(self.topology.speed_G.mean())
        seconds_L = self.time.time(mean_L, each, speed) + self.per_token * mean_L / speed
        return np.where(total_L > 0, seconds_L, 0.0)

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        """Plan all layers; verified, without a bound."""
        began = Clock.begin()
        expected_L = self.expected_L(load_LE)
        # Layer l's weights load while the `distance` layers before it run; before layer 0, the last pass's.
        lead_L = sum((np.roll(expected_L, d) for d in range(1, self.distance + 1)), np.zeros(len(load_LE)))
        found = timed_plan(
            load_LE,
            live_LGC,
            self.capacity_LG[: len(load_LE)],
            self.topology.speed_G,
            self.table,
            load_G=self.load_G,
            lead_L=lead_L,
            price_L=self.gain * expected_L,
            kicks=self.kicks,
        )
        problem = Problem(
            loads=Loads(load_TLE=load_LE),
            topology=self.topology,
            model=self.model,
            time=self.time,
            current=Placement(slots_LGC=live_LGC, experts=load_LE.shape[1]),
        )
        built = Built(slots_LGC=found.slots_LGC, share_LGC=found.share_LGC)
        plan = finish(problem, built, solver=self.name, began=began, certify=False)
        verify(problem, plan)
        return plan

    def plan_layer(self, index: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        """Slots of one layer, shape [G, C]; checked against the rules of a placement.

        Parameters
        ----------
        index : int
            Its place on axis L.
        load_E : array, shape [E]
            Tokens expected.
        slots_GC : array of int32, shape [G, C]
            What each GPU holds.
        """
        load_1E = np.ascontiguousarray(load_E, dtype=np.float64)[None]
        capacity_1G = self.capacity_LG[index : index + 1]
        expected_1 = self.expected_L(load_1E)
        slots_1GC = timed_plan(
            load_1E,
            np.ascontiguousarray(slots_GC, dtype=np.int32)[None],
            capacity_1G,
            self.topology.speed_G,
            self.table,
            load_G=self.load_G,
            lead_L=self.distance * expected_1,
            price_L=self.gain * expected_1,
            kicks=self.kicks,
        ).slots_LGC
        check_slots(slots_1GC[0], load_1E.shape[1], capacity_1G[0])
        return np.asarray(slots_1GC[0])
