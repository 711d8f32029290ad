"""Rough clients on a real ``moeless-serve``: they break off, read slowly, vanish, and are ten times too many.

    python tests/benchmarks/serve_rough.py [--ranks 4] [-- OPTIONS OF THE SERVER]
    python tests/benchmarks/serve_rough.py --faults --ranks 4 [-- OPTIONS OF THE SERVER]

Tells how requests ended, and that nothing of them is left: no request that runs, no block of the KV pool.
``--faults``: ranks are killed and stopped under load, then everything is, then it gets SIGTERM while a rank
is away. Tells the longest time without a token for anybody, when all ranks are back, and whether all answers
are those of before.
All stays on the loopback. Needs the extras serve and load.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
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


async def ask(
    port: int, body: dict[str, Any], patience: float | None = None, address: str = "127.0.0.1"
) -> tuple[str, float]:
    """How a request from an address ended, as its status or "broken off", and after how many seconds."""
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
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
    """Ten times what may run and wait; and how long those before it took, and those of another client."""
    body = {"prompt": PROMPTS[0], "max_tokens": 24, "stream": True}
    early = [asyncio.ensure_future(ask(port, body)) for _ in range(4)]
    await asyncio.sleep(0.3)
    gate = asyncio.Semaphore(600)

    async def one() -> str:
        async with gate:
            return (await ask(port, body | {"max_tokens": 4}))[0]

    flooding = asyncio.gather(*(one() for _ in range(10 * capacity)))
    others = []
    for _ in range(4):
        await asyncio.sleep(0.2)
        others.append(asyncio.ensure_future(ask(port, body, address="127.0.0.2")))
    flood = await flooding
    first = await asyncio.gather(*early, *others)
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


class Load:
    """So many greedy streams at any time, until told to end."""

    def __init__(self, port: int, streams: int = 8) -> None:
        self.port, self.stop = port, False
        self.times: list[float] = []
        self.ends: collections.Counter[str] = collections.Counter()
        self.texts: dict[str, set[str]] = collections.defaultdict(set)
        self.threads = [threading.Thread(target=self._ask, args=(k,)) for k in range(streams)]
        for thread in self.threads:
            thread.start()

    def _ask(self, k: int) -> None:
        prompt = PROMPTS[k % 4]
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
        while not self.stop:
            whole = b""
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
                    connection.sendall(raw(body))
                    while part := connection.recv(65536):
                        self.times.append(time.monotonic())
                        whole += part
            except OSError as error:
                self.ends[type(error).__name__] += 1
                time.sleep(0.1)
                continue
            text, told = "", whole[9:12].decode()
            for line in whole.split(b"\n"):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    text += event["choices"][0]["text"] if "choices" in event else ""
                    told = event["error"]["message"] if "error" in event else told
            self.ends["whole" if b"[DONE]" in whole else told] += 1
            if b"[DONE]" in whole:
                self.texts[prompt].add(text)

    def silence(self, begin: float, end: float) -> float:
        """Longest time without a token for anybody."""
        times = [begin, *sorted(t for t in self.times if begin < t < end), end]
        return max(b - a for a, b in itertools.pairwise(times))

    def end(self) -> None:
        """Ask no more, and wait for the answers."""
        self.stop = True
        for thread in self.threads:
            thread.join()


def ranks_of(server: int) -> dict[int, int]:
    """Processes of ranks by rank (Linux)."""
    found = {}
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        for pid in children.read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            numbers = [int(entry[11:]) for entry in environment if entry.startswith(b"LOCAL_RANK=")]
            found.update(dict.fromkeys(numbers, int(pid)))
    return found


def wait_for(address: str, ranks: int, seconds: float = 120.0) -> float:
    """Seconds until the status says that so many ranks serve."""
    begun = time.monotonic()
    while get(address, "/v1/status?since=1e11")["ranks"] != ranks:
        if time.monotonic() - begun > seconds:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - begun


def lose(server: int, address: str, load: Load, which: list[int], how: signal.Signals, ranks: int) -> str:
    """Send ranks a signal under load; what became of it."""
    before, ends = get(address, "/v1/status?since=1e11"), load.ends.copy()
    pids, begun = ranks_of(server), time.monotonic()
    for rank in which:
        os.kill(pids[rank], how)
        time.sleep(0.5 * (len(which) > 1))
    gone = wait_for(address, ranks - len(which), 30.0)
    served = time.monotonic() - begun
    back = served + wait_for(address, ranks)
    time.sleep(2.0)
    now = time.monotonic()
    retried = get(address, "/v1/status?since=1e11")["requests"]["retried"] - before["requests"]["retried"]
    assert gone < 30, "nobody noticed"
    return (
        f"longest silence {load.silence(begun, begun + served + 3):.2f} s, until all ranks were back after "
        f"{back:.1f} s {load.silence(begun, now):.2f} s; {retried} requests begun anew, "
        f"ended {dict(load.ends - ends)}"
    )


def pause(address: str) -> None:
    """Plan no more; a restart from the state file keeps to that."""
    kind = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/v1/planning", b'{"paused": true}', kind, method="PATCH")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        answer.read()


def faults(ranks: int, more: list[str]) -> int:
    """Ranks die and hang, everything dies, and the server is to end while a rank is away."""
    last = ranks - 1
    with tempfile.TemporaryDirectory() as folder:
        more = ["--state", f"{folder}/state.json", "--every", "16", *more]
        server, address, first = start_server(ranks, more)
        print(f"first token after {first:.1f} s")
        load = Load(urlsplit(address).port or 0)
        time.sleep(3.0)
        begun = time.monotonic()
        time.sleep(4.0)
        print(f"calm: longest silence {load.silence(begun, time.monotonic()):.2f} s", flush=True)
        for what, which, how in (
            ("one killed", [last], signal.SIGKILL),
            ("the first killed", [0], signal.SIGKILL),
            ("one stopped", [1], signal.SIGSTOP),
            ("two killed in short order", [1, last], signal.SIGKILL),
        ):
            print(f"{what}: {lose(server.pid, address, load, which, how, ranks)}", flush=True)
        pause(address)  # else the placement may be another by the time that all are killed
        plan = get(address, "/v1/plan")["slots"]
        time.sleep(2.0)
        pids = [server.pid, *ranks_of(server.pid).values()]
        load.stop = True
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        server.wait()
        load.end()
        texts = load.texts
        server, address, first = start_server(ranks, more)
        kept = get(address, "/v1/plan")["slots"] == plan
        print(f"all killed: first token of the next after {first:.1f} s, same placement: {kept}")
        load = Load(urlsplit(address).port or 0)
        time.sleep(2.0)
        os.kill(ranks_of(server.pid)[last], signal.SIGKILL)
        time.sleep(0.3)
        load.stop = True
        server.send_signal(signal.SIGTERM)
        load.end()
        code = server.wait(120)
        print(f"SIGTERM 0.3 s after a kill: {dict(load.ends)}, ended with {code}")
    for prompt, told in load.texts.items():
        texts[prompt] |= told
    same = all(len(told) == 1 for told in texts.values())
    print(f"the same answers at all times: {same}")
    return int(not same or code != 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--faults", action="store_true", help="of ranks, in place of rough clients")
    parser.add_argument("--requests", type=int, default=1000, help="with random cancellation (default 1000)")
    argv, more = sys.argv[1:], []
    if "--" in argv:
        argv, more = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(argv)
    if args.faults:
        return faults(args.ranks, more)
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
            f"the four before it took {max(early[:4]):.1f} s at most, "
            f"four of another client that came during it {max(early[4:]):.1f} s"
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
