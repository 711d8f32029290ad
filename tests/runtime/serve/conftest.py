"""A served engine for tests: in this process, on a free port of the loopback."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest


@dataclass
class Served:
    """A server under test."""

    address: str
    engine: Any
    server: Any
    results: list[bool]
    thread: threading.Thread

    @property
    def port(self) -> int:
        found = urlsplit(self.address).port
        assert found is not None
        return found

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content (parsed where it is JSON) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        parsed = json.loads(content) if kind.startswith("application/json") else content.decode()
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, parsed


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """Serve an engine inside a ``with`` block: ``serving(engine, max_body=1000)``."""
    from moeless_opt.runtime.serve.http import HttpOptions, HttpServer

    @contextmanager
    def start(engine: Any, **options: Any) -> Iterator[Served]:
        server = HttpServer(engine, HttpOptions(port=0, **options))
        ready, results = threading.Event(), []

        def run() -> None:
            try:
                results.append(server.run(ready.set))
            finally:
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(60)
            yield Served(server.address, engine, server, results, thread)
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()

    return start
