"""Gate replay: a model's own gates, fed early, and fine-tuned where that is not enough.

The residual stream changes little from one layer to the next, so the norm and gate of MoE layer l + d,
applied to the hidden state in front of layer l, choose nearly the experts that layer l + d will choose [1]_
[2]_. How nearly falls with d and differs from layer to layer. `profile` measures it on recorded states;
`fine_tune` trains copies for just those layers that fall below a threshold (layer-aware, as MoEless [3]_).

A trained copy (`TunedGate`) starts as what it replaces: norm and gate, and a small two-layer network added to
the logits whose second matrix is zero. It is trained to say which experts the token will choose (a sigmoid
for each, binary cross-entropy), so on traffic like that of the training the sum of its sigmoids over the
tokens is an unbiased count.

On a GPU a prediction runs on a stream of its own, and its E numbers come home in pinned memory: nothing waits
for it but who reads it (`Pending.load_E`).

References
----------
.. [1] Eliseev, Mazur: Fast Inference of Mixture-of-Experts Language Models with Offloading, 2023,
   arXiv 2312.17238, section 3.2.
.. [2] Song et al.: ProMoE, 2024, arXiv 2410.22134.
.. [3] MoEless, 2026, arXiv 2603.06350.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moeless_opt.problems.arrays import FloatArray, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.engines.observe import HiddenTap, moe_blocks, tap_hidden
from moeless_opt.runtime.engines.transformers import moe_parts, route
from moeless_opt.runtime.predict.history import Known

__all__ = [
    "LARGEST",
    "Foresight",
    "GatePredictor",
    "Pending",
    "PlainGate",
    "RouterGate",
    "TunedGate",
    "fine_tune",
    "load_tuned",
    "plain_gates",
    "profile",
    "save_tuned",
    "train_gate",
]

#: Most parameters that a trained gate may have.
LARGEST = 80_000
#: Most weights of a gate of which a second copy, with the norm's weights in it, is kept.
FOLDED = 2**20
Pair = tuple[int, int]


# -------------------------------------------------------------------------------------------- gates


class PlainGate:
    """The norm and router of one MoE layer of a running model; weights are shared with it, not copied.

    Parameters
    ----------
    block : TransformerLayer
        With an unfused norm in front of a megatron-core `MoELayer`.
    """

    def __init__(self, block: Any) -> None:
        self.norm = block.pre_mlp_layernorm
        self.router = block.mlp.router
        self.top_k = int(self.router.topk)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the hidden states, [T, E]."""
        # The norm's own forward: calling the module would fire the taps.
        logits: Tensor = self.router.gating(self.norm.forward(hidden))
        return logits.flatten(0, -2)

    def scores(self, hidden: Tensor) -> Tensor:
        """What the router picks the largest of (group limits aside), [T, E]."""
        logits = self.logits(hidden)
        bias = getattr(self.router, "expert_bias", None)
        return logits if bias is None else torch.sigmoid(logits) + bias

    def chosen(self, hidden: Tensor) -> Tensor:
        """Which experts the router would choose, by its own rules, as 0 and 1, [T, E]."""
        _, routing_map = self.router.routing(self.logits(hidden)[:, None])
        chosen: Tensor = routing_map
        return chosen


