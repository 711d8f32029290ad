"""The best placement of a tiny layer, proven: who serves which expert, by any time model and either split.

Experts are taken heaviest first, and each is given to every set of GPUs that has room. What is left of all
these ways after an expert are *states*; one that cannot end below the best known time is dropped:

- With free shares, a set of GPUs must end what nobody else can serve: Hall's condition, for all sets, says
  exactly whether a time suffices.
- With even shares, the tokens of every GPU are known.
- In both, all tokens must fit the room of all GPUs.

GPUs that are alike and hold the same so far are interchangeable, and so are experts of one load: of all
ways that differ by that alone the lexicographically largest is kept (the double lexicographic order of Flener
et al.). Where there are more states than may be kept, the most promising are, and nothing is proven. All
states are arrays: no compiler is needed, and the answer is the same everywhere.

Axes: E experts, G GPUs, N states, Q sets of GPUs that an expert may be on, S sets of GPUs, A activated
experts.

References
----------
P. Hall: On representatives of subsets (1935). P. Flener et al.: Breaking row and column symmetries in matrix
models (2002).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import comb

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.plan import TimeTable
from moeless_opt.solvers.core import NeverStop, Stop

__all__ = ["Supports", "best_supports"]

_WIDTHS = (64, 1_000, 16_000)  # states kept, in ever longer searches
_CELLS = 3_000_000  # numbers in one array: widths are cut to it
_MOST_GPUS = 12  # 2 ** GPUs sets are looked at
_MOST_WAYS = 4_096  # of an expert, times the numbers of a state: more take too long
_GAIN = 1e-9  # relative; less is no gain
_AGAIN = 1e-3  # a gain that is worth another search of the same width
_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Supports:
    """What was found.

    Parameters
    ----------
    held_EG : array of bool, shape [E, G], or None
        Who serves whom in less than the time that was known; experts without load are nowhere. None if
        nothing was found.
    value : float
        Its largest GPU time, else the time that was known.
    proven : bool
        Whether no placement and no shares take less.
    """

    held_EG: BoolArray | None
    value: float
    proven: bool


def best_supports(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    known: float,
    *,
    equal: bool = False,
    replicas: int | None = None,
    widths: tuple[int, ...] = _WIDTHS,
    stop: Stop | None = None,
) -> Supports:
    """Find who serves whom in less than a known time, for a layer of a few experts and GPUs.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    table : TimeTable
        Times of one GPU, up to as many activated experts as the GPUs have slots.
    known : float
        A time that can be had, above 0.
    equal : bool
        Whether an expert's tokens are divided evenly over its replicas; else freely.
    replicas : int, optional
        Most of them in all, one for each expert without tokens included (default: what the slots hold).
    widths : tuple of int
        States kept, in one search after the other, each only if the one before proved nothing.
    stop : Stop, optional
        Asked at every expert.
    """
    stop = stop or NeverStop()
    best = Supports(None, known, False)
    order = np.argsort(-load_E, kind="stable")[: int((load_E > 0).sum())]
    room = int(np.minimum(capacity_G, len(load_E)).sum())
    spare = (room if replicas is None else min(room, replicas)) - len(load_E)
    gpus = np.lexsort((capacity_G, speed_G))
    if not len(order) or spare < 0 or not _few(len(speed_G), spare, equal):
        return best
    layer = _Layer.make(load_E[order], capacity_G[gpus], speed_G[gpus], table, spare, equal)
    for width in widths:
        while not best.proven and not stop():
            found = layer.search(best.value, width, stop)
            if found.held_EG is None:
                best = replace(best, proven=found.proven)
                break
            held_EG = np.zeros((len(load_E), len(speed_G)), dtype=np.bool_)
            held_EG[np.ix_(order, gpus)] = found.held_EG
            gain = 1.0 - found.value / best.value
            best = Supports(held_EG, found.value, found.proven)
            if gain < _AGAIN:
                break
        if best.proven:
            break
    return best


def _few(gpus: int, spare: int, equal: bool) -> bool:
    """Whether the sets of GPUs that an expert may be on, and the numbers of a state, are few enough."""
    ways = sum(comb(gpus, k) for k in range(1, min(gpus, 1 + spare) + 1))
    return gpus <= _MOST_GPUS and ways * (gpus if equal else (1 << gpus) - 1) <= _MOST_WAYS


@lru_cache(maxsize=64)
def _sets(gpus: int, most: int) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Sets that an expert may be on [Q, G], falling; all sets [S, G]; which are within which [Q, S]."""
    number = np.arange((1 << gpus) - 1, 0, -1)
    all_SG = (number[:, None] >> np.arange(gpus - 1, -1, -1) & 1).astype(np.bool_)
    on_QG = all_SG[all_SG.sum(axis=1) <= most]
    within_QS = ~(on_QG[:, None, :] & ~all_SG).any(axis=2)
    return on_QG, all_SG, within_QS


