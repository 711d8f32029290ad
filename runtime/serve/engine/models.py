"""What is served: the small model that ships with the package, or a checkpoint, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.live import HomeStore
from moeless_opt.runtime.serve import TextCodec
from moeless_opt.runtime.serve.engine.codec import BytesCodec, FolderCodec
from moeless_opt.runtime.serve.engine.options import EngineOptions

__all__ = ["ServedFacts", "TinyHome", "check_device", "facts_of", "home_of", "load_served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFacts:
    """What is known of a model before it is loaded.

    Parameters
    ----------
    name : str
        For clients.
    context_length : int
        Longest request.
    vocabulary : int
        Tokens from 0 up to this are known.
    experts : int
        Of a layer.
    codec : TextCodec
        Its tokenizer.
    """

    name: str
    context_length: int
    vocabulary: int
    experts: int
    codec: TextCodec


def facts_of(options: EngineOptions) -> ServedFacts:
    """Read a model's settings and tokenizer, without its weights.

    Raises
    ------
    FormatError, UnsupportedFeatureError
        The folder is not one that can be served.
    """
    if options.model is None:
        from moeless_opt.runtime.tiny_moe import model as tiny

        longest, vocabulary, experts = tiny.MAX_LENGTH, tiny.START + 1, tiny.EXPERTS
        codec: TextCodec = BytesCodec(tiny.START)
        name = "tiny-moe"
    else:
        folder = Path(options.model)
        if not folder.is_dir():
            raise FormatError("model", f"{options.model!r} is no folder with a checkpoint")
        from moeless_opt.runtime.checkpoint import recipe_of

        found = recipe_of(folder)
        longest, vocabulary = found.max_sequence_length, int(found.hf["vocab_size"])
        experts = found.experts
        switch = found.rotary.switch_length
        if switch:  # LongRoPE changes the angles of all tokens there, also of those that are in the pool
            longest = min(longest, switch)
        codec, name = FolderCodec(folder), folder.resolve().name
    if options.context_length is not None:
        if options.context_length > longest:
            raise ProblemError(
                "context_length", f"is {options.context_length}, the model goes up to {longest}"
            )
        longest = options.context_length
    return ServedFacts(
        name=options.name or name,
        context_length=longest,
        vocabulary=vocabulary,
        experts=experts,
        codec=codec,
    )


def check_device(options: EngineOptions) -> None:
    """Refuse a device that is not here."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ProblemError("device", "is 'cuda', and there is none here")


def device_of(options: EngineOptions) -> torch.device:
    """Where this rank computes."""
    check_device(options)
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        import os

        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def dtype_of(options: EngineOptions, device: torch.device) -> torch.dtype | None:
    """The type asked for; on a CPU float32 where nothing was."""
    if options.dtype is not None:
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    return torch.float32 if device.type == "cpu" or options.model is None else None


def load_served(options: EngineOptions, device: torch.device, context_length: int) -> Any:
    """Load this rank's part of the model."""
    dtype = dtype_of(options, device)
    if options.model is None:
        from moeless_opt.runtime.tiny_moe import model as tiny

        return tiny.load(device, dtype or torch.float32)
    from moeless_opt.runtime.checkpoint import load_checkpoint

    return load_checkpoint(options.model, dtype=dtype, device=device, max_sequence_length=context_length)


def home_of(options: EngineOptions, model: Any, ranks: int) -> HomeStore:
    """Where experts come from that no rank holds any more: the files that the model was loaded from."""
    dtype = next(model.parameters()).dtype
    if options.model is None:
        return TinyHome(ranks, dtype)
    from moeless_opt.runtime.checkpoint import CheckpointHome

    return CheckpointHome(options.model, ranks, dtype)


class TinyHome:
    """The shipped file as the second source of the small model's experts (a `home.HomeStore`).

    Parameters
    ----------
    gpus : int
        Ranks of the expert-parallel group.
    dtype : torch.dtype
        Of the live model.
    """

    def __init__(self, gpus: int, dtype: torch.dtype) -> None:
        from moeless_opt.runtime.checkpoint import SafetensorsFolder
        from moeless_opt.runtime.tiny_moe import model as tiny

        self._files = SafetensorsFolder(tiny.data_file("tiny_moe.safetensors"))
        self._gpus, self._dtype = gpus, dtype

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """Ranks that can read the expert: all."""
        return range(self._gpus)

    def read(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Return the expert's tensors on the CPU."""
        place = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}"
        names = (f"{place}.linear_fc1.weight", f"{place}.linear_fc2.weight")
        return [self._files.read(name).to(self._dtype) for name in names]

    def regroup(self, survivors: Sequence[int]) -> None:
        """Nothing is lost with a rank."""
        self._gpus = len(survivors)
