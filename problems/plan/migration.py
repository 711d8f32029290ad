"""Getting from the live placement to the new one: transfers in steps, and the check that they are safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray, Record, SlotArray
from moeless_opt.problems.spec import Topology, held_LGE
from moeless_opt.problems.text import bytes_text

__all__ = [
    "HOST",
    "Drop",
    "Migration",
    "Step",
    "Transfer",
    "migration_violations",
    "port_kind",
    "transfer_seconds",
]

HOST = -1
"""Source of a transfer that comes from the host's memory: a cold start."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One replica on its way.

    Parameters
    ----------
    layer, expert : int
        What moves; `layer` is a row of the placements, as what carries it out counts (`Migration.named`,
        which ``moeless_opt.migration`` returns, has the model's own numbers).
    source : int
        GPU that sends, or ``HOST``.
    target : int
        GPU that receives.
    bytes : int
        Its weights.
    """

    layer: int
    expert: int
    source: int
    target: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Drop:
    """One replica to be given up."""

    layer: int
    expert: int
    gpu: int


@dataclass(frozen=True, slots=True)
class Step:
    """Transfers that run at the same time, between two agreements of the ranks.

    First the `drops_before` free memory, then the transfers run, then the `drops_after`
    give up what has been replaced.

    Parameters
    ----------
    drops_before, drops_after : tuple of Drop
        Replicas given up before and after the transfers.
    transfers : tuple of Transfer
        They share no sender port and no receiver port.
    seconds : float
        Time of the step: its slowest transfer.
    """

    drops_before: tuple[Drop, ...]
    transfers: tuple[Transfer, ...]
    drops_after: tuple[Drop, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Migration(Record):
    """An ordered schedule of a re-placement.

    Parameters
    ----------
    steps : tuple of Step
        In order.
    seconds : float
        Sum of the steps.
    lower_bound : float
        No schedule can be quicker (busiest port, or doubling the copies of one expert).
    peak_G : array of int, shape [G]
        Largest number of bytes of experts on each GPU at any moment (replicas where sizes are unknown).
    staged : int
        Transfers that park a replica on a third GPU to break a cycle.
    """

    steps: tuple[Step, ...]
    seconds: float
    lower_bound: float
    peak_G: IntArray
    staged: int = 0

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers in order."""
        return tuple(transfer for step in self.steps for transfer in step.transfers)

    def named(self, layers: Sequence[int]) -> Migration:
        """The same schedule with the model's own number of each layer in place of its row."""

        def drops(given: tuple[Drop, ...]) -> tuple[Drop, ...]:
            return tuple(replace(one, layer=layers[one.layer]) for one in given)

        steps = tuple(
            Step(
                drops_before=drops(step.drops_before),
                transfers=tuple(replace(one, layer=layers[one.layer]) for one in step.transfers),
                drops_after=drops(step.drops_after),
                seconds=step.seconds,
            )
            for step in self.steps
        )
        return self.replace(steps=steps)

    @property
    def bytes(self) -> int:
        """Bytes that travel."""
        return sum(transfer.bytes for transfer in self.transfers)

    def __repr__(self) -> str:
        bound = "" if self.seconds <= 0 else f" (at least {self.lower_bound * 1e3:.3g} ms)"
        parked = f", {self.staged} by way of a third GPU" if self.staged else ""
        return (
            f"Migration({len(self.transfers)} transfers, {bytes_text(self.bytes)} in "
            f"{len(self.steps)} steps, {self.seconds * 1e3:.3g} ms{bound}{parked})"
        )


def transfer_seconds(topology: Topology, source: int, target: int, size: int) -> float:
    """Seconds of one transfer over the link between two GPUs (or from the host)."""
    links = topology.links
    if source == HOST:
        rate = links.host
    else:
        rate = links.intra_node if topology.node_G[source] == topology.node_G[target] else links.inter_node
    return links.latency + size / rate


def port_kind(topology: Topology, source: int, target: int) -> str:
    """Which port of a GPU a transfer uses: ``"intra"`` (NVLink), ``"inter"`` (network) or ``"host"``."""
    if source == HOST:
        return "host"
    return "intra" if topology.node_G[source] == topology.node_G[target] else "inter"


def migration_violations(
    migration: Migration,
    before_LGC: SlotArray,
    after_LGC: SlotArray,
    experts: int,
    topology: Topology,
    *,
    bytes_L: IntArray | None = None,
    limit_G: IntArray | None = None,
) -> list[str]:
    """Every rule that a schedule breaks; empty for a safe one. Replays it replica by replica.

    Checked: every source holds what it sends; no port is used twice in a step; no expert is ever without
    a live replica; memory never exceeds the limit; the end is the new placement; the times add up.

    Parameters
    ----------
    migration : Migration
        The schedule.
    before_LGC, after_LGC : arrays of int32, shape [L, G, C]
        Live placement and the wanted one.
    experts : int
        Experts per layer.
    topology : Topology
        GPUs and links.
    bytes_L : array of int, shape [L], optional
        Bytes of a replica (1 each if not given).
    limit_G : array of int, shape [G], optional
        Bytes that a GPU can hold at any moment; unlimited if not given.
    """
    size_L = np.ones(len(before_LGC), dtype=np.int64) if bytes_L is None or not np.any(bytes_L) else bytes_L
    replay = _Replay(topology, size_L, held_LGE(before_LGC, experts).copy())
    for number, step in enumerate(migration.steps):
        replay.run(f"step {number}", step)
    found = replay.found
    if not np.array_equal(replay.held, held_LGE(after_LGC, experts)):
        found.append("the schedule does not end in the new placement")
    if limit_G is not None and (replay.peak_G > limit_G).any():
        gpu = int(np.argmax(replay.peak_G - limit_G))
        found.append(f"GPU {gpu} would hold {replay.peak_G[gpu]} at its peak, its limit is {limit_G[gpu]}")
    if not np.array_equal(replay.peak_G, migration.peak_G):
        found.append("the claimed peak memory is not that of the schedule")
    if migration.seconds < migration.lower_bound * (1 - 1e-9):
        found.append("the schedule claims to be quicker than its lower bound")
    total = sum(step.seconds for step in migration.steps)
    if abs(migration.seconds - total) > 1e-9 + 1e-6 * migration.seconds:
        found.append("the steps' times do not add up")
    return found


class _Replay:
    """What every GPU holds while the steps run, and the rules that they break."""

    def __init__(self, topology: Topology, size_L: IntArray, held_LGE: BoolArray) -> None:
        self.topology, self.size_L, self.held = topology, size_L, held_LGE
        self.used_G = (self.held.sum(2).T * size_L).sum(1)
        self.peak_G = self.used_G.copy()
        self.found: list[str] = []

    def run(self, where: str, step: Step) -> None:
        for gone in step.drops_before:
            self._drop(where, gone)
        ports: set[tuple[str, str, int]] = set()
        coming: set[tuple[int, int, int]] = set()
        slowest = 0.0
        for move in step.transfers:
            self._check(where, move, ports, coming)
            slowest = max(slowest, transfer_seconds(self.topology, move.source, move.target, move.bytes))
        for layer, gpu, expert in coming:
            self.held[layer, gpu, expert] = True
            self.used_G[gpu] += self.size_L[layer]
        np.maximum(self.peak_G, self.used_G, out=self.peak_G)
        if abs(slowest - step.seconds) > 1e-9 + 1e-6 * slowest:
            self.found.append(f"{where}: claims {step.seconds} s, takes {slowest} s")
        for gone in step.drops_after:
            self._drop(where, gone)

    def _check(
        self,
        where: str,
        move: Transfer,
        ports: set[tuple[str, str, int]],
        coming: set[tuple[int, int, int]],
    ) -> None:
        if move.source != HOST and not self.held[move.layer, move.source, move.expert]:
            self.found.append(
                f"{where}: GPU {move.source} sends expert {move.expert}, which it does not hold"
            )
        key = (move.layer, move.target, move.expert)
        if self.held[key] or key in coming:
            self.found.append(f"{where}: GPU {move.target} already holds expert {move.expert}")
        else:
            coming.add(key)
        kind = port_kind(self.topology, move.source, move.target)
        for end, gpu in (("out", move.source), ("in", move.target)):
            if gpu != HOST and (kind, end, gpu) in ports:
                self.found.append(f"{where}: GPU {gpu} uses its {kind} port ({end}) twice")
            ports.add((kind, end, gpu))

    def _drop(self, where: str, gone: Drop) -> None:
        if not self.held[gone.layer, gone.gpu, gone.expert]:
            self.found.append(
                f"{where}: GPU {gone.gpu} does not hold expert {gone.expert} of row {gone.layer}"
            )
            return
        self.held[gone.layer, gone.gpu, gone.expert] = False
        self.used_G[gone.gpu] -= self.size_L[gone.layer]
        if not self.held[gone.layer, :, gone.expert].any():
            self.found.append(f"{where}: expert {gone.expert} of row {gone.layer} has no live replica")
