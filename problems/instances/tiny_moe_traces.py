"""Recorded routing of the project's own small model: which experts every token of 1280 requests was sent to.

The model is the tiny MoE of `moeless_opt.runtime.tiny_moe` (6 layers, 16 experts, top-2), the requests are
held-out texts of the eight domains that it was trained on. The routing is measured. The split of a request
into prompt and answer is composed: the answer is the text's own continuation, read token by token, not
sampled from the model.

Recordings of traffic are made of requests: split training and test sets by request, never by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError

__all__ = ["TinyMoeTraces", "tiny_moe_traces", "tiny_moe_traces_file"]


@dataclass(frozen=True)
class TinyMoeTraces:
    """Routing of many requests.

    Parameters
    ----------
    experts_TLK : uint8 [tokens, layers, top-k]
        Experts of every token, the one of the largest weight first. Read-only.
    offsets : int64 [requests + 1]
        Request i is ``experts_TLK[offsets[i]:offsets[i + 1]]``.
    prompt_tokens : int64 [requests]
        How many of a request's tokens are its prompt.
    domain : uint8 [requests]
        Index into `domains`.
    domains : tuple of str
        Their names.
    experts : int
        Experts of a layer.
    """

    experts_TLK: NDArray[np.uint8]
    offsets: IntArray
    prompt_tokens: IntArray
    domain: NDArray[np.uint8]
    domains: tuple[str, ...]
    experts: int = 16

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.domain)

    def request(self, i: int) -> NDArray[np.uint8]:
        """Return the routing of request `i`, [its tokens, layers, top-k]."""
        return self.experts_TLK[self.offsets[i] : self.offsets[i + 1]]

    def of_domain(self, name: str) -> IntArray:
        """Return the indices of a domain's requests.

        Raises
        ------
        ProblemError
            No such domain.
        """
        if name not in self.domains:
            raise ProblemError("domain", f"{name!r} is not one of {', '.join(self.domains)}")
        return np.flatnonzero(self.domain == self.domains.index(name))

    def load_LE(self, requests: IntArray | None = None) -> FloatArray:
        """Count the token-expert pairs of some requests (of all by default), [layers, experts]."""
        layers = self.experts_TLK.shape[1]
        load_LE = np.zeros((layers, self.experts))
        chosen = range(self.requests) if requests is None else requests.tolist()
        for i in chosen:
            for layer in range(layers):
                load_LE[layer] += np.bincount(self.request(i)[:, layer].ravel(), minlength=self.experts)
        return load_LE

    def load_DLE(self) -> FloatArray:
        """Count the token-expert pairs of every domain, [domains, layers, experts]."""
        return np.stack([self.load_LE(self.of_domain(name)) for name in self.domains])

    def skew_DL(self) -> FloatArray:
        """Return max / mean of the expert loads, for every domain and layer."""
        load_DLE = self.load_DLE()
        return np.asarray(load_DLE.max(2) / load_DLE.mean(2))

    def drift_DD(self) -> FloatArray:
        """Return how far the domains' loads lie apart: total-variation distance, mean over the layers.

        0 means the same distribution over the experts, 1 that no expert is used by both. The diagonal is the
        distance between a domain's even and odd requests: what chance alone makes.
        """
        halves = [self._split(name) for name in self.domains]
        whole = [even + odd for even, odd in halves]
        drift_DD = np.array([[_total_variation(p, q) for q in whole] for p in whole])
        np.fill_diagonal(drift_DD, [_total_variation(even, odd) for even, odd in halves])
        return drift_DD

    def _split(self, name: str) -> tuple[FloatArray, FloatArray]:
        requests = self.of_domain(name)
        return self.load_LE(requests[::2]), self.load_LE(requests[1::2])


def _total_variation(a_LE: FloatArray, b_LE: FloatArray) -> float:
    """Half the summed difference of the two distributions of each layer, mean over the layers."""
    p_LE, q_LE = (x / x.sum(1, keepdims=True) for x in (a_LE, b_LE))
    return float(0.5 * np.abs(p_LE - q_LE).sum(1).mean())


def tiny_moe_traces_file() -> Path:
    """Return the path of the recording (a compressed .npz)."""
    return Path(str(resources.files("moeless_opt.problems") / "data" / "tiny_moe_traces.npz"))


def tiny_moe_traces() -> TinyMoeTraces:
    """Read the recording that ships with the package.

    Returns
    -------
    TinyMoeTraces
        About a third of a million tokens.

    Examples
    --------
    >>> traces = tiny_moe_traces()
    >>> traces.experts_TLK.shape[1:], traces.requests
    ((6, 2), 1280)
    """
    with np.load(tiny_moe_traces_file(), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for array in arrays.values():
        array.flags.writeable = False
    return TinyMoeTraces(
        experts_TLK=arrays["experts"],
        offsets=arrays["offsets"],
        prompt_tokens=arrays["prompt_tokens"],
        domain=arrays["domain"],
        domains=tuple(str(x) for x in arrays["domain_names"]),
    )
