"""Forecasters chosen by what they were off by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.predict.backtest import FORECASTERS, backtest, forecast_next
from moeless_opt.runtime.predict.history import LastWindow, LinearTrend

RNG = np.random.default_rng(0)


def noisy(windows: int = 30) -> Any:
    base = RNG.lognormal(0, 1, (2, 8)) * 100
    return RNG.poisson(base * 20, (windows, 2, 8)).astype(float)


def jumping() -> Any:
    """A new distribution every four windows."""
    return np.repeat(RNG.dirichlet(np.ones(8), (8, 2)), 4, axis=0) * 1000


def rising() -> Any:
    up = np.arange(20.0)[:, None] * np.array([1.0, -1.0]) + np.array([100.0, 300.0])
    return np.stack([up, up[:, ::-1]], axis=1)


@pytest.mark.parametrize(("windows", "best"), [(noisy(), "mean"), (jumping(), "last"), (rising(), "trend 6")])
def test_each_kind_of_traffic_has_its_own(windows: Any, best: str) -> None:
    found = backtest(windows)
    assert found[0].name == best
    assert [one.error for one in found] == sorted(one.error for one in found)
    assert {one.name for one in found} == set(FORECASTERS)


def test_the_error_is_that_of_the_windows_it_has_not_seen() -> None:
    windows = noisy(6)
    share = windows / windows.sum(2, keepdims=True)
    want = 0.5 * np.abs(share[3:] - share[2:-1]).sum(2)
    (found,) = backtest(windows, {"last": LastWindow}, begin=3)
    assert found.error == pytest.approx(want.mean())
    np.testing.assert_allclose(found.error_L, want.mean(0))
    assert found.worst == pytest.approx(want.mean(1).max())
    assert found.windows == 3


def test_the_best_forecasts_and_its_errors_are_scenarios() -> None:
    found = forecast_next(rising())
    assert found.chosen.name == "trend 6"
    np.testing.assert_allclose(found.loads.load_LE, [[120.0, 280.0], [280.0, 120.0]], rtol=1e-6)
    windows = noisy()
    many = forecast_next(windows, scenarios=4)
    assert many.loads.shape == (5, 2, 8)
    np.testing.assert_allclose(many.loads.load_TLE.sum(2), np.tile(windows[-1].sum(1), (5, 1)))
    np.testing.assert_allclose(many.loads.load_TLE[0], forecast_next(windows).loads.load_LE)
    assert (many.loads.load_TLE >= 0).all()
    assert len({one.tobytes() for one in many.loads.load_TLE}) == 5
    named = mo.Loads(load_TLE=windows, layers=(4, 7))
    assert forecast_next(named).loads.layers == (4, 7)


def test_idle_windows_and_bad_input() -> None:
    windows = noisy(8)
    windows[5, 1] = 0
    assert all(np.isfinite(one.error) for one in backtest(windows))
    windows[:] = 0
    assert backtest(windows)[0].error == 0
    assert forecast_next(windows, scenarios=2).loads.load_LE.sum() == 0
    for bad, text in (
        (windows[0], "must be"),
        (windows[:2], "needs more than 2"),
    ):
        with pytest.raises(ProblemError, match=text):
            backtest(bad)
    with pytest.raises(ProblemError, match="is empty"):
        backtest(windows, {})
    assert backtest(windows[:3], {"trend": LinearTrend})[0].windows == 1
