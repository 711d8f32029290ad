"""Re-planning over many GPUs: the fill by rounds, and the matching over common experts alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.problems.spec.placement import Placement, contiguous
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.solvers.replan import fractional as replan
from moeless_opt.solvers.replan import relabel
from moeless_opt.solvers.replan.flow import UNIT, LayerFlow
from moeless_opt.solvers.replan.wide import fill_wide


def layer(seed: int, experts: int, gpus: int, width: int, spare: int) -> tuple[list[int], list[list[int]]]:
    """Integer loads whose mean over the GPUs is a unit, and a valid placement with `spare` more replicas."""
    rng = np.random.default_rng(seed)
    weight_E = rng.lognormal(0.0, 1.0, experts)
    load = np.rint(weight_E / weight_E.sum() * gpus * UNIT).astype(np.int64).tolist()
    content: list[list[int]] = [[] for _ in range(gpus)]
    for expert in [*range(experts), *rng.integers(0, experts, spare).tolist()]:
        open_ones = [gpu for gpu in range(gpus) if len(content[gpu]) < width and expert not in content[gpu]]
        if open_ones:
            content[int(rng.choice(open_ones))].append(expert)
    return load, content


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 3), st.integers(0, 20))
def test_the_fill_lowers_the_overflow_of_the_flow(seed: int, gpus: int, width: int, spare: int) -> None:
    experts = max(gpus * width * 2 // 3, 1)
    load, content = layer(seed, experts, gpus, width, spare)
    room = [int(1.1 * UNIT)] * gpus
    before = LayerFlow(load, content, [width] * gpus, room).solve()
    filled, overflow = fill_wide(load, content, [width] * gpus, room)
    assert LayerFlow(load, filled, [width] * gpus, room).solve() == overflow <= before
    assert all(len(set(row)) == len(row) <= width for row in filled)
    assert {expert for row in filled for expert in row} == set(range(experts))
    if before <= 0:
        assert filled == content


def test_free_slots_are_filled_until_nothing_overflows() -> None:
    # One replica each on the first 8 of 64 GPUs: only copies can help, and there is room for all of them.
    load, _ = layer(3, 8, 64, 1, 0)
    content = [[gpu] if gpu < 8 else [] for gpu in range(64)]
    peak = max(load) / 60  # more than the copies that the heaviest can have
    room = [int(max(peak, 1.3 * UNIT))] * 64
    filled, overflow = fill_wide(load, content, [1] * 64, room)
    assert overflow <= 0
    assert all(expert == gpu for gpu, (expert, *_) in enumerate(filled[:8]))
    needed = sum(-(-one // room[0]) for one in load)
    assert sum(map(len, filled)) == needed, "one GPU an expert: no copy more than each needs"


@pytest.mark.parametrize(("experts", "gpus", "slots"), [(24, 48, 1), (24, 32, 2), (40, 64, 2)])
def test_a_wide_replan_is_as_good_as_the_greedy(
    monkeypatch: pytest.MonkeyPatch, experts: int, gpus: int, slots: int
) -> None:
    topology = Topology.uniform(gpus // 8, 8, slots=slots)
    capacity_LG = np.full((6, gpus), slots)
    start = Placement(slots_LGC=contiguous(experts, capacity_LG), experts=experts)
    rng = np.random.default_rng(5)
    load_LE = rng.lognormal(0.0, 1.0, (6, experts)) * 1000
    drift_LE = load_LE * rng.lognormal(0.0, 0.3, load_LE.shape)
    moves, gaps = {}, {}
    for many in (10**9, 0):
        monkeypatch.setattr(replan, "MANY_GPUS", many)
        monkeypatch.setattr(relabel, "MANY", many)
        live = mo.plan(load_LE, topology, current=start, balance_tolerance=0.1)
        then = mo.plan(drift_LE, topology, current=live, balance_tolerance=0.1)
        moves[many] = (live.moves.count, then.moves.count)
        for one in (live, then):
            gaps.setdefault(many, []).append(
                float((one.certificate.value_L / one.certificate.lower_bound_L).max())
            )
    assert max(gaps[0]) <= max(*gaps[10**9], 1.1) * (1 + 1e-6)
    assert moves[0][0] <= moves[10**9][0] * 1.1 + 2
    assert moves[0][1] <= moves[10**9][1] * 1.3 + 4


def test_rounds_end_with_little_left_for_single_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As many experts as GPUs, no free slot: only what a GPU's other replica passes on makes enough room.
    left: list[float] = []

    def noted(*arguments: Any, **options: Any) -> tuple[list[list[int]], int]:
        content, overflow = fill_wide(*arguments, **options)
        left.append(overflow / UNIT)
        return content, overflow

    monkeypatch.setattr(replan, "fill_wide", noted)
    topology = Topology.uniform(40, 8, slots=2)
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(0.0, 1.0, (4, 320)) * 1000.0
    live = mo.plan(load_LE, topology)
    then = mo.plan(load_LE * rng.lognormal(0.0, 0.3, load_LE.shape), topology, current=live)
    assert len(left) == 4
    assert sum(left) < 1.0, "mean GPU loads over the rooms, of about 90 at the start"
    assert then.moves.fraction < 0.11
    assert then.imbalance_L.max() < 1.0101


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_matching_over_common_experts_keeps_as_much(seed: int, gpus: int, width: int, kinds: bool) -> None:
    rng = np.random.default_rng(seed)
    experts = width + 5
    both = [
        np.array([rng.choice(experts, size=width, replace=False) for _ in range(gpus)])[None]
        for _ in range(2)
    ]
    live, new = both
    speed = np.where(np.arange(gpus) % 2, 2.0, 1.0) if kinds else np.ones(gpus)
    node = np.arange(gpus) // 3

    def kept(slots: np.ndarray) -> int:
        return sum(len(set(a) & set(b)) for a, b in zip(live[0].tolist(), slots[0].tolist(), strict=True))

    def matched(many: int) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(relabel, "MANY", many)
            return relabel.relabel(live, new, experts=experts, speed_G=speed, node_G=node)

    dense, sparse = matched(10**9), matched(0)
    assert kept(sparse) == kept(dense)
    for kind in np.unique(speed):
        of_kind = speed == kind
        assert sorted(sorted(row) for row in sparse[0][of_kind].tolist()) == sorted(
            sorted(row) for row in new[0][of_kind].tolist()
        )
