"""The published schemas agree with the reader: they take what it takes, and refuse what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.library import instance_names, instance_path
from moeless_opt.problems.io.documents import problem_from_json, problem_to_json
from moeless_opt.problems.io.files import schema
from moeless_opt.problems.io.plans import plan_from_json, plan_to_json
from moeless_opt.problems.spec.topology import TOPOLOGY_PRESETS, Topology
from tests.strategies import few, planned, topologies

SCHEMAS = {name: schema(name) for name in ("problem", "plan", "topology")}
REGISTRY: Any = Registry().with_resources(
    (document["$id"], Resource.from_contents(document)) for document in SCHEMAS.values()
)
VALIDATORS = {name: Draft202012Validator(doc, registry=REGISTRY) for name, doc in SCHEMAS.items()}


def _cases() -> Any:
    """The malformed documents of the reader's own tests."""
    path = Path(__file__).with_name("test_documents.py")
    spec = importlib.util.spec_from_file_location("format_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = _cases()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMAS[name]["$id"] == f"moeless-{name}.schema.json"


def test_unknown_schema() -> None:
    with pytest.raises(ProblemError, match="schema: 'result' is unknown; there are problem, plan, topology"):
        schema("result")


@pytest.mark.parametrize("name", instance_names())
def test_shipped_instances_validate(name: str) -> None:
    VALIDATORS["problem"].validate(json.loads(instance_path(name).read_text()))


@few
@given(planned())
def test_written_documents_validate(drawn: Any) -> None:
    problem, plan = drawn
    VALIDATORS["problem"].validate(json.loads(json.dumps(problem_to_json(problem))))
    VALIDATORS["plan"].validate(json.loads(json.dumps(plan_to_json(plan))))


@few
@given(topologies(memory=True) | topologies())
def test_written_topologies_validate(topology: Topology) -> None:
    VALIDATORS["topology"].validate(json.loads(json.dumps(topology.to_dict())))


GOOD = [
    ("topology", {"kind": "preset", "name": "4x8xH100", "slots": 9, "links": {"host": 5e10}}),
    ("topology", {"gpus_per_node": 2, "slots": [2, 2], "speed": [1, 0.5]}),
    ("topology", {"gpus": [{"slots": 2, "domain": 3}, {"slots": 2, "node": 1, "domain": 0}]}),
    (
        "loads",
        {"load": [[[3, 2, 1]], [[1, 2, 3]]], "weights": [1, 3], "scenarios": ["a", "b"], "layers": [4]},
    ),
    (
        "loads",
        {"load": [[3, 2, 1]], "by_node": [[[3, 2, 1]]], "skipped": [0], "source": "here", "notes": ["x"]},
    ),
    ("loads", {"kind": "generated", "recipe": {"kind": "zipf", "layers": 1, "experts": 3, "alpha": 1.1}}),
    (
        "loads",
        {
            "kind": "generated",
            "recipe": {
                "kind": "lognormal",
                "layers": 1,
                "experts": 3,
                "drift": {"kind": "domains", "domains": 2, "steps": 3, "switch": 0.5},
            },
        },
    ),
    ("model", "Mixtral-8x7B"),
    ("model", {"name": "m", "layers": 1, "experts": 3, "top_k": 1, "hidden": 8, "ffn": 8, "bits": 4.25}),
    ("expert_bytes", 10),
    ("expert_bytes", [10]),
    ("time", {"activation_cost": 3, "unit": "s", "name": "measured"}),
    (
        "time",
        {"kind": "curve", "curve_tokens": [0, 1], "curve_activated": [0, 1], "curve_time": [[1, 1], [2, 2]]},
    ),
    ("sizing", {"policy": "cv", "cv": 0.3, "ddof": 1}),
    ("objective", {"priorities": ["moves", "balance"], "horizon": None, "risk": "cvar", "cvar_alpha": 0.5}),
    ("objective", {"risk": "sigma", "sigma": 0.5}),
    ("objective", {"risk": "covariance", "sigma": 2.5}),
    ("limits", {"max_moves": None, "pinned": [[-1, 0, 1]], "spread": 1, "max_move_seconds": 0.5}),
    ("limits", {"spread": 1, "spread_experts": 2}),
    ("limits", {"spread_experts": [[-1, 0], [0, 1]]}),
    ("current", {"slots": [[[0, 1], [2, -1]]]}),
    ("known", {"source": "me", "best": [3.0], "bound": [2.0]}),
    ("name", "x"),
]


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_every_form_is_taken_by_both(key: str, value: Any) -> None:
    document = CASES.edited(CASES.document(), key, value)
    if key == "model" and isinstance(value, str):
        document["loads"]["load"] = [[1] * 8]
        document["topology"]["slots"] = 4
    VALIDATORS["problem"].validate(document)
    problem_from_json(document)


# What no schema can say: lengths that must agree, sums, files, numbers beyond 64 bits.
BEYOND = (
    "are all zero",
    "has shape",
    "not an array",
    "are 2000000000000",
    "is unknown",
    "names expert",
    "has no replica",
    "room for",
    "cannot be read: No such file",
    "is 5, must be from",
    "experts: is 1000000000000",
    "is inf",
    "absent.json",
    "topology.slots",
)


def _within(cases: Any) -> Any:
    return [case for case in cases if not any(words in case[2] for words in BEYOND)]


@pytest.mark.parametrize(("path", "value", "message"), _within(CASES.BAD_PROBLEMS))
def test_what_the_reader_refuses_of_a_problem_the_schema_refuses(path: str, value: Any, message: str) -> None:
    document = CASES.edited(CASES.document(), path, value)
    assert not VALIDATORS["problem"].is_valid(document)


@pytest.mark.parametrize(("path", "value", "message"), _within(CASES.BAD_PLANS))
def test_what_the_reader_refuses_of_a_plan_the_schema_refuses(path: str, value: Any, message: str) -> None:
    document = CASES.edited(plan_to_json(CASES.small()[1]), path, value)
    assert not VALIDATORS["plan"].is_valid(document)


def _objects(node: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(node, dict):
        yield path
        for key, value in node.items():
            yield from _objects(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node[:2]):
            yield from _objects(value, (*path, i))


@few
@given(planned())
def test_unknown_keys_are_refused_by_both_wherever_they_are(drawn: Any) -> None:
    problem, plan = drawn
    for name, document, read in (
        ("problem", problem_to_json(problem), problem_from_json),
        ("plan", plan_to_json(plan), plan_from_json),
    ):
        document = json.loads(json.dumps(document))
        for path in list(_objects(document)):
            entry = document
            for key in path:
                entry = entry[key]
            entry["surprise"] = 1
            assert not VALIDATORS[name].is_valid(document), path
            with pytest.raises(ProblemError, match="surprise: unknown key"):
                read(document)
            del entry["surprise"]
        assert VALIDATORS[name].is_valid(document)


def test_errors_of_the_schema_are_readable() -> None:
    document = CASES.edited(CASES.document(), "loads.weight", [1])
    (error,) = VALIDATORS["problem"].iter_errors(document)
    assert "'weight' was unexpected" in error.message


def test_presets_of_the_schema_are_those_of_the_code() -> None:
    names = SCHEMAS["topology"]["$defs"]["preset"]["properties"]["name"]["enum"]
    assert names == list(TOPOLOGY_PRESETS)
    assert all(VALIDATORS["topology"].is_valid({"kind": "preset", "name": name}) for name in names)
