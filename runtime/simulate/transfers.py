"""How missing weights come, and what passes pay for it: ways of transfer as objects.

*overlapped*: the schedule of `schedule_migration` runs beside the passes, which go on with the old placement,
undisturbed (assumed; but see `waits`), and switch when it is done. *exposed*: the passes wait for it.
*per-pass* (the paper's mode): the placement holds from the next pass on; a layer's missing replicas load
while the `distance` layers before it run, and what is left of their loading is waited for. *warm-first*:
nobody waits where a copy of the expert is there; a replica serves from when it has come, in this pass or a
later one (`coming`). *sooner*: a layer waits or serves from what is there, whichever ends sooner by the
planner's times.

While replicas change places, those on their way take memory beside those in force: a schedule keeps within
what there is (`Move.limit_G`), and a plan for which none does is not carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import Migration
from moeless_opt.problems.spec import replica_keys
from moeless_opt.runtime.pool import WarmPool
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.options import unknown
from moeless_opt.runtime.simulate.waits import stretched
from moeless_opt.solvers.migration import schedule_migration

__all__ = [
    "TRANSFERS",
    "Arrival",
    "Exposed",
    "Move",
    "Overlapped",
    "PerPass",
    "Sooner",
    "Transfers",
    "WarmFirst",
    "transfers_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of placement that is asked for.

    Parameters
    ----------
    machine, bytes_L : Machine, array of int, shape [L]
        Links, and bytes of a replica.
    live_LGC, wanted_LGC : arrays of int32, shape [L, G, C]
        From where to where.
    now : float
        When.
    network_share : float
        Share of the passes' time in which the all-to-all is on the same ports; 0 where it is not.
    limit_G : array of int, shape [G], optional
        Bytes of experts that each GPU may hold at any moment; by default there is no limit.
    limits : mapping
        Of `schedule_migration`.
    """

    machine: Machine
    bytes_L: IntArray
    live_LGC: SlotArray
    wanted_LGC: SlotArray
    now: float
    network_share: float
    limits: Mapping[str, Any]
    limit_G: IntArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What comes of it.

    Parameters
    ----------
    cold : array of int
        Keys of the replicas that have to be loaded.
    load_L : array, shape [L], optional
        Seconds of loading for each layer, where layers wait for their own replicas.
    stall : float
        Seconds that the next pass waits for it.
    after : float, optional
        Seconds until the placement is in force; by default it is at once.
    beside_L : array, shape [L], optional
        Replicas in memory beside those of the live placement until then, mean over that time.
    peak_G : array, shape [G], optional
        The most bytes of experts on each GPU until then.
    """

    cold: IntArray
    load_L: FloatArray | None = None
    stall: float = 0.0
    after: float | None = None
    beside_L: FloatArray | None = None
    peak_G: IntArray | None = None


@runtime_checkable
class Transfers(Protocol):
    """How missing weights come.

    Attributes
    ----------
    name : str
        For people, and for `transfers_of`.
    per_pass : bool
        Whether a placement is for the next pass alone: replicas are then in use only while they serve, and
        those kept alive beyond it are warm.
    """

    name: str
    per_pass: bool

    def room_LG(self, capacity_LG: IntArray) -> IntArray:
        """Replicas that GPUs hold at most, those on their way included, [L, G]."""
        ...

    def begin(self, move: Move, pool: WarmPool) -> Arrival:
        """Start a move; of a placement for the next pass, loads what is missing into the pool.

        Raises
        ------
        InfeasibleError
            If it does not fit while replicas change.
        """
        ...


class Overlapped:
    """Beside the passes, which switch when all is there."""

    name, per_pass = "overlapped", False

    def room_LG(self, capacity_LG: IntArray) -> IntArray:
        """What the GPUs have room for."""
        return capacity_LG

    def begin(self, move: Move, pool: WarmPool) -> Arrival:
        """See `Transfers`."""
        migration = _scheduled(move)
        return Arrival(
            cold=_missing(move),
            after=stretched(migration.seconds, move.network_share),
            beside_L=_beside(migration, len(move.bytes_L)),
            peak_G=migration.peak_G,
        )


class Exposed(Overlapped):
    """The passes wait for all of it."""

    name = "exposed"

    def begin(self, move: Move, pool: WarmPool) -> Arrival:
        """See `Transfers`."""
        migration = _scheduled(move)
        return Arrival(cold=_missing(move), stall=migration.seconds, peak_G=migration.peak_G)


class PerPass:
    """In force from the next pass on; layers wait for what the layers before them do not hide."""

    name, per_pass = "per-pass", True
    patient: bool | None = True
    """Whether layers wait: always, never where a copy is there, or (None) where that ends sooner."""

    def room_LG(self, capacity_LG: IntArray) -> IntArray:
        """What the GPUs have room for."""
        return capacity_LG

    def begin(self, move: Move, pool: WarmPool) -> Arrival:
        """See `Transfers`."""
        before = pool.keys.copy()
        cold = pool.prewarm(move.wanted_LGC, move.now).cold
        return Arrival(cold=cold, load_L=move.machine.load_seconds(cold, before, move.bytes_L))


class WarmFirst(PerPass):
    """In force as it comes; until then the copies that are there serve."""

    name, patient = "warm-first", False


class Sooner(PerPass):
    """Layers wait for what is missing, or serve from what is there, whichever ends sooner."""

    name, patient = "sooner", None


def _scheduled(move: Move) -> Migration:
    """The schedule; one without a limit is written sooner, and often keeps within it."""

    def schedule(**limits: Any) -> Migration:
        return schedule_migration(
            move.live_LGC,
            move.wanted_LGC,
            move.machine.model.experts,
            move.machine.topology,
            bytes_L=move.bytes_L,
            **(limits | dict(move.limits)),
        )

    found = schedule()
    if move.limit_G is not None and (found.peak_G > move.limit_G).any():
        return schedule(limit_G=move.limit_G)
    return found


def _missing(move: Move) -> IntArray:
    """Keys of what has to be loaded."""
    experts = move.machine.model.experts
    wanted, live = (replica_keys(slots_LGC, experts) for slots_LGC in (move.wanted_LGC, move.live_LGC))
    return np.setdiff1d(wanted, live, assume_unique=True)


def _beside(migration: Migration, layers: int) -> FloatArray:
    """Replicas beside those of the placement that is left, mean over the schedule's time, shape [L]."""
    beside_L, sum_L = np.zeros(layers), np.zeros(layers)
    for step in migration.steps:
        for gone in step.drops_before:
            beside_L[gone.layer] -= 1
        for transfer in step.transfers:
            beside_L[transfer.layer] += 1
        sum_L += step.seconds * beside_L
        for gone in step.drops_after:
            beside_L[gone.layer] -= 1
    return np.asarray(sum_L / max(migration.seconds, 1e-30))


TRANSFERS: dict[str, Transfers] = {
    way.name: way for way in (Overlapped(), Exposed(), PerPass(), WarmFirst(), Sooner())
}
"""The ways by name."""


def transfers_of(transfers: Transfers | str) -> Transfers:
    """A way of transfer, or the one of that name.

    Raises
    ------
    ProblemError
        If there is none.
    """
    if isinstance(transfers, str):
        if transfers not in TRANSFERS:
            raise unknown("transfers", transfers, TRANSFERS)
        return TRANSFERS[transfers]
    return transfers
