"""Loads drawn from a recorded seed: skewed families, traces that drift, and surprises.

The same arguments give the same loads on every machine and with every NumPy version. Only the raw output of
NumPy's PCG64 is used, whose stream NumPy guarantees (NEP 19; the methods of ``Generator`` carry no such
promise): the top 53 bits make a uniform number, Box and Muller's formula makes normal ones. Loads are whole
tokens, so that the last bit of a logarithm, which may differ between processors, does not show. The part that
draws (ranks, jitter, drift, ...) has a stream of its own: ``SeedSequence(seed, spawn_key=(number,))``.

Axis letters: T steps, D domains, L layers, E experts.

References
----------
O'Neill, "PCG: A family of simple fast space-efficient statistically good algorithms for random number
generation" (2014). Box and Muller, "A note on the generation of random normal deviates" (1958).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import FormatError, ProblemError

__all__ = ["ar1_drift", "domain_switches", "from_recipe", "lognormal", "surprise", "zipf"]


# Numbers of the streams. Never renumber: recorded seeds would give other loads.
_RANKS, _JITTER, _LOGNORMAL, _AR1, _SWITCHES, _SURPRISE, _WOBBLE = range(7)


def zipf(
    layers: int, experts: int, *, tokens: int = 65536, alpha: float = 1.2, jitter: float = 0.1, seed: int = 0
) -> FloatArray:
    """Draw loads whose k-th busiest expert gets about 1 / k^alpha, a different order in every layer.

    Parameters
    ----------
    layers, experts : int
        Shape of the loads.
    tokens : int
        Token-expert pairs of each layer (tokens x top-k).
    alpha : float
        Exponent, >= 0; 0 is uniform.
    jitter : float
        Each weight is multiplied by a uniform factor in [1 - jitter, 1 + jitter]; 0 <= jitter < 1.
    seed : int
        Seed, >= 0.

    Returns
    -------
    array of float, shape [L, E]
        Whole tokens; each layer sums to `tokens`.

    Examples
    --------
    >>> zipf(1, 4, tokens=100, alpha=1.0, jitter=0.0, seed=3).tolist()
    [[24.0, 48.0, 12.0, 16.0]]
    """
    _check_shape(layers, experts, tokens, seed)
    _check("alpha", alpha, 0.0, math.inf)
    _check("jitter", jitter, 0.0, 1.0)
    # The rank of an expert is the rank of a uniform number; stable, so that even ties are settled.
    rank_LE = _uniform((layers, experts), seed, _RANKS).argsort(axis=1, kind="stable").argsort(axis=1) + 1
    factor_LE = 1 + jitter * (2 * _uniform((layers, experts), seed, _JITTER) - 1)
    return _whole(rank_LE ** -float(alpha) * factor_LE, tokens)


def lognormal(
    layers: int, experts: int, *, tokens: int = 65536, sigma: float = 1.0, seed: int = 0
) -> FloatArray:
    """Draw loads whose logarithms are normal.

    Parameters
    ----------
    layers, experts : int
        Shape of the loads.
    tokens : int
        Token-expert pairs of each layer (tokens x top-k).
    sigma : float
        Standard deviation of the logarithm, >= 0; 0.5 is mild, 1.5 is very skewed.
    seed : int
        Seed, >= 0.

    Returns
    -------
    array of float, shape [L, E]
        Whole tokens; each layer sums to `tokens`.
    """
    _check_shape(layers, experts, tokens, seed)
    _check("sigma", sigma, 0.0, 10.0)
    return _whole(np.exp(sigma * _normal((layers, experts), seed, _LOGNORMAL)), tokens)


def ar1_drift(
    load_LE: ArrayLike, steps: int, *, sigma: float = 0.1, rho: float = 0.7, seed: int = 0
) -> FloatArray:
    """Let loads drift: their logarithms follow an AR(1) process around where they started.

    Parameters
    ----------
    load_LE : float [layers, experts]
        The first step's loads. An expert without load stays without.
    steps : int
        Steps of the trace, the given loads included.
    sigma : float
        Standard deviation of what each step adds to a log load.
    rho : float
        What is kept of the last step's deviation, in [0, 1]; 1 is a random walk.
    seed : int
        Seed, >= 0.

    Returns
    -------
    array of float, shape [T, L, E]
        Whole tokens; every step of a layer sums to that layer's rounded total.
    """
    load_LE = _loads(load_LE, 2)
    _check_count("steps", steps, 1)
    _check("sigma", sigma, 0.0, 10.0)
    _check("rho", rho, 0.0, 1.0, closed=True)
    shock_TLE = sigma * _normal((steps, *load_LE.shape), seed, _AR1)
    busy_LE = load_LE > 0
    log_LE = np.zeros(load_LE.shape)
    weight_TLE = np.empty(shock_TLE.shape)
    for step in range(steps):
        # Only ratios within a layer count: the highest busy expert's factor is set to 1, nothing overflows.
        top_L = np.where(busy_LE, log_LE, -np.inf).max(axis=1, keepdims=True)
        weight_TLE[step] = np.where(busy_LE, load_LE * np.exp(np.minimum(log_LE - top_L, 0.0)), 0.0)
        log_LE = rho * log_LE + shock_TLE[step]
    return _whole(weight_TLE, np.rint(load_LE.sum(axis=1)))


def domain_switches(
    load_DLE: ArrayLike, steps: int, *, switch: float = 0.1, sigma: float = 0.0, seed: int = 0
) -> tuple[FloatArray, IntArray]:
    """Let the traffic jump between domains: each step stays, or turns to another domain.

    Parameters
    ----------
    load_DLE : float [domains, layers, experts]
        Loads of each domain.
    steps : int
        Steps of the trace. The first is in domain 0.
    switch : float
        Chance of a turn at each later step, in [0, 1]; all other domains are equally likely.
    sigma : float
        Standard deviation of lognormal noise on every step's loads.
    seed : int
        Seed, >= 0.

    Returns
    -------
    load_TLE : array of float, shape [T, L, E]
        Whole tokens; every step of a layer sums to its domain's rounded total.
    domain_T : array of int, shape [T]
        Domain of each step.
    """
    load_DLE = _loads(load_DLE, 3)
    _check_count("steps", steps, 1)
    _check("switch", switch, 0.0, 1.0, closed=True)
    _check("sigma", sigma, 0.0, 10.0)
    domains = len(load_DLE)
    turn_T, which_T = _uniform((2, steps), seed, _SWITCHES)
    # Going on by 1 to D-1 domains never lands on the same one.
    leap_T = np.where(turn_T < switch, 1 + (which_T * (domains - 1)).astype(np.int64), 0)
    leap_T[0] = 0
    domain_T = np.cumsum(leap_T) % domains if domains > 1 else np.zeros(steps, dtype=np.int64)
    noise_TLE = np.exp(sigma * _normal((steps, *load_DLE.shape[1:]), seed, _WOBBLE))
    return _whole(load_DLE[domain_T] * noise_TLE, np.rint(load_DLE.sum(axis=2))[domain_T]), domain_T


def surprise(load: ArrayLike, sigma: float, *, seed: int = 0) -> FloatArray:
    """Multiply every load by lognormal noise of its own: what a prediction got wrong.

    Parameters
    ----------
    load : float [..., experts]
        Loads as predicted.
    sigma : float
        Standard deviation of the noise's logarithm, >= 0; 0.1 is 10 percent, roughly.
    seed : int
        Seed, >= 0.

    Returns
    -------
    float64 of the same shape
        Loads as they turn out; not rounded, and totals are not kept.
    """
    load = _loads(load, None)
    _check("sigma", sigma, 0.0, 10.0)
    return np.asarray(load * np.exp(sigma * _normal(load.shape, seed, _SURPRISE)))


def from_recipe(recipe: Mapping[str, Any], where: str = "recipe") -> FloatArray:
    """Draw the loads that a JSON recipe describes.

    Parameters
    ----------
    recipe : mapping
        ``kind`` ("zipf" or "lognormal"), ``layers``, ``experts`` and the options of that generator.
        Optionally ``drift``, a mapping: ``kind`` "ar1" with ``steps`` and the options of `ar1_drift`, or
        ``kind`` "domains" with ``domains``, ``steps`` and the options of `domain_switches`; domain d is then
        drawn with seed + d. The drift's ``seed`` is the recipe's unless it names its own.
    where : str
        JSON path of the recipe, for messages.

    Returns
    -------
    array of float, shape [L, E], or [steps, layers, experts] with drift
        Whole tokens.

    Raises
    ------
    FormatError
        Naming the JSON path of an unknown, missing or wrong entry.

    Examples
    --------
    >>> from_recipe({"kind": "lognormal", "layers": 2, "experts": 8, "sigma": 0.5, "seed": 7}).shape
    (2, 8)
    """
    options, kind = _entries(recipe, where, ("zipf", "lognormal"))
    drift = options.pop("drift", None)
    draw: Callable[..., FloatArray] = zipf if kind == "zipf" else lognormal
    allowed = {"layers", "experts", "tokens", "seed"} | ({"alpha", "jitter"} if kind == "zipf" else {"sigma"})
    _refuse_unknown(options, where, allowed | {"drift"}, {"layers", "experts"})
    load_LE = _call(where, draw, options)
    if drift is None:
        return load_LE
    at = f"{where}.drift"
    more, drift_kind = _entries(drift, at, ("ar1", "domains"))
    more.setdefault("seed", options.get("seed", 0))
    if drift_kind == "ar1":
        _refuse_unknown(more, at, {"steps", "sigma", "rho", "seed"}, {"steps"})
        return _call(at, lambda **kw: ar1_drift(load_LE, **kw), more)
    _refuse_unknown(more, at, {"domains", "steps", "switch", "sigma", "seed"}, {"domains", "steps"})
    domains = more.pop("domains")
    seed = options.pop("seed", 0)

    def switching(**kw: Any) -> FloatArray:
        _check_count("domains", domains, 1)
        return domain_switches(np.stack([draw(**options, seed=seed + d) for d in range(domains)]), **kw)[0]

    return _call(at, switching, more)


# --- streams -----------------------------------------------------------------------------------------------


def _uniform(shape: tuple[int, ...], seed: int, stream: int) -> FloatArray:
    """Uniform numbers in [0, 1): the top 53 bits of PCG64's raw output."""
    _check_count("seed", seed, 0)
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,)))
    raw: NDArray[np.uint64] = bits.random_raw(math.prod(shape)).reshape(shape)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _normal(shape: tuple[int, ...], seed: int, stream: int) -> FloatArray:
    """Standard normal numbers by Box and Muller's formula, one from each pair of uniform ones."""
    radius, turn = _uniform((2, *shape), seed, stream)
    return np.asarray(np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * turn), dtype=np.float64)


