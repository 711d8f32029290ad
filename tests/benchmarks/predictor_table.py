"""Print how well expert loads are predicted: by layer and distance, across domains, and what it is worth.

``python tests/benchmarks/predictor_table.py [--cache DIR] [--batches N]`` cuts the tiny MoE's held-out text
into requests (a Debian machine: the text comes by ``apt-get download`` into DIR, as for its training),
records hidden states and routes, trains on some requests, and scores on others. The first run records (one to
three minutes) and keeps the recording in DIR.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moeless_opt as mo
from moeless_opt.problems.plan.evaluate import gpu_times, imbalance
from moeless_opt.runtime.predict.affinity import Affinity
from moeless_opt.runtime.predict.foresight import GatePredictor
from moeless_opt.runtime.predict.gates import PlainGate, TunedGate, plain_gates
from moeless_opt.runtime.predict.history import AutoRegressive, Calibrated, Ewma, LastWindow, LinearTrend
from moeless_opt.runtime.predict.tuning import accuracy, fine_tune, train_gate
from moeless_opt.runtime.tiny_moe import model as tiny_moe
from moeless_opt.runtime.tiny_moe.corpus import DOMAINS
from moeless_opt.runtime.tiny_moe.record import DISTANCES, held_out_requests, parts
from moeless_opt.runtime.tiny_moe.scores import (
    Scores,
    TokenRecord,
    actual_loads,
    decode_batches,
    prefill_batches,
    score_predictor,
)
from moeless_opt.solvers.shares.flow import solve_shares

THRESHOLD = 0.7
UNSEEN = ("russian", "chinese", "arithmetic")
WARM_UP = 4


def row(name: str, values: Iterable[float], digits: int = 3) -> str:
    """One line of a table; nothing where there is no number."""
    return f"| {name} | " + " | ".join("" if np.isnan(x) else f"{x:.{digits}f}" for x in values) + " |"


def header(first: str, names: Iterable[object]) -> str:
    """Top of a table."""
    columns = [first, *map(str, names)]
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean of what there is; NaN where there is nothing."""
    count = (~np.isnan(values)).sum(axis=axes)
    return np.where(count > 0, np.nansum(values, axis=axes) / np.maximum(count, 1), np.nan)


def print_by_distance(title: str, scores: list[Scores]) -> None:
    """Three tables: means over layers and batches, by distance."""
    for what, field in (
        ("total-variation distance of the loads", "distance_DBL"),
        ("hit rate of the 4 most loaded experts", "top_DBL"),
        ("hit rate of the tokens' 2 experts", "token_DBL"),
    ):
        print(f"\n{title}: {what}, mean over the layers, by distance\n")
        print(header("predictor", DISTANCES))
        for s in scores:
            values = mean(getattr(s, field), (1, 2))
            if not np.isnan(values).all():
                print(row(s.name, values))


def print_by_layer(scores: list[Scores]) -> None:
    """Total variation at distance 1 of every layer, and all distances for the two kinds of gates."""
    layers = scores[0].distance_DBL.shape[2]
    print("\nprefill: total-variation distance (hits of the 4 most loaded), distance 1, by predicted layer\n")
    print(header("predictor", range(1, layers)))
    for s in scores:
        pairs = zip(mean(s.distance_DBL, (1,))[0, 1:], mean(s.top_DBL, (1,))[0, 1:], strict=True)
        print(f"| {s.name} | " + " | ".join(f"{tv:.3f} ({hit:.2f})" for tv, hit in pairs) + " |")
    print("\nprefill: token hit rate, before -> after fine-tuning, by layer that is predicted (columns)\n")
    plain, tuned = (next(s for s in scores if s.name == n) for n in ("gate", "gate tuned"))
    print(header("distance", range(1, layers)))
    for d in DISTANCES:
        before, after = (mean(s.token_DBL[d - 1], (0,))[1:] for s in (plain, tuned))
        cells = ["" if np.isnan(a) else f"{a:.2f} -> {b:.2f}" for a, b in zip(before, after, strict=True)]
        print(f"| {d} | " + " | ".join(cells) + " |")


