"""The plug-in for vLLM, against stand-ins of vLLM's modules."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moeless_opt as mo
from moeless_opt.adapters import planner
from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapTask, answer, first_map
from moeless_opt.adapters.vllm import Balancer, register_vllm
from tests.adapters.engine_fakes import DefaultEplbPolicy, fake_vllm, model_state, routed

LAYERS, EXPERTS, GPUS, WIDTH = 2, 16, 4, 5
SLOTS = GPUS * WIDTH


def loads(seed: int, layers: int = LAYERS, experts: int = EXPERTS, sigma: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((1000 * rng.lognormal(0, sigma, (layers, experts))).astype(np.int64))


def initial(layers: int = LAYERS, experts: int = EXPERTS, slots: int = SLOTS) -> torch.Tensor:
    return torch.from_numpy(first_map(layers, experts, slots))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switch the plug-in on with options; the policy and the stand-ins."""

    def switch(group: Any = None, **options: Any) -> SimpleNamespace:
        vllm = fake_vllm(monkeypatch, group)
        monkeypatch.setenv("MOELESS_VLLM", "1")
        for name, value in ({"planner": "thread"} | options).items():
            monkeypatch.setenv(f"MOELESS_VLLM_{name.upper()}", str(value))
        register_vllm()
        return SimpleNamespace(policy=vllm.policies["default"], state=vllm.state)

    return switch


def check_contract(found: torch.Tensor, layers: int, experts: int, slots: int) -> None:
    """What vLLM asserts of a map, or breaks without."""
    assert found.device == torch.device("cpu")
    assert found.dtype == torch.int64
    assert found.is_contiguous()
    assert found.shape == (layers, slots)
    assert int(found.min()) >= 0
    for row in found:
        assert sorted(set(row.tolist())) == list(range(experts))


def imbalance(found: torch.Tensor, load: torch.Tensor, gpus: int) -> np.ndarray[Any, Any]:
    """max / mean of the ranks where replicas serve alike, [L]."""
    rows = []
    for row, weight in zip(found.numpy(), load.numpy(), strict=True):
        piece = weight / np.bincount(row, minlength=len(weight))
        rank = piece[row].reshape(gpus, -1).sum(1)
        rows.append(rank.max() / rank.mean())
    return np.array(rows)


def shipped(found: torch.Tensor, live: torch.Tensor, gpus: int) -> int:
    """Replicas on ranks that did not hold them."""
    new, old = (one.reshape(len(one) * gpus, -1).tolist() for one in (found, live))
    return sum(len(set(here) - set(before)) for here, before in zip(new, old, strict=True))


# -- on, off, and told wrongly ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0", "off", "False"])
def test_nothing_happens_unless_asked(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    vllm = fake_vllm(monkeypatch)
    theirs = vllm.state.compute_logical_maps
    monkeypatch.delenv("MOELESS_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("MOELESS_VLLM", value)
    monkeypatch.setenv("MOELESS_VLLM_NONSENSE", "1")  # not even looked at
    register_vllm()
    assert vllm.policies == {"default": DefaultEplbPolicy}
    assert vllm.state.compute_logical_maps is theirs


def test_the_entry_points_name_what_is_there() -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("the source tree is not here")
    text = pyproject.read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]' in text
    assert "moeless_opt.adapters.vllm:register_vllm" in text
    assert '[project.entry-points."sglang.srt.plugins"]' in text
    assert "moeless_opt.adapters.sglang:register_sglang" in text


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MOELESS_VLLM": "yes please"}, ("MOELESS_VLLM", "'yes please'", ".json or .toml")),
        ({"MOELESS_VLLM": "absent.json"}, ("MOELESS_VLLM", "absent.json")),
        (
            {"MOELESS_VLLM_TOLERENCE": "0.1"},
            ("MOELESS_VLLM_TOLERENCE", "'tolerence' is unknown"),
        ),
        ({"MOELESS_VLLM_ENTRIES": "5000"}, ("MOELESS_VLLM_ENTRIES", "5000", "from 2 to 1024")),
        ({"MOELESS_VLLM_MAX_MOVES": "-1"}, ("MOELESS_VLLM_MAX_MOVES", "-1")),
        ({"MOELESS_VLLM_SPLIT": "even"}, ("MOELESS_VLLM_SPLIT", "'even'", "equal")),
        ({"MOELESS_VLLM_SPLIT": "nearest"}, ("MOELESS_VLLM", "nearest", "equal or weighted")),
        ({"MOELESS_VLLM_AGREE": "maybe"}, ("MOELESS_VLLM_AGREE", "true or false")),
        ({"MOELESS_VLLM_SPLIT": "equal", "MOELESS_VLLM_ENTRIES": "64"}, ("entries", "weighted")),
        ({"MOELESS_VLLM_PLAN": "absent-plan.json"}, ("absent-plan.json",)),
    ],
)
def test_wrong_options_are_named_at_load(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: tuple[str, ...]
) -> None:
    fake_vllm(monkeypatch)
    for key, value in ({"MOELESS_VLLM": "1"} | variables).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(mo.ProblemError) as caught:
        register_vllm()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("options.toml", "entries = 64\nplanner = 'thread'\n"),
        ("options.json", '{"entries": 64, "planner": "thread"}'),
    ],
)
def test_options_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str) -> None:
    vllm, path = fake_vllm(monkeypatch), tmp_path / name
    path.write_text(text)
    theirs = vllm.state.compute_logical_maps
    monkeypatch.setenv("MOELESS_VLLM", str(path))
    register_vllm()
    assert vllm.policies["default"] is not DefaultEplbPolicy
    assert vllm.state.compute_logical_maps is not theirs
    path.write_text(text.replace("entries", "entrys"))
    with pytest.raises(mo.ProblemError, match=f"{name}.*'entrys' is unknown"):
        register_vllm()
    path.write_text("{")
    with pytest.raises(mo.FormatError, match=name):
        register_vllm()


