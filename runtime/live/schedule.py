"""In what order a new placement is reached.

Every function here is deterministic: ranks that call it with the same arguments get the same answer, which
is what lets a group of processes change a placement together without talking about it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec import Links
from moeless_opt.runtime.live.slots import rows_to_slots, table_bytes

__all__ = ["Router", "Schedule", "Shipment", "Stage", "build_schedule", "follow_schedule"]


@dataclass(frozen=True, slots=True)
class Shipment:
    """One expert of one layer on its way to one rank.

    Parameters
    ----------
    layer, expert : int
        What moves.
    source, destination : int
        Ranks of the expert-parallel group.
    bytes : int
        Size of the expert's weights.
    from_home : bool
        The source sends its home copy (host memory or checkpoint) rather than a live replica. With
        ``source == destination`` nothing crosses a link but the one to the host.
    """

    layer: int
    expert: int
    source: int
    destination: int
    bytes: int
    from_home: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A placement of one layer that comes into force once steps up to `last_step` have arrived everywhere."""

    layer: int
    slots_GC: SlotArray
    last_step: int


@dataclass(frozen=True)
class Schedule:
    """Steps of transfers, and the switches that they allow.

    Parameters
    ----------
    steps : tuple of tuples of Shipment
        Each step is posted as one batch.
    stages : tuple of Stage
        In order; the stages of one layer follow each other.
    limit_G : array of int, shape [G]
        Bytes of experts, live and on their way, that a rank may hold at any moment.
    """

    steps: tuple[tuple[Shipment, ...], ...]
    stages: tuple[Stage, ...]
    limit_G: IntArray
    digest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        text = repr((self.steps, [(s.layer, s.slots_GC.tolist(), s.last_step) for s in self.stages]))
        object.__setattr__(self, "digest", zlib.crc32(text.encode()) & 0x7FFFFFFF)

    @property
    def bytes(self) -> int:
        """Bytes that cross a link between ranks."""
        return sum(t.bytes for step in self.steps for t in step if t.source != t.destination)


class Router:
    """Chooses where a replica comes from: over the quickest link, and of equals who sent least.

    Parameters
    ----------
    node_G : sequence of int
        Node of each rank.
    home : callable, optional
        ``home(layer, expert)`` lists the ranks that have a home copy.
    links : Links, optional
        Bandwidths. With the defaults: the own node's GPUs, then the rank's own host memory, then the network.
    """

    def __init__(
        self,
        node_G: Sequence[int],
        home: Callable[[int, int], Sequence[int]] | None = None,
        links: Links | None = None,
    ) -> None:
        self.node_G = list(node_G)
        self.home = home
        links = links or Links()
        far_home = min(links.host, links.inter_node)
        # Stable: of links that are equally quick, the first named.
        rates = enumerate((links.intra_node, links.host, links.inter_node, far_home))
        self._order = [kind for kind, _ in sorted(rates, key=lambda pair: -pair[1])]
        self.sent_G = [0] * len(self.node_G)

    def source(self, layer: int, expert: int, holders: Sequence[int], to: int, size: int) -> Shipment:
        """Where rank `to` gets the expert from.

        Raises
        ------
        InfeasibleError
            If nobody has it.
        """
        copies = list(self.home(layer, expert)) if self.home is not None else []
        near = [g for g in holders if self.node_G[g] == self.node_G[to]]
        kinds = ((near, False), ([g for g in copies if g == to], True), (holders, False), (copies, True))
        for kind in self._order:
            ranks, from_home = kinds[kind]
            if ranks:
                best = min(ranks, key=lambda g: (self.sent_G[g], g))
                if best != to:
                    self.sent_G[best] += size
                return Shipment(layer, expert, best, to, size, from_home)
        raise InfeasibleError(
            f"layer {layer}, expert {expert}: no rank holds it and there is no home copy of it"
        )


