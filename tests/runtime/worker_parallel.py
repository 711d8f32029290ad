"""Ranks of `test_parallel`: attention over ranks, layers over stages, experts over the ranks of a stage."""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from worlds import EXPERTS, HIDDEN, batch, join, random_slots, report, row_exact, tiny_config

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.problems.spec import Topology
from moeless_opt.runtime.checkpoint.parts import (
    build_gpt,
    cpu_capable_layer_spec,
    ensure_model_parallel,
    expert_linears,
    parallel_state,
)
from moeless_opt.runtime.checkpoint.pipeline import pipelined, whole_logits
from moeless_opt.runtime.control import Controller, Planner
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live import Guard, MappedHome, static_slots
from moeless_opt.runtime.predict import GatePredictor, PerLayer, plain_gates

LAYERS, TOPK, VOCAB, LENGTH = 4, 2, 256, 24


def whole_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 if "router" in key else 0.15)


def seed(model: Any, tp: int) -> None:
    """The same weights however the model is divided: cut out of whole ones, by megatron's own marks."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    local = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * local
    numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            key = name
            if ".layers." in key:
                head, tail = key.split(".layers.")
                index, rest = tail.split(".", 1)
                key = f"{head}.layers.{numbers[int(index)]}.{rest}"
            if ".local_experts." in key:
                head, tail = key.split(".local_experts.")
                index, rest = tail.split(".", 1)
                p.copy_(whole_weight(f"{head}.expert.{first + int(index)}.{rest}", tuple(p.shape)))
                continue
            axis = p.partition_dim if getattr(p, "tensor_model_parallel", False) and tp > 1 else None
            shape = tuple(n * (tp if i == axis else 1) for i, n in enumerate(p.shape))
            whole = whole_weight(key, shape)
            if axis is None:
                p.copy_(whole)
            elif key.endswith("linear_fc1.weight"):  # gate and up, each divided
                p.copy_(torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)]))
            else:
                p.copy_(whole.chunk(tp, dim=axis)[rank])


class Norm(torch.nn.RMSNorm):
    """Megatron-core's own over torch's refuses sequence parallelism, for training's sake."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)


def build(tp: int, pp: int, **more: Any) -> Any:
    config = tiny_config(
        LAYERS,
        TOPK,
        torch.float64,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_tensor_parallel_size=1,
        pipeline_dtype=torch.float64,
        moe_shared_expert_intermediate_size=32,
        moe_layer_freq=[0, 1, 1, 1],
        **more,
    )
    spec = cpu_capable_layer_spec(config)
    for layer in spec.layer_specs:
        if _has_experts(layer):
            linears = expert_linears(layer)
            linears.linear_fc1 = row_exact(linears.linear_fc1)
            linears.linear_fc2 = row_exact(linears.linear_fc2)
        if config.sequence_parallel:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if config.sequence_parallel:
        spec.layer_norm = Norm
    model = build_gpt(config, VOCAB, 128, layer_spec=spec)
    model = model.to(torch.float64)
    seed(model, tp)
    return model


def _has_experts(spec: Any) -> bool:
    try:
        expert_linears(spec)
    except AttributeError:
        return False
    return True


def logits(model: Any, tokens: torch.Tensor, **how: Any) -> torch.Tensor | None:
    out = pipelined(model, tokens, **how)
    return None if out is None else whole_logits(out)


