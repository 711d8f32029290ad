"""What ``moeless-simulate`` runs on: a machine, a model, its traffic; and what each of these rests on.

Every part adds a line to the scene's basis under *measured*, *composed* or *assumed*, which the command
prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeless_opt.problems.arrays import IntArray, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io.arrivals import Arrivals, poisson_arrivals, read_arrivals, read_lengths
from moeless_opt.problems.io.traces import read_token_traces
from moeless_opt.problems.spec.architecture import ModelSpec, model_preset
from moeless_opt.problems.spec.topology import TOPOLOGY_PRESETS, Topology
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.foresight import (
    TINY_MOE,
    Composition,
    Predictions,
    read_predictions,
    tiny_moe_predictions_file,
)
from moeless_opt.runtime.simulate.machine import EFFICIENCY, Machine
from moeless_opt.runtime.simulate.serving import MEMORY, USABLE, ClosedLoop
from moeless_opt.runtime.simulate.traffic import Passes, RoutingModel, continuous, one_second_batches

__all__ = ["Scene", "model_of", "scene"]

KINDS = ("measured", "composed", "assumed")

Locate = Callable[[Path | None, str], Path | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Traffic on a machine, and what they rest on.

    Parameters
    ----------
    machine, topology : Machine, Topology
        Times, GPUs.
    traffic : callable
        Makes the same passes each time.
    text : tuple of str
        Model, machine, traffic, routing, for people.
    basis : dict of str to list of str
        What is measured, composed, assumed.
    until : float
        Time of the last arrival.
    composition, predictions, learnt
        Where token traces are played, see `foresight.foreseer`.
    closed : callable, optional
        Makes the closed loop over a backend, in place of `traffic`.
    """

    machine: Machine
    topology: Topology
    traffic: Callable[[], Iterator[Passes]]
    text: tuple[str, ...]
    basis: dict[str, list[str]]
    until: float
    composition: Composition | None = None
    predictions: Predictions | None = None
    learnt: IntArray | None = None
    closed: Callable[[SimulatedBackend], ClosedLoop] | None = None


@dataclass(slots=True)
class _Basis:
    """Collects lines."""

    lines: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: str, line: str) -> None:
        self.lines[kind].append(line)


def model_of(name: str, sizes: str | None = None) -> ModelSpec:
    """A preset or the tiny MoE; with the sizes of another preset's experts and hidden state, if asked."""
    model = TINY_MOE if name.lower() == TINY_MOE.name else model_preset(name)
    if sizes is None:
        return model
    other = model_preset(sizes)
    return model.replace(
        name=f"{model.name} (sizes of {other.name})",
        hidden=other.hidden,
        ffn=other.ffn,
        bits=other.bits,
        bias=other.bias,
        matrices=other.matrices,
        shared_experts=other.shared_experts,
    )


def scene(name: str, options: argparse.Namespace) -> Scene:
    """Set up what the command line asks for.

    Parameters
    ----------
    name : str
        Of the model.
    options : Namespace
        Of the command.

    Raises
    ------
    ProblemError
        If the parts do not fit each other.
    """
    data: Path | None = options.data

    def at(given: Path | None, name: str) -> Path | None:
        return given if given is not None or data is None else data / name

    basis = _Basis()
    model = model_of(name, options.sizes)
    if options.sizes is not None:
        basis.add("composed", f"experts and hidden state as large as {options.sizes}'s")
    topology = _topology(options.topology, model.experts, options.slots, options.spare)
    machine = _machine(model, topology, options, at, basis)
    tiny = name.lower() == TINY_MOE.name
    played = tiny or any((options.traces, options.predictions, options.traces_in_data))
    arrivals = _arrivals(options, at, basis, lengths=not played)
    room = int(topology.capacity_LG(np.ones(1, dtype=np.int64), model.experts).max())
    text = (
        f"{model.name}: {model.layers} layers x {model.experts} experts, top {model.top_k}, "
        f"{model.expert_bytes / 1e6:.1f} MB each; up to {room} replicas per GPU and layer",
        f"machine: {machine.text}",
        f"traffic: {arrivals.requests} requests in {arrivals.seconds:.0f} s, recorded texts in place of "
        f"their own, from {arrivals.source}"
        if played
        else f"traffic: {arrivals!r}",
    )
    if played:
        return _played(model, machine, topology, arrivals, text, basis, options, tiny)
    return _generated(model, machine, topology, arrivals, text, basis, options, at)


