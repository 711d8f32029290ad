"""Where ranks find together in the store: survivors after a loss, and ranks that come back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.heartbeat import Heartbeat

__all__ = ["EvictedError", "Invitation", "Meeting"]

#: How often the store is asked.
ASK = 0.01


class EvictedError(MoelessError):
    """The others went on without this rank: it answered too late."""


class Invitation:
    """What a rank that knocked is told: when the next meeting is, and who else comes.

    Parameters
    ----------
    epoch : int
        Of the meeting.
    crew : mapping of int to int
        Lives of the others, by global rank.
    """

    def __init__(self, epoch: int, crew: Mapping[int, int]) -> None:
        self.epoch, self.crew = epoch, dict(crew)

    def to_json(self) -> str:
        """For the store."""
        return json.dumps([self.epoch, sorted(self.crew.items())])

    @classmethod
    def from_json(cls, text: bytes) -> Invitation:
        """From the store."""
        epoch, crew = json.loads(text)
        return cls(epoch, dict(crew))


class Meeting:
    """The meetings of one group and of those that follow it.

    Parameters
    ----------
    group : ExpertGroup
        As it was at first; a rank that was lost has one that it stands outside of.
    grace : float
        Seconds without a sign of life after which nobody waits for a rank any more.
    """

    def __init__(self, group: ExpertGroup, grace: float) -> None:
        self.store, self.me = group.store, group.ranks[group.rank]
        self.grace, self.timeout = grace, group.timeout
        self.heart: Heartbeat | None = group.heart
        self._answered: set[int] = set()
        self._door = f"moeless/door/{'-'.join(map(str, group.ranks))}"
        self._name = f"moeless/{'-'.join(map(str, group.ranks))}/{group.name}"
        if group.size > 1 and not group.outside:
            self.store.set(self._door, self._name)  # the same from all

    # -- survivors ---------------------------------------------------------------------------------

    def gather(self, epoch: int, crew: Mapping[int, int]) -> dict[int, int]:
        """Meet; everybody who comes gets the same list of ranks and lives.

        Parameters
        ----------
        epoch : int
            Which meeting.
        crew : mapping of int to int
            Who is expected, with their lives; whoever else comes in time is welcome.

        Raises
        ------
        EvictedError
            If the others decided before this rank came.
        """
        store, place, heart = self.store, f"{self._name}/meet/{epoch}", self.heart
        life = 0
        if heart is not None:
            heart.alarm(epoch)
            heart.listen(crew)
            life = heart.life
        store.set(f"{place}/{store.add(f'{place}/count', 1)}", json.dumps([self.me, life]))
        here: dict[int, int] = {}
        last = time.monotonic()
        while not store.check([f"{place}/list"]):
            found = self._reported(place)
            if len(found) > len(here):
                last = time.monotonic()
            here = found
            missing = [rank for rank, life in crew.items() if here.get(rank) != life]
            if not missing or not any(self._may_come(rank, last) for rank in missing):
                break
            time.sleep(ASK)
        decided = store.compare_set(f"{place}/list", "", json.dumps(sorted(here.items())))
        lives = {int(rank): int(life) for rank, life in json.loads(decided)}
        if lives.get(self.me) != life:
            raise EvictedError(f"rank {self.me} came too late: ranks {sorted(lives)} went on")
        return lives

    def _reported(self, place: str) -> dict[int, int]:
        count = self.store.add(f"{place}/count", 0)
        keys = [f"{place}/{k}" for k in range(1, count + 1)]
        return dict(json.loads(self.store.get(key)) for key in keys if self.store.check([key]))

    def _may_come(self, rank: int, last: float) -> bool:
        """Whether to wait for a rank that has not reported yet; `last`: when somebody did."""
        waited = time.monotonic() - last
        if self.heart is None or self.heart.deaf:
            return waited < self.grace
        # Alive but busy: as long as an operation may take. Silent: until it is no delay any more.
        return waited < self.timeout and self.heart.silent(rank) < max(self.grace, 2.5 * self.heart.interval)

    # -- ranks that come back ----------------------------------------------------------------------

    def invite(self, epoch: int, crew: Mapping[int, int]) -> dict[int, int]:
        """Tell those who have knocked since the last call of a meeting; returns their ranks and lives."""
        guests: dict[int, int] = {}
        for number in range(1, self.store.add(f"{self._name}/numbers", 0) + 1):
            key = f"{self._name}/knock/{number}"
            if number not in self._answered and self.store.check([key]):
                self._answered.add(number)
                if (rank := int(self.store.get(key))) not in crew:
                    guests[rank] = number  # of several with one rank the last
        for number in guests.values():
            self.store.set(f"{self._name}/invite/{number}", Invitation(epoch, crew).to_json())
        return guests

    def knock(self, dead_after: float) -> Invitation:
        """Ask to be let in, and wait for the answer.

        Raises
        ------
        MoelessError
            If none comes.
        """
        store, late = self.store, f"within {self.timeout:g} s: do the other ranks run under a Guard?"
        deadline = time.monotonic() + self.timeout

        def wait(key: str) -> bytes:
            while not store.check([key]):
                if time.monotonic() > deadline:
                    raise MoelessError(f"rank {self.me} was not let in again {late}")
                time.sleep(ASK)
            found: bytes = store.get(key)
            return found

        self._name = wait(self._door).decode()
        number = store.add(f"{self._name}/numbers", 1)
        self.heart = Heartbeat(store, self._name, self.me, dead_after, number)
        try:
            self._answered = set(range(1, number + 1))  # those before it are the others' business
            store.set(f"{self._name}/knock/{number}", str(self.me))
            store.add(f"{self._name}/knocks", 1)
            return Invitation.from_json(wait(f"{self._name}/invite/{number}"))
        except BaseException:
            self.heart.stop()
            raise

    def close(self) -> None:
        """Let the others hear that this rank does not come."""
        if self.heart is not None:
            self.heart.stop()
