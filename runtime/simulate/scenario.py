"""What is simulated: model, machine, traffic, predictions, policies, and the thresholds of these.

A `Scenario` says all of it in one frozen object. Every option of ``moeless-simulate`` that changes a figure
is a field here, and the command line is made from the fields (`cli`).
"""

# ruff: noqa: RUF009 (`option` makes a dataclass field, as `field` does)

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import MODEL_PRESETS, ModelSpec, Topology, model_preset
from moeless_opt.runtime.simulate.foresight import NAMES, TINY_MOE
from moeless_opt.runtime.simulate.hardware import BESIDE, GPUS, UNKNOWN, Beside, gpu_of, topology_of
from moeless_opt.runtime.simulate.model_file import read_model
from moeless_opt.runtime.simulate.options import (
    check_fields,
    documented,
    file,
    flag,
    name_of,
    option,
    real,
    unknown,
    whole_number,
)
from moeless_opt.runtime.simulate.policies import ABLATION, DEFAULT, Policy, get_policy
from moeless_opt.runtime.simulate.settings import Settings

__all__ = ["BATCHING", "Scenario", "ignored", "model_of"]

BATCHING = ("seconds", "continuous", "closed")
"""When requests share a forward pass."""

HALVES = ("both", "first", "second")
"""Which recorded requests are played; halves are disjoint, by request."""

_SYSTEM, _TRAFFIC, _ROUTING = "what runs where", "traffic", "routing and predictions"


def model_of(model: str | ModelSpec, sizes: str | None = None) -> ModelSpec:
    """A preset, the tiny MoE or a file's; with another preset's sizes of experts and hidden state."""
    if not isinstance(model, ModelSpec):
        if model.lower() == TINY_MOE.name:
            model = TINY_MOE
        else:
            model = read_model(model)[0] if _is_file(model) else model_preset(model)
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


# --------------------------------------------------------------------------------------------- checks


def _preset(where: str, value: Any, further: tuple[str, ...] = ()) -> str:
    names = (*MODEL_PRESETS, *further)
    if not isinstance(value, str) or value.lower() not in {name.lower() for name in names}:
        raise unknown(where, value, names)
    return value


def _is_file(model: object) -> bool:
    """Whether a model is named by a file: no preset's name, and there or spelled like one."""
    if not isinstance(model, str) or not model or model.lower() in {name.lower() for name in MODEL_PRESETS}:
        return False
    return model.endswith(".json") or os.sep in model or Path(model).is_dir()


def _model(where: str, value: Any) -> str | ModelSpec:
    if isinstance(value, ModelSpec):
        return value
    if _is_file(value):
        read_model(value)
        return str(value)
    return _preset(where, value, (TINY_MOE.name, "or a config.json"))


def _shape(where: str, value: Any) -> tuple[int, int] | None:
    """Hidden and inner width of an expert."""
    if value is None:
        return None
    if not isinstance(value, tuple) or len(value) != 2:
        raise ProblemError(where, f"is {value!r}, must be two whole numbers, hidden and inner width")
    hidden, inner = (whole(where, width, low=1) for width in value)
    return hidden, inner


def _two(text: str) -> tuple[int, int]:
    hidden, inner = text.lower().split("x")
    return int(hidden), int(inner)


def _sizes(where: str, value: Any) -> str | None:
    return None if value is None else _preset(where, value)


def _topology(where: str, value: Any) -> str | Topology | None:
    if value is None or isinstance(value, Topology):
        return value
    if not isinstance(value, str):
        raise ProblemError(where, f"is {value!r}, must be a Topology or the name of one")
    topology_of(value, None)
    return value


