"""The shipped instances: all load, say where they come from, and their known values hold."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.library import (
    instance_names,
    instance_path,
    instance_summary,
    load_instance,
)
from moeless_opt.problems.io.documents import load_problem
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.problems.spec.architecture import MODEL_PRESETS

NAMES = instance_names()


def test_there_are_the_families_that_are_promised() -> None:
    for family in ("flashlb", "deepseek-readme", "mixtral", "phi", "scout", "deepseek-v3"):
        assert any(name.startswith(family) for name in NAMES), family
    assert {"flashlb-equal", "flashlb-fractional", "mixtral-drift"} <= set(NAMES)
    assert list(NAMES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_instances(name: str) -> None:
    problem = load_instance(name)
    problem.check_feasible()
    assert problem.name == name
    assert problem == load_problem(instance_path(name))
    assert problem.digest() == load_instance(name).digest()
    known = problem.known
    assert known is not None
    assert len(known.source) > 10
    assert len(known.best_L) in (0, problem.layers)
    assert len(known.bound_L) == len(known.best_L)
    for best, bound in zip(known.best_L, known.bound_L, strict=True):
        assert bound <= best * (1 + 1e-9)
    shape, value, source = instance_summary(name)
    assert f"{problem.layers} x {problem.experts} experts" in shape
    assert (value == "-") == (not known.best_L)
    assert source == known.source
    if problem.model is not None:
        assert problem.model in MODEL_PRESETS.values()


SOLVED = [
    name
    for name in NAMES
    if (problem := load_instance(name)).known is not None
    and problem.known.best_L
    and problem.loads.shape[0] == 1
]


@pytest.mark.parametrize("name", SOLVED)
def test_known_values_are_not_below_what_is_provable(name: str) -> None:
    problem = load_instance(name)
    assert problem.known is not None
    bound_L, _ = best_bound(
        problem.load_LE,
        problem.capacity_LG,
        problem.topology.speed_G,
        "equal" if problem.split == "equal" else "fractional",
    )
    assert (bound_L <= np.array(problem.known.best_L) * (1 + 1e-9)).all()


def test_published_examples() -> None:
    equal, fractional = load_instance("flashlb-equal"), load_instance("flashlb-fractional")
    assert sorted(equal.load_LE[0].tolist(), reverse=True) == [600, 560, 120, 120, 20, 10, 10, 10]
    assert (equal.load_LE == fractional.load_LE).all()
    assert equal.known is not None
    assert fractional.known is not None
    assert equal.known.best_L == equal.known.bound_L == pytest.approx((196.0 + 2 / 3,))
    assert fractional.known.best_L == fractional.known.bound_L == pytest.approx((181.25,))
    readme = load_instance("deepseek-readme-equal")
    assert readme.load_LE[0].tolist() == [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    assert readme.load_LE[1].tolist() == [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]
    assert (readme.topology.gpus, readme.topology.nodes, int(readme.capacity_LG[0].sum())) == (8, 2, 16)


def test_generated_instances_are_recipes_not_tables() -> None:
    for name in NAMES:
        document = json.loads(instance_path(name).read_text())
        if "generated" in document["known"]["source"]:
            assert document["loads"]["kind"] == "generated"
            assert "seed" in document["loads"]["recipe"]


def test_unknown_names() -> None:
    with pytest.raises(
        ProblemError, match="instance: 'flashlb-equl' is unknown; did you mean 'flashlb-equal'"
    ):
        load_instance("flashlb-equl")
    with pytest.raises(ProblemError, match="instance: 'zzz' is unknown; there are deepseek-readme-equal"):
        instance_path("zzz")
