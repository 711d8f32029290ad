"""Pictures of rows: distributions, bars, lines over variants.

Drawing needs matplotlib (the extra ``plot``), which is imported when something is drawn. Colours are those of
Okabe and Ito, which colour-blind readers tell apart; a policy brings its own and has it in every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.plots import picture, picture_format
from moeless_opt.problems.files import atomic_write
from moeless_opt.runtime.simulate.policies import BASELINE, BOUND, SYSTEM, Policy
from moeless_opt.runtime.simulate.report import SimRow

__all__ = [
    "AHEAD",
    "DISTANCE",
    "HELD",
    "MOVED",
    "Drawing",
    "Drawn",
    "against_baseline",
    "beyond_bound",
    "cost",
    "cost_change",
    "distributions",
    "latency",
    "lines",
    "predictors",
    "save_drawing",
    "table_bars",
]

Read = Callable[[SimRow, SimRow], float]

BARS = "#0072B2"
"""Of what belongs to no policy."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows to draw, and the policies that they are of.

    Parameters
    ----------
    rows : sequence of SimRow
        Of all models and variants.
    policies : sequence of Policy
        Whose colours and markers are used.
    """

    rows: Sequence[SimRow]
    policies: Sequence[Policy]

    def panels(self) -> dict[str, list[SimRow]]:
        """Rows of each model and variant."""
        found: dict[str, list[SimRow]] = {}
        for row in self.rows:
            found.setdefault(f"{row['model']} {row['variant']}".strip(), []).append(row)
        return found

    def models(self) -> list[str]:
        """Models, in order."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    def variants(self) -> list[str]:
        """Labels of the variants, in order."""
        return list(dict.fromkeys(row["variant"] for row in self.rows))

    def of(self, model: str) -> list[SimRow]:
        """Rows of a model."""
        return [row for row in self.rows if row["model"] == model]

    def named(self, *parts: str) -> list[Policy]:
        """Policies that play one of these parts (by default any)."""
        return [policy for policy in self.policies if not parts or policy.part in parts]

    def baseline(self, rows: Sequence[SimRow]) -> SimRow:
        """What the others are set against."""
        names = {policy.name for policy in self.named(BASELINE)}
        return next(row for row in rows if row["policy"] in names)

    def colours(self, rows: Sequence[SimRow]) -> list[str]:
        """Of the rows' policies."""
        known = {policy.name: policy.colour for policy in self.policies}
        return [known[row["policy"]] for row in rows]


Drawing = Callable[[Any, Drawn], None]
"""Draws axes into a matplotlib figure."""


def save_drawing(
    drawing: Drawing, drawn: Drawn, path: Path, *, size: tuple[float, float] | None = None
) -> None:
    """Draw rows into a file (.png, .svg, .pdf); `size` in inches, by default as wide as there are panels."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size or (4.5 * len(drawn.panels()), 3.6), layout="constrained", dpi=88)
    drawing(canvas, drawn)
    atomic_write(path, picture(canvas, picture_format(path)))


def distributions(canvas: Any, drawn: Drawn) -> None:
    """Distribution functions of the latency, a panel per model and variant."""
    axes = canvas.subplots(1, len(drawn.panels()), squeeze=False)[0]
    _step_panels(axes, drawn)
    _legend(canvas, axes[0])


def _step_panels(axes: Any, drawn: Drawn) -> None:
    for axis, (title, group) in zip(axes, drawn.panels().items(), strict=True):
        for row, colour in zip(group, drawn.colours(group), strict=True):
            levels = np.linspace(0, 1, len(row["quantiles_ms"]))
            axis.step(
                row["quantiles_ms"], levels, where="post", label=row["policy"], color=colour, linewidth=1.3
            )
        axis.set(title=title, xlabel="MoE layer latency, ms (simulated)", xscale="log", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of layers and passes")


def latency(canvas: Any, drawn: Drawn) -> None:
    """Distribution functions above; means and P99 below."""
    panels = drawn.panels()
    axes = canvas.subplots(2, len(panels), squeeze=False)
    _step_panels(axes[0], drawn)
    for axis, group in zip(axes[1], panels.values(), strict=True):
        names = [row["policy"] for row in group]
        at = np.arange(len(names))
        colours = drawn.colours(group)
        axis.bar(at, [row["p99_ms"] for row in group], color=colours, alpha=0.3)
        bars = axis.bar(at, [row["mean_ms"] for row in group], color=colours, width=0.55)
        axis.bar_label(bars, [f"{row['mean_ms']:.1f}" for row in group], fontsize=8)
        axis.set_xticks(at, names, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    _legend(canvas, axes[0][0])
    axes[1][0].set_ylabel("ms: mean (solid), P99 (pale)")


def cost(canvas: Any, drawn: Drawn) -> None:
    """Cost against static by charging rule, a panel per model."""
    models = drawn.models()
    axes = canvas.subplots(1, len(models), squeeze=False, sharey=True)[0]
    others = drawn.named(SYSTEM, BOUND)
    width = 0.8 / len(others)
    for axis, model in zip(axes, models, strict=True):
        group = drawn.of(model)
        base = drawn.baseline(group)["cost"]
        for i, policy in enumerate(others):
            cost = next(row for row in group if row["policy"] == policy.name)["cost"]
            change = [100 * (cost[rule] / base[rule] - 1) for rule in base]
            at = np.arange(len(base)) + (i - (len(others) - 1) / 2) * width
            axis.bar(at, change, width, color=policy.colour, label=policy.name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(base)), list(base))
        axis.set(title=model, xlabel="charging rule")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("cost (GB*s) against static, %")
    _legend(canvas, axes[-1])


def against_baseline(canvas: Any, drawn: Drawn) -> None:
    """Mean latency against static, bars by policy."""
    models = drawn.models()
    axes = canvas.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        base = drawn.baseline(drawn.of(model))
        group = [row for row in drawn.of(model) if row is not base]
        names = [row["policy"] for row in group]
        change = [100 * (row["mean_ms"] / base["mean_ms"] - 1) for row in group]
        bars = axis.bar(range(len(names)), change, color=drawn.colours(group))
        axis.bar_label(bars, [f"{value:+.1f}" for value in change], fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(model)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("mean MoE layer latency\nagainst static, %")


def lines(xlabel: str, *further: tuple[str, Read], log: bool = False) -> Callable[[Any, Drawn], None]:
    """Panels over the variants: mean latency, and what else is read off a row and the baseline's."""

    def panels_of(canvas: Any, drawn: Drawn) -> None:
        labels = drawn.variants()
        base = {
            label: drawn.baseline([row for row in drawn.rows if row["variant"] == label]) for label in labels
        }
        panels = (("mean MoE layer latency, ms", _mean), *further)
        axes = canvas.subplots(1, len(panels))
        for axis, (ylabel, read) in zip(axes, panels, strict=True):
            for policy in drawn.policies:
                found = {row["variant"]: row for row in drawn.rows if row["policy"] == policy.name}
                values = [read(found[label], base[label]) if label in found else np.nan for label in labels]
                if not np.isnan(values).all():
                    axis.plot(labels, values, color=policy.colour, marker=policy.marker, label=policy.name)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            if log:
                _log(axis)
            axis.grid(alpha=0.3)
        _legend(canvas, axes[0], ", ".join(drawn.models()))

    return panels_of


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


