"""Re-planning for engines that split an expert's tokens evenly over its replicas: local search on few moves.

With an equal split every replica of expert e carries w[e] / r[e], so that changing the number of replicas
changes the load of all GPUs that hold one. The search lowers the *overflow*, the tokens above a wanted time
summed over the GPUs, by the change that lowers it most per replica moved:

========  ============================================================================================
add       a replica of an expert of a hot GPU elsewhere, on a free slot or one that yields
move      that replica itself, likewise
swap      it with a replica of another GPU (two moves)
drop      a replica whose expert has others (no move)
========  ============================================================================================

A replica *yields* when its expert has others; they then take its tokens. What was live at a place before
costs nothing to put back. Destroying and repairing (as in `shake`) then removes moves that turned out
needless. All candidates of a step are evaluated exactly and at once, as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.plan import best_bound, even_times, new_replicas
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.limits import Rules, mended_within, rows_of
from moeless_opt.solvers.replan.equal_wide import MANY_PAIRS, replan_equal_wide
from moeless_opt.solvers.replan.live import Content, mend_content, moves_between
from moeless_opt.solvers.replan.shake import put_back
from moeless_opt.solvers.replan.task import (
    Point,
    Replanned,
    ReplanTask,
    ReplanWish,
    front_of,
    seated,
    spread_budget,
)

__all__ = ["EqualState", "fill_equal", "replan_equal"]


_HOT = 8  # hottest GPUs that a step looks at
_MOST_BACK = 6  # GPUs put back in one round of destroying and repairing
_ENOUGH = 1e-9  # overflow, in units of the mean GPU load, that counts as none
_ROUNDS = 8  # of destroying and repairing, where none are wished for
_TRIES = 6  # wanted times tried for a layer that cannot reach its own


class EqualState:
    """A placement of one layer under an equal split, in units of the mean GPU load.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Loads.
    content : list of list of int
        Experts on each GPU; each has a replica.
    capacity_G : array of int, shape [G]
        Slots.
    room_G : array of float, shape [G]
        Load that each GPU may carry.
    live_EG : array of bool, shape [E, G]
        Where each expert is live: placing it there is no move.
    rules : Rules, optional
        Limits that the placement keeps, and changes to it shall.
    """

    def __init__(
        self,
        load_E: FloatArray,
        content: Sequence[Sequence[int]],
        capacity_G: IntArray,
        room_G: FloatArray,
        live_EG: BoolArray,
        rules: Rules | None = None,
    ) -> None:
        self.rules = rules
        self.load_E, self.capacity_G, self.room_G, self.live_EG = load_E, capacity_G, room_G, live_EG
        self.on_EG = np.zeros((len(load_E), len(content)), dtype=bool)
        for gpu, row in enumerate(content):
            self.on_EG[list(row), gpu] = True
        self.refresh()

    def refresh(self) -> None:
        """Recompute what follows from the membership."""
        self.count_E = self.on_EG.sum(axis=1)
        self.piece_E = self.load_E / self.count_E
        self.load_G = self.piece_E @ self.on_EG

    @property
    def overflow(self) -> float:
        """Load above the rooms, summed."""
        return float(np.maximum(self.load_G - self.room_G, 0.0).sum())

    def content(self) -> Content:
        """Experts on each GPU."""
        return [np.flatnonzero(column).tolist() for column in self.on_EG.T]

    def moves(self) -> int:
        """Count replicas that aren't live where they stand."""
        return int((self.on_EG & ~self.live_EG).sum())

    def apply(self, change: _Change) -> None:
        """Make a change."""
        for expert, gpu in change.drops:
            self.on_EG[expert, gpu] = False
        for expert, gpu in change.adds:
            self.on_EG[expert, gpu] = True
        self.refresh()


@dataclass(frozen=True, slots=True)
class _Change:
    rate: float  # overflow taken away per move
    adds: tuple[tuple[int, int], ...]
    drops: tuple[tuple[int, int], ...]


