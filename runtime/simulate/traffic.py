"""Forward passes for the simulator: when each runs, what it reads and writes, where its tokens are routed.

Batching, one of two rules:

*seconds* (the paper's): the requests that arrive within one second form a batch. Its prompts are read in one
forward pass; then all its answers are written together, a token of each per pass. Of every `decode_every`
writing passes two are simulated, with loads of their own: one that stands for itself, and after it one that
stands for the others, so that what changes from one such pass to the next is what is counted.

*continuous*: passes start at a fixed period; a request's prompt is read in the first pass after its arrival,
then it writes one token per pass until it is done.

Either way the passes are composed once, from the arrivals alone: every policy gets exactly the same passes at
the same times, and a policy that is too slow falls behind (the simulator reports by how much).

Routing, one of two sources: recorded token traces (measured; `from_traces`), or a generator fitted to such
traces (`RoutingModel`) for models that have none.

Axis letters besides the usual ones: B forward passes, R requests, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, floats, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io import Arrivals, RoutedRequests, TokenTraces, loads_by_step
from moeless_opt.problems.spec import ModelSpec
from moeless_opt.runtime.simulate.affinity import LayerAffinity, transitions
from moeless_opt.runtime.simulate.compose import compose_steps

__all__ = ["Passes", "RoutingModel", "continuous", "from_traces", "one_second_batches"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Passes(Record):
    """Consecutive forward passes.

    Parameters
    ----------
    start_B : array, shape [B]
        Earliest start, in seconds; rising.
    weight_B : array, shape [B]
        How many passes each stands for.
    tokens_B, kv_tokens_B : arrays, shape [B]
        Tokens that go through the model, and tokens in the KV cache.
    prefill_B : array of bool, shape [B]
        Whether prompts are read.
    load_BLE : array, shape [B, L, E]
        Token-expert pairs.
    """

    start_B: FloatArray
    weight_B: FloatArray
    tokens_B: FloatArray
    kv_tokens_B: FloatArray
    prefill_B: BoolArray
    load_BLE: FloatArray

    @property
    def count(self) -> int:
        """Number of passes, B."""
        return int(self.start_B.size)

    def part(self, low: int, high: int) -> Passes:
        """Some of them."""
        return Passes(
            start_B=self.start_B[low:high],
            weight_B=self.weight_B[low:high],
            tokens_B=self.tokens_B[low:high],
            kv_tokens_B=self.kv_tokens_B[low:high],
            prefill_B=self.prefill_B[low:high],
            load_BLE=self.load_BLE[low:high],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingModel(Record):
    """Routing of requests by chance: domains with their popular experts, requests that differ within them.

    Request r of domain d routes its tokens in layer l by a distribution drawn once from
    ``Dirichlet(concentration * popularity_DLE[d, l])``; a pass's loads are multinomial over the mix of its
    requests, weighted by their tokens. The domain of a request changes with time as a Markov chain over the
    arrivals: traffic drifts from domain to domain. Layers are independent, unless there is a
    `LayerAffinity`: then what a request does in a layer depends on what it does in the one before
    (`affinity`).

    Parameters
    ----------
    popularity_DLE : array, shape [D, L, E]
        Shares of the experts, positive; scaled to sum to 1.
    concentration : float
        How much requests of a domain are alike; large: all the same.
    top_k : int
        Experts of a token. No expert gets more than one of a token's choices on average.
    stay : float
        Chance that a request has the domain of the request before it.
    source : str
        What it was fitted to, and what was assumed.
    affinity : LayerAffinity, optional
        How a layer follows from the one before.
    """

    popularity_DLE: FloatArray
    concentration: float
    top_k: int
    stay: float = 0.9
    source: str = ""
    affinity: LayerAffinity | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        popularity = floats("routing.popularity", self.popularity_DLE, open_low=True)
        if popularity.ndim != 3:
            raise ProblemError("routing.popularity", f"has shape {popularity.shape}, must be [domains, L, E]")
        put(self, "top_k", whole("routing.top_k", self.top_k, low=1, high=popularity.shape[2]))
        put(self, "concentration", number("routing.concentration", self.concentration, open_low=True))
        if not 0 <= number("routing.stay", self.stay) <= 1:
            raise ProblemError("routing.stay", f"is {self.stay!r}, must be from 0 to 1")
        put(self, "popularity_DLE", floats("routing.popularity", _capped(popularity, self.top_k)))
        _, layers, experts = popularity.shape
        wanted = (layers - 1, experts, experts)
        if self.affinity is not None and self.affinity.transition_MEE.shape != wanted:
            raise ProblemError(
                "routing.affinity",
                f"has transitions of shape {self.affinity.transition_MEE.shape}, must be {wanted}",
            )

    @classmethod
    def fit(
        cls, traces: TokenTraces | RoutedRequests, *, least: int = 32, affinity: bool = False
    ) -> RoutingModel:
        """Popularity by domain, and concentration by moments, from the requests of recorded traces.

        The concentration is that for which requests drawn from the model differ from their domain's mean as
        much as the recorded ones do, beyond what counting so many tokens makes.

        Parameters
        ----------
        traces : TokenTraces or alike
            Measured routing.
        least : int
            Requests with fewer tokens are left out of the fit of the concentration.
        affinity : bool
            Whether layers depend on each other as they do in the traces.
        """
        domain_R = getattr(traces, "domain", None)
        requests = len(traces.offsets) - 1
        layers, top_k = traces.experts_TLK.shape[1:]
        token_R = np.diff(traces.offsets)
        owner = np.repeat(np.arange(requests), token_R)
        load_RLE = loads_by_step(traces, np.arange(len(owner)), owner, requests)
        domain_R = np.zeros(requests, dtype=np.int64) if domain_R is None else np.asarray(domain_R)
        popularity = np.stack([load_RLE[domain_R == d].sum(0) for d in np.unique(domain_R)]) + 0.5
        popularity /= popularity.sum(2, keepdims=True)
        mean_RLE = popularity[np.searchsorted(np.unique(domain_R), domain_R)]
        many = token_R >= least
        count_R = (token_R * top_k)[many].astype(np.float64)
        share_RLE = load_RLE[many] / count_R[:, None, None]
        square = ((share_RLE - mean_RLE[many]) ** 2).sum((1, 2))
        # Dirichlet-multinomial: variance p(1-p) * (1/n + (1 - 1/n) / (concentration + 1)).
        unit = (mean_RLE[many] * (1 - mean_RLE[many])).sum((1, 2))
        excess = float((square - unit / count_R).sum() / (unit * (1 - 1 / count_R)).sum())
        concentration = 1 / max(excess, 1e-6) - 1
        source = f"{layers} layers x {traces.experts} experts, {requests} requests (measured)"
        follows = None
        if affinity:
            table = transitions(traces.experts_TLK, traces.experts)
            follows = LayerAffinity.fit(table, share_RLE, mean_RLE[many], count_R)
        return cls(
            popularity_DLE=popularity,
            concentration=max(concentration, 0.1),
            top_k=top_k,
            source=source,
            affinity=follows,
        )

    @classmethod
    def of_domains(
        cls,
        counts: Mapping[str, ArrayLike],
        measured: tuple[int, ...],
        model: ModelSpec,
        spread: RoutingModel,
        source: str,
    ) -> RoutingModel:
        """Popularity from counts per domain of a few layers; how requests differ from another model.

        Parameters
        ----------
        counts : mapping from a domain's name to an array [layers measured, E]
            Measured counts.
        measured : tuple of int
            The layers that were measured. The others take the nearest one's popularity, each with its
            experts in an order of its own, which changes no skew (assumed).
        model : ModelSpec
            Dimensions.
        spread : RoutingModel
            Whose concentration per expert is used.
        source : str
            Where the counts come from.
        """
        table_DME = np.stack([np.asarray(counts[name], dtype=np.float64) + 0.5 for name in sorted(counts)])
        if table_DME.shape[1:] != (len(measured), model.experts):
            raise ProblemError(
                "counts", f"have shape {table_DME.shape[1:]}, must be {(len(measured), model.experts)}"
            )
        nearest = np.abs(np.arange(model.layers)[:, None] - np.array(measured)).argmin(1)
        rng = np.random.default_rng(0)
        order_LE = rng.permuted(np.tile(np.arange(model.experts), (model.layers, 1)), axis=1)
        layers = np.arange(model.layers)
        order_LE[np.isin(layers, measured)] = np.arange(model.experts)
        popularity_DLE = np.take_along_axis(table_DME[:, nearest], order_LE[None], axis=2)
        return cls(
            popularity_DLE=popularity_DLE,
            concentration=spread.concentration * model.experts / spread.popularity_DLE.shape[2],
            top_k=model.top_k,
            stay=spread.stay,
            source=(
                f"{source}: layers {', '.join(map(str, measured))} measured, the nearest one's for the "
                f"others (assumed); concentration from {spread.source} (composed)"
            ),
            affinity=None if spread.affinity is None else spread.affinity.like(_shares(popularity_DLE)),
        )

    def like(self, layers: int, experts: int, top_k: int, *, seed: int = 0) -> RoutingModel:
        """A model of other dimensions with the same spread of popularity between and within domains.

        Logarithms of the popularity are split into what all domains of a layer share and what is a domain's
        own; both are drawn anew as normal with the measured standard deviations. The concentration per expert
        is kept.
        """
        log_DLE = np.log(self.popularity_DLE)
        log_DLE = log_DLE - log_DLE.mean(2, keepdims=True)
        common_LE = log_DLE.mean(0)
        rng = np.random.default_rng(seed)
        domains, _, old = log_DLE.shape
        drawn = rng.normal(0.0, common_LE.std(), (layers, experts))
        own = rng.normal(0.0, (log_DLE - common_LE).std(), (domains, layers, experts))
        popularity_DLE = np.exp(drawn + own)
        follows = None if self.affinity is None else self.affinity.like(_shares(popularity_DLE), seed=seed)
        return RoutingModel(
            affinity=follows,
            popularity_DLE=popularity_DLE,
            concentration=self.concentration * experts / old,
            top_k=top_k,
            stay=self.stay,
            source=f"drawn for {layers} x {experts} experts with the spreads of {self.source} (composed)",
        )

    def skewed(self, power: float) -> RoutingModel:
        """The same with each expert's popularity raised to a power."""
        share_DLE = self.popularity_DLE / self.popularity_DLE.max(2, keepdims=True)
        return self.replace(popularity_DLE=np.maximum(share_DLE**power, 1e-9))

    @property
    def text(self) -> str:
        """What routing rests on."""
        domains, layers, experts = self.popularity_DLE.shape
        skew = (self.popularity_DLE.max(2) * experts).mean()
        return (
            f"routing generated: {domains} domains, {layers} layers x {experts} experts, top {self.top_k}; "
            f"hottest expert of a domain {skew:.2f} x mean, concentration {self.concentration:.3g}, a "
            f"request has its forerunner's with chance {self.stay:g} (assumed); fitted to {self.source}; "
            + ("layers independent" if self.affinity is None else "affinity between layers")
        )

    def requests(self, count: int, rng: np.random.Generator) -> IntArray:
        """Domains of consecutive requests, shape [R]."""
        domains = len(self.popularity_DLE)
        stays = rng.uniform(size=count) < self.stay
        fresh = rng.integers(0, domains, count)
        stays[0] = False
        return np.asarray(fresh[np.maximum.accumulate(np.where(stays, 0, np.arange(count)))])

    def distributions(self, domain_R: IntArray, rng: np.random.Generator) -> FloatArray:
        """One routing distribution per request and layer, shape [R, L, E] (float32)."""
        mean_RLE = self.popularity_DLE[domain_R]
        if self.affinity is None:
            return self._drawn(self.concentration * mean_RLE, rng)
        rows = [self._drawn(self.concentration * mean_RLE[:, 0], rng)]
        for layer in range(mean_RLE.shape[1] - 1):
            now_RE, then_RE = mean_RLE[:, layer], mean_RLE[:, layer + 1]
            told_RE = self.affinity.next_mean(layer, rows[-1], now_RE, then_RE)
            rows.append(self._drawn(self.affinity.concentration * told_RE, rng))
        return np.asarray(np.stack(rows, axis=1))

    def _drawn(self, alpha: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Dirichlet draws, no expert with more than one of a token's choices."""
        drawn = rng.standard_gamma(np.maximum(alpha, 1e-3).astype(np.float32), dtype=np.float32)
        return _capped(np.maximum(drawn, 1e-12), self.top_k)


def _shares(popularity_DLE: FloatArray) -> FloatArray:
    """Mean popularity over the domains, summing to 1 in each layer, shape [L, E]."""
    return np.asarray((popularity_DLE / popularity_DLE.sum(2, keepdims=True)).mean(0))


def _capped(share: FloatArray, top_k: int) -> FloatArray:
    """Scale to sum to 1 with no entry above 1 / top_k: a token chooses an expert once."""
    share = share / share.sum(-1, keepdims=True)
    for _ in range(top_k - 1):
        over = share > 1 / top_k
        if not over.any():
            break
        room = 1 - over.sum(-1, keepdims=True) / top_k
        free = np.where(over, 0.0, share)
        scale = room / np.maximum(free.sum(-1, keepdims=True), 1e-30)
        share = np.where(over, 1 / top_k, free * np.minimum(scale, 1e12))
    return np.asarray(share / share.sum(-1, keepdims=True), dtype=share.dtype)


def _loads(
    model: RoutingModel, token_BR: FloatArray, share_RLE: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Loads of passes from the tokens of their requests, shape [B, L, E]."""
    requests, layers, experts = share_RLE.shape
    total_B = token_BR.sum(1)
    mix = token_BR @ share_RLE.reshape(requests, layers * experts).astype(np.float64)
    mix_BLE = mix.reshape(-1, layers, experts) / np.maximum(total_B, 1)[:, None, None]
    mix_BLE /= np.maximum(mix_BLE.sum(2, keepdims=True), 1e-30)
    pairs_BL = np.broadcast_to((total_B * model.top_k).astype(np.int64)[:, None], mix_BLE.shape[:2])
    return rng.multinomial(pairs_BL, mix_BLE).astype(np.float64)


def one_second_batches(
    model: RoutingModel, arrivals: Arrivals, *, decode_every: int = 128, seconds: float = 1.0, seed: int = 0
) -> Iterator[Passes]:
    """The paper's batching (rule *seconds*), one batch at a time.

    Parameters
    ----------
    model : RoutingModel
        Where tokens go.
    arrivals : Arrivals
        Requests and their lengths.
    decode_every : int
        Every so many-th writing pass is simulated; 0: none, prompts only.
    seconds : float
        Length of the interval whose arrivals form a batch.
    seed : int
        For the routing.

    Yields
    ------
    Passes
        One batch: reading first, then the chosen writing passes.
    """
    seconds = number("seconds", seconds, open_low=True)
    decode_every = whole("decode_every", decode_every)
    rng = np.random.default_rng(seed)
    domain_R = model.requests(arrivals.requests, rng)
    batch_R = np.floor(arrivals.time_R / seconds).astype(np.int64)
    for batch in np.unique(batch_R):
        low, high = np.searchsorted(batch_R, [batch, batch + 1])
        prompt_R = arrivals.prompt_R[low:high].astype(np.float64)
        output_R = arrivals.output_R[low:high].astype(np.float64)
        share_RLE = model.distributions(domain_R[low:high], rng)
        rows, weights, cached = [np.maximum(prompt_R, 1)], [1.0], [prompt_R.sum()]
        longest = int(output_R.max()) - 1  # the first token comes out of the reading pass
        for first in range(0, longest if decode_every else 0, max(decode_every, 1)):
            weight = min(decode_every, longest - first)
            middle = first + weight // 2 + 1
            live_R = (output_R > middle).astype(np.float64)
            if not live_R.any():
                break
            # The first comes after something else; all the others after one like themselves.
            for part in (1, weight - 1) if weight > 1 else (1,):
                rows.append(live_R)
                weights.append(float(part))
                cached.append(float((live_R * (prompt_R + middle)).sum()))
        token_BR = np.stack(rows)
        yield Passes(
            start_B=np.full(len(rows), (batch + 1) * seconds),
            weight_B=np.array(weights),
            tokens_B=token_BR.sum(1),
            kv_tokens_B=np.array(cached),
            prefill_B=np.arange(len(rows)) == 0,
            load_BLE=_loads(model, token_BR, share_RLE, rng),
        )


def continuous(
    model: RoutingModel,
    arrivals: Arrivals,
    *,
    period: float,
    window: int = 64,
    bank: int = 0,
    seed: int = 0,
) -> Iterator[Passes]:
    """Continuous batching with a fixed period (rule *continuous*), `window` passes at a time.

    Parameters
    ----------
    model : RoutingModel
        Where tokens go.
    arrivals : Arrivals
        Requests and their lengths.
    period : float
        Seconds from one pass's start to the next one's.
    window : int
        Passes per item; passes after the last arrival are left out.
    bank : int
        Where thousands of requests run at once: each takes one of so many distributions that are drawn once
        for its domain. 0: every request has its own.
    seed : int
        For the routing.
    """
    period = number("period", period, open_low=True)
    window = whole("window", window, low=1)
    rng = np.random.default_rng(seed)
    domain_R = model.requests(arrivals.requests, rng)
    first_R = np.ceil(arrivals.time_R / period - 1e-9).astype(np.int64)
    end_R = first_R + arrivals.output_R
    live = np.zeros(0, dtype=np.int64)
    domains, bank = len(model.popularity_DLE), whole("bank", bank)
    if bank:
        kind_R = domain_R * bank + rng.integers(0, bank, arrivals.requests)
        share = model.distributions(np.repeat(np.arange(domains), bank), rng)
    else:
        share = np.zeros((0, *model.popularity_DLE.shape[1:]), dtype=np.float32)
    known = 0
    for low in range(0, int(first_R[-1]) + 1 - window + 1, window):
        upto = int(np.searchsorted(first_R, low + window))
        stays = end_R[live] > low
        new = np.arange(known, upto)
        live = np.concatenate([live[stays], new])
        if not bank:
            share = np.concatenate([share[stays], model.distributions(domain_R[new], rng)])
        known = upto
        step_B1 = low + np.arange(window)[:, None]
        reads_BR = step_B1 == first_R[live]
        writes_BR = (step_B1 > first_R[live]) & (step_B1 < end_R[live])
        token_BR = writes_BR + reads_BR * np.maximum(arrivals.prompt_R[live], 1).astype(np.float64)
        written_BR = np.where(reads_BR | writes_BR, arrivals.prompt_R[live] + step_B1 - first_R[live], 0)
        routed = token_BR
        if bank:
            cell = kind_R[live] + np.arange(window)[:, None] * len(share)
            routed = np.bincount(cell.ravel(), weights=token_BR.ravel(), minlength=window * len(share))
            routed = routed.reshape(window, len(share))
        yield Passes(
            start_B=np.asarray(step_B1[:, 0] * period, dtype=np.float64),
            weight_B=np.ones(window),
            tokens_B=token_BR.sum(1),
            kv_tokens_B=written_BR.sum(1).astype(np.float64),
            prefill_B=reads_BR.any(1),
            load_BLE=_loads(model, routed, share, rng),
        )


def from_traces(
    traces: RoutedRequests,
    arrivals: Arrivals,
    *,
    period: float,
    window: int = 64,
    requests: ArrayLike | None = None,
    seed: int = 0,
) -> Iterator[Passes]:
    """Passes of recorded routing, composed by `compose.compose_steps`; answers only."""
    top_k = traces.experts_TLK.shape[2]
    for item in compose_steps(
        traces, arrivals, step_seconds=period, window=window, requests=requests, seed=seed
    ):
        tokens_B = item.load_SLE[:, 0].sum(1) / top_k
        yield Passes(
            start_B=np.asarray((item.start + np.arange(window)) * period, dtype=np.float64),
            weight_B=np.ones(window),
            tokens_B=tokens_B,
            # What is in the cache is not recorded: half of a mean request for each live one.
            kv_tokens_B=tokens_B * float(np.diff(traces.offsets).mean()) / 2,
            prefill_B=np.zeros(window, dtype=np.bool_),
            load_BLE=item.load_SLE,
        )
