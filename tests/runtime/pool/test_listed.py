"""The listed warm pool does what the tabled one does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import replica_keys
from moeless_opt.runtime.pool.keep_alive import AdaptiveKeepAlive
from moeless_opt.runtime.pool.listed import ReplicaPool
from moeless_opt.runtime.pool.table import WarmPool

LAYERS, GPUS, SLOTS, EXPERTS = 2, 3, 3, 5


def placement(rng: np.random.Generator) -> np.ndarray:
    slots = np.array(
        [[rng.choice(EXPERTS, size=SLOTS, replace=False) for _ in range(GPUS)] for _ in range(LAYERS)]
    )
    drop = rng.uniform(size=slots.shape) < 0.3
    slots = np.where(drop, -1, slots)
    slots[:, 0] = [0, 1, 2]  # all experts have a replica
    slots[:, 1, :2] = [3, 4]
    slots[:, 1, 2] = -1
    return np.take_along_axis(slots, np.argsort(slots < 0, axis=2, kind="stable"), axis=2).astype(np.int32)


def table(pool: ReplicaPool) -> np.ndarray:
    held = np.zeros(LAYERS * GPUS * EXPERTS, dtype=bool)
    held[pool.keys] = True
    return held.reshape(LAYERS, GPUS, EXPERTS)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 2.0, 1e9, "adaptive"]),
    st.integers(SLOTS, EXPERTS),
    st.lists(st.sampled_from(["use", "prewarm", "hold", "keep_only", "advance"]), min_size=1, max_size=14),
)
def test_both_pools_agree_on_everything(seed: int, keep: object, room: int, calls: list[str]) -> None:
    rng = np.random.default_rng(seed)
    start = placement(rng)
    pools = []
    for kind in (WarmPool, ReplicaPool):
        policy = AdaptiveKeepAlive(low=0.1, high=1.0) if keep == "adaptive" else keep
        if isinstance(policy, AdaptiveKeepAlive):
            policy.LEARNT = 3
        pools.append(
            kind(
                start,
                EXPERTS,
                capacity_LG=np.full((LAYERS, GPUS), room),
                bytes_L=np.array([10, 20]),
                keep_alive=policy,
            )
        )
    dense, listed = pools
    now = 0.0
    for call in calls:
        slots = placement(rng)
        now += float(rng.choice([0.0, 0.3, 1.5]))
        for pool in pools:
            pool.advance(now)
        if call in ("use", "prewarm"):
            uses = [
                pool.use(slots, now, now + 0.2) if call == "use" else pool.prewarm(slots, now)
                for pool in pools
            ]
            assert np.array_equal(np.flatnonzero(uses[0].cold_LGE), uses[1].cold)
            assert uses[0].evicted == uses[1].evicted
        elif call == "hold":
            for pool in pools:
                pool.hold(slots, now + 0.4)
        elif call == "keep_only":
            union = np.where(rng.uniform() < 0.5, start, slots)
            for pool in pools:
                pool.prewarm(union, now)
                pool.keep_only(union)
        assert np.array_equal(dense.warm_LGE, table(listed))
        assert dense.byte_seconds == pytest.approx(listed.byte_seconds)
        assert dense.bytes == listed.bytes
        assert np.array_equal(dense.held_L, listed.held_L)
        for name in ("cold_starts", "reuses", "released", "now"):
            assert getattr(dense, name) == getattr(listed, name)


def test_it_refuses_what_does_not_fit_and_what_is_past() -> None:
    slots = placement(np.random.default_rng(0))
    pool = ReplicaPool(slots, EXPERTS, capacity_LG=np.full((LAYERS, GPUS), SLOTS), bytes_L=[1, 1])
    pool.advance(3.0)
    with pytest.raises(ProblemError, match="time has reached"):
        pool.advance(2.0)
    with pytest.raises(InfeasibleError, match="GPU 0 in layer 0"):
        pool.use(np.array([[[0, 1, 2, 3]] * GPUS] * LAYERS, dtype=np.int32), 3.0)


def test_infinite_keep_alive_keeps_everything() -> None:
    slots = placement(np.random.default_rng(1))
    pool = ReplicaPool(
        slots, EXPERTS, capacity_LG=np.full((LAYERS, GPUS), EXPERTS), bytes_L=[1, 1], keep_alive=np.inf
    )
    pool.advance(1e6)
    assert pool.released == 0
    assert pool.byte_seconds == pytest.approx(1e6 * (slots >= 0).sum())


def test_keys_are_ordered_and_skip_empty_slots() -> None:
    slots = np.array([[[3, 1], [2, -1]]], dtype=np.int32)
    assert replica_keys(slots, 4).tolist() == [1, 3, 4 + 2]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_slots_are_the_keys(seed: int) -> None:
    slots = placement(np.random.default_rng(seed))
    pool = ReplicaPool(slots, EXPERTS, capacity_LG=np.full((LAYERS, GPUS), SLOTS), bytes_L=np.ones(LAYERS))
    again = pool.slots()
    np.testing.assert_array_equal(replica_keys(again, EXPERTS), pool.keys)
    assert (np.diff(np.where(again < 0, EXPERTS + np.arange(again.shape[2]), again), axis=2) > 0).all()
