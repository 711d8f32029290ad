"""What the routes share: the engine, its options, figures, and whether requests are taken."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.serve import ServeEngine
from moeless_opt.runtime.serve.http.errors import ApiError, api_error_of
from moeless_opt.runtime.serve.http.mailbox import Mailbox
from moeless_opt.runtime.serve.http.metrics import FrontMetrics
from moeless_opt.runtime.serve.http.options import HttpOptions

if TYPE_CHECKING:
    from moeless_opt.runtime.serve.http.history import History

__all__ = ["HttpFront"]

PATIENCE = 10.0
"""Seconds without an engine that serves, after which it is given up."""

LONG_TEXT = 4096
"""Texts above this are turned into tokens beside the event loop."""


class HttpFront:
    """State of the HTTP side.

    Parameters
    ----------
    engine : ServeEngine
        Who generates. Started with the server; requests are taken from then on.
    options : HttpOptions
        What the HTTP side is told.

    Attributes
    ----------
    ready, draining : bool
        Whether the engine has started; whether the server is about to end.
    failed, error : str, exception or None
        Why the engine could not start, if it could not.
    reason : str
        What the engine said last when it took a request no longer.
    open_requests : int
        HTTP requests under way.
    connections : callable
        Number of connections now; the server puts its own here.
    """

    def __init__(self, engine: ServeEngine, options: HttpOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = FrontMetrics(engine)
        self.ready = self.draining = False
        self.failed = ""
        self.error: Exception | None = None
        self._tokenizing = threading.Lock()  # tokenizers are not made for several threads
        self.reason = ""
        self._idle_since: float | None = None
        self.open_requests = 0
        self.created = int(time.time())
        self.connections: Callable[[], int] = lambda: 0
        self.history: History | None = None

    @cached_property
    def mailbox(self) -> Mailbox:
        """Where the engine's threads deliver; of the running loop."""
        return Mailbox(asyncio.get_running_loop())

    def observe(self, serves: bool) -> None:
        """Take note of whether the engine said just now that it serves."""
        if serves:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()

    @property
    def lost(self) -> bool:
        """Whether the engine has said for long that it serves no longer, and nobody asked it to end.

        What is not heard of it is no sign: a busy machine may have no time to ask.
        """
        since = self._idle_since
        return self.ready and not self.draining and since is not None and time.monotonic() - since > PATIENCE

    def check_open(self) -> None:
        """Raise unless requests are taken."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "5"})
        if self.failed:
            raise ApiError(503, f"the engine has failed: {self.failed}", code="engine_failed")
        if not self.ready:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "2"})

    def check_model(self, model: str | None) -> str:
        """The model that is served, if it is the one asked for."""
        self.check_open()
        if model is not None and model != self.engine.model:
            told = f"the model {model!r} does not exist here; {self.engine.model!r} does"
            raise ApiError(404, told, param="model", code="model_not_found")
        return self.engine.model

    async def tokens(self, field: str, text: str) -> list[int]:
        """Tokens of a text."""
        return await self._beside(field, len(text), self.engine.codec.encode, text)

    async def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens of a conversation, ready for the answer."""
        size = sum(len(message["content"]) for message in messages)
        return await self._beside("messages", size, self.engine.codec.chat, messages)

    async def _beside(self, field: str, size: int, work: Callable[[Any], list[int]], given: Any) -> list[int]:
        def alone() -> list[int]:
            with self._tokenizing:
                return work(given)

        try:
            if size <= LONG_TEXT and self._tokenizing.acquire(blocking=False):
                try:
                    return work(given)
                finally:
                    self._tokenizing.release()
            return await asyncio.to_thread(alone)
        except MoelessError as error:
            found = api_error_of(error)
            raise ApiError(found.status, f"{field}: {found.message}", param=field) from error

    def room(self, field: str, prompt: Sequence[int], wanted: int | None) -> int | None:
        """Tokens that an answer may have, as asked for.

        Raises
        ------
        ApiError
            If prompt and answer are longer than the context.
        """
        most, used = self.engine.context_length, len(prompt)
        if used + (wanted or 1) > most:
            told = f"{field}: has {used} tokens"
            told += f", and {wanted} are asked for" if wanted else ""
            told = f"{told}; the context has {most}"
            raise ApiError(400, told, param=field, code="context_length_exceeded")
        return wanted

    def seeds(self, seed: int | None, count: int) -> list[int]:
        """A seed for every answer."""
        if seed is None:
            return [secrets.randbits(62) for _ in range(count)]
        return [(seed + index + 2**63) % 2**64 - 2**63 for index in range(count)]