class RouterGate(PlainGate):
    """The same of a `transformers` model.

    Parameters
    ----------
    norm, router : modules
        From `transformers_backend.moe_parts`.
    """

    def __init__(self, norm: Any, router: Any) -> None:
        self.norm = norm
        self.module = router
        self.router = SimpleNamespace(weight=router.weight, bias=getattr(router, "bias", None))
        self.top_k = int(router.top_k)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the hidden states, [T, E]."""
        return route(self.module, self.norm.forward(hidden))[0]

    def scores(self, hidden: Tensor) -> Tensor:
        """What the router picks the largest of (group limits aside), [T, E]."""
        bias = getattr(self.module, "e_score_correction_bias", None)
        logits = self.logits(hidden)
        return logits if bias is None else torch.sigmoid(logits) + bias

    def chosen(self, hidden: Tensor) -> Tensor:
        """Which experts the router would choose, by its own rules, as 0 and 1, [T, E]."""
        return route(self.module, self.norm.forward(hidden))[1]


def plain_gates(model: Any) -> list[PlainGate]:
    """The gates of all MoE layers of a megatron-core or `transformers` model."""
    if hasattr(model, "set_experts_implementation"):
        return [RouterGate(norm, router) for norm, router, _ in moe_parts(model)]
    return [PlainGate(block) for block in moe_blocks(model)]


class TunedGate(nn.Module):
    """A trained gate.

    Parameters
    ----------
    norm : module
        Of the layer whose loads are predicted; copied.
    weight_EH : Tensor
        Its gate.
    bias_E : Tensor, optional
        Its bias.
    top_k : int
        Experts of a token.
    width : int, optional
        Of the added network; by default what the limit allows, at most 256. 0: none.
    copies : bool, optional
        Whether the gate is copied and trained too; by default where that fits the limit. Else it is used
        as it is, shared with the model, and only the correction is trained.
    largest : int
        Most trained parameters.

    Raises
    ------
    ProblemError
        If `width` or `copies` asks for more than the limit.
    """

    def __init__(
        self,
        norm: nn.Module,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        *,
        width: int | None = None,
        copies: bool | None = None,
        largest: int = LARGEST,
    ) -> None:
        super().__init__()
        experts, hidden = weight_EH.shape
        self.top_k = top_k
        self.norm = copy.deepcopy(norm).float()
        self.norm._forward_pre_hooks.clear()
        room = largest - experts - sum(p.numel() for p in self.norm.parameters())
        self.copies = experts * hidden <= room if copies is None else copies
        room -= experts * hidden * self.copies
        if room < 0:
            raise ProblemError("copies", f"needs {largest - room} parameters, the limit is {largest}")
        if width is None:
            width = min(256, room // (experts + hidden))
        self.width = whole("width", width)
        if self.width * (experts + hidden) > room:
            raise ProblemError("width", f"is {width}, the limit leaves room for {room // (experts + hidden)}")
        weight_EH = weight_EH.detach() if not self.copies else weight_EH.detach().float()
        if self.copies:
            self.weight_EH = nn.Parameter(weight_EH.clone())
        else:
            self.register_buffer("weight_EH", weight_EH, persistent=False)
        self._fold: tuple[Any, Tensor] | None = None
        start_E = torch.zeros(experts) if bias_E is None else bias_E.detach().float().clone()
        self.bias_E = nn.Parameter(start_E.to(weight_EH.device))
        if self.width:
            seeded = torch.Generator().manual_seed(0)
            into = torch.randn(self.width, hidden, generator=seeded) / math.sqrt(hidden)
            self.into_WH = nn.Parameter(into.to(weight_EH.device))
            self.out_EW = nn.Parameter(torch.zeros(experts, self.width, device=weight_EH.device))

    @classmethod
    def of(cls, gate: PlainGate, **options: Any) -> TunedGate:
        """Start from a model's gate."""
        return cls(gate.norm, gate.router.weight, gate.router.bias, gate.top_k, **options)

    @property
    def parameter_count(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, [T, E]: of each expert being chosen."""
        small = self.weight_EH.numel() <= FOLDED
        if small and isinstance(self.norm, nn.RMSNorm) and not torch.is_grad_enabled():
            return self._folded(hidden.float().flatten(0, -2))
        state = self.norm.forward(hidden.float()).flatten(0, -2)
        logits = F.linear(state, self.weight_EH.float(), self.bias_E)
        if self.width:
            logits = logits + F.silu(state @ self.into_WH.T) @ self.out_EW.T
        return logits

    def _folded(self, hidden_TH: Tensor) -> Tensor:
        """The same without normalised states: norm weights in the matrices, the root mean square at the end.

        One pass over the states in place of several; on a CPU, where they miss the caches, three to eight
        times as fast.
        """
        norm = self.norm
        assert isinstance(norm, nn.RMSNorm)
        parts: list[Tensor] = [self.weight_EH, self.into_WH] if self.width else [self.weight_EH]
        key = tuple((p.data_ptr(), p._version) for p in (*parts, norm.weight))
        if self._fold is None or self._fold[0] != key:
            self._fold = (key, torch.cat([p.float() for p in parts]) * norm.weight)
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        mean_T = torch.linalg.vector_norm(hidden_TH, dim=1).square() / hidden_TH.size(1)
        both = (self._fold[1] @ hidden_TH.T) * torch.rsqrt(mean_T + eps)
        experts = len(self.weight_EH)
        logits = (
            torch.addmm(self.bias_E[:, None], self.out_EW, F.silu(both[experts:]))
            if self.width
            else (self.bias_E[:, None])
        )
        return (both[:experts] + logits).T

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self(hidden)
        return logits

    def chosen(self, hidden: Tensor) -> Tensor:
        """Chance of each expert, [T, E]."""
        return torch.sigmoid(self(hidden))


# --------------------------------------------------------------------------------------- predicting


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
        chosen_TE = gate.chosen(hidden)
        if real is not None:
            chosen_TE = chosen_TE * real[:, None]
        load_E = chosen_TE.sum(0, dtype=torch.float32)
        if self.group is not None:
            dist.all_reduce(load_E, group=self.group)  # on the stream that is current: with NCCL, ours
        return load_E

    def predict(self, known: Known, distance: int) -> FloatArray:
        """Predict and wait, scaled to the pass's token-expert pairs."""
        load_E = self.start(_hidden(known), known.layer, distance).load_E()
        total = float(load_E.sum())
        return load_E * (float(known.load_E.sum()) / total) if total > 0 else load_E

    @torch.no_grad()
    def scores(self, known: Known, distance: int) -> FloatArray:
        """What the gate ranks the experts of each token by, [T, E]."""
        score_TE = self.gate(known.layer, distance).scores(_hidden(known))
        return np.asarray(score_TE.double().cpu().numpy())

    def observe(self, load_LE: FloatArray) -> None:
        """Nothing: a gate looks at the pass at hand alone."""


def _hidden(known: Known) -> Tensor:
    if known.hidden is None:
        raise ProblemError("known.hidden", "is needed by gates")
    hidden: Tensor = known.hidden
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

    def __enter__(self) -> Foresight:
        self._tap = tap_hidden(self._model, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tap is not None:
            self._tap.close()

    def _look(self, layer: int, hidden: Tensor) -> None:
        ahead = layer + self._distance
        if ahead < len(self._predictor.gates):
            pending = self._predictor.start(hidden, layer, self._distance, self.real)
            self._pending[ahead] = pending
            if self._begun is not None:
                self._begun(ahead, pending)

    def load_E(self, layer: int) -> FloatArray | None:
        """What was last foreseen for a layer; None for the first layers, which nothing foresees."""
        pending = self._pending.get(layer)
        return None if pending is None else pending.load_E()


# ------------------------------------------------------------------------------------------- tuning


def train_gate(
    gate: TunedGate,
    hidden_TH: Tensor,
    experts_TK: Tensor,
    *,
    epochs: int = 4,
    batch: int = 1024,
    rate: float = 5e-3,
    seed: int = 0,
) -> TunedGate:
    """Train on (hidden state, experts chosen later) pairs.

    Parameters
    ----------
    gate : TunedGate
        Changed in place, and returned.
    hidden_TH : Tensor
        States in front of the layer at which is predicted; any floating type.
    experts_TK : int Tensor
        Experts of the same tokens in the layer that is predicted.
    epochs, batch, rate, seed
        Of AdamW; the rate falls linearly to zero.
    """
    if len(hidden_TH) != len(experts_TK) or not len(hidden_TH):
        raise ProblemError("hidden", f"has {len(hidden_TH)} tokens, the routes have {len(experts_TK)}")
    gate.requires_grad_(True)  # also one that was trained before: it goes on learning
    optimizer = torch.optim.AdamW(gate.parameters(), lr=rate, weight_decay=1e-3)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(hidden_TH) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    device = gate.weight_EH.device
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(hidden_TH), generator=order), batch):
                logits_TE = gate(hidden_TH[index].to(device))
                wanted_TE = torch.zeros_like(logits_TE).scatter_(1, experts_TK[index].long().to(device), 1.0)
                loss = F.binary_cross_entropy_with_logits(logits_TE, wanted_TE)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return gate.requires_grad_(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What `fine_tune` did: trained gates, and the accuracies (token hit rates) that it decided by.

    Parameters
    ----------
    tuned : dict of (layer, distance) to TunedGate
        Those that were trained and are better than the plain gate on the held-out tokens.
    plain, after : dict of (layer, distance) to float
        Hit rates on the held-out tokens before and after; `after` has those that were trained.
    """

    tuned: dict[Pair, TunedGate]
    plain: dict[Pair, float]
    after: dict[Pair, float]


@torch.no_grad()
def accuracy(gate: PlainGate | TunedGate, hidden_TH: Tensor, experts_TK: Tensor) -> float:
    """Share of the choices that are among each token's K best scores."""
    guess_TK = gate.scores(hidden_TH).topk(experts_TK.size(1), dim=-1).indices
    return float((experts_TK[:, :, None] == guess_TK[:, None, :]).any(2).double().mean())


def profile(
    gates: list[PlainGate], hidden_TLH: Tensor, experts_TLK: Tensor, distances: Iterable[int]
) -> dict[Pair, float]:
    """Accuracy of the plain gate at every layer and distance, on recorded tokens."""
    return {
        (layer, d): accuracy(gates[layer + d], hidden_TLH[:, layer].float(), experts_TLK[:, layer + d])
        for d in distances
        for layer in range(len(gates) - d)
    }


def fine_tune(
    gates: list[PlainGate],
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    distances: Iterable[int] = (1,),
    threshold: float = 0.8,
    options: Mapping[str, Any] | None = None,
    **training: Any,
) -> Tuning:
    """Profile every layer, and train those that are not accurate enough.

    Parameters
    ----------
    gates : list of PlainGate
        Of the model.
    train, held_out : pairs of Tensors
        Hidden states [T, L, H] (the last layer's may be absent) and experts [T, L, K]. Split by request.
    distances : ints
        Distances wanted.
    threshold : float
        A layer whose plain gate hits at least this share of the choices is left alone. Above 1: train all.
    options : mapping
        Of `TunedGate`.
    **training
        Of `train_gate`.
    """
    plain = profile(gates, *held_out, distances)
    tuned: dict[Pair, TunedGate] = {}
    after: dict[Pair, float] = {}
    for (layer, d), before in plain.items():
        if before >= threshold:
            continue
        gate = TunedGate.of(gates[layer + d], **(options or {}))
        train_gate(gate, train[0][:, layer], train[1][:, layer + d], **training)
        after[layer, d] = accuracy(gate, held_out[0][:, layer], held_out[1][:, layer + d])
        if after[layer, d] > before:
            tuned[layer, d] = gate
    return Tuning(tuned=tuned, plain=plain, after=after)


# --------------------------------------------------------------------------------------------- files


def save_tuned(tuned: Mapping[Pair, TunedGate], file: str | Path) -> None:
    """Write trained gates as safetensors: ``layer.distance.parameter``, and the widths as metadata."""
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{d}.{name}": p.detach().cpu().contiguous()
        for (layer, d), gate in tuned.items()
        for name, p in gate.named_parameters()
    }
    shape = {f"{layer}.{d}": [gate.width, int(gate.copies)] for (layer, d), gate in tuned.items()}
    save_file(tensors, str(file), metadata={"format": "moeless-predictors 1", "gates": json.dumps(shape)})


