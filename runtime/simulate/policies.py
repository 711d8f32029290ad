"""The policies that the simulator compares: what each holds, when it plans, how it shares tokens.

A `Policy` sets itself up: backend, planner, controller. Ours are here by name; others come in by entry point,
in the group ``moeless_opt.policies``, each a `Policy` or a function without arguments that makes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from moeless_opt.api import plan
from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import Objective, Sizing, Topology, contiguous
from moeless_opt.runtime.control import Controller, LayerPlanner, Planner, PlanWindow, WorthMoving
from moeless_opt.runtime.simulate.backend import SimulatedBackend, Terms
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.options import unknown
from moeless_opt.runtime.simulate.settings import Settings
from moeless_opt.runtime.simulate.shares import (
    EqualRule,
    FoundRule,
    PerfectRule,
    PlannedRule,
    ShareRule,
    TimedRule,
)
from moeless_opt.runtime.simulate.transfers import Overlapped, PerPass, Sooner, Transfers, WarmFirst

__all__ = [
    "ABLATION",
    "BASELINE",
    "BOUND",
    "DEFAULT",
    "POLICIES",
    "READINGS",
    "SYSTEM",
    "Policy",
    "Run",
    "Site",
    "get_policy",
    "list_policies",
    "policy_names",
]

Plans = Callable[[FloatArray, SlotArray], Plan] | PlanWindow

SYSTEM, BASELINE, BOUND = "system", "baseline", "bound"
"""Parts of a policy in a table: one of many, what all others are set against, what none reaches."""

#: Settings that every policy with a planner reads, by how it plans.
_WINDOWED = frozenset({"every", "contention"})
_PER_PASS = frozenset({"distance", "keep_alive", "decide_ms", "contention"})
_LIVE = frozenset({"split", "believed"})
_FORESEEN = frozenset({"predictor", "error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a policy is set up: what its planner may look at.

    Parameters
    ----------
    machine, topology : Machine, Topology
        Times; GPUs.
    settings : Settings
        Thresholds.
    backend : SimulatedBackend
        What will serve.
    """

    machine: Machine
    topology: Topology
    settings: Settings
    backend: SimulatedBackend


