"""Affinity between layers: where a request leans in one layer tells where it leans in the next.

Experts of consecutive layers go together: a token that chose expert e in one layer chooses some experts of
the next more often than others. Counted over the tokens of recorded traces this is a transition matrix. A
request whose tokens lean towards e, more than its domain's do, then leans towards what follows e:

    share (l + 1) = popularity of the domain + weight * (share - popularity) (l) @ transition + rest

The weight makes the covariance of measured deviations with those that the transitions foretell; the rest is
drawn (`traffic.RoutingModel`) with the spread that is left over. Both are fitted to requests of enough
tokens, less what counting so many tokens makes. `explained` says how much of the spread between requests the
transitions foretell, measured in recorded and in generated traffic alike. What the affinity of single tokens
does within a pass, beyond the loads of the layers, is not generated: the simulator knows loads, not tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, floats, number
from moeless_opt.problems.errors import ProblemError

__all__ = ["LayerAffinity", "explained", "transitions"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerAffinity(Record):
    """How a layer's routing follows from the one before.

    Parameters
    ----------
    transition_MEE : array, shape [L - 1, E, E]
        Share of each expert of the next layer in the choices of tokens that chose an expert; rows sum to 1.
    weight : float
        How much of the foretold deviation requests show.
    concentration : float
        As `RoutingModel.concentration`, of what the layer before does not foretell.
    """

    transition_MEE: FloatArray
    weight: float
    concentration: float

    def __post_init__(self) -> None:
        table = floats("affinity.transition", self.transition_MEE)
        if table.ndim != 3 or table.shape[1] != table.shape[2]:
            raise ProblemError("affinity.transition", f"has shape {table.shape}, must be [layers - 1, E, E]")
        if not np.allclose(table.sum(2), 1.0, atol=1e-4):
            raise ProblemError("affinity.transition", "has a row that does not sum to 1")
        object.__setattr__(self, "transition_MEE", table)
        object.__setattr__(self, "weight", number("affinity.weight", self.weight))
        value = number("affinity.concentration", self.concentration, open_low=True)
        object.__setattr__(self, "concentration", value)

    @classmethod
    def fit(
        cls, transition_MEE: FloatArray, share_RLE: FloatArray, mean_RLE: FloatArray, count_R: FloatArray
    ) -> LayerAffinity:
        """Weight and concentration by moments, beyond what counting makes.

        Parameters
        ----------
        transition_MEE : array, shape [L - 1, E, E]
            Measured transitions.
        share_RLE, mean_RLE : arrays, shape [R, L, E]
            Shares of requests, and of their domains.
        count_R : array, shape [R]
            Token-expert pairs of each request in a layer.
        """
        off_RLE = share_RLE - mean_RLE
        told = _follow(off_RLE, transition_MEE)
        spread = (told**2).sum() - (_told_unit(transition_MEE, mean_RLE[:, :-1]) / count_R).sum()
        weight = max(float((off_RLE[:, 1:] * told).sum() / max(spread, 1e-30)), 0.0)
        unit = (mean_RLE[:, 1:] * (1 - mean_RLE[:, 1:])).sum((1, 2))
        whole = (off_RLE[:, 1:] ** 2).sum() - (unit / count_R).sum()
        # More than all cannot be foretold; a twentieth is left to chance.
        foretold = min(weight**2 * spread, 0.95 * whole)
        excess = float((whole - foretold) / (unit * (1 - 1 / count_R)).sum())
        return cls(
            transition_MEE=transition_MEE,
            weight=float(np.sqrt(max(foretold, 0.0) / max(spread, 1e-30))),
            concentration=max(1 / max(excess, 1e-6) - 1, 0.1),
        )

    def like(self, popularity_LE: FloatArray, *, seed: int = 0) -> LayerAffinity:
        """Transitions of other dimensions with the same spread of their logarithms around the popularity.

        The weight is such that the transitions foretell as large a share of the spread as here.
        """
        layers, experts = popularity_LE.shape
        own_MEE = self.transition_MEE
        log = np.log(np.maximum(own_MEE, 1e-9))
        log = log - log.mean(1, keepdims=True)  # what all experts of the layer before share is popularity
        rng = np.random.default_rng((seed, 7))
        lift = np.exp(rng.normal(0.0, float(log.std()), (layers - 1, experts, experts)))
        table = popularity_LE[1:, None, :] * lift
        for _ in range(8):  # rows sum to 1, and the popularity of the next layer comes out
            table /= table.sum(2, keepdims=True)
            came = np.einsum("me,mef->mf", popularity_LE[:-1], table)
            table *= (popularity_LE[1:] / np.maximum(came, 1e-30))[:, None, :]
        table /= table.sum(2, keepdims=True)
        flat = np.full((1, len(own_MEE), own_MEE.shape[1]), 1 / own_MEE.shape[1])
        here = float(_told_unit(own_MEE, flat)[0] / (len(own_MEE) * (1 - 1 / own_MEE.shape[1])))
        now_LE, then_LE = popularity_LE[None, :-1], popularity_LE[None, 1:]
        there = float(_told_unit(table, now_LE)[0] / (then_LE * (1 - then_LE)).sum())
        return LayerAffinity(
            transition_MEE=table,
            weight=self.weight * float(np.sqrt(here / max(there, 1e-30))),
            concentration=self.concentration * experts / own_MEE.shape[1],
        )

    def next_mean(
        self, layer: int, share_RE: FloatArray, now_RE: FloatArray, then_RE: FloatArray
    ) -> FloatArray:
        """What requests do in layer `layer` + 1 on average, given their shares in `layer`, shape [R, E]."""
        told = (share_RE - now_RE) @ self.transition_MEE[layer]
        mean_RE = np.maximum(then_RE + self.weight * told, 0.05 * then_RE)
        return np.asarray(mean_RE / mean_RE.sum(1, keepdims=True))


def transitions(experts_TLK: IntArray, experts: int) -> FloatArray:
    """Transition shares between consecutive layers, counted over tokens, shape [L - 1, E, E].

    Each pair of a choice and a choice of the next layer counts once; half a count is added to each cell.
    """
    layers = experts_TLK.shape[1]
    table = np.full((layers - 1, experts, experts), 0.5)
    for layer in range(layers - 1):
        now = experts_TLK[:, layer, :, None].astype(np.int64)
        then = experts_TLK[:, layer + 1, None, :]
        pairs = (now * experts + then).ravel()
        table[layer] += np.bincount(pairs, minlength=experts**2).reshape(experts, experts)
    return np.asarray(table / table.sum(2, keepdims=True), dtype=np.float64)


def explained(transition_MEE: FloatArray, share_RLE: FloatArray, mean_RLE: FloatArray) -> float:
    """Squared correlation of requests' deviations with those that the layer before foretells."""
    off_RLE = share_RLE - mean_RLE
    told, then = _follow(off_RLE, transition_MEE), off_RLE[:, 1:]
    return float((told * then).sum() ** 2 / max((told**2).sum() * (then**2).sum(), 1e-30))


def _follow(off_RLE: FloatArray, transition_MEE: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("rme,mef->rmf", off_RLE[:, :-1], transition_MEE))


def _told_unit(transition_MEE: FloatArray, now_RME: FloatArray) -> FloatArray:
    """Spread of the foretold deviations, over all layers, if shares were of a single choice, shape [R]."""
    square_ME = (transition_MEE**2).sum(2)
    came = np.einsum("rme,mef->rmf", now_RME, transition_MEE)
    return np.asarray((now_RME * square_ME).sum((1, 2)) - (came**2).sum((1, 2)))
