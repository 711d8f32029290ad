"""``moeless-simulate``: the paper's comparison, ablations and sweeps, in simulated time.

Exit codes: 0 fine, 1 infeasible, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.plots import need_matplotlib
from moeless_opt.problems.errors import InfeasibleError, MoelessError, ProblemError
from moeless_opt.runtime.pool.cost import RULES
from moeless_opt.runtime.simulate.backend import SimReport, simulate
from moeless_opt.runtime.simulate.figures import FIGURES, draw, draw_distributions
from moeless_opt.runtime.simulate.foresight import NAMES, Judged, foreseer
from moeless_opt.runtime.simulate.policies import POLICIES, Policy, Run, Settings, build
from moeless_opt.runtime.simulate.scene import Scene, scene
from moeless_opt.solvers.pack import fast

__all__ = ["main"]

PAPER_MODELS = ("Mixtral-8x7B", "Phi-3.5-MoE", "Llama-4-Scout")
DEFAULT_POLICIES = ("static", "eplb", "oracle", "moeless", "ours-windowed", "ours")
SWEEPS: dict[str, Callable[[str], Any]] = {
    "cv": float,
    "distance": int,
    "error": float,
    "every": int,
    "gain": float,
    "keep_alive": str,
    "predictor": str,
    "rate": float,
    "slots": int,
    "spare": int,
    "tolerance": float,
    "topology": str,
}
QUANTILES = 201

LEGEND = """\
mean, P99: latency of a MoE layer in one pass: all-to-all, experts, waiting for weights (wait: its mean)
static, eplb, oracle: mean latency against theirs; imbal.: largest over mean GPU tokens, sums of both
held: replicas in memory over all layers, mean over the time of passes; moved: replicas, and bytes in all
foreseen: total-variation distance of predicted from actual loads, mean over layers and passes
plan: median, on this machine
busy: share of the time in which passes run (near 1: it falls behind)
cost in GB*s, and against static's, by charging rule:"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _options(argv)
    try:
        rows = _run(options)
    except InfeasibleError as error:
        print(f"moeless-simulate: infeasible: {error}", file=sys.stderr)
        return 1
    except (MoelessError, OSError) as error:
        print(f"moeless-simulate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeless-simulate: interrupted", file=sys.stderr)
        return 130
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; a figure's own, where the command line says nothing else."""
    parser = _parser()
    figure = FIGURES.get(parser.parse_args(argv).figure or "")
    if figure is not None:
        own = dict(figure.options)
        models, traces = own.pop("model", None), own.pop("traces", None)
        parser.set_defaults(**{"seconds": 150.0, **own})
    options = parser.parse_args(argv)
    options.traces_in_data = None
    if figure is not None:
        options.model = options.model or models
        options.traces_in_data = traces
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeless-simulate",
        description="Compare policies on simulated GPUs: MoE-layer latency, cost, replicas, bytes moved.",
        epilog="Policies: " + "; ".join(f"{name}: {p.text}" for name, p in POLICIES.items()),
    )
    add = parser.add_argument
    add("--figure", choices=FIGURES, help="a figure of the paper: its runs, and with --plot its drawing")
    add(
        "--model",
        action="append",
        metavar="NAME",
        help=f"preset, or tiny-moe; default {', '.join(PAPER_MODELS)}",
    )
    add("--sizes", metavar="NAME", help="preset whose experts' and hidden sizes to take instead")
    add("--topology", default="8xA6000", help="preset, or NODESxGPUS (default 8xA6000)")
    add("--gpu", default="A6000", help="data sheet for the times (A6000, A100, H100)")
    add("--slots", type=int, help="replicas per GPU and layer (default: what static needs, and --spare)")
    add("--spare", type=int, default=1, help="slots per GPU and layer beyond what static needs (default 1)")
    add("--policies", default=",".join(DEFAULT_POLICIES), help="comma-separated, or 'ablation'")
    add("--batching", choices=("seconds", "continuous", "closed"), default="seconds")
    add("--period", type=float, default=0.05, help="of continuous batching, seconds (default 0.05)")
    add("--memory", type=float, help="GB of a GPU for weights and KV cache, --batching closed (data sheet)")
    add("--most-tokens", type=int, default=8192, help="of a pass with --batching closed (default 8192)")
    add("--most-requests", type=int, default=256, help="of a pass with --batching closed (default 256)")
    add("--affinity", action="store_true", help="generated routing: layers depend on the ones before")
    add("--bank", type=int, default=0, help="routing kinds of a domain that requests share (0: each its own)")
    add("--decode-every", type=int, default=0, help="with --batching seconds: also every n-th writing pass")
    add("--seconds", type=float, default=300, help="of arrivals; 0: all (default 300)")
    add(
        "--data", type=Path, help="folder of recordings: Azure arrivals, ShareGPT lengths, A6000 kernel times"
    )
    add("--arrivals", type=Path, help="Azure or Mooncake request trace (default: Poisson, 5.5/s)")
    add("--rate", type=float, help="Poisson arrivals per second instead of recorded ones")
    add("--lengths", type=Path, help="prompt and answer lengths to use in place of the arrivals' own")
    add("--traces", type=Path, help="token traces (.npz): routing measured instead of generated")
    add("--stay", type=float, help="token traces: chance that a request has its forerunner's domain")
    add("--timings", type=Path, help="measured expert kernel times of the GPU")
    add("--popularity", type=Path, help="expert counts per domain (.npz) to take the popularity from")
    add("--cv", type=float, default=0.2, help="threshold of MoEless's scaler (default 0.2)")
    add("--distance", type=int, default=1, help="layers ahead of a prediction (default 1)")
    add("--predictor", choices=NAMES, default="assumed", help="what the per-pass policies plan by")
    add("--predictions", type=Path, help="token traces with recorded predictions beside them (.npz)")
    add("--error", type=float, default=0.1, help="assumed share of pairs mispredicted at distance 1 (0.1)")
    add("--decide-ms", type=float, default=0.0, help="of a predictor and planner, per layer (default 0)")
    add("--contention", action="store_true", help="transfers share ports with the all-to-all")
    add("--keep-alive", default="10", help="seconds, or 'adaptive' (default 10)")
    add("--tolerance", type=float, default=0.1, help="balance tolerance of ours-windowed (default 0.1)")
    add(
        "--gain",
        type=float,
        default=0.02,
        help="share of a layer's time that a load of ours must save (0.02)",
    )
    add("--every", type=int, default=16, help="passes between plans of windowed policies (default 16)")
    add("--sweep", nargs="+", metavar=("NAME", "VALUE"), help=f"one table per value; {', '.join(SWEEPS)}")
    add("--plot", type=Path, help="draw the figure, or the latencies' distributions (.svg, .png, ...)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="figures as JSON on stdout, tables on stderr")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    out = sys.stderr if options.json else sys.stdout
    names = _policies(options.policies)
    if options.plot is not None:
        need_matplotlib()
    figure = FIGURES.get(options.figure or "")
    if figure is not None:
        print(f"figure: {figure.text}", file=out)
    if not fast.available() and any(POLICIES[name].shares == "timed" for name in names):
        print(
            "note: Numba is not installed, so planning by time is interpreted: the same figures, many times "
            'slower (pip install "moeless-opt[fast]")',
            file=sys.stderr,
        )
    rows: list[dict[str, Any]] = []
    said: set[str] = set()
    for model_name in options.model or PAPER_MODELS:
        for label, varied in _variants(options):
            settings = _settings(varied)
            here = scene(model_name, varied)
            basis = _basis(here, varied, settings, names)
            if label:
                print(f"== {label}", file=out)
            for line in (*here.text, f"settings: {_said(settings)}", *basis):
                if line not in said:  # of a sweep, only what changes
                    print(line, file=out)
                    said.add(line)
            found = _table(here, names, settings, varied, out)
            name = here.machine.model.name
            rows += [{"model": name, "variant": label, **row, "basis": here.basis} for row in found]
    print(LEGEND, file=out)
    for rule, text in RULES.items():
        print(f"  {rule}: {text}", file=out)
    if options.plot is not None:
        if figure is not None:
            draw(figure, rows, options.plot)
        else:
            draw_distributions(rows, options.plot)
    return rows


def _policies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["ablation"]:
        names = ["static", "eplb", *(name for name in POLICIES if name.startswith("moeless"))]
    for name in names:
        if name not in POLICIES:
            raise ProblemError("--policies", f"{name!r} is unknown; there are {', '.join(POLICIES)}")
    return names


def _variants(options: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """The runs of a sweep or a figure, each with a label and its options."""

    def changed(changes: dict[str, Any]) -> argparse.Namespace:
        varied = copy.copy(options)
        for key, value in changes.items():
            setattr(varied, key, value)
        return varied

    figure = FIGURES.get(options.figure or "")
    if not options.sweep:
        if figure is None or not figure.variants:
            yield "", options
            return
        for label, changes in figure.variants:
            yield label, changed(dict(changes))
        return
    name, *values = options.sweep
    name = name.replace("-", "_")
    if name not in SWEEPS or not values:
        raise ProblemError("--sweep", f"needs one of {', '.join(SWEEPS)} and at least one value")
    for text in values:
        try:
            value = SWEEPS[name](text)
        except ValueError:
            raise ProblemError("--sweep", f"{text!r} is no value for {name}") from None
        yield f"{name} = {value}", changed({name: value})


def _settings(options: argparse.Namespace) -> Settings:
    keep: float | str = options.keep_alive
    if keep != "adaptive":
        try:
            keep = float(keep)
        except ValueError:
            raise ProblemError("--keep-alive", f"is {keep!r}, must be seconds or 'adaptive'") from None
    given = {part.name: getattr(options, part.name) for part in fields(Settings)}
    return Settings(**{**given, "keep_alive": keep})


def _said(settings: Settings) -> str:
    return (
        f"cv {settings.cv:g}; predictions {settings.distance} layer(s) ahead; keep-alive "
        f"{settings.keep_alive} s; ours: a load saves at least {settings.gain:.2%} of its layer's time; "
        f"windowed: every {settings.every} passes, tolerance {settings.tolerance:g}; seed {settings.seed}"
    )


def _basis(here: Scene, options: argparse.Namespace, settings: Settings, names: Sequence[str]) -> list[str]:
    """Lines for what is measured, composed, assumed; predictions among them, where a policy asks for some."""
    lines = {kind: list(parts) for kind, parts in here.basis.items()}
    if any(POLICIES[name].mode == "per-pass" for name in names):
        kind, _, rest = _foreseer(here, options, settings).text.partition(": ")
        lines.setdefault(kind, []).append(f"predictions: {rest}")
    lines["assumed"].append(
        f"a predictor and a planner take {options.decide_ms:g} ms a layer, `--distance` layers ahead; "
        + (
            "transfers share ports fairly with the all-to-all"
            if options.contention
            else "transfers do not slow the all-to-all"
        )
    )
    return [f"{kind}: {'; '.join(parts)}" for kind, parts in lines.items() if parts]


def _foreseer(
    here: Scene, options: argparse.Namespace, settings: Settings, policy: Policy | None = None
) -> Judged:
    name = "last" if policy is not None and policy.predictor == "last" else options.predictor
    return Judged(
        foreseer(
            name,
            error=settings.error_at_distance,
            distance=settings.distance,
            seed=settings.seed,
            composition=here.composition,
            predictions=here.predictions,
            learnt=here.learnt,
        )
    )


def _table(
    here: Scene, names: Sequence[str], settings: Settings, options: argparse.Namespace, out: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    head = (
        f"{'policy':<22}{'mean ms':>9}{'P99 ms':>9}{'static':>8}{'eplb':>8}{'oracle':>8}{'imbal.':>8}"
        f"{'wait ms':>9}{'held':>7}{'moved/pass':>11}{'moved GB':>10}{'busy':>7}"
        + "".join(f"{rule:>17}" for rule in RULES)
    )
    print(head + f"{'foreseen':>10}{'plan ms':>9}", file=out)
    for name in names:
        run = build(name, here.machine, here.topology, settings)
        foresight = _foreseer(here, options, settings, run.policy) if run.per_pass else None
        run.backend.contention = options.contention
        run.backend.decide_seconds = options.decide_ms * 1e-3
        loop = here.closed(run.backend) if here.closed is not None else None
        began = time.monotonic()
        with _Bar(name, here.until, options.quiet) as bar:
            report = simulate(
                run.backend,
                here.traffic() if loop is None else loop,
                run.controller,
                per_pass=run.per_pass,
                foresight=foresight,
                progress=bar,
            )
        row = _figures(name, run, report)
        row |= _foreseen(foresight, settings.distance)
        row["requests"] = None if loop is None else loop.served().figures()
        row["seconds"] = time.monotonic() - began
        rows.append(row)
    by_name = {row["policy"]: row for row in rows}
    for row in rows:
        print(_line(row, by_name), file=out)
    if here.closed is not None:
        _print_requests(rows, out)
    print(file=out, flush=True)
    return rows


def _print_requests(rows: list[dict[str, Any]], out: Any) -> None:
    """Latency of requests in the closed loop: mean and 99th percentile."""
    times = {"first": "first token s", "each": "per token ms", "whole": "whole answer s"}
    head = "".join(f"{text:>17}{'P99':>9}" for text in times.values())
    print(f"{'policy':<22}{head}{'batch':>8}{'largest':>9}{'KV full':>9}{'passes':>9}", file=out)
    for row in rows:
        known = row["requests"]
        line = f"{row['policy']:<22}"
        for name in times:
            unit = 1e3 if name == "each" else 1.0
            line += f"{known[f'{name}_mean_s'] * unit:>17.3f}{known[f'{name}_p99_s'] * unit:>9.3f}"
        line += (
            f"{known['batch']:>8.1f}{known['largest_batch']:>9}{known['held_back']:>9}{known['passes']:>9}"
        )
        print(line, file=out)


def _foreseen(foresight: Judged | None, distance: int) -> dict[str, Any]:
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


def _figures(name: str, run: Run, report: SimReport) -> dict[str, Any]:
    weight = np.concatenate(report.weight_B)
    exposed = np.concatenate(report.exposed_BL)
    plans = [decision.seconds for decision in run.controller.decisions] if run.controller else []
    return {
        "policy": name,
        "mean_ms": report.mean_latency() * 1e3,
        "p99_ms": report.percentile(0.99) * 1e3,
        "imbalance": report.imbalance,
        "wait_ms": float(exposed.sum() / weight.sum() / exposed.shape[1]) * 1e3,
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


def _line(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> str:
    def against(other: str) -> str:
        if other not in by_name:
            return f"{'':>8}"
        return f"{row['mean_ms'] / by_name[other]['mean_ms'] - 1:>+8.1%}"

    costs = []
    for rule in RULES:
        value = row["cost"][rule]
        part = f" {value / by_name['static']['cost'][rule] - 1:+.1%}" if "static" in by_name else ""
        costs.append(f"{value:,.0f}{part}".rjust(17))
    return (
        f"{row['policy']:<22}{row['mean_ms']:>9.3f}{row['p99_ms']:>9.3f}"
        + "".join(against(other) for other in ("static", "eplb", "oracle"))
        + f"{row['imbalance']:>8.3f}{row['wait_ms']:>9.3f}{row['held']:>7.0f}{row['moved_per_pass']:>11.1f}"
        f"{row['moved_GB']:>10,.1f}{row['busy']:>7.2f}"
        + "".join(costs)
        + (f"{row['foreseen']:>10.4f}" if row["foreseen"] is not None else f"{'':>10}")
        + f"{row['plan_ms']:>9.1f}"
    )


class _Bar:
    """A progress bar with the expected end on a terminal, nothing elsewhere."""

    def __init__(self, name: str, until: float, quiet: bool) -> None:
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=round(until), desc=name, unit="s simulated", leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, seconds: float) -> None:
        """Draw how far simulated time has come."""
        if self.bar is not None:
            self.bar.n = min(round(seconds), self.bar.total)
            self.bar.refresh()


if __name__ == "__main__":
    raise SystemExit(main())
