"""One layer under re-planning: how many tokens overflow a wanted GPU time, told by a maximum flow.

With the placement fixed and token shares free, a wanted time T is reachable exactly when the network

    source -> expert (its tokens) -> GPUs that hold it -> sink (T x speed)

carries every token. The tokens left over are the *overflow*, and the two sides of the minimum cut say
where a new replica helps:

- GPUs still reachable from the source are *hot*: experts whose replicas all stand there have tokens to spare;
- GPUs that still reach the sink are *cool*: a token that lands there finds room.

Only a replica of a captive expert of a hot group on a cool GPU lowers the overflow, and by no more than the
least of the expert's load, the group's excess and the room behind the GPU. An expert with one replica has no
choice; its load is a fixed amount of its GPU, so that the network holds replicated experts only
(about 120 arcs at 32 GPUs, 15 microseconds a solve in ortools).

References
----------
Goldberg (1984), "Finding a maximum density subgraph"; Picard and Queyranne (1982), for the cut and the
density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python.max_flow import SimpleMaxFlow

from moeless_opt.solvers.limits import Rules

__all__ = ["UNIT", "Cut", "ExpertGpu", "LayerFlow", "least_time"]

UNIT = 1 << 30  # integer tokens that stand for one mean GPU load
ExpertGpu = tuple[int, int]  # (expert, GPU)

_SOURCE, _SINK, _FIRST_GPU = 0, 1, 2


@dataclass(slots=True)
class Cut:
    """What the minimum cut says about where tokens are stuck and where they would fit.

    Attributes
    ----------
    excess : dict of int to int
        Tokens over the room of each hot group (a group is named by one of its GPUs).
    captive : dict of int to list of int
        Experts whose every replica stands in the hot group.
    slack : dict of int to int
        Room left in each cool group.
    group : dict of int to int
        Group of each cool GPU.
    flow : list of int
        Tokens on each arc of the network.
    """

    excess: dict[int, int] = field(default_factory=dict)
    captive: dict[int, list[int]] = field(default_factory=dict)
    slack: dict[int, int] = field(default_factory=dict)
    group: dict[int, int] = field(default_factory=dict)
    flow: list[int] = field(default_factory=list)


class LayerFlow:
    """A placement of one layer, its flow network, and trials of changes to it.

    Parameters
    ----------
    load : list of int
        Tokens of each expert.
    content : list of list of int
        Experts on each GPU. Every expert needs a replica.
    capacity : list of int
        Slots of each GPU.
    room : list of int
        Tokens that each GPU may serve: the wanted time times its speed.
    rules : Rules, optional
        Limits that the placement keeps, and changes to it shall.
    """

    __slots__ = (
        "_cap",
        "_head",
        "_net",
        "_node",
        "_size",
        "_tail",
        "_trial_arc",
        "arcs",
        "capacity",
        "content",
        "fixed",
        "gpus",
        "home",
        "load",
        "replicated",
        "room",
        "rules",
        "total",
    )

    def __init__(
        self,
        load: list[int],
        content: Sequence[Sequence[int]],
        capacity: list[int],
        room: list[int],
        rules: Rules | None = None,
    ) -> None:
        self.load = load
        self.rules = rules
        self.content = [list(row) for row in content]
        self.capacity = capacity
        self.room = room
        self.gpus = len(self.content)
        self.total = sum(load)
        self.home: list[list[int]] = [[] for _ in load]
        for gpu, row in enumerate(self.content):
            for expert in row:
                self.home[expert].append(gpu)
        self._rebuild()

    # -- the network ---------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Lay out the arcs: fixed loads, rooms, then the replicated experts."""
        gpus, first_expert = self.gpus, _FIRST_GPU + self.gpus
        self._node: dict[int, int] = {}
        self.fixed = [0] * gpus
        self.replicated: list[int] = []
        for expert, home in enumerate(self.home):
            if len(home) == 1:
                self.fixed[home[0]] += self.load[expert]
            else:
                self.replicated.append(expert)
        nodes = list(range(_FIRST_GPU, first_expert))
        tail = [_SOURCE] * gpus + nodes
        head = nodes + [_SINK] * gpus
        cap = self.fixed + self.room
        self.arcs: dict[ExpertGpu, int] = {}
        for expert in self.replicated:
            load = self.load[expert]
            node = self._node[expert] = first_expert + len(self._node)
            self.arcs[expert, -1] = len(tail)
            tail.append(_SOURCE)
            head.append(node)
            cap.append(load)
            for gpu in self.home[expert]:
                self.arcs[expert, gpu] = len(tail)
                tail.append(node)
                head.append(_FIRST_GPU + gpu)
                cap.append(load)
        size = len(tail)
        self._tail, self._head, self._cap = (
            _grown(tail, np.int32),
            _grown(head, np.int32),
            _grown(cap, np.int64),
        )
        self._size = size
        self._renew()

    def _renew(self) -> None:
        """Hand the arcs to a new solver object (trials leave dead arcs in the old one)."""
        size = self._size
        self._net = SimpleMaxFlow()
        self._net.add_arcs_with_capacity(self._tail[:size], self._head[:size], self._cap[:size])
        self._trial_arc: dict[ExpertGpu, int] = {}

    def set_room(self, room: list[int]) -> None:
        """Change the tokens that each GPU may serve."""
        self.room = room
        self._cap[self.gpus : 2 * self.gpus] = room
        self._renew()

    def solve(self) -> int:
        """Return the overflow: tokens that fit nowhere within the rooms."""
        net = self._net
        net.solve(_SOURCE, _SINK)
        return self.total - int(net.optimal_flow())

    def _node_of(self, expert: int) -> int:
        """Node of an expert, a new one where it had none (few experts do: small networks solve faster)."""
        node = self._node.get(expert)
        if node is None:
            node = self._node[expert] = _FIRST_GPU + self.gpus + len(self._node)
        return node

    # -- changes -------------------------------------------------------------------------------------

    def _edits(
        self, adds: Sequence[ExpertGpu], drops: Sequence[ExpertGpu]
    ) -> tuple[list[tuple[ExpertGpu, int]], dict[int, int]]:
        """Capacities that change when pairs are added and then others dropped."""
        home: dict[int, list[int]] = {}
        for expert, gpu in adds:
            home.setdefault(expert, list(self.home[expert])).append(gpu)
        for expert, gpu in drops:
            home.setdefault(expert, list(self.home[expert])).remove(gpu)
        arcs: list[tuple[ExpertGpu, int]] = []
        shift: dict[int, int] = {}
        for expert, new in home.items():
            load, old = self.load[expert], self.home[expert]
            if (expert, -1) in self.arcs:
                arcs += [((expert, gpu), load) for gpu in new if gpu not in old]
                arcs += [((expert, gpu), 0) for gpu in old if gpu not in new]
                continue
            shift[old[0]] = shift.get(old[0], 0) - load
            if len(new) == 1:
                shift[new[0]] = shift.get(new[0], 0) + load
            else:
                arcs.append(((expert, -1), load))
                arcs += [((expert, gpu), load) for gpu in new]
        return arcs, shift

    def trial(self, adds: Sequence[ExpertGpu], drops: Sequence[ExpertGpu]) -> int:
        """Overflow after a change, which is then taken back."""
        arcs, shift = self._edits(adds, drops)
        net = self._net
        undo: list[tuple[int, int]] = []
        for pair, cap in arcs:
            arc = self.arcs.get(pair)
            if arc is not None:
                undo.append((arc, int(self._cap[arc])))
                net.set_arc_capacity(arc, cap)
                continue
            arc = self._trial_arc.get(pair)
            if arc is None:
                expert, gpu = pair
                node = self._node_of(expert)
                ends = (_SOURCE, node) if gpu < 0 else (node, _FIRST_GPU + gpu)
                arc = self._trial_arc[pair] = net.add_arc_with_capacity(*ends, cap)
            else:
                net.set_arc_capacity(arc, cap)
            undo.append((arc, 0))
        for gpu, tokens in shift.items():
            net.set_arc_capacity(gpu, self.fixed[gpu] + tokens)
            undo.append((gpu, self.fixed[gpu]))
        net.solve(_SOURCE, _SINK)
        overflow = self.total - int(net.optimal_flow())
        for arc, cap in undo:
            net.set_arc_capacity(arc, cap)
        return overflow

    def without(self, expert: int) -> int:
        """Overflow if a replicated expert's tokens were served elsewhere; taken back."""
        return self._with_capacity(self.arcs[expert, -1], 0) - self.load[expert]

    def with_room(self, gpu: int) -> int:
        """Overflow if a GPU's room had no end; taken back."""
        return self._with_capacity(self.gpus + gpu, self.room[gpu] + self.total)

    def with_source(self, gpu: int) -> int:
        """Overflow less the tokens that could be served besides if they came to a GPU; taken back."""
        return self._with_capacity(gpu, self.fixed[gpu] + self.total)

    def _with_capacity(self, arc: int, cap: int) -> int:
        net = self._net
        net.set_arc_capacity(arc, cap)
        net.solve(_SOURCE, _SINK)
        overflow = self.total - int(net.optimal_flow())
        net.set_arc_capacity(arc, int(self._cap[arc]))
        return overflow

    def apply(self, adds: Sequence[ExpertGpu], drops: Sequence[ExpertGpu]) -> None:
        """Make a change for good; call `solve` before reading the cut."""
        arcs, shift = self._edits(adds, drops)
        for pair, cap in arcs:
            arc = self.arcs.get(pair)
            if arc is None:
                arc = self.arcs[pair] = self._size
                if arc == len(self._tail):
                    self._tail, self._head = _grown(self._tail, np.int32), _grown(self._head, np.int32)
                    self._cap = _grown(self._cap, np.int64)
                expert, gpu = pair
                node = self._node_of(expert)
                self._tail[arc], self._head[arc] = (_SOURCE, node) if gpu < 0 else (node, _FIRST_GPU + gpu)
                self._size += 1
                if gpu < 0:
                    self.replicated.append(expert)
            self._cap[arc] = cap
        for gpu, tokens in shift.items():
            self.fixed[gpu] += tokens
            self._cap[gpu] = self.fixed[gpu]
        for expert, gpu in adds:
            self.home[expert].append(gpu)
            self.content[gpu].append(expert)
        for expert, gpu in drops:
            self.home[expert].remove(gpu)
            self.content[gpu].remove(expert)
        self._renew()

    # -- reading the solved network ------------------------------------------------------------------

    def tokens(self, cut: Cut, expert: int, gpu: int) -> int:
        """Tokens of a replicated expert that the flow serves on a GPU."""
        return cut.flow[self.arcs[expert, gpu]]

    def free(self, cut: Cut, gpu: int) -> int:
        """Room that the flow leaves on a GPU."""
        return self.room[gpu] - cut.flow[self.gpus + gpu]

    def hot(self) -> list[int]:
        """GPUs on the source side of the cut: a set that is overloaded by the whole overflow."""
        end = _FIRST_GPU + self.gpus
        return sorted(
            node - _FIRST_GPU for node in self._net.get_source_side_min_cut() if _FIRST_GPU <= node < end
        )

    def cut(self) -> Cut:
        """Read hot and cool groups from the last `solve`.

        Groups are joined by replicated experts: an excess anywhere in a hot group can leave through any
        of its captive experts, and room anywhere in a cool group can be used from each of its GPUs (as far
        as the flow there allows).
        """
        gpus, net, home = self.gpus, self._net, self.home
        hot, cool = [False] * (_FIRST_GPU + gpus), [False] * (_FIRST_GPU + gpus)
        end = _FIRST_GPU + gpus
        for node in net.get_source_side_min_cut():
            if node < end:
                hot[node] = True
        for node in net.get_sink_side_min_cut():
            if node < end:
                cool[node] = True
        hot, cool = hot[_FIRST_GPU:], cool[_FIRST_GPU:]
        flow = net.flows(np.arange(self._size)).tolist()
        root = list(range(gpus))

        def find(gpu: int) -> int:
            while root[gpu] != gpu:
                root[gpu] = gpu = root[root[gpu]]
            return gpu

        captive: list[int] = []
        for expert in self.replicated:
            where = home[expert]
            first = where[0]
            if hot[first]:
                # With a replica on a hot GPU and none elsewhere it is captive; one elsewhere frees all.
                for gpu in where:
                    if not hot[gpu]:
                        break
                else:
                    captive.append(expert)
                    first = find(first)
                    for gpu in where:
                        root[find(gpu)] = first
                    continue
            first = -1
            for gpu in where:
                if cool[gpu]:
                    if first < 0:
                        first = find(gpu)
                    else:
                        root[find(gpu)] = first
        found = Cut(flow=flow)
        for gpu in range(gpus):
            if hot[gpu]:
                name = find(gpu)
                found.excess[name] = found.excess.get(name, 0) + self.fixed[gpu] - self.room[gpu]
                singles = [expert for expert in self.content[gpu] if (expert, -1) not in self.arcs]
                found.captive.setdefault(name, []).extend(singles)
            elif cool[gpu]:
                name = found.group[gpu] = find(gpu)
                found.slack[name] = found.slack.get(name, 0) + self.room[gpu] - flow[gpus + gpu]
        for expert in captive:
            name = find(home[expert][0])
            found.excess[name] += self.load[expert]
            found.captive[name].append(expert)
        return found


def _grown(values: list[int] | NDArray[Any], dtype: type[np.integer[Any]]) -> NDArray[Any]:
    """Copy into an array with spare places at the end."""
    array = np.zeros(len(values) + 96, dtype=dtype)
    array[: len(values)] = values
    return array


def least_time(state: LayerFlow, speed: list[float]) -> float:
    """Least time that the placement allows with the best shares, in units of the mean GPU time.

    Newton's method on the density: while tokens overflow, the time is at least what the overloaded set needs.
    Leaves the state's rooms changed.
    """
    time = state.total / (UNIT * sum(speed))
    while True:
        state.set_room([int(time * UNIT * by) + 1 for by in speed])
        overflow = state.solve() - 2 * state.gpus
        if overflow <= 0:
            return time
        hot = state.hot()
        time += (overflow + 2 * state.gpus) / (UNIT * sum(speed[gpu] for gpu in hot))
