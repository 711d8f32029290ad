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

from moeless_opt.problems.arrays import FloatArray, number
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io import read_arrivals
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.spec import ModelSpec
from moeless_opt.report import table
from moeless_opt.runtime.simulate.advise import Advice, Offered, advise
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import machine_of
from moeless_opt.runtime.simulate.traffic import RoutingModel
from moeless_opt.signals import Signals
from moeless_opt.terminal import guarded

__all__ = ["main", "traffic_of"]

STRETCHES = 4
"""Stretches of generated traffic."""


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
    add("--seed", type=int, default=0, metavar="SEED", help="of generated loads")
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
    found = read_loads(loads)
    load_TLE = found.load_TLE
    if load_TLE.shape[1:] != (model.layers, model.experts):
        raise ProblemError(
            "--loads",
            f"{loads} has {load_TLE.shape[1]} layers of {load_TLE.shape[2]} experts, {model.name} has "
            f"{model.layers} of {model.experts}",
        )
    total_TL1 = load_TLE.sum(2, keepdims=True)
    share_TLE = np.where(total_TL1 > 0, load_TLE / np.maximum(total_TL1, 1e-300), 1.0 / model.experts)
    # No expert is chosen twice by a token.
    share_TLE = np.minimum(share_TLE, 1.0 / model.top_k)
    share_TLE /= share_TLE.sum(2, keepdims=True)
    source = f"{loads}, requests as unlike each other as the tiny MoE's (assumed)"
    if len(share_TLE) == 1:
        return np.repeat(share_TLE, 2, axis=0), alike, f"{source}; one scenario: no drift is seen"
    source += f"; {len(share_TLE)} scenarios, each served by the plan of the one before"
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
    seed: int = 0,
) -> Offered:
    """Offered from what a command line says."""
    if arrivals is not None:
        for name, value in (("--rate", rate), ("--prompt", prompt), ("--answer", answer)):
            if value is not None:
                raise ProblemError(name, f"is {value:g}, but --arrivals says it")
        trace = read_arrivals(arrivals)
        rate = trace.requests / max(trace.seconds, 1e-9)
        prompt, answer = float(trace.prompt_R.mean()), max(float(trace.output_R.mean()), 1.0)
    prompt = 1024.0 if prompt is None else number("--prompt", prompt, low=1)
    answer = 256.0 if answer is None else number("--answer", answer, low=1)
    if rate is not None:
        number("--rate", rate, open_low=True)
    if most_requests < 1:
        raise ProblemError("--most-requests", f"is {most_requests}, must be at least 1")
    share_TLE, concentration, source = _shares(model, loads, seed)
    return Offered(
        share_TLE=share_TLE,
        prompt=prompt,
        answer=answer,
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
    found = advise(machine, traffic, memory=options.memory)
    if options.json:
        print(json.dumps(document(found), indent=1))
        return 0
    _print(found, machine, traffic)
    return 0


def document(found: Advice) -> dict[str, Any]:
    """The advice for programs."""
    entry = asdict(found)
    entry["model"] = found.model.name
    for name, choice in (("best", found.best), ("static", found.static)):
        entry[name]["gpu_hours"] = choice.gpu_hours
    return {"format": "moeless-advice", "version": 1, **entry, "flags": flags(found)}


def flags(found: Advice) -> dict[str, str]:
    """What each engine is told, ready to paste."""
    best = found.best
    balance = best.split != "static"
    vllm = [f"--data-parallel-size {best.width}", "--enable-expert-parallel"]
    sglang = [f"--tp-size {best.width}", f"--ep-size {best.width}"]
    if balance:
        config = {
            "num_redundant_experts": best.redundant,
            "window_size": found.best.every,
            "step_interval": found.best.every,
        }
        vllm += ["--enable-eplb", f"--eplb-config {shlex.quote(json.dumps(config))}"]
        sglang += [
            "--enable-eplb",
            f"--ep-num-redundant-experts {best.redundant}",
            f"--eplb-rebalance-num-iterations {found.best.every}",
        ]
    tensorrt = f"moe_expert_parallel_size: {best.width}"
    if balance:
        slots = best.slots * best.width
        tensorrt += f"\nmoe_config:\n  load_balancer:\n    num_slots: {slots}\n    layer_updates_per_iter: 1"
    return {"vllm": " ".join(vllm), "sglang": " ".join(sglang), "tensorrt-llm": tensorrt}


def _print(found: Advice, machine: Machine, traffic: Offered) -> None:
    best = found.best
    print(f"{found.model.name} on {machine.topology.gpus} {machine.gpu}s; loads: {traffic.source}")
    print(
        f"prompts of {traffic.prompt:.0f} tokens, answers of {traffic.answer:.0f}; times: {machine.basis}\n"
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
                f"{shown.token_s * 1e3:.1f}",
                f"{shown.first_s:.3f}",
                f"{shown.capacity:,.0f}",
                f"{shown.gpu_hours:.2f}",
            ]
        )
    print(table(head, cells, words_last=False))
    print()
    for reason in found.reasons:
        print(f"- {reason}")
    if best.split == "static":
        print("- no balancer: leave it off")
    else:
        moves = "of 95 % of the slots: EPLB" if best.split == "equal" else "of 5 %: plans from what is live"
        print(
            f"- plan every {found.best.interval:.0f} s (about {found.best.every:,} writing passes), so that moving "
            f"weights ({moves}) takes at most a twentieth of the time; tolerance {found.tolerance:g}; a "
            f"replica that serves nothing goes after {found.keep_alive:.0f} s"
        )
    if best.split in ("fractional", "live"):
        print(
            f"- split {best.split}: engines share evenly; moeless_opt's plug-ins and runtime have the others"
        )
    for engine, text in flags(found).items():
        print(f"\n{engine}:\n  " + text.replace("\n", "\n  "))


if __name__ == "__main__":
    raise SystemExit(main())
