"""A stream of steps, composed of recorded routing and recorded arrivals.

Token traces are recorded one request at a time, arrivals by request and without any routing. `compose_steps`
puts the two together: every arrival draws a recorded request, requests are batched continuously, and the
stored experts of all tokens of a step are added up. The routing is then measured, the arrivals are measured,
and which request arrives when, and with whom it shares a batch, is composed. Whoever prints a figure that
rests on it says so (`COMPOSITION` is that sentence).

Axis letters besides the usual ones: R requests, P tokens of a trace, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, integers, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io import Arrivals, RoutedRequests, loads_by_step

__all__ = [
    "COMPOSITION",
    "StepLoads",
    "StepTokens",
    "compose_reads",
    "compose_steps",
    "compose_tokens",
    "draw_requests",
]

COMPOSITION = (
    "Routing measured (the stored experts of every token); arrival times as their source says; composed: "
    "each arrival draws one recorded request at random (with replacement, by the seed) whatever its own "
    "lengths were, joins the batch at the next step, and then every live request adds one token per step "
    "until its "
    "recording ends. All steps take the same time, there is no limit on the batch and no queue."
)
"""What a stream of `compose_steps` is, for the printout."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepLoads(Record):
    """A window of consecutive steps.

    Parameters
    ----------
    start : int
        Number of the first step.
    load_SLE : array of float, shape [S, L, E]
        Token-expert pairs of every step.
    live_S : array of int, shape [S]
        Requests that were live, which is the tokens of the step.
    """

    start: int
    load_SLE: FloatArray
    live_S: IntArray

    @property
    def load_LE(self) -> FloatArray:
        """Loads of the whole window, shape [L, E]."""
        return np.asarray(self.load_SLE.sum(0))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepTokens(Record):
    """A window of consecutive steps, token by token: which recorded tokens each step routes.

    Parameters
    ----------
    start : int
        Number of the first step.
    token_P, step_P : arrays of int, shape [P]
        Rows of the traces, and the step (from 0 in the window) that routes them.
    live_S : array of int, shape [S]
        Requests that write.
    """

    start: int
    token_P: IntArray
    step_P: IntArray
    live_S: IntArray


def draw_requests(
    traces: RoutedRequests,
    arrivals: Arrivals,
    *,
    requests: ArrayLike | None = None,
    stay: float = 0.0,
    seed: int = 0,
) -> IntArray:
    """A recorded request for every arrival, shape [R].

    Parameters
    ----------
    traces : RoutedRequests
        Measured routing.
    arrivals : Arrivals
        Their number counts.
    requests : array of int, optional
        Draw from these requests only (all by default).
    stay : float
        Chance that a request has the domain of the one before it; 0: domains do not matter.
    seed : int
        For the draw.
    """
    pool = np.arange(len(traces.offsets) - 1) if requests is None else integers("requests", requests)
    rng = np.random.default_rng(seed)
    if not number("stay", stay):
        return np.asarray(pool[rng.integers(0, pool.size, arrivals.requests)])
    domain_R = getattr(traces, "domain", None)
    if domain_R is None:
        raise ProblemError("stay", "needs traces that tell the domain of each request")
    kinds, kind_R = np.unique(np.asarray(domain_R)[pool], return_inverse=True)
    stays = rng.uniform(size=arrivals.requests) < stay
    fresh = rng.integers(0, kinds.size, arrivals.requests)
    stays[0] = False
    chosen = fresh[np.maximum.accumulate(np.where(stays, 0, np.arange(arrivals.requests)))]
    order = np.argsort(kind_R, kind="stable")
    count_D = np.bincount(kind_R)
    first_D = np.cumsum(count_D) - count_D
    within = np.floor(rng.uniform(size=arrivals.requests) * count_D[chosen]).astype(np.int64)
    return np.asarray(pool[order[first_D[chosen] + within]])


