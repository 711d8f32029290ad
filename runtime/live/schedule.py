"""Which expert sits where, and in what order a new placement is reached.

Plain numpy: no torch, no process groups, so that the same code plans for a live model, for a simulated
one and in tests. A layer's placement is an array ``slots_GC`` (rank of the expert-parallel group by slot,
expert id or -1); a model's is ``slots_LGC``. Ranks may have any number of slots, also none.

Every function here is deterministic: ranks that call it with the same arguments get the same answer, which
is what lets a group of processes change a placement together without talking about it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.topology import Links

__all__ = [
    "Router",
    "Schedule",
    "SlotTable",
    "Stage",
    "Transfer",
    "build_schedule",
    "follow_schedule",
    "one_each",
    "repair_slots",
    "slots_of",
    "static_slots",
]

Slots = NDArray[np.int32]
Ints = NDArray[np.int64]
EMPTY = -1


def static_slots(n_experts: int, n_ranks: int, n_layers: int | None = None) -> Slots:
    """Contiguous equal blocks, as stock expert parallelism places them.

    Parameters
    ----------
    n_experts, n_ranks : int
        The first must be a multiple of the second.
    n_layers : int, optional
        Add a leading axis of so many equal layers.

    Returns
    -------
    array of int32, shape [G, C] or [L, G, C]
    """
    if n_experts % n_ranks:
        raise ProblemError("n_ranks", f"{n_experts} experts do not divide among {n_ranks} ranks")
    slots_GC = np.arange(n_experts, dtype=np.int32).reshape(n_ranks, -1)
    return slots_GC if n_layers is None else np.repeat(slots_GC[None], n_layers, axis=0)


def one_each(rows: Sequence[Sequence[int]], n_experts: int) -> Slots:
    """Slots that keep one replica of each expert where it is, and as few on the fullest rank as comes easily.

    Experts with the fewest holders choose first, each the holder that keeps least so far.
    """
    holders: list[list[int]] = [[] for _ in range(n_experts)]
    for g, row in enumerate(rows):
        for e in row:
            holders[e].append(g)
    kept: list[list[int]] = [[] for _ in rows]
    for e in sorted(range(n_experts), key=lambda e: (len(holders[e]), e)):
        kept[min(holders[e], key=lambda g: (len(kept[g]), g))].append(e)
    return rows_to_slots([sorted(row) for row in kept])


def slots_of(plan: Any) -> Slots:
    """The array ``slots_LGC`` of a plan, a placement or an array.

    Parameters
    ----------
    plan : object
        Something with ``slots_LGC``, something with ``placement.slots_LGC``, or the array itself.
    """
    for holder in (plan, getattr(plan, "placement", None)):
        if holder is not None and hasattr(holder, "slots_LGC"):
            plan = holder.slots_LGC
            break
    slots = np.asarray(plan)
    if slots.ndim != 3 or slots.dtype.kind not in "iu":
        raise ProblemError(
            "slots_LGC", f"must be whole numbers [layer, rank, slot], got {slots.dtype} {slots.shape}"
        )
    return np.ascontiguousarray(slots, dtype=np.int32)


def rows_to_slots(rows: Sequence[Sequence[int]], width: int | None = None) -> Slots:
    """``slots_GC`` from one list of experts per rank; short rows are filled with -1."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    slots_GC = np.full((len(rows), width), EMPTY, dtype=np.int32)
    for g, row in enumerate(rows):
        slots_GC[g, : len(row)] = row
    return slots_GC


