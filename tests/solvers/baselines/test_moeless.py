"""MoEless's scaler and placer against plain forms of the method, and the properties of every placement."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.baselines import moeless


def plain_scale(load: list[float], cv: float, cap: int, limit: int) -> list[int]:
    """The paper's loop for one layer, with Python's own statistics."""
    count = [1] * len(load)
    while sum(count) < cap:
        pieces = [w / r for w, r in zip(load, count, strict=True) for _ in range(r)]
        mean = statistics.fmean(pieces)
        if mean == 0 or statistics.pstdev(pieces) / mean <= cv + 1e-12:
            break
        able = [e for e in range(len(load)) if count[e] < limit and load[e] > 0]
        if not able:
            break
        count[max(able, key=lambda e: load[e] / count[e])] += 1
    return count


def plain_place(load: list[float], count: list[int], room: list[int], warm: list[set[int]]) -> list[set[int]]:
    """The placer's rule for one layer whose GPUs never run into a dead end."""
    replicas = sorted(
        ((load[e] / count[e], e) for e in range(len(load)) for _ in range(count[e])),
        key=lambda x: (-x[0], x[1]),
    )
    held: list[set[int]] = [set() for _ in room]
    total = [0.0] * len(room)
    waiting = list(replicas)
    for allowed in (warm, [set(range(len(load)))] * len(room)):
        left = []
        for piece, expert in waiting:
            able = [
                g
                for g in range(len(room))
                if expert in allowed[g] and expert not in held[g] and len(held[g]) < room[g]
            ]
            if not able:
                left.append((piece, expert))
                continue
            gpu = min(able, key=lambda g: total[g])
            held[gpu].add(expert)
            total[gpu] += piece
        waiting = left
    assert not waiting
    return held


def held_sets(slots_GC: NDArray[np.int32]) -> list[set[int]]:
    return [set(row[row >= 0].tolist()) for row in slots_GC]


loads = st.lists(st.lists(st.integers(0, 500).map(float), min_size=5, max_size=5), min_size=1, max_size=4)


@given(loads, st.sampled_from([0.0, 0.1, 0.2, 0.6, 1.0]), st.integers(5, 25), st.integers(1, 6))
@settings(deadline=None, max_examples=150)
def test_scaler_is_the_papers_loop(rows: list[list[float]], cv: float, cap: int, limit: int) -> None:
    got = moeless.scale(rows, cv, cap, max_replicas=limit)
    assert got.tolist() == [plain_scale(row, cv, cap, limit) for row in rows]


def test_scaler_stops_at_the_threshold_or_the_cap() -> None:
    load_LE = np.random.default_rng(3).lognormal(sigma=1.0, size=(20, 16))
    loose, tight = moeless.scale(load_LE, 1.0, 200), moeless.scale(load_LE, 0.2, 200)
    assert (moeless.replica_cv(load_LE, loose) <= 1.0).all()
    assert (moeless.replica_cv(load_LE, tight) <= 0.2).all()
    assert (tight >= loose).all()
    assert tight.sum() > loose.sum()
    capped = moeless.scale(load_LE, 0.2, np.arange(16, 36))
    assert (capped.sum(axis=1) <= np.arange(16, 36)).all()
    assert (capped <= tight).all()


def test_the_greedy_is_not_minimal_and_is_kept_so() -> None:
    load = [[69.0, 10.0, 9.0, 6.0, 4.0]]
    replicas_LE = moeless.scale(load, 0.2, 40)
    assert replicas_LE.sum() == 16
    # Twelve replicas meet the threshold too.
    assert (
        min(
            moeless.replica_cv(load, [[a, b, c, d, e]])[0]
            for a in range(1, 9)
            for b in range(1, 4)
            for c in range(1, 4)
            for d in range(1, 3)
            for e in range(1, 3)
            if a + b + c + d + e == 12
        )
        <= 0.2
    )


def test_sample_cv_asks_for_more_than_population_cv() -> None:
    load = [[4.0, 1.0]]
    np.testing.assert_allclose(moeless.replica_cv(load, [[1, 1]], 0), [0.6])
    np.testing.assert_allclose(moeless.replica_cv(load, [[1, 1]], 1), [0.6 * np.sqrt(2)])
    assert moeless.scale(load, 0.7, 4, 0).tolist() == [[1, 1]]
    assert moeless.scale(load, 0.7, 4, 1).tolist() == [[2, 1]]


def test_idle_experts_count_or_not() -> None:
    load = [[10.0, 10.0, 0.0, 0.0]]
    assert moeless.scale(load, 0.2, 8, idle="ignore").tolist() == [[1, 1, 1, 1]]
    assert moeless.scale(load, 0.2, 8).sum() > 4


