"""Load on a real ``moeless-serve`` by locust: what it can take, then a share of that for minutes (the soak).

    python tests/benchmarks/serve_load.py --minutes 30
    python tests/benchmarks/serve_load.py --minutes 2 --ranks 4 -- --policy per-layer

What stands behind ``--`` goes to the server. All stays on the loopback. Needs the extras serve and load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1]


def get(address: str, path: str) -> Any:
    """The JSON at a path of the server."""
    with urllib.request.urlopen(f"{address}{path}", timeout=60) as answer:
        return json.load(answer)


def start_server(ranks: int, more: list[str]) -> tuple[subprocess.Popen[str], str, float]:
    """A server on a free port: its process, its address, and the seconds until its first token."""
    env = os.environ | {"PYTHONPATH": f"{PACKAGE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env.setdefault("OMP_NUM_THREADS", "1")
    begun = time.perf_counter()
    command = [sys.executable, "-m", "moeless_opt.runtime.serve", "--port", "0", "--ranks", str(ranks), *more]
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"http://\S+", line)
        if found:
            break
        print(line, end="", file=sys.stderr)
    else:
        raise SystemExit("the server did not start")
    body = json.dumps({"prompt": "12 + 30 = ", "max_tokens": 1}).encode()
    asked = urllib.request.Request(f"{found[0]}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        answer.read()
    seconds = time.perf_counter() - begun
    threading.Thread(target=_pass_on, args=(server.stderr,), daemon=True).start()
    return server, found[0], seconds


def _pass_on(stream: Any) -> None:
    for line in stream:
        print("server:", line, end="", file=sys.stderr)


def locust(address: str, users: int, seconds: float, rate: float | None) -> dict[str, Any]:
    """What locust saw with so many users, each asking when it is answered, or all at a rate together."""
    env = os.environ | {
        "SERVE_RATE": "" if rate is None else str(rate / users),
        "SERVE_SECONDS": str(seconds),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "locust", "--locustfile", str(HERE / "locustfile.py"), "--headless",
            "--host", address, "--users", str(users), "--spawn-rate", str(users), "--only-summary",
            "--run-time", f"{seconds:.0f}s", "--stop-timeout", "60", "--loglevel", "WARNING",
            "--json-file", f"{folder}/told",
        ]  # fmt: skip
        subprocess.run(command, env=env, check=False, stdout=subprocess.DEVNULL)
        rows = {row["name"]: row for row in json.loads(Path(f"{folder}/told.json").read_text())}
    return rows


def percentile(row: dict[str, Any], q: float) -> float:
    """Of locust's rounded milliseconds."""
    values = sorted((float(ms), count) for ms, count in row["response_times"].items())
    total, seen = sum(count for _, count in values), 0
    for ms, count in values:
        seen += count
        if seen >= q * total:
            return ms
    return 0.0


class Memory:
    """Resident bytes of a process and its children, sampled."""

    def __init__(self, process: int) -> None:
        self._process = psutil.Process(process)
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        begun = time.monotonic()
        while not self._over.wait(2.0):
            held = 0
            for one in (self._process, *self._process.children(recursive=True)):
                try:
                    held += one.memory_info().rss
                except psutil.Error:
                    continue
            self.samples.append((time.monotonic() - begun, held / 1e6))

    def stop(self) -> tuple[float, float, float]:
        """MB at a quarter of the time, at the end, and MB per hour over the last three quarters."""
        self._over.set()
        self._thread.join()
        found = np.array(self.samples)
        late = found[len(found) // 4 :]
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 3600 if len(late) > 2 else float("nan")
        return (
            float(late[: max(len(late) // 10, 1), 1].mean()),
            float(late[-max(len(late) // 10, 1) :, 1].mean()),
            slope,
        )


def picture(address: str, file: Path, wait: float) -> None:
    """The live page after some seconds, by the system's Chromium; beside it the same for the night."""
    from playwright.sync_api import sync_playwright

    time.sleep(wait)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme, name in (("light", file.name), ("dark", f"{file.stem}-dark{file.suffix}")):
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_selector("#state.ready")
            page.wait_for_timeout(1500)
            page.screenshot(path=file.with_name(name), full_page=True)
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak (default 30)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.8, help="of what the server can take (default 0.8)")
    parser.add_argument("--users", type=int, default=32, help="that wait for answers at the same time")
    parser.add_argument(
        "--probe", type=float, default=30.0, help="seconds of the search for what it can take"
    )
    parser.add_argument("--rate", type=float, help="requests per second, in place of the search")
    parser.add_argument("--picture", type=Path, help="of the live page while the soak runs, as a PNG file")
    argv, more = sys.argv[1:], []
    if "--" in argv:
        argv, more = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(argv)
    server, address, first = start_server(args.ranks, more)
    used = psutil.Process(server.pid).cpu_times()
    print(f"start to first token: {first:.1f} s, {used.user + used.system:.1f} s of its processor time")
    try:
        rate = args.rate
        if rate is None:
            rows = locust(address, args.users, args.probe, None)
            most = rows["whole"]["num_requests"] / args.probe
            rate = args.share * most
            print(f"takes {most:.2f} requests/s with {args.users} at a time; the soak sends {rate:.2f}")
        before, memory = get(address, "/v1/status"), Memory(server.pid)
        begun = time.monotonic()
        if args.picture is not None:
            threading.Thread(target=picture, args=(address, args.picture, args.minutes * 50)).start()
        rows = locust(address, max(args.users, 1), args.minutes * 60, rate)
        seconds = time.monotonic() - begun
        early, late, slope = memory.stop()
        tell(rows, before, get(address, "/v1/status"), seconds)
        print(
            f"memory: {early:.0f} MB after a quarter of the time, {late:.0f} MB at the end, {slope:+.1f} MB/h"
        )
        failed = sum(row["num_failures"] for row in rows.values())
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    print(f"the server ended with {code}")
    return int(bool(failed or code))


def tell(rows: dict[str, Any], before: dict[str, Any], after: dict[str, Any], seconds: float) -> None:
    """Print what locust and the server saw."""
    failed = sum(row["num_failures"] for row in rows.values())
    tokens = after["counters"]["generated_tokens"] - before["counters"]["generated_tokens"]
    count = rows["whole"]["num_requests"]
    print(f"{count} requests in {seconds:.0f} s, {failed} failed, {tokens / seconds:.0f} tokens/s")
    for name in ("first token", "token to token", "whole"):
        row = rows[name]
        p50, p99 = percentile(row, 0.5), percentile(row, 0.99)
        print(f"{name:15} P50 {p50:7.0f} ms, P99 {p99:7.0f} ms, largest {row['max_response_time']:7.0f} ms")
    counters = {
        k: after["counters"][k] - before["counters"][k] for k in ("plans", "bytes_moved", "cold_starts")
    }
    moved = counters["bytes_moved"] / 1e6
    print(f"plans {counters['plans']}, moved {moved:.1f} MB, cold starts {counters['cold_starts']}")
    for rule, parts in after["cost"].items():
        print(f"GB*s under {rule!r}: {sum(parts.values()) - sum(before['cost'][rule].values()):.3f}")


if __name__ == "__main__":
    sys.exit(main())
