"""The published OpenAPI document, and the server held to it by schemathesis with made-up requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.runtime.serve.doubles import RoteEngine

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 12
"""Requests that are made up for every operation."""


@pytest.fixture(scope="module")
def rote(serving: Callable[..., Any]) -> Iterator[Any]:
    with serving(RoteEngine(context=64)) as served:
        yield served


def test_the_document_tells_every_operation(rote: Any) -> None:
    document = rote.ask("GET", "/openapi.json")[2]
    found = {(path, method) for path, operations in document["paths"].items() for method in operations}
    assert found == {
        ("/v1/models", "get"), ("/v1/models/{model}", "get"), ("/v1/completions", "post"),
        ("/v1/chat/completions", "post"), ("/v1/plan", "get"), ("/v1/plan", "post"), ("/v1/planning", "get"),
        ("/v1/planning", "patch"), ("/v1/status", "get"), ("/healthz", "get"), ("/readyz", "get"),
        ("/metrics", "get"), ("/", "get"),
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_document_tells_of_the_key(serving: Callable[..., Any]) -> None:
    with serving(RoteEngine(), api_keys=("key",)) as served:
        document = served.ask("GET", "/openapi.json")[2]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == path.startswith("/v1/")


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_made_up_requests_are_answered_as_the_document_says(rote: Any, mode: str) -> None:
    """Fitting ones too may be refused (an unknown model, a plan for another one), but never by a 5xx."""
    checks = schemathesis.checks.CHECKS
    not_held = {"positive_data_acceptance"}
    held = [checks.get_one(name) for name in checks.get_all_names() if name not in not_held]
    schema = schemathesis.openapi.from_url(f"{rote.address}/openapi.json")
    counts: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            derandomize=True, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def check(case: Any) -> None:
            counts[case.path] = counts.get(case.path, 0) + 1
            case.call_and_validate(checks=held)

        with contextlib.suppress(Unsatisfiable):  # without parameters nothing can be wrong
            check()
    assert counts["/v1/completions"] >= EXAMPLES