class SlotTable:
    """The slots of one layer, with every index that dispatching needs worked out once.

    The used slots of all ranks stand in one row, rank by rank ("flat" slots, axis P).

    Parameters
    ----------
    slots_GC : array of int, shape [G, C]
        Expert id of each slot of each rank of the group; -1 where empty.
    n_experts : int
        Logical experts of the layer; each needs at least one slot.

    Raises
    ------
    ProblemError
        If an expert is missing, out of range, or twice on one rank.
    """

    __slots__ = (
        "ends_G",
        "expert_P",
        "n_experts",
        "rank_P",
        "replicas_E",
        "rows",
        "single",
        "sorted",
        "starts_G",
        "to_slots_P",
    )

    def __init__(self, slots_GC: ArrayLike, n_experts: int) -> None:
        slots = np.asarray(slots_GC, dtype=np.int64)
        if slots.ndim != 2:
            raise ProblemError("slots_GC", f"must be [rank, slot], got shape {slots.shape}")
        self.n_experts = n_experts
        self.rows: tuple[tuple[int, ...], ...] = tuple(tuple(int(e) for e in row if e >= 0) for row in slots)
        used = slots >= 0
        self.expert_P: Ints = slots[used]
        self.rank_P: Ints = np.nonzero(used)[0].astype(np.int64)
        sizes_G = used.sum(axis=1)
        self.ends_G: Ints = np.cumsum(sizes_G).astype(np.int64)
        self.starts_G: Ints = self.ends_G - sizes_G
        if self.expert_P.size and int(self.expert_P.max()) >= n_experts:
            raise ProblemError("slots_GC", f"names expert {int(self.expert_P.max())} of {n_experts}")
        self.replicas_E: Ints = np.bincount(self.expert_P, minlength=n_experts).astype(np.int64)
        if (self.replicas_E == 0).any():
            missing = np.flatnonzero(self.replicas_E == 0)[:8].tolist()
            raise ProblemError("slots_GC", f"experts {missing} have no replica; every expert needs one")
        for g, row in enumerate(self.rows):
            if len(set(row)) < len(row):
                twice = sorted({e for e in row if row.count(e) > 1})
                raise ProblemError(
                    f"slots_GC[{g}]", f"experts {twice} stand twice on rank {g}; once is enough"
                )
        self.single = bool((self.replicas_E == 1).all())
        # Rows of tokens come sorted by expert; to_slots_P lists the flat slots in that order.
        self.to_slots_P: Ints = np.argsort(self.expert_P, kind="stable").astype(np.int64)
        self.sorted = bool((np.diff(self.expert_P) > 0).all())

    @property
    def n_ranks(self) -> int:
        """Ranks of the group, with those that hold nothing."""
        return len(self.rows)

    def slots(self, width: int | None = None) -> Slots:
        """Back to ``slots_GC``; `width` pads to so many slots."""
        return rows_to_slots(self.rows, width)


# ---------------------------------------------------------------------------------------------- transfers


@dataclass(frozen=True, slots=True)
class Transfer:
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
    slots_GC: Slots
    last_step: int


@dataclass(frozen=True)
class Schedule:
    """Steps of transfers, and the switches that they allow.

    Parameters
    ----------
    steps : tuple of tuples of Transfer
        Each step is posted as one batch.
    stages : tuple of Stage
        In order; the stages of one layer follow each other.
    limit_G : array of int, shape [G]
        Bytes of experts, live and on their way, that a rank may hold at any moment.
    """

    steps: tuple[tuple[Transfer, ...], ...]
    stages: tuple[Stage, ...]
    limit_G: Ints
    digest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        text = repr((self.steps, [(s.layer, s.slots_GC.tolist(), s.last_step) for s in self.stages]))
        object.__setattr__(self, "digest", zlib.crc32(text.encode()) & 0x7FFFFFFF)

    @property
    def bytes(self) -> int:
        """Bytes that cross a link between ranks."""
        return sum(t.bytes for step in self.steps for t in step if t.source != t.destination)


def table_bytes(rows: Sequence[Sequence[int]], expert_bytes: int) -> Ints:
    """Bytes of each rank's experts of one layer."""
    return np.array([len(row) * expert_bytes for row in rows], dtype=np.int64)


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

    def source(self, layer: int, expert: int, holders: Sequence[int], to: int, size: int) -> Transfer:
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
                return Transfer(layer, expert, best, to, size, from_home)
        raise InfeasibleError(
            f"layer {layer}, expert {expert}: no rank holds it and there is no home copy of it"
        )


