"""Plans do not depend on what loads, speeds and bytes are counted in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo

SOLVERS = ("auto", "construct", "constrained", "static", "moeless", "replan", "stay")


def problem(split: str, *, load: float = 1.0, speed: float = 1.0, live: bool = False) -> mo.Problem:
    load_LE = np.random.default_rng(0).lognormal(5, 1, (2, 12)).round(3)
    speed_G = [989.0] * 2 + [312.0] * 2
    current = None
    if live:
        slots_LGC = np.array([[[g, g + 4, g + 8, -1] for g in range(4)]] * 2, dtype=np.int32)
        current = mo.Placement(slots_LGC=slots_LGC, experts=12)
    return mo.Problem(
        loads=mo.Loads(load_TLE=load_LE * load),
        topology=mo.uniform(1, 4, slots=4, speed=[one * speed for one in speed_G]),
        split=split,
        current=current,
    )


def solved(solver: str, asked: mo.Problem) -> mo.Plan:
    plan = mo.solve(asked, solver).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_unit_gives_the_same_plan(solver: str, split: str) -> None:
    live = solver in ("replan", "stay")
    base = solved(solver, problem(split, live=live))
    cases: list[dict[str, Any]] = [
        {"load": 2.0**40},
        {"load": 2.0**-60},
        {"load": 1e15},
        {"load": 1e-12},
        {"speed": 2.0**40},
        {"speed": 1e9},
        {"speed": 1e12},
        {"speed": 1e-6},
        {"load": 1e15, "speed": 1e12},
    ]
    for case in cases:
        plan = solved(solver, problem(split, live=live, **case))
        factor = case.get("load", 1.0) / case.get("speed", 1.0)
        np.testing.assert_allclose(plan.certificate.value_L, base.certificate.value_L * factor, rtol=1e-6)
        np.testing.assert_allclose(
            plan.certificate.lower_bound_L, base.certificate.lower_bound_L * factor, rtol=1e-6
        )
        if all(np.frexp(value)[0] == 0.5 for value in case.values()):
            assert (plan.slots_LGC == base.slots_LGC).all()
            assert (plan.share_LGC == base.share_LGC).all()


def test_bytes_in_any_unit_give_the_same_plan() -> None:
    load = np.random.default_rng(0).lognormal(5, 1, (2, 12))
    plans = [
        mo.plan(load, mo.uniform(1, 4, memory=10_000 * unit), expert_bytes=1_000 * unit)
        for unit in (1, 2**20, 1000)
    ]
    for plan in plans[1:]:
        assert (plan.slots_LGC == plans[0].slots_LGC).all()
