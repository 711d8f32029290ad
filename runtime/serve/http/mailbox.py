"""From the engine's threads into the event loop, with one wake-up for all that is there."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from moeless_opt.runtime.serve import Deliver, Emitted

__all__ = ["Letters", "Mailbox"]

Letters = asyncio.Queue[tuple[int, Emitted]]
"""What has arrived for one HTTP request: which of its answers, and what was emitted."""


class Mailbox:
    """Hands out to the queues of one event loop what threads deliver.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The one that all queues are of.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Letters, int, Emitted]] = deque()
        self._called = False

    def slot(self, letters: Letters, index: int) -> Deliver:
        """What the engine is given to deliver one answer by."""

        def deliver(emitted: Emitted) -> None:
            # In this order: whoever finds `_called` set has appended before the loop empties the box.
            self._letters.append((letters, index, emitted))
            if not self._called:
                self._called = True
                with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                    self._loop.call_soon_threadsafe(self._hand_out)

        return deliver

    def _hand_out(self) -> None:
        self._called = False
        while self._letters:
            letters, index, emitted = self._letters.popleft()
            letters.put_nowait((index, emitted))
