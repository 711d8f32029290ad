"""The exceptions of the package: one tree, so that a caller can catch as much as it means to."""

from __future__ import annotations

from moeless_opt.problems.text import printable

__all__ = [
    "FormatError",
    "InfeasibleError",
    "InvalidPlanError",
    "MoelessError",
    "ProblemError",
    "SolverUnavailableError",
    "UnsupportedFeatureError",
]

_LONGEST = 2000


def _told(text: str) -> str:
    """A message for people: of one line, and of a length that can be read."""
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} ... {text[-195:]}"
    return printable(" ".join(text.split()))


class MoelessError(Exception):
    """Base of every error that the package raises on purpose; its text is one line that is safe to print."""

    def __str__(self) -> str:
        return _told(super().__str__())


class ProblemError(MoelessError, ValueError):
    """An argument or a field of a problem is wrong.

    Parameters
    ----------
    where : str
        The argument or JSON path, e.g. ``"loads"`` or ``"topology.gpus[3].memory"``.
    what : str
        What is wrong, and what would be right.
    """

    def __init__(self, where: str, what: str) -> None:
        self.where = where
        self.what = what
        super().__init__(f"{where}: {what}")

    def __reduce__(self) -> tuple[type[ProblemError], tuple[str, str]]:
        """Pickle by the two parts (the default would pass the joined message alone)."""
        return type(self), (self.where, self.what)


class FormatError(ProblemError):
    """A file or document cannot be read as what it should be."""


class InfeasibleError(MoelessError):
    """No plan satisfies the caps; the message names the cap that binds and by how much."""


class UnsupportedFeatureError(MoelessError):
    """The chosen solver lacks a feature that the problem needs."""


class SolverUnavailableError(MoelessError):
    """The solver's package is not installed, or no solver has that name."""


class InvalidPlanError(MoelessError):
    """The verifier rejects a plan.

    Parameters
    ----------
    violations : list of str
        Every rule that the plan breaks, and where.
    """

    def __init__(self, violations: list[str]) -> None:
        self.violations = violations
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(f"plan: {violations[0]}{more}")

    def __reduce__(self) -> tuple[type[InvalidPlanError], tuple[list[str]]]:
        """Pickle by the list."""
        return type(self), (self.violations,)
