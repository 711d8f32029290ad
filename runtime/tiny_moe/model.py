"""A small trained mixture of experts that ships with the package: 6 layers x 16 experts, top-2, on bytes.

It is a real megatron-core `GPTModel`, trained on eight domains of text (`corpus`) by `train`, so that
tests, examples and predictors have real routing, with real skew and real drift between domains, on any
machine. ``data/tiny_moe.json`` records how it was trained and what it reached;
``docs/tiny-moe.md`` explains it.

A token is a byte; token 256 starts a document. The weights are stored in bfloat16, so loading them in any
wider type gives exactly the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.checkpoint import (
    GPTModel,
    SafetensorsFolder,
    TransformerConfig,
    build_gpt,
    causal_positions,
    ensure_model_parallel,
    moe_layers,
    neutral_config_fields,
    parallel_state,
    quiet_config,
)

__all__ = [
    "EXPERTS",
    "LAYERS",
    "MAX_LENGTH",
    "PROMPTS",
    "START",
    "TOP_K",
    "VOCABULARY",
    "RouteRecorder",
    "card",
    "config",
    "data_file",
    "decode",
    "encode",
    "generate",
    "load",
    "new_model",
    "record_routes",
    "save",
    "score",
    "summary",
]

LAYERS, EXPERTS, TOP_K = 6, 16, 2
HIDDEN, HEADS, EXPERT_WIDTH = 128, 4, 160
#: Token that starts a document (after the 256 bytes).
START = 256
#: Size of the vocabulary: the bytes, the start token, and one that is never used (an even number).
VOCABULARY = 258
#: Longest sequence, in tokens; the model was trained on 256.
MAX_LENGTH = 512

#: Openings of every domain, for examples and tests.
PROMPTS: dict[str, tuple[str, ...]] = {
    "code": ("def __init__(self, name, value=None):\n        self.", "import os\nimport sys\n\nclass "),
    "english": ("And the king said unto him, ", "  3 And it came to pass in those days, that "),
    "german": ("Die Freiheit ist ", "Wenn man nicht weiß, was man will, "),
    "spanish": ("La vida es ", "El hombre que no "),
    "russian": ("Жизнь — это ", "Если человек не "),
    "chinese": ("春眠不觉晓", "人生"),
    "proofs": ("    $( The proof of ~ syl uses ", "      ( wph wps wch "),
    "arithmetic": ("12 + 30 = ", "3, 5, 7, 9, "),
}


def config(**overrides: Any) -> TransformerConfig:
    """Return the model's configuration.

    Parameters
    ----------
    **overrides
        Other fields of `TransformerConfig`, e.g. ``params_dtype``.

    Returns
    -------
    TransformerConfig
        For `megatron.core.models.gpt.GPTModel`.
    """
    ensure_model_parallel()
    fields: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": EXPERT_WIDTH,
        "moe_ffn_hidden_size": EXPERT_WIDTH,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }
    fields |= neutral_config_fields() | overrides
    return quiet_config(TransformerConfig, **fields)


def new_model(model_config: TransformerConfig | None = None, pg_collection: Any = None) -> GPTModel:
    """Build the model with random weights, on the CPU."""
    return build_gpt(
        config() if model_config is None else model_config,
        VOCABULARY,
        MAX_LENGTH,
        share_embeddings=True,
        pg_collection=pg_collection,
    )


class RouteRecorder:
    """Which experts every token was sent to, gathered forward by forward.

    Attributes
    ----------
    batches : list of uint8 arrays, each [B, S, L, K]
        One per forward; an entry is an expert, the two of a token by falling weight.
    """

    def __init__(self, layers: int) -> None:
        self.batches: list[NDArray[np.uint8]] = []
        self._layers = layers
        self._pending: list[NDArray[np.uint8]] = []

    def _take(self, hidden: torch.Tensor, probs_TE: torch.Tensor) -> None:
        top = probs_TE.topk(TOP_K, dim=-1).indices  # [S*B, K]: megatron's tokens are sequence-major
        shaped = top.view(hidden.size(0), hidden.size(1), TOP_K).transpose(0, 1)
        self._pending.append(shaped.to(device="cpu", dtype=torch.uint8).numpy())
        if len(self._pending) == self._layers:
            self.batches.append(np.stack(self._pending, axis=2))
            self._pending = []

    def concatenate(self) -> NDArray[np.uint8]:
        """Return all tokens recorded, sequence by sequence, [T, L, K]."""
        if not self.batches:
            return np.zeros((0, self._layers, TOP_K), dtype=np.uint8)
        return np.concatenate([b.reshape(-1, self._layers, TOP_K) for b in self.batches])


@contextlib.contextmanager
def record_routes(model: GPTModel) -> Iterator[RouteRecorder]:
    """Record the experts of every token that passes through `model` inside the ``with`` block.

    Examples
    --------
    >>> with record_routes(model) as routes:  # doctest: +SKIP
    ...     score(model, "12 + 30 = 42")
    >>> routes.concatenate().shape  # doctest: +SKIP
    (12, 6, 2)
    """
    layers = moe_layers(model)
    recorder = RouteRecorder(len(layers))

    def hook(_module: Any, args: tuple[Any, ...], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        recorder._take(args[0], out[0].detach())

    handles = [layer.router.register_forward_hook(hook) for _, layer in layers]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


WEIGHTS = "tiny_moe.safetensors"
CARD = "tiny_moe.json"


def data_file(name: str) -> Path:
    """Return the path of a file that ships with the model."""
    return Path(str(resources.files("moeless_opt.runtime") / "data" / name))


def card() -> dict[str, Any]:
    """Return the record of the training: sources and hashes of the text, settings, losses, skew and drift."""
    content: dict[str, Any] = json.loads(data_file(CARD).read_text())
    return content


def load(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    weights: str | Path | None = None,
    pg_collection: Any = None,
    **overrides: Any,
) -> GPTModel:
    """Load the trained model, this rank's part of it.

    Parameters
    ----------
    device : str or torch.device
        Where it shall live.
    dtype : torch.dtype
        Of its parameters. The stored weights are bfloat16, so every wider type holds the same numbers.
    weights : path, optional
        Another safetensors file of the same shape (your own training).
    pg_collection : optional
        Megatron's process groups; by default its global ones, which `ensure_model_parallel` makes for a
        single process.
    **overrides
        Other fields of `TransformerConfig`.

    Returns
    -------
    GPTModel
        In evaluation mode. With several expert-parallel ranks it holds this rank's experts, and its layers
        have a `StaticDispatcher`.

    Raises
    ------
    FormatError
        A file that is not a checkpoint of this model.
    """
    ensure_model_parallel()
    if pg_collection is not None:
        overrides.setdefault("expert_model_parallel_size", pg_collection.ep.size())
    kinds = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    model = new_model(
        config(**(kinds | {"perform_initialization": False} | overrides)), pg_collection=pg_collection
    )
    local = {i: layer.local_expert_indices for i, layer in moe_layers(model)}
    with SafetensorsFolder(data_file(WEIGHTS) if weights is None else weights) as files:
        for name, parameter in model.named_parameters():
            source = _global_name(name, local)
            if files.info(source).shape != parameter.shape:
                wrong = list(files.info(source).shape)
                raise FormatError(f"tensor {source!r}", f"has shape {wrong}, not {list(parameter.shape)}")
            parameter.data = files.read(source).to(device=device, dtype=dtype)
    return model.to(device)


def save(model: GPTModel, file: str | Path) -> None:
    """Write the weights of a whole model (one rank) in bfloat16."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, str(file), metadata={"format": "pt", "model": "moeless-opt tiny MoE"})


