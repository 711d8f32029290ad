"""Recorded routing: the experts of every token of many requests.

Axis letters besides the usual ones: R requests, P tokens of a trace, K choices of a token, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, integers, number, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import named
from moeless_opt.problems.io.files import read_arrays

__all__ = ["RoutedRequests", "TokenTraces", "loads_by_step", "read_token_traces"]


class RoutedRequests(Protocol):
    """What is needed of recorded routing; `TokenTraces` and the tiny model's own traces are both that."""

    @property
    def experts(self) -> int:
        """Experts of a layer."""

    @property
    def experts_TLK(self) -> NDArray[Any]:
        """Experts of every token, [tokens, layers, top-k]."""

    @property
    def offsets(self) -> IntArray:
        """Request i is ``experts_TLK[offsets[i]:offsets[i + 1]]``, [requests + 1]."""

    @property
    def prompt_tokens(self) -> IntArray:
        """How many of a request's tokens are its prompt, [requests]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenTraces(Record):
    """The experts of every token of many requests.

    Parameters
    ----------
    experts_TLK : array of uint8 or uint16, shape [tokens, L, K]
        Experts of every token, request after request, in the order in which the tokens were read.
    offsets : array of int, shape [R + 1]
        Request i is ``experts_TLK[offsets[i]:offsets[i + 1]]``.
    experts : int
        Experts of a layer.
    prompt_tokens : array of int, shape [R], optional
        How many of a request's tokens are its prompt; 0 where only answers were recorded (the default).
    domain : array of int, shape [R], optional
        Index into `domains`.
    domains : tuple of str
        Kinds of requests.
    source : str
        Where the traces come from, for people.

    Raises
    ------
    ProblemError
        If the parts do not fit each other.
    """

    experts_TLK: NDArray[Any]
    offsets: IntArray
    experts: int
    prompt_tokens: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    domain: IntArray | None = None
    domains: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "experts", whole("traces.experts", self.experts, low=1, high=65535))
        routed = np.asarray(self.experts_TLK)
        if routed.ndim != 3 or 0 in routed.shape or routed.dtype.kind not in "iu":
            raise ProblemError(
                "traces.experts_TLK",
                f"has shape {routed.shape} of {routed.dtype}, must be whole numbers [tokens, layers, top-k]",
            )
        low, high = int(routed.min()), int(routed.max())
        if low < 0 or high >= self.experts:
            raise ProblemError(
                "traces.experts_TLK",
                f"holds expert {high if high >= self.experts else low}, must be from 0 to {self.experts - 1}",
            )
        routed = routed.astype(np.uint8 if self.experts <= 256 else np.uint16)
        routed.flags.writeable = False
        put(self, "experts_TLK", routed)
        put(self, "offsets", integers("traces.offsets", self.offsets, high=len(routed)))
        offsets = self.offsets
        if offsets.ndim != 1 or offsets.size < 2 or offsets[0] != 0 or offsets[-1] != len(routed):
            raise ProblemError(
                "traces.offsets",
                f"must run from 0 to the number of tokens, {len(routed)}, one step per request",
            )
        if (np.diff(offsets) < 1).any():
            first = int(np.argmax(np.diff(offsets) < 1))
            raise ProblemError(f"traces.offsets[{first + 1}]", "must be above the one before it")
        given = np.asarray(self.prompt_tokens)
        prompt = given if given.size else np.zeros(self.requests, dtype=np.int64)
        put(self, "prompt_tokens", integers("traces.prompt_tokens", prompt))
        if self.prompt_tokens.shape != (self.requests,) or (self.prompt_tokens > self.tokens_R).any():
            raise ProblemError(
                "traces.prompt_tokens",
                f"must be {self.requests} numbers, each at most the request's number of tokens",
            )
        put(self, "domains", tuple(str(name) for name in self.domains))
        if self.domain is not None:
            put(self, "domain", integers("traces.domain", self.domain, high=len(self.domains) - 1))
            if self.domain.shape != (self.requests,):
                raise ProblemError("traces.domain", f"must be {self.requests} indices into the domains")

    @property
    def requests(self) -> int:
        """How many requests there are, R."""
        return int(self.offsets.size) - 1

    @property
    def tokens_R(self) -> IntArray:
        """Recorded tokens of each request, shape [R]."""
        return np.asarray(np.diff(self.offsets))

    def request(self, i: int) -> NDArray[Any]:
        """The routing of request `i`, shape [its tokens, L, K]."""
        return np.asarray(self.experts_TLK[self.offsets[i] : self.offsets[i + 1]])

    def load_LE(self, requests: ArrayLike | None = None) -> FloatArray:
        """Token-expert pairs of some requests (all by default), shape [L, E]."""
        chosen = np.arange(self.requests) if requests is None else np.asarray(requests, dtype=np.int64)
        tokens = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen])
        return np.asarray(loads_by_step(self, tokens, np.zeros(tokens.size, dtype=np.int64), 1)[0])

    def flow_LEE(self, requests: ArrayLike | None = None) -> FloatArray:
        """How often an expert was followed by one in the next layer, over some requests, [L - 1, E, E].

        A token with K choices in each layer makes K x K hops between two.
        """
        chosen = np.arange(self.requests) if requests is None else np.asarray(requests, dtype=np.int64)
        tokens = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen])
        routed = self.experts_TLK[tokens].astype(np.int64)
        _, layers, choices = routed.shape
        flow_LEE = np.zeros((layers - 1, self.experts**2))
        for layer in range(layers - 1):
            for k in range(choices):
                pair_TK = routed[:, layer, k, None] * self.experts + routed[:, layer + 1]
                flow_LEE[layer] += np.bincount(pair_TK.ravel(), minlength=self.experts**2)
        return flow_LEE.reshape(layers - 1, self.experts, self.experts)

    def split(self, share: float = 0.5, *, seed: int = 0) -> tuple[IntArray, IntArray]:
        """Two disjoint sets of requests, for fitting and for judging: by request, never by token.

        Parameters
        ----------
        share : float
            Part of the requests in the first set, above 0 and below 1.
        seed : int
            For the order.
        """
        if not 0 < number("share", share) < 1:
            raise ProblemError("share", f"is {share!r}, must be above 0 and below 1")
        if self.requests < 2:
            raise ProblemError("traces", f"have {self.requests} request, two sets of them need at least two")
        order = np.random.default_rng(seed).permutation(self.requests)
        cut = min(max(round(share * self.requests), 1), self.requests - 1)
        return np.sort(order[:cut]), np.sort(order[cut:])

    def __repr__(self) -> str:
        tokens, layers, top_k = self.experts_TLK.shape
        kinds = f", {len(self.domains)} domains" if self.domains else ""
        return (
            f"TokenTraces({self.requests} requests, {tokens} tokens, {layers} layers, top {top_k} of "
            f"{self.experts} experts{kinds}{', from ' + self.source if self.source else ''})"
        )


def read_token_traces(path: str | PathLike[str], *, experts: int | None = None) -> TokenTraces:
    """Read token traces from an ``.npz`` file.

    It holds ``experts`` [tokens, layers, top-k] and ``offsets`` [requests + 1]; optionally
    ``prompt_tokens`` [requests], ``domain`` [requests] and ``domain_names``. The traces that ship with the
    package have this form.

    Parameters
    ----------
    path : str or path
        The file.
    experts : int, optional
        Experts of a layer; by default the highest that occurs, plus 1.

    Raises
    ------
    FormatError
        If the file is no such archive.
    """
    arrays = read_arrays(path)
    for name in ("experts", "offsets"):
        if name not in arrays:
            raise FormatError(
                f"{path}", f"has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}"
            )
    routed = arrays["experts"]
    if routed.dtype.kind not in "iu" or routed.size == 0:
        raise FormatError(f"{path}: experts", f"is {routed.dtype} {routed.shape}, must be whole numbers")
    names = arrays.get("domain_names", np.zeros(0, dtype=str))
    with named(path):
        return TokenTraces(
            experts_TLK=routed,
            offsets=arrays["offsets"],
            experts=int(routed.max()) + 1 if experts is None else experts,
            prompt_tokens=arrays.get("prompt_tokens", np.zeros(0, dtype=np.int64)),
            domain=arrays.get("domain"),
            domains=tuple(str(name) for name in names.ravel()),
            source=Path(path).name,
        )


def loads_by_step(traces: RoutedRequests, tokens_P: IntArray, step_P: IntArray, steps: int) -> FloatArray:
    """Add up stored experts: token `tokens_P[i]` belongs to step `step_P[i]`; shape [steps, L, E]."""
    _, layers, _ = traces.experts_TLK.shape
    experts = traces.experts
    row_PL = step_P[:, None] * layers + np.arange(layers)
    key = row_PL[:, :, None] * experts + traces.experts_TLK[tokens_P]
    counts = np.bincount(key.ravel(), minlength=steps * layers * experts)
    return counts.reshape(steps, layers, experts).astype(np.float64)