def print_imbalance(
    made: TokenRecord, batches: list[Any], static_LE: np.ndarray, scores: list[Scores]
) -> None:
    """Plan for what is predicted one layer ahead; let what comes run on it."""
    gpus, slots = 8, 3
    topology = mo.uniform(1, gpus, slots=slots)
    actual_BLE = actual_loads(made, batches)
    expected = {"training mean": np.broadcast_to(static_LE, actual_BLE.shape)}
    expected |= {s.name: s.load_DBLE[0] for s in scores} | {"actual": actual_BLE}
    layers = range(1, made.layers)
    print(
        f"\nrealised imbalance (max / mean GPU tokens), {gpus} GPUs x {slots} slots, distance 1, plans from"
        " scratch: mean over batches; by layer with the planned shares, then means over the layers\n"
    )
    print(header("planned on", [*layers, "planned shares", "shares re-solved", "equal split", "ms per plan"]))
    for name, load_BLE in expected.items():
        planned, solved, equal, spent = [], [], [], []
        for b in range(WARM_UP, len(batches)):
            actual_LE = actual_BLE[b, 1:]
            began = time.perf_counter()
            plan = mo.plan(load_BLE[b, 1:], topology)
            spent.append(time.perf_counter() - began)
            even = mo.plan(load_BLE[b, 1:], topology, split="equal")
            ones = np.ones(gpus)
            planned.append(imbalance(gpu_times(actual_LE, plan.slots_LGC, plan.share_LGC, ones), ones))
            solved.append(imbalance(solve_shares(actual_LE, plan.slots_LGC).time_LG, ones))
            equal.append(imbalance(gpu_times(actual_LE, even.slots_LGC, even.share_LGC, ones), ones))
        means = [float(np.mean(x)) for x in (planned, solved, equal)]
        print(row(name, [*np.mean(planned, axis=0), *means, 1e3 * statistics.median(spent)]))


def best_ms(call: Callable[[], object], repeats: int = 30) -> float:
    """Median milliseconds."""
    call()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


def predicted(predictor: GatePredictor, hidden: torch.Tensor) -> np.ndarray:
    """Predict layer 1 from layer 0."""
    return predictor.start(hidden, 0, 1).load_E()


def print_times(gates: list[PlainGate]) -> None:
    """Time of one layer's prediction, here; models' shapes with random weights.

    The arithmetic counts a multiplication and an addition for every weight and token.
    """
    torch.set_num_threads(1)
    kind = platform.processor() or platform.machine()
    print(f"\nms per layer, this CPU ({kind}, 1 thread), fp32, median of 30\n")
    tokens = (1, 8, 32, 64, 512, 2048)
    columns = ["trained parameters", "kFLOP per token", *(f"{n} tokens" for n in tokens)]
    print(header("gate", columns))

    def line(name: str, gate: PlainGate | TunedGate, hidden: int, count: int) -> None:
        predictor = GatePredictor(gates, {(0, 1): gate} if isinstance(gate, TunedGate) else None)
        if isinstance(gate, PlainGate):
            predictor.gates = [gate, gate]
        states = [torch.randn(n, hidden) for n in tokens]
        spent = [best_ms(partial(predicted, predictor, x)) for x in states]
        plain = isinstance(gate, PlainGate)
        experts = gate.router.weight.size(0) if plain else gate.weight_EH.size(0)
        width = 0 if plain else gate.width
        flop = 2 * (hidden * (experts + width) + width * experts)
        print(f"| {name} | {count:,} | {flop / 1e3:,.0f} | " + " | ".join(f"{x:.3f}" for x in spent) + " |")

    line("tiny MoE, plain", gates[1], tiny_moe.HIDDEN, 0)
    own = TunedGate.of(gates[1])
    line("tiny MoE, tuned", own, tiny_moe.HIDDEN, own.parameter_count)
    for name, hidden, experts, k in (
        ("Mixtral-8x7B", 4096, 8, 2),
        ("Phi-3.5-MoE", 4096, 16, 2),
        ("Llama-4-Scout", 5120, 16, 1),
        ("DeepSeek-V3", 7168, 256, 8),
    ):
        norm = torch.nn.RMSNorm(hidden)
        tuned = TunedGate(norm, torch.randn(experts, hidden), None, k).requires_grad_(False)
        line(f"{name} shape, tuned", tuned, hidden, tuned.parameter_count)


