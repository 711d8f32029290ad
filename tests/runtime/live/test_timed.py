"""Shares of live batches by a time model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.spec.time_model import TimeModel

pytest.importorskip("torch")
from moeless_opt.runtime.live.dispatch.shares import BalancedShares, SharePolicy
from moeless_opt.runtime.live.dispatch.timed import TimedShares
from moeless_opt.runtime.live.slots import SlotTable


def table_of(seed: int, ranks: int, slots: int, experts: int) -> SlotTable:
    rng = np.random.default_rng(seed)
    rows = [[] for _ in range(ranks)]
    for e in range(experts):
        rows[e % ranks].append(e)
    for row in rows:
        others = [e for e in range(experts) if e not in row]
        row += rng.permutation(others)[: slots - len(row)].tolist()
    return SlotTable(np.array([row + [-1] * (slots - len(row)) for row in rows]), experts)


@given(seed=st.integers(0, 10_000), activation=st.sampled_from([0.0, 1.0, 50.0]))
@settings(max_examples=60, deadline=None)
def test_quotas_add_up_and_are_quick(seed: int, activation: float) -> None:
    rng = np.random.default_rng(seed)
    table = table_of(seed, 4, 4, 8)
    load_E = np.floor(rng.lognormal(3, 1.5, 8) * (rng.uniform(size=8) < 0.9)).astype(np.int64)
    time = TimeModel(token_cost=1.0, activation_cost=activation)
    policy = TimedShares(time)
    assert isinstance(policy, SharePolicy)

    def took(quota_P: np.ndarray) -> float:
        tokens_G = np.bincount(table.rank_P, weights=quota_P, minlength=4)
        used_G = np.bincount(table.rank_P, weights=quota_P > 0, minlength=4)
        return float(time.time(tokens_G, used_G, 1.0).max())

    quota_P = policy.quotas(0, load_E, table)
    assert quota_P.dtype == np.int64
    assert (quota_P >= 0).all()
    sums_E = np.bincount(table.expert_P, weights=quota_P, minlength=8)
    np.testing.assert_array_equal(sums_E, load_E)
    np.testing.assert_array_equal(quota_P, TimedShares(time).quotas(0, load_E, table))
    assert took(quota_P) <= took(BalancedShares().quotas(0, load_E, table)) * (1 + 1e-9)


def test_dear_experts_are_activated_once() -> None:
    table = table_of(1, 4, 4, 8)
    policy = TimedShares(TimeModel(token_cost=0.01, activation_cost=10.0))
    quota_P = policy.quotas(0, np.full(8, 20), table)
    assert (quota_P > 0).sum() == 8


@pytest.mark.parametrize("speed", [None, [1.0, 2.0, 1.0, 1.0]])
def test_the_search_is_compiled_when_the_policy_is_made(speed: list[float] | None) -> None:
    pytest.importorskip("numba")
    from moeless_opt.solvers.timed import _kernels

    policy = TimedShares(TimeModel(token_cost=1.0, activation_cost=5.0), speed_G=speed)
    made = set(_kernels.rows.signatures)
    assert made
    for slots in (3, 4):
        policy.quotas(0, np.arange(8), table_of(0, 4, slots, 8))
    assert set(_kernels.rows.signatures) == made
