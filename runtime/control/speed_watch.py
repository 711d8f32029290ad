"""Speeds of nominally equal GPUs while a model runs: changes that last, and nothing of chance.

Every look of a controller says how many rows each rank's experts served in each layer and how long that took.
A GPU's speed is what it is in the median layer, against the median GPU (`measured_speeds`); it counts as
changed when so many looks in a row say so, in the same direction: a single slow look (a neighbour, a clock
that dips) plans nothing anew. What is believed then is the median of all layers of those looks. Every rank
sees the same observations, so that all believe the same.

References
----------
Consecutive evidence before a change is accepted is the run rule of control charts: Page, "Continuous
inspection schemes" (1954); drift of GPUs' speeds is what ViBE (2026, arXiv 2606.00735) balances for.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.control.backend import Observation
from moeless_opt.speeds import measured_speeds

__all__ = ["SpeedWatch"]


class SpeedWatch:
    """What is believed of the GPUs' speeds.

    Parameters
    ----------
    patience : int
        Looks in a row by which a GPU must differ from what is believed of it.
    least : float
        Relative difference from which one counts.
    noise : float
        Standard errors that a GPU must be away from the others to differ from them at all.
    """

    def __init__(self, *, patience: int = 3, least: float = 0.05, noise: float = 3.0) -> None:
        self.patience = whole("patience", patience, low=1)
        self.least = number("least", least)
        if not 0 < self.least < 1:
            raise ProblemError("least", f"is {least}, must be above 0 and below 1 (0.05 is five per cent)")
        self.noise = number("noise", noise)
        #: Relative speeds, shape [G]; the median GPU has 1. None before the first look.
        self.speed_G: FloatArray | None = None
        #: Times that it changed.
        self.changes = 0
        self._looks: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=self.patience)

    def see(self, seen: Observation) -> bool:
        """Take another look; returns whether what is believed changed."""
        tokens_LG = seen.tokens_LG.astype(np.float64)
        if self.speed_G is None or self.speed_G.size != tokens_LG.shape[1]:  # a rank was lost, or came
            self.speed_G = np.ones(tokens_LG.shape[1])
            self._looks.clear()
        self._looks.append((tokens_LG, np.asarray(seen.seconds_LG, dtype=np.float64)))
        if len(self._looks) < self.patience:
            return False
        ratio_KG = np.array([self._speeds(*look) for look in self._looks]) / self.speed_G - 1
        away_G: BoolArray = np.asarray(
            (ratio_KG > self.least).all(0) | (ratio_KG < -self.least).all(0), dtype=np.bool_
        )
        if not away_G.any():
            return False
        now_G = self._speeds(*(np.concatenate(part) for part in zip(*self._looks, strict=True)))
        self.speed_G = np.where(away_G, now_G, self.speed_G)
        self.changes += 1
        self._looks.clear()  # the next change needs evidence of its own
        return True

    def _speeds(self, tokens_SG: FloatArray, seconds_SG: FloatArray) -> FloatArray:
        """Speeds by some samples; of who served nothing, as believed."""
        assert self.speed_G is not None
        busy_G = ((tokens_SG > 0) & (seconds_SG > 0)).any(0)
        found_G = self.speed_G.copy()
        if busy_G.sum() > 1:
            found_G[busy_G] = measured_speeds(
                tokens_SG[:, busy_G], seconds_SG[:, busy_G], noise=self.noise, least=self.least
            )
        return found_G
