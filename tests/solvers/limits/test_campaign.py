"""Plans under limits beside all that there are; in full: ``python tests/benchmarks/limits_campaign.py``."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.limited import Verdict, draw, judge


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    """What two hundred plans are worth; raises where one is wrongly refused or breaks a limit."""
    found = (judge(draw(np.random.default_rng((7, case)))) for case in range(200))
    return [verdict for verdict in found if verdict is not None]


def test_no_claim_is_false(verdicts: list[Verdict]) -> None:
    assert len(verdicts) > 100
    assert not [claim for verdict in verdicts for claim in verdict.false]


def test_few_plans_are_above_the_optimum(verdicts: list[Verdict]) -> None:
    above = [verdict.excess for verdict in verdicts if verdict.excess > 0]
    assert len(above) <= 0.02 * len(verdicts)
    assert max(above, default=0.0) < 0.2


def test_moves_are_the_fewest_mostly(verdicts: list[Verdict]) -> None:
    more = [verdict for verdict in verdicts if verdict.moves > verdict.fewest]
    assert len(more) <= 0.02 * len(verdicts)
