"""Traffic as it was recorded: the experts of every token of many requests, and when requests arrive.

Token traces are recorded one request at a time, arrivals by request and without any routing. `compose_steps`
puts the two together: every arrival draws a recorded request, requests are batched continuously, and the
stored experts of all tokens of a step are added up. The routing is then measured, the arrivals are measured,
and which request arrives when, and with whom it shares a batch, is composed. Whoever prints a figure that
rests on it says so (`COMPOSITION` is that sentence).

Axis letters besides the usual ones: R requests, P tokens of a trace, K choices of a token, S steps.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, floats, integers, number, whole
from moeless_opt.problems.errors import FormatError, ProblemError

__all__ = [
    "COMPOSITION",
    "Arrivals",
    "Lengths",
    "RoutedRequests",
    "StepLoads",
    "StepTokens",
    "TokenTraces",
    "compose_reads",
    "compose_steps",
    "compose_tokens",
    "draw_requests",
    "poisson_arrivals",
    "read_arrivals",
    "read_lengths",
    "read_token_traces",
]

COMPOSITION = (
    "Routing measured (the stored experts of every token); arrival times as their source says; composed: "
    "each arrival draws one recorded request at random (with replacement, by the seed) whatever its own "
    "lengths were, joins the batch at the next step, and then every live request adds one token per step "
    "until its "
    "recording ends. All steps take the same time, there is no limit on the batch and no queue."
)
"""What a stream of `compose_steps` is, for the printout."""


class RoutedRequests(Protocol):
    """What is needed of recorded routing; `TokenTraces` and the tiny model's own traces are both that."""

    @property
    def experts(self) -> int:
        """Experts of a layer."""

    @property
    def experts_TLK(self) -> NDArray[Any]:
        """Experts of every token, [tokens, layers, top-k]."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Request i is ``experts_TLK[offsets[i]:offsets[i + 1]]``, [requests + 1]."""

    @property
    def prompt_tokens(self) -> NDArray[np.int64]:
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
        return np.asarray(count_loads(self, tokens, np.zeros(tokens.size, dtype=np.int64), 1)[0])

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
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(str(path), f"is no readable .npz archive ({error})") from None
    for name in ("experts", "offsets"):
        if name not in arrays:
            raise FormatError(
                f"{path}", f"has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}"
            )
    routed = arrays["experts"]
    if routed.dtype.kind not in "iu" or routed.size == 0:
        raise FormatError(f"{path}: experts", f"is {routed.dtype} {routed.shape}, must be whole numbers")
    return TokenTraces(
        experts_TLK=routed,
        offsets=arrays["offsets"],
        experts=int(routed.max()) + 1 if experts is None else experts,
        prompt_tokens=arrays.get("prompt_tokens", np.zeros(0, dtype=np.int64)),
        domain=arrays.get("domain"),
        domains=tuple(str(name) for name in arrays.get("domain_names", ())),
        source=Path(path).name,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lengths(Record):
    """Prompt and answer lengths of requests.

    Parameters
    ----------
    prompt_R, output_R : arrays of int, shape [R]
        Tokens read and tokens written; at least 1 output each.
    source : str
        For people.
    """

    prompt_R: IntArray
    output_R: IntArray
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_R", integers("lengths.prompt", self.prompt_R))
        object.__setattr__(self, "output_R", integers("lengths.output", self.output_R, low=1))
        if self.prompt_R.ndim != 1 or self.prompt_R.shape != self.output_R.shape or self.prompt_R.size == 0:
            raise ProblemError("lengths", "must be as many prompt as output lengths, at least one")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arrivals(Record):
    """When requests arrive, and how long they are.

    Parameters
    ----------
    time_R : array of float, shape [R]
        Seconds since the start, not falling.
    prompt_R, output_R : arrays of int, shape [R]
        Tokens read and tokens written.
    source : str
        For people.
    """

    time_R: FloatArray
    prompt_R: IntArray
    output_R: IntArray
    source: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "time_R", floats("arrivals.time", self.time_R))
        put(self, "prompt_R", integers("arrivals.prompt", self.prompt_R))
        put(self, "output_R", integers("arrivals.output", self.output_R, low=1))
        if not self.time_R.ndim == 1 or not self.time_R.shape == self.prompt_R.shape == self.output_R.shape:
            raise ProblemError("arrivals", "must be as many times as prompt and output lengths")
        if self.time_R.size == 0:
            raise ProblemError("arrivals", "are none; there must be at least one request")
        if (np.diff(self.time_R) < 0).any():
            first = int(np.argmax(np.diff(self.time_R) < 0))
            raise ProblemError(f"arrivals.time[{first + 1}]", "is earlier than the one before; sort them")

    @property
    def requests(self) -> int:
        """How many requests there are, R."""
        return int(self.time_R.size)

    @property
    def seconds(self) -> float:
        """Time of the last arrival."""
        return float(self.time_R[-1])

    def first(self, seconds: float) -> Arrivals:
        """The requests that arrive before `seconds`."""
        count = int(np.searchsorted(self.time_R, number("seconds", seconds, open_low=True)))
        if count == 0:
            raise ProblemError(
                "seconds", f"is {seconds}, before the first arrival at {float(self.time_R[0]):g} s"
            )
        return self.replace(
            time_R=self.time_R[:count], prompt_R=self.prompt_R[:count], output_R=self.output_R[:count]
        )

    def with_lengths(self, lengths: Lengths, *, seed: int = 0) -> Arrivals:
        """The same arrivals with lengths drawn from elsewhere (composed: not measured together)."""
        chosen = np.random.default_rng(seed).integers(0, lengths.prompt_R.size, self.requests)
        return self.replace(
            prompt_R=lengths.prompt_R[chosen],
            output_R=lengths.output_R[chosen],
            source=f"{self.source}; lengths drawn from {lengths.source}",
        )

    def __repr__(self) -> str:
        rate = self.requests / max(self.seconds, 1e-9)
        return (
            f"Arrivals({self.requests} requests in {self.seconds:.0f} s, {rate:.2f}/s, mean "
            f"{self.prompt_R.mean():.0f} tokens read and {self.output_R.mean():.0f} written"
            f"{', from ' + self.source if self.source else ''})"
        )


