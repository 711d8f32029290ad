"""What stands between a front (HTTP, a benchmark, a test) and an engine that generates. No torch here.

An engine takes requests as tokens, and gives what it generates to a callback, token by token. A front knows
nothing of models, ranks and experts; an engine nothing of HTTP. Another engine can stand behind the same
front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from moeless_opt.problems.arrays import FloatArray, IntArray, number, whole
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.plan import Plan

__all__ = [
    "SERVE_POLICIES",
    "Deliver",
    "Emitted",
    "EngineBusyError",
    "EngineStoppedError",
    "Finish",
    "PlanEvent",
    "Planning",
    "Sampling",
    "ServeEngine",
    "ServeRequest",
    "ServeStatus",
    "TextCodec",
]

Finish = Literal["stop", "length", "cancelled", "error"]

#: Who decides where experts sit: "static" (nobody), the published "eplb" and "moeless", ours by windows, ours
#: layer by layer.
SERVE_POLICIES = ("static", "eplb", "moeless", "windowed", "per-layer")

#: Most alternatives of a token whose probabilities can be asked for.
MOST_LOGPROBS = 20
#: Seeds are taken modulo this.
SEEDS = 2**63


class EngineBusyError(MoelessError):
    """The queue is full.

    Parameters
    ----------
    retry_after : float
        Seconds after which it is worth to try again.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")


class EngineStoppedError(MoelessError):
    """The engine takes no requests: it drains, has ended, or has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a request are chosen. What is chosen does not depend on other requests.

    Parameters
    ----------
    temperature : float
        0 takes the likeliest token.
    top_p : float
        Only the likeliest tokens that have this probability together.
    top_k : int
        Only so many likeliest tokens; 0: all.
    seed : int
        Of the choice: the same request with the same seed gives the same tokens.
    stop : tuple of str
        Texts at which the request ends; they are not part of what is given back.
    max_tokens : int or None
        Most tokens to generate; None: what the context has room for.
    logprobs : int or None
        None: no probabilities; 0: that of the chosen token; else also those of so many likeliest ones.
    ignore_end : bool
        Whether to go on behind a token that ends the text (for benchmarks).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, most, above in (("temperature", 100.0, False), ("top_p", 1.0, True)):
            value = number(name, getattr(self, name), open_low=above)
            if value > most:
                raise ProblemError(name, f"is {value:g}, must be at most {most:g}")
            put(self, name, value)
        put(self, "top_k", whole("top_k", self.top_k, high=2**31 - 1))
        put(self, "seed", whole("seed", self.seed, low=-SEEDS, high=SEEDS - 1) % SEEDS)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ProblemError("stop", "must be texts of at least one character")
        put(self, "stop", tuple(self.stop))
        if self.max_tokens is not None:
            put(self, "max_tokens", whole("max_tokens", self.max_tokens, low=1))
        if self.logprobs is not None:
            put(self, "logprobs", whole("logprobs", self.logprobs, high=MOST_LOGPROBS))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """One text to be continued.

    Parameters
    ----------
    id : str
        Unlike those of all other requests that run.
    prompt : tuple of int
        Tokens, at least one.
    sampling : Sampling
        How to go on.
    client : str
        Whose it is: places in the queue and in the batch are shared evenly among clients.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """One token of one request, or its end.

    Parameters
    ----------
    request : str
        Its id.
    token : int or None
        None where there is only an end to tell (cancelled, failed).
    text : str
        What the token adds. Bytes of a character that is not complete, and what may be the beginning of a
        stop text, are held back and come with a later token.
    logprob : float or None
        Of the token, where asked for: of the model's own distribution, before temperature and cuts.
    top : tuple of (int, float)
        The likeliest tokens and their log-probabilities, where asked for.
    finish : str or None
        None: goes on. "stop": a stop text or a token that ends the text; "length": as many tokens as asked
        for, or the context is full; "cancelled"; "error".
    error : str
        What went wrong, for people.
    cached : int
        Tokens of the prompt that needed no computing (only with the first token).
    """

    request: str
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    error: str = ""
    cached: int = 0


