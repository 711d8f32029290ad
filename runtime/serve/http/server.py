"""The server process: it listens, serves, and ends without losing what it has accepted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.serve import ServeEngine
from moeless_opt.runtime.serve.http.app import create_app
from moeless_opt.runtime.serve.http.front import HttpFront
from moeless_opt.runtime.serve.http.options import HttpOptions
from moeless_opt.runtime.serve.http.wire import listening_socket, patient_protocol

__all__ = ["HttpServer"]

log = logging.getLogger("uvicorn.error")

LAST_WORDS = 5
"""Seconds in which clients are told that their requests could not be finished."""


class HttpServer:
    """An engine's HTTP side, listening already: who connects waits until it runs.

    Parameters
    ----------
    engine : ServeEngine
        Started and closed by `run`.
    options : HttpOptions
        Where to listen, and so on.

    Attributes
    ----------
    address : str
        Where it listens, as the beginning of a URL.

    Raises
    ------
    ProblemError
        The address cannot be listened at.
    """

    def __init__(self, engine: ServeEngine, options: HttpOptions) -> None:
        self._listener = listening_socket(options)
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.address = f"http://{host}:{self._listener.getsockname()[1]}"
        app = create_app(engine, options)
        self._front: HttpFront = app.state.front
        config = uvicorn.Config(
            app,
            http=patient_protocol(options),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="info" if options.access_log else "warning",
            access_log=options.access_log,
            timeout_keep_alive=math.ceil(options.idle_connection),
            timeout_graceful_shutdown=LAST_WORDS,
            server_header=False,
            proxy_headers=False,
        )
        self._server = _Draining(config, self._front)

    def run(self, ready: Callable[[], None]) -> bool:
        """Serve until SIGTERM, SIGINT or `stop`.

        Parameters
        ----------
        ready : callable
            Called once requests are served.

        Returns
        -------
        bool
            Whether all accepted requests were finished; False also where the engine failed for good.

        Raises
        ------
        MoelessError
            The engine cannot start.
        """
        self._server.ready = ready
        with self._listener:
            self._server.run(sockets=[self._listener])
        if isinstance(self._front.error, MoelessError):
            raise self._front.error
        if self._front.error is not None:
            raise RuntimeError("the engine could not start") from self._front.error
        return self._server.finished and not self._server.lost

    def stop(self) -> None:
        """End as after SIGTERM: what was accepted is finished first."""
        self._server.should_exit = True


class _Draining(uvicorn.Server):
    """A server that finishes what it has accepted before it stops to listen."""

    def __init__(self, config: uvicorn.Config, front: HttpFront) -> None:
        super().__init__(config)
        self._front = front
        self.ready: Callable[[], None] | None = None
        self.finished, self.lost = True, False
        front.connections = lambda: len(self.server_state.connections)

    async def on_tick(self, counter: int) -> bool:
        if self._front.ready and self.ready is not None:
            self.ready()
            self.ready = None
        if self._front.failed and not self._front.ready:
            return True
        if self._front.lost:
            reason = self._front.reason or "it has not said why"
            log.error(
                "the engine serves no longer (%s); the server ends, so that it can be started anew", reason
            )
            self.lost = True
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        front = self._front
        # New requests are told to go elsewhere from now on, by an answer; connections are still taken.
        front.draining = True
        end = time.monotonic() + front.options.drain_timeout
        while front.open_requests and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        if front.open_requests:
            self.finished = False
            log.warning("%d requests were not finished in time", front.open_requests)
        await asyncio.to_thread(front.engine.close)  # what still runs is told so
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the application's own end to a traceback
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but signals have had their effect when the server ends: none is raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, self._asked_to_end)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _asked_to_end(self, _number: int, _frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
