"""Print what serving costs and gives under each policy, and the engine beside `transformers`.

``python tests/benchmarks/serve_table.py [--ranks 4] [--seconds 40] [--rate 1.5] [--data DIR]``

One engine serves the same requests once under each policy, from static placement on. They come in bursts
(the Azure trace's conversation arrivals where ``DIR/requests`` has them, else a Poisson process whose
rate is drawn anew every two seconds from a log-normal distribution), and halfway the texts change from
code and English to Russian, Chinese and proofs. Beside them, greedy requests run whose answers are
compared with the un-batched, un-cached model. Columns:

- tok/s, TTFT and TPOT (ms; median and 99th percentile), as the front sees them
- makespan: rows of a layer's fullest rank over those of the mean one, summed over all layers and passes: what
  a pass waits for where every rank has a processor of its own (ranks that share them gain no time)
- imbalance: the same of windows of sixteen passes, mean over layers and reports
- passes; plans, MB: applied, and moved
- GB*s of experts under each charging rule (docs/simulator.md), from the first request to the end of the last
- same: greedy answers that are those of the model alone

``--engine``: tokens per second of this engine and of `transformers` generate (static batch, padded), same
weights, one process, one thread, on the GPU if there is one (or as ``--device`` says; there in
bfloat16), greedy, 1, 8 and 32
requests at once, of equal lengths and (uneven) of a quarter to all of it.
``--kill``: requests under way while a rank is killed.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeless_opt.problems.io import read_arrivals
from moeless_opt.report import table
from moeless_opt.runtime.serve import Emitted, EngineBusyError, Planning, Sampling, ServeRequest
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet
from moeless_opt.runtime.tiny_moe import model as tiny

TRACE = "requests/AzureLLMInferenceTrace_conv_2023.csv.gz"
RULES = ("resident", "passes", "functions")
BEFORE, AFTER = ("code", "english"), ("russian", "chinese", "proofs")
POLICIES: dict[str, dict[str, Any]] = {
    "static EP": {"policy": "static"},
    "EPLB": {"policy": "eplb"},
    "windowed": {"policy": "windowed"},
    # Elastic experts last: a model stays elastic, and is charged as such.
    "MoEless": {"policy": "moeless", "keep_alive": 5.0},
    "per layer": {"policy": "per-layer", "keep_alive": 5.0},
}


class Clients:
    """Sends requests and keeps the times of what comes back."""

    def __init__(self, engine: Fleet) -> None:
        self.engine = engine
        self.sent: dict[str, float] = {}
        self.came: dict[str, list[tuple[float, Emitted]]] = {}
        self.refused = 0
        self._left = 0
        self._over = threading.Condition()

    def send(self, name: str, prompt: list[int], rule: Sampling) -> None:
        self.sent[name], self.came[name] = time.perf_counter(), []
        with self._over:
            self._left += 1
        try:
            self.engine.submit(ServeRequest(id=name, prompt=tuple(prompt), sampling=rule), self.take)
        except EngineBusyError:
            self.refused += 1
            self.came.pop(name)
            with self._over:
                self._left -= 1

    def take(self, emitted: Emitted) -> None:
        self.came[emitted.request].append((time.perf_counter(), emitted))
        if emitted.finish is not None:
            with self._over:
                self._left -= 1
                self._over.notify_all()

    def wait(self, seconds: float = 600) -> None:
        with self._over:
            assert self._over.wait_for(lambda: not self._left, seconds), "requests are left"

    def tokens(self, name: str) -> list[int]:
        return [e.token for _, e in self.came[name] if e.token is not None]

    def figures(self) -> list[str]:
        """Tokens per second, TTFT and TPOT."""
        first, each = [], []
        for name, came in self.came.items():
            stamps = [at for at, e in came if e.token is not None]
            first.append(stamps[0] - self.sent[name])
            each += np.diff(stamps).tolist()
        tokens = sum(len(came) for came in self.came.values())
        seconds = max(came[-1][0] for came in self.came.values()) - min(self.sent.values())
        percentiles = [np.percentile(x, p) * 1e3 for x in (first, each) for p in (50, 99)]
        return [f"{tokens / seconds:.0f}", *(f"{p:.0f}" for p in percentiles)]


def arrivals(seconds: float, rate: float, data: Path | None, seed: int) -> np.ndarray:
    """Seconds at which requests come."""
    rng = np.random.default_rng(seed)
    if data is not None and (data / TRACE).exists():
        at = np.asarray(read_arrivals(data / TRACE).time_R, dtype=np.float64)
        at = (at - at[0]) * (len(at) / (at[-1] - at[0])) / rate  # the trace's own bursts at the wanted rate
        at = at[len(at) // 3 :] - at[len(at) // 3]
        return at[at < seconds]
    out, now = [], 0.0
    while now < seconds:
        here = rate * rng.lognormal(-0.32, 0.8)
        out += (now + np.sort(rng.uniform(0, 2, rng.poisson(2 * here)))).tolist()
        now += 2
    return np.array([x for x in out if x < seconds])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What the model says alone, without cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            inputs = torch.tensor([tokens])
            tokens.append(int(model(inputs, torch.arange(len(tokens))[None], None)[0, -1].argmax()))
    return tokens[len(prompt) :]


def play(engine: Fleet, at: np.ndarray, seconds: float, probes: dict[str, list[int]], length: int) -> Clients:
    """One run of the traffic; greedy probes come with it, evenly."""
    clients, began = Clients(engine), time.perf_counter()
    events = [(t, f"r{i}") for i, t in enumerate(at)]
    events += [(seconds * (i + 0.5) / len(probes), name) for i, name in enumerate(probes)]
    rng = np.random.default_rng(1)
    for when, name in sorted(events):
        time.sleep(max(began + when - time.perf_counter(), 0.0))
        if name in probes:
            clients.send(name, probes[name], Sampling(temperature=0, max_tokens=length, ignore_end=True))
            continue
        domains = BEFORE if when < seconds / 2 else AFTER
        openings = tiny.PROMPTS[str(rng.choice(domains))]
        prompt = tiny.encode(str(rng.choice(openings)) * int(rng.integers(1, 4)))[:160]
        rule = Sampling(
            seed=int(name[1:]), max_tokens=int(np.clip(rng.lognormal(3, 0.6), 4, 96)), ignore_end=True
        )
        clients.send(name, prompt, rule)
    clients.wait()
    return clients


def policies(ranks: int, seconds: float, rate: float, every: int, data: Path | None, only: list[str]) -> None:
    """The table of policies."""
    model, length = tiny.load(), 24
    openings = [tiny.encode(text) for texts in tiny.PROMPTS.values() for text in texts]
    probes = {f"g{i}": prompt for i, prompt in enumerate(openings)}
    wanted = {name: greedy(model, prompt, length) for name, prompt in probes.items()}
    at = arrivals(seconds, rate, data, 7)
    engine = Fleet(EngineOptions(ranks=ranks, planning=Planning(policy="static", every=every)))
    began = time.perf_counter()
    engine.start()
    print(f"{ranks} ranks, {len(at)} requests in {seconds:g} s, start {time.perf_counter() - began:.1f} s")
    rows: list[list[str]] = [
        ["", "tok/s", "TTFT 50", "99", "TPOT 50", "99", "makespan", "imbalance", "passes", "plans", "MB"]
        + [f"GBs {rule}" for rule in RULES]
        + ["same"]
    ]
    try:
        static = engine.plan() if ranks > 1 and settled(engine) else None
        for name, planning in POLICIES.items():
            if (ranks == 1 and name != "static EP") or (only and name not in only):
                continue
            engine.set_planning(policy="static", keep_alive=None)
            if static is not None:
                engine.apply(static)
                time.sleep(1.0)
            engine.set_planning(**({"keep_alive": None} | planning))
            time.sleep(1.0)
            before, stop, seen = engine.status(), threading.Event(), []

            def watch(stop: threading.Event = stop, seen: list[float] = seen) -> None:
                while not stop.wait(0.5):
                    seen.append(float(engine.status().imbalance_L.mean()))

            watcher = threading.Thread(target=watch)
            watcher.start()
            clients = play(engine, at, seconds, probes, length)
            time.sleep(0.6)
            stop.set()
            watcher.join()
            after = engine.status()
            rows_each = after.mean_rows - before.mean_rows
            same = sum(clients.tokens(probe) == wanted[probe] for probe in probes)
            assert same == len(probes), (
                f"{name}: {len(probes) - same} answers are not those of the model alone"
            )
            rows.append(
                [
                    name,
                    *clients.figures(),
                    f"{(after.largest_rows - before.largest_rows) / max(rows_each, 1e-9):.3f}",
                    f"{np.mean(seen):.3f}",
                    str(after.passes - before.passes),
                    str(after.plans - before.plans),
                    f"{(after.bytes_moved - before.bytes_moved) / 1e6:.1f}",
                    *(f"{after.cost[rule][0] - before.cost[rule][0]:.3f}" for rule in RULES),
                    f"{same}/{len(probes)}" + (f" ({clients.refused} refused)" if clients.refused else ""),
                ]
            )
            print(rows[-1], flush=True)
    finally:
        engine.close()
    print(table(rows[0], rows[1:], words_last=False))


def settled(engine: Fleet) -> bool:
    """Serve something, so that there is a report."""
    clients = Clients(engine)
    clients.send("first", tiny.encode("a"), Sampling(max_tokens=20, ignore_end=True))
    clients.wait()
    time.sleep(0.6)
    return True


def as_transformers(model: Any) -> Any:
    """The small model as a Qwen3-MoE of `transformers`, with the same weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    size, heads = tiny.HIDDEN, tiny.HEADS
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=size,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size // heads,
        moe_intermediate_size=tiny.EXPERT_WIDTH,
        intermediate_size=tiny.EXPERT_WIDTH,
        num_experts=tiny.EXPERTS,
        num_experts_per_tok=tiny.TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=tiny.MAX_LENGTH,
        rms_norm_eps=model.config.layernorm_epsilon,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=tiny.START,
        eos_token_id=tiny.VOCABULARY - 1,
        pad_token_id=tiny.VOCABULARY - 1,
    )
    made = Qwen3MoeForCausalLM(config).eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(named["embedding.word_embeddings.weight"])
        made.model.norm.weight.copy_(named["decoder.final_layernorm.weight"])
        for number, layer in enumerate(made.model.layers):
            at = f"decoder.layers.{number}."
            attention = layer.self_attn
            qkv = named[f"{at}self_attention.linear_qkv.weight"].view(heads, 3, -1, size)
            for place, part in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                part.weight.copy_(qkv[:, place].reshape(size, size))
            for part, name in (
                (attention.o_proj, "self_attention.linear_proj"),
                (attention.q_norm, "self_attention.q_layernorm"),
                (attention.k_norm, "self_attention.k_layernorm"),
                (layer.input_layernorm, "input_layernorm"),
                (layer.post_attention_layernorm, "pre_mlp_layernorm"),
                (layer.mlp.gate, "mlp.router"),
            ):
                part.weight.copy_(named[f"{at}{name}.weight"])
            for expert in range(tiny.EXPERTS):
                experts = f"{at}mlp.experts.local_experts.{expert}"
                layer.mlp.experts.gate_up_proj[expert].copy_(named[f"{experts}.linear_fc1.weight"])
                layer.mlp.experts.down_proj[expert].copy_(named[f"{experts}.linear_fc2.weight"])
    return made


