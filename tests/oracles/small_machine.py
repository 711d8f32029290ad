"""The small machine of the simulator's tests: three layers of four experts on four GPUs of two slots."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.runtime.simulate.machine import Machine

MODEL = ModelSpec(name="small", layers=3, experts=4, top_k=2, hidden=64, ffn=128)
CAPACITY = np.full((3, 4), 2)
STATIC = contiguous(4, CAPACITY)


def machine_of(
    nodes: int, gpus_per_node: int, *, intra_node: float, inter_node: float, slower: float = 1.0
) -> Machine:
    """Such a machine; experts take `slower` times 1 us a token and 10 us each."""
    links = Links(intra_node=intra_node, inter_node=inter_node, host=5e7)
    return Machine(
        topology=Topology.uniform(nodes, gpus_per_node, slots=2, links=links),
        model=MODEL,
        time=TimeModel(token_cost=slower * 1e-6, activation_cost=slower * 1e-5, unit="s"),
        flops=1e12,
        bandwidth=1e11,
    )
