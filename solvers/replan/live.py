"""The live placement: as the kernels take it, mended where it breaks the rules; times and moves of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import new_replicas
from moeless_opt.problems.spec import Fill, Problem, without_copies
from moeless_opt.solvers.core import but_moves, mended
from moeless_opt.solvers.limits import Rules, mended_within
from moeless_opt.solvers.migration import schedule_migration

__all__ = [
    "Content",
    "broken_moves",
    "layer_moves",
    "layer_problem",
    "live_slots",
    "mend_content",
    "mend_within",
    "moves_between",
    "part_problem",
]

Entry = TypeVar("Entry", bound=tuple[int, ...])

Content = list[list[int]]
"""Experts on each GPU of a layer."""


def live_slots(problem: Problem) -> SlotArray:
    """The live placement with as many slots per GPU as the problem allows, shape [L, G, C].

    Second copies on a GPU are left out, unless the plan may have such and they weigh.
    """
    if problem.current is None:
        raise ProblemError("current", "is missing: re-planning starts from a live placement")
    slots_LGC = problem.current.slots_LGC
    if problem.fill != Fill.COPIES or problem.split != "equal":
        slots_LGC = without_copies(slots_LGC)
    wide = max(int(problem.capacity_LG.max()), slots_LGC.shape[2])
    padded = np.full((*slots_LGC.shape[:2], wide), -1, dtype=np.int32)
    # Filled slots first: the kernels take a GPU's slots to be its capacity.
    order = np.argsort(slots_LGC < 0, axis=2, kind="stable")
    padded[:, :, : slots_LGC.shape[2]] = np.take_along_axis(slots_LGC, order, axis=2)
    return padded[:, :, : max(int(problem.capacity_LG.max()), 1)]


def layer_moves(problem: Problem, slots_LGC: SlotArray, live_LGC: SlotArray) -> IntArray:
    """Replicas of each layer that are not live, shape [L]."""
    return np.asarray(new_replicas(slots_LGC, live_LGC, problem.experts).sum((1, 2)))


def broken_moves(problem: Problem, slots_LGC: SlotArray, live_LGC: SlotArray) -> tuple[str, float]:
    """The limit on moves that a placement breaks, and what it takes; "" where it keeps them all."""
    limits, moves_L = problem.limits, layer_moves(problem, slots_LGC, live_LGC)
    for name, used in (
        ("max_moves", int(moves_L.sum())),
        ("max_layer_moves", int(moves_L.max())),
        ("max_move_bytes", int(moves_L @ problem.bytes_L)),
    ):
        most = getattr(limits, name)
        if most is not None and used > most:
            return name, used
    if limits.max_move_seconds is None:
        return "", 0
    schedule = schedule_migration(
        live_LGC, slots_LGC, problem.experts, problem.topology, bytes_L=problem.bytes_L
    )
    return ("max_move_seconds", schedule.seconds) if schedule.seconds > limits.max_move_seconds else ("", 0)


def layer_problem(problem: Problem, layer: int) -> Problem:
    """One layer of a problem, with its limits on replicas, pairs and domains; `layer` is a row."""
    return part_problem(problem, [layer])


def part_problem(problem: Problem, rows: list[int]) -> Problem:
    """Some layers of a problem, of the same slots, without the limits on moves and on all layers together."""
    assert problem.current is not None
    numbers, limits = [problem.loads.layers[row] for row in rows], problem.limits
    which = limits.spread_experts
    return problem.replace(
        loads=problem.loads.select(numbers),
        topology=problem.topology.replace(slots_G=problem.capacity_LG[rows[0]], memory_G=None),
        expert_bytes_L=None if not problem.bytes_L.any() else problem.bytes_L[rows],
        model=None,
        current=problem.current.replace(slots_LGC=problem.current.slots_LGC[rows]),
        limits=but_moves(limits).replace(
            max_total_replicas=None,
            max_total_bytes=None,
            pinned=_of(limits.pinned, numbers),
            forbidden=_of(limits.forbidden, numbers),
            spread_experts=which if which is None or isinstance(which, int) else _of(which, numbers),
        ),
        known=None,
    )


def _of(entries: Iterable[Entry], numbers: Sequence[int]) -> tuple[Entry, ...]:
    """Those that are for some layers, or for every layer."""
    return tuple(entry for entry in entries if entry[0] in (-1, *numbers))


def moves_between(live: Sequence[frozenset[int]], content: Sequence[Sequence[int]]) -> int:
    """Count replicas that a GPU does not hold live."""
    return sum(expert not in held for held, row in zip(live, content, strict=True) for expert in row)


def mend_content(
    load: list[int],
    slots: list[list[int]],
    capacity: list[int],
    speed: list[float],
    layer: int = 0,
    repair: bool = False,
    copies: bool = False,
) -> Content:
    """Contents of each GPU of a live placement, mended or refused where they break the rules.

    Parameters
    ----------
    load : list of int
        Tokens of each expert.
    slots : list of list of int
        Experts on each GPU; entries below 0 are empty.
    capacity : list of int
        Slots of each GPU.
    speed : list of float
        Speeds, to place what is missing on the GPU that is least busy for its speed.
    layer : int
        For messages.
    repair : bool
        Mend instead of refusing: unknown experts and duplicates are dropped, the rest as
        `core.mending.mended` says.
    copies : bool
        An expert may have several slots of a GPU.

    Returns
    -------
    list of list of int
        Experts on each GPU.
    """
    experts = len(load)
    content: Content = []
    for gpu, row in enumerate(slots):
        kept: list[int] = []
        for expert in row:
            if expert < 0:
                continue
            wrong = "unknown" if expert >= experts else "held twice" if expert in kept and not copies else ""
            if not wrong:
                kept.append(expert)
            elif not repair:
                raise ProblemError(
                    f"live_LGC[{layer}, {gpu}]",
                    f"expert {expert} is {wrong}; "
                    f"would need distinct experts below {experts} (or repair=True)",
                )
        content.append(kept)
    if not repair:
        for gpu, row in enumerate(content):
            if len(row) > capacity[gpu]:
                raise ProblemError(
                    f"live_LGC[{layer}, {gpu}]",
                    f"holds {len(row)} experts, "
                    f"would need at most its {capacity[gpu]} slots (or repair=True)",
                )
        missing = set(range(experts)).difference(*content)
        if missing:
            raise ProblemError(
                f"live_LGC[{layer}]",
                f"expert {min(missing)} has no replica, would need one (or repair=True)",
            )
    if sum(min(slot, experts) for slot in capacity) < experts:
        raise InfeasibleError(
            f"capacity_LG[{layer}]: {sum(capacity)} slots in all cannot hold {experts} experts, "
            f"{experts - sum(capacity)} more would"
        )
    return mended(load, content, capacity, speed)


def mend_within(
    rules: Rules, load_E: FloatArray, slots_GC: SlotArray, content: Content, speed_G: FloatArray
) -> Content:
    """A live layer within its rules by the fewest moves: from what `mend_content` made, or as it was.

    What was mended without the rules may have to move again for a pin.
    """
    experts = len(load_E)
    live = [[*dict.fromkeys(e for e in row if 0 <= e < experts)] for row in slots_GC.tolist()]
    found = mended_within(rules, load_E, content, speed_G)
    held = [frozenset(row) for row in live]
    if held == [frozenset(row) for row in content]:
        return found
    direct = mended_within(rules, load_E, live, speed_G)
    return direct if moves_between(held, direct) < moves_between(held, found) else found
