"""Load a Hugging Face checkpoint folder into a live megatron-core `GPTModel`, tensor by tensor.

For Mixtral, Phi-3.5-MoE, Llama 4 (text), Qwen3-MoE and DeepSeek-V3. Each rank builds its own part of the
model without initialising it, and reads just the bytes of that part: of the experts, its own. A tensor goes
from the file into the parameter's memory in one read where type and layout allow it, else through one tensor
of scratch; there is never a copy of the model, or of a file, beside it.

What is checked: every parameter is filled to the last element, every tensor has the expected shape, and no
tensor of the checkpoint is left over. What is not supported is refused by name.

`ExpertSource` reads single experts from the same folder, and `CheckpointHome` offers them to a live model:
the second source of weights when a rank is lost.

Examples
--------
>>> model = load_checkpoint("Mixtral-8x7B-v0.1", dtype=torch.bfloat16)  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeless_opt.problems.errors import FormatError, ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.architectures import Piece, Recipe, Shard, recipe
from moeless_opt.runtime.checkpoint.files import SafetensorsFolder, TensorInfo, read_config
from moeless_opt.runtime.checkpoint.parts import (
    GPTModel,
    NeutralRotary,
    build_gpt,
    cpu_capable_layer_spec,
    moe_layers,
    parallel_state,
    stage_layers,
)

__all__ = ["CheckpointHome", "ExpertSource", "LoadReport", "build_model", "load_checkpoint", "recipe_of"]

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SCALE = "_scale_inv"  # block scales of DeepSeek's FP8 weights: "weight" -> "weight_scale_inv"


@dataclass(frozen=True)
class LoadReport:
    """What one `load_checkpoint` did.

    Parameters
    ----------
    bytes_read : int
        From the files.
    tensors : int
        Pieces that were filled.
    scratch_bytes : int
        The largest scratch tensor that was needed.
    """

    bytes_read: int
    tensors: int
    scratch_bytes: int


def recipe_of(folder: str | os.PathLike[str], max_sequence_length: int | None = None) -> Recipe:
    """Read a checkpoint's ``config.json`` and work out how to build its model (`loader_models.recipe`)."""
    return recipe(read_config(folder), max_sequence_length)


