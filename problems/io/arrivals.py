"""When requests arrive and how long they are, as recorded or by chance.

Axis letter besides the usual ones: R requests.
"""

from __future__ import annotations

import csv
import datetime
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, floats, integers, number, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import named, read_text

__all__ = ["Arrivals", "Lengths", "poisson_arrivals", "read_arrivals", "read_lengths"]


_MOST_TOKENS = 10**12


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
    lines = read_text(path).splitlines()
    if not lines:
        raise FormatError(str(path), "is empty")
    parse = _mooncake if lines[0].lstrip().startswith("{") else _azure
    rows = parse(str(path), lines)
    rows.sort(key=lambda row: row[0])
    time, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    with named(path):
        return Arrivals(
            time_R=time - time[0],
            prompt_R=prompt,
            output_R=np.maximum(output, 1),
            source=Path(path).name,
        )


def read_lengths(path: str | PathLike[str]) -> Lengths:
    """Read prompt and answer lengths: a .csv (or .csv.gz) with ``num_prefill_tokens``, ``num_decode_tokens``.

    Or ``n_prompt_tokens`` and ``n_generated_tokens``, as recordings of tokens name them.

    Raises
    ------
    FormatError
        If a column is missing or a line does not fit.
    """
    lines = read_text(path).splitlines()
    names = ("num_prefill_tokens", "num_decode_tokens")
    if lines and "n_prompt_tokens" in lines[0]:
        names = ("n_prompt_tokens", "n_generated_tokens")
    rows = _columns(str(path), lines, names)
    pairs = [(_int(path, n, a), max(_int(path, n, b), 1)) for n, (a, b) in rows]
    prompt, output = (np.array(column) for column in zip(*pairs, strict=True))
    with named(path):
        return Lengths(prompt_R=prompt, output_R=output, source=Path(path).name)


def _columns(path: str, lines: list[str], names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Line number and the named columns of every line that is not blank."""
    try:
        table = list(csv.reader(lines))
    except csv.Error as error:
        raise FormatError(path, f"is no readable table ({error})") from None
    head = table[0] if table else []
    missing = [name for name in names if name not in head]
    if missing:
        raise FormatError(path, f"has no column {missing[0]!r}; it has {', '.join(head) or 'none'}")
    at = [head.index(name) for name in names]
    rows = []
    for number_, row in enumerate(table[1:], start=2):
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
    return _tokens(f"{path}, line {line}", value)


def _tokens(where: str, value: int) -> int:
    if not 0 <= value <= _MOST_TOKENS:
        raise FormatError(where, f"{value} tokens, must be from 0 to {_MOST_TOKENS}")
    return value


def _azure(path: str, lines: list[str]) -> list[tuple[float, int, int]]:
    found = []
    for n, (stamp, read, written) in _columns(path, lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            whole_seconds, _, part = stamp.partition(".")
            moment = datetime.datetime.fromisoformat(whole_seconds).replace(tzinfo=datetime.UTC)
            seconds = moment.timestamp() + (float("0." + part) if part else 0.0)
        except (ValueError, OverflowError):
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
            moment = float(entry["timestamp"]) / 1e3
            read, written = int(entry["input_length"]), int(entry["output_length"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise FormatError(f"{path}, line {n}", f"is no request ({error!r})") from None
        if not abs(moment) < np.inf:
            raise FormatError(f"{path}, line {n}", f"timestamp is {moment:g}, must be a finite number")
        where = f"{path}, line {n}"
        found.append((moment, _tokens(where, read), _tokens(where, written)))
    if not found:
        raise FormatError(path, "holds no requests")
    return found
