"""The next tokens of a batch, each by its own request's rules and its own random numbers.

The random number of a token follows from the request's seed and the token's place alone (a counter that is
hashed), so what is chosen does not depend on the batch, on the rank, or on whether a request was interrupted
and begun anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.runtime.serve import Sampling

__all__ = ["ChosenToken", "choose_tokens", "seeded_uniform"]


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token, and the probabilities that were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def seeded_uniform(seeds: Sequence[int], places: Sequence[int]) -> FloatArray:
    """One number in [0, 1) for each seed and place (SplitMix64 of both)."""
    with np.errstate(over="ignore"):
        x = np.asarray(seeds, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = _mixed(x + np.uint64(0x9E3779B97F4A7C15))
        x = _mixed(x + (np.asarray(places, dtype=np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03))
    return np.asarray((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(
    x: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose_tokens(logits_SV: Tensor, rules: Sequence[Sampling], places: Sequence[int]) -> list[ChosenToken]:
    """Choose one token for each row.

    Parameters
    ----------
    logits_SV : tensor, shape [S, V]
        Of the model.
    rules : sequence of Sampling
        By row.
    places : sequence of int
        Place in its request of the token that is chosen, by row.
    """
    best_S = logits_SV.argmax(dim=-1)
    drawn = [row for row, rule in enumerate(rules) if rule.temperature > 0]
    if drawn:
        best_S = best_S.clone()
        chosen = _draw(logits_SV[drawn], [rules[r] for r in drawn], [places[r] for r in drawn])
        best_S[torch.tensor(drawn, device=best_S.device)] = chosen
    tokens: list[int] = best_S.tolist()
    if all(rule.logprobs is None for rule in rules):
        return [ChosenToken(token) for token in tokens]
    return _with_probabilities(logits_SV, tokens, rules)


def _draw(logits_SV: Tensor, rules: Sequence[Sampling], places: Sequence[int]) -> Tensor:
    """Draw from the cut distributions: of equally likely tokens the first in the vocabulary comes first."""
    device = logits_SV.device
    temperature = torch.tensor([rule.temperature for rule in rules], dtype=torch.float64, device=device)
    sorted_SV, order_SV = torch.sort(logits_SV.double(), dim=-1, descending=True, stable=True)
    scaled_SV = (sorted_SV - sorted_SV[:, :1]) / temperature.clamp(min=1e-6)[:, None]
    weight_SV = torch.softmax(scaled_SV, dim=-1)
    vocabulary = logits_SV.size(1)
    most = torch.tensor([rule.top_k or vocabulary for rule in rules], device=device).clamp(max=vocabulary)
    weight_SV = weight_SV * (torch.arange(vocabulary, device=device) < most[:, None])
    weight_SV = weight_SV / weight_SV.sum(dim=-1, keepdim=True)
    before_SV = weight_SV.cumsum(dim=-1) - weight_SV
    top_p = torch.tensor([rule.top_p for rule in rules], dtype=torch.float64, device=device)
    weight_SV = torch.where(before_SV < top_p[:, None], weight_SV, 0.0)
    upto_SV = weight_SV.cumsum(dim=-1)
    u = torch.from_numpy(seeded_uniform([rule.seed for rule in rules], places)).to(device)
    at = torch.searchsorted(upto_SV, (u * upto_SV[:, -1])[:, None], right=True)[:, 0]
    # Rounding must not reach behind the last token that may be chosen.
    last = (weight_SV > 0).sum(dim=-1) - 1
    return order_SV.gather(1, torch.minimum(at, last)[:, None])[:, 0]


def _with_probabilities(logits_SV: Tensor, tokens: list[int], rules: Sequence[Sampling]) -> list[ChosenToken]:
    rows = [row for row, rule in enumerate(rules) if rule.logprobs is not None]
    log_SV = torch.log_softmax(logits_SV[rows].double(), dim=-1)
    most = min(max(rule.logprobs or 0 for rule in rules), log_SV.size(1))
    chosen = torch.tensor([tokens[row] for row in rows], device=log_SV.device)
    own = log_SV.gather(1, chosen[:, None])[:, 0].tolist()
    value_SK, token_SK = log_SV.topk(most, dim=-1) if most else (log_SV[:, :0], log_SV[:, :0])
    values, ids = value_SK.tolist(), token_SK.tolist()
    out = [ChosenToken(token) for token in tokens]
    for place, row in enumerate(rows):
        count = rules[row].logprobs or 0
        pairs = zip(ids[place][:count], values[place][:count], strict=True)
        out[row] = ChosenToken(tokens[row], own[place], tuple((int(t), float(v)) for t, v in pairs))
    return out
