"""The order of a large migration without memory limits: greedy matchings, as arrays.

A flow for every step (`migration`) is as good as it gets, and too slow for tens of thousands of replicas.
Here every GPU has a queue of what it lacks. In a step the first few of each queue look for a live copy whose
port is free, in the own node where there is one; where several want one port, the one earlier in its queue
gets it. The queues of different GPUs start at different layers, so that they ask different GPUs, and a hot
expert spreads by doubling. A matching that cannot be extended has at least half of the largest one's
transfers; in practice the busiest receiver sets the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray, SlotArray
from moeless_opt.problems.plan import HOST, Drop, Migration, Step, Transfer
from moeless_opt.problems.spec import Topology, replica_keys

__all__ = ["schedule_greedily"]

_AHEAD = 8192  # entries at the heads of all queues together that look for a source in a step
_TRIES = 6  # times that they look, after others took their port
_SEEN = 32  # copies of an expert that one of them looks at

_INTRA, _INTER, _FROM_HOST = 0, 1, 2


def schedule_greedily(
    before_LGC: SlotArray, after_LGC: SlotArray, experts: int, topology: Topology, size_L: IntArray
) -> Migration:
    """Order the transfers that turn one placement into another; see `migration.schedule_migration`.

    Parameters
    ----------
    before_LGC, after_LGC : arrays of int32, shape [L, G, C]
        The live placement and the wanted one.
    experts : int
        Experts per layer.
    topology : Topology
        GPUs and links.
    size_L : array of int, shape [L]
        Bytes of a replica.
    """
    board = _Board(before_LGC, after_LGC, experts, topology, size_L)
    bound = board.bound()
    steps = []
    while board.waiting.size:
        steps.append(board.step())
    if board.drops.size:
        steps.append(Step((), (), board.drop(board.drops), 0.0))
    return Migration(
        steps=tuple(steps),
        seconds=sum(step.seconds for step in steps),
        lower_bound=bound,
        peak_G=board.peak_G,
    )


@dataclass(slots=True)
class _Match:
    """For some queue entries, where each would get its replica from, by what port, and whether it can."""

    source: IntArray
    kind: IntArray
    can: BoolArray


class _Board:
    """Queues, live copies and memory while the schedule is being written."""

    def __init__(
        self,
        before_LGC: SlotArray,
        after_LGC: SlotArray,
        experts: int,
        topology: Topology,
        size_L: IntArray,
    ) -> None:
        held, wanted = replica_keys(before_LGC, experts), replica_keys(after_LGC, experts)
        self.topology, self.size_L, self.experts = topology, size_L, experts
        self.gpus, self.layers = topology.gpus, len(size_L)
        cell = np.setdiff1d(wanted, held, assume_unique=True)
        self.drops = np.setdiff1d(held, wanted, assume_unique=True)
        layer, gpu, expert = self._parts(cell)
        # A queue by GPU; each starts at another layer.
        turn = (layer - gpu) % self.layers
        order = np.lexsort((expert, turn, gpu))
        self.layer, self.gpu, self.expert = layer[order], gpu[order], expert[order]
        self.kind = self.layer * experts + self.expert  # expert of a layer, as one number
        self.waiting = np.arange(len(order))
        self.queued = np.ones(len(order), dtype=np.bool_)
        self._copies(held)
        used = np.bincount(self._parts(held)[1], weights=size_L[self._parts(held)[0]], minlength=self.gpus)
        self.used_G: IntArray = used.astype(np.int64)
        self.peak_G = self.used_G.copy()
        self.left_L = np.bincount(self.layer, minlength=self.layers)

    def _parts(self, key: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        cell, expert = np.divmod(key, self.experts)
        layer, gpu = np.divmod(cell, self.gpus)
        return layer, gpu, expert

    def _copies(self, held: IntArray) -> None:
        """List the live copies of every expert that moves, with room for those to come."""
        layer, gpu, expert = self._parts(held)
        kind = layer * self.experts + expert
        size = self.layers * self.experts
        self.count = np.bincount(kind, minlength=size)
        coming = np.bincount(self.kind, minlength=size)
        self.first = np.cumsum(self.count + coming) - self.count - coming
        self.copy_gpu = np.zeros(int((self.count + coming).sum()), dtype=np.int64)
        order = np.argsort(kind, kind="stable")
        within = np.arange(len(kind)) - (np.cumsum(self.count) - self.count)[kind[order]]
        self.copy_gpu[self.first[kind[order]] + within] = gpu[order]

    def bound(self) -> float:
        """No schedule is quicker: the busiest receiver, over the fastest link, all its ports at once."""
        links = self.topology.links
        fastest = max(links.intra_node, links.inter_node)
        if not (self.count[self.kind] > 0).all():
            fastest = max(fastest, links.host)
        each = links.latency + self.size_L[self.layer] / fastest
        ports = 3 if not (self.count[self.kind] > 0).all() else 1 if self.topology.nodes == 1 else 2
        receive_G = np.bincount(self.gpu, weights=each, minlength=self.gpus)
        return float(receive_G.max(initial=0.0)) / ports

    def step(self) -> Step:
        """Transfers that run at once, and what is given up after them."""
        gpu = self.gpu[self.waiting]
        rank = np.arange(len(gpu)) - np.searchsorted(gpu, gpu)
        near = np.flatnonzero(rank < min(max(_AHEAD // self.gpus, 4), 24))
        entry = self.waiting[near[np.argsort(rank[near], kind="stable")]]
        busy_out = np.zeros((2, self.gpus), dtype=np.bool_)
        busy_in = np.zeros((3, self.gpus), dtype=np.bool_)
        going: list[IntArray] = []
        sources: list[IntArray] = []
        kinds: list[IntArray] = []
        fresh = self.count.copy()  # what arrives in this step is no source in it
        for attempt in range(_TRIES):
            match = self._look(entry, busy_out, busy_in, fresh, attempt)
            where = np.flatnonzero(match.can)
            where = where[_firsts(match.kind[where] * self.gpus + self.gpu[entry[where]])]
            # The host serves every GPU at once.
            sender = np.where(
                match.kind[where] == _FROM_HOST,
                2 * self.gpus + where,
                match.kind[where] * self.gpus + match.source[where],
            )
            where = where[_firsts(sender)]
            if not where.size:
                break
            taken, source, kind = entry[where], match.source[where], match.kind[where]
            near_by = kind != _FROM_HOST
            busy_out[kind[near_by], source[near_by]] = True
            busy_in[kind, self.gpu[taken]] = True
            going.append(taken)
            sources.append(source)
            kinds.append(kind)
            entry = np.delete(entry, where) if self.topology.nodes > 1 else self._open(entry, busy_in, fresh)
            if not entry.size:
                break
        return self._carry_out(np.concatenate(going), np.concatenate(sources), np.concatenate(kinds))

    def _open(self, entry: IntArray, busy_in: BoolArray, count: IntArray) -> IntArray:
        """Entries on one node that can still be served in this step: those whose port is free."""
        port = np.where(count[self.kind[entry]] == 0, _FROM_HOST, _INTRA)
        return entry[~busy_in[port, self.gpu[entry]]]

    def _look(
        self, entry: IntArray, busy_out: BoolArray, busy_in: BoolArray, count: IntArray, attempt: int
    ) -> _Match:
        """The best live copy of each entry: ports free first, own node first, then a turn of its own."""
        node_G = self.topology.node_G
        kind, target = self.kind[entry], self.gpu[entry]
        have = count[kind]
        seen = int(min(have.max(initial=1), _SEEN))
        place = (np.arange(max(seen, 1)) + (target + attempt)[:, None]) % np.maximum(have, 1)[:, None]
        source = self.copy_gpu[np.minimum(self.first[kind][:, None] + place, len(self.copy_gpu) - 1)]
        rows, from_host = np.arange(len(entry)), have == 0
        if self.topology.nodes == 1:
            free = ~busy_out[_INTRA, source] & ~busy_in[_INTRA, target][:, None]
            best = free.argmax(axis=1)
            return _Match(
                source=np.where(from_host, HOST, source[rows, best]),
                kind=np.where(from_host, _FROM_HOST, _INTRA),
                can=np.where(from_host, ~busy_in[_FROM_HOST, target], free[rows, best]),
            )
        own = node_G[source] == node_G[target][:, None]
        port = np.where(own, _INTRA, _INTER)
        free = ~busy_out[port, source] & ~busy_in[port, target[:, None]]
        free &= own | ~own.any(axis=1, keepdims=True)  # better wait for the own node than cross
        best = (2 * free + own).argmax(axis=1)
        return _Match(
            source=np.where(from_host, HOST, source[rows, best]),
            kind=np.where(from_host, _FROM_HOST, port[rows, best]),
            can=np.where(from_host, ~busy_in[_FROM_HOST, target], free[rows, best]),
        )

    def _carry_out(self, taken: IntArray, source: IntArray, port: IntArray) -> Step:
        links = self.topology.links
        order = np.argsort(taken, kind="stable")
        taken, source, port = taken[order], source[order], port[order]
        layer, target, kind = self.layer[taken], self.gpu[taken], self.kind[taken]
        rate = np.array([links.intra_node, links.inter_node, links.host])[port]
        seconds = float((links.latency + self.size_L[layer] / rate).max())
        # Arrived copies are sources from the next step on.
        by_kind = np.argsort(kind, kind="stable")
        ordered = kind[by_kind]
        within = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        self.copy_gpu[self.first[ordered] + self.count[ordered] + within] = target[by_kind]
        np.add.at(self.count, kind, 1)
        np.add.at(self.used_G, target, self.size_L[layer])
        np.maximum(self.peak_G, self.used_G, out=self.peak_G)
        self.queued[taken] = False
        self.waiting = self.waiting[self.queued[self.waiting]]
        self.left_L -= np.bincount(layer, minlength=self.layers)
        columns = (layer, self.expert[taken], source, target, self.size_L[layer])
        transfers = tuple(map(Transfer, *(column.tolist() for column in columns)))
        replaced = self.left_L[self._parts(self.drops)[0]] == 0
        return Step((), transfers, self.drop(self.drops[replaced]), seconds)

    def drop(self, keys: IntArray) -> tuple[Drop, ...]:
        """Give up replicas of layers that are complete."""
        layer, gpu, expert = self._parts(keys)
        np.subtract.at(self.used_G, gpu, self.size_L[layer])
        if len(keys):
            self.drops = np.setdiff1d(self.drops, keys, assume_unique=True)
        return tuple(map(Drop, layer.tolist(), expert.tolist(), gpu.tolist()))


def _firsts(key: IntArray) -> IntArray:
    """Where each value comes first, ascending; values are small."""
    at = np.arange(len(key))
    first = np.empty(int(key.max(initial=0)) + 1, dtype=np.int64)
    first[key[::-1]] = at[::-1]  # of several the last one written stays
    return np.flatnonzero(first[key] == at)
