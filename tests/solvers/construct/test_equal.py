"""The equal-split construction when it is stopped."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.problems.spec.placement import replica_counts
from moeless_opt.solvers.construct.equal import EFFORTS, construct_equal
from moeless_opt.solvers.pack import apportion, pack, resize
from tests.strategies import After


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(("experts", "gpus", "slots"), [(24, 8, 4), (10, 4, 3), (12, 8, 2), (40, 8, 6)])
def test_stopped_at_any_time_every_layer_is_placed(effort: str, experts: int, gpus: int, slots: int) -> None:
    load_LE = np.random.default_rng(1).lognormal(0.0, 1.5, (4, experts))
    capacity_LG, speed_G = np.full((4, gpus), slots), np.ones(gpus)
    whole = construct_equal(load_LE, capacity_LG, speed_G, effort=effort)
    last = np.inf
    for asks in (0, 1, 3, 9, 30, 10**6):
        found = construct_equal(load_LE, capacity_LG, speed_G, effort=effort, stop=After(asks))
        assert (replica_counts(found, experts) > 0).all()
        for row in found.reshape(-1, found.shape[2]).tolist():
            held = [expert for expert in row if expert >= 0]
            assert len(set(held)) == len(held) <= slots
        worst = float(even_times(load_LE, found, speed_G).max(axis=1).sum())
        assert worst <= last * (1 + 1e-9)
        last = worst
    np.testing.assert_array_equal(found, whole)


def test_other_counts_for_pairs_in_a_wider_array() -> None:
    """Layers of two slots a GPU that were packed beside layers with more."""
    load_LE = np.random.default_rng(1).lognormal(0, 1, (3, 5))
    capacity_LG, speed_G = np.full((3, 4), 2), np.ones(4)
    narrow = pack(load_LE, apportion(load_LE, np.full(3, 8), 4), capacity_LG, speed_G)
    wide = np.pad(narrow, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    given = {"goal_L": load_LE.sum(1) / 4, "steps": 4, "width": 2}
    found = resize(load_LE, wide, capacity_LG, speed_G, **given)
    np.testing.assert_array_equal(found[:, :, :2], resize(load_LE, narrow, capacity_LG, speed_G, **given))
    assert (found[:, :, 2] == -1).all()
