"""Speeds of nominally equal GPUs while a model runs: changes that last, and nothing of chance.

Every look of a controller says how many rows each rank's experts served in each layer and how long that took.
A GPU's speed in a look is what it is in the median layer, against the median GPU. It counts as changed when
so many looks in a row say so, in the same direction (a single slow look, a neighbour or a clock that dips,
plans nothing anew), and when their mean is further from what is believed than looks scatter: how much they
do is seen from one look to the next, over all GPUs, so that a model of one layer is followed no more rashly
than one of sixty. Every rank sees the same observations, so that all believe the same.

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
from moeless_opt.problems.spec import TOKENS, TimeModel
from moeless_opt.runtime.control.backend import Observation
from moeless_opt.speeds import measured_speeds

__all__ = ["SpeedWatch"]

_MEMORY = 16  # times the patience: looks by which scatter is known
_NORMAL = 1.4826 / 2**0.5  # standard deviation over the median absolute difference of two draws


class SpeedWatch:
    """What is believed of the GPUs' speeds.

    Parameters
    ----------
    patience : int
        Looks in a row by which a GPU must differ from what is believed of it.
    least : float
        Relative difference from which one counts.
    noise : float
        Standard errors of the mean of these looks that a GPU must be away from what is believed, and half as
        many more, since many GPUs are looked at often.
    time : TimeModel, optional
        Time of a pass in the experts of a layer at speed 1; by default it grows with the tokens. Where it has
        a fixed part (`TimeModel.launch`: decode) and ranks serve unlike many tokens, those with few would
        seem slow without it.
    """

    def __init__(
        self, *, patience: int = 3, least: float = 0.05, noise: float = 3.0, time: TimeModel = TOKENS
    ) -> None:
        self.patience = whole("patience", patience, low=1)
        self.least = number("least", least)
        if not 0 < self.least < 1:
            raise ProblemError("least", f"is {least}, must be above 0 and below 1 (0.05 is five per cent)")
        self.noise = number("noise", noise)
        if not isinstance(time, TimeModel) or time.has_curve or time.activation_cost:
            raise ProblemError(
                "time", "must be a TimeModel of token_cost and launch: looks tell tokens alone"
            )
        self.time = time
        #: Relative speeds, shape [G]; the median GPU has 1. None before the first look.
        self.speed_G: FloatArray | None = None
        #: Times that it changed.
        self.changes = 0
        self._looks: deque[FloatArray] = deque(maxlen=2 * self.patience)
        self._steps: deque[FloatArray] = deque(maxlen=_MEMORY * self.patience)

    def believe(self, speed_G: FloatArray) -> None:
        """Begin with speeds that were told, such as a topology's, shape [G]."""
        self.speed_G = speed_G / float(np.median(speed_G))
        self._looks.clear()
        self._steps.clear()

    def see(self, seen: Observation) -> bool:
        """Take another look; returns whether what is believed changed."""
        gpus = seen.tokens_LG.shape[1]
        if self.speed_G is None or self.speed_G.size != gpus:  # a rank was lost, or came
            was_told = self.speed_G is not None and bool((self.speed_G != 1).any())
            self.believe(np.ones(gpus))
            self._take(seen)
            self.changes += was_told
            return was_told
        self._take(seen)
        away_G = self._away()
        if not away_G.any():
            return False
        last_KG = np.array(self._looks)[-self.patience :]
        now_G = self.speed_G * np.exp(np.median(last_KG, axis=0))
        now_G = np.where(np.abs(now_G - 1) <= self.least, 1.0, now_G)  # one of the others again
        self.speed_G = np.where(away_G, now_G, self.speed_G)
        self.changes += 1
        self._looks.clear()  # the next change needs evidence of its own
        return True

    def _take(self, seen: Observation) -> None:
        """Keep how far every GPU is from what is believed of it; of who served nothing, not at all."""
        assert self.speed_G is not None
        passes = max(seen.batches, 1)
        token_LG = np.asarray(seen.tokens_LG, dtype=np.float64) / passes
        second_LG = np.asarray(seen.seconds_LG, dtype=np.float64) / passes
        good_LG = (token_LG > 0) & np.isfinite(second_LG) & (second_LG > 0)
        busy_G = np.asarray(good_LG.any(0))
        log_G = np.zeros(busy_G.size)
        if busy_G.sum() > 1:
            found_G = measured_speeds(
                token_LG[:, busy_G],
                second_LG[:, busy_G],
                activated=np.zeros_like(token_LG[:, busy_G]),
                time=self.time,
                noise=0.0,
                least=0.0,
            )
            # Against the same GPUs as they are believed to be: these may be the slow ones.
            known_G = self.speed_G[busy_G]
            log_G[busy_G] = np.log(found_G / known_G * np.median(known_G))
        if self._looks:
            self._steps.append(np.abs(log_G - self._looks[-1])[busy_G])
        self._looks.append(log_G)

    def _away(self) -> BoolArray:
        """GPUs that are other than believed, by looks that agree and by their mean, shape [G]."""
        look_KG = np.array(self._looks)
        away_G = np.zeros(look_KG.shape[1], dtype=np.bool_)
        if len(look_KG) < self.patience:
            return away_G
        least = float(np.log1p(self.least))
        # From one look to the next, over all GPUs: a change that lasts is in it once. Few looks tell little.
        steps = np.concatenate(self._steps) if self._steps else np.zeros(1)
        scatter = _NORMAL * float(np.median(steps)) * (1 + 1 / max(len(self._steps), 1))
        # Where looks scatter, twice as many may agree less strictly.
        for looks, each in ((self.patience, least), (2 * self.patience, least / 2)):
            last_KG = look_KG[-looks:]
            if len(last_KG) == looks:
                mean_G = last_KG.mean(0)
                clear = max(least, 1.5 * self.noise * scatter / looks**0.5)
                agree_G = (last_KG > each).all(0) | (last_KG < -each).all(0)
                away_G |= agree_G & (np.abs(mean_G) > clear)
        return away_G