def _whole(weight: FloatArray, tokens: ArrayLike) -> FloatArray:
    """Round weights [..., E] to whole tokens that sum to `tokens` [...] exactly: largest remainders go up."""
    total = weight.sum(axis=-1, keepdims=True)
    want = np.broadcast_to(np.asarray(tokens, dtype=np.float64), weight.shape[:-1])[..., None]
    exact = np.divide(weight * want, total, out=np.zeros_like(weight), where=total > 0)
    floor = np.floor(exact)
    short = np.where(total > 0, want - floor.sum(axis=-1, keepdims=True), 0.0)
    # Weights of zero never get a token: their remainder counts as the lowest.
    remainder = np.where(weight > 0, exact - floor, -1.0)
    place = np.argsort(np.argsort(-remainder, axis=-1, kind="stable"), axis=-1)
    whole: FloatArray = floor + (place < short)
    return whole


# --- checks ------------------------------------------------------------------------------------------------


def _check_shape(layers: int, experts: int, tokens: int, seed: int) -> None:
    _check_count("layers", layers, 1)
    _check_count("experts", experts, 1)
    _check_count("tokens", tokens, 1)
    _check_count("seed", seed, 0)


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or value > 2**53:
        raise ProblemError(name, f"must be a whole number from {low} to 2^53, got {value!r}")