def test_a_vllm_without_the_functions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = fake_vllm(monkeypatch)
    del vllm.state.compute_logical_maps
    monkeypatch.setenv("MOELESS_VLLM", "1")
    monkeypatch.setenv("MOELESS_VLLM_ENTRIES", "64")
    with pytest.raises(mo.ProblemError, match="compute_logical_maps"):
        register_vllm()
    assert vllm.policies == {"default": DefaultEplbPolicy}


# -- the policy's contract -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "experts", "slots", "groups", "nodes", "ranks"),
    [
        (2, 12, 16, 4, 2, 8),  # the example of EPLB's readme
        (1, 4, 4, 1, 1, 1),  # one GPU
        (1, 4, 6, 1, 1, 2),
        (2, 8, 16, 3, 2, 4),  # groups that do not divide over the nodes
        (1, 8, 12, 1, 5, 4),  # nodes that do not divide the ranks
        (1, 1, 4, 1, 1, 4),  # one expert
        (3, 6, 24, 2, 2, 4),  # more slots on a rank than experts needed
        (1, 3, 8, 1, 1, 2),  # more slots on a rank than experts
    ],
)
def test_maps_are_as_vllm_wants_them(
    on: Any, layers: int, experts: int, slots: int, groups: int, nodes: int, ranks: int
) -> None:
    policy, load = on().policy, loads(1, layers, experts)
    live = initial(layers, experts, slots)
    first = policy.rebalance_experts(load, slots, groups, nodes, ranks)
    again = policy.rebalance_experts(load, slots, groups, nodes, ranks, live)
    for found in (first, again):
        check_contract(found, layers, experts, slots)
    assert (imbalance(again, load, ranks) <= imbalance(live, load, ranks) + 1e-9).all()


def test_few_moves_and_then_none(on: Any) -> None:
    policy, load, live = on().policy, loads(2), initial()
    once = policy.rebalance_experts(load, SLOTS, 1, 2, GPUS, live)
    assert imbalance(once, load, GPUS).mean() < imbalance(live, load, GPUS).mean() - 0.1
    twice = policy.rebalance_experts(load, SLOTS, 1, 2, GPUS, once)
    assert torch.equal(once, twice)
    assert shipped(once, live, GPUS) < shipped(policy.rebalance_experts(load, SLOTS, 1, 2, GPUS), live, GPUS)


def test_what_stays_on_a_rank_keeps_its_slot(on: Any) -> None:
    live = initial()
    found = on().policy.rebalance_experts(loads(3), SLOTS, 1, 1, GPUS, live)
    for old, new in zip(live.reshape(-1, WIDTH).tolist(), found.reshape(-1, WIDTH).tolist(), strict=True):
        for slot, expert in enumerate(old):
            if new.count(expert) >= old.count(expert):
                assert new[slot] == expert


def test_a_budget_of_moves(on: Any) -> None:
    load, live = loads(4), initial()
    found = on(max_moves=3, entries=64).policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    assert 0 < shipped(found, live, GPUS) <= 3


def test_what_gains_too_little_is_left(on: Any) -> None:
    load, live = loads(5), initial()
    assert torch.equal(on(min_gain=10).policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live), live)
    dear = on(min_gain=0, move_price=5.0).policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    assert torch.equal(dear, live)


