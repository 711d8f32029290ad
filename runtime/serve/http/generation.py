"""The answers of one HTTP request while the engine makes them: submitted together, ended together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.serve import Emitted, Sampling, ServeEngine, ServeRequest
from moeless_opt.runtime.serve.http.errors import ApiError, api_error_of
from moeless_opt.runtime.serve.http.mailbox import Letters, Mailbox
from moeless_opt.runtime.serve.http.metrics import FrontMetrics

__all__ = ["Generation"]

HEARTBEAT = 15.0
"""Seconds without news after which a stream shows that it lives."""


class Generation:
    """One or more answers that are under way.

    Parameters
    ----------
    engine : ServeEngine
        Who makes them.
    mailbox : Mailbox
        How they arrive.
    metrics : FrontMetrics
        Is told of first tokens, tokens, and ends.
    name : str
        Id of the HTTP request.
    client : str
        Whose it is.

    Attributes
    ----------
    prompt_tokens, cached_tokens, generated_tokens : int
        So far; a prompt of several answers counts once.
    """

    def __init__(
        self, engine: ServeEngine, mailbox: Mailbox, metrics: FrontMetrics, name: str, client: str
    ) -> None:
        self._engine, self._mailbox, self._metrics = engine, mailbox, metrics
        self._name, self._client = name, client
        self._letters: Letters = Letters()
        self._running: set[int] = set()
        self._counted: set[int] = set()
        self._begun = time.monotonic()
        self._last: dict[int, float] = {}
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def submit(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
        """Give all answers to the engine, or none.

        Parameters
        ----------
        prompts : sequence of token sequences
            Of every answer; answers to one prompt stand side by side and have the same object.
        samplings : sequence of Sampling
            Of every answer.

        Raises
        ------
        ApiError
            The engine takes them not.
        """
        try:
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                request = ServeRequest(
                    id=f"{self._name}-{index}", prompt=tuple(prompt), sampling=sampling, client=self._client
                )
                self._engine.submit(request, self._mailbox.slot(self._letters, index))
                self._running.add(index)
                if not index or prompt is not prompts[index - 1]:
                    self._counted.add(index)
                    self.prompt_tokens += len(request.prompt)
        except MoelessError as error:
            self.cancel()
            raise api_error_of(error) from error

    def cancel(self) -> None:
        """End what still runs; nobody waits for it any longer."""
        for index in self._running:
            self._engine.cancel(f"{self._name}-{index}")
            self._metrics.ended("cancelled")
        self._running.clear()

    async def pieces(self) -> AsyncIterator[list[tuple[int, Emitted]]]:
        """All that has arrived, again and again until all answers have ended; nothing if that takes long.

        Raises
        ------
        ApiError
            An answer ended with an error.
        """
        while self._running:
            try:
                arrived = [await asyncio.wait_for(self._letters.get(), HEARTBEAT)]
            except TimeoutError:
                arrived = []
            while not self._letters.empty():
                arrived.append(self._letters.get_nowait())
            for index, emitted in arrived:
                self._count(index, emitted)
            yield arrived

    def _count(self, index: int, emitted: Emitted) -> None:
        if emitted.token is not None:
            now = time.monotonic()
            if index in self._last:
                self._metrics.next_token(now - self._last[index])
            else:
                self._metrics.first_token(now - self._begun)
                self.cached_tokens += emitted.cached if index in self._counted else 0
            self._last[index] = now
            self.generated_tokens += 1
        if emitted.finish is None:
            return
        self._running.discard(index)
        self._metrics.ended(emitted.finish, time.monotonic() - self._begun)
        if emitted.finish in ("error", "cancelled"):
            reason = emitted.error or "the request was ended by the server"
            raise ApiError(503, reason, code=f"generation_{emitted.finish}", headers={"Retry-After": "1"})
