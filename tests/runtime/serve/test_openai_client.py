"""The official client of OpenAI's API, unchanged, against the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.runtime.serve.doubles import RoteEngine

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def served(serving: Callable[..., Any]) -> Iterator[Any]:
    with serving(RoteEngine(room=4, capacity=8), api_keys=("key",)) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="key", max_retries=0) as found:
        yield found


CHAT: list[dict[str, str]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
]


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "rote"
    assert client.models.retrieve("rote").object == "model"


def test_completions_and_streams_agree(client: Any) -> None:
    asked = {"model": "rote", "prompt": "hello", "max_tokens": 5, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == 5
    assert len(whole.choices[0].logprobs.tokens) == 5
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert pieces[-1].usage.completion_tokens == 5
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_conversations_and_streams_agree(client: Any) -> None:
    asked: dict[str, Any] = {"model": "rote", "messages": CHAT, "max_completion_tokens": 6, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(p.choices[0].delta.content or "" for p in pieces)
    assert text == whole.choices[0].message.content
    with client.chat.completions.stream(**asked, stop=text[4]) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content == text[:4]
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_errors_are_the_clients_own(served: Any, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="rote", prompt="x", temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="rote", prompt="x" * 600)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_a_full_queue_is_told_and_the_client_tries_again(served: Any) -> None:
    engine = served.engine

    async def ask(retries: int) -> list[Any]:
        address = f"{served.address}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=retries) as client:
            calls = (client.completions.create(model="rote", prompt="x", max_tokens=20) for _ in range(24))
            return await asyncio.gather(*calls, return_exceptions=True)

    engine.pace = 0.02
    try:
        found = asyncio.run(ask(0))
        refused = [one for one in found if isinstance(one, openai.RateLimitError)]
        assert len(found) - len(refused) >= 12
        assert refused
        assert all(one.response.headers["retry-after"] == "2" for one in refused)
        assert all(one.choices[0].finish_reason == "length" for one in found if one not in refused)
        assert all(one.usage.completion_tokens == 20 for one in asyncio.run(ask(5)))
    finally:
        engine.pace = 0.0


def test_a_client_that_breaks_off_frees_the_engine(served: Any, client: Any) -> None:
    engine = served.engine
    engine.pace = 0.02
    try:
        before = engine.finished["cancelled"]
        with client.completions.create(model="rote", prompt="x", max_tokens=400, stream=True) as stream:
            next(iter(stream))
        for _ in range(500):
            if engine.finished["cancelled"] == before + 1:
                break
            asyncio.run(asyncio.sleep(0.01))
        assert engine.finished["cancelled"] == before + 1
        assert not engine.queue
    finally:
        engine.pace = 0.0
