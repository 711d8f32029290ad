"""Rows on the device: sorted by expert, gathered, added up; each in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from moeless_opt.runtime.live.dispatch.device.launching import launch, power

__all__ = ["chosen_of", "combine_rows", "gather_rows", "place_ends", "sort_rows", "warm_rows"]

#: Rows that a program of `sort_rows` looks at at a time, for small and for large batches.
FEW, MANY = 1024, 4096
#: Rows from which torch's sort is sooner: each program of ours looks at all of them.
MOST = 2**16
#: Channels that a program moves at a time.
WIDE = 2048


def chosen_of(chosen_TE: Tensor, weight_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Experts of each token, ascending, and their weights, from a router's maps.

    Parameters
    ----------
    chosen_TE : bool tensor, shape [T, E]
    weight_TE : tensor, shape [T, E]
    topk : int
        Most experts of a token.

    Returns
    -------
    int64 tensor, shape [T, topk]
        E where a token has fewer.
    tensor, shape [T, topk]
    """
    n_tokens, experts = chosen_TE.shape
    expert_Tk = torch.empty((n_tokens, topk), dtype=torch.int64, device=chosen_TE.device)
    weight_Tk = weight_TE.new_empty((n_tokens, topk))
    if n_tokens:
        chosen = chosen_TE.contiguous().view(torch.uint8)
        width = max(power(experts), power(topk))
        launch(
            "choose",
            (n_tokens,),
            chosen,
            weight_TE.contiguous(),
            expert_Tk,
            weight_Tk,
            experts,
            k=topk,
            EB=width,
        )
    return expert_Tk, weight_Tk


def sort_rows(expert_N: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by expert, of one expert as they come.

    Parameters
    ----------
    expert_N : int tensor, shape [N]
        E or more: of none; they stand behind all.
    experts : int
        E.

    Returns
    -------
    int64 tensors of shape [E], [N] and [N]
        Rows of each expert; the rows in that order; where each row has gone, -1 if it is of none.
    """
    expert_N = expert_N.long().contiguous()  # a kernel reads what lies there
    if expert_N.numel() > MOST:
        return _sorted(expert_N, experts)
    counts_E = expert_N.new_empty(experts)
    order, back = torch.empty_like(expert_N), torch.empty_like(expert_N)
    few = expert_N.numel() <= MANY
    launch(
        "sort",
        (experts + 1,),
        expert_N,
        counts_E,
        order,
        back,
        expert_N.numel(),
        experts,
        BLOCK=FEW if few else MANY,
        warps=4 if few else 8,
    )
    return counts_E, order, back


def _sorted(expert_N: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_rows` by torch's own."""
    expert_N = expert_N.clamp(max=experts)
    one = expert_N.new_ones(1).expand_as(expert_N)
    counts = expert_N.new_zeros(experts + 1).scatter_add_(0, expert_N, one)
    order = torch.argsort(expert_N, stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return counts[:experts], order, back.masked_fill_(expert_N == experts, -1)


def _wide(width: int, topk: int) -> dict[str, int]:
    """How kernels that move whole rows are compiled."""
    return {"H": width, "k": topk, "BLOCK": min(power(width), WIDE), "warps": 4}


def gather_rows(rows: Tensor, weight: Tensor, order: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Rows and weights in an order: ``rows[order // topk]``, ``weight[order]``.

    Parameters
    ----------
    rows : tensor, shape [T, H]
    weight : tensor, shape [T * topk]
    order : int64 tensor, shape [N]
    """
    rows, width = rows.contiguous(), rows.size(1)
    out, weight_out = rows.new_empty((order.numel(), width)), weight.new_empty(order.numel())
    if order.numel():
        launch(
            "gather",
            (order.numel(),),
            rows,
            weight.contiguous(),
            order,
            out,
            weight_out,
            **_wide(width, topk),
        )
    return out, weight_out


def combine_rows(rows: Tensor, back_N: Tensor, topk: int) -> Tensor:
    """Sums of `topk` rows each, added one after the other; -1 is no row.

    Parameters
    ----------
    rows : tensor, shape [M, H]
    back_N : int64 tensor, shape [T * topk]
    """
    rows, width = rows.contiguous(), rows.size(1)
    out = rows.new_empty((back_N.numel() // topk, width))
    if out.size(0):
        launch(
            "combine",
            (out.size(0),),
            rows,
            back_N,
            out,
            **_wide(width, topk),
        )
    return out


def place_ends(size_S: Tensor, place_S: Tensor, places: int) -> Tensor:
    """Where the rows of each place of a pool end: int32 [places].

    Parameters
    ----------
    size_S : int64 tensor, shape [S]
    place_S : int32 tensor, shape [S]
        Ascending.
    places : int
    """
    end_P = torch.empty(places, dtype=torch.int32, device=size_S.device)
    launch("ends", (places,), size_S, place_S, end_P, size_S.numel(), SB=power(size_S.numel(), 32))
    return end_P


def warm_rows(experts: int, topk: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what a forward of a model may want, or read it from Triton's cache."""
    for tokens in (1, MANY + 1):
        expert_N = torch.arange(tokens * topk, device=device) % experts
        rows = torch.zeros((tokens, width), dtype=dtype, device=device)
        for kind in {dtype, torch.float32}:
            weight = torch.zeros(tokens * topk, dtype=kind, device=device)
            _, order, back = sort_rows(expert_N, experts)
            sent, _ = gather_rows(rows, weight, order, topk)
            gather_rows(sent, weight, order, 1)
        combine_rows(sent, back, topk)
