"""EPLB: the published examples, the figures measured of the source, a plain form of the method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.baselines import eplb

README_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
FLASHLB_LOADS = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])


def gpu_loads(load_LE: NDArray[np.float64], plan: eplb.Rebalanced) -> NDArray[np.float64]:
    """Tokens of each GPU when an expert's tokens are spread evenly over its slots."""
    load_LG = np.zeros(plan.slots_LGC.shape[:2])
    for (layer, gpu, _), expert in np.ndenumerate(plan.slots_LGC):
        load_LG[layer, gpu] += load_LE[layer, expert] / plan.replicas_LE[layer, expert]
    return load_LG


def plain_pack(weights: list[np.float32], packs: int) -> list[tuple[int, int]]:
    """Pack one row the way the source is written: Python lists, one item at a time."""
    room = len(weights) // packs
    if room == 1:
        return [(item, 0) for item in range(packs)]
    load, held = [np.float32(0)] * packs, [0] * packs
    answer: dict[int, tuple[int, int]] = {}
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if held[p] < room), key=lambda p: load[p])
        answer[item] = (pack, held[pack])
        load[pack] += weights[item]
        held[pack] += 1
    return [answer[i] for i in range(len(weights))]


def plain_eplb(load: list[float], slots: int, groups: int, nodes: int, gpus: int) -> list[list[int]]:
    """Slots of every GPU for one layer."""
    if groups % nodes:
        groups = nodes = 1
    weights = [np.float32(x) for x in load]
    size = len(load) // groups
    group_weights = [np.float32(sum(weights[k * size : (k + 1) * size])) for k in range(groups)]
    on_node: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
    for group, (node, place) in enumerate(plain_pack(group_weights, nodes)):
        on_node[node].append((place, group))
    answer: list[list[int]] = []
    for members in on_node:
        experts = [group * size + i for _, group in sorted(members) for i in range(size)]
        count = dict.fromkeys(experts, 1)
        replicas = list(experts)
        while len(replicas) < slots // nodes:
            top = max(experts, key=lambda e: weights[e] / np.float32(count[e]))
            replicas.append(top)
            count[top] += 1
        packed = plain_pack([weights[e] / np.float32(count[e]) for e in replicas], gpus // nodes)
        on_gpu: list[list[tuple[int, int]]] = [[] for _ in range(gpus // nodes)]
        for expert, (gpu, place) in zip(replicas, packed, strict=True):
            on_gpu[gpu].append((place, expert))
        answer += [[expert for _, expert in sorted(held)] for held in on_gpu]
    return answer


def test_readme_example_gives_the_published_placement() -> None:
    plan = eplb.rebalance(README_LOADS, 16, 4, 2, 8)
    assert plan.policy == "hierarchical"
    assert plan.slots_LGC.reshape(2, 16).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert gpu_loads(README_LOADS, plan).max(axis=1).tolist() == [156.0, 179.5]


def test_readme_example_global_policy() -> None:
    plan = eplb.rebalance(README_LOADS, 16, 4, 2, 8, policy="global")
    assert plan.policy == "global"
    assert gpu_loads(README_LOADS, plan).max(axis=1).tolist() == [138.5, 172.0]


def test_flashlb_example() -> None:
    plan = eplb.rebalance(FLASHLB_LOADS, 16, 1, 1, 8)
    assert gpu_loads(FLASHLB_LOADS, plan).max() == pytest.approx(232.0)


@pytest.mark.parametrize(
    ("workload", "slots", "groups", "nodes", "gpus", "imbalance"),
    [
        ("prefill_in1024", 288, 1, 1, 32, "1.007"),
        ("decode_in1000out1000", 288, 1, 1, 32, "1.007"),
        ("decode_in1000out1000", 320, 1, 1, 64, "1.021"),
        ("prefill_in1024", 288, 8, 4, 32, "1.166"),
        ("decode_in1000out1000", 288, 8, 4, 32, "1.317"),
        ("decode_in1000out1000", 320, 8, 8, 64, "2.057"),
    ],
)
def test_figures_measured_of_the_source(
    shared_data: Path, workload: str, slots: int, groups: int, nodes: int, gpus: int, imbalance: str
) -> None:
    with np.load(shared_data / "deepseek_v3_counts.npz") as recording:
        load_LE = recording["counts"][recording["workloads"].tolist().index(workload)].astype(np.float64)
    load_LG = gpu_loads(load_LE, eplb.rebalance(load_LE, slots, groups, nodes, gpus))
    assert f"{(load_LG.max(axis=1) / load_LG.mean(axis=1)).mean():.3f}" == imbalance


@st.composite
def sizes(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    """Loads with ties and zeros, slots, groups, nodes, GPUs that EPLB accepts."""
    nodes = draw(st.sampled_from([1, 2, 4]))
    gpus = nodes * draw(st.integers(1, 4))
    groups = draw(st.sampled_from([nodes, 2 * nodes, 1, 3]))
    per_group = draw(st.integers(1, 5))
    experts = groups * per_group
    slots = gpus * (-(-experts // gpus) + draw(st.integers(0, 3)))
    load = st.one_of(st.integers(0, 4), st.integers(0, 1_000_000)).map(float)
    rows = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return rows, slots, groups, nodes, gpus


@given(sizes())
@settings(deadline=None, max_examples=150)
def test_all_layers_at_once_is_the_plain_method(case: tuple[list[list[float]], int, int, int, int]) -> None:
    rows, *size = case
    plan = eplb.rebalance(rows, *size)
    assert plan.slots_LGC.tolist() == [plain_eplb(row, *size) for row in rows]


@given(sizes())
@settings(deadline=None, max_examples=100)
def test_counts_ranks_and_merging_agree(case: tuple[list[list[float]], int, int, int, int]) -> None:
    rows, slots, groups, nodes, gpus = case
    load_LE = np.array(rows)
    plan = eplb.rebalance(load_LE, slots, groups, nodes, gpus)
    slots_LGC, share_LGC, wasted_L = plan.merged()
    held_LGC = slots_LGC >= 0
    for layer in range(len(rows)):
        flat = plan.slots_LGC[layer].ravel()
        ranks = plan.rank_LGC[layer].ravel()
        for expert, count in enumerate(plan.replicas_LE[layer]):
            assert sorted(ranks[flat == expert]) == list(range(count))
            assert share_LGC[layer][slots_LGC[layer] == expert].sum() == pytest.approx(1.0)
        for gpu in range(gpus):
            kept = slots_LGC[layer, gpu][held_LGC[layer, gpu]]
            assert len(set(kept.tolist())) == len(kept)
            assert set(kept.tolist()) == set(plan.slots_LGC[layer, gpu].tolist())
    assert plan.replicas_LE.sum(axis=1).tolist() == [slots] * len(rows)
    assert wasted_L.tolist() == plan.duplicates_L.tolist() == (~held_LGC).sum(axis=(1, 2)).tolist()
    assert not share_LGC[~held_LGC].any()
    # Empty slots last, and the GPU loads are those of the raw plan.
    assert (held_LGC[:, :, :-1] >= held_LGC[:, :, 1:]).all()
    tokens_LGC = np.take_along_axis(load_LE, np.maximum(slots_LGC, 0).reshape(len(rows), -1), axis=1)
    merged_LG = (tokens_LGC.reshape(slots_LGC.shape) * share_LGC).sum(axis=2)
    np.testing.assert_allclose(merged_LG, gpu_loads(load_LE, plan), rtol=1e-12, atol=1e-9)


def test_a_duplicate_is_merged_with_its_share() -> None:
    plan = eplb.rebalance([[90.0, 10.0, 10.0, 10.0]], 6, 1, 1, 2)
    assert plan.slots_LGC.tolist() == [[[0, 0, 3], [0, 1, 2]]]
    slots_LGC, share_LGC, wasted_L = plan.merged()
    assert slots_LGC.tolist() == [[[0, 3, -1], [0, 1, 2]]]
    np.testing.assert_allclose(share_LGC, [[[2 / 3, 1, 0], [1 / 3, 1, 1]]])
    assert wasted_L.tolist() == [1]


def test_hierarchical_policy_keeps_groups_on_one_node() -> None:
    load_LE = np.random.default_rng(5).lognormal(size=(6, 32))
    plan = eplb.rebalance(load_LE, 48, 8, 4, 8)
    for layer_slots in plan.slots_LGC.reshape(6, 4, -1):
        groups_by_node = [set((node // 4).tolist()) for node in layer_slots]
        assert sum(len(groups) for groups in groups_by_node) == 8
        assert set.union(*groups_by_node) == set(range(8))


@pytest.mark.parametrize("fill", ["none", "copies"])
def test_groups_stay_on_nodes_whose_gpus_are_not_numbered_in_a_row(fill: str) -> None:
    node_G = np.array([0, 1, 2, 0, 1, 2])
    topology = mo.Topology(node_G=node_G, speed_G=np.ones(6), slots_G=np.full(6, 4))
    load_LE = np.random.default_rng(5).lognormal(size=(3, 12))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE),
        topology=topology,
        split="equal" if fill == "copies" else "fractional",
        fill=fill,
    )
    plan = mo.solve(problem, "eplb-hierarchical", groups=6).plan
    assert plan is not None
    for slots_GC in plan.slots_LGC:
        groups = [
            set((slots_GC[node_G == node] // 2)[slots_GC[node_G == node] >= 0].tolist()) for node in range(3)
        ]
        assert sum(map(len, groups)) == 6


def test_auto_is_the_rule_of_the_source_and_says_so() -> None:
    load_LE = np.ones((1, 12))
    assert eplb.rebalance(load_LE, 12, 4, 2, 4).policy == "hierarchical"
    assert eplb.rebalance(load_LE, 12, 3, 2, 4).policy == "global"
    with pytest.raises(ProblemError, match=r"groups: EPLB needs a multiple of nodes \(2\), got 3"):
        eplb.rebalance(load_LE, 12, 3, 2, 4, policy="hierarchical")


def test_layers_without_any_load_are_placed_too() -> None:
    plan = eplb.rebalance(np.zeros((2, 4)), 8, 1, 1, 4)
    assert plan.replicas_LE.tolist() == [[5, 1, 1, 1]] * 2
    assert sorted(set(plan.slots_LGC[0].ravel().tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("loads", "size", "message"),
    [
        ([[1.0, 2.0]], (3, 1, 1, 2), r"slots_total: EPLB needs a multiple of gpus \(2\), got 3"),
        ([[1.0, 2.0, 3.0]], (4, 2, 2, 2), r"experts: EPLB needs a multiple of groups \(2\), got 3"),
        ([[1.0, 2.0]], (3, 2, 2, 3), r"gpus: EPLB needs a multiple of nodes \(2\), got 3"),
        ([[1.0, 2.0]], (4, 1, 1, 0), "gpus: must be at least 1, got 0"),
        ([1.0, 2.0], (4, 1, 1, 2), r"loads: must be a non-empty \[layers, experts\] array, got shape \(2,\)"),
        ([[1.0, float("nan")]], (4, 1, 1, 2), "loads: must be finite, not negative"),
        ([[1.0, -2.0]], (4, 1, 1, 2), "loads: must be finite, not negative"),
        ([[1e300, 1.0]], (4, 1, 1, 2), "loads: .*sum to less than"),
    ],
)
def test_bad_input_names_the_field(
    loads: list[list[float]], size: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        eplb.rebalance(loads, *size)


def test_too_few_slots_says_by_how_many() -> None:
    with pytest.raises(
        InfeasibleError, match="8 experts need at least 8 slots per layer, there are 6: 2 too few"
    ):
        eplb.rebalance(np.ones((1, 8)), 6, 1, 1, 2)


def test_unknown_policy() -> None:
    with pytest.raises(ProblemError, match="policy: must be auto, global or hierarchical, got 'best'"):
        eplb.rebalance(np.ones((1, 8)), 8, 1, 1, 2, policy="best")  # type: ignore[arg-type]