def fill_equal(
    state: EqualState,
    rng: np.random.Generator | None = None,
    budget: int | None = None,
    trace: Callable[[EqualState], None] | None = None,
    stop: Stop | None = None,
) -> bool:
    """Lower the overflow until none is left; False if no change helps, or moves or time are spent.

    Parameters
    ----------
    state : EqualState
        Changed in place.
    rng : numpy Generator, optional
        Perturbs the choice of the change.
    budget : int, optional
        Moves (against the live placement) that the state may have.
    trace : callable, optional
        Shown the state after each change.
    stop : Stop, optional
        Asked before each change.
    """
    stop = stop or NeverStop()
    steps = 4 * state.on_EG.shape[1] + int(state.count_E.sum())
    for _ in range(steps):
        if state.overflow <= _ENOUGH:
            return budget is None or state.moves() <= budget
        if budget is not None and state.moves() > budget:
            return False
        if stop():
            return False
        change = _best_change(state, rng)
        if change is None:
            return False
        state.apply(change)
        if trace is not None:
            trace(state)
    return False


def _best_change(state: EqualState, rng: np.random.Generator | None) -> _Change | None:
    over_G = state.load_G - state.room_G
    hot = np.argsort(-over_G, kind="stable")[:_HOT]
    hot = hot[over_G[hot] > 0.0]
    gpu_P, expert_P = np.nonzero(state.on_EG.T[hot])
    gpu_P = hot[gpu_P]
    found = [
        _best_swap(state, over_G, gpu_P, expert_P, rng),
        *_best_placing(state, over_G, gpu_P, expert_P, rng),
    ]
    best = max(
        (change for change in found if change is not None), key=lambda change: change.rate, default=None
    )
    return best if best is not None and best.rate > 1e-12 else None


def _noise(rng: np.random.Generator | None, shape: tuple[int, ...]) -> FloatArray | float:
    return 1.0 if rng is None else rng.uniform(0.6, 1.0, size=shape)


def _rate(gain: FloatArray, cost: NDArray[Any]) -> FloatArray:
    """Gain per move; what costs nothing counts as a tenth of a move."""
    rate: FloatArray = gain / np.where(cost > 0, cost, 0.1)
    return rate


def _best_swap(
    state: EqualState,
    over_G: FloatArray,
    gpu_P: IntArray,
    expert_P: IntArray,
    rng: np.random.Generator | None,
) -> _Change | None:
    """Exchange a replica of a hot GPU with a lighter one of another."""
    on, live, piece_E = state.on_EG, state.live_EG, state.piece_E
    expert_Q, gpu_Q = np.nonzero(on)
    shift_PQ = piece_E[expert_P][:, None] - piece_E[expert_Q][None, :]
    source, target = over_G[gpu_P][:, None], over_G[gpu_Q][None, :]
    before = np.maximum(source, 0.0) + np.maximum(target, 0.0)
    gain = before - np.maximum(source - shift_PQ, 0.0) - np.maximum(target + shift_PQ, 0.0)
    barred = (shift_PQ <= 0.0) | on[expert_P][:, gpu_Q] | on[expert_Q][:, gpu_P].T
    if (rules := state.rules) is not None:
        barred |= ~rules.may_move(on, expert_P, gpu_P, gpu_Q)
        barred |= ~rules.may_move(on, expert_Q, gpu_Q, gpu_P).T
    cost = (~live[expert_P][:, gpu_Q]).astype(np.int64) + (~live[expert_Q][:, gpu_P].T)
    rate = np.where(barred, -1.0, _rate(gain, cost) * _noise(rng, gain.shape))
    if rate.size == 0:
        return None
    p, q = np.unravel_index(int(rate.argmax()), rate.shape)
    here, there = (int(expert_P[p]), int(gpu_P[p])), (int(expert_Q[q]), int(gpu_Q[q]))
    return _Change(float(rate[p, q]), ((here[0], there[1]), (there[0], here[1])), (here, there))


