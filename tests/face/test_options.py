"""Every option in every mode is read, or refused by name."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.cli.command import run
from moeless_opt.cli.options import MODES, OPTIONS, Option, parser, read_arguments
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io.documents import save_problem
from moeless_opt.problems.io.plans import save_plan
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.signals import Signals
from tests.strategies import plan_of

LOAD = np.array([[60.0, 56.0, 12.0, 12.0, 2.0, 1.0, 1.0, 1.0], [5.0, 1.0, 9.0, 4.0, 3.0, 3.0, 8.0, 7.0]])

CALLS: dict[str, list[str]] = {
    "solve": [],
    "compare": ["--compare", "static,auto"],
    "check": ["--check", "plan.json"],
    "explain": ["--explain"],
    "bound": ["--bound"],
    "pareto": ["--pareto", "memory"],
    "after-loss": ["--after-loss", "3", "--current", "live.json"],
    "drain": ["--drain", "3", "--current", "live.json"],
    "recommend": ["--recommend"],
    "export": ["--export", "layer.lp"],
    "list-solvers": ["--list-solvers"],
    "list-instances": ["--list-instances"],
}
"""How each mode is called."""

VALUES: dict[str, list[str]] = {
    "output": ["out.json"],
    "engine": ["vllm"],
    "plan": ["ours.json"],
    "solver": ["construct"],
    "time": ["20"],
    "seed": ["1"],
    "layer": ["1"],
    "schedule": ["moves.json"],
    "plot": ["picture.png"],
    "worst": ["1"],
    "gpus": ["4"],
    "slots": ["3"],
    "memory": ["5GB"],
    "reserve": ["1GB"],
    "topology": ["gpus.json"],
    "speed": ["1,1,1,1"],
    "lost": ["3"],
    "model": ["Mixtral-8x7B"],
    "split": ["equal"],
    "fill": ["copies"],
    "share_entries": ["16"],
    "current": ["live.json"],
    "live_gpus": ["4"],
    "gone": ["3"],
    "model_layers": ["2"],
    "sizing": ["slots"],
    "spread": ["1"],
    "spread_experts": ["2"],
    "failures": ["1"],
    "max_moves": ["100"],
    "max_move_bytes": ["900GB"],
    "tolerance": ["0.1"],
    "priorities": ["balance,traffic"],
    "failure_rate": ["0.02"],
    "costs": ["gpu=0.5,node=1"],
    "sources": ["sources.npy"],
    "flow": ["flow.npy"],
    "groups": ["4"],
    "traffic": ["nodes"],
    "scenario": ["0"],
    "also": ["table.npy"],
    "weights": ["1,2"],
    "risk": ["worst"],
    "key": ["a"],
    "steps": ["keep"],
    "experts": ["8"],
    "as": ["counts"],
    "map": ["map.json"],
}
"""A value of each option."""

NEEDS: dict[str, list[str]] = {
    "schedule": ["--current", "live.json"],
    "engine": ["--output", "out.json"],
    "plan": ["--output", "out.json", "--engine", "vllm"],
    "live_gpus": ["--current", "live.json"],
    "gone": ["--current", "live.json"],
    "model_layers": ["--current", "live.json"],
    "repair": ["--current", "live.json"],
    "tolerance": ["--current", "live.json"],
    "max_moves": ["--current", "live.json"],
    "max_move_bytes": ["--current", "live.json", "--model", "Mixtral-8x7B"],
    "failure_rate": ["--priorities", "survival,balance"],
    "memory": ["--model", "Mixtral-8x7B"],
    "spread_experts": ["--spread", "1"],
    "reserve": ["--memory", "9GB", "--model", "Mixtral-8x7B"],
    "weights": ["--also", "table.npy"],
    "risk": ["--also", "table.npy"],
    "flow": ["--priorities", "balance,hops"],
}
"""What else it takes for the option to mean something."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """Loads, a plan for them, a live one and GPUs."""
    monkeypatch.chdir(tmp_path)
    np.savez("loads.npz", a=LOAD, b=LOAD[:, ::-1])
    np.save("table.npy", LOAD)
    Path("busy.csv").write_text("layer,expert,count\n0,0,5\n0,6,3\n")
    Path("map.json").write_text('{"physical_to_logical_map": [0, 1, 2, 3, 4, 5, 6, 7, 0]}')
    Path("slots.json").write_text(
        '{"physical_count": [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]]}'
    )
    problem = mo.Problem(loads=mo.Loads(load_TLE=LOAD), topology=mo.uniform(1, 4, slots=3), name="small")
    save_problem(problem, "problem.json")
    save_plan(plan_of(problem, contiguous(8, problem.capacity_LG)), "live.json")
    save_plan(plan_of(problem, contiguous(8, problem.capacity_LG)), "plan.json")
    np.save("sources.npy", np.stack([LOAD / 4] * 4))
    np.save("flow.npy", np.ones((1, 8, 8)))
    Path("gpus.json").write_text('{"gpus_per_node": 4, "slots": 3}')
    return tmp_path


class Watched(argparse.Namespace):
    """Arguments that note which of them were read."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


