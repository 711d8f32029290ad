"""Watching a running model: hidden states for predictors, loads by source, traces, and traces played back.

Loads and times are the business of `LiveModel.observe`; here is what concerns single tokens, and the ranks on
which they live. Traces are `moeless_opt.problems.io.traces.TokenTraces`; in a recorded one the experts of a
token ascend.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.problems.files import atomic_write, format_of, named
from moeless_opt.problems.io import TokenTraces
from moeless_opt.problems.spec import Loads
from moeless_opt.runtime.engines.megatron import unwrap
from moeless_opt.runtime.live import LiveModel
from moeless_opt.runtime.live.dispatch import SlotDispatcher

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

__all__ = [
    "HiddenTap",
    "SourceRecorder",
    "TraceRecorder",
    "moe_blocks",
    "record_sources",
    "record_traces",
    "replay_gate",
    "replay_routes",
    "save_token_traces",
    "tap_hidden",
]


# ------------------------------------------------------------------------------------------- traces


def save_token_traces(traces: TokenTraces, path: str | Path) -> None:
    """Write traces as `read_token_traces` reads them (give it ``experts=`` where not every expert occurs)."""
    arrays: dict[str, Any] = {
        "experts": traces.experts_TLK,
        "offsets": traces.offsets,
        "prompt_tokens": traces.prompt_tokens,
    }
    if traces.domain is not None:
        arrays |= {"domain": traces.domain, "domain_names": np.array(traces.domains)}
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    format_of(path, (".npz",))
    atomic_write(path, packed.getvalue())


class TraceRecorder:
    """Collects the routes of this rank's tokens, forward by forward; made by `record_traces`."""

    def __init__(self, live: LiveModel) -> None:
        self._experts = live.experts
        self._layers = len(live.dispatchers)
        self._pending: list[NDArray[np.int16]] = []
        self._tokens: list[NDArray[np.int16]] = []
        self._ends = [0]
        #: Sequences in a batch whose tokens come sequence-major ``[s, b]``: each becomes a request. 1: the
        #: tokens of a forward are one request.
        self.batch_size = 1

    def _take(self, dispatcher: SlotDispatcher, expert_Tk: Tensor) -> None:
        array = dispatcher.real_choice(expert_Tk).to("cpu").numpy().astype(np.int16)
        array[array >= self._experts] = -1
        self._pending.append(array)
        if len(self._pending) == self._layers:
            self._finish(np.stack(self._pending, axis=1))
            self._pending = []

    def _finish(self, chosen_TLK: NDArray[np.int16]) -> None:
        each = self.batch_size
        if len(chosen_TLK) % each:
            raise ProblemError("batch_size", f"is {each}, the batch has {len(chosen_TLK)} tokens")
        by_sequence = chosen_TLK.reshape(-1, each, *chosen_TLK.shape[1:]).swapaxes(0, 1)
        for sequence in by_sequence:
            real = sequence[(sequence >= 0).any(axis=(1, 2))]
            if len(real):
                self._tokens.append(real)
                self._ends.append(self._ends[-1] + len(real))

    def trace(self) -> TokenTraces:
        """Everything recorded so far.

        Raises
        ------
        ProblemError
            If no token was recorded, or one had fewer experts than others.
        """
        if not self._tokens:
            raise ProblemError("trace", "no token was recorded")
        tokens = np.concatenate(self._tokens)
        return TokenTraces(
            experts_TLK=tokens, offsets=np.asarray(self._ends, dtype=np.int64), experts=self._experts
        )


@contextlib.contextmanager
def record_traces(live: LiveModel, batch_size: int = 1) -> Iterator[TraceRecorder]:
    """Record the routes of all forward passes in this context; tokens masked by `real_tokens` are left out.

    Parameters
    ----------
    live : LiveModel
        Of any engine.
    batch_size : int
        See `TraceRecorder.batch_size`.
    """
    recorder = TraceRecorder(live)
    recorder.batch_size = batch_size
    with _on_batches(live, recorder._take):
        yield recorder


