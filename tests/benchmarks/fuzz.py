"""The fuzz campaign: files, command lines and arguments as strangers have them; nothing may go wrong.

    python tests/benchmarks/fuzz.py [--cases N] [--seed S] [--first N] [--workers W] [--processes SHARE]
    python tests/benchmarks/fuzz.py --case NUMBER [--seed S]

What a case is and what counts as wrong stands in ``tests/fuzz.py``; besides, no case may take more than 5 s
of processor time, bring a process above 2 GB, or end it. A share of the command lines runs as commands of
their own, with full, closed and broken standard output. Prints a table by kind, then each failure with the
number that repeats it; exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SECONDS = 5.0
BYTES = 2 * 10**9
MEMORY = "/dev/shm"  # thousands of small files
HANG = 60.0  # of processor time without a word, and ten times that of wall time


def work(args: argparse.Namespace) -> int:
    """Run every `step`-th case; a line of JSON before and after each."""
    from tests.fuzz import run_case, whole_files

    answer = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        folder = Path(name)
        whole = whole_files(folder)
        for number in range(args.first, args.first + args.cases, args.step):
            print(json.dumps({"begin": number}), file=answer)
            began, before = time.process_time(), peak()
            outcome = run_case(args.seed, number, folder, whole)
            seconds, after = time.process_time() - began, peak()
            if seconds > SECONDS and number != args.first:  # the first one compiles and imports
                outcome.wrong.append(f"took {seconds:.1f} s")
            if after > BYTES and after > before:
                outcome.wrong.append(f"took {after / 1e9:.2f} GB")
            found = {"kind": outcome.kind, "text": outcome.text, "code": outcome.code, "wrong": outcome.wrong}
            print(json.dumps(found | {"done": number, "seconds": seconds, "bytes": after}), file=answer)
    return 0


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """A process that runs cases, and is started anew behind one that ends it."""

    def __init__(self, args: argparse.Namespace, offset: int) -> None:
        self.args, self.next, self.end = args, args.first + offset, args.first + args.cases
        self.process: subprocess.Popen[bytes] | None = None
        self.running: int | None = None
        self.buffer = b""
        self.heard = (0.0, 0.0)

    def start(self) -> None:
        """Begin with the next case."""
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", "--seed", str(self.args.seed), "--first", str(self.next),
             "--cases", str(self.end - self.next), "--step", str(self.args.workers)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.running, self.buffer, self.heard = None, b"", self.clocks()

    def clocks(self) -> tuple[float, float]:
        """Processor time of the process and wall time, in seconds."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), time.monotonic()

    def hangs(self) -> bool:
        """Whether a case takes far too long: by processor time, for the machine may be busy."""
        worked, waited = (now - then for now, then in zip(self.clocks(), self.heard, strict=True))
        return worked > HANG or waited > 10 * HANG

    def lines(self) -> list[dict[str, Any]]:
        """What has come since; a case that ended the process is told as a failure."""
        assert self.process is not None
        assert self.process.stdout is not None
        raw = os.read(self.process.stdout.fileno(), 2**16)
        *whole, self.buffer = (self.buffer + raw).split(b"\n")
        found = []
        for line in whole:
            said = json.loads(line)
            self.heard = self.clocks()
            if "begin" in said:
                self.running = said["begin"]
            else:
                self.next, self.running = said["done"] + self.args.workers, None
                found.append(said)
        if not raw:
            found += self.lost(f"ended the process ({self.process.wait()})")
        return found

    def lost(self, why: str) -> list[dict[str, Any]]:
        """Give the process up, and go on behind the case that was running."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None
        if self.running is None:
            return []
        number, self.next = self.running, self.running + self.args.workers
        return [
            {"done": number, "kind": "?", "text": "", "code": None, "wrong": [why], "seconds": 0, "bytes": 0}
        ]


def campaign(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, by several processes."""
    workers = [Worker(args, offset) for offset in range(args.workers)]
    found: list[dict[str, Any]] = []
    told_of = 0
    while any(worker.next < worker.end for worker in workers):
        for worker in workers:
            if worker.process is None and worker.next < worker.end:
                worker.start()
        open_ = {w.process.stdout: w for w in workers if w.process is not None}
        ready, _, _ = select.select(list(open_), [], [], 1.0)
        for stream in ready:
            found += open_[stream].lines()
        for worker in open_.values():
            if worker.process is not None and worker.hangs():
                found += worker.lost(
                    f"hangs: no word for {HANG:.0f} s of processor time, or ten times as long"
                )
        if found and len(found) // 1000 > told_of:
            told_of = len(found) // 1000
            print(
                f"{len(found)} of {args.cases}, {sum(bool(x['wrong']) for x in found)} wrong", file=sys.stderr
            )
    for worker in workers:
        if worker.process is not None:
            worker.process.wait()
    return found


