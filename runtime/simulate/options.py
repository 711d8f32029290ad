"""Options of the simulator: default, unit, help and check of each stand once, in the field that holds it.

A field made by `option` carries an `Option`. `check_fields` validates a dataclass of such fields, and the
command line is made from them (`cli`), so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from moeless_opt.problems.arrays import number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = [
    "Option",
    "by_default",
    "check_fields",
    "checked",
    "documented",
    "file",
    "flag",
    "in_unit",
    "name_of",
    "option",
    "option_of",
    "real",
    "unknown",
    "whole_number",
]

Check = Callable[[str, Any], Any]
Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of a field.

    Parameters
    ----------
    text : str
        What it means, for people; without the default.
    check : callable
        Given the field's name and a value, the value as it is kept; raises ProblemError.
    parse : callable or None
        Makes a value of what stands on the command line; ValueError where it is none. None: a switch.
    unit : str
        Of the value.
    metavar : str
        For the command's help; by default made from the unit.
    group : str
        Under which heading it stands there.
    shown : str
        What it says of the default there; by default the default itself, nothing for None.
    """

    text: str
    check: Check
    parse: Callable[[str], Any] | None
    unit: str = ""
    metavar: str = ""
    group: str = ""
    shown: str | None = None


def option(default: Any, kind: tuple[Check, Callable[[str], Any] | None], text: str, **more: Any) -> Any:
    """A field of a dataclass with an `Option`; `kind` is one of the functions below."""
    check, parse = kind
    return field(default=default, metadata={"option": Option(text, check, parse, **more)})


def option_of(part: Field[Any]) -> Option:
    """The option of a field."""
    found: Option = part.metadata["option"]
    return found


def documented(kind: type[Kind]) -> type[Kind]:
    """Append to a dataclass's docstring what its options say, in numpydoc form."""
    lines = [(kind.__doc__ or "").rstrip(), "", "    Parameters", "    ----------"]
    for part in fields(kind):  # type: ignore[arg-type]
        told = option_of(part)
        lines += [f"    {part.name} : {part.type}", f"        {told.text}{in_unit(told)}{by_default(part)}"]
    kind.__doc__ = "\n".join([*lines, "    "])
    return kind


def in_unit(told: Option) -> str:
    """The unit of an option as the end of a phrase."""
    return f", in {told.unit}" if told.unit else ""


def by_default(part: Field[Any]) -> str:
    """The default of a field in brackets; nothing for a switch, or where None says it all."""
    told, default = option_of(part), part.default
    shown = told.shown
    if shown is None and told.parse is not None and default is not None:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f" (default {shown})" if shown else ""


def checked(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of some fields of a dataclass, as they are kept.

    Raises
    ------
    ProblemError
        Naming the field that is wrong.
    """
    options = {part.name: option_of(part) for part in fields(kind)}
    return {name: options[name].check(name, value) for name, value in values.items()}


def check_fields(record: Any) -> None:
    """Validate every field of a frozen dataclass, and keep what the checks make of the values."""
    for name, value in checked(
        record, {part.name: getattr(record, part.name) for part in fields(record)}
    ).items():
        object.__setattr__(record, name, value)


# ------------------------------------------------------------------------------------- kinds of values


def _maybe(check: Check, optional: bool) -> Check:
    return (lambda where, value: None if value is None else check(where, value)) if optional else check


def real(
    low: float = 0.0, *, high: float | None = None, open_low: bool = False, optional: bool = False
) -> tuple[Check, Callable[[str], Any]]:
    """A number of at least (or above) `low`."""

    def check(where: str, value: Any) -> float:
        found = number(where, value, low=low, open_low=open_low)
        if high is not None and found > high:
            raise ProblemError(where, f"is {value!r}, must be from {low:g} to {high:g}")
        return found

    return _maybe(check, optional), float


def whole_number(low: int = 0, *, optional: bool = False) -> tuple[Check, Callable[[str], Any]]:
    """A whole number of at least `low`."""
    return _maybe(lambda where, value: whole(where, value, low=low), optional), int


def flag() -> tuple[Check, None]:
    """True or False."""

    def check(where: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ProblemError(where, f"is {value!r}, must be True or False")
        return value

    return check, None


def file() -> tuple[Check, Callable[[str], Any]]:
    """A path, or None."""

    def check(where: str, value: Any) -> Path:
        try:
            return Path(value)
        except TypeError:
            raise ProblemError(where, f"is {value!r}, must be a path") from None

    return _maybe(check, True), Path


def name_of(
    known: Mapping[str, Any] | Sequence[str], *, optional: bool = False
) -> tuple[Check, Callable[[str], Any]]:
    """One of several names."""

    def check(where: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise unknown(where, value, known)
        return value

    return _maybe(check, optional), str


def unknown(where: str, value: object, known: Mapping[str, Any] | Sequence[str]) -> ProblemError:
    """An error that says what there is, and what may have been meant."""
    near = get_close_matches(str(value), list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ProblemError(where, f"{value!r} is unknown; {hint}there are {', '.join(known)}")
