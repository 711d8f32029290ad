"""``simulate(scenario)``: every policy of a scenario over the same traffic, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.plots import need_matplotlib
from moeless_opt.problems.errors import ProblemError
from moeless_opt.report import table
from moeless_opt.runtime.pool import RULES
from moeless_opt.runtime.simulate.drawing import Drawn, distributions, save_drawing
from moeless_opt.runtime.simulate.drive import drive
from moeless_opt.runtime.simulate.foresight import JudgedForeseer, foreseer
from moeless_opt.runtime.simulate.policies import BASELINE, Policy, Run
from moeless_opt.runtime.simulate.report import SimReport, SimRow
from moeless_opt.runtime.simulate.routes import PlayedRoutes
from moeless_opt.runtime.simulate.scenario import Scenario
from moeless_opt.runtime.simulate.scene import Scene, scene
from moeless_opt.runtime.simulate.serving import ClosedLoop

__all__ = ["LEGEND", "Simulation", "simulate"]

Told = Callable[[str, float, float], None]

QUANTILES = 201
"""Points of a latency's distribution function."""

LEGEND = "\n".join(
    (
        "mean, P99: latency of a MoE layer in one pass: all-to-all, experts, waiting for weights",
        "vs NAME: mean latency against that policy's; wait: mean of the waiting alone",
        "imbal.: largest over mean GPU tokens, sums of both",
        "held: replicas in memory over all layers, mean over the time of passes",
        "moved: replicas loaded, and bytes in all",
        "foreseen: total-variation distance of predicted from actual loads, mean over layers and passes",
        "plan: median, on this machine",
        "busy: share of the time in which passes run (near 1: it falls behind)",
        "cost in GB*s, and against the baseline's, by charging rule:",
        *(f"  {rule}: {text}" for rule, text in RULES.items()),
    )
)
"""What the columns of a table mean."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What came of a scenario; prints as a table.

    Parameters
    ----------
    scenario : Scenario
        What was simulated.
    rows : tuple of SimRow
        One per policy, in the order asked for.
    text : tuple of str
        Model, machine, traffic, routing, settings, for people.
    basis : mapping of str to tuple of str
        What is measured, computed, composed and assumed.
    policies : tuple of Policy
        Those of the rows.
    """

    scenario: Scenario
    rows: tuple[SimRow, ...]
    text: tuple[str, ...]
    basis: Mapping[str, tuple[str, ...]]
    policies: tuple[Policy, ...]

    def __str__(self) -> str:
        return "\n".join((*self.notes(), self.table()))

    __repr__ = __str__

    def notes(self) -> list[str]:
        """What the figures are of and rest on, line by line."""
        return _notes(self.text, self.basis)

    def table(self) -> str:
        """The figures; in the closed loop, those of the requests below."""
        by_name = {row["policy"]: row for row in self.rows}
        compared = [policy.name for policy in self.policies if policy.compared]
        baseline = next((by_name[p.name] for p in self.policies if p.part == BASELINE), None)
        head = ["policy", "mean ms", "P99 ms", *(f"vs {name}" for name in compared), "imbal.", "wait ms"]
        head += ["held", "moved/pass", "moved GB", "busy", *RULES, "foreseen", "plan ms"]
        cells = []
        for row in self.rows:
            mean = row["mean_ms"]
            line = [row["policy"], f"{mean:.3f}", f"{row['p99_ms']:.3f}"]
            line += [f"{mean / by_name[name]['mean_ms'] - 1:+.1%}" for name in compared]
            line += [f"{row['imbalance']:.3f}", f"{row['wait_ms']:.3f}", f"{row['held']:.0f}"]
            line += [f"{row['moved_per_pass']:.1f}", f"{row['moved_GB']:,.1f}", f"{row['busy']:.2f}"]
            line += [_cost(row, baseline, rule) for rule in RULES]
            line += ["" if row["foreseen"] is None else f"{row['foreseen']:.4f}", f"{row['plan_ms']:.1f}"]
            cells.append(line)
        text = "\n".join([table(head, cells, words_last=False), *self._tight()])
        return text if self.rows[0]["requests"] is None else f"{text}\n\n{self._requests()}"

    def _tight(self) -> list[str]:
        """What memory forbids while replicas change places, if it forbids anything."""
        room = f"of {self.rows[0]['room_GB']:.1f} GB for experts and the KV cache"
        beyond = [
            f"{row['policy']} {row['peak_GB']:.1f} GB" for row in self.rows if row["peak_GB"] > row["room_GB"]
        ]
        refused = [f"{row['policy']} {row['refused']}" for row in self.rows if row["refused"]]
        lines = []
        if beyond:
            lines.append(f"does not fit while replicas change: {', '.join(beyond)} {room}")
        if refused:
            lines.append(f"plans not carried out, because replicas could not change: {', '.join(refused)}")
        return lines

    def _requests(self) -> str:
        """Latency of requests in the closed loop: mean and 99th percentile."""
        times = (
            ("first", "first token s", 1.0),
            ("each", "per token ms", 1e3),
            ("whole", "whole answer s", 1.0),
        )
        head = ["policy"]
        for _, text, _ in times:
            head += [text, "P99"]
        cells = []
        for row in self.rows:
            known = row["requests"] or {}
            line = [row["policy"]]
            for name, _, unit in times:
                line += [f"{known[f'{name}_{kind}_s'] * unit:.3f}" for kind in ("mean", "p99")]
            line += [f"{known['batch']:.1f}"]
            line += [str(known[name]) for name in ("largest_batch", "held_back", "passes")]
            cells.append(line)
        return table([*head, "batch", "largest", "KV full", "passes"], cells, words_last=False)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the distributions of the latency into a file (.png, .svg, ...); needs the extra ``plot``."""
        need_matplotlib()
        save_drawing(distributions, Drawn(self.rows, self.policies), Path(path))


def _notes(text: tuple[str, ...], basis: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [*text, *(f"{kind}: {'; '.join(lines)}" for kind, lines in basis.items() if lines)]


def _cost(row: SimRow, baseline: SimRow | None, rule: str) -> str:
    value = row["cost"][rule]
    return f"{value:,.0f}" + ("" if baseline is None else f" {value / baseline['cost'][rule] - 1:+.1%}")


def simulate(
    scenario: Scenario,
    *,
    variant: str = "",
    say: Callable[[str], None] | None = None,
    progress: Told | None = None,
) -> Simulation:
    """Run every policy of a scenario over the same traffic.

    Parameters
    ----------
    scenario : Scenario
        What to simulate.
    variant : str
        A label for the rows.
    say : callable, optional
        Told the result's `Simulation.notes` line by line, before anything runs.
    progress : callable, optional
        Told a policy's name, how far simulated time has come, and where it ends, in seconds.

    Returns
    -------
    Simulation
        Figures, and what they rest on. The same scenario gives the same figures, times of this machine aside.

    Raises
    ------
    ProblemError
        If the parts of the scenario do not fit each other.
    """
    here = scene(scenario)
    policies = scenario.chosen
    text = (*here.text, f"settings: {scenario.text}")
    basis = _basis(here, scenario, policies)
    if say is not None:
        for line in _notes(text, basis):
            say(line)
    rows = []
    room = here.experts_room() if any(policy.planner for policy in policies) else np.inf
    for policy in policies:
        figures = _run(policy, here, scenario, room, progress)
        rows.append(
            SimRow(model=here.machine.model.name, variant=variant, **figures, basis=here.basis)  # type: ignore[typeddict-item]
        )
    return Simulation(
        scenario=scenario,
        rows=tuple(rows),
        text=text,
        basis=basis,
        policies=policies,
    )


def _basis(here: Scene, scenario: Scenario, policies: tuple[Policy, ...]) -> dict[str, tuple[str, ...]]:
    """What is measured, composed, assumed; predictions among them, where a policy asks for some."""
    lines = {kind: list(parts) for kind, parts in here.basis.items()}
    if any(policy.per_pass for policy in policies):
        kind, _, rest = _foreseer(here, scenario, scenario.predictor).text.partition(": ")
        lines.setdefault(kind, []).append(f"predictions: {rest}")
    lines["assumed"].append(
        f"a predictor and a planner take {scenario.decide_ms:g} ms a layer, `distance` layers ahead; "
        + (
            "transfers share ports fairly with the all-to-all"
            if scenario.contention
            else "transfers do not slow the all-to-all"
        )
    )
    return {kind: tuple(parts) for kind, parts in lines.items()}


def _foreseer(here: Scene, scenario: Scenario, name: str, loop: ClosedLoop | None = None) -> JudgedForeseer:
    routes = None if loop is None else loop.routes
    return JudgedForeseer(
        foreseer(
            name,
            error=scenario.error_at_distance,
            distance=scenario.distance,
            seed=scenario.seed,
            composition=here.composition,
            predictions=here.predictions,
            learnt=here.learnt,
            items=routes.items() if isinstance(routes, PlayedRoutes) else None,
        )
    )


def _run(
    policy: Policy, here: Scene, scenario: Scenario, room: float, progress: Told | None
) -> dict[str, Any]:
    run = policy.build(here.machine, here.topology, scenario, room=room)
    loop = here.closed(run.backend) if here.closed is not None else None
    name = policy.predictor or scenario.predictor
    foresight = _foreseer(here, scenario, name, loop) if policy.per_pass else None
    began = time.monotonic()
    report = drive(
        run.backend,
        here.traffic() if loop is None else loop,
        run.controller,
        foresight=foresight,
        interval=policy.interval,
        progress=None if progress is None else lambda now: progress(policy.name, now, here.until),
    )
    if not report.weight_B:
        raise ProblemError("seconds", f"is {scenario.seconds:g}, which is too short for a single pass")
    return {
        **_figures(run, report),
        "peak_GB": run.backend.fullest / 1e9,
        "room_GB": here.room / 1e9,
        "refused": report.refused,
        **_foreseen(foresight, scenario.distance),
        "requests": None if loop is None else loop.served().figures(),
        "seconds": time.monotonic() - began,
    }


def _foreseen(foresight: JudgedForeseer | None, distance: int) -> dict[str, Any]:
    """How wrong predictions were: by layer, over all, and over those that an earlier layer foresees."""
    if foresight is None:
        return dict.fromkeys(("foreseen", "foreseen_ahead", "foreseen_L"))
    wrong_L = foresight.distance_L
    ahead = wrong_L[distance:] if wrong_L.size > distance else wrong_L
    return {
        "foreseen": float(wrong_L.mean()),
        "foreseen_ahead": float(ahead.mean()),
        "foreseen_L": wrong_L.round(5).tolist(),
    }


def _figures(run: Run, report: SimReport) -> dict[str, Any]:
    weight = np.concatenate(report.weight_B)
    exposed = np.concatenate(report.exposed_BL)
    plans = [decision.seconds for decision in run.controller.decisions] if run.controller else []
    return {
        "policy": run.policy.name,
        "mean_ms": report.mean_latency() * 1e3,
        "p99_ms": report.percentile(0.99) * 1e3,
        "imbalance": report.imbalance,
        "wait_ms": float(weight @ exposed.mean(1) / weight.sum()) * 1e3,
        "held": report.held,
        "moved_per_pass": report.moved / weight.sum(),
        "moved_GB": report.moved_bytes / 1e9,
        "busy": report.busy / max(report.end - report.first_start, 1e-9),
        "cost": {rule: run.backend.meter.cost(rule).total for rule in RULES},
        "plan_ms": float(np.median(plans)) * 1e3 if plans else 0.0,
        "quantiles_ms": _quantiles(report),
    }


def _quantiles(report: SimReport) -> list[float]:
    """Latency at equal steps of the distribution function, in ms."""
    seconds, weight = report.latency()
    order = np.argsort(seconds, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    at = np.searchsorted(reached, np.linspace(0, 1, QUANTILES) * (1 - 1e-12)).clip(0, order.size - 1)
    return [round(float(value) * 1e3, 6) for value in seconds[order][at]]
