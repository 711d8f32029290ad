"""Rules, the replicas that must be, and the search of small layers, each against all placements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import BoolArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.limits import mended_within, rows_of, rules_of
from moeless_opt.solvers.limits.beam import search_layer
from moeless_opt.solvers.limits.needed import needed_EG
from moeless_opt.solvers.limits.rules import Rules
from tests.oracles.enumeration import even_times, placements, set_times


def some_rules(rng: np.random.Generator, experts: int, gpus: int) -> Rules:
    """Rules of a small layer; often there is no placement."""
    allowed_EG = rng.random((experts, gpus)) < 0.8
    least_E = np.where(rng.random(experts) < 0.3, 2, 1)
    capacity_G = rng.integers(0, 4, gpus)
    return Rules(
        number=0,
        allowed_EG=allowed_EG & (capacity_G > 0),
        pinned_EG=allowed_EG & (capacity_G > 0) & (rng.random((experts, gpus)) < 0.1),
        least_E=least_E,
        most_E=least_E + rng.integers(0, 3, experts),
        total=int(rng.integers(experts, experts * 2 + 2)),
        capacity_G=capacity_G,
        domain_G=rng.integers(0, 3, gpus),
        spread_E=rng.integers(1, 3, experts) if rng.random() < 0.5 else np.full(experts, rng.integers(1, 3)),
    )


def all_within(rules: Rules) -> BoolArray:
    """All placements that obey, shape [P, E, G]."""
    held_PEG = placements(rules.capacity_G.tolist(), len(rules.least_E))
    return held_PEG[[rules.keeps(held_EG) for held_EG in held_PEG]]


def as_stated(rules: Rules) -> Rules | None:
    """The same with the least replicas raised to what pins and domains ask for, as `rules_of` does."""
    pinned_EG = rules.pinned_EG
    needed_E = pinned_EG.sum(1) + np.maximum(rules.spread_E - rules.reach_E(pinned_EG), 0)
    rules.least_E = np.maximum(rules.least_E, needed_E)
    rules.most_E = np.minimum(rules.most_E, rules.allowed_EG.sum(1))
    return rules if (rules.least_E <= rules.most_E).all() else None


@pytest.mark.parametrize("seed", range(120))
def test_what_must_be_is_found_wherever_it_exists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    rules = as_stated(some_rules(rng, experts, gpus))
    if rules is None:
        return
    found = all_within(rules)
    there_EG = rng.random((experts, gpus)) < 0.4
    content = [np.flatnonzero(column).tolist() for column in there_EG.T]
    if not len(found):
        with pytest.raises(InfeasibleError):
            needed_EG(rules, there_EG)
        return
    assert rules.keeps(needed_EG(rules, there_EG))
    mended_EG = rows_of(mended_within(rules, rng.random(experts), content, np.ones(gpus)), experts)
    assert rules.keeps(mended_EG)
    fewest = (found & ~there_EG).sum((1, 2)).min()
    assert (mended_EG & ~there_EG).sum() == fewest


@pytest.mark.parametrize("seed", range(40))
def test_changes_are_permitted_where_they_keep_the_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules = as_stated(some_rules(rng, 4, 3))
    found = [] if rules is None else all_within(rules)
    if rules is None or not len(found):
        return
    held_EG = found[int(rng.integers(len(found)))]
    home = [np.flatnonzero(row).tolist() for row in held_EG]
    pairs = list(itertools.product(range(4), range(3)))
    drop_EG = rules.may_drop_EG(held_EG)
    for one, other in itertools.product(pairs, pairs):
        for change in ([one], [one, other]):
            if len(set(change)) < len(change):
                continue
            after_EG = held_EG.copy()
            for pair in change:
                after_EG[pair] = not after_EG[pair]
            adds = [pair for pair in change if not held_EG[pair]]
            drops = [pair for pair in change if held_EG[pair]]
            if (after_EG.sum(0) <= rules.capacity_G).all():
                assert rules.permits(home, adds, drops) == rules.keeps(after_EG)
            if len(change) == 1 and drops:
                assert drop_EG[change[0]] == rules.keeps(after_EG)
            if len(change) == 2 and one[0] == other[0] and held_EG[one] and not held_EG[other]:
                may = rules.may_move(held_EG, np.array([one[0]]), np.array([one[1]]), np.array([other[1]]))
                if (after_EG.sum(0) <= rules.capacity_G).all():
                    assert bool(may[0, 0]) == rules.keeps(after_EG)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_small_layers_are_searched_exactly(seed: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    rules = as_stated(some_rules(rng, experts, gpus))
    if rules is None:
        return
    load_E = np.round(rng.lognormal(0, 1, experts) * 100) * (rng.random(experts) < 0.8)
    speed_G = rng.choice([0.5, 1.0, 2.0], gpus)
    live_EG = rng.random((experts, gpus)) < 0.4
    front = search_layer(
        load_E[None], speed_G, rules, lambda time_TX: time_TX[0], equal=equal, live_EG=live_EG
    )
    assert front is not None
    assert front.exact
    found = all_within(rules)
    if not len(found):
        assert not front.held
        return
    time_P = (even_times if equal else set_times)(found, load_E, speed_G)
    moves_P = (found & ~live_EG).sum((1, 2))
    for held_EG, time, moves in zip(front.held, front.time, front.moves, strict=True):
        assert rules.keeps(held_EG)
        assert (held_EG & ~live_EG).sum() == moves
        assert time == pytest.approx(time_P[moves_P <= moves].min(), rel=1e-9, abs=1e-9)
    assert front.moves[0] == moves_P.min()
    assert front.time[-1] == pytest.approx(time_P.min(), rel=1e-9, abs=1e-9)


def test_rules_say_what_cannot_be() -> None:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, 1, 2))),
        topology=mo.uniform(1, 2, slots=2),
        limits=mo.Limits(min_replicas=2, forbidden=((0, 1, 0),)),
    )
    with pytest.raises(InfeasibleError, match="expert 1 of layer 0 needs 2 replicas, 1 are possible"):
        rules_of(problem)
