"""What a re-plan chooses between, and what it says of it, against all choices and slow sums."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.problems.plan.evaluate import move_seconds
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import NeverStop, Task
from moeless_opt.solvers.core.stopping import Clock
from moeless_opt.solvers.migration.schedule import schedule_migration
from moeless_opt.solvers.replan import solver as module
from moeless_opt.solvers.replan.relabel import relabel
from moeless_opt.solvers.replan.solver import Frontier, ReplanOptions, frontier
from moeless_opt.solvers.replan.task import ReplanWish, front_of, spread_budget
from tests.oracles.enumeration import even_times, set_times
from tests.strategies import random_slots

LINKS = Links(intra_node=2e4, inter_node=1e4, host=5e3, latency=1e-5)


def live_problem(rng: Any, layers: int = 2, **more: Any) -> Problem:
    """A few GPUs, alike or not, with a random live placement."""
    gpus, slots = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    experts = int(rng.integers(2, gpus * slots))
    slots = min(slots, experts)
    problem = Problem(
        **{
            "loads": Loads(load_TLE=rng.lognormal(0, 1, (1, layers, experts)) * 1000),
            "topology": Topology(
                node_G=np.arange(gpus) // 2,
                speed_G=np.ones(gpus) if rng.random() < 0.6 else rng.choice([0.5, 1.0, 2.0], gpus),
                slots_G=np.full(gpus, slots),
                links=LINKS,
            ),
            "split": str(rng.choice(["fractional", "equal"])),
            "expert_bytes_L": rng.integers(1, 4, layers),
        }
        | more
    )
    live = random_slots(rng, problem.capacity_LG, experts)
    return problem.replace(current=Placement(slots_LGC=live, experts=experts))


def top_times(problem: Problem, slots_LGC: Any) -> np.ndarray:
    """Least largest tokens over speed of each layer: over all sets of GPUs, or even."""
    gpus = problem.topology.gpus
    found = []
    for load_E, slots_GC in zip(problem.load_LE, slots_LGC, strict=True):
        held_EG = np.array([[e in slots_GC[g] for g in range(gpus)] for e in range(problem.experts)])
        times = even_times if problem.split == "equal" else set_times
        found.append(float(times(held_EG[None], load_E, problem.topology.speed_G)[0]))
    return np.array(found)


def moved(slots_LGC: Any, live_LGC: Any) -> list[int]:
    return [
        sum(e >= 0 and e not in live_GC[g] for g, row in enumerate(slots_GC) for e in row)
        for slots_GC, live_GC in zip(slots_LGC, live_LGC, strict=True)
    ]


def transfer_times(problem: Problem, slots_LGC: Any) -> list[float]:
    """Seconds of every layer's moves, one after the other, each from the nearest GPU that has the expert."""
    assert problem.current is not None
    node, seconds = problem.topology.node_G, []
    for x, live_GC in enumerate(problem.current.slots_LGC.tolist()):
        took = 0.0
        for g, row in enumerate(slots_LGC[x].tolist()):
            for e in row:
                if e < 0 or e in live_GC[g]:
                    continue
                homes = [h for h, held in enumerate(live_GC) if e in held]
                near = any(node[h] == node[g] for h in homes)
                rate = LINKS.intra_node if near else LINKS.inter_node if homes else LINKS.host
                took += LINKS.latency + problem.bytes_L[x] / rate
        seconds.append(took)
    return seconds


TIMES = (
    mo.TimeModel(token_cost=1e-6, unit="s"),
    mo.TimeModel(token_cost=3e-6, unit="s"),
    mo.TimeModel(token_cost=5e-7, unit="s"),
)


@pytest.mark.parametrize("seed", range(3))
def test_payback_is_time_saved_against_the_schedule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    paid = 0
    for _ in range(6):
        problem = live_problem(rng, time=TIMES[rng.integers(3)])
        if rng.random() < 0.3:
            problem = problem.replace(expert_bytes_L=None)
        plan = mo.solve(problem, "replan").plan
        assert plan is not None
        assert plan.payback is not None
        assert problem.current is not None
        live = problem.current.slots_LGC
        stay, go = top_times(problem, live), top_times(problem, plan.slots_LGC)
        saved = problem.time.token_cost * (stay - go).sum()
        assert plan.payback.saved_per_pass == pytest.approx(saved, rel=1e-7, abs=1e-15)
        steps = mo.migration(problem, plan).steps
        cost = sum(
            max(LINKS.latency + t.bytes / rate_of(problem, t) for t in step.transfers) for step in steps
        )
        assert plan.payback.cost == pytest.approx(cost if problem.bytes_L.any() else 0.0)
        if saved > 0 and plan.payback.cost > 0:
            assert plan.payback.passes == pytest.approx(cost / saved)
            paid += 1
        np.testing.assert_allclose(plan.certificate.value_L, problem.time.token_cost * go, rtol=1e-7)
    assert paid


def rate_of(problem: Problem, transfer: Any) -> float:
    node = problem.topology.node_G
    if transfer.source < 0:
        return LINKS.host
    return LINKS.intra_node if node[transfer.source] == node[transfer.target] else LINKS.inter_node


