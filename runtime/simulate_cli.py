"""``moeless-simulate``: the paper's comparison, ablations and sweeps, in simulated time.

Exit codes: 0 fine, 1 infeasible, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.errors import InfeasibleError, MoelessError, ProblemError
from moeless_opt.problems.models import ModelSpec, model_preset
from moeless_opt.problems.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.topology import TOPOLOGY_PRESETS, Topology
from moeless_opt.problems.traces import (
    COMPOSITION,
    Arrivals,
    poisson_arrivals,
    read_arrivals,
    read_lengths,
    read_token_traces,
)
from moeless_opt.runtime.cost import RULES
from moeless_opt.runtime.predictors import LastWindow
from moeless_opt.runtime.sim_foresight import Online
from moeless_opt.runtime.sim_policies import POLICIES, Run, Settings, build
from moeless_opt.runtime.sim_time import Machine
from moeless_opt.runtime.sim_traffic import (
    Passes,
    RoutingModel,
    continuous,
    from_traces,
    one_second_batches,
)
from moeless_opt.runtime.simulator import SimReport, simulate

__all__ = ["main"]

PAPER_MODELS = ("Mixtral-8x7B", "Phi-3.5-MoE", "Llama-4-Scout")
DEFAULT_POLICIES = ("static", "eplb", "oracle", "moeless", "ours-windowed", "ours", "ours-pays")
SWEEPS: dict[str, Callable[[str], Any]] = {
    "cv": float,
    "distance": int,
    "error": float,
    "keep_alive": lambda text: text if text == "adaptive" else float(text),
    "tolerance": float,
    "every": int,
    "slots": int,
}

LEGEND = """\
mean, P99: latency of a MoE layer in one pass: all-to-all, experts, waiting for weights (wait: its mean)
static, eplb, oracle: mean latency against theirs; imbal.: largest over mean GPU tokens, sums of both
held: replicas in memory over all layers, mean over the time of passes; plan: median, on this machine
busy: share of the time in which passes run (near 1: it falls behind)
cost in GB*s, and against static's, by charging rule:"""