def _yields(state: EqualState) -> tuple[IntArray, IntArray, FloatArray]:
    """Places for a replica: GPU, the expert that yields (-1: free slot), and how the loads change then."""
    G = state.on_EG.shape[1]
    free = np.flatnonzero(state.on_EG.sum(axis=0) < state.capacity_G)
    may_EG = state.on_EG & (state.count_E > 1)[:, None]
    if state.rules is not None:
        may_EG &= state.rules.may_drop_EG(state.on_EG)
    expert_Y, gpu_Y = np.nonzero(may_EG)
    keep = ~np.isin(gpu_Y, free)
    expert_Y, gpu_Y = expert_Y[keep], gpu_Y[keep]
    fewer_Y = state.count_E[expert_Y] - 1
    shift_YG = state.on_EG[expert_Y] * (state.piece_E[expert_Y] / fewer_Y)[:, None]
    shift_YG[np.arange(len(gpu_Y)), gpu_Y] = -state.piece_E[expert_Y]
    return (
        np.concatenate([free, gpu_Y]),
        np.concatenate([np.full(len(free), -1), expert_Y]),
        np.concatenate([np.zeros((len(free), G)), shift_YG]),
    )


def _best_placing(
    state: EqualState,
    over_G: FloatArray,
    gpu_P: IntArray,
    expert_P: IntArray,
    rng: np.random.Generator | None,
) -> list[_Change | None]:
    """Add a replica of a hot GPU's expert elsewhere, move the hot replica itself, or drop it."""
    gpu_Y, yields_Y, shift_YG = _yields(state)
    if len(gpu_Y) == 0:
        return []
    total = float(np.maximum(over_G, 0.0).sum())
    places = np.arange(len(gpu_Y))
    after_YG = over_G + shift_YG
    experts = np.unique(expert_P)
    found: list[_Change | None] = []
    # Add: every replica of the expert gets lighter, the new one as heavy as they.
    piece_A = state.load_E[experts] / (state.count_E[experts] + 1)
    lighter_AG = state.on_EG[experts] * (piece_A - state.piece_E[experts])[:, None]
    over_AYG = after_YG[None] + lighter_AG[:, None]
    over_AYG[:, places, gpu_Y] += piece_A[:, None]
    found.append(_pick(state, total, over_AYG, experts, None, gpu_Y, yields_Y, rng))
    # Move: only the hot GPU gets lighter.
    piece_P = state.piece_E[expert_P]
    over_PYG = np.repeat(after_YG[None], len(expert_P), axis=0)
    over_PYG[np.arange(len(expert_P)), :, gpu_P] -= piece_P[:, None]
    over_PYG[:, places, gpu_Y] += piece_P[:, None]
    found.append(_pick(state, total, over_PYG, expert_P, gpu_P, gpu_Y, yields_Y, rng))
    # Drop: the others take it.
    dropped = np.flatnonzero(yields_Y >= 0)
    gain_D = total - np.maximum(after_YG[dropped], 0.0).sum(axis=1)
    if len(dropped) and gain_D.max() > 1e-12:
        first = int(dropped[int(gain_D.argmax())])
        found.append(_Change(float(gain_D.max()) / 0.1, (), ((int(yields_Y[first]), int(gpu_Y[first])),)))
    return found


def _pick(
    state: EqualState,
    total: float,
    over_XYG: FloatArray,
    expert_X: IntArray,
    leaves_X: IntArray | None,
    gpu_Y: IntArray,
    yields_Y: IntArray,
    rng: np.random.Generator | None,
) -> _Change | None:
    gain_XY = total - np.maximum(over_XYG, 0.0).sum(axis=2)
    barred = state.on_EG[expert_X][:, gpu_Y] | (expert_X[:, None] == yields_Y[None, :])
    if (rules := state.rules) is not None and leaves_X is None:
        barred |= ~rules.allowed_EG[expert_X][:, gpu_Y]
        barred |= (state.count_E >= rules.most_E)[expert_X][:, None]
        if state.count_E.sum() >= rules.total:
            barred |= yields_Y < 0
    elif rules is not None and leaves_X is not None:
        barred |= ~rules.may_move(state.on_EG, expert_X, leaves_X, gpu_Y)
    cost = (~state.live_EG[expert_X][:, gpu_Y]).astype(np.int64)
    rate = np.where(barred, -1.0, _rate(gain_XY, cost) * _noise(rng, gain_XY.shape))
    x, y = np.unravel_index(int(rate.argmax()), rate.shape)
    expert, gpu, yields = int(expert_X[x]), int(gpu_Y[y]), int(yields_Y[y])
    drops = ((yields, gpu),) if yields >= 0 else ()
    if leaves_X is not None:
        drops = (*drops, (expert, int(leaves_X[x])))
    return _Change(float(rate[x, y]), ((expert, gpu),), drops)


