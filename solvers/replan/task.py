"""What the re-planning kernels are asked and what they answer, and one budget over all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec import Fill
from moeless_opt.solvers.core import choose_points
from moeless_opt.solvers.limits import Rules
from moeless_opt.solvers.replan.live import Content
from moeless_opt.solvers.replan.relabel import seat_all

__all__ = ["Point", "ReplanTask", "ReplanWish", "Replanned", "Sources", "front_of", "seated", "spread_budget"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sources:
    """Where the tokens come from that go to the nearest replica.

    Parameters
    ----------
    part_LNE : array of float, shape [L, N, E] or [L, N, 1]
        Part of an expert's tokens that comes from each node.
    node_G : array of int, shape [G]
        Node of each GPU.
    filled : callable, optional
        Placement -> the same with every slot full, where that is wanted.
    """

    part_LNE: FloatArray
    node_G: IntArray
    filled: Callable[[SlotArray], SlotArray] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ReplanTask:
    """What is to be re-planned, checked.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens, not negative.
    live_LGC : array of int, shape [L, G, C]
        Live placement, -1 where empty.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU (0 for a GPU that is lost).
    speed_G : array of float, shape [G], optional
        Relative speeds, ones by default.
    rules : list of Rules, optional
        Limits of each layer that the plan is to keep; none by default.
    fill : Fill
        Whether every slot is to be full, and second copies on a GPU are allowed; an equal split's only.
    sources : Sources, optional
        Where the tokens come from, where they go to the nearest replica.

    Raises
    ------
    ProblemError
        Naming the argument that is wrong.
    """

    load_LE: FloatArray
    live_LGC: SlotArray
    capacity_LG: IntArray
    speed_G: FloatArray = None  # type: ignore[assignment]
    rules: list[Rules] | None = None
    fill: Fill = Fill.NONE
    sources: Sources | None = None

    def __post_init__(self) -> None:
        load = np.asarray(self.load_LE, dtype=np.float64)
        live = np.asarray(self.live_LGC, dtype=np.int32)
        if load.ndim != 2:
            raise ProblemError("load_LE", f"has {load.ndim} axes, would need 2: layers, experts")
        if not np.isfinite(load).all() or (load < 0).any():
            raise ProblemError(
                "load_LE", "has a negative or non-finite entry, would need tokens of at least 0"
            )
        if live.ndim != 3 or len(live) != len(load):
            raise ProblemError("live_LGC", f"has shape {live.shape}, would need [{len(load)}, GPUs, slots]")
        L, G, C = live.shape
        capacity = np.asarray(self.capacity_LG, dtype=np.int64)
        if capacity.shape != (L, G):
            raise ProblemError("capacity_LG", f"has shape {capacity.shape}, would need [{L}, {G}]")
        if (capacity < 0).any() or (capacity > C).any():
            raise ProblemError(
                "capacity_LG", f"has an entry outside 0..{C}, the slots of the live placement's array"
            )
        speed = np.ones(G) if self.speed_G is None else np.asarray(self.speed_G, dtype=np.float64)
        if speed.shape != (G,) or not (speed > 0).all() or not np.isfinite(speed).all():
            raise ProblemError("speed_G", f"would need {G} positive numbers")
        for name, value in (("load_LE", load), ("live_LGC", live), ("capacity_LG", capacity)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "speed_G", speed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplanWish:
    """What a re-plan should reach, and what it may cost.

    Parameters
    ----------
    tolerance : float
        Wanted: largest time at most ``(1 + tolerance) * bound`` in every layer.
    max_moves : int, optional
        Budget over all layers: replicas, or in units of `cost_L`. The summed largest time over the layers is
        made least within it; no layer is balanced further than wanted.
    cost_L : sequence of int, optional
        Cost of a move in each layer, e.g. bytes of a replica. Ones by default.
    bound_L : array of float, shape [L], optional
        Lower bound to measure against; by default the best known (`problems.plan.bounds.best_bound`).
    rounds : int, optional
        Rounds of destroying and repairing per layer after the first descent. By default 0 with a fractional
        split, 8 with an equal one.
    until_stopped : bool
        Go on with these rounds until told to stop, however many. Results then depend on the machine's speed.
    seed : int
        Seed of these rounds.
    repair : bool
        Mend a live placement that breaks the rules (too many replicas, unknown expert, duplicate, expert
        without a replica) by the least change, instead of refusing it.
    start_LGC : array of int32, shape [L, G, C], optional
        A placement to search from, an equal split's only: moves count against the live one all the same.
    limit : str
        Name of the limit that the budget comes from, for messages.
    """

    tolerance: float = 0.01
    max_moves: int | None = None
    cost_L: Sequence[int] | None = None
    bound_L: FloatArray | None = None
    rounds: int | None = None
    until_stopped: bool = False
    seed: int = 0
    repair: bool = False
    start_LGC: SlotArray | None = None
    limit: str = "max_moves"

    def __post_init__(self) -> None:
        if not self.tolerance >= 0.0:
            raise ProblemError("tolerance", f"is {self.tolerance}, would need a number of at least 0")

    def most_rounds(self, default: int) -> float:
        """How many rounds of destroying and repairing there may be."""
        return float("inf") if self.until_stopped else default if self.rounds is None else self.rounds

    def price_L(self, layers: int) -> list[int]:
        """Cost of a move in each layer."""
        return [1] * layers if self.cost_L is None else [int(one) for one in self.cost_L]

    def check_budget(self, forced_L: IntArray) -> None:
        """Refuse a budget that cannot restore coverage, or what the limits ask for.

        Raises
        ------
        InfeasibleError
            Saying which budget would.
        """
        needed = sum(one * by for one, by in zip(forced_L.tolist(), self.price_L(len(forced_L)), strict=True))
        if self.max_moves is not None and needed > self.max_moves:
            unit = "replicas" if self.cost_L is None else "bytes"
            raise InfeasibleError(
                f"limits.{self.limit}: {self.max_moves} {unit} cannot give every expert a replica "
                f"where the limits allow one; the least budget that would is {needed}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replanned:
    """A re-plan of all layers.

    Attributes
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        New placement. What stays keeps its slot wherever no empty slot would stand between full ones.
    share_LGC : array of float, shape [L, G, C]
        Optimal token shares.
    time_L : array of float, shape [L]
        Largest GPU time (tokens over speed).
    moves_L : array of int, shape [L]
        Replicas to be shipped.
    forced_L : array of int, shape [L]
        Those of them without which some expert would have no replica.
    bound_L : array of float, shape [L]
        Lower bound on the time of any placement.
    target_L : array of float, shape [L]
        Wanted time, ``(1 + tolerance) * bound``.
    least_moves_L : array of int, shape [L]
        Proven least number of moves that any plan within the wanted time needs; 0 where shares are not free,
        since to drop a replica, which is no move, may make a layer faster there.
    cut_L : array of bool, shape [L]
        Layers that the search was stopped before or in the middle of.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    time_L: FloatArray
    moves_L: IntArray
    forced_L: IntArray
    bound_L: FloatArray
    target_L: FloatArray
    least_moves_L: IntArray
    cut_L: BoolArray


