"""Connections: those that stay silent, those that trickle, those that do not read, and too many of them."""

from __future__ import annotations

import asyncio
import socket
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.serve.http.options import HttpOptions

__all__ = ["listening_socket", "patient_protocol"]

BACKLOG = 2048
MOST_HEAD = 1 << 16
"""Bytes of a request's head."""


def patient_protocol(options: HttpOptions) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol with limits on the time and the size of a request's head.

    Parameters
    ----------
    options : HttpOptions
        Its ``head_timeout``, and twice its ``max_connections``, above which connections are closed at once.
    """

    class Patient(HttpToolsProtocol):
        _waiting: TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > 2 * options.max_connections:
                transport.abort()
                return
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()  # of the next request of this connection
            super().data_received(data)
            if self._waiting is not None:
                self._head += len(data)
                if self._head > MOST_HEAD and not self.transport.is_closing():
                    self.send_400_response("The head of the request is too large.")

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._head = 0
            self._waiting = self.loop.call_later(options.head_timeout, self._too_late)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_late(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

    return Patient


def listening_socket(options: HttpOptions) -> socket.socket:
    """A bound socket, whose connections end when a client does not read for ``write_timeout`` seconds.

    Raises
    ------
    ProblemError
        The address cannot be listened at.
    """
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ProblemError("--host", f"{options.host!r} cannot be listened at: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        user_timeout: Any = getattr(socket, "TCP_USER_TIMEOUT", None)
        if user_timeout is not None:  # Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, user_timeout, int(options.write_timeout * 1000))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        told = f"{options.host}:{options.port} cannot be listened at: {error.strerror}"
        raise ProblemError("--port", told) from None
    return listener
