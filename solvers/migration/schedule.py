"""The order of a migration: which replica travels when, from where, so that no port and no GPU overflows.

Every GPU has one port into its node (NVLink), one to other nodes and one to its host; in a step each sends
and receives at most one replica. A step is a matching of senders to receivers: a min-cost flow (ortools)
that serves the busiest receivers, and the experts that still have most copies to make, first. Arrived
copies serve as sources in the next step, so a hot expert spreads by doubling. A GPU without room gives up a
replica that lives elsewhere before it receives; where all wait for each other, one replica is parked on a
third GPU.

References
----------
By König's theorem the steps of a bipartite transfer graph need no more than its largest degree; taking, in
each step, a matching that covers the vertices of largest degree attains it.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import (
    HOST,
    Drop,
    Migration,
    Step,
    Transfer,
    new_replicas,
    port_kind,
    transfer_seconds,
)
from moeless_opt.problems.spec import Topology, held_LGE
from moeless_opt.solvers.migration.greedy import schedule_greedily

__all__ = ["migration_bound", "migration_graph", "schedule_migration", "staging_limit"]

MANY, MANY_ACROSS = 256, 4096
"""More transfers than this, on one node and over several, are ordered greedily (`migration_greedy`): the same
number of steps within a tenth, in a tenth of the time or less. With limits a flow decides up to `MANY`; of
more, a greedy matching of the first few that each GPU waits for."""

WINDOW = 6
"""A step looks at so many of the replicas that each GPU waits for, where there are over `MANY` in all."""

SOURCES = 4
"""Live copies that such a replica is looked for at, in a step."""

Key = tuple[int, int, int]
"""Layer, expert, GPU."""

Way = tuple[int, int, int, int]
"""Layer, expert, source, target of a transfer that could run."""


def staging_limit(
    topology: Topology, bytes_L: IntArray, capacity_LG: IntArray, staging: int | None
) -> IntArray:
    """Bytes that each GPU may hold while a migration runs, shape [G].

    Its memory, where that is known; else its slots, plus `staging` bytes (one replica by default).
    """
    if topology.memory_G is not None:
        return topology.memory_G
    room = int(bytes_L.max()) if staging is None else staging
    return np.asarray(bytes_L @ capacity_LG + room)


def schedule_migration(
    before_LGC: SlotArray,
    after_LGC: SlotArray,
    experts: int,
    topology: Topology,
    *,
    bytes_L: IntArray | None = None,
    limit_G: IntArray | None = None,
    max_step_bytes: int | None = None,
    priority_L: IntArray | None = None,
) -> Migration:
    """Order the transfers that turn one placement into another.

    Parameters
    ----------
    before_LGC, after_LGC : arrays of int32, shape [L, G, C]
        The live placement and the wanted one. An expert without a live replica comes from the host.
    experts : int
        Experts per layer.
    topology : Topology
        GPUs and links.
    bytes_L : array of int, shape [L], optional
        Bytes of a replica (1 each where unknown; then a second means nothing, the order does).
    limit_G : array of int, shape [G], optional
        Bytes that a GPU may hold at any moment (see `staging_limit`); unlimited by default.
    max_step_bytes : int, optional
        Bytes that all transfers of one step may have together.
    priority_L : array of int, shape [L], optional
        Layers with larger values go first among equals.

    Returns
    -------
    Migration
        Replayed replica by replica, it never overflows a port or a GPU and never leaves an expert without
        a live replica.

    Raises
    ------
    InfeasibleError
        If no GPU has room to break a cycle of replicas that wait for each other; says how much would do.
    """
    size_L = np.ones(len(before_LGC), dtype=np.int64) if bytes_L is None or not np.any(bytes_L) else bytes_L
    if max_step_bytes is not None and max_step_bytes < int(size_L.max()):
        raise ProblemError("max_step_bytes", f"is {max_step_bytes}, one replica has {int(size_L.max())}")
    if limit_G is None and max_step_bytes is None and priority_L is None:
        moves = int(np.count_nonzero(new_replicas(after_LGC, before_LGC, experts)))
        if moves > (MANY if topology.nodes == 1 else MANY_ACROSS):
            return schedule_greedily(before_LGC, after_LGC, experts, topology, size_L)
    rank_L = np.zeros(len(size_L), dtype=np.int64) if priority_L is None else np.asarray(priority_L)
    board = _Board(before_LGC, after_LGC, experts, topology, size_L, limit_G, rank_L)
    bound = migration_bound(before_LGC, after_LGC, experts, topology, size_L)
    steps: list[Step] = []
    staged, most_parked = 0, 4 * len(board.adds) + 16
    while board.adds or board.drops:
        step = board.step(rank_L, max_step_bytes, few=board.many)
        if board.many and not step.transfers:  # none of the few: any other?
            step = _joined(step, board.step(rank_L, max_step_bytes))
        if not (step.transfers or step.drops_before or step.drops_after):
            board.park()
            staged += 1
            if staged > most_parked:
                raise RuntimeError("the migration schedule makes no progress")
            continue
        steps.append(step)
    return Migration(
        steps=tuple(steps),
        seconds=sum(step.seconds for step in steps),
        lower_bound=bound,
        peak_G=board.peak_G,
        staged=staged,
    )


def _joined(first: Step, then: Step) -> Step:
    """A step without transfers and the one after it, as one."""
    before = first.drops_before + first.drops_after + then.drops_before
    return Step(before, then.transfers, then.drops_after, then.seconds)


class _Board:
    """What lives where while the schedule is being written.

    Kept up as it changes, and not counted anew in every step: what each GPU waits for (`adds_G`), gives up
    (`drops_G`) and could give up now (`loose_G`, bytes); copies that an expert still has to make (`copies`).
    """

    def __init__(
        self,
        before_LGC: SlotArray,
        after_LGC: SlotArray,
        experts: int,
        topology: Topology,
        size_L: IntArray,
        limit_G: IntArray | None,
        rank_L: IntArray,
    ) -> None:
        held, wanted = held_LGE(before_LGC, experts), held_LGE(after_LGC, experts)
        self.topology, self.size_L = topology, size_L
        self.node_G = topology.node_G.tolist()
        self.gpus = topology.gpus
        self.adds: dict[Key, None] = dict.fromkeys(_keys(wanted & ~held))
        self.drops: dict[Key, None] = dict.fromkeys(_keys(held & ~wanted))
        self.many = len(self.adds) > MANY
        self.adds_G: list[dict[Key, None]] = [{} for _ in range(self.gpus)]
        self.drops_G: list[dict[Key, None]] = [{} for _ in range(self.gpus)]
        layers, rank = len(size_L), rank_L.tolist()

        def turn(key: Key) -> tuple[int, int]:  # GPUs begin with different layers, and ask different ones
            return -rank[key[0]], (key[0] - key[2]) % layers

        for key in sorted(self.adds, key=turn) if self.many else self.adds:
            self.adds_G[key[2]][key] = None
        for key in self.drops:
            self.drops_G[key[2]][key] = None
        self.copies = Counter(key[:2] for key in self.adds)
        # Only experts that move matter; the others' replicas are memory and nothing else.
        layer_H, gpu_H, expert_H = (part.tolist() for part in np.nonzero(held))
        moving = {key[:2] for key in (*self.adds, *self.drops)}
        self.holders: dict[tuple[int, int], set[int]] = {kind: set() for kind in moving}
        for layer, gpu, expert in zip(layer_H, gpu_H, expert_H, strict=True):
            if (layer, expert) in moving:
                self.holders[layer, expert].add(gpu)
        self.bytes_L: list[int] = size_L.tolist()
        self.loose_G = [0] * self.gpus
        for key in self.drops:
            if len(self.holders[key[:2]]) > 1:
                self.loose_G[key[2]] += self.bytes_L[key[0]]
        self.replaced = [kind for kind in self.holders if kind not in self.copies]
        """Experts of which no copy is to come any more, and whose drops have not been looked at since."""
        self.used_G: list[int] = (held.sum(2).T @ size_L).tolist()
        self.limit_G: list[float] = [math.inf] * self.gpus if limit_G is None else limit_G.tolist()
        over = [g for g in range(self.gpus) if self.used_G[g] > self.limit_G[g]]
        if over:
            raise InfeasibleError(
                f"migration: GPU {over[0]} already holds {self.used_G[over[0]]} bytes, "
                f"its limit is {int(self.limit_G[over[0]])}"
            )
        self.peak_G: IntArray = np.array(self.used_G, dtype=np.int64)

    # --- one step ------------------------------------------------------------------------------------------

    def step(self, rank_L: IntArray, max_bytes: int | None, *, few: bool = False) -> Step:
        """Transfers that run at once, and what is given up before and after; of `few`, those at the heads."""
        ready = self._heads() if few else self._ready()
        ways = self._greedy(ready, rank_L, max_bytes) if self.many else self._match(ready, rank_L, max_bytes)
        chosen = [Transfer(*way, self.bytes_L[way[0]]) for way in ways]
        before: list[Drop] = []
        going: list[Transfer] = []
        sending = {(t.layer, t.expert, t.source) for t in chosen}
        arriving: Counter[int] = Counter()
        for transfer in chosen:
            freed = self._make_room(transfer, arriving[transfer.target], sending)
            if freed is None:
                continue
            before += freed
            arriving[transfer.target] += transfer.bytes
            going.append(transfer)
        for transfer in going:
            self._arrived((transfer.layer, transfer.expert, transfer.target))
        np.maximum(self.peak_G, np.array(self.used_G), out=self.peak_G)
        seconds = max(
            (transfer_seconds(self.topology, t.source, t.target, t.bytes) for t in going), default=0.0
        )
        return Step(tuple(before), tuple(going), tuple(self._drop_replaced()), seconds)

    def _arrived(self, key: Key) -> None:
        kind, gpu = key[:2], key[2]
        del self.adds[key], self.adds_G[gpu][key]
        self._hold(kind, gpu)
        self.used_G[gpu] += self.bytes_L[key[0]]
        self.copies[kind] -= 1
        if not self.copies[kind]:
            del self.copies[kind]
            self.replaced.append(kind)

    def _hold(self, kind: tuple[int, int], gpu: int) -> None:
        """A GPU holds an expert: what was its only replica may go now."""
        holders = self.holders[kind]
        if len(holders) == 1:
            (alone,) = holders
            if (*kind, alone) in self.drops:
                self.loose_G[alone] += self.bytes_L[kind[0]]
        holders.add(gpu)
        if (*kind, gpu) in self.drops and len(holders) > 1:
            self.loose_G[gpu] += self.bytes_L[kind[0]]

    def _room_G(self) -> list[int]:
        """How many of the largest replicas each GPU has room for, up to three."""
        largest = max(self.bytes_L)
        return [int(min(free // largest, 3)) if free < math.inf else 3 for free in self._free()]

    def _greedy(self, ready: list[Way], rank_L: IntArray, max_bytes: int | None) -> list[Way]:
        """As `_match`, but each way by itself, the most urgent first; nothing can be added to them."""
        room, rank = [max(one, 1) for one in self._room_G()], rank_L.tolist()
        left = len(ready) if max_bytes is None else max_bytes // max(self.bytes_L)
        waiting = [len(keys) for keys in self.adds_G]

        def urgency(way: Way) -> tuple[int, int]:
            return -rank[way[0]], -max(waiting[way[3]], self.copies[way[:2]].bit_length())

        taken: list[Way] = []
        ports: set[tuple[str, str, int]] = set()
        coming: set[Key] = set()
        for way in sorted(ready, key=urgency):
            layer, expert, source, target = way
            kind = self._kind(source, target)
            into, out = (kind, "in", target), (kind, "out", source)
            key = (layer, expert, target)
            if not left or into in ports or out in ports or key in coming or not room[target]:
                continue
            ports.add(into)
            if source != HOST:  # the host serves every GPU at once
                ports.add(out)
            coming.add(key)
            room[target] -= 1
            left -= 1
            taken.append(way)
        return taken

    def _kind(self, source: int, target: int) -> str:
        if source == HOST:
            return "host"
        return "intra" if self.node_G[source] == self.node_G[target] else "inter"

    def _match(self, ready: list[Way], rank_L: IntArray, max_bytes: int | None) -> list[Way]:
        """The transfers of the next step: a matching of sender ports to receiver ports of most priority."""
        if len(ready) <= 1:
            return ready
        from ortools.graph.python import min_cost_flow

        waiting_in = Counter((self._kind(source, target), target) for _, _, source, target in ready)
        nodes: dict[object, int] = {"source": 0, "sink": 1}
        flow = min_cost_flow.SimpleMinCostFlow()
        arcs: dict[int, Way] = {}
        spread = 1 + int(rank_L.max()) - int(rank_L.min())
        room = self._room_G()
        limit = len(ready) if max_bytes is None else max_bytes // int(self.size_L.max())

        def node(key: object) -> int:
            return nodes.setdefault(key, len(nodes))

        ports: set[tuple[int, int]] = set()

        def port(tail: int, head: int, capacity: int) -> None:
            if (tail, head) not in ports:
                ports.add((tail, head))
                flow.add_arc_with_capacity_and_unit_cost(tail, head, capacity, 0)

        for way in ready:
            layer, expert, source, target = way
            kind = self._kind(source, target)
            urgency = max(waiting_in[kind, target], self.copies[layer, expert].bit_length())
            worth = urgency * spread + int(rank_L[layer]) - int(rank_L.min())
            head, tail = node(("in", kind, target)), node(("out", kind, source))
            if source == HOST:  # the host serves every GPU at once
                tail = node(("out", kind, "host", target))
            copy = node(("copy", layer, expert, target))
            port(0, tail, 1)
            arcs[flow.add_arc_with_capacity_and_unit_cost(tail, copy, 1, -worth)] = way
            port(copy, head, 1)
            port(head, node(("gpu", target)), 1)
            port(node(("gpu", target)), 1, max(room[target], 1))
        flow.set_node_supply(0, min(limit, len(ready)))
        flow.set_node_supply(1, -min(limit, len(ready)))
        if flow.solve_max_flow_with_min_cost() != flow.OPTIMAL:
            raise RuntimeError("the matching of a migration step failed")
        return [way for arc, way in arcs.items() if flow.flow(arc)]

    def _ready(self) -> list[Way]:
        """Every transfer that could run now: from each of the nearest live copies."""
        free_G, ready = self._free(), []
        for key in self.adds:
            if free_G[key[2]] >= self.bytes_L[key[0]]:
                ready += self._ways(key)
        return ready

    def _heads(self) -> list[Way]:
        """As `_ready`, of the first few replicas that each GPU waits for."""
        free_G, ready = self._free(), []
        for gpu, keys in enumerate(self.adds_G):
            fits = (key for key in keys if self.bytes_L[key[0]] <= free_G[gpu])
            for key in islice(fits, WINDOW if free_G[gpu] > 0 else 0):
                ways = self._ways(key)
                turn = gpu % len(ways)
                ready += (ways[turn:] + ways[:turn])[:SOURCES]
        return ready

    def _ways(self, key: Key) -> list[Way]:
        """A replica from each of its nearest live copies, or from the host."""
        layer, expert, target = key
        live = sorted(self.holders[layer, expert])
        near = [g for g in live if self.node_G[g] == self.node_G[target]]
        return [(layer, expert, source, target) for source in near or live or [HOST]]

    def _free(self) -> list[float]:
        """Bytes that each GPU could receive, if it gave up what lives elsewhere."""
        parts = zip(self.limit_G, self.used_G, self.loose_G, strict=True)
        return [limit - used + loose for limit, used, loose in parts]

    def _make_room(self, transfer: Transfer, arriving: int, sending: set[Key]) -> list[Drop] | None:
        """Drops that let a transfer in; None if there is no safe way in this step."""
        gpu = transfer.target
        room = self.limit_G[gpu] - arriving - transfer.bytes
        if self.used_G[gpu] <= room:
            return []
        freed: list[Drop] = []
        for key in list(self.drops_G[gpu]):
            if self.used_G[gpu] <= room:
                break
            holders = self.holders[key[:2]]
            if key not in sending and len(holders) > 1 and gpu in holders:
                freed.append(self._drop(key))
        if self.used_G[gpu] <= room:
            return freed
        for gone in freed:  # undo: they did not suffice
            key = (gone.layer, gone.expert, gone.gpu)
            self.drops[key] = self.drops_G[gpu][key] = None
            self._hold(key[:2], gpu)
            self.used_G[gpu] += self.bytes_L[gone.layer]
        return None

    def _drop_replaced(self) -> list[Drop]:
        """Give up what lives elsewhere and is no source of anything still to come."""
        found = []
        for kind in self.replaced:
            for gpu in sorted(self.holders[kind]):
                if (*kind, gpu) in self.drops and len(self.holders[kind]) > 1 and kind not in self.copies:
                    found.append(self._drop((*kind, gpu)))
        self.replaced = []
        return sorted(found, key=lambda one: (one.layer, one.gpu, one.expert))

    def _drop(self, key: Key) -> Drop:
        kind, gpu, size = key[:2], key[2], self.bytes_L[key[0]]
        del self.drops[key], self.drops_G[gpu][key]
        holders = self.holders[kind]
        if len(holders) > 1:
            self.loose_G[gpu] -= size
        holders.discard(gpu)
        if len(holders) == 1:
            (alone,) = holders
            if (*kind, alone) in self.drops:
                self.loose_G[alone] -= size
        self.used_G[gpu] -= size
        return Drop(*key)

    def park(self) -> None:
        """Break a cycle: a GPU that blocks another copies its only replica to a third one, for a while."""
        for layer, expert, gpu in self.drops:
            size = self.bytes_L[layer]
            if not self.adds_G[gpu] or len(self.holders[layer, expert]) != 1:
                continue
            free = [
                g
                for g in range(self.gpus)
                if g not in self.holders[layer, expert] and self.used_G[g] + size <= self.limit_G[g]
            ]
            if free:
                same = [g for g in free if self.node_G[g] == self.node_G[gpu]]
                key = (layer, expert, (same or free)[0])
                self.adds = {key: None, **self.adds}
                self.adds_G[key[2]] = {key: None, **self.adds_G[key[2]]}
                self.drops[key] = self.drops_G[key[2]][key] = None
                self.copies[layer, expert] += 1
                return
        need = min(int(self.size_L[layer]) for layer, _, _ in self.adds)
        raise InfeasibleError(
            f"migration: {len(self.adds)} replicas wait for each other and no GPU has room to park one: "
            f"{need} spare bytes on any GPU would do"
        )


def _keys(mask_LGE: BoolArray) -> list[Key]:
    layer, gpu, expert = np.nonzero(mask_LGE)
    return list(zip(layer.tolist(), expert.tolist(), gpu.tolist(), strict=True))


def migration_bound(
    before_LGC: SlotArray, after_LGC: SlotArray, experts: int, topology: Topology, bytes_L: IntArray
) -> float:
    """Seconds that any schedule takes at least.

    The largest of: what a GPU must receive over its ports; what must enter a node over the network;
    what a sole holder must send; and, for an expert with many new copies, the doublings that they need.
    """
    held, wanted = held_LGE(before_LGC, experts), held_LGE(after_LGC, experts)
    adds = _keys(wanted & ~held)
    links, node_G = topology.links, topology.node_G
    ports = 1 if topology.nodes == 1 else 2
    receive_G = np.zeros(topology.gpus)
    network_G = np.zeros(topology.gpus)
    host_G = np.zeros(topology.gpus)
    enter_N = np.zeros(topology.nodes)
    send_G = np.zeros(topology.gpus)
    longest = 0.0
    targets: dict[tuple[int, int], list[int]] = {}
    for layer, expert, gpu in adds:
        targets.setdefault((layer, expert), []).append(gpu)
    for (layer, expert), gpus in targets.items():
        size = int(bytes_L[layer])
        live = np.flatnonzero(held[layer, :, expert])
        if live.size == 0:
            host_G[gpus[0]] += links.latency + size / links.host if len(gpus) == 1 else 0.0
            continue
        fastest = links.latency + size / max(links.intra_node, links.inter_node)
        across = links.latency + size / links.inter_node
        doublings = math.ceil(math.log2((live.size + len(gpus)) / live.size))
        # With two kinds of ports a copy may send twice in the time of one transfer.
        longest = max(longest, fastest * (doublings if ports == 1 else math.ceil(doublings / 2)))
        if live.size == 1:
            send_G[live[0]] += fastest
        homes = set(node_G[live].tolist())
        for gpu in gpus:
            node = int(node_G[gpu])
            receive_G[gpu] += fastest
            if node not in homes and sum(int(node_G[g]) == node for g in gpus) == 1:
                network_G[gpu] += across
        for node in {int(node_G[g]) for g in gpus} - homes:
            enter_N[node] += across
    per_node = np.bincount(node_G, minlength=topology.nodes)
    return float(
        max(
            receive_G.max() / ports,
            send_G.max() / ports,
            network_G.max(),
            host_G.max(),
            (enter_N / per_node).max(),
            longest,
        )
    )


def migration_graph(migration: Migration, topology: Topology) -> object:
    """The transfers as a networkx ``MultiDiGraph``: GPUs (and the host, -1) are vertices.

    Edges carry ``layer``, ``expert``, ``bytes``, ``step`` and ``kind`` (the port they use).
    """
    import networkx as nx

    graph = nx.MultiDiGraph()
    graph.add_nodes_from((g, {"node": int(topology.node_G[g])}) for g in range(topology.gpus))
    for number, step in enumerate(migration.steps):
        for move in step.transfers:
            graph.add_edge(
                move.source,
                move.target,
                layer=move.layer,
                expert=move.expert,
                bytes=move.bytes,
                step=number,
                kind=port_kind(topology, move.source, move.target),
            )
    return graph
