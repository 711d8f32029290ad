"""Shares as whole tokens: none lost, and no GPU pushed over the largest time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.rounding import round_shares, round_tokens


def random_shares(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts, a placement with every expert somewhere, any shares on it, speeds."""
    rng = np.random.default_rng(seed)
    layers, gpus, slots = int(rng.integers(1, 4)), int(rng.integers(2, 8)), int(rng.integers(1, 5))
    experts = int(rng.integers(1, gpus * slots + 1))
    slots_LGC = np.full((layers, gpus, slots), -1, dtype=np.int32)
    share_LGC = np.zeros(slots_LGC.shape)
    for layer in range(layers):
        for cell, expert in enumerate(rng.permutation(experts)):
            slots_LGC[layer, cell % gpus, cell // gpus] = expert
        for gpu, slot in np.argwhere(slots_LGC[layer] < 0):
            expert = int(rng.integers(experts))
            if expert not in slots_LGC[layer, gpu]:
                slots_LGC[layer, gpu, slot] = expert
        for expert in range(experts):
            own = slots_LGC[layer] == expert
            share_LGC[layer][own] = rng.dirichlet(np.full(own.sum(), 0.5))
    count_LE = rng.integers(0, 30, (layers, experts))
    speed_G = np.ones(gpus) if seed % 2 else rng.uniform(0.5, 2.0, gpus)
    if seed % 3:  # level ones: they come nearest to the caps
        share_LGC = solve_shares(count_LE.astype(float), slots_LGC, speed_G).share_LGC
    return count_LE, slots_LGC, share_LGC, speed_G


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_every_token_is_kept_within_the_caps(seed: int) -> None:
    count_LE, slots_LGC, share_LGC, speed_G = random_shares(seed)
    token_LGC = round_shares(count_LE, slots_LGC, share_LGC, speed_G)
    exact_LGC = np.zeros(slots_LGC.shape)
    for layer, slots_GC in enumerate(slots_LGC):
        filled = slots_GC >= 0
        kept_E = np.bincount(slots_GC[filled], weights=token_LGC[layer][filled], minlength=count_LE.shape[1])
        np.testing.assert_array_equal(kept_E, count_LE[layer])
        exact_LGC[layer][filled] = (count_LE[layer][slots_GC] * share_LGC[layer])[filled]
    assert (np.abs(token_LGC - exact_LGC) < 1 + 1e-6).all()  # down or up, no further
    # No GPU holds more than the largest time's worth, rounded up.
    top_L = (exact_LGC.sum(axis=2) / speed_G).max(axis=1)
    assert (token_LGC.sum(axis=2) <= np.ceil(top_L[:, None] * speed_G * (1.0 + 1e-9) + 1e-9)).all()
    np.testing.assert_array_equal(token_LGC, round_shares(count_LE, slots_LGC, share_LGC, speed_G))


def test_rounding_looks_ahead() -> None:
    """Three experts of one token, 0.6 of each on one GPU: by largest remainders it gets all, its cap is 2."""
    slots_LGC = np.array([[[0, 1, 2], [0, -1, -1], [1, -1, -1], [2, -1, -1]]])
    share_LGC = np.where(np.arange(4)[:, None] == 0, 0.6, np.where(slots_LGC >= 0, 0.4, 0.0))
    token_LGC = round_shares(np.array([[1, 1, 1]]), slots_LGC, share_LGC)
    assert sorted(token_LGC.sum(axis=2)[0].tolist()) == [0, 0, 1, 2]


def test_largest_remainders() -> None:
    exact_P = np.array([0.2, 1.7, 2.6, 0.5, 2.0])
    token_P = round_tokens(exact_P, np.array([0, 1, 0, 1, 0]), np.array([5, 2]))
    assert token_P.tolist() == [0, 2, 3, 0, 2]


def test_shares_that_miss_one_lose_no_token() -> None:
    """Shares from elsewhere may sum to less than 1, or by rounding to more."""
    assert round_tokens(np.array([1.0, 0.5]), np.array([0, 0]), np.array([6])).sum() == 6
    assert round_tokens(np.array([3.0, 4.0]), np.array([0, 0]), np.array([6])).tolist() == [3, 3]


def test_a_missing_replica_is_named() -> None:
    with pytest.raises(ProblemError, match="no replica of an expert that has tokens"):
        round_shares(np.array([[1, 1]]), np.array([[[0]]]), np.array([[[1.0]]]))
