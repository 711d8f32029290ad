"""Steepest descent of the risk over scenarios: replicas trade places, move, or become another expert's.

With even shares a change is weighed exactly in all scenarios at once. Changes start at the slowest GPU of a
scenario: one of its replicas trades places with a replica elsewhere, or moves to a free slot; or one of its
experts gets a replica more elsewhere, in a free slot or in that of an expert with another replica.

Axes: T scenarios, S those that remain of them after `each_gpu` (all or one), L layers, E experts, G GPUs,
C slots of a GPU, K changes that are weighed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.solvers.core.stopping import Stop

__all__ = ["descend_even"]

STEPS = 120
"""Changes of a layer at most, where nothing else is said."""
TARGETS = 12
"""GPUs that a change may reach: those with least to do in the scenario of the slowest GPU."""
_GAIN = 1e-6

Measure = Callable[[FloatArray], FloatArray]
"""Largest times [T, K] to their risk [K]; or times of GPUs [T, ...] to those whose largest counts."""


def descend_even(
    load_TE: FloatArray,
    slots_GC: SlotArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    measure: Measure,
    each_gpu: Measure,
    *,
    enough: float,
    stop: Stop,
    steps: int = STEPS,
) -> None:
    """Lower the risk of a layer with even shares, in place, until no change does.

    Parameters
    ----------
    load_TE : array, shape [T, E]
        Tokens of every scenario.
    slots_GC : array of int32, shape [G, C]
        A placement with every expert.
    capacity_G : array of int, shape [G]
        Slots that a GPU has.
    speed_G : array, shape [G]
        Relative speeds.
    measure : callable
        The risk.
    each_gpu : callable
        What is done with the times of GPUs before the largest is taken: nothing, or a risk of each.
    enough : float
        Risk (tokens over speed) that asks for no further change.
    stop : Stop
        Asked before every change.
    steps : int
        Changes at most.
    """
    layer = _Layer.of(load_TE, slots_GC, capacity_G, speed_G, each_gpu)
    value = float(measure(layer.value_SG.max(1)[:, None])[0])
    for _ in range(steps):
        if value <= enough or stop():
            break
        best: tuple[float, Callable[[], None]] = (value * (1 - _GAIN), lambda: None)
        slowest_S = layer.value_SG.argmax(1)
        for gpu in np.unique(slowest_S).tolist():
            reach_G = np.argsort(layer.value_SG[slowest_S == gpu].max(0), kind="stable")[:TARGETS]
            for weighed, change in (
                _trades(layer, gpu, reach_G, measure),
                _more(layer, gpu, reach_G, measure),
            ):
                if len(weighed) and float(weighed.min()) < best[0]:
                    place = int(weighed.argmin())
                    best = float(weighed[place]), lambda change=change, place=place: change(place)  # type: ignore[misc]
        if best[0] >= value * (1 - _GAIN):
            break
        best[1]()
        layer.refresh()
        value = float(measure(layer.value_SG.max(1)[:, None])[0])


@dataclass(slots=True)
class _Layer:
    """A layer with even shares, and what follows from its slots."""

    load_TE: FloatArray
    slots_GC: SlotArray
    free_GC: SlotArray
    speed_G: FloatArray
    each_gpu: Measure
    held_EG: FloatArray
    count_E: FloatArray
    piece_TE: FloatArray
    time_TG: FloatArray
    value_SG: FloatArray

    @classmethod
    def of(
        cls,
        load_TE: FloatArray,
        slots_GC: SlotArray,
        capacity_G: IntArray,
        speed_G: FloatArray,
        each_gpu: Measure,
    ) -> _Layer:
        nothing = np.zeros((0, 0))
        made = nothing, nothing, nothing, nothing, nothing
        layer = cls(load_TE, slots_GC, slots_GC, speed_G, each_gpu, *made)
        # A slot that may be filled: the first ones of a GPU that are empty, as many as it has room.
        empty = slots_GC < 0
        room_G = capacity_G - (~empty).sum(1)
        layer.free_GC = (empty & (np.cumsum(empty, axis=1) <= room_G[:, None])).astype(np.int32)
        layer.refresh()
        return layer

    def refresh(self) -> None:
        """What follows from the slots."""
        experts = self.load_TE.shape[1]
        gpu, slot = np.nonzero(self.slots_GC >= 0)
        self.free_GC[gpu, slot] = 0
        self.held_EG = np.zeros((experts, len(self.slots_GC)))
        self.held_EG[self.slots_GC[gpu, slot], gpu] = 1.0
        self.count_E = self.held_EG.sum(1)
        self.piece_TE = self.load_TE / self.count_E
        self.time_TG = self.piece_TE @ self.held_EG / self.speed_G
        self.value_SG = self.each_gpu(self.time_TG)

    def elsewhere(self, gpu: int, reach_G: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """GPU, slot and expert (-1: free) of what may change elsewhere."""
        near_G = reach_G[reach_G != gpu]
        usable = (self.slots_GC[near_G] >= 0) | (self.free_GC[near_G] > 0)
        place, slot = np.nonzero(usable)
        other = near_G[place]
        return other, slot, self.slots_GC[other, slot].astype(np.int64)


def _trades(
    layer: _Layer, gpu: int, reach_G: IntArray, measure: Measure
) -> tuple[FloatArray, Callable[[int], None]]:
    """Risks of all trades of a replica of `gpu` for another one or for a free slot, and how to make one."""
    other_P, slot_P, expert_P = layer.elsewhere(gpu, reach_G)
    mine_C = np.flatnonzero(layer.slots_GC[gpu] >= 0)
    own, at = (part.ravel() for part in np.meshgrid(mine_C, np.arange(len(other_P)), indexing="ij"))
    give, take = layer.slots_GC[gpu, own].astype(np.int64), expert_P[at]
    allowed = layer.held_EG[give, other_P[at]] == 0
    allowed &= (take < 0) | (layer.held_EG[np.maximum(take, 0), gpu] == 0)
    own, at, give, take = own[allowed], at[allowed], give[allowed], take[allowed]
    to = other_P[at]
    moved_TK = layer.piece_TE[:, give] - np.where(take >= 0, layer.piece_TE[:, np.maximum(take, 0)], 0.0)
    here_TK = layer.time_TG[:, [gpu]] - moved_TK / layer.speed_G[gpu]
    there_TK = layer.time_TG[:, to] + moved_TK / layer.speed_G[to]
    here_SK, there_SK = layer.each_gpu(here_TK), layer.each_gpu(there_TK)
    rest_SG = layer.value_SG.copy()
    rest_SG[:, gpu] = 0.0
    first_S = rest_SG.argmax(1)
    most_S = rest_SG.max(1)
    rest_SG[np.arange(len(rest_SG)), first_S] = 0.0
    rest_SK = np.where(to == first_S[:, None], rest_SG.max(1)[:, None], most_S[:, None])

    def trade(k: int) -> None:
        layer.slots_GC[gpu, own[k]] = take[k]
        layer.slots_GC[to[k], slot_P[at[k]]] = give[k]
        if take[k] < 0:
            layer.free_GC[gpu, own[k]] = 1

    if not len(to):
        return np.zeros(0), trade
    return measure(np.maximum(np.maximum(here_SK, there_SK), rest_SK)), trade


def _more(
    layer: _Layer, gpu: int, reach_G: IntArray, measure: Measure
) -> tuple[FloatArray, Callable[[int], None]]:
    """Risks of one replica more of an expert of `gpu` where there is a spare one, and how to put it there."""
    other_P, slot_P, expert_P = layer.elsewhere(gpu, reach_G)
    spare_P = (expert_P < 0) | (layer.count_E[np.maximum(expert_P, 0)] > 1)
    other_P, slot_P, expert_P = other_P[spare_P], slot_P[spare_P], expert_P[spare_P]
    mine_E = layer.slots_GC[gpu][layer.slots_GC[gpu] >= 0].astype(np.int64)
    more, at = (part.ravel() for part in np.meshgrid(mine_E, np.arange(len(other_P)), indexing="ij"))
    allowed = (layer.held_EG[more, other_P[at]] == 0) & (expert_P[at] != more)
    more, at = more[allowed], at[allowed]
    less, to = expert_P[at], other_P[at]

    def put(k: int) -> None:
        layer.slots_GC[to[k], slot_P[at[k]]] = more[k]

    if not len(to):
        return np.zeros(0), put
    gone = np.maximum(less, 0)
    count_K = layer.count_E[gone]
    new_TK = layer.load_TE[:, more] / (layer.count_E[more] + 1)
    saved_TK = layer.piece_TE[:, more] - new_TK
    grown_TK = np.where(
        less >= 0, layer.load_TE[:, gone] / np.maximum(count_K - 1, 1) - layer.piece_TE[:, gone], 0.0
    )
    tokens_TKG = layer.time_TG[:, None, :] * layer.speed_G
    tokens_TKG = (
        tokens_TKG - saved_TK[:, :, None] * layer.held_EG[more] + grown_TK[:, :, None] * layer.held_EG[gone]
    )
    here = np.arange(len(to))
    tokens_TKG[:, here, to] += new_TK - np.where(less >= 0, layer.piece_TE[:, gone] + grown_TK, 0.0)
    return measure(layer.each_gpu(tokens_TKG / layer.speed_G).max(2)), put
