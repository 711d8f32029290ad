"""Where the predictions come from that a simulated per-pass policy plans by.

By name (`NAMES`), each a `Foreseer`: given the next passes, in order, it says what was foreseen of each.

*assumed*: the actual loads, a stated share of which is put where pairs went on average (`predicted`).

*last*, *ewma*, *ar*, *affinity*: the package's own predictors (`runtime.predict`), run over the simulated
traffic: in every pass, at layer l, they see the loads of layer l and predict those of layer l + d; then they
are told the pass. Nothing is assumed of their errors.

*gate*, *recorded*: what the gates of a model said while it routed the very tokens that the traffic is
composed of: plain gates fed early, and trained ones (`predict.gates`). `Predictions` hold both sides, token
by token; passes composed of the one and of the other with the same seed are actual and predicted loads. Those
of the project's tiny MoE ship with the package (`tiny_moe.record` makes them).

The first d layers have no layer of the pass before them to predict at; all but *assumed* take the
autoregressive forecast from the passes before for those. None of these predictors is charged for its own
time: it runs beside the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, Record, whole
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import named
from moeless_opt.problems.io import (
    Arrivals,
    RoutedRequests,
    TokenTraces,
    loads_by_step,
    read_arrays,
    read_token_traces,
)
from moeless_opt.problems.spec import ModelSpec
from moeless_opt.runtime.predict import Affinity, AutoRegressive, Context, Ewma, LastWindow, Predictor
from moeless_opt.runtime.simulate.compose import StepTokens, compose_reads, compose_tokens, draw_requests
from moeless_opt.runtime.simulate.traffic import Passes

__all__ = [
    "NAMES",
    "TINY_MOE",
    "Assumed",
    "Composition",
    "Foreseer",
    "JudgedForeseer",
    "Online",
    "Predictions",
    "Recorded",
    "foreseer",
    "predicted",
    "read_predictions",
    "tiny_moe_predictions_file",
]

#: The project's own model, as the simulator takes it.
TINY_MOE = ModelSpec(name="tiny-moe", layers=6, experts=16, top_k=2, hidden=128, ffn=160)

NAMES: dict[str, str] = {
    "assumed": "the actual loads with a share of the pairs wrong (--error)",
    "last": "the pass before",
    "ewma": "an exponential mean of the passes before",
    "ar": "an autoregressive forecast from the passes before",
    "affinity": "transitions between layers, learnt on other requests; needs token traces",
    "gate": "the model's own gates fed early; needs recorded predictions",
    "recorded": "trained gates; needs recorded predictions",
}
"""Predictors that the simulator offers."""

#: Recorded gates by the name of the predictor.
_KINDS = {"gate": "gate", "recorded": "tuned"}


class Foreseer(Protocol):
    """Predicts passes before they run."""

    @property
    def text(self) -> str:
        """What the predictions are and what they rest on, for people."""

    def __call__(self, passes: Passes) -> FloatArray:
        """What was foreseen of the next passes, [B, L, E]; to be called with all passes in order."""


def predicted(
    load_BLE: FloatArray, mean_LE: FloatArray, error: float, rng: np.random.Generator
) -> FloatArray:
    """Loads as an imperfect predictor sees them, shape [B, L, E].

    A share `error` of every layer's pairs is put where pairs went on average until now, by chance; the rest
    is right. A model of a predictor, for where none is at hand (assumed).
    """
    if error <= 0:
        return load_BLE
    total_BL = load_BLE.sum(2)
    wrong_BL = np.rint(error * total_BL).astype(np.int64)
    weight_LE = mean_LE + 1e-9
    share_LE = weight_LE / weight_LE.sum(1, keepdims=True)
    guess = rng.multinomial(wrong_BL, np.broadcast_to(share_LE, load_BLE.shape))
    return np.asarray((1 - error) * load_BLE + guess)


class Assumed:
    """Actual loads with an assumed error.

    Parameters
    ----------
    error : float
        Share of the pairs that is put where pairs went on average until now.
    seed : int
        For them.
    """

    def __init__(self, error: float, *, seed: int = 0) -> None:
        self.error = error
        self._rng = np.random.default_rng(seed)
        self._past_LE: FloatArray | float = 0.0

    @property
    def text(self) -> str:
        """What it rests on."""
        return f"assumed: {self.error:.3g} of the pairs are put where pairs went on average"

    def __call__(self, passes: Passes) -> FloatArray:
        """See `Foreseer`."""
        past_LE = np.broadcast_to(self._past_LE, passes.load_BLE.shape[1:])
        foreseen_BLE = predicted(passes.load_BLE, past_LE, self.error, self._rng)
        self._past_LE = past_LE + passes.load_BLE.sum(0)
        return foreseen_BLE


class Online:
    """One of the package's predictors, run over the traffic as a system would run it.

    Parameters
    ----------
    predictor : Predictor
        Asked at layer l for layer l + d.
    distance : int
        d.
    basis : str
        What it was learnt on, for people.
    """

    def __init__(
        self, predictor: Predictor, distance: int, basis: str = "from the simulated traffic"
    ) -> None:
        self.predictor = predictor
        self.distance = whole("distance", distance, low=1)
        self.basis = basis
        self._first = AutoRegressive()

    @property
    def text(self) -> str:
        """What it rests on."""
        return (
            f"computed: {self.predictor.name} {self.basis}; the first {self.distance} layer(s) by "
            f"{self._first.name}"
        )

    def __call__(self, passes: Passes) -> FloatArray:
        """See `Foreseer`."""
        return np.stack([self._one(load_LE) for load_LE in passes.load_BLE])

    def _one(self, load_LE: FloatArray) -> FloatArray:
        ahead = self.distance
        foreseen_LE = np.empty_like(load_LE)
        foreseen_LE[:ahead] = _early(self._first, load_LE, ahead)
        for layer in range(len(load_LE) - ahead):
            context = Context(layer=layer, load_E=load_LE[layer])
            foreseen_LE[layer + ahead] = self.predictor.predict(context, ahead)
        self.predictor.observe(load_LE)
        self._first.observe(load_LE)
        return foreseen_LE


def _early(first: AutoRegressive, load_LE: FloatArray, count: int) -> FloatArray:
    """Forecast of the first layers from the passes before; of this pass, only its size is used."""
    return np.stack(
        [
            first.predict(Context(layer=layer, load_E=load_LE[layer]), 0)
            for layer in range(min(count, len(load_LE)))
        ]
    )


# ---------------------------------------------------------------------------------------- recordings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions(Record):
    """What tokens chose, and what gates had said that they would.

    Parameters
    ----------
    traces : TokenTraces
        What they chose, [T, L, K].
    said : dict of str to array
        By kind of gate, what was said of layer l at layer l - d, in ``[token, l, d - 1]``: ``chosen_...``
        [T, L, D, K] holds the experts, ``chance_...`` [T, L, D, E] whole multiples of `unit`, rounded so
        that sums over consecutive tokens stay right.
    unit : float
        Of the chances.
    transitions_DLEE : array, shape [D, L, E, E], optional
        Counts between layers l and l + d on the training requests, for `Affinity`.
    source : str
        For people.
    """

    traces: TokenTraces
    said: dict[str, NDArray[Any]]
    unit: float = 1.0
    transitions_DLEE: NDArray[Any] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        tokens, layers, top_k = self.traces.experts_TLK.shape
        for name, array in self.said.items():
            wide = top_k if name.startswith("chosen_") else self.traces.experts
            if array.ndim != 4 or array.shape[:2] != (tokens, layers) or array.shape[3] != wide:
                raise ProblemError(
                    f"predictions.{name}",
                    f"has shape {array.shape}, must be [{tokens} tokens, {layers} layers, distances, {wide}]",
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Gates that were recorded."""
        return tuple(sorted({name.split("_", 1)[1] for name in self.said}))

    def load_SLE(self, kind: str, distance: int, item: StepTokens) -> FloatArray:
        """Predicted loads of the steps of a window, [S, L, E]; nothing in the first `distance` layers."""
        name = next((n for n in (f"chance_{kind}", f"chosen_{kind}") if n in self.said), None)
        if name is None:
            raise ProblemError("predictions", f"hold no {kind!r}; they hold {', '.join(self.kinds)}")
        said = self.said[name]
        if not 1 <= distance <= said.shape[2]:
            raise ProblemError("distance", f"is {distance}, recorded are 1 to {said.shape[2]}")
        said_PLX = said[item.token_P, :, distance - 1]
        steps = item.live_S.size
        if name.startswith("chance_"):
            load_SLE = np.zeros((steps, *said_PLX.shape[1:]))
            np.add.at(load_SLE, item.step_P, self.unit * said_PLX)
        else:
            rows = np.arange(item.token_P.size)
            traces = self.traces
            guess = _Rows(said_PLX, traces.experts, traces.offsets, traces.prompt_tokens)
            load_SLE = loads_by_step(guess, rows, item.step_P, steps)
        load_SLE[:, :distance] = 0
        return load_SLE


