"""Survival as a priority, against enumeration: any order, uneven slots, domains, several failures, layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan import failure_sets, order_of
from moeless_opt.problems.plan.survival import survival_of
from moeless_opt.solvers.core.features import Feature, required_features
from tests.oracles.enumeration import TIGHT, Enumeration
from tests.strategies import random_slots

OTHERS = ("balance", "moves", "memory", "traffic")


def small_problem(seed: int, layers: int = 1) -> tuple[mo.Problem, np.random.Generator]:
    """Three to five experts on two to four GPUs of unequal slots and speed, in one to four domains."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(3, 6 - (layers > 1)))
    gpus = int(rng.integers(2, 5)) if experts < 5 else 3
    slots_G = np.zeros(gpus, dtype=np.int64)
    while slots_G.sum() < experts:
        slots_G = rng.integers(1, 4 if layers == 1 else 3, gpus)
    topology = mo.Topology(
        node_G=np.arange(gpus) // 2,
        slots_G=slots_G,
        speed_G=rng.choice([0.5, 1.0], gpus),
        domain_G=rng.integers(0, int(rng.integers(2, 5)), gpus),
    )
    load_TLE = rng.lognormal(0, 1.2, (1, layers, experts)).round(2)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TLE), topology=topology, split=str(rng.choice(["equal", "fractional"]))
    )
    if rng.random() < 0.5:
        live_LGC = random_slots(rng, problem.capacity_LG, experts)
        problem = problem.replace(current=mo.Placement(slots_LGC=live_LGC, experts=experts))
    return problem, rng


def wanting(problem: mo.Problem, order: tuple[str, ...], rng: np.random.Generator, **more: Any) -> mo.Problem:
    wish = mo.Objective(
        priorities=order,
        balance_tolerance=float(rng.choice([0, 0.05, 0.2])),
        failure_rate=float(rng.choice([0.001, 0.01, 0.2])),
    )
    return problem.replace(objective=wish, **more)


@pytest.mark.parametrize("block", range(4))
def test_any_place_in_the_order_is_right_by_enumeration(block: int) -> None:
    some = 0
    for seed in range(10 * block, 10 * block + 10):
        bare, rng = small_problem(seed)
        truth = Enumeration(bare)
        for _ in range(2):
            order = [str(name) for name in rng.permutation(OTHERS)[: int(rng.integers(0, 4))]]
            order.insert(int(rng.integers(0, len(order) + 1)), "survival")
            truth.problem = problem = wanting(bare, tuple(order), rng)
            result = mo.solve(problem)
            stages = truth.order(order_of(problem), problem.objective.balance_tolerance)
            for stage in stages:
                hair = 1e-12 if stage.name == "survival" else 1e-6
                value = result.objective[stage.name]
                assert value <= stage.allowed * (1 + 1e-6) + hair, f"{seed} {order}: {stage} but {value}"
            assert result.plan is not None
            if stages[0].name == "survival":  # the bound is the least: slots alone decide
                some += 1
                assert result.plan.certificate.loss_bound == pytest.approx(stages[0].best, rel=1e-6)
                assert result.plan.certificate.loss == pytest.approx(stages[0].best, rel=1e-6)
    assert some > 3


def losses(problem: mo.Problem, before: tuple[str, ...]) -> set[bytes]:
    """What the placements of one layer lose that the priorities before survival leave, by failure."""
    truth, sets = Enumeration(problem), failure_sets(problem)
    alive, limit = np.arange(len(truth.held_PEG)), np.inf
    for name in before:
        value = truth._value(name, alive, limit, False)
        slack = problem.objective.balance_tolerance if name == "balance" else 0.0
        allowed = value.min() * (1 + slack)
        limit = allowed if name == "balance" else limit
        alive = alive[value <= allowed * (1 + TIGHT) + TIGHT]
    left_FG = ~sets.gone_FD[:, sets.domain_G]
    return {
        np.array([(~held_EG[:, left_G].any(1)).any() for left_G in left_FG]).tobytes()
        for held_EG in truth.held_PEG[alive]
    }


@pytest.mark.parametrize("order", [("survival", "balance"), ("balance", "survival"), ("memory", "survival")])
def test_layers_lose_together_what_one_of_them_loses(order: tuple[str, ...]) -> None:
    """The least that two layers can lose between them, over all pairs of what they can lose alone."""
    apart = 0
    for seed in range(16):
        bare, rng = small_problem(seed, layers=2)
        problem = wanting(bare, order, rng)
        if "survival" not in order_of(problem):
            continue
        before = order[: order.index("survival")]
        ways = []
        for row in range(2):
            live = problem.current
            one = problem.replace(
                loads=problem.loads.select([row]),
                current=None if live is None else live.replace(slots_LGC=live.slots_LGC[row : row + 1]),
            )
            ways.append([np.frombuffer(way, dtype=np.bool_) for way in losses(one, before)])
        sets = failure_sets(problem)
        least = min(float(sets.chance_F[a | b].sum()) for a in ways[0] for b in ways[1]) + sets.beyond
        alone = max(min(float(sets.chance_F[a].sum()) for a in way) for way in ways) + sets.beyond
        apart += least > alone * (1 + 1e-9)
        assert mo.solve(problem).objective["survival"] == pytest.approx(least, rel=1e-6), seed
    assert apart or order[0] != "balance"  # within its times one layer's way out is not the other's


