"""Threshold accepting on the placement of one layer: tokens that pay little, on GPUs that end in time.

Plain code that Numba compiles as it stands (`_kernels`): the same additions in the same order, so that both
find the same placement. A step exchanges the contents of two slots, or puts another expert into one; it is
taken if what it adds to the cost is below a threshold that is drawn, smaller and smaller (Dueck and Scheuer,
1990). What GPUs carry beyond the limit costs, more and more. The best placement within the limit is kept.

What a replica serves follows from the placement. With free shares and with the nearest replica, every source
sends to its cheapest replicas, evenly over equals; an even split divides by the number of replicas, and at
each level of a tree of costs a group keeps what it serves of its own.

Axes: T scenarios, S sources, E experts, G GPUs, C slots, M sets of sources, K levels, B groups of a level.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.solvers.twins import source_name

__all__ = ["Field", "State", "Tune", "anneal", "anneal_name"]

_PRIME, _ROOT = 2147483647, 48271  # Park and Miller's minimal standard generator
_ASK = 4096  # steps between two looks at the stop
_TINY = 1e-9


@functools.cache
def anneal_name() -> str:
    """What the compiled form of these very sources is called in Numba's cache."""
    return source_name("anneal", Path(__file__), Path(__file__).with_name("_kernels.py"))


class Field(NamedTuple):
    """What does not change.

    Attributes
    ----------
    even : int
        1 for an even split.
    weight_SE, load_SE : arrays, shape [S, E]
        Tokens of a source that pay, and that are served and take time.
    route_SG, price_SG : arrays, shape [S, G]
        By which a source chooses, the least first, and what a token then pays.
    lean_S : array, shape [S]
        What the toll weighs in that choice.
    toll_EG : array, shape [E, G]
        What a served token pays on a GPU, wherever it comes from.
    own_MKBE : array, shape [M, K, B, E]
        Even split: tokens of each set of sources that come from a group of a level.
    total_ME : array, shape [M, E]
        Their sum over a level.
    fee_MK : array, shape [M, K]
        What leaving a group of a level costs.
    group_KG : array of int, shape [K, G]
        Groups of the GPUs.
    load_E, speed_G : arrays
        All tokens of an expert that are served; speeds.
    ratio_TE : array, shape [T, E]
        Tokens of an expert in each scenario, over those.
    limit_T : array, shape [T]
        Tokens over speed that a GPU may have in each scenario.
    domain_G : array of int, shape [G]
        Failure domains.
    capacity_G, least_E, most_E : arrays of int
        Slots; fewest and most replicas.
    allowed_EG, pinned_EG, live_EG : arrays of bool
        Where an expert may be, must be, is.
    """

    even: int
    weight_SE: FloatArray
    load_SE: FloatArray
    route_SG: FloatArray
    price_SG: FloatArray
    lean_S: FloatArray
    toll_EG: FloatArray
    own_MKBE: FloatArray
    total_ME: FloatArray
    fee_MK: FloatArray
    group_KG: IntArray
    load_E: FloatArray
    speed_G: FloatArray
    ratio_TE: FloatArray
    limit_T: FloatArray
    domain_G: IntArray
    capacity_G: IntArray
    least_E: IntArray
    most_E: IntArray
    allowed_EG: BoolArray
    pinned_EG: BoolArray
    live_EG: BoolArray


class Tune(NamedTuple):
    """How to search.

    Attributes
    ----------
    steps, seed : int
    hot : float
        Largest threshold at the start.
    heavy : float
        What a token beyond the limit costs at the start.
    move : float
        What a replica that is not live costs.
    most_moves : int
        How many there may be.
    full : int
        1 where a slot that is full stays full.
    most_held : int
        Replicas of the layer in all.
    spread : int
        Failure domains that an expert must reach.
    """

    steps: int
    seed: int
    hot: float
    heavy: float
    move: float
    most_moves: int
    full: int
    most_held: int
    spread: int


class State(NamedTuple):
    """The placement, changed in place; `content_GC` is the best one at the end."""

    content_GC: IntArray
    host_EG: IntArray
    count_E: IntArray
    piece_EG: FloatArray
    cost_E: FloatArray
    carried_TG: FloatArray
    trial_2G: IntArray
    trial_piece_2G: FloatArray
    extra_TG: FloatArray
    mark_B: FloatArray
    random_1: IntArray


