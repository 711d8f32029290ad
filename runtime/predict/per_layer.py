"""The per-layer mode over a live model: foresee, plan and move each layer a few layers ahead of its turn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.control import Controller, Counted
from moeless_opt.runtime.live import LiveModel
from moeless_opt.runtime.live.dispatch import SlotDispatcher
from moeless_opt.runtime.predict.foresight import Foresight, GatePredictor, Pending

__all__ = ["PerLayer"]


class PerLayer:
    """While this context is open, every forward pass of the model plans its own layers.

    In front of MoE layer l the gates of layer l + d look at the hidden state (`GatePredictor`), and a thread
    plans that layer for what they choose (`Controller.before_layer`). Layers before the first d, which no
    gate can foresee, are planned for what they were given in the pass before. Nothing waits: what is not
    ready at its layer comes into force at that layer of a later pass.

    Parameters
    ----------
    live : LiveModel
        Attached, by any engine.
    controller : Controller
        Of `live`; its planner must know single layers.
    predictor : GatePredictor
        Of the same model, of this rank's tokens alone (no group).
    distance : int
        How many MoE layers ahead.

    Notes
    -----
    All ranks enter and leave it between the same passes. On a GPU the gates run on a stream of their own; on
    a CPU they take their time in the forward pass.
    """

    def __init__(
        self, live: LiveModel, controller: Controller, predictor: GatePredictor, *, distance: int = 1
    ) -> None:
        if live.model is None:
            raise ProblemError("live", "does not know its model; attach makes one that does")
        if predictor.group is not None:
            raise ProblemError("predictor.group", "must be None: the controller's thread adds the ranks up")
        self.live, self.controller = live, controller
        self.distance = whole("distance", distance, low=1)
        self._foresight = Foresight(live.model, predictor, self.distance, self._begun)
        self._hook: Any = None

    def __enter__(self) -> PerLayer:
        self._foresight.__enter__()
        self._hook = self.live.model.register_forward_pre_hook(self._begin)
        self.live.dispatchers[0].on_batch.append(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        self._foresight.__exit__()
        self._hook.remove()
        self.live.dispatchers[0].on_batch.remove(self._first)

    def _begin(self, *_: Any) -> None:
        self._foresight.real = self.live.dispatchers[0].valid
        self._foresight.counted = self.live.adopted.counted

    def _begun(self, index: int, pending: Pending) -> None:
        self.controller.before_layer(self.live.layers[index], pending)

    def _first(self, _dispatcher: SlotDispatcher, _expert_Tk: Tensor) -> None:
        for layer in self.live.layers[: self.distance]:
            load_E = self.live.last_load_E(layer)
            self.controller.before_layer(layer, Counted(load_E), summed=True)
