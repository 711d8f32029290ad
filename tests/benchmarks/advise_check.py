"""Is what `moeless-advise` advises as good as the best of a full sweep in the simulator?

    python tests/benchmarks/advise_check.py [--data DIR] [--model Mixtral-8x7B ...] [--resume FILE]

Every width, number of slots and split that fits serves the same requests, all there at the start, in the
simulator's closed loop until they are done: `static` without spare slots; with some, EPLB (`equal`), or our
planner with shares as planned (`fractional`) or live ones (`live`). Requests come in turns, as many as are in
flight at once, each of the loads of one stretch of time, the first stretch two turns; a plan is made when a
turn has been admitted, of the loads since the last plan. Tokens of answers per second of all groups together
are counted from the second turn's end until nobody waits any more. Routing is that of 256 kinds of requests
of each stretch, drawn once.

Then the sizes of passes from which on balancing pays: single passes of half, as much and twice that size.
A line of --resume is a setting that is done; settings in it are not simulated again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.api import plan
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.io import Arrivals
from moeless_opt.problems.plan import Plan
from moeless_opt.runtime.control import Planner
from moeless_opt.runtime.simulate import Policy
from moeless_opt.runtime.simulate.advise import READS, Deployment, Offered, advise, group_topology
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


class Case(NamedTuple):
    """A machine; recorded loads, and how many of their scenarios; tokens of a request; requests on a GPU."""

    topology: str
    loads: str | None
    stretches: int
    prompt: int
    answer: int
    most: int


SETTINGS = {
    "Mixtral-8x7B": Case("8xH100", None, 4, 1024, 64, 256),
    "DeepSeek-V3": Case("4x8xH100", "deepseek_v3_counts.npz", 4, 1024, 32, 128),
    "Qwen3-235B-A22B": Case("2x8xH100", None, 3, 1024, 32, 128),
}
KINDS = 256


RULES = {"fractional": PlannedRule(), "live": TimedRule()}
ALONE = {"static": POLICIES["static"], "equal": POLICIES["eplb-window"]}
"""What engines do by themselves."""


def policy_of(setting: Deployment) -> Policy:
    """How a setting shares tokens, and plans: anew, or from what is live."""
    if setting.split in ALONE:
        return ALONE[setting.split]

    def planner(site: Site) -> Callable[[FloatArray, SlotArray], Plan]:
        topology, model = site.topology, site.machine.model
        if setting.tolerance is None:
            return lambda load_LE, _: plan(load_LE, topology, model=model)
        few = {"model": model, "fill": "distinct", "balance_tolerance": setting.tolerance}
        return Planner(topology=topology, options=few)

    return Policy(name="ours", summary="ours", shares=RULES[setting.split], planner=planner)


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
        stretch_R = np.maximum(requests // self.each - 1, 0)
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
    topology = slots_of(group_topology(machine.topology, setting.width), setting.slots)
    part = machine.replace(topology=topology)
    policy = policy_of(setting)
    return policy.build(part, topology, Scenario(model=part.model, topology=topology, policies=(policy,)))


def served(machine: Machine, kinds: Kinds, setting: Deployment, case: Case) -> float:
    """Tokens of answers per second of all groups."""
    run = built(machine, setting)
    turns, each = len(kinds.share_TKX) + 1, int(setting.requests)
    # As many requests in a row as the longest answer has tokens have all lengths up to it.
    longest = 2 * case.answer - 1
    lengths = np.tile(np.arange(1, longest + 1), (-(-turns * each // longest), 1))
    answer_R = np.random.default_rng(3).permuted(lengths, axis=1).ravel()[: turns * each]
    arrivals = Arrivals(
        time_R=np.zeros(turns * each),
        prompt_R=np.full(turns * each, case.prompt),
        output_R=answer_R,
    )
    loop = ClosedLoop(
        run.backend,
        RoutingModel(popularity_DLE=np.ones((1, *kinds.shape)), concentration=1.0, top_k=kinds.top_k),
        arrivals,
        most_tokens=READS * setting.width,
        most_requests=case.most * setting.width,
    )
    loop.routes = routes = kinds.turns(each)
    room = Room.of(run.backend.machine).tokens(run.backend.machine.topology)
    loop.cache_tokens = lambda: room  # as engines make it, once, beside all slots, full or not
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
    machine: Machine,
    kinds: Kinds,
    setting: Deployment,
    case: Case,
    *,
    writers: int = 0,
    tokens: int = 0,
) -> float:
    """Share of a pass that a setting saves against static: of writing ones, or ones that read."""
    spent = []
    for split in ("static", setting.split):
        slots = setting.slots if split != "static" else -(-machine.model.experts // setting.width)
        way = Deployment(**{**_fields(setting), "split": split, "slots": slots})
        run, rng, counted = built(machine, way), np.random.default_rng(5), 0.0
        for stretch in range(len(kinds.share_TKX)):
            for at, passes in enumerate(_passes(kinds, case, stretch, writers, tokens, rng)):
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
    kinds: Kinds, case: Case, stretch: int, writers: int, tokens: int, rng: np.random.Generator
) -> Iterator[Passes]:
    for _ in range(32):
        token_TK = np.zeros((len(kinds.share_TKX), KINDS))
        readers = max(round(tokens / case.prompt), 1) if tokens else 0
        chosen = rng.integers(0, KINDS, writers + readers)
        np.add.at(token_TK[stretch], chosen, 1.0 if writers else tokens / readers)
        token_TK = np.round(token_TK)
        count = float(token_TK.sum())
        cached = writers * (case.prompt + case.answer / 2) if writers else count
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
    case, data = SETTINGS[model], options.data
    file = None if case.loads is None or data is None else str(data / case.loads)
    machine = machine_of(Scenario(model=model, topology=case.topology, policies=("static",)))
    traffic = traffic_of(
        machine.model, loads=file, prompt=case.prompt, answer=case.answer, most_requests=case.most
    )
    answer_A = np.arange(1, 2 * case.answer)
    traffic = replace(
        traffic,
        share_TLE=traffic.share_TLE[: case.stretches],
        reserved=float(np.average(case.prompt + answer_A, weights=answer_A)),
        held=float(np.average(case.prompt + answer_A / 2, weights=answer_A)),
    )
    began = time.process_time()
    found = advise(machine, traffic)
    kinds = Kinds(traffic, machine.model.top_k)
    spent = time.process_time() - began
    print(f"{model}: {case}\n  loads: {traffic.source}; advised in {spent:.0f} s", flush=True)
    done = _done(options.resume)
    simulated: dict[tuple[int, int, str, float | None], float] = {}
    settings = sorted(found.settings, key=lambda one: (one.width, one.slots, one.split))
    for setting in (*settings, *found.replans[1:]):
        name = f"{model} {_key(setting)}"
        began = time.process_time()
        if name not in done:
            try:
                done[name] = served(machine, kinds, setting, case)
            except InfeasibleError as error:
                done[name] = 0.0
                print(f"  {name}: {error}")
            if options.resume is not None:
                with options.resume.open("a") as out:
                    out.write(json.dumps([name, done[name]]) + "\n")
        simulated[_key(setting)] = done[name]
        few = "" if setting.tolerance is None else f", from what is live, {setting.tolerance:g}"
        print(
            f"  {setting.width:3d} GPUs, {setting.slots:3d} slots, {setting.split:10s}{few} "
            f"{setting.requests:6,.0f} requests: {setting.capacity:9,.0f} predicted, {done[name]:9,.0f} "
            f"simulated, {setting.capacity / max(done[name], 1e-9) - 1:+6.1%} "
            f"({setting.layers} layers; {time.process_time() - began:.0f} s)",
            flush=True,
        )
    for title, best, splits in (
        ("advised", found.best, {*ALONE, *RULES}),
        ("engines alone", found.engine, set(ALONE)),
    ):
        among = {key: value for key, value in simulated.items() if key[2] in splits}
        most = max(among, key=among.__getitem__)
        mine = simulated[_key(best)]
        print(f"  {title}: {_key(best)}: {mine:,.0f}, {mine / among[most] - 1:+.1%} of the best, {most}")
    _even(machine, kinds, case, found.best, found.writing, found.reading)


def _key(setting: Deployment) -> tuple[int, int, str, float | None]:
    return setting.width, setting.slots, setting.split, setting.tolerance


def _even(
    machine: Machine,
    kinds: Kinds,
    case: Case,
    best: Deployment,
    writing: float | None,
    reading: float | None,
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
                saved = saving(machine, kinds, best, case, **{name: max(round(one), 1)})
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