@dataclass(frozen=True, slots=True)
class Scene:
    """Traffic on a machine, and what they rest on."""

    machine: Machine
    topology: Topology
    traffic: Callable[[], Iterator[Passes]]
    text: tuple[str, ...]
    until: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeless-simulate",
        description="Compare policies on simulated GPUs: MoE-layer latency, cost, replicas, bytes moved.",
        epilog="Policies: " + "; ".join(f"{name}: {p.text}" for name, p in POLICIES.items()),
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME", help=f"preset; default {', '.join(PAPER_MODELS)}")
    add("--topology", default="8xA6000", help="preset, or NODESxGPUS (default 8xA6000)")
    add("--gpu", default="A6000", help="data sheet for the times (A6000, A100, H100)")
    add("--slots", type=int, help="replicas per GPU and layer (default: one more than static needs)")
    add("--policies", default=",".join(DEFAULT_POLICIES), help="comma-separated, or 'ablation'")
    add("--batching", choices=("seconds", "continuous"), default="seconds")
    add("--period", type=float, default=0.05, help="of continuous batching, seconds (default 0.05)")
    add("--decode-every", type=int, default=0, help="with --batching seconds: also every n-th writing pass")
    add("--seconds", type=float, default=300, help="of arrivals; 0: all (default 300)")
    add(
        "--data", type=Path, help="folder of recordings: Azure arrivals, ShareGPT lengths, A6000 kernel times"
    )
    add("--arrivals", type=Path, help="Azure or Mooncake request trace (default: Poisson, 5.5/s)")
    add("--lengths", type=Path, help="prompt and answer lengths to use in place of the arrivals' own")
    add("--traces", type=Path, help="token traces (.npz): routing measured instead of generated")
    add("--timings", type=Path, help="measured expert kernel times of the GPU")
    add("--popularity", type=Path, help="expert counts per domain (.npz) to take the popularity from")
    add("--cv", type=float, default=0.2, help="threshold of MoEless's scaler (default 0.2)")
    add("--distance", type=int, default=1, help="layers ahead of a prediction (default 1)")
    add("--error", type=float, default=0.1, help="share of pairs mispredicted at distance 1 (default 0.1)")
    add("--keep-alive", default="10", help="seconds, or 'adaptive' (default 10)")
    add("--tolerance", type=float, default=0.1, help="balance tolerance of ours (default 0.1)")
    add("--horizon", type=float, default=8, help="passes over which a move must pay (default 8)")
    add("--every", type=int, default=16, help="passes between plans of windowed policies (default 16)")
    add("--sweep", nargs="+", metavar=("NAME", "VALUE"), help=f"one table per value; {', '.join(SWEEPS)}")
    add("--plot", type=Path, help="write the latencies' distribution functions (.svg, .png, ...)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="figures as JSON on stdout, tables on stderr")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    out = sys.stderr if options.json else sys.stdout
    names = [name.strip() for name in options.policies.split(",") if name.strip()]
    if names == ["ablation"]:
        names = ["static", "eplb", *(name for name in POLICIES if name.startswith("moeless"))]
    for name in names:
        if name not in POLICIES:
            raise ProblemError("--policies", f"{name!r} is unknown; there are {', '.join(POLICIES)}")
    rows: list[dict[str, Any]] = []
    panels: dict[str, dict[str, SimReport]] = {}
    for model_name in options.model or PAPER_MODELS:
        for label, settings, slots in _variants(options):
            scene = _scene(model_preset(model_name), options, slots)
            for line in (*scene.text, f"settings: {_said(settings)}"):
                print(line, file=out)
            if label:
                print(f"== {label}", file=out)
            found, reports = _table(scene, names, settings, out, quiet=options.quiet)
            name = scene.machine.model.name
            rows += [{"model": name, "variant": label, **row, "basis": list(scene.text)} for row in found]
            panels[f"{name} {label}".strip()] = reports
    if options.plot is not None:
        _plot(panels, options.plot)
    return rows


def _plot(panels: dict[str, dict[str, SimReport]], path: Path) -> None:
    """One panel per table: share of MoE layers (over passes) that take at most so long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, reports) in zip(axes, panels.items(), strict=True):
        for name, report in reports.items():
            seconds, weight = report.latency()
            order = np.argsort(seconds, kind="stable")
            share = np.cumsum(weight[order]) / weight.sum()
            # A few hundred points draw the same line.
            shown = np.unique(np.searchsorted(share, np.linspace(0, 1, 400)).clip(0, share.size - 1))
            axis.step(seconds[order][shown] * 1e3, share[shown], where="post", label=name, linewidth=1.2)
        axis.set(title=title, xlabel="MoE layer, ms (simulated)", xscale="log", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of layers and passes")
    axes[-1].legend(loc="lower right", fontsize=8)
    figure.savefig(path)


def _variants(options: argparse.Namespace) -> Iterator[tuple[str, Settings, int | None]]:
    base = Settings(
        cv=options.cv,
        distance=options.distance,
        error=options.error,
        keep_alive=SWEEPS["keep_alive"](options.keep_alive),
        tolerance=options.tolerance,
        horizon=options.horizon,
        every=options.every,
        seed=options.seed,
    )
    if not options.sweep:
        yield "", base, options.slots
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
        if name == "slots":
            yield f"slots = {value}", base, value
        else:
            yield f"{name} = {value}", replace(base, **{name: value}), options.slots


def _said(settings: Settings) -> str:
    return (
        f"cv {settings.cv:g}; predictions {settings.distance} layer(s) ahead, "
        f"{settings.error_at_distance:.3g} of the pairs wrong (assumed); keep-alive {settings.keep_alive} s "
        f"(assumed); ours: tolerance {settings.tolerance:g}, horizon {settings.horizon:g} passes; windowed "
        f"policies plan every {settings.every} passes; seed {settings.seed}"
    )


def _scene(model: ModelSpec, options: argparse.Namespace, slots: int | None) -> Scene:
    data: Path | None = options.data

    def at(given: Path | None, name: str) -> Path | None:
        return given if given is not None or data is None else data / name

    topology = _topology(options.topology, model.experts, slots)
    timings = at(options.timings, "latency/phiminimoe_a6000_tp1_expert_gate.csv.gz")
    machine = Machine.of(
        topology, model, gpu=options.gpu, timings=timings if options.gpu == "A6000" else options.timings
    )
    arrivals = _arrivals(options, at)
    room = int(topology.capacity_LG(np.ones(1, dtype=np.int64), model.experts).max())
    text = [
        f"{model.name}: {model.layers} layers x {model.experts} experts, top {model.top_k}, "
        f"{model.expert_bytes / 1e6:.1f} MB each; up to {room} replicas per GPU and layer",
        f"machine: {machine.text}",
        f"traffic: {arrivals!r}",
    ]
    if options.traces is not None:
        traces = read_token_traces(options.traces, experts=model.experts)
        if traces.experts_TLK.shape[1:] != (model.layers, model.top_k):
            raise ProblemError("--traces", f"{traces!r} do not fit {model.name}")
        text += [f"routing: {traces!r}. {COMPOSITION} Period {options.period:g} s; answers only."]
        return Scene(
            machine,
            topology,
            lambda: from_traces(traces, arrivals, period=options.period, window=16, seed=options.seed),
            tuple(text),
            arrivals.seconds,
        )
    routing = _routing(model, options, at)
    text.append(routing.text)
    if options.batching == "continuous":
        text.append(
            f"continuous batching, a pass every {options.period:g} s whatever it takes (composed once, the "
            "same for all); prompts are read in the first pass after their arrival"
        )
        return Scene(
            machine,
            topology,
            lambda: continuous(routing, arrivals, period=options.period, window=16, seed=options.seed),
            tuple(text),
            arrivals.seconds,
        )
    writing = f"every {options.decode_every}-th writing pass" if options.decode_every else "no writing pass"
    text.append(
        "the paper's batching: the requests of one second together, one pass reads their prompts; "
        f"{writing} is simulated (which passes the paper's latency averages over is not said there)"
    )
    return Scene(
        machine,
        topology,
        lambda: one_second_batches(routing, arrivals, decode_every=options.decode_every, seed=options.seed),
        tuple(text),
        arrivals.seconds,
    )


def _topology(text: str, experts: int, slots: int | None) -> Topology:
    """A preset, or ``NODESxGPUS`` with H100 links; by default one slot more than static needs."""
    nodes, _, per_node = text.partition("x")
    if text not in TOPOLOGY_PRESETS and nodes.isdigit() and per_node.isdigit():
        links = TOPOLOGY_PRESETS["4x8xH100"][3]
        plain = Topology.uniform(int(nodes), int(per_node), slots=1, links=links)
    else:
        plain = Topology.preset(text, slots=1)
    return plain.replace(slots_G=np.full(plain.gpus, slots or -(-experts // plain.gpus) + 1))


def _arrivals(options: argparse.Namespace, at: Callable[[Path | None, str], Path | None]) -> Arrivals:
    path = at(options.arrivals, "requests/AzureLLMInferenceTrace_conv_2023.csv.gz")
    lengths = at(options.lengths, "requests/sharegpt_8k_lengths_llama2.csv.gz")
    if path is None:
        arrivals = poisson_arrivals(5.5, options.seconds or 300, seed=options.seed)
    else:
        arrivals = read_arrivals(path)
        if options.seconds > 0:
            arrivals = arrivals.first(options.seconds)
    if lengths is not None:
        arrivals = arrivals.with_lengths(read_lengths(lengths), seed=options.seed)
    return arrivals


def _routing(
    model: ModelSpec, options: argparse.Namespace, at: Callable[[Path | None, str], Path | None]
) -> RoutingModel:
    """Popularity measured for this very model where there is some, else drawn like the tiny model's."""
    own = RoutingModel.fit(tiny_moe_traces())
    popularity = at(options.popularity, "olmoe_mixtral_domain_counts.npz")
    prefix = model.name.split("-")[0].lower() + "__expert_counts__"
    if popularity is not None and popularity.is_file():
        with np.load(popularity, allow_pickle=False) as file:
            counts = {key[len(prefix) :]: file[key] for key in sorted(file.files) if key.startswith(prefix)}
        if counts:
            return RoutingModel.of_domains(counts, (0, 7, 15), model, own, popularity.name)
    return own.like(model.layers, model.experts, model.top_k, seed=options.seed)


def _table(
    scene: Scene, names: Sequence[str], settings: Settings, out: Any, *, quiet: bool
) -> tuple[list[dict[str, Any]], dict[str, SimReport]]:
    rows: list[dict[str, Any]] = []
    reports: dict[str, SimReport] = {}
    head = (
        f"{'policy':<22}{'mean ms':>9}{'P99 ms':>9}{'static':>8}{'eplb':>8}{'oracle':>8}{'imbal.':>8}"
        f"{'wait ms':>9}{'held':>7}{'moved/pass':>11}{'busy':>7}" + "".join(f"{rule:>17}" for rule in RULES)
    )
    print(head + f"{'plan ms':>9}", file=out)
    for name in names:
        run = build(name, scene.machine, scene.topology, settings)
        began = time.monotonic()
        with _Bar(name, scene.until, quiet) as bar:
            report = simulate(
                run.backend,
                scene.traffic(),
                run.controller,
                per_pass=run.per_pass,
                foresight=Online(LastWindow(), settings.distance) if run.policy.predictor == "last" else None,
                error=settings.error_at_distance,
                seed=settings.seed,
                progress=bar,
            )
        reports[name] = report
        row = _figures(name, run, report)
        row["seconds"] = time.monotonic() - began
        rows.append(row)
    by_name = {row["policy"]: row for row in rows}
    for row in rows:
        print(_line(row, by_name), file=out)
    print(LEGEND, file=out)
    for rule, text in RULES.items():
        print(f"  {rule}: {text}", file=out)
    print(file=out)
    return rows, reports


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
    }


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
        f"{row['busy']:>7.2f}" + "".join(costs) + f"{row['plan_ms']:>9.1f}"
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
