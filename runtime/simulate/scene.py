"""What a `Scenario` runs on: a machine, a model, its traffic; and what each of these rests on.

Every part adds a line to the scene's basis under *measured*, *composed* or *assumed*, which is printed with
the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io import (
    Arrivals,
    TokenTraces,
    poisson_arrivals,
    read_arrays,
    read_arrivals,
    read_lengths,
    read_token_traces,
)
from moeless_opt.problems.spec import Topology
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.compose import draw_requests
from moeless_opt.runtime.simulate.foresight import (
    Composition,
    Predictions,
    read_predictions,
    tiny_moe_predictions_file,
)
from moeless_opt.runtime.simulate.hardware import GPUS, slots_of, topology_of
from moeless_opt.runtime.simulate.machine import EFFICIENCY, Machine, is_json
from moeless_opt.runtime.simulate.memory import USABLE, Room
from moeless_opt.runtime.simulate.routes import PlayedRoutes, recorded_lengths
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.serving import ClosedLoop
from moeless_opt.runtime.simulate.traffic import Passes, RoutingModel, continuous, one_second_batches

__all__ = ["Scene", "machine_of", "scene"]

KINDS = ("measured", "composed", "assumed")
RATE = 5.5
"""Requests per second where none are recorded and nothing is said."""

#: Names of recordings in the folder that a scenario names.
_AZURE = "requests/AzureLLMInferenceTrace_conv_2023.csv.gz"
_LENGTHS = "requests/sharegpt_8k_lengths_llama2.csv.gz"
#: Kernel times of one expert on a GPU, and its hidden and inner width.
_TIMINGS = {
    "A6000": ("latency/phiminimoe_a6000_tp1_expert_gate.csv.gz", (4096, 960)),
    "H100": ("latency/mixtral8x7b_h100_tp1_expert_gate.csv.gz", (4096, 14336)),
}
_POPULARITY = "olmoe_mixtral_domain_counts.npz"


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
    room : float
        Bytes of a GPU for experts and the KV cache.
    narrow : callable, optional
        Makes the passes with fewer layers, in less time: all that their KV cache is read from.
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
    room: float = np.inf
    narrow: Callable[[], Iterator[Passes]] | None = None

    def experts_room(self) -> float:
        """Bytes of a GPU for experts while its KV cache is as large as the traffic ever makes it.

        The closed loop, whose cache follows from what a policy holds, makes room as it goes.
        """
        if self.closed is not None:
            return self.room
        traffic = (self.narrow or self.traffic)()
        tokens = max((float(passes.kv_tokens_B.max()) for passes in traffic), default=0.0)
        return self.room - tokens * self.machine.kv_token_bytes / self.topology.gpus


def scene(scenario: Scenario) -> Scene:
    """Set up what a scenario asks for.

    Raises
    ------
    ProblemError
        If the parts do not fit each other.
    """
    return _Setup(scenario).scene()


def machine_of(scenario: Scenario) -> Machine:
    """The machine of a scenario alone, whether its slots fit or not."""
    setup = _Setup(scenario)
    given = scenario.machine
    plain = given if isinstance(given, Topology) else topology_of(given, scenario.gpu_name)[0]
    return setup.machine(plain)


class _Setup:
    """One scenario on its way to a scene; what is said of it on the way."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.basis: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.model = scenario.model_spec

    def say(self, kind: str, line: str) -> None:
        self.basis[kind].append(line)

    def at(self, given: Path | None, name: str) -> Path | None:
        """A file that was named, or the one of that name in the folder of recordings."""
        data = self.scenario.data
        if data is not None and not data.is_dir():
            raise ProblemError("data", f"{data} is no folder")
        return given if given is not None or data is None else data / name

    def scene(self) -> Scene:
        scenario, model = self.scenario, self.model
        if scenario.sizes is not None:
            self.say("composed", f"experts and hidden state as large as {scenario.sizes}'s")
        topology, machine, room = self.place()
        arrivals = self.arrivals()
        bytes_L = np.full(model.layers, model.expert_bytes, dtype=np.int64)
        most = int(topology.capacity_LG(bytes_L, model.experts).max())
        text = (
            f"{model.name}: {model.layers} layers x {model.experts} experts, top {model.top_k}, "
            f"{model.expert_bytes / 1e6:.1f} MB each; up to {most} replicas per GPU and layer",
            f"machine: {machine.text}",
            room.text(topology),
            f"traffic: {arrivals.requests} requests in {arrivals.seconds:.0f} s, recorded texts in place of "
            f"their own, from {arrivals.source}"
            if scenario.played
            else f"traffic: {arrivals!r}",
        )
        made = self.played if scenario.played else self.generated
        found = made(machine, topology, arrivals, text)
        traffic = found.traffic
        return replace(
            found, traffic=lambda: _fitting(traffic(), room, topology), room=room.memory - room.others
        )

    def place(self) -> tuple[Topology, Machine, Room]:
        """The machine: as given, or with slots; by default one more than static needs, where that fits."""
        scenario, given = self.scenario, self.scenario.machine
        plain, own = (given, True) if isinstance(given, Topology) else topology_of(given, scenario.gpu_name)
        needed = -(-self.model.experts // plain.gpus)
        spare = 1 if scenario.spare is None else scenario.spare
        topology = plain if own else slots_of(plain, scenario.slots or needed + spare)
        machine = self.machine(topology)
        room = Room.of(machine, scenario.memory)
        if not own and scenario.slots is None and scenario.spare is None and not room.fits(topology):
            topology = slots_of(plain, needed)
            machine = machine.replace(topology=topology)
            self.say("assumed", "no spare slot: none fits")
        room.check(topology)
        return topology, machine, room

    def machine(self, topology: Topology) -> Machine:
        scenario = self.scenario
        timings, timed = scenario.timings, scenario.timed
        if timings is None and scenario.gpu_name in _TIMINGS:
            name, timed = _TIMINGS[scenario.gpu_name]
            timings = self.at(None, name)
        flops, bandwidth = (f"{share:.0%}" for share in EFFICIENCY)
        if scenario.in_turn and timings is None:
            raise ProblemError(
                "in_turn", f"is for measured kernel times; of {scenario.gpu_name} there are none"
            )
        if timings is not None and is_json(timings):
            self.say("measured", f"times of the model's experts together on the GPU ({timings.name})")
        elif timings is not None:
            self.say("measured", f"expert kernel times of one shape on the GPU ({timings.name})")
            self.say("composed", "those times scaled by the experts' size")
            how = "by its own tokens" if scenario.in_turn else "the tokens spread evenly over them"
            self.say("assumed", f"experts of a GPU run one after the other, {how}")
        else:
            self.say("assumed", f"expert times: a roofline at {flops} and {bandwidth} of the data sheet")
        self.say(
            "assumed", f"attention: {flops} and {bandwidth} of the data sheet; all-to-all: data-sheet links"
        )
        return Machine.of(
            topology,
            self.model,
            gpu=scenario.gpu_name,
            timings=timings,
            timed=timed,
            beside=scenario.beside,
            in_turn=scenario.in_turn,
        )

    def arrivals(self) -> Arrivals:
        scenario = self.scenario
        # A rate that is asked for goes before recordings of a folder.
        path = scenario.arrivals if scenario.rate else self.at(scenario.arrivals, _AZURE)
        drawn = None if scenario.played else self.at(scenario.lengths, _LENGTHS)
        if path is None:
            if not scenario.seconds:
                raise ProblemError(
                    "seconds", "is 0, all of a recording; arrivals that are drawn need a number"
                )
            rate = scenario.rate or RATE
            arrivals = poisson_arrivals(rate, scenario.seconds, seed=scenario.seed)
            self.say("assumed", f"arrivals: Poisson, {rate:g} per second")
        else:
            arrivals = read_arrivals(path)
            if scenario.seconds > 0:
                arrivals = arrivals.first(scenario.seconds)
            self.say("measured", f"arrival times ({path.name})")
        if drawn is not None:
            arrivals = arrivals.with_lengths(read_lengths(drawn), seed=scenario.seed)
            self.say("measured", f"prompt and answer lengths ({drawn.name})")
            self.say("composed", "lengths drawn for the arrivals")
        return arrivals

    # -- token traces ------------------------------------------------------------------------------------

    def recording(self) -> tuple[TokenTraces, Predictions | None]:
        """Token traces: the tiny MoE's, with predictions beside them, or a file's."""
        scenario, experts = self.scenario, self.model.experts
        predictions = None
        if scenario.predictions is not None or scenario.traces is None:
            if scenario.traces is not None:
                raise ProblemError("traces", "must be left out with predictions, which hold the traces too")
            file = scenario.predictions or tiny_moe_predictions_file()
            predictions = read_predictions(file, experts=experts)
            traces = predictions.traces
        else:
            file, data = scenario.traces, scenario.data
            if not file.exists() and not file.is_absolute():
                if data is None:
                    raise ProblemError("traces", f"{file} is not here; name its folder as data")
                file = data / file
            traces = read_token_traces(file, experts=experts)
        if traces.experts_TLK.shape[1:] != (self.model.layers, self.model.top_k):
            raise ProblemError("traces", f"{traces!r} do not fit {self.model.name}")
        return traces, predictions

    def played(
        self, machine: Machine, topology: Topology, arrivals: Arrivals, text: tuple[str, ...]
    ) -> Scene:
        """Passes of recorded requests."""
        scenario = self.scenario
        traces, predictions = self.recording()
        learnt = requests = None
        if scenario.predictor == "affinity" and predictions is None:
            learnt, requests = traces.split(0.5, seed=0)
        elif scenario.half != "both":
            requests = traces.split(0.5, seed=0)[scenario.half == "second"]
            self.say("composed", f"requests of the {scenario.half} half alone ({len(requests)})")
        # Recorded answers are written token by token; whole texts can be read in one pass.
        at_once = (
            predictions is not None and not traces.prompt_tokens.any() and scenario.batching == "seconds"
        )
        stay = (0.9 if scenario.tiny else 0.0) if scenario.stay is None else scenario.stay
        composition = Composition(
            traces=traces,
            arrivals=arrivals,
            batching="seconds" if at_once else "continuous",
            period=scenario.period,
            stay=stay,
            requests=requests,
            seed=scenario.seed,
        )
        self.say("measured", f"routing of every token ({traces!r})")
        closed: Callable[[SimulatedBackend], ClosedLoop] | None = None
        traffic: Callable[[], Iterator[Passes]] = composition.passes
        if scenario.batching == "closed":
            closed, how = self.replayed(composition)
            traffic, text = _none, (*text, how)
        else:
            how = "its own length stands; " + (
                "all texts of one second are read in one pass"
                if at_once
                else f"a pass every {scenario.period:g} s, a token of the answer of each live request"
            )
            self.say("assumed", "no queue, no limit on the batch")
        self.say("composed", f"which recorded request arrives when; {how}")
        if stay:
            self.say("assumed", f"a request has its forerunner's domain with chance {stay:g}")
        return Scene(
            machine=machine,
            topology=topology,
            traffic=traffic,
            text=(*text, f"routing: {traces!r}"),
            basis=self.basis,
            until=arrivals.seconds,
            composition=composition,
            predictions=predictions,
            learnt=learnt,
            closed=closed,
        )

    def replayed(self, composition: Composition) -> tuple[Callable[[SimulatedBackend], ClosedLoop], str]:
        """The closed loop of recorded requests, and what is said about it."""
        scenario, traces = self.scenario, composition.traces
        drawn_R = draw_requests(
            traces,
            composition.arrivals,
            requests=composition.requests,
            stay=composition.stay,
            seed=composition.seed,
        )
        path, lengths = scenario.lengths, None
        if path is not None:
            lengths = read_lengths(path if path.exists() or scenario.data is None else scenario.data / path)
            self.say("measured", f"length of every prompt and answer ({path.name})")
        arrivals, first, done = recorded_lengths(traces, composition.arrivals, drawn_R, lengths)
        loop, how = self.closed(lambda: PlayedRoutes(traces, drawn_R, first, scenario.seed), arrivals)
        return loop, f"{how}; {done}"

    # -- routing by chance -------------------------------------------------------------------------------

    def generated(
        self, machine: Machine, topology: Topology, arrivals: Arrivals, text: tuple[str, ...]
    ) -> Scene:
        """Routing drawn, with popularity measured for this very model where there is some."""
        scenario = self.scenario
        routing, measured = self.routing()
        if scenario.stay is not None:
            routing = routing.replace(stay=scenario.stay)
        if scenario.skew != 1:
            routing = routing.skewed(scenario.skew)
            self.say("assumed", f"popularity raised to the power {scenario.skew:g}")
        if measured:
            self.say("measured", "popularity of the experts by domain, in three layers")
            self.say("assumed", "the other layers are like the nearest of them")
        source = (
            "that popularity" if measured else "a generator with the spread of popularity of the tiny MoE"
        )
        layers = (
            "layers follow from each other as in its token traces"
            if scenario.affinity
            else "layers independent"
        )
        self.say(
            "composed",
            f"routing drawn from {source}; requests differ within a domain as the tiny MoE's do; {layers}",
        )
        self.say("assumed", f"a request has its forerunner's domain with chance {routing.stay:g}")
        closed: Callable[[SimulatedBackend], ClosedLoop] | None = None
        traffic: Callable[[], Iterator[Passes]]
        narrow: Callable[[], Iterator[Passes]] | None = None
        if scenario.batching == "closed":
            closed, how = self.closed(lambda: routing, arrivals)
            traffic = _none
        else:
            traffic, how = self.composed(routing, arrivals)
            one = routing.replace(popularity_DLE=routing.popularity_DLE[:, :1], affinity=None)
            narrow, _ = self.composed(one, arrivals)
        self.say("composed", how)
        return Scene(
            machine=machine,
            topology=topology,
            traffic=traffic,
            text=(*text, routing.text, how),
            basis=self.basis,
            until=arrivals.seconds,
            closed=closed,
            narrow=narrow,
        )

    def routing(self) -> tuple[RoutingModel, bool]:
        """Popularity measured for this very model where there is some, else drawn like the tiny model's."""
        scenario, model = self.scenario, self.model
        own = _spreads(scenario.affinity)
        popularity = self.at(scenario.popularity, _POPULARITY)
        prefix = model.name.split("-")[0].lower() + "__expert_counts__"
        asked = scenario.popularity is not None
        if popularity is not None and (asked or popularity.is_file()):
            arrays = read_arrays(popularity)
            counts = {key[len(prefix) :]: arrays[key] for key in sorted(arrays) if key.startswith(prefix)}
            if counts:
                return RoutingModel.of_domains(counts, (0, 7, 15), model, own, popularity.name), True
            if asked:
                raise ProblemError("popularity", f"{popularity} has no arrays {prefix}DOMAIN")
        return own.like(model.layers, model.experts, model.top_k, seed=scenario.seed), False

    def composed(
        self, routing: RoutingModel, arrivals: Arrivals
    ) -> tuple[Callable[[], Iterator[Passes]], str]:
        """Passes that are the same for every policy, and what is said about them."""
        scenario = self.scenario
        period, bank, every, seed = scenario.period, scenario.bank, scenario.decode_every, scenario.seed
        if scenario.batching == "continuous":
            how = (
                f"continuous batching, a pass every {period:g} s whatever it takes (composed once, the "
                "same for all); prompts are read in the first pass after their arrival"
            )
            if bank:
                how += f"; requests of a domain route in one of {bank} ways"
            return lambda: continuous(routing, arrivals, period=period, window=16, bank=bank, seed=seed), how
        writing = f"every {every}-th writing pass" if every else "no writing pass"
        batch = scenario.batch
        paper = "the paper's batching: the requests of one second together"
        together = paper if batch == 1 else f"the requests of {batch:g} s together"
        return lambda: one_second_batches(routing, arrivals, decode_every=every, seconds=batch, seed=seed), (
            f"{together}, one pass reads their prompts; "
            f"{writing} is simulated (which passes the paper's latency averages over is not said there)"
        )

    def closed(
        self, routing: Callable[[], RoutingModel | PlayedRoutes], arrivals: Arrivals
    ) -> tuple[Callable[[SimulatedBackend], ClosedLoop], str]:
        """The closed loop of each policy, and what is said about it."""
        scenario = self.scenario
        sheet = USABLE * GPUS[scenario.gpu_name].memory
        memory = sheet if scenario.memory is None else scenario.memory * 1e9

        def loop(backend: SimulatedBackend) -> ClosedLoop:
            return ClosedLoop(
                backend,
                routing(),
                arrivals,
                memory=memory,
                most_tokens=scenario.most_tokens,
                most_requests=scenario.most_requests,
                seed=scenario.seed,
            )

        return loop, (
            f"closed loop: a pass starts when the last one ends; at most {scenario.most_requests} requests "
            f"and {scenario.most_tokens} tokens in a pass; {memory / 1e9:.3g} GB of each GPU for weights and "
            "the KV cache, which spreads evenly; a request reserves its whole length and is never preempted "
            "(assumed). Passes differ from policy to policy"
        )


@cache
def _spreads(affinity: bool) -> RoutingModel:
    """Routing as the tiny MoE's: the spreads that generated routing has."""
    return RoutingModel.fit(tiny_moe_traces(), affinity=affinity)


def _fitting(traffic: Iterator[Passes], room: Room, topology: Topology) -> Iterator[Passes]:
    """The passes, none of which may need more KV cache than there is room for."""
    for passes in traffic:
        room.check_cache(topology, float(passes.kv_tokens_B.max()))
        yield passes


def _none() -> Iterator[Passes]:
    raise ProblemError("batching", "is closed: passes are made by the loop")