def _pack(
    transfers: Sequence[Shipment],
    max_step_bytes: int | None,
    gpus: int,
    spare_G: Sequence[int] | None = None,
) -> list[tuple[Shipment, ...]]:
    """First fit in order: no rank sends or receives more than the limit in a step of several transfers.

    With `spare_G`, home copies for other ranks take so many bytes at most of their sender in one step.
    """
    if not transfers:
        return []
    through = [spare_G is not None and _passes_through(t) for t in transfers]
    if max_step_bytes is None and not any(through):
        return [tuple(transfers)]
    most = 2**62 if max_step_bytes is None else max_step_bytes
    steps: list[list[Shipment]] = []
    out: list[IntArray] = []  # sent, received, passed through the sender's memory
    for t, passes in zip(transfers, through, strict=True):
        spare = (
            moved[0, t.source] + t.bytes <= most
            and moved[1, t.destination] + t.bytes <= most
            and (not passes or spare_G is None or moved[2, t.source] + t.bytes <= spare_G[t.source])
            for moved in out
        )
        at = next((i for i, fits in enumerate(spare) if fits), len(steps))
        if at == len(steps):
            steps.append([])
            out.append(np.zeros((3, gpus), dtype=np.int64))
        steps[at].append(t)
        out[at][0, t.source] += t.bytes
        out[at][1, t.destination] += t.bytes
        out[at][2, t.source] += t.bytes * passes
    return [tuple(step) for step in steps]


def _passes_through(t: Shipment) -> bool:
    """Whether it is a home copy for another rank, which a GPU sends from its own memory."""
    return t.from_home and t.source != t.destination


def _through_G(step: Sequence[Shipment], gpus: int) -> IntArray:
    """Bytes of each rank through which home copies for others pass in a step."""
    bytes_G = np.zeros(gpus, dtype=np.int64)
    for t in step:
        bytes_G[t.source] += t.bytes * _passes_through(t)
    return bytes_G


