"""Small layers under rules, expert by expert: a search that is exact where it never had to cut.

Experts are placed from the heaviest to the lightest, each on a set of GPUs out of all sets that its rules
allow. A state keeps what its placement takes so far: with given shares (even ones, or by where the tokens
come from) the tokens of every GPU; with free ones, for every set of GPUs, the tokens that can go nowhere else
(the largest over the speed of the set is the least time, by the max-flow min-cut theorem). Both only
grow, so that a state's time is a bound on all that follows from it, and what is no better than a plan in
hand is dropped. All sets are tried for all states at once, by sums and maxima over supersets. If more
states are left than there is room for, the most promising stay; if that never happens, the best that was
found is proven to be best. The covariance risk may fall where tokens come on top: by it states are
ranked, none is dropped for it, and nothing is proven.

Axes: W states, M sets of GPUs, T scenarios, E experts, G GPUs.

References
----------
Beam search: Lowerre (1976). Zeta transforms over subsets: Yates (1937); the time of a placement: Goldberg
(1984), "Finding a maximum density subgraph".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.solvers.limits.rules import Rules

__all__ = ["MOST_GPUS", "Front", "Nearest", "gpu_sets", "search_layer"]

MOST_GPUS = 8
"""GPUs with slots up to which a layer is searched so."""
ROOM = 1 << 15
"""States x sets of GPUs that are looked at for an expert."""
_EQUAL = 1e-9
_MOVES = 64
"""Moves that are told apart; plans with more count as having so many."""

Measure = Callable[[FloatArray], FloatArray]


def gpu_sets(gpus: int) -> BoolArray:
    """All sets of GPUs, by number: bit g is GPU g, shape [M, G]."""
    return np.asarray((np.arange(1 << gpus)[:, None] >> np.arange(gpus)) & 1 == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """Shares by the nearest replica.

    Parameters
    ----------
    serve_TEMG : array, shape [T or 1, E or 1, M, G with slots]
        Share of an expert that each GPU serves where the expert is on a set of GPUs (`gpu_sets`).
    node_G : array of int, shape [G]
        Node of each GPU.
    """

    serve_TEMG: FloatArray
    node_G: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What was found: placements by moves, each quicker than all with fewer.

    Attributes
    ----------
    held : list of array of bool, shape [E, G]
        Placements.
    time, moves : list
        Largest GPU time of each by the risk, and replicas that move.
    exact : bool
        Whether nothing was cut: then no other placement is quicker, nor as quick with fewer moves.
    """

    held: list[BoolArray]
    time: list[float]
    moves: list[int]
    exact: bool


