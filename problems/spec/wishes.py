"""What is wanted (Objective), what is allowed (Limits), and how many replicas there are to be (Sizing)."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import IntArray, Record, integers, number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = [
    "EVERY_PRIORITY",
    "FILLS",
    "MOST_ENTRIES",
    "PRIORITIES",
    "SPLITS",
    "Fill",
    "Groups",
    "Limits",
    "Objective",
    "Priority",
    "Risk",
    "Sizing",
    "SizingPolicy",
    "Split",
    "risk_rule",
]


class _Choice(enum.StrEnum):
    """One of several words. A plain string of the same letters is as good, and it prints as one."""

    def __repr__(self) -> str:
        return repr(self.value)


class Split(_Choice):
    """How an expert's tokens are divided over its replicas."""

    FRACTIONAL = "fractional"
    """Freely: every replica has a share of its own."""
    EQUAL = "equal"
    """Evenly, for engines that cannot weight."""
    NEAREST = "nearest"
    """By source: to the replica on the same GPU, else evenly to those on the node, else evenly to all."""


class Fill(_Choice):
    """Whether every slot of a plan must hold an expert, as inference engines want."""

    NONE = "none"
    """Slots may stay empty; no expert is twice on a GPU."""
    DISTINCT = "distinct"
    """Every slot is full; no expert is twice on a GPU."""
    COPIES = "copies"
    """Every slot is full; a GPU may hold several copies of an expert. Of n slots of an expert, each gets one
    n-th of its tokens under an equal split: a GPU with k of them serves k/n."""


class Priority(_Choice):
    """What can be minimised."""

    BALANCE = "balance"
    MOVES = "moves"
    TRAFFIC = "traffic"
    MEMORY = "memory"
    GROUPS = "groups"
    """Tokens served outside the node of their expert's group (see `Groups`)."""
    HOPS = "hops"
    """What following tokens from layer to layer costs (see ``Loads.flow_LEE``)."""
    SURVIVAL = "survival"
    """The probability that failing domains lose an expert (see ``Objective.failure_rate``)."""


class Risk(_Choice):
    """How the time of a layer is taken over several load scenarios."""

    EXPECTED = "expected"
    CVAR = "cvar"
    WORST = "worst"
    SIGMA = "sigma"
    COVARIANCE = "covariance"


class SizingPolicy(_Choice):
    """Which rule says how many replicas there are (see `Sizing`)."""

    SLOTS = "slots"
    FILL = "fill"
    CV = "cv"
    MAKESPAN = "makespan"
    MEMORY = "memory"


_MOST_DEVIATIONS = 1e3
_LOOSEST = 1e6  # beyond it anything is balanced; token counts within it stay below 64 bits
MOST_ENTRIES = 1 << 16
"""Entries that a dispatch table may have for an expert."""

