"""The least largest time of shares in multiples of 1/N on a placement, by trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["best_entries", "compositions"]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of so many ordered numbers of at least 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def best_entries(load_E: Any, slots_GC: Any, speed_G: Any, entries: int) -> float:
    """Least largest time of one layer."""
    places = [
        [g for g, row in enumerate(slots_GC) for held in row if held == expert]
        for expert in range(len(load_E))
    ]
    ways = [list(compositions(entries, len(gpus))) for gpus in places]
    least = np.inf
    for chosen in itertools.product(*ways):
        token_G = np.zeros(len(slots_GC))
        for load, gpus, counts in zip(load_E, places, chosen, strict=True):
            for gpu, count in zip(gpus, counts, strict=True):
                token_G[gpu] += load * count / entries
        least = min(least, float((token_G / speed_G).max()))
    return least
