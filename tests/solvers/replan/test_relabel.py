"""Relabelling by linear assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.replan.relabel import relabel, seat, seat_all


def kept(live_GC: np.ndarray, new_GC: np.ndarray) -> int:
    return sum(
        len({int(e) for e in a if e >= 0} & {int(e) for e in b if e >= 0})
        for a, b in zip(live_GC, new_GC, strict=True)
    )


def placement(rng: np.random.Generator, experts: int, gpus: int, width: int) -> np.ndarray:
    return np.array([rng.choice(experts, size=width, replace=False) for _ in range(gpus)])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 3))
def test_keeps_as_much_as_the_best_permutation(seed: int, gpus: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    experts = width + 4
    live, new = placement(rng, experts, gpus, width), placement(rng, experts, gpus, width)
    out = relabel(live[None], new[None], experts=experts)[0]
    best = max(kept(live, new[list(order)]) for order in itertools.permutations(range(gpus)))
    assert kept(live, out) == best
    assert sorted(sorted(row) for row in out.tolist()) == sorted(sorted(row) for row in new.tolist())


def test_only_alike_gpus_trade() -> None:
    live = np.array([[[0, 1], [2, 3]]])
    new = np.array([[[2, 3], [0, 1]]])
    assert relabel(live, new, experts=4).tolist() == live.tolist()
    faster = relabel(live, new, experts=4, speed_G=[1.0, 2.0])
    assert faster.tolist() == new.tolist()
    wider = relabel(live, np.array([[[2, -1], [0, 1]]]), experts=4, capacity_LG=[[1, 2]])
    assert set(wider[0, 0].tolist()) == {2, -1}


def test_the_node_decides_among_equals() -> None:
    # Nothing can stay on its GPU; experts 4 and 5 live on node 1 (GPUs 2 and 3), 0 and 1 on node 0.
    live = np.array([[[0], [1], [4], [5]]])
    new = np.array([[[9], [8], [9], [8]]])
    assert kept(live[0], relabel(live, new, experts=10, node_G=[0, 0, 1, 1])[0]) == 0
    live = np.array([[[0, 2], [1, 3], [4, 6], [5, 7]]])
    new = np.array([[[4, 5], [0, 1], [8, 9], [10, 11]]])
    out = relabel(live, new, experts=12, node_G=[0, 0, 1, 1])[0].tolist()
    homes = {tuple(sorted(row)): gpu // 2 for gpu, row in enumerate(out)}
    assert homes[0, 1] == 0
    assert homes[4, 5] == 1


def test_seating_keeps_slots_and_leaves_no_hole() -> None:
    assert seat([5, 6, 7], [7, 5, 9]) == [5, 9, 7]
    assert seat([5, 6, 7], [7]) == [7, -1, -1]
    assert seat([5, -1, -1], [5, 6]) == [5, 6, -1]
    assert seat([5, 6], []) == [-1, -1]


def test_shapes_must_agree() -> None:
    with pytest.raises(ProblemError, match="would need the live placement's"):
        relabel(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)), experts=4)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_seating_all_is_seating_each(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    live, content = [], []
    for _ in range(6):
        held = rng.permutation(8)[: rng.integers(0, width + 1)].tolist()
        live.append(held + [-1] * (width - len(held)))
        kind = rng.integers(0, 3)  # as it is, in another order, or something else
        other = rng.permutation(8)[: rng.integers(0, width + 1)].tolist()
        content.append([held, rng.permutation(held).astype(int).tolist(), other][kind])
    each = [seat(row, experts) for row, experts in zip(live, content, strict=True)]
    assert seat_all(live, content) == each
