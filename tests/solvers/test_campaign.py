"""The campaign in small: `python tests/benchmarks/campaign.py` is the whole of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.campaign import ABOVE, KINDS, judge

CASES = 30
MAY = {"makespan": 0.0, "memory": 0.0, "plain": 0.0, "scenarios": 0.06, "timed": 0.0}
"""Share of plans above the optimum that is known of the whole campaign, rounded up."""


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_plan_is_wrong_and_few_are_above_the_optimum(kind: str) -> None:
    found = [judge(kind, seed) for seed in range(CASES)]
    assert [one.wrong for one in found if one.wrong] == []
    excess = np.array([one.excess for one in found])
    assert np.isfinite(excess).all(), "refused, though there is a plan"
    assert (excess > ABOVE).sum() <= np.ceil(MAY[kind] * CASES)