def poisson_arrivals(
    rate: float, seconds: float, *, prompt: int = 512, output: int = 128, seed: int = 0
) -> Arrivals:
    """Arrivals by chance alone, with geometric lengths: for when no recording is at hand.

    Parameters
    ----------
    rate : float
        Requests per second.
    seconds : float
        How long; there is always a request at time 0.
    prompt, output : int
        Mean tokens read and written.
    seed : int
        For the draws.
    """
    rate = number("rate", rate, open_low=True)
    seconds = number("seconds", seconds, open_low=True)
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(rate * seconds))
    time_R = np.concatenate([[0.0], np.sort(rng.uniform(0.0, seconds, count))])
    lengths = [rng.geometric(1.0 / whole(name, mean, low=1), count + 1) for name, mean in
               (("prompt", prompt), ("output", output))]  # fmt: skip
    return Arrivals(
        time_R=time_R, prompt_R=lengths[0], output_R=lengths[1], source=f"Poisson, {rate:g}/s, seed {seed}"
    )


def read_arrivals(path: str | PathLike[str]) -> Arrivals:
    """Read a request trace: Azure's LLM inference trace (.csv) or Mooncake's (.jsonl), plain or gzipped.

    Azure: columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``. Mooncake: one object per line with
    ``timestamp`` (ms), ``input_length``, ``output_length``. Time starts at the first arrival; requests
    without any output count as writing one token.

    Raises
    ------
    FormatError
        If the file is neither, with the line that does not fit.
    """
    with _text(path) as file:
        lines = file.read().splitlines()
    if not lines:
        raise FormatError(str(path), "is empty")
    parse = _mooncake if lines[0].lstrip().startswith("{") else _azure
    rows = parse(str(path), lines)
    rows.sort(key=lambda row: row[0])
    time, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Arrivals(
        time_R=time - time[0], prompt_R=prompt, output_R=np.maximum(output, 1), source=Path(path).name
    )


