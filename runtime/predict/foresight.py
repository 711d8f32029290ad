"""Loads predicted by gates while a model runs.

On a GPU a prediction runs on a stream of its own, and its E numbers come home in pinned memory: nothing waits
for it but who reads it (`Pending.load_E`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeless_opt.problems.arrays import FloatArray, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.engines import CudaRecorder, HiddenTap, LaunchRecorder, tap_hidden
from moeless_opt.runtime.predict.gates import Pair, PlainGate, TunedGate
from moeless_opt.runtime.predict.predictor import Context

__all__ = ["Foresight", "GatePredictor", "Pending"]

#: Times that a gate sees a shape before its launches are recorded; most gates and shapes that are.
USES, RECORDED = 3, 128
#: Most numbers in the hidden states of which they are, of one and of all: a recording keeps a copy of them.
SMALL, HELD = 2**23, 2**26


class Pending:
    """A prediction under way."""

    def __init__(self, home_E: Tensor, done: Any, keep: tuple[Any, ...] = ()) -> None:
        self._home_E = home_E
        self._done = done
        self._keep = keep

    @property
    def ready(self) -> bool:
        """Whether `load_E` would not wait."""
        return self._done is None or bool(self._done.query())

    def load_E(self) -> FloatArray:
        """Wait if need be; the predicted loads [E]."""
        if self._done is not None:
            self._done.synchronize()
        self._keep = ()
        return self._home_E.numpy().astype(np.float64)


class _Launched(NamedTuple):
    """A gate's recording: what it reads, its inputs, what launches it, and its result.

    The gate is kept, so that no other one can have its id.
    """

    gate: PlainGate
    reads: tuple[int, ...]
    hidden: Tensor
    launch: Callable[[], None]
    load_E: Tensor


def _reads(gate: PlainGate) -> tuple[int, ...]:
    """Where a gate's weights lie."""
    held = [m._parameters | m._buffers for m in (gate.norm, gate.router)]  # walking modules takes long
    return tuple(t.data_ptr() for names in held for t in names.values() if t is not None)


class _Recorded:
    """Predictions of plain gates that are launched at once: of few tokens they take their time in launches.

    Parameters
    ----------
    recorder : LaunchRecorder
        How they are recorded.
    """

    def __init__(self, recorder: LaunchRecorder) -> None:
        self._recorder = recorder
        self._uses: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[Any, ...], _Launched] = {}

    def counts_E(self, gate: PlainGate | TunedGate, hidden: Tensor, real: Tensor | None) -> Tensor | None:
        """What `gate` counts; None: not recorded."""
        if type(gate) is not PlainGate or real is not None or hidden.numel() > SMALL:
            return None
        key = id(gate), hidden.shape, hidden.dtype
        known = self._known.get(key)
        if known is not None and not (known.gate is gate and known.reads == _reads(gate)):
            # A recording reads weights where they lay.
            del self._known[key]
            known = None
        if known is None:
            known = self._made(key, gate, hidden)
            if known is None:
                return None
        known.hidden.copy_(hidden)
        known.launch()
        return known.load_E.clone()

    def _made(self, key: tuple[Any, ...], gate: PlainGate, hidden: Tensor) -> _Launched | None:
        """A recording, where it is time for one."""
        held = sum(one.hidden.numel() for one in self._known.values())
        if len(self._known) >= RECORDED or held + hidden.numel() > HELD:
            return None
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] < USES:
            return None
        static = hidden.clone()
        try:
            (launch,), load_E = self._recorder.record(lambda _: gate.counts_E(static))
        except RuntimeError as error:
            logging.getLogger(__name__).warning("a gate cannot be recorded as a CUDA graph: %s", error)
            self._uses[key] = -RECORDED * USES  # it is not tried again soon
            return None
        known = self._known[key] = _Launched(gate, _reads(gate), static, launch, load_E)
        return known


