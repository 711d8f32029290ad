"""Recordings as tables: one row for each layer and expert, or a bare matrix."""

from __future__ import annotations

import csv
import io
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

import numpy as np

from moeless_opt.problems.io.recordings.source import Found, Source, cut

__all__ = ["TableReader"]

_LAYER = ("layer", "layer_id", "layer_idx", "layer_index", "layer_no", "moe_layer", "layer_name", "l")
_EXPERT = ("expert", "expert_id", "expert_idx", "expert_index", "expert_no", "logical_expert", "e")
_COUNT = (
    "count", "counts", "tokens", "token_count", "num_tokens", "n_tokens", "load", "loads", "value", "hits",
    "frequency", "freq", "activations", "n",
)  # fmt: skip
_SCENARIO = ("scenario", "workload", "dataset", "data_set", "domain", "task", "category")
_STEP = ("step", "iteration", "iter", "forward_pass_id", "pass", "window")


class TableReader:
    """Reads the text of one table."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, text: str) -> Found:
        """Read the table: long where it has a header or three columns, else a bare matrix."""
        rows = self._rows(text)
        first = next(rows, None)
        if first is None:
            raise self.source.error("is a table without rows")
        line, cells = first
        if any(_number(cell) is None for cell in cells):
            columns = self._columns(cells)
            return self._from_long(rows, columns, len(cells), ())
        if len(cells) > 3:
            return self._from_matrix(chain([first], rows))
        if len(cells) != 3:
            raise self.source.error(
                f"line {line}: {len(cells)} columns without a header; expected layer, expert, count or one "
                "row per layer with a column per expert"
            )
        note = "no header: columns taken as layer, expert, count"
        return self._from_long(chain([first], rows), {"layer": 0, "expert": 1, "count": 2}, 3, (note,))

    def is_long(self, names: list[str]) -> bool:
        """Whether a header has columns for layer, expert and count."""
        return {"layer", "expert", "count"} <= self._roles(names).keys()

    def from_columns(self, names: list[str], columns: Iterable[Iterable[object]]) -> Found:
        """Read a long table that is in memory, of these columns."""
        rows = (
            (number, [str(cell).strip() for cell in row])
            for number, row in enumerate(zip(*columns, strict=True), start=1)
        )
        return self._from_long(rows, self._columns(names), len(names), ())

    def _rows(self, text: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (line number, cells) of the rows that are neither blank nor comments."""
        first = next((line for line in io.StringIO(text) if line.strip() and not line.startswith("#")), "")
        delimiter = max(",;\t|", key=first.count)
        if first.count(delimiter) == 0:
            delimiter = " "
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter == " "
        )
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells) and not cells[0].startswith("#"):
                    trimmed = [cell.strip() for cell in cells]
                    yield reader.line_num, [c for c in trimmed if c] if delimiter == " " else trimmed
        except csv.Error as error:
            raise self.source.error(f"line {reader.line_num}: no readable table ({error})") from None

    def _roles(self, names: list[str]) -> dict[str, int]:
        """Which column plays which part, as far as the header says."""
        header = [_canonical(name) for name in names]
        columns: dict[str, int] = {}
        roles = {"layer": _LAYER, "expert": _EXPERT, "count": _COUNT, "scenario": _SCENARIO, "step": _STEP}
        for role, known in roles.items():
            known = (self.source.key, *known) if role == "count" and self.source.key is not None else known
            found = next(
                (header.index(_canonical(name)) for name in known if _canonical(name) in header), None
            )
            if found is not None:
                columns[role] = found
        return columns

    def _columns(self, names: list[str]) -> dict[str, int]:
        columns = self._roles(names)
        missing = [role for role in ("layer", "expert", "count") if role not in columns]
        if missing:
            raise self.source.error(
                f"is a table without a column for {' and '.join(missing)}; its first row is "
                f"{cut(', '.join(names))!r}; expected a header with layer, expert, count"
            )
        return columns

    def _from_long(
        self,
        rows: Iterable[tuple[int, list[str]]],
        columns: dict[str, int],
        width: int,
        notes: tuple[str, ...],
    ) -> Found:
        """One row for each (scenario or step,) layer and expert; repeated rows add up, absent ones are 0."""
        lead: Literal["steps", "scenarios"] = "scenarios" if "scenario" in columns else "steps"
        lead_column = columns.get("scenario", columns.get("step"))
        layer_column, expert_column, count_column = (columns[role] for role in ("layer", "expert", "count"))
        index: dict[str, int] = {}  # the same few cells come back in every step
        scenario_at: dict[str, int] = {}
        at_R, layer_R, expert_R, count_R = array("q"), array("q"), array("q"), array("d")  # R: rows
        for line, cells in rows:
            if len(cells) != width:
                raise self.source.error(f"line {line}: {len(cells)} cells, the first row has {width}")
            for role, column in (("layer", layer_column), ("expert", expert_column)):
                if cells[column] not in index:
                    index[cells[column]] = self._index(line, role, cells[column])
            count = _number(cells[count_column])
            if count is None or not 0 <= count < math.inf:
                raise self.source.error(
                    f"line {line}: count is {cut(cells[count_column], 40)!r}, must be a number >= 0"
                )
            scenario = "" if lead_column is None else cells[lead_column]
            at_R.append(scenario_at.setdefault(scenario, len(scenario_at)))
            layer_R.append(index[cells[layer_column]])
            expert_R.append(index[cells[expert_column]])
            count_R.append(count)
        if not count_R:
            raise self.source.error("is a table with a header and no rows")
        layers, row_R = np.unique(layer_R, return_inverse=True)
        shape = (len(scenario_at), len(layers), self.source.expert_count(max(expert_R) + 1, "the table"))
        if math.prod(shape) * 8 > self.source.max_bytes:
            raise self.source.error(
                f"names expert {shape[2] - 1} of {shape[1]} layers in {shape[0]} scenarios, over "
                f"{self.source.most}; raise MOELESS_MAX_READ to read it anyway"
            )
        cell_R = np.ravel_multi_index((np.asarray(at_R), row_R, np.asarray(expert_R)), shape)
        load_TLE = np.bincount(cell_R, weights=np.asarray(count_R), minlength=math.prod(shape)).reshape(shape)
        repeated = len(cell_R) - np.count_nonzero(np.bincount(cell_R))
        if repeated:
            notes = (*notes, f"{repeated} repeated rows added up")
        return Found(
            load=load_TLE,
            format="csv",
            axis=lead,
            layers=tuple(layers.tolist()),
            scenarios=() if lead_column is None else tuple(scenario_at),
            notes=notes,
        )

    def _from_matrix(self, rows: Iterable[tuple[int, list[str]]]) -> Found:
        """Read a bare matrix: a row for each layer, a column for each expert."""
        if self.source.key is not None:
            raise self.source.error(
                f"is a table without a header and has no column {self.source.key!r}; leave key out"
            )
        loads: list[list[float]] = []
        for line, cells in rows:
            values = [_number(cell) for cell in cells]
            if loads and len(cells) != len(loads[0]):
                raise self.source.error(f"line {line}: {len(cells)} cells, the first row has {len(loads[0])}")
            if None in values:
                column = values.index(None)
                raise self.source.error(
                    f"line {line}, column {column + 1}: {cut(cells[column], 40)!r} is no number"
                )
            loads.append([value for value in values if value is not None])
        note = "no header: a row for each layer, a column for each expert"
        return Found(load=np.array(loads), format="csv-matrix", notes=(note,))

    def _index(self, line: int, role: str, cell: str) -> int:
        """Return the index in a cell: a number, or a name that has one, like "model.layers.3.mlp"."""
        value = _number(cell)
        if value is not None and value == int(value if math.isfinite(value) else -1) and 0 <= value < 2**31:
            return int(value)
        digits = re.findall(r"\d+", cell) if value is None else []
        if len(digits) == 1 and len(digits[0]) < 10 and "-" not in cell:
            return int(digits[0])
        raise self.source.error(f"line {line}: {role} is {cut(cell, 40)!r}, must be a whole number from 0")


def _number(cell: str) -> float | None:
    # float() also takes "1_000" and other scripts' digits; a table of counts has neither.
    if "_" in cell or not cell.isascii():
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _canonical(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name.strip()).lower()).strip("_")
