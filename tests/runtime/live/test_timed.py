"""Shares of live batches by a time model."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.time_model import TimeModel

pytest.importorskip("torch")
from moeless_opt.runtime.live.dispatch import timed
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
    from moeless_opt.runtime.live.dispatch import _timed_kernels

    policy = TimedShares(TimeModel(token_cost=1.0, activation_cost=5.0), speed_G=speed)
    for slots in (3, 4):
        policy.quotas(0, np.arange(8), table_of(0, 4, slots, 8))
    for name in ("seconds", "part_of", "timed_quotas"):
        kernel = getattr(_timed_kernels, name)
        assert len(kernel.signatures) == 1
        with pytest.raises(TypeError):
            kernel(*(["a"] * len(kernel.signatures[0])))


CURVE = TimeModel(
    curve_tokens=np.array([1.0, 8, 64, 512, 2048]),
    curve_activated=np.array([1.0, 3.0]),
    curve_time=np.array([[30.0, 60], [31, 61], [40, 66], [90, 110], [300, 310]]),
)


def test_the_interpreted_search_gives_the_same_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Numba is not installed."""
    pytest.importorskip("numba")
    from moeless_opt.runtime.live.dispatch import _timed_kernels

    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("plain_timed_kernels", _timed_kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    assert not hasattr(plain.timed_quotas, "signatures")
    rng = np.random.default_rng(3)
    for seed in range(40):
        table = table_of(seed, 4, int(rng.integers(2, 7)), 8)
        load_E = np.floor(rng.lognormal(3, 1.5, 8) * (rng.uniform(size=8) < 0.9)).astype(np.int64)
        time = CURVE if seed % 2 else TimeModel(token_cost=1.0, activation_cost=float(rng.integers(0, 60)))
        policy = TimedShares(time, speed_G=[1.0, 0.7, 1.3, 1.0] if seed % 3 == 0 else None)
        quota_P = policy.quotas(0, load_E, table)
        with monkeypatch.context() as patch:
            patch.setattr(timed, "_kernels", lambda: plain)
            np.testing.assert_array_equal(policy.quotas(0, load_E, table), quota_P)


def test_quotas_are_near_the_best_of_all_quotas() -> None:
    """Every way to divide the tokens of small layers, tried out."""
    rng = np.random.default_rng(1)
    over = []
    for _ in range(25):
        load_E = rng.integers(0, 9, 3)
        table = SlotTable([[0, 1], [1, 2], [0, 2]], 3)
        time = TimeModel(token_cost=1.0, activation_cost=float(rng.integers(0, 8)))
        first, second, third = (np.arange(n + 1) for n in load_E)
        a, b, c = np.meshgrid(first, second, third, indexing="ij")
        # Flat slots: 0 and 1 on rank 0, 1 and 2 on rank 1, 0 and 2 on rank 2.
        parts = ((a, b), (load_E[1] - b, c), (load_E[0] - a, load_E[2] - c))
        took = [time.time(x + y, (x > 0).astype(int) + (y > 0), 1.0) for x, y in parts]
        least = float(np.max(took, axis=0).min())
        quota_P = TimedShares(time).quotas(0, load_E, table)
        mine = [
            time.time(*one, 1.0)
            for one in zip(
                np.bincount(table.rank_P, weights=quota_P),
                np.bincount(table.rank_P, weights=quota_P > 0),
                strict=True,
            )
        ]
        over.append(max(map(float, mine)) / max(least, 1e-9))
    assert np.mean(np.array(over) <= 1 + 1e-9) > 0.9
    assert np.mean(over) < 1.03


@pytest.mark.parametrize("speed", [1e-308, 1e16, 1e300])
def test_speeds_that_are_none_are_refused(speed: float) -> None:
    with pytest.raises(ProblemError, match=r"speed_G\[1\].*relative"):
        TimedShares(TimeModel(token_cost=1.0), speed_G=[1.0, speed])
    near = 1e-100 if speed < 1 else 1e15
    table = SlotTable([[0, 1], [0, 1]], 2)
    for speed_G in ([1.0, near], [near, near]):
        policy = TimedShares(TimeModel(token_cost=1.0, activation_cost=5.0), speed_G=speed_G)
        quota_P = policy.quotas(0, np.array([10, 3]), table)
        assert np.bincount(table.expert_P, weights=quota_P).tolist() == [10, 3]