class GatePredictor:
    """Loads from hidden states: plain gates, and trained ones where there are.

    Parameters
    ----------
    gates : list of PlainGate
        Of all MoE layers, from `plain_gates`.
    tuned : mapping of (layer, distance) to TunedGate
        What replaces the plain gate of ``layer + distance`` on the hidden state of `layer`.
    group : process group, optional
        Ranks whose tokens a load counts; predictions of all of them are then added up.
    name : str, optional
        For tables.
    """

    def __init__(
        self,
        gates: list[PlainGate],
        tuned: Mapping[Pair, TunedGate] | None = None,
        *,
        group: Any = None,
        name: str | None = None,
    ) -> None:
        self.gates = gates
        self.tuned = dict(tuned or {})
        self.group = group
        self.name = name or ("gate tuned" if self.tuned else "gate")
        self._stream: Any = None
        self._recorded: _Recorded | None = None

    def gate(self, layer: int, distance: int) -> PlainGate | TunedGate:
        """What predicts layer ``layer + distance`` at `layer`."""
        whole("distance", distance)
        if not 0 <= layer + distance < len(self.gates):
            raise ProblemError("distance", f"is {distance}, but layer {layer} is of {len(self.gates)}")
        return self.tuned.get((layer, distance)) or self.gates[layer + distance]

    @torch.no_grad()
    def start(self, hidden: Tensor, layer: int, distance: int, real: Tensor | None = None) -> Pending:
        """Begin a prediction and return at once.

        Parameters
        ----------
        hidden : Tensor [..., H]
            Residual stream in front of the norm of `layer`.
        layer, distance : int
            Where it is from, and how far ahead to look.
        real : bool Tensor [T], optional
            Tokens that are no padding.
        """
        gate = self.gate(layer, distance)
        if not hidden.is_cuda:
            return Pending(self._count_E(gate, hidden, real), None)
        device = hidden.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._recorded = _Recorded(CudaRecorder(device))
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            load_E = self._count_E(gate, hidden, real)
            home_E = torch.empty(load_E.shape, dtype=load_E.dtype, pin_memory=True)
            home_E.copy_(load_E, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        # The allocator must not hand these on to the main stream before this one has read them.
        hidden.record_stream(self._stream)
        if real is not None:
            real.record_stream(self._stream)
        return Pending(home_E, done, (load_E,))

    def _count_E(self, gate: PlainGate | TunedGate, hidden: Tensor, real: Tensor | None) -> Tensor:
        load_E = None if self._recorded is None else self._recorded.counts_E(gate, hidden, real)
        if load_E is None:
            load_E = gate.counts_E(hidden, real)
        if self.group is not None:
            dist.all_reduce(load_E, group=self.group)  # on the stream that is current: with NCCL, ours
        return load_E

    def predict(self, context: Context, distance: int) -> FloatArray:
        """Predict and wait, scaled to the pass's token-expert pairs."""
        load_E = self.start(_hidden(context), context.layer, distance).load_E()
        total = float(load_E.sum())
        return load_E * (float(context.load_E.sum()) / total) if total > 0 else load_E

    @torch.no_grad()
    def scores(self, context: Context, distance: int) -> FloatArray:
        """What the gate ranks the experts of each token by, [T, E]."""
        score_TE = self.gate(context.layer, distance).scores(_hidden(context))
        return np.asarray(score_TE.double().cpu().numpy())

    def observe(self, load_LE: FloatArray) -> None:
        """Nothing: a gate looks at the pass at hand alone."""


def _hidden(context: Context) -> Tensor:
    if context.hidden is None:
        raise ProblemError("context.hidden", "is needed by gates")
    hidden: Tensor = context.hidden
    return hidden


class Foresight:
    """Predictions made while a model runs: at every MoE layer, for the layer `distance` ahead.

    Use as a context manager; after (or during) a forward pass `load_E` gives what was foreseen.

    Parameters
    ----------
    model : GPTModel
        Attached or not.
    predictor : GatePredictor
        Of the same model.
    distance : int
        How many MoE layers ahead.
    begun : callable, optional
        Called with the layer that is foreseen and its `Pending`, inside the forward pass: hand it to a
        planning thread, don't wait for it there.
    """

    def __init__(
        self,
        model: Any,
        predictor: GatePredictor,
        distance: int = 1,
        begun: Callable[[int, Pending], None] | None = None,
    ) -> None:
        self._model = model
        self._predictor = predictor
        self._distance = whole("distance", distance, low=1)
        self._begun = begun
        self._tap: HiddenTap | None = None
        self._pending: dict[int, Pending] = {}
        #: Tokens of the next pass that are no padding, [T]; None: all.
        self.real: Tensor | None = None
        #: Which of the tokens that a layer gets are this rank's to count; see `live.adopt.Adopted.counted`.
        self.counted: Callable[[int, Tensor | None, torch.device], Tensor | None] = lambda seen, real, _: real

    def __enter__(self) -> Foresight:
        self._tap = tap_hidden(self._model, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tap is not None:
            self._tap.close()

    def _look(self, layer: int, hidden: Tensor) -> None:
        ahead = layer + self._distance
        if ahead < len(self._predictor.gates):
            real = self.counted(hidden[..., 0].numel(), self.real, hidden.device)
            pending = self._predictor.start(hidden, layer, self._distance, real)
            self._pending[ahead] = pending
            if self._begun is not None:
                self._begun(ahead, pending)

    def load_E(self, layer: int) -> FloatArray | None:
        """What was last foreseen for a layer; None for the first layers, which nothing foresees."""
        pending = self._pending.get(layer)
        return None if pending is None else pending.load_E()
