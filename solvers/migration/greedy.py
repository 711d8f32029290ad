"""The order of a large migration without memory limits: greedy matchings, a step after the other.

A flow for every step (`migration`) is as good as it gets, and too slow for tens of thousands of replicas.
Here every GPU has a queue of what it lacks. In a step the first of all queues look for a live copy whose port
is free, in the own node where there is one, then the second ones, and so on; who lacks most looks first. The
queues of different GPUs start at different layers, so that they ask different GPUs, and a hot expert spreads
by doubling. A matching that cannot be extended has at least half of the largest one's transfers; in practice
the busiest receiver sets the number of steps. Plain lists: a step on eight GPUs is a few dozen looks.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.plan import HOST, Drop, Migration, Step, Transfer
from moeless_opt.problems.spec import Topology, replica_keys

__all__ = ["schedule_greedily"]

_AHEAD = 8192  # entries at the heads of all queues together that look for a source in a step
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
    while any(board.queue_G):
        steps.append(board.step())
    rest = board.replaced()
    if rest:  # nothing has come in their place
        steps.append(Step((), (), rest, 0.0))
    return Migration(
        steps=tuple(steps),
        seconds=sum(step.seconds for step in steps),
        lower_bound=bound,
        peak_G=np.array(board.peak_G, dtype=np.int64),
    )


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
        drops = np.setdiff1d(held, wanted, assume_unique=True)
        layer, gpu, expert = self._parts(cell)
        # A queue by GPU; each starts at another layer.
        turn = (layer - gpu) % self.layers
        order = np.lexsort((expert, turn, gpu))
        layer, gpu, expert = layer[order], gpu[order], expert[order]
        self.layer_N, self.expert_N = layer.tolist(), expert.tolist()
        self.size_N: list[int] = size_L[layer].tolist()
        kind = layer * experts + expert  # expert of a layer, as one number
        self.kind_N: list[int] = kind.tolist()
        ends = np.cumsum(np.bincount(gpu, minlength=self.gpus)).tolist()
        self.queue_G = [list(range(low, high)) for low, high in zip([0, *ends], ends, strict=False)]
        self.copies = self._copies(held, kind)
        self.drops_L: list[list[int]] = [[] for _ in range(self.layers)]
        for key, of in zip(drops.tolist(), self._parts(drops)[0].tolist(), strict=True):
            self.drops_L[of].append(key)
        used = np.bincount(self._parts(held)[1], weights=size_L[self._parts(held)[0]], minlength=self.gpus)
        self.used_G: list[int] = used.astype(np.int64).tolist()
        self.peak_G = list(self.used_G)
        self.left_L: list[int] = np.bincount(layer, minlength=self.layers).tolist()
        self.done = [of for of, left in enumerate(self.left_L) if not left and self.drops_L[of]]
        self.node_G: list[int] = topology.node_G.tolist()
        self.hosted = not all(self.copies.values())
        """Whether some experts come from the host."""
        each = topology.links.latency + size_L[layer] / max(
            topology.links.intra_node, topology.links.inter_node, topology.links.host * self.hosted
        )
        self.receive_G = np.bincount(gpu, weights=each, minlength=self.gpus)

    def _parts(self, key: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        cell, expert = np.divmod(key, self.experts)
        layer, gpu = np.divmod(cell, self.gpus)
        return layer, gpu, expert

    def _copies(self, held: IntArray, moving: IntArray) -> dict[int, list[int]]:
        """GPUs that hold each expert that moves, ascending."""
        layer, gpu, expert = self._parts(held)
        kind = layer * self.experts + expert
        some = np.isin(kind, moving)
        found: dict[int, list[int]] = {one: [] for one in np.unique(moving).tolist()}
        for one, where in zip(kind[some].tolist(), gpu[some].tolist(), strict=True):
            found[one].append(where)
        return found

    def bound(self) -> float:
        """No schedule is quicker: the busiest receiver, over the fastest link, all its ports at once."""
        ports = 3 if self.hosted else 1 if self.topology.nodes == 1 else 2
        return float(self.receive_G.max(initial=0.0)) / ports

    def step(self) -> Step:
        """Transfers that run at once, and what is given up after them."""
        ahead = min(max(_AHEAD // self.gpus, 4), 24)
        busy_out = [[False] * self.gpus for _ in range(2)]
        # Ports that there are: others are never free.
        busy_in = [[not there] * self.gpus for there in (True, self.topology.nodes > 1, self.hosted)]
        looking = sorted(range(self.gpus), key=lambda gpu: -len(self.queue_G[gpu]))  # who lacks most, first
        taken: list[tuple[int, int, int, int]] = []  # entry, source, target, port
        for rank in range(ahead):
            still = []
            for gpu in looking:
                queue = self.queue_G[gpu]
                if rank >= len(queue):
                    continue
                way = self._look(self.kind_N[queue[rank]], gpu, busy_out, busy_in)
                if way is not None:
                    source, port = way
                    busy_in[port][gpu] = True
                    if port != _FROM_HOST:  # the host serves every GPU at once
                        busy_out[port][source] = True
                    taken.append((queue[rank], source, gpu, port))
                if not (busy_in[0][gpu] and busy_in[1][gpu] and busy_in[2][gpu]):
                    still.append(gpu)
            looking = still
            if not looking:
                break
        return self._carry_out(sorted(taken))

    def _look(
        self, kind: int, target: int, busy_out: list[list[bool]], busy_in: list[list[bool]]
    ) -> tuple[int, int] | None:
        """A live copy whose port is free, and that port: on the own node if there is one, in turn."""
        copies = self.copies[kind]
        have = len(copies)
        if not have:
            return None if busy_in[_FROM_HOST][target] else (HOST, _FROM_HOST)
        near, far = busy_out[_INTRA], busy_out[_INTER]
        node, far_free, own = self.node_G[target], None, False
        for turn in range(target, target + min(have, _SEEN)):
            source = copies[turn % have]
            if self.node_G[source] == node:
                own = True
                if not near[source] and not busy_in[_INTRA][target]:
                    return source, _INTRA
            elif far_free is None and not far[source] and not busy_in[_INTER][target]:
                far_free = source
        # Better wait for the own node than cross.
        return None if own or far_free is None else (far_free, _INTER)

    def _carry_out(self, taken: list[tuple[int, int, int, int]]) -> Step:
        links = self.topology.links
        rates = (links.intra_node, links.inter_node, links.host)
        seconds, transfers = 0.0, []
        for entry, source, target, port in taken:
            layer, size = self.layer_N[entry], self.size_N[entry]
            seconds = max(seconds, links.latency + size / rates[port])
            transfers.append(Transfer(layer, self.expert_N[entry], source, target, size))
            self.queue_G[target].remove(entry)
            self.copies[self.kind_N[entry]].append(target)  # a source from the next step on
            self.used_G[target] += size
            self.peak_G[target] = max(self.peak_G[target], self.used_G[target])
            self.left_L[layer] -= 1
            if not self.left_L[layer]:
                self.done.append(layer)
        return Step((), tuple(transfers), self.replaced(), seconds)

    def replaced(self) -> tuple[Drop, ...]:
        """Give up replicas of layers that are complete."""
        drops = []
        for layer in sorted(self.done):
            for key in self.drops_L[layer]:
                cell, expert = divmod(key, self.experts)
                gpu = cell % self.gpus
                self.used_G[gpu] -= int(self.size_L[layer])
                drops.append(Drop(layer, expert, gpu))
        self.done = []
        return tuple(drops)
