"""How ranks come to be, and how they find the front: in this process, as others, or by torchrun."""

from __future__ import annotations

import datetime
import functools
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import Any

from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.runtime.serve import Planning
from moeless_opt.runtime.serve.engine.channel import (
    Channel,
    ChannelClosedError,
    PipeChannel,
    QueueChannel,
    queue_channels,
)
from moeless_opt.runtime.serve.engine.models import ServedFacts, facts_of
from moeless_opt.runtime.serve.engine.options import EngineOptions

__all__ = ["Crew", "launched_from_outside", "prepare", "serve_rank", "start_crew"]

#: Seconds for a rank to load and to report.
START = 600.0
#: Where the ranks of a launcher find the front.
PLACE = "moeless/serve/front"
_COMPILE = (
    "import sys; sys.path[:] = sys.argv[1:]; from moeless_opt.solvers.timed import warm_timed; warm_timed()"
)


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
    keep : object
        The store, which must outlive the ranks.
    hiring : Hiring, optional
        Starts processes in the place of others.
    """

    def __init__(
        self,
        channels: list[Channel],
        processes: list[subprocess.Popen[bytes]],
        threads: list[threading.Thread],
        keep: Any = None,
        hiring: Hiring | None = None,
    ) -> None:
        self.channels, self.processes, self.threads = channels, processes, threads
        self.hiring = hiring
        self._keep = keep

    def close(self, serving: Iterable[int] = (), timeout: float = 5.0) -> None:
        """Wait for the ranks that serve to end, and end those that do not, and the others."""
        deadline = time.monotonic() + timeout
        if self.hiring is not None:
            self.hiring.close()
            for rank, process in self.hiring.processes.items():
                if rank not in serving:
                    process.kill()
                    process.wait()
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


def _work(
    options: EngineOptions,
    channel: Channel,
    facts: ServedFacts | None = None,
    seat: tuple[int, Any] | None = None,
) -> None:
    """Be a rank until the end; what goes wrong is told to the front."""
    try:
        from moeless_opt.runtime.serve.engine.worker import Seat, Worker

        known = facts_of(options) if facts is None else facts
        place = None if seat is None else Seat(*seat)
        Worker(options, channel, known.context_length, known.codec.ends, place).run()
    except ChannelClosedError:
        pass
    except MoelessError as error:
        channel.send(("failed", error))
    except Exception as error:
        channel.send(("failed", f"{type(error).__name__}: {error}"))
        raise
    finally:
        channel.close()


def prepare(planning: Planning) -> None:
    """Have a planner's kernels compiled, by a process beside what serves; Numba's cache keeps them.

    Else all ranks would do that at the same time, and nothing would be served for as long.
    """
    if planning.policy == "per-layer" and not planning.paused:
        _compile()


@functools.cache
def _compile() -> None:
    subprocess.run([sys.executable, "-c", _COMPILE, *sys.path], check=False, stdin=subprocess.DEVNULL)


# -- processes of its own --------------------------------------------------------------------------


class Hiring:
    """Starts processes of ranks, and lets them in.

    Parameters
    ----------
    options : EngineOptions
        What they serve.
    store : TCPStore
        In which they meet.
    """

    def __init__(self, options: EngineOptions, store: Any) -> None:
        self.options, self._store = options, store
        self._door = Door("127.0.0.1")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def start(self, rank: int, *, joins: bool = False) -> None:
        """Start a process; one that `joins` takes the place of one that the others have lost."""
        env = os.environ | {"LOCAL_RANK": str(rank)}
        env.setdefault("OMP_NUM_THREADS", "1")
        # Nothing is compiled here, and asking whether it is takes time in every layer.
        env.setdefault("TORCHDYNAMO_DISABLE", "1")
        # What gloo and the store say of ranks that are gone is told in one line here.
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with self._lock:
            if self._closed:
                raise MoelessError("the engine was closed")
            self._door.forget(rank)
            if rank in self.processes:  # whatever it may still be at
                self.processes[rank].kill()
                self.processes[rank].wait()
            process = self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "moeless_opt.runtime.serve.engine.rank"],
                stdin=subprocess.PIPE,
                env=env,
                # A signal for the front's group (Ctrl-C) is the front's to answer.
                start_new_session=True,
            )
        assert process.stdin is not None
        told = (self.options, rank, self.options.ranks, self._door.address, self._door.key, self._store.port)
        with suppress(BrokenPipeError):  # it has ended already; `arrived` tells
            pickle.dump((*told, joins), process.stdin)
            process.stdin.close()

    def arrived(self, ranks: Sequence[int]) -> list[Channel]:
        """Channels to the processes of these ranks, once they are there.

        Raises
        ------
        MoelessError
            If one has ended, or does not come.
        """
        mine = [self.processes[rank] for rank in ranks]
        return self._door.arrived(ranks, lambda: [p for p in mine if p.poll() is not None])

    def close(self) -> None:
        """Start nobody any more."""
        with self._lock:
            self._closed = True
        self._door.close()

    def kill(self) -> None:
        """End all processes."""
        self.close()
        for process in self.processes.values():
            process.kill()
            process.wait()


class Door:
    """Where processes of ranks come in.

    Parameters
    ----------
    host : str
        Address of this machine to listen at.
    """

    def __init__(self, host: str) -> None:
        self.key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), authkey=self.key)
        self.address = self._listener.address
        self._came: dict[int, Channel] = {}
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._wait, name="moeless-door", daemon=True).start()

    def _wait(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
                rank = connection.recv()
            except (OSError, EOFError, AuthenticationError):  # who knows the key not, or has died
                if self._closed:
                    return
                continue
            if self._closed:
                return
            with self._changed:
                self._came[rank] = PipeChannel(connection, patient=True)
                self._changed.notify_all()

    def forget(self, rank: int) -> None:
        """Another process of this rank is to come."""
        with self._changed:
            self._came.pop(rank, None)

    def arrived(self, ranks: Sequence[int], ended: Callable[[], Sequence[Any]]) -> list[Channel]:
        """See `Hiring.arrived`."""
        deadline = time.monotonic() + START
        with self._changed:
            while missing := [rank for rank in ranks if rank not in self._came]:
                if dead := ended():
                    raise MoelessError(f"a rank ended while it started, with code {dead[0].returncode}")
                if time.monotonic() > deadline:
                    raise MoelessError(
                        f"{len(missing)} of {len(ranks)} ranks did not come within {START:g} s"
                    )
                self._changed.wait(0.05)
            return [self._came[rank] for rank in ranks]

    def close(self) -> None:
        """Let nobody in any more."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError, EOFError, AuthenticationError):  # wakes the thread
            Client(self.address, authkey=self.key).close()
        self._listener.close()