def test_the_profile_run_is_answered_at_once(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, live = on().policy, initial()

    def no_planner(*_: object) -> None:
        raise AssertionError("the planner is not asked")

    monkeypatch.setattr(planner.PlannerProcess, "plan", no_planner)
    found = policy.rebalance_experts(
        torch.zeros((LAYERS, EXPERTS), dtype=torch.int64), SLOTS, 8, 2, GPUS, live
    )
    assert torch.equal(found, live)
    assert found.data_ptr() != live.data_ptr()


def test_layers_without_loads_keep_their_rows(on: Any) -> None:
    load, live = loads(6), initial()
    load[1] = 0
    found = on().policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    assert torch.equal(found[1], live[1])
    assert not torch.equal(found[0], live[0])


@pytest.mark.parametrize("zero", [False, True])
def test_slots_of_new_ranks_are_filled(on: Any, zero: bool) -> None:
    """After scaling up, the slots of the new ranks are -1."""
    live = torch.cat([initial(), torch.full((LAYERS, 2 * WIDTH), -1)], dim=1)
    load = torch.zeros_like(loads(7)) if zero else loads(7)
    found = on().policy.rebalance_experts(load, SLOTS + 2 * WIDTH, 1, 1, GPUS + 2, live)
    check_contract(found, LAYERS, EXPERTS, SLOTS + 2 * WIDTH)


def test_ranks_that_are_to_go(on: Any) -> None:
    """Before scaling down the live map is wider than the one asked for, and experts live on ranks that go."""
    live = torch.flip(initial(slots=SLOTS + 2 * WIDTH), dims=(1,))
    found = on().policy.rebalance_experts(loads(8), SLOTS, 1, 1, GPUS, live.contiguous())
    check_contract(found, LAYERS, EXPERTS, SLOTS)


def test_a_budget_too_small_to_bring_experts_back_is_passed_over(on: Any) -> None:
    live = torch.flip(initial(slots=SLOTS + 2 * WIDTH), dims=(1,))
    found = on(max_moves=0).policy.rebalance_experts(loads(8), SLOTS, 1, 1, GPUS, live.contiguous())
    check_contract(found, LAYERS, EXPERTS, SLOTS)


def test_an_error_leaves_the_live_map(
    on: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, live = on().policy, initial()

    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(planner.PlannerProcess, "plan", broken)
    with caplog.at_level(logging.ERROR):
        found = policy.rebalance_experts(loads(9), SLOTS, 1, 1, GPUS, live)
        smaller = policy.rebalance_experts(loads(9), SLOTS, 1, 1, GPUS, initial(slots=SLOTS + WIDTH))
    assert torch.equal(found, live)
    assert torch.equal(smaller, initial())
    assert caplog.text.count("the live map stays") == 2
    assert "a bug of ours" in caplog.text


def test_slots_that_do_not_divide_are_an_error_that_stops_nothing(
    on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    live = initial(slots=18)
    with caplog.at_level(logging.ERROR):
        found = on().policy.rebalance_experts(loads(9), 18, 1, 1, GPUS, live)
    assert torch.equal(found, live)
    assert "multiple of the 4 GPUs" in caplog.text


# -- weighted replicas -----------------------------------------------------------------------------------


def test_weighted_replicas_by_the_router(on: Any) -> None:
    """Tables as vLLM commits them, all layers at once or one by one; tokens as its kernel sends them."""
    vllm, load, live = on(entries=64), loads(10), initial()
    found = vllm.policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    check_contract(found, LAYERS, EXPERTS, SLOTS)
    slots, count = vllm.state.compute_logical_maps(found, EXPERTS)
    state = model_state(live, EXPERTS)
    for layer in range(LAYERS):
        vllm.state._commit_eplb_maps_for_layer(state, new_physical_to_logical_map=found[layer], layer=layer)
    assert torch.equal(state.physical_to_logical_map, found)
    assert torch.equal(state.logical_to_physical_map[:, :, : slots.shape[2]], slots)
    assert torch.equal(state.logical_replica_count, count)
    assert slots.dtype == count.dtype == torch.int64
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        row = slots[layer, expert]
        entries = row[: int(count[layer, expert])]
        assert len(entries) >= 1
        assert (found[layer][entries] == expert).all()
        assert (row[int(count[layer, expert]) :] == -1).all()
    rank = routed(load, slots, count, GPUS, WIDTH).double()
    weighted = (rank.max(1).values / rank.mean(1)).numpy()
    assert weighted.max() < 1.03
    assert weighted.mean() < imbalance(found, load, GPUS).mean()


def test_rows_that_are_alike_have_tables_of_their_own(on: Any) -> None:
    """In the initial map all layers are alike; their loads are not."""
    vllm, live = on(entries=64, min_gain=100), initial()
    load = loads(11)
    found = vllm.policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    assert torch.equal(found, live)
    slots, _ = vllm.state.compute_logical_maps(found, EXPERTS)
    state = model_state(live, EXPERTS)
    for layer in range(LAYERS):
        vllm.state._commit_eplb_maps_for_layer(state, found[layer], layer)
    assert torch.equal(state.logical_to_physical_map[:, :, : slots.shape[2]], slots)
    assert not torch.equal(slots[0], slots[1])


def test_maps_that_are_not_ours_get_vllms_own_tables(on: Any) -> None:
    vllm, live = on(entries=64), initial()
    vllm.policy.rebalance_experts(loads(12), SLOTS, 1, 1, GPUS, live)
    grown = torch.cat([live, torch.full((LAYERS, WIDTH), -1)], dim=1)
    for one in (grown, grown[0]):
        slots, count = vllm.state.compute_logical_maps(one, EXPERTS)
        assert int(count.sum()) == int((one >= 0).sum())
        assert int((slots >= 0).sum()) == int(count.sum())


def test_an_idle_window_keeps_the_weights(on: Any) -> None:
    vllm = on(entries=64)
    found = vllm.policy.rebalance_experts(loads(13), SLOTS, 1, 1, GPUS, initial())
    before = vllm.state.compute_logical_maps(found, EXPERTS)
    idle = vllm.policy.rebalance_experts(torch.zeros_like(loads(13)), SLOTS, 1, 1, GPUS, found)
    after = vllm.state.compute_logical_maps(idle, EXPERTS)
    assert torch.equal(before[0], after[0])


# -- ranks, threads, processes ---------------------------------------------------------------------------


def test_threads_have_the_same_answer(on: Any) -> None:
    """vLLM asks from a thread of the worker; with a drafter from several."""
    policy, live = on().policy, initial()
    want = [policy.rebalance_experts(loads(seed), SLOTS, 1, 1, GPUS, live) for seed in range(2)]
    found: dict[int, torch.Tensor] = {}

    def ask(seed: int) -> None:
        found[seed] = policy.rebalance_experts(loads(seed), SLOTS, 1, 1, GPUS, live)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], want[seed]) for seed in range(2))


