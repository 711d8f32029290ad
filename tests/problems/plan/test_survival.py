"""The probability that no expert is lost, against every set of domains."""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from pathlib import Path

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import failures, loss_chance, survival_of
from moeless_opt.problems.plan import survival as module
from tests.strategies import random_slots


def by_definition(slots: np.ndarray, experts: int, domain: np.ndarray, k: int) -> float:
    used = sorted({int(domain[g]) for _, g, _ in np.argwhere(slots >= 0)})
    kept = 0
    for gone in combinations(used, k):
        left = np.delete(slots, [g for g, d in enumerate(domain) if d in gone], axis=1)
        kept += all(set(row[row >= 0].tolist()) == set(range(experts)) for row in left)
    return kept / comb(len(used), k)


def test_every_set_of_domains_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    some = 0
    for _ in range(60):
        gpus, slots, layers = (int(n) for n in rng.integers((2, 1, 1), (7, 5, 3)))
        experts = int(rng.integers(1, max(gpus * slots // 2, 2)))
        placed = random_slots(rng, np.full((layers, gpus), min(slots, experts)), experts)
        domain = rng.integers(0, 4, gpus) * 3
        found = survival_of(placed, experts, domain, failures=3)
        want = [by_definition(placed, experts, domain, k + 1) for k in range(len(found.chance_K))]
        assert found.chance_K == pytest.approx(want)
        assert all(found.exact_K)
        some += any(0 < x < 1 for x in want)
        p = 0.2
        terms = [1.0, *want]
        total = sum(
            comb(found.domains, k) * p**k * (1 - p) ** (found.domains - k) * x for k, x in enumerate(terms)
        )
        assert found.given(p) == pytest.approx(total)
    assert some > 5


def test_of_many_sets_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (1, 24))
    plan = mo.plan(loads, mo.uniform(1, 8, slots=6), limits=mo.Limits(min_replicas=2))
    every = mo.survival(plan, topology=mo.uniform(1, 8, slots=6).replace(domain_G=np.arange(8)))
    monkeypatch.setattr(module, "MOST_SETS", 20)
    drawn = survival_of(plan.slots_LGC, 24, np.arange(8), failures=3)
    assert drawn.exact_K == (True, False, False)
    assert drawn.chance_K == pytest.approx(every.chance_K, abs=0.35)
    assert every.chance_K[0] == 1.0
    assert every.alone == 0
    assert "about" in str(drawn)
    assert "2: " in str(every)


def test_pods_survive_more_often_than_replicas_anywhere() -> None:
    loads = np.random.default_rng(2).lognormal(0, 0.7, (3, 64))
    topology = mo.uniform(4, 4, slots=8).replace(domain_G=np.arange(16))
    pods = mo.plan(loads, topology, solver="lazarus", limits=mo.Limits(spread=2))
    free = mo.plan(loads, topology, limits=mo.Limits(spread=2))
    kept = [mo.survival(plan, failures=2).chance_K[1] for plan in (pods, free)]
    assert kept[0] == pytest.approx(1 - 8 / comb(16, 2))  # of 8 pods, both GPUs
    assert kept[1] < kept[0] - 0.2
    assert pods.imbalance_L.max() < 1.05
    by_node = mo.plan(loads, mo.uniform(4, 4, slots=8), solver="lazarus", limits=mo.Limits(spread=2))
    assert mo.survival(by_node, failures=2).chance_K == (1.0, pytest.approx(4 / 6))  # nodes are paired up
    with pytest.raises(mo.InfeasibleError, match="do not reach 3 failure domains"):
        mo.plan(loads, mo.uniform(4, 4, slots=12), solver="lazarus", limits=mo.Limits(spread=3))


def test_bad_input() -> None:
    plan = mo.plan([[3, 2, 1]], mo.uniform(1, 3, slots=1))
    with pytest.raises(ProblemError, match="topology: is missing"):
        mo.survival(plan.replace(made_for="x"))
    with pytest.raises(ProblemError, match="has 2 GPUs"):
        mo.survival(plan, topology=mo.uniform(1, 2, slots=2))
    with pytest.raises(ProblemError, match="probability"):
        mo.survival(plan).given(1.5)
    with pytest.raises(ProblemError, match="failures"):
        mo.survival(plan, failures=0)


@pytest.mark.parametrize("seed", range(40))
def test_pods_of_unequal_gpus(seed: int) -> None:
    """Slots and speeds of any kind, dead GPUs, one expert: valid, and seldom more sets than pods."""
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(1, 9))
    slots_G = rng.integers(0, 5, gpus)
    slots_G[rng.integers(gpus)] = 4
    experts = int(rng.integers(1, int(slots_G.sum()) + 1))
    topology = mo.Topology(
        node_G=np.arange(gpus) // 2, speed_G=rng.choice([0.5, 1.0, 2.0], gpus), slots_G=slots_G
    )
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=rng.integers(0, 50, (1, 2, experts)).astype(float)),
        topology=topology,
        split=str(rng.choice(["equal", "fractional"])),
    )
    plan = mo.solve(problem, "lazarus").plan
    assert plan is not None
    assert mo.violations(problem, plan) == []
    held_LEG = np.array([[(row == e).any(1) for e in range(experts)] for row in plan.slots_LGC])
    sets = max(len({tuple(one) for one in held_EG.tolist()}) for held_EG in held_LEG)
    assert sets <= (slots_G > 0).sum()


