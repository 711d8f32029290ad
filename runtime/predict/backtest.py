"""Which forecast of the next window to trust: each is tried on the windows that have passed.

A forecaster sees windows 1 to t and says window t + 1, for every t of a recording; its error is how far its
loads were from those that came. The best on the past forecasts the next one, and its own past errors, put on
the forecast, are scenarios to plan for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, floats, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Loads
from moeless_opt.runtime.predict.history import AutoRegressive, Ewma, HistoryForecast, LastWindow, LinearTrend

__all__ = ["FORECASTERS", "Backtest", "NextWindow", "backtest", "forecast_next"]

FORECASTERS: Mapping[str, Callable[[], HistoryForecast]] = {
    "last": LastWindow,
    "last 4": lambda: LastWindow(4),
    "mean": lambda: LastWindow(1 << 20),
    "ewma 0.5": lambda: Ewma(0.5),
    "ewma 0.2": lambda: Ewma(0.2),
    "trend 6": lambda: LinearTrend(6),
    "ar(1)": AutoRegressive,
}
"""What is tried by default."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backtest:
    """How a forecaster did on the windows that have passed.

    Parameters
    ----------
    name : str
        Which one.
    error : float
        Total variation between its loads and those that came (0: the same, 1: all of it elsewhere), mean over
        windows and layers.
    error_L : array, shape [L]
        The same by layer.
    worst : float
        Of its worst window, mean over the layers.
    windows : int
        Windows that it was tried on.
    """

    name: str
    error: float
    error_L: FloatArray
    worst: float
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NextWindow:
    """The forecast of the next window.

    Parameters
    ----------
    loads : Loads
        The forecast; with scenarios, the forecast and the forecast with its own past errors.
    chosen : Backtest
        The forecaster, and what it was off by.
    tried : tuple of Backtest
        All, the best first.
    """

    loads: Loads
    chosen: Backtest
    tried: tuple[Backtest, ...]


def backtest(
    loads: Loads | ArrayLike,
    forecasters: Mapping[str, Callable[[], HistoryForecast]] = FORECASTERS,
    *,
    begin: int = 2,
) -> tuple[Backtest, ...]:
    """Try forecasters on the windows of a recording, best first.

    Parameters
    ----------
    loads : Loads or array, shape [T, L, E]
        Windows in their order of time.
    forecasters : mapping
        Name -> maker of a fresh one.
    begin : int
        Windows that each has seen before its first forecast counts.

    Raises
    ------
    ProblemError
        If there are too few windows, or no forecaster.
    """
    load_TLE = _windows(loads, begin)
    return tuple(one for one, _ in _tried(load_TLE, forecasters, begin))


def forecast_next(
    loads: Loads | ArrayLike,
    forecasters: Mapping[str, Callable[[], HistoryForecast]] = FORECASTERS,
    *,
    scenarios: int = 0,
    begin: int = 2,
) -> NextWindow:
    """The next window by the forecaster that was best on those before it.

    Parameters
    ----------
    loads, forecasters, begin
        As in `backtest`.
    scenarios : int
        So many further scenarios: the forecast plus the errors of its last forecasts. A plan for them all
        bears the errors that were made before.

    Returns
    -------
    NextWindow
        Its loads have as many tokens in each layer as the last window in which it had any.

    Examples
    --------
    >>> import numpy as np
    >>> found = forecast_next(np.tile([[[3.0, 1.0]]], (5, 1, 1)))
    >>> found.loads.load_LE.tolist(), found.chosen.error
    ([[3.0, 1.0]], 0.0)
    """
    load_TLE = _windows(loads, begin)
    ranked = _tried(load_TLE, forecasters, begin)
    chosen, off_TLE = ranked[0]
    one = forecasters[chosen.name]()
    for load_LE in load_TLE:
        one.observe(load_LE)
    share_LE = one.share_LE
    assert share_LE is not None
    kept = off_TLE[max(len(off_TLE) - whole("scenarios", scenarios), 0) :] if scenarios else off_TLE[:0]
    share_TLE = np.concatenate([share_LE[None], np.maximum(share_LE + kept, 0.0)])
    share_TLE /= share_TLE.sum(2, keepdims=True)
    layers = {"layers": loads.layers, "skipped": loads.skipped} if isinstance(loads, Loads) else {}
    total_TL = load_TLE.sum(2)
    last_L = (
        len(total_TL) - 1 - (total_TL[::-1] > 0).argmax(0)
    )  # the newest window, too, of a layer without any
    total_L1 = np.take_along_axis(total_TL, last_L[None], 0).T
    return NextWindow(
        loads=Loads(load_TLE=share_TLE * total_L1, **layers),  # type: ignore[arg-type]
        chosen=chosen,
        tried=tuple(found for found, _ in ranked),
    )


def _windows(loads: Loads | ArrayLike, begin: int) -> FloatArray:
    load_TLE = loads.load_TLE if isinstance(loads, Loads) else floats("loads", loads)
    if load_TLE.ndim != 3:
        raise ProblemError("loads", f"has shape {load_TLE.shape}, must be [windows, layers, experts]")
    if len(load_TLE) <= whole("begin", begin, low=1):
        raise ProblemError("loads", f"has {len(load_TLE)} windows, a backtest needs more than {begin}")
    return np.asarray(load_TLE)


def _tried(
    load_TLE: FloatArray, forecasters: Mapping[str, Callable[[], HistoryForecast]], begin: int
) -> list[tuple[Backtest, FloatArray]]:
    """Each with its errors (what came less what it said, as shares of a layer), best first."""
    if not forecasters:
        raise ProblemError("forecasters", "is empty, must name at least one")
    total_TL1 = load_TLE.sum(2, keepdims=True)
    came_TLE = load_TLE / np.where(total_TL1 > 0, total_TL1, 1.0)
    found = []
    for name, make in forecasters.items():
        one, off = make(), []
        for t, load_LE in enumerate(load_TLE):
            if t >= begin:
                assert one.share_LE is not None
                # A layer without load says nothing of the forecast.
                off.append(np.where(total_TL1[t] > 0, came_TLE[t] - one.share_LE, 0.0))
            one.observe(load_LE)
        off_TLE = np.array(off)
        error_TL = 0.5 * np.abs(off_TLE).sum(2)
        told = Backtest(
            name=name,
            error=float(error_TL.mean()),
            error_L=error_TL.mean(0),
            worst=float(error_TL.mean(1).max()),
            windows=len(error_TL),
        )
        found.append((told, off_TLE))
    return sorted(found, key=lambda pair: pair[0].error)
