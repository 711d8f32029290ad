"""Fewest moves of a re-plan whose split is even: a lower bound for any method, the truth for small layers.

An even split over slots is a choice of shares, too, so every bound on the moves with free shares holds for it
(`min_moves_bound`, `fewest_counts`), whatever is filled. Where no GPU may hold an expert twice, an expert's
pieces are all of one size, and few moves change little; that is what this programme counts, layer by layer:

    min   sum over e, r of a[e,r]
    s.t.  sum_r z[e,r] = 1                                            every expert has some number of replicas
          sum_g y[e,g,r] + a[e,r] = r z[e,r],   y[e,g,r] <= z[e,r]     live ones that stay, and new ones
          sum over e, r of w[e] / r y[e,g,r] + sum_k u[g,k] <= T speed[g]
          sum over e, r of y[e,g,r] + sum_k n[g,k] <= capacity[g]      (= where every slot must be full)
          low[k] n[g,k] <= u[g,k] <= high[k] n[g,k]                    for every GPU and class of pieces
          sum_g n[g,k] = sum of a[e,r] in k,   sum_g u[g,k] = sum of w[e] / r a[e,r] in k
          z, y binary; n whole; a, u >= 0

The new replicas go into pools by the size of their pieces, and the arrivals take from these: who goes where
is forgotten, as in `counts`. Counts beyond the live one by more than `_MORE` are one kind, whose pieces are
anything down to nothing. With a class for every piece and GPU, and no count left out, it is the programme of
pairs, whose optimum is the truth (`exact`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear
from moeless_opt.solvers.replan.counts import fewest_counts
from moeless_opt.solvers.replan.min_moves import min_moves_bound

__all__ = ["EvenMoves", "fewest_even_moves"]

_WIDER = (
    1e-6  # relative: rooms are this much larger than wanted, so that no engine's tolerance cuts a plan off
)
_MORE = 1  # replicas beyond the live ones that a count tells apart
_RATIO = 0.8  # heaviest piece of a class to that of the next
_CLASSES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenMoves:
    """What is known of the moves of a layer.

    Attributes
    ----------
    bound : int
        No plan within the time moves fewer replicas; where there is no such plan, `below` as it was asked.
    infeasible : bool
        Proven: no plan is within the time with fewer moves than were asked for.
    exact : bool
        Whether `bound` is the truth: `content` is a plan with so many moves.
    content : list of list of int, or None
        Experts on each GPU of the best plan that the programme of pairs found.
    """

    bound: int
    infeasible: bool = False
    exact: bool = False
    content: list[list[int]] | None = None


def fewest_even_moves(
    load_E: FloatArray,
    live_GC: SlotArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    time: float,
    *,
    fill: str = "none",
    below: int | None = None,
    exact: bool = False,
    stop: Stop,
    engine: str = "highs",
) -> EvenMoves:
    """Fewest moves with which one layer meets a time, tokens split evenly over an expert's slots.

    Parameters
    ----------
    load_E : array, shape [E]
        Tokens.
    live_GC : array of int, shape [G, C]
        Live placement, -1 where empty; an expert may lack a replica.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array, shape [G]
        Relative speeds.
    time : float
        Wanted largest GPU time, in tokens per speed.
    fill : {"none", "distinct", "copies"}
        As in `Problem`.
    below : int, optional
        Moves of a known plan: only fewer are asked for.
    exact : bool
        The programme of pairs: the truth, for small layers. Not with `fill` "copies".
    stop : Stop
        When to end with what is proven.
    engine : str
        See `core.linear.solve_linear`.

    Returns
    -------
    EvenMoves

    Raises
    ------
    ProblemError
        If the truth is asked for with second copies.
    """
    load, speed = np.asarray(load_E, dtype=np.float64), np.asarray(speed_G, dtype=np.float64)
    least = len(load) - len(np.unique(live_GC[live_GC >= 0]))  # who has none must get one
    if least == 0:
        least = int(min_moves_bound(load[None], live_GC[None], speed, np.array([time]), close=True)[0])
    if below is not None and least >= below:
        return EvenMoves(bound=below, infeasible=True)
    unit = float(load.sum() / speed.sum()) or 1.0
    room_G = (speed * (time / unit) * (1.0 + _WIDER)).tolist()
    scaled = (load / unit).tolist()
    held = [sorted({int(expert) for expert in row if expert >= 0}) for row in live_GC]
    slots = np.asarray(capacity_G).tolist()
    if fill == "copies":
        if exact:
            raise ProblemError("exact", "is not with second copies, whose pieces are not of one size")
        free = fewest_counts(scaled, held, slots, room_G, least=least, below=below, stop=stop, engine=engine)
        return EvenMoves(bound=free.bound, infeasible=free.infeasible)
    programme = _Programme(scaled, held, slots, room_G, fill == "distinct", exact)
    programme.write()
    programme.cover()
    programme.ask(least, below)
    answer = solve_linear(programme.model, engine, stop=stop)
    if answer.status == "infeasible":
        return EvenMoves(bound=least if below is None else below, infeasible=True)
    bound = least
    if math.isfinite(answer.bound):
        bound = max(bound, math.ceil(answer.bound - 1e-6 * max(1.0, answer.bound)))
    if not exact or answer.value_V is None:
        return EvenMoves(bound=bound)
    content: list[list[int]] = [[] for _ in held]
    for variable, expert, gpu in programme.places:
        if answer.value_V[variable] > 0.5:
            content[gpu].append(expert)
    return EvenMoves(bound=bound, exact=answer.status == "optimal", content=content)


class _Programme:
    """The programme of one layer, in units of the mean GPU load."""

    def __init__(
        self,
        load: Sequence[float],
        held: Sequence[Sequence[int]],
        slots: Sequence[int],
        room: Sequence[float],
        full: bool,
        exact: bool,
    ) -> None:
        self.load, self.held, self.slots, self.room = load, held, slots, room
        self.full, self.exact = full, exact
        self.model = LinearModel()
        self.home: list[list[int]] = [[] for _ in load]
        for gpu, row in enumerate(held):
            for expert in row:
                self.home[expert].append(gpu)
        self.moves: list[tuple[int, float]] = []
        self.on: list[list[tuple[int, float]]] = [[] for _ in held]  # load terms of each GPU
        self.in_slot: list[list[tuple[int, float]]] = [[] for _ in held]
        self.new: list[tuple[float, float, int, int]] = []  # least and largest piece, variable, expert
        self.places: list[tuple[int, int, int]] = []  # variable of an expert on a GPU
        self.stays: dict[tuple[int, int], list[tuple[int, float]]] = {}  # by pair: variable, least load

    def write(self) -> None:
        """All variables and rows but for those on the number of moves."""
        gpus = sum(slots > 0 for slots in self.slots)
        for expert, where in enumerate(self.home):
            last = gpus if self.exact else min(len(where) + _MORE, gpus)
            kinds = [(count, count) for count in range(1, last + 1)]
            if last < gpus:
                kinds.append((last + 1, gpus))
            chosen = [self._kind(expert, *kind) for kind in kinds]
            self.model.row([(one, 1.0) for one in chosen], 1.0, 1.0)
        if self.exact:
            self._pairs()
        else:
            self._pools()
        for gpu, (on, slots) in enumerate(zip(self.on, self.in_slot, strict=True)):
            self.model.row(on, -math.inf, self.room[gpu])
            self.model.row(slots, float(self.slots[gpu]) if self.full else -math.inf, float(self.slots[gpu]))

    def cover(self) -> None:
        """What a GPU has too much must go: no change of one expert counts for more than all of it."""
        for gpu, row in enumerate(self.held):
            piece = {expert: self.load[expert] / len(self.home[expert]) for expert in row}
            excess = sum(piece.values()) - self.room[gpu]
            if excess <= 10 * _WIDER:
                continue
            terms, total = [], 0.0
            for expert, now in piece.items():
                gone = min(now / excess, 1.0)
                total += gone
                for one, left in self.stays[expert, gpu]:
                    relief = min(max(now - left, 0.0) / excess, 1.0)
                    terms.append((one, relief - gone))
            self.model.row(terms, 1.0 - total - _WIDER, math.inf)

    def ask(self, least: int, below: int | None) -> None:
        """At least so many moves, and fewer than so many."""
        self.model.row(self.moves, float(least), math.inf if below is None else float(below - 1))

    def _kind(self, expert: int, fewest: int, most: int) -> int:
        """An expert with so many replicas: whether, which live ones stay, how many are new."""
        model, tokens, where = self.model, self.load[expert], self.home[expert]
        chosen = model.variable(0.0, 1.0, whole=True)
        new = model.variable(0.0, float(most), cost=1.0)
        stay = [model.variable(0.0, 1.0, whole=True) for _ in where]
        for gpu, one in zip(where, stay, strict=True):
            model.row([(one, 1.0), (chosen, -1.0)], -math.inf, 0.0)
            self.on[gpu].append((one, tokens / most))
            self.in_slot[gpu].append((one, 1.0))
            self.places.append((one, expert, gpu))
            self.stays.setdefault((expert, gpu), []).append((one, tokens / most))
        count = [(one, 1.0) for one in [*stay, new]]
        model.row([*count, (chosen, -float(fewest))], 0.0, math.inf)
        model.row([*count, (chosen, -float(most))], -math.inf, 0.0)
        self.moves.append((new, 1.0))
        self.new.append((tokens / most, tokens / fewest, new, expert))
        return chosen

    def _pairs(self) -> None:
        """Every new replica has its GPU."""
        for piece, _, new, expert in self.new:
            into = []
            for gpu in range(len(self.held)):
                if gpu not in self.home[expert] and self.slots[gpu] > 0:
                    one = self.model.variable(0.0, 1.0, whole=True)
                    self.on[gpu].append((one, piece))
                    self.in_slot[gpu].append((one, 1.0))
                    self.places.append((one, expert, gpu))
                    into.append((one, 1.0))
            self.model.row([*into, (new, -1.0)], 0.0, 0.0)

    def _pools(self) -> None:
        """New replicas go into pools by the size of their pieces, and the GPUs take from these."""
        heaviest = max(high for _, high, _, _ in self.new)
        pools: list[list[tuple[float, float, int, int]]] = [[] for _ in range(_CLASSES)]
        for piece in self.new:
            at = 0
            while at < _CLASSES - 1 and piece[1] <= heaviest * _RATIO ** (at + 1):
                at += 1
            pools[at].append(piece)
        for pool in pools:
            if not pool:
                continue
            low, high = min(piece[0] for piece in pool), max(piece[1] for piece in pool)
            counts, loads = [], []
            for gpu, slots in enumerate(self.slots):
                count = self.model.variable(0.0, float(min(slots, len(self.load))), whole=True)
                tokens = self.model.variable(0.0, self.room[gpu])
                self.model.row([(tokens, 1.0), (count, -min(high, self.room[gpu]))], -math.inf, 0.0)
                self.model.row([(tokens, 1.0), (count, -low)], 0.0, math.inf)
                self.on[gpu].append((tokens, 1.0))
                self.in_slot[gpu].append((count, 1.0))
                counts.append((count, 1.0))
                loads.append((tokens, 1.0))
            self.model.row([*counts, *((new, -1.0) for _, _, new, _ in pool)], 0.0, 0.0)
            self.model.row([*loads, *((new, -least) for least, _, new, _ in pool)], 0.0, math.inf)
            self.model.row([*loads, *((new, -most) for _, most, new, _ in pool)], -math.inf, 0.0)