def _dtype_of(plan: Recipe) -> torch.dtype:
    """Return the type that ``config.json`` names."""
    name = str(plan.hf.get("torch_dtype") or plan.hf.get("dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedFeatureError(f"dtype {name!r} of config.json is not supported; pass dtype=")
    return _DTYPES[name]


def _wanted(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type, if there can be a model of it there."""
    if dtype not in _DTYPES.values():
        raise UnsupportedFeatureError(f"dtype {dtype} is not supported (only {', '.join(_DTYPES)})")
    try:
        torch.empty(0, dtype=dtype, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ProblemError("device", f"{device!r} cannot be used here: {error}") from None
    return dtype


def build_model(plan: Recipe, dtype: torch.dtype, device: str | torch.device = "cpu") -> GPTModel:
    """Build the empty model of a recipe: this rank's part, its parameters not initialised.

    Parameters
    ----------
    plan : Recipe
        From `recipe_of`.
    dtype : torch.dtype
        Of the parameters.
    device : str or torch.device
        Where they shall be.

    Returns
    -------
    GPTModel
        In evaluation mode.
    """
    config = plan.transformer_config(dtype)
    rotary = NeutralRotary(
        plan.rotary.inverse_frequencies,
        interleaved=bool(plan.fields.get("rotary_interleaved", False)),
        long_frequencies=plan.rotary.long_frequencies,
        switch_length=plan.rotary.switch_length,
    )
    model = build_gpt(
        config,
        plan.hf["vocab_size"],
        plan.max_sequence_length,
        rotary=rotary,
        layer_spec=cpu_capable_layer_spec(config, qk_l2_norm=plan.qk_l2_L, router=plan.architecture.router),
        share_embeddings=plan.tied,
    )
    _set_router_jitter(model, plan)
    # Biases that megatron-core has no option for; that of the row-parallel one is added once, to the sum.
    width = plan.hf["hidden_size"]
    if plan.attention_bias:
        for layer in model.decoder.layers:
            layer.self_attention.linear_proj.bias = torch.nn.Parameter(torch.empty(width, dtype=dtype))
    if plan.output_bias and model.post_process:
        rows = model.output_layer.weight.size(0)
        model.output_layer.bias = torch.nn.Parameter(torch.empty(rows, dtype=dtype))
    # On the CPU nothing has been written yet, so no memory is held: make room on the device instead of
    # copying.
    for parameter in model.parameters():
        if parameter.dtype != dtype or parameter.device != torch.device(device):
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)
    return model.to(device)


def _set_router_jitter(model: GPTModel, plan: Recipe) -> None:
    jitter = plan.hf.get("router_jitter_noise")
    for _, layer in moe_layers(model):
        if hasattr(layer.router, "jitter") and jitter is not None:
            layer.router.jitter = float(jitter)


def _run(size: int, cut: tuple[int, int, int]) -> range:
    """Rows, or columns, of a part."""
    _, part, parts = cut
    return range(size // parts * part, size // parts * (part + 1))


class _Filler:
    """Fills views of parameters from a checkpoint, with one scratch tensor at a time."""

    def __init__(self, files: SafetensorsFolder) -> None:
        self.files = files
        self.scratch_bytes = 0
        self.tensors = 0

    def fill(self, piece: Piece, parameter: torch.Tensor) -> int:
        """Fill the piece's part of `parameter`; return how many elements that were."""
        info = self.files.info(piece.source)
        _check_shape(info, piece)
        view = piece.view(parameter.data)
        self.tensors += 1
        in_place = view.is_contiguous() and view.device.type == "cpu" and view.dtype == info.dtype
        scaled = info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        # Rows lie together on disk; columns, and what is scaled block by block, are cut in memory.
        rows = None
        if piece.cut is not None and piece.cut[0] == 0 and not scaled:
            rows = _run(info.shape[0], piece.cut)
        whole = piece.cut is None or rows is not None
        if in_place and whole and not piece.transpose:
            self.files.read_into(piece.source, view, index=piece.index, rows=rows)
            return view.numel()
        value = self.files.read(piece.source, index=piece.index, rows=rows)
        self.scratch_bytes = max(self.scratch_bytes, value.nbytes)
        if scaled:
            value = self._dequantise(piece, value)
        elif not value.is_floating_point():
            raise FormatError(
                f"{info.file}: tensor {piece.source!r}", f"holds {info.dtype}, not a floating-point type"
            )
        if piece.transpose:
            value = value.t()
        if piece.cut is not None and not whole:
            run = _run(value.shape[piece.cut[0]], piece.cut)
            value = value.narrow(piece.cut[0], run.start, len(run))
        view.copy_(value.reshape(view.shape))
        return view.numel()

    def _dequantise(self, piece: Piece, value: torch.Tensor) -> torch.Tensor:
        """Multiply every block of an FP8 weight by its scale."""
        scale_name = piece.source + _SCALE
        if scale_name not in self.files:
            raise FormatError(
                str(self.files.folder),
                f"tensor {scale_name!r} is missing: {piece.source!r} is FP8 and needs it",
            )
        scale = self.files.read(scale_name).float()
        if value.dim() != 2:
            raise FormatError(f"tensor {piece.source!r}", f"is FP8 with {value.dim()} axes; blocks need two")
        rows, columns = value.shape
        block = 128
        wanted = (-(-rows // block), -(-columns // block))
        if tuple(scale.shape) != wanted:
            raise FormatError(
                f"tensor {scale_name!r}",
                f"has shape {list(scale.shape)}; blocks of 128 x 128 ask for {list(wanted)}",
            )
        out = value.float()
        self.scratch_bytes = max(self.scratch_bytes, value.nbytes + out.nbytes)
        for i in range(wanted[0]):  # row of blocks by row of blocks: no expanded scale beside the weight
            part = out[i * block : (i + 1) * block]
            part.mul_(scale[i].repeat_interleave(block)[:columns])
        return out


def _check_quantisation(plan: Recipe) -> None:
    method = plan.hf.get("quantization_config")
    if method is None:
        return
    kind, block = method.get("quant_method"), method.get("weight_block_size")
    if kind != "fp8" or block != [128, 128]:
        raise UnsupportedFeatureError(
            f"quantization {kind!r} with blocks {block} is not supported (only 'fp8' with [128, 128])"
        )


def _fill_model(
    model: GPTModel,
    pieces: Iterable[Piece],
    filler: _Filler,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Fill every parameter, and make sure that nothing is left out."""
    targets = dict(model.named_parameters())
    targets |= {k: b for k, b in model.named_buffers() if k.endswith("expert_bias")}
    filled = dict.fromkeys(targets, 0)
    for piece in pieces:
        if piece.target not in targets:
            raise FormatError(piece.source, f"the model has no parameter {piece.target!r} for it")
        filled[piece.target] += filler.fill(piece, targets[piece.target])
        if on_progress is not None:
            on_progress(filler.files.bytes_read)
    for name, count in filled.items():
        if count != targets[name].numel():
            raise FormatError(
                f"parameter {name!r}", f"{count} of {targets[name].numel()} elements are in the checkpoint"
            )


def _drafts(plan: Recipe, files: SafetensorsFolder) -> tuple[str, ...]:
    """Beginnings of the tensors of layers behind the model's own that draft tokens, which are not loaded.

    Only as many as the configuration has, and only what is known to draft: a layer too many is an error.
    """
    if not plan.names.draft:
        return ()
    count = plan.hf.get("num_nextn_predict_layers", plan.hf.get("num_mtp_layers", 0))
    layers = (f"{plan.names.prefix}model.layers.{plan.layers + i}." for i in range(count))
    return tuple(layer for layer in layers if f"{layer}{plan.names.draft}.weight" in files)


def _check_tensors(plan: Recipe, files: SafetensorsFolder) -> None:
    """Refuse tensors that no piece of any rank uses, and those that do not fit, before anything is built."""
    everything = {p.source for p in plan.pieces(lambda layer: list(range(plan.experts)))}
    unused = plan.names.unused + _drafts(plan, files)
    left = [
        name
        for name in files
        if name not in everything
        and name.removesuffix(_SCALE) not in everything
        and not name.startswith(unused)
        and not name.endswith("rotary_emb.inv_freq")
        and not (plan.tied and name == plan.names.prefix + "lm_head.weight")
    ]
    if left:
        raise FormatError(
            str(files.folder),
            f"{len(left)} tensors are not part of {plan.architecture.title} as configured, "
            f"e.g. {min(left)!r}",
        )
    # Sizes that are out of all proportion would take the memory first: one expert of a layer tells.
    for piece in plan.pieces(lambda layer: [0]):
        _check_shape(files.info(piece.source), piece)


def _check_shape(info: TensorInfo, piece: Piece) -> None:
    if info.shape != piece.shape:
        raise FormatError(
            f"{info.file}: tensor {piece.source!r}",
            f"has shape {list(info.shape)}; the configuration asks for {list(piece.shape)}",
        )


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    max_sequence_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> GPTModel:
    """Load this rank's part of a Hugging Face checkpoint into a megatron-core model.

    Parameters
    ----------
    folder : path
        With ``config.json`` and safetensors files.
    dtype : torch.dtype, optional
        Of the parameters; by default what ``config.json`` names.
    device : str or torch.device
        Where the model shall live.
    max_sequence_length : int, optional
        Longest input that will be used.
    on_progress : callable, optional
        Called with the bytes read so far, after every tensor.

    Returns
    -------
    GPTModel
        In evaluation mode; its attribute `load_report` is a `LoadReport`. Its experts are divided over the
        expert-parallel group as megatron-core does (rank r holds the r-th run of experts), with a
        `StaticDispatcher` if the group has more than one rank. With tensor parallelism (of the attention, the
        embedding and dense layers) and pipeline parallelism it is this rank's part and stage; `pipelined` and
        `whole_logits` run it and put its logits together.

    Raises
    ------
    UnsupportedFeatureError
        An architecture or feature that the loader does not know, by name.
    FormatError
        A file, tensor or field is missing, damaged, of the wrong shape, or left over.

    Notes
    -----
    Megatron's process groups must exist if there is more than one rank (`ensure_model_parallel` makes them).
    """
    plan = recipe_of(folder, max_sequence_length)
    _check_quantisation(plan)
    kind = _wanted(dtype or _dtype_of(plan), device)
    with SafetensorsFolder(folder) as files:
        _check_tensors(plan, files)
        model = build_model(plan, kind, device)
        layers = dict(moe_layers(model))
        filler = _Filler(files)
        shard = Shard(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            stage_layers(model.config),
        )
        pieces = plan.pieces(lambda layer: list(layers[layer].local_expert_indices), shard)
        _fill_model(model, pieces, filler, on_progress)
        model.load_report = LoadReport(files.bytes_read, filler.tensors, filler.scratch_bytes)
    return model


class ExpertSource:
    """Single experts of a checkpoint folder, read when they are needed.

    Parameters
    ----------
    folder : path
        The checkpoint.

    Notes
    -----
    Nothing is held in memory. Layers are counted from 0 over all layers of the model, dense ones included.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.recipe = recipe_of(folder)
        _check_quantisation(self.recipe)
        self._files = SafetensorsFolder(folder)

    def fill(self, layer: int, expert: int, module: torch.nn.Module) -> int:
        """Read an expert's weights into `module`.

        Parameters
        ----------
        layer, expert : int
            Which one.
        module : torch.nn.Module
            With parameters ``linear_fc1.weight`` and ``linear_fc2.weight``, as megatron-core's `MLP` has
            them.

        Returns
        -------
        int
            Bytes read.

        Raises
        ------
        FormatError
            There is no such expert, or its tensors are missing or of the wrong shape.
        """
        return self._fill(layer, expert, dict(module.named_parameters()))

    def read(self, layer: int, expert: int, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Read an expert's weights: those of ``linear_fc1`` and of ``linear_fc2``, on the CPU.

        Parameters
        ----------
        layer, expert : int
            Which one.
        dtype : torch.dtype, optional
            By default what ``config.json`` names.

        Returns
        -------
        list of two Tensors
            Shapes ``[2 x inner, hidden]`` (gate rows first) and ``[hidden, inner]``.

        Raises
        ------
        FormatError
            As of `fill`.
        """
        width, inner = self.recipe.hf["hidden_size"], self.recipe.fields["moe_ffn_hidden_size"]
        kind = dtype or _dtype_of(self.recipe)
        weights = [torch.empty(shape, dtype=kind) for shape in ((2 * inner, width), (width, inner))]
        names = ("linear_fc1.weight", "linear_fc2.weight")
        self._fill(layer, expert, dict(zip(names, weights, strict=True)))
        return weights

    def _fill(self, layer: int, expert: int, targets: Mapping[str, torch.Tensor]) -> int:
        if not (0 <= layer < self.recipe.layers and self.recipe.moe_L[layer]):
            raise FormatError("layer", f"{layer} is not a layer with experts of {self.folder}")
        if not 0 <= expert < self.recipe.experts:
            raise FormatError("expert", f"{expert} is not one of the {self.recipe.experts} experts")
        before, filler = self._files.bytes_read, _Filler(self._files)
        for piece in self.recipe.expert_pieces(layer, expert):
            filler.fill(piece, targets[piece.target])
        return self._files.bytes_read - before

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class CheckpointHome:
    """A checkpoint folder as the second source of a live model's experts (a `home.HomeStore`).

    It holds no memory, every rank can read all of it, and it survives the loss of any rank.

    Parameters
    ----------
    folder : path
        The folder that the model was loaded from, reachable from every rank.
    gpus : int
        Ranks of the expert-parallel group.
    dtype : torch.dtype, optional
        Of the live model's parameters; by default what ``config.json`` names.
    layers : sequence of int, optional
        The live model's layers (its ``layers``), where that is one stage of a pipeline; all by default.

    Notes
    -----
    Layers are counted as a live model counts them: only those with experts.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        gpus: int,
        dtype: torch.dtype | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.source = ExpertSource(folder)
        self.dtype = dtype
        self._gpus = gpus
        whole = [i for i, has_experts in enumerate(self.source.recipe.moe_L) if has_experts]
        if lacking := sorted(set(layers or ()) - set(whole)):
            raise ProblemError("layers", f"names {lacking}, which have no experts in {self.source.folder}")
        self._layers = whole if layers is None else list(layers)

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """Ranks that can read the expert: all."""
        return range(self._gpus)

    def read(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Return the expert's tensors on the CPU."""
        return self.source.read(self._layers[layer], expert, self.dtype)

    def regroup(self, survivors: Sequence[int]) -> None:
        """Nothing is lost with a rank."""
        self._gpus = len(survivors)
