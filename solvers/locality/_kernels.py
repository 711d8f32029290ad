"""The compiled form of `state`, as it stands; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from numba import njit
from numba.extending import register_jitable

from moeless_opt.solvers.locality import state as plain

__all__ = ["anneal"]

for _function in (
    plain.weigh,
    plain.draw,
    plain.without,
    plain.over,
    plain.holds,
    plain.reaches,
    plain.shift,
    plain.settle,
    plain.take,
    plain.begin,
    plain.overflown,
    plain.step_from,
    plain.moved,
    plain.anneal,
):
    register_jitable(_function)


def _anneal(field: Any, tune: Any, state: Any, told: Any) -> None:  # pragma: no cover
    plain.anneal(field, tune, state, told)


# Numba looks at one file alone to tell whether cached code is stale: the name of this one tells of both.
_anneal.__qualname__ = plain.anneal_name()
anneal = njit(cache=True, nogil=True)(_anneal)
