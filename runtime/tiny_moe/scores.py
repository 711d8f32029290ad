"""How good predictors of expert loads are: recordings with hidden states, batches, scores.

A `TokenRecord` holds what a predictor sees and what came of it, token by token; batches are rows of it, so
the same one serves prefill, decode and any mixture of traffic. Split it by request, never by token:
neighbouring tokens tell on each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.checkpoint import causal_positions, moe_layers
from moeless_opt.runtime.engines import tap_hidden
from moeless_opt.runtime.predict import (
    Context,
    Predictor,
    TokenPredictor,
    count_loads,
    load_distance,
    token_hits,
    top_load_hits,
)
from moeless_opt.runtime.tiny_moe import model as tiny_moe

__all__ = ["Scores", "TokenRecord", "decode_batches", "prefill_batches", "record_requests", "score_predictor"]

Rows = IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """Tokens of many requests: hidden states and experts.

    Parameters
    ----------
    hidden_TLH : Tensor, float16
        Residual stream in front of every MoE layer but the last, which predicts nothing.
    experts_TLK : array of uint8 or uint16 [T, L, K]
        Experts chosen.
    offsets : array of int [requests + 1]
        Tokens of request i are ``offsets[i]`` to ``offsets[i + 1]``.
    domain : array of int [requests]
        Kind of request.
    experts : int
        Experts of a layer.
    """

    hidden_TLH: Tensor
    experts_TLK: NDArray[Any]
    offsets: IntArray
    domain: IntArray
    experts: int

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.experts_TLK.shape[1])

    def rows(self, requests: Iterable[int]) -> Rows:
        """Token indices of some requests."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in requests]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def pairs(self, requests: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Hidden states and experts of some requests, as `fine_tune` takes them."""
        rows = self.rows(requests)
        return self.hidden_TLH[torch.from_numpy(rows)], torch.from_numpy(
            self.experts_TLK[rows].astype(np.int64)
        )


@torch.no_grad()
def record_requests(model: Any, texts: Sequence[bytes], domain: Sequence[int]) -> TokenRecord:
    """Run texts through the tiny MoE, one forward pass each, and keep hidden states and routes.

    Parameters
    ----------
    model : GPTModel
        From `tiny_moe.load`.
    texts : sequence of bytes
        Requests of at most ``tiny_moe.MAX_LENGTH - 1`` bytes.
    domain : sequence of int
        Kind of each.
    """
    if len(texts) != len(domain) or not texts:
        raise ProblemError("texts", f"are {len(texts)}, with {len(domain)} domains")
    layers = len(moe_layers(model))
    seen: list[Tensor] = []
    hidden, ends = [], [0]

    def keep(layer: int, state: Tensor) -> None:
        if layer < layers - 1:
            seen.append(state[:, 0].half())

    tap = tap_hidden(model, keep)
    try:
        with tiny_moe.record_routes(model) as routes:
            for text in texts:
                tokens = torch.tensor([tiny_moe.encode(text)], device=next(model.parameters()).device)
                model(tokens, causal_positions(tokens), None)
                hidden.append(torch.stack(seen, dim=1).cpu())
                ends.append(ends[-1] + tokens.size(1))
                seen.clear()
    finally:
        tap.close()
    return TokenRecord(
        hidden_TLH=torch.cat(hidden),
        experts_TLK=routes.concatenate(),
        offsets=np.array(ends, dtype=np.int64),
        domain=np.asarray(domain, dtype=np.int64),
        experts=tiny_moe.EXPERTS,
    )


# ------------------------------------------------------------------------------------------ batches


