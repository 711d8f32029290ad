"""JSON and .npz: round trips, refusals with the place, whole files or none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import FormatError, MoelessError, ProblemError
from moeless_opt.problems.io.documents import load_problem, problem_from_json, problem_to_json, save_problem
from moeless_opt.problems.io.files import read_json
from moeless_opt.problems.io.plans import load_plan, plan_from_json, plan_to_json, save_plan
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.verify import violations
from moeless_opt.problems.spec.architecture import MODEL_PRESETS
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.problem import Known, Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import uniform
from tests.strategies import few, plan_of, planned, problems


@few
@given(problems())
def test_problems_round_trip(problem: Problem) -> None:
    twin = problem_from_json(json.loads(json.dumps(problem_to_json(problem), allow_nan=False)))
    assert twin == problem
    assert twin.digest() == problem.digest()


@few
@given(planned())
def test_plans_round_trip(drawn: Any) -> None:
    problem, plan = drawn
    twin = plan_from_json(json.loads(json.dumps(plan_to_json(plan), allow_nan=False)))
    assert twin == plan
    assert violations(problem, twin) == []


@pytest.mark.parametrize("suffix", [".json", ".npz", ".JSON", ".Npz", ""])
def test_plans_round_trip_through_files(tmp_path: Path, suffix: str) -> None:
    problem, plan = small()
    path = tmp_path / f"plan{suffix}"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert load_plan(os.fspath(path)) == plan
    assert not load_plan(path).slots_LGC.flags.writeable
    assert violations(problem, load_plan(path)) == []
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_part_round_trips(tmp_path: Path) -> None:
    problem, _ = small()
    full = problem.replace(
        model=MODEL_PRESETS["Mixtral-8x7B"].replace(experts=3),
        time=TimeModel(curve_tokens=[0, 9], curve_activated=[0, 4], curve_time=[[1, 2], [3, 5]], unit="s"),
        known=Known(source="me", best_L=(1.5,), bound_L=(1.25,)),
        name="full",
    )
    path = tmp_path / "p.json"
    save_problem(full, path)
    assert load_problem(path) == full
    assert load_problem(path).digest() == full.digest()


def small() -> tuple[Problem, Plan]:
    problem = Problem(loads=Loads(load_TLE=[[3.0, 2.0, 1.0]]), topology=uniform(1, 2, slots=2), name="small")
    return problem, plan_of(problem, np.array([[[0, 1], [2, 0]]], dtype=np.int32))


def document() -> dict[str, Any]:
    return {
        "format": "moeless-problem",
        "version": 1,
        "loads": {"kind": "inline", "load": [[3, 2, 1]]},
        "topology": {"kind": "uniform", "nodes": 1, "gpus_per_node": 2, "slots": 2},
    }


def edited(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one entry set, or removed by `...`."""
    base = json.loads(json.dumps(base))
    *parents, last = path.split(".")
    entry = base
    for key in parents:
        entry = entry.setdefault(key, {})
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return base


