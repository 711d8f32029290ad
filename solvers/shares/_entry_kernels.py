"""The compiled form of `entry_search`, and of the schedule of tables; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from moeless_opt.solvers.shares import entry_search as plain

__all__ = ["lower_peaks", "schedule"]

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


@njit(cache=True, nogil=True)
def schedule(count_KR: Any, total: int, pick_TK: Any) -> None:  # pragma: no cover
    """Twin of the loop of `entry_table._schedule`."""
    rows, replicas = count_KR.shape
    given_R = np.zeros(replicas, dtype=np.int64)
    ahead_R, pace_R = np.zeros(replicas), np.zeros(replicas)
    for k in range(rows):
        serving = 0
        for r in range(replicas):
            serving += count_KR[k, r] > 0
        spread = max(2 * serving - 2, 1)
        for r in range(replicas):
            given_R[r] = 0
            ahead_R[r] = (1.0 - 1.0 / spread) * total / max(count_KR[k, r], 1)
            pace_R[r] = total / max(count_KR[k, r], 1)
        for step in range(1, total + 1):
            pick, due = 0, np.inf
            for r in range(replicas):
                if count_KR[k, r] > 0 and spread * (count_KR[k, r] * step - given_R[r] * total) >= total:
                    own = given_R[r] * pace_R[r] + ahead_R[r]
                    if own < due:
                        pick, due = r, own
            pick_TK[step - 1, k] = pick
            given_R[pick] += 1
