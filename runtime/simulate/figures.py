"""The paper's figures, by name: which runs each is made of, and how it is drawn.

A `Figure` is a `Scenario` (what the command line says goes before it), variants to run one after the other,
and a way to draw the rows that come out (`drawing`); nothing here simulates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moeless_opt.runtime.simulate.drawing import (
    AHEAD,
    DISTANCE,
    HELD,
    MOVED,
    Drawing,
    against_baseline,
    beyond_bound,
    cost,
    cost_change,
    latency,
    lines,
    predictors,
    table_bars,
)
from moeless_opt.runtime.simulate.foresight import TINY_MOE
from moeless_opt.runtime.simulate.options import checked
from moeless_opt.runtime.simulate.policies import ABLATION, READINGS
from moeless_opt.runtime.simulate.scenario import Scenario, ignored

__all__ = ["FIGURES", "PAPER_MODELS", "Figure"]

PAPER_MODELS = ("Mixtral-8x7B", "Phi-3.5-MoE", "Llama-4-Scout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How to make one.

    Parameters
    ----------
    text : str
        What it shows.
    scenario : Scenario
        What is run.
    models : sequence of str
        Each in its turn; by default the scenario's.
    variants : sequence of (label, fields of the scenario)
        Runs; one without a label by default.
    draw : callable
        Draws the rows (see `drawing`).
    size : (float, float)
        Inches.
    """

    text: str
    scenario: Scenario
    draw: Drawing
    models: tuple[str, ...] = ()
    variants: Sequence[tuple[str, Mapping[str, Any]]] = ()
    size: tuple[float, float] = (9.0, 3.6)

    def varied(self, given: Mapping[str, Any]) -> Scenario:
        """Its scenario where `given` says nothing else; what `given` makes idle gives way."""
        given = checked(Scenario, given)
        own = {part.name: getattr(self.scenario, part.name) for part in fields(Scenario)}
        default = {part.name: part.default for part in fields(Scenario)}
        if given.get("model", own["model"]) != own["model"]:  # the traces are its own model's
            own["traces"] = None
        for name in ignored({**own, **given}):
            if name not in given:
                own[name] = default[name]
        return Scenario(**{**own, **given})


