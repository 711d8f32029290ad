"""The policies that the simulator compares, by name: what each holds, when it plans, how it shares tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.problems.spec.wishes import Objective, Sizing
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.layer_planner import LayerPlanner
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.pool.keep_alive import AdaptiveKeepAlive, KeepAlive
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.solvers.baselines.static import contiguous

__all__ = ["POLICIES", "Policy", "Settings", "build"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run may vary; every value is printed with the results.

    Parameters
    ----------
    cv : float
        MoEless's threshold.
    distance : int
        Layers ahead of a prediction.
    error : float
        Share of the pairs that a prediction one layer ahead gets wrong; at distance d, 1 - (1 - error)^d.
    keep_alive : float or "adaptive"
        Seconds that unused replicas stay, for the per-pass policies.
    tolerance : float
        Balance tolerance of ours, windowed.
    gain : float
        Share of a layer's time that a replica loaded by ours, per pass, has to save.
    every : int
        Passes between two plans of the windowed policies.
    seed : int
        For everything random.
    """

    cv: float = 0.2
    distance: int = 1
    error: float = 0.1
    keep_alive: float | str = 10.0
    tolerance: float = 0.1
    gain: float = 0.02
    every: int = 16
    seed: int = 0

    @property
    def error_at_distance(self) -> float:
        """Share of the pairs that the predictor gets wrong."""
        return 1.0 - (1.0 - self.error) ** self.distance

    def keeps(self) -> KeepAlive | float:
        """A keep-alive policy of one's own for one run."""
        if self.keep_alive == "adaptive":
            return AdaptiveKeepAlive()
        if isinstance(self.keep_alive, str):
            raise ProblemError("keep_alive", f"is {self.keep_alive!r}, must be seconds or 'adaptive'")
        return float(self.keep_alive)


@dataclass(frozen=True, slots=True)
class Policy:
    """How to serve.

    Parameters
    ----------
    text : str
        For people.
    shares : str
        See `SimulatedBackend`.
    mode : str
        ``never`` plans, ``windowed``, or ``per-pass`` from a prediction.
    elastic : bool
        Whether replicas are functions.
    solver, split : str
        As in `moeless_opt.plan`.
    predictor : str
        ``model``: `predicted` with the settings' error; ``last``: the pass before.
    scales, remembers : bool
        Whether the scaler adds replicas, and whether the placer looks at warm ones.
    """

    text: str
    shares: str
    mode: str = "never"
    elastic: bool = False
    solver: str = "auto"
    split: str = "fractional"
    predictor: str = "model"
    scales: bool = True
    remembers: bool = True


def _moeless(text: str, **changes: object) -> Policy:
    parts: dict[str, object] = {"solver": "moeless", "split": "equal", **changes}
    return Policy(text, "equal", "per-pass", True, **parts)  # type: ignore[arg-type]


POLICIES: dict[str, Policy] = {
    "static": Policy("Megatron-LM's static expert parallelism", "equal"),
    "eplb": Policy(
        "DeepSeek's EPLB, per window on its loads", "planned", "windowed", solver="eplb", split="equal"
    ),
    "oracle": Policy("perfect balance whatever the router chose, static memory: a bound", "oracle"),
    "moeless": _moeless("the paper's scaler and placer, per pass, from a prediction"),
    "moeless-no-predictor": _moeless("... with the last pass's loads for a prediction", predictor="last"),
    "moeless-no-scaler": _moeless("... with one replica per expert", scales=False),
    "moeless-no-placer": _moeless("... placed anew without a look at what is warm", remembers=False),
    "stay": Policy("one plan after the first window, live shares ever after", "timed", "windowed", True),
    "ours-windowed": Policy("few moves per window on its loads, live shares", "timed", "windowed", True),
    "ours": Policy(
        "per pass from the same prediction, by the time model: moves only what pays, live shares",
        "timed",
        "per-pass",
        True,
        solver="per-layer",
    ),
}  # fmt: skip
"""What the command offers."""


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
        from moeless_opt.api import plan

        p = self.planner
        return plan(load_LE, p.topology, solver=p.solver, split=p.split, **p.options)


class _Warm:
    """Plans from all that is warm, kept-alive replicas as well as those in force."""

    def __init__(self, planner: Planner, backend: SimulatedBackend) -> None:
        self.planner, self.backend = planner, backend

    def __call__(self, load_LE: FloatArray, live_LGC: SlotArray) -> Plan:
        return self.planner(load_LE, self.backend.warm_LGC)


@dataclass(slots=True)
class Run:
    """A backend, and who controls it."""

    backend: SimulatedBackend
    controller: Controller | None
    policy: Policy
    per_pass: bool = field(default=False)


def build(name: str, machine: Machine, topology: Topology, settings: Settings) -> Run:
    """Set up a policy on a machine; it starts from static expert parallelism.

    Raises
    ------
    ProblemError
        If there is no such policy.
    """
    if name not in POLICIES:
        raise ProblemError("policy", f"{name!r} is unknown; there are {', '.join(POLICIES)}")
    policy, model = POLICIES[name], machine.model
    bytes_L = np.full(model.layers, model.expert_bytes, dtype=np.int64)
    capacity_LG = topology.capacity_LG(bytes_L, model.experts)
    backend = SimulatedBackend(
        machine,
        contiguous(model.experts, capacity_LG),
        capacity_LG,
        shares=policy.shares,
        transfers="per-pass" if policy.mode == "per-pass" else "overlapped",
        distance=settings.distance,
        keep_alive=settings.keeps() if policy.mode == "per-pass" else 0.0,
        elastic=policy.elastic,
    )
    if policy.mode == "never":
        return Run(backend, None, policy)
    if policy.solver == "per-layer":
        per_layer = LayerPlanner(
            topology,
            model,
            machine.time,
            per_token=machine.link_per_token,
            distance=settings.distance,
            gain=settings.gain,
        )
        return Run(backend, Controller(backend, per_layer, every=settings.every), policy, True)
    options: dict[str, object] = {"model": model}
    if policy.solver == "moeless":
        options["sizing"] = Sizing(policy="cv", cv=settings.cv if policy.scales else 1e9)
    elif policy.solver == "auto":
        options["objective"] = Objective(balance_tolerance=settings.tolerance)
    planner = Planner(topology=topology, solver=policy.solver, split=policy.split, options=options)
    chosen: Callable[[FloatArray, SlotArray], Plan] = planner
    if name == "stay":
        chosen = _Once(planner)
    elif not policy.remembers:
        chosen = _Forgetful(planner)
    elif policy.mode == "per-pass":
        chosen = _Warm(planner, backend)
    controller = Controller(backend, chosen, every=settings.every)
    return Run(backend, controller, policy, policy.mode == "per-pass")
