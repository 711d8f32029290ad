"""Decode passes of which all but the experts are CUDA graphs.

A pass of a few tokens takes its time in launches, some sixty in a layer. What stands between two layers'
experts (norms, attention over the paged pool, the router) is the same launches in every pass of as many rows,
so it is recorded once and launched as one. The experts stay outside: where their rows go is known in the pass
alone, and the ranks agree there on plans. So plans come into force as in any other pass.

Rows are rounded up to some sizes, blocks of a request to powers of two. Rows that are over belong to no
request: they write to the spare block and choose no expert.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeless_opt.runtime.engines import EndPiece, LaunchRecorder
from moeless_opt.runtime.serve.engine.lean import LeanDecoder, through_experts

__all__ = ["DecodeGraphs"]

#: Most pairs of sizes that are recorded: each keeps the tensors of a pass.
MOST = 64
#: Times that a pair of sizes comes before it is recorded.
USES = 2


class _Layer(NamedTuple):
    """A layer's experts between two pieces: the layer, what they get, and where their results go."""

    layer: Any
    normed: Tensor
    expert_Tk: Tensor
    prob_Tk: Tensor
    made: Tensor


class _Recorded(NamedTuple):
    """A pass of some size: its inputs here and there, pieces, experts between them, and logits."""

    here: Tensor
    there: Tensor
    pieces: list[Callable[[], None]]
    layers: list[_Layer]
    logits: Tensor


class DecodeGraphs:
    """Records and runs decode passes.

    Parameters
    ----------
    decoder : LeanDecoder
        Of the model.
    run : callable
        ``run(inputs, rows, blocks)`` gives the logits of a pass whose tokens, places, slots and blocks lie in
        one int64 tensor, [3 T + T B + 1]: one token of each request, and last the number of real rows.
    recorder : LaunchRecorder
        How passes are recorded.
    device : torch.device
        Where they run.
    """

    def __init__(
        self,
        decoder: LeanDecoder,
        run: Callable[[Tensor, int, int], Tensor],
        recorder: LaunchRecorder,
        device: torch.device,
    ) -> None:
        self._decoder, self._run, self._recorder, self._device = decoder, run, recorder, device
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._uses: dict[tuple[int, int], int] = {}
        self.usable = decoder.plain
        self._read: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        #: Passes that ran so.
        self.passes = 0

    def forward(self, rows: Any, block_tokens: int, spare: tuple[int, int]) -> Tensor | None:
        """Logits of a pass of single tokens; None where it has to run by itself.

        Parameters
        ----------
        rows : PassRows
            The pass.
        block_tokens : int
            Tokens in a block.
        spare : (int, int)
            Block, and slot, of rows that belong to no request.
        """
        count = len(rows.length_R)
        if not self.usable or not count or (rows.length_R != 1).any() or len(rows.wanted_S) != count:
            return None
        if (rows.wanted_S != np.arange(count)).any():
            return None
        if self._decoder.watched() or not self._decoder.served():
            return None
        blocks = int(rows.position_T.max()) // block_tokens + 1
        key = _round(count), 1 << (blocks - 1).bit_length()
        if key not in self._recorded:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] < USES or len(self._recorded) >= MOST:
                return None
            if not self._record(key, spare):
                return None
        found = self._recorded[key]
        if self._read is not None:
            self._read.synchronize()  # the last pass has read what is written over now
        _clear(found.here.numpy(), key, spare)
        _fill(found.here.numpy(), rows, key)
        found.there.copy_(found.here, non_blocking=True)
        if self._read is not None:
            self._read.record()
        for piece, one in zip(found.pieces, found.layers, strict=False):
            piece()
            one.made.copy_(through_experts(one.layer, one.normed, one.expert_Tk, one.prob_Tk))
        found.pieces[-1]()
        self.passes += 1
        return found.logits[:count]

    def _record(self, key: tuple[int, int], spare: tuple[int, int]) -> bool:
        size, blocks = key
        length = 3 * size + size * blocks + 1
        here = torch.empty(length, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        _clear(here.numpy(), key, spare)
        there = here.to(self._device, copy=True)
        layers: list[_Layer] = []

        def call(cut: EndPiece) -> Tensor:
            real = torch.arange(size, device=self._device) < there[-1]

            def experts(layer: Any, routes: Any, normed: Tensor) -> Tensor:
                shared = layer.shared_experts(normed) if layer.use_shared_expert else None
                expert_Tk, prob_Tk = routes(normed)
                none = int(layer.config.num_moe_experts)
                expert_Tk = torch.where(real[:, None], expert_Tk, none)
                made = cut((normed, expert_Tk, prob_Tk), torch.empty_like(normed))
                layers.append(_Layer(layer, normed, expert_Tk, prob_Tk, made))
                return made if shared is None else made + shared

            with self._decoder.experts_by(experts):
                return self._run(there, size, blocks)

        try:
            pieces, logits = self._recorder.record(call)
        except RuntimeError as error:
            # Something of this model waits for the device: it runs as it always did.
            self.usable = False
            logging.getLogger(__name__).warning("passes cannot be recorded as CUDA graphs: %s", error)
            return False
        self._recorded[key] = _Recorded(here, there, pieces, list(layers), logits)
        return True


def _round(count: int) -> int:
    """Rows that are recorded for so many."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def _clear(into: Any, key: tuple[int, int], spare: tuple[int, int]) -> None:
    """A pass without rows, where it is read from: all belong to no request."""
    size, _ = key
    into[: 2 * size] = 0
    into[2 * size : 3 * size] = spare[1]
    into[3 * size : -1] = spare[0]
    into[-1] = 0


def _fill(into: Any, rows: Any, key: tuple[int, int]) -> None:
    """Write a pass over one without rows."""
    (size, blocks), count = key, len(rows.length_R)
    tokens_T, position_T, slot_T = into[: 3 * size].reshape(3, size)
    tokens_T[:count], position_T[:count], slot_T[:count] = rows.tokens_T, rows.position_T, rows.slot_T
    # A request's own blocks are not more than the longest has; what is behind them is hidden.
    known = min(blocks, rows.blocks_RB.shape[1])
    into[3 * size : -1].reshape(size, blocks)[:count, :known] = rows.blocks_RB[:, :known]
    into[-1] = count