BAD_PROBLEMS = [
    ("format", ..., "document: 'format' is missing"),
    ("format", "moeless-plan", "format: is 'moeless-plan', must be 'moeless-problem'"),
    ("version", 2, "version: is 2, this release reads version 1"),
    ("version", True, "version: must be a whole number, got true or false"),
    ("version", 1.5, "version: must be a whole number, got a number"),
    ("loads", ..., "document: 'loads' is missing"),
    ("loads", [[1]], "loads: must be an object, got a list"),
    ("loads.kind", "csv", "loads.kind: is 'csv', must be 'inline', 'npz'"),
    ("loads.load", ..., "loads: 'load' is missing"),
    ("loads.load", "many", "loads.load: must be a list, got a string"),
    ("loads.load", [[1, -2]], "loads.load[0][1]: is -2.0, must be finite and at least 0"),
    ("loads.load", [[1, 2], [3]], "loads: not an array of numbers"),
    ("loads.load", [[1, 1e999]], "loads.load[0][1]: is inf"),
    ("loads.load", [[1, None]], "loads: must hold numbers"),
    ("loads.load", [], "loads: has shape (0,)"),
    ("loads.weight", [1], "loads.weight: unknown key; did you mean 'weights'?"),
    ("loads.layers", [0.5], "loads.layers: must hold whole numbers"),
    ("loads.layers", [[1]], "loads.layers"),
    ("loads.skipped", 5, "loads.skipped: must be a list, got a whole number"),
    ("topolgy", {}, "topolgy: unknown key; did you mean 'topology'?"),
    ("topology", ..., "document: 'topology' is missing"),
    ("topology.gpus_per_node", 0, "topology.gpus_per_node: is 0"),
    ("topology.slots", -1, "topology.slots[0]: is -1"),
    ("topology.slots", 10**30, "topology.slots"),
    ("topology.slots", "9", "topology.slots: must be a whole number or a list, got a string"),
    ("topology.nodes", 10**12, "topology.gpus: are 2000000000000"),
    ("split", "half", "split: is 'half', must be"),
    ("split", 3, "split: must be a string, got a whole number"),
    ("share_entries", 0, "share_entries: is 0, must be a whole number from 1 to 65536"),
    ("share_entries", "8", "share_entries: must be a whole number or null, got a string"),
    ("model", "GPT-5", "model: 'GPT-5' is unknown"),
    ("model", {"name": "m"}, "model: cannot be read"),
    ("model", {"nam": "m"}, "model.nam: unknown key; did you mean 'name'?"),
    ("model", 5, "model: must be a string or an object"),
    ("expert_bytes", 0, "expert_bytes: is 0, must be at least 1"),
    ("expert_bytes", [1, 2], "expert_bytes: has shape (2,)"),
    ("sizing", {"policy": "all"}, "sizing.policy: is 'all'"),
    ("sizing", {"cv": None}, "sizing.cv: is None"),
    ("objective", {"tolerance": 1}, "objective.tolerance: unknown key; did you mean 'balance_tolerance'?"),
    ("objective", {"priorities": "balance"}, "objective.priorities: is 'balance'"),
    ("limits", {"max_moves": -1}, "limits.max_moves: is -1"),
    ("limits", {"pinned": [[0, 0]]}, "limits.pinned[0]: is [0, 0]"),
    ("limits", {"pinned": [[0, 9, 0]]}, "limits.pinned[0]: names expert 9, the last one is 2"),
    ("limits", [], "limits: must be an object, got a list"),
    ("time", {"kind": "cubic"}, "time.kind: is 'cubic', must be 'linear' or 'curve'"),
    ("time", {"kind": "curve"}, "time: 'curve_tokens' is missing"),
    ("time", {"launch": "slow"}, "time.launch: is 'slow'"),
    ("time", {"kind": "linear", "curve_time": []}, "time.curve_time: unknown key"),
    ("current", {"slots": [[[0, 1], [0, -1]]]}, "current.slots[0]: expert 2 has no replica"),
    (
        "current",
        {"slots": [[[0, 1, 2], [0, -1, -1]]]},
        "current[0][0]: holds 3 replicas of layer 0, GPU 0 has room for 2",
    ),
    ("current", {"kind": "file"}, "current.kind: is 'file', must be 'inline' or 'plan'"),
    ("current", {"kind": "plan", "path": "absent.json"}, "current.path: absent.json: cannot be read"),
    ("known", {"best": [1]}, "known: 'source' is missing"),
    ("known", {"source": "me", "best": [-1]}, "known.best[0]: is -1.0"),
    ("name", 5, "name: must be a string, got a whole number"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_PROBLEMS)
def test_malformed_problems_are_refused_with_the_place(path: str, value: Any, message: str) -> None:
    problem_from_json(document())
    with pytest.raises(ProblemError) as caught:
        problem_from_json(edited(document(), path, value))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [None, 5, "text", [1], True])
def test_a_document_must_be_an_object(value: Any) -> None:
    for read in (problem_from_json, plan_from_json):
        with pytest.raises(FormatError, match="document: must be an object, got"):
            read(value)


