"""What a placement is worth in each priority, with the token shares that the order of priorities wants.

Shares are free in a fractional split, so two figures depend on them: the largest GPU time and the tokens that
leave their node. Where balance comes first, shares make the time least, and keep tokens on their node as far
as the time allows. Where traffic comes first, every node that has a replica serves all of its own tokens, and
what freedom remains makes the time least: the tokens that a node keeps are an expert of their own, whose
replicas are those on the node.

Axes: X candidates, T scenarios, L layers, N nodes, E experts, G GPUs, C slots of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import new_replicas, node_traffic, order_of, risk
from moeless_opt.problems.spec import Problem, equal_shares, held_LGE
from moeless_opt.solvers.core import risk_L
from moeless_opt.solvers.lexicographic.survival import Failures
from moeless_opt.solvers.shares import pooled_shares, solve_shares, solve_source_shares

__all__ = ["EQUAL", "Figures"]

EQUAL = 1e-9
"""Relative difference below which two figures are the same."""

ALL = slice(None)


class Figures:
    """The figures of placements of a problem, for its order of priorities.

    Parameters
    ----------
    problem : Problem
        Times count tokens only.
    order : sequence of str, optional
        The priorities; those of the problem that make a difference by default.
    """

    def __init__(self, problem: Problem, order: Sequence[str] | None = None) -> None:
        self.problem = problem
        self.order = tuple(order_of(problem) if order is None else order)
        place = {name: i for i, name in enumerate(self.order)}
        never = len(self.order)
        self.near = place.get("traffic", never) < place.get("balance", never)
        """Whether tokens stay on their node before times are evened out."""
        self.failures = Failures(problem) if "survival" in self.order else None
        """What failures cost, where survival is a priority."""
        # A launch cost counts on equal GPUs alone, where it is the same for all.
        self._fixed = problem.time.launch / float(problem.topology.speed_G.max())
        self.live_LGC = None if problem.current is None else problem.current.slots_LGC
        by_node = problem.loads.load_LNE
        nodes = problem.topology.nodes
        even_LNE = np.repeat(problem.load_LE[:, None, :] / nodes, nodes, axis=1)
        self.source_LNE = even_LNE if by_node is None else by_node

    def figure_L(
        self,
        name: str,
        slots_LGC: SlotArray,
        limit_L: FloatArray | None,
        rows: IntArray | slice = ALL,
    ) -> FloatArray:
        """One figure of some layers' placements by the name of its priority.

        Parameters
        ----------
        name : str
            ``balance``: least largest GPU time, over the scenarios by the problem's risk. ``moves``: replicas
            that are not live yet. ``traffic``: fewest tokens that leave their node with times up to the
            limit. ``memory``: replicas. ``survival``: see `Failures.figure_L`.
        slots_LGC : array of int32, shape [L, G, C]
            The placement of these layers.
        limit_L : array, shape [L], optional
            See `shares`.
        rows : array of int or slice
            Which layers of the problem they are; all by default.
        """
        if name == "balance":
            return self._balance_L(slots_LGC, rows)
        if name == "moves":
            assert self.live_LGC is not None
            new = new_replicas(slots_LGC, self.live_LGC[rows], self.problem.experts)
            return np.asarray(new.sum((1, 2)), dtype=np.float64)
        if name == "memory":
            return np.asarray((slots_LGC >= 0).sum((1, 2)), dtype=np.float64)
        if self.failures is not None and name == "survival":
            return self.failures.figure_L(slots_LGC)
        share_LGC = self.shares(slots_LGC, limit_L, rows)
        load_LE, node_G = self.problem.load_LE[rows], self.problem.topology.node_G
        return node_traffic(load_LE, slots_LGC, share_LGC, node_G, self.source_LNE[rows])

    def shares(
        self, slots_LGC: SlotArray, limit_L: FloatArray | None = None, rows: IntArray | slice = ALL
    ) -> FloatArray:
        """Token shares for the expected loads, as the order wants them, shape [L, G, C].

        Parameters
        ----------
        slots_LGC : array of int32, shape [L, G, C]
            The placement.
        limit_L : array, shape [L], optional
            Time up to which a layer's GPUs may work for the sake of traffic; the least possible by default.
        rows : array of int or slice
            Which layers of the problem they are; all by default.
        """
        problem = self.problem
        if problem.split == "equal":
            return equal_shares(slots_LGC, problem.experts)
        speed_G, source_LNE = problem.topology.speed_G, self.source_LNE[rows]
        if "traffic" not in self.order:
            return solve_shares(problem.load_LE[rows], slots_LGC, speed_G).share_LGC
        if self.near:
            return self._near_shares(slots_LGC, source_LNE)[0]
        slack_L = np.full(len(slots_LGC), EQUAL)
        if limit_L is not None:
            least_L = solve_shares(problem.load_LE[rows], slots_LGC, speed_G).time_L
            most_L = (limit_L - self._fixed) / problem.time.token_cost
            slack_L = np.maximum(most_L / np.where(least_L > 0, least_L, np.inf) - 1, EQUAL)
        found = solve_source_shares(source_LNE, slots_LGC, problem.topology.node_G, speed_G, slack=slack_L)
        return pooled_shares(found.share_LNGC, source_LNE, slots_LGC)

    def _balance_L(self, slots_LGC: SlotArray, rows: IntArray | slice) -> FloatArray:
        loads = self.problem.loads
        if not self.near or self.problem.split == "equal":
            tokens_L = risk_L(self.problem, slots_LGC, rows)
        else:
            nodes = self.problem.topology.nodes
            top_TL = []
            for t, load_LE in enumerate(loads.load_TLE[:, rows]):
                source_LNE = np.repeat(load_LE[:, None, :] / nodes, nodes, axis=1)
                if loads.load_TLNE is not None:
                    source_LNE = loads.load_TLNE[t, rows]
                top_TL.append(self._near_shares(slots_LGC, source_LNE)[1])
            tokens_L = risk(np.array(top_TL), loads.weight_T, self.problem.objective)
        return np.asarray(tokens_L * self.problem.time.token_cost + self._fixed)

    def _near_shares(self, slots_LGC: SlotArray, source_LNE: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Shares with the least traffic, of those the ones with the least largest time; and that time [L]."""
        topology = self.problem.topology
        node_G, gpus = topology.node_G, topology.gpus
        layers, nodes, experts = source_LNE.shape
        load_LE = source_LNE.sum(1)
        held = held_LGE(slots_LGC, experts)
        on_LNE = np.stack([held[:, node_G == n].any(1) for n in range(nodes)], axis=1)
        own_LNE = np.where(on_LNE, source_LNE, 0.0)
        rest_LE = np.maximum(load_LE - own_LNE.sum(1), 0.0)
        # Experts by node first, then what no node keeps; each slot appears twice. Those that a node does not
        # hold have no tokens, and get one replica anywhere.
        own_LGC = np.where(slots_LGC >= 0, slots_LGC + (node_G * experts)[None, :, None], -1)
        rest_LGC = np.where(slots_LGC >= 0, slots_LGC + nodes * experts, -1)
        absent = np.full((layers, gpus * -(-nodes * experts // gpus)), -1, dtype=np.int64)
        absent[:, : nodes * experts] = np.where(on_LNE.reshape(layers, -1), -1, np.arange(nodes * experts))
        parts = np.concatenate([own_LGC, rest_LGC, absent.reshape(layers, gpus, -1)], axis=2)
        load_LP = np.concatenate([own_LNE.reshape(layers, -1), rest_LE], axis=1)
        found = solve_shares(load_LP, parts.astype(np.int32), topology.speed_G)
        place = np.maximum(slots_LGC, 0)
        row, wide = np.arange(layers)[:, None, None], slots_LGC.shape[2]
        tokens = found.share_LGC[:, :, :wide] * own_LNE[row, node_G[None, :, None], place]
        tokens = tokens + found.share_LGC[:, :, wide : 2 * wide] * rest_LE[row, place]
        total = load_LE[row, place]
        even = equal_shares(slots_LGC, experts)  # for experts without tokens
        share_LGC = np.where(total > 0, tokens / np.where(total > 0, total, 1.0), even)
        return np.where(slots_LGC >= 0, share_LGC, 0.0), found.time_L