@dataclass(slots=True)
class _States:
    """Placements of the first experts: what they use of the GPUs, and how they came about."""

    used_NG: IntArray
    tied_NG: BoolArray  # whether a GPU is still as its left neighbour
    token_NX: FloatArray  # captive tokens of the sets of GPUs, or, with even shares, tokens of the GPUs
    last_N: IntArray
    path_NE: IntArray


@dataclass(slots=True)
class _Layer:
    """One layer, experts falling in load, GPUs that are alike side by side."""

    load_E: FloatArray
    capacity_G: IntArray
    speed_G: FloatArray
    table: TimeTable
    spare: int
    equal: bool
    on_QG: BoolArray
    all_SG: BoolArray
    within_QS: BoolArray

    @classmethod
    def make(
        cls,
        load_E: FloatArray,
        capacity_G: IntArray,
        speed_G: FloatArray,
        table: TimeTable,
        spare: int,
        equal: bool,
    ) -> _Layer:
        gpus = len(speed_G)
        sets = _sets(gpus, min(gpus, 1 + spare))
        return cls(load_E, capacity_G.astype(np.int64), speed_G, table, spare, equal, *sets)

    @property
    def columns(self) -> int:
        """Numbers that a state keeps."""
        return len(self.speed_G) if self.equal else len(self.all_SG)

    def search(self, known: float, width: int, stop: Stop) -> Supports:
        """The best placement below the known time among the states that are kept."""
        gpus = len(self.speed_G)
        room_GA = self._room(known * (1.0 - _GAIN))
        if (room_GA.max(axis=1) < 0).any():
            return Supports(None, known, True)
        # More experts may yet be activated, in less time where a curve falls.
        later_GA = np.maximum.accumulate(room_GA[:, ::-1], axis=1)[:, ::-1]
        width = max(8, min(width, _CELLS // (len(self.on_QG) * self.columns)))
        alike_G = np.zeros(gpus, dtype=np.bool_)
        alike_G[1:] = (np.diff(self.speed_G) == 0) & (np.diff(self.capacity_G) == 0)
        states = _States(
            np.zeros((1, gpus), dtype=np.int64),
            alike_G[None],
            np.zeros((1, self.columns)),
            np.zeros(1, dtype=np.int64),
            np.zeros((1, 0), dtype=np.int64),
        )
        whole = True
        for expert in range(len(self.load_E)):
            if stop():
                return Supports(None, known, False)
            states, rank_N = self._placed(states, expert, later_GA)
            if len(rank_N) > width:
                whole = False
                states = _kept(states, np.sort(np.argsort(rank_N, kind="stable")[:width]))
        fits_N, _ = self._fits(states.used_NG, states.token_NX, room_GA, 0.0)
        states = _kept(states, np.flatnonzero(fits_N))
        if not len(states.used_NG):
            return Supports(None, known, whole)
        index, value = self._fastest(states, known)
        return Supports(self.on_QG[states.path_NE[index]], value, whole)

    def _room(self, time: float) -> FloatArray:
        """Tokens that each GPU serves in a time by activated experts, -1 for none; shape [G, A]."""
        room_GA = np.minimum(self.table.largest(time * self.speed_G), 2.0 * self.load_E.sum())
        return np.asarray(np.maximum(room_GA, -1.0))

    def _fits(
        self, used_NG: IntArray, token_NX: FloatArray, room_GA: FloatArray, rest: float
    ) -> tuple[BoolArray, FloatArray]:
        """Which states are in time so far, and how near they are to the end of it (the lower, the better)."""
        room_NG = room_GA[np.arange(len(self.speed_G)), np.minimum(used_NG, room_GA.shape[1] - 1)]
        good_N = (room_NG >= 0).all(axis=1)
        slop = 1e-12 * self.load_E.sum()
        if self.equal:
            over_NX = (token_NX - room_NG) / self.speed_G
            good_N &= room_NG.sum(axis=1) - token_NX.sum(axis=1) >= rest - slop
        else:
            room_NS = np.zeros(token_NX.shape)
            for gpu, inside_S in enumerate(self.all_SG.T):
                room_NS += room_NG[:, gpu, None] * inside_S
            over_NX = token_NX - room_NS
            over_NX[:, 0] += rest  # the set of all GPUs stands first
            over_NX /= (self.all_SG * self.speed_G).sum(axis=1)
        near_N = over_NX.max(axis=1)
        return good_N & (near_N <= slop), near_N

    def _placed(self, states: _States, expert: int, later_GA: FloatArray) -> tuple[_States, FloatArray]:
        """All states with one more expert, and their rank."""
        load = float(self.load_E[expert])
        rest_experts, rest = len(self.load_E) - expert - 1, float(self.load_E[expert + 1 :].sum())
        used_NG, on_QG = states.used_NG, self.on_QG
        given_N = used_NG.sum(axis=1)
        most_N = self.spare + expert + 1 - given_N
        fine_NQ = on_QG.sum(axis=1) <= most_N[:, None]
        full_NG = used_NG >= self.capacity_G
        for gpu in range(used_NG.shape[1]):
            fine_NQ &= ~(full_NG[:, gpu, None] & on_QG[:, gpu])
            if gpu:
                fine_NQ &= ~(states.tied_NG[:, gpu, None] & (on_QG[:, gpu] & ~on_QG[:, gpu - 1]))
        if expert and load == self.load_E[expert - 1]:
            fine_NQ &= np.arange(len(on_QG)) >= states.last_N[:, None]
        n, q = np.nonzero(fine_NQ)
        used_NG = used_NG[n] + on_QG[q]
        if self.equal:
            token_NX = states.token_NX[n] + on_QG[q] * (load / on_QG.sum(axis=1))[q, None]
        else:
            token_NX = states.token_NX[n] + load * self.within_QS[q]
        good_N, near_N = self._fits(used_NG, token_NX, later_GA, rest)
        if rest_experts:
            good_N &= (self.capacity_G - used_NG).sum(axis=1) >= rest_experts
        keep = np.flatnonzero(good_N)
        n, q = n[keep], q[keep]
        tied_NG = states.tied_NG[n].copy()
        tied_NG[:, 1:] &= on_QG[q][:, 1:] == on_QG[q][:, :-1]
        path_NE = np.column_stack([states.path_NE[n], q])
        return _States(used_NG[keep], tied_NG, token_NX[keep], q, path_NE), near_N[keep]

    def _fastest(self, states: _States, known: float) -> tuple[int, float]:
        """The state that ends first, and when, by halving."""
        low, high = 0.0, known
        left = np.arange(len(states.used_NG))
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            fits_N, _ = self._fits(states.used_NG[left], states.token_NX[left], self._room(middle), 0.0)
            if fits_N.any():
                high, left = middle, left[fits_N]
            else:
                low = middle
            if high - low <= 1e-15 * high:
                break
        return int(left[0]), high


def _kept(states: _States, rows: IntArray) -> _States:
    return _States(
        states.used_NG[rows],
        states.tied_NG[rows],
        states.token_NX[rows],
        states.last_N[rows],
        states.path_NE[rows],
    )
