"""The token split as Triton kernels; importing this imports Triton.

What they compute are the very integers of the host's split (`dispatch.shares`, `dispatch.routes`). So what is
in floating point is in float64, operation by operation as there, and launches forbid fused products. With
``TRITON_INTERPRET=1`` in the environment of the process they run on a CPU, for tests.

Sizes are no part of what is compiled, only their powers of two: no batch compiles anything.

Axes: R ranks that send (G as places of experts), E experts, P flat slots, X replicas of an expert, S experts
that have several, or local slots; names in B are the next power of two. Whole numbers are int64, tables
int32.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0913

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["arrange", "fill", "interpreted", "order", "pack", "pour", "search", "split"]


def interpreted() -> bool:
    """Whether kernels run on the CPU, which is decided where Triton and this are imported."""
    return not any(isinstance(part, triton.JITFunction) for part in (tl.sum, split))


ONE: tl.constexpr = tl.constexpr(2**20)


@triton.jit(do_not_specialize=["stride", "R", "S"])
def order(
    counts, stride, many, copies_E, nth_E, load_E, load_S, place_S, R, S, RB: tl.constexpr, SB: tl.constexpr
):
    """Loads; and places of the experts with several replicas, heaviest first (of equals the first).

    A program for each expert, which adds up all counts that it compares with: cheaper than a second launch.
    """
    e = tl.program_id(0)
    r = tl.arange(0, RB)
    own = tl.sum(tl.load(counts + r * stride + e, mask=r < R, other=0), 0)
    tl.store(load_E + e, own)
    if tl.load(copies_E + e) > 1:
        mine = tl.load(nth_E + e)
        s = tl.arange(0, SB)
        expert = tl.load(many + s, mask=s < S, other=0)
        total = tl.zeros([SB], tl.int64)
        for rank in range(R):
            total += tl.load(counts + rank * stride + expert, mask=s < S, other=0)
        before = (total > own) | ((total == own) & (s < mine))
        tl.store(place_S + tl.sum((before & (s < S)).to(tl.int32), 0), mine)
        tl.store(load_S + mine, own)


@triton.jit
def _poured(tokens, busy, speed, valid, n, X: tl.constexpr, UNIT: tl.constexpr):
    """`shares.pour` of the first n vessels."""
    x = tl.arange(0, X)
    first = tl.sum(tl.where(x == 0, busy, 0), 0)
    second = tl.sum(tl.where(x == 1, busy, 0), 0)
    level = first + second + tokens
    half = tl.maximum((level + (first <= second).to(tl.int64)) // 2 - first, 0)
    half = tl.minimum(half, tokens)
    part = tl.where(x == 0, half, tl.where(x == 1, tokens - half, 0))
    if X > 2 or not UNIT:
        alike = tl.sum(tl.where(x == 0, speed, 0), 0) == tl.sum(tl.where(x == 1, speed, 0), 0)
        if (n != 2) | (alike == 0):
            part = _levelled(tokens, busy, speed, valid, X, UNIT)
    return part


@triton.jit
def _levelled(tokens, busy, speed, valid, X: tl.constexpr, UNIT: tl.constexpr):
    """The general case of `shares.pour`: the lowest vessels are filled to a level below the next one."""
    x = tl.arange(0, X)
    rest = busy if UNIT else busy * ONE // speed
    lower = (rest[None, :] < rest[:, None]) | ((rest[None, :] == rest[:, None]) & (x[None, :] < x[:, None]))
    lower = lower & valid[None, :]
    at = tl.sum(lower.to(tl.int32), 1)
    below = tokens + tl.sum(tl.where(lower, busy[None, :], 0), 1)
    wide = tl.sum(tl.where(lower, speed[None, :], 0), 1)
    dry = valid & (at > 0) & (below * speed <= busy * wide)
    used = tl.min(tl.where(dry, at, X), 0)
    wet = valid & (at < used)
    level = tokens + tl.sum(tl.where(wet, busy, 0), 0)
    width = tl.maximum(tl.sum(tl.where(wet, speed, 0), 0), 1)
    exact = level * speed
    part = tl.where(wet, tl.maximum(exact // width - busy, 0), 0)
    over = exact % width
    left = tokens - tl.sum(part, 0)
    sooner = (over[None, :] > over[:, None]) | ((over[None, :] == over[:, None]) & (x[None, :] < x[:, None]))
    sooner = sooner & wet[None, :]
    if left > 0:
        count = tl.maximum(tl.sum(wet.to(tl.int64), 0), 1)
        nth = tl.sum(sooner.to(tl.int64), 1)
        part += tl.where(wet, left // count + (nth < left % count).to(tl.int64), 0)
    while left < 0:
        # A round: who has tokens gives one back, in that order, until none is too many.
        gives = wet & (part > 0)
        nth = tl.sum((sooner & gives[None, :]).to(tl.int64), 1)
        back = (gives & (nth < -left)).to(tl.int64)
        part -= back
        left += tl.sum(back, 0)
    return part


@triton.jit(do_not_specialize=["sweeps", "G", "C", "S"])
def pour(
    load_E,
    many,
    load_S,
    place_S,
    single_GC,
    rank_EX,
    copies_E,
    speed_G,
    busy_G,
    base_G,
    alone_G,
    quota_SX,
    sweeps,
    G,
    C,
    S,
    GB: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
    X: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Quotas of `BalancedShares`, one program: the sweeps are a chain."""
    g = tl.arange(0, GB)
    x = tl.arange(0, X)
    s = tl.arange(0, SB)
    c = tl.arange(0, CB)
    cell = (g[:, None] < G) & (c[None, :] < C)
    single = tl.load(single_GC + g[:, None] * C + c[None, :], mask=cell, other=-1)
    tokens = tl.load(load_E + single, mask=single >= 0, other=0)
    alone = tl.sum(tokens, 1)
    tl.store(busy_G + g, alone, mask=g < G)
    # For `search`: what experts of one replica bring, and how many they are.
    tl.store(base_G + g, alone, mask=g < G)
    tl.store(alone_G + g, tl.sum((tokens > 0).to(tl.int64), 1), mask=g < G)
    zero = tl.zeros([SB, X], tl.int64)
    tl.store(quota_SX + s[:, None] * X + x[None, :], zero, mask=s[:, None] < S)
    used = tl.sum((tl.load(load_S + s, mask=s < S, other=0) > 0).to(tl.int32), 0)
    speed_g = tl.load(speed_G + g, mask=g < G, other=1)
    tl.debug_barrier()
    best = tl.sum(zero.to(tl.int64).reshape([SB * X]), 0) - 1
    sweep = used * 0
    while sweep < sweeps:
        for k in range(used):
            i = tl.load(place_S + k)
            e = tl.load(many + i)
            n = tl.load(copies_E + e)
            rank = tl.load(rank_EX + e * X + x)
            valid = x < n
            had = tl.load(quota_SX + i * X + x)
            busy = tl.load(busy_G + rank, mask=valid, other=0) - had
            speed = tl.load(speed_G + rank, mask=valid, other=1)
            part = _poured(tl.load(load_S + i), busy, speed, valid, n, X, UNIT)
            tl.debug_barrier()
            tl.store(quota_SX + i * X + x, part)
            tl.store(busy_G + rank, busy + part, mask=valid)
            tl.debug_barrier()
        level = tl.load(busy_G + g, mask=g < G, other=0) * ONE
        if not UNIT:
            level = level // speed_g
        fullest = tl.max(level, 0)
        sweep += 1
        if (sweep > 1) & (fullest >= best):
            sweep = sweeps + 0 * sweep
        best = fullest