_RANK = """
import sys
if sys.argv[1] == "bare":
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "numba" else find(name, *more)
import hashlib
import numpy as np
from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapTask, answer, first_map
from moeless_opt.solvers.replan import warm_equal
from moeless_opt.solvers.shares import warm_entries
assert warm_equal() == warm_entries() == (sys.argv[1] != "bare")
load = np.random.default_rng(5).lognormal(0, 1, (4, 24)) * 1000
word = hashlib.sha256()
for split, options in (("equal", PolicyOptions()), ("fractional", PolicyOptions(entries=64))):
    task = MapTask(load_LE=load, slots=32, gpus=8, nodes=2, live_LS=first_map(4, 24, 32))
    found = answer(task, options, split)
    word.update(found.map_LS.tobytes())
    word.update(b"" if found.table is None else found.table.slot_LEN.tobytes())
print(word.hexdigest())
"""


@pytest.mark.slow
def test_ranks_with_and_without_numba_have_the_same_map() -> None:
    pytest.importorskip("numba")
    root = str(Path(mo.__file__).resolve().parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, kind],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )
        for kind in ("bare", "compiled")
    ]
    words = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    assert words[0] == words[1] != ""


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_differ_keep_the_live_map(
    on: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    group = SimpleNamespace(rank_in_group=1, world_size=2, cpu_group="gloo")

    def all_reduce(pair: torch.Tensor, op: Any, group: str) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        assert group == "gloo"
        other = pair if same else torch.tensor([12345, -12345])
        torch.maximum(pair, other, out=pair)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    live = initial()
    with caplog.at_level(logging.ERROR):
        found = on(group).policy.rebalance_experts(loads(14), SLOTS, 1, 1, GPUS, live)
    assert torch.equal(found, live) != same
    assert ("maps differ" in caplog.text) != same


def test_a_rank_that_fails_still_answers_the_others(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' agreement is collective: one that cannot plan must not leave the others waiting."""
    asked = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda pair, **_: asked.append(pair))
    policy = on(SimpleNamespace(rank_in_group=0, world_size=2, cpu_group="gloo")).policy
    policy.rebalance_experts(torch.zeros((LAYERS, EXPERTS), dtype=torch.int64), SLOTS, 1, 1, GPUS, initial())
    policy.rebalance_experts(loads(15), SLOTS + 1, 1, 1, GPUS, initial(slots=SLOTS + 1))
    assert len(asked) == 2


_COLD = (
    "import sys; sys.path[:] = sys.argv[1:]; from moeless_opt.adapters import planner;"
    "planner.warm_up = bool; planner.serve()"
)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A planner in a process of its own, which compiles nothing first."""
    monkeypatch.setattr(planner, "_START", _COLD)
    told: list[str] = []
    made = planner.PlannerProcess(PolicyOptions(), told.append)
    yield SimpleNamespace(planner=made, told=told)
    made.close()


def test_planning_leaves_the_interpreter_to_others(beside: Any) -> None:
    """While the planner's process works (here: is stopped), the thread that waits holds no lock."""
    task = MapTask(load_LE=loads(16), slots=SLOTS, gpus=GPUS, live_LS=first_map(LAYERS, EXPERTS, SLOTS))
    beside.planner.begin()
    pid = beside.planner._process.pid
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(beside.planner.plan(task, "equal")))
    os.kill(pid, signal.SIGSTOP)
    try:
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()  # and this thread has gone on
        assert not found
    finally:
        os.kill(pid, signal.SIGCONT)
    thread.join()
    assert np.array_equal(found[0].map_LS, answer(task, PolicyOptions(), "equal").map_LS)
    # An error comes back as itself, and the process lives on.
    with pytest.raises(ValueError, match="nonsense"):
        beside.planner.plan(task, "nonsense")
    assert beside.planner._process.pid == pid
    # A process that dies is no reason for another answer.
    os.kill(pid, signal.SIGKILL)
    beside.planner._process.wait()
    beside.planner._process.returncode = None  # as if nobody had noticed
    again = beside.planner.plan(task, "equal")
    assert np.array_equal(again.map_LS, found[0].map_LS)
    assert len(beside.told) <= 1


