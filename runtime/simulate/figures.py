"""The paper's figures, by name: which runs each is made of, and how it is drawn.

A `Figure` is options for ``moeless-simulate`` (what the command line says goes before them), variants to run
one after the other, and a way to draw the rows that come out; nothing here simulates. Drawing needs
matplotlib (the extra ``plot``), which is imported when something is drawn. Colours are those of Okabe and
Ito, which colour-blind readers tell apart; a policy has the same one in every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FIGURES", "Figure", "draw", "draw_distributions"]

Row = dict[str, Any]
Read = Callable[[Row, Row], float]

COLOURS = {
    "static": "#000000",
    "eplb": "#E69F00",
    "oracle": "#999999",
    "moeless": "#D55E00",
    "moeless-no-predictor": "#009E73",
    "moeless-no-scaler": "#56B4E9",
    "moeless-no-placer": "#CC79A7",
    "stay": "#F0E442",
    "ours-windowed": "#56B4E9",
    "ours": "#0072B2",
}
MARKERS = dict(zip(COLOURS, "os^DvP*X<>", strict=False))
SPARE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How to make one.

    Parameters
    ----------
    text : str
        What it shows.
    options : mapping
        Of the command, by attribute; where the command line says nothing else.
    variants : sequence of (label, options)
        Runs; one without a label by default.
    draw : callable
        Axes are drawn into a matplotlib figure from the rows.
    size : (float, float)
        Inches.
    """

    text: str
    options: Mapping[str, Any]
    draw: Callable[[Any, list[Row]], None]
    variants: Sequence[tuple[str, Mapping[str, Any]]] = ()
    size: tuple[float, float] = (9.0, 3.6)


def draw(figure: Figure, rows: list[Row], path: Path) -> None:
    """Draw a figure's rows into a file (.png, .svg, ...)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained", dpi=88)
    figure.draw(canvas, rows)
    canvas.savefig(path)


def draw_distributions(rows: list[Row], path: Path) -> None:
    """Draw the latencies' distribution functions alone, a panel per model and variant."""
    panels = len(_panels(rows))
    shape = Figure(text="", options={}, draw=_distributions, size=(4.5 * panels, 3.6))
    draw(shape, rows, path)


# ------------------------------------------------------------------------------------------- drawing


def _panels(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row['model']} {row['variant']}".strip(), []).append(row)
    return found


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _policies(rows: list[Row], *without: str) -> list[str]:
    return [p for p in dict.fromkeys(row["policy"] for row in rows) if p not in without]


def _distributions(canvas: Any, rows: list[Row]) -> None:
    panels = _panels(rows)
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    _step_panels(axes, panels)
    _legend(canvas, axes[0])