def _spawn(options: EngineOptions) -> Crew:
    store = _tcp_store()
    hiring, ranks = Hiring(options, store), range(options.ranks)
    try:
        for rank in ranks:
            hiring.start(rank)
        prepare(options.planning)
        channels = hiring.arrived(ranks)
    except BaseException:
        hiring.kill()
        raise
    return Crew(channels, [hiring.processes[rank] for rank in ranks], [], store, hiring)


def _tcp_store(port: int | None = None) -> Any:
    """Where ranks find each other: a new one, or that of the front."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if port is None:
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return TCPStore("127.0.0.1", port, is_master=False)


def rank_main() -> None:
    """What a process of a rank runs: settings come by standard input."""
    options, rank, size, address, key, port, joins = pickle.load(sys.stdin.buffer)
    try:
        connection = Client(address, authkey=key)
        connection.send(rank)
        store = _tcp_store(port)
    except (OSError, EOFError, RuntimeError):  # the front is gone meanwhile
        os._exit(1)
    if joins:
        from moeless_opt.runtime.checkpoint import stand_outside

        stand_outside(rank, size)
    else:
        join_world(options, rank, size, store)
    _work(options, PipeChannel(connection), seat=(rank, store) if joins else None)
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
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size
    door = Door("127.0.0.1" if local else socket.gethostname())
    store.set(PLACE, pickle.dumps((door.address, door.key)).hex())
    here, there = queue_channels()
    thread = _in_thread(options, there)
    try:
        others = door.arrived(range(1, size), list)
    finally:
        door.close()
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
