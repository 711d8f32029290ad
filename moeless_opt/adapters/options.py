"""How a plug-in is switched on and told what to do: one environment variable, a file, or both."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moeless_opt.problems.arrays import Record, number, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import named, read_bytes
from moeless_opt.problems.io import parse_json
from moeless_opt.problems.spec import Limits, Objective
from moeless_opt.solvers.pack import fast

__all__ = ["PolicyOptions", "options_from"]

_MOST_ENTRIES = 1024  # columns of vLLM's dispatch table
_OFF = ("", "0", "false", "no", "off")
_ON = ("1", "true", "yes", "on")
_CHOICES = {
    "split": ("auto", "equal", "weighted", "nearest"),
    "fill": ("copies", "distinct"),
    "backend": ("auto", "numba"),
    "planner": ("process", "thread"),
}
_PATHS = ("plan", "record", "log")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyOptions(Record):
    """What a plug-in is told.

    Parameters
    ----------
    split : {"auto", "equal", "weighted", "nearest"}
        What the engine does with an expert's tokens. "auto": in vLLM weighted where `entries` are given,
        else equal; in SGLang what its dispatch does.
    entries : int, optional
        Weighted replicas in vLLM: entries of an expert's dispatch table, shares are multiples of 1 over it.
    tolerance : float, optional
        A layer's largest GPU load may be this share above its bound where that saves moves; 0.01 by
        default, 0.02 with an equal split.
    max_moves : int, optional
        Replicas that one re-balance may ship, over all layers.
    min_gain : float
        A layer stays as it is where its largest GPU load would fall by less than this share of the mean.
    move_price : float
        Or by less than this for each replica shipped.
    fill : {"copies", "distinct"}
        Whether slots left over may hold a second copy of an expert of their GPU.
    backend : {"auto", "numba"}
        "auto" takes Numba where it is installed; "numba" refuses to begin without. The plans are the same.
    planner : {"process", "thread"}
        Whether planning has a process of its own beside the engine's, or the calling thread.
    agree : bool
        Whether vLLM's ranks compare digests of their maps, and keep the live one where they differ.
    plan : path, optional
        A plan's file, taken in place of the first re-balance: while the live map is still the engine's
        initial one.
    record : path, optional
        Folder for the loads of every window, as recordings.
    log : path, optional
        File of JSON lines that tell what every call did.
    """

    split: str = "auto"
    entries: int | None = None
    tolerance: float | None = None
    max_moves: int | None = None
    min_gain: float = 0.005
    move_price: float = 0.0
    fill: str = "copies"
    backend: str = "auto"
    planner: str = "process"
    agree: bool = True
    plan: str | None = None
    record: str | None = None
    log: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ProblemError(name, f"is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        if self.entries is not None:
            put(self, "entries", whole("entries", self.entries, low=2, high=_MOST_ENTRIES))
        if self.tolerance is not None:
            checked = Objective(balance_tolerance=number("tolerance", self.tolerance))
            put(self, "tolerance", checked.balance_tolerance)
        if self.max_moves is not None:
            put(self, "max_moves", whole("max_moves", self.max_moves))
        for name in ("min_gain", "move_price"):
            put(self, name, number(name, getattr(self, name)))
        if not isinstance(self.agree, bool):
            raise ProblemError("agree", f"is {self.agree!r}, must be true or false")
        for name in _PATHS:
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ProblemError(name, f"is {path!r}, must be a path")
        if self.entries is not None and self.split not in ("auto", "weighted"):
            raise ProblemError(
                "entries", f"are for weighted replicas, but split is {self.split!r}: leave one out"
            )
        if self.backend == "numba" and not fast.available():
            raise ProblemError(
                "backend", "is 'numba', which is not installed: pip install 'moeless-opt[fast]'"
            )

    @property
    def limits(self) -> Limits:
        """What a re-plan may not exceed."""
        return Limits(max_moves=self.max_moves)


def options_from(variable: str, environment: Mapping[str, str] | None = None) -> PolicyOptions | None:
    """The options that an environment variable switches on, None where it is absent or off.

    Its value is ``1`` (the defaults), or the path of a JSON or TOML file of options. ``VARIABLE_NAME`` sets
    the option ``name`` and goes before the file.

    Raises
    ------
    ProblemError
        Naming the variable, or the file, and the option that is unknown or wrong.
    """
    environment = os.environ if environment is None else environment
    switch = environment.get(variable, "").strip()
    if switch.lower() in _OFF:
        return None
    given: dict[str, Any] = {} if switch.lower() in _ON else _from_file(variable, switch)
    where = dict.fromkeys(given, switch)
    for key, text in environment.items():
        name = key.removeprefix(f"{variable}_").lower()
        if key.startswith(f"{variable}_"):
            given[name], where[name] = _from_text(text), key
    known = {field.name for field in fields(PolicyOptions)}
    for name in given:
        if name not in known:
            raise ProblemError(
                where[name], f"option {name!r} is unknown; there are {', '.join(sorted(known))}"
            )
    try:
        return PolicyOptions(**given)
    except ProblemError as error:
        raise ProblemError(where.get(error.where, variable), f"option {error.where} {error.what}") from None


def _from_file(variable: str, path: str) -> dict[str, Any]:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".toml"):
        raise ProblemError(
            variable,
            f"is {path!r}, must be 1, 0, or the path of a file of options that ends in .json or .toml",
        )
    with named(variable):
        raw = read_bytes(path)
    if suffix == ".json":
        found = parse_json(raw, path)
        if not isinstance(found, dict):
            raise FormatError(path, "must hold one object of options")
        return found
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(path, f"is no TOML: {error}") from None


def _from_text(text: str) -> Any:
    """A value as TOML would have it: a number, true, false; anything else is the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text
