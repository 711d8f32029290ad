"""When ranks that were lost are started anew: at once, then ever later, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Restarts"]

#: Seconds after which a rank that has served so long counts as sound.
STEADY = 300.0
#: Seconds before the second start in a row; each further one waits twice as long, up to the last.
FIRST, LONGEST = 1.0, 60.0


class Restarts:
    """The book of restarts.

    Parameters
    ----------
    most : int
        In a row, of one rank.
    clock : callable
        Seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        #: Processes that were started so far.
        self.count = 0
        self._row: dict[int, int] = {}
        self._serves: dict[int, float] = {}

    def next(self, rank: int) -> float | None:
        """Seconds to wait before a rank that was lost is started; None: it was often enough."""
        since = self._serves.pop(rank, None)
        if since is not None and self._clock() - since >= STEADY:
            self._row.pop(rank, None)
        tries = self._row.get(rank, 0)
        if tries >= self.most:
            return None
        self._row[rank] = tries + 1
        self.count += 1
        return min(FIRST * 2.0 ** min(tries - 1, 30), LONGEST) if tries else 0.0

    def serves(self, rank: int) -> None:
        """A rank has begun to serve."""
        self._serves[rank] = self._clock()
