"""A limit on moves refuses a re-plan exactly where no placement keeps it: live placements with gaps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import IntArray

Pins = Sequence[tuple[int, int]]


def moved(plan: mo.Plan) -> int:
    """Pairs of a plan that are not live."""
    assert plan.moves is not None
    return plan.moves.count


def least_moves(
    live_GC: list[list[int]], experts: int, slots: list[int], *, full: bool, pins: Pins = ()
) -> int | None:
    """Fewest new pairs of any placement of a layer without second copies, by trying all; None: none."""
    choices = []
    for gpu, room in enumerate(slots):
        sizes = [min(room, experts)] if full else range(min(room, experts) + 1)
        must = {expert for expert, where in pins if where == gpu}
        sets = [set(one) for size in sizes for one in itertools.combinations(range(experts), size)]
        choices.append([(one, len(one.difference(live_GC[gpu]))) for one in sets if must <= one])
    moves = [
        sum(cost for _, cost in chosen)
        for chosen in itertools.product(*choices)
        if len(set().union(*(one for one, _ in chosen))) == experts
    ]
    return min(moves, default=None)


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("fill", ["distinct", "copies"])
def test_an_expert_without_a_replica_comes_into_an_empty_slot(split: str, fill: str) -> None:
    for slots, live in (([2, 0], [[-1, 0], [-1, -1]]), ([1, 1], [[0], [-1]])):
        plan = mo.plan(
            [[0.72, 8.7]],
            mo.uniform(1, 2, slots=slots),
            split=split,
            fill=fill,
            current=[live],
            repair=True,
            limits=mo.Limits(max_moves=1),
        )
        assert moved(plan) == 1


def test_a_pin_is_met_by_the_fewest_moves() -> None:
    live = [[[1], [2], [2]], [[0], [1], [1]]]

    def plan(most: int) -> mo.Plan:
        limits = mo.Limits(max_moves=most, max_layer_moves=most, pinned=((0, 1, 2),))
        return mo.plan(
            [[3.0, 2.0, 1.0]] * 2,
            mo.uniform(1, 3, slots=1),
            share_entries=1,
            current=live,
            repair=True,
            limits=limits,
        )

    assert moved(plan(3)) == 3
    with pytest.raises(mo.InfeasibleError, match="the least budget that would is 3"):
        plan(2)


def drawn(rng: np.random.Generator, layers: int) -> tuple[int, list[int], IntArray]:
    """Experts, slots of each GPU, and a live placement with gaps."""
    experts, gpus = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    slots = rng.integers(0, min(experts, 3) + 1, gpus)
    while slots.sum() < experts:
        slots = rng.integers(1, min(experts, 3) + 1, gpus)
    live_LGC = np.full((layers, gpus, max(slots)), -1)
    for layer, gpu in np.ndindex(layers, gpus):
        held = rng.permutation(experts)[: rng.integers(0, slots[gpu] + 1)]
        live_LGC[layer, gpu, : len(held)] = held
    return experts, slots.tolist(), live_LGC


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("full", [True, False])
def test_refused_only_where_nothing_fits(split: str, full: bool) -> None:
    rng = np.random.default_rng((5, full))
    refused = 0
    for case in range(30):
        layers = int(rng.integers(1, 3))
        experts, slots, live_LGC = drawn(rng, layers)
        pins: Pins = []
        if case % 2:
            gpu = int(np.argmax(slots))
            pins = [(int(rng.integers(experts)), gpu)]
        least = [
            least_moves(one, experts, slots, full=full, pins=pins if layer == 0 else [])
            for layer, one in enumerate(live_LGC.tolist())
        ]
        needed = None if None in least else sum(one for one in least if one is not None)
        load_LE = rng.exponential(size=(layers, experts))
        for most in (needed - 1, needed) if needed else (0,) if needed == 0 else (9,):
            try:
                plan = mo.plan(
                    load_LE,
                    mo.uniform(1, len(slots), slots=slots),
                    split=split,
                    fill="distinct" if full else "none",
                    current=live_LGC,
                    repair=True,
                    limits=mo.Limits(max_moves=most, pinned=tuple((0, *pin) for pin in pins)),
                )
            except mo.InfeasibleError:
                assert needed is None or most < needed, (case, live_LGC.tolist(), slots, pins, most)
                refused += 1
            else:
                assert needed is not None
                assert moved(plan) == needed == most
    assert refused > 10
