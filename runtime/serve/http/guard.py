"""In front of everything: who may ask, how much, and for how long.

Plain ASGI, so that streams stay streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeless_opt.runtime.serve import EngineBusyError
from moeless_opt.runtime.serve.http.errors import ApiError, api_error_of, error_response
from moeless_opt.runtime.serve.http.front import HttpFront

__all__ = ["RequestGuard"]

ALWAYS = ("/healthz", "/readyz", "/metrics")
"""Answered however busy the server is: what watches it must not be shut out."""

GENERATING = ("/v1/completions", "/v1/chat/completions")

CONTROLLING = ("/v1/plan", "/v1/planning")
"""What changes the server, with any method but GET."""


class _GoneError(Exception):
    """The client left before its request was complete."""


class RequestGuard:
    """Refuses what must not reach the routes.

    Parameters
    ----------
    app : ASGIApp
        What is guarded.
    front : HttpFront
        Its options and state.
    """

    def __init__(self, app: ASGIApp, front: HttpFront) -> None:
        self._app, self._front = app, front
        options = front.options
        self._keys = options.api_keys
        self._admin = options.admin_keys or options.api_keys
        own = {"localhost", "127.0.0.1", "::1", options.host}
        closed = options.is_loopback and not options.api_keys
        any_host = "*" in options.allowed_hosts or (not closed and not options.allowed_hosts)
        self._hosts = None if any_host else own | set(options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        status = 499

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
                if self._front.draining:
                    headers["connection"] = "close"
            await send(message)

        self._front.open_requests += 1
        try:
            try:
                self._admit(scope)
                inner = await self._with_body(scope, receive)
            except ApiError as error:
                await error_response(error)(scope, receive, stamped)
                return
            except _GoneError:
                return
            await self._app(scope, inner, stamped)
        finally:
            self._front.open_requests -= 1
            route = scope.get("route")
            path = getattr(route, "path", scope["path"] if scope["path"] in GENERATING else "other")
            self._front.metrics.http.labels(path, _method(scope), str(status)).inc()

    def _admit(self, scope: Scope) -> None:
        """Raise unless the request may go on to its body."""
        path, headers = scope["path"], Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403, "the server is not called by this name here (see --allowed-host)", code="unknown_host"
            )
        if path in ALWAYS:
            return
        if self._front.connections() > self._front.options.max_connections:
            busy = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(
                503, "too many connections; try again later", code="too_many_connections", headers=busy
            )
        if path.startswith("/v1/") or path == "/v1":
            changes = path in CONTROLLING and scope["method"] not in ("GET", "HEAD")
            self._check_key(headers.get("authorization", ""), self._admin if changes else self._keys)
        if path in GENERATING and scope["method"] == "POST":
            self._front.check_open()
            scope["state"]["client"] = client = self._client(scope, headers.get("authorization", ""))
            # Before body and parsing: in a flood refusals must cost little, or those served wait for them.
            try:
                self._front.engine.check_room(client)
            except EngineBusyError as error:
                raise api_error_of(error) from None

    def _client(self, scope: Scope, given: str) -> str:
        """Whose request it is: the key's, or the address's where there are no keys."""
        if self._keys:
            return "key " + hashlib.sha256(given.partition(" ")[2].strip().encode()).hexdigest()[:16]
        return f"address {(scope.get('client') or ('', 0))[0]}"

    def _check_key(self, given: str, keys: tuple[str, ...]) -> None:
        if not keys:
            return
        kind, _, key = given.partition(" ")
        asked = {"WWW-Authenticate": "Bearer"}
        if kind.lower() != "bearer" or not key.strip():
            told = "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, told, code="no_api_key", headers=asked)
        shown = key.strip().encode("utf-8", "replace")
        if _is_one_of(shown, keys):
            return
        if _is_one_of(shown, (*self._keys, *self._admin)):
            raise ApiError(403, "this API key may not do that", code="insufficient_api_key")
        raise ApiError(401, "the API key is not known", code="invalid_api_key", headers=asked)

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read within its limits, for the routes to receive in one piece."""
        headers = Headers(scope=scope)
        has_body = "content-length" in headers or "transfer-encoding" in headers
        if not has_body:
            return receive
        most = self._front.options.max_body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._front.options.body_timeout):
                body = await _read(receive, most)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive", code="timeout", headers=_CLOSE) from None
        if body and scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the body must be application/json, not {kind or 'of no type'}")
            try:
                body.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="not_utf8") from None
        return _replayed(body, receive)


_CLOSE = {"Connection": "close"}


def _is_one_of(shown: bytes, keys: tuple[str, ...]) -> bool:
    """Compared with all keys, so that time tells nothing."""
    same = [hmac.compare_digest(shown, known.encode()) for known in keys]
    return any(same)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", headers=_CLOSE)


async def _read(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _host_name(value: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{value}").hostname or ""
    except ValueError:
        return ""


def _method(scope: Scope) -> str:
    known: Callable[[str], bool] = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS").__contains__
    return scope["method"] if known(scope["method"]) else "other"