@pytest.mark.parametrize("seed", range(4))
def test_with_a_horizon_no_offer_would_lose_less(seed: int) -> None:
    """Every layer takes the offer of its frontier whose time over the horizon and transfers are least."""
    rng = np.random.default_rng(seed)
    went = stayed = 0
    for _ in range(5):
        horizon = float(10 ** rng.uniform(-1.5, 1.5))
        problem = live_problem(rng, time=TIMES[rng.integers(3)], objective=mo.Objective(horizon=horizon))
        assert problem.current is not None
        plan = mo.solve(problem, "replan").plan
        assert plan is not None
        points = frontier(problem)
        assert isinstance(points, Frontier)
        np.testing.assert_array_equal(points.slots_KLGC[-1], problem.current.slots_LGC)  # to stay

        def loss(slots_LGC: Any, problem: Problem = problem, horizon: float = horizon) -> np.ndarray:
            return horizon * problem.time.token_cost * top_times(problem, slots_LGC) + transfer_times(
                problem, slots_LGC
            )

        for k, slots_LGC in enumerate(points.slots_KLGC):
            assert points.moves_KL[k].tolist() == moved(slots_LGC, problem.current.slots_LGC)
            np.testing.assert_allclose(points.time_KL[k], top_times(problem, slots_LGC), rtol=1e-7)
        least = np.min([loss(slots_LGC) for slots_LGC in points.slots_KLGC], axis=0)
        np.testing.assert_allclose(loss(plan.slots_LGC), least, rtol=1e-7)
        for count in moved(plan.slots_LGC, problem.current.slots_LGC):
            went, stayed = went + (count > 0), stayed + (count == 0)
        bytes_L = problem.bytes_L
        got = move_seconds(
            problem.topology, plan.slots_LGC, problem.current.slots_LGC, problem.experts, bytes_L
        )
        np.testing.assert_allclose(got, transfer_times(problem, plan.slots_LGC), rtol=1e-12, atol=1e-15)
    assert went
    assert stayed


