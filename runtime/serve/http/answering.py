"""Answers on their way to a client: as a whole or as a stream, and no longer than somebody reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moeless_opt.runtime.serve import Emitted
from moeless_opt.runtime.serve.http.errors import ApiError
from moeless_opt.runtime.serve.http.forms import AnswerForm
from moeless_opt.runtime.serve.http.generation import Generation

__all__ = ["AnswerStream", "answer_whole"]

_T = TypeVar("_T")
_DONE = b"data: [DONE]\n\n"
_COMMENT = b": still waiting\n\n"
"""Read over by clients; keeps proxies from giving up, and notices peers that are gone without a word."""


class ClientLeftError(Exception):
    """Nobody waits for the answer any longer."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """Do some work as long as the client is there.

    Parameters
    ----------
    receive : Receive
        Tells that the client has left.
    work : coroutine
        Cancelled then, and when time is up.
    seconds : float
        How long it may take.

    Raises
    ------
    ClientLeftError, ApiError
        The client has left; time is up.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        done, _ = await asyncio.wait({doing, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing in done:
            return doing.result()
        if leaving in done:
            raise ClientLeftError
        raise ApiError(504, f"the answer took longer than {seconds:g} s", code="timeout")
    finally:
        for task in (doing, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def usage(generation: Generation) -> dict[str, Any]:
    """Numbers of tokens so far."""
    prompt, generated = generation.prompt_tokens, generation.generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


async def answer_whole(
    generation: Generation,
    form: AnswerForm,
    head: dict[str, Any],
    count: int,
    receive: Receive,
    seconds: float,
) -> Response:
    """Wait for all answers, and give them at once.

    Parameters
    ----------
    generation : Generation
        Submitted already; nothing of it runs on afterwards.
    form : AnswerForm
        How answers are written.
    head : dict
        Fields in front: id, created, model, fingerprint.
    count : int
        Number of answers.
    receive, seconds
        See `while_there`.
    """

    async def gather() -> list[list[Emitted]]:
        answers: list[list[Emitted]] = [[] for _ in range(count)]
        async for arrived in generation.pieces():
            for index, emitted in arrived:
                answers[index].append(emitted)
        return answers

    try:
        answers = await while_there(receive, gather(), seconds)
    except ClientLeftError:
        return Response(status_code=499)
    finally:
        generation.cancel()
    choices = [form.whole(index, emitted) for index, emitted in enumerate(answers)]
    content = {**head, "object": form.whole_object, "choices": choices, "usage": usage(generation)}
    return JSONResponse(content)


class AnswerStream(Response):
    """Server-sent events, one per token and answer, as they come.

    Parameters
    ----------
    generation, form, head, count, seconds
        As for `answer_whole`.
    with_usage : bool
        Whether a last event has the numbers of tokens.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        form: AnswerForm,
        head: dict[str, Any],
        count: int,
        seconds: float,
        with_usage: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._form, self._count = generation, form, count
        self._head = {**head, "object": form.piece_object}
        self._end = time.monotonic() + seconds
        self._with_usage = with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the answers have ended, the client has left, or time is up."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = _DONE
        try:
            left = max(self._end - time.monotonic(), 0.01)
            await while_there(receive, self._send_events(send), left)
        except ClientLeftError:
            return
        except ApiError as error:
            last = _event(error.body())
        finally:
            self._generation.cancel()
        # Where the client does not read, the connection is ended by its write timeout.
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _events(self) -> AsyncIterator[bytes]:
        opened: set[int] = set()
        async for arrived in self._generation.pieces():
            if not arrived:
                yield _COMMENT
            choices = []
            for index, emitted in arrived:
                if index not in opened:
                    opened.add(index)
                    choices.append(self._form.opening(index))
                choices.append(self._form.piece(index, emitted))
            events = b"".join(self._chunk([choice]) for choice in choices if choice is not None)
            if events:
                yield events
        if self._with_usage:
            yield self._chunk([], usage(self._generation))

    def _chunk(self, choices: list[dict[str, Any]], told: dict[str, Any] | None = None) -> bytes:
        content = {**self._head, "choices": choices}
        if self._with_usage:
            content["usage"] = told
        return _event(content)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
