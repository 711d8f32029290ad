"""Ranks of `test_transformers_world`: transformers models under moving placements."""

from __future__ import annotations

import functools
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import source_check
import torch
import torch.distributed as dist
import transformers as T
import worlds

import moeless_opt.runtime.engines.transformers as engine
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.engines.observe import record_sources
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.home import NodeHome

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2)
    ),
    "qwen3": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**SMALL, moe_intermediate_size=48, head_dim=16, num_experts=8, num_experts_per_tok=3)
    ),
    "phimoe": lambda: T.PhimoeForCausalLM(
        T.PhimoeConfig(
            **SMALL, num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True
        )
    ),
    "deepseek": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(
            **(SMALL | {"num_key_value_heads": 4}),
            moe_intermediate_size=48,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            q_lora_rank=32,
            kv_lora_rank=24,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
    ),
    "gptoss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**SMALL, head_dim=16, num_local_experts=8, num_experts_per_tok=2)
    ),
}


def main() -> None:
    rank, size = worlds.join()
    out = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.1)
        model.set_experts_implementation("eager")
        x = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            want = model(x).logits
        # As with GPUs, for some: a share of the home copies on each rank; detach brings the stacks together.
        engine.shares_home = lambda device, shared=name in ("qwen3", "gptoss"): shared
        live = attach(model, checksums=True)
        rng = np.random.default_rng(5)
        worst = 0.0
        moved = 0
        for _ in range(4):
            with torch.no_grad():
                worst = max(worst, (model(x).logits - want).abs().max().item())
            number = live.apply(worlds.random_slots(rng, len(live.banks), size))
            live.settle()
            moved += live.migration(number).bytes
        assert moved > 0 or size == 1
        if name == "deepseek":  # whose first layer is dense
            live.observe()
            with torch.no_grad():
                model(x)
            load_LE = live.observe().load_LE
            assert load_LE.sum() == 2 * size * x.numel()
            run = torch.no_grad()(functools.partial(model, x))
            source_check.check(live, run, torch.arange(x.numel()) < 20, load_LE)
        live.detach()
        with torch.no_grad():
            after = (model(x).logits - want).abs().max().item()
        t = torch.tensor([worst, after])
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        out[name] = t.tolist()
    live = attach(model, checksums=True, timeout=20.0)
    guard = Guard(live, grace=1.0)

    def step() -> torch.Tensor:
        if rank == size - 1:
            live.dispatchers[1].on_batch.append(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with torch.no_grad():
            logits: torch.Tensor = model(x).logits
        return logits

    with record_sources(live) as recorder:
        out["survivor"] = [(guard.run(step) - want).abs().max().item(), 0.0]
    assert recorder.load_LE.sum() == 2 * len(live.layers) * x.numel()  # once, though the pass was repeated
    assert live.group.size == size - 1
    assert guard.recoveries[0].restored_bytes > 0
    assert isinstance(live.home, NodeHome)
    assert live.home.share == [4, 5, 6, 7]
    worlds.report(out)


if __name__ == "__main__":
    main()
