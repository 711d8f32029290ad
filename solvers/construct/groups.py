"""Groups of GPUs that share load, for when the spare slots are too few to join all GPUs into one.

With free shares, GPUs that a tree of shared experts joins act as one machine. Joining k GPUs costs k - 1
slots, so S slots for E experts leave at least E + G - S groups, and what is left to decide is a packing:
which GPUs form a group, and which experts lie in it whole. That is far smaller than the placement, and
nearly all of the balance is in it.

1. Join, as often as slots are spare, the group whose slots beside its heaviest expert must take the lightest
   experts with the one that asks for the heaviest: a GPU that is too slow for its expert, or has many slots
   for its speed, gains a partner with time to spare.
2. Fill the groups, heaviest expert first, each into the group that needs most tokens per slot that is left,
   and swap experts between groups until the slowest one is at the goal or no swap helps.
3. Spread each group over its GPUs: a pair shares its heaviest expert, larger groups are packed by joining or
   alias packing.

Steps 1 and 2 run on all layers at once. A layer that misses its goal is grouped again for the time it
reached.

References
----------
R. McNaughton: Scheduling with deadlines and loss functions (1959): k - 1 shared pieces do for k machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.solvers.construct.alias import alias_pack
from moeless_opt.solvers.construct.small import join_layer
from moeless_opt.solvers.core import NeverStop, Stop

__all__ = ["pack_groups", "pack_whole"]

Built = tuple[SlotArray, FloatArray, FloatArray]

_ROUNDS = 24  # of swaps between half of the groups and the other half
_FOCUS = 96  # of swaps between the slowest group and any other
_AGAIN = 3  # times that a layer is grouped for another goal
_UNLIKE_PARTS = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5)  # of the joins: unlike GPUs may want empty slots
_FEWEST = (2, 3)  # of these tries: heavy experts lie first where fewest others must lie with them
_FAR = 1e-3  # relative distance from the goal from which that is worth a try: it joins light GPUs less
_CLOSE = 2e-4  # relative distance from the goal at which a layer is left alone
_EXACT = 1e-9
_COMFORT = 0.9  # of the mean tokens per slot: groups that may take such experts need no partner
_LEAN = 0.5  # see `counts.apportion`
_BARRED = 1e300


def pack_groups(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    goal_L: FloatArray,
    *,
    stop: Stop | None = None,
) -> Built:
    """Place and share out all layers, with few spare slots, for the least largest GPU time.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens.
    capacity_LG : int array [layers, GPUs]
        Slots.
    speed_G : float array [GPUs]
        Relative speeds.
    goal_L : float array [layers]
        Times that would be perfect, for instance lower bounds.
    stop : Stop, optional
        Asked in every round.

    Returns
    -------
    slots_LGC : int32 array [layers, GPUs, slots]
        Placement, -1 (last) where empty.
    share_LGC : float array [layers, GPUs, slots]
        Fraction of its expert's tokens served by each slot.
    time_L : float array [layers]
        Largest GPU times; infinite where nothing was found.
    """
    L, G = capacity_LG.shape
    C = int(capacity_LG.max(initial=1))
    slots, share, time_L = np.full((L, G, C), -1, dtype=np.int32), np.zeros((L, G, C)), np.full(L, np.inf)
    goal_L = np.maximum(goal_L, 1e-300)
    aim_L = goal_L
    rows = np.flatnonzero(np.minimum(capacity_LG, load_LE.shape[1]).sum(axis=1) >= load_LE.shape[1])
    alike = bool((capacity_LG == capacity_LG[:, :1]).all() and (speed_G == speed_G[0]).all())
    parts = (1.0,) * (_AGAIN + 1) if alike else _UNLIKE_PARTS
    stop = stop or NeverStop()
    for number, part in enumerate(parts):
        if not len(rows) or (number and stop()):
            break
        fewest = not alike and number in _FEWEST
        close_L = time_L[rows] <= goal_L[rows] * (1.0 + _FAR)
        kept, rows = (rows[close_L], rows[~close_L]) if fewest else (rows[:0], rows)
        if not len(rows):
            rows = kept
            continue
        found = _grouped(
            load_LE[rows], capacity_LG[rows], speed_G, aim_L[rows], goal_L[rows], part, stop, fewest=fewest
        )
        better = found[2] < time_L[rows] * (1.0 - _EXACT)
        where = rows[better]
        width = found[0].shape[2]
        slots[where], share[where], time_L[where] = -1, 0.0, found[2][better]
        slots[where, :, :width], share[where, :, :width] = found[0][better], found[1][better]
        open_L = time_L[rows] > goal_L[rows] * (1.0 + _CLOSE)
        # Equal GPUs gain nothing from what did not help once.
        rows = np.concatenate([rows[open_L & (better | (number == 0) | (not alike))], kept])
        reached_L = np.where(np.isfinite(time_L), time_L, goal_L)
        if alike:
            aim_L = reached_L if number == 0 else (goal_L + reached_L) / 2.0
        else:
            aim_L = goal_L if number % 2 else reached_L
    return slots, share, time_L


def pack_whole(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    goal_L: FloatArray,
    *,
    stop: Stop | None = None,
) -> tuple[SlotArray, FloatArray]:
    """One replica of each expert, slots that are spare left empty: placement and largest times, as above."""
    stop = stop or NeverStop()
    slots, _, time_L = _grouped(load_LE, capacity_LG, speed_G, goal_L, goal_L, 0.0, stop)
    if stop():
        return slots, time_L
    again, _, again_L = _grouped(load_LE, capacity_LG, speed_G, time_L, goal_L, 0.0, stop)
    better = again_L < time_L
    slots[better] = again[better]
    return slots, np.minimum(time_L, again_L)


@dataclass(slots=True)
class _Groups:
    """Groups of every layer: their speed, the experts that they take (0 beyond the last), and each GPU's."""

    speed_LM: FloatArray
    room_LM: IntArray
    label_LG: IntArray


