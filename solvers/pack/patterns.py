"""Proven optimum of a small layer with equal split: dynamic programming over what one GPU can hold.

These layers are hard for general solvers for two reasons: symmetry (GPUs are alike, replicas are alike),
and a load per replica that depends on how many replicas there are. Both vanish if a layer is built GPU by
GPU out of *patterns*. A type ``(e, r)`` is one of r replicas of expert e and weighs ``w_e / r``; a pattern
is a set of types of different experts that one GPU can hold within time T. The loads' sum is given and no
GPU may exceed T, so a pattern may waste no more than the slack ``T * speeds - loads`` of the whole layer:
near the optimum hardly any pattern is left, and each pattern used leaves less to waste.

The next GPU to fill always takes the heaviest expert that is not done yet. What is left to do then depends
only on replicas decided, replicas left and GPUs left: equal states are merged and keep the smallest time so
far. States are expanded by the thousand in numpy, deepest first, so plans turn up early.

T rises from the lower bound in growing steps. A step that finds nothing has proven a new lower bound; the
first step that finds anything has found the optimum.

Axes: E experts, G GPUs, K classes of equal GPUs, Y types, M patterns, C types of a pattern, N states, W
words of 64 types each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, WordArray
from moeless_opt.problems.plan import best_bound
from moeless_opt.problems.spec import TOKENS, TimeModel
from moeless_opt.solvers.core import NeverStop, Stop

__all__ = ["PatternResult", "fewest_replicas", "solve_patterns"]


_CHUNK = 1 << 14  # states expanded together
_BEAM = 2000  # states kept per depth by the beam search
_HARD = 1000  # states in a step from which on a good plan is looked for first
_CELLS = 1 << 22  # (state, pattern) pairs tested together
_MOST_CANDIDATES = 60_000_000  # sets of types looked at before the method gives up
_ROUND = 1e-11  # relative slop of sums of loads
_SAME = 1e-9  # plans closer than this are equally good


@dataclass(slots=True)
class PatternResult:
    """What the search proved: ``lower <= optimum <= upper``.

    Parameters
    ----------
    lower, upper : float
        Bounds on the least largest GPU time; ``upper`` is infinite if nothing is known.
    slots_GC : array of int32, shape [G, C], or None
        The plan of time ``upper``, -1 in empty slots; None if ``upper`` is the caller's.
    proven : bool
        Whether the two meet (within the gap asked for).
    states : int
        States expanded.
    """

    lower: float
    upper: float
    slots_GC: SlotArray | None
    proven: bool
    states: int


def solve_patterns(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray | None = None,
    *,
    upper: float = np.inf,
    lower: float = 0.0,
    gap: float = 0.0,
    max_replicas: int | None = None,
    min_replicas: int = 1,
    time: TimeModel = TOKENS,
    stop: Stop | None = None,
) -> PatternResult:
    """Find the proven optimum of one layer with equal split, or as good a pair of bounds as time allows.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens of each expert.
    capacity_G : array of int, shape [G]
        Slots of each GPU.
    speed_G : array of float, shape [G], optional
        Relative speeds (default 1).
    upper : float
        Largest GPU time of a plan that is known already; only better ones are looked for.
    lower : float
        A known lower bound.
    gap : float
        Stop once ``upper <= lower * (1 + gap)``.
    max_replicas, min_replicas : int, optional
        Limits on the replicas of each expert.
    time : TimeModel
        The time model.
    stop : Stop, optional
        When to stop.

    Returns
    -------
    PatternResult
        Bounds, plan and whether it is proven. Infinite bounds prove that no plan exists.

    Notes
    -----
    Meant for up to about 16 experts and 2 to 4 slots per GPU, where it takes milliseconds to seconds. Beyond,
    the steps stay valid but time runs out; the mean is a good bound there anyway.
    """
    stop = NeverStop() if stop is None else stop
    speed = np.ones(len(capacity_G)) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    load = np.asarray(load_E, dtype=np.float64)
    capacity = np.asarray(capacity_G, dtype=np.int64)
    bound_L, _ = best_bound(
        load[None],
        capacity[None],
        speed,
        "equal",
        max_replicas=max_replicas,
        min_replicas=min_replicas,
        time=time,
    )
    base = max(lower, float(bound_L[0]))
    result = PatternResult(base, upper, None, base == np.inf, 0)
    layer = _Layer.make(load, capacity, speed, max_replicas, min_replicas, time)
    _rise(layer, result, gap, stop)
    return result


def _rise(layer: _Layer, result: PatternResult, gap: float, stop: Stop) -> None:
    """Raise the limit from the lower bound in growing steps until the bounds meet, or `stop` says so."""
    base = result.lower
    step, hard = 2.0**-13, _HARD
    while not result.proven:
        # The last step before a known plan asks for anything better than it.
        limit = base * (1 + step) if result.upper > base * (1 + 1.15 * step) else result.upper * (1 - _SAME)
        search = _Search(layer, limit, stop)
        found, complete = search.run()
        result.states += search.states
        if found is not None:
            result.upper, result.slots_GC = found
        if complete:
            result.lower = limit if found is None and limit < result.upper * (1 - 2 * _SAME) else result.upper
        result.proven = result.upper <= result.lower * (1 + max(gap, _ROUND))
        if not complete or (found is not None and result.lower >= result.upper):
            break
        if search.states > hard:
            # Steps get long: a good plan now keeps the last of them from going farther than it must.
            wide = min(result.upper * (1 - _SAME), base * (1 + 4 * step))
            plan, _ = _Search(layer, wide, stop, beam=_BEAM).run()
            if plan is not None:
                result.upper, result.slots_GC = plan
            hard = hard * 4 if plan is None else 1 << 62
        # States grow with a high power of the step: stride while they are few, walk once they are many.
        step *= 4.0 if search.states < 100 else 2.0 if search.states < 1000 else 1.35


def fewest_replicas(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray | None = None,
    *,
    limit: float,
    most: int | None = None,
    time: TimeModel = TOKENS,
    stop: Stop | None = None,
) -> tuple[int, SlotArray | None]:
    """Find the fewest replicas with which a layer with equal split can be placed within a time, proven.

    Parameters
    ----------
    load_E, capacity_G, speed_G, time, stop
        As in `solve_patterns`.
    limit : float
        Largest GPU time wanted.
    most : int, optional
        Replicas from which on nobody is interested (default: the slots + 1).

    Returns
    -------
    bound : int
        No plan within the limit has fewer replicas; ``most`` if there is none with fewer than that.
    slots_GC : array of int32, shape [G, C], or None
        A plan with ``bound`` replicas; None if there is none below ``most``, or time ran out.
    """
    stop = NeverStop() if stop is None else stop
    speed = np.ones(len(capacity_G)) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    load = np.asarray(load_E, dtype=np.float64)
    layer = _Layer.make(load, np.asarray(capacity_G, dtype=np.int64), speed, None, 1, time)
    top = int(layer.slots_K @ layer.size_K) + 1 if most is None else most
    types = _types(layer, limit)
    if types is None:
        return top, None
    total = int(layer.slots_K @ layer.size_K) - types.spare
    while total < top:
        found, complete = _Search(layer, limit, stop, total).run()
        if found is not None:
            return total, found[1]
        if not complete:
            break
        total += 1
    return min(total, top), None


@dataclass(slots=True)
class _Layer:
    """The layer, its GPUs in classes of equal slots and speed."""

    load_E: FloatArray
    cost_E: FloatArray  # what one more replica adds to the work in all
    order_E: IntArray  # heaviest first
    token: float
    launch: float
    class_G: IntArray
    size_K: IntArray
    slots_K: IntArray
    speed_K: FloatArray
    most_replicas: int
    min_replicas: int

    @classmethod
    def make(
        cls,
        load_E: FloatArray,
        capacity_G: IntArray,
        speed_G: FloatArray,
        max_replicas: int | None,
        min_replicas: int,
        time: TimeModel,
    ) -> _Layer:
        # A GPU holds an expert once: more slots than experts are worth nothing.
        keys_G2 = np.column_stack([np.minimum(capacity_G, len(load_E)), speed_G])
        kinds, class_G, size_K = np.unique(keys_G2, axis=0, return_inverse=True, return_counts=True)
        slots_K = kinds[:, 0].astype(np.int64)
        size_K = np.where(slots_K > 0, size_K, 0)
        gpus = int(size_K.sum())
        return cls(
            load_E,
            np.where(load_E > 0, time.activation_cost, 0.0),
            np.argsort(-load_E, kind="stable"),
            time.token_cost,
            time.launch,
            class_G.reshape(-1),
            size_K,
            slots_K,
            kinds[:, 1].copy(),
            gpus if max_replicas is None else min(gpus, max_replicas),
            min_replicas,
        )


@dataclass(slots=True)
class _Types:
    """All (expert, replicas) pairs that a plan within the limit can have, heaviest expert first."""

    expert_Y: IntArray
    count_Y: IntArray
    weight_Y: FloatArray
    extra_Y: IntArray  # replicas beyond the fewest that the expert needs
    lost_Y: FloatArray  # work that those extra replicas add
    spare: int  # slots beyond the fewest replicas of all experts
    budget: int  # replicas that may be added to those
    slack: float  # work that the GPUs can do within the limit beyond what must be done


@dataclass(slots=True)
class _Patterns:
    """All sets of types that a GPU of some class can hold without wasting more than the slack."""

    types_MC: IntArray  # -1 pads
    class_M: IntArray
    weight_M: FloatArray
    waste_M: FloatArray
    empty_M: NDArray[np.int16]  # slots left empty
    mask_MW: WordArray


@dataclass(slots=True)
class _States:
    """States of one depth, by columns, with the way back to the root."""

    parent: _States | None
    origin_N: IntArray  # row in the parent
    pattern_N: IntArray  # pattern that led here
    allowed_NW: WordArray  # types that later GPUs may still take
    decided_NE: NDArray[np.uint8]  # replicas of each expert, 0 if undecided
    left_NE: NDArray[np.uint8]  # of those, still to be placed
    gpus_NK: NDArray[np.int16]
    slack_N: FloatArray
    spare_N: NDArray[np.int16]
    budget_N: NDArray[np.int16]
    worst_N: FloatArray  # largest time of the GPUs filled so far
    hash_N: WordArray

    def take(self, index: Any) -> _States:
        columns = (getattr(self, f.name)[index] for f in fields(self)[1:])
        return _States(self.parent, *columns)

    def __len__(self) -> int:
        return len(self.slack_N)


def _types(layer: _Layer, limit: float, total: int | None = None) -> _Types | None:
    """List the types; None if some expert has none or the slots do not suffice."""
    E = len(layer.load_E)
    slots = int(layer.slots_K @ layer.size_K)
    room_K = limit * layer.speed_K - layer.launch
    slop = _ROUND * limit * float(layer.speed_K.max())
    options: list[list[int]] = []
    for load, cost in zip(layer.load_E, layer.cost_E, strict=True):
        fits = [
            r
            for r in range(layer.min_replicas, min(layer.most_replicas, slots - E + 1) + 1)
            if layer.size_K[layer.token * load / r + cost <= room_K + slop].sum() >= r
        ]
        options.append(fits if load > 0 else fits[:1])
        if not fits:
            return None
    fewest_E = np.array([fits[0] for fits in options])
    spare = slots - int(fewest_E.sum())
    work = layer.token * float(layer.load_E.sum()) + float(layer.cost_E @ fewest_E)
    slack = float(room_K @ layer.size_K) - work
    budget = spare if total is None else min(spare, total - int(fewest_E.sum()))
    if budget < 0 or slack < -slop * len(layer.class_G):
        return None
    pairs = [(e, r) for e in layer.order_E for r in options[e] if r - fewest_E[e] <= budget]
    expert_Y, count_Y = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    weight_Y = layer.token * layer.load_E[expert_Y] / count_Y + layer.cost_E[expert_Y]
    extra_Y = count_Y - fewest_E[expert_Y]
    return _Types(
        expert_Y, count_Y, weight_Y, extra_Y, layer.cost_E[expert_Y] * extra_Y, spare, budget, slack
    )


def _patterns(layer: _Layer, types: _Types, limit: float, stop: Stop) -> _Patterns | None:
    """List the patterns by adding one type at a time; None if told to stop, or there are too many."""
    Y = len(types.weight_Y)
    room_K = limit * layer.speed_K - layer.launch
    slop = _ROUND * limit * float(layer.speed_K.max()) * len(layer.class_G)
    used_K = layer.size_K > 0
    largest, smallest = float(room_K[used_K].max()), float(room_K[used_K].min())
    most = int(layer.slots_K.max())
    # The heaviest type from y on: what a set whose last type is y - 1 could still add.
    later_Y = np.append(np.maximum.accumulate(types.weight_Y[::-1])[::-1], 0.0)
    sets_MC, weight_M = np.arange(Y)[:, None], types.weight_Y
    found: list[tuple[IntArray, int, FloatArray]] = []
    for size in range(1, most + 1):
        reach_M = weight_M + (most - size) * later_Y[sets_MC[:, -1] + 1]
        hopeful = (weight_M <= largest + slop) & (reach_M >= smallest - types.slack - slop)
        sets_MC, weight_M = sets_MC[hopeful], weight_M[hopeful]
        for k in np.flatnonzero(used_K & (layer.slots_K >= size)):
            fits = (weight_M <= room_K[k] + slop) & (weight_M >= room_K[k] - types.slack - slop)
            found.append((sets_MC[fits], int(k), weight_M[fits]))
        if size == most:
            break
        if len(sets_MC) * Y > _MOST_CANDIDATES:
            return None
        parts = [np.zeros((2, 0), dtype=np.int64)]
        height = max(1, _CELLS // Y)
        for start in range(0, len(sets_MC), height):
            if stop():
                return None
            last_M, before_M = sets_MC[start : start + height, -1], weight_M[start : start + height]
            later = np.arange(Y) > last_M[:, None]
            later &= types.expert_Y != types.expert_Y[last_M][:, None]
            later &= before_M[:, None] + types.weight_Y <= largest + slop
            row, added = np.nonzero(later)
            reach_M = before_M[row] + types.weight_Y[added] + (most - size - 1) * later_Y[added + 1]
            hopeful = reach_M >= smallest - types.slack - slop
            parts.append(np.stack([row[hopeful] + start, added[hopeful]]))
        row, added = np.concatenate(parts, axis=1)
        sets_MC, weight_M = np.column_stack([sets_MC[row], added]), weight_M[row] + types.weight_Y[added]
    words = (Y + 63) // 64
    if sum(len(sets) for sets, _, _ in found) * words > _MOST_CANDIDATES or stop():
        return None
    types_MC = np.concatenate(
        [np.pad(s, ((0, 0), (0, most - s.shape[1])), constant_values=-1) for s, _, _ in found]
    )
    class_M = np.repeat(np.array([k for _, k, _ in found]), [len(s) for s, _, _ in found])
    weight_M = np.concatenate([w for _, _, w in found])
    mask_MW = np.zeros((len(types_MC), words), dtype=np.uint64)
    for column in types_MC.T:
        if stop():
            return None
        row = np.flatnonzero(column >= 0)
        mask_MW[row, column[row] // 64] |= _bit(column[row])
    empty_M = (layer.slots_K[class_M] - (types_MC >= 0).sum(axis=1)).astype(np.int16)
    return _Patterns(types_MC, class_M, weight_M, room_K[class_M] - weight_M, empty_M, mask_MW)


def _bit(type_: IntArray) -> WordArray:
    bit: WordArray = np.uint64(1) << (type_ % 64).astype(np.uint64)
    return bit


class _StoppedError(Exception):
    """Told to stop in the middle of a chunk."""


class _Search:
    """One step: all plans within ``limit``, or the best of them."""

    def __init__(
        self, layer: _Layer, limit: float, stop: Stop, total: int | None = None, beam: int | None = None
    ) -> None:
        self.layer, self.limit, self.stop = layer, limit, stop
        self.total, self.beam = total, beam
        self.states = 0
        self.slop = _ROUND * limit * float(layer.speed_K.max()) * len(layer.class_G)

    def run(self) -> tuple[tuple[float, SlotArray] | None, bool]:
        """Return the best plan within the limit, or None, and whether that is certain."""
        types = _types(self.layer, self.limit, self.total)
        if types is None:
            return None, True
        patterns = _patterns(self.layer, types, self.limit, self.stop)
        if patterns is None:
            return None, False
        self.types, self.patterns = types, patterns
        self._prepare()
        return self._descend()

    def _prepare(self) -> None:
        """Tables over types and experts that the expansion looks up."""
        types, patterns, layer = self.types, self.patterns, self.layer
        Y, E, K = len(types.weight_Y), len(layer.load_E), len(layer.size_K)
        words = patterns.mask_MW.shape[1]
        self.one_YW = np.zeros((Y, words), dtype=np.uint64)
        self.one_YW[np.arange(Y), np.arange(Y) // 64] = _bit(np.arange(Y))
        self.all_EW = np.zeros((E, words), dtype=np.uint64)
        np.bitwise_or.at(self.all_EW, types.expert_Y, self.one_YW)
        expert_MC = np.where(patterns.types_MC >= 0, types.expert_Y[patterns.types_MC], -1)
        # Patterns with an expert, by its replicas: (e, 0) for any number.
        self.with_type = {(e, 0): np.flatnonzero((expert_MC == e).any(axis=1)) for e in range(E)}
        for y, (e, r) in enumerate(zip(types.expert_Y.tolist(), types.count_Y.tolist(), strict=True)):
            some = self.with_type[e, 0]
            self.with_type[e, r] = some[(patterns.types_MC[some] == y).any(axis=1)]
        self.speed_M = layer.speed_K[patterns.class_M]
        rng = np.random.default_rng(1)
        keys = rng.integers(0, 1 << 63, 2 * E + K).astype(np.uint64) * np.uint64(2) + np.uint64(1)
        self.left_key_E, self.decided_key_E, self.class_key_K = keys[:E], keys[E : 2 * E], keys[2 * E :]

    def _root(self) -> _States:
        E = len(self.layer.load_E)
        return _States(
            None,
            np.zeros(1, dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.bitwise_or.reduce(self.all_EW, axis=0)[None],
            np.zeros((1, E), dtype=np.uint8),
            np.zeros((1, E), dtype=np.uint8),
            self.layer.size_K[None].astype(np.int16),
            np.array([self.types.slack]),
            np.array([self.types.spare], dtype=np.int16),
            np.array([self.types.budget], dtype=np.int16),
            np.zeros(1),
            np.zeros(1, dtype=np.uint64),
        )

    def _descend(self) -> tuple[tuple[float, SlotArray] | None, bool]:
        """Expand chunks of states, deepest first, until none is left or time is up."""
        best, leaf = np.inf, None
        complete = True
        stack = [self._root()]
        while stack:
            if self.stop():
                complete = False
                break
            chunk = stack.pop()
            if best < np.inf:
                chunk = chunk.take(chunk.worst_N < best * (1 - _ROUND))
            if not len(chunk):
                continue
            self.states += len(chunk)
            pivot_N = self._pivots(chunk)
            done_N = pivot_N < 0
            if done_N.any():
                row = int(np.argmin(np.where(done_N, chunk.worst_N, np.inf)))
                if chunk.worst_N[row] < best:
                    best, leaf = float(chunk.worst_N[row]), (chunk, row)
                    if self.total is not None:
                        break  # any plan within the limit will do
            try:
                children = self._children(chunk, *self._matches(chunk, pivot_N, best))
            except _StoppedError:
                complete = False
                break
            if self.beam is not None and len(children) > self.beam:
                # What has wasted least so far can still do most.
                complete = False
                children = children.take(np.argsort(-children.slack_N, kind="stable")[: self.beam])
            if len(children):
                stack += [
                    children.take(slice(start, start + _CHUNK)) for start in range(0, len(children), _CHUNK)
                ]
        if leaf is None:
            return None, complete
        return (max(best, self._idle()), self._rebuild(*leaf)), complete

    def _idle(self) -> float:
        """Time of a GPU that does nothing."""
        return float((self.layer.launch / self.layer.speed_K).max())

    def _pivots(self, states: _States) -> IntArray:
        """Return the heaviest expert that is undecided or has replicas left, -1 if all are done."""
        open_NE = ((states.decided_NE == 0) | (states.left_NE > 0))[:, self.layer.order_E]
        return np.where(open_NE.any(axis=1), self.layer.order_E[open_NE.argmax(axis=1)], -1)

    def _matches(self, states: _States, pivot_N: IntArray, best: float) -> tuple[IntArray, IntArray]:
        """Return all (state, pattern) pairs in which the pattern holds the pivot and fits the state."""
        patterns, parts = self.patterns, [np.zeros((2, 0), dtype=np.int64)]
        decided_N = states.decided_NE[np.arange(len(states)), pivot_N].astype(np.int64)
        key_N = np.where(pivot_N >= 0, pivot_N * 256 + decided_N, -1)
        for key in np.unique(key_N[key_N >= 0]).tolist():
            columns = self.with_type[divmod(key, 256)]
            if best < np.inf:
                time_M = (patterns.weight_M[columns] + self.layer.launch) / self.speed_M[columns]
                columns = columns[time_M < best * (1 - _ROUND)]
            rows, height = np.flatnonzero(key_N == key), max(1, _CELLS // max(len(columns), 1))
            for some in (rows[start : start + height] for start in range(0, len(rows), height)):
                if self.stop():
                    raise _StoppedError
                fits = patterns.waste_M[columns] <= states.slack_N[some, None] + self.slop
                for w in range(patterns.mask_MW.shape[1]):
                    fits &= (patterns.mask_MW[columns, w] & ~states.allowed_NW[some, None, w]) == 0
                if len(self.layer.size_K) > 1:
                    fits &= states.gpus_NK[some][:, patterns.class_M[columns]] > 0
                row, column = np.nonzero(fits)
                parts.append(np.stack([some[row], columns[column]]))
        both = np.concatenate(parts, axis=1)
        return both[0], both[1]

    def _children(self, states: _States, origin_N: IntArray, pattern_N: IntArray) -> _States:
        """Apply the patterns, drop what has no slots or slack left, and merge equal states."""
        types, patterns, layer = self.types, self.patterns, self.layer
        types_CN = patterns.types_MC[pattern_N].T
        spare_N = states.spare_N[origin_N] - patterns.empty_M[pattern_N]
        budget_N = states.budget_N[origin_N]
        slack_N = states.slack_N[origin_N] - patterns.waste_M[pattern_N]
        for type_N in types_CN:
            if self.stop():
                raise _StoppedError
            fresh_N = (type_N >= 0) & (states.decided_NE[origin_N, types.expert_Y[type_N]] == 0)
            extra_N = np.where(fresh_N, types.extra_Y[type_N], 0).astype(np.int16)
            spare_N, budget_N = spare_N - extra_N, budget_N - extra_N
            slack_N = slack_N - np.where(fresh_N, types.lost_Y[type_N], 0.0)
        keep = (spare_N >= 0) & (budget_N >= 0) & (slack_N >= -self.slop)
        origin_N, pattern_N, types_CN = origin_N[keep], pattern_N[keep], types_CN[:, keep]
        class_N = patterns.class_M[pattern_N]
        time_N = (patterns.weight_M[pattern_N] + layer.launch) / layer.speed_K[class_N]
        child = _States(
            states,
            origin_N,
            pattern_N,
            states.allowed_NW[origin_N],
            states.decided_NE[origin_N],
            states.left_NE[origin_N],
            states.gpus_NK[origin_N],
            slack_N[keep],
            spare_N[keep],
            budget_N[keep],
            np.maximum(states.worst_N[origin_N], time_N),
            states.hash_N[origin_N] + self.class_key_K[class_N],
        )
        child.gpus_NK[np.arange(len(child)), class_N] -= 1
        for type_N in types_CN:
            if self.stop():
                raise _StoppedError
            self._place(child, np.flatnonzero(type_N >= 0), type_N)
        return _merge(child)

    def _place(self, child: _States, row: IntArray, type_N: IntArray) -> None:
        """Put one replica of each row's type down, deciding its expert's replicas if that is still open."""
        types = self.types
        placed = type_N[row]
        expert, count = types.expert_Y[placed], types.count_Y[placed]
        fresh = child.decided_NE[row, expert] == 0
        new, new_expert, new_type, new_count = row[fresh], expert[fresh], placed[fresh], count[fresh]
        child.decided_NE[new, new_expert] = new_count
        child.left_NE[new, new_expert] = new_count
        child.allowed_NW[new] &= ~self.all_EW[new_expert] | self.one_YW[new_type]
        keys = self.decided_key_E[new_expert] + self.left_key_E[new_expert]
        child.hash_N[new] += new_count.astype(np.uint64) * keys
        child.left_NE[row, expert] -= 1
        child.hash_N[row] -= self.left_key_E[expert]
        last = child.left_NE[row, expert] == 0
        child.allowed_NW[row[last]] &= ~self.one_YW[placed[last]]

    def _rebuild(self, states: _States, row: int) -> SlotArray:
        layer, patterns = self.layer, self.patterns
        slots_GC = np.full((len(layer.class_G), int(layer.slots_K.max())), -1, dtype=np.int32)
        free = [list(np.flatnonzero(layer.class_G == k)) for k in range(len(layer.size_K))]
        while states.parent is not None:
            pattern = int(states.pattern_N[row])
            held = patterns.types_MC[pattern]
            held = np.sort(self.types.expert_Y[held[held >= 0]])
            slots_GC[free[int(patterns.class_M[pattern])].pop(0), : len(held)] = held
            row, states = int(states.origin_N[row]), states.parent
        return slots_GC


def _merge(states: _States) -> _States:
    """Keep the state with the smallest time so far of all that leave the same to do."""
    states = states.take(np.lexsort((states.worst_N, states.hash_N)))
    same = states.hash_N[1:] == states.hash_N[:-1]
    if same.any():
        # Equal hashes are compared in full: a collision costs a merge, never a state.
        for column in (states.left_NE, states.decided_NE, states.gpus_NK):
            same &= (column[1:] == column[:-1]).all(axis=1)
        states = states.take(np.concatenate([[True], ~same]))
    return states
