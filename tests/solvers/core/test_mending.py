"""Mending a placement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.solvers.core.mending import mended


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_expert_comes_back_and_no_gpu_overflows(seed: int, free_first: bool) -> None:
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(1, 6))
    capacity = rng.integers(0, 5, gpus).tolist()
    most = sum(capacity)
    experts = int(rng.integers(1, most + 1)) if most else 0
    while sum(min(slots, experts) for slots in capacity) < experts:
        experts -= 1
    content = [rng.permutation(experts)[: rng.integers(0, 6)].tolist() for _ in range(gpus)]
    load = rng.integers(0, 9, experts).tolist()
    rows = mended(load, content, capacity, rng.uniform(0.5, 2.0, gpus).tolist(), free_first=free_first)
    assert all(len(set(row)) == len(row) <= slots for row, slots in zip(rows, capacity, strict=True))
    assert set().union(*rows) == set(range(experts))
    if set().union(*content) == set(range(experts)) and all(
        len(row) <= slots for row, slots in zip(content, capacity, strict=True)
    ):
        assert rows == content, "nothing was broken"


@pytest.mark.parametrize(("free_first", "rows"), [(False, [[0, 2], [0, 1]]), (True, [[0, 1], [0, 1, 2]])])
def test_a_free_slot_or_a_less_busy_gpu(free_first: bool, rows: list[list[int]]) -> None:
    """Expert 2 is missing; GPU 0 is the less busy one and full, and holds a second replica of expert 1."""
    content = [[0, 1], [0, 1]]
    assert mended([4.0, 2.0, 3.0], content, [2, 3], [2.0, 1.0], free_first=free_first) == rows


def test_an_overfull_gpu_gives_up_what_others_have() -> None:
    assert mended([5.0, 1.0, 3.0], [[0, 1, 2], [0]], [2, 1]) == [[1, 2], [0]]
