"""Equal-split re-planning over many GPUs."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan.evaluate import even_times, new_replicas
from moeless_opt.problems.plan.verify import check_slots
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.replan import equal
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.equal_wide import replan_equal_wide
from moeless_opt.solvers.replan.task import ReplanTask, ReplanWish
from tests.strategies import After


def drifted(seed: int, layers: int = 4, experts: int = 40, gpus: int = 16, slots: int = 3) -> ReplanTask:
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(0.0, 1.0, (layers, experts)) * 1000.0
    capacity_LG = np.full((layers, gpus), slots)
    speed_G = np.ones(gpus) if seed % 2 else rng.uniform(0.7, 1.4, gpus)
    live_LGC = construct_equal(load_LE, capacity_LG, speed_G)
    return ReplanTask(load_LE * rng.lognormal(0.0, 0.4, load_LE.shape), live_LGC, capacity_LG, speed_G)


@pytest.mark.parametrize("seed", range(8))
def test_plans_are_valid_quicker_and_told_as_they_are(seed: int) -> None:
    task = drifted(seed)
    found = replan_equal_wide(task, ReplanWish(tolerance=0.02))
    live_L = even_times(task.load_LE, task.live_LGC, task.speed_G).max(axis=1)
    for slots_GC, capacity_G in zip(found.slots_LGC, task.capacity_LG, strict=True):
        check_slots(slots_GC, task.load_LE.shape[1], capacity_G)
    np.testing.assert_allclose(
        found.time_L, even_times(task.load_LE, found.slots_LGC, task.speed_G).max(axis=1), rtol=1e-12
    )
    moved_L = new_replicas(found.slots_LGC, task.live_LGC, task.load_LE.shape[1]).sum(axis=(1, 2))
    np.testing.assert_array_equal(found.moves_L, moved_L)
    assert (found.time_L <= live_L * (1 + 1e-12)).all()
    assert (found.moves_L[live_L <= found.target_L] == 0).all()
    assert found.time_L.sum() < 0.95 * live_L.sum()
    assert found.moves_L.sum() < 0.8 * (task.live_LGC >= 0).sum()


@pytest.mark.parametrize("budget", [0, 5, 20, 60])
def test_budgets_are_kept_and_used(budget: int) -> None:
    task = drifted(3)
    free = replan_equal_wide(task, ReplanWish(tolerance=0.02))
    found = replan_equal_wide(task, ReplanWish(tolerance=0.02, max_moves=budget, cost_L=[2, 1, 1, 1]))
    assert int(found.moves_L @ [2, 1, 1, 1]) <= budget
    live_L = even_times(task.load_LE, task.live_LGC, task.speed_G).max(axis=1)
    assert free.time_L.sum() * (1 - 1e-9) <= found.time_L.sum() <= live_L.sum() * (1 + 1e-9)
    if budget == 60:
        assert found.time_L.sum() < live_L.sum()


def test_what_is_missing_comes_back() -> None:
    task = drifted(5)
    live_LGC = task.live_LGC.copy()
    live_LGC[:, 0] = -1
    broken = ReplanTask(task.load_LE, live_LGC, task.capacity_LG, task.speed_G)
    found = replan_equal_wide(broken, ReplanWish(tolerance=0.02, repair=True))
    for slots_GC, capacity_G in zip(found.slots_LGC, task.capacity_LG, strict=True):
        check_slots(slots_GC, task.load_LE.shape[1], capacity_G)
    with pytest.raises(InfeasibleError, match="the least budget"):
        replan_equal_wide(broken, ReplanWish(tolerance=0.02, repair=True, max_moves=0))


@pytest.mark.parametrize("asks", [0, 1, 2, 5])
def test_stopped_at_any_time_it_is_a_placement(asks: int) -> None:
    task = drifted(1)
    found = replan_equal_wide(task, ReplanWish(tolerance=0.02), stop=After(asks))
    for slots_GC, capacity_G in zip(found.slots_LGC, task.capacity_LG, strict=True):
        check_slots(slots_GC, task.load_LE.shape[1], capacity_G)
    assert found.cut_L.any()


def test_many_gpus_are_re_planned_so(monkeypatch: pytest.MonkeyPatch) -> None:
    task = drifted(7)
    monkeypatch.setattr(equal, "MANY_PAIRS", 1)
    wide = replan_equal_wide(task, ReplanWish(tolerance=0.02))
    np.testing.assert_array_equal(replan_equal(task, ReplanWish(tolerance=0.02)).slots_LGC, wide.slots_LGC)
