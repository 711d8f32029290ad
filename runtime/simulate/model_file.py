"""A model of one's own: its dimensions from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io import read_json
from moeless_opt.problems.spec import ModelSpec
from moeless_opt.runtime.simulate.hardware import Beside

__all__ = ["read_model"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "experts_per_token"
)  # fmt: skip
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
#: Bits of a weight, scales included, by the method of ``quantization_config``.
_BITS = {"fp8": 8 + 32 / 128**2, "mxfp4": 4.25, "nvfp4": 4.5, "awq": 4.25, "gptq": 4.25}
#: Methods of so many bits as the file says, and scales.
_SAID = ("awq", "gptq")
#: Fields of architectures that are not read: layers of one kind each (Nemotron-H), other names (DBRX).
_UNREAD = ("hybrid_override_pattern", "ffn_config")
_PLAIN = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}


class _Config:
    """The text model's part of the file; what is asked of it is checked."""

    def __init__(self, path: str) -> None:
        data = read_json(path)
        if not isinstance(data, Mapping):
            raise FormatError(path, "is no object, must be a config.json")
        text = data.get("text_config")
        both = {**data, **text} if isinstance(text, Mapping) else dict(data)
        self.path, self.data = path, {name: value for name, value in both.items() if value is not None}
        unread = next((name for name in _UNREAD if name in self.data), None)
        if unread is not None:
            raise FormatError(
                path, f"has {unread!r}: of an architecture that is not read; make a ModelSpec of it"
            )

    def number(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """A whole number by the first of the names that is there."""
        name = next((name for name in names if name in self.data), None)
        if name is None:
            if default is None:
                raise FormatError(
                    self.path, f"{names[0]!r} is missing: no config.json of a mixture of experts"
                )
            return default
        try:
            return whole(name, self.data[name], low=low)
        except ProblemError as error:
            raise FormatError(self.path, f"{name!r} {error.what}") from None

    def moe_layers(self) -> tuple[int, int]:
        """How many layers have experts, and how many dense ones come first."""
        layers = self.number("num_hidden_layers")
        sparse = self.data.get("moe_layers")
        if isinstance(sparse, list) and sparse:
            found = sparse
        elif any(isinstance(self.data.get(name), list) for name in ("mlp_layer_types", "moe_layer_freq")):
            kinds = self.data.get("mlp_layer_types") or self.data["moe_layer_freq"]
            found = [layer for layer, kind in enumerate(kinds) if kind in (1, True, "sparse")]
        else:
            found = [layer for layer in self._since(layers) if self._has_experts(layer)]
        if not found:
            raise FormatError(self.path, "has no layer with experts")
        bad = [layer for layer in found if not isinstance(layer, int) or not 0 <= layer < layers]
        if bad:
            raise FormatError(self.path, f"has experts in layer {bad[0]!r} of {layers}")
        return len(found), min(found)

    def _since(self, layers: int) -> range:
        """Layers after the dense ones that come first."""
        first = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
        return range(self.number(*first, default=0, low=0), layers)

    def _has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, by the steps that architectures know."""
        dense = self.data.get("mlp_only_layers")
        if isinstance(dense, list) and layer in dense:
            return False
        if "expert_layer_period" in self.data:  # Jamba
            offset = self.number("expert_layer_offset", default=0, low=0)
            return layer % self.number("expert_layer_period") == offset
        if layer % self.number("moe_layer_freq", "moe_layer_interval", default=1):  # DeepSeek, Ernie
            return False
        return (layer + 1) % self.number("interleave_moe_layer_step", "decoder_sparse_step", default=1) == 0

    def attending(self) -> int:
        """How many layers keep keys and values of every token."""
        layers = self.number("num_hidden_layers")
        kinds = self.data.get("layer_types")
        if isinstance(kinds, list):
            return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
        linear = self.data.get("attn_type_list")  # MiniMax: 1 where it is not linear
        if isinstance(linear, list):
            return sum(kind == 1 for kind in linear)
        period = self.number("attn_layer_period", "full_attention_interval", default=1)
        return -(-layers // period)

    def bits(self) -> float:
        """Bits of an expert's weight as served."""
        method = self.data.get("quantization_config")
        if isinstance(method, Mapping):
            name = str(method.get("quant_method", "")).lower()
            if name not in _BITS:
                raise FormatError(
                    self.path, f"quantization {name!r} is not known; there are {', '.join(_BITS)}"
                )
            if name in _SAID and ("bits" in method or "w_bit" in method):
                key = "bits" if "bits" in method else "w_bit"
                try:
                    return whole(key, method[key], low=1) + 0.25
                except ProblemError as error:
                    raise FormatError(self.path, f"quantization_config: {key!r} {error.what}") from None
            return _BITS[name]
        name = str(self.data.get("torch_dtype", self.data.get("dtype", "bfloat16"))).removeprefix("torch.")
        if name not in _PLAIN:
            raise FormatError(self.path, f"'torch_dtype' is {name!r}, must be one of {', '.join(_PLAIN)}")
        return _PLAIN[name]

    def kv_bytes(self) -> float:
        """Bytes of a token's keys and values in one layer, at 16 bits."""
        if "kv_lora_rank" in self.data:
            return 2.0 * (self.number("kv_lora_rank") + self.number("qk_rope_head_dim", default=64, low=0))
        heads = self.number("num_attention_heads", default=32)
        width = self.number("head_dim", default=max(self.number("hidden_size") // heads, 1))
        return 4.0 * self.number("num_key_value_heads", default=heads) * width


def read_model(path: str | PathLike[str]) -> tuple[ModelSpec, Beside]:
    """Read the dimensions of a mixture-of-experts model, and what it holds beside its experts.

    Parameters
    ----------
    path : path
        A ``config.json``, or the folder that it lies in.

    Raises
    ------
    FormatError
        Naming the file and the field that is missing or wrong.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = _Config(str(file))
    layers, first = config.moe_layers()
    hidden = config.number("hidden_size")
    ffn = config.number("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    shared = config.number(*_SHARED, default=0, low=0)
    wide_shared = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
    if any(name in config.data for name in wide_shared):  # one, as wide as several: Qwen, Granite
        shared = -(-config.number(*wide_shared, low=0) // ffn)
    elif str(config.data.get("model_type", "")).startswith("llama4"):
        shared = 1
    try:
        model = ModelSpec(
            name=str(config.data.get("_name_or_path") or file.resolve().parent.name or "model"),
            layers=layers,
            experts=config.number(*_EXPERTS),
            top_k=config.number(*_TOP_K),
            hidden=hidden,
            ffn=ffn,
            bits=config.bits(),
            shared_experts=shared,
            bias=str(config.data.get("model_type", "")) == "gpt_oss",
            first_moe_layer=first,
            groups=config.number("n_group", default=1, low=0) or 1,
        )
    except FormatError:
        raise
    except ProblemError as error:
        raise FormatError(str(file), f"{error.where}: {error.what}") from None
    every = config.number("num_hidden_layers")
    wide = config.number("intermediate_size_mlp", "intermediate_size", default=ffn)
    once = 2.0 * config.number("vocab_size", default=0, low=0) * hidden
    once += (every - layers) * (2.5 * hidden**2 + 3.0 * hidden * wide)
    return model, Beside(config.kv_bytes() * config.attending() / layers, once)