def weigh(
    field: Field, e: int, host_G: IntArray, count: int, piece_G: FloatArray, mark_B: FloatArray
) -> float:
    """What an expert's tokens pay with these hosts; what each host serves goes into `piece_G`."""
    cost = 0.0
    for i in range(count):
        piece_G[i] = 0.0
    if field.even == 0:
        for s in range(field.weight_SE.shape[0]):
            weight, load = field.weight_SE[s, e], field.load_SE[s, e]
            if weight == 0.0 and load == 0.0:
                continue
            best, ties, paid = np.inf, 0, 0.0
            for i in range(count):
                way = field.route_SG[s, host_G[i]] + field.lean_S[s] * field.toll_EG[e, host_G[i]]
                if way < best:
                    best, ties, paid = way, 1, field.price_SG[s, host_G[i]]
                elif way == best:
                    ties += 1
                    paid += field.price_SG[s, host_G[i]]
            cost += weight * paid / ties
            part = load / ties
            for i in range(count):
                way = field.route_SG[s, host_G[i]] + field.lean_S[s] * field.toll_EG[e, host_G[i]]
                if way == best:
                    piece_G[i] += part
    else:
        for i in range(count):
            piece_G[i] = field.load_E[e] / count
        sets, levels, groups = field.own_MKBE.shape[:3]
        for k in range(levels):
            for b in range(groups):
                mark_B[b] = 0.0
            for i in range(count):
                mark_B[field.group_KG[k, host_G[i]]] += 1.0
            for m in range(sets):
                if field.fee_MK[m, k] == 0.0:
                    continue
                for b in range(groups):
                    over = field.own_MKBE[m, k, b, e] - field.total_ME[m, e] * mark_B[b] / count
                    if over > 0.0:
                        cost += field.fee_MK[m, k] * over
    for i in range(count):
        cost += field.toll_EG[e, host_G[i]] * piece_G[i]
    return cost


def draw(state: State, below: int) -> int:
    """A whole number from 0 on, below this one."""
    state.random_1[0] = state.random_1[0] * _ROOT % _PRIME
    return int(state.random_1[0] % below)


def without(state: State, row: int, e: int, gpu: int) -> int:
    """Copy an expert's hosts but this one into a trial row; returns how many they are."""
    n = 0
    for i in range(state.count_E[e]):
        if state.host_EG[e, i] != gpu:
            state.trial_2G[row, n] = state.host_EG[e, i]
            n += 1
    return n


def over(field: Field, t: int, g: int, carried: float) -> float:
    """Tokens beyond the limit of a scenario."""
    room = field.limit_T[t] * field.speed_G[g]
    return carried - room if carried > room else 0.0


def holds(state: State, gpu: int, e: int) -> bool:
    """Whether a GPU holds an expert."""
    found = False
    for i in range(state.count_E[e]):
        found = found or state.host_EG[e, i] == gpu
    return found


def reaches(field: Field, tune: Tune, state: State, e: int, gone: int, come: int) -> bool:
    """Whether an expert that leaves a GPU for another (-1: for none) is in enough failure domains then."""
    domains = 0
    for i in range(state.count_E[e]):
        g = state.host_EG[e, i]
        if g == gone:
            continue
        known = come >= 0 and field.domain_G[come] == field.domain_G[g]
        for j in range(i):
            h = state.host_EG[e, j]
            known = known or (h != gone and field.domain_G[h] == field.domain_G[g])
        if not known:
            domains += 1
    return domains + (1 if come >= 0 else 0) >= tune.spread


def shift(field: Field, state: State, row: int, e: int, count: int, sign: float) -> None:
    """Add what an expert puts on GPUs: now (sign -1, its row is free) or in a trial (sign 1)."""
    for t in range(len(field.limit_T)):
        ratio = field.ratio_TE[t, e]
        if sign < 0:
            for i in range(state.count_E[e]):
                state.extra_TG[t, state.host_EG[e, i]] -= state.piece_EG[e, i] * ratio
        else:
            for i in range(count):
                state.extra_TG[t, state.trial_2G[row, i]] += state.trial_piece_2G[row, i] * ratio


