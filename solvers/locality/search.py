"""Local search on placements of layers for nearness, compiled or not: what the kernel gets, and its runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import Level
from moeless_opt.problems.spec import Problem, held_LGE
from moeless_opt.solvers.core import Stop
from moeless_opt.solvers.locality import state as plain
from moeless_opt.solvers.locality.state import Field, State, Tune
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.twins import Asked, in_cache, until_stopped

__all__ = ["TokenSources", "search_near_layers", "warm_locality"]

_MUCH = 10_000  # steps of plain code in all, from which on loading compiled code pays
_HOT = 0.3  # largest threshold at the start, in mean loads of a replica
_HEAVY = 3.0  # what a token beyond the limit costs, in those that go the dearest way


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSources:
    """Where one layer's tokens come from, and what they pay.

    Parameters
    ----------
    tokens_SE : array, shape [S, E]
        Tokens of each source that pay.
    price_SG : array, shape [S, G]
        What one pays on each GPU.
    serves : bool
        Whether these are the tokens that are served; else they only pay.
    levels : list of Level
        The price as a tree, for an even split.
    group_SK : array of int, shape [S, K]
        Groups of the sources.
    weight : float
        What the cost counts beside others.
    """

    tokens_SE: FloatArray
    price_SG: FloatArray
    serves: bool
    levels: list[Level]
    group_SK: IntArray
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSearch:
    """One layer to be searched.

    Parameters
    ----------
    row : int
        Of the problem.
    start_GC : array, shape [G, C]
        Where the search begins.
    sources : list of TokenSources
        One of them serves.
    toll_EG : array, shape [E, G]
        What a served token pays on a GPU.
    allowed_EG : array of bool, shape [E, G]
        Where an expert may be.
    limit_T : array, shape [T]
        Tokens over speed that a GPU may have in each scenario.
    most_held : int
        Replicas of the layer in all.
    move : float
        What a replica that is not live costs, in tokens.
    most_moves : int
        How many of them there may be.
    even : bool
        Whether replicas are taken to serve evenly; else tokens go the cheapest way.
    """

    row: int
    start_GC: SlotArray
    sources: list[TokenSources]
    toll_EG: FloatArray
    allowed_EG: BoolArray
    limit_T: FloatArray
    most_held: int
    move: float
    most_moves: int
    even: bool


def search_near_layers(
    problem: Problem,
    layers: list[LayerSearch],
    *,
    steps: int,
    seed: int,
    hot: float = 1.0,
    heavy: float = _HEAVY,
    stop: Stop,
) -> list[SlotArray]:
    """The best placement of each layer that the search finds, shape [G, C] each.

    Parameters
    ----------
    steps : int
        Changes to look at in each layer.
    hot : float
        By how much the threshold at the start is above the usual.
    heavy : float
        What a token beyond the limit costs at the start, in those that go the dearest way.
    """
    jobs = [_job(problem, layer, steps, seed, (hot, heavy)) for layer in layers]
    _plain[0] += steps * len(layers)
    many = _plain[0] > _MUCH or fast.loaded()
    compiled = fast.available() and (_kernel.cache_info().currsize > 0 or (many and _in_cache()))
    if compiled:
        told = np.zeros(1, dtype=np.uint8)
        step = max(min(len(jobs), os.cpu_count() or 1), 1)
        until_stopped([_Run(_kernel(), jobs[i::step], told) for i in range(step)], told, stop)
    else:
        asked = Asked(stop)
        for field, tune, state in jobs:
            plain.anneal(field, tune, state, asked)
    return [state.content_GC.astype(np.int32) for _, _, state in jobs]


@dataclass(frozen=True, slots=True)
class _Run:
    kernel: Callable[..., None]
    jobs: list[tuple[Field, Tune, State]]
    told: Any

    def __call__(self) -> None:
        for field, tune, state in self.jobs:
            self.kernel(field, tune, state, self.told)


def _job(
    problem: Problem, layer: LayerSearch, steps: int, seed: int, tuned: tuple[float, float]
) -> tuple[Field, Tune, State]:
    gpus, experts = problem.topology.gpus, problem.experts
    load_E = problem.load_LE[layer.row]
    speed_G = problem.topology.speed_G
    unit = float(load_E.sum() / speed_G.sum()) or 1.0
    dearest = max((s.weight * float(s.price_SG.max(initial=0.0)) for s in layer.sources), default=0.0)
    dearest = max(dearest, float(layer.toll_EG.max(initial=0.0))) or 1.0
    field = _field(problem, layer, unit, dearest)
    held = int((layer.start_GC >= 0).sum())
    piece = float(load_E.sum()) / max(held, 1) / unit
    tune = Tune(
        steps=int(steps),
        seed=int(seed * 7919 + layer.row * 104729 + 1),
        hot=float(_HOT * tuned[0] * piece),
        heavy=float(tuned[1]),
        move=float(layer.move / unit),
        most_moves=int(layer.most_moves),
        full=int(problem.fill != "none"),
        most_held=int(layer.most_held),
        spread=int(problem.limits.spread),
    )
    wide = layer.start_GC.shape[1]
    content_GC = np.full((gpus, wide), -1, dtype=np.int64)
    for g, row in enumerate(layer.start_GC):  # what is there comes first
        content_GC[g, : int((row >= 0).sum())] = row[row >= 0]
    groups = max(int(field.group_KG.max(initial=0)) + 1, 1)
    state = State(
        content_GC=content_GC,
        host_EG=np.zeros((experts, gpus), dtype=np.int64),
        count_E=np.zeros(experts, dtype=np.int64),
        piece_EG=np.zeros((experts, gpus)),
        cost_E=np.zeros(experts),
        carried_TG=np.zeros((len(layer.limit_T), gpus)),
        trial_2G=np.zeros((2, gpus + 1), dtype=np.int64),
        trial_piece_2G=np.zeros((2, gpus + 1)),
        extra_TG=np.zeros((len(layer.limit_T), gpus)),
        mark_B=np.zeros(groups),
        random_1=np.zeros(1, dtype=np.int64),
    )
    return field, tune, state


def _field(problem: Problem, layer: LayerSearch, unit: float, dearest: float) -> Field:
    gpus, experts = problem.topology.gpus, problem.experts
    limits, row = problem.limits, layer.row
    load_E = problem.load_LE[row] / unit
    weight, load, route, price, lean = [], [], [], [], []
    for source in layer.sources:
        tokens_SE = source.tokens_SE / unit
        weight.append(tokens_SE * (source.weight / dearest))
        if source.serves:
            sums = tokens_SE.sum(0)
            spread = np.divide(load_E, sums, out=np.zeros_like(sums), where=sums > 0)
            load.append(tokens_SE * spread + np.where(sums > 0, 0.0, load_E / len(tokens_SE)))
        else:
            load.append(np.zeros_like(tokens_SE))
        near = problem.split == "nearest" and source.serves
        route.append(_by_node(problem, len(source.price_SG)) if near else source.price_SG / dearest)
        price.append(source.price_SG)
        lean.append(np.full(len(tokens_SE), 0.0 if near or not source.serves else 1.0))
    own, total, fee, group_KG = _levels(layer, unit, dearest)
    mask = (row, slice(None), slice(None))
    live_EG = np.zeros((experts, gpus), dtype=np.bool_)
    if problem.current is not None:
        live_EG = held_LGE(problem.current.slots_LGC[row : row + 1], experts)[0].T
    load_TE = problem.loads.load_TLE[:, row]
    ratio_TE = np.ones((1, experts))
    if len(load_TE) > 1:
        ratio_TE = np.divide(load_TE / unit, load_E, out=np.zeros_like(load_TE), where=load_E > 0)
    most = gpus if limits.max_replicas is None else limits.max_replicas
    return Field(
        even=int(layer.even),
        weight_SE=np.ascontiguousarray(np.concatenate(weight)),
        load_SE=np.ascontiguousarray(np.concatenate(load)),
        route_SG=np.ascontiguousarray(np.concatenate(route)),
        price_SG=np.ascontiguousarray(np.concatenate(price)),
        lean_S=np.concatenate(lean),
        toll_EG=np.ascontiguousarray(layer.toll_EG / dearest),
        own_MKBE=own,
        total_ME=total,
        fee_MK=fee,
        group_KG=group_KG,
        load_E=np.ascontiguousarray(load_E),
        speed_G=np.array(problem.topology.speed_G, dtype=np.float64),
        ratio_TE=np.ascontiguousarray(ratio_TE),
        limit_T=np.array(layer.limit_T, dtype=np.float64) / unit,
        domain_G=np.array(problem.topology.failure_domain_G, dtype=np.int64),
        capacity_G=np.array(np.minimum(problem.capacity_LG[row], layer.start_GC.shape[1]), dtype=np.int64),
        least_E=np.full(experts, max(limits.min_replicas, 1), dtype=np.int64),
        most_E=np.full(experts, most, dtype=np.int64),
        allowed_EG=np.array(layer.allowed_EG & ~problem.pairs_LEG("forbidden")[mask], dtype=np.bool_),
        pinned_EG=np.array(problem.pairs_LEG("pinned")[mask], dtype=np.bool_),
        live_EG=np.ascontiguousarray(live_EG),
    )


def _by_node(problem: Problem, sources: int) -> FloatArray:
    """How far each GPU is for a split by the nearest replica: itself, its node, the others; [S, G]."""
    node_G = problem.topology.node_G
    if sources == problem.topology.nodes:
        return np.asarray(np.arange(sources)[:, None] != node_G, dtype=np.float64)
    return np.asarray((node_G[:, None] != node_G) + (1.0 - np.eye(sources)), dtype=np.float64)


def _levels(
    layer: LayerSearch, unit: float, dearest: float
) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """Sources by the groups of each level, their totals, what leaving costs, and the GPUs' groups."""
    levels, sets = layer.sources[0].levels, len(layer.sources)
    gpus, experts = layer.allowed_EG.shape[1], layer.allowed_EG.shape[0]
    group_KG = np.array([level.group_G for level in levels], dtype=np.int64).reshape(len(levels), gpus)
    wide = int(group_KG.max(initial=0)) + 1
    own = np.zeros((sets, len(levels), wide, experts))
    total, fee = np.zeros((sets, experts)), np.zeros((sets, len(levels)))
    for m, source in enumerate(layer.sources):
        total[m] = source.tokens_SE.sum(0) / unit
        for k, level in enumerate(source.levels):
            np.add.at(own[m, k], source.group_SK[:, k], source.tokens_SE / unit)
            fee[m, k] = level.cost * source.weight / dearest
    return own, total, fee, group_KG


