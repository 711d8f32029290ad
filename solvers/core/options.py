"""Options of a solver: one frozen dataclass each; an unknown one or a value out of range is refused by name.

The fields of the dataclass are the options, their defaults what holds where nothing is said; its
``__post_init__`` checks types and ranges with `one_of` and the checks of ``problems.arrays``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from moeless_opt.problems.errors import ProblemError

__all__ = ["NoOptions", "one_of", "option_names", "read_options"]

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """A solver without options."""


def option_names(kind: type[Any]) -> tuple[str, ...]:
    """The options that a dataclass holds."""
    return tuple(field.name for field in fields(kind))


def read_options(kind: type[Kind], given: Mapping[str, Any], solver: str) -> Kind:
    """Options from keyword arguments.

    Parameters
    ----------
    kind : type
        The solver's dataclass.
    given : mapping
        What the caller said.
    solver : str
        Who takes them, for the error.

    Raises
    ------
    ProblemError
        If there is no option of that name, or a value is out of its range.
    """
    names = option_names(kind)
    unknown = [name for name in given if name not in names]
    if unknown:
        has = ", ".join(names) or "none"
        raise ProblemError(min(unknown), f"is no option of solver {solver!r} (it has: {has})")
    return kind(**given)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of a few words."""
    if value not in allowed:
        raise ProblemError(name, f"is {value!r}, must be one of {', '.join(map(repr, allowed))}")
