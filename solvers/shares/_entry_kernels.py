"""The compiled form of `entry_search`; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from numba import njit
from numba.extending import register_jitable

from moeless_opt.solvers.shares import entry_search as plain

__all__ = ["lower_peaks"]

for _function in (
    plain.lower_peak,
    plain.worst,
    plain.grow,
    plain.cycles,
    plain.evenly,
    plain.peak,
    plain.whole,
    plain.fits,
    plain.lay,
    plain.hand_out,
    plain.settle,
    plain.vary,
):
    register_jitable(_function)
register_jitable(plain.lower_peaks)


def _lower_peaks(graph: Any) -> None:  # pragma: no cover
    plain.lower_peaks(graph)


# Numba looks at one file alone to tell whether cached code is stale: the name of this one tells of both.
_lower_peaks.__qualname__ = plain.compiled_name()
lower_peaks = njit(cache=True, nogil=True)(_lower_peaks)
