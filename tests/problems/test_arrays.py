"""Checks of arrays and numbers, and what every record can do."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.arrays import floats, frozen, integers, number, whole
from moeless_opt.problems.errors import FormatError, InvalidPlanError, MoelessError, ProblemError
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.wishes import Objective
from tests.strategies import few, planned, problems


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, float("nan")], r"x\[1\]: is nan, must be finite and at least 0"),
        ([[1.0], [float("inf")]], r"x\[1\]\[0\]: is inf, must be finite"),
        ([0.0, -1.0], r"x\[1\]: is -1.0, must be finite and at least 0"),
        ([[1, 2], [3]], "x: not an array of numbers"),
        (["a"], "x: must hold numbers"),
        (None, "x: must hold numbers"),
        ([1 + 2j], "x: must hold numbers"),
        ([2**70], "x: holds a number too large for 64 bits"),
        ([1, None], "x: must hold numbers"),
        (np.array([1, True, "2"], dtype=object), "x: must hold numbers"),
        (np.array([np.longdouble("1e4000")]), r"x\[0\]: is inf, must be finite"),
        (np.ma.masked_array([1.0, 2.0], mask=[0, 1]), "x: has masked entries"),
        (np.zeros(2, dtype=[("float", "f8")]), "x: must hold numbers"),
    ],
)
def test_floats_name_the_offending_entry(value: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        floats("x", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], "x: must hold whole numbers"),
        ([True], "x: must hold whole numbers"),
        ([float("nan")], "x: must hold whole numbers"),
        ([1, -1], r"x\[1\]: is -1, must be from 0 to 3"),
        ([4], r"x\[0\]: is 4, must be from 0 to 3"),
        ([1e30], "x: holds a number too large for 64 bits"),
        ([-1e30], "x: holds a number too large for 64 bits"),
        (np.array([1, -(2**70)], dtype=object), "x: holds a number too large for 64 bits"),
        (np.array([2**64 - 1], dtype=np.uint64), "x: holds a number too large for 64 bits"),
    ],
)
def test_integers_name_the_offending_entry(value: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        integers("x", value, high=3)


def test_numbers_in_boxes_are_numbers() -> None:
    assert floats("x", np.array([1, 2.5, np.float32(3)], dtype=object)).tolist() == [1.0, 2.5, 3.0]
    assert integers("x", np.array([[1, np.int8(2)]], dtype=object)).tolist() == [[1, 2]]
    assert floats("x", np.ma.masked_array([1.0], mask=[0])).tolist() == [1.0]


def test_integers_without_an_upper_end() -> None:
    with pytest.raises(ProblemError, match=r"x\[0\]: is -2, must be at least 0"):
        integers("x", [-2])
    assert integers("x", [2.0, 7]).dtype == np.int64


def test_floats_with_an_open_end() -> None:
    with pytest.raises(ProblemError, match="finite and above 0"):
        floats("x", [0.0], open_low=True)
    assert floats("x", []).size == 0


@pytest.mark.parametrize("value", [None, "1", True, [1], float("nan"), float("inf"), -1, 10**400, 1j])
def test_number_refuses(value: Any) -> None:
    with pytest.raises(ProblemError, match=r"^x: is .*must be a finite number of at least 0"):
        number("x", value)


def test_no_message_prints_a_number_of_thousands_of_digits() -> None:
    for refuse in (number, whole):
        with pytest.raises(ProblemError, match=r"x: is an int of thousands of digits, must be"):
            refuse("x", 10**5000)
        with pytest.raises(ProblemError, match=r"x: is 'aaa.*\.\.\., must be") as caught:
            refuse("x", "a" * 10**6)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [None, "1", True, [1], float("nan"), float("inf"), 1.5, -1, 10**400])
def test_whole_refuses(value: Any) -> None:
    with pytest.raises(ProblemError, match=r"^x: is .*must be a whole number of at least 0"):
        whole("x", value)


def test_numbers_come_out_as_plain_python() -> None:
    assert type(number("x", np.float32(0.5))) is float
    assert type(whole("x", np.int64(3))) is int
    with pytest.raises(ProblemError, match="above 0"):
        number("x", 0, open_low=True)
    with pytest.raises(ProblemError, match="from 1 to 4"):
        whole("x", 5, low=1, high=4)


def test_checked_arrays_are_read_only_copies() -> None:
    mine = np.ones(3)
    checked = floats("x", mine)
    mine[0] = 5
    assert checked[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        checked[0] = 2
    assert mine.flags.writeable
    view = frozen(mine)
    assert not view.flags.writeable
    assert mine.flags.writeable
    assert frozen(view) is view


@few
@given(planned())
def test_records_compare_hash_and_pickle_by_value(drawn: Any) -> None:
    for record in drawn:
        for twin in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record), record.replace()):
            assert twin == record
            assert hash(twin) == hash(record)
    problem, plan = (pickle.loads(pickle.dumps(record)) for record in drawn)
    assert problem.digest() == drawn[0].digest()
    for array in (
        problem.loads.load_TLE,
        problem.topology.speed_G,
        problem.capacity_LG,
        plan.slots_LGC,
        plan.share_LGC,
        plan.moves.count_L,
        plan.certificate.value_L,
    ):
        assert not array.flags.writeable


@few
@given(problems(), st.integers(0, 10**6))
def test_any_change_of_a_load_is_a_difference(problem: Any, at: int) -> None:
    load = problem.loads.load_TLE.copy()
    load.ravel()[at % load.size] += 1.0
    other = problem.replace(loads=problem.loads.replace(load_TLE=load, load_TLNE=None))
    assert other != problem
    assert other.digest() != problem.digest()


def test_records_are_frozen_and_know_their_fields() -> None:
    objective = Objective()
    with pytest.raises(FrozenInstanceError):
        objective.risk = "worst"  # type: ignore[misc]
    with pytest.raises(ProblemError, match=r"rsk: Objective has no such field; it has .*'risk'"):
        objective.replace(rsk="worst")
    with pytest.raises(ProblemError, match=r"objective\.risk"):
        objective.replace(risk="none")
    assert objective != "objective"
    assert objective.replace(risk="worst") != objective


def test_equal_records_of_different_shape_are_different() -> None:
    assert Loads(load_TLE=[[1, 2]]) != Loads(load_TLE=[[1, 2], [1, 2]])
    assert Loads(load_TLE=[[1, 2]], weight_T=[1]) != Loads(load_TLE=[[1, 2]])


def test_errors_survive_pickling() -> None:
    for error in (
        ProblemError("a.b", "is wrong"),
        FormatError("f", "is no plan"),
        InvalidPlanError(["x", "y"]),
    ):
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert isinstance(twin, MoelessError)
    assert str(InvalidPlanError(["x", "y"])) == "plan: x (and 1 more)"
    assert isinstance(ProblemError("a", "b"), ValueError)
