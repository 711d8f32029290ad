"""Going on after a rank has died: notice, agree on who is left, rebuild, restore, repeat.

A death shows as an error in the next operation with the dead rank (its connections close), or as a heart that
beats no longer. Who notices closes its own groups, which wakes whoever waits for *it*, and tells the others'
hearts. The survivors meet in the store, agree on the list of ranks (the first to write it wins, everybody
reads it), build new groups, tell each other what they hold, compute a placement for what is left, fetch the
experts that nobody has from home copies, and repeat the step that failed.

A rank that was lost comes back the same way: it knocks, the others hear of it, agree in the header of a batch
that all have, and meet with it behind the step. It holds nothing then, and gets its experts as others get
those of a rank that was lost.

The store must outlive the ranks: the launcher has to host it, as torchrun does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from moeless_opt.problems.arrays import FloatArray, SlotArray, number, whole
from moeless_opt.problems.errors import MoelessError, UnsupportedFeatureError
from moeless_opt.runtime.live.groups import ExpertGroup, RankLostError
from moeless_opt.runtime.live.meeting import Meeting
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.live.repair import repair_slots, spread_slots

__all__ = ["Guard", "Recovery"]

T = TypeVar("T")

#: Attempts to recover with the same ranks.
ATTEMPTS = 3
Replan = Callable[[list[list[list[int]]], FloatArray | None], SlotArray]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One recovery, or one return of ranks that were lost before.

    Parameters
    ----------
    lost : tuple of int
        Global ranks that are gone.
    joined : tuple of int
        Global ranks that came back.
    cause : str
        The error by which this rank noticed.
    restored_bytes : int
        Fetched to complete the placement.
    seconds : float
        From noticing to being ready for the next step.
    agree_seconds : float
        Of these, finding out who is left.
    migrating : bool
        Whether experts were on their way, or a plan was waiting.
    repeated : bool
        Whether this rank had to repeat a step that it had completed already, for those that had not.
    """

    lost: tuple[int, ...]
    joined: tuple[int, ...]
    cause: str
    restored_bytes: int
    seconds: float
    agree_seconds: float
    migrating: bool
    repeated: bool


