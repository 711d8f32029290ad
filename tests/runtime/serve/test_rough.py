"""Clients that break off, read slowly, trickle, vanish, or come all at once; nobody else may suffer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.runtime.serve.doubles import RoteEngine

pytest.importorskip("fastapi", reason="needs the extra 'serve'")


def raw(body: Any, *, close: bool = True) -> bytes:
    """A request for a completion as it goes over the wire."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n" + ("Connection: close\r\n" if close else "")
    return head.encode() + b"\r\n" + content


async def ask(port: int, body: Any, patience: float | None = None) -> tuple[int, bytes]:
    """Status and content; 0 where the client broke off after `patience` seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw(body))
        answer = await asyncio.wait_for(reader.read(), patience)
    except TimeoutError:
        return 0, b""
    finally:
        writer.transport.abort()
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), content


def settle(engine: RoteEngine) -> None:
    """Wait until nothing runs any longer."""
    end = time.monotonic() + 20
    while engine.queue:
        assert time.monotonic() < end, f"{len(engine.queue)} requests run on although nobody waits for them"
        time.sleep(0.01)


def test_a_thousand_requests_with_random_cancellation(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.001, room=32, capacity=2000)
    rng = random.Random(5)

    async def all_of_them(port: int) -> list[tuple[int, bytes]]:
        gate = asyncio.Semaphore(64)

        async def one(k: int) -> tuple[int, bytes]:
            async with gate:
                # Shorter than any answer takes: who leaves does not hang on the speed of the machine.
                patience = rng.choice([None, rng.uniform(0, 0.2)])
                return await ask(port, {"prompt": "x", "max_tokens": 200, "stream": k % 2 == 0}, patience)

        return await asyncio.gather(*(one(k) for k in range(1000)))

    with serving(engine) as served:
        found = asyncio.run(all_of_them(served.port))
        settle(engine)
        whole = [content for status, content in found if status]
        assert {status for status, _ in found} == {0, 200}
        assert 200 < len(whole) < 950
        assert all(content.count(b"[DONE]") == 1 or b'"usage"' in content for content in whole)
        assert served.ask("GET", "/healthz")[0] == 200
    assert engine.finished["cancelled"] > 20
    assert engine.finished["length"] >= len(whole)
    assert engine.finished["error"] == 0


def test_a_client_that_does_not_read_costs_only_itself(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.0, context=2**20)
    with serving(engine, write_timeout=1.0) as served:
        slow = socket.create_connection(("127.0.0.1", served.port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(raw({"prompt": "x", "max_tokens": 40000, "stream": True}))
        begun = time.monotonic()
        while time.monotonic() < begun + 0.5:
            assert served.ask("POST", "/v1/completions", {"prompt": "y", "max_tokens": 5})[0] == 200
        settle(engine)  # the engine does not wait for whoever reads slowly
        end = time.monotonic() + 20
        while served.server._front.connections() and time.monotonic() < end:
            time.sleep(0.1)
        assert served.server._front.connections() == 0, "its connection is ended"
        slow.close()


def test_a_slow_reader_gets_all_of_it(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(context=2**20), write_timeout=10.0) as served:
        slow = socket.create_connection(("127.0.0.1", served.port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(raw({"prompt": "x", "max_tokens": 1500, "stream": True}))
        content = b""
        while part := slow.recv(65536):
            content += part
            time.sleep(0.005)
        slow.close()
    assert content.count(b"data: {") == 1500
    assert b"data: [DONE]" in content


def test_clients_that_vanish_free_the_engine(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.005, room=64)
    with serving(engine) as served:
        for k in range(20):
            gone = socket.create_connection(("127.0.0.1", served.port))
            gone.sendall(raw({"prompt": "x", "max_tokens": 400, "stream": bool(k % 2), "n": 2}))
            if k % 4 == 1:
                gone.recv(100)
            # Reset in place of an orderly end.
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.close()
        settle(engine)
        assert served.ask("POST", "/v1/completions", {"prompt": "x"})[0] == 200
    assert engine.finished["length"] <= 1


def test_a_flood_of_ten_times_the_capacity(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.005, room=8, capacity=12)
    body = {"prompt": "x", "max_tokens": 20}

    async def flood(port: int) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        early = [asyncio.ensure_future(ask(port, body | {"stream": True})) for _ in range(20)]
        while len(engine.seen) < 20:
            await asyncio.sleep(0.005)
        rest = await asyncio.gather(*(ask(port, body) for _ in range(200)))
        return await asyncio.gather(*early), rest

    with serving(engine) as served:
        early, rest = asyncio.run(flood(served.port))
        assert [status for status, _ in early] == [200] * 20, "who was there first does not suffer"
        assert all(content.count(b"data: {") == 20 for _, content in early)
        codes = [status for status, _ in rest]
        assert set(codes) <= {200, 429}
        assert codes.count(429) > 100
        told = next(json.loads(content) for status, content in rest if status == 429)
        assert told["error"]["type"] == "rate_limit_error"
        assert served.ask("POST", "/v1/completions", body)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: "])
def test_heads_that_do_not_come_end_the_connection(serving: Callable[..., Any], sent: bytes) -> None:
    with serving(RoteEngine(), head_timeout=0.3) as served:
        silent = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        silent.sendall(sent)
        assert _ended(silent) == b""


def test_endless_heads_are_told(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), head_timeout=300) as served:
        endless = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        endless.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Endless: ")
        with contextlib.suppress(OSError):  # it is refused in the midst
            for _ in range(200):
                endless.sendall(b"x" * 10000)
                time.sleep(0.001)
        assert served.ask("GET", "/healthz", headers={"X-Long": "x" * 8000})[0] == 200
        told = _ended(endless)
        assert told.startswith(b"HTTP/1.1 400") or told == b"", "a reset may overtake the answer"


def test_the_head_of_a_later_request_has_its_limit_too(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), head_timeout=0.3) as served:
        again = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        again.sendall(raw({"prompt": "x"}, close=False))
        assert again.recv(65536).startswith(b"HTTP/1.1 200")
        again.sendall(b"POST /v1/compl")
        _ended(again)


def test_bodies_that_do_not_come_are_told(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), body_timeout=0.3) as served:
        slow = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        slow.sendall(raw({"prompt": "x"})[:-3])
        assert _ended(slow).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("chunked", [False, True])
def test_huge_bodies_are_told_before_they_have_come(serving: Callable[..., Any], chunked: bool) -> None:
    with serving(RoteEngine(), max_body=1000) as served:
        huge = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {10**15}"
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        huge.sendall(f"{head}{size}\r\n\r\n".encode() + (b"7d0\r\n" if chunked else b"") + b" " * 2000)
        assert _ended(huge).startswith(b"HTTP/1.1 413")


def test_too_many_connections_are_told_and_the_watchers_let_in(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), max_connections=5) as served:
        held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(6)]
        time.sleep(0.2)
        status, headers, told = served.ask("POST", "/v1/completions", {"prompt": "x"})
        assert (status, told["error"]["code"]) == (503, "too_many_connections")
        assert "retry-after" in headers
        assert served.ask("GET", "/healthz")[0] == 200
        more = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(12)]
        assert _ended(more[-1]) == b"", "above twice as many there is no answer"
        for one in (*held, *more):
            one.close()
        end = time.monotonic() + 20
        while served.server._front.connections() > 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert served.ask("POST", "/v1/completions", {"prompt": "x"})[0] == 200


def test_requests_that_take_too_long_are_told(serving: Callable[..., Any]) -> None:
    engine = RoteEngine(pace=0.1)
    with serving(engine, request_timeout=0.5) as served:
        body = {"prompt": "x", "max_tokens": 400}
        assert served.ask("POST", "/v1/completions", body)[0] == 504
        status, _, content = served.ask("POST", "/v1/completions", body | {"stream": True})
        assert status == 200
        assert '"code":"timeout"' in content.rpartition("data: ")[2]
        settle(engine)


def _ended(connection: socket.socket) -> bytes:
    """What still comes until the server ends the connection."""
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return content
