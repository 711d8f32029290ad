"""How the engines measure balance: one table of loads, each engine's own number.

From one number alone none of them converts into another; from the table all do. Means of ratios over passes
(SGLang, TensorRT-LLM) say more imbalance than ratios of sums.

References
----------
vLLM ``vllm/distributed/eplb/eplb_state.py`` (``balancedness`` of the log line), SGLang
``python/sglang/srt/eplb/expert_distribution.py`` (``compute_utilization_rate``), TensorRT-LLM
``examples/wide_ep/ep_load_balancer/report_load_statistics.py``, vllm-ascend (``Expert hotness imbalance``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, floats, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.evaluate import gpu_tokens, over_perfect
from moeless_opt.problems.plan.plan import Plan

__all__ = ["EngineMeasures", "engine_measures"]

_TINY = 1e-5  # what SGLang adds to both of its terms


@dataclass(frozen=True, slots=True)
class EngineMeasures:
    """Balance as each engine tells it; m and M are the mean and the largest load of a layer's GPUs.

    Parameters
    ----------
    vllm_balancedness : float
        Sum of m over the layers, over the sum of M, of each pass; mean over the passes. 1 is perfect.
    sglang_balancedness : float
        (m + 1e-5) / (M + 1e-5), mean over the layers, where a dense one counts as 1, and over the passes.
    tensorrt_llm_imbalance : float
        (M - m) / m of each layer, mean over the passes, then over the layers. 0 is perfect.
    ascend_mean, ascend_worst : float
        M / m of each layer's loads over all passes: its mean and its largest. Our own imbalance where all
        GPUs are equally fast.
    """

    vllm_balancedness: float
    sglang_balancedness: float
    tensorrt_llm_imbalance: float
    ascend_mean: float
    ascend_worst: float

    def to_dict(self) -> dict[str, Any]:
        """The measures as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return (
            f"vLLM balancedness {self.vllm_balancedness:.4f}, SGLang balancedness "
            f"{self.sglang_balancedness:.4f}, "
            f"TensorRT-LLM imbalance ratio {self.tensorrt_llm_imbalance:.4f}, "
            f"Ascend {self.ascend_mean:.4f} mean, {self.ascend_worst:.4f} worst"
        )


def engine_measures(
    tokens: ArrayLike | Plan, *, dense: int = 0, usable: ArrayLike | None = None
) -> EngineMeasures:
    """What vLLM, SGLang, TensorRT-LLM and vllm-ascend would report of loads of GPUs.

    Parameters
    ----------
    tokens : array or Plan, shape [layers, GPUs] or [passes, layers, GPUs]
        Tokens that each GPU served, without padded ones. A plan gives those of its problem's expected loads,
        with that problem's dense layers and without its dead GPUs.
    dense : int
        Dense layers of the model, which SGLang counts as balanced.
    usable : array of bool, shape [GPUs], optional
        GPUs that are alive; the others are left out. All by default.

    Raises
    ------
    ProblemError
        If an argument is malformed, or no GPU is alive.
    """
    if isinstance(tokens, Plan):
        problem = tokens.made_for
        if isinstance(problem, str):
            raise ProblemError("tokens", "is a plan without its problem, so that its loads are unknown")
        served_LG = gpu_tokens(problem.loads.load_LE, tokens.slots_LGC, tokens.share_LGC)
        return engine_measures(served_LG, dense=len(problem.loads.skipped), usable=problem.usable_LG.any(0))
    tokens_PLG = floats("tokens", tokens)
    tokens_PLG = tokens_PLG[None] if tokens_PLG.ndim == 2 else tokens_PLG
    if tokens_PLG.ndim != 3 or 0 in tokens_PLG.shape:
        raise ProblemError(
            "tokens", f"has shape {tokens_PLG.shape}, must be [layers, GPUs] or with passes before"
        )
    dense = whole("dense", dense)
    if usable is not None:
        alive_G = np.asarray(usable)
        if alive_G.dtype != np.bool_ or alive_G.shape != tokens_PLG.shape[2:] or not alive_G.any():
            raise ProblemError("usable", f"must be {tokens_PLG.shape[2]} booleans, one of them true")
        tokens_PLG = tokens_PLG[:, :, alive_G]
    passes_PLG = tokens_PLG[tokens_PLG.any((1, 2))]
    if not len(passes_PLG):
        passes_PLG = tokens_PLG[:1]
    mean_PL, top_PL = passes_PLG.mean(2), passes_PLG.max(2)
    ratio_PL = (mean_PL + _TINY) / (top_PL + _TINY)
    layers = mean_PL.shape[1]
    total_LG = passes_PLG.sum(0)
    over_L = over_perfect(total_LG.max(1), total_LG.mean(1))
    return EngineMeasures(
        vllm_balancedness=float(_ratio(mean_PL.sum(1), top_PL.sum(1)).mean()),
        sglang_balancedness=float((ratio_PL.sum(1) + dense).mean() / (layers + dense)),
        tensorrt_llm_imbalance=float((over_perfect(top_PL.ravel(), mean_PL.ravel()) - 1).mean()),
        ascend_mean=float(over_L.mean()),
        ascend_worst=float(over_L.max()),
    )


def _ratio(part_P: FloatArray, whole_P: FloatArray) -> FloatArray:
    return np.asarray(np.divide(part_P, whole_P, out=np.ones_like(part_P), where=whole_P > 0))