def off(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """Largest difference on the last stage."""
    return 0.0 if a is None or b is None else (a - b).abs().max().item()


def worst_everywhere(value: float) -> float:
    out = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(out, op=dist.ReduceOp.MAX)
    return out.item()


def main() -> None:
    tp, pp, ep, sp = map(int, sys.argv[1:5])
    if sp:
        # Megatron-core's exchange of sequence parts names the current CUDA device.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    rank, size = join(1)
    # The model without tensor and pipeline parallelism, whole on every rank.
    plain = build(1, 1)
    mine = rank % (size // pp) // tp  # of the data-parallel ranks, in megatron's order tp, dp, pp
    batches = [batch(mine, k, length=LENGTH if sp else (LENGTH, 1, 7)[k]) for k in range(3)]
    wanted = [logits(plain, x) for x in batches]
    parallel_state.destroy_model_parallel()
    ensure_model_parallel(ep, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    more = {"sequence_parallel": True} if sp else {}
    model = build(tp, pp, **more)
    stock = [logits(model, x) for x in batches]
    figures: dict[str, Any] = {
        "against undivided": worst_everywhere(max(off(a, b) for a, b in zip(stock, wanted, strict=True)))
    }
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    live = attach(model, checksums=True)
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers if layer.layer_number > 1]
    assert list(live.layers) == numbers, (live.layers, numbers)
    with pytest.raises(
        UnsupportedFeatureError, match=r"Guard does not support (tensor|pipeline) parallelism yet"
    ):
        Guard(live)
    figures["moving"] = moving(live, batches, stock)
    counted(live, batches[0], tp)
    planned(live, batches[0], stock[0], tp)
    homes(live)
    live.detach()
    figures["detached"] = worst_everywhere(
        max(off(logits(model, x), y) for x, y in zip(batches, stock, strict=True))
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][1]), name
    if pp > 1:
        figures["microbatches"] = worst_everywhere(off(logits(model, batches[0], microbatches=2), stock[0]))
    report(figures | {"layers": list(live.layers)})


def moving(live: Any, batches: list[torch.Tensor], stock: list[Any]) -> float:
    """The largest difference to the stock dispatcher under random placements of each stage's own."""
    worst, rng = 0.0, np.random.default_rng(live.layers[0])
    for step in range(9):
        x, want = batches[step % 3], stock[step % 3]
        worst = max(worst, off(logits(live.model, x), want))
        live.apply(random_slots(rng, len(live.layers), live.group.size))
    live.settle()
    worst = max(worst, *(off(logits(live.model, x), want) for x, want in zip(batches, stock, strict=True)))
    return worst_everywhere(worst)


def everybody(load_LE: np.ndarray) -> float:
    """Loads of a layer over all expert-parallel groups of the stage, which must not count anything twice."""
    total = torch.tensor([float(load_LE.sum()) / load_LE.shape[0]], dtype=torch.float64)
    group = parallel_state.get_expert_model_parallel_group()
    total /= dist.get_world_size(group)
    world = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    dist.all_gather_into_tensor(world, total)
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return float(world.view(pp, -1)[stage].sum())


def counted(live: Any, x: torch.Tensor, tp: int) -> None:
    """Every real token counts once, however many ranks hold it."""
    live.observe()
    logits(live.model, x)
    dp = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size() // tp
    assert everybody(live.observe().load_LE) == dp * x.numel() * TOPK
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(x.size(1), x.size(0), generator=generator) < 0.6
    for skip in (False, True):
        with live.real_tokens(mask, skip=skip):
            logits(live.model, x)
        assert everybody(live.observe().load_LE) == dp * int(mask.sum()) * TOPK


def planned(live: Any, x: torch.Tensor, want: Any, tp: int) -> None:
    """Both modes of the controller, each stage for itself."""
    ranks, layers = live.group.size, len(live.layers)
    topology = Topology.uniform(1, ranks, slots=EXPERTS // ranks + 2)
    live.apply(static_slots(EXPERTS, ranks, layers))
    live.settle()
    with_plans = Controller(live, Planner(topology=topology), every=2)
    worst = 0.0
    for _ in range(5):
        worst = max(worst, off(logits(live.model, x), want))
        with_plans.after()
    with_plans.close()
    live.settle()
    assert any(d.applied for d in with_plans.decisions)
    controller = Controller(live, Planner(topology=topology))
    with PerLayer(live, controller, GatePredictor(plain_gates(live.model)), distance=1):
        for _ in range(3):
            worst = max(worst, off(logits(live.model, x), want))
            controller.drain()
    live.settle()
    errors = [d.error for d in controller.layer_decisions if d.error]
    assert not errors, errors[0]
    foreseen = [d.load_E.sum() for d in controller.layer_decisions if d.load_E.any()]
    assert foreseen
    dp = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size() // tp
    per_group = dp * x.numel() * TOPK * ranks / (dp * tp)  # each group has its ranks' share of the tokens
    assert set(foreseen) == {per_group}, (foreseen, per_group)
    assert {d.layer for d in controller.layer_decisions} <= set(live.layers)
    controller.close()
    assert worst == 0.0, worst


def homes(live: Any) -> None:
    """Files of all stages in one folder, and each stage's experts out of it."""
    folder = os.environ["WORLD_FOLDER"] + "/home"
    live.save_home(folder)
    dist.barrier()
    home = MappedHome(folder, live.group.size, live.layers)
    for index, bank in enumerate(live.banks):
        for expert, weights in bank.resident.items():
            assert list(home.ranks(index, expert)) == list(range(live.group.size))
            for mine, theirs in zip(weights, home.read(index, expert), strict=True):
                assert torch.equal(mine, theirs)
    assert len(weights) == 2
    assert mine.shape[0] == HIDDEN
    dist.barrier()


main()
