"""The loop that gives a simulated backend its traffic, and its controller the word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.runtime.control import Controller
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.report import SimReport
from moeless_opt.runtime.simulate.traffic import Passes

__all__ = ["drive"]


def drive(
    backend: SimulatedBackend,
    traffic: Iterable[Passes],
    controller: Controller | None = None,
    *,
    foresight: Callable[[Passes], FloatArray] | None = None,
    interval: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimReport:
    """Drive a backend with traffic under a controller.

    Parameters
    ----------
    backend : SimulatedBackend
        What serves.
    traffic : iterable of Passes
        What is served.
    controller : Controller, optional
        Who plans; nobody by default.
    foresight : callable, optional
        Then the controller is asked before every pass: given the next passes, in order, what was foreseen of
        each, [B, L, E] (see `foresight`). Without, it plans after passes, from their loads.
    interval : float, optional
        Seconds between two plans of a controller that plans after passes; by default it counts passes.
    progress : callable, optional
        Told the simulated time.

    Returns
    -------
    SimReport
        The backend's own.
    """
    due = interval or 0.0
    for passes in traffic:
        if controller is None:
            backend.run(passes)
        elif foresight is None:
            for part in _windows(passes, interval):
                backend.run(part)
                if interval is None or backend.now >= due:
                    controller.after(int(part.weight_B.sum()))
                    due = interval * (backend.now // interval + 1) if interval else due
        else:
            foreseen_BLE = foresight(passes)
            for i in range(passes.count):
                backend.wait_until(float(passes.start_B[i]))
                if foreseen_BLE[i].any():
                    controller.before(foreseen_BLE[i])
                backend.run(passes.part(i, i + 1))
                controller.passes += 1
        if progress is not None:
            progress(float(passes.start_B[-1]))
    return backend.report


def _windows(passes: Passes, interval: float | None) -> Iterator[Passes]:
    """All at once, cut where an interval begins, or one by one where some stand for many."""
    if (passes.weight_B == 1).all():
        cuts = [] if interval is None else (np.flatnonzero(np.diff(passes.start_B // interval)) + 1).tolist()
    else:
        cuts = list(range(1, passes.count))
    for low, high in zip([0, *cuts], [*cuts, passes.count], strict=True):
        yield passes.part(low, high)
