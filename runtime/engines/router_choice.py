"""What a router of megatron-core chooses, as indices, without the dense maps between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RouterChoice", "hooked"]


class RouterChoice:
    """A router's choice as indices.

    The rules (softmax before or after the choice, sigmoid with a bias, groups) are megatron-core's; the plain
    ones are repeated here without its maps. Whether that gives the same, bit for bit, is tried once on the
    router itself: one for which it does not is asked itself.

    Parameters
    ----------
    router : TopKRouter
        In evaluation mode.
    """

    def __init__(self, router: Any) -> None:
        self.router, config = router, router.config
        self.topk = int(config.moe_router_topk)
        self.softmax = config.moe_router_score_function == "softmax"
        self.first = bool(config.moe_router_pre_softmax)
        self.factor = config.moe_router_topk_scaling_factor
        self.plain = not config.moe_router_group_topk and self._same()

    @torch.no_grad()
    def _same(self) -> bool:
        """Whether both ways choose alike for some numbers without pattern."""
        router, experts = self.router, int(self.router.config.num_moe_experts)
        made = torch.Generator().manual_seed(1)
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(
            router.config.moe_router_dtype, router.weight.dtype
        )
        logits = (torch.randn((64, experts), generator=made) * 3).to(router.weight.device, dtype)
        # Who replays or records routes has no business with these.
        replay, router.router_replay = router.router_replay, None
        try:
            probs, chosen = router.routing(logits[:, None])
        finally:
            router.router_replay = replay
        expert_Tk, prob_Tk = self._choose(logits)
        mine = torch.zeros_like(probs).scatter(1, expert_Tk, prob_Tk)
        return bool(torch.equal(mine, probs)) and bool(chosen.gather(1, expert_Tk).all())

    def asked(self) -> bool:
        """Whether somebody watches, replays or trains the router: then it has to be asked itself."""
        router = self.router
        return not self.plain or hooked(router) or router.training or router.router_replay is not None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each row, ascending, and their weights: [T, k] each."""
        return self._choose(self.router.gating(x).view(-1, self.router.config.num_moe_experts))

    def counts_E(self, x: Tensor, weight_T: Tensor | None = None) -> Tensor:
        """Tokens for each expert, float32 [E]; of each token so much as `weight_T` says."""
        experts = int(self.router.config.num_moe_experts)
        logits = self.router.gating(x).view(-1, experts)
        expert_Tk = self._scores(logits)[1].topk(self.topk, dim=1).indices
        weight_T = logits.new_ones(1, dtype=torch.float32) if weight_T is None else weight_T.float()
        weight_Tk = weight_T[:, None].expand_as(expert_Tk)
        out = torch.zeros(experts, dtype=torch.float32, device=logits.device)
        return out.scatter_add_(0, expert_Tk.flatten(), weight_Tk.flatten())

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the experts, and those by which they are ranked."""
        if self.softmax:
            if self.first:
                logits = torch.softmax(logits, dim=-1, dtype=torch.float32).type_as(logits)
            return logits, logits
        scores = torch.sigmoid(logits.float()).type_as(logits)
        bias = self.router.expert_bias
        return scores, scores if bias is None else scores + bias

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, ranks = self._scores(logits)
        value, expert = ranks.topk(self.topk, dim=1)
        prob = value if ranks is scores else scores.gather(1, expert).type_as(logits)
        if self.softmax:
            if not self.first:
                prob = torch.softmax(prob, dim=-1, dtype=torch.float32).type_as(logits)
        elif self.topk > 1:
            prob = prob / (prob.sum(dim=-1, keepdim=True) + 1e-20)
        if self.factor:
            prob = prob * self.factor
        if self.topk == 1:
            return expert, prob
        expert, at = expert.sort(dim=1)
        return expert, prob.gather(1, at)


def hooked(*modules: Any) -> bool:
    """Whether somebody looks at what goes into or out of a module."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
