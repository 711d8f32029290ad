"""A limit that cannot bind, or does not, gives the very same plan; one that binds a little changes little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.solvers.core import FEATURES, PUBLISHED, Feature, required_features, without_slack

RNG = np.random.default_rng(4)
BEFORE_LE = RNG.lognormal(0, 1, (3, 16)) * 1e6
AFTER_LE = RNG.permuted(BEFORE_LE, axis=1)
GPUS = mo.uniform(2, 4, slots=3)
SLACK = [
    mo.Limits(max_replicas=8),
    mo.Limits(max_layer_replicas=24),
    mo.Limits(max_total_replicas=72),
    mo.Limits(max_total_bytes=720),
]


BY_CLOCK = {"cpsat", "milp", "portfolio", "min-moves"}
"""They end when the time is up: plans may differ from run to run."""


def problem(*, live: bool = False, split: str = "fractional", **more: Any) -> mo.Problem:
    """Three layers, with or without something live."""
    plain = mo.Problem(
        loads=mo.Loads(load_TLE=BEFORE_LE[None]), topology=GPUS, split=split, expert_bytes_L=[10, 10, 10]
    )
    if live:
        current = mo.solve(plain).plan
        assert current is not None
        plain = plain.replace(
            loads=mo.Loads(load_TLE=AFTER_LE[None]),
            current=mo.Placement(slots_LGC=current.slots_LGC, experts=16),
        )
    return plain.replace(**more)


def same(one: mo.Plan | None, other: mo.Plan | None) -> bool:
    """Whether two plans are the same: slots, shares, bounds, proofs."""
    assert one is not None
    assert other is not None
    return (
        np.array_equal(one.slots_LGC, other.slots_LGC)
        and np.array_equal(one.share_LGC, other.share_LGC)
        and np.array_equal(one.certificate.lower_bound_L, other.certificate.lower_bound_L)
        and one.certificate.bound_L == other.certificate.bound_L
        and one.certificate.proof == other.certificate.proof
    )


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("limits", SLACK, ids=str)
def test_what_cannot_bind_changes_nothing(limits: mo.Limits, live: bool, split: str) -> None:
    free = problem(live=live, split=split)
    assert same(mo.solve(free.replace(limits=limits)).plan, mo.solve(free).plan)


@pytest.mark.parametrize("name", sorted(set(FEATURES) - PUBLISHED - BY_CLOCK))
def test_every_solver_takes_what_cannot_bind(name: str) -> None:
    asks: dict[str, Any] = {
        "sized": {"sizing": mo.Sizing(policy="makespan", imbalance=1.2)},
        "activation": {"time": mo.TimeModel(activation_cost=5.0)},
        "lexicographic": {"objective": mo.Objective(priorities=("moves", "balance"))},
    }.get(name, {})
    live = Feature.MIGRATION in FEATURES[name] and name in (
        "cover",
        "replan",
        "min-moves",
        "stay",
        "lexicographic",
    )
    split = "equal" if Feature.FRACTIONAL not in FEATURES[name] else "fractional"
    free = problem(live=live, split=split, **asks)
    free = free.replace(loads=free.loads.select([0]), expert_bytes_L=[10], current=None) if not live else free
    bound = free.replace(limits=mo.Limits(max_replicas=8, max_layer_replicas=24))
    assert required_features(bound) == required_features(free)
    assert same(mo.solve(bound, name).plan, mo.solve(free, name).plan)


def test_only_what_cannot_bind_is_dropped() -> None:
    tight = problem(limits=mo.Limits(max_replicas=7, max_layer_replicas=24, max_total_replicas=71))
    assert without_slack(tight).limits == mo.Limits(max_replicas=7, max_total_replicas=71)
    plain = problem(limits=mo.Limits(max_replicas=2))
    assert without_slack(plain) is plain
    gpus = GPUS.replace(domain_G=np.arange(8))
    apart = problem(topology=gpus, limits=mo.Limits(min_replicas=2, max_layer_replicas=24, spread=2))
    assert without_slack(apart).limits == mo.Limits(min_replicas=2)
    together = apart.replace(topology=gpus.replace(domain_G=np.zeros(8, dtype=np.int64)))
    assert without_slack(together).limits.spread == 2


@pytest.mark.parametrize("limits", [mo.Limits(), *SLACK[:3]], ids=str)
def test_where_bytes_are_the_only_limit_the_same_few_replicas_are_held(limits: mo.Limits) -> None:
    free = problem(topology=mo.uniform(2, 4, memory=90))
    assert same(mo.solve(free.replace(limits=limits)).plan, mo.solve(free).plan)


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_a_ban_that_the_plan_keeps_anyway_changes_nothing(split: str) -> None:
    for live in (False, True):
        free = problem(live=live, split=split)
        plan = mo.solve(free).plan
        assert plan is not None
        absent = next(e for e in range(16) if e not in plan.slots_LGC[1, 3])
        banned = free.replace(limits=mo.Limits(forbidden=((1, absent, 3),)))
        again = mo.solve(banned).plan
        assert again is not None
        assert np.array_equal(again.slots_LGC, plan.slots_LGC)
        assert np.array_equal(again.share_LGC, plan.share_LGC)


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_one_ban_costs_a_re_plan_little(split: str) -> None:
    free = problem(live=True, split=split)
    plan = mo.solve(free).plan
    assert plan is not None
    assert free.current is not None
    live_LGC = free.current.slots_LGC
    new = [
        (layer, int(e), g)
        for layer, g in np.ndindex(3, 8)
        for e in plan.slots_LGC[layer, g]
        if e >= 0 and e not in live_LGC[layer, g]
    ]
    for layer, expert, gpu in new[:3]:
        banned = mo.solve(free.replace(limits=mo.Limits(forbidden=((layer, expert, gpu),)))).plan
        assert banned is not None
        others = [row for row in range(3) if row != layer]
        assert np.array_equal(banned.slots_LGC[others], plan.slots_LGC[others])
        assert banned.moves.count <= plan.moves.count + 3
        assert banned.imbalance_L[layer] <= max(plan.imbalance_L[layer], 1.01) + 0.01


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_the_tolerance_and_the_horizon_work_within_limits(split: str) -> None:
    free = problem(live=True, split=split, limits=mo.Limits(max_replicas=3, forbidden=((-1, 0, 0),)))
    few = mo.solve(free.replace(objective=mo.Objective(balance_tolerance=0.3))).plan
    many = mo.solve(free).plan
    assert few is not None
    assert many is not None
    assert few.moves.count < many.moves.count
    paid = free.replace(time=mo.TimeModel(unit="s", token_cost=1e-6), expert_bytes_L=[10**8] * 3)
    long = mo.solve(paid.replace(objective=mo.Objective(horizon=1e6))).plan
    short = mo.solve(paid.replace(objective=mo.Objective(horizon=1e-3))).plan
    assert long is not None
    assert short is not None
    assert short.moves.count < long.moves.count
