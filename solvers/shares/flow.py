"""Token shares of all layers at once: water-filling by coordinate descent, and an exact finish by flow.

One NumPy step water-fills every expert of one colour of the `ReplicaGraph` in every layer. A sweep over the
colours is a sweep of block coordinate descent on

    sum_g speed[g] (time[g])^2 / 2,

whose minimiser also minimises the largest time: the loads that a placement can attain form the base
polytope of a polymatroid, and the least-majorised point of such a polytope minimises every separable
symmetric convex function at once (Fujishige 1980, "Lexicographically optimal base of a polymatroid").

Bounds come from the same densities as in `lp`, taken over the sets of the k slowest GPUs: near
the optimum the critical set is such a prefix. The exact finish is Newton's method on the density
(Dinkelbach 1967; parametric flow as in Gallo, Grigoriadis and Tarjan 1989): ask a maximum flow whether
time T is attainable, and if it isn't take T from the density of its minimum cut. All unfinished layers
go into one flow network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.shares.graph import ReplicaGraph

__all__ = ["Shares", "descend", "solve_shares"]

_FLOW_UNITS = float(1 << 36)  # integer units in which a flow splits the mean load of a GPU
_OVERFULL = 1e280  # load of the column that swallows padding: above any real load, and its sums stay finite
_PRESWEEPS = 3  # sweeps before the exact finish: enough to order the GPUs
_EXACT = 1e-12  # relative gap below which a layer counts as solved


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Token shares of all layers, with the certificate.

    Attributes
    ----------
    share_LGC : array of float, shape [L, G, C]
        Fraction of its expert's tokens that a slot serves.
    time_LG : array of float, shape [L, G]
        GPU times (tokens over speed).
    bound_L : array of float, shape [L]
        Lower bound on the largest time of each layer, whatever the shares.
    critical_LG : array of bool, shape [L, G]
        GPU set whose density is the bound (see `problems.plan.bounds.density_bound`).
    """

    share_LGC: FloatArray
    time_LG: FloatArray
    bound_L: FloatArray
    critical_LG: BoolArray

    @property
    def time_L(self) -> FloatArray:
        """Largest GPU time of each layer."""
        largest: FloatArray = self.time_LG.max(axis=1)
        return largest

    @property
    def gap_L(self) -> FloatArray:
        """Proven relative distance from the optimum."""
        gap: FloatArray = self.time_L / np.where(self.bound_L > 0.0, self.bound_L, 1.0) - (self.bound_L > 0.0)
        return np.maximum(gap, 0.0)


def solve_shares(
    load_LE: FloatArray,
    slots_LGC: NDArray[Any] | ReplicaGraph,
    speed_G: FloatArray | None = None,
    *,
    tolerance: float = 1e-3,
    max_sweeps: int = 60,
    exact: bool = True,
    worth_L: FloatArray | None = None,
) -> Shares:
    """Split every expert's tokens over its replicas so that the largest GPU time is least.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    slots_LGC : array of int, shape [L, G, C] or ReplicaGraph
        Placement; pass a `ReplicaGraph` to prepare it once for many loads.
    speed_G : array of float, shape [G], optional
        Relative speeds; ones by default. Ignored with a graph, which has them.
    tolerance : float
        Descent alone: stop once every layer is proven within this relative gap.
    max_sweeps : int
        Descent alone: stop after so many sweeps anyway; the gap reached is in the result.
    exact : bool
        Few sweeps, then maximum flow: the optimum to rounding (1e-9) in every layer. On loads near
        balance this is also the faster way. False is descent alone, which needs no ortools.
    worth_L : array of float, shape [L], optional
        Times above which a layer is of no use: it is left as it is once it is proven to need more.

    Returns
    -------
    Shares
        Shares, times and bounds.

    Examples
    --------
    >>> import numpy as np
    >>> solve_shares(np.array([[6.0, 4.0, 2.0]]), np.array([[[0, 1], [1, 2]]]), exact=True).time_L
    array([6.])
    """
    graph = _graph(slots_LGC, speed_G, load_LE)
    load_LX, base_LG = graph.loads(load_LE)
    if exact:
        # Enough descent to order the GPUs; flow does the rest.
        token_LXR, time_LG = descend(graph, load_LX, base_LG, tolerance=_EXACT, max_sweeps=_PRESWEEPS)
        worth_L = np.full(len(load_LE), np.inf) if worth_L is None else worth_L
        token_LXR, time_LG, bound_L, critical_LG = _finish(
            graph, load_LX, base_LG, token_LXR, time_LG, worth_L
        )
    else:
        token_LXR, time_LG = descend(graph, load_LX, base_LG, tolerance=tolerance, max_sweeps=max_sweeps)
        bound_L, critical_LG = graph.bound(load_LX, base_LG, time_LG)
    return Shares(
        share_LGC=graph.to_shares(load_LX, token_LXR),
        time_LG=time_LG,
        bound_L=bound_L,
        critical_LG=critical_LG,
    )


