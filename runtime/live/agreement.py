"""What the ranks tell each other with the token counts of every batch, and what follows from it.

One row of whole numbers per rank travels with the counts: where the rank stands (forward pass and layer),
then the headers of the machines that move experts, and the share policies that it was given. Every rank sees
all rows, at the same batch, and so all take the same decisions without a word more.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.runtime.live.dispatch import RankShares, SharePolicy, share_policy
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.lanes import LaneHeader, Lanes
from moeless_opt.runtime.live.migrate import Header, Migrator

__all__ = ["Agreement", "OutOfStepError", "digest", "same_everywhere"]


class OutOfStepError(MoelessError):
    """The ranks are not at the same point of the same forward pass; raised on all of them."""


class _Step(NamedTuple):
    """Where a rank stands, its share policies, the knocks that it heard; or a column [R] of each.

    Parameters
    ----------
    passes, layer : int
        Forward passes begun, and the layer of the newest.
    policies, policy : int
        How many share policies it was given, and the checksum of the next.
    knocks : int
        How many ranks it has ever heard ask to be let in.
    """

    passes: Any
    layer: Any
    policies: Any
    policy: Any
    knocks: Any


class _Asked(NamedTuple):
    """A policy as it was asked for, its checksum, and the (global) ranks of the group at that time."""

    policy: SharePolicy
    digest: int
    ranks: tuple[int, ...]


#: Where the numbers of the migrator and of the lanes begin.
CUTS = [len(_Step._fields), len(_Step._fields) + len(Header._fields)]


def digest(value: Any) -> int:
    """A number of what a value says, the same in every process: without addresses and private parts."""
    fields = getattr(value, "__dict__", None)
    if fields is not None:
        shown = {k: digest(v) for k, v in fields.items() if not k.startswith("_")}
        value = f"{type(value).__qualname__} {getattr(value, 'name', '')} {shown}"
    return zlib.crc32(re.sub(r"0x[0-9a-f]+", "", repr(value)).encode())


def same_everywhere(group: ExpertGroup, told: Mapping[str, Any]) -> None:
    """Refuse what the ranks were told differently; a collective.

    Raises
    ------
    ProblemError
        On all of them, with the names of what differs and the ranks that differ from the first.
    """
    rows = np.asarray(group.gather_ints([digest(value) for value in told.values()]), dtype=np.int64)
    for name, column_R in zip(told, rows.T, strict=True):
        others = [group.ranks[r] for r in np.flatnonzero(column_R != column_R[0])]
        if others:
            raise ProblemError(
                name,
                f"is another one on ranks {others} than on rank {group.ranks[0]} (here: {told[name]!r}); "
                "give it all ranks alike",
            )


#: Stands for a layer between forward passes.
BETWEEN = -1
#: Policies that a rank which comes back takes over from the others.
NAMED = ("balanced", "equal")


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
        self._policies: list[_Asked] = []
        self.ask(shares)
        #: Called with the policy that has come into force.
        self.on_policy: Callable[[SharePolicy], None] = lambda _: None
        self.migrator: Migrator
        self.lanes: Lanes
        #: Ranks that have ever asked to be let in, as far as all have heard of them.
        self.knocks = 0
        self._asked = 0
        self._passes = 0

    def drive(self, migrator: Migrator, lanes: Lanes) -> None:
        """Let these act on what the ranks say; once, before the first batch."""
        self.migrator, self.lanes = migrator, lanes

    def ask(self, shares: str | SharePolicy) -> None:
        """Use another policy from the first batch on that all ranks know of it.

        Raises
        ------
        ProblemError
            If it is of another number of ranks or layers.
        """
        policy = share_policy(shares)
        if isinstance(policy, RankShares):
            policy.check(len(self.layers), self.group.size)
        self._policies.append(_Asked(policy, 1 + digest(policy), self.group.ranks))

    def header(self, layer: int | None) -> tuple[int, ...]:
        """What this rank tells the others now, in front of a batch of a layer (None: between passes).

        Nothing, where there are no others and nothing is under way.
        """
        self._passes += layer == 0
        if layer is not None and self._quiet():
            return ()
        where = BETWEEN if layer is None else layer
        asked, following = len(self._policies) - 1, self._asked + 1
        policy = self._policies[following].digest if following <= asked else 0
        heart = self.group.heart
        step = _Step(self._passes, where, asked, policy, 0 if heart is None else heart.knocks)
        return (*step, *self.migrator.header(), *self.lanes.header())

    def agree(self, layer: int | None, headers_RK: IntArray) -> None:
        """Act on everybody's numbers.

        Raises
        ------
        OutOfStepError
            If the ranks stand at different points; nothing was decided then.
        MoelessError
            If they were asked for different share policies; the old one stays.
        """
        if not headers_RK.size:
            self.batches += layer == 0
            self.lanes.quiet(layer)
            return
        steps_RK, plans_RK, lanes_RK = np.split(headers_RK, CUTS, axis=1)
        told_R = _Step(*steps_RK.T)
        if (told_R.layer != told_R.layer[0]).any() or (told_R.passes != told_R.passes[0]).any():
            self._part(told_R)
        self.knocks = int(told_R.knocks.min())
        if layer == 0:
            self.batches += 1
        self.migrator.agree(layer, plans_RK)
        self.lanes.agree(layer, lanes_RK)
        if int(told_R.policies.min()) > self._asked:
            self._asked += 1
            if (told_R.policy != told_R.policy[0]).any():
                others = self._ranks(told_R.policy != told_R.policy[0])
                name = self._policies[self._asked].policy.name
                self._policies[self._asked] = self._policies[self._asked - 1]
                raise MoelessError(
                    f"ranks {others} were asked for other shares than rank {self.group.ranks[0]} (here: "
                    f"{name!r}); the shares stay as they were"
                )
            self._use(self._asked)

    def _quiet(self) -> bool:
        """Whether this rank is alone and would decide nothing now."""
        if not self.group.alone or len(self._policies) - 1 > self._asked or self.group.heart is not None:
            return False
        return self.migrator.quiet and self.lanes.rests

    def _ranks(self, which_R: BoolArray) -> list[int]:
        return [self.group.ranks[r] for r in np.flatnonzero(which_R)]

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

    def round(self, *, last: bool = False) -> bool:
        """Agree outside a forward; whether anything was under way on any rank before.

        Parameters
        ----------
        last : bool
            Nothing more will be handed in on any rank: what not all have will never start.

        Raises
        ------
        MoelessError
            On all ranks, if it is the last and they have different plans; these are dropped.
        """
        busy = not (self.migrator.idle and self.lanes.idle)
        rows = np.asarray(self.group.gather_ints([*self.header(None), int(busy)]), dtype=np.int64)
        self.agree(None, rows[:, :-1])
        if last:
            self._refuse_uneven(rows[:, :-1])
        return bool(rows[:, -1].any())

    def _refuse_uneven(self, headers_RK: IntArray) -> None:
        steps_RK, plans_RK, lanes_RK = np.split(headers_RK, CUTS, axis=1)
        step_R, plan_R, lane_R = _Step(*steps_RK.T), Header(*plans_RK.T), LaneHeader(*lanes_RK.T)
        for what, number_R in (
            ("plan", plan_R.number),
            ("plan of a layer", lane_R.opened),
            ("share policy", step_R.policies),
        ):
            if (number_R == number_R[0]).all():
                continue
            have, lack = number_R == number_R.max(), number_R < number_R.max()
            reason = (
                f"ranks {self._ranks(have)} were handed a {what} that ranks {self._ranks(lack)} were not; "
                "all ranks have to be given the same ones: it was dropped"
            )
            self.migrator.forget(int(plan_R.number.max()), reason)
            del self._policies[int(step_R.policies.min()) + 1 :]
            raise MoelessError(reason)

    def _use(self, number: int) -> None:
        self._asked = number
        self.on_policy(self.policy)

    def regroup(self, group: ExpertGroup) -> None:
        """Go on with other ranks."""
        self.group = group
        self.batches = self._passes = 0
        # Some may have switched in the batch that failed, and others not; all have what one uses.
        number = max(row[0] for row in group.gather_ints([self._asked]))
        while (
            len(self._policies) <= number
        ):  # a rank that is new; `policy_digest` tells whether it is the same
            self._policies.append(self._policies[-1])
        self._use(number)

    @property
    def policy_digest(self) -> int:
        """A number of the policy in force, the same in every process."""
        return self._policies[self._asked].digest

    @property
    def named(self) -> int:
        """Which of `NAMED` is in force; below 0: none, but a policy of its own."""
        digests = [1 + digest(share_policy(name)) for name in NAMED]
        return digests.index(self.policy_digest) if self.policy_digest in digests else -1

    def take_named(self, which: int) -> None:
        """Use one of `NAMED` as the others do: this rank is new among them."""
        policy = share_policy(NAMED[which])
        self._policies[self._asked] = _Asked(policy, 1 + digest(policy), self.group.ranks)
        self._use(self._asked)

    @property
    def policy(self) -> SharePolicy:
        """The policy in force, for the ranks that there are now."""
        policy, _, ranks = self._policies[self._asked]
        if ranks == self.group.ranks or not isinstance(policy, RankShares):
            return policy
        return policy.among([ranks.index(r) if r in ranks else None for r in self.group.ranks])

    @property
    def newest(self) -> SharePolicy:
        """The policy that was asked for last."""
        return self._policies[-1].policy
