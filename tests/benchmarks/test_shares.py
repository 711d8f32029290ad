"""Speed of shares and of the fractional construction: ``pytest tests/benchmarks --benchmark-enable``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.pack.counts import apportion, trim
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph
from moeless_opt.solvers.shares.rounding import round_shares
from tests.oracles.share_lp import ShareLP

LAYERS, EXPERTS = 58, 256


def drifted(gpus: int, slots: int) -> tuple[np.ndarray, ReplicaGraph]:
    """A placement for one set of loads, and other loads to split on it."""
    rng = np.random.default_rng(0)
    planned_LE = np.exp(rng.normal(0.0, 0.8, (LAYERS, EXPERTS))) * 1e4
    capacity_LG = np.full((LAYERS, gpus), slots)
    replicas_LE = trim(planned_LE, apportion(planned_LE, capacity_LG.sum(axis=1), gpus), capacity_LG)
    slots_LGC = pack(planned_LE, replicas_LE, capacity_LG, np.ones(gpus))
    return planned_LE * np.exp(rng.normal(0.0, 0.2, planned_LE.shape)), ReplicaGraph(
        slots_LGC, np.ones(gpus), EXPERTS
    )


@pytest.mark.parametrize(("gpus", "slots"), [(32, 9), (64, 5)])
def test_exact_shares(benchmark: Any, gpus: int, slots: int) -> None:
    load_LE, graph = drifted(gpus, slots)
    found = benchmark(lambda: solve_shares(load_LE, graph))
    assert found.gap_L.max() < 1e-9


@pytest.mark.parametrize(("gpus", "slots"), [(32, 9), (64, 5)])
def test_descent(benchmark: Any, gpus: int, slots: int) -> None:
    load_LE, graph = drifted(gpus, slots)
    found = benchmark(lambda: solve_shares(load_LE, graph, exact=False, tolerance=0.005))
    assert found.gap_L.max() < 0.01


def test_persistent_programmes(benchmark: Any) -> None:
    load_LE, graph = drifted(32, 9)
    programmes = [ShareLP(slots_GC, np.ones(32), EXPERTS) for slots_GC in graph.slots_LGC]
    time_L = benchmark(lambda: [lp.time(load_E) for lp, load_E in zip(programmes, load_LE, strict=True)])
    np.testing.assert_allclose(time_L, solve_shares(load_LE, graph).time_L, rtol=1e-8)


def test_prepare_a_placement(benchmark: Any) -> None:
    _, graph = drifted(32, 9)
    again = benchmark(lambda: ReplicaGraph(graph.slots_LGC, np.ones(32), EXPERTS))
    np.testing.assert_array_equal(again.gpu_LXR, graph.gpu_LXR)


def test_rounding(benchmark: Any) -> None:
    load_LE, graph = drifted(32, 9)
    count_LE = load_LE.astype(np.int64)
    share_LGC = solve_shares(count_LE.astype(float), graph).share_LGC
    token_LGC = benchmark(lambda: round_shares(count_LE, graph.slots_LGC, share_LGC))
    assert token_LGC.sum() == count_LE.sum()


@pytest.mark.parametrize(
    ("layers", "experts", "gpus", "slots"), [(58, 256, 32, 9), (58, 256, 64, 5), (1, 8, 8, 2)]
)
def test_construct_fractional(benchmark: Any, layers: int, experts: int, gpus: int, slots: int) -> None:
    load_LE = np.exp(np.random.default_rng(0).normal(0.0, 1.0, (layers, experts))) * 1e4
    capacity_LG, speed_G = np.full((layers, gpus), slots), np.ones(gpus)
    slots_LGC, share_LGC = benchmark(lambda: construct_fractional(load_LE, capacity_LG, speed_G))
    rows = np.arange(layers)[:, None, None]
    time_LG = np.where(slots_LGC >= 0, load_LE[rows, slots_LGC] * share_LGC, 0.0).sum(axis=2)
    np.testing.assert_allclose(time_LG.max(axis=1), load_LE.sum(axis=1) / gpus, rtol=1e-9)
