"""Experts as functions: which replicas are warm on which GPU, and for how long an unused one is kept.

A replica is *used* by a pass, then *kept alive* for a while, then released; the last replica of an expert is
never released (only extra ones scale to zero). A wanted replica that is not warm is a *cold start*: its
weights have to come from another GPU or from the host. How long to keep one is a policy: a fixed time, or one
learnt from how long replicas of the layer were idle before they were used again.

Axis letters: L layers, G GPUs, E experts, C slots.

References
----------
Adaptive keep-alive follows the idle-time histograms of Shahrad et al., "Serverless in the Wild", USENIX
ATC 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.placement import held_LGE
from moeless_opt.runtime.pool.keep_alive import FixedKeepAlive, KeepAlive

__all__ = ["WarmPool"]


@dataclass(frozen=True, slots=True)
class Use:
    """What a use of replicas met.

    Parameters
    ----------
    cold_LGE : array of bool, shape [L, G, E]
        Replicas that had to be loaded.
    evicted : int
        Warm replicas that made room.
    """

    cold_LGE: BoolArray
    evicted: int


class WarmPool:
    """The replicas in memory.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        What is warm at time 0.
    experts : int
        Experts per layer.
    capacity_LG : array of int, shape [L, G]
        Replicas that a GPU has room for, in use and kept alive together.
    bytes_L : array of int, shape [L]
        Bytes of one replica.
    keep_alive : KeepAlive or float
        Policy, or a fixed time in seconds.
    """

    def __init__(
        self,
        slots_LGC: SlotArray,
        experts: int,
        *,
        capacity_LG: IntArray,
        bytes_L: ArrayLike,
        keep_alive: KeepAlive | float = 10.0,
    ) -> None:
        self.warm_LGE = held_LGE(slots_LGC, experts)
        self.capacity_LG = np.asarray(capacity_LG, dtype=np.int64)
        self.bytes_L = np.asarray(bytes_L, dtype=np.float64)
        self.keep_alive: KeepAlive = (
            FixedKeepAlive(keep_alive) if isinstance(keep_alive, int | float) else keep_alive
        )
        self.last_LGE: FloatArray = np.where(self.warm_LGE, 0.0, -np.inf)
        #: Replicas that stay however long they idle: in a running model, those in force or on their way.
        self.pinned_LGE: BoolArray | None = None
        self.now = 0.0
        self.byte_seconds = 0.0
        self.cold_starts = self.reuses = self.released = 0
        self._check_room(self.warm_LGE)

    @property
    def held_L(self) -> FloatArray:
        """Replicas in memory by layer, shape [L]."""
        return np.asarray(self.warm_LGE.sum((1, 2)), dtype=np.float64)

    @property
    def bytes(self) -> float:
        """Bytes in memory."""
        return float(self.held_L @ self.bytes_L)

    def slots(self) -> SlotArray:
        """What is warm as slots, experts in ascending order, shape [L, G, C]."""
        width = max(int(self.warm_LGE.sum(2).max()), 1)
        order = np.argsort(~self.warm_LGE, axis=2, kind="stable")[:, :, :width]
        filled = np.take_along_axis(self.warm_LGE, order, axis=2)
        return np.where(filled, order, -1).astype(np.int32)

    def advance(self, now: float, keep_LGE: BoolArray | None = None) -> None:
        """Let time pass until `now`: charge what is held, release what has been idle for too long.

        What is in `keep_LGE` is not released this time.
        """
        if now < self.now:
            raise ProblemError("now", f"is {now}, time has reached {self.now}")
        keep_L = self.keep_alive.seconds_L(len(self.warm_LGE))
        end_LGE = np.where(self.warm_LGE, self.last_LGE, 0.0) + keep_L[:, None, None]
        gone_LGE = self.warm_LGE & (end_LGE < now) & ~self._last_copies()
        for kept_LGE in (self.pinned_LGE, keep_LGE):
            if kept_LGE is not None:
                gone_LGE &= ~kept_LGE
        self.byte_seconds += self.bytes * (now - self.now)
        # A replica is charged to the moment of its release, not to the moment at which we notice.
        over_LGE = np.where(gone_LGE, now - np.maximum(end_LGE, self.now), 0.0)
        self.byte_seconds -= float(over_LGE.sum((1, 2)) @ self.bytes_L)
        self.warm_LGE &= ~gone_LGE
        self.released += int(gone_LGE.sum())
        self.now = now

    def use(self, slots_LGC: SlotArray, now: float, until: float | None = None) -> Use:
        """Use replicas from `now` on; those that are not warm are loaded, idle ones make room if they must.

        Parameters
        ----------
        slots_LGC : array of int32, shape [L, G, C]
            What is used.
        now, until : float
            Start and end of the use (the start by default). Idle time counts from the end.

        Raises
        ------
        InfeasibleError
            If more is wanted on a GPU than it has room for.
        """
        self.advance(now)
        wanted_LGE = held_LGE(slots_LGC, self.warm_LGE.shape[2])
        self._check_room(wanted_LGE)
        cold_LGE = self._take(wanted_LGE, now, now if until is None else max(now, until))
        return Use(cold_LGE, self._make_room(wanted_LGE))

    def take(self, wanted_LGE: BoolArray, now: float) -> BoolArray:
        """Want replicas, wherever they fit: what a running model does before it makes room (`fit`).

        Parameters
        ----------
        wanted_LGE : array of bool, shape [L, G, E]
            What is wanted; pinned ones count neither as cold nor as re-used.

        Returns
        -------
        array of bool, shape [L, G, E]
            What has to be loaded.
        """
        self.advance(now, wanted_LGE)
        return self._take(wanted_LGE, now, now)

    def _take(self, wanted_LGE: BoolArray, now: float, until: float) -> BoolArray:
        cold_LGE = wanted_LGE & ~self.warm_LGE
        again_LGE = wanted_LGE & self.warm_LGE
        if self.pinned_LGE is not None:
            again_LGE &= ~self.pinned_LGE
        layer, gpu, expert = np.nonzero(again_LGE & (self.last_LGE < now))
        self.keep_alive.idle(layer, now - self.last_LGE[layer, gpu, expert])
        self.last_LGE[wanted_LGE] = until
        self.warm_LGE |= wanted_LGE
        self.cold_starts += int(cold_LGE.sum())
        self.reuses += int(again_LGE.sum())
        return cold_LGE

    def fit(self) -> int:
        """Release the longest idle replicas of GPUs that are over their room, pinned ones excepted."""
        none: BoolArray = np.zeros(self.warm_LGE.shape, dtype=np.bool_)
        return self._make_room(none if self.pinned_LGE is None else self.pinned_LGE)

    def drop(self, gone_LGE: BoolArray) -> None:
        """Forget replicas that are not there after all: a transfer has failed."""
        self.warm_LGE &= ~gone_LGE

    def hold(self, slots_LGC: SlotArray, until: float) -> None:
        """Keep warm replicas until a time at least, used or not: what a serverful system does."""
        self.touch(held_LGE(slots_LGC, self.warm_LGE.shape[2]), until)

    def touch(self, used_LGE: BoolArray, until: float) -> None:
        """Of these replicas those that are warm were used until then."""
        held = used_LGE & self.warm_LGE
        self.last_LGE[held] = np.maximum(self.last_LGE[held], until)

    def follow(self, kept_LGE: BoolArray, now: float) -> None:
        """Have exactly these replicas from now on: somebody else has moved them."""
        self.advance(now)
        self._take(kept_LGE, now, now)
        self.released += int((self.warm_LGE & ~kept_LGE).sum())
        self.warm_LGE &= kept_LGE

    def keep_only(self, slots_LGC: SlotArray) -> None:
        """Release all other replicas now: what a serverful system does when it has switched."""
        kept_LGE = held_LGE(slots_LGC, self.warm_LGE.shape[2])
        self.released += int((self.warm_LGE & ~kept_LGE).sum())
        self.warm_LGE &= kept_LGE

    def prewarm(self, slots_LGC: SlotArray, now: float) -> Use:
        """Load, ahead of their use, replicas that a prediction wants; a use at the same time finds them warm.

        Counts as cold starts what it loads, and nothing as re-used.
        """
        self.advance(now)
        wanted_LGE = held_LGE(slots_LGC, self.warm_LGE.shape[2])
        self._check_room(wanted_LGE)
        cold_LGE = wanted_LGE & ~self.warm_LGE
        self.last_LGE[cold_LGE] = now
        self.warm_LGE |= cold_LGE
        self.cold_starts += int(cold_LGE.sum())
        return Use(cold_LGE, self._make_room(wanted_LGE))

    def _last_copies(self) -> BoolArray:
        """Of every expert, the copy used last (on the lowest GPU among equals)."""
        last_LGE = np.where(self.warm_LGE, self.last_LGE, -np.inf)
        if self.pinned_LGE is not None:  # those are in use
            last_LGE[self.pinned_LGE & self.warm_LGE] = np.inf
        best_LE = last_LGE.argmax(1)
        copies: BoolArray = np.zeros(self.warm_LGE.shape, dtype=np.bool_)
        np.put_along_axis(copies, best_LE[:, None, :], True, axis=1)
        return copies & self.warm_LGE

    def _check_room(self, wanted_LGE: BoolArray) -> None:
        over_LG = wanted_LGE.sum(2) - self.capacity_LG
        if (over_LG > 0).any():
            layer, gpu = (int(i) for i in np.argwhere(over_LG > 0)[0])
            raise InfeasibleError(
                f"warm pool: {int(wanted_LGE[layer, gpu].sum())} replicas are wanted on GPU {gpu} in layer "
                f"{layer}, it has room for {int(self.capacity_LG[layer, gpu])}"
            )

    def _make_room(self, wanted_LGE: BoolArray) -> int:
        """Release the longest idle replicas of GPUs that are over their room."""
        over_LG = self.warm_LGE.sum(2) - self.capacity_LG
        evicted = 0
        for layer, gpu in np.argwhere(over_LG > 0):
            idle = np.flatnonzero(self.warm_LGE[layer, gpu] & ~wanted_LGE[layer, gpu])
            order = idle[np.argsort(self.last_LGE[layer, gpu, idle], kind="stable")]
            gone = order[: over_LG[layer, gpu]]
            self.warm_LGE[layer, gpu, gone] = False
            evicted += gone.size
        self.released += evicted
        return evicted