def _mean(row: SimRow, _: SimRow) -> float:
    return float(row["mean_ms"])


def _held(row: SimRow, _: SimRow) -> float:
    return float(row["held"])


def cost_change(rule: str) -> tuple[str, Read]:
    """Cost against the baseline's by a charging rule, a panel of `lines`."""
    return (
        f"cost against static, %\n(rule '{rule}')",
        lambda row, base: 100 * (row["cost"][rule] / base["cost"][rule] - 1),
    )


def _foreseen(row: SimRow, _: SimRow) -> float:
    return float(row["foreseen"]) if row["foreseen"] is not None else float("nan")


def _moved(row: SimRow, _: SimRow) -> float:
    return float(row["moved_per_pass"])


def _ahead(row: SimRow, _: SimRow) -> float:
    return float(row["foreseen_ahead"]) if row["foreseen_ahead"] is not None else float("nan")


HELD = ("replicas held", _held)
MOVED = ("replicas moved per pass", _moved)
AHEAD = ("total variation of the predictions\nthat a gate makes", _ahead)
DISTANCE = ("predictions: total variation\nfrom the actual loads", _foreseen)


def predictors(canvas: Any, drawn: Drawn) -> None:
    """Latency of each policy by predictor, and how wrong each predictor was."""
    labels, rows = drawn.variants(), drawn.rows
    left, right = canvas.subplots(1, 2)
    systems = drawn.named(SYSTEM)
    width = 0.8 / len(systems)
    for i, policy in enumerate(systems):
        found = {row["variant"]: row for row in rows if row["policy"] == policy.name}
        at = np.arange(len(labels)) + (i - (len(systems) - 1) / 2) * width
        mean = [found[label]["mean_ms"] for label in labels]
        left.bar(at, mean, width, color=policy.colour, label=policy.name)
    for part, style in ((BASELINE, "--"), (BOUND, ":")):
        for policy in drawn.named(part):
            level = next(row["mean_ms"] for row in rows if row["policy"] == policy.name)
            left.axhline(level, color=policy.colour, linestyle=style, label=policy.name)
    left.set_ylabel("mean MoE layer latency, ms")
    wrong = {row["variant"]: row["foreseen"] for row in rows if row["foreseen"] is not None}
    bars = right.bar(range(len(labels)), [wrong[label] for label in labels], color=BARS)
    right.bar_label(bars, [f"{wrong[label]:.3f}" for label in labels], fontsize=8)
    right.set_ylabel(DISTANCE[0])
    for axis in (left, right):
        axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    _legend(canvas, left)


def beyond_bound(canvas: Any, drawn: Drawn) -> None:
    """How far from the oracle each policy is, by variant, a panel per model."""
    models, labels = drawn.models(), drawn.variants()
    axes = canvas.subplots(1, len(models), sharey=True, squeeze=False)[0]
    systems, (bound, *_) = drawn.named(SYSTEM), drawn.named(BOUND)
    width = 0.8 / len(systems)
    for axis, model in zip(axes, models, strict=True):
        mean = {(row["variant"], row["policy"]): row["mean_ms"] for row in drawn.of(model)}
        for i, policy in enumerate(systems):
            at = np.arange(len(labels)) + (i - (len(systems) - 1) / 2) * width
            beyond = [100 * (mean[label, policy.name] / mean[label, bound.name] - 1) for label in labels]
            bars = axis.bar(at, beyond, width, color=policy.colour, label=policy.name)
            axis.bar_label(bars, [f"{x:+.1f}" for x in beyond], fontsize=7)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
        axis.set_title(model)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("mean MoE layer latency beyond the oracle's, %")
    _legend(canvas, axes[0])


def table_bars(canvas: Any, drawn: Drawn) -> None:
    """Latency, replicas, bytes moved and cost of every policy."""
    rows, colours = drawn.rows, drawn.colours(drawn.rows)
    names = [row["policy"] for row in rows]
    panels: tuple[tuple[str, Callable[[SimRow], float], str], ...] = (
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