def compose_steps(
    traces: RoutedRequests,
    arrivals: Arrivals,
    *,
    step_seconds: float,
    window: int = 64,
    requests: ArrayLike | None = None,
    prompts: bool = False,
    seed: int = 0,
) -> Iterator[StepLoads]:
    """Batch recorded requests continuously at the times of recorded arrivals; see `COMPOSITION`.

    A request that arrives at time t takes part from step ``ceil(t / step_seconds)`` on. Steps after the last
    arrival are left out (the batch would only drain), and so is a last window that is not full.

    Parameters
    ----------
    traces : RoutedRequests
        Measured routing.
    arrivals : Arrivals
        Measured arrival times; the lengths are not used: a request is as long as its recording.
    step_seconds : float
        Duration of every step.
    window : int
        Steps per window.
    requests : array of int, optional
        Draw from these requests only (all by default); to hold out requests, not tokens.
    prompts : bool
        Whether recorded prompt tokens take part: all of them in the request's first step. By default they
        are left out, and the answer's tokens alone are played.
    seed : int
        For the drawing of requests.

    Yields
    ------
    StepLoads
        Windows, in order.
    """
    drawn_R = draw_requests(traces, arrivals, requests=requests, seed=seed)
    for item in compose_tokens(
        traces, arrivals, drawn_R, step_seconds=step_seconds, window=window, prompts=prompts
    ):
        load_SLE = loads_by_step(traces, item.token_P, item.step_P, item.live_S.size)
        yield StepLoads(start=item.start, load_SLE=load_SLE, live_S=item.live_S)


def compose_tokens(
    traces: RoutedRequests,
    arrivals: Arrivals,
    drawn_R: IntArray,
    *,
    step_seconds: float,
    window: int = 64,
    prompts: bool = False,
) -> Iterator[StepTokens]:
    """Rows of the traces that each step of `compose_steps` routes, for requests that are drawn already."""
    step_seconds = number("step_seconds", step_seconds, open_low=True)
    window = whole("window", window, low=1)
    start_R = np.ceil(arrivals.time_R / step_seconds - 1e-9).astype(np.int64)
    prompt_R = np.asarray(traces.prompt_tokens, dtype=np.int64)[drawn_R]
    token_R = traces.offsets[drawn_R] + prompt_R  # first token of the answer
    answer_R = traces.offsets[drawn_R + 1] - token_R
    end_R = start_R + answer_R
    steps = int(start_R[-1]) + 1
    for low in range(0, steps - window + 1, window):
        # Arrivals are in order, so a slice holds everyone who can be live; most of it is.
        upto = int(np.searchsorted(start_R, low + window))
        live = np.flatnonzero(end_R[:upto] > low)
        first = np.maximum(start_R[live], low)
        count = np.minimum(end_R[live], low + window) - first
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        step_P = np.repeat(first - low, count) + within
        token_P = np.repeat(token_R[live] + first - start_R[live], count) + within
        live_S = np.bincount(step_P, minlength=window)
        if prompts:
            new = np.flatnonzero((start_R[:upto] >= low) & (prompt_R[:upto] > 0))
            count = prompt_R[new]
            within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            token_P = np.concatenate([token_P, np.repeat(token_R[new] - prompt_R[new], count) + within])
            step_P = np.concatenate([step_P, np.repeat(start_R[new] - low, count)])
        yield StepTokens(start=low, token_P=token_P, step_P=step_P, live_S=live_S)


def compose_reads(
    traces: RoutedRequests, arrivals: Arrivals, drawn_R: IntArray, *, seconds: float = 1.0
) -> Iterator[StepTokens]:
    """The rows that one pass reads of the requests of each interval: all recorded tokens of each.

    `StepTokens.start` is the interval's number; intervals without arrivals are left out.
    """
    batch_R = np.floor(arrivals.time_R / number("seconds", seconds, open_low=True)).astype(np.int64)
    for batch in np.unique(batch_R):
        rows = [np.arange(traces.offsets[i], traces.offsets[i + 1]) for i in drawn_R[batch_R == batch]]
        token_P = np.concatenate(rows)
        step_P = np.zeros(token_P.size, dtype=np.int64)
        yield StepTokens(start=int(batch), token_P=token_P, step_P=step_P, live_S=np.array([len(rows)]))
