"""Print what the engines' balancers and our plug-ins make of a drift: imbalance, replicas shipped, time.

``python tests/benchmarks/engines_table.py [--data DIR] [--repeats 3] [--vllm WHEEL] [--sglang WHEEL]`` begins
with the balancer's own plan for traffic A, lets it become B and calls the policy: measured loads in DIR
(``deepseek_v3_counts.npz``), else a drifting lognormal of the same shape. WHEEL is the folder of an unpacked
wheel, whose own policy is then run too (it needs nothing but torch and NumPy). Imbalance is max/mean over the
GPUs, mean over the layers, tokens divided as the engine does: evenly, or by the entries of its table.
Milliseconds are of the processor: the whole call, checks, verification and tables included.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import moeless_opt as mo
from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapTask, answer
from moeless_opt.problems.plan import even_times, new_replicas
from moeless_opt.report import table
from moeless_opt.solvers.baselines.eplb import rebalance

SIZES = ((32, 9), (64, 5))
START = "prefill_in1024"
DRIFTS = ("prefill_in4096", "decode_in1000out1000")
ENTRIES = (64, 256, 1024)
PUBLISHED = {  # measured elsewhere with its own code, at 32 x 9, from its own plan on A
    "prefill_in4096": (1.331, 1.112, 0.197),
    "decode_in1000out1000": (1.715, 1.092, 0.257),
}
Call = Callable[[np.ndarray, Any], tuple[np.ndarray, float | None]]
"""Loads and live map to a map [L, S], and its imbalance where that is not of an even split."""


def recorded(folder: Path | None) -> dict[str, np.ndarray]:
    """Loads [58, 256] by name."""
    names = (START, *DRIFTS)
    if folder is not None:
        with np.load(folder / "deepseek_v3_counts.npz") as archive:
            counts = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(float), strict=True))
        return {name: counts[name] for name in names}
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 0.8, (58, 256)) * 1000
    return {name: np.rint(base * rng.lognormal(0, 0.3, base.shape)) for name in names}


def module_of(wheel: Path, name: str) -> ModuleType:
    """One module of an unpacked wheel, beside its siblings, without the package around it."""
    path = wheel.joinpath(*name.split("."))
    parent = "engine_" + path.parent.name
    if parent not in sys.modules:
        package = ModuleType(parent)
        package.__path__ = [str(path.parent)]
        sys.modules[parent] = package
    spec = importlib.util.spec_from_file_location(f"{parent}.{path.name}", path.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(gpus: int, width: int, vllm: Path | None, sglang: Path | None) -> dict[str, Call]:
    """The published method, and the engines' own code where it is at hand; global policy, one node."""
    slots = gpus * width

    def eplb(load: np.ndarray, live: Any) -> tuple[np.ndarray, float | None]:
        return rebalance(load, slots, 1, 1, gpus).slots_LGC.reshape(len(load), slots), None

    found: dict[str, Call] = {"EPLB (our twin)": eplb}
    if vllm is not None:
        policy = module_of(vllm, "vllm.distributed.eplb.policy.default").DefaultEplbPolicy

        def of_vllm(load: np.ndarray, live: Any) -> tuple[np.ndarray, float | None]:
            old = None if live is None else torch.from_numpy(live.astype(np.int64))
            weight = torch.from_numpy(load.astype(np.int64))
            return policy.rebalance_experts(weight, slots, 1, 1, gpus, old).numpy(), None

        found["vLLM 0.33's own"] = of_vllm
    if sglang is not None:
        deepseek = module_of(sglang, "sglang.srt.eplb.eplb_algorithms.deepseek")

        def of_sglang(load: np.ndarray, live: Any) -> tuple[np.ndarray, float | None]:
            weight = torch.from_numpy(load.astype(np.int64))
            return deepseek.rebalance_experts(weight, slots, 1, 1, gpus, False)[0].numpy(), None

        found["SGLang 0.5.23's own"] = of_sglang
    return found


def ours(gpus: int, width: int) -> dict[str, Call]:
    """The plug-ins' policy: an even split, and weighted replicas."""

    def call(options: PolicyOptions, split: str) -> Call:
        def ask(load: np.ndarray, live: Any) -> tuple[np.ndarray, float | None]:
            task = MapTask(load_LE=load, slots=gpus * width, gpus=gpus, live_LS=live)
            found = answer(task, options, split)
            return found.map_LS, None if split == "equal" else float(found.after_L.mean())

        return ask

    found = {
        f"ours, even split, to {1 + to:.2f}": call(PolicyOptions(tolerance=to), "equal")
        for to in (0.02, 0.05)
    }
    return found | {f"ours, {n} entries": call(PolicyOptions(entries=n), "fractional") for n in ENTRIES}


def imbalance(load: np.ndarray, map_LS: np.ndarray, gpus: int) -> float:
    """max / mean with an even split, mean over the layers."""
    slots = map_LS.reshape(len(load), gpus, -1).astype(np.int32)
    return float((even_times(load, slots, np.ones(gpus)).max(1) / (load.sum(1) / gpus)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--sglang", type=Path)
    args = parser.parse_args()
    mo.warm_up()
    loads, rows = recorded(args.data), []
    for gpus, width in SIZES:
        for name, call in (theirs(gpus, width, args.vllm, args.sglang) | ours(gpus, width)).items():
            live, _ = call(loads[START], None)
            for drift in DRIFTS:
                load, spent = loads[drift], []
                for _ in range(args.repeats):
                    begun = time.process_time()
                    new, weighted = call(load, live)
                    spent.append((time.process_time() - begun) * 1e3)
                shape = (len(load), gpus, width)
                old, now = (one.reshape(shape).astype(np.int32) for one in (live, new))
                moved = new_replicas(now, old, load.shape[1]).sum() / now.size
                after = imbalance(load, new, gpus) if weighted is None else weighted
                milliseconds = f"{statistics.median(spent):.0f}"
                rows.append(
                    (f"{gpus} x {width}", drift, name, f"{after:.4f}", f"{100 * moved:.2f} %", milliseconds)
                )
        if gpus == SIZES[0][0] and args.data is not None:
            for drift, (_, after, moved) in PUBLISHED.items():
                rows.append(
                    (
                        f"{gpus} x {width}",
                        drift,
                        "swift (published)",
                        f"{after:.3f}",
                        f"{100 * moved:.1f} %",
                        "",
                    )
                )
    rows.sort(key=lambda row: (SIZES.index(tuple(map(int, row[0].split(" x ")))), DRIFTS.index(row[1])))
    print(table(("GPUs", f"{START} ->", "balancer", "imbalance", "shipped", "ms processor"), rows))


if __name__ == "__main__":
    main()