@contextlib.contextmanager
def _on_batches(live: LiveModel, take: Callable[[SlotDispatcher, Tensor], None]) -> Iterator[None]:
    """Hand every batch of every layer to `take` meanwhile."""
    for dispatcher in live.dispatchers:
        dispatcher.on_batch.append(take)
    try:
        yield
    finally:
        for dispatcher in live.dispatchers:
            dispatcher.on_batch.remove(take)


# ---------------------------------------------------------------------------------- loads by source


class SourceRecorder:
    """Counts what the tokens of this rank choose; made by `record_sources`.

    A pass that the loss of a rank broke off, and that is repeated, counts once.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._pending: list[Tensor] = []
        self._group = live.group
        self._sum_LE: Tensor | None = None

    def _take(self, dispatcher: SlotDispatcher, expert_Tk: Tensor) -> None:
        if dispatcher.index == 0:
            self._count()
            self._group = self._live.group
        self._pending.append(dispatcher.real_counts(expert_Tk))

    def _count(self) -> None:
        """Add the last pass, if all layers had it among the ranks that there still are."""
        if len(self._pending) == len(self._live.layers) and self._group is self._live.group:
            pass_LE = torch.stack(self._pending)
            self._sum_LE = pass_LE if self._sum_LE is None else self._sum_LE + pass_LE
        self._pending = []

    @property
    def load_LE(self) -> IntArray:
        """What this rank's own tokens have chosen so far; between two passes."""
        self._count()
        if self._sum_LE is None:
            return np.zeros((len(self._live.layers), self._live.experts), dtype=np.int64)
        return np.asarray(self._sum_LE.cpu().numpy(), dtype=np.int64)

    def clear(self) -> None:
        """Begin anew."""
        self._sum_LE, self._pending = None, []

    def loads(self) -> Loads:
        """Loads by the rank that the tokens live on, `Loads.load_TLGE`; called by all ranks together.

        Raises
        ------
        ProblemError
            If no rank had a token.
        """
        live = self._live
        rows = np.asarray(live.group.gather_ints(self.load_LE.ravel().tolist()), dtype=np.float64)
        load_LGE = rows.reshape(len(rows), len(live.layers), live.experts).swapaxes(0, 1)
        if not load_LGE.any():
            raise ProblemError("loads", "no token was recorded")
        return Loads(
            load_TLE=load_LGE.sum(1)[None], load_TLGE=load_LGE[None], layers=live.layers, source="live model"
        )

    def save(self, folder: str | Path) -> Path:
        """Write this rank's file, ``loads_rank0.csv`` or the like, as `moeless_opt.read_sources` reads them.

        Each rank writes its own, at any time, all or nothing; a second call replaces the first one's.

        Parameters
        ----------
        folder : path
            The same one on all ranks, of this expert-parallel group alone; it is made.

        Raises
        ------
        ProblemError
            If there is a file of a rank that does not exist: of another run.
        """
        group, live = self._live.group, self._live
        with named(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in Path(folder).glob("loads_rank*.csv"))
        known = {f"loads_rank{rank}.csv" for rank in range(group.size)}
        for name in names:
            if name not in known:
                raise ProblemError(
                    "folder",
                    f"{folder} has {name}, there are {group.size} ranks: of another run? must be one without",
                )
        path = Path(folder) / f"loads_rank{group.rank}.csv"
        cells = ((live.layers[x], e, n) for (x, e), n in np.ndenumerate(self.load_LE))
        lines = ["layer,expert,count", *(f"{layer},{expert},{n}" for layer, expert, n in cells)]
        atomic_write(path, ("\n".join(lines) + "\n").encode())
        return path


@contextlib.contextmanager
def record_sources(live: LiveModel) -> Iterator[SourceRecorder]:
    """Count what each rank's tokens choose in this context; tokens masked by `real_tokens` are left out.

    Parameters
    ----------
    live : LiveModel
        Of any engine.
    """
    recorder = SourceRecorder(live)
    with _on_batches(live, recorder._take):
        yield recorder


