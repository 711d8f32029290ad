"""Where bytes alone limit the replicas, the default holds no more than the balance tolerance asks for."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.verify import violations

BYTES = 1000


def loads(seed: int, scenarios: int = 1) -> mo.Loads:
    rng = np.random.default_rng(seed)
    return mo.Loads(load_TLE=rng.lognormal(0, 0.8, (scenarios, 3, 24)) * 1000)


def topology(slots: int) -> mo.Topology:
    return mo.uniform(1, 8, memory=slots * 3 * BYTES)


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("scenarios", [1, 2])
def test_few_replicas_within_the_tolerance(split: str, scenarios: int) -> None:
    for seed in range(3):
        given = {"loads": loads(seed, scenarios), "expert_bytes": BYTES, "split": split}
        lean = mo.plan(topology=topology(12), **given)  # type: ignore[arg-type]
        full = mo.plan(topology=topology(12), sizing="fill", **given)  # type: ignore[arg-type]
        assert full.replicas > lean.replicas
        reached = np.maximum(full.imbalance_L, 1.0)
        assert (lean.imbalance_L <= np.maximum(1.01, 1.01 * reached) * (1 + 1e-6)).all()
        if split == "fractional" and scenarios == 1:
            # twice the memory asks for no more replicas
            more = mo.plan(topology=topology(20), **given)  # type: ignore[arg-type]
            assert more.replicas <= lean.replicas * 1.02
        assert f"{lean.replicas} replicas" in lean.certificate.proof
        assert "KV cache" in lean.certificate.proof


def test_where_no_number_is_enough_a_layer_keeps_near_what_all_reach() -> None:
    load = np.ones((2, 8))
    load[0, 0] = 100.0  # can be shared by 2 GPUs at most: the third has no room for it
    gpus = mo.Topology(node_G=[0, 0, 0], speed_G=[1.0, 1.0, 8.0], memory_G=[40, 40, 40])
    problem = mo.Problem(loads=mo.Loads(load_TLE=load), topology=gpus, expert_bytes_L=[5, 5], split="equal")
    result = mo.solve(problem)
    full = mo.solve(problem.replace(sizing=mo.Sizing(policy="fill")))
    assert result.plan is not None
    assert full.plan is not None
    assert violations(problem, result.plan) == []
    assert (result.plan.certificate.value_L <= full.plan.certificate.value_L * 1.011).all()
    assert result.plan.replicas <= full.plan.replicas


def test_slots_options_limits_and_what_is_live_ask_for_all() -> None:
    given = {"loads": loads(0), "expert_bytes": BYTES}
    full = 8 * 6 * 3
    assert mo.plan(topology=mo.uniform(1, 8, slots=6), **given).replicas == full  # type: ignore[arg-type]
    assert mo.plan(topology=topology(6), effort="thorough", **given).replicas == full  # type: ignore[arg-type]
    assert mo.plan(topology=topology(6), solver="construct", **given).replicas == full  # type: ignore[arg-type]
    with pytest.raises(mo.ProblemError, match="memory is the only limit"):
        mo.plan(topology=mo.uniform(1, 8, slots=6), solver="sized", **given)  # type: ignore[arg-type]
