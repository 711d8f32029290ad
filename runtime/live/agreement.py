"""What the ranks tell each other with the token counts of every batch, and what follows from it.

One row of whole numbers per rank travels with the counts: where the rank stands (forward pass and layer),
then the headers of the machines that move experts, and the share policies that it was given. Every rank sees
all rows, at the same batch, and so all take the same decisions without a word more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.live.dispatch import SharePolicy, share_policy
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.lanes import LaneHeader, Lanes
from moeless_opt.runtime.live.migrate import Header, Migrator

__all__ = ["Agreement", "OutOfStepError"]


class OutOfStepError(MoelessError):
    """The ranks are not at the same point of the same forward pass; raised on all of them."""


class _Step(NamedTuple):
    """Where a rank stands, and how many share policies it was given; or a column [R] of each."""

    passes: Any
    layer: Any
    policies: Any


#: Stands for a layer between forward passes.
BETWEEN = -1


class Agreement:
    """The numbers of one rank, and the machines that act on everybody's.

    Parameters
    ----------
    group : ExpertGroup
        The ranks.
    layers : sequence of int
        The model's own numbers of its MoE layers, for messages.
    shares : str or SharePolicy
        The first policy.
    """

    def __init__(self, group: ExpertGroup, layers: Sequence[int], shares: str | SharePolicy) -> None:
        self.group = group
        self.layers = layers
        self.batches = 0
        # Policies as they were asked for; the ranks agree on how many of them all know.
        self.policies = [share_policy(shares)]
        #: Called with the policy that has come into force.
        self.on_policy: Callable[[SharePolicy], None] = lambda _: None
        self.migrator: Migrator
        self.lanes: Lanes
        self._in_force = 0
        self._passes = 0

    def drive(self, migrator: Migrator, lanes: Lanes) -> None:
        """Let these act on what the ranks say; once, before the first batch."""
        self.migrator, self.lanes = migrator, lanes

    def header(self, layer: int | None) -> tuple[int, ...]:
        """What this rank tells the others now, in front of a batch of a layer (None: between passes)."""
        self._passes += layer == 0
        where = BETWEEN if layer is None else layer
        step = _Step(self._passes, where, len(self.policies) - 1)
        return (*step, *self.migrator.header(), *self.lanes.header())

    def agree(self, layer: int | None, headers_RK: IntArray) -> None:
        """Act on everybody's numbers.

        Raises
        ------
        OutOfStepError
            If the ranks stand at different points; nothing was decided then.
        """
        steps, plans = len(_Step._fields), len(Header._fields)
        told_R = _Step(*headers_RK[:, :steps].T)
        if (told_R.layer != told_R.layer[0]).any() or (told_R.passes != told_R.passes[0]).any():
            self._part(told_R)
        if layer == 0:
            self.batches += 1
        self.migrator.agree(layer, headers_RK[:, steps : steps + plans])
        self.lanes.agree(layer, headers_RK[:, steps + plans : steps + plans + len(LaneHeader._fields)])
        known = int(told_R.policies.min())
        if known > self._in_force:
            self._use(known)

    def _part(self, told_R: _Step) -> None:
        # From here on all count alike again: who starts a pass anew on all ranks can go on.
        self._passes = int(told_R.passes.max())
        where = [
            f"rank {rank} {'after' if at == BETWEEN else f'in layer {self.layers[at]} of'} pass {step}"
            for rank, at, step in zip(
                self.group.ranks, told_R.layer.tolist(), told_R.passes.tolist(), strict=True
            )
        ]
        raise OutOfStepError(
            f"the ranks are out of step ({'; '.join(where)}): a forward pass has ended early on some of "
            "them; all of them have to begin the same pass again"
        )

    def round(self) -> bool:
        """Agree outside a forward; whether anything was under way on any rank before."""
        busy = not (self.migrator.idle and self.lanes.idle)
        rows = np.asarray(self.group.gather_ints([*self.header(None), int(busy)]), dtype=np.int64)
        self.agree(None, rows[:, :-1])
        return bool(rows[:, -1].any())

    def _use(self, number: int) -> None:
        self._in_force = number
        self.on_policy(self.policies[number])

    def regroup(self, group: ExpertGroup) -> None:
        """Go on with other ranks."""
        self.group = group
        self.batches = self._passes = 0
        # Some may have switched in the batch that failed, and others not: take what all have.
        self._use(min(row[0] for row in group.gather_ints([len(self.policies) - 1])))