def _grouped(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    aim_L: FloatArray,
    goal_L: FloatArray,
    part: float,
    stop: Stop,
    *,
    fewest: bool = False,
) -> Built:
    """Group for the times `aim_L`, fill for them, spread."""
    groups = _join(load_LE, capacity_LG, speed_G, aim_L, part, fewest)
    expert_LMN = _Filling(load_LE, groups, aim_L).swap(goal_L, stop)
    return _spread(load_LE, capacity_LG, speed_G, groups.label_LG, expert_LMN)


def _join(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    aim_L: FloatArray,
    part: float,
    fewest: bool,
) -> _Groups:
    """Step 1: a part of the joins that the spare slots allow; slots that no join takes stay empty."""
    L, G = capacity_LG.shape
    E = load_LE.shape[1]
    rows = np.arange(L)
    room = np.minimum(capacity_LG, E).astype(np.float64)
    alive = room > 0
    speed = np.where(alive, speed_G, 0.0)
    size = alive.astype(np.int64)
    most_L = np.minimum(room.sum(axis=1) - E, alive.sum(axis=1) - 1.0)
    joins_L = np.floor(part * most_L).astype(np.int64)
    # The heaviest experts lie on the fastest GPUs, one each, if so wished where fewest must lie with them.
    heavy = np.zeros((L, G))
    heavy[:, : min(E, G)] = -np.sort(-load_LE, axis=1)[:, :G]
    head = np.zeros((L, G))
    np.put_along_axis(head, np.lexsort((room * fewest, -speed), axis=1), heavy, axis=1)
    head[~alive] = 0.0
    label = np.tile(np.arange(G), (L, 1))
    usual_L = (aim_L * speed.sum(axis=1) - head.sum(axis=1)) / np.maximum(
        room.sum(axis=1) - alive.sum(axis=1), 1
    )
    for step in range(int(joins_L.max(initial=0))):
        fill = (aim_L[:, None] * speed - head) / np.maximum(room - 1.0, 0.5)
        low = np.where(alive, fill, np.inf)
        poor_L = low.argmin(axis=1)
        at_ease_L = low[rows, poor_L] >= _COMFORT * usual_L
        heaviest_L = np.where(alive, head / (speed + _LEAN * speed_G), -1.0).argmax(axis=1)
        one_L = np.where(at_ease_L, heaviest_L, poor_L)
        other = alive.copy()
        other[rows, one_L] = False
        least_L = np.where(other, size, G + 1).min(axis=1)
        two_L = np.where(other & (size == least_L[:, None]), fill, -np.inf).argmax(axis=1)
        now = np.flatnonzero(joins_L > step)
        one, two = one_L[now], two_L[now]
        speed[now, one] += speed[now, two]
        room[now, one] += room[now, two] - 1.0
        size[now, one] += size[now, two]
        alive[now, two] = False
        merged = label[now]
        label[now] = np.where(merged == two[:, None], one[:, None], merged)
    # Number the groups of each layer from 0.
    order = np.argsort(~alive, axis=1, kind="stable")
    number = np.argsort(order, axis=1, kind="stable")
    M = int(alive.sum(axis=1).max(initial=1))
    order = order[:, :M]
    kept = np.take_along_axis(alive, order, axis=1)
    return _Groups(
        np.where(kept, np.take_along_axis(speed, order, axis=1), 0.0),
        np.where(kept, np.take_along_axis(room, order, axis=1), 0.0).astype(np.int64),
        np.where(capacity_LG > 0, np.take_along_axis(number, label, axis=1), -1),
    )


