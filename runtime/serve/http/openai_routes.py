"""``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moeless_opt import __version__
from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.serve.http.answering import AnswerStream, answer_whole
from moeless_opt.runtime.serve.http.errors import ApiError, api_error_of
from moeless_opt.runtime.serve.http.forms import AnswerForm, ChatForm, CompletionForm
from moeless_opt.runtime.serve.http.front import HttpFront
from moeless_opt.runtime.serve.http.generation import Generation
from moeless_opt.runtime.serve.http.schemas import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    sampling_of,
)

__all__ = ["refusals", "router"]

FINGERPRINT = f"moeless-opt-{__version__}"
DEFAULT_LENGTH = 16
"""Tokens of a completion that asks for no number, as OpenAI has it."""

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_TOLD = {
    400: "What is asked for is wrong",
    401: "No API key, or an unknown one",
    403: "Called by a name that is not this server's, or with a key that may not do this",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not `application/json`",
    429: "The queue is full; `Retry-After` says when to try again",
    500: "The engine failed",
    503: "Loading, shutting down, too many connections, or the engine has failed",
    504: "The answer took too long",
}


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """How errors are told, for the OpenAPI document; every request can be refused for the first ones."""
    return {code: {"model": ErrorAnswer, "description": _TOLD[code]} for code in (400, 401, 403, 503, *codes)}


def _streams(what: str) -> dict[int | str, dict[str, Any]]:
    event = {"schema": {"type": "string"}, "description": f"Server-sent events: {what}, then `[DONE]`"}
    return {200: {"content": {"text/event-stream": event}, "description": "The answers"}}


def _front(request: Request) -> HttpFront:
    front: HttpFront = request.app.state.front
    return front


def _card(front: HttpFront) -> ModelCard:
    name = front.check_model(None)
    return ModelCard(
        id=name, created=front.created, owned_by="moeless-opt", max_model_len=front.engine.context_length
    )


@router.get("/models", summary="The models that are served", responses=refusals())
async def list_models(request: Request) -> ModelList:
    """One: this server's."""
    return ModelList(data=[_card(_front(request))])


@router.get("/models/{model:path}", summary="One model", responses=refusals(404))
async def get_model(request: Request, model: str) -> ModelCard:
    """The model of that name."""
    _front(request).check_model(model)
    return _card(_front(request))


@router.post(
    "/completions",
    summary="Continue texts",
    response_model=CompletionAnswer,
    responses=_streams("pieces of the texts") | refusals(404, 408, 413, 415, 429, 500, 504),
)
async def create_completion(asked: CompletionRequest, request: Request) -> Response:
    """Continue one or more texts; with ``stream`` as server-sent events."""
    front = _front(request)
    front.check_model(asked.model)
    if asked.echo and asked.logprobs is not None:
        raise ApiError(400, "echo: is not supported together with logprobs", param="echo")
    texts = _texts(asked.prompt)
    _check_count(front, len(texts) * (asked.n or 1))
    prompts = [await front.tokens("prompt", text) if isinstance(text, str) else text for text in texts]
    echoes = [_echo(front, text) if asked.echo else "" for text in texts]
    times = asked.n or 1
    prompts = [prompt for prompt in prompts for _ in range(times)]
    echoes = [echo for echo in echoes for _ in range(times)]
    form = CompletionForm(front.engine.codec, asked.logprobs is not None, echoes)
    most = [
        front.room("prompt", prompt, asked.max_tokens) or _default_length(front, prompt) for prompt in prompts
    ]
    return await _answer(request, asked, prompts, most, asked.logprobs, form)


@router.post(
    "/chat/completions",
    summary="Answer conversations",
    response_model=ChatAnswer,
    responses=_streams("pieces of the answer") | refusals(404, 408, 413, 415, 429, 500, 504),
)
async def create_chat_completion(asked: ChatRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` as server-sent events."""
    front = _front(request)
    front.check_model(asked.model)
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs = true", param="top_logprobs")
    count = asked.n or 1
    _check_count(front, count)
    prompt = await front.chat_tokens([message.plain() for message in asked.messages])
    wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    most = front.room("messages", prompt, wanted)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    form = ChatForm(front.engine.codec, logprobs is not None)
    return await _answer(request, asked, [prompt] * count, [most] * count, logprobs, form)


def _texts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Every prompt of a request, as text or as tokens."""
    if isinstance(prompt, str):
        return [prompt]
    tokens: list[int] = []
    texts: list[str | list[int]] = []
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
        else:
            texts.append(part)
    return texts or [tokens]


def _echo(front: HttpFront, text: str | list[int]) -> str:
    return text if isinstance(text, str) else front.engine.codec.decode(text)


def _default_length(front: HttpFront, prompt: Sequence[int]) -> int:
    return min(DEFAULT_LENGTH, front.engine.context_length - len(prompt))


def _check_count(front: HttpFront, count: int) -> None:
    most = front.options.max_choices
    if count > most:
        raise ApiError(400, f"n: {count} answers are asked for, at most {most} are given", param="n")


async def _answer(
    request: Request,
    asked: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int | None],
    logprobs: int | None,
    form: AnswerForm,
) -> Response:
    front, count = _front(request), len(prompts)
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: needs stream = true", param="stream_options")
    try:
        samplings = [
            sampling_of(asked, seed, length, logprobs)
            for seed, length in zip(front.seeds(asked.seed, count), most, strict=True)
        ]
    except MoelessError as error:
        raise api_error_of(error) from error
    name = form.prefix + request.state.request_id
    head = {
        "id": name,
        "created": int(time.time()),
        "model": front.engine.model,
        "system_fingerprint": FINGERPRINT,
    }
    generation = Generation(front.engine, front.mailbox, front.metrics, name, request.state.client)
    try:
        generation.submit(prompts, samplings)
    except ApiError as error:
        if error.code == "stopped":
            front.reason = error.message
        raise
    seconds = front.options.request_timeout
    if not asked.stream:
        return await answer_whole(generation, form, head, count, request.receive, seconds)
    told = asked.stream_options is not None and asked.stream_options.include_usage
    return AnswerStream(generation, form, head, count, seconds, told)
