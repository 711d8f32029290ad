"""Placements and the arrays derived from them, against plain loops."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import (
    Placement,
    contiguous,
    equal_shares,
    held_LGE,
    replica_counts,
    replica_keys,
    seat_in_place,
    second_copies,
    without_copies,
)
from tests.strategies import few, planned


@few
@given(planned())
def test_derived_arrays(drawn: Any) -> None:
    problem, plan = drawn
    slots, experts = plan.slots_LGC, problem.experts
    layers, gpus, _ = slots.shape
    count, held, share = (
        replica_counts(slots, experts),
        held_LGE(slots, experts),
        equal_shares(slots, experts),
    )
    placement = Placement(slots_LGC=slots, experts=experts)
    assert (placement.replicas_LE == count).all()
    assert (placement.held_LGE == held).all()
    for x in range(layers):
        everyone = slots[x].ravel().tolist()
        for e in range(experts):
            assert count[x, e] == everyone.count(e)
            assert share[x][slots[x] == e].tolist() == [1 / everyone.count(e)] * everyone.count(e)
            assert plan.gpus_of(problem.loads.layers[x], e) == [g for g in range(gpus) if e in slots[x, g]]
        for g in range(gpus):
            row = slots[x, g].tolist()
            assert held[x, g].tolist() == [e in row for e in range(experts)]
            assert placement.used_LG[x, g] == sum(e >= 0 for e in row)
            for e in range(experts):
                want = plan.share_LGC[x, g, row.index(e)] if e in row else 0.0
                assert plan.share_LGE[x, g, e] == want
    assert (share[slots < 0] == 0).all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[[0, -1], [0, -1]]], r"placement\.slots\[0\]: expert 1 has no replica; it needs one"),
        ([[[0, 2], [1, -1]]], r"placement\.slots\[0\]\[0\]\[1\]: is 2, must be from -1 to 1"),
        ([[[0, -2], [1, -1]]], r"placement\.slots\[0\]\[0\]\[1\]: is -2"),
        ([[0, 1]], r"placement\.slots: has shape \(1, 2\), must be \[layers, gpus, slots\]"),
        ([[[0.5, 1]]], r"placement\.slots: must hold whole numbers"),
        ([[[0], [-1]], [[0]]], r"placement\.slots: not an array"),
        ([[[-1], [0]]] * 0, r"placement\.slots: has shape"),
        ([[[0]]], r"placement\.slots: has 1 slots per layer, 2 experts need one each"),
        (None, r"placement\.slots: must hold numbers"),
    ],
)
def test_malformed(slots: Any, message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        Placement(slots_LGC=slots, experts=2)


@pytest.mark.parametrize("experts", [0, -3, 1.5, 10**12, "2"])
def test_malformed_number_of_experts(experts: Any) -> None:
    with pytest.raises(ProblemError, match=r"^placement\.experts"):
        Placement(slots_LGC=[[[0, 1]]], experts=experts)


def test_whatever_can_be_a_placement() -> None:
    slots = np.array([[[0, -1], [1, 0]]])
    want = Placement(slots_LGC=slots, experts=2)
    assert want.slots_LGC.dtype == np.int32
    assert Placement.of(slots.tolist(), 2) == want
    assert Placement.of(want, 2) is want
    assert Placement.of(type("Plan", (), {"slots_LGC": slots})(), 2) == want
    with pytest.raises(ProblemError, match=r"^current\.slots\[0\]: expert 2 has no replica"):
        Placement.of(want, 3)
    with pytest.raises(ProblemError, match=r"^current\.slots: must hold numbers"):
        Placement.of("plan.json", 3)
    slots[0, 0, 0] = 1
    assert want.slots_LGC[0, 0, 0] == 0


# --- static expert parallelism ---------------------------------------------------------------------------


def test_divisible_case_is_megatrons_mapping() -> None:
    slots_LGC = contiguous(8, [[2, 2, 2, 2], [3, 3, 3, 3]])
    assert slots_LGC[:, :, :2].tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    assert (slots_LGC[:, :, 2] == -1).all()
    assert slots_LGC.dtype == np.int32


def test_unequal_slots_and_a_gpu_without_any() -> None:
    assert contiguous(6, [[1, 0, 4, 2]]).tolist() == [
        [[0, -1, -1, -1], [-1, -1, -1, -1], [1, 2, 3, -1], [4, 5, -1, -1]]
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_every_expert_once_in_order_and_as_equal_as_slots_allow(capacity: list[int], experts: int) -> None:
    assume(sum(capacity) >= experts)
    slots_GC = contiguous(experts, [capacity])[0]
    held = [row[row >= 0] for row in slots_GC]
    assert np.concatenate(held).tolist() == list(range(experts))
    sizes = [len(row) for row in held]
    for size, room in zip(sizes, capacity, strict=True):
        assert size <= room
        # Only a full GPU may hold less than the largest block minus one.
        assert size == room or size >= max(sizes) - 1


def test_too_few_slots_names_the_layer() -> None:
    with pytest.raises(
        InfeasibleError, match="layer 1: 5 experts need at least 5 slots, there are 3: 2 too few"
    ):
        contiguous(5, [[3, 3], [3, 0]])


@pytest.mark.parametrize("capacity", [[], [[]], [2, 2], [[2.5, 3.0]], [[4, -1]]])
def test_bad_capacities(capacity: list[object]) -> None:
    with pytest.raises(
        ProblemError, match=r"capacity: must be a non-empty \[layers, gpus\] array of integers"
    ):
        contiguous(2, capacity)  # type: ignore[arg-type]


def test_no_experts() -> None:
    with pytest.raises(ProblemError, match="experts: must be at least 1, got 0"):
        contiguous(0, [[1]])


@few
@given(st.integers(0, 2**32 - 1))
def test_what_is_held_once_and_again(seed: int) -> None:
    """Second copies, what is left without them, what is held, and seats: against loops."""
    rng = np.random.default_rng(seed)
    L, G, C, E = (int(n) for n in rng.integers(1, 5, 4))
    slots = rng.integers(-1, E, (L, G, C)).astype(np.int32)
    live = rng.integers(-1, E, (L, G, int(rng.integers(1, 6)))).astype(np.int32)
    room = rng.integers(0, C + 1, (L, G))
    second, plain = second_copies(slots), without_copies(slots)
    order = seat_in_place(slots, live, room)
    sat = np.take_along_axis(slots, order, axis=2)
    keys = []
    for x, g in np.ndindex(L, G):
        row, old = slots[x, g].tolist(), live[x, g].tolist()[: int(room[x, g])]
        assert second[x, g].tolist() == [e >= 0 and e in row[:c] for c, e in enumerate(row)]
        assert plain[x, g].tolist() == [-1 if e in row[:c] else e for c, e in enumerate(row)]
        keys += [(x * G + g) * E + e for e in sorted({e for e in row if e >= 0})]
        assert sorted(order[x, g].tolist()) == list(range(C))
        old = (old + [-1] * C)[:C]
        for e in range(E):  # as many copies stay in their slots as can
            stay = sum(a == b == e for a, b in zip(old, sat[x, g], strict=True))
            assert stay == min(old.count(e), row.count(e))
        free = [c for c in range(C) if not (old[c] == sat[x, g, c] >= 0)]
        assert sorted(sat[x, g, free].tolist(), key=lambda e: e < 0) == sat[x, g, free].tolist()
    assert replica_keys(slots, E).tolist() == keys


def test_a_gpu_may_hold_copies() -> None:
    """Even shares go by slots; the expert is held once."""
    live = Placement(slots_LGC=[[[0, 0, 1], [0, 2, -1]]], experts=3)
    assert live.replicas_LE.tolist() == [[3, 1, 1]]
    assert live.held_LGE.sum() == 4
    share = equal_shares(live.slots_LGC, 3)
    assert share[0, 0, :2].sum() == pytest.approx(2 / 3)
    fixed = Placement.repaired([[[0, 0, 1], [0, 2, 9]]], 3, np.array([[2, 3]]))
    assert fixed.slots_LGC.tolist() == [[[0, 1, -1], [0, 2, -1]]]


@pytest.mark.parametrize("row", [[1, 2, 3], [2, -1, 2], [-1, -1, 4], [-1, -1, -1]])
def test_a_gpu_on_which_nothing_changes_keeps_its_slots_beside_one_that_changes(row: list[int]) -> None:
    live = np.array([[row, [5, 6, 7]]], dtype=np.int32)
    new = np.array([[row, [7, 8, 5]]], dtype=np.int32)
    assert seat_in_place(live, live).tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert seat_in_place(new, live).tolist() == [[[0, 1, 2], [2, 1, 0]]]


def test_a_repair_keeps_as_many_experts_as_any_could() -> None:
    """Held against a largest matching of experts to slots of GPUs that held them."""
    rng = np.random.default_rng(5)
    for _ in range(150):
        gpus, slots, experts = (int(n) for n in rng.integers((2, 1, 2), (6, 3, 9)))
        wide = slots + int(rng.integers(0, 4))
        live = rng.integers(-1, experts, (1, gpus, wide))
        capacity = rng.integers(0, slots + 1, (1, gpus))
        fixed = Placement.repaired(live, experts, capacity)
        graph = nx.Graph()
        tops = [("expert", e) for e in set(live.ravel().tolist()) - {-1}]
        graph.add_nodes_from(tops)
        graph.add_edges_from(
            (("expert", int(e)), (g, c))
            for g in range(gpus)
            for e in live[0, g]
            if e >= 0
            for c in range(capacity[0, g])
        )
        most = len(nx.bipartite.hopcroft_karp_matching(graph, top_nodes=tops)) // 2
        assert int((fixed.replicas_LE > 0).sum()) == most
        assert (fixed.used_LG <= capacity).all()
        for row, kept in zip(live[0].tolist(), fixed.slots_LGC[0].tolist(), strict=True):
            assert all(kept.count(e) <= row.count(e) for e in kept if e >= 0)
            assert len(row) == wide


def test_a_placement_that_lacks_nothing_is_not_partial() -> None:
    """So that a problem has one digest, however what is live is told."""
    slots_LGC = [[[0, 1], [1, -1]]]
    assert not Placement(slots_LGC=slots_LGC, experts=2, partial=True).partial
    assert Placement(slots_LGC=slots_LGC, experts=3, partial=True).partial