def call(mode: str, option: Option) -> list[str]:
    """A call of the mode with the option."""
    argv = [*CALLS[mode], option.flags[0], *VALUES.get(option.dest, [])]
    for extra in range(0, len(NEEDS.get(option.dest, [])), 2):
        flag, value = NEEDS[option.dest][extra : extra + 2]
        if mode in next(one for one in OPTIONS if one.flags[0] == flag).modes:
            argv += [flag, value]
    if mode in ("list-solvers", "list-instances"):
        return argv
    if option.dest in ("key", "scenario", "steps", "as", "also", "weights") or "--also" in argv:
        gpus = ["--gpus", "4", *([] if mode == "recommend" else ["--slots", "3"])]
        loads = ["loads.npz"] if option.dest == "key" else ["table.npy"]
        return [*loads, *argv, *gpus]
    if option.dest == "map":
        return ["slots.json", *argv, "--gpus", "4", *([] if mode == "recommend" else ["--slots", "3"])]
    if option.dest == "experts":
        return ["busy.csv", *argv, "--gpus", "4", *([] if mode == "recommend" else ["--slots", "3"])]
    if option.dest == "gpus" and mode != "recommend":
        argv += ["--slots", "3"]
    return ["problem.json", *argv]


def test_every_mode_and_option_is_here() -> None:
    assert CALLS.keys() == MODES.keys()
    flags = {option.dest for option in OPTIONS if option.form.get("action") == "store_true"}
    assert VALUES.keys() | flags == {option.dest for option in OPTIONS}
    known = {action.dest for action in parser()._actions}
    modes = {flag.removeprefix("--").replace("-", "_") for flag in MODES.values() if flag}
    assert known == {option.dest for option in OPTIONS} | modes | {"problem", "help", "version"}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda one: one.dest)
@pytest.mark.parametrize("mode", MODES)
def test_an_option_is_read_or_refused(folder: Path, capsys: Any, mode: str, option: Option) -> None:
    argv = call(mode, option)
    if mode not in option.modes:
        with pytest.raises(ProblemError) as refusal:
            read_arguments(argv)
        assert refusal.value.where == option.flags[0]
        assert str(refusal.value).startswith(f"{option.flags[0]}: is not read ")
        assert main(argv) == 2
        return
    args = read_arguments(argv, Watched())
    vars(args)["_read"] = set()
    # Read all the same where it makes another problem of it, for which the plan is none.
    recorded = ("key", "scenario", "steps", "experts", "also", "weights", "risk")
    other = mode == "check" and option.dest in ("gpus", "topology", *recorded)
    other |= mode == "export" and option.dest in ("also", "weights")  # a model of several scenarios
    other |= option.dest == "fill" and mode in ("pareto", "export")  # full slots trade no memory
    other |= option.dest == "flow" and mode == "pareto"  # of moves
    other |= option.dest == "share_entries" and mode == "export"  # the model's shares are free
    with suppress(ProblemError, mo.UnsupportedFeatureError) if other else nullcontext():
        run(args, Signals())
    assert option.dest in vars(args)["_read"], argv


