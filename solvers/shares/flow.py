"""Token shares of all layers at once: water-filling by coordinate descent, and an exact finish by flow.

Only experts with several replicas have a choice, about one in ten. `ReplicaGraph` gathers them once per
placement, and colours them so that experts of one colour share no GPU: then one NumPy step
water-fills every expert of that colour in every layer. A sweep over the colours is a sweep of
block coordinate descent on

    sum_g speed[g] (time[g])^2 / 2,

whose minimiser also minimises the largest time: the loads that a placement can attain form the base
polytope of a polymatroid, and the least-majorised point of such a polytope minimises every separable
symmetric convex function at once (Fujishige 1980, "Lexicographically optimal base of a polymatroid").

Bounds come from the same densities as in `share_lp`, taken over the sets of the k slowest GPUs: near
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

from moeless_opt.problems.errors import ProblemError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FLOW_UNITS = float(1 << 36)  # integer units in which a flow splits the mean load of a GPU
_OVERFULL = 1e280  # load of the column that swallows padding: above any real load, and its sums stay finite
_PRESWEEPS = 3  # sweeps before the exact finish: enough to order the GPUs
_EXACT = 1e-12  # relative gap below which a layer counts as solved


@dataclass(frozen=True, slots=True)
class ColourClass:
    """Experts that share no GPU within their layer: padded tables over [replicas, layers, members].

    `member_LM` indexes the expert axis X of the graph (X itself where padded), `cell_RLM` is a flat index
    into a [layers, GPUs + 1] array (the last column swallows the padding), `speed_RLM` the speed there.
    Replicas come first because NumPy reduces a short leading axis several times faster than a short
    trailing one.
    """

    member_LM: Ints
    cell_RLM: Ints
    speed_RLM: Floats


class ReplicaGraph:
    """The replicated experts of a placement, laid out for batched share solvers.

    Parameters
    ----------
    slots_LGC : int array [layers, GPUs, slots]
        Expert in each slot, -1 where empty.
    speed_G : float array [GPUs]
        Relative speeds, positive.
    experts : int
        Experts per layer.

    Attributes
    ----------
    expert_LX : int array [layers, X]
        Replicated experts of each layer, most replicas first; `experts` where padded.
    gpu_LXR : int array [layers, X, R]
        GPUs of their replicas, ascending; the number of GPUs where padded.
    slot_LXR : int array [layers, X, R]
        Flat position of the replica in `slots_LGC`; its size where padded.
    colours : list of ColourClass
        The order of a sweep.

    Raises
    ------
    ProblemError
        An expert has no replica.
    """

    def __init__(self, slots_LGC: NDArray[Any], speed_G: Floats, experts: int) -> None:
        self.slots_LGC = slots_LGC
        self.speed_G: Floats = np.asarray(speed_G, dtype=np.float64)
        self.experts = experts
        L, G, C = slots_LGC.shape
        self.shape = (L, G, C)
        flat = slots_LGC.reshape(-1)
        layer_of = np.repeat(np.arange(L) * (experts + 1), G * C)
        # Empty slots count as an extra expert at the end of the layer's range.
        self._key = layer_of + np.where(flat < 0, experts, flat)
        count_LE = np.bincount(self._key, minlength=L * (experts + 1)).reshape(L, experts + 1)
        self.replicas_LE: Ints = count_LE[:, :experts]
        if self.replicas_LE.min(initial=1) < 1:
            layer, expert = np.argwhere(self.replicas_LE < 1)[0].tolist()
            raise ProblemError(
                "slots_LGC", f"layer {layer}: expert {expert} has no replica, would be one or more"
            )
        count_LE = count_LE.copy()
        count_LE[:, experts] = 0
        self._gather(count_LE)
        self._place_singles(count_LE)
        self.colours = self._colour()

    def _gather(self, count_LE: Ints) -> None:
        """Table the replicas of replicated experts: sort by layer, replicas (descending), expert, GPU."""
        L, G, C = self.shape
        replicas = count_LE.reshape(-1)[self._key]
        picked = np.flatnonzero(replicas > 1)
        number_L = np.count_nonzero(count_LE > 1, axis=1)
        self.width = X = int(number_L.max(initial=0))
        R = int(replicas.max(initial=1))
        self.expert_LX: Ints = np.full((L, X), self.experts, dtype=np.int64)
        self.gpu_LXR: Ints = np.full((L, X, R), G, dtype=np.int64)
        self.slot_LXR: Ints = np.full((L, X, R), L * G * C, dtype=np.int64)
        # Rank of each replicated expert in its layer, by replicas; its key finds it again.
        order_LX = np.argsort(-count_LE, axis=1, kind="stable")[:, :X]
        live_LX = np.arange(X) < number_L[:, None]
        self.expert_LX[live_LX] = order_LX[live_LX]
        rank = np.zeros(L * (self.experts + 1), dtype=np.int64)
        rank[(np.arange(L)[:, None] * (self.experts + 1) + order_LX)[live_LX]] = np.nonzero(live_LX)[1]
        key = self._key[picked]
        place = np.argsort(key, kind="stable")  # slots are in GPU order already
        key, picked = key[place], picked[place]
        first = np.r_[True, key[1:] != key[:-1]] if len(key) else np.zeros(0, dtype=bool)
        start = np.flatnonzero(first)
        within = np.arange(len(key)) - np.repeat(start, np.diff(np.r_[start, len(key)]))
        layer = picked // (G * C)
        self.gpu_LXR[layer, rank[key], within] = picked % (G * C) // C
        self.slot_LXR[layer, rank[key], within] = picked

    def _place_singles(self, count_LE: Ints) -> None:
        """Note the one GPU of every other expert."""
        _, G, C = self.shape
        self.single = np.flatnonzero(count_LE.reshape(-1)[self._key] == 1)
        self.single_load = (self.single // (G * C)) * self.experts + self.slots_LGC.reshape(-1)[self.single]
        self.single_gpu = (self.single // (G * C)) * (G + 1) + self.single % (G * C) // C

    def _colour(self) -> list[ColourClass]:
        """Colour experts greedily, most replicas first: a bit mask per GPU holds the colours seen there."""
        L, G, _ = self.shape
        X = self.width
        if X == 0:
            return []
        cell_LXR = self.gpu_LXR + np.arange(L)[:, None, None] * (G + 1)
        live_LX = self.expert_LX < self.experts
        colour_LX = np.full((L, X), -1, dtype=np.int64)
        seen = np.zeros(L * (G + 1), dtype=np.uint64)
        one = np.uint64(1)
        spill: list[tuple[int, int]] = []
        for x in range(X):
            cell_LR = cell_LXR[:, x]
            mask_L = np.bitwise_or.reduce(seen[cell_LR], axis=1)
            free_L = ~mask_L & (mask_L + one)  # lowest colour that no GPU of this expert has seen
            full_L = (free_L == 0) & live_LX[:, x]
            if full_L.any():
                spill += [(int(layer), x) for layer in np.flatnonzero(full_L)]
            colour_LX[:, x] = np.where(
                live_LX[:, x] & ~full_L, np.frexp(free_L.astype(np.float64))[1].astype(np.int64) - 1, -1
            )
            seen[cell_LR] |= free_L[:, None]
            seen[G :: G + 1] = 0
        for extra, (layer, x) in enumerate(spill):  # more than 64 colours: each its own
            colour_LX[layer, x] = 64 + extra
        return [self._class(colour_LX == k, cell_LXR) for k in range(int(colour_LX.max(initial=-1)) + 1)]

    def _class(self, in_LX: NDArray[np.bool_], cell_LXR: Ints) -> ColourClass:
        L, G, _ = self.shape
        M = int(in_LX.sum(axis=1).max())
        order_LM = np.argsort(~in_LX, axis=1, kind="stable")[:, :M]
        live_LM = np.take_along_axis(in_LX, order_LM, axis=1)
        member_LM = np.where(live_LM, order_LM, in_LX.shape[1])
        gpu_LMR = np.where(
            live_LM[..., None], np.take_along_axis(self.gpu_LXR, order_LM[..., None], axis=1), G
        )
        width = max(1, int((gpu_LMR < G).sum(axis=2).max()))
        gpu_LMR = gpu_LMR[..., :width]
        cell_LMR = gpu_LMR + np.arange(L)[:, None, None] * (G + 1)
        cell_RLM = np.ascontiguousarray(cell_LMR.transpose(2, 0, 1))
        speed_RLM = np.ascontiguousarray(np.r_[self.speed_G, 1.0][gpu_LMR].transpose(2, 0, 1))
        return ColourClass(member_LM, cell_RLM, speed_RLM)

    def loads(self, load_LE: Floats) -> tuple[Floats, Floats]:
        """Loads of the replicated experts [layers, X] and the fixed load of every GPU [layers, GPUs]."""
        L, G, _ = self.shape
        load = np.ascontiguousarray(load_LE, dtype=np.float64)
        base = np.bincount(self.single_gpu, weights=load.reshape(-1)[self.single_load], minlength=L * (G + 1))
        padded = np.concatenate([load, np.zeros((L, 1))], axis=1)
        base_LG: Floats = base.reshape(L, G + 1)[:, :G].astype(np.float64)
        return np.take_along_axis(padded, self.expert_LX, axis=1), base_LG

    def bound(self, load_LX: Floats, base_LG: Floats, time_LG: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Largest density over the sets of the k slowest GPUs, for k = 1..G, and that set as a mask.

        A valid lower bound for any times; tight near the optimum.
        """
        L, G, _ = self.shape
        order_LG = np.argsort(-time_LG, axis=1, kind="stable")
        rank = np.empty((L, G + 1), dtype=np.int64)
        np.put_along_axis(rank, order_LG, np.arange(G)[None, :], axis=1)
        rank[:, G] = -1
        captive_LG = np.take_along_axis(base_LG, order_LG, axis=1)
        if self.width:
            cell_LXR = self.gpu_LXR + np.arange(L)[:, None, None] * (G + 1)
            last_LX = rank.reshape(-1)[cell_LXR].max(axis=2)
            cell_LX = np.maximum(last_LX, 0) + np.arange(L)[:, None] * G
            captive_LG = captive_LG + np.bincount(
                cell_LX.reshape(-1), weights=load_LX.reshape(-1), minlength=L * G
            ).reshape(L, G)
        density_LG = np.cumsum(captive_LG, axis=1) / np.cumsum(self.speed_G[order_LG], axis=1)
        best_L = density_LG.argmax(axis=1)
        return density_LG[np.arange(L), best_L], rank[:, :G] <= best_L[:, None]

    def to_shares(self, load_LX: Floats, token_LXR: Floats) -> Floats:
        """Tokens per replica as shares in the placement's slots; an expert without load splits evenly."""
        L, G, C = self.shape
        share = np.zeros(L * G * C + 1)
        share[self.single] = 1.0
        total_LX = token_LXR.sum(axis=2)
        live_LXR = self.gpu_LXR < G
        even_LX = 1.0 / np.maximum(live_LXR.sum(axis=2), 1)
        ok_LX = total_LX > 0.0
        scale_LX = np.where(ok_LX, 1.0 / np.where(ok_LX, total_LX, 1.0), 0.0)
        share[self.slot_LXR] = np.where(ok_LX[..., None], token_LXR * scale_LX[..., None], even_LX[..., None])
        return share[:-1].reshape(L, G, C)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Token shares of all layers, with the certificate.

    Attributes
    ----------
    share_LGC : float array [layers, GPUs, slots]
        Fraction of its expert's tokens that a slot serves.
    time_LG : float array [layers, GPUs]
        GPU times (tokens over speed).
    bound_L : float array [layers]
        Lower bound on the largest time of each layer, whatever the shares.
    critical_LG : bool array [layers, GPUs]
        GPU set whose density is the bound (`moeless_opt.solvers.shares.lp.density` recomputes it).
    """

    share_LGC: Floats
    time_LG: Floats
    bound_L: Floats
    critical_LG: NDArray[np.bool_]

    @property
    def time_L(self) -> Floats:
        """Largest GPU time of each layer."""
        largest: Floats = self.time_LG.max(axis=1)
        return largest

    @property
    def gap_L(self) -> Floats:
        """Proven relative distance from the optimum."""
        gap: Floats = self.time_L / np.where(self.bound_L > 0.0, self.bound_L, 1.0) - (self.bound_L > 0.0)
        return np.maximum(gap, 0.0)


def solve_shares(
    load_LE: Floats,
    slots_LGC: NDArray[Any] | ReplicaGraph,
    speed_G: Floats | None = None,
    *,
    tolerance: float = 1e-3,
    max_sweeps: int = 60,
    exact: bool = True,
) -> Shares:
    """Split every expert's tokens over its replicas so that the largest GPU time is least.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens.
    slots_LGC : int array [layers, GPUs, slots] or ReplicaGraph
        Placement; pass a `ReplicaGraph` to prepare it once for many loads.
    speed_G : float array [GPUs], optional
        Relative speeds; ones by default. Ignored with a graph, which has them.
    tolerance : float
        Descent alone: stop once every layer is proven within this relative gap.
    max_sweeps : int
        Descent alone: stop after so many sweeps anyway; the gap reached is in the result.
    exact : bool
        Few sweeps, then maximum flow: the optimum to rounding (1e-9) in every layer. On loads near
        balance this is also the faster way. False is descent alone, which needs no ortools.

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
        token_LXR, time_LG, bound_L, critical_LG = _finish(graph, load_LX, base_LG, token_LXR, time_LG)
    else:
        token_LXR, time_LG = descend(graph, load_LX, base_LG, tolerance=tolerance, max_sweeps=max_sweeps)
        bound_L, critical_LG = graph.bound(load_LX, base_LG, time_LG)
    return Shares(
        share_LGC=graph.to_shares(load_LX, token_LXR),
        time_LG=time_LG,
        bound_L=bound_L,
        critical_LG=critical_LG,
    )


