"""What comes out: a Plan to be carried out, what it moves, and how far it can be from the best."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, SlotArray, frozen, number
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.evaluate import new_replicas
from moeless_opt.problems.plan.links import Locality
from moeless_opt.problems.spec import Placement, Problem, replica_counts, span, without_copies
from moeless_opt.problems.text import bytes_text, html_facts, printable

__all__ = ["PROVEN", "Certificate", "Moves", "Payback", "Plan", "Status", "count_moves"]


class Status(enum.StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    """The plan is proven best (see `PROVEN`)."""
    FEASIBLE = "feasible"
    """A valid plan; the gap says how far from the best it can be at most."""
    INFEASIBLE = "infeasible"
    """Proven: no plan satisfies the caps."""
    NO_SOLUTION = "no solution"
    """Nothing found before a limit, and nothing proven."""


PROVEN = 1e-6
"""Relative gap up to which a plan counts as proven best: what the tolerances of exact solvers allow to claim.

Every claim of a proof uses it, and a bound may lie above the value that attains it by no more.
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Certificate(Record):
    """How far a plan can be from the best possible one.

    Parameters
    ----------
    value_L : array, shape [L]
        Largest GPU time of each layer; over several scenarios by the objective's risk.
    lower_bound_L : array, shape [L]
        No plan for these GPUs, slots and split can have a smaller one.
    bound_L : tuple of str
        Which bound that is, by layer.
    solver : str
        Who found the plan.
    seconds : float
        Time that the solve took.
    proof : str
        What else was proven, for people.
    loss : float, optional
        Probability that failures lose an expert, where survival is a priority (see
        ``Objective.failure_rate``).
    loss_bound : float
        No plan for these GPUs and slots has a smaller one.
    """

    value_L: FloatArray
    lower_bound_L: FloatArray
    bound_L: tuple[str, ...]
    solver: str = ""
    seconds: float = 0.0
    proof: str = ""
    loss: float | None = None
    loss_bound: float = 0.0

    def __post_init__(self) -> None:
        for key in ("value_L", "lower_bound_L"):
            object.__setattr__(self, key, frozen(getattr(self, key)))

    @property
    def gap_L(self) -> FloatArray:
        """(value - bound) / bound of each layer, shape [L]; up to `PROVEN` it is proven optimal."""
        gap = np.divide(
            self.value_L - self.lower_bound_L,
            self.lower_bound_L,
            out=np.zeros_like(self.value_L),
            where=self.lower_bound_L > 0,
        )
        return np.maximum(gap, 0.0)

    @property
    def gap(self) -> float:
        """Gap of the sum over the layers."""
        bound = float(self.lower_bound_L.sum())
        return max(float(self.value_L.sum()) / bound - 1.0, 0.0) if bound > 0 else 0.0

    @property
    def status(self) -> Status:
        """OPTIMAL if every layer's gap is at most `PROVEN`, else FEASIBLE."""
        closed = self.value_L <= self.lower_bound_L * (1 + PROVEN)
        return Status.OPTIMAL if bool(closed.all()) else Status.FEASIBLE

    def __repr__(self) -> str:
        names = sorted(set(self.bound_L))
        loss = "" if self.loss is None else f", loss {self.loss:.3g} (least {self.loss_bound:.3g})"
        return (
            f"Certificate({self.status.value}, gap {self.gap:.3%} (worst layer {self.gap_L.max():.3%}), "
            f"bound by {', '.join(names)}{loss}, {self.solver} in {self.seconds * 1e3:.1f} ms)"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moves(Record):
    """What a plan has to ship.

    Parameters
    ----------
    count : int
        Replicas on a GPU that did not hold the expert before; of several copies there, one.
    bytes : int
        Their weights (0 where the size of an expert is unknown).
    fraction : float
        `count` as a share of all replicas of the plan.
    count_L : array of int, shape [L]
        By layer.
    cold : bool
        Whether nothing was live before, so that every replica is loaded.
    """

    count: int
    bytes: int
    fraction: float
    count_L: IntArray
    cold: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "count_L", frozen(self.count_L))

    def __repr__(self) -> str:
        size = f", {bytes_text(self.bytes)}" if self.bytes else ""
        if self.cold:
            return f"Moves(cold start: {self.count} replicas to load{size})"
        return f"Moves({self.count} replicas{size}, {self.fraction:.2%} of the plan)"


