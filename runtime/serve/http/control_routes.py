"""Plans, settings and status: what an operator asks and changes while the server serves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from moeless_opt.problems.io import plan_to_json
from moeless_opt.runtime.serve import Planning
from moeless_opt.runtime.serve.http.front import HttpFront
from moeless_opt.runtime.serve.http.history import event_document, status_document
from moeless_opt.runtime.serve.http.openai_routes import refusals

__all__ = ["control_router"]

control_router = APIRouter(prefix="/v1", tags=["Experts"])

Count = Annotated[int, Field(ge=0, lt=2**62)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]


class PlanningChange(BaseModel):
    """Fields of the controller's settings to change; those left out stay, null gives the default back."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    policy: Literal["static", "eplb", "moeless", "windowed", "per-layer"] | None = Field(
        default="windowed", description="Who decides where experts sit."
    )
    paused: bool | None = Field(default=False, description="Plan nothing for the time being.")
    every: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        default=64, description="Forward passes between two looks at the loads."
    )
    slots: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="Replicas of a layer that each rank holds; null: one more than it must."
    )
    max_moves: Count | None = Field(default=None, description="Most replicas that one plan may move.")
    max_step_bytes: Annotated[int, Field(ge=1, lt=2**62)] | None = Field(
        default=None, description="Most bytes that a rank sends, or receives, at a time."
    )
    keep_alive: Seconds | None = Field(
        default=None, description="Seconds that a replica stays in memory which a layer gave up; null: none."
    )
    idle_after: Seconds | None = Field(
        default=None,
        description="Seconds without requests after which extra replicas leave; null: never.",
    )


def _front(request: Request) -> HttpFront:
    front: HttpFront = request.app.state.front
    if front.failed or not front.ready:
        front.check_open()
    return front


def _planning(front: HttpFront) -> dict[str, Any]:
    planning = front.engine.planning()
    return {name: getattr(planning, name) for name in PlanningChange.model_fields}


@control_router.get("/plan", summary="The placement in force", responses=refusals(500))
def get_plan(request: Request) -> dict[str, Any]:
    """As a plan in the package's JSON format, judged for the loads of the last windows."""
    return plan_to_json(_front(request).engine.plan())


@control_router.post("/plan", summary="Serve with a plan", responses=refusals(408, 413, 415, 500))
def post_plan(
    request: Request, plan: Annotated[dict[str, Any], Body(description="A moeless-plan document.")]
) -> dict[str, Any]:
    """Move to a plan made elsewhere: it is verified first; serving goes on meanwhile."""
    return event_document(_front(request).engine.apply(plan))


@control_router.get("/planning", summary="What the controller may do", responses=refusals(500))
def get_planning(request: Request) -> dict[str, Any]:
    """Policy, budgets, and whether it is paused."""
    return _planning(_front(request))


@control_router.patch("/planning", summary="Change settings", responses=refusals(408, 413, 415, 500))
def patch_planning(request: Request, change: PlanningChange) -> dict[str, Any]:
    """Change policy, budgets, or pause: all fields that are given, or none."""
    front = _front(request)
    changes = change.model_dump(exclude_unset=True)
    default = Planning()
    front.engine.set_planning(**{k: getattr(default, k) if v is None else v for k, v in changes.items()})
    return _planning(front)


@control_router.get("/status", summary="What the server is doing", responses=refusals(500))
def get_status(
    request: Request,
    since: Annotated[
        float, Query(ge=0, le=1e12, description="Only samples after this time (Unix seconds).")
    ] = 0.0,
) -> dict[str, Any]:
    """Everything that the live page shows."""
    front = _front(request)
    samples = [] if front.history is None else front.history.since(since)
    document = {"model": front.engine.model, "draining": front.draining, "planning": _planning(front)}
    return document | status_document(front.engine.status(), samples)