def _graph(slots_LGC: NDArray[Any] | ReplicaGraph, speed_G: Floats | None, load_LE: Floats) -> ReplicaGraph:
    if isinstance(slots_LGC, ReplicaGraph):
        return slots_LGC
    speed_G = np.ones(slots_LGC.shape[1]) if speed_G is None else speed_G
    return ReplicaGraph(slots_LGC, speed_G, load_LE.shape[1])


def descend(
    graph: ReplicaGraph,
    load_LX: Floats,
    base_LG: Floats,
    *,
    tolerance: float,
    max_sweeps: int,
    check: int = 4,
) -> tuple[Floats, Floats]:
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


def _fill_uniform(other_RLM: Floats, load_LM: Floats, speed_RLM: Floats, out_RLM: Floats) -> None:
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


def _fill(other_RLM: Floats, load_LM: Floats, speed_RLM: Floats, out_RLM: Floats) -> None:
    """As `_fill_uniform`, with speeds: level = (load + other loads) / speeds over the best prefix."""
    order_RLM = np.argsort(other_RLM / speed_RLM, axis=0, kind="stable")
    load_RLM = np.cumsum(np.take_along_axis(other_RLM, order_RLM, axis=0), axis=0) + load_LM
    level_LM = (load_RLM / np.cumsum(np.take_along_axis(speed_RLM, order_RLM, axis=0), axis=0)).min(axis=0)
    np.subtract(level_LM * speed_RLM, other_RLM, out=out_RLM)
    np.maximum(out_RLM, 0.0, out=out_RLM)