@pytest.mark.parametrize("first", [mode for mode in MODES if mode != "solve"])
@pytest.mark.parametrize("second", [mode for mode in MODES if mode != "solve"])
def test_modes_refuse_each_other(first: str, second: str) -> None:
    if first != second:
        with pytest.raises(ProblemError, match=r"cannot be given with --.*: one at a time"):
            read_arguments(["problem.json", *CALLS[first], *CALLS[second]])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["problem.json", "--worst", "-1"], "--worst: is -1, must be a whole number of at least 0"),
        (["problem.json", "--compare", ""], "--compare: is '', must name solvers"),
        (
            ["problem.json", "--compare", "auto,,eplb"],
            "--compare: is 'auto,,eplb': a name between two commas",
        ),
        (["problem.json", "--gone", "3"], "--gone: is about a live placement: give --current"),
        (["problem.json", "--live-gpus", "3"], "--live-gpus: is about a live placement: give --current"),
        (["problem.json", "--engine", "vllm"], "--engine: needs a file to write: give --output FILE"),
        (["problem.json", "--plan", "x.json"], "--plan: is for --engine; without one"),
        (["problem.json", "--model-layers", "2"], "--model-layers: is for engines' files"),
        (
            ["problem.json", "--engine", "sglang", "-o", "x.json"],
            "model-layers: is missing: 2 layers are numbered from 0",
        ),
        (
            ["problem.json", "--engine", "vllm", "-o", "x.json", "--model-layers", "2"],
            "--model-layers: is of no use for vllm",
        ),
        (["problem.json", "--engine", "vllm", "-o", "x.yaml"], "x.yaml: must end in .json"),
        (
            ["problem.json", "--engine", "vllm", "-o", "x.json", "--slots", "3,1=4"],
            "--engine: vllm needs as many slots on every GPU, they are 3 to 4: give --slots C",
        ),
        (
            ["problem.json", "--engine", "eplb", "-o", "x.npz", "--fill", "none"],
            "--fill: is none, and eplb needs",
        ),
        (
            ["problem.json", "--engine", "ascend", "-o", "x.json", "--fill", "copies"],
            "--fill: is copies, and vllm-asc",
        ),
        (
            ["problem.json", "--engine", "vllm", "-o", "x.json", "--plan", "x.json"],
            "x.json: is written by --output; --plan needs another name",
        ),
        (["problem.json", "--repair"], "--repair: needs a live plan to mend"),
        (
            ["problem.json", "--tolerance", "0.1"],
            "--tolerance: gives balance up for fewer moves, and nothing",
        ),
        (["problem.json", "--max-moves", "3"], "--max-moves: needs a live plan to move from"),
        (["problem.json", "--max-move-bytes", "3GB"], "--max-move-bytes: needs a live plan to move from"),
        (["problem.json", "--steps", "sum"], "--steps: is for recordings; problem.json is a problem"),
        (["flashlb-equal", "--key", "x"], "--key: is for recordings; flashlb-equal is a shipped instance"),
        (["problem.json", "--scenario", "0"], "--scenario: is for recordings"),
        (["problem.json", "--also", "table.npy"], "--also: is for recordings; problem.json is a problem"),
        (
            ["table.npy", "--gpus", "4", "--slots", "3", "--also", "busy.csv"],
            "busy.csv: has layers 0 of 7 experts, table.npy has 0-1 of 8",
        ),
        (["table.npy", "--gpus", "4", "--slots", "3", "--weights", "1,2"], "--weights: are those of several"),
        (
            ["table.npy", "--gpus", "4", "--slots", "3", "--also", "table.npy", "--weights", "1"],
            "--weights: has 1 numbers, there are 2 workloads",
        ),
        (["problem.json", "--risk", "bold"], "objective.risk: is 'bold', must be one of"),
        (["problem.json", "--risk", "worst=2"], "objective.risk: is 'worst=2': 'worst' takes no value"),
        (["problem.json", "--risk", "worst"], "--risk: is worst, and the loads are of one scenario"),
        (["problem.json", "--risk", "covariance=-1"], "objective.sigma: is -1.0, must be"),
        (["problem.json", "--flow", "flow.npy"], "--flow: is for the priority hops, which is not asked for"),
        (["problem.json", "--risk", "sigma=x"], "objective.risk: is 'sigma=x': 'x' is no number"),
        (["table.npy", "--gpus", "4", "--slots", "3", "--scenario", "99"], "table.npy: "),
        (
            ["problem.json", "--compare", "oracle", "-o", "x.json"],
            "--output: needs a plan; 'oracle'",
        ),
        (
            ["problem.json", "-o", "x.json", "--schedule", "x.json", "--current", "live.json"],
            "x.json: is written by --output; --schedule needs another",
        ),
        (["problem.json", "--list-solvers"], "problem: is not read with --list-solvers"),
        (["problem.json", "--lost", "9"], "--lost: names GPU 9, the last one is 3"),
        (["problem.json", "--lost", "0-3"], "--lost: names all GPUs"),
        (["problem.json", "--lost", "two"], "--lost: has 'two', must be GPUs such as 3,17"),
        (["problem.json", "--lost", "3-1"], "--lost: has 3-1, must go from the smaller"),
        (
            ["problem.json", "--speed", "1,2"],
            "--speed: has 2 values, must be one for all",
        ),
        (["problem.json", "--speed", "3=fast"], "--speed: has 'fast', must be numbers"),
        (["problem.json", "--speed", "3=0"], "topology.speed[3]: is 0"),
        (["problem.json", "--slots", "2.5"], "topology.slots: must hold whole numbers"),
        (["problem.json", "--reserve", "20GiB"], "--reserve: needs the memory of the GPUs to take it from"),
        (
            ["problem.json", "--memory", "9GB", "--reserve", "9GB", "--model", "Mixtral-8x7B"],
            "--reserve: is 9 GB, the GPUs have 9 GB: none is left",
        ),
        (
            ["problem.json", "--memory", "9XB"],
            "--memory: is '9XB', must be a size such as 40GB",
        ),
        (["problem.json", "--pareto", "memory", "--time", "0"], "--time: is 0.0, must be above 0"),
        (["problem.json", "--recommend", "--time", "-1"], "--time: is -1.0, must be above 0"),
    ],
)
def test_what_means_nothing_is_refused(folder: Path, capsys: Any, argv: list[str], message: str) -> None:
    before = sorted(Path.cwd().rglob("*"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"moeless-solve: {message}"), err
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64G", 64 * 10**9),
        ("80GB", 80 * 10**9),
        ("20GiB", 20 * 2**30),
        ("20gi", 20 * 2**30),
        ("1.5 TB", 15 * 10**11),
        ("512", 512),
        ("7kb", 7000),
        (".5MiB", 2**19),
    ],
)
def test_sizes(text: str, count: int) -> None:
    from moeless_opt.cli.units import size

    assert size(text, "--memory") == count