def _graph(
    slots_LGC: NDArray[Any] | ReplicaGraph, speed_G: FloatArray | None, load_LE: FloatArray
) -> ReplicaGraph:
    if isinstance(slots_LGC, ReplicaGraph):
        return slots_LGC
    speed_G = np.ones(slots_LGC.shape[1]) if speed_G is None else speed_G
    return ReplicaGraph(slots_LGC, speed_G, load_LE.shape[1])


def descend(
    graph: ReplicaGraph,
    load_LX: FloatArray,
    base_LG: FloatArray,
    *,
    tolerance: float,
    max_sweeps: int,
    check: int = 4,
) -> tuple[FloatArray, FloatArray]:
    """Block coordinate descent from the equal split: tokens [layers, X, R] and GPU times [layers, GPUs].

    The gap is examined every `check` sweeps.
    """
    L, G, _ = graph.shape
    X, R = graph.gpu_LXR.shape[1:]
    # The spare column of `work` is overfull, so padding never gets a token.
    work = np.concatenate([base_LG, np.full((L, 1), _OVERFULL)], axis=1).reshape(-1)
    padded_LX = np.concatenate([load_LX, np.zeros((L, 1))], axis=1)
    uniform = bool(np.all(graph.speed_G == 1.0))
    steps = []
    for colour in graph.colours:
        load_LM = np.take_along_axis(padded_LX, colour.member_LM, axis=1)
        live_RLM = work[colour.cell_RLM] < _OVERFULL
        token_RLM = np.where(live_RLM, load_LM / np.maximum(live_RLM.sum(axis=0), 1), 0.0)
        work[colour.cell_RLM] += token_RLM
        steps.append((colour, load_LM, token_RLM))
    # With every speed 1 the divisions fall away.
    fill = _fill_uniform if uniform else _fill
    for sweep in range(1, max_sweeps + 1):
        for colour, load_LM, token_RLM in steps:
            other_RLM = work[colour.cell_RLM]
            other_RLM -= token_RLM
            fill(other_RLM, load_LM, colour.speed_RLM, token_RLM)
            other_RLM += token_RLM
            work[colour.cell_RLM] = other_RLM
        if sweep % check == 0 and sweep < max_sweeps:
            time_LG = work.reshape(L, G + 1)[:, :G] / graph.speed_G
            bound_L, _ = graph.bound(load_LX, base_LG, time_LG)
            if np.all(time_LG.max(axis=1) <= bound_L * (1.0 + tolerance)):
                break
    token_LXR = np.zeros((L, X + 1, R))
    for colour, _, token_RLM in steps:
        token_LXR[np.arange(L)[:, None], colour.member_LM, : len(token_RLM)] = token_RLM.transpose(1, 2, 0)
    return token_LXR[:, :X], work.reshape(L, G + 1)[:, :G] / graph.speed_G