Deliver = Callable[[Emitted], None]
"""Takes what a request emits, in order, the last with ``finish``; called from a thread of the engine: be
quick, and don't raise."""


@runtime_checkable
class TextCodec(Protocol):
    """Text to tokens and back."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the start token where the model wants one."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without those that only mark beginnings and ends."""
        ...

    def token_text(self, token: int) -> str:
        """One token for people (log-probabilities)."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token (empty for marks)."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Prompt of a conversation (``role`` and ``content``), ready for the answer.

        Raises
        ------
        ProblemError
            If the template refuses the messages.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What the controller may do, changed while it serves.

    Parameters
    ----------
    policy : str
        One of `SERVE_POLICIES`.
    paused : bool
        Whether nothing is planned for the time being.
    every : int
        Forward passes between two looks at the loads ("eplb", "windowed").
    slots : int or None
        Replicas of a layer that each rank holds; None: one more than it takes to hold every expert once.
    max_moves : int or None
        Most replicas that one plan may move.
    max_step_bytes : int or None
        Most bytes that a rank sends, or receives, at a time.
    keep_alive : float or None
        Seconds that a replica which a layer gave up stays in memory; None: it leaves at once.
    idle_after : float or None
        Seconds without requests after which all replicas but one of each expert leave; None: never.
    """

    policy: str = "windowed"
    paused: bool = False
    every: int = 64
    slots: int | None = None
    max_moves: int | None = None
    max_step_bytes: int | None = None
    keep_alive: float | None = None
    idle_after: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.policy not in SERVE_POLICIES:
            raise ProblemError("policy", f"is {self.policy!r}, must be one of {', '.join(SERVE_POLICIES)}")
        if not isinstance(self.paused, bool):
            raise ProblemError("paused", f"is {self.paused!r}, must be true or false")
        put(self, "every", whole("every", self.every, low=1, high=10**9))
        for name, low in (("slots", 1), ("max_moves", 0), ("max_step_bytes", 1)):
            if getattr(self, name) is not None:
                put(self, name, whole(name, getattr(self, name), low=low))
        for name in ("keep_alive", "idle_after"):
            if getattr(self, name) is not None:
                seconds = number(name, getattr(self, name))
                if seconds > 1e9:
                    raise ProblemError(name, f"is {seconds:g}, must be at most 1e+09 seconds")
                put(self, name, seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEvent:
    """Something that happened to the placement.

    Parameters
    ----------
    number : int
        Counted from 1.
    at : float
        Seconds since 1970.
    passes : int
        Forward passes until then.
    kind : str
        "plan" (the controller's), "given" (from outside), "restored", "idle" (scaled to zero), "ranks"
        (joined or left), "failed", "refused", "settings".
    moves : int
        Replicas that have to be brought to a rank that did not hold them.
    bytes : int
        Their weights.
    seconds : float
        Time of planning.
    imbalance_before, imbalance_after : float
        Largest over mean load of a rank for the loads that were planned for, mean over the layers (1 is
        perfect).
    detail : str
        For people.
    """

    number: int
    at: float
    passes: int
    kind: str
    moves: int = 0
    bytes: int = 0
    seconds: float = 0.0
    imbalance_before: float = 1.0
    imbalance_after: float = 1.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServeStatus:
    """What an engine is doing; counters only grow while it lives.

    Parameters
    ----------
    ready : bool
        Whether requests are served.
    ranks : int
        Ranks that serve now.
    running, waiting, capacity : int
        Requests in the batch, in the queue, and how many may wait.
    kv_blocks, kv_blocks_used : int
        Blocks of the KV pools of all ranks, and those that requests hold.
    kv_cached_blocks : int
        Besides, blocks that are kept because a later prompt may begin alike.
    passes : int
        Forward passes.
    prompt_tokens, cached_tokens, generated_tokens : int
        Computed, taken from kept blocks, and generated.
    finished : mapping
        Requests by how they ended.
    retried : int
        Requests that were begun anew on another rank.
    layers : tuple of int
        The model's numbers of the layers with experts (axis L).
    load_LE : array, shape [L, E]
        Token-expert pairs in the last window.
    tokens_LG : array, shape [L, G]
        Rows that each rank's experts computed in the last window.
    replicas_LE : array of int, shape [L, E]
        Replicas of each expert in force.
    imbalance_L : array, shape [L]
        Largest over mean rows of a rank in the last window.
    largest_rows, mean_rows : float
        Rows of a layer's fullest rank, and of a rank on average, summed over layers and passes: what a pass
        waits for, and what it would wait for in perfect balance. 0 where several GPUs split batches by
        kernels: hosts are told their own rows alone.
    plans, bytes_moved : int
        Plans applied, and bytes that they moved.
    plan_seconds : float
        Time of planning.
    wait_seconds : float
        Time that forward passes waited for weights.
    cold_starts : int
        Replicas that had to be fetched when they were wanted.
    cost : mapping
        GB*s under each charging rule (`runtime.pool.RULES`): experts and the rest, each.
    prediction_error : float or None
        Distance between foreseen and true loads (total variation, 0 to 1), mean of the last plans.
    recoveries : int
        Losses of ranks that were survived.
    restarts : int
        Processes that were started in the place of ranks that were lost.
    events : tuple of PlanEvent
        The newest ones, oldest first.
    """

    ready: bool
    ranks: int
    running: int
    waiting: int
    capacity: int
    kv_blocks: int
    kv_blocks_used: int
    kv_cached_blocks: int
    passes: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]
    retried: int
    layers: tuple[int, ...]
    load_LE: IntArray
    tokens_LG: IntArray
    replicas_LE: IntArray
    imbalance_L: FloatArray
    largest_rows: float
    mean_rows: float
    plans: int
    bytes_moved: int
    plan_seconds: float
    wait_seconds: float
    cold_starts: int
    cost: Mapping[str, tuple[float, float]]
    prediction_error: float | None
    recoveries: int
    restarts: int
    events: tuple[PlanEvent, ...]