def print_tuning(
    made: TokenRecord, gates: list[PlainGate], parts: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Size and epochs of the trained gates, and what the threshold leaves alone, at distance 1."""
    train, held_out, test = (made.pairs(p) for p in parts)
    print("\nfine-tuning at distance 1: token hit rate on test requests, by layer that is predicted\n")
    print(header("gate", [*range(1, made.layers), "parameters", "s"]))
    plain = [accuracy(gates[m], test[0][:, m - 1].float(), test[1][:, m]) for m in range(1, made.layers)]
    print(row("plain", [*plain, 0, 0], 3))
    for name, options, threshold in (
        (f"under {THRESHOLD:g} only", {}, THRESHOLD),
        ("all, no added network", {"width": 0}, 2.0),
        ("all", {}, 2.0),
        ("all, width 512", {"width": 512}, 2.0),
    ):
        began = time.perf_counter()
        made_now = fine_tune(gates, train, held_out, threshold=threshold, options=options)
        spent = time.perf_counter() - began
        predictor = GatePredictor(gates, made_now.tuned)
        hits = [
            accuracy(predictor.gate(m - 1, 1), test[0][:, m - 1].float(), test[1][:, m])
            for m in range(1, made.layers)
        ]
        count = sum(g.parameter_count for g in made_now.tuned.values())
        print(
            f"| {name} | "
            + " | ".join(f"{x:.3f}" for x in hits)
            + f" | {len(made_now.tuned)} gates, {count:,} "
            f"| {spent:.0f} |"
        )


def go_on(made: TokenRecord, tuned: Any, part: np.ndarray, few: int) -> dict[tuple[int, int], TunedGate]:
    """Train on with `few` requests of each unseen domain, and of the others, lest they be forgotten."""
    chosen = [np.flatnonzero((part == 0) & (made.domain == d))[:few] for d in range(len(DOMAINS))]
    hidden, experts = made.pairs(np.concatenate(chosen))
    return {
        (layer, d): train_gate(
            copy.deepcopy(gate), hidden[:, layer], experts[:, layer + d], epochs=8, batch=256, rate=2e-3
        )
        for (layer, d), gate in tuned.items()
    }


def print_domains(made: TokenRecord, gates: list[PlainGate], part: np.ndarray, all_tuned: Any) -> None:
    """Train without some domains, test on them; then let the gates go on learning from a few requests."""
    unseen = np.isin(made.domain, [DOMAINS.index(d) for d in UNSEEN])
    train, held_out = (np.flatnonzero((part == i) & ~unseen) for i in (0, 1))
    tuned = fine_tune(gates, made.pairs(train), made.pairs(held_out), threshold=2.0).tuned
    adapted = {few: GatePredictor(gates, go_on(made, tuned, part, few)) for few in (1, 4)}
    for few, predictor in adapted.items():
        predictor.name = f"gate tuned, went on with {few} of each"
    seen_affinity = Affinity(made.layers, made.experts).learn(made.experts_TLK[made.rows(train)])
    seen_affinity.name = "affinity, not trained on them"
    everything = np.flatnonzero(part == 0)
    affinity = Affinity(made.layers, made.experts).learn(made.experts_TLK[made.rows(everything)])
    affinity.name = "affinity, trained on all domains"
    test = np.flatnonzero((part == 2) & unseen)
    batches = prefill_batches(made, test, 36)
    print(f"\nacross domains: {', '.join(UNSEEN)}; distance 1, prefill\n")
    print(header("predictor", ["total variation", "top-4 hits", "token hits"]))
    for p in (
        LastWindow(),
        seen_affinity,
        affinity,
        GatePredictor(gates),
        Calibrated(GatePredictor(gates)),
        GatePredictor(gates, tuned, name="gate tuned, not on them"),
        Calibrated(GatePredictor(gates, tuned, name="gate tuned, not on them,")),
        *adapted.values(),
        GatePredictor(gates, all_tuned, name="gate tuned on all domains"),
    ):
        s = score_predictor(p, made, batches, distances=(1,), warm_up=WARM_UP)
        print(row(s.name, [float(mean(x, (0, 1, 2))) for x in (s.distance_DBL, s.top_DBL, s.token_DBL)]))


def main() -> None:
    """Print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "moeless-opt")
    parser.add_argument("--batches", type=int, default=52, help="batches of prefill (default 52)")
    parser.add_argument("--times", action="store_true", help="only the time of a prediction")
    args = parser.parse_args()
    if args.times:
        print_times(plain_gates(tiny_moe.load()))
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    made, part = held_out_requests(args.cache), parts()
    train, held_out, test = (np.flatnonzero(part == i) for i in range(3))
    gates = plain_gates(tiny_moe.load())
    tokens = [len(made.rows(p)) for p in (train, held_out, test)]
    print(
        f"{len(DOMAINS)} domains; {tokens[0]} tokens to train on, {tokens[1]} to profile, {tokens[2]} to test"
    )
    tuning = fine_tune(gates, made.pairs(train), made.pairs(held_out), distances=DISTANCES, threshold=2.0)
    routes = made.experts_TLK[made.rows(train)]

    def predictors() -> list[Any]:
        history = [LastWindow(), Ewma(), LinearTrend(), AutoRegressive()]
        affinity = Affinity(made.layers, made.experts).learn(routes)
        plain, tuned = GatePredictor(gates), GatePredictor(gates, tuning.tuned)
        return [*history, affinity, Calibrated(affinity), plain, Calibrated(plain), tuned, Calibrated(tuned)]

    for title, batches in (
        ("decode, 64 tokens", decode_batches(made, test, 4 * args.batches)),
        ("prefill, 8 requests", prefill_batches(made, test, args.batches)),
    ):
        scores = [
            score_predictor(p, made, batches, distances=DISTANCES, warm_up=WARM_UP) for p in predictors()
        ]
        print_by_distance(title, scores)
        static_LE = np.stack([np.bincount(x.ravel(), minlength=made.experts) for x in routes.swapaxes(0, 1)])
        print_imbalance(
            made,
            batches[: args.batches],
            static_LE.astype(float),
            [
                s
                for s in scores
                if s.name in ("last", "ar(1)", "affinity", "gate", "gate calibrated", "gate tuned")
            ],
        )
    print_by_layer(scores)
    print_domains(made, gates, part, tuning.tuned)
    print_tuning(made, gates, (train, held_out, test))
    print_times(gates)


if __name__ == "__main__":
    main()
