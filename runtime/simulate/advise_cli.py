"""``moeless-advise``: from a model, GPUs and loads to what an engine is to be told, and why.

Exit codes: 0 fine, 1 nothing fits, 2 bad input, 3 a package is missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, number, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io import read_arrivals
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.spec import ModelSpec
from moeless_opt.report import table
from moeless_opt.runtime.simulate.advise import Advice, Deployment, Offered, advise
from moeless_opt.runtime.simulate.hardware import GPUS, topology_of
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import machine_of
from moeless_opt.runtime.simulate.traffic import RoutingModel
from moeless_opt.signals import Signals
from moeless_opt.terminal import guarded

__all__ = ["main", "traffic_of"]

STRETCHES = 4
"""Stretches of generated traffic."""

VLLM_MOST = 1023
"""Redundant experts that vLLM's tables have room for."""

MOST_STRETCHES = 8
"""Stretches of a recording; of one with more steps consecutive ones are summed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body(signals: Signals) -> int:
        return _run(_parser().parse_args(argv))

    return guarded("moeless-advise", body)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moeless-advise", description=__doc__.splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a preset, or a config.json")
    add(
        "--topology",
        metavar="NAME",
        help="as of moeless-simulate: 8xA6000, 4x8xH100, a file (default 8xA6000)",
    )
    add("--gpu", metavar="NAME", help="data sheet for the times; by default what --topology says")
    add("--timings", metavar="FILE", help="measured expert kernel times, instead of a roofline")
    add("--timed", metavar="HxF", help="hidden and inner width of the expert that was timed")
    add(
        "--memory",
        type=float,
        metavar="GB",
        help="of a GPU for weights and KV cache (default 95%% of the sheet)",
    )
    add("--loads", metavar="FILE", help="a recording of expert loads, in any format that moeless-solve reads")
    add("--rate", type=float, metavar="R", help="requests per second (default: as many as can be served)")
    add("--arrivals", metavar="FILE", help="a request trace: rate and lengths from there")
    add("--prompt", type=float, metavar="N", help="tokens of a prompt, mean (default 1024)")
    add("--answer", type=float, metavar="N", help="tokens of an answer, mean (default 256)")
    add("--most-requests", type=int, default=256, metavar="N", help="in flight on a GPU (default 256)")
    add("--seed", type=int, metavar="SEED", help="of generated loads (default 0)")
    add("--json", action="store_true", help="the result as JSON on standard output")
    return parser


def _shares(model: ModelSpec, loads: str | None, seed: int) -> tuple[FloatArray, float, str]:
    """Shares of the experts in stretches of time [T, L, E], how much requests are alike, and the source."""
    spread = RoutingModel.fit(tiny_moe_traces())
    alike = spread.concentration * model.experts / spread.popularity_DLE.shape[2]
    if loads is None:
        routing = spread.like(model.layers, model.experts, model.top_k, seed=seed)
        rng = np.random.default_rng(seed)
        # A stretch holds some requests of each domain, in proportions of its own.
        stretches = []
        for _ in range(STRETCHES):
            domain_R = routing.requests(64, rng)
            stretches.append(routing.distributions(domain_R, rng).mean(0, dtype=np.float64))
        return np.stack(stretches), alike, "generated with the spread of the tiny MoE's (assumed)"
    load_TLE = read_loads(loads).load_TLE
    if load_TLE.shape[1:] != (model.layers, model.experts):
        raise ProblemError(
            "--loads",
            f"{loads} has {load_TLE.shape[1]} layers of {load_TLE.shape[2]} experts, {model.name} has "
            f"{model.layers} of {model.experts}",
        )
    steps = len(load_TLE)
    if steps > MOST_STRETCHES:
        load_TLE = np.stack([part.sum(0) for part in np.array_split(load_TLE, MOST_STRETCHES)])
    total_TL1 = load_TLE.sum(2, keepdims=True)
    share_TLE = np.where(total_TL1 > 0, load_TLE / np.maximum(total_TL1, 1e-300), 1.0 / model.experts)
    # No expert is chosen twice by a token.
    share_TLE = np.minimum(share_TLE, 1.0 / model.top_k)
    share_TLE /= share_TLE.sum(2, keepdims=True)
    source = f"{loads}, requests as unlike each other as the tiny MoE's (assumed)"
    if len(share_TLE) == 1:
        return np.repeat(share_TLE, 2, axis=0), alike, f"{source}; one scenario: no drift is seen"
    pooled = "" if steps == len(share_TLE) else f", summed to {len(share_TLE)} in their order"
    source += f"; {steps} scenarios{pooled}, each served by the plan of the one before"
    return share_TLE, alike, source


def traffic_of(
    model: ModelSpec,
    *,
    loads: str | None = None,
    arrivals: str | None = None,
    rate: float | None = None,
    prompt: float | None = None,
    answer: float | None = None,
    most_requests: int = 256,
    seed: int | None = None,
) -> Offered:
    """Offered from what a command line says."""
    if arrivals is not None:
        for name, value in (("--rate", rate), ("--prompt", prompt), ("--answer", answer)):
            if value is not None:
                raise ProblemError(name, f"is {value:g}, but --arrivals says it")
        trace = read_arrivals(arrivals)
        span = trace.seconds - float(trace.time_R[0])
        if span <= 0:
            raise ProblemError("--arrivals", f"{arrivals} has no two requests at different times: no rate")
        rate = (trace.requests - 1) / span
        prompt_R, answer_R = np.maximum(trace.prompt_R, 1.0), np.maximum(trace.output_R, 1.0)
    else:
        prompt_R = np.array([1024.0 if prompt is None else number("--prompt", prompt, low=1)])
        answer_R = np.array([256.0 if answer is None else number("--answer", answer, low=1)])
    if rate is not None:
        number("--rate", rate, open_low=True)
    whole("--most-requests", most_requests, low=1)
    if loads is not None and seed is not None:
        raise ProblemError("--seed", f"is {seed}, but it is for generated loads, and --loads has others")
    share_TLE, concentration, source = _shares(model, loads, whole("--seed", seed or 0))
    prompt, answer = float(prompt_R.mean()), float(answer_R.mean())
    return Offered(
        share_TLE=share_TLE,
        prompt=prompt,
        answer=answer,
        reserved=float(np.average(prompt_R + answer_R, weights=answer_R)),
        held=float(np.average(prompt_R + answer_R / 2, weights=answer_R)),
        rate=rate,
        most_requests=most_requests,
        concentration=concentration,
        source=source,
    )


def _two(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        hidden, inner = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ProblemError("--timed", f"is {text!r}, must be HIDDENxFFN") from None
    return hidden, inner


def _memory(memory: float | None, machine: Machine) -> float | None:
    """GB of a GPU: as asked for, else as the topology says."""
    most = GPUS[machine.gpu].memory / 1e9
    if memory is not None and memory > most:
        raise ProblemError("--memory", f"is {memory:g}, but an {machine.gpu} has {most:g} GB")
    given_G = machine.topology.memory_G
    return memory if memory is not None or given_G is None else float(np.min(given_G)) / 1e9


def _run(options: argparse.Namespace) -> int:
    scenario = Scenario(
        model=options.model,
        topology=options.topology,
        gpu=options.gpu,
        timings=options.timings,
        timed=_two(options.timed),
        memory=options.memory,
        policies=("static",),
    )
    machine = machine_of(scenario)
    traffic = traffic_of(
        machine.model,
        loads=options.loads,
        arrivals=options.arrivals,
        rate=options.rate,
        prompt=options.prompt,
        answer=options.answer,
        most_requests=options.most_requests,
        seed=options.seed,
    )
    slots_G = machine.topology.slots_G
    own = options.topology is not None and topology_of(options.topology, machine.gpu)[1]
    found = advise(
        machine,
        traffic,
        memory=_memory(options.memory, machine),
        most_slots=None if slots_G is None or not own else int(slots_G.min()),
    )
    if options.json:
        print(json.dumps(document(found), indent=1))
        return 0
    _print(found, machine, traffic)
    return 0


def document(found: Advice) -> dict[str, Any]:
    """The advice for programs."""
    entry = asdict(found)
    entry["model"] = found.model.name
    for name in ("best", "static", "engine"):
        entry[name]["gpu_hours"] = getattr(found, name).gpu_hours
    for name in ("best", "engine"):
        entry[name]["every"] = getattr(found, name).every
    return {"format": "moeless-advice", "version": 1, **entry, "flags": flags(found)}


def flags(found: Advice) -> dict[str, str]:
    """What each engine is told, ready to paste: one group of the best that engines do by themselves."""
    told = found.engine
    vllm = [f"--data-parallel-size {told.width}", "--enable-expert-parallel"]
    sglang = [
        f"--tp-size {told.width}",
        f"--dp-size {told.width}",
        "--enable-dp-attention",
        f"--ep-size {told.width}",
    ]
    tensorrt = [
        f"tensor_parallel_size: {told.width}",
        f"moe_expert_parallel_size: {told.width}",
        "enable_attention_dp: true",
    ]
    if told.width == 1:
        vllm, sglang, tensorrt = ["--data-parallel-size 1"], ["--tp-size 1"], ["tensor_parallel_size: 1"]
    if told.nodes > 1:  # addresses and ranks of nodes are for who starts them
        vllm.insert(1, f"--data-parallel-size-local {told.width // told.nodes}")
        sglang.append(f"--nnodes {told.nodes}")
    if told.split != "static":
        config = {
            "num_redundant_experts": told.redundant,
            "window_size": told.every,
            "step_interval": told.every,
        }
        vllm += ["--enable-eplb", f"--eplb-config {shlex.quote(json.dumps(config))}"]
        sglang += [
            "--enable-eplb",
            f"--ep-num-redundant-experts {told.redundant}",
            f"--eplb-rebalance-num-iterations {told.every}",
        ]
        tensorrt += [
            "moe_config:",
            "  load_balancer:",
            f"    num_slots: {told.slots * told.width}",
            "    layer_updates_per_iter: 1",
        ]
    if told.redundant > VLLM_MOST:
        vllm = [f"# takes at most {VLLM_MOST:,} redundant experts, not {told.redundant:,}"]
    return {"vllm": " ".join(vllm), "sglang": " ".join(sglang), "tensorrt-llm": "\n".join(tensorrt)}


def _print(found: Advice, machine: Machine, traffic: Offered) -> None:
    best = found.best
    gpus = machine.topology.gpus
    print(f"{found.model.name} on {gpus} {_plural(gpus, machine.gpu)}; loads: {traffic.source}")
    print(
        f"prompts of {traffic.prompt:,.5g} tokens, answers of {traffic.answer:,.5g}; times: {machine.basis}\n"
    )
    head = ["", "GPUs a group", "groups", "slots", "redundant", "split", "experts GB", "cache tokens"]
    head += ["requests", "imbal.", "ms/token", "prompt s", "tokens/s", "GPU h/M"]
    cells = []
    for choice in found.choices:
        is_best = (choice.width, choice.slots) == (best.width, best.slots)
        shown = best if is_best else choice
        cells.append(
            [
                "advised" if is_best else "",
                str(shown.width),
                str(shown.groups),
                str(shown.slots),
                str(shown.redundant),
                shown.split,
                f"{shown.expert_bytes / 1e9:.1f}",
                f"{shown.cache_tokens:,.0f}",
                f"{shown.requests:,.0f}",
                f"{shown.imbalance:.3f}",
                f"{shown.token_s * 1e3:.3g}",
                f"{shown.first_s:.3g}",
                f"{shown.capacity:,.0f}",
                f"{shown.gpu_hours:.3g}",
            ]
        )
    print(table(head, cells, words_last=False))
    print()
    for reason in found.reasons:
        print(f"- {reason}")
    print("- " + _replanned(best, found.keep_alive))
    for choice in found.replans:
        print(
            f"    {_how(choice)}: {choice.capacity:,.0f} tokens/s, {choice.moved:.1%} of the replicas move, "
            f"{choice.interval:.0f} s between plans at the soonest"
        )
    engine = found.engine
    if engine != best:
        print(
            f"- engines by themselves share evenly; the best of that: {engine.width} GPUs a group, "
            f"{engine.redundant} redundant experts: {engine.capacity:,.0f} tokens/s "
            f"({engine.capacity / best.capacity - 1:+.1%}), {engine.token_s * 1e3:.3g} ms a token "
            f"({engine.token_s / best.token_s - 1:+.1%}), planned every {engine.interval:.0f} s "
            f"({engine.every:,} passes). {_WHO[best.split]}"
        )
    copies = f", {engine.groups} such" if engine.groups > 1 else ""
    print(
        f"\nEngines: groups of {engine.width} {_plural(engine.width, 'GPU')} on {engine.nodes} "
        f"{_plural(engine.nodes, 'node')}{copies}"
    )
    for name, text in flags(found).items():
        print(f"\n{name}:\n  " + text.replace("\n", "\n  "))


_WHO = {
    "static": "",
    "equal": "",
    "fractional": "Fractional shares take moeless_opt's plug-in for vLLM, or its runtime",
    "live": "Live shares take moeless_opt's runtime",
}


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _how(choice: Deployment) -> str:
    return "made anew" if choice.tolerance is None else f"from what is live, tolerance {choice.tolerance:g}"


def _replanned(best: Deployment, keep_alive: float) -> str:
    """When and how plans are made."""
    if best.split == "static":
        return "no balancer: leave it off"
    how = "" if best.tolerance is None else f" {_how(best)}, every slot full (fill distinct),"
    return (
        f"plan{how} every {best.interval:.0f} s (about {best.every:,} passes): moving weights "
        f"({best.moved:.1%} of the replicas) takes at most a twentieth of the time; a replica that serves "
        f"nothing goes after {keep_alive:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
