"""The warm pool against a replay replica by replica, and what keep-alive learns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import held_LGE, replica_keys
from moeless_opt.runtime.pool.keep_alive import AdaptiveKeepAlive, FixedKeepAlive
from moeless_opt.runtime.pool.warm import WarmPool

L, G, E, C = 2, 3, 4, 3


def placement(rng: np.random.Generator) -> np.ndarray:
    """A random placement: every expert once, and some more where there is room."""
    slots = np.full((L, G, C), -1, dtype=np.int32)
    for layer in range(L):
        held: list[set[int]] = [set() for _ in range(G)]
        for expert in range(E):
            free = [g for g in range(G) if len(held[g]) < C]
            held[int(rng.choice(free))].add(expert)
        for _ in range(int(rng.integers(0, 4))):
            g, e = int(rng.integers(G)), int(rng.integers(E))
            if len(held[g]) < C:
                held[g].add(e)
        for g in range(G):
            slots[layer, g, : len(held[g])] = sorted(held[g])
    return slots


def held(keys: np.ndarray) -> list[list[int]]:
    """(layer, GPU, expert) of keys."""
    return np.stack(np.unravel_index(keys, (L, G, E)), axis=1).tolist()  # type: ignore[no-any-return]


class Replay:
    """One replica at a time, in a dictionary from (layer, GPU, expert) to the time of the last use."""

    def __init__(self, slots: np.ndarray, keep: float) -> None:
        self.last: dict[tuple[int, ...], float] = dict.fromkeys(
            map(tuple, np.argwhere(held_LGE(slots, E))), 0.0
        )
        self.keep, self.now, self.paid = keep, 0.0, 0.0

    def advance(self, now: float) -> None:
        protected = set()
        for layer in range(L):
            for expert in range(E):
                copies = [k for k in self.last if (k[0], k[2]) == (layer, expert)]
                protected.add(max(copies, key=lambda k: (self.last[k], -k[1])))
        for key in list(self.last):
            end = self.last[key] + self.keep
            if end < now and key not in protected:
                self.paid += max(end, self.now) - self.now
                del self.last[key]
            else:
                self.paid += now - self.now
        self.now = now

    def use(self, slots: np.ndarray, now: float) -> set[tuple[int, ...]]:
        self.advance(now)
        wanted = set(map(tuple, np.argwhere(held_LGE(slots, E))))
        cold = wanted - set(self.last)
        for key in wanted:
            self.last[key] = now
        for layer in range(L):
            for g in range(G):
                here = [k for k in self.last if k[:2] == (layer, g)]
                idle = sorted((k for k in here if k not in wanted), key=lambda k: (self.last[k], k[2]))
                for key in idle[: max(len(here) - C, 0)]:
                    del self.last[key]
        return cold


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 2.0, 100.0]))
def test_pool_is_the_replay(seed: int, keep: float) -> None:
    rng = np.random.default_rng(seed)
    start = placement(rng)
    pool = WarmPool(start, E, capacity_LG=np.full((L, G), C), bytes_L=np.ones(L), keep_alive=keep)
    replay = Replay(start, keep)
    now = 0.0
    for _ in range(8):
        now += float(rng.choice([0.25, 1.0, 3.0]))
        slots = placement(rng)
        use = pool.use(slots, now)
        assert set(map(tuple, held(use.cold))) == replay.use(slots, now)
        assert set(map(tuple, held(pool.keys))) == set(replay.last)
        assert pool.byte_seconds == pytest.approx(replay.paid)
        assert held_LGE(pool.slots(), E).any(1).all()  # no expert ever goes cold altogether
        assert set(map(tuple, np.argwhere(held_LGE(pool.slots(), E)))) == set(replay.last)


def two_on_one() -> np.ndarray:
    return np.array([[[0, 1], [2, 3], [0, -1]]], dtype=np.int32)


def pool_of(**options: object) -> WarmPool:
    return WarmPool(
        two_on_one(),
        4,
        capacity_LG=np.full((1, 3), 2),
        bytes_L=np.array([7]),
        **options,  # type: ignore[arg-type]
    )


def test_extra_replica_goes_after_its_keep_alive_and_is_charged_until_then() -> None:
    pool = pool_of(keep_alive=2.0)
    alone = np.array([[[0, 1], [2, 3], [-1, -1]]], dtype=np.int32)
    pool.use(alone, 1.0, until=1.5)
    assert pool.bytes == 5 * 7
    pool.advance(10.0)
    assert pool.bytes == 4 * 7
    # Four for ten seconds; the fifth, last used at 0, for two.
    assert pool.byte_seconds == pytest.approx(7 * (4 * 10 + 2))
    assert pool.use(two_on_one(), 10.0).cold.size == 1


def test_kept_for_ever() -> None:
    slots = placement(np.random.default_rng(0))
    pool = WarmPool(slots, E, capacity_LG=np.full((L, G), C), bytes_L=np.full(L, 2), keep_alive=float("inf"))
    held_keys = pool.keys.copy()
    pool.advance(1e9)
    np.testing.assert_array_equal(pool.keys, held_keys)
    assert pool.byte_seconds == pytest.approx(2e9 * held_keys.size)


def test_prewarmed_replica_is_warm_and_no_reuse() -> None:
    pool = pool_of(keep_alive=FixedKeepAlive(5.0))
    moved = np.array([[[0, 1], [2, 3], [1, -1]]], dtype=np.int32)
    assert pool.prewarm(moved, 1.0).cold.size == 1
    assert pool.reuses == 0
    assert pool.use(moved, 1.0).cold.size == 0
    assert pool.cold_starts == 1


def test_serverful_pool_keeps_what_it_holds() -> None:
    pool = pool_of(keep_alive=0.0)
    pool.hold(two_on_one(), 100.0)
    pool.advance(100.0)
    assert pool.bytes == 5 * 7
    assert pool.byte_seconds == pytest.approx(5 * 7 * 100)
    pool.keep_only(np.array([[[0, 1], [2, 3], [-1, -1]]], dtype=np.int32))
    assert pool.bytes == 4 * 7


def test_adaptive_keeps_as_long_as_most_gaps() -> None:
    policy = AdaptiveKeepAlive(0.9, low=0.01, high=30.0)
    assert policy.seconds_L(2).tolist() == [30.0, 30.0]  # nothing is known yet
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1.0, 4000)
    policy.idle(np.zeros(4000, dtype=np.int64), gaps)
    known, unknown = policy.seconds_L(2)
    assert unknown == 30.0
    found = float((gaps <= known).mean())
    assert 0.9 <= found < 0.96  # the upper edge of the bin of the quantile
    with pytest.raises(ProblemError, match="quantile"):
        AdaptiveKeepAlive(1.5)


def test_adaptive_pool_learns_from_idle_times() -> None:
    policy = AdaptiveKeepAlive(0.9, low=0.01, high=50.0)
    pool = pool_of(keep_alive=policy)
    alone = np.array([[[0, 1], [2, 3], [-1, -1]]], dtype=np.int32)
    for i in range(1, 60):
        pool.use(two_on_one() if i % 2 else alone, float(i))
    learnt = float(policy.seconds_L(1)[0])
    assert 1.0 <= learnt < 4.0  # replicas rest for 1 or 2 seconds


def test_bad_input() -> None:
    with pytest.raises(ProblemError, match="keep_alive"):
        FixedKeepAlive(-1.0)
    pool = pool_of(keep_alive=1.0)
    pool.advance(3.0)
    with pytest.raises(ProblemError, match="now"):
        pool.advance(2.0)
    full = np.array([[[0, 1, 2], [3, -1, -1], [-1, -1, -1]]], dtype=np.int32)
    with pytest.raises(InfeasibleError, match="GPU 0 in layer 0, it has room for 2"):
        pool.use(full, 4.0)


def two_by_two(*rows: list[int]) -> np.ndarray:
    """Slots of one layer, two GPUs, room for three."""
    slots = np.full((1, 2, 3), -1, dtype=np.int32)
    for g, row in enumerate(rows):
        slots[0, g, : len(row)] = row
    return slots


def test_what_a_running_model_uses_is_pinned() -> None:
    start = two_by_two([0, 1], [2, 3])
    pool = WarmPool(start, 4, capacity_LG=np.array([[3, 3]]), bytes_L=[10], keep_alive=1.0)
    pool.pinned = replica_keys(start, 4)
    more = two_by_two([0, 1, 2], [2, 3])
    cold = pool.take(replica_keys(more, 4), 5.0)  # idle for long, yet all pinned ones are there
    assert cold.tolist() == [2]
    assert (pool.cold_starts, pool.reuses) == (1, 0)
    pool.pinned = replica_keys(more, 4)
    # Expert 2 leaves GPU 1 and is kept: the copy in use on GPU 0 is the one that must not go.
    after = two_by_two([0, 1, 2], [3])
    pool.pinned = replica_keys(after, 4)
    pool.touch(replica_keys(two_by_two([], [2]), 4), 6.0)
    pool.advance(6.5)
    assert pool.bytes == 50
    pool.advance(7.5)
    assert (pool.bytes, pool.released) == (40, 1)
    # 40 until 5, 50 until a second after the last use, 40 from there.
    assert pool.byte_seconds == pytest.approx(40 * 5 + 50 * 2 + 40 * 0.5)
    # Wanted again while warm: re-used, and its idle time is learnt.
    keep = AdaptiveKeepAlive(0.5, low=0.0, high=100.0)
    pool.keep_alive = keep
    pool.take(replica_keys(two_by_two([], [2]), 4), 8.0)
    pool.touch(replica_keys(two_by_two([], [2]), 4), 8.0)
    for k in range(1, 17):
        assert not pool.take(replica_keys(two_by_two([], [2]), 4), 8.0 + 2 * k).size
    assert pool.reuses == 16
    assert 1.5 < keep.seconds_L(1)[0] < 3.0


def test_pinned_replicas_stay_beyond_the_room_and_others_go() -> None:
    start = two_by_two([0, 1], [2, 3])
    pool = WarmPool(start, 4, capacity_LG=np.array([[2, 2]]), bytes_L=[10], keep_alive=100.0)
    pool.pinned = replica_keys(start, 4)
    both = replica_keys(two_by_two([2, 3], []), 4)
    pool.take(both, 1.0)
    pool.pinned = np.union1d(pool.pinned, both)
    assert pool.fit() == 0
    assert pool.bytes == 60
    pool.pinned = np.setdiff1d(pool.pinned, both)
    assert pool.fit() == 2
    assert pool.bytes == 40
    pool.take(both, 2.0)
    pool.drop(both)
    assert pool.bytes == 40
    pool.follow(replica_keys(two_by_two([0, 1, 3], [2, 3]), 4), 3.0)
    assert (pool.bytes, pool.cold_starts) == (50, 5)