@triton.jit
def _seconds(tokens, used, rate, knot_K, table_AK, K, A, LOG: tl.constexpr):
    """`_timed_kernels.seconds`, elementwise."""
    low = tokens.to(tl.int32) * 0
    high = low + (K - 1)
    tokens = tokens.to(tl.float64)
    for _ in tl.static_range(LOG):
        middle = (low + high) // 2
        open_ = high - low > 1
        right = tl.load(knot_K + middle) <= tokens
        low = tl.where(open_ & right, middle, low)
        high = tl.where(open_ & (right == 0), middle, high)
    at = tl.load(knot_K + low)
    along = (tokens - at) / (tl.load(knot_K + low + 1) - at)
    along = tl.where(along > 0.0, along, 0.0)
    row = table_AK + tl.minimum(used, A - 1).to(tl.int32) * K + low
    left = tl.load(row)
    return (left + (tl.load(row + 1) - left) * along) / rate


@triton.jit
def _later(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _part_of(
    amount,
    n_g,
    a_g,
    s_g,
    n_h,
    a_h,
    s_h,
    asked,
    knot_K,
    table_AK,
    K,
    A,
    TRIES: tl.constexpr,
    LOG: tl.constexpr,
):
    """`_timed_kernels.part_of`, elementwise."""
    infinite = tl.full(amount.shape, float("inf"), tl.float64)
    close = tl.full(amount.shape, 1e-4, tl.float64)
    low = amount * 0
    high = amount
    gap_low = _seconds(n_g, a_g, s_g, knot_K, table_AK, K, A, LOG)
    gap_low -= _seconds(n_h, a_h, s_h, knot_K, table_AK, K, A, LOG)
    gap_high = _seconds(n_g - amount, a_g, s_g, knot_K, table_AK, K, A, LOG)
    gap_high -= _seconds(n_h + amount, a_h, s_h, knot_K, table_AK, K, A, LOG)
    best = low
    value = infinite
    going = asked & (gap_low > 0.0) & (gap_high < 0.0)
    for _ in range(TRIES):
        going = going & (high - low >= 2)
        slope = tl.where(going, gap_low - gap_high, 1.0)
        middle = low + ((high - low).to(tl.float64) * (gap_low / slope)).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        t_g = _seconds(n_g - middle, a_g, s_g, knot_K, table_AK, K, A, LOG)
        t_h = _seconds(n_h + middle, a_h, s_h, knot_K, table_AK, K, A, LOG)
        worst = _later(t_g, t_h)
        better = going & (worst < value)
        best = tl.where(better, middle, best)
        value = tl.where(better, worst, value)
        gap = t_g - t_h
        going = going & (tl.abs(gap) > close * worst)
        up = going & (gap > 0.0)
        down = going & (gap <= 0.0)
        low = tl.where(up, middle, low)
        high = tl.where(down, middle, high)
        new_low = tl.where(up, gap, tl.where(down, gap_low * 0.5, gap_low))
        gap_high = tl.where(down, gap, tl.where(up, gap_high * 0.5, gap_high))
        gap_low = new_low
    return best, value


@triton.jit
def _pick(tile, s, x, row, column):
    """One element of a tile."""
    return tl.sum(tl.sum(tl.where((s[:, None] == row) & (x[None, :] == column), tile, 0), 1), 0)


@triton.jit
def _hand(y, n, a, hold, s, x, g, row, source, target, amount):
    """`_timed_kernels._hand`: tokens of an expert from one replica to another; all as it is then."""
    left = _pick(y, s, x, row, source) - amount
    had = _pick(y, s, x, row, target)
    from_g = g == _pick(hold, s, x, row, source)
    to_g = g == _pick(hold, s, x, row, target)
    n = n + tl.where(to_g, amount, 0) - tl.where(from_g, amount, 0)
    a = a + (to_g & (had == 0)).to(tl.int64) - (from_g & (left == 0)).to(tl.int64)
    here = s[:, None] == row
    y = (
        y
        + tl.where(here & (x[None, :] == target), amount, 0)
        - tl.where(here & (x[None, :] == source), amount, 0)
    )
    return y, n, a


@triton.jit
def _descend(
    best, y, n, a, best_y, best_n, best_a, hold, valid, rate, n_G, a_G, t_G, rate_G, knot_K, table_AK, K, A,
    G, SB: tl.constexpr, X: tl.constexpr, GB: tl.constexpr, TRIES: tl.constexpr, STEPS: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """`_timed_kernels._descend`, with all steps from the slowest rank looked at side by side."""
    s = tl.arange(0, SB)
    x = tl.arange(0, X)
    g = tl.arange(0, GB)
    rate_h = tl.load(rate_G + hold, mask=valid, other=1.0)
    nearly = tl.full([], 1 - 1e-9, tl.float64)
    sooner = tl.full([], 1 - 1e-6, tl.float64)
    infinite = tl.full([SB, X], float("inf"), tl.float64)
    index = s[:, None] * X + x[None, :]
    step = 0
    while step < STEPS:
        t = tl.where(g < G, _seconds(n, a, rate, knot_K, table_AK, K, A, LOG), -1.0)
        worst = tl.max(t, 0)
        slow = tl.argmax(t, 0, tie_break_left=True)
        better = worst < best * nearly
        best = tl.where(better, worst, best)
        best_y = tl.where(better, y, best_y)
        best_n = tl.where(better, n, best_n)
        best_a = tl.where(better, a, best_a)
        limit = worst * sooner
        tl.store(n_G + g, n, mask=g < G)
        tl.store(a_G + g, a, mask=g < G)
        tl.store(t_G + g, t, mask=g < G)
        tl.debug_barrier()
        n_h = tl.load(n_G + hold, mask=valid, other=0)
        a_h = tl.load(a_G + hold, mask=valid, other=0) + (y == 0).to(tl.int64)
        t_h = tl.load(t_G + hold, mask=valid, other=0.0)
        tl.debug_barrier()
        there = valid & (hold == slow) & (y > 0)
        held = tl.sum(tl.where(there, y, 0), 1)
        source = tl.sum(tl.where(there, x[None, :], 0), 1)
        amount = held[:, None] + y * 0
        can = valid & (amount > 0) & (hold != slow) & (t_h < limit)
        n_g = tl.sum(tl.where(g == slow, n, 0), 0)
        a_g = tl.sum(tl.where(g == slow, a, 0), 0)
        rate_g = tl.sum(tl.where(g == slow, rate, 0.0), 0)
        without = _seconds(n_g - held, a_g - 1 + held * 0, rate_g, knot_K, table_AK, K, A, LOG)
        whole = _seconds(n_h + amount, a_h, rate_h, knot_K, table_AK, K, A, LOG)
        whole = _later(without[:, None] + whole * 0.0, whole)
        part, ends = _part_of(
            amount,
            n_g + y * 0,
            a_g + y * 0,
            rate_g,
            n_h,
            a_h,
            rate_h,
            can,
            knot_K,
            table_AK,
            K,
            A,
            TRIES,
            LOG,
        )
        value = tl.where(can, tl.where(ends < whole, ends, whole), infinite)
        least = tl.min(tl.min(value, 1), 0)
        first = tl.min(tl.min(tl.where(value == least, index, SB * X), 1), 0)
        row = first // X
        target = first % X
        give = _pick(tl.where(ends < whole, part, amount), s, x, row, target)
        at = tl.sum(tl.where(s == row, source, 0), 0)
        step += 1
        if least < limit:
            y, n, a = _hand(y, n, a, hold, s, x, g, row, at, target, give)
        else:
            step = step + STEPS
    return best, y, n, a, best_y, best_n, best_a


@triton.jit
def _push(draw, slow, y, n, a, hold, copies, valid, SB: tl.constexpr, X: tl.constexpr, GB: tl.constexpr):
    """One half of `_timed_kernels._shake`."""
    s = tl.arange(0, SB)
    x = tl.arange(0, X)
    g = tl.arange(0, GB)
    there = valid & (hold == slow) & (y > 0)
    some = tl.sum(there.to(tl.int64), 1)
    count = tl.sum(some, 0)
    if count > 0:
        draw = draw * 48271 % 2147483647
        nth = draw % count
        draw = draw * 48271 % 2147483647
        row = tl.sum(tl.where((some > 0) & (tl.cumsum(some, 0) == nth + 1), s, 0), 0)
        source = tl.sum(tl.sum(tl.where(there & (s[:, None] == row), x[None, :], 0), 1), 0)
        target = draw % (tl.sum(tl.where(s == row, copies, 0), 0) - 1)
        target += (target >= source).to(tl.int64)
        amount = _pick(y, s, x, row, source)
        y, n, a = _hand(y, n, a, hold, s, x, g, row, source, target, amount)
    return draw, y, n, a


@triton.jit(do_not_specialize=["kicks", "G", "S", "K", "A"])
def search(
    many, load_S, place_S, rank_EX, copies_E, base_G, alone_G, busy_G, quota_SX, rate_G, knot_K, table_AK,
    n_G, a_G, t_G, kicks, G, S, K, A,
    GB: tl.constexpr, SB: tl.constexpr, X: tl.constexpr, TRIES: tl.constexpr, STEPS: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """Quotas of `TimedShares`, one program, from what `pour` leaves; in the place of its quotas."""
    s = tl.arange(0, SB)
    x = tl.arange(0, X)
    g = tl.arange(0, GB)
    used = tl.sum((tl.load(load_S + s, mask=s < S, other=0) > 0).to(tl.int32), 0)
    here = s < used
    nth = tl.load(place_S + s, mask=here, other=0)
    expert = tl.load(many + nth, mask=here, other=0)
    copies = tl.load(copies_E + expert, mask=here, other=2).to(tl.int64)
    load = tl.load(load_S + nth, mask=here, other=0)
    valid = here[:, None] & (x[None, :] < copies[:, None])
    hold = tl.load(rank_EX + expert[:, None] * X + x[None, :], mask=valid, other=0)
    even = tl.load(quota_SX + nth[:, None] * X + x[None, :], mask=valid, other=0)
    rate = tl.load(rate_G + g, mask=g < G, other=1.0)
    n = tl.load(base_G + g, mask=g < G, other=0)
    a = tl.load(alone_G + g, mask=g < G, other=0)
    even_n = tl.load(busy_G + g, mask=g < G, other=0)
    even_a = a
    y = even * 0
    for row in range(used):
        # Whole on the replica that ends soonest with it.
        mine = s[:, None] == row
        rank_x = tl.sum(tl.where(mine, hold, 0), 0)
        real_x = tl.sum((mine & valid).to(tl.int32), 0) > 0
        at = rank_x[:, None] == g[None, :]
        n_x = tl.sum(tl.where(at, n[None, :], 0), 1)
        a_x = tl.sum(tl.where(at, a[None, :], 0), 1)
        rate_x = tl.sum(tl.where(at, rate[None, :], 0.0), 1)
        tokens = tl.sum(tl.where(s == row, load, 0), 0)
        ends = _seconds(n_x + tokens, a_x + 1, rate_x, knot_K, table_AK, K, A, LOG)
        ends = tl.where(real_x, ends, float("inf"))
        first = tl.argmin(ends, 0, tie_break_left=True)
        to = tl.sum(tl.where(x == first, rank_x, 0), 0)
        y += tl.where(mine & (x[None, :] == first), tokens, 0)
        n += tl.where(g == to, tokens, 0)
        a += (g == to).to(tl.int64)
        serves_x = (tl.sum(tl.where(mine, even, 0), 0) > 0) & real_x
        even_a += tl.sum((at & serves_x[:, None]).to(tl.int64), 0)
    best = tl.full([], float("inf"), tl.float64)
    best_y, best_n, best_a = y, n, a
    draw = used.to(tl.int64) * 0 + 88172645
    for turn in range(kicks + 2):
        if turn == 1:
            y, n, a = even, even_n, even_a
        if turn > 1:
            y, n, a = best_y, best_n, best_a
            t = tl.where(g < G, _seconds(n, a, rate, knot_K, table_AK, K, A, LOG), -1.0)
            slow = tl.argmax(t, 0, tie_break_left=True)
            draw, y, n, a = _push(draw, slow, y, n, a, hold, copies, valid, SB, X, GB)
            draw = draw * 48271 % 2147483647
            slow = (draw % G).to(tl.int32)
            draw, y, n, a = _push(draw, slow, y, n, a, hold, copies, valid, SB, X, GB)
        best, y, n, a, best_y, best_n, best_a = _descend(
            best, y, n, a, best_y, best_n, best_a, hold, valid, rate, n_G, a_G, t_G, rate_G, knot_K, table_AK,
            K, A, G, SB, X, GB, TRIES, STEPS, LOG,
        )  # fmt: skip
    tl.store(quota_SX + nth[:, None] * X + x[None, :], best_y, mask=valid)


@triton.jit
def _matched(flow, supply, demand):
    """What flows from supplies to demands in their order (north-west corner); what is left of both."""
    high_r = tl.cumsum(supply, 0)
    high_x = tl.cumsum(demand, 0)
    low = tl.maximum((high_r - supply)[:, None], (high_x - demand)[None, :])
    more = tl.maximum(tl.minimum(high_r[:, None], high_x[None, :]) - low, 0)
    return flow + more, tl.sum(more, 1), tl.sum(more, 0)


@triton.jit(do_not_specialize=["stride", "R", "P", "nodes"])
def split(
    counts,
    stride,
    slot_EX,
    rank_EX,
    copies_E,
    nth_E,
    weight_EX,
    total_E,
    quota_SX,
    node_R,
    sends_RP,
    R,
    P,
    nodes,
    RB: tl.constexpr,
    X: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Quotas (`EqualShares`, `PlannedShares`, or as they are given) and routes; a program for each expert."""
    e = tl.program_id(0)
    r = tl.arange(0, RB)
    x = tl.arange(0, X)
    supply = tl.load(counts + r * stride + e, mask=r < R, other=0)
    n = tl.load(copies_E + e)
    valid = x < n
    slot = tl.load(slot_EX + e * X + x)
    if n == 1:
        only = tl.load(slot_EX + e * X)
        tl.store(sends_RP + r * P + only, supply, mask=r < R)
    else:
        load = tl.sum(supply, 0)
        if POLICY == 0:
            each = load // n
            quota = tl.where(valid, each + (x < load - each * n).to(tl.int64), 0)
        elif POLICY == 1:
            quota = _rounded(load, tl.load(weight_EX + e * X + x), tl.load(total_E + e), valid, n, X)
        else:
            quota = tl.load(quota_SX + tl.load(nth_E + e) * X + x)
        rank = tl.load(rank_EX + e * X + x)
        there = tl.load(counts + rank * stride + e, mask=valid, other=0)
        own = tl.minimum(there, quota)
        flow = tl.where((r[:, None] == rank[None, :]) & valid[None, :], own[None, :], 0)
        supply -= tl.sum(flow, 1)
        quota -= own
        if nodes > 1:
            node_r = tl.load(node_R + r, mask=r < R, other=-1)
            node_x = tl.load(node_R + rank)
            for node in range(nodes):
                near = tl.where(node_r == node, supply, 0)
                wants = tl.where(node_x == node, quota, 0)
                flow, out, came = _matched(flow, near, wants)
                supply -= out
                quota -= came
        flow, out, came = _matched(flow, supply, quota)
        tl.store(sends_RP + r[:, None] * P + slot[None, :], flow, mask=(r[:, None] < R) & valid[None, :])


@triton.jit
def _rounded(load, weight, total, valid, n, X: tl.constexpr):
    """Twin of `weighted_quotas`: floors, then the largest remainders."""
    x = tl.arange(0, X)
    exact = load.to(tl.float64) * weight / total
    hair = tl.full([X], 1e-9, tl.float64)
    one = tl.full([X], 1.0, tl.float64)
    quota = tl.where(valid, tl.floor(exact + hair * (one + exact)).to(tl.int64), 0)
    left = load - tl.sum(quota, 0)
    # Shares that sum to a hair above 1: the fullest gives it back.
    fullest = tl.argmax(tl.where(valid, quota, -1), 0, tie_break_left=True)
    quota += tl.where((x == fullest) & (left < 0), left, 0)
    left = tl.maximum(left, 0)
    each = left // n
    short = quota.to(tl.float64) - exact
    sooner = (short[None, :] < short[:, None]) | (
        (short[None, :] == short[:, None]) & (x[None, :] < x[:, None])
    )
    nth = tl.sum((sooner & valid[None, :]).to(tl.int64), 1)
    return tl.where(valid, quota + each + (nth < left - each * n).to(tl.int64), 0)


@triton.jit(do_not_specialize=["stride", "E", "K", "R", "P", "me", "S"])
def pack(
    gathered,
    stride,
    E,
    K,
    sends_RP,
    first_G,
    out,
    R,
    P,
    me,
    S,
    KB: tl.constexpr,
    SB: tl.constexpr,
):
    """What the host must know: what each rank told, what goes to it, what comes from it, for which slot."""
    r = tl.program_id(0)
    k = tl.arange(0, KB)
    s = tl.arange(0, SB)
    row = out + r * (K + 2 + S)
    tl.store(row + k, tl.load(gathered + r * stride + E + k, mask=k < K, other=0), mask=k < K)
    low = tl.load(first_G + r)
    high = tl.load(first_G + r + 1)
    give = tl.zeros([SB], tl.int64)
    for at in range(low, high, SB):
        give += tl.load(sends_RP + me * P + at + s, mask=at + s < high, other=0)
    mine = tl.load(first_G + me)
    come = tl.load(sends_RP + r * P + mine + s, mask=s < S, other=0)
    tl.store(row + K, tl.sum(give, 0))
    tl.store(row + K + 1, tl.sum(come, 0))
    tl.store(row + K + 2 + s, come, mask=s < S)


@triton.jit(do_not_specialize=["P", "me"])
def fill(sends_RP, place_P, order, out, back, P, me, PB: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that are sorted by expert, sorted by slot, and where each then stands; a program for each slot.

    Slot p takes its rows behind those of the slots that come before it among the replicas (`place_P`).
    """
    p = tl.program_id(0)
    q = tl.arange(0, PB)
    own = tl.load(sends_RP + me * P + q, mask=q < P, other=0)
    place = tl.load(place_P + q, mask=q < P, other=0)
    here = tl.load(place_P + p)
    source = tl.sum(tl.where(place < here, own, 0), 0)
    target = tl.sum(tl.where(q < p, own, 0), 0)
    size = tl.load(sends_RP + me * P + p)
    i = tl.arange(0, BLOCK)
    for at in range(0, size, BLOCK):
        inside = at + i < size
        row = tl.load(order + source + at + i, mask=inside, other=0)
        tl.store(out + target + at + i, row, mask=inside)
        tl.store(back + row, target + at + i, mask=inside)


@triton.jit(do_not_specialize=["R", "P", "first", "S", "rows"])
def arrange(
    sends_RP,
    wanted_S,
    gather,
    scatter,
    R,
    P,
    first,
    S,
    rows,
    RB: tl.constexpr,
    SB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where arriving rows go (`scatter`), and whence (`gather`); a program for each rank and slot.

    Rows arrive rank by rank and there slot by slot; they are wanted slot by slot, in the order `wanted_S`,
    each slot's padded to a multiple of `rows`.
    """
    rank = tl.program_id(0)
    nth = tl.program_id(1)
    r = tl.arange(0, RB)
    j = tl.arange(0, SB)
    slot = tl.load(wanted_S + j, mask=j < S, other=0)
    mine = tl.load(wanted_S + nth)
    known = (r[:, None] < R) & (j[None, :] < S)
    size = tl.load(sends_RP + r[:, None] * P + first + slot[None, :], mask=known, other=0)
    sooner = (r[:, None] < rank) | ((r[:, None] == rank) & (slot[None, :] < mine))
    source = tl.sum(tl.sum(tl.where(sooner, size, 0), 1), 0)
    whole = (tl.sum(size, 0) + rows - 1) // rows * rows
    target = tl.sum(tl.where(j < nth, whole, 0), 0)
    target += tl.sum(tl.sum(tl.where((r[:, None] < rank) & (j[None, :] == nth), size, 0), 1), 0)
    count = tl.load(sends_RP + rank * P + first + mine)
    i = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        inside = at + i < count
        tl.store(gather + target + at + i, source + at + i, mask=inside)
        tl.store(scatter + source + at + i, target + at + i, mask=inside)