def _next_rows(
    have: list[list[int]], target: Sequence[Sequence[int]], room_G: Sequence[int], ready: set[tuple[int, int]]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """One stage towards `target`: what each rank holds after it, and the (expert, rank) that must arrive.

    A rank takes at most ``room_G`` arrivals. An expert leaves a rank only when another replica of it is there
    after the stage, so every expert is served at every moment. Arrivals that let another rank drop the expert
    come first: they are what makes room.
    """
    wanted = [(e, g) for g, row in enumerate(target) for e in row if e not in have[g]]
    leaving = {(e, g) for g, row in enumerate(have) for e in row if e not in target[g]}
    moved = {e for e, _ in leaving}
    wanted.sort(key=lambda eg: ((eg[0], eg[1]) not in ready, eg[0] not in moved, eg[1], eg[0]))
    room = list(room_G)
    arrivals: list[tuple[int, int]] = []
    for e, g in wanted:
        # What is already staged on the rank takes no further room.
        if (e, g) in ready or room[g] > 0:
            room[g] -= (e, g) not in ready
            arrivals.append((e, g))
    after = [list(row) for row in have]
    for e, g in arrivals:
        after[g].append(e)
    count: dict[int, int] = {}
    for row in after:
        for e in row:
            count[e] = count.get(e, 0) + 1
    for e, g in sorted(leaving):
        if count[e] > 1:
            after[g].remove(e)
            count[e] -= 1
    return after, arrivals


def build_schedule(
    have_LG: Sequence[Sequence[Sequence[int]]],
    target_LGC: SlotArray,
    bytes_L: Sequence[int],
    *,
    node_G: Sequence[int] | None = None,
    max_step_bytes: int | None = None,
    max_extra_bytes: int | None = None,
    home: Callable[[int, int], Sequence[int]] | None = None,
    links: Links | None = None,
    staged: frozenset[tuple[int, int, int]] = frozenset(),
    through: bool = False,
) -> Schedule:
    """Steps that lead from what the ranks hold to a target placement, layer by layer.

    Layers move in their order; one that does not fit yet is put behind the others.

    Parameters
    ----------
    have_LG : nested sequences
        ``have_LG[layer][rank]`` lists the experts that the rank holds.
    target_LGC : array of int32, shape [L, G, C]
        The placement to reach.
    bytes_L : sequence of int
        Bytes of one expert of each layer.
    node_G : sequence of int, optional
        Node of each rank; transfers prefer their own. All in one node by default.
    max_step_bytes : int, optional
        What one rank may send, and what it may receive, in one step. A larger expert travels alone.
    max_extra_bytes : int, optional
        A rank never holds more bytes of experts than the larger of before and after, plus this.
    home : callable, optional
        ``home(layer, expert)`` lists the ranks that have a home copy.
    links : Links, optional
        Bandwidths, which decide between sources; see `Router`.
    staged : set of (layer, expert, rank)
        Copies that already lie on the rank though no placement uses them.
    through : bool
        Home copies for other ranks take memory of their sender while they travel.

    Returns
    -------
    Schedule

    Raises
    ------
    InfeasibleError
        If the memory is too small for any order, or an expert has no source.

    Notes
    -----
    The stages of a layer are found greedily: every stage takes as many arrivals as fit and lets go of every
    expert that has another replica. With `max_extra_bytes` of one expert per rank any permutation can be
    carried out; tighter than that only what first frees memory can move.
    """
    target = np.asarray(target_LGC)
    router = Router(node_G if node_G is not None else [0] * target.shape[1], home, links)
    work = _Work(have_LG, target, bytes_L, router, staged, max_step_bytes, max_extra_bytes)
    work.through = through
    todo = [i for i in range(len(target)) if not work.there(i)]
    while todo:
        progressed = False
        for layer in list(todo):
            while not work.there(layer) and work.stage(layer):
                progressed = True
            if work.there(layer):
                todo.remove(layer)
        if todo and not progressed:
            spare_G = work.limit_G - work.now_G
            worst = int(np.argmin(spare_G))
            raise InfeasibleError(
                f"migration: {len(todo)} layers do not fit: rank {worst} has {int(spare_G[worst])} bytes to "
                f"spare and one expert takes {bytes_L[todo[0]]}; max_extra_bytes must be at least that"
            )
    return Schedule(tuple(work.steps), tuple(work.stages), work.limit_G)


class _Work:
    """A schedule being built: what ranks hold so far, and what was posted for it."""

    def __init__(
        self,
        have_LG: Sequence[Sequence[Sequence[int]]],
        target_LGC: SlotArray,
        bytes_L: Sequence[int],
        router: Router,
        staged: frozenset[tuple[int, int, int]],
        max_step_bytes: int | None,
        max_extra_bytes: int | None,
    ) -> None:
        self.goal_LG = [[[int(e) for e in row if e >= 0] for row in layer] for layer in target_LGC]
        self.held = [[list(row) for row in layer] for layer in have_LG]
        self.bytes_L, self.router, self.staged = bytes_L, router, staged
        self.max_step_bytes = max_step_bytes
        self.through = False
        self.steps: list[tuple[Shipment, ...]] = []
        self.stages: list[Stage] = []
        before_G = _all_bytes(self.held, bytes_L)
        extra = 2**62 if max_extra_bytes is None else int(max_extra_bytes)
        self.limit_G = np.maximum(before_G, _all_bytes(self.goal_LG, bytes_L)) + extra
        # Copies that are staged already count as held from the start.
        self.now_G = before_G.copy()
        for layer, _, g in staged:
            self.now_G[g] += bytes_L[layer]

    def _spare(self, moves: Sequence[Shipment]) -> list[int]:
        """Bytes of each rank that are free while these moves are made."""
        free_G = self.limit_G - self.now_G
        for t in moves:
            free_G[t.destination] -= t.bytes
        for t in moves:
            free = int(free_G[t.source])
            if _passes_through(t) and t.bytes > free:
                what = f"the home copy of layer {t.layer}, expert {t.expert} takes {t.bytes}"
                raise InfeasibleError(
                    f"migration: rank {t.source} has {free} bytes to spare, and {what} on its way to rank "
                    f"{t.destination}; max_extra_bytes must leave room for that"
                )
        return [int(free) for free in free_G]

    def there(self, layer: int) -> bool:
        """Whether the layer stands as it shall, slot by slot."""
        return self.held[layer] == self.goal_LG[layer]

    def stage(self, layer: int) -> bool:
        """Add one stage of a layer; False if nothing can move."""
        size, gpus = self.bytes_L[layer], len(self.limit_G)
        held, goal = self.held[layer], self.goal_LG[layer]
        ready = {(e, g) for (at, e, g) in self.staged if at == layer}
        room_G = [int((self.limit_G[g] - self.now_G[g]) // size) if size else 2**31 for g in range(gpus)]
        rows, arrivals = _next_rows(held, goal, room_G, ready)
        reached = _sorted(rows) == _sorted(goal)
        if not reached and _sorted(rows) == _sorted(held):
            return False
        if reached:
            rows = [list(row) for row in goal]
        moves = [
            self.router.source(layer, e, [g for g in range(gpus) if e in held[g]], to, size)
            for e, to in arrivals
            if (e, to) not in ready
        ]
        self.steps += _pack(moves, self.max_step_bytes, gpus, self._spare(moves) if self.through else None)
        self.now_G = self.now_G + table_bytes(rows, size) - table_bytes(held, size)
        for e, g in arrivals:
            if (e, g) in ready:
                self.now_G[g] -= size
        self.held[layer] = rows
        self.stages.append(Stage(layer, rows_to_slots(rows), len(self.steps) - 1))
        return True


def _sorted(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [sorted(row) for row in rows]


def _all_bytes(rows_LG: Sequence[Sequence[Sequence[int]]], bytes_L: Sequence[int]) -> IntArray:
    """Bytes of each rank's experts of all layers."""
    bytes_LG = [table_bytes(rows, size) for rows, size in zip(rows_LG, bytes_L, strict=True)]
    return np.asarray(np.sum(bytes_LG, axis=0), dtype=np.int64)


def _given(steps: Any) -> list[Any]:
    """The steps of a schedule that somebody else made."""
    given = getattr(steps, "steps", steps)
    if not isinstance(given, Iterable):
        raise ProblemError("steps", f"is {steps!r}, must be a Migration or a sequence of steps")
    return list(given)


def follow_schedule(
    steps: Any,
    have_LG: Sequence[Sequence[Sequence[int]]],
    target_LGC: SlotArray,
    bytes_L: Sequence[int],
    *,
    max_extra_bytes: int | None = None,
    home: Callable[[int, int], Sequence[int]] | None = None,
    through: bool = False,
) -> Schedule:
    """A schedule whose steps somebody else chose, made ready to be carried out.

    Parameters
    ----------
    steps : Migration or sequence
        A `moeless_opt.problems.plan.Migration`, its steps, or plain sequences of transfers (anything
        with ``layer``, ``expert``, ``source`` and ``target`` or ``destination``). A source of -1 is the host.
        Without drops of their own, steps let go of a layer's old replicas after its last transfer.
    have_LG, target_LGC, bytes_L, max_extra_bytes, home, through
        As in `build_schedule`.

    Raises
    ------
    ProblemError
        If a source does not hold its expert, or the steps do not lead to the target.
    InfeasibleError
        If the steps need more memory than `max_extra_bytes` allows.
    """
    target = np.asarray(target_LGC)
    layers, gpus = target.shape[:2]
    goal_LG = [[[int(e) for e in row if e >= 0] for row in layer] for layer in target]
    held = [[list(row) for row in layer] for layer in have_LG]
    given = _given(steps)
    explicit = any(hasattr(step, "transfers") for step in given)
    last_L = {int(t.layer): s for s, step in enumerate(given) for t in getattr(step, "transfers", step)}
    limit_G = np.maximum(_all_bytes(held, bytes_L), _all_bytes(goal_LG, bytes_L)) + (
        2**62 if max_extra_bytes is None else int(max_extra_bytes)
    )
    done: list[tuple[Shipment, ...]] = []
    stages: list[Stage] = []

    def switch(layers: set[int], last_step: int) -> None:
        stages.extend(Stage(i, rows_to_slots(held[i]), last_step) for i in sorted(layers))

    for s, step in enumerate(given):
        switch(_let_go(held, getattr(step, "drops_before", ()), f"steps[{s}].drops_before"), s - 1)
        row = tuple(
            _checked(t, f"steps[{s}].transfers[{k}]", held, bytes_L, home)
            for k, t in enumerate(getattr(step, "transfers", step))
        )
        for t in row:
            held[t.layer][t.destination].append(t.expert)
        done.append(row)
        now_G = _all_bytes(held, bytes_L) + (_through_G(row, gpus) if through else 0)
        if (now_G > limit_G).any():
            g = int(np.argmax(now_G - limit_G))
            over = int(now_G[g] - limit_G[g])
            raise InfeasibleError(f"step {s} of the migration takes rank {g} {over} bytes over its limit")
        changed = {t.layer for t in row}
        changed |= _let_go(held, getattr(step, "drops_after", ()), f"steps[{s}].drops_after")
        if not explicit:
            for i in [i for i in changed if last_L[i] == s]:
                held[i] = [
                    [e for e in row if e in goal] for row, goal in zip(held[i], goal_LG[i], strict=True)
                ]
        switch(changed, s)
    for i in range(layers):
        if not explicit and i not in last_L:
            held[i] = _common(held[i], goal_LG[i])
        for g in range(gpus):
            if set(held[i][g]) != set(goal_LG[i][g]):
                missing = sorted(set(goal_LG[i][g]) - set(held[i][g]))
                extra = sorted(set(held[i][g]) - set(goal_LG[i][g]))
                raise ProblemError(
                    "steps", f"layer {i}: rank {g} would end without experts {missing} and with {extra}"
                )
        if [list(row) for row in have_LG[i]] != goal_LG[i]:
            stages.append(Stage(i, rows_to_slots(goal_LG[i]), len(done) - 1))
    return Schedule(tuple(done), tuple(stages), limit_G)


def _common(rows: list[list[int]], others: list[list[int]]) -> list[list[int]]:
    return [[e for e in row if e in other] for row, other in zip(rows, others, strict=True)]


def _let_go(held: list[list[list[int]]], drops: Sequence[Any], where: str) -> set[int]:
    for drop in drops:
        row = held[int(drop.layer)][int(drop.gpu)]
        if int(drop.expert) not in row:
            raise ProblemError(
                where, f"rank {drop.gpu} does not hold expert {drop.expert} of layer {drop.layer}"
            )
        row.remove(int(drop.expert))
    return {int(drop.layer) for drop in drops}


def _checked(
    t: Any,
    where: str,
    held: list[list[list[int]]],
    bytes_L: Sequence[int],
    home: Callable[[int, int], Sequence[int]] | None,
) -> Shipment:
    layer, expert, source = int(t.layer), int(t.expert), int(t.source)
    to = int(t.target if hasattr(t, "target") else t.destination)
    if expert in held[layer][to]:
        raise ProblemError(where, f"rank {to} has expert {expert} of layer {layer} already")
    from_home = source < 0 or bool(getattr(t, "from_home", False))
    if from_home:
        copies = list(home(layer, expert)) if home is not None else []
        if not copies:
            raise ProblemError(where, f"there is no home copy of expert {expert} of layer {layer}")
        source = to if to in copies else copies[0]
    elif expert not in held[layer][source]:
        raise ProblemError(where, f"rank {source} does not hold expert {expert} of layer {layer}")
    return Shipment(layer, expert, source, to, int(bytes_L[layer]), from_home)