# -- the two twins ---------------------------------------------------------------------------------------

_plain = [0]
"""Steps that were asked for so far in this process."""


def _in_cache() -> bool:
    return in_cache(plain.anneal_name(), Path(__file__))


def warm_locality() -> bool:
    """Compile or load the compiled twin; returns whether it could be (whether Numba is there)."""
    if not fast.available():
        return False
    _kernel()(*_tiny(), np.zeros(1, dtype=np.uint8))
    return True


def _tiny() -> tuple[Field, Tune, State]:
    """Two experts on two GPUs."""
    from moeless_opt.problems.spec import Loads, Topology

    problem = Problem(loads=Loads(load_TLE=np.ones((1, 2))), topology=Topology.uniform(2, 1, slots=1))
    sources = TokenSources(
        tokens_SE=np.ones((2, 2)),
        price_SG=1.0 - np.eye(2),
        serves=True,
        levels=[Level(np.arange(2), 1.0)],
        group_SK=np.arange(2)[:, None],
        weight=1.0,
    )
    layer = LayerSearch(
        row=0,
        start_GC=np.array([[0], [1]], dtype=np.int32),
        sources=[sources],
        toll_EG=np.zeros((2, 2)),
        allowed_EG=np.ones((2, 2), dtype=np.bool_),
        limit_T=np.ones(1),
        most_held=4,
        move=0.0,
        most_moves=4,
        even=False,
    )
    return _job(problem, layer, 10, 0, (1.0, 1.0))


@functools.cache
def _kernel() -> Any:
    from moeless_opt.solvers.locality import _kernels

    return _kernels.anneal