def read_lengths(path: str | PathLike[str]) -> Lengths:
    """Read prompt and answer lengths: a .csv (or .csv.gz) with ``num_prefill_tokens``, ``num_decode_tokens``.

    Raises
    ------
    FormatError
        If a column is missing or a line does not fit.
    """
    with _text(path) as file:
        lines = file.read().splitlines()
    rows = _columns(str(path), lines, ("num_prefill_tokens", "num_decode_tokens"))
    pairs = [(_int(path, n, a), max(_int(path, n, b), 1)) for n, (a, b) in rows]
    prompt, output = (np.array(column) for column in zip(*pairs, strict=True))
    return Lengths(prompt_R=prompt, output_R=output, source=Path(path).name)


def _text(path: str | PathLike[str]) -> TextIO:
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return io.StringIO(data.decode("utf-8-sig"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FormatError(str(path), f"cannot be read ({error})") from None


def _columns(path: str, lines: list[str], names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Line number and the named columns of every line that is not blank."""
    reader = csv.reader(lines)
    head = next(reader, [])
    missing = [name for name in names if name not in head]
    if missing:
        raise FormatError(path, f"has no column {missing[0]!r}; it has {', '.join(head) or 'none'}")
    at = [head.index(name) for name in names]
    rows = []
    for number_, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) <= max(at):
            raise FormatError(f"{path}, line {number_}", f"has {len(row)} columns, must have {len(head)}")
        rows.append((number_, tuple(row[i] for i in at)))
    if not rows:
        raise FormatError(path, "has a head and no lines")
    return rows


def _int(path: str | PathLike[str], line: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise FormatError(f"{path}, line {line}", f"{text!r} is no whole number") from None
    if value < 0:
        raise FormatError(f"{path}, line {line}", f"{value} tokens, must be at least 0")
    return value


def _azure(path: str, lines: list[str]) -> list[tuple[float, int, int]]:
    found = []
    for n, (stamp, read, written) in _columns(path, lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            whole_seconds, _, part = stamp.partition(".")
            moment = datetime.datetime.fromisoformat(whole_seconds).replace(tzinfo=datetime.UTC)
            seconds = moment.timestamp() + (float("0." + part) if part else 0.0)
        except ValueError:
            raise FormatError(f"{path}, line {n}", f"{stamp!r} is no time stamp") from None
        found.append((seconds, _int(path, n, read), _int(path, n, written)))
    return found


def _mooncake(path: str, lines: list[str]) -> list[tuple[float, int, int]]:
    found = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found.append(
                (float(entry["timestamp"]) / 1e3, int(entry["input_length"]), int(entry["output_length"]))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}, line {n}", f"is no request ({error!r})") from None
    return found


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


def count_loads(traces: RoutedRequests, tokens_P: IntArray, step_P: IntArray, steps: int) -> FloatArray:
    """Add up stored experts: token `tokens_P[i]` belongs to step `step_P[i]`; shape [steps, L, E]."""
    _, layers, _ = traces.experts_TLK.shape
    experts = traces.experts
    row_PL = step_P[:, None] * layers + np.arange(layers)
    key = row_PL[:, :, None] * experts + traces.experts_TLK[tokens_P]
    counts = np.bincount(key.ravel(), minlength=steps * layers * experts)
    return counts.reshape(steps, layers, experts).astype(np.float64)


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
        load_SLE = count_loads(traces, item.token_P, item.step_P, item.live_S.size)
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
