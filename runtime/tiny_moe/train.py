"""Train the tiny MoE: ``python -m moeless_opt.runtime.tiny_moe.train --cache FOLDER``.

One core, about an hour. Fetches the text (`tiny_moe_corpus`), trains with AdamW on mixed batches (every
window comes from a random domain), evaluates on held-out text, and writes the weights, the record of the
training and the routing traces. Every step's batch follows from the seed and the step alone, so that a run
resumed from its last checkpoint is the run that was not interrupted.

The auxiliary load-balancing loss [1]_ is a tenth of what is usual: enough to keep experts alive, too little
to flatten what the text makes uneven.

References
----------
.. [1] Fedus, Zoph, Shazeer: Switch Transformers, 2021, section 2.2.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces, tiny_moe_traces_file
from moeless_opt.runtime.checkpoint import causal_positions
from moeless_opt.runtime.tiny_moe import model as tiny_moe
from moeless_opt.runtime.tiny_moe.corpus import DOMAINS, Corpus, build_corpora

SEED, STEPS = 20_240_607, 5000
WINDOW, BATCH = 256, 8
PEAK_RATE, WARM_UP, DECAY_FROM = 2e-3, 100, 0.7
BALANCE, ROUTER_Z = 1e-3, 1e-4


def window_batch(corpora: dict[str, Corpus], step: int) -> torch.Tensor:
    """Draw one step's windows, [BATCH, WINDOW + 1]: the start token, then bytes of a random domain."""
    rng = np.random.default_rng((SEED, step))
    rows = np.full((BATCH, WINDOW + 1), tiny_moe.START, dtype=np.int64)
    for row, domain in zip(rows, rng.choice(len(DOMAINS), size=BATCH), strict=True):
        text = corpora[DOMAINS[domain]].train
        first = int(rng.integers(text.size - WINDOW))
        row[1:] = text[first : first + WINDOW]
    return torch.from_numpy(rows)


def learning_rate(step: int, steps: int) -> float:
    """Warm up, stay, then fall linearly to zero over the last part."""
    left = (steps - step) / (steps * (1 - DECAY_FROM))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, left)


