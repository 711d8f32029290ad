"""Is what `moeless-advise` advises as good as the best of a full sweep in the simulator?

    python tests/benchmarks/advise_check.py [--data DIR] [--model Mixtral-8x7B ...] [--resume FILE]

Every width, number of slots and split that fits serves the same requests, all there at the start, in the
simulator's closed loop until they are done: `static` without spare slots; with some, EPLB (`equal`), or our
planner with shares as planned (`fractional`) or live ones (`live`). Requests come in turns, as many as are in
flight at once, each of the loads of one stretch of time; a plan is made when a turn has been admitted, of the
loads since the last plan. Tokens of answers per second of all groups together are counted from the end of the
first turn until nobody waits any more. Routing is that of 256 kinds of requests of each stretch, drawn once.

Then the sizes of passes from which on balancing pays: single passes of half, as much and twice that size.
A line of --resume is a setting that is done; settings in it are not simulated again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.io import Arrivals
from moeless_opt.runtime.control import Planner
from moeless_opt.runtime.simulate import Policy
from moeless_opt.runtime.simulate.advise import READS, Deployment, Offered, advise, part_of
from moeless_opt.runtime.simulate.advise_cli import traffic_of
from moeless_opt.runtime.simulate.hardware import slots_of
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.memory import Room
from moeless_opt.runtime.simulate.policies import POLICIES, Run, Site
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import machine_of
from moeless_opt.runtime.simulate.serving import ClosedLoop
from moeless_opt.runtime.simulate.shares import PlannedRule, TimedRule
from moeless_opt.runtime.simulate.traffic import Passes, RoutingModel

SETTINGS = {
    "Mixtral-8x7B": ("8xH100", None),
    "DeepSeek-V3": ("4x8xH100", "deepseek_v3_counts.npz"),
    "Qwen3-235B-A22B": ("2x8xH100", None),
}
PROMPT, ANSWER, MOST = 1024, 64, 256
KINDS = 256
LENGTHS = 128
"""Answers of so many requests in a row have all lengths from 1 to twice the mean, in some order."""


def _ours(site: Site) -> Planner:
    return Planner(topology=site.topology, options={"model": site.machine.model})


WAYS = {
    "static": POLICIES["static"],
    "equal": POLICIES["eplb-window"],
    "fractional": Policy(name="fractional", summary="as planned", shares=PlannedRule(), planner=_ours),
    "live": Policy(name="live", summary="live shares", shares=TimedRule(), planner=_ours),
}


class Kinds:
    """Requests of some kinds, each of them drawn once: `Routes` of any number of requests at once."""

    def __init__(self, traffic: Offered, top_k: int) -> None:
        self.top_k = top_k
        stretches, layers, experts = traffic.share_TLE.shape
        self.shape = (layers, experts)
        model = RoutingModel(
            popularity_DLE=np.maximum(traffic.share_TLE, 1e-9),
            concentration=traffic.concentration,
            top_k=top_k,
        )
        rng = np.random.default_rng(7)
        self.share_TKX = np.stack(
            [
                model.distributions(np.full(KINDS, stretch), rng).reshape(KINDS, layers * experts)
                for stretch in range(stretches)
            ]
        )

    def turns(self, each: int) -> _Turns:
        """Routes of requests that come in turns of so many."""
        return _Turns(self, each)

    def load_LE(self, token_TK: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Loads of so many tokens of every kind."""
        mix = sum(
            token_K.astype(np.float32) @ share_KX
            for token_K, share_KX in zip(token_TK, self.share_TKX, strict=True)
            if token_K.any()
        )
        mix_LE = np.asarray(mix, dtype=np.float64).reshape(self.shape)
        mix_LE /= mix_LE.sum(1, keepdims=True)
        pairs = int(token_TK.sum()) * self.top_k
        return rng.multinomial(np.full(self.shape[0], pairs), mix_LE).astype(np.float64)


