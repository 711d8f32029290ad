"""The one truth about a plan's loads, times, moves, traffic and memory; every solver and report asks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, SlotArray, frozen
from moeless_opt.problems.spec.placement import held_LGE
from moeless_opt.problems.spec.time_model import TimeModel

if TYPE_CHECKING:
    from moeless_opt.problems.plan.plan import Plan
    from moeless_opt.problems.spec.problem import Problem
    from moeless_opt.problems.spec.topology import Topology
    from moeless_opt.problems.spec.wishes import Objective

__all__ = [
    "Moves",
    "activated",
    "count_moves",
    "gpu_times",
    "gpu_tokens",
    "imbalance",
    "move_seconds",
    "new_replicas",
    "node_traffic",
    "objective_vector",
    "risk",
    "scenario_value",
]


def gpu_tokens(load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Tokens that each GPU serves, shape [L, G]."""
    # an empty slot (-1) reads some other expert's load, and its share is 0
    return np.asarray(np.einsum("lgc,lgc->lg", _slot_loads(load_LE, slots_LGC), share_LGC))


def _slot_loads(load_LE: FloatArray, slots_LGC: SlotArray) -> FloatArray:
    """Load of the expert in each slot, shape [L, G, C]; anything where the slot is empty."""
    layers, experts = load_LE.shape
    if layers == 1:
        return np.asarray(load_LE[0][slots_LGC])
    return np.asarray(load_LE.ravel()[slots_LGC + (np.arange(layers) * experts)[:, None, None]])