def load_tuned(file: str | Path, gates: list[PlainGate]) -> dict[Pair, TunedGate]:
    """Read trained gates for a model.

    Raises
    ------
    FormatError
        If the file is not of `save_tuned`, or of another model.
    """
    from safetensors import safe_open

    tuned: dict[Pair, TunedGate] = {}
    with safe_open(str(file), framework="pt") as content:
        meta = content.metadata() or {}
        if meta.get("format") != "moeless-predictors 1":
            raise FormatError(str(file), "is not a file of predictors (format 'moeless-predictors 1')")
        for key, (width, copies) in json.loads(meta["gates"]).items():
            layer, d = map(int, key.split("."))
            if layer + d >= len(gates):
                raise FormatError(str(file), f"predicts layer {layer + d}, the model has {len(gates)}")
            gate = TunedGate.of(gates[layer + d], width=width, copies=bool(copies), largest=2**62)
            for name, p in gate.named_parameters():
                stored = content.get_tensor(f"{key}.{name}")
                if stored.shape != p.shape:
                    raise FormatError(
                        f"tensor {key}.{name}", f"has shape {list(stored.shape)}, the model {list(p.shape)}"
                    )
                with torch.no_grad():
                    p.copy_(stored)
            tuned[layer, d] = gate.requires_grad_(False)
    return tuned
