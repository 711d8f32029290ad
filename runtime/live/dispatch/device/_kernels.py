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
    counts, stride, many, copies_E, nth_E, rank_EX, load_E, place_S, load_S, copies_S, rank_SX, R, S,
    RB: tl.constexpr, SB: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Loads; and the experts with several replicas, heaviest first (of equals the first): S is sorted.

    `place_S` tells where each of `many` has gone. A program for each expert, which adds up all counts that
    it compares with: cheaper than a second launch.
    """
    e = tl.program_id(0)
    r = tl.arange(0, RB)
    own = tl.sum(tl.load(counts + r * stride + e, mask=r < R, other=0), 0)
    tl.store(load_E + e, own)
    copies = tl.load(copies_E + e)
    if copies > 1:
        mine = tl.load(nth_E + e)
        s = tl.arange(0, SB)
        x = tl.arange(0, X)
        expert = tl.load(many + s, mask=s < S, other=0)
        total = tl.zeros([SB], tl.int64)
        for rank in range(R):
            total += tl.load(counts + rank * stride + expert, mask=s < S, other=0)
        before = (total > own) | ((total == own) & (s < mine))
        place = tl.sum((before & (s < S)).to(tl.int32), 0)
        tl.store(place_S + mine, place)
        tl.store(load_S + place, own)
        tl.store(copies_S + place, copies)
        tl.store(rank_SX + place * X + x, tl.load(rank_EX + e * X + x))


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
    load_E, load_S, copies_S, rank_SX, single_GC, speed_G, busy_G, base_G, alone_G, quota_SX, sweeps, G, C, S,
    GB: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr, X: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
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
        n = tl.load(copies_S)
        rank = tl.load(rank_SX + x)
        load = tl.load(load_S)
        for k in range(used):
            valid = x < n
            had = tl.load(quota_SX + k * X + x)
            busy = tl.load(busy_G + rank, mask=valid, other=0) - had
            speed = tl.load(speed_G + rank, mask=valid, other=1)
            part = _poured(load, busy, speed, valid, n, X, UNIT)
            at = rank
            # Of the next expert all that does not depend on this one, while this is under way.
            after = tl.minimum(k + 1, used - 1)
            n = tl.load(copies_S + after)
            rank = tl.load(rank_SX + after * X + x)
            load = tl.load(load_S + after)
            tl.debug_barrier()
            tl.store(quota_SX + k * X + x, part)
            tl.store(busy_G + at, busy + part, mask=valid)
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
def _seconds(tokens, used, rate, knot_K, table_AK, slope_AK, K, A, LOG: tl.constexpr, UNIT: tl.constexpr):
    """`_timed_kernels.seconds`, elementwise."""
    low = tokens.to(tl.int32) * 0
    tokens = tokens.to(tl.float64)
    if LOG > 0:
        high = low + (K - 1)
        for _ in tl.static_range(LOG):
            middle = (low + high) // 2
            open_ = high - low > 1
            right = tl.load(knot_K + middle) <= tokens
            low = tl.where(open_ & right, middle, low)
            high = tl.where(open_ & (right == 0), middle, high)
    beyond = tokens - tl.load(knot_K + low)
    beyond = tl.where(beyond > 0.0, beyond, 0.0)
    row = tl.minimum(used, A - 1).to(tl.int32) * K + low
    time = tl.load(table_AK + row) + tl.load(slope_AK + row) * beyond
    return time if UNIT else time / rate


@triton.jit
def _later(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _part_of(
    amount, t_g, n_g, a_g, s_g, t_h, n_h, a_h, s_h, asked, knot_K, table_AK, slope_AK, K, A,
    TRIES: tl.constexpr, LOG: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`_timed_kernels.part_of`, elementwise; now g takes t_g, and h, with the expert, t_h."""
    infinite = tl.full(amount.shape, float("inf"), tl.float64)
    close = tl.full(amount.shape, 1e-4, tl.float64)
    low = amount * 0
    high = amount
    gap_low = t_g - t_h
    gap_high = _seconds(n_g - amount, a_g, s_g, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
    gap_high -= _seconds(n_h + amount, a_h, s_h, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
    best = low
    value = infinite
    going = asked & (gap_low > 0.0) & (gap_high < 0.0) & (high - low >= 2)
    turn = 0
    while turn < TRIES:
        slope = tl.where(going, gap_low - gap_high, 1.0)
        middle = low + ((high - low).to(tl.float64) * (gap_low / slope)).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        then_g = _seconds(n_g - middle, a_g, s_g, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        then_h = _seconds(n_h + middle, a_h, s_h, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        worst = _later(then_g, then_h)
        better = going & (worst < value)
        best = tl.where(better, middle, best)
        value = tl.where(better, worst, value)
        gap = then_g - then_h
        going = going & (tl.abs(gap) > close * worst)
        up = going & (gap > 0.0)
        down = going & (gap <= 0.0)
        low = tl.where(up, middle, low)
        high = tl.where(down, middle, high)
        new_low = tl.where(up, gap, tl.where(down, gap_low * 0.5, gap_low))
        gap_high = tl.where(down, gap, tl.where(up, gap_high * 0.5, gap_high))
        gap_low = new_low
        going = going & (high - low >= 2)
        turn += 1
        if tl.max(tl.max(going.to(tl.int32), 1), 0) == 0:
            turn = turn + TRIES
    return best, value


@triton.jit
def _pick(tile, s, x, row, column):
    """One element of a tile."""
    return tl.sum(tl.sum(tl.where((s[:, None] == row) & (x[None, :] == column), tile, 0), 1), 0)


@triton.jit
def _hand(y, n, a, n_h, a_h, hold, s, x, g, row, source, target, amount):
    """`_timed_kernels._hand`: tokens of an expert from one replica to another; all as it is then.

    `n_h` and `a_h` are `n` and `a` of each replica's rank.
    """
    left = _pick(y, s, x, row, source) - amount
    had = _pick(y, s, x, row, target)
    giver = _pick(hold, s, x, row, source)
    taker = _pick(hold, s, x, row, target)
    less = (left == 0).to(tl.int64)
    more = (had == 0).to(tl.int64)
    n = n + tl.where(g == taker, amount, 0) - tl.where(g == giver, amount, 0)
    a = a + tl.where(g == taker, more, 0) - tl.where(g == giver, less, 0)
    n_h = n_h + tl.where(hold == taker, amount, 0) - tl.where(hold == giver, amount, 0)
    a_h = a_h + tl.where(hold == taker, more, 0) - tl.where(hold == giver, less, 0)
    here = s[:, None] == row
    y = (
        y
        + tl.where(here & (x[None, :] == target), amount, 0)
        - tl.where(here & (x[None, :] == source), amount, 0)
    )
    return y, n, a, n_h, a_h


@triton.jit
def _push(
    draw, slow, y, n, a, n_h, a_h, hold, copies, valid, SB: tl.constexpr, X: tl.constexpr, GB: tl.constexpr
):
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
        y, n, a, n_h, a_h = _hand(y, n, a, n_h, a_h, hold, s, x, g, row, source, target, amount)
    return draw, y, n, a, n_h, a_h


@triton.jit(do_not_specialize=["first", "G", "S", "K", "A"])
def search(
    load_S, copies_S, rank_SX, base_G, alone_G, busy_G, quota_SX, rate_G, knot_K, table_AK, slope_AK,
    y_NSX, n_NG, a_NG, t_N, first, G, S, K, A,
    GB: tl.constexpr, SB: tl.constexpr, X: tl.constexpr, NB: tl.constexpr, TRIES: tl.constexpr,
    STEPS: tl.constexpr, LOG: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Quotas of `TimedShares`: one descent of `_timed_kernels.timed_quotas` for each program.

    The first two start from whole experts and from what `pour` leaves (`first` is 0), the others from the
    best of the `first` that ended before, shaken. Each leaves its quotas, and what the ranks then do.
    """
    nth = first + tl.program_id(0)
    s = tl.arange(0, SB)
    x = tl.arange(0, X)
    g = tl.arange(0, GB)
    load = tl.load(load_S + s, mask=s < S, other=0)
    here = load > 0
    used = tl.sum(here.to(tl.int32), 0)
    copies = tl.load(copies_S + s, mask=here, other=2).to(tl.int64)
    valid = here[:, None] & (x[None, :] < copies[:, None])
    cell = s[:, None] * X + x[None, :]
    hold = tl.load(rank_SX + cell, mask=valid, other=-1)
    rank = tl.where(valid, hold, 0)
    rate = tl.load(rate_G + g, mask=g < G, other=1.0)
    rate_h = tl.load(rate_G + rank)
    n = tl.load(base_G + g, mask=g < G, other=0)
    a = tl.load(alone_G + g, mask=g < G, other=0)
    n_h = tl.zeros([SB, X], tl.int64)
    a_h = n_h
    y = tl.zeros([SB, X], tl.int64)
    if first == 0:
        # In memory, row by row: what ranks serve is needed of the few that hold an expert.
        n_G = n_NG + nth * G
        a_G = a_NG + nth * G
        y_SX = y_NSX + nth * S * X
        if nth == 1:
            n = tl.load(busy_G + g, mask=g < G, other=0)
        tl.store(n_G + g, n, mask=g < G)
        tl.store(a_G + g, a, mask=g < G)
        tl.debug_barrier()
        count = tl.load(copies_S)
        rank_x = tl.load(rank_SX + x)
        tokens = tl.load(load_S)
        even = tl.load(quota_SX + x)
        for row in range(used):
            real = x < count
            n_x = tl.load(n_G + rank_x, mask=real, other=0)
            a_x = tl.load(a_G + rank_x, mask=real, other=0)
            part = even
            if nth == 0:
                # Whole on the replica that ends soonest with it.
                rate_x = tl.load(rate_G + rank_x, mask=real, other=1.0)
                ends = _seconds(n_x + tokens, a_x + 1, rate_x, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
                soonest = tl.argmin(tl.where(real, ends, float("inf")), 0, tie_break_left=True)
                part = tl.where(x == soonest, tokens, 0)
                n_x += part
            serves = real & (part > 0)
            at = rank_x
            below = tl.minimum(row + 1, used - 1)
            count = tl.load(copies_S + below)
            rank_x = tl.load(rank_SX + below * X + x)
            tokens = tl.load(load_S + below)
            even = tl.load(quota_SX + below * X + x)
            tl.debug_barrier()
            tl.store(y_SX + row * X + x, part, mask=real)
            tl.store(n_G + at, n_x, mask=serves)
            tl.store(a_G + at, a_x + 1, mask=serves)
            tl.debug_barrier()
        y = tl.load(y_SX + cell, mask=valid, other=0)
        n = tl.load(n_G + g, mask=g < G, other=0)
        a = tl.load(a_G + g, mask=g < G, other=0)
        n_h = tl.load(n_G + rank)
        a_h = tl.load(a_G + rank)
    else:
        k = tl.arange(0, NB)
        t_k = tl.load(t_N + k, mask=k < first, other=float("inf"))
        at = tl.argmin(t_k, 0, tie_break_left=True)
        y = tl.load(y_NSX + at * S * X + cell, mask=valid, other=0)
        n = tl.load(n_NG + at * G + g, mask=g < G, other=0)
        a = tl.load(a_NG + at * G + g, mask=g < G, other=0)
        n_h = tl.load(n_NG + at * G + rank)
        a_h = tl.load(a_NG + at * G + rank)
        t = _seconds(n, a, rate, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        slow = tl.argmax(tl.where(g < G, t, -1.0), 0, tie_break_left=True)
        draw = (nth.to(tl.int64) - 1) * 88172645 % 2147483647
        draw, y, n, a, n_h, a_h = _push(draw, slow, y, n, a, n_h, a_h, hold, copies, valid, SB, X, GB)
        draw = draw * 48271 % 2147483647
        slow = (draw % G).to(slow.dtype)
        draw, y, n, a, n_h, a_h = _push(draw, slow, y, n, a, n_h, a_h, hold, copies, valid, SB, X, GB)
    nearly = tl.full([], 1 - 1e-9, tl.float64)
    sooner = tl.full([], 1 - 1e-6, tl.float64)
    infinite = tl.full([SB, X], float("inf"), tl.float64)
    best = tl.full([], float("inf"), tl.float64)
    best_y, best_n, best_a = y, n, a
    step = 0
    while step < STEPS:
        t = _seconds(n, a, rate, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        t = tl.where(g < G, t, -1.0)
        worst = tl.max(t, 0)
        slow = tl.argmax(t, 0, tie_break_left=True)
        better = worst < best * nearly
        best = tl.where(better, worst, best)
        best_y = tl.where(better, y, best_y)
        best_n = tl.where(better, n, best_n)
        best_a = tl.where(better, a, best_a)
        limit = worst * sooner
        there = valid & (hold == slow) & (y > 0)
        held = tl.sum(tl.where(there, y, 0), 1)
        source = tl.sum(tl.where(there, x[None, :], 0), 1)
        amount = held[:, None] + y * 0
        t_h = _seconds(n_h, a_h, rate_h, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        can = valid & (amount > 0) & (hold != slow) & (t_h < limit)
        n_g = tl.sum(tl.where(g == slow, n, 0), 0)
        a_g = tl.sum(tl.where(g == slow, a, 0), 0)
        rate_g = tl.sum(tl.where(g == slow, rate, 0.0), 0)
        then_h = a_h + (y == 0).to(tl.int64)
        without = _seconds(
            n_g - held, a_g - 1 + held * 0, rate_g, knot_K, table_AK, slope_AK, K, A, LOG, UNIT
        )
        whole = _seconds(n_h + amount, then_h, rate_h, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        whole = _later(without[:, None] + whole * 0.0, whole)
        used_h = _seconds(n_h, then_h, rate_h, knot_K, table_AK, slope_AK, K, A, LOG, UNIT)
        part, ends = _part_of(
            amount, worst, n_g + y * 0, a_g + y * 0, rate_g, used_h, n_h, then_h, rate_h, can, knot_K,
            table_AK, slope_AK, K, A, TRIES, LOG, UNIT,
        )  # fmt: skip
        value = tl.where(can, tl.where(ends < whole, ends, whole), infinite)
        least = tl.min(tl.min(value, 1), 0)
        chosen = tl.min(tl.min(tl.where(value == least, cell, SB * X), 1), 0)
        row = chosen // X
        target = chosen % X
        step += 1
        if least < limit:
            give = _pick(tl.where(ends < whole, part, amount), s, x, row, target)
            at = tl.sum(tl.where(s == row, source, 0), 0)
            y, n, a, n_h, a_h = _hand(y, n, a, n_h, a_h, hold, s, x, g, row, at, target, give)
        else:
            step = step + STEPS
    tl.store(y_NSX + nth * S * X + cell, best_y, mask=valid)
    tl.store(n_NG + nth * G + g, best_n, mask=g < G)
    tl.store(a_NG + nth * G + g, best_a, mask=g < G)
    tl.store(t_N + nth, best)


@triton.jit
def _matched(flow, supply, demand):
    """What flows from supplies to demands in their order (north-west corner); what is left of both."""
    high_r = tl.cumsum(supply, 0)
    high_x = tl.cumsum(demand, 0)
    low = tl.maximum((high_r - supply)[:, None], (high_x - demand)[None, :])
    more = tl.maximum(tl.minimum(high_r[:, None], high_x[None, :]) - low, 0)
    return flow + more, tl.sum(more, 1), tl.sum(more, 0)


@triton.jit(do_not_specialize=["stride", "R", "P", "S", "nodes", "tries"])
def split(
    counts, stride, slot_EX, rank_EX, copies_E, nth_E, weight_EX, total_E, place_S, quota_NSX, t_N, node_R,
    sends_RP, R, P, S, nodes, tries,
    RB: tl.constexpr, X: tl.constexpr, NB: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Quotas and routes; a program for each expert.

    Quotas are those of `EqualShares` (POLICY 0), of `PlannedShares` (1), or as they are given, of the first
    of the quickest of several tries.
    """
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
            k = tl.arange(0, NB)
            t_k = tl.load(t_N + k, mask=k < tries, other=float("inf"))
            at = tl.argmin(t_k, 0, tie_break_left=True) * S + tl.load(place_S + tl.load(nth_E + e))
            quota = tl.where(load > 0, tl.load(quota_NSX + at * X + x, mask=valid, other=0), 0)
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
