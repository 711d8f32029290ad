"""The engine in one process: what it generates is what the model alone generates, one text at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeless_opt.problems.errors import FormatError, InvalidPlanError, ProblemError
from moeless_opt.runtime.serve import (
    Emitted,
    EngineBusyError,
    EngineStoppedError,
    Planning,
    Sampling,
    ServeEngine,
    ServeRequest,
)
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet
from moeless_opt.runtime.tiny_moe import model as tiny

PROMPTS = [tiny.encode(text) for texts in tiny.PROMPTS.values() for text in texts]


class Desk:
    """Hands requests in and keeps what comes back."""

    def __init__(self, engine: ServeEngine) -> None:
        self.engine = engine
        self.out: dict[str, list[Emitted]] = {}
        self.ended: dict[str, threading.Event] = {}

    def send(self, name: str, prompt: list[int], client: str = "", **sampling: Any) -> None:
        self.out[name], self.ended[name] = [], threading.Event()
        given = {"temperature": 0.0, "max_tokens": 16, "ignore_end": True} | sampling
        request = ServeRequest(id=name, prompt=tuple(prompt), sampling=Sampling(**given), client=client)
        try:
            self.engine.submit(request, self.take)
        except EngineBusyError:
            del self.ended[name]
            raise

    def take(self, emitted: Emitted) -> None:
        self.out[emitted.request].append(emitted)
        if emitted.finish is not None:
            self.ended[emitted.request].set()

    def tokens(self, name: str) -> list[int]:
        assert self.ended[name].wait(60), f"{name} did not end"
        return [e.token for e in self.out[name] if e.token is not None]

    def text(self, name: str) -> str:
        self.tokens(name)
        return "".join(e.text for e in self.out[name])

    def finish(self, name: str) -> str | None:
        self.tokens(name)
        return self.out[name][-1].finish


@pytest.fixture(scope="module")
def engine() -> Iterator[ServeEngine]:
    made = Fleet(
        EngineOptions(token_budget=24, max_running=8, max_waiting=24, kv_blocks=96, context_length=256)
    )
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone() -> Any:
    """Greedy tokens without cache and batch."""
    model = tiny.load()
    known: dict[tuple[int, ...], list[int]] = {}

    def run(prompt: list[int], count: int) -> list[int]:
        tokens = known.setdefault(tuple(prompt), list(prompt))
        while len(tokens) < len(prompt) + count:
            inputs = torch.tensor([tokens])
            with torch.no_grad():
                logits = model(inputs, torch.arange(len(tokens))[None], None)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) : len(prompt) + count]

    return run


def test_batched_and_cached_is_what_the_model_says_alone(engine: ServeEngine, alone: Any) -> None:
    desk = Desk(engine)
    long = tiny.encode("And the king said unto him, " * 6)  # several pieces of the token budget
    prompts = [*PROMPTS, long, long[:100]]
    for number, prompt in enumerate(prompts):
        desk.send(f"a{number}", prompt, max_tokens=4 + number % 5)
    for number, prompt in enumerate(prompts):
        assert desk.tokens(f"a{number}") == alone(prompt, 4 + number % 5)
        assert desk.finish(f"a{number}") == "length"
    desk.send("again", long)
    assert desk.tokens("again") == alone(long, 16)
    assert desk.out["again"][0].cached >= 128  # the blocks of the first time
    status = engine.status()
    assert status.finished["length"] >= len(prompts)
    assert status.kv_blocks_used == 0 or status.running


def test_samples_do_not_depend_on_the_batch(engine: ServeEngine) -> None:
    desk = Desk(engine)
    rule = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "seed": 7}
    desk.send("lonely", PROMPTS[0], **rule)
    lonely = desk.tokens("lonely")
    for number in range(6):
        desk.send(f"b{number}", PROMPTS[number + 1], temperature=1.0, seed=number)
    desk.send("crowded", PROMPTS[0], **rule)
    desk.send("other seed", PROMPTS[0], **(rule | {"seed": 8}))
    assert desk.tokens("crowded") == lonely
    assert desk.tokens("other seed") != lonely


def test_stop_texts_end_tokens_and_probabilities(engine: ServeEngine) -> None:
    desk = Desk(engine)
    desk.send("whole", PROMPTS[2], max_tokens=40, logprobs=3)
    text = desk.text("whole")
    stop = text[10:13]
    desk.send("stopped", PROMPTS[2], max_tokens=40, stop=(stop,))
    assert desk.text("stopped") == text[: text.index(stop)]
    assert desk.finish("stopped") == "stop"
    first = desk.out["whole"][0]
    assert first.logprob is not None
    assert first.top[0] == (first.token, pytest.approx(first.logprob))
    assert len(first.top) == 3


def test_cancelled_requests_end_soon_and_free_their_blocks(engine: ServeEngine) -> None:
    desk = Desk(engine)
    desk.send("gone", PROMPTS[4], max_tokens=200)
    desk.send("stays", PROMPTS[5], max_tokens=8)
    engine.cancel("gone")
    engine.cancel("never was")
    assert desk.finish("gone") == "cancelled"
    assert len(desk.tokens("gone")) < 150
    assert len(desk.tokens("stays")) == 8


def test_what_cannot_be_served_is_refused_by_name(engine: ServeEngine) -> None:
    desk = Desk(engine)
    for prompt, name in (
        ([], "prompt: is empty"),
        ([5] * 256, "prompt: has 256 tokens"),
        ([9999], "prompt: has tokens"),
    ):
        with pytest.raises(ProblemError, match=name):
            desk.send("bad", prompt)
    desk.send("twin", PROMPTS[0], max_tokens=30)
    with pytest.raises(ProblemError, match="in use"):
        engine.submit(ServeRequest(id="twin", prompt=(1,)), desk.take)
    desk.tokens("twin")


def test_a_flood_is_turned_away_and_the_others_are_served(engine: ServeEngine) -> None:
    desk, refused = Desk(engine), 0
    for number in range(80):
        try:
            desk.send(f"f{number}", PROMPTS[number % 16], max_tokens=3)
        except EngineBusyError as error:
            refused += error.retry_after > 0
    assert refused >= 30
    for name in desk.ended:
        assert len(desk.tokens(name)) == 3


def test_others_get_in_beside_a_flood(engine: ServeEngine) -> None:
    desk = Desk(engine)
    for number in range(32):
        desk.send(f"f{number}", PROMPTS[0], "many", max_tokens=24)
    with pytest.raises(EngineBusyError):
        engine.check_room("many")
    engine.check_room("one")
    desk.send("mine", PROMPTS[0], "one", max_tokens=3)
    assert len(desk.tokens("mine")) == 3
    # Those of the flood that came before and are not in the batch still wait.
    assert sum(not event.is_set() for event in desk.ended.values()) > 10
    for name in desk.ended:
        desk.tokens(name)


def test_plans_come_out_and_go_in(engine: ServeEngine) -> None:
    desk = Desk(engine)
    desk.send("some", PROMPTS[0])
    desk.tokens("some")
    plan = engine.plan()
    assert plan.slots_LGC.shape[:2] == (6, 1)
    assert engine.apply(plan).kind == "given"
    assert engine.apply({"slots": plan.slots_LGC.tolist()}).kind == "given"
    for wrong, error in (
        ({}, ProblemError),
        ({"slots": [[[0, 1]]] * 6}, ProblemError | InvalidPlanError),
        ({"slots": plan.slots_LGC[:5].tolist()}, ProblemError),
    ):
        with pytest.raises(error if isinstance(error, type) else (ProblemError, InvalidPlanError)):
            engine.apply(wrong)
    assert engine.set_planning(paused=True).paused
    assert not engine.set_planning(paused=False, every=5).paused
    assert engine.planning().every == 5
    for change in ({"policy": "magic"}, {"every": 0}, {"nothing": 1}, {"slots": 1}, {"slots": 17}):
        with pytest.raises(ProblemError, match=f"^{next(iter(change))}"):
            engine.set_planning(**change)
    assert engine.planning().every == 5


def test_it_ends_in_order() -> None:
    made = Fleet(EngineOptions(planning=Planning(policy="static"), context_length=128, kv_blocks=16))
    with pytest.raises(EngineStoppedError):
        Desk(made).send("early", PROMPTS[0])
    made.start()
    desk = Desk(made)
    desk.send("taken", PROMPTS[0], max_tokens=40)
    assert made.drain(60)
    assert len(desk.tokens("taken")) == 40
    with pytest.raises(EngineStoppedError):
        desk.send("late", PROMPTS[0])
    made.close()
    made.close()


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no folder"):
        Fleet(EngineOptions(model=str(tmp_path / "nothing")))
    with pytest.raises(ProblemError, match="context_length"):
        Fleet(EngineOptions(context_length=100_000))
    assert np.isfinite(EngineOptions().timeout)


def test_a_state_that_can_no_longer_be_written_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a pool of few blocks is the context that clients are told."""
    folder = tmp_path / "gone"
    folder.mkdir()
    options = EngineOptions(kv_blocks=2, state=str(folder / "state.json"))
    made = Fleet(options)
    folder.rmdir()
    made.start()
    try:
        desk = Desk(made)
        for name in ("a", "b"):
            desk.send(name, tiny.encode("And"), max_tokens=100)
            assert len(desk.tokens(name)) == 32 - 4
        assert made.context_length == 32
        with pytest.raises(ProblemError, match="room for 31"):
            desk.send("c", tiny.encode("A" * 40))
    finally:
        made.close()
    assert [record.message.split(":")[0] for record in caplog.records] == ["the state is not kept"]


def test_settings_outlive_a_restart_but_not_one_that_asks_for_others(tmp_path: Path) -> None:
    state = str(tmp_path / "state.json")
    for asked, found in ((64, 64), (64, 9), (5, 5)):
        made = Fleet(EngineOptions(kv_blocks=2, state=state, planning=Planning(every=asked)))
        made.start()
        try:
            Desk(made).send("a", tiny.encode("And"), max_tokens=2)
            end = time.monotonic() + 20
            while made.planning().every != found:
                assert time.monotonic() < end
                time.sleep(0.05)
            made.set_planning(every=9)
        finally:
            made.close()
