"""The thread of the per-layer mode, which plans while a forward pass goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.runtime.control.backend import LayerBackend
from moeless_opt.runtime.control.decision import LayerDecision, same_replicas

__all__ = ["Counted", "Foreseen", "LayerForeseer"]


class Foreseen(Protocol):
    """A prediction that may still be under way, e.g. `predict.foresight.Pending`."""

    def load_E(self) -> FloatArray:
        """Wait if need be; the loads of a layer, [E]."""
        ...


class Counted:
    """Loads that are known already, in the place of a prediction."""

    def __init__(self, load_E: FloatArray) -> None:
        self._load_E = load_E

    def load_E(self) -> FloatArray:
        """The loads."""
        return self._load_E


class LayerForeseer:
    """The thread of the per-layer mode: reads predictions, sums them over the ranks, plans, offers.

    The threads of all ranks take the same tickets in the same order, because tickets are opened so.

    Parameters
    ----------
    backend : LayerBackend
        Opens tickets and takes offers.
    decide : callable
        ``decide(layer, load_E, slots_GC)`` plans a layer from what it holds; may raise.
    record : callable
        Gets every decision, before its slots are offered.
    """

    def __init__(
        self,
        backend: LayerBackend,
        decide: Callable[[int, FloatArray, SlotArray], LayerDecision],
        record: Callable[[LayerDecision], None],
    ) -> None:
        self._backend, self._decide, self._record = backend, decide, record
        self.group = getattr(backend, "group", None)
        self._side = backend.side_group()
        self._queue: queue.Queue[tuple[Any, int, Foreseen, bool] | None] = queue.Queue()
        # Not an executor's: the interpreter must not wait at its end for ranks that are gone.
        self._thread = threading.Thread(target=self._run, name="moeless-foresight", daemon=True)
        self._thread.start()

    def take(self, ticket: Any, layer: int, predicted: Foreseen, summed: bool) -> None:
        """Return at once; the rest is the thread's."""
        self._queue.put((ticket, layer, predicted, summed))

    def drain(self) -> None:
        """Wait until everything taken is planned."""
        self._queue.join()

    def close(self) -> None:
        """Wait for the thread, and end it."""
        self._queue.put(None)
        self._thread.join()
        self._side.close()

    def give_up(self) -> None:
        """End without waiting: the thread may be waiting for a rank that is gone."""
        self._queue.put(None)
        self._side.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._foresee(*item)
            self._queue.task_done()
        self._queue.task_done()

    def _foresee(self, ticket: Any, layer: int, predicted: Foreseen, summed: bool) -> None:
        base_GC, load_E = ticket.base_GC, np.zeros(0)
        try:
            load_E = predicted.load_E()
            if not summed:
                load_E = self._side.sum(load_E)
            decision = self._decide(layer, load_E, base_GC)
        except Exception as error:  # whatever it was: the other ranks wait for word of this ticket
            text = f"{type(error).__name__}: {error}"
            decision = LayerDecision(
                layer=layer, load_E=load_E, slots_GC=base_GC, applied=None, seconds=0.0, error=text
            )
        if not decision.error and not same_replicas(decision.slots_GC[None], base_GC[None]):
            decision = replace(decision, applied=ticket.number)
        # Unchanged slots are offered as they stand: another order of the same experts would be a switch.
        slots_GC = base_GC if decision.applied is None else decision.slots_GC
        self._record(decision)
        self._backend.offer_layer(ticket, slots_GC, decision.error)
