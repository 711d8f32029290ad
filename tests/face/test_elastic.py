"""GPUs that fail, leave and join."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import HOST, migration_violations
from moeless_opt.problems.spec import held_LGE

RNG = np.random.default_rng(3)
LOADS = RNG.lognormal(0, 1, (3, 16)) * 100


def live(**more: Any) -> mo.Plan:
    return mo.plan(LOADS, mo.uniform(2, 4, slots=5), model=None, expert_bytes=10, **more)


def test_a_loss_is_covered_and_then_balanced() -> None:
    plan = live()
    found = mo.repair(plan, [3])
    held = held_LGE(np.delete(plan.slots_LGC, 3, axis=1), 16).any(1)
    assert found.lost == (3,)
    assert found.missing == int((~held).sum()) == found.coverage.moves.count
    assert found.coverage.moves.bytes == 10 * found.missing
    assert found.plan.imbalance_L.mean() <= found.coverage.imbalance_L.mean() + 1e-9
    for stage in (found.coverage, found.plan):
        assert (stage.slots_LGC[:, 3] == -1).all()
        assert mo.violations(stage.made_for, stage) == []
    first, second = found.schedules()
    assert {one.source for one in first.transfers} <= {HOST}
    assert all(one.source != HOST for one in second.transfers)
    assert f"{found.missing} experts have no live replica" in str(found)
    alone = mo.repair(plan, [3], balance=False)
    assert alone.plan is alone.coverage
    assert alone.schedules()[1].steps == ()
    assert "balance:" not in str(alone)


def test_coverage_comes_before_nearness() -> None:
    far = mo.uniform(2, 2, slots=12).with_levels([("gpu", 0.1), ("node", 1)])
    plan = mo.plan(LOADS, far, groups=mo.Groups.even(16, 4))
    found = mo.repair(plan, [1])
    assert found.coverage.moves.count == found.missing
    assert mo.violations(found.coverage.made_for, found.coverage) == []
    assert isinstance(found.plan.made_for, mo.Problem)
    assert found.plan.made_for.groups is not None
    assert mo.violations(found.plan.made_for, found.plan) == []
    costs = mo.repair(mo.plan(LOADS, far), [1], balance=False)
    assert costs.coverage.moves.count == costs.missing
    with pytest.raises(mo.UnsupportedFeatureError, match="groups of experts"):
        mo.repair(plan, [1], balance=False)


def test_balance_may_be_limited() -> None:
    found = mo.repair(live(split="equal"), [0], max_moves=2)
    assert found.plan.moves.count <= 2
    assert mo.repair(live(split="equal"), [0], max_moves=0).plan.moves.count == 0


def test_spread_means_that_nothing_is_missing() -> None:
    topology = mo.uniform(4, 2, slots=5)
    plan = mo.plan(LOADS, topology, limits=mo.Limits(spread=2))
    for node in range(4):
        found = mo.repair(plan, [2 * node, 2 * node + 1])
        assert found.missing == 0
        # 30 slots are left for 16 experts: not two each.
        assert found.spread == 1
    one = mo.repair(plan, [0])  # 35 slots
    assert one.spread == 2
    domain_G = topology.failure_domain_G
    for row in one.coverage.slots_LGC:
        for expert in range(16):
            assert len({int(domain_G[g]) for g in np.nonzero(row == expert)[0]}) >= 2


def test_what_cannot_be_held_is_told() -> None:
    plan = mo.plan(LOADS, mo.uniform(1, 4, slots=5))
    with pytest.raises(InfeasibleError, match="the GPUs have 15: 1 too few"):
        mo.repair(plan, [1])
    with pytest.raises(InfeasibleError, match="all GPUs are gone"):
        mo.repair(plan, [0, 1, 2, 3])
    with pytest.raises(ProblemError, match="lost"):
        mo.repair(plan, [4])
    with pytest.raises(ProblemError, match="lost: is 3, must be a list"):
        mo.repair(plan, 3)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="topology: is str"):
        mo.expand(plan, "8xH100")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="problem: is missing"):
        mo.repair(plan.replace(made_for="abc"), [1])
    with pytest.raises(ProblemError, match="must be a Plan"):
        mo.repair(plan.slots_LGC, [1])  # type: ignore[arg-type]
    other = mo.Problem(loads=mo.Loads(load_TLE=LOADS[:1]), topology=mo.uniform(1, 4, slots=5))
    with pytest.raises(ProblemError, match="is for 3 layers"):
        mo.repair(plan.replace(made_for="abc"), [1], problem=other)


def test_gpus_that_leave_hand_over_what_they_hold() -> None:
    plan = live()
    found = mo.drain(plan, [2, 6])
    assert (found.plan.slots_LGC[:, [2, 6]] == -1).all()
    assert all(one.source != HOST for one in found.schedule.transfers)
    assert mo.violations(found.plan.made_for, found.plan) == []
    rows = {layer: x for x, layer in enumerate(plan.layers)}
    assert rows == {0: 0, 1: 1, 2: 2}
    broken = migration_violations(
        found.schedule,
        plan.slots_LGC,
        found.plan.slots_LGC,
        16,
        plan.made_for.topology,
        bytes_L=np.full(3, 10),
    )
    assert broken == []
    assert found.schedule.bytes == found.plan.moves.bytes
    assert "transfers" in str(found)


def test_gpus_that_join_are_taken_in() -> None:
    plan = live()
    more = mo.uniform(3, 4, slots=5)
    found = mo.expand(plan, more)
    assert found.plan.slots_LGC.shape[1] == 12
    assert (found.plan.slots_LGC[:, 8:] >= 0).any()
    assert found.plan.imbalance_L.mean() < 1.02
    assert len(found.schedule.transfers) == found.plan.moves.count
    few = mo.expand(plan, more, loads=LOADS[:, ::-1].copy())
    assert few.plan.made_for != found.plan.made_for
    with pytest.raises(ProblemError, match="has 4 GPUs, what is live has 8"):
        mo.expand(plan, mo.uniform(1, 4, slots=5))


def test_memory_limits_and_pins_go_with_the_gpus() -> None:
    topology = mo.uniform(2, 2, memory=3 * 7 * 10)
    plan = mo.plan(
        LOADS[:, :10], topology, expert_bytes=10, limits=mo.Limits(pinned=[(-1, 0, 1), (-1, 0, 2)])
    )
    found = mo.repair(plan, [1])
    assert (found.plan.slots_LGC[:, 2] == 0).any(1).all()
    assert (found.plan.slots_LGC[:, 1] == -1).all()


def test_the_command_asks_for_domains_and_tells_of_failures(tmp_path: Any, capsys: Any) -> None:
    from moeless_opt.cli.command import main

    np.save(tmp_path / "loads.npy", LOADS)
    plan = str(tmp_path / "plan.json")
    common = [str(tmp_path / "loads.npy"), "--gpus", "4x2", "--slots", "5"]
    assert main([*common, "--spread", "2", "--failures", "2", "-o", plan]) == 0
    assert "chance that no expert is lost, by how many of 4 failure domains" in capsys.readouterr().out
    for given in ([*common, "--spread", "2"], common):  # its own problem, and another one
        assert main([*given, "--check", plan, "--failures", "1"]) == 0
        assert "1: 1 (0 experts" in " ".join(capsys.readouterr().out.split())
        assert main([*given, "--check", plan, "--failures", "1", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["survival"]
        assert told == {"domains": 4, "chance": [1.0], "exact": [True], "experts_in_one_domain": 0}
    assert main([*common, "--failures", "1", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["survival"]["chance"] != [1.0]
    assert main([*common, "--spread", "9"]) == 1
    assert main([*common, "--spread", "0"]) == 2
    assert main([*common, "--failures", "0"]) == 2


@pytest.fixture
def files(tmp_path: Any, monkeypatch: Any) -> list[str]:
    """Loads and a live plan with every expert on two nodes; the command's words for them."""
    monkeypatch.chdir(tmp_path)
    np.save("loads.npy", LOADS)
    mo.save_plan(mo.plan(LOADS, mo.uniform(2, 4, slots=6), limits=mo.Limits(spread=2)), "live.json")
    return ["loads.npy", "--gpus", "2x4", "--slots", "6", "--spread", "2", "--current", "live.json"]


