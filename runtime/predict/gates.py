"""Gate replay: a model's own gates, fed early, and trained copies where that is not enough.

The residual stream changes little from one layer to the next, so the norm and gate of MoE layer l + d,
applied to the hidden state in front of layer l, choose nearly the experts that layer l + d will choose [1]_
[2]_. How nearly falls with d and differs from layer to layer; `tuning` trains copies for just those layers
that fall below a threshold, `foresight` predicts with them.

A trained copy (`TunedGate`) starts as what it replaces: norm and gate, and a small two-layer network added to
the logits whose second matrix is zero. It is trained to say which experts the token will choose (a sigmoid
for each, binary cross-entropy), so on traffic like that of the training the sum of its sigmoids over the
tokens is an unbiased count.

References
----------
.. [1] Eliseev, Mazur: Fast Inference of Mixture-of-Experts Language Models with Offloading, 2023,
   arXiv 2312.17238, section 3.2.
.. [2] Song et al.: ProMoE, 2024, arXiv 2410.22134.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.engines import RouterChoice, moe_blocks, moe_parts, route

__all__ = ["LARGEST", "Pair", "PlainGate", "RouterGate", "TunedGate", "plain_gates"]

#: Most parameters that a trained gate may have.
LARGEST = 80_000
#: Most weights of a gate of which a second copy, with the norm's weights in it, is kept.
FOLDED = 2**20
#: Layer at which is predicted, and how many layers ahead.
Pair = tuple[int, int]


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
        # Tried now: on a GPU trying waits, and a prediction must not.
        self._choice: RouterChoice | None = RouterChoice(self.router)

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

    def counts_E(self, hidden: Tensor, real_T: Tensor | None = None) -> Tensor:
        """Tokens for each expert, float32 [E]; of those that are real."""
        if self._choice is not None and self._choice.plain:
            return self._choice.counts_E(self.norm.forward(hidden), real_T)
        return counted_E(self.chosen(hidden), real_T)


class RouterGate(PlainGate):
    """The same of a `transformers` model.

    Parameters
    ----------
    norm, router : modules
        From `engines.transformers.moe_parts`.
    """

    def __init__(self, norm: Any, router: Any) -> None:
        self.norm = norm
        self.module, self._choice = router, None
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


def counted_E(chosen_TE: Tensor, real_T: Tensor | None) -> Tensor:
    """Sums over the tokens that are real, float32 [E]."""
    if real_T is not None:
        chosen_TE = chosen_TE * real_T[:, None]
    return chosen_TE.sum(0, dtype=torch.float32)


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

    def counts_E(self, hidden: Tensor, real_T: Tensor | None = None) -> Tensor:
        """Sum of the chances of each expert over the real tokens, float32 [E]."""
        return counted_E(self.chosen(hidden), real_T)
