"""The loop that gives a simulated backend its traffic, and its controller the word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
    progress : callable, optional
        Told the simulated time.

    Returns
    -------
    SimReport
        The backend's own.
    """
    for passes in traffic:
        if controller is None:
            backend.run(passes)
        elif foresight is None:
            for part in _windows(passes):
                backend.run(part)
                controller.after(int(part.weight_B.sum()))
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


def _windows(passes: Passes) -> Iterator[Passes]:
    """All at once, or one by one where some stand for many."""
    if (passes.weight_B == 1).all():
        yield passes
    else:
        yield from (passes.part(i, i + 1) for i in range(passes.count))
