"""Rotary positions as checkpoints describe them: plain, linear, Llama 3, YaRN, LongRoPE.

All five only change how fast the angle of each pair of channels grows with the position (`inverse
frequencies`), and the last two also scale the attention's logits. So one embedding class serves all, given
the frequencies.

References
----------
Linear interpolation: Chen et al., arXiv:2306.15595. YaRN: Peng et al., arXiv:2309.00071, section 3. LongRoPE:
Ding et al., arXiv:2402.13753. Llama 3: Dubey et al., arXiv:2407.21783, section 3.4.3 and the released
reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeless_opt.problems.arrays import number
from moeless_opt.problems.errors import FormatError, ProblemError, UnsupportedFeatureError

__all__ = ["RotarySpec", "rotary_spec"]


@dataclass(frozen=True)
class RotarySpec:
    """What a rotary embedding needs.

    Parameters
    ----------
    inverse_frequencies : Tensor, shape [width / 2]
        Radians per position.
    logit_scale : float
        Factor on queries and on keys (so the logits get its square).
    long_frequencies, switch_length : optional
        Frequencies for sequences longer than `switch_length`.
    channel_scale : (float, float), optional
        Factor and weight by which DeepSeek's attention scales the logits of all channels, rotated or not.
    """

    inverse_frequencies: torch.Tensor
    logit_scale: float = 1.0
    long_frequencies: torch.Tensor | None = None
    switch_length: int | None = None
    channel_scale: tuple[float, float] | None = None


def _parameters(config: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Bring the two spellings (``rope_parameters``; ``rope_theta`` with ``rope_scaling``) to one."""
    if isinstance(config.get("rope_parameters"), dict):
        found = dict(config["rope_parameters"])
    else:
        found = dict(config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", default_theta))
    kind = str(found.get("rope_type", found.get("type", "default")))
    found["rope_type"] = {"su": "longrope"}.get(kind, kind)
    if "original_max_position_embeddings" not in found:
        found["original_max_position_embeddings"] = config.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
    return found


def _number(parameters: dict[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; `default` (if there is one) where the file has none, or 0."""
    value = parameters.get(name)
    if default is not None and (value is None or value == 0):
        return default
    try:
        return number(name, value, open_low=True)
    except ProblemError as error:
        raise FormatError(
            f"config.json: rope parameter {name!r}", f"{parameters['rope_type']} positions: {error.what}"
        ) from None


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(parameters: dict[str, Any], plain: torch.Tensor, width: int) -> RotarySpec:
    """Interpolate slow pairs, leave fast ones, blend between."""
    factor = _number(parameters, "factor")
    original = _number(parameters, "original_max_position_embeddings")
    theta = _number(parameters, "rope_theta")

    def pair_that_turns(times: float) -> float:  # over the original length
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(_number(parameters, "beta_fast", 32.0))
    high = pair_that_turns(_number(parameters, "beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    slow_share = torch.clamp((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    frequencies = plain / factor * slow_share + plain * (1 - slow_share)
    above, below = (_number(parameters, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    if parameters.get("attention_factor") is not None:
        scale = _number(parameters, "attention_factor")
    elif above and below:
        scale = _yarn_scale(factor, above) / _yarn_scale(factor, below)
    else:
        scale = _yarn_scale(factor)
    return RotarySpec(frequencies, scale)


def _llama3(parameters: dict[str, Any], plain: torch.Tensor) -> RotarySpec:
    """Slow down long waves by `factor`, leave short ones, blend between."""
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    original = _number(parameters, "original_max_position_embeddings")
    wave = 2 * math.pi / plain
    out = torch.where(wave > original / low, plain / factor, plain)
    if high > low:
        blend = (original / wave - low) / (high - low)
        between = (wave >= original / high) & (wave <= original / low)
        out = torch.where(between, (1 - blend) * plain / factor + blend * plain, out)
    return RotarySpec(out)


def _longrope(parameters: dict[str, Any], plain: torch.Tensor, config: dict[str, Any]) -> RotarySpec:
    """Divide every pair's frequency by its own searched factor, one set for short inputs, one for long."""
    original = int(_number(parameters, "original_max_position_embeddings"))
    sets = []
    for name in ("short_factor", "long_factor"):
        values = parameters.get(name)
        if not isinstance(values, list) or len(values) != len(plain):
            raise FormatError(
                f"config.json: rope parameter {name!r}", f"must be a list of {len(plain)} numbers"
            )
        factors = [_number({**parameters, name: value}, name) for value in values]
        sets.append(plain / torch.tensor(factors, dtype=torch.float32))
    short_scale, long_scale = parameters.get("short_mscale"), parameters.get("long_mscale")
    if short_scale is not None or long_scale is not None:
        if short_scale != long_scale:
            raise UnsupportedFeatureError(
                f"LongRoPE with short_mscale {short_scale} != long_mscale {long_scale} is not supported"
            )
        scale = float(_number(parameters, "short_mscale"))
    elif parameters.get("attention_factor") is not None:
        scale = _number(parameters, "attention_factor")
    else:
        longest = float(config["max_position_embeddings"])
        factor = _number(parameters, "factor", longest / original)
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RotarySpec(sets[0], scale, long_frequencies=sets[1], switch_length=original)


def rotary_spec(config: dict[str, Any], width: int, default_theta: float) -> RotarySpec:
    """Work out the rotary embedding that a ``config.json`` asks for.

    Parameters
    ----------
    config : dict
        The text model's configuration.
    width : int
        Channels that are rotated in each head.
    default_theta : float
        The architecture's base, where the file gives none.

    Returns
    -------
    RotarySpec
        Frequencies and logit scale.

    Raises
    ------
    UnsupportedFeatureError
        Kinds that are not known here (``dynamic`` ...), or partial rotation.
    """
    parameters = _parameters(config, default_theta)
    kind = parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedFeatureError(f"partial_rotary_factor {partial} is not supported (only 1)")
    theta = _number(parameters, "rope_theta")
    if theta <= 1:
        raise FormatError("config.json: rope parameter 'rope_theta'", f"is {theta:g}, must be above 1")
    plain = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
    if kind == "default":
        return RotarySpec(plain)
    if kind == "linear":
        spec = RotarySpec(plain / _number(parameters, "factor"))
    elif kind == "llama3":
        spec = _llama3(parameters, plain)
    elif kind == "yarn":
        spec = _yarn(parameters, plain, width)
    elif kind == "longrope":
        spec = _longrope(parameters, plain, config)
    else:
        raise UnsupportedFeatureError(
            f"rope_type {kind!r} is not supported; known are default, linear, llama3, yarn and longrope"
        )
    weight = _number(parameters, "mscale_all_dim", 0.0)
    return replace(spec, channel_scale=(_number(parameters, "factor", 1.0), weight)) if weight else spec
