"""Objective, limits and sizing: what is refused, and with which words."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.wishes import Limits, Objective, Priority, Risk, Sizing, SizingPolicy, Split


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (Objective, {"priorities": "balance"}, r"objective\.priorities: is 'balance', must be a list"),
        (Objective, {"priorities": 5}, r"objective\.priorities: is 5, must be a list"),
        (Objective, {"priorities": ()}, r"objective\.priorities: is \(\), must be distinct"),
        (Objective, {"priorities": ("balance", "balance")}, r"objective\.priorities: .*must be distinct"),
        (Objective, {"priorities": ("speed",)}, r"objective\.priorities: .*from \('balance'"),
        (
            Objective,
            {"balance_tolerance": 1e7},
            r"objective\.balance_tolerance: is 1e\+07, must be at most 1e\+06",
        ),
        (Objective, {"balance_tolerance": -0.1}, r"objective\.balance_tolerance: is -0.1"),
        (Objective, {"balance_tolerance": "1%"}, r"objective\.balance_tolerance: is '1%'"),
        (Objective, {"balance_tolerance": None}, r"objective\.balance_tolerance: is None"),
        (Objective, {"horizon": 0}, r"objective\.horizon: is 0, must be a finite number above 0"),
        (
            Objective,
            {"risk": "mean"},
            r"objective\.risk: is 'mean', must be one of \('expected', 'cvar', 'worst',",
        ),
        (Objective, {"failure_rate": 0}, r"objective\.failure_rate: is 0, must be at least 0.0001"),
        (Objective, {"failure_rate": 0.6}, r"objective\.failure_rate: is 0.6, .*at most 0.5"),
        (Objective, {"cvar_alpha": 1}, r"objective\.cvar_alpha: is 1.0, must be at least 0 and below 1"),
        (Objective, {"cvar_alpha": "a"}, r"objective\.cvar_alpha: is 'a'"),
        (Limits, {"min_replicas": 0}, r"limits\.min_replicas: is 0, must be a whole number of at least 1"),
        (Limits, {"min_replicas": None}, r"limits\.min_replicas: is None"),
        (Limits, {"max_replicas": 1.5}, r"limits\.max_replicas: is 1.5"),
        (Limits, {"max_replicas": float("nan")}, r"limits\.max_replicas: is nan"),
        (Limits, {"max_moves": -1}, r"limits\.max_moves: is -1, must be a whole number of at least 0"),
        (Limits, {"max_move_bytes": "1GB"}, r"limits\.max_move_bytes: is '1GB'"),
        (Limits, {"max_move_seconds": -1}, r"limits\.max_move_seconds: is -1"),
        (Limits, {"max_total_replicas": True}, r"limits\.max_total_replicas: is True"),
        (Limits, {"spread": 0}, r"limits\.spread: is 0"),
        (Limits, {"spread_experts": 0}, r"limits\.spread_experts: is 0"),
        (Limits, {"spread_experts": 1.5}, r"limits\.spread_experts: is 1\.5"),
        (Limits, {"spread_experts": "all"}, r"limits\.spread_experts: is 'all'"),
        (Limits, {"spread_experts": [3]}, r"limits\.spread_experts\[0\]: is 3, must be \(layer, expert\)"),
        (Limits, {"spread_experts": [(0, -1)]}, r"limits\.spread_experts\[0\]\.expert: is -1"),
        (
            Limits,
            {"min_replicas": 3, "max_replicas": 2},
            r"limits\.max_replicas: is 2, must be at least min_replicas = 3",
        ),
        (Limits, {"pinned": [(0, 1)]}, r"limits\.pinned\[0\]: is \(0, 1\), must be \(layer, expert, gpu\)"),
        (Limits, {"pinned": 5}, r"limits\.pinned: is 5, must be a list"),
        (Limits, {"pinned": ["abc"]}, r"limits\.pinned\[0\]: is 'abc'"),
        (Limits, {"forbidden": [(0, 0, 0), (0, -1, 0)]}, r"limits\.forbidden\[1\]\.expert: is -1"),
        (Limits, {"forbidden": [(-2, 0, 0)]}, r"limits\.forbidden\[0\]\.layer: is -2"),
        (Limits, {"forbidden": [(0, 0, 0.5)]}, r"limits\.forbidden\[0\]\.gpu: is 0.5"),
        (
            Limits,
            {"pinned": [(0, 1, 2)], "forbidden": [(0, 1, 2)]},
            r"limits\.forbidden: \(0, 1, 2\) is pinned too",
        ),
        (Sizing, {"policy": "auto"}, r"sizing\.policy: is 'auto', must be one of \('slots'"),
        (Sizing, {"cv": -1}, r"sizing\.cv: is -1"),
        (Sizing, {"ddof": 2}, r"sizing\.ddof: is 2, must be 0 \(population\) or 1 \(sample\)"),
        (Sizing, {"imbalance": 0.9}, r"sizing\.imbalance: is 0.9, must be a finite number of at least 1"),
    ],
)
def test_malformed(kind: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        kind(**kwargs)


def test_numbers_of_any_kind_are_the_same_number() -> None:
    assert Objective(horizon=10) == Objective(horizon=np.float64(10))
    assert repr(Objective(horizon=10)) == repr(Objective(horizon=np.float64(10)))
    limits = Limits(max_moves=np.int64(3), pinned=[[np.int32(-1), 0, 1]], max_replicas=4.0)
    assert limits == Limits(max_moves=3, pinned=((-1, 0, 1),), max_replicas=4)
    assert repr(limits) == repr(Limits(max_moves=3, pinned=((-1, 0, 1),), max_replicas=4))


@pytest.mark.parametrize(
    ("kwargs", "bounds"),
    [
        ({}, False),
        ({"max_replicas": 2}, False),
        ({"max_moves": 0}, True),
        ({"max_move_bytes": 0}, True),
        ({"max_move_seconds": 0}, True),
        ({"max_layer_moves": 5}, True),
    ],
)
def test_limits_on_moves(kwargs: dict[str, Any], bounds: bool) -> None:
    assert Limits(**kwargs).bounds_moves is bounds


def test_order_of_priorities_is_kept() -> None:
    assert Objective(priorities=["moves", "balance"]).priorities == ("moves", "balance")


def test_words_are_as_good_as_members_and_print_as_words() -> None:
    word = Objective(risk="worst", priorities=("moves", "balance"))
    member = Objective(risk=Risk.WORST, priorities=(Priority.MOVES, Priority.BALANCE))
    assert word == member
    assert hash(word) == hash(member)
    assert word.risk is Risk.WORST
    assert repr(word) == repr(member)
    assert "risk='worst'" in repr(word)
    assert "priorities=('moves', 'balance')" in repr(word)
    assert f"{Split.EQUAL} {SizingPolicy.CV!r}" == "equal 'cv'"
    assert json.dumps([Split.EQUAL, Sizing(policy="cv").policy]) == '["equal", "cv"]'
    assert {"cv": 1}[SizingPolicy.CV] == 1
    assert Sizing(policy="cv").policy is SizingPolicy.CV
    assert pickle.loads(pickle.dumps(member)) == word
