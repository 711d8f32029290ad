"""Sizes of an expert's batches for which a row's result does not depend on the batch.

A matrix library may add up the same row in another order in batches of other sizes: small products take
another kernel, large ones are cut along the inner axis. Where it does so depends on the CPU, the type and
the shapes, so nothing is assumed: products of the experts' shapes are tried out, once, when a model is
attached. What is found is a block, to whose multiples batches are padded, and the most rows that one product
may have; longer batches are computed in pieces. In the worst case all pieces have one size, so one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["RowBlock", "default_row_block", "pieces"]

Owner = TypeVar("Owner")

#: Rows of one product at most, and multiples of which rows are tried, in the order of preference.
MOST = (256, 128, 64, 32)
BLOCKS = (1, 2, 4, 8, 16, 32)
#: Sizes that are tried of one block, at least and at most, and between them so many weights in all.
TRIALS, TRIED = (8, 32), 2**26


class RowBlock(NamedTuple):
    """Rows of one product.

    Parameters
    ----------
    rows : int
        Batches are padded to a multiple of it.
    most : int, optional
        Of one product; a multiple of `rows`. None: any number.
    """

    rows: int = 1
    most: int | None = None


def pieces(owners: Iterable[Owner], sizes: Sequence[int], most: int | None) -> tuple[list[Owner], list[int]]:
    """Batches of more than `most` rows as several; empty ones are left out.

    Returns
    -------
    owners, sizes of the pieces, in order
    """
    whose: list[Owner] = []
    rows: list[int] = []
    for owner, size in zip(owners, sizes, strict=True):
        step = most or max(size, 1)
        for begin in range(0, size, step):
            whose.append(owner)
            rows.append(min(step, size - begin))
    return whose, rows


def default_row_block(
    device: torch.device, products: Iterable[tuple[int, int, torch.dtype]], *, transposed: bool = False
) -> RowBlock:
    """Sizes of products in which every row gets the same bits, tried out on this CPU.

    Parameters
    ----------
    device
        Of the experts. On GPUs, whose kernels are chosen by the batch, nothing is tried.
    products : iterable of (int, int, dtype)
        Inner and outer width of the experts' products, and the type.
    transposed : bool
        Whether their weights are stored [inner, outer].

    Returns
    -------
    RowBlock
        Of one row and no limit on GPUs, and where nothing helps.
    """
    if device.type != "cpu":
        return RowBlock()
    threads = torch.get_num_threads()
    blocks = [_least_exact_block(*kind, transposed, threads) for kind in products]
    # Blocks are powers of two: what holds for a divisor holds for a multiple.
    most = [b.most for b in blocks if b.most is not None]
    return RowBlock(max((b.rows for b in blocks), default=1), min(most) if most else None)


@functools.cache
def _least_exact_block(
    inner: int, outer: int, dtype: torch.dtype, transposed: bool, threads: int
) -> RowBlock:
    run, x = _telling(inner, outer, dtype, transposed)
    for block in BLOCKS:
        for most in MOST:
            if _holds(run, x[:most], block):
                return RowBlock(block, most)
    return RowBlock()


def _telling(
    inner: int, outer: int, dtype: torch.dtype, transposed: bool
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A product in which the order of the sums shows: all terms cancel, the rounding errors alone are left.

    In bf16, whose results are rounded after sums in fp32, plain numbers would hide it.
    """
    chance = torch.Generator().manual_seed(0)
    half = -(-inner // 2)
    order = torch.randperm(2 * half, generator=chance)[:inner]
    weight = torch.randn(outer, half, generator=chance).repeat(1, 2)[:, order].to(dtype)
    x = torch.randn(MOST[0], half, generator=chance)
    x = torch.cat((x, -x), dim=1)[:, order].to(dtype)
    stored = weight.t().contiguous().t() if transposed else weight
    return lambda rows: torch.nn.functional.linear(rows, stored), x


def _holds(run: Callable[[Tensor], Tensor], x: Tensor, block: int) -> bool:
    """Whether multiples of `block` rows, wherever they stand, give what all of them give together."""
    whole, most = run(x), len(x)
    counts = range(1, most // block)
    half = min(TRIALS[1], max(TRIALS[0], TRIED // (x.size(1) * whole.size(1)))) // 2
    # All small multiples, and some of the others.
    some = [*counts[:half], *counts[half :: max(1, len(counts) // half)]]
    return torch.equal(run(x.flip(0)), whole.flip(0)) and all(
        torch.equal(run(x[at : at + n]), whole[at : at + n])
        for n in (count * block for count in some)
        for at in sorted({0, min(8, most - n), most - n})
    )
