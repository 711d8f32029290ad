"""What is done with rows as Triton kernels; importing this imports Triton.

Small batches wait for launches, not for memory: each of these is in the place of three to fifteen operations
of torch, and gives the same bits. Sizes of a model (H, k) are compiled in, those of a batch are not.

Axes: N rows before they are sent (T tokens times k), H channels, E experts, R ranks, P flat slots or places
of a pool, S local slots; names in B are the next power of two.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["choose", "combine", "ends", "gather", "sizes", "sort"]


@triton.jit(do_not_specialize=["E"])
def choose(chosen_TE, weight_TE, expert_Tk, weight_Tk, E, k: tl.constexpr, EB: tl.constexpr):
    """Experts of each token, ascending, and their weights; E where it has fewer than k. A program a token."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EB)
    on = tl.load(chosen_TE + t * E + e, mask=e < E, other=0) != 0
    nth = tl.cumsum(on.to(tl.int32), 0) - 1
    here = on & (nth < k)
    tl.store(expert_Tk + t * k + nth, e.to(tl.int64), mask=here)
    tl.store(weight_Tk + t * k + nth, tl.load(weight_TE + t * E + e, mask=here, other=0), mask=here)
    # What is missing stands behind; there are never more lanes than experts to fill it.
    behind = tl.sum(on.to(tl.int32), 0) + e
    tl.store(expert_Tk + t * k + behind, (e * 0 + E).to(tl.int64), mask=behind < k)
    none = tl.zeros([EB], tl.float32).to(weight_Tk.dtype.element_ty)
    tl.store(weight_Tk + t * k + behind, none, mask=behind < k)


@triton.jit(do_not_specialize=["N", "E"])
def sort(expert_N, counts_E, order, back, N, E, BLOCK: tl.constexpr):
    """Rows by expert, of one expert as they come (`order`), and where each has gone (`back`).

    A program for each expert and one for rows of none (E or more), which stand behind all, `back` -1.
    """
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    sooner = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for at in range(0, N, BLOCK):
        found = tl.minimum(tl.load(expert_N + at + i, mask=at + i < N, other=E), E)
        sooner += ((found < e) & (at + i < N)).to(tl.int32)
        own += ((found == e) & (at + i < N)).to(tl.int32)
    place = tl.sum(sooner, 0)
    if e < E:
        tl.store(counts_E + e, tl.sum(own, 0).to(tl.int64))
    for at in range(0, N, BLOCK):
        found = tl.minimum(tl.load(expert_N + at + i, mask=at + i < N, other=E), E)
        mine = (found == e) & (at + i < N)
        stands = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + stands, (at + i).to(tl.int64), mask=mine)
        stands = tl.where(mine & (e < E), stands, -1)
        tl.store(back + at + i, stands.to(tl.int64), mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def gather(rows, weight, order, out, weight_out, H: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and their weights in an order; each of the rows stands for k. A program a row."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.load(order + i)
    tl.store(weight_out + i, tl.load(weight + at))
    row = rows + at // k * H
    h = tl.arange(0, BLOCK)
    for begin in range(0, H, BLOCK):
        inside = begin + h < H
        tl.store(out + i * H + begin + h, tl.load(row + begin + h, mask=inside), mask=inside)


@triton.jit
def combine(rows, back, out, H: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of k rows each, one after the other and rounded each time; -1 is no row. A program a token."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    kind = rows.dtype.element_ty
    for begin in range(0, H, BLOCK):
        inside = begin + h < H
        at = tl.load(back + t * k)
        total = tl.load(rows + at * H + begin + h, mask=inside & (at >= 0), other=0)
        for j in tl.static_range(1, k):
            at = tl.load(back + t * k + j)
            more = tl.load(rows + at * H + begin + h, mask=inside & (at >= 0), other=0)
            if kind.primitive_bitwidth < 32:
                total = (total.to(tl.float32) + more.to(tl.float32)).to(kind)
            else:
                total += more
        tl.store(out + t * H + begin + h, total, mask=inside)


@triton.jit(do_not_specialize=["R", "P", "first", "S"])
def sizes(sends_RP, wanted_S, size_S, tokens, R, P, first, S, SB: tl.constexpr, COUNT: tl.constexpr):
    """Rows of each local slot, in an order of the slots; all of them are added to `tokens`, if they COUNT."""
    s = tl.arange(0, SB)
    slot = first + tl.load(wanted_S + s, mask=s < S, other=0)
    total = tl.zeros([SB], tl.int64)
    for rank in range(R):
        total += tl.load(sends_RP + rank * P + slot, mask=s < S, other=0)
    tl.store(size_S + s, total, mask=s < S)
    if COUNT:
        tl.store(tokens, tl.load(tokens) + tl.sum(total, 0))


@triton.jit(do_not_specialize=["S"])
def ends(size_S, place_S, end_P, S, SB: tl.constexpr):
    """Where the rows of each place of a pool end; a program a place."""
    p = tl.program_id(0)
    s = tl.arange(0, SB)
    size = tl.load(size_S + s, mask=s < S, other=0)
    place = tl.load(place_S + s, mask=s < S, other=0)
    tl.store(end_P + p, tl.sum(tl.where(place <= p, size, 0), 0).to(tl.int32))
