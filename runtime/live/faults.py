"""Going on after a rank has died: notice, agree on who is left, rebuild, restore, repeat.

A death shows as an error in the next operation with the dead rank (its connections close), or as a timeout if
it hangs. Who notices closes its own groups, which wakes whoever waits for *it*, so the news runs through the
group in milliseconds. The survivors meet in the store, agree on the list of ranks (the first to write it
wins, everybody reads it), build new groups, tell each other what they hold, compute a placement for what is
left, fetch the experts that nobody has from home copies, and repeat the step that failed.

The store must outlive the ranks: the launcher has to host it, as torchrun does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.live.groups import ExpertGroup, RankLostError
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.live.repair import repair_slots

__all__ = ["EvictedError", "Guard", "Recovery"]

T = TypeVar("T")

#: Attempts to recover with the same ranks.
ATTEMPTS = 3
Replan = Callable[[list[list[list[int]]], FloatArray | None], SlotArray]


class EvictedError(MoelessError):
    """The others went on without this rank: it answered too late."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One recovery.

    Parameters
    ----------
    lost : tuple of int
        Global ranks that are gone.
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
    grace : float
        How long survivors wait for each other after the last of them has reported.
    slots : int, optional
        Slots per layer that each rank may use when experts have to be placed anew; by default as many as it
        takes to hold all experts. The first survivor's counts.
    replan : callable, optional
        ``replan(have_LG, load_LE)`` gives the placement after a loss; only the first survivor calls it.
        `repair_slots` by default.
    """

    def __init__(
        self, live: LiveModel, *, grace: float = 5.0, slots: int | None = None, replan: Replan | None = None
    ) -> None:
        self.live = live
        self.grace = grace
        self.slots = slots
        self.replan = replan
        self.load_LE: FloatArray | None = None
        self.recoveries: list[Recovery] = []
        # Meetings are counted from here, whatever became of the groups in between.
        self._meeting = f"moeless/meet/{'-'.join(map(str, live.group.ranks))}"
        self._epoch = 0
        self._completed = 0
        self._replay: Callable[[], Any] | None = None

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
                if self._behind:
                    self._behind = False
                    if self._replay is not None:
                        self._replay()
                result = step()
            except RankLostError as error:
                self._recover(error)
                continue
            self._completed += 1
            self._replay = dummy or step
            return result

    _behind = False

    def _recover(self, error: Exception) -> None:
        began = time.monotonic()
        cause = str(error)
        before = self.live.group.ranks
        migrating = not self.live.migrator.idle
        alike, left = 0, before
        while True:
            try:
                self._attempt(cause, began, before, migrating)
                return
            except RankLostError as again:
                cause = str(again)
            alike = alike + 1 if self.live.group.ranks == left else 0
            left = self.live.group.ranks
            if alike >= ATTEMPTS:
                raise MoelessError(
                    f"recovering failed {alike + 1} times though ranks {list(left)} were there: {cause}"
                )

    def _attempt(self, cause: str, began: float, before: tuple[int, ...], migrating: bool) -> None:
        live = self.live
        old = live.group
        old.close()
        self._epoch += 1
        started = time.monotonic()
        ranks = self._members(old)
        agreed = time.monotonic()
        group = old.shrunk([old.ranks.index(r) for r in ranks], f"epoch{self._epoch}")
        live.regroup(group)
        experts = live.experts
        held = [int(e in bank.resident) for bank in live.banks for e in range(experts)]
        rows = group.gather_ints([self._completed, self.slots or 0, *held])
        have_RLE = np.asarray([row[2:] for row in rows]).reshape(group.size, len(live.banks), experts)
        have_LG = [
            [np.flatnonzero(have_RLE[g, layer]).tolist() for g in range(group.size)]
            for layer in range(len(live.banks))
        ]
        target = self._target(group, have_LG, rows[0][1])
        moved = live.migrator.restore(have_LG, target, timeout=group.timeout)
        live.refill_home()
        fewest = min(row[0] for row in rows)
        self._behind = self._completed > fewest
        lost = tuple(r for r in before if r not in ranks)
        now = time.monotonic()
        self.recoveries.append(
            Recovery(
                lost=lost,
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

    def _members(self, old: ExpertGroup) -> list[int]:
        """Global ranks that go on; everybody who comes to the meeting gets the same list."""
        me = old.ranks[old.rank]
        if old.size == 1:
            return [me]
        store, place = old.store, f"{self._meeting}/{self._epoch}"
        store.set(f"{place}/{me}", b"here")
        store.add(f"{place}/count", 1)
        seen, last = 0, time.monotonic()
        while time.monotonic() - last < self.grace and not store.check([f"{place}/list"]):
            count = store.add(f"{place}/count", 0)
            if count > seen:
                seen, last = count, time.monotonic()
            if count >= old.size:
                break
            time.sleep(0.01)
        here = [r for r in old.ranks if store.check([f"{place}/{r}"])]
        decided = store.compare_set(f"{place}/list", "", json.dumps(here))
        ranks: list[int] = json.loads(decided)
        if me not in ranks:
            raise EvictedError(f"rank {me} came too late: ranks {ranks} went on")
        return ranks

    def _target(self, group: ExpertGroup, have_LG: list[list[list[int]]], slots: int) -> SlotArray:
        """The placement after the loss, from the first survivor, so that all have the same."""
        live = self.live
        most = max(len(row) for rows in have_LG for row in rows)
        width = max(slots, most, -(-live.experts // group.size))
        shape = (len(live.banks), group.size, width)
        flat, error = np.full(shape, -1, dtype=np.int32), None
        if group.rank == 0:
            try:
                if self.replan is not None:
                    found = np.asarray(self.replan(have_LG, self.load_LE), dtype=np.int32)
                else:
                    cap = slots or width
                    found = repair_slots(have_LG, live.experts, np.full(shape[:2], cap), self.load_LE)
                if found.shape[2] > width:
                    raise MoelessError(
                        f"the new placement has {found.shape[2]} slots per rank, {width} are allowed"
                    )
                flat[:, :, : found.shape[2]] = found
            except MoelessError as problem:
                error = problem
        rows = group.gather_ints([int(error is not None), *flat.ravel().tolist()])
        if error is not None:
            raise error
        if rows[0][0]:
            raise MoelessError("the first survivor found no placement for what is left")
        return np.asarray(rows[0][1:], dtype=np.int32).reshape(shape)