# -- files -----------------------------------------------------------------------------------------------


def test_a_plan_to_begin_with(on: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load = loads(17)
    plan = mo.plan(load.numpy(), mo.uniform(1, GPUS, slots=WIDTH), split="equal", fill="copies")
    mo.save_plan(plan, tmp_path / "plan.json")
    policy, live = on(plan=tmp_path / "plan.json").policy, initial()
    zeros = torch.zeros_like(load)
    assert torch.equal(policy.rebalance_experts(zeros, SLOTS, 1, 1, GPUS, live), live)
    begun = policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    assert begun.flatten().tolist() == plan.slots_LGC.flatten().tolist()
    later = policy.rebalance_experts(loads(18), SLOTS, 1, 1, GPUS, begun)
    assert not torch.equal(later, begun)
    with caplog.at_level(logging.WARNING):
        other = policy.rebalance_experts(loads(19, 1), SLOTS, 1, 1, GPUS, initial(1))
    check_contract(other, 1, EXPERTS, SLOTS)
    assert "plan.json is not taken: it is for (2, 20)" in caplog.text


def test_a_line_for_every_call_and_the_loads(on: Any, tmp_path: Path) -> None:
    log, folder = tmp_path / "log" / "calls.jsonl", tmp_path / "loads"
    policy, live, load = on(log=log, record=folder).policy, initial(), loads(20)
    policy.rebalance_experts(torch.zeros_like(load), SLOTS, 1, 1, GPUS, live)
    found = policy.rebalance_experts(load, SLOTS, 1, 1, GPUS, live)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["call"] for line in lines] == [1, 2]
    assert lines[0]["reason"] == "no loads"
    assert lines[1]["moved"] == shipped(found, live, GPUS)
    assert lines[1]["imbalance_before"] == pytest.approx(imbalance(live, load, GPUS).mean(), abs=1e-5)
    assert lines[1]["imbalance_after"] == pytest.approx(imbalance(found, load, GPUS).mean(), abs=1e-5)
    assert lines[1]["milliseconds"] > 0
    (recording,) = folder.iterdir()
    assert np.array_equal(mo.read_loads(recording).load_LE, load.numpy())


def test_a_log_that_cannot_be_written_stops_nothing(
    on: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = on(log=tmp_path).policy  # a folder
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            policy.rebalance_experts(loads(21), SLOTS, 1, 1, GPUS, initial())
    assert caplog.text.count("cannot be written") == 1


def test_weighted_without_a_number_of_entries() -> None:
    assert Balancer(PolicyOptions(split="weighted", planner="thread")).options.entries == 256
