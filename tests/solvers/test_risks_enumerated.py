"""Every risk over scenarios on two nodes and eight experts, against all placements there are."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from tests.oracles.enumeration import even_times, placements, risk_of, set_times

RISKS = ("expected", "worst", "cvar", "sigma")
SPLITS = ("fractional", "equal", "nearest")
WEIGHT_T = np.array([0.5, 0.3, 0.2])
EXPERTS, SLOTS, NODES = 8, 5, 2
FAR = {None: 0.08, 3: 0.08, 1: 0.7}
"""Largest gap by the moves allowed: of one alone the search with even or nearest shares may miss the best."""
HELD_PEG = placements([SLOTS] * NODES, EXPERTS)


def near_times(held_PEG: BoolArray, load_E: FloatArray) -> FloatArray:
    """One GPU to a node, as many tokens from each: what is on both is served at home, [P]."""
    both_PE1 = held_PEG.all(2)[:, :, None]
    part_PEG = np.where(both_PE1, 0.5, held_PEG)
    return np.asarray(np.einsum("peg,e->pg", part_PEG, load_E).max(1))


def values(split: str, load_TE: FloatArray) -> FloatArray:
    """Largest GPU time of all placements in each scenario, [T, P]."""
    if split == "nearest":
        return np.array([near_times(HELD_PEG, load_E) for load_E in load_TE])
    times = even_times if split == "equal" else set_times
    return np.array([times(HELD_PEG, load_E, np.ones(NODES)) for load_E in load_TE])


def moves_from(live_EG: BoolArray) -> IntArray:
    return np.asarray((HELD_PEG & ~live_EG).sum((1, 2)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("risk", RISKS)
def test_risks_of_two_nodes_are_near_the_best(split: str, risk: str) -> None:
    """With limits on moves and without: the value is the risk by its definition, the bound is true."""
    off = []
    for seed, most in itertools.product((0, 3), (None, 1, 3)):
        rng = np.random.default_rng([seed, 7])
        load_TE = rng.lognormal(0, 1, (3, EXPERTS)) * 100
        live = mo.plan(load_TE[:1] * rng.lognormal(0, 0.5, (1, EXPERTS)), mo.uniform(NODES, 1, slots=SLOTS))
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_TE[:, None], weight_T=WEIGHT_T),
            topology=mo.uniform(NODES, 1, slots=SLOTS),
            split=split,
            objective=mo.Objective(risk=risk, cvar_alpha=0.6, sigma=0.7, balance_tolerance=0.0),
            current=None if most is None else mo.Placement(slots_LGC=live.slots_LGC, experts=EXPERTS),
            limits=mo.Limits(max_moves=most),
        )
        value_P = risk_of(values(split, load_TE), WEIGHT_T, risk, 0.6, 0.7)
        if most is not None:
            held_EG = np.array([[e in live.slots_LGC[0, g] for g in range(NODES)] for e in range(EXPERTS)])
            value_P = np.where(moves_from(held_EG) <= most, value_P, np.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = mo.solve(problem).plan
        assert plan is not None
        mo.verify(problem, plan)
        held = np.array([[e in plan.slots_LGC[0, g] for g in range(NODES)] for e in range(EXPERTS)])
        (same,) = np.flatnonzero((held == HELD_PEG).all((1, 2)))
        got, best = float(plan.certificate.value_L[0]), float(value_P.min())
        assert got == pytest.approx(value_P[same], rel=1e-9)
        assert plan.certificate.lower_bound_L[0] <= best * (1 + 1e-9)
        off.append((got / best - 1) / FAR[most])
    assert max(off) < 1, off


@pytest.mark.parametrize("limits", [mo.Limits(max_replicas=2), mo.Limits(max_total_replicas=10)])
def test_deviations_of_impossible_times_raise_no_warning(limits: mo.Limits) -> None:
    """The descent marks what the limits forbid by times that have no square."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.random.default_rng(3).lognormal(0, 1, (3, 1, EXPERTS)) * 1000),
        topology=mo.uniform(NODES, 2, slots=3),
        split="equal",
        limits=limits,
        objective=mo.Objective(risk="sigma"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mo.solve(problem).plan is not None
