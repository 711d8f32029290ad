"""One layer under an equal split, in whole numbers, and the search for few moves on it.

Loads are whole multiples of 2**-40 of the mean GPU load: sums of them are exact, whatever their order, so
that what is kept up to date change by change equals what is computed afresh, and the compiled form
(`_equal_kernels`) finds the same plan as this one, which picks its candidates by arrays.

With r slots an expert puts ``load // r`` tokens on each. A *change* is a row of seven numbers: kind,
expert, the GPU and the slot that it comes from, the expert that yields (-1: none), the GPU and the slot
that it goes to.

========  ============================================================================================
``ADD``     a slot elsewhere, free or of an expert that yields; on the hot GPU itself: in place of another
``MOVE``    the slot itself, to a free one or one that yields
``SWAP``    two slots exchange their experts
``DROP``    a slot whose expert has others becomes empty
========  ============================================================================================

An expert *yields* when it has more slots than it must have; the others then take its tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.solvers.twins import source_name

__all__ = [
    "FILL",
    "LOAD_UNIT",
    "REACH",
    "ROUNDS",
    "STEP",
    "EqualSearch",
    "LayerState",
    "Layers",
    "search_layers",
]

LOAD_UNIT = 1 << 40
"""The mean GPU load."""

ADD, MOVE, SWAP, DROP = 0, 1, 2, 3
REACH, ROUNDS, STEP, FILL = 0, 1, 2, 3
_SOFT = 4  # load between a GPU's fair share and its room counts 2**-_SOFT of what lies above the room
_FREE = 10.0  # what costs no move counts as a tenth of one
_BEST = 2  # changes that are tried exactly in each step
BARRED = 1 << 60
_WORK = 9  # rows of `LayerState.work_WX`
_CHAOS = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@functools.cache
def compiled_name() -> str:
    """What the compiled form of these very sources is called in Numba's cache."""
    return source_name("search_layers", Path(__file__), Path(__file__).with_name("_equal_kernels.py"))


class LayerState(NamedTuple):
    """Placement of one layer and all that follows from it; arrays are changed in place.

    Attributes
    ----------
    load_E : array of int64, shape [E]
        Loads.
    content_GC : array of int64, shape [G, C]
        Expert in each slot, -1 where empty.
    capacity_G : array of int64, shape [G]
        Slots; a GPU uses its first ones.
    room_G, slack_G : array of int64, shape [G]
        Load that a GPU may carry, and how much of it is above its fair share.
    price_EG : array of int64, shape [E, G]
        Price of an expert on a GPU: 0 where it is live.
    open_EG, held_EG : array of bool, shape [E, G]
        Where an expert may be placed, and from where it must not go.
    least_E, most_E : array of int64, shape [E]
        Slots that an expert must and may have.
    count_E, piece_E, lighter_E, heavier_E : array of int64, shape [E]
        Slots, load on each, and what it would be with one more and one fewer.
    on_EG : array of int64, shape [E, G]
        Slots of an expert on a GPU.
    host_KE, hosts_E : arrays of int, shapes [G, E] and [E]
        GPUs that hold an expert (the first `hosts_E` entries), in no order.
    carried_G : array of int64, shape [G]
        Load of each GPU.
    left_1 : array of int64, shape [1]
        Replicas that the layer may still gain.
    domain_G : array of int64, shape [G]
        Failure domains, numbers from 0.
    inside_ED, reach_E : array of int64, shapes [E, D] and [E]
        GPUs of each domain that hold an expert, and domains that it reaches.
    spread_E : array of int64, shape [E]
        Domains that each expert must reach.
    arrive_GE : array of int64, shape [G, E]
        `price_EG` the other way round, `BARRED` where an expert may not be placed.
    back_GC : array of int64, shape [G, C]
        What it pays back to empty each slot.
    facts_3 : array of int64, shape [3]
        The least price that is not 0, whether anything is held, and whether anything must be spread.
    work_WX, steps_X4 : arrays of int64
        Room for the compiled form.
    """

    load_E: Any
    content_GC: Any
    capacity_G: Any
    room_G: Any
    slack_G: Any
    price_EG: Any
    open_EG: Any
    held_EG: Any
    least_E: Any
    most_E: Any
    count_E: Any
    piece_E: Any
    lighter_E: Any
    heavier_E: Any
    on_EG: Any
    host_KE: Any
    hosts_E: Any
    carried_G: Any
    left_1: Any
    domain_G: Any
    inside_ED: Any
    reach_E: Any
    spread_E: Any
    arrive_GE: Any
    back_GC: Any
    facts_3: Any
    work_WX: Any
    steps_X4: Any


class EqualSearch(NamedTuple):
    """How a layer is searched.

    Attributes
    ----------
    full : bool
        Every slot is to be filled.
    copies : bool
        An expert may have several slots of a GPU.
    rounds : int
        Rounds of destroying and repairing.
    most_back : int
        GPUs put back in one of them, at most.
    tries : int
        Wanted times that are tried where the first is out of reach.
    steps : int
        Changes in one descent, at most; 0: as many as there may be.
    """

    full: Any
    copies: Any
    rounds: Any
    most_back: Any
    tries: Any
    steps: Any