class _Filling:
    """Step 2: whole experts in groups, of all layers at once; -1 marks an empty place."""

    def __init__(self, load_LE: FloatArray, groups: _Groups, aim_L: FloatArray) -> None:
        L, M = groups.speed_LM.shape
        N = int(groups.room_LM.max(initial=1))
        used_LM = groups.room_LM > 0
        self.inverse = np.where(used_LM, 1.0 / np.where(used_LM, groups.speed_LM, 1.0), 0.0)
        self.expert = np.full((L, M, N), -1, dtype=np.int64)
        self.weight = np.zeros((L, M, N))
        self.barred = np.arange(N) >= groups.room_LM[:, :, None]
        need = aim_L[:, None] * groups.speed_LM
        left = groups.room_LM.astype(np.float64)
        rows = np.arange(L)
        for expert in np.argsort(-load_LE, axis=1, kind="stable").T:
            weight = load_LE[rows, expert]
            group = np.where(left > 0, need / np.maximum(left, 1.0), -np.inf).argmax(axis=1)
            place = (groups.room_LM[rows, group] - left[rows, group]).astype(np.int64)
            self.expert[rows, group, place], self.weight[rows, group, place] = expert, weight
            need[rows, group] -= weight
            left[rows, group] -= 1.0
        self.token = self.weight.sum(axis=2)

    def swap(self, goal_L: FloatArray, stop: Stop) -> IntArray:
        """Swap until each layer is at its goal or no swap helps; returns the experts, shape [L, M, N]."""
        result = self.expert.copy()
        goal, layer = goal_L * (1.0 + _EXACT), np.arange(len(goal_L))
        M = self.token.shape[1]
        half = M // 2
        stale = np.zeros(len(goal), dtype=np.int64)
        for step in range(_ROUNDS + _FOCUS):
            focus = step >= _ROUNDS
            if step == _ROUNDS:
                stale[:] = 0
            elif not focus and (stale >= half).all():
                continue  # no pair gains any more: on to the slowest group against all
            time = self.token * self.inverse
            done = time.max(axis=1) <= goal
            if focus:
                done |= stale > 0
            if done.any():
                result[layer[done]] = self.expert[done]
                for name in ("inverse", "expert", "weight", "barred", "token"):
                    setattr(self, name, getattr(self, name)[~done])
                goal, layer, stale, time = goal[~done], layer[~done], stale[~done], time[~done]
            if not len(goal) or stop():
                break
            if focus:
                slow = np.repeat(time.argmax(axis=1)[:, None], M, axis=1)
                fast = np.tile(np.arange(M), (len(goal), 1))
            else:
                rank = np.argsort(-time, axis=1, kind="stable")
                slow, fast = rank[:, :half], rank[:, M - 1 - (np.arange(half) + step) % half]
            gained = self._exchange(slow, fast, focus)
            stale = np.where(gained, 0, stale + 1)
        result[layer] = self.expert
        return result

    def _exchange(self, slow: IntArray, fast: IntArray, only_best: bool) -> BoolArray:
        """The swap in each pair that brings its groups closest, or that of the best pair; who gained."""
        A, P = slow.shape
        N = self.expert.shape[2]
        rows, pairs = np.arange(A)[:, None], np.arange(P)
        weight_a, weight_b = self.weight[rows, slow], self.weight[rows, fast]
        inv_a, inv_b = self.inverse[rows, slow], self.inverse[rows, fast]
        time_a, time_b = self.token[rows, slow] * inv_a, self.token[rows, fast] * inv_b
        bar_a, bar_b = self.barred[rows, slow], self.barred[rows, fast]
        even = (time_a - time_b) / np.maximum(
            inv_a + inv_b, 1e-300
        )  # tokens to shift so that both end together
        give = np.where(bar_a, _BARRED, weight_a - even[:, :, None])
        take = np.where(bar_b, -_BARRED, weight_b)
        miss = give[:, :, :, None] - take[:, :, None, :]
        np.abs(miss, out=miss)
        i, j = np.divmod(miss.reshape(A, P, N * N).argmin(axis=2), N)
        shift = weight_a[rows, pairs, i] - weight_b[rows, pairs, j]
        later = np.maximum(time_a - shift * inv_a, time_b + shift * inv_b)
        later[bar_a[rows, pairs, i] | bar_b[rows, pairs, j]] = np.inf
        gained: BoolArray = later < time_a * (1.0 - 1e-12)
        if only_best:
            gained &= pairs == later.argmin(axis=1)[:, None]
        row, pair = np.nonzero(gained)
        a, b = (row, slow[row, pair], i[row, pair]), (row, fast[row, pair], j[row, pair])
        for array in (self.expert, self.weight):
            array[a], array[b] = array[b], array[a]
        self.token[row, a[1]] -= shift[row, pair]
        self.token[row, b[1]] += shift[row, pair]
        return np.asarray(gained.any(axis=1))


