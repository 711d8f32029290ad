"""Where the tokens of the closed loop go: drawn for every request, or as they were recorded.

Either way a request's routing is its own, whoever is in the batch beside it and under whatever policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io import Arrivals, Lengths, RoutedRequests, loads_by_step
from moeless_opt.runtime.simulate.compose import StepTokens
from moeless_opt.runtime.simulate.traffic import RoutingModel

__all__ = ["DrawnRoutes", "PlayedRoutes", "Routes", "recorded_lengths"]


class Routes(Protocol):
    """Routing of the live requests, in the order in which they were admitted.

    Attributes
    ----------
    shape : (int, int)
        Layers and experts.
    """

    shape: tuple[int, int]

    def enter(self, requests: IntArray) -> None:
        """These join the batch."""
        ...

    def load_LE(self, token_R: IntArray, written_R: IntArray) -> FloatArray:
        """Loads of a pass, [L, E]: of each live request so many tokens, after so many written ones."""
        ...

    def stay(self, stays_R: BoolArray) -> None:
        """The others leave the batch."""
        ...


class DrawnRoutes:
    """A distribution for each request, from a generator.

    Parameters
    ----------
    model : RoutingModel
        The generator.
    requests : int
        In all.
    seed : int
        For the draws.
    """

    def __init__(self, model: RoutingModel, requests: int, seed: int) -> None:
        _, layers, experts = model.popularity_DLE.shape
        self.model, self.seed, self.shape = model, seed, (layers, experts)
        self._domain_R = model.requests(requests, np.random.default_rng(seed))
        self._rng = np.random.default_rng((seed, 1))
        self._share_RLE = np.zeros((0, layers, experts), dtype=np.float32)

    def of(self, requests: IntArray) -> FloatArray:
        """The requests' own distributions, shape [R, L, E]."""
        rows = [
            self.model.distributions(
                self._domain_R[request : request + 1], np.random.default_rng((self.seed, 2, int(request)))
            )
            for request in requests
        ]
        return np.concatenate([self._share_RLE[:0], *rows])

    def enter(self, requests: IntArray) -> None:
        """See `Routes`."""
        self._share_RLE = np.concatenate([self._share_RLE, self.of(requests)])

    def load_LE(self, token_R: IntArray, written_R: IntArray) -> FloatArray:
        """See `Routes`."""
        layers, experts = self.shape
        token_R = token_R.astype(np.float64)
        mix_LE = (token_R @ self._share_RLE.reshape(-1, layers * experts)).reshape(layers, experts)
        mix_LE = mix_LE / np.maximum(mix_LE.sum(1, keepdims=True), 1e-30)
        pairs = int(token_R.sum()) * self.model.top_k
        return self._rng.multinomial(np.full(layers, pairs), mix_LE).astype(np.float64)

    def stay(self, stays_R: BoolArray) -> None:
        """See `Routes`."""
        self._share_RLE = self._share_RLE[stays_R]


class PlayedRoutes:
    """Recorded requests, token by token.

    Parameters
    ----------
    traces : RoutedRequests
        What tokens chose.
    drawn_R : array of int, shape [R]
        The recorded request that each arrival is.
    first : array of int
        Of every recorded request the tokens that are its prompt, and recorded. Where a prompt is longer, or
        not recorded at all, its tokens go where tokens of the request went that were recorded, drawn by
        chance (composed).
    seed : int
        For that.
    """

    def __init__(self, traces: RoutedRequests, drawn_R: IntArray, first: IntArray, seed: int) -> None:
        self.traces, self.drawn_R, self.seed = traces, drawn_R, seed
        self.shape = (traces.experts_TLK.shape[1], traces.experts)
        self.first_R = np.asarray(first)[drawn_R]
        self._live: IntArray = np.zeros(0, dtype=np.int64)
        self._pass = -1
        self._token_P: IntArray = self._live

    def enter(self, requests: IntArray) -> None:
        """See `Routes`."""
        self._live = np.concatenate([self._live, requests])

    def load_LE(self, token_R: IntArray, written_R: IntArray) -> FloatArray:
        """See `Routes`."""
        rows = [
            self._prompt(request, tokens) if not written else self._answer(request, written)
            for request, tokens, written in zip(
                self._live.tolist(), token_R.tolist(), written_R.tolist(), strict=True
            )
        ]
        self._token_P = np.concatenate(rows)
        self._pass += 1
        return np.asarray(
            loads_by_step(self.traces, self._token_P, np.zeros(len(self._token_P), dtype=np.int64), 1)[0]
        )

    def _answer(self, request: int, written: int) -> IntArray:
        """The token after so many of the answer: the one that was written last is read."""
        start = int(self.traces.offsets[self.drawn_R[request]])
        return np.array([start + int(self.first_R[request]) + written - 1])

    def _prompt(self, request: int, tokens: int) -> IntArray:
        start, end = (
            self.traces.offsets[self.drawn_R[request]],
            self.traces.offsets[self.drawn_R[request] + 1],
        )
        known = min(tokens, int(self.first_R[request]))
        drawn = np.random.default_rng((self.seed, 3, request)).integers(start, end, tokens - known)
        return np.concatenate([np.arange(start, start + known), drawn])

    def stay(self, stays_R: BoolArray) -> None:
        """See `Routes`."""
        self._live = self._live[stays_R]

    def items(self) -> Iterator[StepTokens]:
        """Rows of the traces that the pass routes that was made last."""
        while True:
            live_S = np.array([len(self._live)])
            step_P = np.zeros(len(self._token_P), dtype=np.int64)
            yield StepTokens(start=self._pass, token_P=self._token_P, step_P=step_P, live_S=live_S)


def recorded_lengths(
    traces: RoutedRequests, arrivals: Arrivals, drawn_R: IntArray, lengths: Lengths | None
) -> tuple[Arrivals, IntArray, str]:
    """The arrivals with the lengths of the recorded requests that they are.

    Parameters
    ----------
    traces : RoutedRequests
        Recorded tokens.
    arrivals : Arrivals
        Their times.
    drawn_R : array of int, shape [R]
        Which recorded request each is.
    lengths : Lengths, optional
        Of the recorded requests, in their order.

    Returns
    -------
    arrivals, first, text
        The arrivals; of every recorded request the recorded tokens of its prompt; what was done, for people.

    Raises
    ------
    ProblemError
        If the lengths are of more or fewer requests than are recorded.
    """
    tokens = np.diff(traces.offsets)
    first = np.asarray(traces.prompt_tokens, dtype=np.int64)
    if lengths is not None:
        prompt, output = lengths.prompt_R, lengths.output_R
        if len(prompt) != len(tokens):
            raise ProblemError(
                "lengths", f"are of {len(prompt)} requests, must be of the {len(tokens)} that are recorded"
            )
        first = np.minimum(first, prompt)
        written = tokens - first + 1  # the last one written is never read
        short = int((output > written).sum())
        output = np.minimum(output, written)
        text = (
            "prompts and answers as long as recorded; tokens of prompts that are not recorded go where "
            "tokens of their request went that are"
        )
        if short:
            text += f"; {short} of the recorded answers are cut where their recording ends"
    else:
        if not first.any():
            first = tokens // 2
            text = "the first half of every recorded text is its prompt, the other half is written"
        else:
            text = "prompts and answers as recorded"
        prompt, output = first, tokens - first + 1
    return (
        arrivals.replace(prompt_R=prompt[drawn_R], output_R=output[drawn_R]),
        first,
        text,
    )
