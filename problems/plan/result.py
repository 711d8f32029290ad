"""What came of a solve: the plan, its status, and why the search ended."""

from __future__ import annotations

import enum

__all__ = ["StoppedBy"]


class StoppedBy(enum.StrEnum):
    """What ended a search before it ended by itself; falsy where nothing did."""

    NOTHING = ""
    TIME = "time"
    GAP = "gap"
    INTERRUPT = "interrupt"
    CALLER = "caller"