def _fill_uniform(
    other_RLM: FloatArray, load_LM: FloatArray, speed_RLM: FloatArray, out_RLM: FloatArray
) -> None:
    """Pour each expert's load over the other loads: the level is the least over prefixes of sorted GPUs."""
    R = len(other_RLM)
    if R == 2:
        low, high = other_RLM
        level_LM = np.minimum(np.minimum(low, high) + load_LM, 0.5 * (low + high + load_LM))
    else:
        sorted_RLM = np.sort(other_RLM, axis=0)
        total_LM = sorted_RLM[0] + load_LM
        level_LM = total_LM.copy()
        for r in range(1, R):
            total_LM += sorted_RLM[r]
            np.minimum(level_LM, total_LM / (r + 1), out=level_LM)
    np.subtract(level_LM, other_RLM, out=out_RLM)
    np.maximum(out_RLM, 0.0, out=out_RLM)


def _fill(other_RLM: FloatArray, load_LM: FloatArray, speed_RLM: FloatArray, out_RLM: FloatArray) -> None:
    """As `_fill_uniform`, with speeds: level = (load + other loads) / speeds over the best prefix."""
    order_RLM = np.argsort(other_RLM / speed_RLM, axis=0, kind="stable")
    load_RLM = np.cumsum(np.take_along_axis(other_RLM, order_RLM, axis=0), axis=0) + load_LM
    level_LM = (load_RLM / np.cumsum(np.take_along_axis(speed_RLM, order_RLM, axis=0), axis=0)).min(axis=0)
    np.subtract(level_LM * speed_RLM, other_RLM, out=out_RLM)
    np.maximum(out_RLM, 0.0, out=out_RLM)


def _finish(
    graph: ReplicaGraph,
    load_LX: FloatArray,
    base_LG: FloatArray,
    token_LXR: FloatArray,
    time_LG: FloatArray,
    worth_L: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray, BoolArray]:
    """Newton's method on the density for the layers that descent left open, all in one flow network."""
    bound_L, critical_LG = graph.bound(load_LX, base_LG, time_LG)
    # No GPU is faster than its fixed load: from here on every GPU has room for at least that.
    alone_LG = base_LG / graph.speed_G
    worst_L = alone_LG.argmax(axis=1)
    single_L = np.flatnonzero(alone_LG.max(axis=1) > bound_L)
    bound_L[single_L] = alone_LG.max(axis=1)[single_L]
    critical_LG[single_L] = np.arange(len(graph.speed_G)) == worst_L[single_L, None]
    token_LXR, time_LG = token_LXR.copy(), time_LG.copy()
    open_L = np.flatnonzero(time_LG.max(axis=1) > bound_L * (1.0 + _EXACT))
    for _ in range(len(graph.speed_G) + 1):  # each cut is a denser set: at most G of them
        open_L = open_L[bound_L[open_L] <= worth_L[open_L]]
        if not len(open_L):
            break
        token_OXR, cut_OG, full_O = _flow(graph, load_LX, base_LG, bound_L, open_L)
        done_L = open_L[full_O]
        token_LXR[done_L] = token_OXR[full_O]
        time_LG[done_L] = gpu_times(graph, base_LG, token_LXR)[done_L]
        open_L, cut_OG = open_L[~full_O], cut_OG[~full_O]
        if len(open_L):
            value_O = _density_of(graph, load_LX[open_L], base_LG[open_L], cut_OG, open_L)
            rises_O = value_O > bound_L[open_L] * (1.0 + 1e-15)
            bound_L[open_L[rises_O]] = value_O[rises_O]
            critical_LG[open_L[rises_O]] = cut_OG[rises_O]
            # A cut no denser than the bound is rounding in the flow's integers: raise T by one unit of it.
            bound = bound_L[open_L[~rises_O]]
            bound_L[open_L[~rises_O]] = bound * (1.0 + 1e-10)
    final_L = _density_of(graph, load_LX, base_LG, critical_LG, np.arange(len(load_LX)))
    return token_LXR, time_LG, final_L, critical_LG


