"""Watching a running model: hidden states for predictors, routing traces, and traces played back.

Loads and times are the business of `LiveModel.observe`; here is what concerns single tokens.

The trace format (``.npz``) has

============  =========================================================================================
``experts``   whole numbers, [tokens, layers, top-k]: the experts of every token, ascending; -1 for none
``offsets``   int64, [requests + 1]: tokens of request i are ``offsets[i]`` to ``offsets[i + 1]``
``n_experts`` experts per layer
``format``    ``"moeless-trace"``, and ``version`` 1
============  =========================================================================================

Other arrays may stand beside them and are kept. `moeless_opt.problems` reads loads from such a file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless_opt.problems.errors import FormatError, ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.dispatch import SlotDispatcher
from moeless_opt.runtime.live import LiveModel
from moeless_opt.runtime.megatron import unwrap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

__all__ = [
    "HiddenTap",
    "RoutingTrace",
    "TraceRecorder",
    "record_routes",
    "replay_gate",
    "replay_routes",
    "tap_hidden",
]


# ------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts served which token.

    Parameters
    ----------
    experts_TLK : array of int, shape [tokens, layers, top-k]
        Ascending; -1 where a token had none.
    offsets : array of int64, shape [requests + 1]
        Where each request begins and ends.
    n_experts : int
        Experts per layer.
    more : dict
        Arrays that came along.
    """

    experts_TLK: NDArray[Any]
    offsets: NDArray[np.int64]
    n_experts: int
    more: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.experts_TLK.ndim != 3 or self.experts_TLK.dtype.kind not in "iu":
            raise FormatError(
                "experts", f"must be whole numbers [tokens, layers, top-k], got {self.experts_TLK.shape}"
            )
        ends = self.offsets
        if (
            ends.ndim != 1
            or ends.size < 1
            or ends[0] != 0
            or ends[-1] != len(self.experts_TLK)
            or (np.diff(ends) < 0).any()
        ):
            raise FormatError(
                "offsets",
                f"must rise from 0 to the {len(self.experts_TLK)} tokens, got {ends[:1]}..{ends[-1:]}",
            )
        if self.experts_TLK.size and int(self.experts_TLK.max()) >= self.n_experts:
            raise FormatError("experts", f"names expert {int(self.experts_TLK.max())} of {self.n_experts}")

    def load_LE(self) -> NDArray[np.int64]:
        """Tokens of each expert, by layer."""
        n_layers = self.experts_TLK.shape[1]
        flat = self.experts_TLK.astype(np.int64).transpose(1, 0, 2).reshape(n_layers, -1)
        return np.stack([np.bincount(row[row >= 0], minlength=self.n_experts) for row in flat])

    def request(self, index: int) -> NDArray[Any]:
        """Tokens of one request, [tokens, layers, top-k]."""
        return self.experts_TLK[self.offsets[index] : self.offsets[index + 1]]

    def save(self, path: str | Path) -> None:
        """Write the trace."""
        small = (
            np.uint8
            if self.n_experts < 256 and (not self.experts_TLK.size or self.experts_TLK.min() >= 0)
            else np.int16
        )
        arrays: dict[str, Any] = {
            **self.more,
            "experts": self.experts_TLK.astype(small),
            "offsets": self.offsets.astype(np.int64),
            "n_experts": np.int64(self.n_experts),
            "format": np.array("moeless-trace"),
            "version": np.int64(1),
        }
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: str | Path, n_experts: int | None = None) -> RoutingTrace:
        """Read a trace; `n_experts` for files that do not say it.

        Raises
        ------
        FormatError
            If it is no trace.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "experts" not in arrays or "offsets" not in arrays:
            raise FormatError(
                str(path), f"is no routing trace: needs 'experts' and 'offsets', has {sorted(arrays)}"
            )
        version = int(arrays.pop("version", np.int64(1)))
        if version != 1:
            raise FormatError(str(path), f"is version {version} of the trace format, this reads version 1")
        arrays.pop("format", None)
        experts = arrays.pop("experts")
        offsets = arrays.pop("offsets").astype(np.int64)
        known = arrays.pop("n_experts", None)
        count = int(known) if known is not None else n_experts
        if count is None:
            count = int(experts.max()) + 1 if experts.size else 1
        return cls(experts, offsets, count, arrays)


class TraceRecorder:
    """Collects the routes of this rank's tokens, forward by forward; made by `record_routes`."""

    def __init__(self, live: LiveModel) -> None:
        self._n_experts = live.n_experts
        self._layers = len(live.dispatchers)
        self._pending: list[NDArray[np.int16]] = []
        self._tokens: list[NDArray[np.int16]] = []
        self._ends = [0]
        #: Sequences in a batch whose tokens come sequence-major ``[s, b]``: each becomes a request. 1: the
        #: tokens of a forward are one request.
        self.batch_size = 1

    def _take(self, dispatcher: SlotDispatcher, expert_Tk: Tensor) -> None:
        chosen = expert_Tk
        if dispatcher.valid is not None:
            chosen = torch.where(dispatcher.valid[:, None], chosen, self._n_experts)
        array = chosen.to("cpu").numpy().astype(np.int16)
        array[array >= self._n_experts] = -1
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

    def trace(self) -> RoutingTrace:
        """Everything recorded so far."""
        shape = (0, self._layers, 1)
        tokens = np.concatenate(self._tokens) if self._tokens else np.zeros(shape, dtype=np.int16)
        return RoutingTrace(tokens, np.asarray(self._ends, dtype=np.int64), self._n_experts)


@contextlib.contextmanager
def record_routes(live: LiveModel, batch_size: int = 1) -> Iterator[TraceRecorder]:
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
    for dispatcher in live.dispatchers:
        dispatcher.on_batch.append(recorder._take)
    try:
        yield recorder
    finally:
        for dispatcher in live.dispatchers:
            dispatcher.on_batch.remove(recorder._take)


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


def _moe_blocks(model: Any) -> list[Any]:
    return [block for block in unwrap(model).decoder.layers if isinstance(block.mlp, MoELayer)]


def tap_hidden(model: Any, callback: Callable[[int, Tensor], None]) -> HiddenTap:
    """Call `callback(layer, hidden)` in front of every MoE layer of a megatron-core model.

    Parameters
    ----------
    model : GPTModel
        Attached or not.
    callback : callable
        Gets the index among the MoE layers and the residual stream, [sequence, batch, hidden], before its
        norm. It runs in the forward pass: keep it short, and detach what you keep.
    """
    tap = HiddenTap()
    for index, block in enumerate(_moe_blocks(model)):

        def hook(_module: Any, arguments: tuple[Any, ...], index: int = index) -> None:
            callback(index, arguments[0].detach())

        if not any(True for _ in block.pre_mlp_layernorm.parameters()):
            tap.close()
            raise UnsupportedFeatureError(
                "the norm in front of the MoE layer is fused away; use a layer spec that keeps it"
            )
        tap._handles.append(block.pre_mlp_layernorm.register_forward_pre_hook(hook))
    return tap


@torch.no_grad()
def replay_gate(model: Any, layer: int, hidden: Tensor) -> Tensor:
    """What the router of `layer` would choose for this hidden state, as tokens per expert [E].

    With the residual stream of an earlier layer this is the simplest predictor of a later layer's load. The
    counts are of this rank's tokens.
    """
    block = _moe_blocks(model)[layer]
    router = block.mlp.router
    # The norm's own forward: calling the module would fire the taps.
    logits = router.gating(block.pre_mlp_layernorm.forward(hidden))
    _, routing_map = router.routing(logits)
    counts: Tensor = routing_map.sum(dim=0)
    return counts
