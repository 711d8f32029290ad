"""The fewest moves of an even split that reach a time in one small layer, by trying every placement."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

__all__ = ["fewest_moves"]


def fewest_moves(
    load_E: Any, live: Any, capacity_G: Any, speed_G: Any, time: float, fill: str = "none"
) -> int | None:
    """Moves of the best placement, None where none is in time; `live` are the experts on each GPU."""
    experts = len(load_E)
    choose = itertools.combinations_with_replacement if fill == "copies" else itertools.combinations
    rows = []
    for slots in capacity_G:
        sizes = [slots] if fill != "none" else range(slots + 1)
        rows.append([row for size in sizes for row in choose(range(experts), size)])
    least = None
    for chosen in itertools.product(*rows):
        count_E = np.zeros(experts)
        for row in chosen:
            np.add.at(count_E, list(row), 1)
        if not count_E.all():
            continue
        piece_E = load_E / count_E
        token_G = np.array([sum(piece_E[expert] for expert in row) for row in chosen])
        if (token_G <= time * speed_G * (1 + 1e-9)).all():
            moved = sum(len(set(row) - set(old)) for row, old in zip(chosen, live, strict=True))
            least = moved if least is None else min(least, moved)
    return least