def _finish(
    graph: ReplicaGraph, load_LX: Floats, base_LG: Floats, token_LXR: Floats, time_LG: Floats
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
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


def gpu_times(graph: ReplicaGraph, base_LG: Floats, token_LXR: Floats) -> Floats:
    """Times of the GPUs when the replicated experts' tokens are split so."""
    L, G, _ = graph.shape
    cell_LXR = graph.gpu_LXR + np.arange(L)[:, None, None] * (G + 1)
    load = np.bincount(cell_LXR.reshape(-1), weights=token_LXR.reshape(-1), minlength=L * (G + 1))
    return (base_LG + load.reshape(L, G + 1)[:, :G]) / graph.speed_G


def _density_of(
    graph: ReplicaGraph, load_OX: Floats, base_OG: Floats, set_OG: NDArray[np.bool_], layers: Ints
) -> Floats:
    """Density of one GPU set per layer of `layers`."""
    padded = np.concatenate([set_OG, np.ones((len(set_OG), 1), dtype=bool)], axis=1)
    gpu_OXR = graph.gpu_LXR[layers]
    captive_OX = padded[np.arange(len(set_OG))[:, None, None], gpu_OXR].all(axis=2)
    load_O = np.where(captive_OX, load_OX, 0.0).sum(axis=1) + np.where(set_OG, base_OG, 0.0).sum(axis=1)
    density_O: Floats = load_O / np.maximum(np.where(set_OG, graph.speed_G, 0.0).sum(axis=1), 1e-300)
    return density_O


def _flow(
    graph: ReplicaGraph, load_LX: Floats, base_LG: Floats, time_L: Floats, layers: Ints
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
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


def round_shares(
    count_LE: NDArray[Any], slots_LGC: NDArray[Any], share_LGC: Floats, speed_G: Floats | None = None
) -> Ints:
    """Whole tokens per slot: every token is kept, and no GPU exceeds its cap by the rounding.

    Every slot gets the floor of its part. The tokens left over, fewer than the expert has replicas, go up
    by at most one per slot, through a flow in which a GPU takes at most the largest time's worth of tokens,
    rounded up. Such a rounding exists (flows are integral), so the largest load grows by less than one
    token.

    Parameters
    ----------
    count_LE : int array [layers, experts]
        Tokens, whole.
    slots_LGC : int array [layers, GPUs, slots]
        Placement, -1 where empty.
    share_LGC : float array [layers, GPUs, slots]
        Shares to round; an expert's sum to 1.
    speed_G : float array [GPUs], optional
        Relative speeds; ones by default.

    Returns
    -------
    int64 array [layers, GPUs, slots]
        Tokens of each slot. Over an expert's slots they sum to its count.
    """
    from ortools.graph.python import max_flow

    count_LE = np.asarray(count_LE, dtype=np.int64)
    L, G, _ = slots_LGC.shape
    E = count_LE.shape[1]
    speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    filled = slots_LGC >= 0
    expert_LGC = np.where(filled, slots_LGC, 0)
    rows = np.arange(L)[:, None, None]
    exact_LGC = np.where(filled, count_LE[rows, expert_LGC] * share_LGC, 0.0)
    token_LGC = np.floor(exact_LGC + 1e-9 * (1.0 + exact_LGC)).astype(np.int64)
    key_LGC = rows * E + expert_LGC
    given = np.bincount(key_LGC[filled], weights=token_LGC[filled].astype(np.float64), minlength=L * E)
    left = count_LE.reshape(-1) - given.astype(np.int64)
    for over in np.flatnonzero(left < 0).tolist():  # shares that sum to a hair above 1
        at = np.argwhere((key_LGC == over) & filled)
        top = at[np.argmax([token_LGC[tuple(a)] for a in at])]
        token_LGC[tuple(top)] += left[over]
        left[over] = 0
    layer, gpu, slot = np.nonzero(filled & (left[key_LGC] > 0))
    if not len(layer):
        return token_LGC
    # Nodes: source, sink, experts with tokens left, GPUs.
    key, node = np.unique(key_LGC[layer, gpu, slot], return_inverse=True)
    gpu_node = 2 + len(key) + layer * G + gpu
    top_L = (exact_LGC.sum(axis=2) / speed).max(axis=1)
    cap_LG = np.ceil(top_L[:, None] * speed * (1.0 - 1e-9)).astype(np.int64) - token_LGC.sum(axis=2)
    all_gpus = np.arange(L * G)
    # The slot that lost most by its floor comes first.
    order = np.lexsort((slot, gpu, -(exact_LGC - token_LGC)[layer, gpu, slot], layer))
    for extra in range(int(left.max()) + 2):
        network = max_flow.SimpleMaxFlow()
        arcs = network.add_arcs_with_capacity(
            np.concatenate([np.zeros(len(key), dtype=np.int64), 2 + node[order], 2 + len(key) + all_gpus]),
            np.concatenate([2 + np.arange(len(key)), gpu_node[order], np.ones(L * G, dtype=np.int64)]),
            np.concatenate(
                [
                    left[key],
                    np.full(len(order), 1 + extra, dtype=np.int64),
                    np.maximum(cap_LG.reshape(-1) + extra, 0),
                ]
            ),
        )
        network.solve(0, 1)
        if network.optimal_flow() == int(left[key].sum()):
            up = np.asarray(network.flows(arcs))[len(key) : len(key) + len(order)]
            token_LGC[layer[order], gpu[order], slot[order]] += up
            return token_LGC
    raise ProblemError("share_LGC", "does not sum to 1 per expert, would be shares of all its tokens")