BAD_PLANS = [
    ("format", "moeless-problem", "format: is 'moeless-problem', must be 'moeless-plan'"),
    ("version", 0, "version: is 0, this release reads version 1"),
    ("experts", ..., "document: 'experts' is missing"),
    ("experts", 10**12, "experts: is 1000000000000"),
    ("experts", 0, "experts: is 0"),
    ("slots", [[[0, 1], [2, 5]]], "slots[0][1][1]: is 5, must be from -1 to 2"),
    ("slots", [[[0, 1], [1, -1]]], "slots[0]: expert 2 has no replica"),
    ("slots", [[[0, 1], [2]]], "slots: not an array"),
    ("slots", "none", "slots: must hold numbers"),
    ("shares", [[[1.0, 1.0]]], "shares: has shape (1, 1, 2), must be (1, 2, 2)"),
    ("shares", [[[-1.0, 1.0], [1.0, 0.0]]], "shares[0][0][0]: is -1.0"),
    ("times", [[1.0]], "times: has shape (1, 1), must be (1, 2)"),
    ("imbalance", [1.0, 1.0], "imbalance: has shape (2,), must be (1,)"),
    ("layers", [0, 1], "layers: has shape (2,), must be (1,)"),
    ("layers", [-1], "layers[0]: is -1"),
    ("split", "half", "split: is 'half', must be one of ('fractional', 'equal', 'nearest')"),
    ("share_entries", 70000, "share_entries: is 70000, must be a whole number from 1 to 65536"),
    ("moves.by_layer", [1, 2], "moves.by_layer: has shape (2,)"),
    ("moves.count", 1.5, "moves.count: must be a whole number, got a number"),
    ("moves.cold", 1, "moves.cold: must be true or false, got a whole number"),
    ("moves.fraction", 1e999, "moves.fraction: is inf"),
    ("moves.cost", 1, "moves.cost: unknown key; did you mean 'count'?"),
    ("certificate.value", [1.0, 2.0], "certificate.value: has shape (2,)"),
    ("certificate.bound", [], "certificate.bound: has shape (0,)"),
    ("certificate.seconds", -1, "certificate.seconds: is -1"),
    ("certificate.lower", [1], "certificate.lower: unknown key; did you mean 'lower_bound'?"),
    ("certificate", ..., "document: 'certificate' is missing"),
    ("slotz", 1, "slotz: unknown key; did you mean 'slots'?"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_PLANS)
def test_malformed_plans_are_refused_with_the_place(path: str, value: Any, message: str) -> None:
    good = plan_to_json(small()[1])
    with pytest.raises(ProblemError) as caught:
        plan_from_json(edited(good, path, value))
    assert str(caught.value).startswith(message)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b'{"format": "moeless-pro', "is not JSON: Unterminated string"),
        (b'{"a": 1,}', "is not JSON"),
        (b"\x80\x04\x95", "is not JSON: not even UTF-8 text"),
        (b"\x00\x01\x02", "is not JSON"),
        (b'{"loads": [NaN]}', "holds NaN, which is no JSON number"),
        (b'{"loads": [-Infinity]}', "holds -Infinity, which is no JSON number"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number that cannot be read"),
        (b'{"a": {"b": 1, "b": 2}}', "has the key 'b' twice in one object"),
    ],
)
def test_files_that_are_no_documents(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for read in (read_json, load_problem, load_plan):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document()).encode())
    assert load_problem(path).experts == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(FormatError, match=f"cannot be read: {reason}"):
            read_json(path)
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        load_plan(tmp_path / "absent.npz")


def test_too_large_a_document_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.write(b'{"format": "moeless-problem"')
        file.truncate(2**30)  # sparse: no gigabyte is written
    with pytest.raises(FormatError, match=r"big\.json: has 1.07 GB, more than the limit of 256 MB"):
        load_problem(path)
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(FormatError, match=r"big\.json: is JSON of 67.1 MB; up to 64 MB are read: keep large"):
        read_json(path)