def chance_of_a_loss(problem: mo.Problem, slots: np.ndarray) -> float:
    """Over all states of all domains that have room."""
    domain, rate = problem.topology.failure_domain_G, problem.objective.failure_rate
    used = sorted({int(domain[g]) for g in np.flatnonzero(problem.capacity_LG.any(0))})
    total = 0.0
    for states in product((False, True), repeat=len(used)):
        gone = [d for d, fails in zip(used, states, strict=True) if fails]
        left = np.delete(slots, [g for g, d in enumerate(domain) if d in gone], axis=1)
        lost = any(set(row[row >= 0].tolist()) != set(range(problem.experts)) for row in left)
        total += lost * float(np.prod([rate if fails else 1 - rate for fails in states]))
    return total


def test_the_chance_of_a_loss_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    cases = []
    for _ in range(30):
        gpus, layers = int(rng.integers(1, 7)), int(rng.integers(1, 3))
        slots_G = rng.integers(0, 4, gpus)
        slots_G[0] = 3
        experts = int(rng.integers(1, int(slots_G.sum()) + 1))
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=np.ones((1, layers, experts))),
            topology=mo.uniform(1, gpus, slots=1).replace(
                slots_G=slots_G, domain_G=rng.integers(0, 5, gpus) * 3
            ),
            objective=mo.Objective(priorities=("survival",), failure_rate=float(rng.choice([0.01, 0.3]))),
        )
        placed = random_slots(rng, problem.capacity_LG, experts)
        want = chance_of_a_loss(problem, placed)
        assert loss_chance(problem, placed) == pytest.approx(want, rel=1e-9)
        cases.append((problem, placed, want))
    monkeypatch.setattr(failures, "MOST_FAILURES", 6)  # single domains and pairs; more count as a loss
    failures._sets.cache_clear()
    few = [loss_chance(problem, placed) for problem, placed, _ in cases]
    failures._sets.cache_clear()
    assert all(chance >= want * (1 - 1e-9) for chance, (*_, want) in zip(few, cases, strict=True))
    assert few != pytest.approx([want for *_, want in cases])


def test_the_verifier_counts_losses_by_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    for seed in range(12):
        gpus = int(rng.integers(2, 7))
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=rng.lognormal(0, 1, (1, 2, 5))),
            topology=mo.uniform(1, gpus, slots=1).replace(
                slots_G=rng.integers(3, 6, gpus), domain_G=rng.integers(0, 4, gpus)
            ),
            objective=mo.Objective(priorities=("survival", "memory")),
        )
        plan = mo.solve(problem, "lexicographic").plan
        assert plan is not None
        told = plan.certificate
        if told.loss is None:  # one domain
            continue
        mo.verify(problem, plan)
        assert f"loss {told.loss:.3g} (least {told.loss_bound:.3g})" in repr(plan)
        assert told.loss == pytest.approx(chance_of_a_loss(problem, plan.slots_LGC), rel=1e-9)
        for wrong in (
            told.replace(loss=told.loss * 1.01),
            told.replace(loss_bound=told.loss * 1.01),
            told.replace(loss=None, loss_bound=0.001),
        ):
            assert mo.violations(problem, plan.replace(certificate=wrong)), seed
        mo.save_plan(plan, tmp_path / "plan.json")
        again = mo.load_plan(tmp_path / "plan.json").certificate
        assert (again.loss, again.loss_bound) == (told.loss, told.loss_bound)