def settle(field: Field, state: State, e: int, row: int, count: int) -> float:
    """Overflow that a pair of changes adds on an expert's GPUs, each counted once; clears what was added."""
    added = 0.0
    for t in range(len(field.limit_T)):
        for i in range(state.count_E[e]):
            g = state.host_EG[e, i]
            if state.extra_TG[t, g] != 0.0:
                now = state.carried_TG[t, g]
                added += over(field, t, g, now + state.extra_TG[t, g]) - over(field, t, g, now)
                state.extra_TG[t, g] = 0.0
        for i in range(count):
            g = state.trial_2G[row, i]
            if state.extra_TG[t, g] != 0.0:
                now = state.carried_TG[t, g]
                added += over(field, t, g, now + state.extra_TG[t, g]) - over(field, t, g, now)
                state.extra_TG[t, g] = 0.0
    return added / len(field.limit_T)


def take(field: Field, state: State, e: int, row: int, count: int, cost: float) -> None:
    """Make a trial row an expert's hosts."""
    for t in range(len(field.limit_T)):
        ratio = field.ratio_TE[t, e]
        for i in range(state.count_E[e]):
            state.carried_TG[t, state.host_EG[e, i]] -= state.piece_EG[e, i] * ratio
        for i in range(count):
            state.carried_TG[t, state.trial_2G[row, i]] += state.trial_piece_2G[row, i] * ratio
    for i in range(count):
        state.host_EG[e, i] = state.trial_2G[row, i]
        state.piece_EG[e, i] = state.trial_piece_2G[row, i]
    state.count_E[e] = count
    state.cost_E[e] = cost


def begin(field: Field, state: State) -> None:
    """Fill the state from its contents."""
    gpus, slots = state.content_GC.shape
    for e in range(len(state.count_E)):
        state.count_E[e] = 0
    scenarios = len(field.limit_T)
    for g in range(gpus):
        for t in range(scenarios):
            state.carried_TG[t, g] = 0.0
            state.extra_TG[t, g] = 0.0
        for c in range(slots):
            e = state.content_GC[g, c]
            if e >= 0:
                state.host_EG[e, state.count_E[e]] = g
                state.count_E[e] += 1
    for e in range(len(state.count_E)):
        count = state.count_E[e]
        state.cost_E[e] = weigh(field, e, state.host_EG[e], count, state.piece_EG[e], state.mark_B)
        for t in range(scenarios):
            for i in range(count):
                state.carried_TG[t, state.host_EG[e, i]] += state.piece_EG[e, i] * field.ratio_TE[t, e]


def overflown(field: Field, state: State) -> float:
    """Tokens beyond the limits on all GPUs, in the mean of the scenarios."""
    overflow, scenarios = 0.0, len(field.limit_T)
    for g in range(len(field.speed_G)):
        for t in range(scenarios):
            overflow += over(field, t, g, state.carried_TG[t, g]) / scenarios
    return overflow


def step_from(field: Field, tune: Tune, state: State, step_6: IntArray) -> int:
    """Draw a step: the expert that leaves g, the one that comes, and for an exchange the other GPU and slot.

    Returns 0 where what was drawn cannot be done.
    """
    gpus, experts = len(field.speed_G), len(field.load_E)
    g = draw(state, gpus)
    if field.capacity_G[g] == 0:
        return 0
    c = draw(state, field.capacity_G[g])
    a = state.content_GC[g, c]
    if a >= 0 and field.pinned_EG[a, g]:
        return 0
    h, d, b = -1, -1, -1
    if draw(state, 3) > 0:  # an exchange, or a move where the other slot is empty
        h = draw(state, gpus)
        if h == g or field.capacity_G[h] == 0:
            return 0
        d = draw(state, field.capacity_G[h])
        b = state.content_GC[h, d]
        if a == b or (b >= 0 and (field.pinned_EG[b, h] or not field.allowed_EG[b, g] or holds(state, g, b))):
            return 0
        if a >= 0 and (not field.allowed_EG[a, h] or holds(state, h, a)):
            return 0
        if tune.spread > 1 and b >= 0 and not reaches(field, tune, state, b, h, g):
            return 0
    else:
        if a >= 0 and state.count_E[a] <= field.least_E[a]:
            return 0
        b = draw(state, experts)
        if holds(state, g, b) or not field.allowed_EG[b, g] or state.count_E[b] >= field.most_E[b]:
            b = -1  # the slot is left empty
        if b < 0 and (a < 0 or tune.full):
            return 0
    if tune.spread > 1 and a >= 0 and not reaches(field, tune, state, a, g, h):
        return 0
    step_6[0], step_6[1], step_6[2], step_6[3], step_6[4], step_6[5] = g, c, a, h, d, b
    return 1


