"""Training of gates for the layers whose own gates, fed early, are not accurate enough; and their files.

`profile` measures on recorded states how accurate plain gates are; `fine_tune` trains copies for just those
layers that fall below a threshold (layer-aware, as MoEless [1]_).

References
----------
.. [1] MoEless, 2026, arXiv 2603.06350.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.predict.gates import Pair, PlainGate, TunedGate

__all__ = ["Tuning", "accuracy", "fine_tune", "load_tuned", "profile", "save_tuned", "train_gate"]


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
