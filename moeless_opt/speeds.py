"""How fast GPUs that are nominally alike really are: speeds from what was served and how long it took."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, floats, number
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import TOKENS, TimeModel

__all__ = ["measured_speeds"]

_SPREAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def measured_speeds(
    tokens: ArrayLike,
    seconds: ArrayLike,
    *,
    activated: ArrayLike | None = None,
    time: TimeModel = TOKENS,
    noise: float = 3.0,
    least: float = 0.01,
) -> FloatArray:
    """Relative speed of every GPU, for ``Topology.replace(speed_G=...)``; 1 is the median GPU's.

    What a GPU's work takes by the time model, over what it took, is its speed in one sample; the median over
    the samples is its own. A GPU whose speed differs from the others' by less than the noise of its samples,
    or by less than `least`, counts as one of them, so that plans do not follow chance.

    Parameters
    ----------
    tokens, seconds : arrays, shape [S, G]
        Tokens that each GPU served in a sample (a layer of a forward pass, say), and the time that it took.
        No tokens, or a time that is not a number: no sample.
    activated : array, shape [S, G], optional
        Experts that served them, where the time model asks.
    time : TimeModel
        Time of the work at speed 1; tokens alone by default.
    noise : float
        Standard errors of a GPU's median that its distance from 1 must exceed.
    least : float
        Smallest distance from 1 that counts.

    Returns
    -------
    array of float, shape [G]

    Raises
    ------
    ProblemError
        If shapes do not fit, or a GPU has no sample.

    References
    ----------
    The same drift is what ViBE (2026, arXiv 2606.00735) balances for.

    Examples
    --------
    >>> measured_speeds([[100, 100, 100]] * 5, [[1.0, 1.0, 1.25]] * 5).tolist()
    [1.0, 1.0, 0.8]
    """
    token_SG = floats("tokens", tokens)
    try:
        second_SG = np.asarray(seconds, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProblemError("seconds", "not an array of numbers [samples, GPUs]") from None
    if token_SG.ndim != 2 or not token_SG.shape[1] or second_SG.shape != token_SG.shape:
        raise ProblemError(
            "seconds", f"has shape {second_SG.shape}, tokens {token_SG.shape}; both must be [samples, GPUs]"
        )
    active_SG = token_SG if activated is None else floats("activated", activated)
    if active_SG.shape != token_SG.shape:
        raise ProblemError("activated", f"has shape {active_SG.shape}, must be {token_SG.shape}")
    if activated is None and not time.counts_tokens_only:
        raise ProblemError("activated", "is missing: the time model asks for it")
    work_SG = np.asarray(time.time(token_SG, active_SG, np.ones(token_SG.shape[1])))
    good_SG = np.isfinite(second_SG) & (second_SG > 0) & (token_SG > 0)
    if not good_SG.any(0).all():
        gpu = int((~good_SG.any(0)).argmax())
        raise ProblemError("seconds", f"has no sample of GPU {gpu}: it needs tokens and a time above 0")
    rate_SG = np.where(good_SG, work_SG / np.where(good_SG, second_SG, 1.0), np.nan)
    speed_G = np.nanmedian(rate_SG, axis=0)
    spread_G = _SPREAD * np.nanmedian(np.abs(rate_SG - speed_G), axis=0)
    usual = float(np.median(speed_G))
    # Of a median the standard error is a quarter above that of a mean.
    error_G = 1.2533 * spread_G / np.sqrt(good_SG.sum(0)) / usual
    speed_G = speed_G / usual
    alike_G = np.abs(speed_G - 1) <= np.maximum(number("noise", noise) * error_G, number("least", least))
    return np.where(alike_G, 1.0, speed_G)
