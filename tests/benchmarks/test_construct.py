"""Speed of the equal-split construction: ``pytest tests/benchmarks/test_construct.py --benchmark-enable``."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.pack import fast

BACKENDS = [
    "numpy",
    pytest.param("numba", marks=pytest.mark.skipif(not fast.available(), reason="Numba is not installed")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("G", "C"), [(32, 9), (64, 5)])
def test_recorded_model(benchmark, shared_data, G, C, backend):
    """All 58 layers of a recorded DeepSeek-V3 load."""
    with np.load(shared_data / "deepseek_v3_counts.npz") as data:
        load = data["counts"][0].astype(float)
    capacity, speed = np.full((58, G), C), np.ones(G)
    slots = benchmark(construct_equal, load, capacity, speed, backend=backend)
    assert slots.shape == (58, G, C)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deepseek_shape(benchmark, backend):
    """The same shape from a generator, where no recording is at hand."""
    load = np.random.default_rng(0).lognormal(0, 1, (58, 256))
    slots = benchmark(construct_equal, load, np.full((58, 32), 9), np.ones(32), backend=backend)
    assert slots.shape == (58, 32, 9)


@pytest.mark.parametrize("effort", ["quick", "normal"])
@pytest.mark.parametrize(("E", "G", "C"), [(8, 8, 2), (16, 8, 3)])
def test_small_layer(benchmark, E, G, C, effort):
    """One layer of a small model."""
    load = np.random.default_rng(0).lognormal(0, 1, (1, E))
    slots = benchmark(construct_equal, load, np.full((1, G), C), np.ones(G), effort=effort)
    assert slots.shape == (1, G, C)