def seated(task: ReplanTask, contents: Sequence[Content]) -> SlotArray:
    """Slots of all layers: what stays keeps its slot, shape [L, G, C]."""
    new = np.full_like(task.live_LGC, -1)
    for layer, content in enumerate(contents):
        new[layer] = seat_all(task.live_LGC[layer].tolist(), content)
    return new


Taken = TypeVar("Taken")
Point = tuple[int, float, Content]
"""A place where a layer may stop on its way: moves, largest time, contents."""


def front_of(points: list[tuple[int, float, Taken]]) -> list[tuple[int, float, Taken]]:
    """Those points, by moves, that are quicker than every one with fewer moves."""
    points = sorted(points, key=lambda point: point[:2])
    front = points[:1]
    for point in points[1:]:
        if point[1] < front[-1][1] * (1.0 - 1e-9):
            if point[0] == front[-1][0]:
                front[-1] = point
            else:
                front.append(point)
    return front


def spread_budget(
    fronts: list[list[tuple[int, float, Taken]]], weight_L: Sequence[Any], price_L: list[int], budget: int
) -> list[Taken]:
    """Where each layer stops so that all moves together keep a budget and the whole gains most.

    `weight_L` makes the times of different layers comparable.
    """
    chosen = choose_points(
        [[point[0] * price for point in front] for front, price in zip(fronts, price_L, strict=True)],
        [[point[1] * weight for point in front] for front, weight in zip(fronts, weight_L, strict=True)],
        budget,
    )
    return [front[at][2] for front, at in zip(fronts, chosen.point_L.tolist(), strict=True)]
