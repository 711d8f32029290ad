"""Every risk over scenarios on two nodes and eight experts, against all placements there are."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from tests.oracles.enumeration import even_times, placements, risk_of, set_times

RISKS = ("expected", "worst", "cvar", "sigma", "covariance")
SPLITS = ("fractional", "equal", "nearest")
WEIGHT_T = np.array([0.5, 0.3, 0.2])
EXPERTS, SLOTS, NODES = 8, 5, 2
FAR = {None: 0.08, 3: 1e-3, 1: 1e-3}
"""Largest gap by the moves allowed: with few of them tiny layers are searched as a whole."""
DEVIATIONS = 0.7
HELD_PEG = placements([SLOTS] * NODES, EXPERTS)


def halves(held_PEG: BoolArray) -> FloatArray:
    """Shares of two GPUs: what is on both is divided evenly, also by the nearest of two nodes, [P, E, G]."""
    return np.where(held_PEG.all(2)[:, :, None], 0.5, held_PEG)


def values(split: str, load_TE: FloatArray) -> FloatArray:
    """Largest GPU time of all placements in each scenario, [T, P]."""
    if split == "nearest":
        return np.einsum("peg,te->tpg", halves(HELD_PEG), load_TE).max(2)
    times = even_times if split == "equal" else set_times
    return np.array([times(HELD_PEG, load_E, np.ones(NODES)) for load_E in load_TE])


def strayed(part_PEG: FloatArray, load_TE: FloatArray) -> FloatArray:
    """Largest ``m + z sqrt(s' C s)`` of the GPUs, with the covariance written out, [P]."""
    mean_E = WEIGHT_T @ load_TE
    covariance_EE = np.cov(load_TE.T, aweights=WEIGHT_T, ddof=0)
    square_PG = np.einsum("peg,ef,pfg->pg", part_PEG, covariance_EE, part_PEG, optimize=True)
    mean_PG = np.einsum("peg,e->pg", part_PEG, mean_E)
    return np.asarray((mean_PG + DEVIATIONS * np.sqrt(np.maximum(square_PG, 0.0))).max(1))


def by_covariance(split: str, load_TE: FloatArray, held_PEG: BoolArray) -> FloatArray:
    """Covariance risk of all placements: of free shares the best, by ternary searches in one another, [P]."""
    if split != "fractional":
        return strayed(halves(held_PEG), load_TE)
    both_PE = held_PEG.all(2)
    assert both_PE.sum(1).max() <= 2  # ten slots, eight experts
    first_PE = both_PE & (np.cumsum(both_PE, axis=1) == 1)
    second_PE = both_PE & ~first_PE

    def worth(first_P: FloatArray, second_P: FloatArray) -> FloatArray:
        part_PEG = held_PEG.astype(float)
        for mine_PE, share_P in ((first_PE, first_P), (second_PE, second_P)):
            part_PEG[:, :, 0] = np.where(mine_PE, share_P[:, None], part_PEG[:, :, 0])
            part_PEG[:, :, 1] = np.where(mine_PE, 1 - share_P[:, None], part_PEG[:, :, 1])
        return strayed(part_PEG, load_TE)

    def least(worth: Callable[[FloatArray], FloatArray]) -> FloatArray:
        low_P, high_P = np.zeros(len(held_PEG)), np.ones(len(held_PEG))
        for _ in range(24):
            left_P, right_P = (2 * low_P + high_P) / 3, (low_P + 2 * high_P) / 3
            falls_P = worth(left_P) > worth(right_P)
            low_P, high_P = np.where(falls_P, left_P, low_P), np.where(falls_P, high_P, right_P)
        return worth((low_P + high_P) / 2)

    return least(lambda first_P: least(lambda second_P: worth(first_P, second_P)))


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
            objective=mo.Objective(risk=risk, cvar_alpha=0.6, sigma=DEVIATIONS, balance_tolerance=0.0),
            current=None if most is None else mo.Placement(slots_LGC=live.slots_LGC, experts=EXPERTS),
            limits=mo.Limits(max_moves=most),
        )
        near_P = np.ones(len(HELD_PEG), dtype=np.bool_)
        if most is not None:
            held_EG = np.array([[e in live.slots_LGC[0, g] for g in range(NODES)] for e in range(EXPERTS)])
            near_P = moves_from(held_EG) <= most
        value_P = np.full(len(HELD_PEG), np.inf)
        if risk == "covariance":
            value_P[near_P] = by_covariance(split, load_TE, HELD_PEG[near_P])
        else:
            value_P[near_P] = risk_of(values(split, load_TE), WEIGHT_T, risk, 0.6, DEVIATIONS)[near_P]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = mo.solve(problem).plan
        assert plan is not None
        mo.verify(problem, plan)
        held = np.array([[e in plan.slots_LGC[0, g] for g in range(NODES)] for e in range(EXPERTS)])
        (same,) = np.flatnonzero((held == HELD_PEG).all((1, 2)))
        got, best = float(plan.certificate.value_L[0]), float(value_P.min())
        assert got == pytest.approx(value_P[same], rel=1e-9 if risk != "covariance" else 2e-5)
        assert (plan.scenario_share_TLGC is not None) == (split == "fractional" and risk != "covariance")
        assert plan.certificate.lower_bound_L[0] <= best * (1 + 1e-9)
        off.append((got / best - 1) / FAR[most])
    assert max(off) < 1, off


@pytest.mark.parametrize("live", [False, True])
def test_tiny_layers_of_the_nearest_replica_are_searched_whole(live: bool) -> None:
    """Experts that are busy at different times and places: the best of all placements."""
    node_TNE = np.array([[[1.3, 0.8, 2.0], [0.7, 0.2, 0.0]], [[0.3, 0.0, 1.4], [0.7, 0.0, 1.6]]])
    load_TE = node_TNE.sum(1)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TE[:, None], load_TLNE=node_TNE[:, None]),
        topology=mo.uniform(2, 2, slots=2),
        split="nearest",
        objective=mo.Objective(risk="covariance", sigma=10.0, balance_tolerance=0.0),
        current=mo.Placement(slots_LGC=np.array([[[0, 1], [1, 2], [2, -1], [2, -1]]]), experts=3)
        if live
        else None,
    )
    best = np.inf
    for held_EG in placements([2] * 4, 3):
        by_ENG = held_EG[:, None, :] & (np.arange(4) // 2 == np.arange(2)[:, None])
        count_EN = by_ENG.sum(2)
        near_ENG = by_ENG / np.maximum(count_EN, 1)[:, :, None]
        away_ENG = (held_EG / held_EG.sum(1)[:, None])[:, None, :] * (count_EN == 0)[:, :, None]
        time_TG = np.einsum("tne,eng->tg", node_TNE, near_ENG + away_ENG)
        best = min(best, float((time_TG.mean(0) + 10 * time_TG.std(0)).max()))
    plan = mo.solve(problem).plan
    assert plan is not None
    assert plan.certificate.value_L[0] == pytest.approx(best, rel=1e-6)


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