def test_an_oracle_alone_is_a_row(folder: Path, capsys: Any) -> None:
    assert main(["problem.json", "--compare", "oracle"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("oracle")


def test_dead_gpus_hold_nothing_and_keep_their_numbers(folder: Path) -> None:
    assert main(["problem.json", "--lost", "1", "-o", "out.json", "--quiet"]) == 0
    plan = mo.load_plan("out.json")
    assert plan.slots_LGC.shape[1] == 4
    assert (plan.slots_LGC[:, 1] == -1).all()
    assert (plan.slots_LGC[:, [0, 2, 3]] >= 0).any(2).all()


def test_speeds_and_slots_of_single_gpus(folder: Path) -> None:
    argv = ["problem.json", "--slots", "3,1=2,3=4", "--speed", "0=2", "-o", "out.json", "--quiet"]
    assert main(argv) == 0
    plan = mo.load_plan("out.json")
    assert (plan.slots_LGC >= 0).sum(2).max(0).tolist() <= [3, 2, 3, 4]
    tokens_LG = plan.time_LG * np.array([2.0, 1, 1, 1])
    np.testing.assert_allclose(tokens_LG.sum(1), LOAD.sum(1))


def test_memory_less_its_reserve(folder: Path) -> None:
    one = mo.model_preset("Mixtral-8x7B").expert_bytes
    model = ["--model", "Mixtral-8x7B", "-o", "out.json", "--quiet", "--gpus", "4"]
    room = [f"--memory={8 * one}", f"--reserve={2 * one}"]
    assert main(["problem.json", *model, *room]) == 0
    assert mo.load_plan("out.json").slots_LGC.shape[2] == 3
    assert main(["problem.json", *model[:-2], "--topology", "8xH100", "--reserve", "70GiB"]) == 0
    assert (mo.load_plan("out.json").slots_LGC >= 0).sum((0, 2)).max() <= (80e9 - 70 * 2**30) / one


@pytest.mark.parametrize("lost", ["2", "0-1"])
def test_a_live_plan_loses_gpus(folder: Path, capsys: Any, lost: str) -> None:
    argv = ["problem.json", "--current", "live.json", "--lost", lost, "--slots", "5", "-o", "out.json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "live replicas are lost or dropped" in err
    assert [line.split()[0] for line in out.splitlines()[2:3]] == ["auto"]
    plan, live = mo.load_plan("out.json"), mo.load_plan("live.json")
    gone = [int(lost)] if lost == "2" else [0, 1]
    assert (plan.slots_LGC[:, gone] == -1).all()
    assert not plan.moves.cold
    assert plan.moves.count >= (live.slots_LGC[:, gone] >= 0).sum()


def test_repair_of_a_plan_that_breaks_every_rule(folder: Path, capsys: Any) -> None:
    document = json.loads(Path("live.json").read_text())
    assert document["slots"][0][0][:2] == [0, 1]
    document["slots"][0][0][:2] = [1, 1]  # expert 0 is nowhere
    Path("broken.json").write_text(json.dumps(document))
    assert main(["problem.json", "--current", "broken.json", "--quiet"]) == 2
    assert "expert 0 has no replica" in capsys.readouterr().err
    assert main(["problem.json", "--current", "broken.json", "--repair", "-o", "out.json"]) == 0
    assert "1 experts are left without a replica" in capsys.readouterr().err
    assert (mo.load_plan("out.json").replicas_LE >= 1).all()


@pytest.mark.parametrize("gpus", [3, 6])
def test_repair_of_a_plan_for_other_gpus(folder: Path, capsys: Any, gpus: int) -> None:
    argv = ["problem.json", "--gpus", str(gpus), "--slots", "4", "--current", "live.json", "-o", "out.json"]
    assert main(argv) == (2 if gpus < 4 else 0)
    told = (
        "say which are gone (such as --gone 3)" if gpus < 4 else "is for 4 GPUs; GPUs 4-5 are new and empty"
    )
    assert told in capsys.readouterr().err
    assert main([*argv, "--repair"]) == 0
    told = "is for 4 GPUs, taken as the first 3" if gpus < 4 else "GPUs 4-5 are new and empty"
    assert told in capsys.readouterr().err
    assert mo.load_plan("out.json").slots_LGC.shape[1] == gpus


def test_a_live_plan_is_judged_on_other_loads(folder: Path, capsys: Any) -> None:
    np.save("today.npy", LOAD[::-1])
    argv = ["today.npy", "--gpus", "4", "--slots", "3", "--check", "plan.json"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("valid as a placement; made for another problem")
    assert main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["valid"]
    assert not answer["same_problem"]
    worth = answer["on_these_loads"]
    assert worth["best_shares"]["balance"] <= worth["its_own_shares"]["balance"]
    assert worth["its_own_shares"]["balance"] >= worth["its_own_shares"]["lower_bound"] > 0
    own = mo.load_plan("plan.json")
    tokens_LG = np.einsum("lge,le->lg", own.share_LGE, LOAD[::-1])
    assert worth["its_own_shares"]["balance"] == pytest.approx(tokens_LG.max(1).sum())
    assert main(["today.npy", "--gpus", "3", "--slots", "3", "--check", "plan.json"]) == 2
    assert "plan: is for 2 layers, 4 GPUs and 8 experts" in capsys.readouterr().err
    assert main(["today.npy", "--gpus", "4", "--slots", "3", "--lost", "0", "--check", "plan.json"]) == 1
    assert (
        "plan.json: layer 0: GPU 0 holds more replicas than fit: 2, it has room for 0"
        in capsys.readouterr().err
    )
