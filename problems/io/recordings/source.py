"""The file that is being read, what its reader found, and how both are put into words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from numpy.typing import NDArray

from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.text import bytes_text

__all__ = ["LARGEST_LOAD", "As", "Found", "Source", "cut", "kind_text", "shape_text"]

As = Literal["counts", "trace", "physical"]
"""What the caller says an array is: loads of experts, experts of tokens, or loads of slots."""
LARGEST_LOAD = 1e30  # what `Loads` takes: sums and products must stay finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Loads before checks: what one format's reader hands on.

    `axis` says what the leading axis of a 3-D array is: "steps" of one run, or "scenarios". `rank` wrote it,
    of `ranks` in its group as far as the file says; `sparse`: what it does not list is 0.
    """

    load: NDArray[Any]
    format: str
    axis: Literal["steps", "scenarios"] = "scenarios"
    layers: tuple[int, ...] = ()
    scenarios: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    sparse: bool = False

    def with_notes(self, *notes: str) -> Found:
        """The same with more to tell."""
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True, slots=True)
class Source:
    """One file being read: its name for messages, the caller's options, and the layer that its name tells."""

    path: str
    key: str | None
    experts: int | None
    max_bytes: int
    as_: As | None = None
    map: NDArray[Any] | None = None
    layer: int | None = None

    @property
    def most(self) -> str:
        """The limit in words."""
        return bytes_text(self.max_bytes)

    def error(self, what: str) -> FormatError:
        """Return the error that names the file."""
        return FormatError(self.path, what)

    def expert_count(self, seen: int, where: str) -> int:
        """Return the number of experts, from the caller or from the highest seen; `where` saw them."""
        if self.experts is None:
            return max(seen, 1)
        if seen > self.experts:
            raise self.error(
                f"{where} names expert {seen - 1}; experts={self.experts} allows 0 to {self.experts - 1}"
            )
        return self.experts


def kind_text(value: object) -> str:
    """Say what a JSON value is."""
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "str": "a string",
        "dict": "an object",
        "list": "a list",
        "int": "a number",
        "float": "a number",
    }
    name = type(value).__name__
    return names.get(name, f"a {name}")


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape the way the messages do: [layers, experts]."""
    return "[" + ", ".join(map(str, shape)) + "]"


def cut(text: str, limit: int = 200) -> str:
    """Shorten a text that comes from the file."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
