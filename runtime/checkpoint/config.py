"""What ``config.json`` says, checked before anything is built from it: the kind and range of every field."""

from __future__ import annotations

from typing import Any

from moeless_opt.problems.arrays import number, whole
from moeless_opt.problems.errors import FormatError, ProblemError

__all__ = ["checked_config", "wrong"]

#: Whole numbers: least and most. What is far beyond any model is a damaged file, not a model.
_WHOLE: dict[str, tuple[int, int]] = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "vocab_size",
    ),
    (1, 2**24),
) | {
    "num_hidden_layers": (1, 2**12),
    "max_position_embeddings": (1, 2**40),
    "original_max_position_embeddings": (2, 2**40),
    # 0 and absent mean the same in these.
    "n_group": (0, 2**24),
    "topk_group": (0, 2**24),
    "decoder_sparse_step": (0, 2**12),
    "interleave_moe_layer_step": (0, 2**12),
    "moe_layer_freq": (0, 2**12),
    "no_rope_layer_interval": (0, 2**12),
    "first_k_dense_replace": (0, 2**12),
    "num_nextn_predict_layers": (0, 2**12),
    "num_mtp_layers": (0, 2**12),
    "sliding_window": (0, 2**40),
    "attention_chunk_size": (0, 2**40),
    "floor_scale": (0, 2**40),
}
#: Numbers, and whether they may be 0.
_NUMBERS = {"rms_norm_eps": True, "routed_scaling_factor": False, "router_jitter_noise": True}
#: True or false (some files write 0 or a number).
_SWITCHES = (
    "attention_bias",
    "attn_temperature_tuning",
    "lm_head_bias",
    "norm_topk_prob",
    "rope_interleave",
    "tie_word_embeddings",
    "use_qk_norm",
    "use_sliding_window",
)
#: Lists of whole numbers.
_LISTS = ("mlp_only_layers", "moe_layers", "no_rope_layers")
_TEXTS = ("hidden_act", "scoring_func", "topk_method", "torch_dtype", "dtype")
_OBJECTS = ("quantization_config", "rope_parameters", "rope_scaling")


def wrong(name: str, what: str) -> FormatError:
    """The error of a field."""
    return FormatError(f"config.json: {name!r}", what)


def _kind(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kind):
        raise wrong(name, f"is {value!r}, must be {wanted}")


def checked_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is null, every field that the loader may use of the right kind.

    Raises
    ------
    FormatError
        Naming the first field that is not.
    """
    found = {name: value for name, value in hf.items() if value is not None}
    try:
        for name in _WHOLE.keys() & found.keys():
            low, high = _WHOLE[name]
            found[name] = whole(name, found[name], low=low, high=high)
        for name in _NUMBERS.keys() & found.keys():
            found[name] = number(name, found[name], open_low=not _NUMBERS[name])
        for name in found.keys() & set(_LISTS):
            _kind(name, found[name], list, "a list of whole numbers")
            found[name] = [whole(f"{name}[{i}]", entry) for i, entry in enumerate(found[name])]
    except ProblemError as error:
        raise wrong(error.where, error.what) from None
    for names, kind, wanted in (
        (_SWITCHES, int, "true or false"),
        (_TEXTS, str, "a text"),
        (_OBJECTS, dict, "an object"),
    ):
        for name in found.keys() & set(names):
            _kind(name, found[name], kind, wanted)
    return found