def moved(field: Field, step_6: IntArray) -> int:
    """Replicas that are not live, more than before a step."""
    g, a, h, b = step_6[0], step_6[2], step_6[3], step_6[5]
    more = 0
    if a >= 0:
        more -= 0 if field.live_EG[a, g] else 1
        if h >= 0:
            more += 0 if field.live_EG[a, h] else 1
    if b >= 0:
        more += 0 if field.live_EG[b, g] else 1
        if h >= 0:
            more -= 0 if field.live_EG[b, h] else 1
    return more


def anneal(field: Field, tune: Tune, state: State, told: Any) -> None:
    """Search from the contents; leaves the best ones there."""
    begin(field, state)
    state.random_1[0] = tune.seed % (_PRIME - 1) + 1
    gpus, slots = state.content_GC.shape
    best_GC = state.content_GC.copy()
    step_6 = np.zeros(6, dtype=np.int64)
    cost, moves, held = 0.0, 0, 0
    for e in range(len(state.count_E)):
        cost += state.cost_E[e]
        held += state.count_E[e]
    overflow = overflown(field, state)
    for g in range(gpus):
        for c in range(slots):
            e = state.content_GC[g, c]
            if e >= 0 and not field.live_EG[e, g]:
                moves += 1
    start_over, scale = overflow, field.limit_T.max() * gpus
    best_over, best_cost = overflow, cost + tune.move * moves
    for turn in range(tune.steps):
        if turn % _ASK == 0 and told[0]:
            break
        if step_from(field, tune, state, step_6) == 0:
            continue
        g, c, a, h, d, b = step_6[0], step_6[1], step_6[2], step_6[3], step_6[4], step_6[5]
        more = moved(field, step_6)
        if more > 0 and moves + more > tune.most_moves:
            continue
        if h < 0 and a < 0 and held >= tune.most_held:
            continue
        cold = 1.0 - turn / tune.steps
        heavy = tune.heavy * (1.0 + 4.0 * (1.0 - cold))
        added, count_a, count_b, cost_a, cost_b = 0.0, 0, 0, 0.0, 0.0
        if a >= 0:
            count_a = without(state, 0, a, g)
            if h >= 0:
                state.trial_2G[0, count_a] = h
                count_a += 1
            cost_a = weigh(field, a, state.trial_2G[0], count_a, state.trial_piece_2G[0], state.mark_B)
            added += cost_a - state.cost_E[a]
            shift(field, state, 0, a, count_a, -1.0)
            shift(field, state, 0, a, count_a, 1.0)
        if b >= 0:
            count_b = without(state, 1, b, h)
            state.trial_2G[1, count_b] = g
            count_b += 1
            cost_b = weigh(field, b, state.trial_2G[1], count_b, state.trial_piece_2G[1], state.mark_B)
            added += cost_b - state.cost_E[b]
            shift(field, state, 1, b, count_b, -1.0)
            shift(field, state, 1, b, count_b, 1.0)
        beyond = 0.0
        if a >= 0:
            beyond += settle(field, state, a, 0, count_a)
        if b >= 0:
            beyond += settle(field, state, b, 1, count_b)
        rise = added + tune.move * more + heavy * beyond
        if rise > tune.hot * cold * cold * (draw(state, 1 << 20) / (1 << 20)):
            continue
        if a >= 0:
            take(field, state, a, 0, count_a, cost_a)
        if b >= 0:
            take(field, state, b, 1, count_b, cost_b)
        state.content_GC[g, c] = b
        if h >= 0:
            state.content_GC[h, d] = a
        cost, overflow, moves = cost + added, overflow + beyond, moves + more
        held += (1 if b >= 0 else 0) - (1 if a >= 0 else 0) if h < 0 else 0
        now, late = cost + tune.move * moves, overflow > _TINY * scale
        if late and overflow >= best_over and best_over > _TINY * scale:
            continue
        if (not late and (best_over > _TINY * scale or now < best_cost)) or (late and overflow < best_over):
            if late and start_over <= _TINY * scale:
                continue
            best_over, best_cost = overflow if late else 0.0, now
            for x in range(gpus):
                for y in range(slots):
                    best_GC[x, y] = state.content_GC[x, y]
    for x in range(gpus):
        for y in range(slots):
            state.content_GC[x, y] = best_GC[x, y]
