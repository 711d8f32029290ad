"""Rows of loads by rank, step and layer, put together: nothing twice, nothing missing, ranks added up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.io.recordings.source import Found, Source

__all__ = ["Cells"]


class Cells:
    """Loads [experts] of one layer in one step by one rank, until all are there.

    Parameters
    ----------
    source : Source
        What is read.
    grows : bool
        Whether rows may differ in length: what they do not list is 0.
    adds : bool
        Whether a step may have several rows of a layer (micro-batches), which add up.
    """

    def __init__(self, source: Source, *, grows: bool = False, adds: bool = False) -> None:
        self.source, self.grows, self.adds = source, grows, adds
        self.repeated = 0
        self.rows: dict[tuple[int, int, int], NDArray[Any]] = {}

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self.rows

    def add(self, where: str, rank: int | None, step: int | None, layer: int, load_E: NDArray[Any]) -> None:
        """Take one row; the same rank, step and layer again is refused, but what names no step adds up."""
        at = (-1 if rank is None else rank, -1 if step is None else step, layer)
        if not self.grows and self.rows:
            first = next(iter(self.rows.values()))
            if len(load_E) != len(first):
                raise self.source.error(
                    f"{where}: layer {layer} has {len(load_E)} experts, the first row has {len(first)}: "
                    "two models?"
                )
        if at not in self.rows:
            self.rows[at] = load_E
        elif step is None or self.adds:
            old = self.rows[at]
            total = np.zeros(max(len(old), len(load_E)))
            total[: len(old)] += old
            total[: len(load_E)] += load_E
            self.rows[at] = total
            self.repeated += 1
        else:
            raise self.source.error(f"{where}: layer {layer} comes twice in step {step}: two recordings?")

    def found(self, form: str, *, by_stage: int | None = None) -> Found:
        """All rows together; every rank must have every layer in every step.

        With `by_stage`, ranks stand in groups of that many, and each must have what its group has.
        """
        ranks = sorted({rank for rank, *_ in self.rows})
        steps = sorted({step for _, step, _ in self.rows})
        layers = sorted({layer for *_, layer in self.rows})
        if by_stage is None and ranks != [-1] and len(ranks) > 1 and ranks != list(range(ranks[-1] + 1)):
            missing = next(rank for rank in range(ranks[-1]) if rank not in ranks)
            raise self.source.error(f"has nothing of rank {missing}, but of ranks 0 to {ranks[-1]}")
        for members in self._groups(ranks, by_stage):
            here = sorted({(step, layer) for rank, step, layer in self.rows if rank in members})
            need = here if by_stage else [(step, layer) for step in steps for layer in layers]
            for rank in members:
                for step, layer in need:
                    if (rank, step, layer) not in self.rows:
                        who = "" if rank < 0 else f"of rank {rank} "
                        when = "" if step < 0 else f" in step {step}"
                        raise self.source.error(
                            f"has no row {who}for layer {layer}{when}, but for others: cut off?"
                        )
        width = max(map(len, self.rows.values()))
        if len(steps) * len(layers) * width * 8 > self.source.max_bytes:
            raise self.source.error(f"takes over {self.source.most}; raise MOELESS_MAX_READ to read it")
        load_TLE = np.zeros((len(steps), len(layers), width))
        step_at = {step: i for i, step in enumerate(steps)}
        layer_at = {layer: i for i, layer in enumerate(layers)}
        for (_, step, layer), load_E in self.rows.items():
            load_TLE[step_at[step], layer_at[layer], : len(load_E)] += load_E
        one = ranks[0] if len(ranks) == 1 and ranks[0] >= 0 else None
        notes = (f"ranks 0 to {ranks[-1]} added up",) if len(ranks) > 1 else ()
        if self.repeated:
            notes = (*notes, f"{self.repeated} repeated rows added up")
        return Found(
            load=load_TLE,
            format=form,
            axis="steps",
            layers=tuple(layers),
            scenarios=() if steps == [-1] else tuple(f"step {step}" for step in steps),
            notes=notes,
            rank=one,
            sparse=self.grows,
        )

    def _groups(self, ranks: list[int], by_stage: int | None) -> list[list[int]]:
        if by_stage is None:
            return [ranks]
        return [ranks[i : i + by_stage] for i in range(0, len(ranks), by_stage)]
