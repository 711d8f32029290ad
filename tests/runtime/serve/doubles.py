"""An engine that continues every text by rote, for tests of what stands in front of engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.problems.errors import InvalidPlanError, ProblemError
from moeless_opt.problems.io.plans import plan_from_json
from moeless_opt.problems.plan import Plan
from moeless_opt.runtime.serve import (
    Deliver,
    Emitted,
    EngineBusyError,
    EngineStoppedError,
    PlanEvent,
    Planning,
    ServeRequest,
    ServeStatus,
)

RULES = ("resident", "passes", "functions")


class ByteCodec:
    """A token is a byte; 256 starts, 257 ends."""

    ends = frozenset({257})

    def encode(self, text: str) -> list[int]:
        return [256, *text.encode("utf-8", "replace")]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        return self.decode([token])

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ProblemError("messages", "must not begin with the assistant")
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))


class RoteEngine:
    """Continues every text with the alphabet, `pace` seconds a step, at most `room` at a time."""

    model = "rote"
    codec = ByteCodec()

    def __init__(
        self,
        *,
        pace: float = 0.0,
        room: int = 8,
        capacity: int = 64,
        context: int = 512,
        loading: float = 0.0,
    ) -> None:
        self.context_length = context
        self.pace, self.room, self.capacity, self.loading = pace, room, capacity, loading
        self.lock = threading.Condition()
        self.queue: list[list[Any]] = []
        self.seen: list[ServeRequest] = []
        self.cancelled: set[str] = set()
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.tokens = self.passes = 0
        self.stopping = False
        self.broken: str | None = None
        self.settings = Planning()
        self.events: list[PlanEvent] = []
        load_LE = np.arange(1, 9)[None].repeat(2, axis=0) * 10
        self.load_LE = load_LE
        self.placed = mo.plan(load_LE, mo.uniform(1, 2, slots=5))
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        time.sleep(self.loading)
        if self.broken is not None:
            raise ProblemError("--model", self.broken)
        self.thread.start()

    def check_room(self, client: str) -> None:
        with self.lock:
            if len(self.queue) >= self.room + self.capacity:
                raise EngineBusyError(self.capacity, 1.5)

    def submit(self, request: ServeRequest, deliver: Deliver) -> None:
        with self.lock:
            if self.stopping:
                raise EngineStoppedError("the engine is stopping")
            if len(request.prompt) >= self.context_length:
                raise ProblemError("prompt", f"has {len(request.prompt)} tokens, more than the context")
            if max(request.prompt) > 257:
                raise ProblemError("prompt", f"token {max(request.prompt)} is none of 0..257")
            self.check_room(request.client)
            self.seen.append(request)
            self.queue.append([request, deliver, 0, ""])
            self.lock.notify_all()

    def cancel(self, request: str) -> None:
        with self.lock:
            self.cancelled.add(request)

    def _run(self) -> None:
        while True:
            with self.lock:
                while not self.queue and not self.stopping:
                    self.lock.wait()
                if not self.queue and self.stopping:
                    return
                batch = list(self.queue[: self.room])
                self.passes += 1
            if self.pace:
                time.sleep(self.pace)
            for entry in batch:
                self._step(entry)

    def _step(self, entry: list[Any]) -> None:
        request, deliver, count, text = entry
        sampling = request.sampling
        if request.id in self.cancelled:
            self._end(entry, Emitted(request=request.id, finish="cancelled"))
            return
        token = ord("a") + (len(request.prompt) + count + sampling.seed * (sampling.temperature > 0)) % 26
        entry[2] = count = count + 1
        entry[3] = text = text + chr(token)
        most = sampling.max_tokens or self.context_length - len(request.prompt)
        finish, piece = None, chr(token)
        if any(stop in text for stop in sampling.stop):
            finish, piece = "stop", ""
        elif count >= most:
            finish = "length"
        top = tuple((ord("a") + k, -0.5 - k) for k in range(sampling.logprobs or 0))
        logprob = None if sampling.logprobs is None else -0.5
        self.tokens += 1
        told = Emitted(request=request.id, token=token, text=piece, logprob=logprob, top=top, finish=finish)
        if finish:
            self._end(entry, told)
        else:
            deliver(told)

    def _end(self, entry: list[Any], told: Emitted) -> None:
        with self.lock:
            if entry not in self.queue:
                return
            self.queue.remove(entry)
            assert told.finish is not None
            self.finished[told.finish] += 1
        entry[1](told)

    def drain(self, timeout: float | None = None) -> bool:
        with self.lock:
            self.stopping = True
            self.lock.notify_all()
        end = time.monotonic() + (timeout or 60)
        while self.queue and time.monotonic() < end:
            time.sleep(0.005)
        return not self.queue

    def close(self) -> None:
        with self.lock:
            self.stopping = True
            left = list(self.queue)
            self.lock.notify_all()
        for entry in left:
            self._end(entry, Emitted(request=entry[0].id, finish="error", error="the engine was closed"))

    def status(self) -> ServeStatus:
        with self.lock:
            running = min(len(self.queue), self.room)
            waiting = len(self.queue) - running
        replicas = np.stack([np.bincount(s[s >= 0], minlength=8) for s in self.placed.slots_LGC])
        return ServeStatus(
            ready=self.thread.is_alive(), ranks=2, running=running, waiting=waiting, capacity=self.capacity,
            kv_blocks=100, kv_blocks_used=running, kv_cached_blocks=1, passes=self.passes,
            prompt_tokens=len(self.seen), cached_tokens=0, generated_tokens=self.tokens,
            finished=dict(self.finished), retried=0, layers=(1, 3), load_LE=self.load_LE,
            tokens_LG=np.array([[10 + self.passes % 7, 20], [20, 10]]), replicas_LE=replicas,
            imbalance_L=np.array([1.3, 1.4]),
            largest_rows=13.0, mean_rows=10.0, plans=len(self.events), bytes_moved=1000 * len(self.events),
            plan_seconds=0.1, wait_seconds=0.2, cold_starts=3,
            cost=dict.fromkeys(RULES, (1.0 + 0.01 * self.passes, 2.0)), prediction_error=0.05, recoveries=0,
            restarts=0, events=tuple(self.events),
        )  # fmt: skip

    def plan(self) -> Plan:
        return self.placed

    def apply(self, plan: Plan | Mapping[str, Any]) -> PlanEvent:
        found = plan if isinstance(plan, Plan) else plan_from_json(plan)
        if found.slots_LGC.shape[0] != 2:
            raise InvalidPlanError(["the model has 2 layers"])
        self.placed = found
        return self.note(kind="given", moves=3, bytes=3000, imbalance_before=1.4, imbalance_after=1.1)

    def note(self, **fields: Any) -> PlanEvent:
        event = PlanEvent(number=len(self.events) + 1, at=time.time(), passes=self.passes, **fields)
        self.events.append(event)
        return event

    def planning(self) -> Planning:
        return self.settings

    def set_planning(self, **changes: Any) -> Planning:
        self.settings = replace(self.settings, **changes)
        return self.settings
