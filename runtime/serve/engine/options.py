"""How an engine is set up, and where it comes from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeless_opt.problems.arrays import number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.serve import Planning

__all__ = ["DEVICES", "DTYPES", "EngineOptions"]

DEVICES = ("auto", "cpu", "cuda")
#: Seconds that no wait is longer than: clocks of operating systems end somewhere.
LONGEST = 1e6
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What to serve, and with how much.

    Parameters
    ----------
    model : str or None
        Folder of a Hugging Face checkpoint of an architecture that the loader knows; None: the small mixture
        of experts that ships with the package.
    name : str or None
        What clients call it; by default the folder's name, or ``tiny-moe``.
    ranks : int
        Expert-parallel processes, started here. Under torchrun (or another launcher that sets ``RANK`` and
        ``WORLD_SIZE``) there are as many as it started, and this is not looked at.
    device, dtype : str
        ``auto``: CUDA where there is some, else the CPU. None: the checkpoint's type (float32 on a CPU).
    context_length : int or None
        Most tokens of prompt and answer together, if less than the model's own.
    token_budget : int
        Most tokens in a forward pass of one rank: longer prompts are computed in pieces.
    max_running : int
        Most requests in the batch of one rank.
    max_waiting : int
        Most requests in the queue, of all ranks together; more are turned away.
    block_tokens : int
        Tokens in a block of the KV pool.
    kv_blocks : int or None
        Blocks of a rank's pool; None: enough for `max_running` requests of a quarter of the context, and for
        one of all of it.
    prefix_cache : bool
        Whether blocks of prompts are kept for prompts that begin alike.
    experts : str
        How a rank's experts are computed: "grouped" in two products, "loop" one after the other (the same
        bits under every placement), "auto": grouped where that is possible.
    graphs : bool
        On a GPU: record what decode passes of the same size launch between the experts, and launch it as CUDA
        graphs.
    planning : Planning
        What the controller may do at first.
    state : str or None
        File that the placement and the settings are kept in: a restart begins from there.
    timeout : float
        Seconds without a sign of life after which a rank counts as lost (at least 0.5). One that gives such
        signs is waited for, however long its pass takes.
    max_restarts : int
        Times in a row that a rank which was lost is started anew, by whoever started it here.
    """

    model: str | None = None
    name: str | None = None
    ranks: int = 1
    device: str = "auto"
    dtype: str | None = None
    context_length: int | None = None
    token_budget: int = 256
    max_running: int = 64
    max_waiting: int = 256
    block_tokens: int = 16
    kv_blocks: int | None = None
    prefix_cache: bool = True
    experts: str = "auto"
    graphs: bool = True
    planning: Planning = field(default_factory=Planning)
    state: str | None = None
    timeout: float = 2.5
    max_restarts: int = 5

    def __post_init__(self) -> None:
        put = object.__setattr__
        for key, low, high in (
            ("ranks", 1, 4096),
            ("token_budget", 1, 2**24),
            ("max_running", 1, 2**16),
            ("max_waiting", 0, 2**20),
            ("block_tokens", 1, 2**12),
            ("max_restarts", 0, 2**20),
        ):
            put(self, key, whole(key, getattr(self, key), low=low, high=high))
        for key, low in (("context_length", 2), ("kv_blocks", 1)):
            if getattr(self, key) is not None:
                put(self, key, whole(key, getattr(self, key), low=low))
        put(self, "timeout", number("timeout", self.timeout, low=0.5))
        if self.timeout > LONGEST:
            raise ProblemError("timeout", f"is {self.timeout:g}, must be at most {LONGEST:g} seconds")
        for key in ("model", "name", "state"):
            text = getattr(self, key)
            if text is not None and not (text.strip() and text.isprintable()):
                raise ProblemError(key, f"is {text!r}, must be printable text that is not empty")
        if self.device not in DEVICES:
            raise ProblemError("device", f"is {self.device!r}, must be one of {', '.join(DEVICES)}")
        if self.experts not in ("auto", "grouped", "loop"):
            raise ProblemError("experts", f"is {self.experts!r}, must be 'auto', 'grouped' or 'loop'")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ProblemError("dtype", f"is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