def search_layer(
    load_TE: FloatArray,
    speed_G: FloatArray,
    rules: Rules,
    risk: Measure,
    *,
    equal: bool,
    nearest: Nearest | None = None,
    each_gpu: Measure | None = None,
    limit: float = np.inf,
    live_EG: BoolArray | None = None,
    room: int = ROOM,
) -> Front | None:
    """Search a layer for placements of least time, and of fewest moves where something is live.

    Parameters
    ----------
    load_TE : array of float, shape [T, E]
        Tokens in each scenario.
    speed_G : array of float, shape [G]
        Relative speeds.
    rules : Rules
        What is allowed.
    risk : callable
        Times by scenario, shape [T, X], to one value each, shape [X]; it may not fall where a time rises.
    equal : bool
        Whether shares are even.
    nearest : Nearest, optional
        Where they are neither even nor free.
    each_gpu : callable, optional
        Where given shares are judged by a risk of each GPU: times of GPUs by scenario [T, X] to one value
        each, [1, X], which `risk` leaves as it is.
    limit : float
        Only what takes less is of interest.
    live_EG : array of bool, shape [E, G], optional
        Where replicas are live; by default moves do not count.
    room : int
        States x sets that are looked at for each expert.

    Returns
    -------
    Front or None
        None for layers of too many GPUs. A front without placements that is exact says that there is none.
    """
    used = np.flatnonzero(rules.capacity_G > 0)
    if len(used) > MOST_GPUS:
        return None
    order = np.lexsort((np.arange(load_TE.shape[1]), -load_TE.max(0)))
    search = _Search(
        load_TE[:, order], speed_G[used], rules, used, order, risk, equal, nearest, each_gpu, live_EG
    )
    return search.run(limit, max(room // len(search.set_MG), 8))


@dataclass(slots=True, eq=False)
class _States:
    """What is kept of every state: time so far by scenario, tokens by set or GPU, slots, moves, its way."""

    time_TW: FloatArray
    tokens_TWS: FloatArray
    left_WG: IntArray
    total_W: IntArray
    moves_W: IntArray
    way_WE: IntArray

    def take(self, index: IntArray) -> _States:
        return _States(
            self.time_TW[:, index],
            self.tokens_TWS[:, index],
            self.left_WG[index],
            self.total_W[index],
            self.moves_W[index],
            self.way_WE[index],
        )


class _Search:
    """The tables of one layer. Sets of GPUs are numbers: bit g is GPU g of those with slots."""

    def __init__(
        self,
        load_TE: FloatArray,
        speed_G: FloatArray,
        rules: Rules,
        used: IntArray,
        order: IntArray,
        risk: Measure,
        equal: bool,
        nearest: Nearest | None,
        each_gpu: Measure | None,
        live_EG: BoolArray | None,
    ) -> None:
        self.load_TE, self.speed_G, self.rules, self.used, self.order = load_TE, speed_G, rules, used, order
        self.risk, self.equal, self.nearest, self.each_gpu = risk, equal, nearest, each_gpu
        gpus = len(used)
        self.set_MG = gpu_sets(gpus)
        self.size_M = self.set_MG.sum(1)
        self.speed_M = np.maximum(self.set_MG @ speed_G, 1e-300)
        self.allowed_EG = rules.allowed_EG[np.ix_(order, used)]
        self.pinned_EG = rules.pinned_EG[np.ix_(order, used)]
        self.live_EG = None if live_EG is None else live_EG[np.ix_(order, used)]
        self.good_EM = np.array([self._sets_of(e) for e in range(len(order))])
        least_E = np.where(self.good_EM, self.size_M, len(used) + 1).min(1)
        self.impossible = bool((least_E > len(used)).any())
        self.after_E = np.append(np.cumsum(least_E[::-1])[::-1][1:], 0)  # replicas that later experts need
        self.capacity_G = rules.capacity_G[used]
        self.slots = min(rules.total, int(np.minimum(self.capacity_G, len(order)).sum()))
        self.alike = self._alike()
        self.rest_EK = self._rest()

    def _sets_of(self, e: int) -> BoolArray:
        """Sets of GPUs that an expert may be on, shape [M]."""
        rules, at = self.rules, int(self.order[e])
        good_M = (self.size_M >= max(int(rules.least_E[at]), 1)) & (self.size_M <= rules.most_E[at])
        good_M &= ~(self.set_MG & ~self.allowed_EG[e]).any(1)
        good_M &= ~(~self.set_MG & self.pinned_EG[e]).any(1)
        if rules.spread_E[at] > 1:
            domain_G = rules.domain_G[self.used]
            reached = [self.set_MG[:, domain_G == d].any(1) for d in np.unique(domain_G)]
            good_M &= np.sum(reached, axis=0) >= rules.spread_E[at]
        if not self.load_TE[:, e].any():  # no use of a second one
            good_M &= ~self._some_within(good_M) | ~good_M
        return np.asarray(good_M)

    def _some_within(self, good_M: BoolArray) -> BoolArray:
        """Sets that have a smaller one of these in them, shape [M]."""
        within_M = np.zeros(len(good_M), dtype=np.bool_)
        for g in range(len(self.used)):
            without = np.arange(len(good_M)) & ~(1 << g)
            within_M |= self.set_MG[:, g] & good_M[without]
        for g in range(len(self.used)):
            without = np.arange(len(good_M)) & ~(1 << g)
            within_M |= self.set_MG[:, g] & within_M[without]
        return within_M

    def _alike(self) -> list[tuple[int, int]]:
        """Neighbours among GPUs of which it does not matter which is which."""
        key = [
            (
                int(self.capacity_G[g]),
                float(self.speed_G[g]),
                int(self.rules.domain_G[at]),
                0 if self.nearest is None else int(self.nearest.node_G[at]),
            )
            for g, at in enumerate(self.used.tolist())
        ]
        columns = [self.allowed_EG, self.pinned_EG] + ([] if self.live_EG is None else [self.live_EG])
        pairs: list[tuple[int, int]] = []
        last: dict[tuple[object, ...], int] = {}
        for g in range(len(self.used)):
            name = (*key[g], *(column[:, g].tobytes() for column in columns))
            if name in last:
                pairs.append((last[name], g))
            last[name] = g
        return pairs

    def _rest(self) -> FloatArray:
        """Least time of the experts from e on if they had k replicas, shape [E + 1, slots + 1].

        Giving the next replica to the largest load per replica is best for the largest of them.
        """
        experts = len(self.order)
        rest_EK = np.zeros((experts + 1, self.slots + 1))
        if self.load_TE.shape[0] > 1:
            return rest_EK
        load_E, top = self.load_TE[0], float(self.speed_G.max())
        most_E = np.minimum(self.rules.most_E[self.order], len(self.used))
        for e in range(experts):
            count_E = np.ones(experts - e, dtype=np.int64)
            rest_EK[e, : experts - e] = np.inf
            for k in range(experts - e, self.slots + 1):
                piece_E = load_E[e:] / count_E
                at = int(piece_E.argmax())
                rest_EK[e, k] = piece_E[at] / top
                if count_E[at] >= most_E[e + at]:
                    rest_EK[e, k:] = piece_E[at] / top
                    break
                count_E[at] += 1
        return rest_EK

    def _over(self, value_XM: FloatArray, join: np.ufunc) -> FloatArray:
        """For every set the join over all of its supersets, in place."""
        shape = value_XM.shape
        gpus = len(self.used)
        cube = value_XM.reshape(*shape[:-1], *(2,) * gpus)
        for axis in range(len(shape) - 1, len(shape) - 1 + gpus):
            low = (slice(None),) * axis + (0,)
            high = (slice(None),) * axis + (1,)
            cube[low] = join(cube[low], cube[high])
        return value_XM

    def run(self, limit: float, width: int) -> Front:
        if self.impossible:
            return Front(held=[], time=[], moves=[], exact=True)
        experts, gpus = len(self.order), len(self.used)
        scenarios = len(self.load_TE)
        wide = gpus if self._given else len(self.set_MG)
        states = _States(
            np.zeros((scenarios if self.each_gpu is None else 1, 1)),
            np.zeros((scenarios, 1, wide)),
            self.capacity_G[None].copy(),
            np.zeros(1, dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.zeros((1, experts), dtype=np.int64),
        )
        mean_T = self.load_TE.sum(1) / self.speed_G.sum()
        exact = self.each_gpu is None
        for e in range(experts):
            states, cut = self._step(e, states, limit, width, mean_T)
            exact &= not cut
            if not len(states.moves_W):
                return Front(held=[], time=[], moves=[], exact=exact)
        return self._front(states, exact)

    def _step(
        self, e: int, states: _States, limit: float, width: int, mean_T: FloatArray
    ) -> tuple[_States, bool]:
        """Place one expert in every way that fits, and keep the most promising states."""
        fits_WM = self._fits(e, states)
        with np.errstate(over="ignore"):  # where no room is left, no time is enough
            time_TWM, weight_WM = self._times(e, states, mean_T)
        slots_WM = states.total_W[:, None] + self.size_M
        left_WM = np.clip(self.slots - slots_WM, 0, self.slots)
        shape = time_TWM.shape
        floor_T = mean_T if self.each_gpu is None else self.each_gpu(mean_T[:, None])[:, 0]
        value_WM = self.risk(np.maximum(time_TWM, floor_T[:, None, None]).reshape(shape[0], -1)).reshape(
            shape[1:]
        )
        value_WM = np.maximum(value_WM, self.rest_EK[e + 1][left_WM])
        if self.each_gpu is None or e + 1 == len(self.order):
            fits_WM &= value_WM < limit * (1 - _EQUAL)
        w_X, m_X = np.nonzero(fits_WM)
        moves_X = states.moves_W[w_X]
        if self.live_EG is not None:
            moves_X = np.minimum(moves_X + (self.set_MG[m_X] & ~self.live_EG[e]).sum(1), _MOVES)
        value_X, weight_X = value_WM[w_X, m_X], weight_WM[w_X, m_X]
        rank = np.lexsort((m_X, w_X, weight_X, np.rint(value_X / max(float(mean_T.max()), 1e-300) * 1e6)))
        w_X, m_X, moves_X = w_X[rank], m_X[rank], moves_X[rank]
        chosen, cut = self._chosen(moves_X, width)
        w_X, m_X, moves_X = w_X[chosen], m_X[chosen], moves_X[chosen]
        new = states.take(w_X)
        new.time_TW = time_TWM[:, w_X, m_X]
        self._add(e, new, m_X)
        new.left_WG = new.left_WG - self.set_MG[m_X]
        new.total_W = new.total_W + self.size_M[m_X]
        new.moves_W = moves_X
        new.way_WE[:, e] = m_X
        kept = self._distinct(new) if len(w_X) else w_X
        return (new if len(kept) == len(w_X) else new.take(kept)), cut

    def _chosen(self, moves_X: IntArray, width: int) -> tuple[IntArray, bool]:
        """The first `width`; where moves count, half of them the first of each number of moves in turn."""
        if len(moves_X) <= width:
            return np.arange(len(moves_X)), False
        if self.live_EG is None:
            return np.arange(width), True
        nth_X = np.zeros(len(moves_X), dtype=np.int64)
        for moves in np.unique(moves_X):
            same = np.flatnonzero(moves_X == moves)
            nth_X[same] = np.arange(len(same))
        turn = np.lexsort((moves_X, nth_X))[: width // 2]
        rest = np.setdiff1d(np.arange(len(moves_X)), turn)[: width - len(turn)]
        return np.sort(np.concatenate([turn, rest])), True

    def _fits(self, e: int, states: _States) -> BoolArray:
        """Where an expert fits the slots, and GPUs that are alike are filled in their order, [W, M]."""
        full_W = ((states.left_WG == 0) << np.arange(len(self.used))).sum(1)
        fits_WM = self.good_EM[e] & (full_W[:, None] & np.arange(len(self.set_MG)) == 0)
        fits_WM &= (states.total_W[:, None] + self.size_M + self.after_E[e]) <= self.slots
        empty_WG = states.left_WG == self.capacity_G
        for first, second in self.alike:
            both_W = empty_WG[:, first] & empty_WG[:, second]
            fits_WM &= ~(both_W[:, None] & (self.set_MG[:, second] & ~self.set_MG[:, first]))
        return np.asarray(fits_WM)

    def _times(self, e: int, states: _States, mean_T: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Time of every state with an expert on every set, [T, W, M], and how uneven it is, [W, M]."""
        tokens_TWS, load_T = states.tokens_TWS, self.load_TE[:, e]
        unit_T = np.maximum(mean_T, 1e-300)
        if self._given:
            piece_TMG = self._pieces(e)
            time_TWM = np.repeat(states.time_TW[:, :, None], len(self.set_MG), axis=2)
            if self.each_gpu is not None:
                time_TWM[:] = 0.0
            weight_WM = np.zeros(time_TWM.shape[1:])
            # What is to come has to go where slots are left.
            open_TWM = (
                np.zeros((len(load_T), *time_TWM.shape[1:])) + self.load_TE[:, e + 1 :].sum(1)[:, None, None]
            )
            open_WM = np.zeros(time_TWM.shape[1:])
            for g, speed in enumerate(self.speed_G.tolist()):
                here = (tokens_TWS[:, :, g, None] + piece_TMG[:, None, :, g]) / speed
                np.maximum(time_TWM, here if self.each_gpu is None else self.each_gpu(here), out=time_TWM)
                left_WM = states.left_WG[:, g, None] - self.set_MG[:, g]
                open_TWM += np.where(left_WM > 0, here * speed, 0.0)
                open_WM += np.where(left_WM > 0, speed, 0.0)
                weight_WM += ((here / unit_T[:, None, None]) ** 4).sum(0)
            if e + 1 < len(self.order) and self.each_gpu is None:
                np.maximum(time_TWM, open_TWM / np.maximum(open_WM, 1e-300), out=time_TWM)
            return time_TWM, weight_WM
        before = tokens_TWS / self.speed_M
        after = (tokens_TWS + load_T[:, None, None]) / self.speed_M
        before[:, :, 0], after[:, :, 0] = 0.0, 0.0
        grows = ((after / unit_T[:, None, None]) ** 4 - (before / unit_T[:, None, None]) ** 4).sum(0)
        weight_WM = ((before / unit_T[:, None, None]) ** 4).sum((0, 2))[:, None] + self._over(grows, np.add)
        time_TWM = np.maximum(self._over(after, np.maximum), states.time_TW[:, :, None])
        return time_TWM, weight_WM

    @property
    def _given(self) -> bool:
        """Whether shares follow from the placement."""
        return self.equal or self.nearest is not None

    def _pieces(self, e: int) -> FloatArray:
        """Tokens of an expert that every GPU serves on every set, [T, M, G]."""
        load_T = self.load_TE[:, e]
        if self.nearest is None:
            return np.asarray((load_T[:, None] / np.maximum(self.size_M, 1))[:, :, None] * self.set_MG)
        serve_TEMG = self.nearest.serve_TEMG
        at = int(self.order[e]) if serve_TEMG.shape[1] > 1 else 0
        return np.asarray(load_T[:, None, None] * serve_TEMG[:, at])

    def _add(self, e: int, new: _States, m_X: IntArray) -> None:
        """Tokens of the states with the expert on its set."""
        load_T = self.load_TE[:, e]
        if self._given:
            new.tokens_TWS = new.tokens_TWS + self._pieces(e)[:, m_X]
        else:
            inside_XS = (m_X[:, None] & np.arange(len(self.set_MG))) == m_X[:, None]
            new.tokens_TWS = new.tokens_TWS + load_T[:, None, None] * inside_XS

    def _distinct(self, states: _States) -> IntArray:
        """The first of states that will never differ."""
        tokens_WX = np.moveaxis(states.tokens_TWS, 1, 0).reshape(len(states.left_WG), -1)
        # Sums in another order differ by rounding.
        scale = max(float(tokens_WX.max(initial=0.0)), 1e-300)
        rows = np.column_stack(
            [np.rint(tokens_WX / scale * 1e12), states.left_WG, states.total_W, states.moves_W]
        ).astype(np.int64)
        _, first = np.unique(rows, axis=0, return_index=True)
        return np.sort(first)

    def _front(self, states: _States, exact: bool) -> Front:
        """Of the finished states those that are quicker than all with fewer moves."""
        value_W = self.risk(states.time_TW)
        found = Front(held=[], time=[], moves=[], exact=exact)
        best = np.inf
        rank = np.lexsort(
            (states.total_W, np.rint(value_W / max(value_W.min(initial=1.0), 1e-300) * 1e9), states.moves_W)
        )
        for w in rank.tolist():
            if value_W[w] < best * (1 - _EQUAL):
                best = float(value_W[w])
                held_EG = np.zeros(self.rules.allowed_EG.shape, dtype=np.bool_)
                held_EG[np.ix_(self.order, self.used)] = self.set_MG[states.way_WE[w]]
                found.held.append(held_EG)
                found.time.append(best)
                found.moves.append(int(states.moves_W[w]))
        return found