def gpu_times(graph: ReplicaGraph, base_LG: FloatArray, token_LXR: FloatArray) -> FloatArray:
    """Times of the GPUs when the replicated experts' tokens are split so."""
    L, G, _ = graph.shape
    cell_LXR = graph.gpu_LXR + np.arange(L)[:, None, None] * (G + 1)
    load = np.bincount(cell_LXR.reshape(-1), weights=token_LXR.reshape(-1), minlength=L * (G + 1))
    return (base_LG + load.reshape(L, G + 1)[:, :G]) / graph.speed_G


def _density_of(
    graph: ReplicaGraph, load_OX: FloatArray, base_OG: FloatArray, set_OG: BoolArray, layers: IntArray
) -> FloatArray:
    """Density of one GPU set per layer of `layers`."""
    padded = np.concatenate([set_OG, np.ones((len(set_OG), 1), dtype=bool)], axis=1)
    gpu_OXR = graph.gpu_LXR[layers]
    captive_OX = padded[np.arange(len(set_OG))[:, None, None], gpu_OXR].all(axis=2)
    load_O = np.where(captive_OX, load_OX, 0.0).sum(axis=1) + np.where(set_OG, base_OG, 0.0).sum(axis=1)
    density_O: FloatArray = load_O / np.maximum(np.where(set_OG, graph.speed_G, 0.0).sum(axis=1), 1e-300)
    return density_O


def _flow(
    graph: ReplicaGraph, load_LX: FloatArray, base_LG: FloatArray, time_L: FloatArray, layers: IntArray
) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Can the open layers meet their times? Tokens, GPUs on the source's side of the cut, yes or no."""
    from ortools.graph.python import max_flow

    K, G = len(layers), len(graph.speed_G)
    gpu_OXR = graph.gpu_LXR[layers]
    X = gpu_OXR.shape[1]
    # Integer units per layer: the mean GPU load is 2^36 of them, so a unit is 1.5e-11 of it.
    unit_O = np.maximum(time_L[layers], 1e-300) / _FLOW_UNITS
    supply_OX = np.floor(load_LX[layers] / unit_O[:, None]).astype(np.int64)
    room_OG = np.ceil((time_L[layers, None] * graph.speed_G - base_LG[layers]) / unit_O[:, None])
    room_OG = np.maximum(room_OG, 0.0).astype(np.int64)
    expert_node = 2 + np.arange(K * X).reshape(K, X)
    gpu_node = 2 + K * X + np.arange(K * G).reshape(K, G)
    layer_p, expert_p, replica_p = np.nonzero(gpu_OXR < G)
    tail = np.concatenate(
        [np.zeros(K * X, dtype=np.int64), expert_node[layer_p, expert_p], gpu_node.reshape(-1)]
    )
    head = np.concatenate(
        [
            expert_node.reshape(-1),
            gpu_node[layer_p, gpu_OXR[layer_p, expert_p, replica_p]],
            np.ones(K * G, dtype=np.int64),
        ]
    )
    capacity = np.concatenate([supply_OX.reshape(-1), supply_OX[layer_p, expert_p], room_OG.reshape(-1)])
    network = max_flow.SimpleMaxFlow()
    arcs = network.add_arcs_with_capacity(tail, head, capacity)
    if network.solve(0, 1) != network.OPTIMAL:
        raise ProblemError("load_LE", "is out of range for the flow, would be finite numbers below 1e300")
    flow = np.asarray(network.flows(arcs))
    pairs = slice(K * X, K * X + len(layer_p))
    token_OXR = np.zeros(gpu_OXR.shape)
    token_OXR[layer_p, expert_p, replica_p] = flow[pairs]
    left_OX = supply_OX - flow[: K * X].reshape(K, X)
    full_O = (left_OX == 0).all(axis=1)
    # Floors dropped less than a unit per expert: scale the split back to the whole load.
    total_OX = token_OXR.sum(axis=2)
    token_OXR *= (load_LX[layers] / np.where(total_OX > 0.0, total_OX, 1.0))[..., None]
    side = np.zeros(2 + K * (X + G), dtype=bool)
    side[network.get_source_side_min_cut()] = True
    return token_OXR, side[2 + K * X :].reshape(K, G), full_O