@runtime_checkable
class ServeEngine(Protocol):
    """What generates. All methods may be called from any thread."""

    @property
    def model(self) -> str:
        """Name for clients."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def codec(self) -> TextCodec:
        """Text to tokens and back."""
        ...

    def start(self) -> None:
        """Load and begin to serve; returns when requests can be served.

        Raises
        ------
        MoelessError
            If it cannot.
        """
        ...

    def check_room(self, client: str) -> None:
        """Raise `EngineBusyError` if a request of the client would be turned away now; costs nothing."""
        ...

    def submit(self, request: ServeRequest, deliver: Deliver) -> None:
        """Take a request; returns at once.

        Raises
        ------
        EngineBusyError
            The queue is full.
        EngineStoppedError
            It is draining, closed or has failed.
        ProblemError
            The prompt is empty, has unknown tokens, or is too long for the context; or the id is in use.
        """
        ...

    def cancel(self, request: str) -> None:
        """End a request soon, with ``finish="cancelled"``; unknown ids are ignored."""
        ...

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that were taken; whether all have ended."""
        ...

    def close(self) -> None:
        """End at once: what runs ends with an error. May be called twice."""
        ...

    def status(self) -> ServeStatus:
        """What it is doing."""
        ...

    def plan(self) -> Plan:
        """The placement in force, judged for the loads of the last windows."""
        ...

    def apply(self, plan: Plan | Mapping[str, Any]) -> PlanEvent:
        """Serve with a plan made elsewhere (or its JSON form): verified first, then moved to while it serves.

        Raises
        ------
        ProblemError, InvalidPlanError
            It is no plan for this model and these ranks.
        """
        ...

    def planning(self) -> Planning:
        """What the controller may do."""
        ...

    def set_planning(self, **changes: Any) -> Planning:
        """Change fields of it (all that are named, or on an error none); returns it as it is now.

        Raises
        ------
        ProblemError
            An unknown field, or a wrong value.
        """
        ...
