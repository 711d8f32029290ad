"""Starts real processes for the runtime's tests, and what these processes share.

A test calls `run_world("worker_x.py", ranks)`: so many processes run the script, each with a gloo group among
them; the launcher hosts the store (as torchrun does), so that any rank may die. Scripts assert for
themselves: a world passes when every process ends well.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_world(
    script: str, ranks: int, *arguments: str, expect_killed: int | None = 0, timeout: float = 240.0
) -> list[Any]:
    """Run a script in `ranks` processes; returns what each rank handed to `report` (None if nothing).

    `expect_killed`: how many end by SIGKILL; None: any number.

    One process imports torch and megatron-core and forks the ranks: importing takes longer than most tests.
    """
    import torch.distributed as dist

    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
    )
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "WORLD_SIZE": str(ranks),
            "STORE_PORT": str(store.port),
            "WORLD_FOLDER": folder,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}",
            "TORCHDYNAMO_DISABLE": "1",
        }
        command = [sys.executable, "-W", "ignore", __file__, str(timeout), str(HERE / script), *arguments]
        leader = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        codes = json.loads(leader.stdout.splitlines()[-1]) if leader.returncode == 0 else []
        killed = codes.count(-9) if expect_killed is None else expect_killed
        wanted = [-9] * killed + [0] * (ranks - killed)
        if sorted(codes) != wanted:
            logs = [
                f"--- rank {r}: {path.read_text()[-4000:]}"
                for r, path in enumerate(sorted(Path(folder).glob("log*")))
            ]
            raise AssertionError(
                "\n".join([f"exit codes {codes}, wanted {wanted}", leader.stderr[-4000:], *logs])
            )
        results = [Path(folder) / f"result{r}.json" for r in range(ranks)]
        return [json.loads(path.read_text()) if path.exists() else None for path in results]


def lead(timeout: float, script: str, *arguments: str) -> list[int]:
    """Import what is heavy, fork the ranks, and wait for them; returns their exit codes."""
    for heavy in ("engines.attach", "engines.observe"):
        importlib.import_module(f"moeless_opt.runtime.{heavy}")
    size = int(os.environ["WORLD_SIZE"])
    running: dict[int, int] = {}
    codes = [-1] * size
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = str(rank)
            log = os.open(f"{os.environ['WORLD_FOLDER']}/log{rank}", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = [script, *arguments]
            failed = 1
            try:
                runpy.run_path(script, run_name="__main__")
                failed = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                # Not the interpreter's own end: a thread may wait in gloo for a rank that is gone.
                os._exit(failed)
        running[child] = rank
    deadline = time.monotonic() + timeout
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            if codes.count(1) and running:
                deadline = min(deadline, time.monotonic() + 5)  # let the others tell their story
        elif time.monotonic() > deadline:
            for late in list(running):
                os.kill(late, signal.SIGKILL)
                os.waitpid(late, 0)
                codes[running.pop(late)] = 124
        else:
            time.sleep(0.02)
    return codes


# ------------------------------------------------------------------------------------- inside a process


def report(value: Any) -> None:
    """Hand a value to the test."""
    final = Path(os.environ["WORLD_FOLDER"], f"result{os.environ['RANK']}.json")
    draft = final.with_suffix(".part")
    draft.write_text(json.dumps(value))
    draft.rename(final)  # a rank may be killed at any moment


def join(expert_parallel: int | None = None, timeout: float = 120.0, **more: int) -> tuple[int, int]:
    """Enter the world and make megatron's groups; returns rank and size."""
    import torch
    import torch.distributed as dist

    from moeless_opt.runtime.checkpoint.parts import ensure_model_parallel

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        "127.0.0.1",
        int(os.environ["STORE_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=timeout),
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    ensure_model_parallel(expert_parallel, **more)
    return rank, size


EXPERTS, HIDDEN, EXPERT_WIDTH, VOCAB = 8, 64, 96, 256


def tiny_config(layers: int = 3, topk: int = 2, dtype: Any = None, **more: Any) -> Any:
    """A small model's configuration."""
    import torch

    from moeless_opt.runtime.checkpoint.parts import (
        TransformerConfig,
        neutral_config_fields,
        parallel_state,
        quiet_config,
    )

    dtype = dtype or torch.float32
    return quiet_config(
        TransformerConfig,
        **neutral_config_fields(
            **{
                "num_layers": layers,
                "hidden_size": HIDDEN,
                "num_attention_heads": 4,
                "num_moe_experts": EXPERTS,
                "moe_router_topk": topk,
                "moe_ffn_hidden_size": EXPERT_WIDTH,
                "ffn_hidden_size": 96,
                "add_bias_linear": False,
                "gated_linear_unit": True,
                "activation_func": torch.nn.functional.silu,
                "normalization": "RMSNorm",
                "moe_router_load_balancing_type": "none",
                "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
                "params_dtype": dtype,
                "bf16": dtype is torch.bfloat16,
            }
            | more
        ),
    )


def row_exact(kind: type[Any]) -> type[Any]:
    """A linear layer that pads and cuts its rows: what a row gives does not depend on how many there are."""
    import torch

    from moeless_opt.runtime.live.rows import default_row_block

    class RowExact(kind):  # type: ignore[misc,valid-type]
        def forward(self, input_: Any, *rest: Any, **named: Any) -> Any:
            outer, inner = self.weight.shape
            # One block for both products of an expert, as `attach` finds it.
            kinds = [(EXPERT_WIDTH, HIDDEN), (HIDDEN, 2 * EXPERT_WIDTH), (inner, outer)]
            block = default_row_block(torch.device("cpu"), [(*k, input_.dtype) for k in kinds])
            missing = -input_.size(0) % block.rows
            padded = torch.nn.functional.pad(input_, (0, 0, 0, missing)) if missing else input_
            done = [
                super(RowExact, self).forward(x, *rest, **named)
                for x in torch.split(padded, block.most or len(padded))
            ]
            return torch.cat([out for out, _ in done])[: input_.size(0)], done[0][1]

    return RowExact


def tiny_model(
    layers: int = 3, topk: int = 2, dtype: Any = None, exact: bool = False, spec_of: Any = None, **more: Any
) -> Any:
    """A small megatron-core model whose weights do not depend on the number of ranks.

    exact : expert layers pad their rows, so that the stock bank, too, gives the same bits for any batch size.
    """
    import torch

    from moeless_opt.runtime.checkpoint.parts import build_gpt, cpu_capable_layer_spec, expert_linears

    config = tiny_config(layers, topk, dtype, **more)
    spec = (spec_of or cpu_capable_layer_spec)(config)
    if exact:
        for layer in spec.layer_specs:
            linears = expert_linears(layer)
            linears.linear_fc1 = row_exact(linears.linear_fc1)
            linears.linear_fc2 = row_exact(linears.linear_fc2)
    model = build_gpt(config, VOCAB, 128, layer_spec=spec)
    seed_weights(model)
    return model.to(dtype or torch.float32)


def seed_weights(model: Any) -> None:
    """Weights by layer, logical expert and name."""
    import zlib

    import torch

    from moeless_opt.runtime.checkpoint.parts import parallel_state

    local = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * local
    with torch.no_grad():
        for name, p in model.named_parameters():
            key = name
            if ".local_experts." in name:
                head, tail = name.split(".local_experts.")
                index, rest = tail.split(".", 1)
                key = f"{head}.expert.{first + int(index)}.{rest}"
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            if p.dim() > 1:
                scale = 0.5 if "router" in key else 0.15
                p.copy_(torch.randn(p.shape, generator=generator) * scale)


def batch(rank: int, step: int = 0, sequences: int = 2, length: int = 24, skew: int = 3) -> Any:
    """Tokens of a rank: skewed, and different for every rank and step."""
    import torch

    generator = torch.Generator().manual_seed(1000 + rank + 97 * step)
    return (torch.rand(sequences, length, generator=generator) ** skew * VOCAB).long().clamp(max=VOCAB - 1)


def forward(model: Any, tokens: Any) -> Any:
    """Logits."""
    import torch

    from moeless_opt.runtime.checkpoint.parts import causal_positions

    with torch.no_grad():
        return model(tokens, causal_positions(tokens), None)


def random_slots(
    rng: Any, layers: int, ranks: int, experts: int = EXPERTS, extra: int = 4, empty: int | None = None
) -> Any:
    """A random valid placement: uneven, some experts several times, perhaps a rank without any."""
    import numpy as np

    from moeless_opt.runtime.live.slots import rows_to_slots

    width = experts
    out = []
    for _ in range(layers):
        usable = [g for g in range(ranks) if g != empty]
        rows: list[list[int]] = [[] for _ in range(ranks)]
        for e in rng.permutation(experts).tolist():
            rows[usable[int(rng.integers(len(usable)))]].append(e)
        for _ in range(int(rng.integers(0, extra + 1))):
            g, e = usable[int(rng.integers(len(usable)))], int(rng.integers(experts))
            if e not in rows[g]:
                rows[g].append(e)
        out.append(rows_to_slots(rows, width))
    return np.stack(out)


if __name__ == "__main__":
    print(json.dumps(lead(float(sys.argv[1]), *sys.argv[2:])))