def _global_name(name: str, local_experts: dict[int, list[int]]) -> str:
    """Turn a rank's parameter name into the stored one: experts are stored by their global index."""
    parts = name.split(".")
    if "local_experts" in parts:
        slot = parts.index("local_experts") + 1
        layer = int(parts[parts.index("layers") + 1])
        parts[slot] = str(local_experts[layer][int(parts[slot])])
    return ".".join(parts)


# --------------------------------------------------------------------------------------------------- text


def encode(text: str | bytes) -> list[int]:
    """Turn text into tokens: the start token, then its bytes (UTF-8)."""
    return [START, *(text.encode() if isinstance(text, str) else text)]


def decode(tokens: list[int] | torch.Tensor) -> str:
    """Turn tokens into text; what is not UTF-8 (a character cut in two) becomes a replacement character."""
    return bytes(t for t in map(int, tokens) if t < 256).decode("utf-8", errors="replace")


def _device(model: GPTModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@torch.no_grad()
def score(model: GPTModel, text: str | bytes) -> FloatArray:
    """Return how surprised the model is by every byte of `text`.

    Parameters
    ----------
    model : GPTModel
        From `load`.
    text : str or bytes
        Longer texts are cut into windows of 256 bytes, each with its own start token.

    Returns
    -------
    float64 array, shape [bytes]
        Minus the logarithm of each byte's probability, in nats; divide by ``log(2)`` for bits.
    """
    tokens = encode(text)[1:]
    losses: list[FloatArray] = []
    for first in range(0, len(tokens), 256):
        window = torch.tensor([[START, *tokens[first : first + 256]]], device=_device(model))
        inputs = window[:, :-1]
        logits = model(inputs, causal_positions(inputs), None)[0]
        losses.append(F.cross_entropy(logits.double(), window[0, 1:], reduction="none").cpu().numpy())
    return np.concatenate(losses) if losses else np.zeros(0)


@torch.no_grad()
def generate(
    model: GPTModel, prompt: str | bytes = "", length: int = 64, *, temperature: float = 0.0, seed: int = 0
) -> bytes:
    """Continue a text, byte by byte.

    Parameters
    ----------
    model : GPTModel
        From `load`. With several expert-parallel ranks, all of them must generate equally many bytes.
    prompt : str or bytes
        What comes before.
    length : int
        Bytes wanted.
    temperature : float
        0 takes the likeliest byte; 1 samples from the model.
    seed : int
        Of the sampling.

    Returns
    -------
    bytes
        The continuation alone.

    Raises
    ------
    ProblemError
        Prompt and continuation are longer than `MAX_LENGTH`, or an argument is out of range.
    """
    if temperature < 0 or not math.isfinite(temperature):
        raise ProblemError("temperature", f"must be a number of at least 0, not {temperature}")
    tokens = encode(prompt)
    if length < 0 or len(tokens) + length > MAX_LENGTH:
        raise ProblemError(
            "length", f"must be in 0..{MAX_LENGTH - len(tokens)} after this prompt, not {length}"
        )
    rng = np.random.default_rng(seed)
    for _ in range(length):
        inputs = torch.tensor([tokens], device=_device(model))
        logits_V = model(inputs, causal_positions(inputs), None)[0, -1, :256].double().cpu().numpy()
        if temperature == 0:
            tokens.append(int(logits_V.argmax()))
        else:  # the largest of logits + Gumbel noise is a sample of their soft-max
            tokens.append(int((logits_V / temperature + rng.gumbel(size=256)).argmax()))
    return bytes(tokens[len(tokens) - length :])


def summary() -> str:
    """Return the card's figures as text: losses, skew and drift by domain."""
    figures = card()
    skew, drift = figures["skew_max_over_mean"], figures["drift_total_variation"]
    lines = [
        f"{figures['model']['parameters']:,} parameters, {figures['training']['tokens']:,} bytes of training",
        "",
        f"{'domain':12}{'nats/byte':>10}{'bits/byte':>10}{'counted':>9}   skew (max / mean load) by layer",
    ]
    for domain, loss in figures["held_out"].items():
        row = "".join(f"{x:6.2f}" for x in skew[domain])
        lines.append(
            f"{domain:12}{loss['nats_per_byte']:10.3f}{loss['bits_per_byte']:10.3f}"
            f"{loss['counted_bits_per_byte']:9.3f}   {row}"
        )
    lines.append(f"{'all':41}   " + "".join(f"{x:6.2f}" for x in skew["all_domains_L"]))
    lines += ["", "drift (total variation of the expert loads; diagonal: two halves of one domain)"]
    lines.append(" " * 12 + "".join(f"{d[:7]:>8}" for d in figures["held_out"]))
    for domain, distances in zip(figures["held_out"], drift["matrix"], strict=True):
        lines.append(f"{domain:12}" + "".join(f"{x:8.2f}" for x in distances))
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary())
