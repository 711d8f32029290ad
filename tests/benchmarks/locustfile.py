"""Users for `serve_load`: they continue texts of eight domains, and one after the other is in fashion."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from locust import FastHttpUser, constant_throughput, task

# Openings of the small model's domains; here in short, for locust changes sockets before torch may be loaded.
DOMAINS = (
    ("def __init__(self, name, value=None):\n        self.", "import os\nimport sys\n\nclass "),
    ("And the king said unto him, ", "  3 And it came to pass in those days, that "),
    ("Die Freiheit ist ", "Wenn man nicht weiß, was man will, "),
    ("La vida es ", "El hombre que no "),
    ("Жизнь — это ", "Если человек не "),
    ("春眠不觉晓", "人生"),
    ("    $( The proof of ~ syl uses ", "      ( wph wps wch "),
    ("12 + 30 = ", "3, 5, 7, 9, "),
)
RATE, SECONDS = os.environ.get("SERVE_RATE", ""), float(os.environ.get("SERVE_SECONDS", "60"))
BEGUN = time.monotonic()


class Reader(FastHttpUser):
    """Asks for a stream, and reads it to its end."""

    if RATE:
        wait_time = constant_throughput(float(RATE))

    def on_start(self) -> None:
        """Not all at once."""
        if RATE:
            time.sleep(random.random() / float(RATE))  # of locust's green threads

    @task
    def read(self) -> None:
        """Three of four texts are of the domain of the hour."""
        hour = int(8 * (time.monotonic() - BEGUN) / SECONDS) % 8
        domain = DOMAINS[hour] if random.random() < 0.75 else random.choice(DOMAINS)
        body = {
            "prompt": random.choice(domain) * random.randint(1, 4),
            "max_tokens": max(1, min(int(random.lognormvariate(3.0, 0.7)), 128)),
            "temperature": random.choice([0.0, 1.0]),
            "stream": True,
        }
        begun = time.perf_counter()
        last, tokens = begun, 0
        fault: Exception | None = None
        with self.client.post(
            "/v1/completions", json=body, stream=True, name="head", catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            answer.success()
            ended = False
            while line := answer.stream.readline(b"\n\n"):
                now = time.perf_counter()
                told = line.strip().removeprefix(b"data: ")
                if told == b"[DONE]":
                    ended = True
                    break
                if told.startswith(b'{"error"'):
                    fault = RuntimeError(told.decode())
                    break
                self._tell("token to token" if tokens else "first token", now - last)
                last, tokens = now, tokens + 1
            if not ended and fault is None:
                fault = RuntimeError("the stream broke off")
        self._tell("whole", time.perf_counter() - begun, fault)

    def _tell(self, name: str, seconds: float, fault: Exception | None = None) -> None:
        fire: Any = self.environment.events.request.fire
        fire(
            request_type="stream", name=name, response_time=1000 * seconds, response_length=0, exception=fault
        )