@dataclass(slots=True, kw_only=True)
class Run:
    """A policy on a machine: a backend, and who controls it."""

    policy: Policy
    backend: SimulatedBackend
    controller: Controller | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How to serve.

    Parameters
    ----------
    name, summary : str
        For tables and for people.
    shares : ShareRule
        How replicas share their tokens.
    transfers : Transfers
        How missing weights come. `PerPass`: it plans before every pass, from a prediction; else after windows
        of passes, from their loads.
    planner : callable, optional
        Given the `Site`, what makes a plan of loads [L, E] and the live slots [L, G, C]. None: what it starts
        with stays, static expert parallelism.
    elastic : bool
        Whether replicas are functions, for the charging rules.
    interval : float, optional
        Seconds between two plans of a policy that plans after passes, instead of `every` passes.
    predictor : str, optional
        The predictor that belongs to it, whatever the scenario's is.
    reads : frozenset of str
        Fields of `Settings` that its planner looks at, besides what all planners of its kind do.
    part : {"system", "baseline", "bound"}
        What it is in a comparison.
    compared : bool
        Whether tables have a column of mean latencies against this policy's.
    colour, marker : str
        Of its figures, as matplotlib names them.

    Raises
    ------
    ProblemError
        If a field is not what it has to be.
    """

    name: str
    summary: str
    shares: ShareRule
    transfers: Transfers = Overlapped()  # noqa: RUF009 (it keeps nothing)
    planner: Callable[[Site], Plans] | None = None
    elastic: bool = False
    interval: float | None = None
    predictor: str | None = None
    reads: frozenset[str] = frozenset()
    part: str = SYSTEM
    compared: bool = False
    colour: str = "#777777"
    marker: str = "o"

    def __post_init__(self) -> None:
        for name in ("name", "summary", "colour", "marker"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ProblemError(f"policy.{name}", f"is {getattr(self, name)!r}, must be a text")
        if not isinstance(self.shares, ShareRule):
            raise ProblemError("policy.shares", f"is {self.shares!r}, must be a rule (see `shares`)")
        if not isinstance(self.transfers, Transfers):
            raise ProblemError("policy.transfers", f"is {self.transfers!r}, must be one of `transfers`")
        if self.planner is not None and not callable(self.planner):
            raise ProblemError("policy.planner", f"is {self.planner!r}, must be callable")
        if self.part not in (SYSTEM, BASELINE, BOUND):
            raise unknown("policy.part", self.part, (SYSTEM, BASELINE, BOUND))

    @property
    def per_pass(self) -> bool:
        """Whether it plans before every pass, from a prediction."""
        return self.planner is not None and self.transfers.per_pass

    @property
    def settings_read(self) -> frozenset[str]:
        """Fields of a scenario that make a difference to this policy and not to every one."""
        reads = self.reads | (_LIVE if self.shares.live else frozenset())
        if self.planner is None:
            return reads
        if not self.per_pass:
            return reads | (_WINDOWED if self.interval is None else _WINDOWED - {"every"})
        if isinstance(self.transfers, Sooner):
            reads |= {"believed"}
        return reads | _PER_PASS | (_FORESEEN if self.predictor is None else frozenset())

    def build(self, machine: Machine, topology: Topology, settings: Settings, *, room: float = np.inf) -> Run:
        """Set the policy up on a machine; it starts from static expert parallelism.

        `room`: bytes of experts that each GPU may hold at any moment, replicas on their way included.
        """
        model = machine.model
        bytes_L = np.full(model.layers, model.expert_bytes, dtype=np.int64)
        capacity_LG = topology.capacity_LG(bytes_L, model.experts)
        backend = SimulatedBackend(
            machine,
            contiguous(model.experts, capacity_LG),
            capacity_LG,
            shares=self.shares,
            transfers=self.transfers,
            distance=settings.distance,
            keep_alive=settings.keeps() if self.transfers.per_pass else 0.0,
            contention=settings.contention,
            decide_seconds=settings.decide_ms * 1e-3,
            terms=Terms(
                believed=None if settings.believed == "exact" else machine.believed(settings.believed),
                learns=settings.believed == "learnt" and "believed" in self.settings_read,
                split_seconds=settings.split_seconds(model.experts, topology.gpus),
                elastic=self.elastic,
                charge_once=settings.charge_once,
                room=room,
            ),
        )
        if self.planner is None:
            return Run(policy=self, backend=backend, controller=None)
        site = Site(machine=machine, topology=topology, settings=settings, backend=backend)
        controller = Controller(
            backend, self.planner(site), every=settings.every if self.interval is None else 1
        )
        return Run(policy=self, backend=backend, controller=controller)


# ------------------------------------------------------------------------------------------- planners


class _Once:
    """The first plan, for ever."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.plan: Plan | None = None

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        self.plan = self.plan or self.planner(load_LE, live_LGC)
        return self.plan


class _Forgetful:
    """Plans from nothing, whatever is live."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        p = self.planner
        return plan(load_LE, p.topology, solver=p.solver, split=p.split, **p.options)


class _Warm:
    """Plans from all that is warm, kept-alive replicas as well as those in force."""

    def __init__(self, planner: Planner, backend: SimulatedBackend) -> None:
        self.planner, self.backend = planner, backend

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        return self.planner(load_LE, self.backend.warm_LGC)


def _eplb(site: Site) -> Planner:
    return Planner(
        topology=site.topology, solver="eplb", split="equal", options={"model": site.machine.model}
    )


def _few_moves(site: Site) -> Planner:
    objective = Objective(balance_tolerance=site.settings.tolerance)
    return Planner(topology=site.topology, options={"model": site.machine.model, "objective": objective})


def _moves_that_pay(site: Site) -> WorthMoving:
    machine, settings, beliefs = site.machine, site.settings, site.backend.beliefs
    return WorthMoving(
        _few_moves(site),
        site.topology,
        machine.model,
        lambda: beliefs.time,
        per_token=machine.link_per_token,
        split=settings.split_seconds(machine.model.experts, site.topology.gpus),
        gain=settings.gain,
    )


def _moeless(site: Site, cv: float | None = None, within: float | None = None) -> Planner:
    """The paper's scaler and placer; with a coefficient of variation that no layer exceeds, no scaler."""
    sizing = Sizing(policy="cv", cv=site.settings.cv if cv is None else cv)
    return Planner(
        topology=site.topology,
        solver="moeless",
        split="equal",
        options={"model": site.machine.model, "sizing": sizing, "within": within},
    )


