"""Problems: parts that do not fit each other, caps that leave no room, digests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.architecture import MODEL_PRESETS
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.problem import Known, Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Topology, uniform
from moeless_opt.problems.spec.wishes import Limits, Objective, Sizing
from tests.strategies import few, problems

LOADS = Loads(load_TLE=[[4.0, 3.0, 2.0, 1.0]])


def make(**changes: Any) -> Problem:
    return Problem(**{"loads": LOADS, "topology": uniform(2, 2, slots=2)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "uneven"}, r"split: is 'uneven', must be one of \('fractional', 'equal', 'nearest'\)"),
        ({"loads": np.ones((1, 4))}, "loads: is ndarray, must be Loads"),
        ({"topology": "8xH100"}, "topology: is str, must be Topology"),
        ({"model": "Mixtral-8x7B"}, "model: is str, must be ModelSpec or None"),
        ({"current": [[[0]]]}, "current: is list, must be Placement or None"),
        ({"limits": None}, "limits: is NoneType, must be Limits"),
        ({"objective": {}}, "objective: is dict, must be Objective"),
        ({"model": MODEL_PRESETS["Mixtral-8x7B"]}, "model: Mixtral-8x7B has 8 experts per layer, .* have 4"),
        ({"expert_bytes_L": [1, 2]}, r"expert_bytes: has shape \(2,\), must be one number or \(1,\)"),
        ({"expert_bytes_L": 0}, "expert_bytes: is 0, must be from 1"),
        ({"expert_bytes_L": [10**16]}, r"expert_bytes\[0\]: is 10000000000000000, must be from 1 to"),
        (
            {"limits": Limits(pinned=[(1, 0, 0)])},
            r"limits\.pinned\[0\]: names layer 1, the loads are of the layers 0",
        ),
        ({"limits": Limits(pinned=[(-1, 4, 0)])}, r"limits\.pinned\[0\]: names expert 4, the last one is 3"),
        (
            {"limits": Limits(forbidden=[(0, 0, 4)])},
            r"limits\.forbidden\[0\]: names gpu 4, the last one is 3",
        ),
        ({"topology": uniform(1, 2, memory=100)}, r"topology\.memory: needs the size of an expert"),
        (
            {"current": Placement(slots_LGC=[[[0, 1, 2, 3]]], experts=4)},
            "current: is for 1 layers, 1 GPUs and 4 experts; the problem has 1, 4 and 4",
        ),
        (
            {"current": Placement(slots_LGC=[[[0, 1, 2], [3, -1, -1], [0, -1, -1], [1, -1, -1]]], experts=4)},
            r"current\[0\]\[0\]: holds 3 replicas of layer 0, GPU 0 has room for 2",
        ),
        (
            {"loads": Loads(load_TLE=[[2.0, 1.0]], load_TLNE=[[[[2.0, 1.0]]]])},
            r"loads\.by_node: has 1 nodes, the topology has 2",
        ),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"topology": uniform(1, 3, slots=1)},
            r"topology\.slots: 4 experts with one replica each need 4 slots per layer, the GPUs have 3: 1",
        ),
        (
            {"topology": uniform(1, 2, memory=99), "expert_bytes_L": 50},
            r"topology\.memory: .* need 4 slots per layer, .*room for 2 slots per layer \(2 too few\)",
        ),
        (
            {"topology": uniform(1, 1, slots=9), "limits": Limits(min_replicas=2)},
            r"topology\.slots: 4 experts with 2 replicas each need 8 slots per layer, the GPUs have 4: 4 too",
        ),
        (
            {"limits": Limits(max_layer_replicas=3)},
            r"limits\.max_layer_replicas: 3 replicas per layer are 1 too few; 4 experts need 4",
        ),
        (
            {"limits": Limits(max_total_replicas=3)},
            r"limits\.max_total_replicas: 3 replicas are 1 too few",
        ),
        (
            {"limits": Limits(max_total_bytes=39), "expert_bytes_L": 10},
            r"limits\.max_total_bytes: 39 bytes are 1 too few",
        ),
        ({"limits": Limits(spread=3)}, r"limits\.spread: 3 failure domains are wanted, 2 have room"),
        (
            {"limits": Limits(spread=2), "topology": uniform(2, 1, slots=[4, 0])},
            r"limits\.spread: 2 failure domains are wanted, 1 have room",
        ),
        (
            {"limits": Limits(spread=2), "topology": uniform(2, 2, slots=[2, 2, 2, 1])},
            r"topology\.slots: 4 experts with 2 replicas each need 8 slots per layer, the GPUs have 7: 1",
        ),
        (
            {"limits": Limits(spread=2, max_replicas=1)},
            r"limits\.spread: 2 failure domains cannot be reached with max_replicas = 1",
        ),
        (
            {"limits": Limits(pinned=[(0, 0, 1), (0, 1, 1), (-1, 2, 1)])},
            r"limits\.pinned: 3 experts are pinned to GPU 1 in layer 0, it has room for 2: 1 too many",
        ),
        (
            {"limits": Limits(forbidden=[(-1, 2, g) for g in range(4)])},
            r"limits\.forbidden: in layer 0, expert 2 may be on 0 GPUs; it needs 1",
        ),
        (
            {"limits": Limits(pinned=[(0, 2, 3)], forbidden=[(-1, 2, 3)])},
            r"limits\.forbidden: expert 2 is pinned to GPU 3 and forbidden there, layer 0",
        ),
    ],
)
def test_caps_that_leave_no_room(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InfeasibleError, match="^" + message):
        make(**changes).check_feasible()


def test_many_replicas_need_many_gpus() -> None:
    problem = Problem(
        loads=Loads(load_TLE=[[1.0, 1.0]]), topology=uniform(1, 2, slots=9), limits=Limits(min_replicas=3)
    )
    with pytest.raises(InfeasibleError, match=r"^topology\.slots: .* the GPUs have 4: 2 too few"):
        problem.check_feasible()


@few
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_feasibility_by_enumeration(slots: list[int], experts: int, least: int) -> None:
    """Room for everyone is claimed exactly where some placement has it."""
    problem = Problem(
        loads=Loads(load_TLE=np.ones((1, experts))),
        topology=Topology(node_G=[0] * len(slots), speed_G=[1.0] * len(slots), slots_G=slots),
        limits=Limits(min_replicas=least),
    )
    contents = [
        [set(s) for k in range(min(c, experts) + 1) for s in itertools.combinations(range(experts), k)]
        for c in slots
    ]
    possible = any(
        all(sum(e in held for held in gpus) >= least for e in range(experts))
        for gpus in itertools.product(*contents)
    )
    try:
        problem.check_feasible()
        claimed = True
    except InfeasibleError:
        claimed = False
    assert claimed == possible


def test_bytes_of_experts() -> None:
    mixtral = MODEL_PRESETS["Mixtral-8x7B"]
    loads = Loads(load_TLE=np.ones((2, 8)))
    base = Problem(loads=loads, topology=uniform(1, 8, slots=1))
    assert base.bytes_L.tolist() == [0, 0]
    assert base.replace(model=mixtral).bytes_L.tolist() == [mixtral.expert_bytes] * 2
    assert base.replace(model=mixtral, expert_bytes_L=7).bytes_L.tolist() == [7, 7]
    by_memory = base.replace(expert_bytes_L=[30, 70], topology=uniform(1, 8, memory=350))
    assert by_memory.capacity_LG.tolist() == [[3] * 8] * 2


def test_pairs_as_masks() -> None:
    loads = Loads(load_TLE=np.ones((3, 2)))
    limits = Limits(pinned=[(-1, 1, 0), (2, 0, 1)], forbidden=[(0, 0, 0)])
    problem = Problem(loads=loads, topology=uniform(1, 2, slots=2), limits=limits)
    assert np.argwhere(problem.pairs_LEG("pinned")).tolist() == [[0, 1, 0], [1, 1, 0], [2, 0, 1], [2, 1, 0]]
    assert np.argwhere(problem.pairs_LEG("forbidden")).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"loads": Loads(load_TLE=[[4.0, 3.0, 2.0, 1.5]])},
        {"loads": LOADS.replace(layers=(3,))},
        {"topology": uniform(2, 2, slots=3)},
        {"topology": uniform(1, 4, slots=2)},
        {"topology": uniform(2, 2, slots=2, speed=[1, 1, 1, 0.5])},
        {"split": "equal"},
        {"fill": "distinct"},
        {"fill": "copies"},
        {"expert_bytes_L": 5},
        {"sizing": Sizing(policy="cv")},
        {"time": TimeModel(launch=1)},
        {"objective": Objective(balance_tolerance=0.02)},
        {"objective": Objective(sigma=0.5)},
        {"objective": Objective(failure_rate=0.02)},
        {"limits": Limits(max_moves=3)},
        {"current": Placement(slots_LGC=[[[0, 1], [2, -1], [3, -1], [0, -1]]], experts=4)},
    ],
)
def test_digest_tells_problems_apart(changes: dict[str, Any]) -> None:
    assert make(**changes).digest() != make().digest()
    assert make(**changes).digest() == make(**changes).digest()


def test_digest_of_what_old_plans_were_made_for() -> None:
    """Plans in files name their problem by it."""
    loads = Loads(load_TLE=np.arange(24.0).reshape(1, 2, 12) + 1)
    problem = Problem(loads=loads, topology=uniform(1, 4, slots=4))
    assert problem.digest() == "5ee8a28b29ab6b96"
    assert problem.replace(objective=Objective()).digest() == "5ee8a28b29ab6b96"


def test_digest_ignores_what_is_for_people() -> None:
    other = make(
        name="other",
        known=Known(source="me"),
        loads=LOADS.replace(source="file", scenarios=("a",), skipped=(7,), notes=("summed",)),
        topology=uniform(2, 2, slots=2, name="rack"),
        # equal to the defaults, but other objects, and other kinds of numbers
        objective=Objective(balance_tolerance=np.float64(0.01)),
        limits=Limits(min_replicas=np.int64(1)),
        sizing=Sizing(cv=np.float64(0.2)),
        time=TimeModel(token_cost=1),
    )
    assert other.digest() == make().digest()
    assert len(other.digest()) == 16


@few
@given(problems())
def test_replacing_nothing_changes_nothing(problem: Problem) -> None:
    assert problem.replace() == problem
    assert problem.replace(name="x").digest() == problem.digest()
    assert problem.capacity_LG.shape == (problem.layers, problem.topology.gpus)
    with pytest.raises(ProblemError, match="capacity_LG: Problem has no such field"):
        problem.replace(capacity_LG=problem.capacity_LG)


def test_repr() -> None:
    text = repr(make(name="tiny", split="equal"))
    assert text.startswith("Problem(tiny: Loads(1 layers x 4 experts")
    assert "equal split" in text
    live = Placement(slots_LGC=[[[0, 1], [2, -1], [3, -1], [0, -1]]], experts=4)
    assert "from a live placement" in repr(make(current=live))
