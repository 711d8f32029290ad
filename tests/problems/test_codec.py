"""The keys of one JSON object: taken once, of their kind, none left over, and named where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from moeless_opt.problems.codec import NUMBER, Fields, moved, plain_fields, read_record
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.spec.topology import Links


def test_every_key_is_taken_once() -> None:
    entry = Fields({"name": "a", "size": 2, "on": True}, "part[3]")
    assert entry.take("name", str) == "a"
    assert entry.take("size", NUMBER) == 2
    assert entry.take("other", int, 7) == 7
    assert entry.path("size") == "part[3].size"
    with pytest.raises(FormatError, match=r"part\[3\]\.on: unknown key; known keys: name, other, size"):
        entry.done()
    assert entry.take("on", bool) is True
    entry.done()


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([1], int, "document: must be an object, got a list"),
        ({}, int, "document: 'size' is missing"),
        ({"sise": 2}, int, "'size' is missing; 'sise' is not a key, was 'size' meant?"),
        ({"size": "2"}, int, "size: must be a whole number, got a string"),
        ({"size": True}, (int, float), "size: must be a whole number or a number, got true or false"),
        ({"size": None}, list, "size: must be a list, got null"),
    ],
)
def test_refusals(data: Any, kind: Any, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Fields(data, "").take("size", kind)
    assert message.replace("\\", "") in str(caught.value)


def test_flat_records_and_their_errors() -> None:
    assert read_record(Links, {"host": 2.0}, "a.links") == Links(host=2.0)
    assert plain_fields(Links(host=2.0)) == {"host": 2.0}
    with pytest.raises(ProblemError, match=r"^a\.links\.host: is -1"):
        read_record(Links, {"host": -1}, "a.links")
    with pytest.raises(FormatError, match=r"a\.links\.hots: unknown key; did you mean 'host'"):
        read_record(Links, {"hots": 1}, "a.links")


def test_an_error_moves_to_where_the_document_has_it() -> None:
    error = moved(ProblemError("topology.slots", "is 0"), "topology", "b.topology")
    assert str(error) == "b.topology.slots: is 0"
    assert type(moved(FormatError("x", "y"), "x", "z")) is FormatError


@dataclass
class Picky:
    size: int

    def __post_init__(self) -> None:
        raise TypeError("never right")


def test_a_record_that_cannot_be_built_says_where() -> None:
    with pytest.raises(FormatError, match="p: cannot be read: never right"):
        read_record(Picky, {"size": 1}, "p")