def test_ties_first_or_fewest() -> None:
    load = [[10.0, 20.0, 10.0]]  # at 1, 2, 1 all three carry 10 per replica
    assert moeless.scale(load, 0.0, 4).tolist() == [[1, 2, 1]]
    load = [[20.0, 10.0, 1.0]]
    assert moeless.scale(load, 0.0, 5, ties="first").tolist() == [[3, 1, 1]]
    assert moeless.scale(load, 0.0, 5, ties="fewest").tolist() == [[2, 2, 1]]


def test_layers_without_load_keep_one_replica_each() -> None:
    assert moeless.scale(np.zeros((2, 3)), 0.0, 9).tolist() == [[1, 1, 1]] * 2


def test_cap_in_bytes() -> None:
    assert moeless.slots_for_bytes(8, 3.5e9, 1e9) == 11
    with pytest.raises(ProblemError, match="replica_bytes: must be a number > 0"):
        moeless.slots_for_bytes(8, 1.0, 0.0)
    with pytest.raises(ProblemError, match="extra_bytes: must be a number >= 0"):
        moeless.slots_for_bytes(8, float("nan"), 1.0)


@st.composite
def placements(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Loads, wanted replicas, capacities that hold them, and warm slots."""
    layers, experts, gpus = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    replicas_LE = rng.integers(1, gpus + 1, (layers, experts))
    capacity_LG = rng.integers(0, experts + 2, (layers, gpus))
    capacity_LG[:, 0] += np.maximum(replicas_LE.sum(axis=1) - capacity_LG.sum(axis=1), 0)
    warm_LGC = rng.integers(-1, experts, (layers, gpus, 3))
    return rng.integers(0, 50, (layers, experts)).astype(float), replicas_LE, capacity_LG, warm_LGC


@given(placements())
@settings(deadline=None, max_examples=200)
def test_every_placement_is_valid(
    case: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]],
) -> None:
    load_LE, wanted_LE, capacity_LG, warm_LGC = case
    got = moeless.place(load_LE, wanted_LE, capacity_LG, warm_LGC)
    assert (got.replicas_LE >= 1).all()
    assert (got.replicas_LE <= wanted_LE).all()
    assert got.dropped_L.tolist() == (wanted_LE - got.replicas_LE).sum(axis=1).tolist()
    for layer, (slots_GC, share_GC) in enumerate(zip(got.slots_LGC, got.share_LGC, strict=True)):
        held = held_sets(slots_GC)
        count = np.zeros(load_LE.shape[1], dtype=int)
        reused = 0
        for gpu, members in enumerate(held):
            assert len(members) == (slots_GC[gpu] >= 0).sum() <= capacity_LG[layer, gpu]
            assert (slots_GC[gpu][: len(members)] >= 0).all()
            count[list(members)] += 1
            reused += len(members & set(warm_LGC[layer, gpu].tolist()))
        assert count.tolist() == got.replicas_LE[layer].tolist()
        assert reused == got.reused_L[layer]
        np.testing.assert_allclose(share_GC[slots_GC >= 0], 1 / count[slots_GC[slots_GC >= 0]])
        assert not share_GC[slots_GC < 0].any()


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None, max_examples=100)
def test_placer_is_the_papers_rule(seed: int, warm: bool) -> None:
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(sigma=1.0, size=(3, 8))
    replicas_LE = moeless.scale(load_LE, 0.2, 14, max_replicas=4)
    capacity_LG = rng.integers(8, 11, (3, 4))  # roomy: each GPU could hold every expert
    warm_LGC = rng.integers(-1, 8, (3, 4, 5))
    got = moeless.place(load_LE, replicas_LE, capacity_LG, warm_LGC if warm else None)
    for layer in range(3):
        sets = [set(row.tolist()) - {-1} for row in warm_LGC[layer]] if warm else [set() for _ in range(4)]
        assert held_sets(got.slots_LGC[layer]) == plain_place(
            load_LE[layer].tolist(), replicas_LE[layer].tolist(), capacity_LG[layer].tolist(), sets
        )


def test_nothing_moves_while_the_wanted_replicas_stay_the_same() -> None:
    rng = np.random.default_rng(8)
    load_LE = rng.lognormal(size=(6, 16))
    replicas_LE = moeless.scale(load_LE, 0.2, 24, max_replicas=8)
    first = moeless.place(load_LE, replicas_LE, np.full((6, 8), 3))
    again = moeless.place(
        load_LE * rng.lognormal(sigma=0.5, size=load_LE.shape),
        replicas_LE,
        np.full((6, 8), 3),
        first.slots_LGC,
    )
    np.testing.assert_array_equal(again.slots_LGC, first.slots_LGC)
    assert again.reused_L.tolist() == replicas_LE.sum(axis=1).tolist()


def test_full_gpus_are_filled_by_exchanges_without_dropping() -> None:
    # Every slot is wanted: the last replicas meet GPUs that hold their expert already.
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(sigma=1.2, size=(200, 8))
    replicas_LE = moeless.scale(load_LE, 0.0, 16, max_replicas=8)
    got = moeless.place(load_LE, replicas_LE, np.full((200, 8), 2))
    assert got.dropped_L.sum() == 0
    assert (got.slots_LGC >= 0).all()
    np.testing.assert_array_equal(got.replicas_LE, replicas_LE)


def test_a_replica_that_fits_nowhere_is_dropped_and_said() -> None:
    got = moeless.place([[8.0, 4.0]], [[2, 2]], [[1, 3]])
    assert got.dropped_L.tolist() == [1]
    assert got.replicas_LE.sum() == 3
    assert sorted(map(len, held_sets(got.slots_LGC[0]))) == [1, 2]


def test_faster_gpus_get_more() -> None:
    load_LE = np.ones((1, 12))
    got = moeless.place(load_LE, np.ones((1, 12), dtype=int), [[12, 12]], speed_G=[1.0, 2.0])
    assert (got.slots_LGC >= 0).sum(axis=2).tolist() == [[4, 8]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cv": -0.1}, "cv: must be a number >= 0, got -0.1"),
        ({"cv": float("nan")}, "cv: must be a number >= 0, got nan"),
        ({"ddof": 2}, "ddof: must be 0"),
        ({"idle": "no"}, "idle: must be count or ignore, got 'no'"),
        ({"ties": "no"}, "ties: must be first or fewest, got 'no'"),
        ({"cap": 4.5}, "cap: must be whole numbers"),
        ({"cap": [4, 4, 4]}, r"cap: must fit the shape \(1,\), got \(3,\)"),
        ({"max_replicas": 0}, "max_replicas: must be at least 1, got 0"),
    ],
)
def test_scaler_refuses_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        moeless.scale([[1.0, 2.0]], **kwargs)


def test_scaler_says_how_much_the_cap_is_short() -> None:
    with pytest.raises(
        InfeasibleError, match="layer 1: the cap of 2 replicas is 1 short of one for each of 3"
    ):
        moeless.scale(np.ones((2, 3)), 0.2, [4, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_LE": [[1.0, float("inf")]]}, "loads: must be finite"),
        ({"load_LE": [1.0, 2.0]}, r"loads: must be a non-empty \[layers, experts\] array"),
        ({"replicas_LE": [[1, 0]]}, "replicas: layer 0, expert 1: must be at least 1"),
        ({"capacity_LG": [2, 2]}, r"capacity: must be \[1 layers, gpus\]"),
        ({"capacity_LG": [[-1, 4]]}, "capacity: must not be negative"),
        ({"previous_LGC": [[[0, 5], [1, -1]]]}, "previous: must hold experts 0 to 1"),
        ({"previous_LGC": [[0, 1]]}, r"previous: must be an integer array \[1, 2, slots\]"),
        ({"speed_G": [1.0, 0.0]}, r"speed: must be \[2 gpus\], each > 0"),
    ],
)
def test_placer_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"load_LE": [[1.0, 2.0]], "replicas_LE": [[1, 1]], "capacity_LG": [[2, 2]]}
    with pytest.raises(ProblemError, match=message):
        moeless.place(**(arguments | change))


def test_placer_says_how_many_slots_are_missing() -> None:
    with pytest.raises(InfeasibleError, match="layer 0: 4 replicas wanted, 3 slots: 1 too few"):
        moeless.place([[1.0, 2.0]], [[2, 2]], [[1, 2]])


def test_warm_replicas_within_a_share_of_the_mean() -> None:
    """Everything is warm on GPU 0; a limit sends what would overload it elsewhere."""
    load, one = [[30.0, 30.0, 30.0, 30.0]], np.ones((1, 4), dtype=int)
    warm = np.array([[[0, 1, 2, 3], [-1] * 4, [-1] * 4, [-1] * 4]])
    capacity = [[4, 4, 4, 4]]
    held = {}
    for within in (None, 2.0, 1.0, 0.0):
        found = moeless.place(load, one, capacity, warm, within=within)
        held[within] = (found.slots_LGC[0, 0] >= 0).sum()
        assert found.reused_L[0] == held[within]
    assert held == {None: 4, 2.0: 3, 1.0: 2, 0.0: 1}