class _ByTime:
    """Plans by the times that the backend believes at the moment."""

    def __init__(self, site: Site) -> None:
        machine, settings = site.machine, site.settings
        self.backend = site.backend
        self.planner = LayerPlanner(
            site.topology,
            machine.model,
            site.backend.beliefs.time,
            per_token=machine.link_per_token,
            distance=settings.distance,
            gain=settings.gain,
        )

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        if self.backend.beliefs.time is not self.planner.time:
            self.planner.plan_by(self.backend.beliefs.time)
        return self.planner(load_LE, live_LGC)


# ------------------------------------------------------------------------------------------- our own

_EQUAL, _TIMED, _PER_PASS_WAY = EqualRule(), TimedRule(), Sooner()

_OURS = (
    Policy(
        name="static",
        summary="Megatron-LM's static expert parallelism",
        shares=_EQUAL,
        part=BASELINE,
        compared=True,
        colour="#000000",
        marker="o",
    ),
    Policy(
        name="eplb",
        summary="DeepSeek's EPLB, every second on its loads",
        shares=PlannedRule(),
        planner=_eplb,
        interval=1.0,
        compared=True,
        colour="#E69F00",
        marker="s",
    ),
    Policy(
        name="eplb-window",
        summary="... per window of passes",
        shares=PlannedRule(),
        planner=_eplb,
        colour="#BB8800",
        marker="8",
    ),
    Policy(
        name="eplb-live",
        summary="... every second, and live shares",
        shares=_TIMED,
        planner=_eplb,
        interval=1.0,
        elastic=True,
        colour="#DDAA33",
        marker="1",
    ),
    Policy(
        name="oracle",
        summary="perfect balance whatever the router chose, static memory: a bound",
        shares=PerfectRule(),
        part=BOUND,
        compared=True,
        colour="#999999",
        marker="^",
    ),
    Policy(
        name="oracle-placed",
        summary="the same slots, loads known, true times; moves and shares free: what placing could do",
        shares=FoundRule(),
        part=BOUND,
        colour="#666666",
        marker="2",
    ),
    Policy(
        name="moeless",
        summary="the paper's scaler and placer, per pass, from a prediction",
        shares=_EQUAL,
        transfers=_PER_PASS_WAY,
        planner=lambda site: _Warm(_moeless(site), site.backend),
        elastic=True,
        reads=frozenset({"cv"}),
        colour="#D55E00",
        marker="D",
    ),
    Policy(
        name="moeless-waits",
        summary="... every layer waits for all its cold replicas",
        shares=_EQUAL,
        transfers=PerPass(),
        planner=lambda site: _Warm(_moeless(site), site.backend),
        elastic=True,
        reads=frozenset({"cv"}),
        colour="#AA3377",
        marker="d",
    ),
    Policy(
        name="moeless-warm",
        summary="... no layer waits: warm replicas serve until the cold ones have come",
        shares=_EQUAL,
        transfers=WarmFirst(),
        planner=lambda site: _Warm(_moeless(site), site.backend),
        elastic=True,
        reads=frozenset({"cv"}),
        colour="#EE6677",
        marker="p",
    ),
    Policy(
        name="moeless-within",
        summary="... warm replicas only where their GPU stays within a tenth of the mean load",
        shares=_EQUAL,
        transfers=_PER_PASS_WAY,
        planner=lambda site: _Warm(_moeless(site, within=0.1), site.backend),
        elastic=True,
        reads=frozenset({"cv"}),
        colour="#994455",
        marker="+",
    ),
    Policy(
        name="moeless-no-predictor",
        summary="... with the last pass's loads for a prediction",
        shares=_EQUAL,
        transfers=_PER_PASS_WAY,
        planner=lambda site: _Warm(_moeless(site), site.backend),
        elastic=True,
        predictor="last",
        reads=frozenset({"cv"}),
        colour="#009E73",
        marker="v",
    ),
    Policy(
        name="moeless-no-scaler",
        summary="... with one replica per expert",
        shares=_EQUAL,
        transfers=_PER_PASS_WAY,
        planner=lambda site: _Warm(_moeless(site, cv=1e9), site.backend),
        elastic=True,
        colour="#56B4E9",
        marker="P",
    ),
    Policy(
        name="moeless-no-placer",
        summary="... placed anew without a look at what is warm",
        shares=_EQUAL,
        transfers=_PER_PASS_WAY,
        planner=lambda site: _Forgetful(_moeless(site)),
        elastic=True,
        reads=frozenset({"cv"}),
        colour="#CC79A7",
        marker="*",
    ),
    Policy(
        name="stay",
        summary="one plan after the first window, live shares ever after",
        shares=_TIMED,
        planner=lambda site: _Once(_few_moves(site)),
        elastic=True,
        reads=frozenset({"tolerance"}),
        colour="#F0E442",
        marker="X",
    ),
    Policy(
        name="ours-windowed",
        summary="few moves per window on its loads, in layers that gain by them; live shares",
        shares=_TIMED,
        planner=_moves_that_pay,
        elastic=True,
        reads=frozenset({"tolerance", "gain"}),
        colour="#56B4E9",
        marker="<",
    ),
    Policy(
        name="ours",
        summary="per pass from the same prediction, by the time model: moves only what pays, live shares",
        shares=_TIMED,
        transfers=_PER_PASS_WAY,
        planner=_ByTime,
        elastic=True,
        reads=frozenset({"gain"}),
        colour="#0072B2",
        marker=">",
    ),
    Policy(
        name="ours-waits",
        summary="... every layer waits for all that it loads",
        shares=_TIMED,
        transfers=PerPass(),
        planner=_ByTime,
        elastic=True,
        reads=frozenset({"gain"}),
        colour="#004488",
        marker="h",
    ),
    Policy(
        name="ours-warm",
        summary="... no layer waits: what is there serves until a load has come",
        shares=_TIMED,
        transfers=WarmFirst(),
        planner=_ByTime,
        elastic=True,
        reads=frozenset({"gain"}),
        colour="#66CCEE",
        marker="H",
    ),
)