def activated(load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> IntArray:
    """Replicas of each GPU that serve tokens, shape [L, G]."""
    load = _slot_loads(load_LE, slots_LGC)
    return np.asarray(((load > 0) & (share_LGC > 0) & (slots_LGC >= 0)).sum(2))


def gpu_times(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    speed_G: FloatArray,
    time: TimeModel | None = None,
) -> FloatArray:
    """Time of each GPU in each layer, shape [L, G], in the time model's unit.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens per expert.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        Expert in each slot (-1 empty), and the share of its tokens that the slot serves.
    speed_G : array, shape [G]
        Relative speeds.
    time : TimeModel, optional
        Tokens only by default.
    """
    tokens_LG = gpu_tokens(load_LE, slots_LGC, share_LGC)
    if time is None or time.counts_tokens_only:
        scale = 1.0 if time is None else time.token_cost
        return np.asarray(tokens_LG / speed_G if scale == 1.0 else tokens_LG * scale / speed_G)
    return time.time(tokens_LG, activated(load_LE, slots_LGC, share_LGC), speed_G)


def imbalance(time_LG: FloatArray, speed_G: FloatArray) -> FloatArray:
    """max / mean GPU time of each layer, shape [L]; 1 is perfect.

    The mean is weighted by speed, so that it is the time of a perfect balance of the same work
    (with equal speeds, the plain mean). A layer without any time counts as 1.
    """
    mean_L = time_LG @ (speed_G / speed_G.sum())
    top_L = time_LG.max(1)
    return np.asarray(np.divide(top_L, mean_L, out=np.ones_like(top_L), where=mean_L > 0))


def new_replicas(slots_LGC: SlotArray, before_LGC: SlotArray, experts: int) -> BoolArray:
    """Slots whose expert the GPU did not hold before, shape [L, G, C]."""
    had_LGE = held_LGE(before_LGC, experts)
    kept = np.take_along_axis(had_LGE, np.maximum(slots_LGC, 0).astype(np.int64), axis=2)
    return (slots_LGC >= 0) & ~kept


def move_seconds(
    topology: Topology, slots_LGC: SlotArray, before_LGC: SlotArray, experts: int, bytes_L: IntArray
) -> FloatArray:
    """Seconds of transfer of each layer's new replicas, each over the nearest link, one after the other [L].

    A replica comes from its own node if that held the expert, else from another node, else from the host.
    """
    had_LGE = held_LGE(before_LGC, experts)
    new_LGC = new_replicas(slots_LGC, before_LGC, experts)
    layer, gpu, slot = np.nonzero(new_LGC)
    expert = slots_LGC[layer, gpu, slot]
    in_node_LNE = np.stack([had_LGE[:, topology.node_G == n].any(1) for n in range(topology.nodes)], axis=1)
    near = in_node_LNE[layer, topology.node_G[gpu], expert]
    anywhere = in_node_LNE[layer, :, expert].any(1)
    links = topology.links
    rate = np.where(near, links.intra_node, np.where(anywhere, links.inter_node, links.host))
    seconds = links.latency + bytes_L[layer] / rate
    return np.asarray(np.bincount(layer, weights=seconds, minlength=len(slots_LGC)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moves(Record):
    """What a plan has to ship.

    Parameters
    ----------
    count : int
        Replicas on a GPU that did not hold the expert before.
    bytes : int
        Their weights (0 where the size of an expert is unknown).
    fraction : float
        `count` as a share of all replicas of the plan.
    count_L : array of int, shape [L]
        By layer.
    cold : bool
        Whether nothing was live before, so that every replica is loaded.
    """

    count: int
    bytes: int
    fraction: float
    count_L: IntArray
    cold: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "count_L", frozen(self.count_L))

    def __repr__(self) -> str:
        size = f", {self.bytes / 1e9:.3g} GB" if self.bytes else ""
        if self.cold:
            return f"Moves(cold start: {self.count} replicas to load{size})"
        return f"Moves({self.count} replicas{size}, {self.fraction:.2%} of the plan)"


def count_moves(slots_LGC: SlotArray, before_LGC: SlotArray | None, experts: int, bytes_L: IntArray) -> Moves:
    """Count the replicas that no warm GPU has.

    Parameters
    ----------
    slots_LGC, before_LGC : arrays of int32, shape [L, G, C]
        New placement, and the live one (None: nothing is live).
    experts : int
        Experts per layer.
    bytes_L : array of int, shape [L]
        Bytes of one replica in each layer.
    """
    filled_L = np.count_nonzero(slots_LGC >= 0, axis=(1, 2))
    if before_LGC is None:
        count_L = filled_L
    else:
        count_L = np.count_nonzero(new_replicas(slots_LGC, before_LGC, experts), axis=(1, 2))
    count = int(count_L.sum())
    return Moves(
        count=count,
        bytes=int(count_L @ bytes_L),
        fraction=count / max(int(filled_L.sum()), 1),
        count_L=count_L,
        cold=before_LGC is None,
    )


def node_traffic(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    node_G: IntArray,
    load_LNE: FloatArray | None = None,
) -> FloatArray:
    """Tokens of each layer that must leave their node, shape [L].

    A node keeps as many of an expert's tokens as its own replicas serve; the rest crosses.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens per expert.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        The plan.
    node_G : array of int, shape [G]
        Node of each GPU.
    load_LNE : array, shape [L, N, E], optional
        Tokens by source node; spread evenly over the nodes if unknown.
    """
    layers, experts = load_LE.shape
    nodes = int(node_G.max()) + 1
    served = np.zeros((layers, nodes, experts + 1))
    row_L = np.arange(layers)[:, None, None]
    np.add.at(served, (row_L, node_G[None, :, None], slots_LGC), share_LGC)  # -1 lands in the spare column
    served_LNE = served[:, :, :experts] * load_LE[:, None, :]
    source_LNE = load_LE[:, None, :] / nodes if load_LNE is None else load_LNE
    stays_L = np.minimum(served_LNE, source_LNE).sum((1, 2))
    return np.asarray(np.maximum(load_LE.sum(1) - stays_L, 0.0))


def risk(top_TL: FloatArray, weight_T: FloatArray | None, objective: Objective) -> FloatArray:
    """One value per layer from the values in each scenario, by the objective's risk measure.

    Parameters
    ----------
    top_TL : array, shape [T, L]
        Largest GPU time of each layer in each scenario.
    weight_T : array, shape [T], optional
        Weights of the scenarios, summing to 1; equal by default.
    objective : Objective
        Says ``expected``, ``worst`` or ``cvar``.
    """
    if weight_T is None:
        weight_T = np.full(top_TL.shape[0], 1 / top_TL.shape[0])
    if objective.risk == "worst":
        return np.asarray(top_TL.max(0))
    if objective.risk == "expected":
        return np.asarray(weight_T @ top_TL)
    order_TL = np.argsort(-top_TL, axis=0, kind="stable")
    weight_TL = weight_T[order_TL]
    tail = 1.0 - objective.cvar_alpha
    kept_TL = np.clip(tail - (np.cumsum(weight_TL, axis=0) - weight_TL), 0.0, weight_TL)
    return np.asarray((kept_TL * np.take_along_axis(top_TL, order_TL, axis=0)).sum(0) / tail)


def scenario_value(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> float:
    """Sum over the layers of the largest GPU time, over the scenarios as the objective says, shares fixed."""
    speed_G, time = problem.topology.speed_G, problem.time
    top_TL = np.array(
        [gpu_times(load_LE, slots_LGC, share_LGC, speed_G, time).max(1) for load_LE in problem.loads.load_TLE]
    )
    return float(risk(top_TL, problem.loads.weight_T, problem.objective).sum())


def objective_vector(problem: Problem, plan: Plan) -> dict[str, float]:
    """All objectives of a plan, whatever the priorities.

    Returns
    -------
    dict
        ``balance``: sum over the layers of the largest GPU time (over the scenarios by the
        objective's risk), in the time model's unit. ``moves``: bytes to ship, or replicas where the
        size of an expert is unknown. ``traffic``: tokens that leave their node. ``memory``: bytes
        held, or replicas.
    """
    by_node = problem.loads.load_LNE
    held_L = np.count_nonzero(plan.slots_LGC >= 0, axis=(1, 2))
    sized = bool(problem.bytes_L.any())
    return {
        "balance": scenario_value(problem, plan.slots_LGC, plan.share_LGC),
        "moves": float(plan.moves.bytes if sized else plan.moves.count),
        "traffic": float(
            node_traffic(
                problem.load_LE, plan.slots_LGC, plan.share_LGC, problem.topology.node_G, by_node
            ).sum()
        ),
        "memory": float(held_L @ problem.bytes_L if sized else held_L.sum()),
    }
