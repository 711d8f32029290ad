"""The warm pool against a table of all layers, GPUs and experts, call by call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import held_LGE, replica_keys
from moeless_opt.runtime.pool.keep_alive import AdaptiveKeepAlive, FixedKeepAlive, KeepAlive
from moeless_opt.runtime.pool.warm import WarmPool

LAYERS, GPUS, SLOTS, EXPERTS = 2, 3, 3, 5


class Table:
    """The rules once more, on dense masks [L, G, E]."""

    def __init__(self, warm: np.ndarray, room: int, bytes_L: np.ndarray, keep: KeepAlive) -> None:
        self.warm, self.room, self.bytes_L, self.keep = warm, room, bytes_L, keep
        self.last = np.where(warm, 0.0, -np.inf)
        self.pinned = np.zeros_like(warm)
        self.now = self.byte_seconds = 0.0
        self.cold_starts = self.reuses = self.released = 0

    @property
    def held_L(self) -> np.ndarray:
        return self.warm.sum((1, 2))

    def advance(self, now: float, kept: np.ndarray | None = None) -> None:
        end = np.where(self.warm, self.last, 0.0) + self.keep.seconds_L(LAYERS)[:, None, None]
        last = np.where(self.warm, self.last, -np.inf)
        last[self.pinned & self.warm] = np.inf
        final = np.zeros_like(self.warm)
        np.put_along_axis(final, last.argmax(1)[:, None, :], True, axis=1)
        gone = self.warm & (end < now) & ~final & ~self.pinned
        if kept is not None:
            gone &= ~kept
        over = np.where(gone, now - np.maximum(end, self.now), 0.0)
        self.byte_seconds += self.held_L @ self.bytes_L * (now - self.now) - over.sum((1, 2)) @ self.bytes_L
        self.warm &= ~gone
        self.released += gone.sum()
        self.now = now

    def take(self, wanted: np.ndarray, now: float, until: float) -> np.ndarray:
        cold, again = wanted & ~self.warm, wanted & self.warm & ~self.pinned
        layer, gpu, expert = np.nonzero(again & (self.last < now))
        self.keep.idle(layer, now - self.last[layer, gpu, expert])
        self.last[wanted] = until
        self.warm |= wanted
        self.cold_starts += cold.sum()
        self.reuses += again.sum()
        return cold

    def prewarm(self, wanted: np.ndarray, now: float) -> np.ndarray:
        cold = wanted & ~self.warm
        self.last[cold] = now
        self.warm |= cold
        self.cold_starts += cold.sum()
        return cold

    def fit(self, wanted: np.ndarray) -> int:
        evicted = 0
        for layer, gpu in np.argwhere(self.warm.sum(2) > self.room):
            over = self.warm[layer, gpu].sum() - self.room
            idle = np.flatnonzero(self.warm[layer, gpu] & ~wanted[layer, gpu])
            gone = idle[np.argsort(self.last[layer, gpu, idle], kind="stable")][:over]
            self.warm[layer, gpu, gone] = False
            evicted += gone.size
        self.released += evicted
        return evicted

    def touch(self, used: np.ndarray, until: float) -> None:
        held = used & self.warm
        self.last[held] = np.maximum(self.last[held], until)

    def keep_only(self, kept: np.ndarray) -> None:
        self.released += (self.warm & ~kept).sum()
        self.warm &= kept


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


def mask(keys: np.ndarray) -> np.ndarray:
    held = np.zeros(LAYERS * GPUS * EXPERTS, dtype=bool)
    held[keys] = True
    return held.reshape(LAYERS, GPUS, EXPERTS)


CALLS = ["use", "prewarm", "hold", "keep_only", "advance", "take", "touch", "fit", "drop", "follow", "pin"]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 2.0, 1e9, "adaptive"]),
    st.integers(SLOTS, EXPERTS),
    st.lists(st.sampled_from(CALLS), min_size=1, max_size=14),
)
def test_the_pool_is_the_table(seed: int, keep: object, room: int, calls: list[str]) -> None:
    rng = np.random.default_rng(seed)
    start = placement(rng)
    policies: list[KeepAlive] = []
    for _ in range(2):
        policy = AdaptiveKeepAlive(low=0.1, high=1.0) if keep == "adaptive" else FixedKeepAlive(float(keep))  # type: ignore[arg-type]
        if isinstance(policy, AdaptiveKeepAlive):
            policy.LEARNT = 3
        policies.append(policy)
    bytes_L = np.array([10, 20])
    pool = WarmPool(
        start,
        EXPERTS,
        capacity_LG=np.full((LAYERS, GPUS), room),
        bytes_L=bytes_L,
        keep_alive=policies[0],
    )
    table = Table(held_LGE(start, EXPERTS), room, bytes_L, policies[1])
    now = 0.0
    for call in calls:
        slots = placement(rng)
        wanted, keys = held_LGE(slots, EXPERTS), replica_keys(slots, EXPERTS)
        now += float(rng.choice([0.0, 0.3, 1.5]))
        if call == "take":
            table.advance(now, wanted)
            assert np.array_equal(np.flatnonzero(table.take(wanted, now, now)), pool.take(keys, now))
        else:
            table.advance(now)
            pool.advance(now)
        if call == "use":
            cold, found = table.take(wanted, now, now + 0.2), pool.use(slots, now, now + 0.2)
            assert np.array_equal(np.flatnonzero(cold), found.cold)
            assert found.evicted == (table.fit(wanted) if cold.any() else 0)
        elif call == "prewarm":
            cold, found = table.prewarm(wanted, now), pool.prewarm(slots, now)
            assert np.array_equal(np.flatnonzero(cold), found.cold)
            assert found.evicted == (table.fit(wanted) if cold.any() else 0)
        elif call == "hold":
            table.touch(wanted, now + 0.4)
            pool.hold(slots, now + 0.4)
        elif call == "touch":
            table.touch(wanted, now)
            pool.touch(keys, now)
        elif call == "keep_only":
            table.prewarm(wanted, now)
            table.fit(wanted)
            pool.prewarm(slots, now)
            table.keep_only(wanted)
            pool.keep_only(slots)
        elif call == "fit":
            assert table.fit(table.pinned) == pool.fit()
        elif call == "drop":
            gone = wanted & (table.warm.sum(1, keepdims=True) > table.warm.any(1, keepdims=True))
            table.warm &= ~gone
            pool.drop(np.flatnonzero(gone))
        elif call == "follow":
            table.take(wanted, now, now)
            table.keep_only(wanted)
            pool.follow(keys, now)
        elif call == "pin":
            table.pinned = table.warm & (rng.uniform(size=table.warm.shape) < 0.5)
            pool.pinned = np.flatnonzero(table.pinned)
        if not table.warm.any(1).all():
            return  # nobody drops all copies of an expert
        assert np.array_equal(table.warm, mask(pool.keys))
        assert table.byte_seconds == pytest.approx(pool.byte_seconds)
        assert np.array_equal(table.held_L, pool.held_L)
        for name in ("cold_starts", "reuses", "released", "now"):
            assert getattr(table, name) == getattr(pool, name)


def test_it_refuses_what_does_not_fit_and_what_is_past() -> None:
    slots = placement(np.random.default_rng(0))
    pool = WarmPool(slots, EXPERTS, capacity_LG=np.full((LAYERS, GPUS), SLOTS), bytes_L=[1, 1])
    pool.advance(3.0)
    with pytest.raises(ProblemError, match="time has reached"):
        pool.advance(2.0)
    with pytest.raises(InfeasibleError, match="GPU 0 in layer 0"):
        pool.use(np.array([[[0, 1, 2, 3]] * GPUS] * LAYERS, dtype=np.int32), 3.0)


def test_infinite_keep_alive_keeps_everything() -> None:
    slots = placement(np.random.default_rng(1))
    pool = WarmPool(
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
    pool = WarmPool(slots, EXPERTS, capacity_LG=np.full((LAYERS, GPUS), SLOTS), bytes_L=np.ones(LAYERS))
    again = pool.slots()
    np.testing.assert_array_equal(replica_keys(again, EXPERTS), pool.keys)
    assert (np.diff(np.where(again < 0, EXPERTS + np.arange(again.shape[2]), again), axis=2) > 0).all()