def _policies(where: str, value: Any) -> tuple[str | Policy, ...]:
    """Names, policies, or both; of a text its parts, of ``ablation`` what it stands for."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    elif isinstance(value, Policy):
        value = [value]
    try:
        found = tuple(value)
    except TypeError:
        raise ProblemError(where, f"is {value!r}, must be names of policies") from None
    if found == ("ablation",):
        found = ABLATION
    if not found:
        raise ProblemError(where, "names no policy")
    names = []
    for each in found:
        if not isinstance(each, str | Policy):
            raise ProblemError(where, f"has {each!r}, must be names or policies")
        names.append((each if isinstance(each, Policy) else get_policy(each)).name)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ProblemError(where, f"has {double!r} twice")
    return found


@documented
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scenario(Settings):
    """What is simulated.

    Raises
    ------
    ProblemError
        Naming the field that is wrong, or that nothing reads as the others are set.
    """

    model: str | ModelSpec = option(
        "Phi-3.5-MoE", (_model, str), "preset, tiny-moe, or a config.json", group=_SYSTEM
    )
    sizes: str | None = option(
        None, (_sizes, str), "preset whose experts' and hidden sizes to take instead", group=_SYSTEM
    )
    topology: str | Topology | None = option(
        None,
        (_topology, str),
        "preset, GPUSxKIND, NODESxGPUS, NODESxGPUSxKIND, or a topology file (.json)",
        shown="8 of --gpu, A6000 if that is not given either",
        group=_SYSTEM,
    )
    gpu: str | None = option(
        None,
        name_of(GPUS, optional=True),
        f"data sheet for the times ({', '.join(GPUS)})",
        shown="what --topology says, else H100",
        group=_SYSTEM,
    )
    timings: Path | None = option(
        None, file(), "measured expert kernel times of the GPU, instead of a roofline", group=_SYSTEM
    )
    timed: tuple[int, int] | None = option(
        None,
        (_shape, _two),
        "hidden and inner width of the expert that was timed",
        metavar="HIDDENxFFN",
        shown="the model's own",
        group=_SYSTEM,
    )
    in_turn: bool = option(
        False,
        flag(),
        "measured kernel times: each expert's by its own tokens, not by its GPU's, spread evenly",
        group=_SYSTEM,
    )
    slots: int | None = option(
        None,
        whole_number(1, optional=True),
        "replicas per GPU and layer",
        shown="what static needs, and --spare",
        group=_SYSTEM,
    )
    spare: int | None = option(
        None,
        whole_number(optional=True),
        "slots per GPU and layer beyond what static needs",
        shown="1, or 0 where that does not fit",
        group=_SYSTEM,
    )
    memory: float | None = option(
        None,
        real(open_low=True, optional=True),
        "of a GPU for weights and KV cache",
        unit="GB",
        shown="95% of the data sheet",
        group=_SYSTEM,
    )
    policies: tuple[str | Policy, ...] = option(
        DEFAULT,
        (_policies, str),
        "comma-separated, or 'ablation'",
        metavar="A,B,C",
        shown=",".join(DEFAULT),
        group=_SYSTEM,
    )
    batching: str = option(
        "seconds", name_of(BATCHING), f"when requests share a pass: {', '.join(BATCHING)}", group=_TRAFFIC
    )
    period: float = option(
        0.05, real(open_low=True), "of continuous batching", unit="seconds", group=_TRAFFIC
    )
    decode_every: int = option(
        0, whole_number(), "with --batching seconds: also every n-th writing pass", group=_TRAFFIC
    )
    batch: float = option(
        1.0,
        real(open_low=True),
        "with --batching seconds: whose arrivals share a pass",
        unit="seconds",
        group=_TRAFFIC,
    )
    most_tokens: int = option(8192, whole_number(1), "of a pass with --batching closed", group=_TRAFFIC)
    most_requests: int = option(256, whole_number(1), "of a pass with --batching closed", group=_TRAFFIC)
    seconds: float = option(300.0, real(), "of arrivals (0: all)", unit="seconds", group=_TRAFFIC)
    data: Path | None = option(
        None,
        file(),
        "folder of recordings: Azure arrivals, ShareGPT lengths, A6000 kernel times",
        metavar="FOLDER",
        group=_TRAFFIC,
    )
    arrivals: Path | None = option(
        None, file(), "Azure or Mooncake request trace", shown="Poisson, 5.5/s", group=_TRAFFIC
    )
    rate: float | None = option(
        None,
        real(open_low=True, optional=True),
        "Poisson arrivals instead of recorded ones",
        unit="requests per second",
        metavar="R",
        group=_TRAFFIC,
    )
    lengths: Path | None = option(
        None,
        file(),
        "prompt and answer lengths in place of the arrivals' own; with --traces, of its requests in order",
        group=_TRAFFIC,
    )
    traces: Path | None = option(
        None, file(), "token traces (.npz): routing measured instead of generated", group=_ROUTING
    )
    stay: float | None = option(
        None,
        real(high=1.0, optional=True),
        "chance that a request has its forerunner's domain; 0: a pass mixes domains, 1: it has one alone",
        metavar="P",
        shown="0.9; 0 for token traces of a file",
        group=_ROUTING,
    )
    half: str = option(
        "both",
        name_of(HALVES),
        f"token traces: half of the requests, one to tune on and one to judge by: {', '.join(HALVES)}",
        group=_ROUTING,
    )
    popularity: Path | None = option(
        None, file(), "expert counts per domain (.npz) to take the popularity from", group=_ROUTING
    )
    skew: float = option(
        1.0,
        real(open_low=True),
        "generated routing: power to which the popularity is raised, 1: as it is",
        group=_ROUTING,
    )
    affinity: bool = option(
        False, flag(), "generated routing: layers depend on the ones before", group=_ROUTING
    )
    bank: int = option(
        0,
        whole_number(),
        "continuous batching: routing kinds of a domain that requests share; 0: each its own",
        group=_ROUTING,
    )
    predictor: str = option(
        "assumed", name_of(NAMES), f"what the per-pass policies plan by: {', '.join(NAMES)}", group=_ROUTING
    )
    predictions: Path | None = option(
        None, file(), "token traces with recorded predictions beside them (.npz)", group=_ROUTING
    )

    def __post_init__(self) -> None:
        check_fields(self)
        gpu_of(self.machine, self.gpu)
        for name, why in ignored({part.name: getattr(self, part.name) for part in fields(self)}).items():
            raise ProblemError(name, why)

    @property
    def chosen(self) -> tuple[Policy, ...]:
        """The policies themselves."""
        return tuple(each if isinstance(each, Policy) else get_policy(each) for each in self.policies)

    @property
    def model_spec(self) -> ModelSpec:
        """The model, with the sizes that were asked for."""
        return model_of(self.model, self.sizes)

    @property
    def beside(self) -> Beside:
        """What the model holds beside its experts."""
        if isinstance(self.model, str) and _is_file(self.model):
            return read_model(self.model)[1]
        return BESIDE.get(model_of(self.model).name, UNKNOWN)

    @property
    def gpu_name(self) -> str:
        """What the GPUs are."""
        return gpu_of(self.machine, self.gpu)

    @property
    def machine(self) -> str | Topology:
        """The topology, or the name of one."""
        return f"8x{self.gpu or 'A6000'}" if self.topology is None else self.topology

    @property
    def tiny(self) -> bool:
        """Whether it is the project's own model, whose recordings ship with the package."""
        return _tiny(self.model)

    @property
    def played(self) -> bool:
        """Whether routing is that of recorded tokens."""
        return self.tiny or self.traces is not None or self.predictions is not None