class _Replay:
    def __init__(self, replays: list[Any]) -> None:
        self._replays = replays

    def load(self, experts_TLK: NDArray[Any]) -> None:
        """Routes of the next forward pass, one row per token in the order in which the layers see them."""
        if experts_TLK.ndim != 3 or experts_TLK.shape[1] != len(self._replays):
            raise ProblemError(
                "experts", f"must be [tokens, {len(self._replays)} layers, top-k], got {experts_TLK.shape}"
            )
        if experts_TLK.size and int(experts_TLK.min()) < 0:
            raise ProblemError("experts", "has tokens without experts, which a router cannot replay")
        for layer, replay in enumerate(self._replays):
            replay.set_target_indices(
                torch.from_numpy(np.ascontiguousarray(experts_TLK[:, layer], dtype=np.int64))
            )


@contextlib.contextmanager
def replay_routes(model: Any) -> Iterator[_Replay]:
    """Make a megatron-core model's routers choose what a trace says, by megatron-core's `RouterReplay`.

    Works on any live model, also one that was built without ``moe_enable_routing_replay``. The weights of the
    chosen experts still come from the router's scores.
    """
    routers = [block.mlp.router for block in unwrap(model).decoder.layers if isinstance(block.mlp, MoELayer)]
    before = [router.router_replay for router in routers]
    known = RouterReplay.global_router_replay_instances
    kept = list(known)
    replays = []
    for router in routers:
        replay = RouterReplay()
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        router.router_replay = replay
        replays.append(replay)
    try:
        yield _Replay(replays)
    finally:
        for router, old in zip(routers, before, strict=True):
            router.router_replay = old
        known[:] = kept


# ------------------------------------------------------------------------------------ hidden states


class HiddenTap:
    """Gives away what a predictor sees; made by `tap_hidden`."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def close(self) -> None:
        """Stop."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def moe_blocks(model: Any) -> list[Any]:
    """The transformer layers of a megatron-core model that have experts."""
    return [block for block in unwrap(model).decoder.layers if isinstance(block.mlp, MoELayer)]


def _norms(model: Any) -> list[Any]:
    """The norm in front of every MoE layer of a model of any engine."""
    if hasattr(model, "set_experts_implementation"):
        from moeless_opt.runtime.engines.transformers import moe_parts

        return [norm for norm, _, _ in moe_parts(model)]
    norms = [block.pre_mlp_layernorm for block in moe_blocks(model)]
    if not all(any(True for _ in norm.parameters()) for norm in norms):
        raise UnsupportedFeatureError(
            "the norm in front of the MoE layer is fused away; use a layer spec that keeps it"
        )
    return norms


def tap_hidden(model: Any, callback: Callable[[int, Tensor], None]) -> HiddenTap:
    """Call `callback(layer, hidden)` in front of every MoE layer.

    Parameters
    ----------
    model : GPTModel or transformers model
        Attached or not.
    callback : callable
        Gets the index among the MoE layers and the residual stream before its norm: [sequence, batch, hidden]
        with megatron-core, [batch, sequence, hidden] with `transformers`. It runs in the forward pass: keep
        it short, and detach what you keep.

    Raises
    ------
    UnsupportedFeatureError
        If there is no such place in the model.
    """
    tap = HiddenTap()
    for index, norm in enumerate(_norms(model)):

        def hook(_module: Any, arguments: tuple[Any, ...], index: int = index) -> None:
            callback(index, arguments[0].detach())

        tap._handles.append(norm.register_forward_pre_hook(hook))
    return tap


@torch.no_grad()
def replay_gate(model: Any, layer: int, hidden: Tensor) -> Tensor:
    """What the router of `layer` would choose for this hidden state, as tokens per expert [E].

    With the residual stream of an earlier layer this is the simplest predictor of a later layer's load. The
    counts are of this rank's tokens.
    """
    if hasattr(model, "set_experts_implementation"):
        from moeless_opt.runtime.engines.transformers import moe_parts, route

        norm, router, _ = moe_parts(model)[layer]
        return route(router, norm.forward(hidden))[1].sum(dim=0)
    block = moe_blocks(model)[layer]
    router = block.mlp.router
    # The norm's own forward: calling the module would fire the taps.
    logits = router.gating(block.pre_mlp_layernorm.forward(hidden))
    _, routing_map = router.routing(logits)
    counts: Tensor = routing_map.sum(dim=0)
    return counts
