"""Explanations are true: ways help as they say, sets prove the bound, contradictions are smallest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.conflicts import contradiction, keepable
from moeless_opt.explaining import bound_of, explain
from moeless_opt.problems.plan import PROVEN
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.solvers.core import get_solver, required_features
from tests.oracles.enumeration import wanted_domains
from tests.strategies import plan_of

# --- plans -------------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[mo.Problem, mo.Plan]:
    """A small problem of any kind, and a plan of it."""
    rng = np.random.default_rng(seed)
    layers, experts, gpus = (int(n) for n in rng.integers(1, [4, 13, 7]))
    slots = -(-experts // gpus) + int(rng.integers(0, 3))
    uneven: Any = [slots + int(n) for n in rng.integers(0, 2, gpus)] if seed % 3 == 0 else slots
    speed: Any = rng.choice([1.0, 2.0], gpus).tolist() if seed % 4 == 0 else 1.0
    shape = (2, layers, experts) if seed % 7 == 0 else (layers, experts)
    load = rng.lognormal(0, 1.5, shape).round(2) + (0.01 if seed % 5 else 0.0)
    limits = mo.Limits(max_replicas=2) if seed % 6 == 5 else mo.Limits()
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load, layers=tuple(range(3, 3 + layers))),
        topology=mo.uniform(1, gpus, slots=uneven, speed=speed),
        split="equal" if seed % 2 else "fractional",
        limits=limits,
        expert_bytes_L=10 if seed % 8 == 3 else None,
    )
    if seed % 3 == 1:  # something is live, and few moves are allowed
        live = mo.Placement(slots_LGC=contiguous(experts, problem.capacity_LG), experts=experts)
        problem = problem.replace(current=live, limits=limits.replace(max_moves=int(rng.integers(0, 3))))
    solver = (
        "auto" if seed % 4 == 2 or required_features(problem) - get_solver("static").features else "static"
    )
    plan = mo.solve(problem, solver).plan
    assert plan is not None
    return problem, plan


@pytest.mark.parametrize("seed", range(36))
def test_what_is_said_is_true(seed: int) -> None:
    problem, plan = drawn(seed)
    told = explain(plan)
    assert isinstance(told, mo.Explanation)
    row = plan.layers.index(told.layer)
    assert told.time == plan.certificate.value_L[row]
    # The set proves what the certificate says.
    assert told.proof.bound == plan.certificate.lower_bound_L[row]
    assert told.proof.name == plan.certificate.bound_L[row]
    proven = bound_of(problem, row, list(told.proof.experts))
    assert proven == pytest.approx(told.proof.bound, rel=2 * PROVEN)
    if told.proof.name != "mean" and len(told.proof.experts) > 1:
        assert bound_of(problem, row, list(told.proof.experts[:-1])) < told.proof.bound * (1 - PROVEN)
    # Experts with no replica outside the tight GPUs are their load, whatever the shares.
    held = plan.share_LGE[row] >= 0
    held &= (plan.slots_LGC[row][:, :, None] == np.arange(plan.experts)).any(1)
    # Of several scenarios it is said of one of them, by its own loads.
    load_TE = problem.loads.load_TLE[:, row]
    assert (told.tight.scenario == "") == (len(load_TE) == 1)
    scenario = int(told.tight.scenario or 0)
    time = told.time
    if told.tight.scenario:
        each = plan.scenario_share_TLGC
        share_GC = plan.share_LGC[row] if each is None else each[scenario, row]
        tokens_GC = np.where(plan.slots_LGC[row] >= 0, load_TE[scenario][plan.slots_LGC[row]] * share_GC, 0.0)
        time_G = tokens_GC.sum(1) / problem.topology.speed_G
        time = time_G.max()
        assert problem.split == "equal" or set(np.flatnonzero(time_G > time * (1 - 1e-9))) <= {
            *told.tight.gpus
        }
        assert f"tight: in scenario {scenario} GPU" in str(told)
    outside = np.setdiff1d(np.arange(problem.topology.gpus), told.tight.gpus)
    if problem.split == "fractional":
        assert not held[np.ix_(outside, list(told.tight.experts))].any()
        if told.tight.closed:
            speed = problem.topology.speed_G[list(told.tight.gpus)].sum()
            assert told.tight.load / speed == pytest.approx(time, rel=2 * PROVEN)
    else:
        tokens = plan.share_LGE[row] @ load_TE[scenario]
        assert told.tight.load == pytest.approx(tokens[list(told.tight.gpus)].sum())
    # Each way is a valid plan that ends as soon as it says; nothing else changes.
    for way in told.ways:
        mo.verify(way.problem, way.plan)
        assert way.before == told.time
        assert way.after == way.plan.certificate.value_L[row] < told.time
        others = np.arange(len(plan.layers)) != row
        np.testing.assert_allclose(way.plan.certificate.value_L[others], plan.certificate.value_L[others])
        if way.kind in ("shares", "move", "search"):
            assert way.problem is problem
        if way.kind == "shares":
            assert way.moves == 0
        if way.kind == "limit":
            assert way.problem.replace(limits=problem.limits) == problem
            assert mo.violations(problem, way.plan)
        if way.kind in ("slot", "gpu"):
            assert way.problem.limits == problem.limits
            assert way.problem.capacity_LG.sum() > problem.capacity_LG.sum()
    if told.optimal:
        assert not [way for way in told.ways if way.kind in ("shares", "move", "search")]
    # Both forms say the same.
    data = json.loads(json.dumps(told.to_dict()))
    assert data["tight"]["gpus"] == list(told.tight.gpus)
    assert [way["after"] for way in data["ways"]] == [way.after for way in told.ways]
    for way in told.ways:
        assert way.text.split(":")[0].split(",")[0] in " ".join(str(told).split())
    assert max(map(len, str(told).splitlines())) <= 80
    assert "<table>" in told._repr_html_()


def test_every_kind_of_way_comes_up() -> None:
    kinds = {way.kind for seed in (0, 3, 4, 5, 21) for way in explain(drawn(seed)[1]).ways}  # type: ignore[union-attr]
    assert kinds >= {"move", "search", "limit", "slot", "gpu"}


def test_shares_that_could_be_better() -> None:
    problem = mo.Problem(loads=mo.Loads(load_TLE=[[6.0, 2.0]]), topology=mo.uniform(1, 2, slots=2))
    plan = plan_of(problem, np.array([[[0, 1], [0, 1]]], dtype=np.int32))
    lopsided = plan.replace(share_LGC=np.array([[[1.0, 1.0], [0.0, 0.0]]]))
    from moeless_opt.solvers.core import Clock
    from moeless_opt.solvers.core.finish import Built, finish

    built = Built(slots_LGC=lopsided.slots_LGC, share_LGC=lopsided.share_LGC)
    told = explain(finish(problem, built, solver="drawn", began=Clock.begin()))
    assert isinstance(told, mo.Explanation)
    assert not told.tight.closed
    assert (told.ways[0].kind, told.ways[0].after) == ("shares", 4.0)


def test_layers_and_plans_that_are_not_there() -> None:
    problem, plan = drawn(2)
    with pytest.raises(mo.ProblemError, match="layer: is 99, the plan is for the layers"):
        explain(plan, layer=99)
    with pytest.raises(mo.ProblemError, match="problem: is missing: the plan does not hold"):
        explain(plan.replace(made_for="0" * 16))
    with pytest.raises(mo.ProblemError, match="is no plan of this problem"):
        explain(plan, problem.replace(loads=mo.Loads(load_TLE=problem.load_LE * 2, layers=plan.layers)))
    with pytest.raises(mo.ProblemError, match="contradicts itself nowhere"):
        explain(problem)
    with pytest.raises(mo.ProblemError, match="what: is int"):
        explain(3)  # type: ignore[arg-type]


def test_an_idle_layer() -> None:
    loads = mo.Loads(load_TLE=[[[0.0, 0.0], [1.0, 2.0]]])
    plan = mo.solve(mo.Problem(loads=loads, topology=mo.uniform(1, 2, slots=1))).plan
    assert plan is not None
    told = explain(plan, layer=0)
    assert isinstance(told, mo.Explanation)
    assert told.ways == ()
    assert "nothing to do" in str(told)


# --- problems ----------------------------------------------------------------------------------------------


def placements(experts: int, gpus: int) -> Any:
    """All placements of a layer, as sets of pairs: arrays of bool, shape [E, G]."""
    for bits in itertools.product((False, True), repeat=experts * gpus):
        yield np.array(bits).reshape(experts, gpus)


def has_plan(problem: mo.Problem) -> bool:
    """Whether the one layer has a placement, by trying them all."""
    limits, domains = problem.limits, problem.topology.failure_domain_G
    pinned, forbidden = problem.pairs_LEG("pinned")[0], problem.pairs_LEG("forbidden")[0]
    room, size = problem.capacity_LG[0], int(problem.bytes_L[0])
    live = np.zeros(pinned.shape, dtype=bool)
    if problem.current is not None:
        live = problem.current.held_LGE[0].T
    for held in placements(*pinned.shape):
        count, moved = held.sum(1), int((held & ~live).sum())
        total = int(count.sum())
        reached_E = [len(set(domains[row])) for row in held]
        tops = [
            (limits.max_replicas, int(count.max())),
            (limits.max_layer_replicas, total),
            (limits.max_total_replicas, total),
            (limits.max_total_bytes, total * size),
        ]
        if problem.current is not None:
            tops += [(limits.max_moves, moved), (limits.max_move_bytes, moved * size)]
            tops += [(limits.max_layer_moves, moved)]
        if (
            count.min() >= limits.min_replicas
            and (held.sum(0) <= room).all()
            and (reached_E >= wanted_domains(problem)[0]).all()
            and not (pinned & ~held).any()
            and not (forbidden & held).any()
            and all(top is None or value <= top for top, value in tops)
        ):
            return True
    return False


def strict(seed: int) -> mo.Problem:
    """A tiny problem with many limits, often too many."""
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    low = int(rng.integers(1, 3))

    def some(high: int) -> int | None:
        return int(rng.integers(1, high + 1)) if rng.random() < 0.35 else None

    def pairs() -> tuple[tuple[int, int, int], ...]:
        drawn = {(-1, int(rng.integers(experts)), int(rng.integers(gpus))) for _ in range(rng.integers(0, 3))}
        return tuple(sorted(drawn))

    pinned = pairs()
    most = some(3)
    live = rng.random() < 0.5
    limits = mo.Limits(
        min_replicas=low,
        max_replicas=None if most is None else max(most, low),
        max_layer_replicas=some(7),
        max_total_replicas=some(7),
        max_total_bytes=some(70),
        spread=int(rng.integers(1, 3)),
        spread_experts=(None, 1, ((-1, 0),))[seed % 3],
        pinned=pinned,
        forbidden=tuple(pair for pair in pairs() if pair not in pinned),
        max_moves=some(3) if live else None,
        max_layer_moves=some(3) if live else None,
    )
    slots = rng.integers(0, 4, gpus)
    slots[0] = max(slots[0], 1)
    topology = mo.uniform(1, gpus, slots=slots.tolist()).replace(domain_G=rng.integers(0, 2, gpus))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, experts))), topology=topology, expert_bytes_L=10, limits=limits
    )
    if not live:
        return problem
    rows = [[e for e in range(experts) if rng.random() < 0.4][: int(room)] for room in slots]
    held = np.array([row + [-1] * (4 - len(row)) for row in rows], dtype=np.int32)
    return problem.replace(current=mo.Placement(slots_LGC=held[None], experts=experts, partial=True))


@pytest.mark.parametrize("part", range(4))
def test_a_contradiction_is_a_smallest_one(part: int) -> None:
    found = 0
    for seed in range(part * 25, part * 25 + 25):
        problem = strict(seed)
        told = contradiction(problem)
        assert (told is None) == has_plan(problem), seed
        if told is None:
            continue
        found += 1
        assert told.proven
        assert told.rules
        from moeless_opt.conflicts import rules

        kept = {rule.name for rule in told.rules}
        alone = problem
        for rule in rules(problem):
            if rule.name not in kept:
                alone = rule.drop(alone)
        assert not has_plan(alone), seed
        for rule in told.rules:
            assert has_plan(rule.drop(alone)), (seed, rule.name)
        assert [rule["name"] for rule in told.to_dict()["rules"]] == [rule.name for rule in told.rules]
        assert all(rule.text.split()[0] in str(told) for rule in told.rules)
    assert found >= 8


def test_several_layers_share_their_totals() -> None:
    base = mo.Problem(loads=mo.Loads(load_TLE=np.ones((3, 4))), topology=mo.uniform(2, 2, slots=2))
    limits = mo.Limits(max_total_replicas=23, min_replicas=2)
    told = explain(base.replace(limits=limits))
    assert isinstance(told, mo.Contradiction)
    assert [rule.name for rule in told.rules] == ["limits.min_replicas", "limits.max_total_replicas"]
    assert keepable(base.replace(limits=limits.replace(max_total_replicas=24)))


def test_lost_gpus_are_named() -> None:
    topology = mo.uniform(1, 3, slots=[2, 0, 2])
    told = explain(mo.Problem(loads=mo.Loads(load_TLE=np.ones((1, 6))), topology=topology))
    assert isinstance(told, mo.Contradiction)
    assert [rule.name for rule in told.rules] == ["topology: lost GPUs", "topology.slots"]
    assert "lost GPUs 1" in str(told)


def test_memory_that_layers_share() -> None:
    base = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((3, 2))),
        topology=mo.uniform(1, 2, memory=35),
        expert_bytes_L=np.array([10, 20, 10]),
        sizing=mo.Sizing(policy="memory"),
    )
    assert contradiction(base) is not None  # 80 bytes in 70
    wide = base.replace(topology=mo.uniform(1, 2, memory=45))
    assert contradiction(wide) is None
    tight = mo.uniform(1, 2, memory=[25, 60])
    assert contradiction(base.replace(topology=tight)) is None
    assert contradiction(base.replace(topology=mo.uniform(1, 2, memory=[5, 79]))) is not None


# --- on the command line -----------------------------------------------------------------------------------


def test_explain_on_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["flashlb-equal", "-o", "plan.json", "--quiet"]) == 0
    assert main(["flashlb-equal", "--explain"]) == 0
    solved = capsys.readouterr().out
    assert solved.startswith("layer 0: takes 196.667 tokens: 8.506% above its bound")
    assert main(["flashlb-equal", "--explain", "plan.json", "--layer", "0"]) == 0
    assert capsys.readouterr().out == solved
    assert main(["flashlb-equal", "--explain", "plan.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "moeless-explanation"
    assert main(["flashlb-equal", "--explain", "plan.json", "--seed", "3"]) == 2
    assert "--seed: is not read with --explain PLAN" in capsys.readouterr().err
    assert main(["flashlb-equal", "--explain", "--slots", "2", "--lost", "0-4"]) == 1
    out = capsys.readouterr().out
    assert "topology: lost GPUs" in out
    assert main(["flashlb-equal", "--explain", "--slots", "2", "--lost", "0-4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["format"] == "moeless-contradiction"
