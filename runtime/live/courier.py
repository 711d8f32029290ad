"""Sends and receives weights beside the forward passes: a thread does the waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.live.experts import Weights
from moeless_opt.runtime.live.groups import ExpertGroup

__all__ = [
    "DAMAGED",
    "LOST",
    "NO_MEMORY",
    "OK",
    "REASON",
    "UNREADABLE",
    "Courier",
    "DamagedError",
    "Flight",
    "Letter",
    "UnreadableError",
]

OK, DAMAGED, NO_MEMORY, LOST, UNREADABLE = range(5)
REASON = {
    DAMAGED: "checksum mismatch",
    NO_MEMORY: "no memory for an arrival",
    LOST: "a transfer failed",
    UNREADABLE: "a home copy could not be read",
}


#: Weights to be sent, or what reads them (from a disk, perhaps), the rank of the group, and a tag.
Letter = tuple[Weights | Callable[[], Weights], int, int]


class DamagedError(Exception):
    """A checksum does not match."""


class UnreadableError(Exception):
    """A home copy cannot be read on a rank that should have it."""


class Flight:
    """A posted step: `done` turns true when all of it has arrived or failed; then `fault` tells which."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.fault = OK
        self.error = ""
        self.began = time.perf_counter()
        self.seconds = 0.0
        # Buffers must outlive the operations that read and write them.
        self.held: list[Any] = []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


class Courier:
    """Posts transfers of one rank and watches them from a thread.

    Parameters
    ----------
    group : ExpertGroup
        Its `weights` group carries the transfers.
    """

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self.device = group.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.waits = 0
        self._queue: queue.SimpleQueue[tuple[Flight, list[Any], Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        # What has to be read before it can be posted, and all that comes behind it: order counts.
        self._unread: queue.SimpleQueue[tuple[Flight, Any, Any, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._reader: threading.Thread | None = None
        self._reading = 0
        self._lock = threading.Lock()

    def on_stream(self) -> Any:
        """Context in which transfers are issued."""
        return torch.cuda.stream(self.stream)

    def post(
        self,
        sends: Sequence[Letter],
        receives: Sequence[tuple[Weights, int, int]],
        finish: Callable[[], None],
    ) -> Flight:
        """Start a step; returns at once.

        Parameters
        ----------
        sends, receives : sequences of (weights, rank of the group, tag)
            In the same order on every rank. What must be read first is read by a thread, which posts the step
            then; later ones wait behind it.
        finish : callable
            Run by the thread after the arrivals (reading home copies, checking); it may raise.
        """
        flight = Flight()
        flight.held = [*sends, *receives]
        if self.stream is not None:
            # The memory of the arrivals may have been freed by kernels that are still to run.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._lock:
            later = self._reading > 0 or any(callable(weights) for weights, _, _ in sends)
            self._reading += later
        if not later:
            self._start(flight, sends, receives, finish)
            return flight
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name="moeless-reader", daemon=True)
            self._reader.start()
        self._unread.put((flight, sends, receives, finish))
        return flight

    def _read(self) -> None:
        if self.stream is not None:
            torch.cuda.set_device(self.device)
        while (item := self._unread.get()) is not None:
            flight, sends, receives, finish = item
            try:
                with self.on_stream(), torch.no_grad():
                    sends = [(w() if callable(w) else w, peer, tag) for w, peer, tag in sends]
                flight.held = [*sends, *receives]
            except Exception as error:  # whatever it was, the other ranks must hear of it
                flight.fault, flight.error = LOST, f"{type(error).__name__}: {error}"
                flight.done.set()
            else:
                self._start(flight, sends, receives, finish)
            with self._lock:
                self._reading -= 1
            del item, flight, sends, receives, finish

    def _start(self, flight: Flight, sends: Any, receives: Any, finish: Callable[[], None]) -> None:
        """Post a step, and let it be watched."""
        works: list[Any] = []
        with self.on_stream():
            outgoing, incoming = (
                [(t.data, peer, tag * 16 + i) for weights, peer, tag in items for i, t in enumerate(weights)]
                for items in (sends, receives)
            )
            try:
                works = self.group.exchange(outgoing, incoming)
                if self.stream is not None and not self.group.staged:
                    for work in works:
                        work.wait()  # orders the stream behind the transfer; the host goes on
            except (MoelessError, MemoryError, RuntimeError) as error:
                flight.fault = NO_MEMORY if isinstance(error, MemoryError) else LOST
                flight.error = str(error)
                flight.done.set()
                return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="moeless-courier", daemon=True)
            self._thread.start()
        self._queue.put((flight, works, finish))

    def _watch(self) -> None:
        if self.stream is not None:
            torch.cuda.set_device(self.device)
        while (item := self._queue.get()) is not None:
            flight, works, finish = item
            try:
                with self.on_stream(), torch.no_grad():
                    if self.stream is None or self.group.staged:
                        # Not here: a variable of this thread would keep the last one, and with it the
                        # group's connections, open after the group was closed.
                        _wait(works)
                    finish()
                    if self.stream is not None:
                        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                        event.record(self.stream)
                        event.synchronize()
                        self.group.check()  # an aborted transfer ends its event, too
            except DamagedError as error:
                flight.fault, flight.error = DAMAGED, str(error)
            except UnreadableError as error:
                flight.fault, flight.error = UNREADABLE, str(error)
            except Exception as error:  # whatever it was, the other ranks must hear of it
                flight.fault, flight.error = LOST, f"{type(error).__name__}: {error}"
            # Let go of the weights before anybody hears of it: what is done must not hold memory.
            works.clear()
            flight.held = []
            flight.seconds = time.perf_counter() - flight.began
            flight.done.set()
            del item, works, finish, flight

    def wait(self, flight: Flight, timeout: float) -> None:
        """Wait for a step; counted, because no forward pass may do it."""
        if not flight.done.is_set():
            self.waits += 1
            flight.done.wait(timeout)

    def close(self) -> None:
        """End the threads once what is posted has ended."""
        self._unread.put(None)
        self._queue.put(None)
        self._thread = self._reader = None
