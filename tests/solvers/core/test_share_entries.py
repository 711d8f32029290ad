"""Problems whose shares are whole entries of a dispatch table: plans, bounds, verdicts, documents."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.cli import main
from moeless_opt.problems.io.documents import problem_from_json, problem_to_json
from moeless_opt.problems.io.plans import load_plan, save_plan
from moeless_opt.problems.plan import entry_bound
from moeless_opt.solvers.core.finish import lower_bound
from tests.oracles.entries import best_entries

GPUS = mo.uniform(1, 4, slots=3)
ABLE = ("auto", "construct", "constrained", "replan", "stay")


def loads(seed: int, *shape: int) -> Any:
    return np.floor(np.random.default_rng(seed).lognormal(3, 1, shape)) + 1


def placements(experts: int, capacity_G: list[int]) -> Any:
    """All placements of one layer in which every expert has a replica."""
    rows = [
        [row for size in range(slots + 1) for row in itertools.combinations(range(experts), size)]
        for slots in capacity_G
    ]
    for chosen in itertools.product(*rows):
        if len(set().union(*chosen)) == experts:
            yield chosen


def least_time(load_E: Any, capacity_G: list[int], speed_G: Any, entries: int) -> float:
    return min(
        best_entries(load_E, chosen, speed_G, entries) for chosen in placements(len(load_E), capacity_G)
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_beats_the_bound_and_small_plans_are_near_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus, entries = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 5))
    capacity_G = rng.integers(1, 3, gpus)
    capacity_G[0] += max(experts - int(np.minimum(capacity_G, experts).sum()), 0)
    speed_G = rng.choice([1.0, 2.0], gpus)
    load_LE = rng.lognormal(0, 1.5, (1, experts))
    topology = mo.uniform(1, gpus, slots=capacity_G.tolist(), speed=speed_G.tolist())
    problem = make_problem(load_LE, topology, share_entries=entries)
    least = least_time(load_LE[0], np.minimum(capacity_G, experts).tolist(), speed_G, entries)
    bound = float(lower_bound(problem)[0][0])
    free = float(lower_bound(problem.replace(share_entries=None))[0][0])
    assert free * (1 - 1e-12) <= bound <= least * (1 + 1e-9)
    for name in ("construct", "auto"):
        plan = mo.solve(problem, name).plan
        assert plan is not None
        assert least * (1 - 1e-9) <= plan.certificate.value_L[0] <= 1.35 * least


def test_entries_raise_the_bound_where_experts_are_heavy() -> None:
    # Two thirds of the heavy one are the least that three entries on three GPUs can do with four slots.
    bound_L = entry_bound(np.array([[9.0, 0.1]]), np.array([[1, 1, 1]]), np.ones(3), 3, np.array([3.0]))
    assert bound_L[0] == pytest.approx(6.0, rel=1e-9)


@pytest.mark.parametrize(("name", "entries"), [*((name, 3) for name in ABLE), ("replan", 1), ("stay", 16)])
def test_plans_have_whole_entries_in_every_scenario(name: str, entries: int) -> None:
    live = mo.plan(loads(1, 2, 8), GPUS)
    for load in (loads(2, 2, 8), loads(3, 2, 2, 8)):
        problem = make_problem(load, GPUS, current=live, share_entries=entries)
        plan = mo.solve(problem, name).plan
        assert plan is not None
        assert plan.share_entries == entries
        for share in (plan.share_LGC, plan.scenario_share_TLGC):
            if share is not None:
                assert np.allclose(share * entries, np.rint(share * entries), rtol=0, atol=1e-9)
        assert mo.violations(problem, plan) == []


def test_a_plan_to_start_from_is_rounded_and_never_made_worse() -> None:
    problem = make_problem(loads(4, 2, 8), GPUS, share_entries=4)
    free = mo.plan(loads(4, 2, 8), GPUS)
    plan = mo.solve(problem, "construct", initial=free).plan
    again = mo.solve(problem, "construct", initial=plan).plan
    assert plan is not None
    assert again is not None
    assert (again.certificate.value_L <= plan.certificate.value_L * (1 + 1e-9)).all()


def test_the_tolerance_of_a_replan_is_judged_after_the_rounding() -> None:
    before = np.random.default_rng(5).lognormal(0, 1, (4, 64))
    after = before * np.random.default_rng(6).lognormal(0, 0.3, before.shape)
    topology = mo.uniform(2, 8, slots=6)
    live = mo.plan(before, topology)
    plan = mo.plan(after, topology, current=live, share_entries=64, balance_tolerance=0.02)
    free = mo.plan(after, topology, current=live, balance_tolerance=0.02)
    assert (plan.certificate.gap_L <= 0.02 + 1e-9).all()
    assert free.moves.count <= plan.moves.count < 0.5 * plan.replicas
    capped = mo.plan(
        after, topology, current=live, share_entries=4, limits=mo.Limits(max_moves=free.moves.count)
    )
    assert capped.moves.count <= free.moves.count


def test_a_wanted_imbalance_is_reached_in_whole_entries() -> None:
    problem = make_problem(
        np.random.default_rng(7).lognormal(0, 1, (1, 12)),
        mo.uniform(1, 3, slots=8),
        share_entries=8,
        sizing="makespan=1.1",
    )
    plan = mo.solve(problem, "auto").plan
    assert plan is not None
    assert (plan.imbalance_L <= 1.1 + 1e-9).all()


def test_decode_times_keep_idle_replicas_idle() -> None:
    problem = make_problem(loads(8, 2, 8), GPUS, share_entries=8, time=mo.TimeModel(activation_cost=20.0))
    plan = mo.solve(problem, "auto").plan
    free = mo.solve(problem.replace(share_entries=None), "auto").plan
    assert plan is not None
    assert free is not None
    assert (plan.certificate.value_L <= free.certificate.value_L * 1.1).all()


@pytest.mark.parametrize(
    "name", ["portfolio", "milp", "cpsat", "min-moves", "lexicographic", "eplb", "static"]
)
def test_who_proves_free_shares_or_knows_none_refuses(name: str) -> None:
    problem = make_problem(loads(9, 1, 8), GPUS, current=mo.plan(loads(8, 1, 8), GPUS), share_entries=8)
    with pytest.raises(mo.UnsupportedFeatureError, match="shares in whole entries"):
        mo.solve(problem, name)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share_entries": 0}, "share_entries: is 0, must be a whole number from 1 to 65536"),
        ({"share_entries": 2.5}, "share_entries: is 2.5, must be a whole number"),
        ({"share_entries": 70000}, "share_entries: is 70000, must be a whole number from 1 to 65536"),
        ({"share_entries": 8, "split": "equal"}, "share_entries: is 8 with an equal split"),
    ],
)
def test_senseless_entries_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(mo.ProblemError, match=said):
        make_problem([[3.0, 2.0]], GPUS, **given)


def test_the_verifier_counts_entries() -> None:
    problem = make_problem(loads(10, 2, 2, 8), GPUS, share_entries=8)
    plan = mo.solve(problem).plan
    assert plan is not None
    assert plan.scenario_share_TLGC is not None
    (said,) = mo.violations(problem, plan.replace(share_entries=None))
    assert said == "plan has shares of None entries, the problem asks for 8"
    assert mo.violations(problem.replace(share_entries=16), plan.replace(share_entries=16)) == []
    free = problem.replace(share_entries=None)
    assert mo.violations(free, plan) == ["plan has shares of 8 entries, the problem asks for None"]
    x, g, c = (int(i[0]) for i in np.nonzero((plan.share_LGC > 0) & (plan.share_LGC < 1)))
    expert = plan.slots_LGC[x, g, c]
    twin = np.argwhere((plan.slots_LGC[x] == expert) & (np.arange(4)[:, None] != g))[0]
    for key in ("share_LGC", "scenario_share_TLGC"):
        share = getattr(plan, key).copy()
        one = share if key == "share_LGC" else share[1]
        one[x, g, c] += 1e-8
        one[x, *twin] -= 1e-8
        (said,) = mo.violations(problem, plan.replace(**{key: share}))
        assert "no multiple of 1/8" in said
        assert said.startswith("scenario 1, layer" if key != "share_LGC" else "layer")


def test_models_of_free_shares_are_not_written_for_entries(tmp_path: Path) -> None:
    problem = make_problem(loads(9, 1, 8), GPUS, share_entries=8)
    with pytest.raises(mo.ProblemError, match="share_entries: is 8, must be None"):
        mo.export_model(problem, tmp_path / "layer.lp")


def test_fronts_are_of_rounded_plans() -> None:
    problem = make_problem(loads(12, 1, 12), mo.uniform(1, 4, slots=5), share_entries=8)
    front = mo.pareto(problem, ("balance", "memory"))
    balance = [value for value, _ in front.values]
    assert balance == sorted(balance, reverse=True)
    assert all(plan.share_entries == 8 for plan in front.plans)


# --- documents ---------------------------------------------------------------------------------------------


def test_documents_carry_the_entries(tmp_path: Path, capsys: Any) -> None:
    problem = make_problem(loads(11, 2, 8), GPUS, share_entries=16)
    assert problem_from_json(problem_to_json(problem)) == problem
    assert problem.digest() != problem.replace(share_entries=None).digest()
    assert problem.digest() != problem.replace(share_entries=8).digest()
    assert "16 entries" in repr(problem)
    plan = mo.solve(problem).plan
    assert plan is not None
    for name in ("plan.json", "plan.npz"):
        save_plan(plan, tmp_path / name)
        read = load_plan(tmp_path / name)
        assert read.share_entries == 16
        assert mo.violations(problem, read) == []
        assert np.array_equal(mo.share_table(read).slot_LEN, mo.share_table(plan).slot_LEN)
    np.save(tmp_path / "loads.npy", loads(11, 2, 8))
    call = [str(tmp_path / "loads.npy"), "--gpus", "4", "--slots", "3", "-o", str(tmp_path / "out.json")]
    assert main([*call, "--share-entries", "4"]) == 0
    assert load_plan(tmp_path / "out.json").share_entries == 4
    capsys.readouterr()
    assert main([*call, "--share-entries", "4", "--split", "equal"]) == 2
    assert "share_entries: is 4 with an equal split" in capsys.readouterr().err