def beside_transformers(length: int, rounds: int, device: str) -> None:
    """Tokens per second of both, one after the other in every round; the best of the rounds counts."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if device == "cpu" else "bfloat16"
    print(torch.cuda.get_device_name() if device == "cuda" else device, dtype)
    other = as_transformers(tiny.load()).to(device, getattr(torch, dtype))
    engine = Fleet(EngineOptions(max_running=64, prefix_cache=False, device=device, dtype=dtype))
    engine.start()
    openings = [tiny.encode(text) for texts in tiny.PROMPTS.values() for text in texts]
    # Sixteen openings, and the same behind a few bytes of their own.
    prompts = openings + [[tiny.START, 65 + i, *opening[1:]] for i, opening in enumerate(openings)]
    pad = tiny.VOCABULARY - 1
    rows = [
        ["requests", "engine tok/s", "transformers tok/s", "ratio", "CPU s: engine", "transformers", "same"]
    ]
    try:
        for count, even in ((1, True), (8, True), (32, True), (8, False), (32, False)):
            chosen = prompts[:count]
            widest = max(map(len, chosen))
            ids = torch.tensor([[pad] * (widest - len(p)) + p for p in chosen], device=device)
            mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in chosen], device=device)
            ours, theirs, cpu_ours, cpu_theirs, same = [], [], [], [], 0
            # Each request its own length: a static batch runs until the longest has ended.
            lengths = [length if even else length * (1 + i % 4) // 4 for i in range(count)]
            for _ in range(rounds):
                clients, began, used = Clients(engine), time.perf_counter(), time.process_time()
                for number, prompt in enumerate(chosen):
                    rule = Sampling(temperature=0, max_tokens=lengths[number], ignore_end=True)
                    clients.send(str(number), prompt, rule)
                clients.wait()
                ours.append(time.perf_counter() - began)
                cpu_ours.append(time.process_time() - used)
                began, used = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    out = other.generate(
                        ids,
                        attention_mask=mask,
                        max_new_tokens=length,
                        min_new_tokens=length,
                        do_sample=False,
                    )
                theirs.append(time.perf_counter() - began)
                cpu_theirs.append(time.process_time() - used)
                said = [out[i, widest : widest + lengths[i]].tolist() for i in range(count)]
                same = sum(clients.tokens(str(i)) == said[i] for i in range(count))
            made = sum(lengths)
            rows.append(
                [
                    f"{count}{'' if even else ', uneven'}",
                    f"{made / min(ours):.0f}",
                    f"{made / min(theirs):.0f}",
                    f"{min(theirs) / min(ours):.2f}",
                    f"{min(cpu_ours):.2f}",
                    f"{min(cpu_theirs):.2f}",
                    f"{same}/{count}",
                ]
            )
            print(rows[-1], flush=True)
    finally:
        engine.close()
    print(table(rows[0], rows[1:], words_last=False))


def kill(ranks: int) -> None:
    """A rank is killed while requests run: when the next token came, and whether all answers are right."""
    openings = [tiny.encode(text) for texts in tiny.PROMPTS.values() for text in texts]
    rule = Sampling(temperature=0, max_tokens=40, ignore_end=True)
    engine = Fleet(EngineOptions(ranks=ranks, planning=Planning(every=16)))
    engine.start()
    try:
        calm = Clients(engine)
        for number, prompt in enumerate(openings):
            calm.send(str(number), prompt, rule)
        calm.wait()
        clients = Clients(engine)
        for number, prompt in enumerate(openings):
            clients.send(str(number), prompt, rule)
        time.sleep(1.0)
        assert engine._crew is not None
        at = time.perf_counter()
        os.kill(engine._crew.processes[-1].pid, signal.SIGKILL)
        clients.wait()
        stamps = sorted(t for came in clients.came.values() for t, _ in came if t > at)
        gaps = np.diff([at, *stamps])
        ends = [came[-1][1].finish for came in clients.came.values()]
        same = sum(clients.tokens(name) == calm.tokens(name) for name in clients.came)
        status = engine.status()
        print(
            f"{ranks} ranks, the last one killed: longest silence {gaps.max():.2f} s, "
            f"{status.retried} begun anew, ended {sorted(set(ends), key=str)}, "
            f"{same}/{len(openings)} as before, {status.ranks} ranks left"
        )
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--rate", type=float, default=1.5)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=list(POLICIES), help="this policy")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of --engine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(platform.machine(), torch.__version__)
    if options.engine:
        beside_transformers(options.length, options.rounds, options.device)
    elif options.kill:
        kill(options.ranks)
    else:
        policies(options.ranks, options.seconds, options.rate, options.every, options.data, options.only)


if __name__ == "__main__":
    main()
