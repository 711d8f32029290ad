"""Errors in the form that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from moeless_opt.problems.errors import InfeasibleError, InvalidPlanError, MoelessError, ProblemError
from moeless_opt.problems.text import printable
from moeless_opt.runtime.serve import EngineBusyError, EngineStoppedError

__all__ = ["ApiError", "api_error_of", "error_response", "invalid_request"]

_LONGEST = 1000
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Parameters
    ----------
    status : int
        Of the HTTP answer.
    message : str
        What is wrong, and what would be right.
    param : str, optional
        The field that is wrong.
    code : str, optional
        For programs.
    headers : mapping, optional
        Of the answer, besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = printable(" ".join(message.split()))[:_LONGEST]
        self.param = None if param is None else printable(param)[:_LONGEST]
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's content."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error_of(error: MoelessError) -> ApiError:
    """What a client is told of an error of the package."""
    if isinstance(error, EngineBusyError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="stopped", headers={"Retry-After": "1"})
    if isinstance(error, ProblemError):
        return ApiError(400, str(error), param=error.where or None)
    if isinstance(error, InvalidPlanError | InfeasibleError):
        return ApiError(400, str(error), code="invalid_plan")
    return ApiError(500, str(error))


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer for an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def invalid_request(found: Sequence[Mapping[str, Any]], unsupported: Mapping[str, str]) -> ApiError:
    """The first thing that is wrong with a body, as a client is told.

    Parameters
    ----------
    found : sequence of mapping
        Errors of pydantic.
    unsupported : mapping
        Fields that only take the value by which they change nothing, and that value.
    """
    first: Mapping[str, Any] = found[0] if found else {"loc": (), "msg": "is not valid", "type": ""}
    place, kind = list(first["loc"]), first["type"]
    if kind == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "")
        return ApiError(
            400, f"the body is not valid JSON: {reason} at character {place[-1]}", code="json_invalid"
        )
    if place and place[0] in ("body", "query", "path"):
        place = place[1:]
    # Of a union pydantic names every alternative; people know only fields and indices.
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place if _is_field(p)).lstrip(".")
    name = str(place[0]) if place else ""
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {path!r}", param=path, code="unknown_parameter")
    if name in unsupported:
        told = f"{name}: is not supported here; leave it out, or give {unsupported[name]}"
        return ApiError(400, told, param=name, code="unsupported_parameter")
    if not path:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}")
    alternatives = {e["msg"] for e in found if e["loc"][1:2] == first["loc"][1:2]}
    return ApiError(400, f"{path}: {'; or '.join(sorted(alternatives)[:4])}", param=path)


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in _BRANCHES)


_BRANCHES = {"str", "int", "float", "bool"}