def byte_losses(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return the loss of every byte in nats, [B, S - 1]."""
    inputs, targets = tokens_BS[:, :-1], tokens_BS[:, 1:]
    logits = model(inputs, causal_positions(inputs), None)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def held_out_losses(model: Any, corpora: dict[str, Corpus], windows: int = 64) -> dict[str, float]:
    """Return the mean held-out loss of every domain, in nats per byte, over evenly spaced windows."""
    was_training = model.training
    model.eval()
    losses = {}
    for domain in DOMAINS:
        text = corpora[domain].held_out
        starts = np.linspace(0, text.size - WINDOW - 1, windows).astype(int)
        rows = np.full((windows, WINDOW + 1), tiny_moe.START, dtype=np.int64)
        for row, first in zip(rows, starts, strict=True):
            row[1:] = text[first : first + WINDOW]
        parts = [byte_losses(model, torch.from_numpy(r)) for r in np.split(rows, max(1, windows // 16))]
        losses[domain] = float(torch.cat(parts).mean())
    model.train(was_training)
    return losses


@torch.no_grad()
def expert_skew(model: Any, corpora: dict[str, Corpus]) -> FloatArray:
    """Return max / mean of the expert loads of every layer, on held-out text of all domains."""
    with tiny_moe.record_routes(model) as routes:
        held_out_losses(model, corpora, windows=16)
    chosen_TLK = routes.concatenate()
    load_LE = np.stack(
        [np.bincount(x.ravel(), minlength=tiny_moe.EXPERTS) for x in chosen_TLK.swapaxes(0, 1)]
    )
    return np.asarray(load_LE.max(1) / load_LE.mean(1))


def optimizer_for(model: Any) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def train(corpora: dict[str, Corpus], steps: int, folder: Path, every: int = 250) -> Any:
    """Train for `steps`, resuming from the folder's checkpoint if it has one.

    Parameters
    ----------
    corpora : dict of str to Corpus
        The text.
    steps : int
        Length of the run; the learning rate falls over its last 30 %.
    folder : Path
        Holds ``checkpoint.pt`` and ``log.jsonl``.
    every : int
        Steps between evaluations and checkpoints.

    Returns
    -------
    GPTModel
        The trained model.
    """
    torch.manual_seed(SEED)
    model = tiny_moe.new_model(
        tiny_moe.config(
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=BALANCE,
            moe_z_loss_coeff=ROUTER_Z,
            init_method_std=0.04,
        )
    ).train()
    optimizer = optimizer_for(model)
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"resumed at step {first}", flush=True)
    began, recent = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = byte_losses(model, window_batch(corpora, step)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += float(loss.detach())
        done = step + 1
        if done % 50 == 0:
            print(f"{done} loss {recent / 50:.4f} {time.monotonic() - began:.0f}s", flush=True)
            recent = 0.0
        if done % every == 0 or done == steps:
            held_out = held_out_losses(model, corpora, windows=32)
            line = {
                "step": done,
                "seconds": round(time.monotonic() - began),
                "mean": round(float(np.mean(list(held_out.values()))), 4),
                "held_out": {d: round(x, 4) for d, x in held_out.items()},
                "skew": [round(float(x), 2) for x in expert_skew(model, corpora)],
            }
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            weights = {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}
            state = {"model": weights, "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, folder / "checkpoint.new")
            os.replace(folder / "checkpoint.new", checkpoint)
    return model.eval()


# ------------------------------------------------------------------------------------- what is shipped

REQUESTS_PER_DOMAIN, SHORTEST, LONGEST = 160, 32, 511


def request_lengths(rng: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
    """Draw lengths (log-normal around 256 bytes), and how much of each is prompt (20 to 80 %)."""
    total = np.exp(rng.normal(np.log(256), 0.6, size=count)).clip(SHORTEST, LONGEST).astype(np.int64)
    prompt = (total * rng.uniform(0.2, 0.8, size=count)).astype(np.int64) + 1
    return total, prompt


@torch.no_grad()
def route_texts(model: Any, corpora: dict[str, Corpus]) -> dict[str, NDArray[Any]]:
    """Route held-out texts as requests; return the arrays of `problems.tiny_moe_traces`."""
    rng = np.random.default_rng(SEED)
    experts, lengths, prompts = [], [], []
    for domain in DOMAINS:
        text = corpora[domain].held_out
        for total, prompt in zip(*request_lengths(rng, REQUESTS_PER_DOMAIN), strict=True):
            first = int(rng.integers(text.size - total))
            tokens = torch.tensor([tiny_moe.encode(text[first : first + total].tobytes())])
            with tiny_moe.record_routes(model) as routes:
                model(tokens, causal_positions(tokens), None)
            experts.append(routes.concatenate())
            lengths.append(tokens.size(1))
            prompts.append(int(prompt) + 1)  # with the start token
    return {
        "experts": np.concatenate(experts),
        "offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        "prompt_tokens": np.array(prompts, dtype=np.int64),
        "domain": np.repeat(np.arange(len(DOMAINS), dtype=np.uint8), REQUESTS_PER_DOMAIN),
        "domain_names": np.array(DOMAINS),
    }


def write_traces(arrays: dict[str, NDArray[Any]], file: Path) -> None:
    """Write a compressed .npz that is the same, byte for byte, for the same arrays (no time stamps)."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, 9)


def training_seconds(log: Path) -> int:
    """Add up the time of the runs in a log (the clock starts anew where a run was resumed)."""
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    return sum(a for a, b in zip(seconds, [*seconds[1:], -1], strict=True) if b < a)


def counted_bits(corpus: Corpus, belief: float = 16.0) -> float:
    """Return a yardstick's bits per held-out byte, from counts of what follows each two bytes in training.

    Each order's estimate is drawn towards the next lower order's, as if that had been seen `belief` times.
    """
    train, held_out = corpus.train.astype(np.int64), corpus.held_out.astype(np.int64)
    chance = np.full(held_out.size - 2, 1 / 256)
    for order in range(3):
        # The code of a byte and the `order` bytes before it; the byte itself in the lowest eight bits.
        seen, asked = (
            np.sum([x[2 - j : x.size - j] << (8 * j) for j in range(order + 1)], axis=0)
            for x in (train, held_out)
        )
        count = np.bincount(seen, minlength=256 ** (order + 1))
        context = count.reshape(-1, 256).sum(1)
        chance = (count[asked] + belief * chance) / (context[asked >> 8] + belief)
    return float(-np.log2(chance).mean())


def report(corpora: dict[str, Corpus], steps: int, folder: Path) -> dict[str, Any]:
    """Measure the weights and traces as shipped; return the record of the training."""
    losses = held_out_losses(tiny_moe.load(), corpora, windows=128)
    traces = tiny_moe_traces()
    load_LE, skew_DL, drift_DD = traces.load_LE(), traces.skew_DL(), traces.drift_DD()
    between = drift_DD[~np.eye(len(DOMAINS), dtype=bool)]
    return {
        "model": {
            "layers": tiny_moe.LAYERS,
            "experts": tiny_moe.EXPERTS,
            "top_k": tiny_moe.TOP_K,
            "parameters": sum(p.numel() for p in tiny_moe.load().parameters()),
            "weights_sha256": hashlib.sha256(tiny_moe.data_file(tiny_moe.WEIGHTS).read_bytes()).hexdigest(),
        },
        "training": {
            "seed": SEED,
            "steps": steps,
            "tokens": steps * BATCH * WINDOW,
            "window": WINDOW,
            "batch": BATCH,
            "optimizer": "AdamW, betas 0.9 and 0.98, weight decay 0.1, gradient norm at most 1",
            "learning_rate": PEAK_RATE,
            "schedule": f"{WARM_UP} steps up, constant to {DECAY_FROM:.0%}, then linear to 0",
            "load_balancing_loss": BALANCE,
            "router_z_loss": ROUTER_Z,
            "seconds_one_thread": training_seconds(folder / "log.jsonl"),
            "versions": {name: version(name) for name in ("torch", "megatron-core", "numpy")},
        },
        "corpora": {d: corpora[d].card() for d in DOMAINS},
        "held_out": {
            d: {
                "nats_per_byte": round(loss, 4),
                "bits_per_byte": round(loss / math.log(2), 4),
                "counted_bits_per_byte": round(counted_bits(corpora[d]), 4),
            }
            for d, loss in losses.items()
        },
        "skew_max_over_mean": {
            "all_domains_L": np.round(load_LE.max(1) / load_LE.mean(1), 3).tolist(),
            **{d: np.round(row, 3).tolist() for d, row in zip(DOMAINS, skew_DL, strict=True)},
        },
        "drift_total_variation": {
            "mean_between_domains": round(float(between.mean()), 4),
            "largest_between_domains": round(float(between.max()), 4),
            "mean_within_a_domain": round(float(np.diag(drift_DD).mean()), 4),
            "matrix": np.round(drift_DD, 4).tolist(),
        },
    }


def main() -> None:
    """Run the whole: text, training, weights, traces, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads and checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpora = build_corpora(args.cache / "packages")
    model = train(corpora, args.steps, args.cache)
    for file in (tiny_moe.data_file(tiny_moe.WEIGHTS), tiny_moe_traces_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
    tiny_moe.save(model, tiny_moe.data_file(tiny_moe.WEIGHTS))
    shipped = tiny_moe.load()  # what users get: rounded to bfloat16
    write_traces(route_texts(shipped, corpora), tiny_moe_traces_file())
    record = json.dumps(report(corpora, args.steps, args.cache), indent=1)
    record = re.sub(r"\[[^][]*\]", lambda row: re.sub(r"\s+", " ", row.group()), record)  # rows on one line
    tiny_moe.data_file(tiny_moe.CARD).write_text(record + "\n")
    print(record)


if __name__ == "__main__":
    main()