@dataclass(frozen=True, slots=True)
class _Rows:
    """Predicted experts in the form that `loads_by_step` takes."""

    experts_TLK: NDArray[Any]
    experts: int
    offsets: IntArray
    prompt_tokens: IntArray


def tiny_moe_predictions_file() -> Path:
    """The recording that ships with the package."""
    return Path(str(resources.files("moeless_opt.runtime") / "data" / "tiny_moe_foresight.npz"))


def read_predictions(path: str | PathLike[str], *, experts: int | None = None) -> Predictions:
    """Read token traces with predictions beside them (.npz).

    The file is one of `read_token_traces` with further arrays ``chosen_NAME`` [T, L, D, K] or ``chance_NAME``
    [T, L, D, E] (in units of ``unit``), and optionally ``transitions`` [D, L, E, E].

    Raises
    ------
    FormatError
        If it holds no predictions, or they do not fit the traces.
    """
    traces = read_token_traces(path, experts=experts)
    arrays = read_arrays(path)
    said = {name: array for name, array in arrays.items() if name.startswith(("chosen_", "chance_"))}
    unit = arrays.get("unit", np.ones(()))
    if unit.shape != () or unit.dtype.kind not in "iuf":
        raise FormatError(f"{path}: unit", f"has shape {unit.shape} of {unit.dtype}, must be one number")
    if not said:
        raise FormatError(str(path), "holds no predictions (arrays chosen_NAME or chance_NAME)")
    with named(path):
        return Predictions(
            traces=traces,
            said=said,
            unit=float(unit),
            transitions_DLEE=arrays.get("transitions"),
            source=Path(path).name,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Passes of recorded requests, the same whenever they are composed.

    Parameters
    ----------
    traces : RoutedRequests
        Measured routing.
    arrivals : Arrivals
        Times.
    batching : {"seconds", "continuous"}
        All recorded tokens of the requests of one second in one pass; or a pass every `period`, a token of
        the answer of each live request.
    period : float
        Seconds.
    stay : float
        Chance that a request has its forerunner's domain.
    window : int
        Passes at a time.
    requests : array of int, optional
        Draw from these only.
    seed : int
        For the draw.
    """

    traces: RoutedRequests
    arrivals: Arrivals
    batching: str = "seconds"
    period: float = 0.05
    stay: float = 0.0
    window: int = 16
    requests: IntArray | None = None
    seed: int = 0

    def tokens(self) -> Iterator[StepTokens]:
        """Rows of the traces that each pass routes."""
        drawn_R = draw_requests(
            self.traces, self.arrivals, requests=self.requests, stay=self.stay, seed=self.seed
        )
        if self.batching == "seconds":
            return compose_reads(self.traces, self.arrivals, drawn_R)
        return compose_tokens(
            self.traces, self.arrivals, drawn_R, step_seconds=self.period, window=self.window
        )

    def passes(self) -> Iterator[Passes]:
        """The traffic."""
        prefill = self.batching == "seconds"
        mean = float(np.diff(self.traces.offsets).mean())
        for item in self.tokens():
            steps = item.live_S.size
            load_SLE = loads_by_step(self.traces, item.token_P, item.step_P, steps)
            token_S = np.bincount(item.step_P, minlength=steps).astype(np.float64)
            first = (item.start + 1.0) if prefill else item.start * self.period
            yield Passes(
                start_B=np.asarray(first + np.arange(steps) * self.period, dtype=np.float64),
                weight_B=np.ones(steps),
                tokens_B=token_S,
                # What is in the cache is not recorded: half of a mean request for each one that writes.
                kv_tokens_B=token_S if prefill else token_S * mean / 2,
                prefill_B=np.full(steps, prefill),
                load_BLE=load_SLE,
            )


class Recorded:
    """Recorded predictions, composed as the traffic is.

    Parameters
    ----------
    predictions : Predictions
        Both sides.
    items : iterator of StepTokens
        Rows of ``predictions.traces`` that the passes route, as the traffic has them.
    kind : str
        Which gates.
    distance : int
        Layers ahead.
    """

    def __init__(
        self, predictions: Predictions, items: Iterator[StepTokens], kind: str, distance: int
    ) -> None:
        self.predictions, self.kind, self.distance = predictions, kind, distance
        self._items = items
        self._first = AutoRegressive()

    @property
    def text(self) -> str:
        """What it rests on."""
        which, count = "trained" if self.kind == "tuned" else "plain", self.predictions.traces.requests
        return (
            f"measured: {which} gates on the very tokens ({self.predictions.source}, {count} requests that "
            f"were not trained on), composed as the traffic; the first {self.distance} layer(s) by "
            f"{self._first.name}"
        )

    def __call__(self, passes: Passes) -> FloatArray:
        """See `Foreseer`."""
        item = next(self._items)
        foreseen_BLE = self.predictions.load_SLE(self.kind, self.distance, item)
        if foreseen_BLE.shape != passes.load_BLE.shape:
            raise ProblemError("passes", "are not those that the predictions are composed for")
        total_BL1 = foreseen_BLE.sum(2, keepdims=True)
        pairs_BL1 = passes.load_BLE.sum(2, keepdims=True)
        # A sum of chances is near the number of pairs; the router's number is known.
        foreseen_BLE *= np.where(total_BL1 > 0, pairs_BL1 / np.where(total_BL1 > 0, total_BL1, 1), 0)
        for foreseen_LE, load_LE in zip(foreseen_BLE, passes.load_BLE, strict=True):
            foreseen_LE[: self.distance] = _early(self._first, load_LE, self.distance)
            self._first.observe(load_LE)
        return foreseen_BLE


# ------------------------------------------------------------------------------------------ choosing


class JudgedForeseer:
    """A foreseer that keeps count of how wrong it was.

    Parameters
    ----------
    inner : Foreseer
        What is judged.
    """

    def __init__(self, inner: Foreseer) -> None:
        self.inner = inner
        self._wrong_L: FloatArray | float = 0.0
        self._passes = 0

    @property
    def text(self) -> str:
        """What the predictions rest on."""
        return self.inner.text

    def __call__(self, passes: Passes) -> FloatArray:
        """See `Foreseer`."""
        foreseen_BLE = self.inner(passes)
        load_BLE = passes.load_BLE
        live_B = load_BLE.any((1, 2))
        share, said = (
            x[live_B] / np.maximum(x[live_B].sum(2, keepdims=True), 1e-12) for x in (load_BLE, foreseen_BLE)
        )
        self._wrong_L = self._wrong_L + 0.5 * np.abs(share - said).sum((0, 2))
        self._passes += int(live_B.sum())
        return foreseen_BLE

    @property
    def distance_L(self) -> FloatArray:
        """Total-variation distance of predicted from actual loads, mean over the passes, by layer."""
        return np.atleast_1d(self._wrong_L) / max(self._passes, 1)


def foreseer(
    name: str,
    *,
    error: float,
    distance: int,
    seed: int = 0,
    composition: Composition | None = None,
    predictions: Predictions | None = None,
    learnt: IntArray | None = None,
    items: Iterator[StepTokens] | None = None,
) -> Foreseer:
    """A predictor by its name, fresh for one run.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    error : float
        Of *assumed*.
    distance : int
        Layers ahead.
    seed : int
        For *assumed*.
    composition : Composition, optional
        The traffic, where it is composed of token traces.
    predictions : Predictions, optional
        Predictions beside those traces.
    learnt : array of int, optional
        Requests of the traces that *affinity* learns from, where the recording brings no transitions.
    items : iterator of StepTokens, optional
        Rows that the passes route, where they follow from more than `composition`.

    Raises
    ------
    ProblemError
        If there is no such predictor, or it needs what is not there.
    """
    history: dict[str, Callable[[], Predictor]] = {
        "last": LastWindow,
        "ewma": Ewma,
        "ar": AutoRegressive,
    }
    if name == "assumed":
        return Assumed(error, seed=seed)
    if name in history:
        return Online(history[name](), distance)
    if name not in NAMES:
        raise ProblemError("predictor", f"{name!r} is unknown; there are {', '.join(NAMES)}")
    if composition is None:
        raise ProblemError("predictor", f"{name!r} needs token traces; generated routing has no tokens")
    if name == "affinity":
        return _affinity(composition.traces, distance, predictions, learnt)
    if predictions is None:
        raise ProblemError("predictor", f"{name!r} needs recorded predictions; give a file of them")
    return Recorded(predictions, items or composition.tokens(), _KINDS[name], distance)


def _affinity(
    traces: RoutedRequests, distance: int, predictions: Predictions | None, learnt: IntArray | None
) -> Online:
    layers = traces.experts_TLK.shape[1]
    if predictions is not None and predictions.transitions_DLEE is not None:
        return Online(
            Affinity.counted(predictions.transitions_DLEE),
            distance,
            f"learnt on the training requests of {predictions.source}",
        )
    if learnt is None:
        raise ProblemError("predictor", "'affinity' needs requests to learn from")
    rows = np.concatenate([np.arange(traces.offsets[i], traces.offsets[i + 1]) for i in learnt])
    affinity = Affinity(layers, traces.experts, furthest=distance).learn(traces.experts_TLK[rows])
    return Online(affinity, distance, f"learnt on {len(learnt)} requests that the traffic leaves out")
