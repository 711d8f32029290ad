"""Recordings as tables: one row for each layer and expert, or a bare matrix."""

from __future__ import annotations

import csv
import io
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.io.recordings.cells import Cells
from moeless_opt.problems.io.recordings.choose import Chooser
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
_RANK = ("rank", "ep_rank", "global_rank")
_SLOT = ("slot", "slot_id", "physical_expert", "physical_expert_id", "physical_id", "physical")


class TableReader:
    """Reads the text of one table."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, text: str) -> Found:
        """Read the table: long (header or three columns), wide (a column per expert), or bare."""
        rows = self._rows(text)
        first = next(rows, None)
        if first is None:
            raise self.source.error("is a table without rows")
        line, cells = first
        if any(_number(cell) is None for cell in cells):
            rows, again = self._without_headers(rows, cells)
            wide = self._wide_columns(cells)
            if wide is not None and not self.is_long(cells):
                found = self._from_wide(rows, cells, wide)
            else:
                columns = self._columns(cells)
                found = self._from_long(rows, columns, len(cells), _left_out(cells, columns))
            return found.with_notes(*(f"{count} repeated headers left out" for count in again if count))
        if len(cells) > 3:
            if cells == [str(i) for i in range(len(cells))]:
                rows, again = self._without_headers(rows, cells)
                return self._from_matrix(rows).with_notes("first row taken as the experts' numbers")
            return self._from_matrix(chain([first], rows))
        if len(cells) != 3:
            raise self.source.error(
                f"line {line}: {len(cells)} columns without a header; expected layer, expert, count or one "
                "row per layer with a column per expert"
            )
        note = "no header: columns taken as layer, expert, count"
        found = self._from_long(chain([first], rows), {"layer": 0, "expert": 1, "count": 2}, 3, (note,))
        busy = np.count_nonzero(found.load)
        if busy * 8 < found.load.size and found.load.size > 64:
            raise self.source.error(
                f"has three columns without a header; as layer, expert, count they fill {busy} of "
                f"{found.load.size} places, so they may be loads of three experts: give them a header"
            )
        return found

    def _without_headers(
        self, rows: Iterable[tuple[int, list[str]]], header: list[str]
    ) -> tuple[Iterator[tuple[int, list[str]]], list[int]]:
        """The rows without the header where it comes again (files joined), and how often it did."""
        again = [0]

        def others() -> Iterator[tuple[int, list[str]]]:
            for line, cells in rows:
                if cells == header:
                    again[0] += 1
                else:
                    yield line, cells

        return others(), again

    def _wide_columns(self, names: list[str]) -> dict[int, int] | None:
        """Column of each expert where a header names experts: ``expert_7``, ``e7`` or ``7``."""
        found: dict[int, int] = {}
        for column, name in enumerate(names):
            match = re.fullmatch(r"(?:(?:logical_)?(?:experts?|exp|e)_?)?(\d{1,6})", _canonical(name))
            if match is None:
                continue
            if int(match[1]) in found:
                raise self.source.error(f"names expert {int(match[1])} in two columns of its header")
            found[int(match[1])] = column
        return found if len(found) > 1 else None

    def _from_wide(
        self, rows: Iterable[tuple[int, list[str]]], names: list[str], experts: dict[int, int]
    ) -> Found:
        """A row for each (step,) (rank) and layer, a column for each expert."""
        roles = self._roles(names)
        left = [column for column in range(len(names)) if column not in experts.values()]
        index = next((column for column in left if not names[column] and len(left) == 1), None)
        layer_column = roles.get("layer", index)
        if layer_column is None and self.source.layer is None and left:
            raise self.source.error(
                f"has a column for each expert and none for the layer; its others: "
                f"{cut(', '.join(names[column] for column in left))!r}"
            )
        count = max(experts) + 1
        if len(experts) < count:
            missing = next(expert for expert in range(count) if expert not in experts)
            raise self.source.error(f"has a column for expert {count - 1} and none for expert {missing}")
        lead = roles.get("scenario", roles.get("step"))
        scenario_at: dict[str, int] = {}
        cells = Cells(self.source)
        for number, (line, row) in enumerate(rows):
            if len(row) != len(names):
                raise self.source.error(f"line {line}: {len(row)} cells, the first row has {len(names)}")
            load_E = np.array([self._count(line, row[experts[expert]]) for expert in range(count)])
            layer = number if self.source.layer is None else self.source.layer
            if layer_column is not None:
                layer = self._index(line, "layer", row[layer_column])
            step = None if lead is None else scenario_at.setdefault(row[lead], len(scenario_at))
            rank = self._index(line, "rank", row[roles["rank"]]) if "rank" in roles else None
            cells.add(f"line {line}", rank, step, layer, load_E)
        if cells.empty:
            raise self.source.error("is a table with a header and no rows")
        found = cells.found("csv-wide")
        axis: Literal["steps", "scenarios"] = "scenarios" if "scenario" in roles else "steps"
        return replace(found, axis=axis, scenarios=tuple(scenario_at))

    def _count(self, line: int, cell: str) -> float:
        count = _number(cell)
        if count is None or not 0 <= count < math.inf:
            raise self.source.error(f"line {line}: count is {cut(cell, 40)!r}, must be a number >= 0")
        return count

    def is_long(self, names: list[str]) -> bool:
        """Whether a header has columns for layer, expert and count."""
        return {"layer", "expert", "count"} <= self._roles(names).keys() and self._wide_columns(names) is None

    def from_columns(self, names: list[str], columns: Iterable[Iterable[object]]) -> Found:
        """Read a long table that is in memory, of these columns."""
        rows = (
            (number, [str(cell).strip() for cell in row])
            for number, row in enumerate(zip(*columns, strict=True), start=1)
        )
        roles = self._columns(names)
        return self._from_long(rows, roles, len(names), _left_out(names, roles))

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
        roles = {
            "layer": _LAYER, "expert": _EXPERT, "count": _COUNT, "scenario": _SCENARIO, "step": _STEP,
            "rank": _RANK, "slot": _SLOT,
        }  # fmt: skip
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
        if "expert" not in columns and "slot" in columns:
            columns["expert"] = columns["slot"]
        missing = [role for role in ("layer", "expert", "count") if role not in columns]
        if missing == ["layer"] and self.source.layer is not None:
            missing = []
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
        expert_column, count_column = columns["expert"], columns["count"]
        layer_column, rank_column = columns.get("layer"), columns.get("rank")
        ranks: dict[str, int] = {}
        rank_R: list[str] = []
        index: dict[str, int] = {}  # the same few cells come back in every step
        scenario_at: dict[str, int] = {}
        at_R, layer_R, expert_R, count_R = array("q"), array("q"), array("q"), array("d")  # R: rows
        for line, cells in rows:
            if len(cells) != width:
                raise self.source.error(f"line {line}: {len(cells)} cells, the first row has {width}")
            for role, column in (("layer", layer_column), ("expert", expert_column), ("rank", rank_column)):
                if column is not None and cells[column] not in index:
                    index[cells[column]] = self._index(line, role, cells[column])
            if rank_column is not None:
                ranks[cells[rank_column]] = index[cells[rank_column]]
                rank_R.append(cells[rank_column])
            count = self._count(line, cells[count_column])
            scenario = "" if lead_column is None else cells[lead_column]
            at_R.append(scenario_at.setdefault(scenario, len(scenario_at)))
            layer_R.append(self.source.layer or 0 if layer_column is None else index[cells[layer_column]])
            expert_R.append(index[cells[expert_column]])
            count_R.append(count)
        if not count_R:
            raise self.source.error("is a table with a header and no rows")
        if len(ranks) > 1 and sorted(ranks.values()) != list(range(len(ranks))):
            missing = next(rank for rank in range(len(ranks) + 1) if rank not in ranks.values())
            raise self.source.error(f"has no row of rank {missing}, but of ranks up to {max(ranks.values())}")
        layers, row_R = np.unique(layer_R, return_inverse=True)
        physical = self.source.as_ == "physical" or columns.get("slot") == expert_column
        seen = max(expert_R) + 1
        count = seen if physical else self.source.expert_count(seen, "the table")
        if physical and self.source.map is not None:
            count = max(count, self.source.map.shape[-1])
        shape = (len(scenario_at), len(layers), count)
        if math.prod(shape) * 8 > self.source.max_bytes:
            raise self.source.error(
                f"names expert {shape[2] - 1} of {shape[1]} layers in {shape[0]} scenarios, over "
                f"{self.source.most}; raise MOELESS_MAX_READ to read it anyway"
            )
        cell_R = np.ravel_multi_index((np.asarray(at_R), row_R, np.asarray(expert_R)), shape)
        load_TLE = np.bincount(cell_R, weights=np.asarray(count_R), minlength=math.prod(shape)).reshape(shape)
        self._check_end(cell_R, shape[2])
        if lead_column is not None and lead == "steps":
            self._check_last(np.asarray(at_R), row_R, "step")
        if len(ranks) > 1:
            self._check_last(np.asarray([index[name] for name in rank_R]), row_R, "rank")
        repeated = len(cell_R) - np.count_nonzero(np.bincount(cell_R))
        if len(ranks) > 1:
            notes = (*notes, f"{len(ranks)} ranks added up")
        elif repeated:
            notes = (*notes, f"{repeated} repeated rows added up")
        found = Found(
            load=load_TLE,
            format="csv",
            axis=lead,
            layers=tuple(layers.tolist()),
            scenarios=() if lead_column is None else tuple(scenario_at),
            notes=notes,
            rank=next(iter(ranks.values())) if len(ranks) == 1 else None,
            sparse=len(np.unique(cell_R)) < math.prod(shape),
        )
        if not physical or self.source.as_ == "counts":
            return found
        logical = Chooser(self.source).read_physical(load_TLE, "the table's loads")
        return replace(found, load=logical.load, notes=(*notes, *logical.notes))

    def _check_last(self, part_R: IntArray, layer_R: IntArray, what: str) -> None:
        """Refuse a table whose last step (or rank) lacks layers that all others have."""
        last = part_R[-1]
        counts = [len(np.unique(layer_R[part_R == part])) for part in np.unique(part_R) if part != last]
        have = len(np.unique(layer_R[part_R == last]))
        if counts and have < min(counts):
            raise self.source.error(
                f"ends after {have} layers of a {what}; others have {min(counts)}: cut off?"
            )

    def _check_end(self, cell_R: IntArray, experts: int) -> None:
        """Refuse a table that ends within a layer, where all others list every expert."""
        last = cell_R[-1] // experts
        groups, sizes = np.unique(np.unique(cell_R) // experts, return_counts=True)
        others = sizes[groups != last]
        if (
            len(others) > 1
            and others[0] > 1
            and (others == others[0]).all()
            and sizes[groups == last][0] < others[0]
        ):
            raise self.source.error(
                f"ends after {sizes[groups == last][0]} experts of a layer; all others have {others[0]}: "
                "cut off?"
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
        if not loads:
            raise self.source.error("is a table with a header and no rows")
        load_LE = np.array(loads)
        self._check_matrix(load_LE)
        note = "no header: a row for each layer, a column for each expert"
        if self.source.layer is not None:  # rows are steps of the layer that the file's name tells
            return Found(
                load=load_LE[:, None], format="csv-matrix", axis="steps", layers=(self.source.layer,)
            )
        return Chooser(self.source).read_array(load_LE, "the table", "csv-matrix").with_notes(note)

    def _check_matrix(self, load_LE: FloatArray) -> None:
        """Refuse what looks like numbers of layers or experts in a table that has no header to say so."""
        if self.source.as_ is not None or len(load_LE) < 3:
            return
        first = load_LE[:, 0]
        if (np.diff(first) == 1).all() and first[0] in (0, 1, 3):
            raise self.source.error(
                f"is a table without a header whose first column counts {first[0]:.0f}, {first[1]:.0f}, "
                "...: it may "
                "number the layers; give it a header (layer, 0, 1, ...), or --as counts (as_='counts')"
            )
        if load_LE.shape[1] == 4 and len(np.unique(load_LE[:, :3], axis=0)) == len(load_LE):
            places = math.prod(len(np.unique(load_LE[:, i])) for i in range(3))
            if places == len(load_LE):
                raise self.source.error(
                    "is a table of four columns without a header: it may be step, layer, expert, count or "
                    "loads of "
                    "four experts; give it a header, or --as counts (as_='counts')"
                )

    def _index(self, line: int, role: str, cell: str) -> int:
        """Return the index in a cell: a number, or a name that has one, like "model.layers.3.mlp"."""
        value = _number(cell)
        if value is not None and value == int(value if math.isfinite(value) else -1) and 0 <= value < 2**31:
            return int(value)
        digits = re.findall(r"\d+", cell) if value is None else []
        if len(digits) == 1 and len(digits[0]) < 10 and "-" not in cell:
            return int(digits[0])
        raise self.source.error(f"line {line}: {role} is {cut(cell, 40)!r}, must be a whole number from 0")


def _left_out(names: list[str], columns: dict[str, int]) -> tuple[str, ...]:
    """A note of the columns that play no part."""
    others = [name for at, name in enumerate(names) if name and at not in columns.values()]
    return (f"columns left out: {cut(', '.join(others))}",) if others else ()


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
