"""Messages between a front and the ranks: queues in a process, connections between processes. No torch."""

from __future__ import annotations

import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, Protocol

__all__ = ["Channel", "ChannelClosedError", "PipeChannel", "QueueChannel", "queue_channels"]


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel(Protocol):
    """One end."""

    def send(self, message: Any) -> None:
        """Hand a message over; from any thread."""
        ...

    def take(self, timeout: float) -> list[Any]:
        """All messages that are there; waits up to `timeout` seconds for the first."""
        ...

    def close(self) -> None:
        """Give it up; the other side is told."""
        ...


class QueueChannel:
    """One end of a pair of queues."""

    def __init__(self, inbox: queue.SimpleQueue[Any], outbox: queue.SimpleQueue[Any]) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._closed = False

    def send(self, message: Any) -> None:
        """See `Channel.send`."""
        self._outbox.put((message,))

    def take(self, timeout: float) -> list[Any]:
        """See `Channel.take`."""
        found: list[Any] = []
        try:
            item = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
            while True:
                if item is None:
                    self._inbox.put(None)  # for whoever asks again
                    if found:
                        return found
                    raise ChannelClosedError
                found.append(item[0])
                item = self._inbox.get_nowait()
        except queue.Empty:
            return found

    def close(self) -> None:
        """See `Channel.close`."""
        if not self._closed:
            self._closed = True
            self._outbox.put(None)


def queue_channels() -> tuple[QueueChannel, QueueChannel]:
    """Two ends in one process."""
    there: queue.SimpleQueue[Any] = queue.SimpleQueue()
    back: queue.SimpleQueue[Any] = queue.SimpleQueue()
    return QueueChannel(back, there), QueueChannel(there, back)


class PipeChannel:
    """One end of a connection of `multiprocessing`.

    Parameters
    ----------
    connection : Connection
        To the other process.
    patient : bool
        A thread writes: whoever sends never waits for a process that does not read (it may be stopped).
    """

    def __init__(self, connection: Connection, *, patient: bool = False) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._letters: queue.SimpleQueue[Any] | None = None
        if patient:
            self._letters = queue.SimpleQueue()
            threading.Thread(target=self._post, name="moeless-sender", daemon=True).start()

    def _post(self) -> None:
        assert self._letters is not None
        while (letter := self._letters.get()) is not None:
            self._write(letter[0])

    def _write(self, message: Any) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except (OSError, ValueError):
                return

    def send(self, message: Any) -> None:
        """See `Channel.send`; a message to nobody is dropped, `take` tells."""
        if self._letters is None:
            self._write(message)
        else:
            self._letters.put((message,))

    def take(self, timeout: float) -> list[Any]:
        """See `Channel.take`."""
        found: list[Any] = []
        deadline = time.monotonic() + timeout
        try:
            while self._connection.poll(max(deadline - time.monotonic(), 0.0) if not found else 0.0):
                found.append(self._connection.recv())
        except (OSError, EOFError, ValueError):
            if not found:
                raise ChannelClosedError from None
        return found

    def close(self) -> None:
        """See `Channel.close`."""
        if self._letters is not None:
            self._letters.put(None)
        self._connection.close()