def _spread(
    load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, label_LG: IntArray, expert_LMN: IntArray
) -> Built:
    """Step 3: the experts of every group on its GPUs, with all of them at the group's time."""
    L, G = capacity_LG.shape
    M, N = expert_LMN.shape[1:]
    C = int(capacity_LG.max(initial=1))
    slots, share = np.full((L, G, C), -1, dtype=np.int32), np.zeros((L, G, C))
    filled = expert_LMN >= 0
    weight = np.where(filled, load_LE[np.arange(L)[:, None, None], expert_LMN], 0.0)
    order = np.argsort(np.where(filled, -weight, 1.0), axis=2, kind="stable")  # heaviest first, empties last
    expert, weight = np.take_along_axis(expert_LMN, order, 2), np.take_along_axis(weight, order, 2)
    failed_L = np.zeros(L, dtype=bool)
    size_LM = np.zeros((L, M), dtype=np.int64)
    layer, gpu = np.nonzero(label_LG >= 0)
    np.add.at(size_LM, (layer, label_LG[layer, gpu]), 1)
    # GPUs by layer and group: the members of a group stand in a row.
    where = np.lexsort((gpu, label_LG[layer, gpu], layer))
    layer, gpu = layer[where], gpu[where]
    group = label_LG[layer, gpu]
    first = np.flatnonzero(np.r_[True, (layer[1:] != layer[:-1]) | (group[1:] != group[:-1])])
    size = size_LM[layer[first], group[first]]
    alone = first[size == 1]
    width = min(C, N)
    slots[layer[alone], gpu[alone], :width] = expert[layer[alone], group[alone], :width]
    share[layer[alone], gpu[alone], :width] = expert[layer[alone], group[alone], :width] >= 0
    two = first[size == 2]
    one_G, two_G = gpu[two], gpu[two + 1]
    alike = (speed_G[one_G] == speed_G[two_G]) & (
        capacity_LG[layer[two], one_G] == capacity_LG[layer[two], two_G]
    )
    pairs = two[alike]
    _pairs(
        slots,
        share,
        layer[pairs],
        gpu[pairs],
        gpu[pairs + 1],
        expert[layer[pairs], group[pairs]],
        weight[layer[pairs], group[pairs]],
    )
    for at, k in [
        *((int(p), 2) for p in two[~alike]),
        *zip(first[size > 2].tolist(), size[size > 2].tolist(), strict=True),
    ]:
        members = gpu[at : at + k]
        experts = expert[layer[at], group[at]]
        experts = experts[experts >= 0]
        if not len(experts):
            continue  # more GPUs than anybody needs
        packed = _level(load_LE[layer[at], experts], capacity_LG[layer[at], members], speed_G[members])
        if packed is None:
            failed_L[layer[at]] = True
            continue
        held, part = packed
        slots[layer[at], members, : held.shape[1]] = np.where(held >= 0, experts[held], -1)
        share[layer[at], members, : held.shape[1]] = part
    token = np.where(slots >= 0, load_LE[np.arange(L)[:, None, None], slots] * share, 0.0)
    time_L = (token.sum(axis=2) / speed_G).max(axis=1)
    time_L[failed_L] = np.inf
    return slots, share, time_L


