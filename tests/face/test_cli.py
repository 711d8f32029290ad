"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.problems.errors import SolverUnavailableError
from moeless_opt.problems.io.documents import load_problem, save_problem
from moeless_opt.problems.io.plans import save_plan
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.solvers.core import registry
from tests.strategies import plan_of

LOAD = [[60.0, 56.0, 12.0, 12.0, 2.0, 1.0, 1.0, 1.0], [5.0, 1.0, 9.0, 4.0, 3.0, 3.0, 8.0, 7.0]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(**changes: Any) -> mo.Problem:
    base = {"loads": mo.Loads(load_TLE=LOAD), "topology": mo.uniform(1, 4, slots=3), "name": "small"}
    return mo.Problem(**base | changes)


@pytest.fixture
def saved(folder: Path) -> mo.Problem:
    """A small problem, in problem.json."""
    made = problem()
    save_problem(made, folder / "problem.json")
    return made


def refused(capsys: Any, *argv: str, code: int = 2) -> str:
    """Run, expect one line on stderr, nothing on stdout and no new file; return the line."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moeless-solve: ")
    assert err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("moeless-solve: ").rstrip("\n")


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "format": "moeless-problem",
        "version": 1,
        "loads": {"load": LOAD},
        "topology": {"gpus_per_node": 4, "slots": 3},
    }
    return base | changes


# --- solving -----------------------------------------------------------------------------------------------


def test_a_problem_is_solved_and_written(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "-o", "plan.json"]) == 0
    out, err = capsys.readouterr()
    head, rule, *rows = out.splitlines()
    assert head.split() == ["solver", "imbalance", "worst", "gap", "replicas", "time", "status"]
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows[:2]] == ["static", "auto"]
    assert "worst layers of auto:" in out
    assert "wrote plan.json" in err
    plan = mo.load_plan("plan.json")
    mo.verify(saved, plan)
    assert float(rows[1].split()[1]) == pytest.approx(plan.imbalance_L.mean(), abs=1e-4)
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["plan.json", "problem.json"]


@pytest.mark.parametrize("name", ["plan.json", "plan.npz"])
def test_a_plan_is_checked(saved: mo.Problem, capsys: Any, name: str) -> None:
    assert main(["problem.json", "-o", name, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["problem.json", "--check", name]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("valid\n<Plan")
    assert err == ""
    assert main(["problem.json", "--check", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "violations": [], "same_problem": True}


def test_a_plan_that_breaks_a_rule_fails_its_check(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "-o", "plan.json", "--quiet"]) == 0
    data = json.loads(Path("plan.json").read_text())
    data["times"][0][0] += 1
    Path("plan.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["problem.json", "--check", "plan.json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moeless-solve: plan.json: the plan's GPU times are not")
    assert main(["problem.json", "--check", "plan.json", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["valid"]
    assert answer["violations"]


def test_json_output(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "--json", "--compare", "static,eplb,auto,oracle"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["format"] == "moeless-result"
    assert answer["problem"]["digest"] == saved.digest()
    assert [row["solver"] for row in answer["solvers"]] == ["static", "eplb", "auto", "oracle"]
    best = min(row["objective"]["balance"] for row in answer["solvers"] if row["objective"])
    from moeless_opt.problems.io.plans import plan_from_json

    plan = plan_from_json(answer["plan"])
    mo.verify(saved, plan)
    assert plan.certificate.value_L.sum() == pytest.approx(best)


def test_comparison(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "--compare", "--worst", "0"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:7]] == ["static", "eplb", "moeless", "auto", "oracle"]
    assert any("a bound, not a plan" in row for row in rows)
    assert any(row.startswith("balance as engines measure it") for row in rows)


def test_a_solver_that_cannot_is_a_row_with_the_reason(folder: Path, capsys: Any) -> None:
    save_problem(problem(topology=mo.uniform(1, 4, slots=3, speed=[1, 1, 1, 0.5])), "problem.json")
    assert main(["problem.json", "--compare", "static,eplb"]) == 0
    table, _, note = capsys.readouterr().out.partition("eplb: ")
    assert "no solution" in table
    assert max(map(len, [*table.splitlines(), *note.splitlines()])) <= 80
    assert "does not support GPUs of different speed or slots" in " ".join(note.split())
    assert "solvers that have it:" in " ".join(note.split())
    line = refused(capsys, "problem.json", "--solver", "eplb", "--quiet", code=2)
    assert "'eplb' does not support GPUs of different speed" in line


def test_the_best_of_several_is_written(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "--compare", "static,auto,moeless", "-o", "plan.json", "--quiet"]) == 0
    best = mo.load_plan("plan.json")
    for name in ("static", "auto", "moeless"):
        other = mo.solve(saved, name).plan
        assert other is not None
        assert best.certificate.value_L.sum() <= other.certificate.value_L.sum() * (1 + 1e-9)


def test_the_same_seed_gives_the_same_plan(saved: mo.Problem) -> None:
    for name in ("a.npz", "b.npz"):
        assert main(["problem.json", "-o", name, "--seed", "5", "--quiet"]) == 0
    assert (mo.load_plan("a.npz").slots_LGC == mo.load_plan("b.npz").slots_LGC).all()
    assert (mo.load_plan("a.npz").share_LGC == mo.load_plan("b.npz").share_LGC).all()


def test_shipped_instances(folder: Path, capsys: Any) -> None:
    assert main(["flashlb-fractional", "-o", "plan.json"]) == 0
    assert "best known: 181.25" in capsys.readouterr().err
    assert mo.load_plan("plan.json").time_LG.max() == pytest.approx(181.25)
    assert main(["flashlb-fractional", "--check", "plan.json"]) == 0


def test_a_live_plan(saved: mo.Problem, capsys: Any) -> None:
    slots = contiguous(8, saved.capacity_LG)
    save_plan(plan_of(saved, slots), "live.json")
    assert main(["problem.json", "--current", "live.json", "-o", "plan.json", "--quiet"]) == 0
    plan = mo.load_plan("plan.json")
    assert not plan.moves.cold
    mo.verify(saved.replace(current=mo.Placement(slots_LGC=slots, experts=8)), plan)


def test_lists(capsys: Any) -> None:
    assert main(["--list-solvers"]) == 0
    out = capsys.readouterr().out
    for name in mo.solver_names():
        assert f"{name}: " in out
    assert main(["--list-instances"]) == 0
    out = capsys.readouterr().out
    for name in mo.instance_names():
        assert f"{name}: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_and_version(capsys: Any) -> None:
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        assert capsys.readouterr().out.strip()


def test_a_picture(saved: mo.Problem, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    assert main(["problem.json", "--plot", "plan.png"]) == 0
    assert "wrote plan.png" in capsys.readouterr().err
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG\r\n")
    live = plan_of(saved, contiguous(8, saved.capacity_LG))
    save_plan(live, "live.json")
    assert main(["problem.json", "--plot", "live.png", "--current", "live.json", "--quiet"]) == 0
    assert Path("live.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_no_matplotlib_is_said_before_anything_is_solved(
    saved: mo.Problem, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("moeless_opt.plots.find_spec", lambda name: None)
    line = refused(capsys, "problem.json", "--plot", "x.png", code=3)
    assert line == "--plot: needs a package that is missing: pip install 'moeless-opt[plot]'"


# --- recordings --------------------------------------------------------------------------------------------


def recordings() -> dict[str, Any]:
    dense = [[0.0] * 8, *LOAD]
    rows = [f"{x},{e},{int(n)}" for x, row in enumerate(LOAD) for e, n in enumerate(row)]
    return {
        "sglang.json": json.dumps({"rank": 0, "logical_count": [LOAD, LOAD]}).encode(),
        "dense.json": json.dumps({"logical_count": dense}).encode(),
        "table.csv": ("layer,expert,count\n" + "\n".join(rows)).encode(),
        "table.csv.gz": gzip.compress(("layer,expert,count\n" + "\n".join(rows)).encode()),
        "misnamed.txt": json.dumps({"logical_count": LOAD}).encode(),
    }


@pytest.mark.parametrize("name", recordings())
def test_recordings_straight_on_the_command_line(folder: Path, capsys: Any, name: str) -> None:
    Path(name).write_bytes(recordings()[name])
    assert main([name, "--gpus", "2x2", "--slots", "3", "-o", "plan.json"]) == 0
    _, err = capsys.readouterr()
    plan = mo.load_plan("plan.json")
    assert plan.slots_LGC.shape == (2, 4, 3)
    twice = 2 if name == "sglang.json" else 1
    np.testing.assert_allclose(plan.time_LG.sum(1), np.sum(LOAD, axis=1) * twice)
    if name == "dense.json":
        assert "dense layers 0 skipped" in err
        assert plan.layers == (1, 2)


def test_arrays_on_the_command_line(folder: Path, capsys: Any) -> None:
    np.save("loads.npy", LOAD)
    np.savez("loads.npz", chat=LOAD, code=np.array(LOAD)[:, ::-1], names=np.array(["x"]))
    assert main(["loads.npy", "--gpus", "4", "--slots", "3", "--quiet"]) == 0
    assert main(["loads.npz", "--key", "code", "--gpus", "4", "--slots", "3", "--quiet", "-o", "a.json"]) == 0
    assert (
        main(["loads.npz", "--key", "c*", "--scenario", "chat", "--gpus", "4", "--slots", "3", "--quiet"])
        == 0
    )
    assert (
        main(["loads.npz", "--key", "c*", "--workload", "code", "--gpus", "4", "--slots", "3", "--quiet"])
        == 0
    )
    assert capsys.readouterr().out == ""
    line = refused(capsys, "loads.npz", "--key", "maths", "--gpus", "4", "--slots", "3")
    assert line.startswith("loads.npz: ")
    assert "maths" in line


def test_memory_in_place_of_slots(folder: Path, capsys: Any) -> None:
    np.save("loads.npy", LOAD)
    mixtral = mo.model_preset("Mixtral-8x7B").expert_bytes * 2
    argv = ["loads.npy", "--gpus", "1x4", "--model", "mixtral-8x7b", "--quiet"]
    assert main([*argv, "--memory", f"{3 * mixtral}B", "-o", "plan.json"]) == 0
    assert mo.load_plan("plan.json").slots_LGC.shape[2] <= 3
    assert mo.load_plan("plan.json").moves.bytes > 0
    line = refused(capsys, *argv, "--memory", f"{(2 * mixtral - 1) / 1e9:.9f}GB", code=1)
    assert line.startswith(
        "infeasible: topology.memory: 8 experts with one replica each need 8 slots per layer"
    )
    assert "room for 4 slots per layer (4 too few)" in line


def test_topology_by_name_and_by_file(folder: Path, capsys: Any) -> None:
    np.save("loads.npy", LOAD)
    assert main(["loads.npy", "--topology", "8xH100", "--slots", "2", "--quiet"]) == 0
    Path("t.json").write_text(json.dumps({"gpus": [{"slots": 4}, {"slots": 5, "speed": 2}]}))
    assert main(["loads.npy", "--topology", "t.json", "--quiet", "-o", "plan.json"]) == 0
    assert mo.load_plan("plan.json").slots_LGC.shape == (2, 2, 5)


def test_overrides(saved: mo.Problem) -> None:
    assert (
        main(["problem.json", "--split", "equal", "--gpus", "8", "--slots", "2", "--quiet", "-o", "p.json"])
        == 0
    )
    plan = mo.load_plan("p.json")
    assert plan.split == "equal"
    assert plan.slots_LGC.shape[1] == 8


# --- bad input ---------------------------------------------------------------------------------------------

BAD_DOCUMENTS = [
    ({"loads": {"load": [1, 2]}}, "loads: has shape (2,), must be [layers, experts]"),
    ({"loads": {"load": [[1, 2], [3]]}}, "loads: not an array of numbers"),
    ({"loads": {"load": [[1, -2]]}}, "loads.load[0][1]: is -2.0, must be finite and at least 0"),
    ({"loads": {"load": [["a", "b"]]}}, "loads: must hold numbers"),
    ({"topology": {"gpus_per_node": 0, "slots": 1}}, "topology.gpus_per_node: is 0"),
    ({"topology": {"gpus": []}}, "topology.gpus: needs at least one GPU"),
    ({"topolgy": {}}, "topolgy: unknown key; did you mean 'topology'?"),
    ({"split": 5}, "split: must be a string, got a whole number"),
    ({"known": {"source": "me", "best": [[1]]}}, "known.best_L: has shape (1, 1), must be one number per"),
    ({"known": {"source": "me", "bound": [1] * 9}}, "known.bound_L: has 9 numbers, there are 2 layers"),
    ({"version": 99}, "version: is 99, this release reads version 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_DOCUMENTS)
def test_malformed_problems(folder: Path, capsys: Any, changes: dict[str, Any], message: str) -> None:
    Path("p.json").write_text(json.dumps(document(**changes)))
    assert refused(capsys, "p.json", "-o", "plan.json").startswith(f"p.json: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "moeless-problem", "loads": [NaN]}', "holds NaN, which is no JSON number"),
        (b'{"format": "moeless-problem", "loads": ', "is not JSON"),
        (b'{"format": "moeless-problem", "loads": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"format": "moeless-plan", "version": 1}', "is a plan, not a problem; use it with --current"),
        (b"", "is empty"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "is binary in no known format"),
        (b"\x80\x04\x95\x00\x00", "is a bare Python pickle"),
        (b"PK\x03\x04broken", "is a truncated or damaged zip archive"),
        (b'{"logical_count": [[1, 2], [3', ""),
        (b'{"logical_count": [[1, NaN]]}', ""),
        (b'{"logical_count": [[1, -1]]}', ""),
        (b'{"logical_count": [[0, 0]]}', ""),
        (b"layer,expert,count\n0,0,many\n", ""),
    ],
)
def test_unreadable_files(folder: Path, capsys: Any, content: bytes, message: str) -> None:
    Path("x.json").write_bytes(content)
    line = refused(capsys, "x.json", "--gpus", "4", "--slots", "3")
    assert line.startswith(f"x.json: {message}")


@pytest.mark.parametrize("start", [b'{"format": "moeless-problem", "loads": [', b'{"logical_count": [['])
def test_a_gigabyte_of_json_is_refused_unread(folder: Path, capsys: Any, start: bytes) -> None:
    with Path("big.json").open("wb") as file:
        file.write(start)
        file.truncate(2**30)
    began = time.monotonic()
    line = refused(capsys, "big.json", "--gpus", "4", "--slots", "3")
    assert "1.07 GB" in line
    assert "256 MB" in line
    assert time.monotonic() - began < 60  # read, it would take minutes and many gigabytes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "problem: is missing: give a problem, a recording, or an instance"),
        (["absent.json"], "absent.json: is no file nor the name of a shipped instance"),
        (["flashlb-equl"], "flashlb-equl: is no file; did you mean the instance 'flashlb-equal'?"),
        (["."], "./"),
        (["problem.json", "--solver", "magic"], "solver: 'magic' is unknown; there are auto"),
        (["problem.json", "--solver", "epbl"], "solver: 'epbl' is unknown; did you mean 'eplb'?"),
        (["problem.json", "--compare", "auto,magic"], "solver: 'magic' is unknown"),
        (["problem.json", "--slots", "many"], "--slots: has 'many', must be numbers such as 9"),
        (["loads.npy", "--slots", "3"], "--gpus: is missing"),
        (["problem.json", "--slot"], "arguments: ambiguous option|arguments: argument --slots: expected"),
        (["problem.json", "--frobnicate"], "arguments: unrecognized arguments: --frobnicate"),
        (["problem.json", "--gpus", "4y8"], "--gpus: is '4y8', must be like 4x8"),
        (["problem.json", "--gpus", "0x8", "--slots", "3"], "topology.nodes: is 0"),
        (["problem.json", "--gpus", "4x0", "--slots", "3"], "topology.gpus_per_node: is 0"),
        (["problem.json", "--gpus", "4"], "topology: says neither slots nor memory"),
        (["problem.json", "--gpus", "4", "--slots", "-1"], "topology.slots[0]: is -1"),
        (["problem.json", "--gpus", "4", "--memory", "40GB"], "topology.memory: needs the size of an expert"),
        (["problem.json", "--gpus", "4", "--memory", "lots"], "--memory: is 'lots', must be a size such as"),
        (["problem.json", "--topology", "9xH100"], "--topology: '9xH100' is no preset"),
        (["problem.json", "--topology", "8xH100", "--gpus", "4"], "--gpus: cannot be given with --topology"),
        (["problem.json", "--topology", "loads.npy"], "loads.npy: is not JSON"),
        (["problem.json", "--model", "GPT-5"], "model: 'GPT-5' is unknown"),
        (["problem.json", "--model", "Phi-3.5-MoE"], "model: Phi-3.5-MoE has 16 experts per layer"),
        (["problem.json", "--tolerance", "-1"], "objective.balance_tolerance: is -1"),
        (["problem.json", "--time", "0"], "time_limit: is 0"),
        (["problem.json", "--time", "nan"], "time_limit: is nan"),
        (["problem.json", "--seed", "-1"], "seed: is -1"),
        (["problem.json", "--split", "half"], "arguments: argument --split: invalid choice"),
        (["problem.json", "--current", "absent.json"], "absent.json: cannot be read: No such file"),
        (
            ["problem.json", "--current", "problem.json"],
            "problem.json: format: is 'moeless-problem', must be 'moeless-plan'",
        ),
        (["problem.json", "--check", "loads.npy"], "loads.npy: is not JSON"),
        (["problem.json", "-o", "absent/plan.json"], "absent/plan.json: cannot be written: its folder"),
        (["problem.json", "--plot", "absent/x.png"], "absent/x.png: cannot be written: its folder"),
        (["problem.json", "-o", "."], ".: cannot be written: it is a folder"),
        (["loads.npy", "--gpus", "4", "--slots", "3", "--experts", "4"], "loads.npy: has loads of 8 experts"),
        (["problem.json", "--speed", "3=1e-308"], "topology.speed: goes from 1e-308 to 1; the fastest"),
        (["problem.json", "--speed", "3=1e15"], "topology.speed: goes from 1 to 1e+15; the fastest"),
        (
            ["problem.json", "--speed", "1e300"],
            "topology.speed: goes from 1e+300 to 1e+300; must be from 1e-30",
        ),
        (
            ["problem.json", "--current", "p.json", "--max-move-bytes", "1GB"],
            "--max-move-bytes: needs the size of an expert",
        ),
        (["loads.npy"], "--gpus: is missing: loads.npy is a recording and says nothing of the GPUs"),
        (["loads.npy", "--gpus", "4"], "topology: says neither slots nor memory"),
    ],
)
def test_bad_arguments(saved: mo.Problem, capsys: Any, argv: list[str], message: str) -> None:
    np.save("loads.npy", LOAD)
    save_plan(plan_of(saved, contiguous(8, saved.capacity_LG)), "p.json")
    line = refused(capsys, *argv, *(["--quiet"] if argv and "--frobnicate" not in argv else []))
    assert line.startswith(tuple(message.split("|")))


def test_a_lost_gpu_is_in_no_mean(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "--slots", "4", "--lost", "2", "--bound"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["0", f"{sum(LOAD[0]) / 3:.8g}", "mean", "1.0000"]


def test_a_plan_for_other_loads_is_explained_on_these(saved: mo.Problem, capsys: Any) -> None:
    assert main(["problem.json", "--model", "Mixtral-8x7B", "-o", "live.json", "--quiet"]) == 0
    capsys.readouterr()
    np.save("loads.npy", np.array(LOAD)[::-1])
    assert main(["loads.npy", "--gpus", "4", "--slots", "3", "--explain", "live.json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("layer ")
    assert "note: live.json was made for another problem; explained on this one" in err
    few = ["loads.npy", "--gpus", "3", "--slots", "3", "--explain", "live.json", "--quiet"]
    assert main(few) == 2
    assert "live.json: plan: is for 2 layers, 4 GPUs" in capsys.readouterr().err


def test_too_few_slots_are_infeasible(saved: mo.Problem, capsys: Any) -> None:
    line = refused(
        capsys, "problem.json", "--gpus", "3", "--slots", "2", "-o", "plan.json", "--quiet", code=1
    )
    assert line == (
        "infeasible: topology.slots: 8 experts with one replica each need 8 slots per layer, "
        "the GPUs have 6: 2 too few"
    )


def test_plans_of_another_problem(saved: mo.Problem, capsys: Any) -> None:
    other = problem(loads=mo.Loads(load_TLE=np.array(LOAD) + 1))
    save_plan(plan_of(other, contiguous(8, other.capacity_LG)), "other.json")
    few = problem(topology=mo.uniform(1, 3, slots=3))
    save_plan(plan_of(few, contiguous(8, few.capacity_LG)), "few.json")
    assert main(["problem.json", "--current", "few.json", "--quiet"]) == 0  # GPU 3 is new
    many = problem(topology=mo.uniform(1, 5, slots=3))
    save_plan(plan_of(many, contiguous(8, many.capacity_LG)), "many.json")
    line = refused(capsys, "problem.json", "--current", "many.json", "--quiet")
    assert line.startswith(
        "many.json: current: is for 5 GPUs, the problem has 4: say which are gone (such as --"
    )
    assert main(["problem.json", "--current", "many.json", "--gone", "1", "--quiet"]) == 0


def test_a_failed_solve_leaves_the_old_plan(saved: mo.Problem, capsys: Any) -> None:
    Path("plan.json").write_text("old")
    refused(capsys, "problem.json", "--gpus", "1", "--slots", "1", "-o", "plan.json", "--quiet", code=1)
    assert Path("plan.json").read_text() == "old"


def test_a_missing_package_is_exit_3(saved: mo.Problem, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(registry.SOLVERS, "needy", "no_such_package_at_all:Solver")
    line = refused(capsys, "problem.json", "--solver", "needy", "--quiet", code=3)
    assert line.startswith(
        "solver: 'needy' needs a package that is missing: No module named 'no_such_package"
    )
    with pytest.raises(SolverUnavailableError):
        mo.get_solver("needy")
    with pytest.warns(RuntimeWarning, match="needs a package that is missing"):
        (row,) = [row for row in mo.list_solvers() if row.name == "needy"]
    assert "no_such_package" in row.problem
    assert main(["--list-solvers"]) == 0
    assert "needy: cannot be used: solver: 'needy' needs a package" in capsys.readouterr().out


# --- as a process ------------------------------------------------------------------------------------------

ROOT = Path(mo.__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeless_opt.cli", *argv],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )


def test_processes_exit_as_told(saved: mo.Problem) -> None:
    done = run("problem.json", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["format"] == "moeless-plan"
    assert done.stderr.startswith("small: Loads(")
    bad = run("problem.json", "--gpus", "1", "--slots", "2", "--quiet")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("moeless-solve: infeasible: ")
    assert bad.stderr.count("\n") == 1
    assert "Traceback" not in run("absent").stderr


SLOW = """
import sys, time
import moeless_opt.solvers.core.registry as registry
from moeless_opt.cli import main
from moeless_opt.solvers.core.features import Feature
from moeless_opt.solvers.core.finish import Built
from moeless_opt.solvers.core.solver import Heuristic
from moeless_opt.problems.spec.placement import contiguous

class Slow(Heuristic):
    name, summary, features = "slow", "waits to be stopped", frozenset(Feature)

    def build(self, task):
        print("started", flush=True)
        while not task.stop():
            time.sleep(0.01)
        return Built(slots_LGC=contiguous(task.problem.experts, task.problem.capacity_LG))

class Deaf(Slow):
    name, summary, features = "deaf", "never stops", frozenset(Feature)

    def build(self, task):
        print("started", flush=True)
        while True:
            time.sleep(0.01)

registry.SOLVERS["slow"] = "__main__:Slow"
registry.SOLVERS["deaf"] = "__main__:Deaf"
sys.exit(main(sys.argv[1:]))
"""


def slow(*argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_returns_the_best_so_far(saved: mo.Problem, number: int, code: int) -> None:
    process = slow("problem.json", "--solver", "slow", "-o", "plan.json")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "stopping with the best found so far" in err
    assert "interrupted: the best found so far is shown" in err
    assert "worst layers of slow" in out
    mo.verify(saved, mo.load_plan("plan.json"))


def test_a_second_signal_gives_up(saved: mo.Problem) -> None:
    process = slow("problem.json", "--solver", "deaf", "-o", "plan.json")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "moeless-solve: ended by SIGTERM"
    assert not Path("plan.json").exists()


def test_a_time_limit_stops_a_solver(saved: mo.Problem) -> None:
    process = slow("problem.json", "--solver", "slow", "--time", "0.2", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["solvers"][-1]["solver"] == "slow"


def test_problems_on_disk_are_what_was_saved(saved: mo.Problem) -> None:
    assert load_problem("problem.json") == saved


def test_bounds_fronts_and_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flashlb-equal", "--bound", "--json"]) == 0
    bounds = json.loads(capsys.readouterr().out)
    assert bounds["layers"] == [{"layer": 0, "bound": 181.25, "name": "mean"}]
    live, after, moves = tmp_path / "live.json", tmp_path / "after.json", tmp_path / "moves.json"
    assert main(["mixtral-zipf", "-o", str(live), "--quiet"]) == 0
    drifted = ["mixtral-lognormal", "--current", str(live)]
    assert main([*drifted, "--max-moves", "20", "-o", str(after), "--schedule", str(moves), "--quiet"]) == 0
    schedule = json.loads(moves.read_text())
    assert 0 < sum(len(step["transfers"]) for step in schedule["steps"]) <= 20
    assert schedule["seconds"] >= schedule["lower_bound"] > 0
    assert main([*drifted, "--pareto", "moves", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert points[0]["moves"] == 0
    assert points[-1]["imbalance"] < points[0]["imbalance"]
    assert main(["mixtral-lognormal", "--schedule", str(moves)]) == 2
    assert "--schedule: needs a live plan" in capsys.readouterr().err


def test_sizing_redundancy_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phi-zipf", "--sizing", "makespan=1.2", "--json", "--quiet"]) == 0
    few = json.loads(capsys.readouterr().out)["solvers"][-1]
    assert few["imbalance_worst"] <= 1.2 + 1e-6
    assert few["replicas"] < 32 * 24
    wrongs = (("makespan=x", "'x' is no number"), ("slots=3", "takes no value"), ("best", "best"))
    for wrong, message in wrongs:
        assert main(["phi-zipf", "--sizing", wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["mixtral-zipf", "--recommend", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals[0]["spare"] == 0
    assert totals[-1]["imbalance"] < totals[0]["imbalance"]
    assert main(["mixtral-zipf", "--recommend"]) == 0
    shown = capsys.readouterr()
    assert "spent evenly" in shown.out
    assert "moeless-advise" in shown.err
    assert main(["mixtral-zipf", "--recommend", "--slots", "5"]) == 2
    assert "moeless-advise" in capsys.readouterr().err
    model = tmp_path / "layer.mps"
    assert main(["flashlb-equal", "--export", str(model)]) == 0
    assert model.read_text().rstrip().endswith("ENDATA")
    assert main(["flashlb-equal", "--export", str(model), "--layer", "7"]) == 2
    assert "layer: is 7" in capsys.readouterr().err


def test_schedules_name_the_models_own_layers(tmp_path: Path) -> None:
    problem = mo.load_instance("mixtral-zipf")
    loads = mo.Loads(load_TLE=problem.loads.load_TLE[:, :2, ::-1].copy(), layers=(7, 9))
    live = mo.plan(problem.load_LE[:2], problem.topology)
    mo.save_problem(problem.replace(loads=loads, current=live.placement, known=None), tmp_path / "p.json")
    moves = tmp_path / "moves.json"
    assert main([str(tmp_path / "p.json"), "--schedule", str(moves), "--quiet"]) == 0
    steps = json.loads(moves.read_text())["steps"]
    named = {
        one[0] for step in steps for key in ("transfers", "drops_before", "drops_after") for one in step[key]
    }
    assert named == {7, 9}
