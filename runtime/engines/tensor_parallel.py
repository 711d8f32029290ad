"""Tokens that tensor-parallel ranks hold alike: each sends its own part of them to the experts.

Attention is divided over these ranks, experts are not (`expert_tensor_parallel_size` 1). Behind attention all
of them hold the same hidden states, and megatron-core's dispatchers send every token to its experts once from
each, so that experts compute everything as often. Here a rank sends its run of the tokens, and the sums are
gathered. With `sequence_parallel` the hidden states are divided already, in the same runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["TokenPart"]


class TokenPart:
    """The rank's part of the tokens.

    Parameters
    ----------
    group : process group, optional
        Ranks over which attention is divided; None: this one alone.
    divided : bool
        Whether layers get just their rank's tokens anyway (`sequence_parallel`).
    """

    def __init__(self, group: Any = None, divided: bool = False) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.divided = divided and self.size > 1
        #: Whether rows have to be taken out of the batch, and sums gathered.
        self.cuts = self.size > 1 and not self.divided

    def run(self, tokens: int, rank: int | None = None) -> slice:
        """Which of so many tokens, of the whole batch, are a rank's."""
        which = self.rank if rank is None else rank
        return slice(tokens * which // self.size, tokens * (which + 1) // self.size)

    def own(self, marks: Tensor | None) -> Tensor | None:
        """Marks of this rank's tokens, from those of the whole batch."""
        return marks if marks is None or self.size == 1 else marks[self.run(marks.numel())]

    def counted(self, seen: int, marks: Tensor | None, device: torch.device) -> Tensor | None:
        """Marks of the tokens that this rank counts among the `seen` ones that its layers get; None: all."""
        if not self.cuts:
            return self.own(marks)
        mine = torch.zeros(seen, dtype=torch.bool, device=device)
        run = self.run(seen)
        mine[run] = True if marks is None else marks[run]
        return mine

    def gather(self, rows: Tensor, tokens: int) -> Tensor:
        """Everybody's rows, in the order of the whole batch's tokens."""
        most = -(-tokens // self.size)
        mine = rows.new_zeros((most, rows.size(1)))
        mine[: len(rows)] = rows
        # Flat output: gloo refuses the stacked form.
        flat = rows.new_empty(self.size * mine.numel())
        dist.all_gather_into_tensor(flat, mine.view(-1), group=self.group)
        whole = flat.view(self.size, most, rows.size(1))
        if most * self.size == tokens:
            return whole.view(tokens, -1)
        runs = [self.run(tokens, rank) for rank in range(self.size)]
        return torch.cat([part[: run.stop - run.start] for part, run in zip(whole, runs, strict=True)])
