"""The compiled twins give the same plans, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.pack.counts import apportion
from moeless_opt.solvers.pack.packing import pack
from moeless_opt.solvers.pack.swaps import improve

needs_numba = pytest.mark.skipif(not fast.available(), reason="Numba is not installed")


def loads(rng, L, E):
    """Loads with ties, zeros and heavy tails."""
    kinds = (
        lambda: rng.lognormal(0, 1.2, (L, E)),
        lambda: rng.zipf(1.5, (L, E)).clip(0, 5000).astype(float),
        lambda: rng.integers(0, 4, (L, E)).astype(float),
    )
    return kinds[rng.integers(len(kinds))]()


@needs_numba
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    G=st.integers(1, 40),
    C=st.integers(1, 6),
    uneven=st.sampled_from(["", "slots", "speed", "both"]),
)
def test_each_kernel_is_its_twin(seed, G, C, uneven):
    rng = np.random.default_rng(seed)
    L = 3
    E = int(rng.integers(C, G * C + 1))
    load = loads(rng, L, E)
    capacity = np.full((L, G), C)
    if uneven in ("slots", "both"):
        capacity += rng.integers(0, 3, (L, G))
    speed = rng.choice([0.7, 1.0, 1.9], G) if uneven in ("speed", "both") else np.ones(G)
    total, lean = int(rng.integers(E, G * C + 1)), float(rng.choice([0.0, 0.5]))
    counts = apportion(load, total, G, lean=lean)
    assert (counts == apportion(load, total, G, lean=lean, backend="numba")).all()
    ones = np.ones_like(counts)
    counts = np.where((counts.max(axis=1) <= G)[:, None] & (uneven in ("", "speed")), counts, ones)
    slots = pack(load, counts, capacity, speed)
    assert (slots == pack(load, counts, capacity, speed, backend="numba")).all()
    for rounds, focus in ((1, 0), (0, 1), (5, 7), (40, 40)):
        a = improve(load, slots, capacity, speed, rounds=rounds, focus=focus)
        b = improve(load, slots, capacity, speed, rounds=rounds, focus=focus, backend="numba")
        assert (a == b).all()


@needs_numba
@pytest.mark.parametrize(("E", "G", "C"), [(8, 8, 2), (16, 8, 3), (64, 8, 10), (256, 64, 5)])
@pytest.mark.parametrize("kind", ["lognormal", "zipf"])
def test_constructions_are_the_same(E, G, C, kind):
    rng = np.random.default_rng(E + G)
    load = rng.lognormal(0, 1, (2, E))
    if kind == "zipf":
        load = rng.permuted(np.tile(np.arange(1, E + 1) ** -1.2, (2, 1)), axis=1) * rng.uniform(
            0.9, 1.1, (2, E)
        )
    capacity, speed = np.full((2, G), C), np.ones(G)
    a = construct_equal(load, capacity, speed, backend="numpy")
    assert (a == construct_equal(load, capacity, speed, backend="numba")).all()


@needs_numba
def test_recorded_loads_give_the_same_plans(shared_data):
    with np.load(shared_data / "deepseek_v3_counts.npz") as data:
        counts = data["counts"].astype(float)
    for load in counts[:, ::6]:
        for G, C in ((32, 9), (64, 5)):
            capacity = np.full((len(load), G), C)
            a = construct_equal(load, capacity, np.ones(G), backend="numpy")
            assert (a == construct_equal(load, capacity, np.ones(G), backend="numba")).all()


def run(code):
    """Run code in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_auto_does_not_import_numba():
    run(
        "import sys, numpy as np\n"
        "from moeless_opt.solvers.construct.equal import construct_equal\n"
        "construct_equal(np.arange(64.).reshape(1, 64), np.full((1, 8), 10), np.ones(8))\n"
        "assert 'numba' not in sys.modules"
    )


@needs_numba
def test_auto_uses_kernels_that_are_loaded():
    run(
        "from moeless_opt.solvers.pack import fast\n"
        "assert fast.choose_backend('auto') == 'numpy'\n"
        "assert fast.warm() and fast.loaded()\n"
        "assert fast.choose_backend('auto') == 'numba'"
    )


def test_missing_numba_is_named(monkeypatch):
    monkeypatch.setattr(fast, "available", lambda: False)
    assert not fast.warm()
    with pytest.raises(SolverUnavailableError, match=r"moeless-opt\[fast\]"):
        fast.choose_backend("numba")
    with pytest.raises(ProblemError, match="'cupy'"):
        fast.choose_backend("cupy")
