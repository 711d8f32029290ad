"""What a simulated system believes of its experts' times, and what placing could do at best."""

from __future__ import annotations

import numpy as np

from moeless_opt.runtime.simulate import Scenario, simulate
from moeless_opt.runtime.simulate.beliefs import Beliefs
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.scene import machine_of

PROMPTS = Scenario(
    model="Phi-3.5-MoE", seconds=6, rate=8, policies=("static", "oracle-placed", "oracle", "ours"), error=0.0
)


def machine() -> Machine:
    return machine_of(PROMPTS)


def test_passes_correct_what_is_believed() -> None:
    true = machine()
    wrong = true.time.replace(token_cost=2 * true.time.token_cost, activation_cost=0.0)
    beliefs = Beliefs(true, wrong, learns=True, slots=3)
    fixed = Beliefs(true, wrong, learns=False, slots=3)
    load = np.full((1, 32, 16), 500.0)
    slots = np.tile(np.arange(16, dtype=np.int32).reshape(8, 2), (32, 1, 1))
    times = true.layers(load, slots, np.ones((1, 32, 8, 2)))
    tokens, used, seconds = times.tokens_BLG[0, 0], times.activated_BLG[0, 0], times.seconds_BLG[0, 0]
    assert (used == 2).all()
    before = beliefs.time.time(tokens, used, 1.0)
    assert beliefs.see(times)
    assert not fixed.see(times)
    assert fixed.time is wrong
    np.testing.assert_allclose(beliefs.time.time(tokens, used, 1.0), seconds, rtol=1e-9)
    assert np.abs(before / seconds - 1).max() > 0.1
    # Searches see the same, the link included.
    k = np.searchsorted(beliefs.table.knot_K, tokens[0]) - 1
    row = beliefs.table.table_AK[2]
    assert row[k] <= seconds[0] + true.link_per_token * tokens[0] <= row[k + 1] * (1 + 1e-9)


def test_learning_is_worth_most_of_knowing() -> None:
    mean = {
        kind: simulate(PROMPTS.replace(policies=("static", "ours"), believed=kind)).rows[1]["mean_ms"]
        for kind in ("exact", "learnt", "datasheet")
    }
    assert mean["learnt"] <= mean["exact"] * 1.02
    assert mean["learnt"] <= mean["datasheet"] * 0.98


def test_what_placing_could_do_lies_between_balance_and_systems() -> None:
    mean = {row["policy"]: row["mean_ms"] for row in simulate(PROMPTS).rows}
    assert mean["oracle"] <= mean["oracle-placed"] * 1.03
    assert mean["oracle-placed"] <= mean["ours"]
    assert mean["oracle-placed"] < 0.9 * mean["static"]
