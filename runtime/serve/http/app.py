"""The ASGI application: routes, guard, errors, and the engine's life."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from base64 import b64encode
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from moeless_opt import __version__
from moeless_opt.problems.errors import MoelessError
from moeless_opt.runtime.serve import ServeEngine
from moeless_opt.runtime.serve.http.control_routes import control_router
from moeless_opt.runtime.serve.http.errors import ApiError, api_error_of, error_response, invalid_request
from moeless_opt.runtime.serve.http.front import HttpFront
from moeless_opt.runtime.serve.http.guard import RequestGuard
from moeless_opt.runtime.serve.http.history import History
from moeless_opt.runtime.serve.http.openai_routes import router
from moeless_opt.runtime.serve.http.options import HttpOptions
from moeless_opt.runtime.serve.http.schemas import UNSUPPORTED, ErrorAnswer

__all__ = ["create_app"]

SAMPLE_SECONDS = 1.0

watching = APIRouter(tags=["Watching"])


def create_app(engine: ServeEngine, options: HttpOptions | None = None) -> FastAPI:
    """The HTTP side of an engine.

    Parameters
    ----------
    engine : ServeEngine
        Is started with the application, and closed with it.
    options : HttpOptions, optional
        What else it is told.

    Returns
    -------
    FastAPI
        An ASGI application; ``state.front`` is its `HttpFront`.
    """
    front = HttpFront(engine, options or HttpOptions())
    app = FastAPI(
        title="moeless-serve",
        version=__version__,
        summary="OpenAI's API over a mixture of experts whose experts are elastic",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.front = front
    for routes in (router, control_router, watching):
        app.include_router(routes)
    app.add_middleware(RequestGuard, front=front)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(MoelessError, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(Exception, _broken)
    _tidy(app)
    return app


def _tidy(app: FastAPI) -> None:
    """The OpenAPI document without the errors that FastAPI would send, with the key where there is one."""
    made, keys = app.openapi, app.state.front.options.api_keys

    def openapi() -> dict[str, Any]:
        document = made()
        components = document.setdefault("components", {})
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if keys and path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        if keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------- life


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    front: HttpFront = app.state.front
    front.history = History(front.metrics)
    tasks = [asyncio.ensure_future(_start(front)), asyncio.ensure_future(_sample(front, front.history))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(front.engine.close)


async def _start(front: HttpFront) -> None:
    """Start the engine, in a thread that keeps no process alive: to be told to end meanwhile must work."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def start() -> None:
        try:
            front.engine.start()
        except Exception as error:
            front.error = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=start, name="moeless-start", daemon=True).start()
    await ended.wait()
    if front.error is None:
        front.ready = True
    else:
        front.failed = str(front.error) or type(front.error).__name__


async def _sample(front: HttpFront, history: History) -> None:
    while True:
        if front.ready:
            try:
                status = await asyncio.to_thread(front.engine.status)
            except Exception:  # an engine that has failed says so to whoever asks it
                front.observe(False)
            else:
                front.observe(status.ready)
                history.add(status)
        await asyncio.sleep(SAMPLE_SECONDS)


# ------------------------------------------------------------------------------------------- errors


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error_response(error)
    if isinstance(error, MoelessError):
        return error_response(api_error_of(error))
    if isinstance(error, RequestValidationError):
        return error_response(invalid_request(error.errors(), UNSUPPORTED))
    assert isinstance(error, HTTPException)
    told = {
        404: f"there is nothing at {request.url.path}; /openapi.json has what there is",
        405: f"{request.url.path} does not take {request.method}",
        400: "the body is not valid JSON",
    }
    return error_response(
        ApiError(error.status_code, told.get(error.status_code, str(error.detail)), headers=error.headers)
    )


async def _broken(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError(500, "an error of the server; its log says more"))


# ----------------------------------------------------------------------------------------- watching


@watching.get("/healthz", summary="Whether the process lives", responses={503: {"model": ErrorAnswer}})
async def healthz(request: Request) -> dict[str, str]:
    """An orchestrator restarts what is not healthy."""
    front: HttpFront = request.app.state.front
    if front.failed:
        raise ApiError(503, f"the engine has failed: {front.failed}", code="engine_failed")
    if front.lost:
        raise ApiError(503, f"the engine serves no longer: {front.reason or 'no reason'}", code="engine_lost")
    return {"status": "ok"}


@watching.get("/readyz", summary="Whether requests are taken", responses={503: {"model": ErrorAnswer}})
async def readyz(request: Request) -> dict[str, str]:
    """No requests should be sent to what is not ready: it loads, shuts down, or has failed."""
    front: HttpFront = request.app.state.front
    front.check_open()
    if not front.engine.status().ready:
        raise ApiError(
            503, "the engine serves no requests now", code="not_ready", headers={"Retry-After": "1"}
        )
    return {"status": "ready"}


@watching.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(request: Request) -> Response:
    """In its text format."""
    front: HttpFront = request.app.state.front
    return Response(front.metrics.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page() -> tuple[str, dict[str, str]]:
    """The live page, and headers by which it can load and tell nothing but itself."""
    text = (resources.files("moeless_opt.runtime.serve.http") / "page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


@watching.get("/", summary="The live page", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """What the server does, as it does it."""
    text, headers = _page()
    return HTMLResponse(text, headers=headers)
