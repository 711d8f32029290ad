"""Clusters: validation, JSON, presets, capacities, graphs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.spec.topology import TOPOLOGY_PRESETS, Links, Topology, uniform
from tests.strategies import few, topologies


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform(0, 8, slots=1), r"topology\.nodes: is 0, must be a whole number of at least 1"),
        (lambda: uniform(1, 0, slots=1), r"topology\.gpus_per_node: is 0"),
        (lambda: uniform(1, True, slots=1), r"topology\.gpus_per_node: is True"),
        (lambda: uniform(1, 2.5, slots=1), r"topology\.gpus_per_node: is 2.5"),
        (lambda: uniform("4", 8, slots=1), r"topology\.nodes: is '4'"),
        (lambda: uniform(10**6, 10**6, slots=1), r"topology\.gpus: are 1000000000000, more than"),
        (lambda: uniform(1, 2), "topology: says neither slots nor memory"),
        (lambda: uniform(1, 2, slots=-1), r"topology\.slots\[0\]: is -1, must be at least 0"),
        (lambda: uniform(1, 2, slots=1.5), r"topology\.slots: must hold whole numbers"),
        (lambda: uniform(1, 2, slots="9"), r"topology\.slots: must hold numbers"),
        (lambda: uniform(1, 2, slots=[1, 2, 3]), r"topology\.slots: has shape \(3,\), must be \(2,\)"),
        (
            lambda: uniform(1, 2, slots=1, speed=0),
            r"topology\.speed\[0\]: is 0.0, must be finite and above 0",
        ),
        (lambda: uniform(1, 2, slots=1, speed=[1, np.nan]), r"topology\.speed\[1\]: is nan"),
        (
            lambda: uniform(1, 2, slots=1, speed=[1, 9e14]),
            r"topology\.speed: goes from 1 to 9e\+14; the fast",
        ),
        (lambda: uniform(1, 2, memory=-5), r"topology\.memory\[0\]: is -5"),
        (lambda: uniform(1, 2, slots=1, links=5), r"topology\.links: is int, must be Links"),
        (lambda: Topology(node_G=[], speed_G=[], slots_G=[]), r"topology\.gpus: needs at least one GPU"),
        (
            lambda: Topology(node_G=[0, 10**15], speed_G=[1, 1], slots_G=[1, 1]),
            r"topology\.node: .*without gaps; 1 has no GPU",
        ),
        (
            lambda: Topology(node_G=[0, 0], speed_G=[1, 1], slots_G=[1, 1], domain_G=[0]),
            r"topology\.domain: has shape \(1,\)",
        ),
        (lambda: Links(intra_node=0), r"links\.intra_node: is 0, must be a finite number above 0"),
        (lambda: Links(host=[1, 2]), r"links\.host: is \[1, 2\]"),
        (lambda: Links(latency=-1), r"links\.latency: is -1"),
        (lambda: Topology.preset("9xH100"), r"topology\.preset: '9xH100' is unknown; there are 8xA6000"),
        (lambda: Topology.preset("8xH100", expert_memory=1.5), r"topology\.expert_memory: is 1.5"),
    ],
)
def test_malformed_clusters_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        make()


@few
@given(topologies(memory=True) | topologies())
def test_json_round_trip(topology: Topology) -> None:
    assert Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


def test_json_kinds() -> None:
    flat = Topology.from_dict({"nodes": 4, "gpus_per_node": 8, "slots": 9})
    assert flat == uniform(4, 8, slots=9)
    named = Topology.from_dict({"kind": "preset", "name": "4x8xH100", "links": {"host": 1e9}})
    assert named.memory_G is not None
    assert int(named.memory_G[0]) == int(80e9 * 0.6)
    assert named.links == Links(host=1e9)
    one = Topology.from_dict({"gpus": [{"slots": 1}, {"slots": 2, "speed": 0.5, "node": 1}]})
    assert one.nodes == 2
    assert one.speed_G.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "ring", "gpus_per_node": 2}, r"topology\.kind: is 'ring', must be"),
        ({"gpus_per_node": 2, "slot": 1}, r"topology: says neither slots nor memory|topology\.slot: unknown"),
        ({"gpus_per_node": 2, "slots": 1, "sped": 1}, r"topology\.sped: unknown key; did you mean 'speed'"),
        (
            {"gpus_per_nodes": 2, "slots": 1},
            r"topology: 'gpus_per_node' is missing; 'gpus_per_nodes' is not a",
        ),
        (
            {"gpus_per_node": "8", "slots": 1},
            r"topology\.gpus_per_node: must be a whole number, got a string",
        ),
        ({"gpus_per_node": True, "slots": 1}, r"topology\.gpus_per_node: must be a whole number, got true"),
        ({"gpus": []}, r"topology\.gpus: needs at least one GPU"),
        ({"gpus": [{"slots": 1}, {}]}, r"topology\.gpus\[1\]: 'slots' is missing; other GPUs have it"),
        ({"gpus": [{"slots": 1, "nod": 0}]}, r"topology\.gpus\[0\]\.nod: unknown key; did you mean 'node'"),
        ({"gpus": [3]}, r"topology\.gpus\[0\]: must be an object, got a whole number"),
        ({"gpus_per_node": 1, "slots": 1, "links": {"host": 0}}, r"topology\.links\.host: is 0"),
        ({"gpus_per_node": 1, "slots": 1, "links": {"hots": 1}}, r"topology\.links\.hots: unknown key"),
        ([1], "topology: must be an object, got a list"),
        (None, "topology: must be an object, got null"),
    ],
)
def test_malformed_json_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        Topology.from_dict(data)


@pytest.mark.parametrize("name", TOPOLOGY_PRESETS)
def test_presets(name: str) -> None:
    by_memory, by_slots = Topology.preset(name), Topology.preset(name, slots=3)
    nodes, per_node, gigabytes, links = TOPOLOGY_PRESETS[name]
    assert by_memory.gpus == by_slots.gpus == nodes * per_node
    assert by_memory.nodes == nodes
    assert by_memory.slots_G is None
    assert by_slots.memory_G is None
    assert by_slots.slots_G is not None
    assert by_slots.slots_G.tolist() == [3] * by_slots.gpus
    assert by_memory.memory_G is not None
    assert by_memory.memory_G.tolist() == pytest.approx([0.6 * gigabytes * 1e9] * by_memory.gpus, rel=1e-9)
    assert by_memory.links == links
    # names say how many GPUs there are
    assert str(by_memory.gpus) in name or name.startswith(f"{nodes}x{per_node}x")
    assert links.intra_node >= links.inter_node


def test_capacity_by_slots_and_bytes() -> None:
    bytes_L = [30, 70]
    slots = uniform(1, 2, slots=[3, 9]).capacity_LG([0, 0], 8)
    assert slots.tolist() == [[3, 8], [3, 8]]  # no GPU can use more slots than there are experts
    memory = uniform(1, 3, memory=[99, 100, 450]).capacity_LG(bytes_L, 8)
    assert memory.tolist() == [[0, 1, 4]] * 2
    both = uniform(1, 3, slots=2, memory=[99, 100, 450]).capacity_LG(bytes_L, 8)
    assert both.tolist() == [[0, 1, 2]] * 2
    unsized = uniform(1, 2, slots=2, memory=100).capacity_LG([0, 0], 8)
    assert unsized.tolist() == [[2, 2]] * 2
    with pytest.raises(ProblemError, match=r"topology\.memory: needs the size of an expert"):
        uniform(1, 2, memory=100).capacity_LG([0], 8)


@few
@given(topologies(memory=True), st.lists(st.integers(1, 10**8), min_size=1, max_size=4), st.integers(1, 9))
def test_capacity_is_the_most_that_fits(topology: Topology, bytes_L: list[int], experts: int) -> None:
    capacity = topology.capacity_LG(bytes_L, experts)
    assert capacity.shape == (len(bytes_L), topology.gpus)
    assert topology.slots_G is not None
    assert topology.memory_G is not None
    for g in range(topology.gpus):
        fits = [
            k
            for k in range(experts + 1)
            if k <= topology.slots_G[g] and k * sum(bytes_L) <= topology.memory_G[g]
        ]
        assert capacity[:, g].tolist() == [max(fits)] * len(bytes_L)


@few
@given(topologies())
def test_bandwidth_agrees_with_the_graph(topology: Topology) -> None:
    rate = topology.bandwidth_GG()
    graph = topology.to_networkx()
    assert nx.is_connected(graph)
    kinds = [data["kind"] for _, data in graph.nodes(data=True)]
    assert kinds.count("gpu") == topology.gpus
    assert kinds.count("node") == kinds.count("host") == topology.nodes
    assert kinds.count("network") == (topology.nodes > 1)
    for g in range(topology.gpus):
        assert graph.nodes["gpu", g]["speed"] == topology.speed_G[g]
        assert graph.nodes["gpu", g]["domain"] == topology.failure_domain_G[g]
        assert np.isinf(rate[g, g])
        for h in range(g):
            via = ("node", int(topology.node_G[g]))
            if topology.node_G[g] != topology.node_G[h]:
                via = ("network",)  # type: ignore[assignment]
            path = [("gpu", g), via, ("gpu", h)]
            narrow = min(graph.edges[a, b]["bandwidth"] for a, b in itertools.pairwise(path))
            assert rate[g, h] == rate[h, g] == narrow


@few
@given(topologies(memory=True), st.data())
def test_loss_of_gpus_keeps_the_rest(topology: Topology, data: Any) -> None:
    lost = data.draw(st.lists(st.integers(0, topology.gpus - 1), unique=True, max_size=topology.gpus - 1))
    rest = topology.without(lost)
    kept = [g for g in range(topology.gpus) if g not in lost]
    assert rest.gpus == len(kept)
    assert rest.speed_G.tolist() == topology.speed_G[kept].tolist()
    assert topology.slots_G is not None
    assert rest.slots_G is not None
    assert rest.slots_G.tolist() == topology.slots_G[kept].tolist()
    assert rest.failure_domain_G.tolist() == topology.failure_domain_G[kept].tolist()
    # GPUs of one node stay together, in order
    old, new = topology.node_G[kept], rest.node_G
    assert [(a == b) for a in old for b in old] == [(a == b) for a in new for b in new]
    assert rest.nodes == len(set(old.tolist()))


def test_loss_of_too_much() -> None:
    topology = uniform(1, 2, slots=1)
    with pytest.raises(ProblemError, match="gpus: all GPUs are lost"):
        topology.without([0, 1])
    with pytest.raises(ProblemError, match=r"gpus\[0\]: is 2, must be from 0 to 1"):
        topology.without([2])


def test_repr_tells_what_differs() -> None:
    text = repr(uniform(2, 2, slots=[1, 2, 2, 2], speed=[1, 1, 0.5, 1], memory=5 * 10**9))
    assert text == (
        "Topology(2x2: 4 GPUs in 2 node(s), 1..2 slots per GPU and layer, 5 GB per GPU for experts, "
        "speeds 0.5..1)"
    )


def test_json_errors_are_format_errors() -> None:
    with pytest.raises(FormatError):
        Topology.from_dict({"kind": "ring"})
