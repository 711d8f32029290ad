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

__all__ = ["arrange", "fill", "interpreted", "order", "pack", "pour", "split"]


def interpreted() -> bool:
    """Whether kernels run on the CPU, which is decided where Triton and this are imported."""
    return not any(isinstance(part, triton.JITFunction) for part in (tl.sum, split))


ONE: tl.constexpr = tl.constexpr(2**20)


@triton.jit(do_not_specialize=["stride", "R", "S"])
def order(counts, stride, many, load_S, place_S, R, S, SB: tl.constexpr):
    """Loads of the experts with several replicas, and their places, heaviest first (of equals the first).

    A program for each of them, which adds up all of their counts: cheaper than a second launch.
    """
    mine = tl.program_id(0)
    s = tl.arange(0, SB)
    expert = tl.load(many + s, mask=s < S, other=0)
    total = tl.zeros([SB], tl.int64)
    for r in range(R):
        total += tl.load(counts + r * stride + expert, mask=s < S, other=0)
    own = tl.sum(tl.where(s == mine, total, 0), 0)
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


@triton.jit(do_not_specialize=["stride", "sweeps", "R", "G", "C", "S"])
def pour(
    counts,
    stride,
    many,
    load_S,
    place_S,
    single_GC,
    rank_EX,
    copies_E,
    speed_G,
    busy_G,
    quota_SX,
    sweeps,
    R,
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
    tokens = tl.zeros([GB, CB], tl.int64)
    for r in range(R):
        tokens += tl.load(counts + r * stride + single, mask=single >= 0, other=0)
    tl.store(busy_G + g, tl.sum(tokens, 1), mask=g < G)
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
def fill(sends_RP, place_P, order, out, P, me, PB: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that are sorted by expert, sorted by slot; a program for each slot.

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
        tl.store(out + target + at + i, tl.load(order + source + at + i, mask=inside), mask=inside)


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
