"""The live page in a real browser, the system's headless Chromium: it loads, updates, shows a re-plan."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moeless_opt as mo
from moeless_opt.problems.io import plan_to_json
from tests.runtime.serve.doubles import RoteEngine

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not work for root, in whose place checks often run.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = driver.chromium.launch(executable_path=program, args=options)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test if a script fails on it, or anything else than the server is asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    found.on("request", lambda request: wrong.append(request.url) if "127.0.0.1" not in request.url else None)
    found.wrong = wrong
    yield found
    context.close()


def until(page: Any, true: str) -> None:
    """Wait for a condition (playwright's own way would need what the page's policy forbids)."""
    end = time.monotonic() + 30
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        page.wait_for_timeout(50)


def picture(page: Any, name: str) -> None:
    """Keep a picture where ``MOELESS_PICTURES`` says."""
    folder = os.environ.get("MOELESS_PICTURES")
    if folder:
        page.screenshot(path=Path(folder) / name, full_page=True)


def test_the_page_loads_updates_and_shows_a_replan(serving: Callable[..., Any], page: Any) -> None:
    engine = RoteEngine()
    with serving(engine) as served:
        page.goto(served.address)
        page.wait_for_selector("#state.ready")
        assert "rote on 2 ranks" in page.inner_text("#model")
        until(page, "document.querySelector('#latency svg path') !== null")
        assert page.evaluate("document.querySelector('#heat').dataset.rows") == "2"
        assert page.evaluate("document.querySelector('#experts').dataset.columns") == "8"
        before = page.inner_text("#tile-rate small")
        served.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 60})
        until(page, f"document.querySelector('#tile-rate small').textContent !== {before!r}")
        assert "60 so far" in page.inner_text("#tile-rate small")
        until(page, "document.querySelector('#tile-ttft dd').textContent !== '\u2013'")
        assert page.locator("#plans tbody tr").count() == 0
        served.ask(
            "POST", "/v1/plan", plan_to_json(mo.plan(engine.load_LE[:, ::-1], mo.uniform(1, 2, slots=5)))
        )
        page.wait_for_selector("#plans tbody tr")
        row = page.inner_text("#plans tbody tr")
        assert "given" in row
        assert "1.40 → 1.10" in row
        assert "21 %" in row
        until(page, "document.querySelector('#imbalance svg .mark') !== null")
        picture(page, "page.png")
    page.wait_for_selector("#state.off", timeout=20000)
    assert [text for text in page.wrong if "ERR_CONNECTION_REFUSED" not in text] == []


def test_the_page_is_for_keyboards_and_for_the_night(serving: Callable[..., Any], page: Any) -> None:
    engine = RoteEngine()
    with serving(engine) as served:
        page.emulate_media(color_scheme="dark")
        page.goto(served.address)
        page.wait_for_selector("#state.ready")
        until(page, "document.querySelector('#heat-read').textContent !== ''")
        night = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.keyboard.press("t")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != night
        page.focus("#experts")
        for key in ("ArrowDown", "End", "ArrowLeft"):
            page.keyboard.press(key)
        told = page.inner_text("#experts-read")
        assert told.startswith("Layer 3, expert 6: 2 replicas")
        assert "% of the layer's load" in told
        page.focus("#pause")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#policy').textContent.includes('paused')")
        assert engine.settings.paused
        page.set_viewport_size({"width": 360, "height": 740})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, "nothing is cut off on a phone"
        assert page.wrong == []


def test_the_page_asks_for_the_key(serving: Callable[..., Any], page: Any) -> None:
    with serving(RoteEngine(), api_keys=("secret",)) as served:
        page.goto(served.address)
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#secret", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#state.ready")
        assert page.is_hidden("#key")
        assert "secret" not in page.url
