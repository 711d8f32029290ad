"""Signs of life in the store, by which a rank that is slow is told from one that is dead.

A thread of every rank counts up in the store and looks at the others' counters. Whoever stands still for too
long is dead: killed, stopped, or without a network. Whoever still counts is alive, however long its forward
pass takes. The thread has a connection of its own, so that nobody waits for anybody; it hears, too, when
another rank has begun to recover, and when a rank that was lost wants to come back.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Heartbeat"]

#: What stands for the counter of a rank that has left on purpose.
LEFT = b"left"


class Heartbeat:
    """The thread of one rank.

    Parameters
    ----------
    store : torch.distributed.Store
        Hosted by something that outlives the ranks.
    name : str
        Of the group and of those that follow it, the same on all ranks.
    rank : int
        Global rank of this process.
    dead_after : float
        Seconds without a sign of life after which a rank counts as dead.
    life : int
        Tells this process from earlier ones that had its rank.
    """

    def __init__(self, store: Any, name: str, rank: int, dead_after: float, life: int = 0) -> None:
        self.rank, self.life, self.dead_after = rank, life, dead_after
        self.name = name
        self.interval = min(1.0, dead_after / 5)
        #: Why this rank must not wait for the others any more, or nothing.
        self.news = ""
        #: Why the thread hears nothing any more, or nothing.
        self.deaf = ""
        #: Ranks that have ever asked to be let in.
        self.knocks = 0
        #: Called once, from the thread, when there are news.
        self.on_loss: Callable[[], None] = lambda: None
        self._store = store.clone() if hasattr(store, "clone") else store
        self._lives: dict[int, int] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._epoch = 0
        self._count = 0
        self._waits: tuple[float, float] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        for counter in ("alarm", "knocks"):
            self._store.add(f"{self.name}/{counter}", 0)  # so that all keys are there to be read
        self._beat()
        self._woke = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moeless-heartbeat", daemon=True)
        self._thread.start()

    # -- what the other threads use ----------------------------------------------------------------

    def follow(self, lives: Mapping[int, int], epoch: int = 0) -> None:
        """Listen to these ranks from now on, with their lives; what was lost before is forgotten."""
        with self._lock:
            self._lives = {rank: life for rank, life in lives.items() if rank != self.rank}
            self._heard = {rank: (b"", time.monotonic()) for rank in self._lives}
            self._epoch, self.news = epoch, ""

    def listen(self, lives: Mapping[int, int]) -> None:
        """Listen to these, too."""
        with self._lock:
            for rank, life in lives.items():
                if rank != self.rank and self._lives.get(rank) != life:
                    self._lives[rank] = life
                    self._heard[rank] = (b"", time.monotonic())

    def silent(self, rank: int) -> float:
        """Seconds since a rank's last sign of life; no end of them if it has left."""
        with self._lock:
            value, at = self._heard.get(rank, (LEFT, 0.0))
            return float("inf") if value.startswith(LEFT) else time.monotonic() - at

    def alarm(self, epoch: int) -> None:
        """Let everybody hear that the group has to be made anew."""
        with contextlib.suppress(RuntimeError), self._lock:
            # Not counted up: two ranks at a time would ring for a meeting that nobody holds.
            if self._store.add(f"{self.name}/alarm", 0) < epoch:
                self._store.set(f"{self.name}/alarm", str(epoch))

    @contextlib.contextmanager
    def waiting(self, limit: float) -> Iterator[None]:
        """The host waits for a device inside; that takes longer than `limit` only if a rank is stuck."""
        self._waits = (time.monotonic(), limit)
        try:
            yield
        finally:
            self._waits = None

    def heard(self) -> str:
        """News, if they come within the time that they take: connections close sooner than words travel."""
        deadline = time.monotonic() + 2.5 * self.interval
        while not (self.news or self.deaf) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.news

    def stop(self, reason: str = "") -> None:
        """End the thread; the others hear that this rank has left, and why."""
        if self._stop.is_set():
            return
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.interval)
        if not self.deaf:
            with contextlib.suppress(RuntimeError), self._lock:
                self._store.set(self._key(self.rank, self.life), LEFT.decode() + reason)

    # -- the thread --------------------------------------------------------------------------------

    def _key(self, rank: int, life: int) -> str:
        return f"{self.name}/beat/{rank}.{life}"

    def _beat(self) -> None:
        self._count += 1
        self._store.set(self._key(self.rank, self.life), str(self._count))

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            # Own pauses (a stopped process, a machine that is too busy) are nobody else's silence.
            late, self._woke = now - self._woke - self.interval, now
            news = ""
            if not self.deaf:
                try:
                    with self._lock:
                        if self._stop.is_set():
                            return
                        self._beat()
                        news = self._listen(max(0.0, late))
                except Exception as error:  # the store is gone: nothing can be heard, nor recovered
                    self.deaf = f"the store is gone: {error}"
            waits = self._waits
            if not news and waits is not None and now - waits[0] > waits[1]:
                news = f"no answer from the device within {waits[1]:g} s, though all ranks give signs of life"
            if news and not self.news:
                self.news = news  # first: whoever the call below wakes looks at it
                self.on_loss()

    def _listen(self, late: float) -> str:
        """Hear everybody; what is wrong, if anything is."""
        keys = [self._key(rank, life) for rank, life in self._lives.items()]
        *beats, alarm, knocks = self._store.multi_get([*keys, f"{self.name}/alarm", f"{self.name}/knocks"])
        now = time.monotonic()
        dead: list[str] = []
        for rank, beat in zip(self._lives, beats, strict=True):
            value, at = self._heard[rank]
            self._heard[rank] = (beat, now) if beat != value else (value, at + late)
            if beat.startswith(LEFT):
                reason = beat.removeprefix(LEFT).decode(errors="replace")
                dead.append(f"rank {rank} has left{reason and ': '}{reason}")
            elif now - self._heard[rank][1] > self.dead_after:
                dead.append(f"rank {rank} has given no sign of life for {self.dead_after:g} s")
        self.knocks = int(knocks)
        if int(alarm) > self._epoch:
            dead.append("another rank has lost one")
        return "; ".join(dead)