# -- state ---------------------------------------------------------------------------------------------


def recount(state: LayerState, e: int, count: int) -> None:
    """Set the slots of an expert and the loads that follow."""
    load = state.load_E[e]
    state.count_E[e] = count
    state.piece_E[e] = load // count if count > 0 else 0
    state.lighter_E[e] = load // (count + 1)
    state.heavier_E[e] = load // (count - 1) if count > 1 else 0


def refresh(state: LayerState, most: int) -> None:
    """Recompute all that follows from the content; `most` replicas are allowed."""
    (E, G), C = state.on_EG.shape, state.content_GC.shape[1]
    flat = state.content_GC.ravel()
    full = np.flatnonzero(flat >= 0)
    e, g = flat[full], full // C
    state.on_EG[:] = np.bincount(e * G + g, minlength=E * G).reshape(E, G)
    x, host = np.nonzero(state.on_EG)
    state.hosts_E[:] = np.bincount(x, minlength=E)
    state.host_KE[np.arange(len(x)) - (np.cumsum(state.hosts_E) - state.hosts_E)[x], x] = host
    state.count_E[:] = np.bincount(e, minlength=E)
    count = state.count_E
    state.piece_E[:] = np.where(count > 0, state.load_E // np.maximum(count, 1), 0)
    state.lighter_E[:] = state.load_E // (count + 1)
    state.heavier_E[:] = np.where(count > 1, state.load_E // np.maximum(count - 1, 1), 0)
    state.carried_G[:] = (state.on_EG * state.piece_E[:, None]).sum(0)
    state.inside_ED[:] = 0
    np.add.at(state.inside_ED, (x, state.domain_G[host]), 1)
    state.reach_E[:] = (state.inside_ED > 0).sum(1)
    state.back_GC.ravel()[:] = 0
    state.back_GC.ravel()[full] = np.where(state.on_EG[e, g] == 1, state.price_EG[e, g], 0)
    state.left_1[0] = most - len(full)


def _pays_back(state: LayerState, e: int, g: int) -> None:
    """Set what it pays back to empty a slot of an expert on a GPU."""
    back = state.price_EG[e, g] if state.on_EG[e, g] == 1 else 0
    for c in range(state.content_GC.shape[1]):
        if state.content_GC[g, c] == e:
            state.back_GC[g, c] = back


def _shift(state: LayerState, e: int, by: int) -> None:
    """Add `by` to the load of each slot of an expert."""
    for k in range(state.hosts_E[e]):
        g = state.host_KE[k, e]
        state.carried_G[g] += state.on_EG[e, g] * by


def place(state: LayerState, e: int, g: int, c: int) -> None:
    """Put an expert into an empty slot."""
    before = state.piece_E[e]
    recount(state, e, state.count_E[e] + 1)
    _shift(state, e, state.piece_E[e] - before)
    if state.on_EG[e, g] == 0:
        state.host_KE[state.hosts_E[e], e] = g
        state.hosts_E[e] += 1
        domain = state.domain_G[g]
        state.inside_ED[e, domain] += 1
        if state.inside_ED[e, domain] == 1:
            state.reach_E[e] += 1
    state.on_EG[e, g] += 1
    state.carried_G[g] += state.piece_E[e]
    state.content_GC[g, c] = e
    _pays_back(state, e, g)
    state.left_1[0] -= 1


def remove(state: LayerState, e: int, g: int, c: int) -> None:
    """Empty a slot."""
    before = state.piece_E[e]
    state.on_EG[e, g] -= 1
    state.carried_G[g] -= before
    if state.on_EG[e, g] == 0:
        last = state.hosts_E[e] - 1
        for k in range(last):
            if state.host_KE[k, e] == g:
                state.host_KE[k, e] = state.host_KE[last, e]
                break
        state.hosts_E[e] = last
        domain = state.domain_G[g]
        state.inside_ED[e, domain] -= 1
        if state.inside_ED[e, domain] == 0:
            state.reach_E[e] -= 1
    recount(state, e, state.count_E[e] - 1)
    _shift(state, e, state.piece_E[e] - before)
    state.content_GC[g, c] = -1
    state.back_GC[g, c] = 0
    _pays_back(state, e, g)
    state.left_1[0] += 1


def make(state: LayerState, change: Any) -> int:
    """Make a change; returns its price, negative where it takes back what was paid for."""
    kind, e, h, at, f, g, to = (change[0], change[1], change[2], change[3], change[4], change[5], change[6])
    price = 0
    if kind != ADD:
        price += leave(state, e, h, at)
    if f >= 0:
        price += leave(state, f, g, to)
    if kind != DROP:
        price += enter(state, e, g, to)
    if kind == SWAP:
        price += enter(state, f, h, at)
    return price


def unmake(state: LayerState, change: Any) -> None:
    """Take a change back."""
    kind, e, h, at, f, g, to = (change[0], change[1], change[2], change[3], change[4], change[5], change[6])
    if kind == SWAP:
        remove(state, f, h, at)
    if kind != DROP:
        remove(state, e, g, to)
    if f >= 0:
        place(state, f, g, to)
    if kind != ADD:
        place(state, e, h, at)


def together(state: LayerState, change: Any) -> bool:
    """Whether a GPU that the change does not name holds the expert and the one that yields."""
    kind, e, f, g = change[0], change[1], change[4], change[5]
    if f < 0 or kind == SWAP:
        return False
    for k in range(state.hosts_E[f]):
        other = state.host_KE[k, f]
        if other != g and state.on_EG[e, other] > 0:
            return True
    return False


def enter(state: LayerState, e: int, g: int, c: int) -> int:
    """Put an expert into an empty slot; returns the price."""
    price = state.price_EG[e, g] if state.on_EG[e, g] == 0 else 0
    place(state, e, g, c)
    return int(price)


def leave(state: LayerState, e: int, g: int, c: int) -> int:
    """Empty a slot; returns what that pays back, at most 0."""
    remove(state, e, g, c)
    return -int(state.price_EG[e, g]) if state.on_EG[e, g] == 0 else 0


def overflow(state: LayerState) -> int:
    """Load above the rooms, summed."""
    return int(np.maximum(state.carried_G - state.room_G, 0).sum())


def pressure(state: LayerState) -> int:
    """The overflow, and a little of what GPUs carry above their fair share."""
    return int(_above(state.carried_G - state.room_G, state.slack_G).sum())


def hot_gpus(state: LayerState) -> int:
    """GPUs that carry more than they may."""
    return int((state.carried_G > state.room_G).sum())


def paid(state: LayerState) -> int:
    """Price of all that is not live."""
    return int(state.price_EG[state.on_EG > 0].sum())


def slowest(state: LayerState, speed_G: Any) -> float:
    """Largest GPU time, in units of the mean load."""
    most = 0.0
    for g in range(len(speed_G)):
        most = max(most, state.carried_G[g] / (speed_G[g] * LOAD_UNIT))
    return most


def give_rooms(state: LayerState, speed_G: Any, time: float) -> None:
    """Let each GPU carry what it does in a time."""
    spare = state.content_GC.shape[1]  # pieces are rounded down: as many units may be missing
    for g in range(len(speed_G)):
        state.room_G[g] = int(speed_G[g] * time * LOAD_UNIT) + spare
        state.slack_G[g] = max(state.room_G[g] - int(speed_G[g] * LOAD_UNIT), 0)


# -- the best changes, by arrays -------------------------------------------------------------------------


def _above(over: Any, slack: Any) -> Any:
    """Pressure of GPUs whose load is `over` above their rooms."""
    return np.maximum(over, 0) + (np.maximum(over + slack, 0) >> _SOFT)


def scrambled(word: int) -> int:
    """The next of a sequence of 64-bit words (SplitMix64: Steele, Lea and Flood 2014)."""
    word = (word + _CHAOS) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _noise(seed: int, first: Any, second: Any) -> Any:
    """A factor of 0.6 to 1 for each pair; 1 where the seed is 0."""
    if seed == 0:
        return 1.0
    word = np.uint64(seed) + (
        np.asarray(first).astype(np.uint64) * np.uint64(0x2545F4914F6CDD1D)
        + np.asarray(second).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    )
    word = word + np.uint64(_CHAOS)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return 0.6 + 0.4 * ((word >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def _rates(gain: Any, price: Any, seed: int, first: Any, second: Any) -> Any:
    rate = np.where(price > 0, gain / np.maximum(price, 1), gain * _FREE)
    return rate * _noise(seed, first, second)


class _Places(NamedTuple):
    """Slots for an expert: GPU, slot, who yields (-1: free), the harm elsewhere, the change of the GPU."""

    gpu: Any
    slot: Any
    yields: Any
    harm: Any
    change: Any


def _places(state: LayerState) -> _Places:
    content = state.content_GC
    G, C = content.shape
    free = (content < 0) & (np.arange(C) < state.capacity_G[:, None])
    free &= np.cumsum(free, axis=1) == 1  # free slots of a GPU are alike
    e = np.maximum(content, 0)
    row_G = np.arange(G)[:, None]
    may = (content >= 0) & (state.count_E[e] > state.least_E[e]) & ~state.held_EG[e, row_G]
    may &= ~_needed(state, e, row_G)
    gpu, slot = np.nonzero(may | (free & (state.left_1[0] > 0)))
    f = content[gpu, slot]
    harm, change = _harm(state, f, gpu)
    return _Places(gpu, slot, f, harm, change)


def _harm(state: LayerState, f: Any, gpu: Any) -> tuple[Any, Any]:
    """What emptying slots of experts `f` (-1: none) on GPUs does: pressure elsewhere, change there."""
    x = np.maximum(f, 0)
    some = f >= 0
    over_G = state.carried_G - state.room_G
    on_YG = state.on_EG[x]
    rise_YG = on_YG * (state.heavier_E[x] - state.piece_E[x])[:, None]
    harm_YG = _above(over_G + rise_YG, state.slack_G) - _above(over_G, state.slack_G)
    harm_YG[np.arange(len(x)), gpu] = 0
    m = on_YG[np.arange(len(x)), gpu]
    change = (m - 1) * state.heavier_E[x] - m * state.piece_E[x]
    return np.where(some, harm_YG.sum(1), 0), np.where(some, change, 0)


def _needed(state: LayerState, e: Any, g: Any) -> Any:
    """Whether an expert would reach too few domains without its slot on a GPU."""
    alone = (state.on_EG[e, g] == 1) & (state.inside_ED[e, state.domain_G[g]] == 1)
    return alone & (state.reach_E[e] <= state.spread_E[e]) & (state.spread_E[e] > 1)


def _astray(state: LayerState, e: Any, g: Any, to: Any) -> Any:
    """Whether an expert would reach too few domains if its slot went from a GPU to another."""
    there = state.domain_G[to]
    return _needed(state, e, g) & (state.domain_G[g] != there) & (state.inside_ED[e, there] > 0)


def _refund(state: LayerState, e: Any, g: Any) -> Any:
    """What it pays back to empty one slot of an expert on a GPU."""
    return np.where((e >= 0) & (state.on_EG[e, g] == 1), state.price_EG[e, g], 0)


def best_changes(state: LayerState, search: EqualSearch, seed: int, best: Any) -> int:
    """The changes with the most gain per price that touch the hottest GPU; returns how many.

    Gains are exact but for GPUs that hold both the expert and the one that yields. Of equal rates the
    first counts: by kind (add, move, swap, drop, in place of another), slot of the hot GPU, slot that it
    goes to.

    Parameters
    ----------
    state : LayerState
        Not changed.
    search : EqualSearch
        Whether slots stay full, and second copies are allowed.
    seed : int
        Perturbs the ranking unless 0.
    best : array of int64, shape [K, 9]
        Filled with up to K changes, their gains and prices, the best first.
    """
    over_G = state.carried_G - state.room_G
    h = int(over_G.argmax())
    content, C = state.content_GC, state.content_GC.shape[1]
    at = np.flatnonzero((content[h] >= 0) & (state.piece_E[content[h]] > 0))
    if over_G[h] <= 0 or len(at) == 0:
        return 0
    e, places = content[h, at], _places(state)
    found = [
        *_elsewhere(state, search, seed, h, at, e, places),
        _swaps(state, search, seed, h, at, e),
        *_here(state, search, seed, h, at, e),
    ]
    rate = np.concatenate([one.rate for one in found])
    ends = np.cumsum([len(one.rate) for one in found])
    count = 0
    while count < min(len(best), len(rate)):
        top = int(rate.argmax())
        if rate[top] <= 0.0:
            break
        family = int(np.searchsorted(ends, top, side="right"))
        kind, i, target, expert, gain, price = found[family].row(top - int(ends[family - 1] if family else 0))
        g, to = divmod(target, C)
        yields = -1 if kind == DROP else int(content[g, to])
        best[count] = (kind, expert, h, int(at[i]), yields, g, to, gain, price)
        rate[top] = -1.0
        count += 1
    return count


class _Family(NamedTuple):
    """Changes of one kind: a grid of slots of the hot GPU and of choices, those kept that gain."""

    kind: int
    rate: Any  # of those kept
    kept: Any  # flat places in the grid
    gain: Any  # by flat place
    price: Any
    wide: int  # choices for each slot
    target: Any  # GPU * C + slot by choice, or by slot of the hot GPU where `enters`
    expert: Any  # by slot of the hot GPU, or by choice where `enters`
    enters: bool  # whether the choice is who enters, else where to

    def row(self, k: int) -> tuple[int, int, int, int, int, int]:
        """Kind, place of the hot GPU's slot, flat target, expert, gain, price."""
        flat = int(self.kept[k])
        i, j = divmod(flat, self.wide)
        slot, who = (i, i) if self.kind == DROP else (i, j) if self.enters else (j, i)
        gain, price = int(self.gain.ravel()[flat]), int(self.price.ravel()[flat])
        return self.kind, i, int(self.target[slot]), int(self.expert[who]), gain, price


def _family(
    kind: int, seed: int, gain: Any, barred: Any, price: Any, target: Any, expert: Any, enters: bool = False
) -> _Family:
    """Rank the changes of a grid that gain and are allowed."""
    kept = np.flatnonzero((gain > 0) & ~barred)
    wide = gain.shape[1]
    i, j = np.divmod(kept, wide)
    slot, who = (i, i) if kind == DROP else (i, j) if enters else (j, i)
    noise = DROP if enters else kind
    rate = _rates(gain.ravel()[kept], price.ravel()[kept], seed, expert[who] * 4 + noise, target[slot])
    return _Family(kind, rate, kept, gain, price, wide, target, expert, enters)


def _elsewhere(
    state: LayerState, search: EqualSearch, seed: int, h: int, at: Any, e: Any, places: _Places
) -> tuple[_Family, _Family]:
    """Add an expert of the hot GPU at a place, or move it there."""
    over_G, slack = state.carried_G - state.room_G, state.slack_G
    C = state.content_GC.shape[1]
    g, f = places.gpu[None, :], places.yields[None, :]
    x = e[:, None]
    m = state.on_EG[x, g]
    barred = (g == h) | (f == x) | ~state.open_EG[x, g] | ((m > 0) & (not search.copies))
    price = np.where(m == 0, state.price_EG[x, g], 0) - _refund(state, places.yields, places.gpu)
    over, soft = over_G[g], slack[g]
    before = _above(over, soft)
    target = places.gpu * C + places.slot
    # Add: every slot of the expert gets lighter, the new one as heavy as they.
    drop_E = state.piece_E[e] - state.lighter_E[e]
    relief_EG = _above(over_G, slack) - _above(over_G - state.on_EG[e] * drop_E[:, None], slack)
    relief = relief_EG.sum(1)[:, None] - relief_EG[:, places.gpu]
    come = (m + 1) * state.lighter_E[x] - m * state.piece_E[x]
    gain = relief - places.harm + before - _above(over + places.change + come, soft)
    shut = barred | (state.count_E >= state.most_E)[x]
    add = _family(ADD, seed, gain, shut, price, target, e)
    # Move: only the hot GPU gets lighter.
    out = _above(over_G[h], slack[h]) - _above(over_G[h] - state.piece_E[x], slack[h])
    gain = out - places.harm + before - _above(over + places.change + state.piece_E[x], soft)
    price = price - _refund(state, e, np.full_like(e, h))[:, None]
    shut = barred | state.held_EG[x, h] | search.full  # it would leave a slot empty
    shut |= _astray(state, x, h, g)
    return add, _family(MOVE, seed, gain, shut, price, target, e)


def _swaps(state: LayerState, search: EqualSearch, seed: int, h: int, at: Any, e: Any) -> _Family:
    """Exchange a slot of the hot GPU with a lighter one of another."""
    over_G, slack, content = state.carried_G - state.room_G, state.slack_G, state.content_GC
    gpu, slot = np.nonzero(content >= 0)
    expert = content[gpu, slot]
    g, f, x = gpu[None, :], expert[None, :], e[:, None]
    shift = state.piece_E[x] - state.piece_E[f]
    gain = (
        (_above(over_G[h], slack[h]) + _above(over_G, slack)[g])
        - _above(over_G[h] - shift, slack[h])
        - _above(over_G[g] + shift, slack[g])
    )
    barred = (g == h) | (shift <= 0) | ~state.open_EG[x, g] | ~state.open_EG[f, h]
    barred |= state.held_EG[x, h] | state.held_EG[f, g]
    barred |= _astray(state, x, h, g) | _astray(state, f, g, h)
    on, back = state.on_EG[x, g], state.on_EG[f, h]
    if not search.copies:
        barred |= (on > 0) | (back > 0)
    price = np.where(on == 0, state.price_EG[x, g], 0) - _refund(state, e, np.full_like(e, h))[:, None]
    price = price + (np.where(back == 0, state.price_EG[f, h], 0) - _refund(state, expert, gpu))
    return _family(SWAP, seed, gain, barred, price, gpu * content.shape[1] + slot, e)


def _here(
    state: LayerState, search: EqualSearch, seed: int, h: int, at: Any, e: Any
) -> tuple[_Family, _Family]:
    """Empty a slot of the hot GPU whose expert has others; or put another expert into it."""
    over_G, slack = state.carried_G - state.room_G, state.slack_G
    C, E = state.content_GC.shape[1], len(state.load_E)
    harm, change = _harm(state, e, np.full(len(e), h))
    stays = (state.count_E[e] <= state.least_E[e]) | state.held_EG[e, h] | _needed(state, e, h)
    before = _above(over_G[h], slack[h])
    target = h * C + at
    refund = _refund(state, e, np.full_like(e, h))
    # A grid of one choice: the slot itself.
    gain = (before - _above(over_G[h] + change, slack[h]) - harm)[:, None]
    shut = (stays | search.full)[:, None]
    drop = _family(DROP, seed, gain, shut, -refund[:, None], target, e)
    # In its place: another expert, whose slots elsewhere get lighter.
    x = np.arange(E)
    m = state.on_EG[:, h]
    step = state.piece_E - state.lighter_E
    warm = np.flatnonzero(over_G + slack > 0)  # elsewhere nothing is relieved
    relief_EG = _above(over_G[warm], slack[warm]) - _above(
        over_G[warm] - state.on_EG[:, warm] * step[:, None], slack[warm]
    )
    relief = (relief_EG * (warm != h)).sum(1)
    come = (m + 1) * state.lighter_E - m * state.piece_E
    gain = relief - harm[:, None] + before - _above(over_G[h] + change[:, None] + come, slack[h])
    barred = ~state.open_EG[:, h] | (state.count_E >= state.most_E) | ((m > 0) & (not search.copies))
    barred = barred[None, :] | stays[:, None] | (x[None, :] == e[:, None])
    price = np.where(m == 0, state.price_EG[:, h], 0)[None, :] - refund[:, None]
    return drop, _family(ADD, seed, gain, barred, price, target, x, enters=True)


# -- the search ------------------------------------------------------------------------------------------


def descend(
    state: LayerState, search: EqualSearch, spent: int, budget: int, seed: int, told: Any
) -> tuple[bool, int]:
    """Lower the overflow, by the best change of each step, until none is left or `search.steps` are made.

    Returns
    -------
    reached : bool
        Whether none is left, within the budget; else no change helps, or the search was told to stop.
    spent : int
        Price of the placement then.
    """
    G, C = state.content_GC.shape
    best = np.zeros((_BEST, 9), dtype=np.int64)
    now = pressure(state)
    for turn in range(search.steps if search.steps > 0 else 4 * G + G * C):
        if overflow(state) == 0:
            return spent <= budget, spent
        if told[0] != 0:
            return False, spent
        if hot_gpus(state) > 2 * (budget - spent):  # a move seldom cools more than two
            return False, spent
        found = best_changes(state, search, seed + turn if seed != 0 else 0, best)
        pick, top, after = -1, 0.0, now
        for k in range(found):
            price, then = best[k, 8], now - best[k, 7]
            if together(state, best[k]):
                price = make(state, best[k])
                then = pressure(state)
                unmake(state, best[k])
            rate = (now - then) / price if price > 0 else (now - then) * _FREE
            if spent + price <= budget and rate > top:
                pick, top, after = k, rate, then
        if pick < 0:
            return False, spent
        spent += make(state, best[pick])
        now = after
    return overflow(state) == 0 and spent <= budget, spent


def fill_up(state: LayerState, search: EqualSearch) -> int:
    """Put the expert into each free slot that costs least and helps most; returns the price."""
    G, C = state.content_GC.shape
    change = np.zeros(9, dtype=np.int64)
    change[0], change[4] = ADD, -1
    price = 0
    for g in range(G):
        for c in range(min(C, state.capacity_G[g])):
            if state.content_GC[g, c] >= 0 or state.left_1[0] <= 0:
                continue
            pick, cheapest, least = -1, 0, 0
            for e in range(len(state.load_E)):
                on = state.on_EG[e, g]
                if not state.open_EG[e, g] or state.count_E[e] >= state.most_E[e]:
                    continue
                if on > 0 and not search.copies:
                    continue
                cost = 0 if on > 0 else int(state.price_EG[e, g])
                if pick >= 0 and cost > cheapest:
                    continue
                change[1], change[5], change[6] = e, g, c
                make(state, change)
                then = pressure(state)
                unmake(state, change)
                if pick < 0 or cost < cheapest or then < least:
                    pick, cheapest, least = e, cost, then
            if pick >= 0:
                change[1], change[5], change[6] = pick, g, c
                price += make(state, change)
    return price


def bring(state: LayerState, start_GC: Any, chosen_G: Any, best_GC: Any, most: int) -> None:
    """Give some GPUs their content at the start, the others that of the best."""
    state.content_GC[:] = np.where(chosen_G[:, None], start_GC, best_GC)
    refresh(state, most)


def put_back(state: LayerState, start_GC: Any, chosen_G: Any, best_GC: Any, most: int) -> bool:
    """Some GPUs as at the start, the others as in the best; more of them where coverage asks for it."""
    while True:
        bring(state, start_GC, chosen_G, best_GC, most)
        missing = False
        grown = False
        for e in range(len(state.load_E)):
            if state.count_E[e] >= state.least_E[e]:
                continue
            missing = True
            for g in range(len(start_GC)):
                if not chosen_G[g] and (start_GC[g] == e).any():
                    chosen_G[g] = True
                    grown = True
        if not missing:
            spread = (state.reach_E >= state.spread_E).all()
            return state.left_1[0] >= 0 and spread and not (state.count_E > state.most_E).any()
        if not grown:
            return False


def shake(
    state: LayerState, start_GC: Any, search: EqualSearch, most: int, spent: int, word_1: Any, told: Any
) -> int:
    """Rounds of putting some changed GPUs back and repairing; returns the price then, never more.

    `word_1` is the state of the choices, of one 64-bit word: later rounds go on from there.
    """
    G, C = start_GC.shape
    best_GC = state.content_GC.copy()
    chosen_G = np.zeros(G, dtype=np.bool_)
    changed_G = np.zeros(G, dtype=np.int64)
    changed, stale = 0, True
    for _ in range(search.rounds):
        if told[0] != 0:
            break
        if stale:
            changed, stale = 0, False
            for g in range(G):
                for c in range(C):
                    if best_GC[g, c] >= 0 and state.price_EG[best_GC[g, c], g] > 0:
                        changed_G[changed] = g
                        changed += 1
                        break
        if changed == 0:
            break
        chosen_G[:] = False
        size = 1 + draw(word_1, min(changed, search.most_back))
        for k in range(size):
            other = k + draw(word_1, changed - k)
            gpu = changed_G[other]
            changed_G[other], changed_G[k] = changed_G[k], gpu
            chosen_G[gpu] = True
        seed = 1 + draw(word_1, 1 << 40)
        if not put_back(state, start_GC, chosen_G, best_GC, most):
            continue
        reached, price = descend(state, search, paid(state), spent, seed, told)
        if reached and price <= spent:
            best_GC[:] = state.content_GC
            spent, stale = price, True
    state.content_GC[:] = best_GC
    refresh(state, most)
    return spent


def first_word(seed: int, layer: int) -> int:
    """Where the random choices of a layer begin."""
    return scrambled(scrambled(seed & _WORD) + layer)


def draw(word_1: Any, below: int) -> int:
    """A number below another; changes the word."""
    word_1[0] = scrambled(int(word_1[0]))
    return int(word_1[0] >> 11) % below


def reach(state: LayerState, speed_G: Any, search: EqualSearch, target: float, most: int, told: Any) -> Any:
    """Reach the wanted time, or the best within reach, with few moves.

    Parameters
    ----------
    state : LayerState
        The placement to start from, counted; afterwards the one found, or that placement if none is faster.
    speed_G : array, shape [G]
        Speeds, mean 1 in the unit of the loads.
    target : float
        Wanted largest time.
    most : int
        Replicas that the layer may have.
    told : array of uint8, shape [1]
        Not 0: stop.

    Returns
    -------
    reached : bool
        Whether the time was reached.
    goal : float
        The time that the placement keeps: wanted, or its own.
    spent : int
        Price of the placement.
    """
    start_GC = state.content_GC.copy()
    first = paid(state)
    begun = slowest(state, speed_G)
    endless = 1 << 60
    give_rooms(state, speed_G, target)
    reached, spent = descend(state, search, first, endless, 0, told)
    if reached:
        return True, target, spent
    best_GC = start_GC.copy()
    high, least = begun, first
    now = slowest(state, speed_G)
    if now < high:
        high, least = now, spent
        best_GC[:] = state.content_GC
    # Perturbed descents, then looser times halfway to the best one found.
    low = target
    for turn in range(2 * search.tries):
        if told[0] != 0 or high - low < 1e-3 * high:
            break
        wish = target if turn < search.tries else 0.5 * (low + high)
        give_rooms(state, speed_G, wish)
        state.content_GC[:] = start_GC
        refresh(state, most)
        seed = 1 + turn * 1000003 if turn < search.tries else 0
        reached, spent = descend(state, search, first, endless, seed, told)
        if reached and turn < search.tries:
            return True, target, spent
        now = slowest(state, speed_G)
        if now < high:
            high, least = now, spent
            best_GC[:] = state.content_GC
        if not reached:
            low = wish
    state.content_GC[:] = best_GC
    refresh(state, most)
    give_rooms(state, speed_G, high)
    return False, high, least


def new_state(
    load_E: Any,
    content_GC: Any,
    capacity_G: Any,
    price_EG: Any,
    open_EG: Any,
    held_EG: Any,
    least_E: Any,
    most_E: Any,
    domain_G: Any,
    spread_E: Any,
) -> LayerState:
    """A state of which nothing is counted yet; price, open and held are taken as they are."""
    E, G = len(load_E), len(capacity_G)
    return LayerState(
        load_E,
        content_GC,
        capacity_G,
        np.zeros(G, dtype=np.int64),
        np.zeros(G, dtype=np.int64),
        price_EG,
        open_EG,
        held_EG,
        least_E,
        most_E,
        np.zeros(E, dtype=np.int64),
        np.zeros(E, dtype=np.int64),
        np.zeros(E, dtype=np.int64),
        np.zeros(E, dtype=np.int64),
        np.zeros((E, G), dtype=np.int32),
        np.zeros((G, E), dtype=np.int32),
        np.zeros(E, dtype=np.int64),
        np.zeros(G, dtype=np.int64),
        np.zeros(1, dtype=np.int64),
        domain_G,
        np.zeros((E, domain_G.max() + 1), dtype=np.int64),
        np.zeros(E, dtype=np.int64),
        spread_E,
        np.where(open_EG, price_EG, BARRED).T.copy(),
        np.zeros(content_GC.shape, dtype=np.int64),
        np.array(
            [np.where(price_EG > 0, price_EG, BARRED).min(), int(held_EG.any()), int(spread_E.max() > 1)],
            dtype=np.int64,
        ),
        np.zeros((_WORK, max(content_GC.size, E)), dtype=np.int64),
        np.zeros((2 * content_GC.size + 4, 4), dtype=np.int64),
    )


class Layers(NamedTuple):
    """Many layers to search, arrays as in `LayerState` with an axis L or one of length 1 for all alike.

    Attributes
    ----------
    load_LE, content_LGC, capacity_LG, least_LE, most_LE : arrays of int64
        One row for each layer; the contents are replaced by what is found.
    live_LGC : array of int64, shape [L, G, C]
        What costs nothing.
    price_LEG : array of int64, shape [L or 1, E, G]
        Price of placing an expert where it is not live.
    open_LEG, held_LEG : arrays of bool, shape [L or 1, E, G]
        Limits.
    speed_G : array of float, shape [G]
        Speeds.
    domain_G : array of int64, shape [G]
        Failure domains, numbers from 0.
    spread_LE : array of int64, shape [L, E]
        Domains that each expert must reach.
    replicas_L : array of int64, shape [L]
        Replicas that a layer may have.
    word_L : array of uint64, shape [L]
        State of the random choices.
    base_LGC : array of int64, shape [L, G, C]
        What rounds put back; every slot full where that is asked for.
    goal_L : array of float, shape [L]
        Times that the layers are to keep; replaced by those that they do.
    price_L : array of int64, shape [L]
        Replaced by what is paid.
    reached_L : array of bool, shape [L]
        Replaced by whether the wanted time was reached.
    cut_L : array of bool, shape [L]
        Replaced by whether the search for it was told to stop.
    """

    load_LE: Any
    content_LGC: Any
    capacity_LG: Any
    least_LE: Any
    most_LE: Any
    live_LGC: Any
    price_LEG: Any
    open_LEG: Any
    held_LEG: Any
    speed_G: Any
    domain_G: Any
    spread_LE: Any
    replicas_L: Any
    word_L: Any
    base_LGC: Any
    goal_L: Any
    price_L: Any
    reached_L: Any
    cut_L: Any


def take(turns_2: Any, at: int) -> int:
    """Count one more; returns how many there were. Compiled: no two threads get the same."""
    turns_2[at] += 1
    return int(turns_2[at]) - 1


def await_others(turns_2: Any, count: int) -> None:
    """Wait until so many layers are done; others do theirs only in the compiled form."""


def search_layers(
    layers: Layers, search: EqualSearch, task: int, turns_2: Any, told: Any, waits: bool
) -> None:
    """Search layers, each as its turn comes, until none is left.

    `task` says what for: ``REACH`` the wanted times, then rounds of destroying and repairing; ``ROUNDS``
    alone; ``STEP`` once, after which `reached_L` tells whether it changed anything; ``FILL`` free slots.
    `turns_2` counts the layers that were begun and that are done; who `waits` ends when all are done.
    """
    count = len(layers.load_LE)
    x = take(turns_2, 0)
    while x < count:
        if told[0] == 0 or task == REACH:
            search_layer(layers, search, task, x, told)
        take(turns_2, 1)
        x = take(turns_2, 0)
    if waits:
        await_others(turns_2, count)


def search_layer(layers: Layers, search: EqualSearch, task: int, x: int, told: Any) -> None:
    """Search one layer (see `search_layers`)."""
    price_EG = layers.price_LEG[x if len(layers.price_LEG) > 1 else 0].copy()
    for g in range(layers.live_LGC.shape[1]):
        for c in range(layers.live_LGC.shape[2]):
            if layers.live_LGC[x, g, c] >= 0:
                price_EG[layers.live_LGC[x, g, c], g] = 0
    state = new_state(
        layers.load_LE[x],
        layers.content_LGC[x],
        layers.capacity_LG[x],
        price_EG,
        layers.open_LEG[x if len(layers.open_LEG) > 1 else 0],
        layers.held_LEG[x if len(layers.held_LEG) > 1 else 0],
        layers.least_LE[x],
        layers.most_LE[x],
        layers.domain_G,
        layers.spread_LE[x],
    )
    most = layers.replicas_L[x]
    refresh(state, most)
    give_rooms(state, layers.speed_G, layers.goal_L[x])
    if task == FILL:
        fill_up(state, search)
        return
    if task == STEP:
        before = pressure(state)
        _, layers.price_L[x] = descend(state, search, layers.price_L[x], 1 << 60, 0, told)
        layers.reached_L[x] = pressure(state) != before
        layers.goal_L[x] = slowest(state, layers.speed_G)
        return
    if task == REACH:
        if told[0] != 0:
            layers.cut_L[x] = True
            layers.price_L[x] = paid(state)
            return
        reached, goal, spent = reach(state, layers.speed_G, search, layers.goal_L[x], most, told)
        layers.reached_L[x] = reached
        layers.goal_L[x] = goal
        layers.price_L[x] = spent
        layers.cut_L[x] = not reached and told[0] != 0
    if layers.price_L[x] > 0:
        give_rooms(state, layers.speed_G, layers.goal_L[x])
        word_1 = layers.word_L[x : x + 1]
        layers.price_L[x] = shake(state, layers.base_LGC[x], search, most, layers.price_L[x], word_1, told)
