"""Rough clients on a real ``moeless-serve``: they break off, read slowly, vanish, and are ten times too many.

    python tests/benchmarks/serve_rough.py [--ranks 4] [-- OPTIONS OF THE SERVER]

Tells how requests ended, and that nothing of them is left: no request that runs, no block of the KV pool.
All stays on the loopback. Needs the extras serve and load.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import signal
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from serve_load import get, start_server

PROMPTS = ("La vida es ", "def __init__(self, ", "12 + 30 = ", "And the king said unto him, ")


def raw(body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return (
        f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )


async def ask(port: int, body: dict[str, Any], patience: float | None = None) -> tuple[str, float]:
    """How a request ended, as its status or "broken off", and after how many seconds."""
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw(body))
        answer = await asyncio.wait_for(reader.read(), patience)
    except TimeoutError:
        return "broken off", time.monotonic() - begun
    except ConnectionError:
        return "reset", time.monotonic() - begun
    finally:
        writer.transport.abort()
    status = answer[9:12].decode()
    if status.startswith("5"):
        return answer[9:12].decode() + answer.rpartition(b'"message":')[2].decode()[:200], 0.0
    whole = b"data: [DONE]" in answer if body.get("stream") else b'"usage"' in answer
    return status if whole or status != "200" else "200 but not whole", time.monotonic() - begun


async def cancelling(port: int, count: int, rng: random.Random) -> collections.Counter[str]:
    """So many requests, half of which break off at some time."""
    gate = asyncio.Semaphore(48)

    async def one(k: int) -> str:
        body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, 24), "stream": k % 2 == 0}
        async with gate:
            return (await ask(port, body, rng.choice([None, rng.uniform(0.0, 1.0)])))[0]

    return collections.Counter(await asyncio.gather(*(one(k) for k in range(count))))


async def flooding(port: int, capacity: int) -> tuple[collections.Counter[str], list[float]]:
    """Ten times what may run and wait; and how long those took that were there before."""
    body = {"prompt": PROMPTS[0], "max_tokens": 24, "stream": True}
    early = [asyncio.ensure_future(ask(port, body)) for _ in range(4)]
    await asyncio.sleep(0.3)
    gate = asyncio.Semaphore(600)

    async def one() -> str:
        async with gate:
            return (await ask(port, body | {"max_tokens": 4}))[0]

    flood = await asyncio.gather(*(one() for _ in range(10 * capacity)))
    first = await asyncio.gather(*early)
    assert {how for how, _ in first} == {"200"}, first
    return collections.Counter(flood), [seconds for _, seconds in first]


def vanishing(port: int, count: int) -> None:
    """Clients whose connection is reset, before or in the midst of an answer."""
    for k in range(count):
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(raw({"prompt": PROMPTS[k % 4], "max_tokens": 200, "stream": k % 2 == 0, "n": 2}))
        if k % 4 == 0:
            gone.recv(1)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()


async def beside_slow(port: int, slow: int) -> tuple[list[float], list[float]]:
    """Seconds of ten requests alone, and of ten more beside clients that read nothing."""
    body = {"prompt": PROMPTS[1], "max_tokens": 16}
    alone = [(await ask(port, body))[1] for _ in range(10)]
    held = []
    for _ in range(slow):
        one = socket.create_connection(("127.0.0.1", port))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.sendall(raw({"prompt": PROMPTS[2], "max_tokens": 400, "stream": True, "n": 1}))
        held.append(one)
    await asyncio.sleep(1.0)
    beside = [(await ask(port, body))[1] for _ in range(10)]
    for one in held:
        one.close()
    return alone, beside


def settle(address: str) -> dict[str, Any]:
    """The status once nothing runs or waits any longer."""
    end = time.monotonic() + 60
    while True:
        status = get(address, "/v1/status?since=1e11")
        idle = not status["requests"]["running"] and not status["requests"]["waiting"]
        if (idle and not status["kv_blocks"]["used"]) or time.monotonic() > end:
            return dict(status)
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000, help="with random cancellation (default 1000)")
    argv, more = sys.argv[1:], []
    if "--" in argv:
        argv, more = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(argv)
    small = ["--max-running", "16", "--max-waiting", "48", *more]
    server, address, _ = start_server(args.ranks, small)
    port = urlsplit(address).port or 0
    try:
        print("random cancellation:", dict(asyncio.run(cancelling(port, args.requests, random.Random(1)))))
        left = [settle(address)]
        vanishing(port, 100)
        print("vanished: 100 clients, 200 answers")
        left.append(settle(address))
        alone, beside = asyncio.run(beside_slow(port, 20))
        medians = sorted(alone)[5], sorted(beside)[5]
        print(f"beside 20 clients that read nothing: median {medians[1]:.2f} s, alone {medians[0]:.2f} s")
        left.append(settle(address))
        told, early = asyncio.run(flooding(port, args.ranks * 16 + 48))
        print(
            f"flood of ten times the capacity: {dict(told)}; "
            f"the four before it took {max(early):.1f} s at most"
        )
        left.append(settle(address))
        clean = all(
            not s["requests"]["running"] and not s["requests"]["waiting"] and not s["kv_blocks"]["used"]
            for s in left
        )
        print("nothing is left of them" if clean else f"left: {left}", left[-1]["requests"]["finished"])
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    print(f"the server ended with {code}")
    return int(not clean or code != 0)


if __name__ == "__main__":
    sys.exit(main())