class Guard:
    """Runs steps of a live model so that the loss of other ranks only delays them.

    Parameters
    ----------
    live : LiveModel
        Attached with a `timeout` that suits the traffic, and with home copies if lost experts must come back.
        One that was attached with ``join`` is let in here: this blocks until the others have seen it.
    grace : float
        How long a rank may give no sign of life while the others wait for it in a recovery. One that does is
        waited for as long as an operation may take, `timeout`. (Without signs of life: how long they wait for
        each other after the last of them has come.)
    slots : int, optional
        Slots per layer that each rank may use when experts have to be placed anew; by default as many as it
        takes to hold all experts. The first survivor's counts.
    replan : callable, optional
        ``replan(have_LG, load_LE)`` gives the placement after a loss or a return; only the first survivor
        calls it. By default `repair_slots` after a loss, and `spread_slots` where ranks came back.
    """

    def __init__(
        self, live: LiveModel, *, grace: float = 5.0, slots: int | None = None, replan: Replan | None = None
    ) -> None:
        if live.adopted.divided:
            raise UnsupportedFeatureError(
                f"Guard does not support {live.adopted.divided} yet: a lost rank takes a part of the model "
                "along that its expert-parallel group cannot make up for"
            )
        self.live = live
        self.grace = number("grace", grace)
        self.slots = None if slots is None else whole("slots", slots, low=1)
        self.replan = replan
        self.load_LE: FloatArray | None = None
        self.recoveries: list[Recovery] = []
        # Meetings are counted from here, whatever became of the groups in between.
        self._meeting = Meeting(live.group, grace)
        self._epoch = 0
        #: Who belongs to the group, with their lives; and who has been invited to the next meeting.
        self._crew = dict.fromkeys(live.group.ranks, 0)
        self._guests: dict[int, int] = {}
        self._answered = 0
        #: Steps done; a rank that is new counts from where the others stand.
        self._completed = 0
        self._new = False
        self._replay: Callable[[], Any] | None = None
        if live.group.outside:
            self.rejoin()

    def run(self, step: Callable[[], T], dummy: Callable[[], Any] | None = None) -> T:
        """Run one step (a forward pass) and, if ranks are lost under it, recover and run it again.

        Parameters
        ----------
        step : callable
            Must be repeatable: a failed attempt may have run half of it.
        dummy : callable, optional
            A forward pass whose result nobody wants. If this rank completed a step that others did not, it
            has to take part in it once more; by default by the step itself.

        Raises
        ------
        EvictedError
            If the others went on without this rank.
        InfeasibleError
            If those left cannot hold the experts.
        MoelessError
            If a home copy that is needed cannot be read or is damaged, or recovering fails again and again.
        """
        while True:
            try:
                if self.live.knocks > self._answered:
                    self._admit()
                if self._behind:
                    self._behind = False
                    if self._replay is not None:
                        self._replay()
                result = step()
            except RankLostError as error:
                self._recover(str(error))
                continue
            self._completed += 1
            self._replay = dummy or step
            return result

    _behind = False

    def rejoin(self) -> None:
        """Come back into the group after it went on without this rank; blocks until the others let it in.

        They do behind their next step. All experts are fetched from them again.

        Raises
        ------
        MoelessError
            If they do not within the timeout, or this rank's options differ from theirs.
        """
        live = self.live
        dead_after = live.options.dead_after
        if dead_after is None:
            raise MoelessError("ranks come back by signs of life only: attach with dead_after")
        live.group.close()
        invited = self._meeting.knock(dead_after)
        live.hollow()
        self._epoch, self._crew, self._new = invited.epoch - 1, invited.crew, True
        self._guests = {self._meeting.me: self._life}
        self._completed, self._behind, self._replay = 0, False, None
        try:
            self._recover("this rank comes back")
        except BaseException:
            self._meeting.close()
            raise

    @property
    def _life(self) -> int:
        heart = self._meeting.heart
        return 0 if heart is None else heart.life

    def _admit(self) -> None:
        """Let those in who have knocked; all ranks of the group do so behind the same step."""
        self._answered = self.live.knocks
        self._guests |= self._meeting.invite(self._epoch + 1, self._crew)
        if self._guests:
            self._recover(f"ranks {sorted(self._guests)} come back")

    def _recover(self, cause: str) -> None:
        began = time.monotonic()
        before = dict(self._crew)
        migrating = not self.live.migrator.idle
        alike, left = 0, before
        while True:
            try:
                self._attempt(cause, began, before, migrating)
                return
            except RankLostError as again:
                cause = str(again)
            except dist.DistError as error:  # of the store, in which everybody meets
                raise MoelessError(f"recovering failed, the store is gone: {error}; was: {cause}") from error
            alike = alike + 1 if self._crew == left else 0
            left = dict(self._crew)
            if alike >= ATTEMPTS:
                raise MoelessError(
                    f"recovering failed {alike + 1} times though ranks {sorted(left)} were there: {cause}"
                )

    def _attempt(self, cause: str, began: float, before: dict[int, int], migrating: bool) -> None:
        live = self.live
        old = live.group
        old.give_up()
        self._epoch += 1
        started = time.monotonic()
        self._crew = self._meeting.gather(self._epoch, self._crew | self._guests)
        self._guests = {}
        agreed = time.monotonic()
        heart = self._meeting.heart
        if heart is not None:
            heart.follow(self._crew, self._epoch)
        group = old.among(sorted(self._crew), f"epoch{self._epoch}", heart)
        completed = -1 if self._new else self._completed
        rows = group.gather_ints([completed, self.slots or 0, live.told_digest(), self._answered])
        new = [g for g, row in enumerate(rows) if row[0] < 0]
        if len(new) == group.size:
            raise MoelessError("all ranks of the group were lost before others could come back")
        first = next(g for g in range(group.size) if g not in new)
        self._refuse_strangers(group, [g for g in new if rows[g][2] != rows[first][2]])
        live.regroup(group)
        have_LG, policies, named = self._held(group)
        if named[first] >= 0:  # there is nothing to it but its name
            if self._new:
                live.take_policy(named[first])
            policies = [policies[first] if g in new else policy for g, policy in enumerate(policies)]
        self._refuse_strangers(group, [g for g in new if policies[g] != policies[first]])
        live.share_sums(first, new=bool(new))
        target = self._target(group, have_LG, rows[first][1], first, new)
        moved = live.migrator.restore(have_LG, target, timeout=group.timeout)
        live.refill_home()
        fewest = min(row[0] for row in rows if row[0] >= 0)
        self._behind = not self._new and self._completed > fewest
        now = time.monotonic()
        self.recoveries.append(
            Recovery(
                lost=tuple(r for r in sorted(before) if before[r] != self._crew.get(r)),
                joined=tuple(group.ranks[g] for g in new),
                cause=cause,
                restored_bytes=moved,
                seconds=now - began,
                agree_seconds=agreed - started,
                migrating=migrating,
                repeated=self._behind,
            )
        )
        # From here on all survivors count alike.
        self._completed = fewest + self._behind
        self._new = False
        self._answered = max(self._answered, rows[first][3])

    def _held(self, group: ExpertGroup) -> tuple[list[list[list[int]]], list[int], list[int]]:
        """Experts that the ranks hold, by layer and rank; checksums and names of the shares that they use."""
        banks, experts = self.live.banks, self.live.experts
        mine = [int(e in bank.resident) for bank in banks for e in range(experts)]
        shares = [self.live.policy_digest(), self.live.named_policy()]
        rows = np.asarray(group.gather_ints([*shares, *mine]), dtype=np.int64)
        held_RLE = rows[:, 2:].reshape(group.size, len(banks), experts)
        held_LG = [
            [np.flatnonzero(held_RLE[g, layer]).tolist() for g in range(group.size)]
            for layer in range(len(banks))
        ]
        return held_LG, rows[:, 0].tolist(), rows[:, 1].tolist()

    def _refuse_strangers(self, group: ExpertGroup, strangers: list[int]) -> None:
        """Ranks that came back with other options than the others have."""
        if group.rank in strangers:
            raise MoelessError(
                f"rank {group.ranks[group.rank]} came back with other options of attach, or another policy "
                "of shares, than the others use: it has to give the same ones"
            )
        if strangers:
            raise RankLostError(f"ranks {[group.ranks[g] for g in strangers]} came with other options")

    def _target(
        self, group: ExpertGroup, have_LG: list[list[list[int]]], slots: int, first: int, new: list[int]
    ) -> SlotArray:
        """The placement from now on, from the first survivor, so that all have the same."""
        live = self.live
        most = max(len(row) for rows in have_LG for row in rows)
        width = max(slots, most, -(-live.experts // group.size))
        shape = (len(live.banks), group.size, width)
        flat, error = np.full(shape, -1, dtype=np.int32), None
        if group.rank == first:
            try:
                if self.replan is not None:
                    found = np.asarray(self.replan(have_LG, self.load_LE), dtype=np.int32)
                else:
                    cap = np.full(shape[:2], slots or width)
                    found = repair_slots(have_LG, live.experts, cap, self.load_LE)
                    if new:
                        found = spread_slots(found, live.experts, cap, new, self.load_LE)
                if found.shape[2] > width:
                    raise MoelessError(
                        f"the new placement has {found.shape[2]} slots per rank, {width} are allowed"
                    )
                flat[:, :, : found.shape[2]] = found
            except Exception as problem:  # whatever a planner may raise: the others wait for its answer
                error = problem
        rows = group.gather_ints([int(error is not None), *flat.ravel().tolist()])
        if isinstance(error, MoelessError):
            raise error
        if error is not None:
            raise MoelessError(f"replan failed: {type(error).__name__}: {error}") from error
        if rows[first][0]:
            raise MoelessError("the first survivor found no placement for what is left")
        return np.asarray(rows[first][1:], dtype=np.int32).reshape(shape)