def _tiny(model: str | ModelSpec) -> bool:
    return (model.name if isinstance(model, ModelSpec) else model).lower() == TINY_MOE.name


# ------------------------------------------------------------------------------ what nothing would read


def ignored(values: Mapping[str, Any]) -> dict[str, str]:
    """Fields that differ from their defaults and make no difference, with the reason of each.

    Parameters
    ----------
    values : mapping
        Of every field of a `Scenario`; each is right by itself.
    """
    default = {part.name: part.default for part in fields(Scenario)}
    found: dict[str, str] = {}
    for names, unread, why in (*_by_mode(values), *_by_policy(values)):
        for name in names:
            if unread and name not in found and values[name] != default[name]:
                found[name] = f"is set to {_shown(values[name])}, but {why}"
    return found


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)


def _by_mode(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Fields, whether the traffic or the machine leaves them unread, and why."""
    batching = values["batching"]
    tiny = _tiny(values["model"])
    played = tiny or values["traces"] is not None or values["predictions"] is not None
    generated = "it is for generated routing; here recorded tokens are routed"
    yield ("affinity", "skew", "popularity", "bank", "decode_every", "batch"), played, generated
    yield ("lengths",), played and batching != "closed", "recorded texts are as long as they are"
    yield ("half",), not played, "it is for token traces; here routing is generated"
    learns = values["predictor"] == "affinity" and values["predictions"] is None
    yield ("half",), played and learns, "affinity learns from the first half and is judged by the second"
    yield ("decode_every",), batching != "seconds", f"it is for batching 'seconds', not {batching!r}"
    yield ("batch",), batching != "seconds", f"it is for batching 'seconds', not {batching!r}"
    yield ("bank",), batching != "continuous", f"it is for batching 'continuous', not {batching!r}"
    closed = ("most_tokens", "most_requests")
    yield closed, batching != "closed", f"it is for batching 'closed', not {batching!r}"
    # Recorded answers are written token by token at a period; texts that can be read at once are not.
    at_once = batching == "seconds" and (not played or (tiny and values["traces"] is None))
    at_once = at_once and values["predictions"] is None
    yield ("period",), at_once or batching == "closed", f"passes follow from batching {batching!r}"
    yield ("rate",), values["arrivals"] is not None, "arrivals are read from a file"
    yield ("spare",), values["slots"] is not None, "slots say how many there are"
    given = values["topology"]
    given = isinstance(given, Topology) or (given is not None and topology_of(given, None)[1])
    yield ("timed",), values["timings"] is None, "no timings are given"
    yield ("slots", "spare"), given, "the topology has slots or memory of its own"
    yield ("error",), values["predictor"] != "assumed", f"predictor is {values['predictor']!r}"


def _by_policy(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Fields that only some policies read."""
    policies = [each if isinstance(each, Policy) else get_policy(each) for each in values["policies"]]
    read = frozenset[str]().union(*(policy.settings_read for policy in policies))
    own = {part.name for part in fields(Settings)} - {"seed", "charge_once"} | {"predictor"}
    names = ", ".join(policy.name for policy in policies)
    yield tuple(sorted(own - read)), True, f"no policy of {names} reads it"