def test_offers_within_a_budget_are_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        K, L = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        slots = np.arange(K * L, dtype=np.int32).reshape(K, L, 1, 1)
        loss, moves = rng.integers(0, 30, (K, L)).astype(float), rng.integers(0, 6, (K, L))
        offers = module._Offers(slots, loss, moves)
        assert [loss[k, x] for x, k in enumerate(offers.best().ravel() // L)] == loss.min(0).tolist()
        price = rng.integers(1, 4, L)
        budget = None if rng.random() < 0.3 else int(rng.integers(0, 14))
        most = None if rng.random() < 0.5 else int(rng.integers(0, 6))
        good = [
            choice
            for choice in itertools.product(range(K), repeat=L)
            if (budget is None or sum(moves[k, x] * price[x] for x, k in enumerate(choice)) <= budget)
            and (most is None or all(moves[k, x] <= most for x, k in enumerate(choice)))
        ]
        if not good:
            with pytest.raises(mo.InfeasibleError, match=r"^limits"):
                offers.within(budget, price, most)
            continue
        taken = offers.within(budget, price, most).ravel() // L
        assert tuple(taken) in good
        least = min(sum(loss[k, x] for x, k in enumerate(choice)) for choice in good)
        assert sum(loss[k, x] for x, k in enumerate(taken)) == least


def test_points_that_no_other_beats() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        points = [
            (int(m), float(t), k) for k, (m, t) in enumerate(rng.integers(0, 6, (rng.integers(1, 9), 2)))
        ]
        front = front_of(points)
        want = {
            (m, t)
            for m, t, _ in points
            if not any(n <= m and s <= t and (n, s) != (m, t) for n, s, _ in points)
        }
        assert [point[:2] for point in front] == sorted(want)
        assert all(point in points for point in front)
    for _ in range(60):
        L = int(rng.integers(1, 4))
        fronts = [
            front_of([(int(m), float(t), [[x, k]]) for k, (m, t) in enumerate(rng.integers(0, 9, (4, 2)))])
            for x in range(L)
        ]
        weight, price = rng.integers(1, 4, L).tolist(), rng.integers(1, 3, L).tolist()
        floor = sum(front[0][0] * p for front, p in zip(fronts, price, strict=True))
        budget = floor + int(rng.integers(0, 12))
        found = spread_budget(fronts, weight, price, budget)
        taken = [
            next(point for point in front if point[2] == got)
            for front, got in zip(fronts, found, strict=True)
        ]
        value = {
            choice: sum(point[1] * w for point, w in zip(choice, weight, strict=True))
            for choice in (tuple((m, t) for m, t, _ in one) for one in itertools.product(*fronts))
            if sum(m * p for (m, _), p in zip(choice, price, strict=True)) <= budget
        }
        assert value[tuple((m, t) for m, t, _ in taken)] == min(value.values())


@pytest.mark.parametrize("seed", range(4))
def test_a_fresh_layer_replaces_the_live_one_only_where_it_is_better(seed: int) -> None:
    """The rule, layer by layer: reach what is wanted with fewer moves, or at all, or come much nearer."""
    rng = np.random.default_rng(seed)
    replaced = 0
    for _ in range(8):
        tolerance = float(rng.choice([0.0, 0.05, 0.3]))
        problem = live_problem(rng, layers=4, objective=mo.Objective(balance_tolerance=tolerance))
        assert problem.current is not None
        live = problem.current.slots_LGC
        task = Task(
            problem=problem,
            options=ReplanOptions(),
            stop=NeverStop(),
            seed=0,
            initial=None,
            began=Clock.begin(),
            progress=None,
        )
        offered = live.copy()
        for x in np.flatnonzero(rng.random(4) < 0.5):  # another placement, that moves much
            offered[x] = random_slots(rng, problem.capacity_LG[[x]], problem.experts)[0]
        cut = rng.random(4) < 0.3
        # Of the re-plan's own slots the times are known; what came of them since is timed anew.
        own = offered.copy() if rng.random() < 0.5 else offered
        first = replace(
            module.replan_within(problem, ReplanWish(tolerance=tolerance)),
            slots_LGC=own,
            time_L=top_times(problem, offered) if own is offered else np.zeros(4),
            cut_L=cut,
        )
        got = module._best_of_scratch(task, offered, live, first)
        fresh = Construct().placed(task, problem.replace(current=None)).slots_LGC
        fresh = relabel(
            live,
            fresh,
            experts=problem.experts,
            speed_G=problem.topology.speed_G,
            capacity_LG=problem.capacity_LG,
            node_G=problem.topology.node_G,
        )
        speed = problem.topology.speed_G
        bound = best_bound(problem.load_LE, problem.capacity_LG, speed, problem.split)[0]
        wanted = bound * (1 + tolerance) * (1 + 1e-9)
        time, new = top_times(problem, offered), top_times(problem, fresh)
        moves, new_moves = moved(offered, live), moved(fresh, live)
        for x in range(4):
            filled = int((offered[x] >= 0).sum())
            doubt = (time[x] > wanted[x] and not cut[x]) or moves[x] > module.SCRATCH_FROM * filled
            if time[x] <= wanted[x]:
                better = new[x] <= wanted[x] and new_moves[x] < moves[x]
            else:
                better = new[x] <= wanted[x] or new[x] < time[x] * (1 - tolerance)
            np.testing.assert_array_equal(got[x], fresh[x] if doubt and better else offered[x])
            replaced += doubt and better
    assert replaced


def test_seconds_of_moves_are_kept_to_and_used() -> None:
    rng = np.random.default_rng(3)
    used = 0
    for _ in range(8):
        problem = live_problem(rng, layers=3)
        free = mo.solve(problem, "replan").plan
        assert free is not None
        assert problem.current is not None
        live = problem.current.slots_LGC
        needs = mo.migration(problem, free).seconds
        if not free.moves.count:
            continue
        for part in (1.0, 0.5):
            limits = mo.Limits(max_move_seconds=needs * part)
            plan = mo.solve(problem.replace(limits=limits), "replan").plan
            assert plan is not None
            took = schedule_migration(
                live, plan.slots_LGC, problem.experts, problem.topology, bytes_L=problem.bytes_L
            ).seconds
            assert took <= needs * part
            stay = top_times(problem, live).sum()
            assert top_times(problem, plan.slots_LGC).sum() <= stay * (1 + 1e-9)
            used += part < 1 and plan.moves.count > 0
    assert used


def test_bytes_are_a_budget_of_layers_of_unlike_size() -> None:
    rng = np.random.default_rng(4)
    for _ in range(4):
        problem = live_problem(rng, layers=3, expert_bytes_L=[1, 5, 3])
        free = mo.solve(problem, "replan").plan
        assert free is not None
        for limits in (
            mo.Limits(max_move_bytes=free.moves.bytes // 2),
            mo.Limits(max_move_bytes=free.moves.bytes // 2, max_moves=2),
            mo.Limits(max_layer_moves=1),
        ):
            plan = mo.solve(problem.replace(limits=limits), "replan").plan
            assert plan is not None
            mo.verify(problem.replace(limits=limits), plan)
    alike = live_problem(rng, layers=2, expert_bytes_L=[4, 4])
    assert module._budget(alike.replace(limits=mo.Limits(max_move_bytes=11))) == (2, None)
    assert module._budget(alike.replace(limits=mo.Limits(max_move_bytes=11, max_moves=1))) == (1, None)
    assert module._budget(alike.replace(limits=mo.Limits(max_move_bytes=11, max_moves=3))) == (2, None)
    assert module._budget(alike.replace(limits=mo.Limits(max_moves=3))) == (3, None)
    unlike = alike.replace(expert_bytes_L=[4, 5])
    budget, cost = module._budget(unlike.replace(limits=mo.Limits(max_move_bytes=11, max_moves=3)))
    assert budget == 11
    assert cost is not None
    assert cost.tolist() == [4, 5]
