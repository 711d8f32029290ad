"""The verifier: accepts valid plans, and refuses each way of breaking one, by its own words."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import moeless_opt.problems.plan.verify as module
from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.verify import verify, violations
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.topology import Links, Topology, uniform
from moeless_opt.problems.spec.wishes import Limits
from tests.strategies import few, plan_of, planned


@few
@given(planned())
def test_valid_plans_are_accepted(drawn: Any) -> None:
    problem, plan = drawn
    assert violations(problem, plan) == []
    verify(problem, plan)


def base(split: str = "fractional", **changes: Any) -> tuple[Problem, Plan]:
    """Two layers, 3 experts, 3 GPUs in 2 nodes with 2 slots, one of them free in layer 0."""
    problem = Problem(
        **{
            "loads": Loads(load_TLE=[[6.0, 3.0, 1.0], [1.0, 2.0, 4.0]]),
            "topology": Topology(node_G=[0, 0, 1], speed_G=[1.0, 1.0, 1.0], slots_G=[2, 2, 2]),
            "split": split,
            "expert_bytes_L": [10, 20],
        }
        | changes
    )
    slots = np.array([[[0, 1], [0, -1], [1, 2]], [[0, 1], [2, 1], [2, 0]]], dtype=np.int32)
    return problem, plan_of(problem, slots)


def changed(array: Any, at: Any, value: Any) -> Any:
    copy = np.array(array)
    copy[at] = value
    return copy


def refuses(problem: Problem, plan: Plan, *words: str) -> None:
    found = violations(problem, plan)
    for word in words:
        assert any(word in text for text in found), (word, found)
    with pytest.raises(InvalidPlanError) as caught:
        verify(problem, plan)
    assert caught.value.violations == found


def with_slots(problem: Problem, plan: Plan, slots: Any) -> Plan:
    """The same plan with other slots and all its figures true to them."""
    return plan_of(problem, np.asarray(slots, dtype=np.int32))


def test_the_base_is_valid() -> None:
    for split in ("fractional", "equal"):
        assert violations(*base(split)) == []


def test_shapes() -> None:
    problem, plan = base()
    refuses(problem, plan.replace(slots_LGC=plan.slots_LGC[:1]), "slots have shape (1, 3, 2)")
    refuses(problem, plan.replace(slots_LGC=plan.slots_LGC[:, :2]), "slots have shape (2, 2, 2)")
    refuses(problem, plan.replace(slots_LGC=plan.slots_LGC[0]), "slots have shape (3, 2)")
    refuses(problem, plan.replace(share_LGC=plan.share_LGC[:, :, :1]), "shares have shape (2, 3, 1)")
    refuses(problem, plan.replace(slots_LGC=plan.slots_LGC[:, :, :0], share_LGC=plan.share_LGC[:, :, :0]), "")
    refuses(problem, plan.replace(time_LG=plan.time_LG[:1]), "GPU times are not")
    refuses(problem, plan.replace(imbalance_L=plan.imbalance_L[:1]), "imbalance is not")
    wide = np.concatenate([plan.time_LG, plan.time_LG])
    refuses(problem, plan.replace(time_LG=wide), "GPU times are not")
    refuses(problem, plan.replace(imbalance_L=np.ones(3)), "imbalance is not")
    proof = plan.certificate
    for more in (proof.replace(value_L=np.ones(3)), proof.replace(lower_bound_L=np.zeros(3))):
        refuses(problem, plan.replace(certificate=more), "the certificate does not cover every layer")
    moves = plan.moves.replace(count_L=np.append(plan.moves.count_L, 0))
    refuses(problem, plan.replace(moves=moves), "moves by layer are not")


@pytest.mark.parametrize("expert", [3, 99, -2])
def test_unknown_expert(expert: int) -> None:
    problem, plan = base()
    slots = changed(plan.slots_LGC, (0, 1, 1), expert)
    refuses(problem, plan.replace(slots_LGC=slots), "outside -1..2")


def test_duplicate_on_a_gpu() -> None:
    problem, plan = base()
    slots = changed(plan.slots_LGC, (0, 1, 1), 0)
    share = changed(changed(plan.share_LGC, (0, 1, 0), 0.25), (0, 1, 1), 0.25)
    refuses(problem, plan.replace(slots_LGC=slots, share_LGC=share), "layer 0 GPU 1: expert 0 sits there 2")


def test_missing_expert() -> None:
    problem, plan = base()
    slots = changed(plan.slots_LGC, (0, 2, 1), -1)
    refuses(problem, with_slots(problem, plan, slots), "layer 0: expert 2 has 0 replicas, needs 1")


def test_too_few_replicas() -> None:
    problem, plan = base(limits=Limits(min_replicas=2))
    refuses(problem, plan, "layer 0: expert 2 has 1 replicas, needs 2")


def test_over_capacity() -> None:
    problem, plan = base()
    slots = np.full((2, 3, 3), -1, dtype=np.int32)
    slots[:, :, :2] = plan.slots_LGC
    slots[0, 0, 2] = 2
    refuses(problem, with_slots(problem, plan, slots), "layer 0 GPU 0: 3 replicas, room for 2")


def test_over_memory() -> None:
    problem, plan = base()
    # the same plan where GPU 0 has a byte less than its 1 + 2 replicas of 10 and 20 bytes
    tight = problem.replace(topology=problem.topology.replace(memory_G=[59, 60, 60]))
    need = "GPU 0: 60 bytes of experts, room for 59"
    refuses(tight, plan_of(tight, plan.slots_LGC), need)
    enough = problem.replace(topology=problem.topology.replace(memory_G=[60, 60, 60]))
    assert violations(enough, plan_of(enough, plan.slots_LGC)) == []


@pytest.mark.parametrize("value", [0.4, 0.6, 0.0, 5.0])
def test_shares_that_do_not_sum_to_one(value: float) -> None:
    problem, plan = base()
    broken = plan_of(problem, plan.slots_LGC, changed(plan.share_LGC, (0, 0, 0), value))
    refuses(problem, broken, "layer 0: the shares of expert 0 sum to")


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_shares_that_are_no_shares(value: float) -> None:
    problem, plan = base()
    broken = plan.replace(share_LGC=changed(plan.share_LGC, (0, 0, 0), value))
    refuses(problem, broken, "shares must be finite and at least 0")


def test_share_of_an_empty_slot() -> None:
    problem, plan = base()
    refuses(problem, plan.replace(share_LGC=changed(plan.share_LGC, (0, 1, 1), 0.1)), "an empty slot has")


def test_uneven_equal_split() -> None:
    problem, plan = base("equal")
    share = changed(changed(plan.share_LGC, (0, 0, 0), 0.6), (0, 1, 0), 0.4)
    refuses(problem, plan_of(problem, plan.slots_LGC, share), "an equal split gives 0.5")
    # all on one of two replicas is no even split over slots either
    share = changed(changed(plan.share_LGC, (0, 0, 0), 0.0), (0, 1, 0), 1.0)
    refuses(problem, plan_of(problem, plan.slots_LGC, share), "an equal split gives 0.5")


def test_two_slots_of_one_gpu_may_count_twice_in_an_equal_split() -> None:
    """EPLB puts one expert in two slots of a GPU: a double share from one copy, if slots suffice."""
    problem, plan = base("equal")
    share = changed(changed(plan.share_LGC, (0, 1, 0), 2 / 3), (0, 0, 0), 1 / 3)
    assert violations(problem, plan_of(problem, plan.slots_LGC, share)) == []  # GPU 1 has a slot to spare
    share = changed(changed(plan.share_LGC, (0, 1, 0), 1 / 3), (0, 0, 0), 2 / 3)
    refuses(problem, plan_of(problem, plan.slots_LGC, share), "an equal split gives 0.5")  # GPU 0 is full


def test_another_split() -> None:
    problem, plan = base()
    refuses(problem, plan.replace(split="equal"), "plan has a equal split, the problem asks for fractional")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_replicas": 1}, "an expert has 2 replicas, at most 1 are allowed"),
        ({"max_layer_replicas": 5}, "a layer has 6 replicas, at most 5"),
        ({"max_total_replicas": 10}, "11 replicas in all, at most 10"),
        ({"max_total_bytes": 169}, "170 bytes in all, at most 169"),
        ({"spread": 2}, "layer 0: expert 0 is in 1 failure domains, must be in 2"),
        ({"pinned": [(0, 2, 0)]}, "layer 0: expert 2 is pinned to GPU 0 and is not there"),
        ({"pinned": [(-1, 0, 1)]}, ": expert 0 is pinned to GPU 1 and is not there"),
        ({"forbidden": [(1, 2, 2)]}, "layer 1: expert 2 is forbidden on GPU 2 and is there"),
        ({"forbidden": [(-1, 0, 1)]}, "layer 0: expert 0 is forbidden on GPU 1 and is there"),
    ],
)
def test_limits(limits: dict[str, Any], words: str) -> None:
    refuses(*base(limits=Limits(**limits)), words)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_replicas": 2, "max_layer_replicas": 6, "max_total_replicas": 11, "max_total_bytes": 170},
        {"pinned": [(-1, 0, 0), (1, 2, 1)], "forbidden": [(0, 2, 0), (-1, 2, 0)]},
        {"max_moves": 0},  # nothing is live, so nothing moves
    ],
)
def test_limits_that_are_kept(limits: dict[str, Any]) -> None:
    assert violations(*base(limits=Limits(**limits))) == []


LIVE = Placement(slots_LGC=[[[0, 1], [2, -1], [1, -1]], [[0, 1], [2, 0], [1, 2]]], experts=3)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_moves": 3}, "4 replicas move, at most 3 may"),
        ({"max_move_bytes": 59}, "60 bytes move, at most 59 may"),
        ({"max_layer_moves": 1}, "2 replicas move in one layer, at most 1 may"),
        ({"max_move_seconds": 0.18}, "moves take 0.1875 s at least, at most 0.18 s are allowed"),
        ({"max_moves": 4, "max_move_bytes": 60, "max_layer_moves": 2, "max_move_seconds": 0.19}, ""),
    ],
)
def test_limits_on_moves(limits: dict[str, Any], words: str) -> None:
    # GPUs 1 and 2 get 10 bytes in layer 0 and 20 in layer 1 each, over links of 160 bytes a second together
    links = Links(intra_node=100.0, inter_node=50.0, host=10.0)
    topology = base()[0].topology.replace(links=links)
    problem, plan = base(current=LIVE, limits=Limits(**limits), topology=topology)
    assert plan.moves.count_L.tolist() == [2, 2]
    if words:
        refuses(problem, plan, words)
    else:
        assert violations(problem, plan) == []


def test_claims_about_moves() -> None:
    problem, plan = base(current=LIVE)
    moves = plan.moves
    refuses(
        problem, plan.replace(moves=moves.replace(count=1)), "plan claims 1 moves of 60 bytes, it makes 4"
    )
    refuses(problem, plan.replace(moves=moves.replace(bytes=0)), "plan claims 4 moves of 0 bytes")
    refuses(problem, plan.replace(moves=moves.replace(count_L=np.array([1, 3]))), "moves by layer")
    refuses(problem, plan.replace(moves=moves.replace(count_L=np.array([4]))), "moves by layer")
    refuses(problem, plan.replace(moves=moves.replace(cold=True)), "cold=True")
    refuses(problem, plan.replace(moves=moves.replace(fraction=0.0)), "plan claims to move 0 of its replicas")
    refuses(problem.replace(current=None), plan, "cold=False")


def test_claims_about_time() -> None:
    problem, plan = base()
    refuses(problem, plan.replace(time_LG=plan.time_LG * 0.99), "GPU times are not those of its shares")
    refuses(problem, plan.replace(imbalance_L=plan.imbalance_L * 0.99), "imbalance is not that of its shares")
    low = plan.certificate.replace(value_L=plan.certificate.value_L * 0.99)
    refuses(problem, plan.replace(certificate=low), "the certificate's values are not")
    short = plan.certificate.replace(lower_bound_L=plan.certificate.lower_bound_L[:1])
    refuses(problem, plan.replace(certificate=short), "the certificate does not cover every layer")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_claims_are_judged_layer_by_layer(scale: float) -> None:
    """A lie about a layer of few tokens is a lie, whatever the other layers carry."""
    loads = Loads(load_TLE=[[6e6 * scale, 3e6 * scale, 1e6 * scale], [1e-3 * scale, 0.0, 0.0]])
    problem, plan = base(loads=loads)
    refuses(problem, plan.replace(time_LG=changed(plan.time_LG, (1, 0), 0.0)), "GPU times are not")
    bound = plan.certificate.replace(lower_bound_L=plan.certificate.value_L * 1.00001)
    refuses(problem, plan.replace(certificate=bound), "layer 0: lower bound", "is above the plan's own")
    bound = plan.certificate.replace(lower_bound_L=plan.certificate.value_L * [1, 1.00001])
    refuses(problem, plan.replace(certificate=bound), "layer 1: lower bound")
    exact = plan.certificate.replace(lower_bound_L=plan.certificate.value_L)
    assert violations(problem, plan.replace(certificate=exact)) == []


def test_other_traffic_makes_other_claims() -> None:
    problem, plan = base()
    other = problem.replace(loads=Loads(load_TLE=[[6.0, 3.0, 2.0], [1.0, 2.0, 4.0]]))
    refuses(other, plan, "GPU times are not")


@few
@given(planned(), st.data())
def test_any_slot_overwritten_is_found(drawn: Any, data: Any) -> None:
    """Whatever a slot is changed to, unless to what it was, some rule or claim fails."""
    problem, plan = drawn
    at = tuple(data.draw(st.integers(0, n - 1)) for n in plan.slots_LGC.shape)
    value = data.draw(st.integers(-1, problem.experts))
    was = int(plan.slots_LGC[at])
    # without load and with next to no share, one expert is as good there as another
    assume(value != was and (was < 0 or plan.share_LGC[at] > 1e-5))
    found = violations(problem, plan.replace(slots_LGC=changed(plan.slots_LGC, at, value)))
    assert found


@few
@given(planned(), st.data())
def test_any_share_overwritten_is_found(drawn: Any, data: Any) -> None:
    problem, plan = drawn
    at = tuple(data.draw(st.integers(0, n - 1)) for n in plan.slots_LGC.shape)
    value = data.draw(st.floats(0, 1))
    assume(abs(value - plan.share_LGC[at]) > 1e-5)
    assert violations(problem, plan.replace(share_LGC=changed(plan.share_LGC, at, value)))


def test_all_violations_are_listed() -> None:
    problem, plan = base("equal", limits=Limits(max_replicas=1, spread=2))
    found = violations(problem, plan.replace(split="fractional", time_LG=plan.time_LG * 2))
    assert len(found) >= 4
    with pytest.raises(InvalidPlanError, match=r"^plan: .* \(and \d+ more\)$"):
        verify(problem, plan.replace(split="fractional", time_LG=plan.time_LG * 2))


def test_the_verifier_shares_no_code_with_solvers_or_evaluation() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names
    for name in names:
        assert "solvers" not in name
        assert name not in ("moeless_opt.problems.plan.evaluate", "moeless_opt.problems.spec.placement")


def test_one_gpu_and_one_expert() -> None:
    problem = Problem(loads=Loads(load_TLE=[[5.0]]), topology=uniform(1, 1, slots=1))
    plan = plan_of(problem, np.zeros((1, 1, 1), dtype=np.int32))
    assert violations(problem, plan) == []
    assert plan.imbalance_L.tolist() == [1.0]
