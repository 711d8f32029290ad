"""Several ranks: the same tokens through every re-placement, and when ranks are lost; restarts."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.serve import Emitted, Planning, Sampling, ServeRequest
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet
from moeless_opt.runtime.tiny_moe import model as tiny

PROMPTS = [tiny.encode(texts[0]) for texts in tiny.PROMPTS.values()]


class Round:
    """Greedy answers to all prompts, at once."""

    def __init__(self, engine: Fleet, tag: str, length: int = 16) -> None:
        self.out: dict[str, list[Emitted]] = {f"{tag}{i}": [] for i in range(len(PROMPTS))}
        self.left = len(PROMPTS)
        self.over = threading.Event()
        for name, prompt in zip(self.out, PROMPTS, strict=True):
            rule = Sampling(temperature=0, max_tokens=length, ignore_end=True)
            engine.submit(ServeRequest(id=name, prompt=tuple(prompt), sampling=rule), self.take)

    def take(self, emitted: Emitted) -> None:
        self.out[emitted.request].append(emitted)
        if emitted.finish is not None:
            self.left -= 1
            if not self.left:
                self.over.set()

    def tokens(self) -> list[list[int | None]]:
        assert self.over.wait(90)
        assert {emitted[-1].finish for emitted in self.out.values()} == {"length"}
        return [[e.token for e in emitted] for emitted in self.out.values()]


def until(happens: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_tokens_are_the_same_through_plans_policies_and_the_loss_of_a_rank(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    options = EngineOptions(
        ranks=2,
        planning=Planning(policy="static", every=6),
        state=str(state),
        context_length=128,
        timeout=5.0,
    )
    engine = Fleet(options)
    engine.start()
    try:
        wanted = Round(engine, "static").tokens()
        model = tiny.load()
        for prompt, tokens in list(zip(PROMPTS, wanted, strict=True))[:3]:
            assert list(tiny.generate(model, bytes(prompt[1:]), 16)) == tokens
        for policy in ("windowed", "per-layer", "eplb", "moeless"):
            engine.set_planning(policy=policy)
            assert Round(engine, policy).tokens() == wanted
        until(lambda: engine.status().plans > 0)
        engine.set_planning(policy="static")

        live = engine.plan()
        other = np.ascontiguousarray(live.slots_LGC[:, ::-1])
        running = Round(engine, "given")
        event = engine.apply({"slots": other.tolist()})
        assert event.kind == "given"
        assert event.moves > 0
        assert running.tokens() == wanted
        mo.save_plan(engine.plan(), tmp_path / "plan.json")  # what comes out goes in
        assert engine.apply(json.loads((tmp_path / "plan.json").read_text())).kind == "given"
        with pytest.raises(ProblemError, match="3 ranks"):
            engine.apply({"slots": np.tile(np.arange(16), (6, 3, 1)).tolist()})
        with pytest.raises(ProblemError, match=r"^slots"):
            engine.apply({"slots": np.zeros((6, 2, 16), dtype=int).tolist()})
        until(lambda: engine.status().replicas_LE.sum() == np.count_nonzero(other >= 0))

        engine.set_planning(policy="windowed")
        running = Round(engine, "killed", 40)
        until(lambda: len(running.out["killed0"]) > 3)
        assert engine._crew is not None
        os.kill(engine._crew.processes[1].pid, signal.SIGKILL)
        assert [tokens[:16] for tokens in running.tokens()] == wanted
        status = until(lambda: s if (s := engine.status()).recoveries else None)
        assert status.ranks == 1
        assert status.retried > 0
        assert status.ready
        back(engine, 2)
        assert Round(engine, "back").tokens() == wanted
        engine.set_planning(policy="per-layer", keep_alive=5.0)
        running = Round(engine, "stopped", 40)
        until(lambda: len(running.out["stopped0"]) > 3)
        os.kill(engine._crew.processes[0].pid, signal.SIGSTOP)  # the first one, which speaks for all
        assert [tokens[:16] for tokens in running.tokens()] == wanted
        back(engine, 2)
        assert Round(engine, "again").tokens() == wanted
        status = engine.status()
        # More where a machine is so busy that a rank gives no sign of life for as long as is allowed.
        assert status.recoveries >= 2
        assert status.restarts >= 2
        assert engine.planning().policy == "per-layer"
        numbers = [event.number for event in status.events]
        assert numbers == sorted(set(numbers))
        told = [e.detail for e in status.events if e.kind == "ranks"]
        assert told[:2] == ["rank 1 left; 1 is there", "rank 1 came in; 2 are there"]
        assert "rank 0 left; 1 is there" in told
        assert told[-1].endswith("came in; 2 are there")
    finally:
        engine.close()


def back(engine: Fleet, ranks: int) -> None:
    """Wait until so many ranks serve and have said so."""
    until(lambda: engine.status().ranks == ranks and engine._group["ranks"] == ranks, 120)


@pytest.mark.slow
def test_switches_of_all_kinds_end_and_change_no_token() -> None:
    rng = random.Random(4)
    engine = Fleet(EngineOptions(ranks=2, context_length=64, planning=Planning(policy="static", every=3)))
    engine.start()
    try:
        wanted, running = Round(engine, "static", 6).tokens(), None
        for k in range(30):
            if running is None or running.over.is_set():
                assert running is None or running.tokens() == wanted
                running = Round(engine, f"{k}-", 6) if rng.random() < 0.7 else None
            if rng.random() < 0.2:
                slots_LGC = engine.plan().slots_LGC
                assert engine.apply({"slots": slots_LGC[:, ::-1].tolist()}).kind == "given"
                continue
            policy = rng.choice(("static", "windowed", "eplb", "moeless", "per-layer", "per-layer"))
            keep_alive = rng.choice((None, 0.0, 0.05, 5.0))
            idle_after, slots = rng.choice((None, 0.0, 0.1)), rng.choice((None, 8, 10, 16))
            paused, every = rng.random() < 0.15, rng.choice((1, 2, 3, 8))
            settings = Planning(
                policy=policy,
                paused=paused,
                every=every,
                slots=slots,
                keep_alive=keep_alive,
                idle_after=idle_after,
            )
            assert engine.set_planning(**asdict(settings)) == settings
        status = engine.status()
        assert status.plans > 0
        assert (status.recoveries, status.ranks) == (0, 2)
        assert not [e.detail for e in status.events if e.kind == "failed" and "given up" not in e.detail]
    finally:
        engine.close()


@pytest.mark.slow
def test_a_restart_begins_from_the_last_plan(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    slots = np.stack([np.stack([np.arange(15, 6, -1), np.arange(8, -1, -1)])] * 6)
    document = {
        "format": "moeless-serve-state",
        "version": 1,
        "model": "tiny-moe",
        "experts": 16,
        "slots": slots.tolist(),
        "load": np.ones((6, 16), dtype=int).tolist(),
        "planning": {"every": 7, "idle_after": 1.0},
    }
    state.write_text(json.dumps(document))
    engine = Fleet(EngineOptions(ranks=2, state=str(state), context_length=64))
    engine.start()
    try:
        until(lambda: any(e.kind == "restored" for e in engine.status().events))
        Round(engine, "first", 4).tokens()
        until(lambda: any(e.kind == "idle" for e in engine.status().events))
        until(lambda: engine.status().replicas_LE.sum() == 6 * 16)  # one of each is left
        Round(engine, "awake", 4).tokens()
        until(lambda: any(e.kind == "plan" for e in engine.status().events))  # and all are back
        assert [e.kind for e in engine.status().events][:3] == ["settings", "restored", "idle"]
        assert engine.planning().every == 7
        # What was sent is not lost with the traffic, also where nobody plans.
        engine.set_planning(policy="static", idle_after=0.5)
        engine.apply({"slots": slots.tolist()})
        until(lambda: engine.status().replicas_LE.sum() == 6 * 16)
        Round(engine, "static", 4).tokens()
        until(lambda: engine.status().replicas_LE.sum() == 6 * 18)
        assert engine.set_planning(idle_after=None, policy="static").policy == "static"
    finally:
        engine.close()
    saved = json.loads(state.read_text())
    assert (saved["experts"], saved["planning"]["policy"]) == (16, "static")
    assert np.shape(saved["slots"])[:2] == (6, 2)