def _step_panels(axes: Any, panels: dict[str, list[Row]]) -> None:
    for axis, (title, group) in zip(axes, panels.items(), strict=True):
        for row in group:
            levels = np.linspace(0, 1, len(row["quantiles_ms"]))
            name = row["policy"]
            axis.step(
                row["quantiles_ms"], levels, where="post", label=name, color=COLOURS[name], linewidth=1.3
            )
        axis.set(title=title, xlabel="MoE layer latency, ms (simulated)", xscale="log", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of layers and passes")


def _latency(canvas: Any, rows: list[Row]) -> None:
    """Distribution functions above; means and P99 below."""
    panels = _panels(rows)
    axes = canvas.subplots(2, len(panels), squeeze=False)
    _step_panels(axes[0], panels)
    for axis, group in zip(axes[1], panels.values(), strict=True):
        names = [row["policy"] for row in group]
        at = np.arange(len(names))
        colours = [COLOURS[name] for name in names]
        axis.bar(at, [row["p99_ms"] for row in group], color=colours, alpha=0.3)
        bars = axis.bar(at, [row["mean_ms"] for row in group], color=colours, width=0.55)
        axis.bar_label(bars, [f"{row['mean_ms']:.1f}" for row in group], fontsize=8)
        axis.set_xticks(at, names, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    _legend(canvas, axes[0][0])
    axes[1][0].set_ylabel("ms: mean (solid), P99 (pale)")


def _cost(canvas: Any, rows: list[Row]) -> None:
    """Cost against static by charging rule, a panel per model."""
    models = _models(rows)
    axes = canvas.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        group = [row for row in rows if row["model"] == model]
        base = next(row for row in group if row["policy"] == "static")["cost"]
        names = _policies(group, "static")
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            cost = next(row for row in group if row["policy"] == name)["cost"]
            change = [100 * (cost[rule] / base[rule] - 1) for rule in base]
            at = np.arange(len(base)) + (i - (len(names) - 1) / 2) * width
            axis.bar(at, change, width, color=COLOURS[name], label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(base)), list(base))
        axis.set(title=model, xlabel="charging rule")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("cost (GB*s) against static, %")
    _legend(canvas, axes[-1])


def _against_static(canvas: Any, rows: list[Row]) -> None:
    """Mean latency against static, bars by policy."""
    models = _models(rows)
    axes = canvas.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        group = [row for row in rows if row["model"] == model]
        base = next(row for row in group if row["policy"] == "static")["mean_ms"]
        group = [row for row in group if row["policy"] != "static"]
        names = [row["policy"] for row in group]
        change = [100 * (row["mean_ms"] / base - 1) for row in group]
        bars = axis.bar(range(len(names)), change, color=[COLOURS[name] for name in names])
        axis.bar_label(bars, [f"{value:+.1f}" for value in change], fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(model)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("mean MoE layer latency\nagainst static, %")


def _lines(xlabel: str, *further: tuple[str, Read], log: bool = False) -> Callable[[Any, list[Row]], None]:
    """Panels over the variants: mean latency, and what else is read off a row and static's."""

    def drawn(canvas: Any, rows: list[Row]) -> None:
        labels = list(dict.fromkeys(row["variant"] for row in rows))
        base = {row["variant"]: row for row in rows if row["policy"] == "static"}
        panels = (("mean MoE layer latency, ms", _mean), *further)
        axes = canvas.subplots(1, len(panels))
        for axis, (ylabel, read) in zip(axes, panels, strict=True):
            for name in _policies(rows):
                found = {row["variant"]: row for row in rows if row["policy"] == name}
                values = [read(found[label], base[label]) if label in found else np.nan for label in labels]
                if not np.isnan(values).all():
                    axis.plot(labels, values, color=COLOURS[name], marker=MARKERS[name], label=name)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            if log:
                _log(axis)
            axis.grid(alpha=0.3)
        _legend(canvas, axes[0], ", ".join(_models(rows)))

    return drawn


def _log(axis: Any) -> None:
    """A logarithmic axis with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(canvas: Any, axis: Any, title: str | None = None) -> None:
    """Above all panels, where it hides nothing."""
    handles, names = axis.get_legend_handles_labels()
    canvas.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=len(names),
        fontsize=8,
        title=title,
        title_fontsize=9,
        frameon=False,
    )


def _mean(row: Row, _: Row) -> float:
    return float(row["mean_ms"])


def _held(row: Row, _: Row) -> float:
    return float(row["held"])


def _cost_change(rule: str) -> tuple[str, Read]:
    return (
        f"cost against static, %\n(rule '{rule}')",
        lambda row, base: 100 * (row["cost"][rule] / base["cost"][rule] - 1),
    )


def _foreseen(row: Row, _: Row) -> float:
    return float(row["foreseen"]) if row["foreseen"] is not None else float("nan")


def _moved(row: Row, _: Row) -> float:
    return float(row["moved_per_pass"])


def _ahead(row: Row, _: Row) -> float:
    return float(row["foreseen_ahead"]) if row["foreseen_ahead"] is not None else float("nan")


_HELD = ("replicas held", _held)
_MOVED = ("replicas moved per pass", _moved)
_DISTANCE = ("predictions: total variation\nfrom the actual loads", _foreseen)


def _predictors(canvas: Any, rows: list[Row]) -> None:
    """Latency of each policy by predictor, and how wrong each predictor was."""
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    left, right = canvas.subplots(1, 2)
    names = _policies(rows, "static", "oracle")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = {row["variant"]: row for row in rows if row["policy"] == name}
        at = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * width
        left.bar(at, [found[label]["mean_ms"] for label in labels], width, color=COLOURS[name], label=name)
    for name, style in (("static", "--"), ("oracle", ":")):
        level = [row["mean_ms"] for row in rows if row["policy"] == name]
        if level:
            left.axhline(level[0], color=COLOURS[name], linestyle=style, label=name)
    left.set_ylabel("mean MoE layer latency, ms")
    wrong = {row["variant"]: row["foreseen"] for row in rows if row["foreseen"] is not None}
    bars = right.bar(range(len(labels)), [wrong[label] for label in labels], color=SPARE[0])
    right.bar_label(bars, [f"{wrong[label]:.3f}" for label in labels], fontsize=8)
    right.set_ylabel(_DISTANCE[0])
    for axis in (left, right):
        axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    _legend(canvas, left)


def _beyond_oracle(canvas: Any, rows: list[Row]) -> None:
    """How far from the oracle each policy is, by variant, a panel per model."""
    models = _models(rows)
    axes = canvas.subplots(1, len(models), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    names = _policies(rows, "static", "oracle")
    width = 0.8 / len(names)
    for axis, model in zip(axes, models, strict=True):
        mean = {(row["variant"], row["policy"]): row["mean_ms"] for row in rows if row["model"] == model}
        for i, name in enumerate(names):
            at = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * width
            beyond = [100 * (mean[label, name] / mean[label, "oracle"] - 1) for label in labels]
            bars = axis.bar(at, beyond, width, color=COLOURS[name], label=name)
            axis.bar_label(bars, [f"{x:+.1f}" for x in beyond], fontsize=7)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
        axis.set_title(model)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("mean MoE layer latency beyond the oracle's, %")
    _legend(canvas, axes[0])


def _table_bars(canvas: Any, rows: list[Row]) -> None:
    """Latency, replicas, bytes moved and cost of every policy."""
    names = [row["policy"] for row in rows]
    colours = [COLOURS[name] for name in names]
    panels: tuple[tuple[str, Callable[[Row], float], str], ...] = (
        ("mean MoE layer latency, ms", lambda row: row["mean_ms"], "{:.3f}"),
        ("replicas held", lambda row: row["held"], "{:.0f}"),
        ("weights moved, GB", lambda row: row["moved_GB"], "{:,.0f}"),
        ("cost, GB*s (rule 'passes')", lambda row: row["cost"]["passes"], "{:,.0f}"),
    )
    axes = canvas.subplots(1, len(panels))
    for axis, (title, read, form) in zip(axes, panels, strict=True):
        bars = axis.barh(range(len(names)), [read(row) for row in rows], color=colours)
        axis.bar_label(bars, fmt=form, fontsize=8, padding=2)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)


# ------------------------------------------------------------------------------------------- figures

_PAPER = ("Mixtral-8x7B", "Phi-3.5-MoE", "Llama-4-Scout")
_ALL = "static,eplb,oracle,moeless,ours-windowed,ours"


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
        options={"model": list(_PAPER), "policies": _ALL, "seconds": 300.0},
        draw=_latency,
        size=(12.5, 6.4),
    ),
    "cost": Figure(
        text="cost of all policies on the paper's models, by charging rule",
        options={"model": list(_PAPER), "policies": _ALL, "seconds": 300.0},
        draw=_cost,
        size=(12.5, 3.8),
    ),
    "ablation": Figure(
        text="MoEless without its predictor, scaler, placer",
        options={"model": list(_PAPER), "policies": "ablation"},
        draw=_against_static,
        size=(11.0, 3.8),
    ),
    "cv": Figure(
        text="the scaler's threshold: looser is cheaper and slower",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,moeless"},
        variants=_each("cv", (0.2, 0.4, 0.6, 0.8, 1.0)),
        draw=_lines("CV threshold of MoEless's scaler", _HELD, _cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "distance": Figure(
        text="layers ahead of the prediction, error assumed",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,moeless,ours"},
        variants=_each("distance", (1, 2, 3, 4, 5)),
        draw=_lines("prediction distance, layers", _DISTANCE),
    ),
    "distance-recorded": Figure(
        text="layers ahead of the prediction, trained gates recorded on the tiny MoE",
        options={
            "model": ["tiny-moe"],
            "sizes": "Phi-3.5-MoE",
            "rate": 32.0,
            "predictor": "recorded",
            "policies": "static,moeless,ours",
        },
        variants=_each("distance", (1, 2, 3, 4, 5)),
        draw=_lines(
            "prediction distance, layers",
            ("total variation of the predictions\nthat a gate makes", _ahead),
        ),
    ),
    "keep-alive": Figure(
        text="seconds that unused replicas stay",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,moeless,ours"},
        variants=_each("keep_alive", ("0", "1", "10", "60", "adaptive")),
        draw=_lines("keep-alive, seconds", _HELD, _cost_change("resident")),
        size=(11.0, 3.6),
    ),
    "memory": Figure(
        text="memory cap: replicas that a GPU may hold of each layer (static needs 2)",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,eplb,moeless,ours"},
        variants=_each("slots", (2, 3, 4, 5)),
        draw=_lines("replicas per GPU and layer", _HELD, _cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "error": Figure(
        text="how much a wrong prediction costs",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,moeless,ours"},
        variants=_each("error", (0.0, 0.02, 0.05, 0.1, 0.2)),
        draw=_lines("assumed share of pairs mispredicted", _DISTANCE),
    ),
    "gain": Figure(
        text="what a load has to save of its layer's time: latency against bytes moved",
        options={"model": ["Phi-3.5-MoE"], "policies": "static,moeless,ours"},
        variants=_each("gain", (0.0, 0.005, 0.02, 0.05, 0.1)),
        draw=_lines("least saving of a load (ours), share of a layer", _MOVED, _cost_change("passes")),
        size=(11.0, 3.6),
    ),
    "oracle": Figure(
        text="how near to the oracle: layers ahead, and spare slots",
        options={"model": list(_PAPER), "policies": "static,oracle,moeless,ours"},
        # Errors such that predictions are as wrong as the trained gates of the tiny MoE, reading prompts.
        variants=tuple(
            (f"{ahead} ahead, {spare} spare", {"distance": ahead, "spare": spare, "error": error})
            for ahead, error in ((1, 0.1), (3, 0.04))
            for spare in (1, 2)
        ),
        draw=_beyond_oracle,
        size=(12.5, 4.0),
    ),
    "predictors": Figure(
        text="real predictors on the tiny MoE's routing, experts sized as Phi-3.5-MoE's",
        options={
            "model": ["tiny-moe"],
            "sizes": "Phi-3.5-MoE",
            "rate": 32.0,
            "policies": "static,oracle,moeless,ours",
        },
        variants=_each("predictor", ("last", "ewma", "ar", "affinity", "gate", "recorded", "assumed")),
        draw=_predictors,
        size=(10.0, 3.8),
    ),
    "scale": Figure(
        text="DeepSeek-V3 on 32 to 2,048 GPUs, traffic in proportion",
        options={
            "model": ["DeepSeek-V3"],
            "gpu": "H100",
            "batching": "continuous",
            "policies": "static,eplb,ours-windowed",
            "seconds": 8.0,
        },
        variants=_scaled({"4x8": 9, "16x8": 3, "64x8": 1, "256x8": 1}, 0.1),
        draw=_lines("GPUs", ("largest over mean GPU tokens", lambda row, _: row["imbalance"]), log=True),
    ),
    "gpt-oss": Figure(
        text="gpt-oss-20b's own token traces at real arrivals on 8 GPUs",
        options={
            "model": ["gpt-oss-20b"],
            "traces": "gptoss20b_topk.npz",
            "slots": 5,
            "policies": "static,eplb,oracle,moeless,stay,ours-windowed,ours",
        },
        draw=_table_bars,
        size=(12.0, 3.4),
    ),
}
"""Figures by name."""