def _drawn(
    recording: TokenRecord, requests: IntArray, count: int, rng: np.random.Generator, dwell: int
) -> Iterable[tuple[int, IntArray]]:
    """For each of `count` batches, the chance of each request: one domain is three quarters of the traffic.

    Which one, changes every `dwell` batches; `dwell` 0: all domains alike throughout.
    """
    kinds = np.unique(recording.domain[requests])
    order = rng.permutation(kinds)
    for b in range(count):
        chance = np.ones(len(requests))
        if dwell and len(kinds) > 1:
            main = recording.domain[requests] == order[b // dwell % len(order)]
            chance = np.where(main, 0.75 / main.sum(), 0.25 / max(1, (~main).sum()))
        yield b, rng.choice(requests, size=len(requests), p=chance / chance.sum())


def prefill_batches(
    recording: TokenRecord,
    requests: IntArray,
    count: int,
    *,
    size: int = 8,
    dwell: int = 6,
    seed: int = 0,
) -> list[Rows]:
    """Batches of `size` whole requests.

    Parameters
    ----------
    recording : TokenRecord
        The tokens.
    requests : array of int
        Those to draw from (with replacement).
    count : int
        Batches wanted.
    size : int
        Requests of a batch.
    dwell : int
        Batches in which one domain makes three quarters of the traffic, before the next one does; 0: an even
        mixture throughout.
    seed : int
        Of the draw.
    """
    rng = np.random.default_rng(seed)
    drawn = _drawn(recording, requests, count, rng, dwell)
    return [recording.rows(chosen[:size].tolist()) for _, chosen in drawn]


def decode_batches(
    recording: TokenRecord,
    requests: IntArray,
    count: int,
    *,
    size: int = 64,
    dwell: int = 48,
    seed: int = 0,
) -> list[Rows]:
    """Batches of one token of each of `size` requests in flight; one that ends is replaced by a new one.

    The text of a request stands for its answer, token after token. Parameters as in `prefill_batches`.
    """
    rng = np.random.default_rng(seed)
    batches: list[Rows] = []
    at = np.zeros(size, dtype=np.int64)
    end = np.zeros(size, dtype=np.int64)
    for b, chosen in _drawn(recording, requests, count, rng, dwell):
        pick = rng.choice(chosen, size=size)
        fresh = at >= end
        start, stop = recording.offsets[pick], recording.offsets[pick + 1]
        # the first requests are met in mid-flight, or all would end together
        into = (rng.random(size) * (stop - start)).astype(np.int64) if b == 0 else 0
        at, end = np.where(fresh, start + into, at), np.where(fresh, stop, end)
        batches.append(at.copy())
        at = at + 1
    return batches


# ------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How a predictor did, batch by batch; NaN where it was not asked.

    Parameters
    ----------
    name : str
        Of the predictor.
    distance_DBL : array
        Total-variation distance of the loads, at distance D + 1, of layer L (the one that is predicted).
    top_DBL : array
        Share of the most loaded quarter of the experts that were predicted to be.
    token_DBL : array
        Share of the tokens' choices that were predicted (NaN where single tokens are not).
    load_DBLE : array
        The predictions.
    """

    name: str
    distance_DBL: FloatArray
    top_DBL: FloatArray
    token_DBL: FloatArray
    load_DBLE: FloatArray


def actual_loads(recording: TokenRecord, batches: Sequence[Rows]) -> FloatArray:
    """Loads of the batches, [B, L, E]."""
    return np.stack([count_loads(recording.experts_TLK[rows], recording.experts) for rows in batches])


def score_predictor(
    predictor: Predictor,
    recording: TokenRecord,
    batches: Sequence[Rows],
    *,
    distances: Sequence[int] = (1, 2, 3, 4, 5),
    warm_up: int = 0,
) -> Scores:
    """Play batches to a predictor in order, and compare.

    Parameters
    ----------
    predictor : Predictor
        Asked at every layer, then told the loads.
    recording : TokenRecord
        The tokens.
    batches : sequence of int arrays
        Rows of each.
    distances : ints
        How far ahead it is asked; every layer that has one so far ahead.
    warm_up : int
        Batches at the start that are not scored (so that history has some).
    """
    L, D = recording.layers, max(distances)
    shape = (D, len(batches), L)
    wrong, top, token = (np.full(shape, np.nan) for _ in range(3))
    load_DBLE = np.full((*shape, recording.experts), np.nan)
    by_token = isinstance(predictor, TokenPredictor)
    busiest = max(1, recording.experts // 4)
    for b, rows in enumerate(batches):
        experts_TLK = recording.experts_TLK[rows]
        hidden_TLH = recording.hidden_TLH[torch.from_numpy(rows)].float()
        actual_LE = count_loads(experts_TLK, recording.experts)
        for layer in range(L - 1):
            context = Context(
                layer=layer,
                load_E=actual_LE[layer],
                experts_TK=experts_TLK[:, layer],
                hidden=hidden_TLH[:, layer],
            )
            for d in distances:
                ahead = layer + d
                if ahead >= L:
                    continue
                predicted_E = predictor.predict(context, d)
                load_DBLE[d - 1, b, ahead] = predicted_E
                if b < warm_up:
                    continue
                wrong[d - 1, b, ahead] = load_distance(predicted_E, actual_LE[ahead])
                top[d - 1, b, ahead] = top_load_hits(predicted_E, actual_LE[ahead], busiest)
                if by_token:
                    score_TE = predictor.scores(context, d)  # type: ignore[attr-defined]
                    token[d - 1, b, ahead] = token_hits(score_TE, experts_TLK[:, ahead])
        predictor.observe(actual_LE)
    return Scores(name=predictor.name, distance_DBL=wrong, top_DBL=top, token_DBL=token, load_DBLE=load_DBLE)
