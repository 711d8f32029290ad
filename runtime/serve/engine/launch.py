"""How ranks come to be, and how they find the front: in this process, as others, or by torchrun."""

from __future__ import annotations

import datetime
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Listener
from typing import Any

from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.runtime.serve.engine.channel import (
    Channel,
    ChannelClosedError,
    PipeChannel,
    QueueChannel,
    queue_channels,
)
from moeless_opt.runtime.serve.engine.models import ServedFacts, facts_of
from moeless_opt.runtime.serve.engine.options import EngineOptions

__all__ = ["Crew", "launched_from_outside", "serve_rank", "start_crew"]

#: Seconds for a rank to load and to report.
START = 600.0
#: Where the ranks of a launcher find the front.
PLACE = "moeless/serve/front"


def launched_from_outside(environment: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Rank and world size, where torchrun (or one like it) has started this process."""
    env = os.environ if environment is None else environment
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    return int(env["RANK"]), int(env["WORLD_SIZE"])


class Crew:
    """The ranks of an engine, as the front sees them.

    Parameters
    ----------
    channels : list of Channel
        One per rank.
    processes : list of Popen
        Those that were started here.
    threads : list of Thread
        Ranks of this process.
    """

    def __init__(
        self,
        channels: list[Channel],
        processes: list[subprocess.Popen[bytes]],
        threads: list[threading.Thread],
        keep: Any = None,
    ) -> None:
        self.channels, self.processes, self.threads = channels, processes, threads
        self._keep = keep  # the store, which must outlive the ranks

    def close(self, timeout: float = 5.0) -> None:
        """Wait for the ranks to end, and end those that do not."""
        deadline = time.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self.channels:
            channel.close()


def start_crew(options: EngineOptions) -> Crew:
    """Start the ranks, or meet those that a launcher has started (this process being the first of them)."""
    outside = launched_from_outside()
    if outside is not None and outside[1] > 1:
        return _meet(options, outside[1])
    if options.ranks == 1 or outside is not None:
        here, there = queue_channels()
        return Crew([here], [], [_in_thread(options, there)])
    return _spawn(options)


def _in_thread(options: EngineOptions, channel: QueueChannel) -> threading.Thread:
    thread = threading.Thread(target=_work, args=(options, channel), name="moeless-rank", daemon=True)
    thread.start()
    return thread


def _work(options: EngineOptions, channel: Channel, facts: ServedFacts | None = None) -> None:
    """Be a rank until the end; what goes wrong is told to the front."""
    try:
        from moeless_opt.runtime.serve.engine.worker import Worker

        known = facts_of(options) if facts is None else facts
        Worker(options, channel, known.context_length, known.codec.ends).run()
    except ChannelClosedError:
        pass
    except MoelessError as error:
        channel.send(("failed", error))
    except Exception as error:
        channel.send(("failed", f"{type(error).__name__}: {error}"))
        raise
    finally:
        channel.close()


# -- processes of its own --------------------------------------------------------------------------


def _spawn(options: EngineOptions) -> Crew:
    key = secrets.token_bytes(32)
    listener = Listener(("127.0.0.1", 0), authkey=key)
    store = _tcp_store()
    processes = []
    try:
        for rank in range(options.ranks):
            env = os.environ | {"LOCAL_RANK": str(rank)}
            env.setdefault("OMP_NUM_THREADS", "1")
            # Nothing is compiled here, and asking whether it is takes time in every layer.
            env.setdefault("TORCHDYNAMO_DISABLE", "1")
            process = subprocess.Popen(
                [sys.executable, "-m", "moeless_opt.runtime.serve.engine.rank"],
                stdin=subprocess.PIPE,
                env=env,
                # A signal for the front's group (Ctrl-C) is the front's to answer.
                start_new_session=True,
            )
            assert process.stdin is not None
            pickle.dump((options, rank, options.ranks, listener.address, key, store.port), process.stdin)
            process.stdin.close()
            processes.append(process)
        channels = _accept(listener, range(options.ranks), processes)
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
    finally:
        listener.close()
    return Crew(channels, processes, [], store)


def _tcp_store(port: int | None = None) -> Any:
    """Where ranks find each other: a new one, or that of the front."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if port is None:
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return TCPStore("127.0.0.1", port, is_master=False)


def _accept(listener: Listener, ranks: range, processes: list[subprocess.Popen[bytes]]) -> list[Channel]:
    """Connections of these ranks, in order."""
    found: dict[int, Channel] = {}

    def wait() -> None:
        while len(found) < len(ranks):
            connection = listener.accept()
            rank = connection.recv()
            found[rank] = PipeChannel(connection)

    thread = threading.Thread(target=wait, name="moeless-front", daemon=True)
    thread.start()
    deadline = time.monotonic() + START
    while thread.is_alive():
        thread.join(0.05)
        dead = [p for p in processes if p.poll() is not None]
        if dead:
            raise MoelessError(f"a rank ended while it started, with code {dead[0].returncode}")
        if time.monotonic() > deadline:
            raise MoelessError(
                f"{len(ranks) - len(found)} of {len(ranks)} ranks did not come within {START:g} s"
            )
    return [found[rank] for rank in ranks]


def rank_main() -> None:
    """What a process of a rank runs: settings come by standard input."""
    options, rank, size, address, key, port = pickle.load(sys.stdin.buffer)
    connection = Client(address, authkey=key)
    connection.send(rank)
    store = _tcp_store(port)
    join_world(options, rank, size, store)
    _work(options, PipeChannel(connection))
    # Groups of ranks that are gone would be waited for.
    sys.stdout.flush()
    os._exit(0)


def join_world(options: EngineOptions, rank: int, size: int, store: Any = None) -> None:
    """Make torch's and megatron's groups."""
    import torch
    import torch.distributed as dist

    from moeless_opt.runtime.checkpoint import ensure_model_parallel

    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    wait = datetime.timedelta(seconds=START)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if not dist.is_initialized():
        if store is None:
            dist.init_process_group(backend, timeout=wait)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    ensure_model_parallel(size)


# -- by a launcher ---------------------------------------------------------------------------------


def _meet(options: EngineOptions, size: int) -> Crew:
    import torch.distributed as dist

    join_world(options, 0, size)
    store = dist.distributed_c10d._get_default_store()
    key = secrets.token_bytes(32)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size
    host = "127.0.0.1" if local else socket.gethostname()
    listener = Listener((host, 0), authkey=key)
    store.set(PLACE, pickle.dumps((listener.address, key)).hex())
    here, there = queue_channels()
    thread = _in_thread(options, there)
    try:
        others = _accept(listener, range(1, size), [])
    finally:
        listener.close()
    return Crew([here, *others], [], [thread], store)


def serve_rank(options: EngineOptions) -> None:
    """Be one of a launcher's ranks but the first, until the front is gone."""
    outside = launched_from_outside()
    if outside is None or outside[0] == 0:
        raise ProblemError("RANK", "must be above 0: the first rank has the front")
    import torch.distributed as dist

    rank, size = outside
    join_world(options, rank, size)
    store = dist.distributed_c10d._get_default_store()
    address, key = pickle.loads(bytes.fromhex(store.get(PLACE).decode()))
    connection = Client(address, authkey=key)
    connection.send(rank)
    _work(options, PipeChannel(connection))