SPLITS = tuple(Split)
FILLS = tuple(Fill)
EVERY_PRIORITY = tuple(Priority)
PRIORITIES = (Priority.BALANCE, Priority.MOVES, Priority.TRAFFIC, Priority.MEMORY)
"""The default order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective(Record):
    """What to minimise, in order, each within the tolerance of the one before.

    Parameters
    ----------
    priorities : tuple of Priority or str
        From ``balance``, ``moves``, ``traffic``, ``memory`` (the default), ``groups``, ``hops`` and
        ``survival``, in any order; the first weighs most. See
        ``docs/formulation.md`` for who minimises which order how well.
    balance_tolerance : float
        A layer's largest GPU time may be this share above its least where a later priority gains by it.
    horizon : float, optional
        Forward passes until the next plan. With it a replica moves only if the time that it saves
        over the horizon exceeds the time of its transfer.
    risk : Risk or str
        How the time of a layer is taken over several load scenarios: ``"expected"``, ``"cvar"``, ``"worst"``,
        or ``"sigma"``: the mean and `sigma` standard deviations above it; or ``"covariance"``: the mean and
        `sigma` standard deviations of each GPU's time under one split for all scenarios, of the GPU where
        that is most. Shares that cannot follow the traffic, and a whole history as scenarios, are its case.
    cvar_alpha : float
        Level of the CVaR: the mean over the worst ``1 - cvar_alpha`` of the weight.
    sigma : float
        How many deviations. With the risk ``"sigma"`` 0 to 1, and counted is what lies above the mean (the
        upper semideviation), so that no plan gains by being slower in its good scenarios. With
        ``"covariance"`` at least 0, and of standard deviations: experts that are busy at different times make
        up for each other.
    failure_rate : float
        With the priority ``survival``: probability that a failure domain fails, each by itself, until the
        placement is mended; 0.0001 to 0.5.
    """

    priorities: tuple[str, ...] = PRIORITIES
    balance_tolerance: float = 0.01
    horizon: float | None = None
    risk: str = Risk.EXPECTED
    cvar_alpha: float = 0.9
    sigma: float = 1.0
    failure_rate: float = 0.01

    def __post_init__(self) -> None:
        put = object.__setattr__
        given: object = self.priorities
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ProblemError("objective.priorities", f"is {given!r}, must be a list from {EVERY_PRIORITY}")
        put(self, "priorities", tuple(given))
        unknown = [p for p in self.priorities if p not in EVERY_PRIORITY]
        if unknown or not self.priorities or len(set(self.priorities)) != len(self.priorities):
            raise ProblemError(
                "objective.priorities", f"is {self.priorities}, must be distinct, from {EVERY_PRIORITY}"
            )
        put(self, "priorities", tuple(Priority(p) for p in self.priorities))
        put(self, "balance_tolerance", number("objective.balance_tolerance", self.balance_tolerance))
        if self.balance_tolerance > _LOOSEST:
            raise ProblemError(
                "objective.balance_tolerance",
                f"is {self.balance_tolerance:g}, must be at most {_LOOSEST:g} (0.01 is one per cent)",
            )
        if self.horizon is not None:
            put(self, "horizon", number("objective.horizon", self.horizon, open_low=True))
        if self.risk not in tuple(Risk):
            raise ProblemError("objective.risk", f"is {self.risk!r}, must be one of {tuple(Risk)}")
        put(self, "risk", Risk(self.risk))
        put(self, "sigma", number("objective.sigma", self.sigma))
        if self.risk == Risk.COVARIANCE:
            if self.sigma > _MOST_DEVIATIONS:
                raise ProblemError(
                    "objective.sigma", f"is {self.sigma:g}, must be at most {_MOST_DEVIATIONS:g}"
                )
        elif self.sigma > 1:
            raise ProblemError("objective.sigma", f"is {self.sigma}, must be at least 0 and at most 1")
        put(self, "failure_rate", number("objective.failure_rate", self.failure_rate))
        if not 1e-4 <= self.failure_rate <= 0.5:
            raise ProblemError(
                "objective.failure_rate", f"is {self.failure_rate:g}, must be at least 0.0001 and at most 0.5"
            )
        put(self, "cvar_alpha", number("objective.cvar_alpha", self.cvar_alpha))
        if self.cvar_alpha >= 1:
            raise ProblemError(
                "objective.cvar_alpha", f"is {self.cvar_alpha}, must be at least 0 and below 1"
            )


def risk_rule(rule: str) -> dict[str, Any]:
    """The fields of an `Objective` by a short rule: a risk, or ``cvar=0.9``, ``sigma=0.5``, ``covariance=2``.

    Raises
    ------
    ProblemError
        If there is no such risk, or it takes no value.
    """
    risk, given, value = rule.partition("=")
    if not given:
        return {"risk": risk}
    fields: dict[str, str] = {Risk.CVAR: "cvar_alpha", Risk.SIGMA: "sigma", Risk.COVARIANCE: "sigma"}
    field = fields.get(risk)
    if field is None:
        raise ProblemError("objective.risk", f"is {rule!r}: {risk!r} takes no value")
    try:
        return {"risk": risk, field: float(value)}
    except ValueError:
        raise ProblemError("objective.risk", f"is {rule!r}: {value!r} is no number") from None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups(Record):
    """Experts that belong together on a node, as routing that is limited to some groups wants.

    A group's home in a layer is the node that serves most of its tokens there.

    Parameters
    ----------
    group_E : array of int, shape [E]
        Group of each expert; the same in all layers.
    max_outside : float
        Largest share of a layer's tokens that may be served outside their group's home. 0 keeps every group
        on one node; 1 allows everything, and the priority ``groups`` says what it is worth.

    References
    ----------
    DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.1.2 (node-limited routing).
    """

    group_E: IntArray
    max_outside: float = 0.0

    def __post_init__(self) -> None:
        group_E = integers("groups.group", self.group_E)
        if group_E.ndim != 1 or not group_E.size:
            raise ProblemError("groups.group", f"has shape {group_E.shape}, must be one number per expert")
        used = np.unique(group_E)
        if used[-1] != used.size - 1:
            gap = int((used != np.arange(used.size)).argmax())
            raise ProblemError("groups.group", f"must be numbered from 0 without gaps; {gap} has no expert")
        object.__setattr__(self, "group_E", group_E)
        outside = number("groups.max_outside", self.max_outside)
        if outside > 1:
            raise ProblemError("groups.max_outside", f"is {outside:g}, must be a share from 0 to 1")
        object.__setattr__(self, "max_outside", outside)

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.group_E.max()) + 1

    @classmethod
    def even(cls, experts: int, count: int, max_outside: float = 0.0) -> Groups:
        """`count` groups of as many experts, in their order (DeepSeek-V3: 8 groups of 32).

        Raises
        ------
        ProblemError
            If the experts cannot be divided so.
        """
        count = whole("groups.count", count, low=1)
        if whole("groups.experts", experts, low=1) % count:
            raise ProblemError("groups.count", f"is {count}, must divide the {experts} experts")
        return cls(group_E=np.arange(experts) // (experts // count), max_outside=max_outside)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Limits(Record):
    """What a plan may not exceed.

    Parameters
    ----------
    min_replicas, max_replicas : int
        Of every expert.
    max_layer_replicas : int, optional
        Replicas of one layer in all.
    max_total_replicas, max_total_bytes : int, optional
        Over all layers.
    max_moves, max_move_bytes, max_move_seconds : number, optional
        Replicas, bytes, or seconds of transfer that a re-plan may cost, over all layers.
    max_layer_moves : int, optional
        Replicas that may move in one layer.
    spread : int
        Failure domains that the replicas of every expert must reach.
    spread_experts : int or tuple of (layer, expert), optional
        Experts that `spread` is for; all by default. A number: so many of each layer, those with the most
        expected tokens (of equal ones the first). Pairs: these, layers as in `pinned`.
    pinned, forbidden : tuple of (layer, expert, gpu)
        Replicas that must, or must not, be there. The layer is the model's own number, as in
        ``Loads.layers``; -1 stands for every layer.
    """

    min_replicas: int = 1
    max_replicas: int | None = None
    max_layer_replicas: int | None = None
    max_total_replicas: int | None = None
    max_total_bytes: int | None = None
    max_moves: int | None = None
    max_move_bytes: int | None = None
    max_move_seconds: float | None = None
    max_layer_moves: int | None = None
    spread: int = 1
    spread_experts: int | tuple[tuple[int, int], ...] | None = None
    pinned: tuple[tuple[int, int, int], ...] = ()
    forbidden: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        for key, low in (
            ("min_replicas", 1),
            ("max_replicas", 1),
            ("max_layer_replicas", 1),
            ("max_total_replicas", 1),
            ("max_total_bytes", 1),
            ("max_moves", 0),
            ("max_move_bytes", 0),
            ("max_layer_moves", 0),
            ("spread", 1),
        ):
            value = getattr(self, key)
            if value is not None or key in ("min_replicas", "spread"):
                put(self, key, whole(f"limits.{key}", value, low=low))
        if self.max_move_seconds is not None:
            put(self, "max_move_seconds", number("limits.max_move_seconds", self.max_move_seconds))
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ProblemError(
                "limits.max_replicas",
                f"is {self.max_replicas}, must be at least min_replicas = {self.min_replicas}",
            )
        which: object = self.spread_experts
        if isinstance(which, Iterable) and not isinstance(which, str):
            put(self, "spread_experts", _numbers("limits.spread_experts", which, "layer", "expert"))
        elif which is not None:
            put(self, "spread_experts", whole("limits.spread_experts", which, low=1))
        for key in ("pinned", "forbidden"):
            object.__setattr__(
                self, key, _numbers(f"limits.{key}", getattr(self, key), "layer", "expert", "gpu")
            )
        both = set(self.pinned) & set(self.forbidden)
        if both:
            raise ProblemError(
                "limits.forbidden", f"{min(both)} is pinned too; a pair can be one or the other"
            )

    @property
    def bounds_moves(self) -> bool:
        """Whether any limit on moves is set."""
        limits = (self.max_moves, self.max_move_bytes, self.max_move_seconds, self.max_layer_moves)
        return any(limit is not None for limit in limits)

    @property
    def bounds_replicas(self) -> bool:
        """Whether any upper limit on replicas or their bytes is set."""
        limits = (self.max_replicas, self.max_layer_replicas, self.max_total_replicas, self.max_total_bytes)
        return any(limit is not None for limit in limits)


def _numbers(where: str, value: object, *names: str) -> tuple[tuple[int, ...], ...]:
    """Tuples of whole numbers, each with so many names; a layer may be -1, which means every layer."""
    form = f"({', '.join(names)})"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ProblemError(where, f"is {value!r}, must be a list of {form}")
    found = []
    for i, entry in enumerate(value):
        numbers = tuple(entry) if isinstance(entry, Iterable) and not isinstance(entry, str) else ()
        if len(numbers) != len(names):
            raise ProblemError(f"{where}[{i}]", f"is {entry!r}, must be {form}")
        found.append(
            tuple(
                whole(f"{where}[{i}].{name}", n, low=-1 if name == "layer" else 0)
                for name, n in zip(names, numbers, strict=True)
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sizing(Record):
    """How many replicas there are to be.

    Parameters
    ----------
    policy : SizingPolicy or str
        ``slots``: every slot may be used (the usual shape); where the topology gives bytes alone and
        nothing is live, `auto` holds the fewest replicas within the balance tolerance, and the other
        bytes stay free. ``fill``: every slot may be used, bytes or not. ``cv``: the fewest replicas
        whose loads have a coefficient of variation of at most `cv`. ``makespan``: the fewest for which the
        imbalance is at most `imbalance`. ``memory``: the layers share the GPUs' bytes.
    cv : float
        Threshold of the ``cv`` policy.
    ddof : {0, 1}
        Population or sample coefficient of variation.
    imbalance : float
        Target of the ``makespan`` policy, at least 1.
    """

    policy: str = SizingPolicy.SLOTS
    cv: float = 0.2
    ddof: int = 0
    imbalance: float = 1.05

    def __post_init__(self) -> None:
        if self.policy not in tuple(SizingPolicy):
            raise ProblemError("sizing.policy", f"is {self.policy!r}, must be one of {tuple(SizingPolicy)}")
        object.__setattr__(self, "policy", SizingPolicy(self.policy))
        object.__setattr__(self, "cv", number("sizing.cv", self.cv))
        if self.ddof not in (0, 1):
            raise ProblemError("sizing.ddof", f"is {self.ddof!r}, must be 0 (population) or 1 (sample)")
        object.__setattr__(self, "imbalance", number("sizing.imbalance", self.imbalance, low=1.0))

    @classmethod
    def of(cls, rule: str) -> Sizing:
        """The sizing of a short rule: a policy, or ``cv=0.2``, ``makespan=1.05`` (an imbalance).

        Raises
        ------
        ProblemError
            If there is no such policy, or it takes no value.
        """
        policy, given, value = rule.partition("=")
        field = {SizingPolicy.CV: "cv", SizingPolicy.MAKESPAN: "imbalance"}.get(policy)  # type: ignore[call-overload]
        if not given:
            return cls(policy=policy)
        if field is None:
            raise ProblemError("sizing", f"is {rule!r}: {policy!r} takes no value")
        try:
            setting: dict[str, Any] = {"policy": policy, field: float(value)}
        except ValueError:
            raise ProblemError("sizing", f"is {rule!r}: {value!r} is no number") from None
        return cls(**setting)