def _pack(
    transfers: Sequence[Transfer], max_step_bytes: int | None, n_ranks: int
) -> list[tuple[Transfer, ...]]:
    """First fit in order: no rank sends or receives more than the limit in a step of several transfers."""
    if not transfers:
        return []
    if max_step_bytes is None:
        return [tuple(transfers)]
    steps: list[list[Transfer]] = []
    out: list[Ints] = []
    for t in transfers:
        spare = (
            moved[0, t.source] + t.bytes <= max_step_bytes
            and moved[1, t.destination] + t.bytes <= max_step_bytes
            for moved in out
        )
        at = next((i for i, fits in enumerate(spare) if fits), len(steps))
        if at == len(steps):
            steps.append([])
            out.append(np.zeros((2, n_ranks), dtype=np.int64))
        steps[at].append(t)
        out[at][0, t.source] += t.bytes
        out[at][1, t.destination] += t.bytes
    return [tuple(step) for step in steps]


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
    target_LGC: Slots,
    bytes_L: Sequence[int],
    *,
    node_G: Sequence[int] | None = None,
    max_step_bytes: int | None = None,
    max_extra_bytes: int | None = None,
    home: Callable[[int, int], Sequence[int]] | None = None,
    links: Links | None = None,
    staged: frozenset[tuple[int, int, int]] = frozenset(),
    order: Sequence[int] | None = None,
) -> Schedule:
    """Steps that lead from what the ranks hold to a target placement, layer by layer.

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
    order : sequence of int, optional
        Layers in the order in which they should move; by index by default. A layer that does not fit
        yet is put behind the others.

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
    n_layers, n_ranks = target.shape[:2]
    router = Router(node_G if node_G is not None else [0] * n_ranks, home, links)
    goal_LG = [[[int(e) for e in row if e >= 0] for row in layer] for layer in target]
    held = [[list(row) for row in layer] for layer in have_LG]
    before_G = sum((table_bytes(held[i], bytes_L[i]) for i in range(n_layers)), np.zeros(n_ranks, np.int64))
    after_G = sum((table_bytes(goal_LG[i], bytes_L[i]) for i in range(n_layers)), np.zeros(n_ranks, np.int64))
    # Copies that are staged already count as held from the start.
    extra = 2**62 if max_extra_bytes is None else int(max_extra_bytes)
    limit_G = np.maximum(before_G, after_G) + extra
    staged_G = np.zeros(n_ranks, np.int64)
    for layer, _, g in staged:
        staged_G[g] += bytes_L[layer]
    now_G = before_G + staged_G
    steps: list[tuple[Transfer, ...]] = []
    stages: list[Stage] = []
    todo = [i for i in (order if order is not None else range(n_layers)) if held[i] != goal_LG[i]]
    while todo:
        progressed = False
        for layer in list(todo):
            size = bytes_L[layer]
            while held[layer] != goal_LG[layer]:
                ready = {(e, g) for (at, e, g) in staged if at == layer}
                room_G = [int((limit_G[g] - now_G[g]) // size) if size else 2**31 for g in range(n_ranks)]
                rows, arrivals = _next_rows(held[layer], goal_LG[layer], room_G, ready)
                same = [sorted(a) for a in rows] == [sorted(b) for b in held[layer]]
                if same and [sorted(a) for a in rows] != [sorted(b) for b in goal_LG[layer]]:
                    break
                if [sorted(a) for a in rows] == [sorted(b) for b in goal_LG[layer]]:
                    rows = [list(row) for row in goal_LG[layer]]
                moves = [
                    router.source(layer, e, [g for g in range(n_ranks) if e in held[layer][g]], to, size)
                    for e, to in arrivals
                    if (e, to) not in ready
                ]
                steps += _pack(moves, max_step_bytes, n_ranks)
                now_G = now_G + table_bytes(rows, size) - table_bytes(held[layer], size)
                for _, g in [(e, g) for e, g in arrivals if (e, g) in ready]:
                    now_G[g] -= size
                held[layer] = rows
                stages.append(Stage(layer, rows_to_slots(rows), len(steps) - 1))
                progressed = True
            if held[layer] == goal_LG[layer]:
                todo.remove(layer)
        if todo and not progressed:
            worst = int(np.argmin(limit_G - now_G))
            raise InfeasibleError(
                f"migration: {len(todo)} layers do not fit: rank {worst} has "
                f"{int(limit_G[worst] - now_G[worst])} bytes to spare and one expert takes "
                f"{bytes_L[todo[0]]}; max_extra_bytes must be at least that"
            )
    return Schedule(tuple(steps), tuple(stages), limit_G)


def follow_schedule(
    steps: Any,
    have_LG: Sequence[Sequence[Sequence[int]]],
    target_LGC: Slots,
    bytes_L: Sequence[int],
    *,
    max_extra_bytes: int | None = None,
    home: Callable[[int, int], Sequence[int]] | None = None,
) -> Schedule:
    """A schedule whose steps somebody else chose, made ready to be carried out.

    Parameters
    ----------
    steps : Migration or sequence
        A `moeless_opt.problems.plan.Migration`, its steps, or plain sequences of transfers (anything
        with ``layer``, ``expert``, ``source`` and ``target`` or ``destination``). A source of -1 is the host.
        Without drops of their own, steps let go of a layer's old replicas after its last transfer.
    have_LG, target_LGC, bytes_L, max_extra_bytes, home
        As in `build_schedule`.

    Raises
    ------
    ProblemError
        If a source does not hold its expert, or the steps do not lead to the target.
    InfeasibleError
        If the steps need more memory than `max_extra_bytes` allows.
    """
    target = np.asarray(target_LGC)
    n_layers, n_ranks = target.shape[:2]
    goal_LG = [[[int(e) for e in row if e >= 0] for row in layer] for layer in target]
    held = [[list(row) for row in layer] for layer in have_LG]
    given = list(getattr(steps, "steps", steps))
    explicit = any(hasattr(step, "transfers") for step in given)
    last_L = {int(t.layer): s for s, step in enumerate(given) for t in getattr(step, "transfers", step)}
    before_G = sum((table_bytes(held[i], bytes_L[i]) for i in range(n_layers)), np.zeros(n_ranks, np.int64))
    after_G = sum((table_bytes(goal_LG[i], bytes_L[i]) for i in range(n_layers)), np.zeros(n_ranks, np.int64))
    limit_G = np.maximum(before_G, after_G) + (2**62 if max_extra_bytes is None else int(max_extra_bytes))
    done: list[tuple[Transfer, ...]] = []
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
        now_G = sum((table_bytes(held[i], bytes_L[i]) for i in range(n_layers)), np.zeros(n_ranks, np.int64))
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
    for i in range(n_layers):
        if not explicit and i not in last_L:
            held[i] = _common(held[i], goal_LG[i])
        for g in range(n_ranks):
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
) -> Transfer:
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
    return Transfer(layer, expert, source, to, int(bytes_L[layer]), from_home)


def repair_slots(
    have_LG: Sequence[Sequence[Sequence[int]]],
    n_experts: int,
    capacity_LG: ArrayLike,
    load_LE: ArrayLike | None = None,
) -> Slots:
    """A placement from what is left: everything stays, and experts without a replica get a slot.

    Parameters
    ----------
    have_LG : nested sequences
        Experts that each surviving rank holds, by layer.
    n_experts : int
        Logical experts of a layer.
    capacity_LG : array of int, shape [L, G]
        Slots of each rank in each layer.
    load_LE : array of float, shape [L, E], optional
        Tokens of each expert; equal by default.

    Returns
    -------
    array of int32, shape [L, G, C]

    Raises
    ------
    InfeasibleError
        If the slots are too few.

    Notes
    -----
    Lost experts are placed in decreasing load on the least loaded rank with a free slot. Where no slot is
    free, the least loaded replica among experts that have another one makes room. The nearest valid
    placement, not the best: a re-plan may follow.
    """
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    n_layers, n_ranks = capacity.shape
    load = np.ones((n_layers, n_experts)) if load_LE is None else np.asarray(load_LE, dtype=np.float64)
    layers: list[list[list[int]]] = []
    for i in range(n_layers):
        if int(np.minimum(capacity[i], n_experts).sum()) < n_experts:
            raise InfeasibleError(
                f"layer {i}: {n_experts} experts and only {int(capacity[i].sum())} slots on the ranks left"
            )
        rows = [list(row) for row in have_LG[i]]
        count_E = np.bincount([e for row in rows for e in row], minlength=n_experts)

        def share(e: int, i: int = i, count_E: Any = count_E) -> float:
            return float(load[i, e]) / max(1, int(count_E[e]))

        def evict(g: int, rows: list[list[int]] = rows, count_E: Any = count_E, share: Any = share) -> bool:
            spare = [e for e in rows[g] if count_E[e] > 1]
            if not spare:
                return False
            out = min(spare, key=lambda e: (share(e), e))
            rows[g].remove(out)
            count_E[out] -= 1
            return True

        for g in range(n_ranks):
            while len(rows[g]) > capacity[i, g] and evict(g):
                pass
            while len(rows[g]) > capacity[i, g]:
                count_E[rows[g].pop()] -= 1
        for e in sorted(np.flatnonzero(count_E == 0).tolist(), key=lambda e: (-load[i, e], e)):
            tokens_G = [sum(share(x) for x in row) for row in rows]
            free = [g for g in range(n_ranks) if len(rows[g]) < capacity[i, g]]
            if not free:
                free = [g for g in sorted(range(n_ranks), key=lambda g: (tokens_G[g], g)) if evict(g)][:1]
            if not free:
                raise InfeasibleError(f"layer {i}: no slot left for expert {e}")
            rows[min(free, key=lambda g: (tokens_G[g], g))].append(e)
            count_E[e] += 1
        layers.append(rows)
    width = max(len(row) for rows in layers for row in rows)
    return np.stack([rows_to_slots(rows, width) for rows in layers])
