"""Engines' maps [layers, slots] and our placements [layers, GPUs, slots], both ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.adapters import EngineMap, expert_slots, map_of_slots, slots_of_map
from moeless_opt.problems.errors import ProblemError


@st.composite
def maps(draw: st.DrawFn, copies: bool = False) -> tuple[np.ndarray, int, int]:
    """A map, its GPUs and its experts; every expert is there."""
    layers, gpus, slots = (draw(st.integers(1, high)) for high in (4, 5, 4))
    experts = draw(st.integers(1, gpus * slots if copies else min(gpus * slots, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    map_LS = np.full((layers, gpus * slots), -1)
    for row in map_LS:
        row[:experts] = np.arange(experts)
        if copies:
            row[experts:] = rng.integers(0, experts, row.size - experts)
        rng.shuffle(row)
    return map_LS, gpus, experts


@given(maps())
def test_there_and_back(case: tuple[np.ndarray, int, int]) -> None:
    map_LS, gpus, _ = case
    slots_LGC = slots_of_map(map_LS, gpus)
    slots = slots_LGC.shape[2]
    for slot in range(map_LS.shape[1]):
        assert (slots_LGC[:, slot // slots, slot % slots] == map_LS[:, slot]).all()
    assert (map_of_slots(slots_LGC) == map_LS).all()
    wider = map_of_slots(slots_LGC, slots + 2).reshape(len(map_LS), gpus, -1)
    assert (wider[:, :, :slots] == slots_LGC).all()
    assert (wider[:, :, slots:] == -1).all()


@given(maps())
def test_slots_of_every_expert(case: tuple[np.ndarray, int, int]) -> None:
    map_LS, _, experts = case
    slot_LEX, count_LE = expert_slots(map_LS, experts)
    for row, slots_EX in enumerate(slot_LEX):
        for expert in range(experts):
            there = np.flatnonzero(map_LS[row] == expert).tolist()
            assert slots_EX[expert][: len(there)].tolist() == there
            assert (slots_EX[expert][len(there) :] == -1).all()
            assert count_LE[row, expert] == len(there)
    assert slot_LEX.shape[2] == count_LE.max()


def test_a_placement_of_a_map() -> None:
    placement = EngineMap(map_LS=[[0, 1, 2, -1], [2, 1, -1, 0]]).placement(gpus=2)
    assert placement.experts == 3
    assert placement.slots_LGC.tolist() == [[[0, 1], [2, -1]], [[2, 1], [-1, 0]]]


def test_rows_are_found_by_the_model_s_numbers() -> None:
    rows = [[0, 1], [1, 0], [0, 1], [1, 0]]
    engine = EngineMap(map_LS=rows, layers=(3, 4, 5, 61))
    assert engine.placement(gpus=2, layers=[4, 61]).slots_LGC[:, :, 0].tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ProblemError, match=r"layer 6: is not in the map, which has the layers 3-5, 61"):
        engine.placement(gpus=2, layers=[5, 6])
    every = EngineMap(map_LS=rows, all_layers=True)
    assert every.placement(gpus=2, layers=[2, 3]).slots_LGC[:, :, 0].tolist() == [[0, 1], [1, 0]]
    plain = EngineMap(map_LS=rows)
    assert len(plain.placement(gpus=2, layers=[3, 4, 5, 6]).slots_LGC) == 4  # MoE layers, by position
    with pytest.raises(ProblemError, match=r"layers: are 4 in the map, 3 are wanted"):
        plain.placement(gpus=2, layers=[0, 1, 2])


@pytest.mark.parametrize(
    ("engine", "asked", "message"),
    [
        ({}, {}, "gpus: are not in a map of slots"),
        ({"gpus": 4}, {"gpus": 2}, "gpus: are 4 in the map, 2 are wanted"),
        ({}, {"gpus": 3}, "map: has 4 slots per layer, which 3 GPUs cannot have in equal parts"),
        (
            {},
            {"gpus": 2, "experts": 2},
            r"layer 7, slot 3 \(GPU 1\): expert 2 is unknown; a layer has the exp",
        ),
        ({}, {"gpus": 2, "experts": 4}, "layer 7: no slot holds expert 3; each of the 4 experts needs one"),
        ({"experts": 5}, {"gpus": 2}, "layer 7: no slot holds expert 3"),
    ],
)
def test_what_does_not_fit_is_named(engine: dict, asked: dict, message: str) -> None:
    found = EngineMap(map_LS=[[0, 1, 0, 2]], layers=(7,), **engine)
    with pytest.raises(ProblemError, match=message):
        found.placement(**asked)
    if "missing" in message or "no slot" in message:
        assert found.placement(gpus=2, partial=True, experts=asked.get("experts")).partial


@pytest.mark.parametrize(
    "value", [[0, 1], [[[0]]], [[]], [[0.5]], [["a"]], [[-2]], [[2**31]], [[0, 1], [0]], {"a": 1}]
)
def test_no_map(value: object) -> None:
    with pytest.raises(ProblemError, match="map"):
        EngineMap(map_LS=value)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="map"):
        slots_of_map(value, 1)  # type: ignore[arg-type]


def test_experts_beyond_all_slots_are_unknown() -> None:
    with pytest.raises(ProblemError, match=r"layer 0, slot 1 \(GPU 1\): expert 2147483646 is unknown"):
        EngineMap(map_LS=[[0, 2**31 - 2]]).placement(gpus=2)


def test_slots_beyond_those_of_a_gpu() -> None:
    with pytest.raises(ProblemError, match=r"slots\[0\]\[1\]: go beyond the 1 slots of a GPU"):
        map_of_slots([[[0, -1], [1, 2]]], 1)
