"""A time model as a table, and the most tokens that it says a GPU serves in a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.plan.time_bounds import TimeTable
from moeless_opt.problems.spec.time_model import TimeModel
from tests.strategies import time_models


@given(time=time_models(), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_table_is_the_model(time: TimeModel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = TimeTable.of(time, 6)
    used, tokens = rng.integers(1, 7, 50), rng.uniform(0, 9000, 50)
    k = np.clip(np.searchsorted(table.knot_K, tokens, side="right") - 1, 0, table.knot_K.size - 2)
    along = np.maximum((tokens - table.knot_K[k]) / np.diff(table.knot_K)[k], 0.0)
    low, high = table.table_AK[used, k], table.table_AK[used, k + 1]
    np.testing.assert_allclose(low + along * (high - low), time.time(tokens, used, 1.0), rtol=1e-9)


@given(time=time_models(), seconds=st.floats(0.1, 5000.0))
@settings(max_examples=100, deadline=None)
def test_most_tokens_in_a_time(time: TimeModel, seconds: float) -> None:
    most_A = TimeTable.of(time, 3).largest(np.array([seconds]))[0]
    for used in (1, 2, 3):
        if np.isneginf(most_A[used]):
            assert float(time.time(0.0, used, 1.0)) > seconds
        elif np.isfinite(most_A[used]):
            assert float(time.time(most_A[used], used, 1.0)) <= seconds * (1 + 1e-9)
            assert float(time.time(most_A[used] * (1 + 1e-6) + 1e-6, used, 1.0)) > seconds * (1 - 1e-9)
