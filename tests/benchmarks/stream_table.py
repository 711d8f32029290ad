"""What placements and token shares are worth on a stream of real traffic, batch by batch.

A stream of decode steps is composed from recorded routing and recorded arrivals (see
`compose.compose_steps`). Every 64 steps each policy re-plans with the loads of the window
that has just ended, and serves the next window with it; window 0 is the first plan's and is not served.
Where a decay is named, the loads are those of all windows so far with a fading memory: a controller's
`LoadWindow` (``Controller(..., decay=0.97)``).
Shares are either fixed until the next re-plan or re-solved for every batch and layer on its actual loads
(`solve_shares`, exact). Migration itself takes no time here: the table counts what moves.

Run it as a script: ``python tests/benchmarks/stream_table.py --data FOLDER`` with the folder of recordings
(gpt-oss-20b token traces, Azure arrivals), or without ``--data`` on the traces of the project's own small
model and Poisson arrivals.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import moeless_opt as mo
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io.arrivals import poisson_arrivals, read_arrivals
from moeless_opt.problems.io.traces import RoutedRequests, read_token_traces
from moeless_opt.problems.plan.evaluate import activated, gpu_tokens, new_replicas
from moeless_opt.problems.spec.architecture import ModelSpec, model_preset
from moeless_opt.runtime.control.backend import LoadWindow, Observation
from moeless_opt.runtime.simulate.compose import COMPOSITION, StepLoads, compose_steps
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph

Floats = NDArray[np.float64]
Planner = Callable[[Floats, mo.Topology, mo.Plan | None], mo.Plan]


def fresh(solver: str, split: str = "equal") -> Planner:
    """A planner that looks at the live placement only if its method does."""
    sizing = mo.Sizing(policy="cv", cv=0.2) if solver == "moeless" else None

    def make(load_LE: Floats, topology: mo.Topology, live: mo.Plan | None) -> mo.Plan:
        return mo.plan(load_LE, topology, solver=solver, split=split, current=live, sizing=sizing)

    return make


def steady(tolerance: float) -> Planner:
    """Equal split, every slot full, and a layer within the tolerance stays as it is."""

    def make(load_LE: Floats, topology: mo.Topology, live: mo.Plan | None) -> mo.Plan:
        wish = {"split": "equal", "fill": "distinct", "balance_tolerance": tolerance}
        return mo.plan(load_LE, topology, current=live, **wish)  # type: ignore[arg-type]

    return make


def budgeted(load_LE: Floats, topology: mo.Topology, live: mo.Plan | None) -> mo.Plan:
    """Equal split, every slot full, and at most 3 % of the replicas move."""
    most = int(0.03 * len(load_LE) * topology.slots_G.sum())
    limits = None if live is None else mo.Limits(max_moves=most)
    return mo.plan(load_LE, topology, split="equal", fill="distinct", current=live, limits=limits)


def first_kept(load_LE: Floats, topology: mo.Topology, live: mo.Plan | None) -> mo.Plan:
    """The first plan, for ever."""
    return live or mo.plan(load_LE, topology)


class Policy(NamedTuple):
    """How to plan, whether shares follow every batch, and what is left of older loads at a re-plan."""

    name: str
    plan: Planner
    live_shares: bool
    decay: float = 0.0


POLICIES = (
    Policy("static", fresh("static"), False),
    Policy("eplb", fresh("eplb"), False),
    Policy("moeless (cv 0.2)", fresh("moeless"), False),
    Policy("ours, equal split", fresh("auto"), False),
    Policy("ours, equal, 3 % budget", budgeted, False),
    Policy("ours, equal, decay 0.95", steady(0.02), False, 0.95),
    Policy("ours, equal, decay 0.97", steady(0.015), False, 0.97),
    Policy("ours, shares of the window", fresh("auto", "fractional"), False),
    Policy("eplb, shares re-solved", fresh("eplb"), True),
    Policy("shares only (stay)", first_kept, True),
    Policy("ours", fresh("auto", "fractional"), True),
)


class Tally:
    """What a policy's run adds up to."""

    def __init__(self) -> None:
        self.largest = self.whole = self.mean = self.busiest = 0.0
        self.windows: list[tuple[float, float]] = []  # largest and mean loads, summed
        self.moved: list[int] = []
        self.held: list[int] = []
        self.milliseconds: list[float] = []

    def serve(self, plan: mo.Plan, window: StepLoads, speed_G: Floats, live_shares: bool) -> None:
        """Add the largest and the mean GPU load of every step and layer of a window."""
        steps, layers, experts = window.load_SLE.shape
        load_BE = window.load_SLE.reshape(steps * layers, experts)  # B: steps x layers
        slots_BGC = np.tile(plan.slots_LGC, (steps, 1, 1))
        if live_shares:
            share_BGC = solve_shares(load_BE, ReplicaGraph(slots_BGC, speed_G, experts)).share_LGC
        else:
            share_BGC = np.tile(plan.share_LGC, (steps, 1, 1))
        tokens_BG = gpu_tokens(load_BE, slots_BGC, share_BGC)
        self.windows.append((float(tokens_BG.max(1).sum()), float(tokens_BG.mean(1).sum())))
        self.largest += self.windows[-1][0]
        # Whole tokens: rounding the shares never needs more than the next whole number (`round_shares`).
        self.whole += float(np.ceil(tokens_BG.max(1) - 1e-6).sum())
        self.mean += self.windows[-1][1]
        self.busiest += float(activated(load_BE, slots_BGC, share_BGC).max(1).sum())

    def later(self) -> float:
        """Imbalance of the second half of the windows: settings are tuned on the first."""
        largest, mean = np.sum(self.windows[len(self.windows) // 2 :], axis=0)
        return float(largest / mean)


def observed(window: StepLoads, gpus: int) -> Observation:
    """A window as a controller sees it; nobody looks at the ranks' own times here."""
    steps, layers, _ = window.load_SLE.shape
    none_LG = np.zeros((layers, gpus), dtype=np.int64)
    load_LE = window.load_LE.astype(np.int64)
    return Observation(load_LE=load_LE, tokens_LG=none_LG, seconds_LG=none_LG * 0.0, batches=steps)


def run(policy: Policy, windows: list[StepLoads], topology: mo.Topology) -> Tally:
    """Re-plan at the end of every window, serve the next one."""
    tally, live, memory = Tally(), None, LoadWindow(policy.decay)
    for seen, served in itertools.pairwise(windows):
        load_LE = memory.update(observed(seen, topology.gpus))
        began = time.perf_counter()
        new = policy.plan(load_LE, topology, live)
        if live is not None:
            tally.milliseconds.append((time.perf_counter() - began) * 1e3)
            moved = new_replicas(new.slots_LGC, live.slots_LGC, new.experts)
            tally.moved.append(int(moved.sum()))
        tally.held.append(new.replicas)
        live = new
        tally.serve(new, served, topology.speed_G, policy.live_shares)
    return tally


class Stream(NamedTuple):
    """Windows of traffic, and what they are."""

    windows: list[StepLoads]
    model: ModelSpec
    text: tuple[str, ...]


def compose(traces: RoutedRequests, arrivals: object, options: argparse.Namespace) -> Iterator[StepLoads]:
    """The stream by the rule of `compose_steps`."""
    return compose_steps(
        traces,
        arrivals,  # type: ignore[arg-type]
        step_seconds=options.step_ms / 1e3,
        window=options.window,
        seed=options.seed,
    )


def stream_of(options: argparse.Namespace) -> Stream:
    """gpt-oss-20b on Azure arrivals where the recordings are at hand, else the tiny model's own traces."""
    if options.data is not None:
        traces = read_token_traces(options.data / "gptoss20b_topk.npz", experts=32)
        arrivals = read_arrivals(options.data / "requests" / "AzureLLMInferenceTrace_conv_2023.csv.gz")
        if options.seconds > 0:
            arrivals = arrivals.first(options.seconds)
        windows = list(compose(traces, arrivals, options))
        return Stream(windows, model_preset("gpt-oss-20b"), (repr(traces), repr(arrivals)))
    own = tiny_moe_traces()
    arrivals = poisson_arrivals(5.5, options.seconds or 600, seed=options.seed)
    _, layers, top_k = own.experts_TLK.shape
    model = ModelSpec(name="tiny MoE", layers=layers, experts=own.experts, top_k=top_k, hidden=256, ffn=256)
    text = f"tiny MoE: {own.requests} requests, {layers} layers, top {top_k} of {own.experts} experts"
    return Stream(list(compose(own, arrivals, options)), model, (text, repr(arrivals)))


def machine() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, NumPy {np.__version__}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of recordings; without it the tiny model's traces")
    parser.add_argument("--seconds", type=float, default=600, help="of arrivals; 0: all (default 600)")
    parser.add_argument("--step-ms", type=float, default=25, help="duration of a step (default 25)")
    parser.add_argument("--window", type=int, default=64, help="steps between re-plans (default 64)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--slots", type=int, default=0, help="per GPU (default 5; 3 for the tiny model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="policies by their names in the table, separated by ';'")
    options = parser.parse_args()
    slots = options.slots or (5 if options.data else 3)
    topology = mo.uniform(1, options.gpus, slots=slots)
    mo.warm_up()
    stream = stream_of(options)
    unknown = set((options.only or "").split(";")) - {"", *(policy.name for policy in POLICIES)}
    if unknown:
        parser.error(f"no policy {sorted(unknown)[0]!r}; there are {'; '.join(p.name for p in POLICIES)}")
    windows, size = stream.windows, stream.model.expert_bytes
    live = np.concatenate([w.live_S for w in windows])
    print(f"{stream.text[0]}\n{stream.text[1]}\n{COMPOSITION}\nAnswers only: no prompt tokens take part.")
    print(
        f"{len(windows)} windows of {options.window} steps of {options.step_ms:g} ms; "
        f"{live.mean():.1f} live requests per step (up to {live.max()}); "
        f"{options.gpus} GPUs x {slots} slots; {size / 1e6:.1f} MB per expert; seed {options.seed}; "
        f"{machine()}"
    )
    print(
        "imbalance: sum over steps and layers of the largest GPU load / of the mean; whole: with whole\n"
        "tokens (an upper bound); activated: largest number of experts that a GPU reads, mean over steps\n"
        "and layers; moved: replicas per re-plan, share of those held, MB"
    )
    head = f"{'policy':<28}{'shares':>12}{'imbalance':>11}{'2nd half':>10}{'whole':>8}{'activated':>11}"
    print(f"{head}{'moved':>9}{'%':>8}{'MB':>9}{'held':>8}{'plan ms':>9}")
    for policy in POLICIES:
        if options.only and policy.name not in options.only.split(";"):
            continue
        tally = run(policy, windows, topology)
        cells = (len(windows) - 1) * options.window * stream.model.layers
        moved, held = statistics.mean(tally.moved), statistics.mean(tally.held)
        print(
            f"{policy.name:<28}{'every batch' if policy.live_shares else 'per window':>12}"
            f"{tally.largest / tally.mean:>11.4f}{tally.later():>10.4f}{tally.whole / tally.mean:>8.4f}"
            f"{tally.busiest / cells:>11.2f}{moved:>9.2f}{moved / held:>8.2%}{moved * size / 1e6:>9.1f}"
            f"{held:>8.0f}{statistics.median(tally.milliseconds):>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