# -- all layers ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Layer:
    load_E: FloatArray
    capacity_G: IntArray
    speed_G: FloatArray
    live: list[frozenset[int]]
    live_EG: BoolArray
    start: Content
    content: Content
    target: float
    rng: np.random.Generator
    rules: Rules | None = None
    reached: bool = True
    cut: bool = False

    def state(self, content: Content, time: float) -> EqualState:
        room_G = self.speed_G * time * (1.0 + 1e-12)
        return EqualState(self.load_E, content, self.capacity_G, room_G, self.live_EG, self.rules)

    def time(self, content: Content) -> float:
        state = self.state(content, self.target)
        return float((state.load_G / self.speed_G).max())


def replan_equal(task: ReplanTask, wish: ReplanWish | None = None, *, stop: Stop | None = None) -> Replanned:
    """Move few replicas until, tokens split evenly, the largest GPU time is within a tolerance of the bound.

    Parameters and errors are those of `fractional.replan_fractional`; 8 rounds of destroying and repairing
    run for each layer if the wish names no other number.

    Returns
    -------
    Replanned
        Placement, equal shares, times, moves and bounds. A layer that the search cannot bring to the wanted
        time has the best time that it found; ``least_moves_L`` is one where the live placement misses it.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    if task.load_LE.shape[1] * len(task.speed_G) >= MANY_PAIRS:
        if task.rules is None:
            return replan_equal_wide(task, wish, stop=stop)
        if wish.max_moves is None:
            return _wide_within(task, task.rules, wish, stop)
    load, speed = task.load_LE, task.speed_G
    L, E = load.shape
    if wish.bound_L is None:
        bound = best_bound(load, task.capacity_LG, speed, "equal")[0]
    else:
        bound = np.asarray(wish.bound_L, dtype=np.float64)
    mean_L = np.where(load.sum(axis=1) > 0.0, load.sum(axis=1) / speed.sum(), 1.0)
    layers = []
    for layer in range(L):
        target = (1.0 + wish.tolerance) * float(bound[layer] / mean_L[layer])
        layers.append(_begin(task, layer, mean_L[layer], target, wish))
    forced_L = np.array([moves_between(one.live, one.start) for one in layers], dtype=np.int64)
    wish.check_budget(forced_L)
    time = [one.time(one.start) for one in layers]
    least = [int(now > one.target * (1.0 + 1e-9)) for now, one in zip(time, layers, strict=True)]
    # The worst first: who knows for how many there is time.
    for layer in sorted(range(L), key=lambda layer: (layers[layer].target - time[layer], layer)):
        if least[layer]:
            _plan_layer(layers[layer], stop)
    _improve(layers, wish.most_rounds(_ROUNDS), stop)
    if wish.max_moves is not None:
        _keep_to_budget(layers, wish.price_L(L), wish.max_moves, stop)
    new = seated(task, [one.content for one in layers])
    return Replanned(
        slots_LGC=new,
        share_LGC=equal_shares(new, E),
        time_L=np.array([one.time(one.content) for one in layers]) * mean_L * (load.sum(axis=1) > 0.0),
        moves_L=np.array([moves_between(one.live, one.content) for one in layers], dtype=np.int64),
        forced_L=forced_L,
        bound_L=bound,
        target_L=(1.0 + wish.tolerance) * bound,
        least_moves_L=np.array(least, dtype=np.int64),
        cut_L=np.array([one.cut for one in layers]),
    )


def _wide_within(task: ReplanTask, rules: list[Rules], wish: ReplanWish, stop: Stop) -> Replanned:
    """Over many GPUs: as without limits, then mended where that breaks one."""
    found = replan_equal_wide(replace(task, rules=None), wish, stop=stop)
    load, speed = task.load_LE, task.speed_G
    contents = [
        mended_within(one, load_E, [[e for e in row if e >= 0] for row in rows], speed)
        for one, load_E, rows in zip(rules, load, found.slots_LGC.tolist(), strict=True)
    ]
    new = seated(task, contents)
    return replace(
        found,
        slots_LGC=new,
        share_LGC=equal_shares(new, load.shape[1]),
        time_L=even_times(load, new, speed).max(axis=1),
        moves_L=new_replicas(new, task.live_LGC, load.shape[1]).sum(axis=(1, 2)),
    )


def _begin(task: ReplanTask, layer: int, mean: float, target: float, wish: ReplanWish) -> _Layer:
    load_E = task.load_LE[layer] / mean
    rows, capacity_G, speed_G = task.live_LGC[layer].tolist(), task.capacity_LG[layer], task.speed_G
    from_rows = rows if wish.start_LGC is None else wish.start_LGC[layer].tolist()
    start = mend_content(
        load_E.tolist(), from_rows, capacity_G.tolist(), speed_G.tolist(), layer, wish.repair
    )
    rules = None if task.rules is None else task.rules[layer]
    if rules is not None:
        start = mended_within(rules, load_E, start, speed_G)
    live = [frozenset(expert for expert in row if 0 <= expert < len(load_E)) for row in rows]
    live_EG = np.array([[expert in row for row in live] for expert in range(len(load_E))])
    rng = np.random.default_rng((wish.seed, layer))
    return _Layer(load_E, capacity_G, speed_G, live, live_EG, start, start, target, rng, rules)


def _plan_layer(one: _Layer, stop: Stop) -> None:
    """Reach the wanted time; else bisect for one that is within reach."""
    if stop():
        one.reached, one.cut = False, True
        return
    state = one.state(one.start, one.target)
    one.reached = fill_equal(state, stop=stop)
    best = min(one.time(one.start), time := one.time(state.content()))
    if one.reached or time <= best:
        one.content = state.content()
    low, high = one.target, best
    for _ in range(0 if one.reached else _TRIES):
        if stop():
            one.cut = True
            break
        middle = 0.5 * (low + high)
        state = one.state(one.start, middle)
        done = fill_equal(state, stop=stop)
        time = one.time(state.content())
        if time < high:
            high, one.content = time, state.content()
        if not done:
            low = middle
        if high - low < 1e-3 * high:
            break


def _improve(layers: list[_Layer], rounds: float, stop: Stop) -> None:
    """Destroy and repair each layer in turn."""
    turn = 0
    active = [one for one in layers if one.reached and one.content is not one.start]
    while active and turn < rounds and not stop():
        for one in active:
            if stop():
                break
            _shake(one, stop)
        turn += 1


def _shake(one: _Layer, stop: Stop) -> None:
    changed = [
        gpu for gpu, row in enumerate(one.content) if any(expert not in one.live[gpu] for expert in row)
    ]
    if not changed:
        return
    moves = moves_between(one.live, one.content)
    size = int(one.rng.integers(1, min(len(changed), _MOST_BACK) + 1))
    chosen = one.rng.choice(changed, size=size, replace=False).tolist()
    trial = put_back(one.live, one.content, chosen, len(one.load_E))
    if one.rules is not None and not one.rules.keeps(rows_of(trial, len(one.load_E))):
        return
    state = one.state(trial, one.target)
    if fill_equal(state, one.rng, moves, stop=stop):
        one.content = state.content()


def _keep_to_budget(layers: list[_Layer], price: list[int], budget: int, stop: Stop) -> None:
    spent = sum(by * moves_between(one.live, one.content) for one, by in zip(layers, price, strict=True))
    if spent <= budget:
        return
    fronts = [_frontier(one, stop) for one in layers]
    contents = spread_budget(fronts, [float(one.load_E.sum()) for one in layers], price, budget)
    for one, content in zip(layers, contents, strict=True):
        one.content = content


def _frontier(one: _Layer, stop: Stop) -> list[Point]:
    """Points between the start and the finished plan, each with more moves and faster than the last."""
    points: list[Point] = []

    def note(content: Content) -> None:
        points.append((moves_between(one.live, content), max(one.time(content), one.target), content))

    note(one.start)
    note(one.content)
    first, last = points[0][1], points[1][1]
    for part in (0.5, 0.25, 0.1, 0.0):
        if stop():
            break
        state = one.state(one.start, last + part * (first - last))
        fill_equal(state, trace=lambda now: note(now.content()), stop=stop)
    return front_of(points)