def _pairs(
    slots: SlotArray,
    share: FloatArray,
    layer: IntArray,
    one: IntArray,
    two: IntArray,
    expert_PN: IntArray,
    weight_PN: FloatArray,
) -> None:
    """Equal GPUs in twos, in place: they share the heaviest expert, the others are dealt out there and back.

    Dealt 1, 2, 2, 1, ... the two differ by one expert's tokens at most, and the shared one has no fewer.
    """
    N = expert_PN.shape[1]
    if not len(layer):
        return
    turn = np.isin(np.arange(N) % 4, (2, 3))  # who gets column 1, 2, ...: one, two, two, one, ...
    turn[0] = False
    held = [weight_PN[:, 1:][:, ~turn[1:]].sum(axis=1), weight_PN[:, 1:][:, turn[1:]].sum(axis=1)]
    shared = weight_PN[:, 0]
    part = np.where(shared > 0, ((held[1] - held[0]) / np.where(shared > 0, shared, 1.0) + 1.0) / 2.0, 0.5)
    part = np.clip(part, 0.0, 1.0)
    for gpu, mine, own in ((one, ~turn, part), (two, turn, 1.0 - part)):
        columns = np.flatnonzero(mine)
        columns = np.concatenate([[0], columns[columns > 0]])[: slots.shape[2]]
        held_PC = expert_PN[:, columns]
        slots[layer, gpu, : len(columns)] = held_PC
        share[layer, gpu, : len(columns)] = held_PC >= 0
        share[layer, gpu, 0] = np.where(held_PC[:, 0] >= 0, own, 0.0)


def _level(
    load_E: FloatArray, capacity_G: IntArray, speed_G: FloatArray
) -> tuple[SlotArray, FloatArray] | None:
    """One group with every GPU at the mean: by joining, else by alias packing."""
    joined = join_layer(load_E.tolist(), capacity_G.tolist(), speed_G.tolist())
    if joined is None:
        return alias_pack(load_E, capacity_G, speed_G)
    C = int(capacity_G.max())
    return (
        np.array([row + [-1] * (C - len(row)) for row in joined[0]], dtype=np.int32),
        np.array([row + [0.0] * (C - len(row)) for row in joined[1]]),
    )