def test_every_truncation_of_a_plan_is_refused(tmp_path: Path) -> None:
    _, plan = small()
    for name in ("plan.json", "plan.npz"):
        save_plan(plan, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole) - 1, max(1, len(whole) // 40)):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(FormatError, match=name):
                load_plan(tmp_path / name)


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    save_plan(small()[1], path)
    arrays = dict(np.load(path))

    def damaged(**changes: Any) -> None:
        left = {key: value for key, value in (arrays | changes).items() if value is not None}
        np.savez(path, **left)

    damaged(document=None)
    with pytest.raises(FormatError, match=r"is no plan: it holds \['imbalance'"):
        load_plan(path)
    damaged(shares=None)
    with pytest.raises(FormatError, match=r"is no plan archive: .*shares"):
        load_plan(path)
    damaged(slots=arrays["slots"][:, :1])
    with pytest.raises(ProblemError, match="slots: has 2 slots per layer, 3 experts need one each"):
        load_plan(path)
    damaged(document=np.frombuffer(b"[1, 2]", np.uint8))
    with pytest.raises(FormatError, match=r"plan\.npz: document: must be an object, got a list"):
        load_plan(path)
    np.savez(path, document=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"plan\.npz: is no .npz archive: Object arrays"):
        load_plan(path)
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(FormatError, match=r"plan\.npz: is a truncated or damaged zip archive"):
        load_plan(path)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MOELESS_MAX_READ", "1M")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("load.npy", b"\0" * (2 * 10**6))
    path = tmp_path / "bomb.npz"
    path.write_bytes(buffer.getvalue())
    assert path.stat().st_size < 10**5
    with pytest.raises(FormatError, match=r"bomb\.npz: unpacks to 2 MB; up to 1 MB are read"):
        load_plan(path)
    with pytest.raises(FormatError, match=r"unpacks to 2 MB"):
        problem_from_json(with_npz(path), folder=tmp_path)


# --- arrays beside the document ----------------------------------------------------------------------------


def with_npz(path: Path, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return edited(
        document(), "loads", {"kind": "npz", "path": path.name, "key": "load", "sha256": digest} | changes
    )


def test_loads_beside_the_document(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    np.savez_compressed(path, load=[[3.0, 2.0, 1.0]], other=[1])
    (tmp_path / "p.json").write_text(json.dumps(with_npz(path)))
    assert load_problem(tmp_path / "p.json").digest() == problem_from_json(document()).digest()
    with pytest.raises(FormatError, match=r"loads\.sha256: .*has hash .*the problem names 000000000000"):
        problem_from_json(with_npz(path, sha256="0" * 64), folder=tmp_path)
    with pytest.raises(FormatError, match=r"loads\.key: .*no array 'laod'; it has \['load', 'other'\]"):
        problem_from_json(with_npz(path, key="laod"), folder=tmp_path)
    with pytest.raises(FormatError, match=r"loads\.path: .*cannot be read: No such file"):
        problem_from_json(with_npz(path), folder=tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"loads: 'sha256' is missing"):
        problem_from_json(edited(with_npz(path), "loads.sha256", ...), folder=tmp_path)
    for content in (b"", b"PK\x03\x04", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"loads\.path: .*is (a truncated|no .npz)"):
            problem_from_json(with_npz(path), folder=tmp_path)
    np.savez(path, load=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"loads\.path: .*is no \.npz archive"):
        problem_from_json(with_npz(path), folder=tmp_path)


def test_loads_from_a_recording(tmp_path: Path) -> None:
    np.savez(tmp_path / "counts.npz", chat=[[1, 2, 3]], code=[[3, 2, 1]])
    recorded = {"kind": "recording", "path": "counts.npz", "key": "*", "scenario": "code"}
    problem = problem_from_json(edited(document(), "loads", recorded), folder=tmp_path)
    assert problem.load_LE.tolist() == [[3, 2, 1]]
    with pytest.raises(FormatError, match=r"loads\.scenarios: unknown key; did you mean 'scenario'"):
        problem_from_json(edited(document(), "loads", recorded | {"scenarios": "code"}), folder=tmp_path)


def test_a_live_plan_from_a_file(tmp_path: Path) -> None:
    problem, plan = small()
    save_plan(plan, tmp_path / "plan.npz")
    live = {"kind": "plan", "path": "plan.npz"}
    loaded = problem_from_json(edited(document(), "current", live), folder=tmp_path)
    assert loaded.current == plan.placement
    assert loaded == problem.replace(current=plan.placement, name="", topology=loaded.topology)


# --- writing -----------------------------------------------------------------------------------------------


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    _, plan = small()
    with pytest.raises(FormatError, match=r"absent/plan\.json: cannot be written: its folder does not exist"):
        save_plan(plan, tmp_path / "absent" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match="folder: cannot be written"):
        save_plan(plan, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_all_errors_have_one_line() -> None:
    for path, value, _ in BAD_PROBLEMS:
        with pytest.raises(MoelessError) as caught:
            problem_from_json(edited(document(), path, value))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


# --- anything else -----------------------------------------------------------------------------------------

STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 5000, 1e999, float("nan"), 10**30, -(10**30), 2**63, 2**31, 1e30,
    "", "x", "\ud800", [], [[]], [[[]]], {}, {"a": 1}, [None], ["x"], [1, [2]], [True], [[1e308]],
]  # fmt: skip


def whole_documents() -> dict[str, dict[str, Any]]:
    """Documents that use every key."""
    full = document() | {
        "name": "x",
        "loads": {
            "kind": "inline",
            "load": [[3, 2, 1], [1, 2, 3]],
            "weights": [1],
            "layers": [3, 4],
            "scenarios": ["a"],
            "skipped": [0],
            "by_node": [[[3, 2, 1]], [[1, 2, 3]]],
            "source": "s",
            "notes": ["n"],
        },
        "topology": {
            "kind": "explicit",
            "gpus": [
                {"node": 0, "speed": 1, "slots": 2, "memory": 100, "domain": 0},
                {"node": 0, "speed": 1, "slots": 2, "memory": 100, "domain": 1},
            ],
            "links": {"host": 1},
        },
        "model": {"name": "m", "layers": 2, "experts": 3, "top_k": 1, "hidden": 1, "ffn": 1},
        "expert_bytes": [10, 10],
        "current": {"kind": "inline", "slots": [[[0, 1], [2, -1]], [[0, 1], [2, -1]]]},
        "time": {
            "kind": "curve",
            "curve_tokens": [0, 1],
            "curve_activated": [0, 1],
            "curve_time": [[1, 1], [2, 2]],
            "unit": "s",
            "name": "n",
        },
        "sizing": {"policy": "cv", "cv": 0.2, "ddof": 0, "imbalance": 1.1},
        "objective": {
            "priorities": ["balance"],
            "balance_tolerance": 0.1,
            "horizon": 5,
            "risk": "cvar",
            "cvar_alpha": 0.5,
        },
        "limits": {
            "min_replicas": 1,
            "max_replicas": 2,
            "max_moves": 3,
            "max_move_seconds": 1.0,
            "spread": 1,
            "spread_experts": [[-1, 2]],
            "pinned": [[0, 0, 0]],
            "forbidden": [[0, 2, 0]],
        },
        "known": {"source": "s", "best": [1, 2], "bound": [1, 1]},
    }
    recipe = {
        "kind": "lognormal",
        "layers": 2,
        "experts": 3,
        "tokens": 100,
        "sigma": 0.5,
        "seed": 1,
        "drift": {"kind": "ar1", "steps": 2, "sigma": 0.1, "rho": 0.5},
    }
    flat = {
        "kind": "uniform",
        "nodes": 1,
        "gpus_per_node": 2,
        "slots": [2, 2],
        "memory": 100,
        "speed": [1, 1],
    }
    return {
        "full": full,
        "generated": full | {"loads": {"kind": "generated", "recipe": recipe}},
        "uniform": full | {"topology": flat, "time": {"kind": "linear", "token_cost": 1, "launch": 1}},
        "plan": plan_to_json(small()[1]) | {"payback": {"saved_per_pass": 1.0, "cost": 2.0}},
    }


def _places(node: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def test_weights_come_back_to_the_last_bit() -> None:
    """Dividing by the sum again would change 1/6, 4/6, 1/6."""
    loads = Loads(load_TLE=np.ones((3, 1, 2)), weight_T=np.array([0.25, 1.0, 0.25]))
    problem = Problem(loads=loads, topology=uniform(1, 2, slots=1))
    twin = problem_from_json(json.loads(json.dumps(problem_to_json(problem))))
    assert twin == problem
    assert twin.digest() == problem.digest()


def test_notes_are_texts() -> None:
    document = whole_documents()["uniform"]
    document["loads"]["notes"] = ["fine", float("inf")]
    with pytest.raises(ProblemError, match=r"loads\.notes\[1\]: is inf, must be a text"):
        problem_from_json(document)


@pytest.mark.parametrize("name", whole_documents())
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_strange_values_anywhere_are_taken_or_refused_in_one_line(name: str, data: Any) -> None:
    good = whole_documents()[name]
    path = data.draw(st.sampled_from(list(_places(good))))
    entry = good
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = data.draw(st.sampled_from(STRANGE))
    try:
        _use(name, good)
    except MoelessError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def _use(name: str, good: dict[str, Any]) -> None:
    """Read, write, and all that a command would do with it."""
    if name == "plan":
        plan = plan_from_json(good)
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan), allow_nan=False))) == plan
        assert isinstance(violations(small()[0], plan), list)
        assert repr(plan)
        return
    problem = problem_from_json(good)
    twin = problem_from_json(json.loads(json.dumps(problem_to_json(problem), allow_nan=False)))
    assert twin.digest() == problem.digest()
    assert repr(problem)
    problem.check_feasible()
