"""Generated loads: recorded values, shapes of the distributions, drift, and recipes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.spec import generators

ZIPF = [[49.0, 115.0, 58.0, 75.0, 430.0, 38.0, 201.0, 34.0]]
LOGNORMAL = [[59.0, 118.0, 226.0, 124.0, 27.0, 319.0, 56.0, 71.0]]
TRACE = "ef900329b0bbd4ec"


def test_recorded_seeds_give_the_recorded_loads() -> None:
    """These must never change: problems name loads by recipe and plans carry their hash."""
    assert generators.zipf(1, 8, tokens=1000, seed=1).tolist() == ZIPF
    assert generators.lognormal(1, 8, tokens=1000, seed=1).tolist() == LOGNORMAL
    trace_TLE = generators.ar1_drift(generators.zipf(58, 256, tokens=2**20, seed=5), 6, sigma=0.3, seed=9)
    assert hashlib.sha256(trace_TLE.astype("<i8").tobytes()).hexdigest()[:16] == TRACE


def test_the_raw_stream_is_pcg64() -> None:
    first = int(np.random.PCG64(np.random.SeedSequence(12, spawn_key=(0,))).random_raw())
    assert generators._uniform((3,), 12, 0)[0] == (first >> 11) / 2**53


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 10_000), st.integers(0, 2**40))
def test_layers_are_whole_and_sum_to_the_tokens(layers: int, experts: int, tokens: int, seed: int) -> None:
    for load_LE in (
        generators.zipf(layers, experts, tokens=tokens, seed=seed),
        generators.lognormal(layers, experts, tokens=tokens, seed=seed),
    ):
        assert load_LE.shape == (layers, experts)
        assert (load_LE >= 0).all()
        assert (load_LE == np.rint(load_LE)).all()
        assert load_LE.sum(axis=1).tolist() == [tokens] * layers


def test_zipf_follows_its_law_in_a_different_order_per_layer() -> None:
    load_LE = generators.zipf(20, 64, tokens=10**9, alpha=1.2, jitter=0.0, seed=2)
    ranked_LE = -np.sort(-load_LE, axis=1)
    np.testing.assert_allclose(ranked_LE[:, 0] / ranked_LE[:, 7], 8**1.2, rtol=1e-6)
    assert len(set(load_LE.argmax(axis=1).tolist())) > 10
    jittered_LE = generators.zipf(20, 64, tokens=10**9, alpha=0.0, jitter=0.1, seed=2)
    spread = jittered_LE / jittered_LE.mean()
    assert 0.85 < spread.min() < 0.95 < 1.05 < spread.max() < 1.15


def test_lognormal_has_the_wanted_spread() -> None:
    load_LE = generators.lognormal(200, 256, tokens=10**12, sigma=0.8, seed=4)
    log_LE = np.log(load_LE)
    assert log_LE.std() == pytest.approx(0.8, abs=0.01)
    z = (log_LE - log_LE.mean()) / log_LE.std()
    assert (z**3).mean() == pytest.approx(0.0, abs=0.05)
    assert (z**4).mean() == pytest.approx(3.0, abs=0.1)


def test_ar1_drift_starts_at_the_loads_and_forgets_at_its_rate() -> None:
    load_LE = np.full((50, 200), 1e9)
    trace_TLE = generators.ar1_drift(load_LE, 40, sigma=0.1, rho=0.7, seed=6)
    np.testing.assert_array_equal(trace_TLE[0], load_LE)
    assert (trace_TLE.sum(axis=2) == load_LE.sum(axis=1)).all()
    log_TLE = np.log(trace_TLE[20:])
    log_TLE -= log_TLE.mean(axis=2, keepdims=True)
    # Stationary deviation sigma / sqrt(1 - rho^2), correlation rho from one step to the next.
    assert log_TLE.std() == pytest.approx(0.1 / np.sqrt(1 - 0.49), rel=0.03)
    assert (log_TLE[1:] * log_TLE[:-1]).mean() / log_TLE.var() == pytest.approx(0.7, abs=0.02)


def test_an_idle_expert_stays_idle() -> None:
    trace_TLE = generators.ar1_drift([[0.0, 5.0, 3.0], [0.0, 0.0, 0.0]], 5, sigma=2.0, seed=1)
    assert not trace_TLE[:, 0, 0].any()
    assert not trace_TLE[:, 1].any()
    assert (trace_TLE[:, 0].sum(axis=1) == 8).all()


def test_domains_switch_at_the_given_rate_and_never_to_themselves() -> None:
    load_DLE = np.array([[[90.0, 10.0]], [[10.0, 90.0]], [[50.0, 50.0]]])
    load_TLE, domain_T = generators.domain_switches(load_DLE, 5000, switch=0.25, seed=3)
    np.testing.assert_array_equal(load_TLE, load_DLE[domain_T])
    assert domain_T[0] == 0
    assert (np.diff(domain_T) != 0).mean() == pytest.approx(0.25, abs=0.02)
    turns = np.diff(domain_T)[np.diff(domain_T) != 0] % 3
    assert (turns == 1).mean() == pytest.approx(0.5, abs=0.05)
    every_T = generators.domain_switches(load_DLE, 100, switch=1.0, seed=3)[1]
    assert (np.diff(every_T) != 0).all()
    alone_T = generators.domain_switches(load_DLE[:1], 10, switch=1.0, sigma=0.2, seed=3)[1]
    assert not alone_T.any()


def test_surprise_multiplies_by_noise_of_the_given_size() -> None:
    load_LE = generators.lognormal(58, 256, seed=1)
    factor = generators.surprise(load_LE, 0.3, seed=2)[load_LE > 0] / load_LE[load_LE > 0]
    assert np.log(factor).std() == pytest.approx(0.3, rel=0.02)
    np.testing.assert_array_equal(generators.surprise(load_LE, 0.0, seed=2), load_LE)
    assert (generators.surprise(load_LE, 0.3, seed=3) != generators.surprise(load_LE, 0.3, seed=2)).any()


@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
@pytest.mark.parametrize(
    "drift", [None, {"kind": "ar1", "steps": 2}, {"kind": "domains", "steps": 3, "domains": 2}]
)
def test_a_recipe_without_a_seed_has_seed_0(kind: str, drift: Any) -> None:
    """A drift without one has that of the loads."""
    recipe: dict[str, Any] = {"kind": kind, "layers": 2, "experts": 6}
    if drift is not None:
        recipe["drift"] = drift
    np.testing.assert_array_equal(
        generators.from_recipe(recipe), generators.from_recipe(recipe | {"seed": 0})
    )
    if drift is not None:
        seeded = recipe | {"seed": 7}
        same = seeded | {"drift": drift | {"seed": 7}}
        np.testing.assert_array_equal(generators.from_recipe(seeded), generators.from_recipe(same))
    plain = {"layers": 2, "experts": 6}
    if drift is None:
        draw = generators.zipf if kind == "zipf" else generators.lognormal
        np.testing.assert_array_equal(draw(**plain), draw(**plain, seed=0))  # type: ignore[arg-type]


def test_recipes_are_the_generators() -> None:
    base = {"layers": 3, "experts": 16, "tokens": 4096, "seed": 11}
    np.testing.assert_array_equal(
        generators.from_recipe({"kind": "zipf", "alpha": 0.8, "jitter": 0.2, **base}),
        generators.zipf(3, 16, tokens=4096, alpha=0.8, jitter=0.2, seed=11),
    )
    load_LE = generators.lognormal(3, 16, tokens=4096, sigma=1.5, seed=11)
    recipe = {"kind": "lognormal", "sigma": 1.5, **base}
    np.testing.assert_array_equal(generators.from_recipe(recipe), load_LE)
    np.testing.assert_array_equal(
        generators.from_recipe(recipe | {"drift": {"kind": "ar1", "steps": 4, "sigma": 0.3, "rho": 0.9}}),
        generators.ar1_drift(load_LE, 4, sigma=0.3, rho=0.9, seed=11),
    )
    load_DLE = np.stack([generators.lognormal(3, 16, tokens=4096, sigma=1.5, seed=11 + d) for d in range(3)])
    np.testing.assert_array_equal(
        generators.from_recipe(recipe | {"drift": {"kind": "domains", "domains": 3, "steps": 9, "seed": 5}}),
        generators.domain_switches(load_DLE, 9, seed=5)[0],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "zip"}, r"loads\.kind: must be zipf or lognormal, got 'zip'"),
        ({"sigma": 1.0}, r"loads\.sigma: unknown key; known are alpha, drift, experts"),
        ({"layers": 0}, r"loads\.layers: must be a whole number from 1 to 2\^53, got 0"),
        ({"experts": 8.0}, r"loads\.experts: must be a whole number"),
        ({"tokens": True}, r"loads\.tokens: must be a whole number"),
        ({"seed": -1}, r"loads\.seed: must be a whole number from 0"),
        ({"alpha": "steep"}, r"loads\.alpha: must be a number in \[0, inf\), got 'steep'"),
        ({"jitter": 1.0}, r"loads\.jitter: must be a number in \[0, 1\), got 1.0"),
        ({"alpha": float("nan")}, r"loads\.alpha: must be a number"),
        ({"drift": 3}, r"loads\.drift: must be an object, got int"),
        ({"drift": {"kind": "walk"}}, r"loads\.drift\.kind: must be ar1 or domains, got 'walk'"),
        ({"drift": {"kind": "ar1"}}, r"loads\.drift\.steps: is missing"),
        (
            {"drift": {"kind": "ar1", "steps": 2, "rho": 1.5}},
            r"loads\.drift\.rho: must be a number in \[0, 1\]",
        ),
        ({"drift": {"kind": "domains", "steps": 2, "domains": 0}}, r"loads\.drift\.domains: must be a whole"),
        ({"drift": {"kind": "ar1", "steps": 2, "domains": 2}}, r"loads\.drift\.domains: unknown key"),
    ],
)
def test_bad_recipes_name_the_json_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        generators.from_recipe({"kind": "zipf", "layers": 2, "experts": 8} | change, "loads")


def test_bad_loads() -> None:
    with pytest.raises(
        ProblemError, match=r"loads: must be a non-empty \[layers, experts\], got shape \(2,\)"
    ):
        generators.ar1_drift([1.0, 2.0], 3)
    with pytest.raises(ProblemError, match="loads: must be finite and not negative"):
        generators.surprise([[-1.0]], 0.1)