def commands(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Command lines as commands: real streams, some of them full, closed or broken."""
    from tests.fuzz import command_line, laid_out, mutated, whole_files

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = whole_files(folder)
        for number in range(count):
            rng = random.Random(f"{args.seed}/command/{number}")
            laid_out(folder, whole)
            argv = [one for one in command_line(rng) if "\0" not in one]
            used = [one for one in argv if one in whole]
            if used and rng.random() < 0.5:
                victim = rng.choice(used)
                (folder / victim).write_bytes(mutated(rng, victim, whole[victim]))
            found.append(command(rng, folder, argv) | {"done": f"command {number}"})
    return found


def command(rng: random.Random, folder: Path, argv: list[str]) -> dict[str, Any]:
    """Run one command and judge it."""
    stream = rng.choice(("file", "file", "/dev/full", "closed", "broken"))
    line = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-m", "moeless_opt.cli", *argv]
    shell = {"file": '"$@" > stdout', "/dev/full": '"$@" > /dev/full', "closed": '"$@" >&-',
             "broken": '{ sleep 0.1; "$@"; echo $? > code; } | true'}[stream]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "MOELESS_READ_SECONDS": "1"}
    stdin = (folder / rng.choice(("small.json", "plan.json"))).open("rb")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with stdin:
        done = subprocess.run(
            ["sh", "-c", shell, "sh", *line],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=env,
            cwd=folder,
            timeout=600,
            check=False,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrong = []
    err = done.stderr.decode("utf-8", "surrogateescape")
    code = int((folder / "code").read_text()) if stream == "broken" else done.returncode
    if "Traceback" in err or "Exception ignored" in err:
        wrong.append(err[-1500:])
    if code not in (0, 1, 2, 3):
        wrong.append(f"exit code {code}: {err[-300:]}")
    if code == 2 and not err.rstrip("\n").rsplit("\n", 1)[-1].startswith("moeless-solve: "):
        wrong.append(f"no line of error: {err[-300:]!r}")
    if not err.replace("\n", "").isprintable():
        wrong.append(f"not plain: {err[-300:]!r}")
    if left := [path.name for path in folder.iterdir() if path.name.startswith(".moeless-")]:
        wrong.append(f"left {left}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if after.ru_maxrss * 1024 > BYTES:
        wrong.append(f"took {after.ru_maxrss * 1024 / 1e9:.2f} GB")
    return {
        "kind": f"command, stdout {stream}",
        "text": " ".join(map(repr, argv)),
        "code": code,
        "wrong": wrong,
        "seconds": seconds,
        "bytes": after.ru_maxrss * 1024,
    }


def told(found: list[dict[str, Any]]) -> str:
    """The table, and the failures."""
    lines = [
        "| kind | cases | done | refused | failures | most s | most MB |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = Counter(one["kind"] for one in found)
    for kind in [*sorted(kinds), "all"]:
        some = [one for one in found if kind in (one["kind"], "all")]
        fine = sum(one["code"] == 0 for one in some)
        failed = sum(bool(one["wrong"]) for one in some)
        seconds, size = max(one["seconds"] for one in some), max(one["bytes"] for one in some)
        counts = f"{len(some)} | {fine} | {len(some) - fine} | {failed}"
        lines.append(f"| {kind} | {counts} | {seconds:.2f} | {size / 1e6:.0f} |")
    for one in found:
        lines += [f"\n{one['done']}: {one['text']}\n  {why}" for why in one["wrong"]]
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, or one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--processes", type=float, default=0.005, help="share of command lines as commands")
    parser.add_argument("--case", type=int, help="run this one here")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    if args.case is not None:
        args.first, args.cases, args.workers, args.processes = args.case, 1, 1, 0.0
    found = campaign(args) + commands(args, round(args.cases * args.processes))
    print(told(sorted(found, key=lambda one: str(one["done"]).rjust(12))))
    return any(one["wrong"] for one in found)


if __name__ == "__main__":
    sys.exit(main())
