"""GPUs that fail, leave and join."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import HOST, migration_violations
from moeless_opt.problems.spec import held_LGE
from tests.oracles.enumeration import Enumeration

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
    assert found.trouble == ""
    alone = mo.repair(plan, [1], balance=False)
    assert alone.coverage.moves.count == alone.missing
    assert "coverage does not look at groups" in str(alone)


def test_coverage_comes_back_where_nothing_balanced_is_allowed(files: Any, capsys: Any) -> None:
    """Groups of eight fit no node any more; every expert fits."""
    from moeless_opt.cli.command import main

    topology = mo.uniform(2, 2, slots=6)
    plan = mo.plan(LOADS, topology, groups=mo.Groups.even(16, 2))
    with pytest.raises(InfeasibleError):
        mo.drain(plan, [0])
    found = mo.repair(plan, [0])
    assert found.plan is found.coverage
    assert found.coverage.moves.count == found.missing
    assert mo.violations(found.coverage.made_for, found.coverage) == []
    assert "no balanced plan: " in str(found)
    mo.save_plan(plan, "groups.json")
    words = ["loads.npy", "--gpus", "2x2", "--slots", "6", "--groups", "2", "--current", "groups.json"]
    assert main([*words, "--after-loss", "0", "-o", "new.json"]) == 0
    assert "note: no balanced plan: " in " ".join(capsys.readouterr().err.split())
    assert np.array_equal(mo.load_plan("new.json").slots_LGC, found.coverage.slots_LGC)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_layers_that_share_bytes_are_covered_by_the_fewest_loads_and_stay_near(split: str) -> None:
    even = mo.plan(LOADS, mo.uniform(2, 4, slots=5), expert_bytes=10, split=split)
    assert isinstance(even.made_for, mo.Problem)
    sized = even.made_for.replace(
        topology=mo.uniform(2, 4, memory=3 * 5 * 10), sizing=mo.Sizing(policy="memory")
    )
    live = mo.Placement(slots_LGC=even.slots_LGC, experts=16)
    found = mo.repair(live, [3], problem=sized.replace(objective=mo.Objective(balance_tolerance=0.1)))
    assert found.coverage is not found.plan
    assert found.coverage.moves.count == found.missing
    for stage in (found.coverage, found.plan):
        assert isinstance(stage.made_for, mo.Problem)
        assert stage.made_for.sizing.policy == "memory"
        assert mo.violations(stage.made_for, stage) == []
    assert found.plan.imbalance_L.mean() <= found.coverage.imbalance_L.mean() + 1e-9
    assert found.plan.moves.count < even.replicas / 3  # not built anew


def test_shared_bytes_against_enumeration() -> None:
    """Two layers of unequal bytes: every expert comes back by its load alone wherever there is a way."""
    rng = np.random.default_rng(8)
    seen, refused, none = 0, 0, 0
    for _ in range(60):
        size_L, memory_G = rng.integers(1, 4, 2), rng.integers(3, 9, 3)
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=rng.integers(1, 9, (1, 2, 3)).astype(float)),
            topology=mo.uniform(1, 3, memory=1).replace(memory_G=memory_G * [0, 1, 1]),
            expert_bytes_L=size_L,
            sizing=mo.Sizing(policy="memory"),
        )
        held = np.zeros((2, 3, 3), dtype=bool)
        for x, e, g in itertools.product(range(2), range(3), (1, 2)):
            held[x, g, e] = rng.random() < 0.4 and size_L @ held[:, g].sum(1) + size_L[x] <= memory_G[g]
        slots_LGC = np.where(held, np.arange(3), -1).astype(np.int32)
        problem = problem.replace(current=mo.Placement(slots_LGC=slots_LGC, experts=3, partial=True))
        missing = [(x, e) for x, e in np.argwhere(~held.any(1)).tolist()]
        ways = 0  # of giving each missing expert to a GPU, others that have two replicas making room
        for gpus in itertools.product((1, 2), repeat=len(missing)):
            after = held.copy()
            for (x, e), g in zip(missing, gpus, strict=True):
                after[x, g, e] = True
            ways += any(
                np.all(size_L @ (after & kept).sum(2) <= memory_G * [0, 1, 1])
                for kept in dropped(after, missing)
            )
        try:
            plan = mo.solve(problem, "cover").plan
        except InfeasibleError:
            refused += ways > 0  # large ones first need not be the way
            none += not ways
            continue
        assert ways
        assert plan is not None
        assert plan.moves.count == len(missing)
        seen += 1
    assert seen > 15
    assert none > 5
    assert refused <= 2


def dropped(held: np.ndarray, missing: list[tuple[int, int]]) -> Any:
    """Masks that leave every expert a replica, none of those that come being dropped."""
    spare = [
        (x, g, e)
        for x, g, e in np.argwhere(held).tolist()
        if (x, e) not in missing and held[x, :, e].sum() > 1
    ]
    for gone in itertools.product((False, True), repeat=len(spare)):
        kept = np.ones_like(held)
        for (x, g, e), goes in zip(spare, gone, strict=True):
            kept[x, g, e] = not goes
        if (held & kept).any(1).all():
            yield kept


def test_bytes_to_leave_and_to_join_against_enumeration() -> None:
    """Fewest bytes within the balance tolerance, of all placements on the GPUs that are left or come."""
    more = seen = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        experts, gpus = 4, 3
        load_LE = rng.lognormal(0, 1, (1, experts)).round(2)
        topology = mo.uniform(1, gpus, slots=int(rng.integers(2, 4)))
        plan = mo.plan(load_LE, topology, expert_bytes=10, split=("equal", "fractional")[seed % 2])
        wide = mo.uniform(1, gpus + 1, slots=int(topology.slots_G[0]))
        for found in (mo.drain(plan, [gpus - 1]), mo.expand(plan, wide)):
            made = found.plan.made_for
            assert isinstance(made, mo.Problem)
            assert made.current is not None
            truth, told = Enumeration(made), found.plan.certificate
            near = 1 + made.objective.balance_tolerance
            limit = near * told.lower_bound_L[0]  # of the bound, or of the best where none comes so near
            if truth.best_time() > limit:
                limit = near * truth.best_time()
            live_EG = np.array([(made.current.slots_LGC[0] == e).any(1) for e in range(experts)])
            soon_PEG = truth.held_PEG[truth.time_P <= limit * (1 + 1e-9)]
            fewest = int((soon_PEG & ~live_EG).sum((1, 2)).min())
            assert told.value_L[0] <= limit * (1 + 1e-6)
            assert found.schedule.bytes == found.plan.moves.bytes >= 10 * fewest
            more += found.plan.moves.bytes // 10 - fewest
            seen += 1
    assert more <= seen // 12


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


@pytest.mark.parametrize("mode", ["--after-loss", "--drain"])
def test_wishes_are_read_where_gpus_go(files: list[str], capsys: Any, mode: str) -> None:
    """Each gives the plan that `repair` and `drain` give for the problem of the same words."""
    from moeless_opt.cli.command import main

    np.save("other.npy", LOADS[:, ::-1].copy())
    np.save("sources.npy", np.stack([0.2 * LOADS, 0.8 * LOADS]))
    words = [*files[:5], *files[7:]]
    changes = mo.repair if mode == "--after-loss" else mo.drain
    plain = changes(mo.load_plan("live.json"), [3], problem=problem_of(words)).plan
    wishes = (
        ["--also", "other.npy", "--risk", "worst"],
        ["--costs", "gpu=0.1,node=1", "--priorities", "balance,traffic"],
        ["--sources", "sources.npy", "--priorities", "balance,traffic", "--tolerance", "0.1"],
        ["--groups", "4:0.3"],
        ["--priorities", "survival,balance", "--failure-rate", "0.05"],
    )
    for wish in wishes if mode == "--after-loss" else wishes[::4]:
        assert main([*words, *wish, mode, "3", "-o", "new.json", "--quiet"]) == 0
        found = mo.load_plan("new.json")
        problem = problem_of([*words, *wish])
        wanted = changes(mo.load_plan("live.json"), [3], problem=problem).plan
        assert np.array_equal(found.slots_LGC, wanted.slots_LGC)
        assert found.problem_digest == wanted.made_for.digest()
        assert not np.array_equal(found.slots_LGC, plain.slots_LGC), wish
    limited = problem_of(words)
    mo.save_problem(limited.replace(limits=mo.Limits(max_move_bytes=5), expert_bytes_L=10), "limited.json")
    assert main(["limited.json", mode, "3"]) == 2
    assert f"limits.max_move_bytes: is not read with {mode}" in capsys.readouterr().err
    # What no one method takes together is refused by name.
    assert main([*words, mode, "3", "--groups", "4", "--priorities", "memory,balance"]) == 2
    assert "groups of experts kept on a node, this order of priorities" in capsys.readouterr().err