def _machine(
    model: ModelSpec, topology: Topology, options: argparse.Namespace, at: Locate, basis: _Basis
) -> Machine:
    timings = options.timings
    if options.gpu == "A6000":
        timings = at(timings, "latency/phiminimoe_a6000_tp1_expert_gate.csv.gz")
    flops, bandwidth = (f"{share:.0%}" for share in EFFICIENCY)
    if timings is not None:
        basis.add("measured", f"expert kernel times of one shape on the GPU ({Path(timings).name})")
        basis.add("composed", "those times scaled by the experts' size")
        basis.add("assumed", "experts of a GPU run one after the other")
    else:
        basis.add("assumed", f"expert times: a roofline at {flops} and {bandwidth} of the data sheet")
    basis.add(
        "assumed", f"attention: {flops} and {bandwidth} of the data sheet; all-to-all: data-sheet links"
    )
    return Machine.of(topology, model, gpu=options.gpu, timings=timings)


def _topology(text: str, experts: int, slots: int | None, spare: int) -> Topology:
    """A preset, or ``NODESxGPUS`` with H100 links; by default `spare` slots more than static needs."""
    nodes, _, per_node = text.partition("x")
    if text not in TOPOLOGY_PRESETS and nodes.isdigit() and per_node.isdigit():
        links = TOPOLOGY_PRESETS["4x8xH100"][3]
        plain = Topology.uniform(int(nodes), int(per_node), slots=1, links=links)
    else:
        plain = Topology.preset(text, slots=1)
    return plain.replace(
        slots_G=np.full(plain.gpus, slots or -(-experts // plain.gpus) + whole("--spare", spare))
    )


def _arrivals(options: argparse.Namespace, at: Locate, basis: _Basis, *, lengths: bool) -> Arrivals:
    # A rate that is asked for goes before recordings of a folder, not before a recording that is asked for.
    path = options.arrivals if options.rate else at(options.arrivals, _AZURE)
    drawn = at(options.lengths, "requests/sharegpt_8k_lengths_llama2.csv.gz") if lengths else None
    if path is None:
        rate = options.rate or 5.5
        arrivals = poisson_arrivals(rate, options.seconds or 300, seed=options.seed)
        basis.add("assumed", f"arrivals: Poisson, {rate:g} per second")
    else:
        arrivals = read_arrivals(path)
        if options.seconds > 0:
            arrivals = arrivals.first(options.seconds)
        basis.add("measured", f"arrival times ({Path(path).name})")
    if drawn is not None:
        arrivals = arrivals.with_lengths(read_lengths(drawn), seed=options.seed)
        basis.add("measured", f"prompt and answer lengths ({Path(drawn).name})")
        basis.add("composed", "lengths drawn for the arrivals")
    return arrivals


_AZURE = "requests/AzureLLMInferenceTrace_conv_2023.csv.gz"


def _played(
    model: ModelSpec,
    machine: Machine,
    topology: Topology,
    arrivals: Arrivals,
    text: tuple[str, ...],
    basis: _Basis,
    options: argparse.Namespace,
    tiny: bool,
) -> Scene:
    """Token traces: the tiny MoE's, with predictions beside them, or a file's."""
    predictions = None
    traces_file = options.traces
    if options.predictions is not None or (tiny and traces_file is None):
        if traces_file is not None:
            raise ProblemError("--traces", "must be left out with --predictions, which hold the traces too")
        predictions = read_predictions(
            options.predictions or tiny_moe_predictions_file(), experts=model.experts
        )
        traces = predictions.traces
    else:
        if traces_file is None:
            if options.data is None:
                raise ProblemError("--traces", f"is needed, or --data with {options.traces_in_data}")
            traces_file = options.data / options.traces_in_data
        traces = read_token_traces(traces_file, experts=model.experts)
    if traces.experts_TLK.shape[1:] != (model.layers, model.top_k):
        raise ProblemError("--traces", f"{traces!r} do not fit {model.name}")
    learnt = requests = None
    if options.predictor == "affinity" and predictions is None:
        learnt, requests = traces.split(0.5, seed=0)
    # Recorded answers are written token by token; whole texts, as the tiny MoE's, can be read in one pass.
    whole = predictions is not None and not traces.prompt_tokens.any() and options.batching == "seconds"
    stay = (0.9 if tiny else 0.0) if options.stay is None else options.stay
    composition = Composition(
        traces=traces,
        arrivals=arrivals,
        batching="seconds" if whole else "continuous",
        period=options.period,
        stay=stay,
        requests=requests,
        seed=options.seed,
    )
    basis.add("measured", f"routing of every token ({traces!r})")
    basis.add(
        "composed",
        "which recorded request arrives when (its own length stands); "
        + (
            "all texts of one second are read in one pass"
            if whole
            else f"a pass every {options.period:g} s, a token of the answer of each live request"
        ),
    )
    basis.add("assumed", "no queue, no limit on the batch")
    if stay:
        basis.add("assumed", f"a request has its forerunner's domain with chance {stay:g}")
    return Scene(
        machine=machine,
        topology=topology,
        traffic=composition.passes,
        text=(*text, f"routing: {traces!r}"),
        basis=basis.lines,
        until=arrivals.seconds,
        composition=composition,
        predictions=predictions,
        learnt=learnt,
    )


def _generated(
    model: ModelSpec,
    machine: Machine,
    topology: Topology,
    arrivals: Arrivals,
    text: tuple[str, ...],
    basis: _Basis,
    options: argparse.Namespace,
    at: Locate,
) -> Scene:
    """Routing by chance, with popularity measured for this very model where there is some."""
    routing, measured = _routing(model, options, at)
    if measured:
        basis.add("measured", "popularity of the experts by domain, in three layers")
        basis.add("assumed", "the other layers are like the nearest of them")
    basis.add(
        "composed",
        "routing drawn from "
        + ("that popularity" if measured else "a generator with the spread of popularity of the tiny MoE")
        + "; requests differ within a domain as the tiny MoE's do; "
        + (
            "layers follow from each other as in its token traces"
            if options.affinity
            else "layers independent"
        ),
    )
    basis.add("assumed", f"a request has its forerunner's domain with chance {routing.stay:g}")
    closed: Callable[[SimulatedBackend], ClosedLoop] | None = None
    if options.batching == "closed":
        closed, how = _closed(routing, arrivals, options)

        def traffic() -> Iterator[Passes]:
            raise ProblemError("--batching", "is closed: passes are made by the loop")

    elif options.batching == "continuous":
        how = (
            f"continuous batching, a pass every {options.period:g} s whatever it takes (composed once, the "
            "same for all); prompts are read in the first pass after their arrival"
        )
        bank = options.bank
        if bank:
            how += f"; requests of a domain route in one of {bank} ways"

        def traffic() -> Iterator[Passes]:
            return continuous(
                routing, arrivals, period=options.period, window=16, bank=bank, seed=options.seed
            )

    else:
        every = options.decode_every
        writing = f"every {every}-th writing pass" if every else "no writing pass"
        how = (
            "the paper's batching: the requests of one second together, one pass reads their prompts; "
            f"{writing} is simulated (which passes the paper's latency averages over is not said there)"
        )

        def traffic() -> Iterator[Passes]:
            return one_second_batches(routing, arrivals, decode_every=every, seed=options.seed)

    basis.add("composed", how)
    return Scene(
        machine=machine,
        topology=topology,
        traffic=traffic,
        text=(*text, routing.text, how),
        basis=basis.lines,
        until=arrivals.seconds,
        closed=closed,
    )


def _closed(
    routing: RoutingModel, arrivals: Arrivals, options: argparse.Namespace
) -> tuple[Callable[[SimulatedBackend], ClosedLoop], str]:
    """The closed loop of each policy, and what is said about it."""
    memory = USABLE * MEMORY[options.gpu] if options.memory is None else options.memory * 1e9

    def loop(backend: SimulatedBackend) -> ClosedLoop:
        return ClosedLoop(
            backend,
            routing,
            arrivals,
            memory=memory,
            most_tokens=options.most_tokens,
            most_requests=options.most_requests,
            seed=options.seed,
        )

    return loop, (
        f"closed loop: a pass starts when the last one ends; at most {options.most_requests} requests and "
        f"{options.most_tokens} tokens in a pass; {memory / 1e9:.3g} GB of each GPU for weights and the KV "
        "cache, which spreads evenly; a request reserves its whole length and is never preempted (assumed). "
        "Passes differ from policy to policy"
    )


def _routing(model: ModelSpec, options: argparse.Namespace, at: Locate) -> tuple[RoutingModel, bool]:
    """Popularity measured for this very model where there is some, else drawn like the tiny model's."""
    own = RoutingModel.fit(tiny_moe_traces(), affinity=options.affinity)
    popularity = at(options.popularity, "olmoe_mixtral_domain_counts.npz")
    prefix = model.name.split("-")[0].lower() + "__expert_counts__"
    if popularity is not None and popularity.is_file():
        with np.load(popularity, allow_pickle=False) as file:
            counts = {key[len(prefix) :]: file[key] for key in sorted(file.files) if key.startswith(prefix)}
        if counts:
            return RoutingModel.of_domains(counts, (0, 7, 15), model, own, popularity.name), True
    return own.like(model.layers, model.experts, model.top_k, seed=options.seed), False