def _each(option: str, values: Sequence[Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((str(value), {option: value}) for value in values)


def _scaled(shapes: Mapping[str, int], rate_per_gpu: float) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """More GPUs, with so many slots per layer, and as much more traffic."""
    found = []
    for shape, slots in shapes.items():
        nodes, per_node = map(int, shape.split("x"))
        gpus = nodes * per_node
        found.append((str(gpus), {"topology": shape, "slots": slots, "rate": rate_per_gpu * gpus}))
    return tuple(found)


FIGURES: dict[str, Figure] = {
    "latency": Figure(
        text="MoE layer latency of all policies on the paper's models: distribution, mean, P99",
        scenario=Scenario(seconds=300.0),
        models=PAPER_MODELS,
        draw=latency,
        size=(12.5, 6.4),
    ),
    "cost": Figure(
        text="cost of all policies on the paper's models, by charging rule",
        scenario=Scenario(seconds=300.0),
        models=PAPER_MODELS,
        draw=cost,
        size=(12.5, 3.8),
    ),
    "ablation": Figure(
        text="MoEless without its predictor, scaler, placer",
        scenario=Scenario(policies=ABLATION, seconds=150.0),
        models=PAPER_MODELS,
        draw=against_baseline,
        size=(11.0, 3.8),
    ),
    "readings": Figure(
        text="each method in all its readings: intervals, waiting, warm replicas",
        scenario=Scenario(policies=READINGS, seconds=60.0),
        models=PAPER_MODELS,
        draw=against_baseline,
        size=(14.0, 4.2),
    ),
    "cv": Figure(
        text="the scaler's threshold: looser is cheaper and slower",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "moeless"), seconds=150.0),
        variants=_each("cv", (0.2, 0.4, 0.6, 0.8, 1.0)),
        draw=lines("CV threshold of MoEless's scaler", HELD, cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "distance": Figure(
        text="layers ahead of the prediction, error assumed",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "moeless", "ours"), seconds=150.0),
        variants=_each("distance", (1, 2, 3, 4, 5)),
        draw=lines("prediction distance, layers", DISTANCE),
    ),
    "distance-recorded": Figure(
        text="layers ahead of the prediction, trained gates recorded on the tiny MoE",
        scenario=Scenario(
            model=TINY_MOE.name,
            sizes="Phi-3.5-MoE",
            rate=32.0,
            predictor="recorded",
            policies=("static", "moeless", "ours"),
            seconds=150.0,
        ),
        variants=_each("distance", (1, 2, 3, 4, 5)),
        draw=lines("prediction distance, layers", AHEAD),
    ),
    "keep-alive": Figure(
        text="seconds that unused replicas stay",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "moeless", "ours"), seconds=150.0),
        variants=_each("keep_alive", (0, 1, 10, 60, "adaptive")),
        draw=lines("keep-alive, seconds", HELD, cost_change("resident")),
        size=(11.0, 3.6),
    ),
    "memory": Figure(
        text="memory cap: replicas that a GPU may hold of each layer (static needs 2)",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "eplb", "moeless", "ours"), seconds=150.0),
        variants=_each("slots", (2, 3, 4, 5)),
        draw=lines("replicas per GPU and layer", HELD, cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "error": Figure(
        text="how much a wrong prediction costs",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "moeless", "ours"), seconds=150.0),
        variants=_each("error", (0.0, 0.02, 0.05, 0.1, 0.2)),
        draw=lines("assumed share of pairs mispredicted", DISTANCE),
    ),
    "gain": Figure(
        text="what a load has to save of its layer's time: latency against bytes moved",
        scenario=Scenario(model="Phi-3.5-MoE", policies=("static", "moeless", "ours"), seconds=150.0),
        variants=_each("gain", (0.0, 0.005, 0.02, 0.05, 0.1)),
        draw=lines("least saving of a load (ours), share of a layer", MOVED, cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "oracle": Figure(
        text="how near to the oracle: layers ahead, and spare slots",
        scenario=Scenario(policies=("static", "oracle", "moeless", "ours"), seconds=150.0),
        models=PAPER_MODELS[:2],  # the third has no room for spare slots
        # Errors such that predictions are as wrong as the trained gates of the tiny MoE, reading prompts.
        variants=tuple(
            (f"{ahead} ahead, {spare} spare", {"distance": ahead, "spare": spare, "error": error})
            for ahead, error in ((1, 0.1), (3, 0.04))
            for spare in (1, 2)
        ),
        draw=beyond_bound,
        size=(12.5, 4.0),
    ),
    "predictors": Figure(
        text="real predictors on the tiny MoE's routing, experts sized as Phi-3.5-MoE's",
        scenario=Scenario(
            model=TINY_MOE.name,
            sizes="Phi-3.5-MoE",
            rate=32.0,
            policies=("static", "oracle", "moeless", "ours"),
            seconds=150.0,
        ),
        variants=_each("predictor", ("last", "ewma", "ar", "affinity", "gate", "recorded", "assumed")),
        draw=predictors,
        size=(10.0, 3.8),
    ),
    "scale": Figure(
        text="DeepSeek-V3 on 32 to 2,048 GPUs, traffic in proportion",
        scenario=Scenario(
            model="DeepSeek-V3",
            topology="4x8xH100",
            batching="continuous",
            policies=("static", "eplb", "ours-windowed"),
            seconds=8.0,
        ),
        variants=_scaled({"4x8": 9, "16x8": 3, "64x8": 1, "256x8": 1}, 0.1),
        draw=lines("GPUs", ("largest over mean GPU tokens", lambda row, _: row["imbalance"]), log=True),
    ),
    "gpt-oss": Figure(
        text="gpt-oss-20b's own token traces at real arrivals on 8 GPUs",
        scenario=Scenario(
            model="gpt-oss-20b",
            traces=Path("gptoss20b_topk.npz"),
            slots=5,
            policies=("static", "eplb", "oracle", "moeless", "stay", "ours-windowed", "ours"),
            seconds=150.0,
        ),
        draw=table_bars,
        size=(12.0, 3.4),
    ),
}
"""Figures by name."""