def test_the_command_repairs_in_two_stages(files: list[str], capsys: Any) -> None:
    from moeless_opt.cli.command import main

    assert main([*files, "--after-loss", "3", "--json", "-o", "new.json", "--schedule", "steps.json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = mo.repair(mo.load_plan("live.json"), [3], problem=problem_of(files))
    assert told["missing"] == wanted.missing == 0
    assert told["spread"] == 2
    assert [one["moves"] for one in told["stages"]] == [wanted.coverage.moves.count, wanted.plan.moves.count]
    assert np.array_equal(mo.load_plan("new.json").slots_LGC, wanted.plan.slots_LGC)
    with open("steps.json") as file:
        steps = json.load(file)
    assert steps == told["schedule"]
    first, second = wanted.schedules()
    assert steps["coverage_steps"] == len(first.steps)
    moved = [tuple(one) for step in steps["steps"] for one in step["transfers"]]
    assert moved == [
        (t.layer, t.expert, t.source, t.target, t.bytes) for t in (*first.transfers, *second.transfers)
    ]
    assert main([*files, "--after-loss", "3"]) == 0
    assert "coverage" in capsys.readouterr().out


def test_a_lost_node_lowers_the_spread_alike(files: list[str], capsys: Any) -> None:
    """`--lost`, `--after-loss` and `repair` ask for the same of the GPUs that are left, and say so."""
    from moeless_opt.cli.command import main

    assert main([*files, "--after-loss", "4-7"]) == 0
    assert "note: spread 1 instead of 2" in " ".join(capsys.readouterr().err.split())
    assert main([*files, "--lost", "4-7", "-o", "new.json"]) == 0
    assert "note: spread 1 instead of 2: what the GPUs that are left" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main([*files, "--lost", "4-7", "--check", "new.json"]) == 0
    assert main([*files[:6], "9", *files[7:], "--lost", "4-7"]) == 1  # nine nodes there never were
    assert main([*files, "--lost", "3", "--quiet", "-o", "new.json"]) == 0  # 18 slots: nothing is lowered
    assert mo.load_plan("new.json").replicas_LE.min() == 2
    # Slots for all of them twice, but those of one node for 15 of 16.
    tight = mo.plan(LOADS, mo.uniform(2, 4, slots=5), limits=mo.Limits(spread=2))
    assert mo.repair(tight, [3]).spread == 1


def test_the_command_drains(files: list[str], capsys: Any) -> None:
    from moeless_opt.cli.command import main

    assert main([*files, "--drain", "0,7", "--json", "--schedule", "steps.json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = mo.drain(mo.load_plan("live.json"), [0, 7], problem=problem_of(files))
    assert told["left"] == [0, 7]
    assert told["plan"]["slots"] == wanted.plan.slots_LGC.tolist()
    moved = [tuple(one) for step in told["schedule"]["steps"] for one in step["transfers"]]
    assert moved == [(t.layer, t.expert, t.source, t.target, t.bytes) for t in wanted.schedule.transfers]
    assert all(source >= 0 for _, _, source, _, _ in moved)  # who leaves serves until the end


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--drain", "8"], 2, "--drain: "),
        (["--after-loss", "0-7"], 2, "--after-loss: names all GPUs; at least one must be left"),
        (["--drain", "1", "--max-moves", "3"], 2, "--max-moves: is not read with --drain"),
        (["--drain", "1-6", "-o", "new.json"], 1, "16 experts with one replica each need 16 slots"),
        (
            ["--after-loss", "1-6", "--schedule", "x.json"],
            1,
            "need 16 slots per layer, the GPUs have 12: 4 too few",
        ),
        (["--after-loss", "1", "--drain", "2"], 2, "one at a time"),
    ],
)
def test_the_command_refuses(
    files: list[str], capsys: Any, words: list[str], code: int, message: str
) -> None:
    from pathlib import Path

    from moeless_opt.cli.command import main

    assert main([*files, *words]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not {"new.json", "x.json"} & {path.name for path in Path().iterdir()}
    assert main([*files[:-2], "--drain", "1"]) == 2
    assert "--drain: needs a live plan to start from: give --current PLAN" in capsys.readouterr().err


def problem_of(words: list[str]) -> mo.Problem:
    """The problem that the command's words make."""
    from moeless_opt.cli.inputs import read_problem
    from moeless_opt.cli.options import read_arguments

    return read_problem(read_arguments(words))


@pytest.mark.parametrize("sizing", ["cv=0.3", "makespan=1.1"])
def test_plans_of_few_replicas_are_repaired_as_they_were_made(sizing: str) -> None:
    plan = mo.plan(LOADS, mo.uniform(2, 4, slots=5), sizing=sizing)
    found = mo.repair(plan, [3])
    assert found.coverage.moves.count == found.missing
    assert mo.violations(found.plan.made_for, found.plan) == []
    assert found.plan.made_for.sizing == plan.made_for.sizing
    assert found.plan.replicas <= plan.replicas + 3


def test_nothing_is_left_where_the_others_have_no_slots() -> None:
    plan = mo.plan(LOADS[:, :3], mo.uniform(1, 3, slots=[3, 0, 0]))
    for change in (mo.repair, mo.drain):
        with pytest.raises(InfeasibleError, match="need 3 slots per layer, the GPUs have 0"):
            change(plan, [0])
