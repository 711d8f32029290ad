"""Lines of the report: what was found, and whether that was measured on a GPU."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Line", "Sheet", "lines_table", "read_lines", "told"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One finding.

    Parameters
    ----------
    part, name : str
        What was looked at.
    status : {"measured", "dry", "failed"}
        On a GPU; on a CPU with small shapes, which says nothing of a GPU; or not as it must be.
    reason : str
        Why it failed, or why it is dry.
    value : number, bool, or dict of them
        Found on the GPU; None where there was none.
    unit : str
        Of the value.
    wish : str
        What is wanted, if there is a figure for that.
    met : bool, optional
        Whether the wish is met; None where nothing is measured or wished.
    on_cpu : number, bool, or dict of them
        What the dry run found in its small shapes.
    detail : dict
        More about it.
    """

    part: str
    name: str
    status: str
    reason: str = ""
    value: Any = None
    unit: str = ""
    wish: str = ""
    met: bool | None = None
    on_cpu: Any = None
    detail: dict[str, Any] = field(default_factory=dict)


def told(error: BaseException) -> str:
    """An error in one line, with its place."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _plain(value: Any) -> Any:
    """For JSON: Python's own numbers; what is not finite becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> list[float]:
    return [float(one) for one in (value.values() if isinstance(value, Mapping) else [value])]


class Sheet:
    """Takes the lines of one part, and keeps each at once: what comes later may end the process.

    Parameters
    ----------
    part : str
        Its name.
    dry : bool
        No GPU.
    path : path
        File to which lines are added.
    """

    def __init__(self, part: str, dry: bool, path: Path) -> None:
        self.part, self.dry, self.path = part, dry, path
        self._taken: set[str] = set()

    def take(
        self,
        name: str,
        value: Any,
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
        wish: float | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a line down.

        Parameters
        ----------
        name : str
            One of the part's `LINES`.
        value : number, bool, or mapping to them
            False fails.
        unit : str
            Of the value.
        most, least : float, optional
            The line fails where a value is beyond; in a dry run as well.
        wish : float, optional
            What is wanted at most. Reported, and no failure.
        detail : mapping, optional
            For the JSON.
        """
        numbers = _numbers(value)
        wrong = ""
        if value is False or any(math.isnan(x) for x in numbers):
            wrong = f"is {value}"
        elif most is not None and max(numbers) > most:
            wrong = f"is {max(numbers):.4g} {unit}".rstrip() + f", may be {most:g} at most"
        elif least is not None and min(numbers) < least:
            wrong = f"is {min(numbers):.4g} {unit}".rstrip() + f", must be {least:g} at least"
        status = "failed" if wrong else "dry" if self.dry else "measured"
        wished = "" if wish is None else f"<= {wish:g} {unit}".rstrip()
        line = Line(
            part=self.part,
            name=name,
            status=status,
            reason=wrong or ("no GPU: small shapes on a CPU" if self.dry else ""),
            value=None if self.dry else _plain(value),
            unit=unit,
            wish=wished,
            met=None if wish is None or self.dry else max(numbers) <= wish,
            on_cpu=_plain(value) if self.dry else None,
            detail=_plain(dict(detail or {})),
        )
        self._taken.add(name)
        self._add({"line": asdict(line)})

    @contextlib.contextmanager
    def guard(self, *names: str) -> Iterator[None]:
        """Let an error in this context fail these lines, where they are not written yet, and no others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            for name in names:
                if name not in self._taken:
                    self._add(
                        {"line": asdict(Line(part=self.part, name=name, status="failed", reason=told(error)))}
                    )

    def end(self, error: str = "") -> None:
        """Say that the part is over, and why if it ended early."""
        self._add({"end": error})

    def _add(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_lines(part: str, names: Sequence[str], path: Path, ended: str) -> list[Line]:
    """What a part's sheet holds; lines that it never reached have failed.

    Parameters
    ----------
    part : str
        Its name.
    names : sequence of str
        All lines that it should have.
    path : path
        Of the sheet.
    ended : str
        How the process ended, if not by itself.
    """
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    taken: dict[str, Line] = {}
    ends = []
    for row in map(json.loads, rows):
        if "line" in row:
            taken[row["line"]["name"]] = Line(**row["line"])
        else:
            ends.append(row["end"])
    why = ended or (ends[-1] if ends and ends[-1] else "the part ended without this line")
    missing = {name: Line(part=part, name=name, status="failed", reason=why) for name in names}
    return list((missing | taken).values())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lines_table(lines: Sequence[Line]) -> str:
    """The lines for people."""
    out, part = [], ""
    for line in lines:
        if line.part != part:
            part = line.part
            out.append(f"{part}:")
        found = _short(line.value if line.status != "dry" else line.on_cpu)
        text = f"  {line.status:8s}  {line.name}"
        if line.status == "dry":
            text += f"  (on a CPU: {found} {line.unit}".rstrip() + ")"
        elif line.value is not None:
            text += f"  {found} {line.unit}".rstrip()
        if line.wish:
            text += (
                f"  [wanted {line.wish}"
                + ("" if line.met is None else ", met" if line.met else ", missed")
                + "]"
            )
        if line.status == "failed":
            text += f"  {line.reason.splitlines()[-1] if line.reason else ''}"
        out.append(text)
    return "\n".join(out)