@pytest.mark.parametrize("domains", ["nodes", "gpus"])
def test_many_experts_are_on_few_sets_of_domains_and_balanced(domains: str) -> None:
    loads = np.random.default_rng(2).lognormal(0, 0.7, (3, 64))
    topology = mo.uniform(4, 4, slots=8)
    if domains == "gpus":
        topology = topology.replace(domain_G=np.arange(16))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=loads[None]),
        topology=topology,
        objective=mo.Objective(priorities=("survival", "balance")),
    )
    plan = mo.solve(problem).plan
    pods = mo.solve(problem.replace(objective=mo.Objective()), "lazarus").plan
    assert plan is not None
    assert pods is not None
    given = 64, topology.failure_domain_G
    found, known = (survival_of(one.slots_LGC, *given, failures=2).chance_K for one in (plan, pods))
    assert found == pytest.approx(known)  # Lazarus' pods are the best there is
    assert found[0] == 1.0
    assert plan.imbalance_L.max() <= min(1.08, pods.imbalance_L.max() * 1.01)
    loss, bound = plan.certificate.loss, plan.certificate.loss_bound
    assert loss is not None
    assert 0.7 * loss < bound <= loss


def test_balance_first_gives_up_no_more_than_it_may() -> None:
    loads = np.random.default_rng(5).lognormal(0, 1.0, (3, 32))
    bare = mo.Problem(loads=mo.Loads(load_TLE=loads[None]), topology=mo.uniform(4, 2, slots=10))
    best = mo.solve(bare).plan
    assert best is not None
    chances = []
    for tolerance in (0.01, 0.5):
        wish = mo.Objective(priorities=("balance", "survival"), balance_tolerance=tolerance)
        result = mo.solve(bare.replace(objective=wish))
        assert result.plan is not None
        assert result.plan.imbalance_L.max() <= best.imbalance_L.max() * (1 + tolerance) * (1 + 1e-6)
        chances.append(result.objective["survival"])
    assert chances[1] <= chances[0] < 0.05


def test_who_does_not_minimise_survival_refuses_it_by_name() -> None:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, 1, 4))),
        topology=mo.uniform(2, 2, slots=2),
        objective=mo.Objective(priorities=("balance", "survival", "traffic")),
    )
    assert Feature.SURVIVAL in required_features(problem)
    for name in ("locality", "construct", "lazarus", "cover"):
        with pytest.raises(mo.UnsupportedFeatureError, match="the priority of survival"):
            mo.solve(problem, name)
    one = problem.replace(topology=mo.uniform(1, 4, slots=2))  # one domain: nothing to choose
    assert order_of(one) == ("balance",)


def test_a_given_plan_is_beaten_as_a_whole() -> None:
    """Two plans that lose different failures are not mixed: together they would lose both."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=[[[4.0, 3, 2, 1], [1.0, 2, 3, 4]]]),
        topology=mo.uniform(4, 1, slots=2),
        objective=mo.Objective(priorities=("survival", "balance")),
    )
    first = mo.solve(problem)
    other = mo.solve(problem, initial=first.plan)
    assert other.objective["survival"] == pytest.approx(first.objective["survival"])
    assert other.objective["balance"] <= first.objective["balance"] * (1 + 1e-9)


def test_a_front_of_balance_against_survival(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    from moeless_opt.cli import main

    monkeypatch.chdir(tmp_path)
    loads = np.random.default_rng(5).lognormal(0, 1.0, (2, 24))
    problem = mo.Problem(loads=mo.Loads(load_TLE=loads[None]), topology=mo.uniform(4, 2, slots=7))
    front = mo.pareto(problem, ("balance", "survival"), points=3)
    values = np.array(front.values)
    assert len(values) > 1
    assert (np.diff(values[:, 1]) > 0).all()  # cheapest first: the plan that fails least
    assert (np.diff(values[:, 0]) < 0).all()
    best = mo.solve(problem.replace(objective=mo.Objective(priorities=("survival", "balance"))))
    assert values[0, 1] == pytest.approx(best.objective["survival"])
    for plan, (_, loss) in zip(front.plans, front.values, strict=True):
        mo.verify(problem, plan)
        assert plan.certificate.loss == pytest.approx(loss)
    assert "probability" in str(front)
    assert front.plot().startswith(b"\x89PNG")
    mo.save_problem(problem, "problem.json")
    assert main(["problem.json", "--pareto", "survival", "--time", "1", "--quiet", "-o", "safe.json"]) == 0
    with pytest.raises(mo.ProblemError, match="one failure domain"):
        mo.pareto(problem.replace(topology=mo.uniform(1, 8, slots=7)), ("balance", "survival"))


@pytest.mark.parametrize(
    ("slots", "domains", "experts", "order"),
    [
        ((2, 2, 3), (0, 1, 2), 5, ("memory", "survival")),
        ((2, 1, 1, 1), (2, 2, 1, 0), 4, ("balance", "survival")),
    ],
)
def test_the_bound_on_a_loss_counts_experts_and_not_sets(
    slots: tuple[int, ...], domains: tuple[int, ...], experts: int, order: tuple[str, ...]
) -> None:
    """Few experts may be on as many domains as the slots allow for all: sets are smaller than experts say."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, 1, experts))),
        topology=mo.Topology(
            node_G=np.zeros(len(slots), dtype=np.int64),
            slots_G=np.array(slots),
            speed_G=np.ones(len(slots)),
            domain_G=np.array(domains),
        ),
        objective=mo.Objective(priorities=order),
    )
    bound = solved_bound(problem)
    least = solved_bound(
        problem.replace(objective=mo.Objective(priorities=("survival", "balance"))), told=True
    )
    assert bound <= least * (1 + 1e-6)


def solved_bound(problem: mo.Problem, *, told: bool = False) -> float:
    """The bound on a loss, or the loss itself, of a plan."""
    plan = mo.solve(problem, "lexicographic").plan
    assert plan is not None
    assert plan.certificate.loss is not None
    return plan.certificate.loss if told else plan.certificate.loss_bound
