"""What an engine hands over when a model's experts are taken from it, and how it was asked to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moeless_opt.problems.arrays import IntArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Links
from moeless_opt.runtime.live.dispatch import SharePolicy, SlotDispatcher
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank
from moeless_opt.runtime.live.groups import ExpertGroup
from moeless_opt.runtime.live.home import HomeStore

__all__ = ["Adopted", "AttachOptions", "Engine"]


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """How a model is attached.

    Parameters
    ----------
    shares : str or SharePolicy
        ``"balanced"`` (water-filling for every batch), ``"equal"``, or a policy.
    home : HomeStore, optional
        Second source of experts; a `PinnedHome` is filled here. By default what the engine has: the
        checkpoint's weights on the host with `transformers`, none with megatron-core.
    checksums : bool
        Check arrivals before they serve.
    row_block : int, optional
        Rows to which expert batches are padded; by default what makes results independent of the split
        (tried out on a CPU, see `live.rows`; 1 on a GPU).
    experts : {"auto", "loop", "grouped"}
        How a rank's experts are computed: one after the other, or in grouped products over a pool that holds
        all of them (`live.grouped`; not in float64). By default grouped on a GPU where that is possible.
    places : int, optional
        Experts of a layer for which the pool has room; by default a quarter more than a rank has at first, at
        least two. More are possible, at the cost of an allocation.
    split : {"auto", "host", "device"}
        Where the tokens of a batch are split among replicas: by kernels where the counts are (needs Triton;
        on a GPU, or interpreted), or on the host. By default by kernels on a GPU where Triton is there. The
        integers are the same; policies of your own are always computed on the host.
    timeout : float
        Seconds after which a collective of a batch fails, though all ranks are alive.
    dead_after : float, optional
        Seconds without a sign of life (see `live.heartbeat`) after which a rank counts as dead; None: there
        are none, and a rank that hangs is only noticed by `timeout`.
    join : int, optional
        The group runs already and has lost this process's (global) rank, which is to come back: nothing is
        agreed here, and a `Guard` brings it in. Needs `store`, and the group's first ranks.
    node_G : sequence of int, optional
        Node of each rank; by host name when absent.
    memory_limit : int, optional
        Bytes of experts that this rank may hold at any moment.
    links : Links, optional
        Bandwidths, by which sources of a replica are chosen; by default NVLink, then the rank's own host
        memory, then the network.
    ranks : sequence of int, optional
        Global ranks of the expert-parallel group; by default what the engine says, or all of the world.
    store : torch.distributed.Store, optional
        Where they find each other; by default the world's.
    staged : bool
        Carry tokens and weights through host memory by gloo, on a GPU too: several ranks can then share one,
        for tests, which NCCL refuses. Slow.
    """

    shares: str | SharePolicy = "balanced"
    home: HomeStore | None = None
    checksums: bool = False
    row_block: int | None = None
    experts: str = "auto"
    places: int | None = None
    split: str = "auto"
    timeout: float = 600.0
    dead_after: float | None = 30.0
    join: int | None = None
    node_G: Sequence[int] | None = None
    memory_limit: int | None = None
    links: Links | None = None
    ranks: Sequence[int] | None = None
    store: Any = None
    staged: bool = False
    #: Groups that were made with these options, to be closed where attaching fails.
    made: list[ExpertGroup] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.experts not in ("auto", "loop", "grouped"):
            raise ProblemError("experts", f"is {self.experts!r}, must be 'auto', 'loop' or 'grouped'")
        if self.split not in ("auto", "host", "device"):
            raise ProblemError("split", f"is {self.split!r}, must be 'auto', 'host' or 'device'")
        if self.places is not None:
            whole("places", self.places, low=1)
            if self.experts == "loop":
                raise ProblemError(
                    "places", f"is {self.places}, but only grouped experts have a pool, not 'loop'"
                )
        if self.row_block is not None:
            whole("row_block", self.row_block, low=1)
        if self.memory_limit is not None:
            whole("memory_limit", self.memory_limit)
        for g, node in enumerate(() if self.node_G is None else self.node_G):
            whole(f"node_G[{g}]", node)
        if self.home is not None and not callable(getattr(self.home, "read", None)):
            raise ProblemError("home", f"is {self.home!r}, must be a HomeStore")
        if self.links is not None and not isinstance(self.links, Links):
            raise ProblemError("links", f"is {self.links!r}, must be Links")
        for name in ("checksums", "staged"):
            if not isinstance(getattr(self, name), bool):
                raise ProblemError(name, f"is {getattr(self, name)!r}, must be true or false")
        number("timeout", self.timeout, open_low=True)
        if self.dead_after is not None:
            number("dead_after", self.dead_after, low=0.1)

    def told(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        home = None if self.home is None else (type(self.home).__name__, getattr(self.home, "copies", None))
        return {
            "shares": self.shares,
            "home": home,
            "checksums": self.checksums,
            "node_G": None if self.node_G is None else [int(n) for n in self.node_G],
            "links": self.links,
            "staged": self.staged,
        }

    def group(self, device: torch.device, ranks: Sequence[int] | None = None) -> ExpertGroup:
        """The expert-parallel group; `ranks` are those of the engine, if it has such groups."""
        made = ExpertGroup.create(
            self.ranks if ranks is None else ranks,
            device=device,
            timeout=self.timeout,
            node_R=self.node_G,
            store=self.store,
            staged=self.staged,
            dead_after=self.dead_after,
            join=self.join,
        )
        self.made.append(made)
        return made


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """The experts of a model, on one rank.

    Parameters
    ----------
    model : module
        Whose experts these are.
    group : ExpertGroup
        Ranks that hold them between them, from `AttachOptions.group`.
    layers : sequence of int
        The model's own numbers of its MoE layers, in order.
    experts, topk, hidden : int
        Of a layer; of a token; width of a token.
    banks : sequence of SlotBank
        Slots of this rank, by layer. To begin with every rank holds a run of experts
        (`slots.static_slots`).
    meter : MemoryMeter
        Of the banks.
    run_experts : callable
        ``run_experts(index, rows, sizes)`` puts rows through this rank's experts of the layer with that
        index, as many through each as its size says.
    install : callable
        ``install(dispatchers, most_rows)``, called once: let these, one a layer, take the place of the
        engine's own, and compute at most so many rows at a time (None: any number; see `rows.pieces`).
    restore : callable
        Called by `detach` with all experts in their first places: the reverse.
    home : HomeStore, optional
        Second source that the engine keeps anyway.
    transposed : bool
        Whether the experts' matrices are stored [inner, outer].
    row_exact : bool
        Whether sizes of batches are chosen so that a row's result does not depend on the batch.
    counted : callable
        ``counted(seen, marks, device)``: which of the tokens that layers get on this rank are this rank's to
        count, given the marks of real ones (None: all). Others count those that several ranks hold alike.
    divided : str
        By what else than expert parallelism the model is divided, so that no rank can be spared; empty: by
        nothing.
    """

    model: Any
    group: ExpertGroup
    layers: Sequence[int]
    experts: int
    topk: int
    hidden: int
    banks: Sequence[SlotBank]
    meter: MemoryMeter
    run_experts: Callable[[int, torch.Tensor, IntArray], Any]
    install: Callable[[Sequence[SlotDispatcher], int | None], None]
    restore: Callable[[], None]
    home: HomeStore | None = None
    transposed: bool = False
    row_exact: bool = True
    counted: Callable[[int, torch.Tensor | None, torch.device], torch.Tensor | None] = (
        lambda seen, marks, device: marks
    )
    divided: str = ""

    def told(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        return {
            "layers": list(self.layers),
            "experts": (self.experts, self.topk),
            "shapes": [bank.shapes for bank in self.banks],
        }


class Engine(Protocol):
    """An adapter: a module, or an object, with these two functions."""

    def accepts(self, model: Any) -> bool:
        """Whether the model is of this engine; must not raise."""
        ...

    def adopt(self, model: Any, options: AttachOptions) -> Adopted:
        """Take its experts over; on every rank of an expert-parallel group at the same time.

        Raises
        ------
        UnsupportedFeatureError
            Naming what the model uses and the adapter does not support.
        """
        ...