POLICIES: dict[str, Policy] = {policy.name: policy for policy in _OURS}
"""The policies that ship with the package."""

READINGS = (
    "static",
    "eplb-window",
    "eplb",
    "eplb-live",
    "moeless-waits",
    "moeless-warm",
    "moeless",
    "moeless-within",
    "moeless-no-placer",
    "ours-waits",
    "ours-warm",
    "ours",
)
"""Methods in all their readings."""

DEFAULT = ("static", "eplb", "oracle", "moeless", "ours-windowed", "ours")
"""What is compared where nothing is said."""

ABLATION = ("static", "eplb", "moeless", "moeless-no-predictor", "moeless-no-scaler", "moeless-no-placer")
"""What ``ablation`` stands for."""


# ------------------------------------------------------------------------------------------- registry

ENTRY_POINTS = "moeless_opt.policies"
_UNUSABLE = "cannot be used: "


def _plugged() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    return {name: found[name] for name in sorted(found) if name not in POLICIES}


def policy_names() -> list[str]:
    """Names of all policies, ours first; of others whether they can be used or not."""
    return [*POLICIES, *_plugged()]


def get_policy(name: str) -> Policy:
    """A policy by its name.

    Raises
    ------
    ProblemError
        If there is none of that name.
    SolverUnavailableError
        If it comes from another package and cannot be used.
    """
    if name in POLICIES:
        return POLICIES[name]
    entry = _plugged().get(name)
    if entry is None:
        raise unknown("policies", name, policy_names())
    unusable = f"policies: {name!r} ({entry.value}) {_UNUSABLE}"
    try:
        found = entry.load()
        policy = found if isinstance(found, Policy) else found()
    except Exception as error:  # whatever another package does, the others go on
        raise SolverUnavailableError(f"{unusable}{type(error).__name__}: {error}") from error
    if not isinstance(policy, Policy):
        raise SolverUnavailableError(f"{unusable}it makes a {type(policy).__name__}, no Policy")
    if policy.name != name:
        raise SolverUnavailableError(f"{unusable}its policy calls itself {policy.name!r}")
    return policy


def list_policies() -> dict[str, Policy | str]:
    """All policies by name; in place of one that cannot be used the reason, which is also warned of."""
    rows: dict[str, Policy | str] = {}
    for name in policy_names():
        try:
            rows[name] = get_policy(name)
        except SolverUnavailableError as error:
            warnings.warn(str(error), stacklevel=2)
            rows[name] = str(error).partition(_UNUSABLE)[2]
    return rows