class _Turns:
    def __init__(self, kinds: Kinds, each: int) -> None:
        self.kinds, self.each, self.shape = kinds, each, kinds.shape
        self._rng = np.random.default_rng(1)
        self._kind_R: IntArray = np.zeros(0, dtype=np.int64)
        self.entered = 0

    def enter(self, requests: IntArray) -> None:
        stretch_R = np.minimum(requests // self.each, len(self.kinds.share_TKX) - 1)
        self._kind_R = np.concatenate([self._kind_R, stretch_R * KINDS + requests % KINDS])
        self.entered += len(requests)

    def load_LE(self, token_R: IntArray, written_R: IntArray) -> FloatArray:
        stretches = len(self.kinds.share_TKX)
        token_TK = np.bincount(self._kind_R, weights=token_R, minlength=stretches * KINDS)
        return self.kinds.load_LE(token_TK.reshape(stretches, KINDS), self._rng)

    def stay(self, stays_R: BoolArray) -> None:
        self._kind_R = self._kind_R[stays_R]


def built(machine: Machine, setting: Deployment) -> Run:
    """The policy of a setting on one group."""
    topology = slots_of(part_of(machine.topology, setting.width), setting.slots)
    part = machine.replace(topology=topology)
    policy = WAYS[setting.split]
    return policy.build(part, topology, Scenario(model=part.model, topology=topology, policies=(policy,)))


def served(machine: Machine, kinds: Kinds, setting: Deployment, each: int) -> float:
    """Tokens of answers per second of all groups."""
    run = built(machine, setting)
    turns = len(kinds.share_TKX)
    rng = np.random.default_rng(3)
    rows = -(-turns * each // LENGTHS)
    answer_R = rng.permuted(np.tile(np.arange(LENGTHS) + 0.5, (rows, 1)), axis=1).ravel()
    answer_R = np.maximum(np.round(answer_R * 2 * ANSWER / LENGTHS), 1)[: turns * each]
    arrivals = Arrivals(
        time_R=np.zeros(turns * each),
        prompt_R=np.full(turns * each, PROMPT),
        output_R=answer_R.astype(np.int64),
    )
    loop = ClosedLoop(
        run.backend,
        RoutingModel(popularity_DLE=np.ones((1, *kinds.shape)), concentration=1.0, top_k=kinds.top_k),
        arrivals,
        memory=Room.of(run.backend.machine).memory,
        most_tokens=READS * setting.width,
        most_requests=each,
    )
    loop.routes = routes = kinds.turns(each)
    planned, seen = 0, []
    for passes in loop:
        run.backend.run(passes)
        told = loop.served()
        seen.append((run.backend.now, told.batch * told.passes, routes.entered))
        if run.controller is not None and routes.entered >= min(planned + 1, turns) * each:
            planned += 1
            if planned < turns:
                run.controller.every = 1
                run.controller._due = 0
                run.controller.after(1)
        if routes.entered == arrivals.requests:
            break  # nobody waits any more
    time_B, written_B, entered_B = np.array(seen).T
    first = int(np.argmax(entered_B >= 2 * each))
    tokens = written_B[-1] - written_B[first]
    return float(setting.groups * tokens / (time_B[-1] - time_B[first]))


def saving(
    machine: Machine, kinds: Kinds, setting: Deployment, *, writers: int = 0, tokens: int = 0
) -> float:
    """Share of a pass that a setting saves against static: of writing ones, or ones that read."""
    spent = []
    for split in ("static", setting.split):
        slots = setting.slots if split != "static" else -(-machine.model.experts // setting.width)
        way = Deployment(**{**_fields(setting), "split": split, "slots": slots})
        run, rng, counted = built(machine, way), np.random.default_rng(5), 0.0
        for stretch in range(len(kinds.share_TKX)):
            for at, passes in enumerate(_passes(kinds, stretch, writers, tokens, rng)):
                before = max(run.backend.now, float(passes.start_B[0]))
                run.backend.run(passes)
                counted += (run.backend.now - before) * (stretch > 0 and at >= 8)
            if run.controller is not None:
                run.controller.every, run.controller._due = 1, 0
                run.controller.after(1)
                run.backend.now += 60.0  # the weights have come
        spent.append(counted)
    return 1 - spent[1] / spent[0]


def _passes(
    kinds: Kinds, stretch: int, writers: int, tokens: int, rng: np.random.Generator
) -> Iterator[Passes]:
    for _ in range(32):
        token_TK = np.zeros((len(kinds.share_TKX), KINDS))
        readers = max(round(tokens / PROMPT), 1) if tokens else 0
        chosen = rng.integers(0, KINDS, writers + readers)
        np.add.at(token_TK[stretch], chosen, 1.0 if writers else tokens / readers)
        token_TK = np.round(token_TK)
        count = float(token_TK.sum())
        cached = writers * (PROMPT + ANSWER / 2) if writers else count
        yield Passes(
            start_B=np.zeros(1),
            weight_B=np.ones(1),
            tokens_B=np.array([count]),
            kv_tokens_B=np.array([cached]),
            prefill_B=np.array([not writers]),
            load_BLE=kinds.load_LE(token_TK, rng)[None],
        )


def _fields(setting: Deployment) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in Deployment.__slots__}


def check(model: str, options: argparse.Namespace) -> None:
    """Advise, sweep, compare."""
    shape, loads = SETTINGS[model]
    data = options.data
    file = None if loads is None or data is None else str(data / loads)
    machine = machine_of(Scenario(model=model, topology=shape, policies=("static",)))
    traffic = traffic_of(machine.model, loads=file, prompt=PROMPT, answer=ANSWER, most_requests=MOST)
    began = time.process_time()
    found = advise(machine, traffic)
    kinds = Kinds(traffic, machine.model.top_k)
    print(f"{model} on {shape}, loads {traffic.source}; advised in {time.process_time() - began:.0f} s")
    done = _done(options.resume)
    simulated: dict[tuple[int, int, str], float] = {}
    for setting in sorted(found.settings, key=lambda one: (one.width, one.slots, one.split)):
        key = (setting.width, setting.slots, setting.split)
        name = f"{model} {key}"
        began = time.process_time()
        if name not in done:
            try:
                done[name] = served(machine, kinds, setting, int(setting.requests))
            except InfeasibleError as error:
                done[name] = 0.0
                print(f"  {name}: {error}")
            if options.resume is not None:
                with options.resume.open("a") as out:
                    out.write(json.dumps([name, done[name]]) + "\n")
        simulated[key] = done[name]
        print(
            f"  {setting.width:3d} GPUs, {setting.slots:3d} slots, {setting.split:10s} "
            f"{setting.requests:6,.0f} requests: {setting.capacity:9,.0f} predicted, {done[name]:9,.0f} "
            f"simulated, {setting.capacity / max(done[name], 1e-9) - 1:+6.1%} "
            f"({setting.layers} layers; {time.process_time() - began:.0f} s)",
            flush=True,
        )
    most = max(simulated.values())
    for title, best in (("advised", found.best), ("of engines alone", found.engine)):
        key = (best.width, best.slots, best.split)
        among = [v for (*_, split), v in simulated.items() if title == "advised" or split in WAYS_ALONE]
        print(f"  {title}: {key}: {simulated[key]:,.0f}, {simulated[key] / max(among) - 1:+.1%} of the best")
    print(f"  best of the sweep: {max(simulated, key=simulated.__getitem__)}: {most:,.0f}")
    _even(machine, kinds, found.best, found.writing, found.reading)


WAYS_ALONE = ("static", "equal")


def _even(
    machine: Machine, kinds: Kinds, best: Deployment, writing: float | None, reading: float | None
) -> None:
    """What is saved about the sizes from which on balancing pays by 1 %."""
    for name, size, most in (
        ("writers", writing, best.requests),
        ("tokens", reading, READS * best.width),
    ):
        if best.split == "static":
            break
        at = [most / 2, most] if size is None else [size / 2, size, 2 * size]
        cells = []
        for one in at:
            if one >= 1:
                saved = saving(machine, kinds, best, **{name: max(round(one), 1)})
                cells.append(f"{round(one):,}: {saved:+.1%}")
        told = "never" if size is None else f"from {size:,.0f} on"
        print(f"  passes by {name}: pays {told}; simulated {', '.join(cells)}", flush=True)


def _done(resume: Path | None) -> dict[str, float]:
    if resume is None or not resume.exists():
        return {}
    return dict(json.loads(line) for line in resume.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", action="append", choices=list(SETTINGS))
    parser.add_argument("--resume", type=Path, help="a file of settings that are done; more are added")
    options = parser.parse_args()
    for model in options.model or SETTINGS:
        check(model, options)


if __name__ == "__main__":
    main()