def count_moves(slots_LGC: SlotArray, before_LGC: SlotArray | None, experts: int, bytes_L: IntArray) -> Moves:
    """Count the replicas that no warm GPU has.

    Parameters
    ----------
    slots_LGC, before_LGC : arrays of int32, shape [L, G, C]
        New placement, and the live one (None: nothing is live).
    experts : int
        Experts per layer.
    bytes_L : array of int, shape [L]
        Bytes of one replica in each layer.
    """
    filled_L = np.count_nonzero(slots_LGC >= 0, axis=(1, 2))
    if before_LGC is None:
        count_L = np.count_nonzero(without_copies(slots_LGC) >= 0, axis=(1, 2))
    else:
        count_L = np.count_nonzero(new_replicas(slots_LGC, before_LGC, experts), axis=(1, 2))
    count = int(count_L.sum())
    return Moves(
        count=count,
        bytes=int(count_L @ bytes_L),
        fraction=count / max(int(filled_L.sum()), 1),
        count_L=count_L,
        cold=before_LGC is None,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Payback(Record):
    """Whether the moves of a plan earn their cost.

    Parameters
    ----------
    saved_per_pass : float
        Seconds that a forward pass takes less than with the live placement and its best shares.
    cost : float
        Seconds that the transfers take.
    """

    saved_per_pass: float
    cost: float

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "saved_per_pass", number("payback.saved_per_pass", self.saved_per_pass, low=-1e300))
        put(self, "cost", number("payback.cost", self.cost))

    @property
    def passes(self) -> float:
        """Forward passes after which the moves have paid: 0 if they are free, infinite if they never do."""
        if self.cost <= 0:
            return 0.0
        return self.cost / self.saved_per_pass if self.saved_per_pass > 0 else float("inf")

    def __repr__(self) -> str:
        return (
            f"Payback({self.saved_per_pass * 1e6:.4g} us saved per pass for {self.cost * 1e3:.4g} ms of "
            f"transfers: even after {self.passes:.4g} passes)"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan(Record):
    """Replicas, where they live, and the share of the tokens that each serves.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, -1 for an empty one.
    share_LGC : array of float, shape [L, G, C]
        Share of its expert's tokens that a slot serves; an expert's shares sum to 1.
    experts : int
        Experts per layer, E.
    layers : tuple of int
        The model's own index of each layer.
    split : str
        ``"fractional"`` or ``"equal"``.
    time_LG : array of float, shape [L, G]
        Time of each GPU under the expected loads, with `share_LGC`.
    imbalance_L : array of float, shape [L]
        max / mean GPU time; over several scenarios the layer's time by the objective's risk, over that of a
        perfect balance in each.
    moves : Moves
        What has to be shipped from the live placement.
    certificate : Certificate
        How far from the best possible.
    made_for : Problem or str
        The problem that the plan is for, or its digest (a plan that was read from a file).
    unit : str
        Unit of the times.
    name : str
        For people.
    payback : Payback, optional
        Time saved against the cost of the moves, where times are in seconds and something was live.
    share_entries : int, optional
        The shares are multiples of one in so many, where the problem asked for it.
    scenario_share_TLGC : array of float, shape [T, L, G, C], optional
        The shares of each scenario, where the loads have several and the split is fractional: shares follow
        the traffic and move no weights. `share_LGC` has those for the expected loads.
    locality : Locality, optional
        Traffic, tokens outside their groups and hops with their bounds, where the plan was made for them.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    experts: int
    layers: tuple[int, ...]
    split: str
    time_LG: FloatArray
    imbalance_L: FloatArray
    moves: Moves
    certificate: Certificate
    made_for: Problem | str = field(default="", compare=False, repr=False)
    unit: str = "tokens"
    name: str = ""
    payback: Payback | None = None
    share_entries: int | None = None
    scenario_share_TLGC: FloatArray | None = None
    locality: Locality | None = None

    def __post_init__(self) -> None:
        for key in ("slots_LGC", "share_LGC", "time_LG", "imbalance_L", "scenario_share_TLGC"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, frozen(getattr(self, key)))

    @property
    def replicas_LE(self) -> SlotArray:
        """Replicas of every expert, shape [L, E]."""
        return replica_counts(self.slots_LGC, self.experts)

    @property
    def placement(self) -> Placement:
        """The placement alone."""
        return Placement(slots_LGC=self.slots_LGC, experts=self.experts)

    @property
    def share_LGE(self) -> FloatArray:
        """Shares by expert instead of by slot, those of its copies on a GPU together, shape [L, G, E]."""
        dense = np.zeros((*self.slots_LGC.shape[:2], self.experts))
        layer, gpu, slot = np.nonzero(self.slots_LGC >= 0)
        np.add.at(dense, (layer, gpu, self.slots_LGC[layer, gpu, slot]), self.share_LGC[layer, gpu, slot])
        return dense

    @property
    def problem_digest(self) -> str:
        """Digest of the problem that the plan is for; empty if unknown."""
        return self.made_for if isinstance(self.made_for, str) else self.made_for.digest()

    @property
    def replicas(self) -> int:
        """Replicas in all."""
        return int(np.count_nonzero(self.slots_LGC >= 0))

    def gpus_of(self, layer: int, expert: int) -> list[int]:
        """The GPUs that hold an expert; `layer` is the model's own number."""
        if layer not in self.layers:
            raise ProblemError("layer", f"is {layer}, the plan is for the layers {span(self.layers)}")
        if not 0 <= expert < self.experts:
            raise ProblemError("expert", f"is {expert}, must be from 0 to {self.experts - 1}")
        row_GC = self.slots_LGC[self.layers.index(layer)]
        return [int(gpu) for gpu in np.flatnonzero((row_GC == expert).any(1))]

    def _over(self) -> str:
        """What the times are taken over, where the problem is known and has several scenarios."""
        if isinstance(self.made_for, str) or self.made_for.loads.shape[0] == 1:
            return ""
        return f", {self.made_for.objective.risk} over {self.made_for.loads.shape[0]} scenarios"

    def __repr__(self) -> str:
        layers, gpus, slots = self.slots_LGC.shape
        if not isinstance(self.made_for, str):
            gpus = int(self.made_for.usable_LG.any(0).sum())
        title = f" {printable(self.name)}" if self.name else ""
        worst = int(np.argmax(self.imbalance_L))
        payback = f"\n  {self.payback!r}" if self.payback else ""
        near = f"\n  {self.locality!r}" if self.locality else ""
        proof = f"\n  {self.certificate.proof}" if self.certificate.proof else ""
        return (
            f"<Plan{title}: {layers} layer(s), {self.experts} experts as {self.replicas} replicas "
            f"on {gpus} GPUs (up to {slots} slots), {self.split} split\n"
            f"  imbalance (max/mean{self._over()}) {self.imbalance_L.mean():.4f} mean, "
            f"{self.imbalance_L[worst]:.4f} worst (layer {self.layers[worst]})\n"
            f"  {self.certificate!r}\n"
            f"  {self.moves!r}{near}{proof}{payback}>"
        )

    def _repr_html_(self) -> str:
        rows = (
            ("layers x experts", f"{self.slots_LGC.shape[0]} x {self.experts}"),
            ("replicas on GPUs", f"{self.replicas} on {self.slots_LGC.shape[1]}"),
            (f"imbalance, mean{self._over()}", f"{self.imbalance_L.mean():.4f}"),
            (
                "imbalance, worst",
                f"{self.imbalance_L.max():.4f} (layer {self.layers[int(self.imbalance_L.argmax())]})",
            ),
            ("gap to the bound", f"{self.certificate.gap:.3%} ({self.certificate.status.value})"),
            ("moves", f"{self.moves.count} ({bytes_text(self.moves.bytes)})"),
            ("solver", f"{self.certificate.solver}, {self.certificate.seconds * 1e3:.1f} ms"),
        )
        return html_facts(rows, f"Plan {self.name} ({self.split} split)")
