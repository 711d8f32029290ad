"""The replicated experts of a placement, laid out once for every share solver.

Only experts with several replicas have a choice, about one in ten. `ReplicaGraph` gathers them, and colours
them so that experts of one colour share no GPU: one NumPy step then serves every expert of a colour in every
layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import without_copies

__all__ = ["ColourClass", "ReplicaGraph"]


@dataclass(frozen=True, slots=True)
class ColourClass:
    """Experts that share no GPU within their layer: padded tables over [replicas, layers, members].

    `member_LM` indexes the expert axis X of the graph (X itself where padded), `cell_RLM` is a flat index
    into a [layers, GPUs + 1] array (the last column swallows the padding), `speed_RLM` the speed there.
    Replicas come first because NumPy reduces a short leading axis several times faster than a short
    trailing one.
    """

    member_LM: IntArray
    cell_RLM: IntArray
    speed_RLM: FloatArray


class ReplicaGraph:
    """The replicated experts of a placement, laid out for batched share solvers.

    Parameters
    ----------
    slots_LGC : array of int, shape [L, G, C]
        Expert in each slot, -1 where empty. Second copies on a GPU get no share.
    speed_G : array of float, shape [G]
        Relative speeds, positive.
    experts : int
        Experts per layer.

    Attributes
    ----------
    expert_LX : array of int, shape [L, X]
        Replicated experts of each layer, most replicas first; `experts` where padded.
    gpu_LXR : array of int, shape [L, X, R]
        GPUs of their replicas, ascending; the number of GPUs where padded.
    slot_LXR : array of int, shape [L, X, R]
        Flat position of the replica in `slots_LGC`; its size where padded.
    colours : list of ColourClass
        The order of a sweep.

    Raises
    ------
    ProblemError
        An expert has no replica.
    """

    def __init__(self, slots_LGC: NDArray[Any], speed_G: FloatArray, experts: int) -> None:
        self.slots_LGC = slots_LGC
        self.speed_G: FloatArray = np.asarray(speed_G, dtype=np.float64)
        self.experts = experts
        L, G, C = slots_LGC.shape
        self.shape = (L, G, C)
        # Of several copies on a GPU the first serves all that is served there.
        flat = without_copies(slots_LGC).reshape(-1)
        layer_of = np.repeat(np.arange(L) * (experts + 1), G * C)
        # Empty slots count as an extra expert at the end of the layer's range.
        self._key = layer_of + np.where(flat < 0, experts, flat)
        count_LE = np.bincount(self._key, minlength=L * (experts + 1)).reshape(L, experts + 1)
        self.replicas_LE: IntArray = count_LE[:, :experts]
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

    def _gather(self, count_LE: IntArray) -> None:
        """Table the replicas of replicated experts: sort by layer, replicas (descending), expert, GPU."""
        L, G, C = self.shape
        replicas = count_LE.reshape(-1)[self._key]
        picked = np.flatnonzero(replicas > 1)
        number_L = np.count_nonzero(count_LE > 1, axis=1)
        self.width = X = int(number_L.max(initial=0))
        R = int(replicas.max(initial=1))
        self.expert_LX: IntArray = np.full((L, X), self.experts, dtype=np.int64)
        self.gpu_LXR: IntArray = np.full((L, X, R), G, dtype=np.int64)
        self.slot_LXR: IntArray = np.full((L, X, R), L * G * C, dtype=np.int64)
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

    def _place_singles(self, count_LE: IntArray) -> None:
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

    def _class(self, in_LX: BoolArray, cell_LXR: IntArray) -> ColourClass:
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

    def loads(self, load_LE: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Loads of the replicated experts [layers, X] and the fixed load of every GPU [layers, GPUs]."""
        L, G, _ = self.shape
        load = np.ascontiguousarray(load_LE, dtype=np.float64)
        base = np.bincount(self.single_gpu, weights=load.reshape(-1)[self.single_load], minlength=L * (G + 1))
        padded = np.concatenate([load, np.zeros((L, 1))], axis=1)
        base_LG: FloatArray = base.reshape(L, G + 1)[:, :G].astype(np.float64)
        return np.take_along_axis(padded, self.expert_LX, axis=1), base_LG

    def bound(
        self, load_LX: FloatArray, base_LG: FloatArray, time_LG: FloatArray
    ) -> tuple[FloatArray, BoolArray]:
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

    def to_shares(self, load_LX: FloatArray, token_LXR: FloatArray) -> FloatArray:
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
