"""Models by name: the dimensions that decide how many experts there are and what one of them weighs."""

from __future__ import annotations

from dataclasses import dataclass

from moeless_opt.problems.arrays import Record, number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = ["MODEL_PRESETS", "ModelSpec", "model_preset"]


_MOST = 10**6  # keeps the bytes of an expert within 64 bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelSpec(Record):
    """The dimensions of a mixture-of-experts model.

    Parameters
    ----------
    name : str
        For people.
    layers : int
        MoE layers (dense layers are not counted).
    experts, top_k : int
        Routed experts per layer, and how many of them a token uses.
    hidden, ffn : int
        Width of the residual stream, and of one expert's inner layer.
    bits : float
        Bits per weight as served, block scales included (16 for bf16, 4.25 for MXFP4).
    shared_experts : int
        Experts that every token uses; they live on every GPU and are not planned.
    matrices : int
        Weight matrices of one expert: 3 for a gated unit, 2 for a plain one.
    bias : bool
        Whether the expert's linear layers have biases (16 bits each).
    first_moe_layer : int
        Number of dense layers before the first MoE layer.
    groups : int
        Expert groups of a group-limited router; 1 if it has none.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    bits: float = 16.0
    shared_experts: int = 0
    matrices: int = 3
    bias: bool = False
    first_moe_layer: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        for key in ("layers", "experts", "top_k", "hidden", "ffn", "matrices", "groups"):
            put(self, key, whole(f"model.{key}", getattr(self, key), low=1, high=_MOST))
        for key in ("shared_experts", "first_moe_layer"):
            put(self, key, whole(f"model.{key}", getattr(self, key), high=_MOST))
        for key, kind in (("name", str), ("bias", bool)):
            if not isinstance(getattr(self, key), kind):
                raise ProblemError(f"model.{key}", f"is {getattr(self, key)!r}, must be a {kind.__name__}")
        if self.top_k > self.experts:
            raise ProblemError("model.top_k", f"is {self.top_k}, must be at most experts = {self.experts}")
        put(self, "bits", number("model.bits", self.bits, open_low=True))
        if self.bits > 64:
            raise ProblemError("model.bits", f"is {self.bits!r}, must be at most 64")

    @property
    def expert_bytes(self) -> int:
        """Bytes of one replica of one expert in one layer."""
        bits = self.matrices * self.hidden * self.ffn * self.bits
        if self.bias:
            bits += ((self.matrices - 1) * self.ffn + self.hidden) * 16
        return int(-(-bits // 8))


# Dimensions from each model's published config.json; bits as the weights are published.
_SPECS = (
    ModelSpec(name="Mixtral-8x7B", layers=32, experts=8, top_k=2, hidden=4096, ffn=14336),
    ModelSpec(name="Mixtral-8x22B", layers=56, experts=8, top_k=2, hidden=6144, ffn=16384),
    ModelSpec(name="Phi-3.5-MoE", layers=32, experts=16, top_k=2, hidden=4096, ffn=6400),
    ModelSpec(name="Llama-4-Scout", layers=48, experts=16, top_k=1, hidden=5120, ffn=8192, shared_experts=1),
    ModelSpec(
        name="Llama-4-Maverick", layers=24, experts=128, top_k=1, hidden=5120, ffn=8192, shared_experts=1
    ),
    # fp8 with one fp32 scale per 128x128 block
    ModelSpec(
        name="DeepSeek-V3",
        layers=58,
        experts=256,
        top_k=8,
        hidden=7168,
        ffn=2048,
        bits=8 + 32 / 128**2,
        shared_experts=1,
        first_moe_layer=3,
        groups=8,
    ),
    ModelSpec(
        name="Kimi-K2",
        layers=60,
        experts=384,
        top_k=8,
        hidden=7168,
        ffn=2048,
        bits=8 + 32 / 128**2,
        shared_experts=1,
        first_moe_layer=1,
    ),
    ModelSpec(name="Qwen3-30B-A3B", layers=48, experts=128, top_k=8, hidden=2048, ffn=768),
    ModelSpec(name="Qwen3-235B-A22B", layers=94, experts=128, top_k=8, hidden=4096, ffn=1536),
    ModelSpec(
        name="Qwen1.5-MoE-A2.7B", layers=24, experts=60, top_k=4, hidden=2048, ffn=1408, shared_experts=4
    ),
    ModelSpec(name="OLMoE-1B-7B", layers=16, experts=64, top_k=8, hidden=2048, ffn=1024),
    ModelSpec(
        name="gpt-oss-20b", layers=24, experts=32, top_k=4, hidden=2880, ffn=2880, bits=4.25, bias=True
    ),
    ModelSpec(
        name="gpt-oss-120b", layers=36, experts=128, top_k=4, hidden=2880, ffn=2880, bits=4.25, bias=True
    ),
)

MODEL_PRESETS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def model_preset(name: str) -> ModelSpec:
    """A model by its name.

    Raises
    ------
    ProblemError
        If no preset has that name.
    """
    found = {key.lower(): spec for key, spec in MODEL_PRESETS.items()}.get(name.lower())
    if found is None:
        raise ProblemError("model", f"{name!r} is unknown; there are {', '.join(MODEL_PRESETS)}")
    return found
