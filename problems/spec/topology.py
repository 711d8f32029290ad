"""The GPUs: nodes, slots, memory, speeds, failure domains, and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, floats, integers, number, whole
from moeless_opt.problems.codec import NUMBER, Fields, moved, read_record
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.text import bytes_text, printable

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["TOPOLOGY_PRESETS", "Links", "Topology", "uniform"]

GB = 10**9
_FASTEST = 1e30  # more, or less than one part of it, overflows times
_MOST_APART = 1e9  # fastest over slowest GPU: beyond it a balance is lost in the rounding, or a unit is wrong
_DEAREST = 1e9  # of a token between two GPUs: sums with loads then stay finite
MOST_GPUS = 2**20  # far beyond any machine: what exceeds it is a slip or an attack


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Links(Record):
    """Bandwidths of one GPU, one direction, in bytes per second.

    Parameters
    ----------
    intra_node : float
        Between two GPUs of one node (NVLink, PCIe).
    inter_node : float
        Between two GPUs of different nodes, per GPU.
    host : float
        From the host's memory to the GPU (a cold start).
    latency : float
        Seconds before the first byte of a transfer arrives.
    """

    intra_node: float = 450e9
    inter_node: float = 50e9
    host: float = 55e9
    latency: float = 10e-6

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("intra_node", "inter_node", "host"):
            put(self, name, number(f"links.{name}", getattr(self, name), open_low=True))
        put(self, "latency", number("links.latency", self.latency))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Topology(Record):
    """The GPUs that hold the experts.

    Parameters
    ----------
    node_G : array of int, shape [G]
        Node of each GPU, numbered from 0.
    speed_G : array of float, shape [G]
        Relative speed; 1 is nominal.
    slots_G : array of int, shape [G], optional
        Replicas that a GPU may hold in each layer.
    memory_G : array of int, shape [G], optional
        Bytes of each GPU for expert weights, over all layers together.
        One of `slots_G` and `memory_G` must be given; with both, both bind.
    domain_G : array of int, shape [G], optional
        Failure domain of each GPU; its node by default.
    links : Links
        Bandwidths.
    name : str
        For people.
    cost_GG : array of float, shape [G, G], optional
        What a token costs that comes from one GPU (row) and is served on another (column); nothing on its
        own. By default 1 between nodes and nothing inside. See `with_costs` and `with_levels`.

    Raises
    ------
    ProblemError
        If a field is malformed.
    """

    node_G: IntArray
    speed_G: FloatArray
    slots_G: IntArray | None = None
    memory_G: IntArray | None = None
    domain_G: IntArray | None = None
    links: Links = Links()
    name: str = ""
    cost_GG: FloatArray | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "node_G", integers("topology.node", self.node_G))
        gpus = self.node_G.size
        if self.node_G.ndim != 1 or gpus == 0:
            raise ProblemError("topology.gpus", f"needs at least one GPU, got shape {self.node_G.shape}")
        used = np.unique(self.node_G)
        if used[-1] != used.size - 1:
            gap = int((used != np.arange(used.size)).argmax())
            raise ProblemError(
                "topology.node", f"nodes must be numbered from 0 without gaps; {gap} has no GPU"
            )
        if not isinstance(self.links, Links):
            raise ProblemError("topology.links", f"is {type(self.links).__name__}, must be Links")
        put(self, "speed_G", floats("topology.speed", self.speed_G, open_low=True))
        if self.slots_G is not None:
            put(self, "slots_G", integers("topology.slots", self.slots_G))
        if self.memory_G is not None:
            put(self, "memory_G", integers("topology.memory", self.memory_G))
        if self.domain_G is not None:
            put(self, "domain_G", integers("topology.domain", self.domain_G))
        for key in ("speed", "slots", "memory", "domain"):
            array = getattr(self, key + "_G")
            if array is not None and array.shape != (gpus,):
                raise ProblemError(
                    f"topology.{key}", f"has shape {array.shape}, must be ({gpus},): one per GPU"
                )
        slow, fast = float(self.speed_G.min()), float(self.speed_G.max())
        if fast / _MOST_APART > slow:
            raise ProblemError(
                "topology.speed",
                f"goes from {slow:g} to {fast:g}; the fastest GPU must be at most {_MOST_APART:g} times as "
                "fast as the slowest (is one of them in another unit?)",
            )
        if not 1.0 / _FASTEST <= slow <= fast <= _FASTEST:
            raise ProblemError(
                "topology.speed",
                f"goes from {slow:g} to {fast:g}; must be from {1 / _FASTEST:g} to {_FASTEST:g}",
            )
        if self.cost_GG is not None:
            put(self, "cost_GG", _checked_costs(self.cost_GG, gpus))
        if self.slots_G is None and self.memory_G is None:
            raise ProblemError(
                "topology",
                "says neither slots nor memory; give slots=... (replicas per GPU and layer) or memory=...",
            )

    @property
    def gpus(self) -> int:
        """Number of GPUs, G."""
        return int(self.node_G.size)

    @property
    def nodes(self) -> int:
        """Number of nodes, N."""
        return int(self.node_G.max()) + 1

    @property
    def failure_domain_G(self) -> IntArray:
        """Failure domain of each GPU: `domain_G`, or else the node."""
        return self.node_G if self.domain_G is None else self.domain_G

    @property
    def is_uniform(self) -> bool:
        """Whether all GPUs have the same speed."""
        return bool((self.speed_G == self.speed_G[0]).all())

    @classmethod
    def uniform(
        cls,
        nodes: int,
        gpus_per_node: int,
        slots: int | Sequence[int] | None = None,
        memory: int | Sequence[int] | None = None,
        speed: float | Sequence[float] = 1.0,
        links: Links | None = None,
        name: str = "",
    ) -> Topology:
        """`nodes` x `gpus_per_node` GPUs; `slots`, `memory` and `speed` are one value or one per GPU.

        Examples
        --------
        >>> Topology.uniform(4, 8, slots=9).gpus
        32
        """
        gpus = whole("topology.nodes", nodes, low=1) * whole("topology.gpus_per_node", gpus_per_node, low=1)
        if gpus > MOST_GPUS:
            raise ProblemError("topology.gpus", f"are {gpus}, more than the {MOST_GPUS} that are supported")

        def spread(value: ArrayLike | None) -> Any:
            if value is None or isinstance(value, Sequence) or np.ndim(value) > 0:
                return np.full(gpus, value) if isinstance(value, str) else value
            return np.full(gpus, value)

        return cls(
            node_G=np.repeat(np.arange(int(nodes)), int(gpus_per_node)),
            speed_G=spread(speed),
            slots_G=spread(slots),
            memory_G=spread(memory),
            links=links or Links(),
            name=name or f"{nodes}x{gpus_per_node}",
        )

    @classmethod
    def preset(
        cls, name: str, *, slots: int | None = None, memory: int | None = None, expert_memory: float = 0.6
    ) -> Topology:
        """A known machine by name (see ``TOPOLOGY_PRESETS``).

        Parameters
        ----------
        name : str
            For example ``"8xA6000"``, ``"8xH100"``, ``"4x8xH100"``, ``"GB200-NVL72"``.
        slots, memory : int, optional
            As in `uniform`. With neither, `memory` is `expert_memory` of the GPU's memory: the rest
            is left to attention, the KV cache and activations.
        expert_memory : float
            Share of the GPU's memory for expert weights, above 0 and up to 1.
        """
        found = TOPOLOGY_PRESETS.get(name)
        if found is None:
            raise ProblemError(
                "topology.preset", f"{name!r} is unknown; there are {', '.join(TOPOLOGY_PRESETS)}"
            )
        if not 0 < number("topology.expert_memory", expert_memory) <= 1:
            raise ProblemError("topology.expert_memory", f"is {expert_memory}, must be above 0 and at most 1")
        nodes, per_node, gigabytes, links = found
        if slots is None and memory is None:
            memory = int(gigabytes * GB * expert_memory)
        return cls.uniform(nodes, per_node, slots=slots, memory=memory, links=links, name=name)

    def capacity_LG(
        self, bytes_L: ArrayLike, experts: int, *, shared: bool = False, copies: bool = False
    ) -> IntArray:
        """Slots of each GPU in each layer, shape [L, G].

        Bytes are divided so that every layer gets the same number of slots; without second copies no GPU can
        use more than one slot per expert.

        Parameters
        ----------
        bytes_L : array of int, shape [L]
            Bytes of one replica in each layer (0 where unknown: then only `slots_G` binds).
        experts : int
            Experts per layer.
        shared : bool
            The layers compete for the bytes: each could have them all.
        copies : bool
            A GPU may hold several copies of an expert: all its slots count, more than experts too.
        """
        size_L = np.asarray(bytes_L, dtype=np.int64)
        # Where slots are given, copies may take them all; bytes alone are not there to be used up.
        most = np.iinfo(np.int32).max if copies and self.slots_G is not None else experts
        slots_G = np.full(self.gpus, most, dtype=np.int64)
        if self.slots_G is not None:
            slots_G = np.minimum(slots_G, self.slots_G)
        if shared and self.memory_G is not None and size_L.all():
            return np.asarray(np.minimum(slots_G, self.memory_G // size_L[:, None]))
        if self.memory_G is not None and size_L.any():
            slots_G = np.minimum(slots_G, self.memory_G // int(size_L.sum()))
        elif self.slots_G is None:
            raise ProblemError(
                "topology.memory", "needs the size of an expert: give model=... (or slots instead of memory)"
            )
        return np.broadcast_to(slots_G, (size_L.size, self.gpus))

    def with_costs(self, costs: ArrayLike | nx.Graph) -> Topology:
        """The same GPUs with other costs of a token between them.

        Parameters
        ----------
        costs : array of float, shape [G, G], or networkx graph
            Rows are where a token comes from, columns where it is served. Of a graph, the shortest paths
            between its vertices ``("gpu", g)`` (as in `to_networkx`) or ``g``; an edge without a ``cost``
            counts 1.

        Raises
        ------
        ProblemError
            If the matrix is not square, or a GPU is no vertex or not reached.
        """
        return self.replace(cost_GG=_graph_costs(costs, self.gpus) if hasattr(costs, "nodes") else costs)

    def with_levels(self, levels: Sequence[tuple[str | Sequence[int], float]]) -> Topology:
        """The same GPUs with costs by a tree: of the groups that a token leaves, the dearest counts.

        Parameters
        ----------
        levels : sequence of (groups, cost)
            Groups are ``"gpu"``, ``"node"``, ``"domain"`` (failure domains), or a number per GPU; those with
            the same number are together. Leaving a group costs this much.

        Examples
        --------
        >>> two = Topology.uniform(2, 2, slots=2).with_levels([("gpu", 0.1), ("node", 1)])
        >>> two.cost_GG[0].tolist()
        [0.0, 0.1, 1.0, 1.0]
        """
        cost_GG = np.zeros((self.gpus, self.gpus))
        for i, level in enumerate(levels):
            where = f"topology.cost.levels[{i}]"
            if isinstance(level, str) or len(level) != 2:
                raise ProblemError(where, f"is {level!r}, must be (groups, cost)")
            group: Any = level[0]
            if isinstance(group, str):
                named = {"gpu": np.arange(self.gpus), "node": self.node_G, "domain": self.failure_domain_G}
                if group not in named:
                    raise ProblemError(
                        where, f"is of {group!r}, must be of 'gpu', 'node', 'domain' or a list"
                    )
                group = named[group]
            group_G = integers(f"{where}.group", group)
            if group_G.shape != (self.gpus,):
                raise ProblemError(f"{where}.group", f"has shape {group_G.shape}, must be ({self.gpus},)")
            apart = group_G[:, None] != group_G
            cost_GG[apart] = np.maximum(cost_GG[apart], number(f"{where}.cost", level[1]))
        return self.replace(cost_GG=cost_GG)

    def bandwidth_GG(self) -> FloatArray:
        """Bytes per second from GPU to GPU, shape [G, G]; infinite on the diagonal."""
        same = self.node_G[:, None] == self.node_G
        rate = np.where(same, self.links.intra_node, self.links.inter_node)
        np.fill_diagonal(rate, np.inf)
        return rate

    def without(self, gpus: Sequence[int]) -> Topology:
        """The topology after the loss of some GPUs; nodes are numbered anew."""
        lost = integers("gpus", list(gpus), high=self.gpus - 1)
        keep = np.setdiff1d(np.arange(self.gpus), lost)
        if keep.size == 0:
            raise ProblemError("gpus", "all GPUs are lost; at least one must remain")
        part: dict[str, Any] = {
            k: None if (a := getattr(self, k)) is None else a[keep]
            for k in ("slots_G", "memory_G", "domain_G")
        }
        if part["domain_G"] is None:
            part["domain_G"] = self.node_G[keep]
        part["cost_GG"] = None if self.cost_GG is None else self.cost_GG[np.ix_(keep, keep)]
        return self.replace(
            node_G=np.unique(self.node_G[keep], return_inverse=True)[1], speed_G=self.speed_G[keep], **part
        )

    def to_networkx(self) -> nx.Graph:
        """GPUs, nodes and the network as a graph; edges carry ``bandwidth`` in bytes per second.

        Vertices are ``("gpu", g)``, ``("node", n)`` (the switch inside a node), ``("host", n)`` and
        ``("network",)``. The bandwidth of a path is that of its narrowest edge.
        """
        import networkx as nx

        graph = nx.Graph(name=self.name)
        for g, (node, speed) in enumerate(zip(self.node_G.tolist(), self.speed_G.tolist(), strict=True)):
            graph.add_node(
                ("gpu", g), kind="gpu", node=node, speed=speed, domain=int(self.failure_domain_G[g])
            )
            graph.add_edge(("gpu", g), ("node", node), bandwidth=self.links.intra_node)
            graph.add_edge(("gpu", g), ("host", node), bandwidth=self.links.host)
            if self.nodes > 1:
                graph.add_edge(("gpu", g), ("network",), bandwidth=self.links.inter_node)
        for vertex, data in graph.nodes(data=True):
            data.setdefault("kind", vertex[0])
        return graph

    def to_dict(self) -> dict[str, Any]:
        """The JSON form (``kind: "explicit"``)."""
        gpus = []
        for g in range(self.gpus):
            entry: dict[str, Any] = {"node": int(self.node_G[g]), "speed": float(self.speed_G[g])}
            for key, array in (("slots", self.slots_G), ("memory", self.memory_G), ("domain", self.domain_G)):
                if array is not None:
                    entry[key] = int(array[g])
            gpus.append(entry)
        links = {k: getattr(self.links, k) for k in ("intra_node", "inter_node", "host", "latency")}
        entry = {"kind": "explicit", "name": self.name, "gpus": gpus, "links": links}
        if self.cost_GG is not None:
            entry["cost"] = {"kind": "matrix", "matrix": self.cost_GG.tolist()}
        return entry

    @staticmethod
    def from_dict(data: object, where: str = "topology") -> Topology:
        """Read the JSON form (kinds ``uniform``, ``preset``, ``explicit``).

        Raises
        ------
        FormatError, ProblemError
            Naming the JSON path.
        """
        entry = Fields(data, where)
        kind = entry.take("kind", str, "explicit" if "gpus" in entry.data else "uniform")
        costs = entry.take("cost", dict, None)
        links_data = entry.take("links", dict, None)
        links = None if links_data is None else read_record(Links, links_data, f"{where}.links")
        try:
            if kind == "uniform":
                topology = Topology.uniform(
                    entry.take("nodes", int, 1),
                    entry.take("gpus_per_node", int),
                    slots=entry.take("slots", (int, list), None),
                    memory=entry.take("memory", (int, list), None),
                    speed=entry.take("speed", (int, float, list), 1.0),
                    links=links,
                    name=entry.take("name", str, ""),
                )
            elif kind == "preset":
                topology = Topology.preset(
                    entry.take("name", str),
                    slots=entry.take("slots", int, None),
                    memory=entry.take("memory", int, None),
                    expert_memory=entry.take("expert_memory", NUMBER, 0.6),
                )
                topology = topology if links is None else topology.replace(links=links)
            elif kind == "explicit":
                topology = _explicit(entry, links or Links())
            else:
                raise FormatError(
                    entry.path("kind"), f"is {kind!r}, must be 'uniform', 'preset' or 'explicit'"
                )
            if costs is not None:
                topology = _read_costs(topology, costs, f"{where}.cost")
        except ProblemError as error:
            raise moved(error, "topology", where) from None
        entry.done()
        return topology

    def __repr__(self) -> str:
        room = "" if self.slots_G is None else f", {_range(self.slots_G)} slots per GPU and layer"
        if self.memory_G is not None:
            room += f", {_bytes_range(self.memory_G)} per GPU for experts"
        speed = "" if self.is_uniform else f", speeds {_range(self.speed_G)}"
        name = f"{printable(self.name)}: " if self.name else ""
        costs = "" if self.cost_GG is None else ", costs of its own between GPUs"
        return f"Topology({name}{self.gpus} GPUs in {self.nodes} node(s){room}{speed}{costs})"


def _checked_costs(costs: ArrayLike, gpus: int) -> FloatArray:
    cost_GG = floats("topology.cost", costs)
    if cost_GG.shape != (gpus, gpus):
        raise ProblemError(
            "topology.cost", f"has shape {cost_GG.shape}, must be ({gpus}, {gpus}): GPU to GPU"
        )
    if np.diag(cost_GG).any():
        first = int(np.flatnonzero(np.diag(cost_GG))[0])
        raise ProblemError(
            f"topology.cost[{first}][{first}]",
            f"is {cost_GG[first, first]:g}, must be 0: a token stays there",
        )
    if cost_GG.max(initial=0.0) > _DEAREST:
        raise ProblemError("topology.cost", f"reaches {cost_GG.max():g}, must be at most {_DEAREST:g}")
    return cost_GG


def _graph_costs(graph: nx.Graph, gpus: int) -> FloatArray:
    """Shortest paths between the GPUs of a graph, shape [G, G]."""
    import networkx as nx

    where = "topology.cost"
    vertex_G = [("gpu", g) if ("gpu", g) in graph else g for g in range(gpus)]
    missing = [g for g, vertex in enumerate(vertex_G) if vertex not in graph]
    if missing:
        raise ProblemError(where, f"is a graph without a vertex ('gpu', {missing[0]}) or {missing[0]}")
    for a, b, cost in graph.edges(data="cost", default=1.0):
        number(f"{where}: edge {a} - {b}", cost)
    cost_GG = np.zeros((gpus, gpus))
    for source, vertex in enumerate(vertex_G):
        length = nx.single_source_dijkstra_path_length(
            graph, vertex, weight=lambda a, b, data: float(data.get("cost", 1.0))
        )
        for target, other in enumerate(vertex_G):
            if other not in length:
                raise ProblemError(where, f"is a graph with no path from GPU {source} to GPU {target}")
            cost_GG[source, target] = length[other]
    return cost_GG


def _read_costs(topology: Topology, data: object, where: str) -> Topology:
    entry = Fields(data, where)
    kind = entry.take("kind", str, "matrix" if "matrix" in entry.data else "tree")
    if kind == "matrix":
        topology = topology.with_costs(entry.take("matrix", list))
    elif kind == "tree":
        levels = []
        for i, level in enumerate(entry.take("levels", list)):
            part = Fields(level, f"{where}.levels[{i}]")
            levels.append((part.take("group", (str, list)), part.take("cost", NUMBER)))
            part.done()
        topology = topology.with_levels(levels)
    else:
        raise FormatError(entry.path("kind"), f"is {kind!r}, must be 'matrix' or 'tree'")
    entry.done()
    return topology


def _explicit(entry: Fields, links: Links) -> Topology:
    gpus = entry.take("gpus", list)
    columns: dict[str, list[Any]] = {"node": [], "speed": [], "slots": [], "memory": [], "domain": []}
    for i, gpu in enumerate(gpus):
        part = Fields(gpu, f"{entry.where}.gpus[{i}]")
        columns["node"].append(part.take("node", int, 0))
        columns["speed"].append(part.take("speed", NUMBER, 1.0))
        for key in ("slots", "memory", "domain"):
            columns[key].append(part.take(key, int, None))
        part.done()
    for key in ("slots", "memory", "domain"):
        missing = [i for i, value in enumerate(columns[key]) if value is None]
        if missing and len(missing) < len(gpus):
            raise FormatError(f"{entry.where}.gpus[{missing[0]}]", f"{key!r} is missing; other GPUs have it")
    more: dict[str, Any] = {
        f"{key}_G": None
        if not gpus or columns[key][0] is None
        else integers(f"{entry.where}.{key}", columns[key])
        for key in ("slots", "memory", "domain")
    }
    return Topology(
        node_G=integers(f"{entry.where}.node", columns["node"]),
        speed_G=floats(f"{entry.where}.speed", columns["speed"]),
        **more,
        links=links,
        name=entry.take("name", str, ""),
    )


def _range(values: IntArray | FloatArray) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"


def _bytes_range(values: IntArray) -> str:
    low, high = bytes_text(int(values.min())), bytes_text(int(values.max()))
    return low if low == high else f"{low}..{high}"


uniform = Topology.uniform

# name: (nodes, GPUs per node, GB of memory, links). Data-sheet bandwidths, one direction; host links are
# PCIe 4/5 x16 (NVLink-C2C shared by two GPUs for GB200) at about 85 % of the raw rate.
TOPOLOGY_PRESETS: dict[str, tuple[int, int, float, Links]] = {
    "8xA6000": (1, 8, 48, Links(intra_node=56.25e9, inter_node=12.5e9, host=26e9)),
    "8xA100": (1, 8, 80, Links(intra_node=300e9, inter_node=25e9, host=26e9)),
    "8xH100": (1, 8, 80, Links(intra_node=450e9, inter_node=50e9, host=54e9)),
    "4x8xH100": (4, 8, 80, Links(intra_node=450e9, inter_node=50e9, host=54e9)),
    "8x8xH100": (8, 8, 80, Links(intra_node=450e9, inter_node=50e9, host=54e9)),
    "8xH200": (1, 8, 141, Links(intra_node=450e9, inter_node=50e9, host=54e9)),
    "8xB200": (1, 8, 180, Links(intra_node=900e9, inter_node=50e9, host=54e9)),
    "GB200-NVL72": (1, 72, 186, Links(intra_node=900e9, inter_node=50e9, host=190e9)),
}
