"""Torch shares: the same numbers as NumPy, and nothing that waits for the device."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moeless_opt.solvers.pack.counts import apportion, trim  # noqa: E402
from moeless_opt.solvers.pack.packing import pack  # noqa: E402
from moeless_opt.solvers.shares import torch as share_torch  # noqa: E402
from moeless_opt.solvers.shares.flow import solve_shares  # noqa: E402
from moeless_opt.solvers.shares.graph import ReplicaGraph  # noqa: E402
from moeless_opt.solvers.shares.torch import TorchShares  # noqa: E402


def problem(seed: int) -> tuple[np.ndarray, ReplicaGraph]:
    rng = np.random.default_rng(seed)
    layers, gpus, slots = int(rng.integers(1, 4)), int(rng.integers(2, 9)), int(rng.integers(2, 5))
    experts = int(rng.integers(1, gpus * slots + 1))
    load_LE = np.exp(rng.normal(0.0, 1.0, (layers, experts))) * 100.0
    capacity_LG = np.full((layers, gpus), slots)
    total_L = np.full(layers, min(gpus * slots, gpus * experts))
    replicas_LE = trim(load_LE, apportion(load_LE, total_L, gpus), capacity_LG)
    speed_G = np.ones(gpus) if seed % 2 else rng.uniform(0.5, 2.0, gpus)
    slots_LGC = pack(load_LE, replicas_LE, capacity_LG, speed_G)
    return load_LE * np.exp(rng.normal(0.0, 0.3, load_LE.shape)), ReplicaGraph(slots_LGC, speed_G, experts)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_same_shares_as_numpy(seed: int) -> None:
    load_LE, graph = problem(seed)
    expected = solve_shares(load_LE, graph, exact=False, tolerance=-1.0, max_sweeps=12)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        solver = TorchShares(graph, dtype=dtype, sweeps=12)
        loads = torch.as_tensor(load_LE)
        share_LGC, time_LG = solver(loads)
        np.testing.assert_allclose(share_LGC.numpy(), expected.share_LGC, atol=tolerance)
        np.testing.assert_allclose(time_LG.numpy(), expected.time_LG, rtol=tolerance)
        gap_L = solver.gap(loads, time_LG).numpy()
        assert (np.abs(gap_L - expected.gap_L) <= tolerance).all()


def test_more_sweeps_reach_the_optimum() -> None:
    load_LE, graph = problem(11)
    _, time_LG = TorchShares(graph, sweeps=2000)(torch.as_tensor(load_LE))
    np.testing.assert_allclose(time_LG.numpy().max(axis=1), solve_shares(load_LE, graph).time_L, rtol=1e-6)


def test_zero_loads_split_evenly() -> None:
    solver = TorchShares(np.array([[[0], [0]]]))
    share_LGC, time_LG = solver(torch.zeros((1, 1), dtype=torch.float64))
    assert share_LGC.flatten().tolist() == [0.5, 0.5]
    assert time_LG.max() == 0.0


def test_calls_can_be_traced_on_the_meta_device() -> None:
    """A meta tensor has no data: any read-back to the host raises on it."""
    _, graph = problem(7)
    solver = TorchShares(graph, device="meta")
    loads = torch.empty((graph.shape[0], graph.experts), dtype=torch.float64, device="meta")
    share_LGC, time_LG = solver(loads)
    assert share_LGC.shape == graph.shape
    assert solver.gap(loads, time_LG).shape == graph.shape[:1]


def test_no_host_synchronisation_in_the_source() -> None:
    source = "\n".join(
        inspect.getsource(part) for part in (TorchShares.__call__, TorchShares.gap, TorchShares._to_shares)
    )
    assert not re.search(r"\.(item|cpu|tolist|numpy|nonzero)\(|bool\(", source)
    assert inspect.getsource(share_torch._fill).count("sort") > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_the_gpu() -> None:
    load_LE, graph = problem(5)
    torch.cuda.set_sync_debug_mode("default")
    on_cpu = TorchShares(graph)(torch.as_tensor(load_LE))
    solver, loads = TorchShares(graph, device="cuda"), torch.as_tensor(load_LE, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = solver(loads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, two in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_allclose(one.numpy(), two.cpu().numpy(), rtol=1e-9, atol=1e-12)
