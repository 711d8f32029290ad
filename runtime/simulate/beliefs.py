"""What a simulated system takes for its experts' times: told once, or learnt from what its GPUs took."""

from __future__ import annotations

from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.control import LearntTimes
from moeless_opt.runtime.simulate.machine import LayerTimes, Machine

__all__ = ["Beliefs"]


class Beliefs:
    """Times by which a system plans; those of the judge are only ever seen as seconds of GPUs.

    Parameters
    ----------
    truth : Machine
        The machine as it is.
    time : TimeModel, optional
        Expert times that are believed at the start; the true ones by default.
    learns : bool
        Whether passes correct them.
    slots : int
        Most replicas that a GPU uses in a layer.

    Attributes
    ----------
    machine : Machine
        The machine as it is believed to be.
    table : TimeTable
        Its times, as searches take them.
    """

    def __init__(self, truth: Machine, time: TimeModel | None, *, learns: bool, slots: int) -> None:
        self._truth, self._slots = truth, slots
        prior = truth.time if time is None else time
        self._learnt = LearntTimes(prior, slots) if learns else None
        self._take(prior)

    @property
    def time(self) -> TimeModel:
        """Expert times as they are believed to be."""
        return self.machine.time

    def see(self, times: LayerTimes) -> bool:
        """Learn from passes that have run; returns whether anything is believed to be different now."""
        if self._learnt is None:
            return False
        speed_G = self._truth.topology.speed_G
        self._learnt.see(times.tokens_BLG, times.activated_BLG, times.seconds_BLG, speed_G)
        self._take(self._learnt.time)
        return True

    def _take(self, time: TimeModel) -> None:
        self.machine = self._truth if time is self._truth.time else self._truth.replace(time=time)
        self.table = TimeTable.of(time, self._slots, per_token=self._truth.link_per_token)
