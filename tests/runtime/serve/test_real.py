"""The real engine behind HTTP, two ranks that re-plan: the official client, and the page in a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("megatron.core")
openai = pytest.importorskip("openai")

from moeless_opt.runtime.serve import Planning  # noqa: E402
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet  # noqa: E402
from tests.runtime.serve.test_page import browser, page, picture, until  # noqa: E402, F401

pytestmark = pytest.mark.slow

PLANNING = Planning(policy="windowed", every=8, paused=True)


@pytest.fixture(scope="module")
def real(serving: Callable[..., Any]) -> Iterator[Any]:
    engine = Fleet(EngineOptions(ranks=2, max_running=4, max_waiting=4, planning=PLANNING))
    with serving(engine, api_keys=("key",)) as found:
        yield found


@pytest.fixture(scope="module")
def client(real: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{real.address}/v1", api_key="key", max_retries=0) as found:
        yield found


def test_the_official_client_gets_what_it_asks_for(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-moe", "prompt": "La vida es ", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, n=2, logprobs=2)
    first, second = whole.choices
    assert first.text == second.text
    assert first.finish_reason == "length"
    assert len(first.logprobs.tokens) == len(first.logprobs.top_logprobs) == 12
    assert all(
        max(top.values()) == pytest.approx(own)
        for top, own in zip(first.logprobs.top_logprobs, first.logprobs.token_logprobs, strict=True)
    ), "greedy tokens are the likeliest"
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == first.text
    assert pieces[-1].usage.completion_tokens == 12
    stopped = client.completions.create(**asked, stop=first.text[4:6]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (first.text[: first.text.index(first.text[4:6])], "stop")
    chat: dict[str, Any] = {"model": "tiny-moe", "messages": [{"role": "user", "content": "12 + 30 = "}]}
    drawn = client.chat.completions.create(
        **chat, n=2, seed=5, max_completion_tokens=6, logprobs=True, top_logprobs=1
    )
    again = client.chat.completions.create(**chat, n=2, seed=5, max_completion_tokens=6)
    assert [c.message.content for c in drawn.choices] == [c.message.content for c in again.choices]
    assert len(drawn.choices[0].logprobs.content) == 6


def test_the_official_client_is_told_what_is_wrong(real: Any, client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-moe", "prompt": "x"}
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(**asked, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(**asked | {"prompt": "x" * 600})
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").completions.create(**asked)

    async def flood() -> list[Any]:
        address = f"{real.address}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0) as many:
            calls = (many.completions.create(**asked, max_tokens=60) for _ in range(40))
            return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(flood())
    refused = [one for one in found if isinstance(one, openai.RateLimitError)]
    assert len(refused) >= 20
    assert all(int(one.response.headers["retry-after"]) >= 1 for one in refused)
    assert all(one.usage.completion_tokens == 60 for one in found if one not in refused)


def test_the_page_shows_a_plan_that_the_controller_made(real: Any, client: Any, page: Any) -> None:  # noqa: F811
    page.goto(real.address)
    page.fill("#secret", "key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state.ready")
    assert "tiny-moe on 2 ranks" in page.inner_text("#model")
    assert page.evaluate("document.querySelector('#heat').dataset.rows") == "6"
    before = page.inner_text("#tile-rate small")
    planned = page.locator("#plans tbody tr", has=page.get_by_text("plan", exact=True))
    assert planned.count() == 0
    real.engine.set_planning(paused=False)
    client.completions.create(model="tiny-moe", prompt="import os\nimport sys\n" * 5, max_tokens=40, n=4)
    planned.first.wait_for(timeout=30000)
    until(page, f"document.querySelector('#tile-rate small').textContent !== {before!r}")
    moved = [event for event in real.engine.status().events if event.kind == "plan" and event.moves]
    assert moved
    until(page, "document.querySelector('#imbalance svg .mark') !== null")
    picture(page, "real.png")
    assert [text for text in page.wrong if "401" not in text] == []