def _check(name: str, value: object, low: float, high: float, *, closed: bool = False) -> None:
    good = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (good and low <= value and (value <= high if closed else value < high)):  # type: ignore[operator]
        raise ProblemError(
            name, f"must be a number in [{low:g}, {high:g}{']' if closed else ')'}, got {value!r}"
        )


def _loads(load: ArrayLike, axes: int | None) -> FloatArray:
    array = np.asarray(load, dtype=np.float64)
    if array.size == 0 or (axes is not None and array.ndim != axes):
        names = {2: "[layers, experts]", 3: "[domains, layers, experts]"}.get(axes or 0, "array")
        raise ProblemError("loads", f"must be a non-empty {names}, got shape {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ProblemError("loads", "must be finite and not negative")
    return array


def _entries(data: object, where: str, kinds: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    if not isinstance(data, Mapping):
        raise FormatError(where, f"must be an object, got {type(data).__name__}")
    options = dict(data)
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise FormatError(f"{where}.kind", f"must be {' or '.join(kinds)}, got {kind!r}")
    return options, str(kind)


def _refuse_unknown(options: dict[str, Any], where: str, allowed: set[str], needed: set[str]) -> None:
    for key in options:
        if key not in allowed:
            raise FormatError(
                f"{where}.{key}", f"unknown key; known are {', '.join(sorted(allowed | {'kind'}))}"
            )
    for key in sorted(needed - options.keys()):
        raise FormatError(f"{where}.{key}", "is missing")


def _call(where: str, function: Callable[..., FloatArray], options: dict[str, Any]) -> FloatArray:
    """Call a generator with a recipe's options; its errors name the JSON path."""
    try:
        return function(**options)
    except ProblemError as error:
        raise FormatError(f"{where}.{error.where}", error.what) from None
