"""The keys of one JSON object: each is taken once, of the kind that it must have, and none may be left over.

What is read and written key by key (`Topology`, problems, plans) uses this, each beside its own class.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from moeless_opt.problems.errors import FormatError, ProblemError

__all__ = ["NUMBER", "Fields", "kind_name", "moved", "plain_fields", "read_record"]


class Fields:
    """The keys of one JSON object: each is taken once, and none may be left over.

    Parameters
    ----------
    data : object
        The parsed object.
    where : str
        Its path in the document, for messages.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise FormatError(where or "document", f"must be an object, got {kind_name(data)}")
        self.data = dict(data)
        self.where = where
        self.asked: list[str] = []

    def path(self, key: str) -> str:
        """The path of a key in the document."""
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str, kind: type | tuple[type, ...] | None = None, default: Any = ...) -> Any:
        """The value of a key, which must be of that kind; without a default the key must be there."""
        self.asked.append(key)
        if key not in self.data:
            if default is not ...:
                return default
            near = difflib.get_close_matches(key, list(self.data), n=1)
            hint = f"; {near[0]!r} is not a key, was {key!r} meant?" if near else ""
            raise FormatError(self.where or "document", f"{key!r} is missing{hint}")
        value = self.data.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds)
        ):
            want = " or ".join(_NAMES.get(k, str(k)) for k in kinds if k is not None)
            raise FormatError(self.path(key), f"must be {want}, got {kind_name(value)}")
        return value

    def done(self) -> None:
        """Refuse what was not taken."""
        for key in self.data:
            near = difflib.get_close_matches(str(key), self.asked, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(self.asked))}"
            raise FormatError(self.path(key), f"unknown key; {known}")


NUMBER = (int, float)
_NAMES: dict[Any, str] = {
    type(None): "null",
    str: "a string",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def kind_name(value: object) -> str:
    """What a JSON value is, for people."""
    if value is None:
        return "null"
    return _NAMES.get(bool if isinstance(value, bool) else type(value), type(value).__name__)


def read_record(cls: Callable[..., Any], data: object, where: str) -> Any:
    """Build a flat dataclass from an object whose keys are its fields' names."""
    entry = Fields(data, where)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    given = {name: entry.take(name) for name in names if name in entry.data}
    entry.asked = names
    entry.done()
    try:
        return cls(**given)
    except ProblemError as error:
        raise moved(error, re.split(r"[.\[]", error.where)[0], where) from None
    except (TypeError, ValueError) as error:
        raise FormatError(where, f"cannot be read: {error}") from None


def moved(error: ProblemError, old: str, new: str) -> ProblemError:
    """The same error at the place where the document has it."""
    return type(error)(error.where.replace(old, new, 1), error.what)


def plain_fields(record: Any) -> dict[str, Any]:
    """The fields of a flat dataclass that differ from their defaults."""
    result = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if value != field.default:
            result[field.name] = value
    return result
