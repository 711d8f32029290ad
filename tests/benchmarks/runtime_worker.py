"""Ranks of `runtime_table`: ``python`` is not meant to run this by itself."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime"))
import worlds

from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.faults import Guard
from moeless_opt.runtime.live.home import MappedHome


def placements(plans: int) -> dict[str, Any]:
    """Outputs, bytes, waits, and memory through many re-placements under traffic."""
    rank, size = worlds.join()
    layers = 4
    model = worlds.tiny_model(layers, 2, torch.float64, exact=True)
    batches = [worlds.batch(rank, k) for k in range(4)]
    stock = [worlds.forward(model, x) for x in batches]
    live = attach(model, checksums=True)
    one = live.banks[0].expert_bytes
    rng = np.random.default_rng(0)
    worst, forwards, over = 0.0, 0, -(10**18)
    calm: list[float] = []
    busy: list[float] = []
    done = 0

    def run() -> None:
        nonlocal worst, forwards
        began = time.perf_counter()
        out = worlds.forward(model, batches[forwards % 4])
        (busy if not live.migrator.idle else calm).append(time.perf_counter() - began)
        worst = max(worst, (out - stock[forwards % 4]).abs().max().item())
        forwards += 1

    for _ in range(plans):
        run()
        wanted = worlds.random_slots(rng, layers, size)
        held = np.array([sum(len(row[g]) for row in live.migrator.rows_LG) for g in range(size)]) * one
        after = (wanted >= 0).sum(axis=(0, 2)) * one
        live.meter.reset_peak()
        number = live.apply(wanted, max_step_bytes=4 * one, max_extra_bytes=4 * one)
        while live.migration(number).status in ("waiting", "moving"):
            run()
        done += live.migration(number).status == "done"
        over = max(over, int(live.meter.peak - max(held[rank], after[rank])))
    figures = torch.tensor([worst, live.migrator.courier.waits, over], dtype=torch.float64)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return {
        "plans": plans,
        "done": done,
        "forwards": forwards,
        "worst": figures[0].item(),
        "waits": int(figures[1]),
        "bytes": live.migrator.bytes_moved,
        "allowed": 4 * one,
        "used": int(figures[2]),
        "calm_ms": 1e3 * statistics.median(calm),
        "busy_ms": 1e3 * statistics.median(busy),
    }


def grouped(hidden: int, inner: int) -> list[dict[str, Any]]:
    """Grouped against looped experts of one rank: processor time, and the largest difference."""
    worlds.join()
    out = []
    for dtype, experts in itertools.product((torch.float32, torch.bfloat16), (8, 32, 64)):
        worlds.EXPERTS, worlds.HIDDEN = experts, hidden
        lives = []
        for how in ("loop", "grouped"):
            model = worlds.tiny_model(1, 2, dtype, moe_ffn_hidden_size=inner, ffn_hidden_size=inner)
            lives.append(attach(model, experts=how, row_block=1))
        chance = torch.Generator().manual_seed(0)
        for tokens in (1, 8, 64, 512):
            x = torch.randn(tokens, hidden, generator=chance).to(dtype)
            sizes = torch.randint(experts, (tokens,), generator=chance).bincount(minlength=experts).numpy()
            results: list[Any] = [None, None]
            took: list[list[float]] = [[], []]
            for turn in range(16):
                for which in (0, 1) if turn % 2 else (1, 0):
                    began = time.process_time()
                    with torch.no_grad():
                        results[which] = lives[which].adopted.run_experts(0, x, sizes)[0]
                    took[which].append(time.process_time() - began)
            out.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "experts": experts,
                    "tokens": tokens,
                    "ms": [1e3 * min(times[1:]) for times in took],
                    "difference": (results[0] - results[1]).abs().max().item(),
                    "scale": results[0].abs().max().item(),
                }
            )
        for live in lives:
            live.detach()
    return out


def overhead(rounds: int, hidden: int, length: int, experts: str) -> dict[str, Any]:
    """An attached model with the static placement against megatron-core's own dispatcher and experts."""
    import stock_on_cpu

    rank, _ = worlds.join()
    stock_on_cpu.install()
    worlds.HIDDEN = hidden
    fields = {"moe_token_dispatcher_type": "alltoall"}
    wide = {"moe_ffn_hidden_size": 2 * hidden, "ffn_hidden_size": 2 * hidden}
    models = []
    for _ in range(2):
        model = worlds.tiny_model(4, 2, torch.float32, **wide, **fields)
        models.append(model)
    stock_on_cpu.use_stock_dispatchers(models[0])
    live = attach(models[1], experts=experts)
    x = worlds.batch(rank, 0, 4, length)
    seconds: list[list[float]] = [[], []]
    processor: list[list[float]] = [[], []]
    difference = (worlds.forward(models[0], x) - worlds.forward(models[1], x)).abs().max().item()
    for k in range(rounds):
        for which in (0, 1) if k % 2 else (1, 0):
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            worlds.forward(models[which], x)
            seconds[which].append(time.perf_counter() - began)
            processor[which].append(time.process_time() - used)
    live.detach()
    stock_ms, live_ms = (1e3 * statistics.median(s) for s in seconds)
    return {
        "hidden": hidden,
        "tokens": x.numel(),
        "stock_ms": stock_ms,
        "live_ms": live_ms,
        "ratio": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "processor_ms": [1e3 * statistics.median(p) for p in processor],
        "difference": difference,
    }


def kills(seed: int) -> dict[str, Any]:
    """Three deaths, one after the other, at random moments under traffic and migrations."""
    rank, size = worlds.join()
    chance = np.random.default_rng(seed)
    victims = chance.permutation(size)[: size - 1].tolist()
    moments = np.sort(chance.choice(np.arange(3, 45), size - 1, replace=False)).tolist()
    model = worlds.tiny_model(3, 2, torch.float64, exact=True)
    batches = [worlds.batch(rank, k) for k in range(4)]
    stock = [worlds.forward(model, x) for x in batches]
    live = attach(model, timeout=8.0, checksums=True)
    folder = os.environ["WORLD_FOLDER"] + "/home"
    live.save_home(folder)
    live.use_home(MappedHome(folder, size))
    guard = Guard(live, grace=0.5, slots=8)
    # A death comes after so many batches of layers in the step: in the middle of a forward pass.
    depth = {r: int(chance.integers(0, 3)) for r in range(size)}
    worst, attempts = 0.0, 0
    for step in range(48):

        def work(step: int = step) -> torch.Tensor:
            nonlocal attempts
            attempts += 1
            if rank in victims and step == moments[victims.index(rank)]:
                seen = [0]

                def die(*_: Any) -> None:
                    seen[0] += 1
                    if seen[0] > depth[rank]:
                        os.kill(os.getpid(), signal.SIGKILL)

                for d in live.dispatchers:
                    d.on_batch.append(die)
            return worlds.forward(model, batches[step % 4])

        before = len(guard.recoveries)
        out = guard.run(work)
        worst = max(worst, (out - stock[step % 4]).abs().max().item())
        if len(guard.recoveries) == before and step % 2 == 0:
            rng = np.random.default_rng(1000 * seed + step)
            live.apply(worlds.random_slots(rng, 3, live.group.size), max_step_bytes=300_000)
    return {
        "worst": worst,
        "lost": [r.lost for r in guard.recoveries],
        "seconds": [r.seconds for r in guard.recoveries],
        "agree": [r.agree_seconds for r in guard.recoveries],
        "repeated": attempts - 48,
        "bytes": [r.restored_bytes for r in guard.recoveries],
    }


def traffic(steps_per_domain: int, slots: int) -> dict[str, Any]:
    """Tokens per rank on the project's own model, replaying its recorded traffic domain after domain."""
    from moeless_opt import plan
    from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
    from moeless_opt.problems.spec.topology import Topology
    from moeless_opt.runtime.control.backend import LoadWindow
    from moeless_opt.runtime.engines.observe import replay_routes
    from moeless_opt.runtime.live.slots import static_slots
    from moeless_opt.runtime.tiny_moe import model as tiny_moe

    rank, size = worlds.join()
    model = tiny_moe.load()
    live = attach(model)
    traces = tiny_moe_traces()
    chance = np.random.default_rng(rank)
    length = 192
    steps = []
    for name in traces.domains:
        of_domain = traces.of_domain(name)
        for _ in range(steps_per_domain):
            drawn: list[Any] = []
            while sum(map(len, drawn)) < length:
                drawn.append(traces.request(int(chance.choice(of_domain))))
            steps.append(np.concatenate(drawn)[:length])
    tokens = torch.from_numpy(chance.integers(0, 256, (1, length)))
    topology = Topology.uniform(1, size, slots=slots)
    static = static_slots(tiny_moe.EXPERTS, size, tiny_moe.LAYERS)
    one = live.banks[0].expert_bytes
    results: dict[str, Any] = {}
    outputs: list[torch.Tensor] = []
    for name in ("static EP", "equal split", "shares", "shares and re-plans"):
        live.apply(static)
        live.settle()
        live.set_shares("equal" if name == "equal split" else "balanced")
        live.observe()
        window, imbalance, moved, worst = LoadWindow(0.5), [], live.migrator.bytes_moved, 0.0
        for k, routes in enumerate(steps):
            with replay_routes(model) as replay:
                replay.load(routes)
                out = worlds.forward(model, tokens)
            if name == "static EP":
                outputs.append(out)
            worst = max(worst, (out - outputs[k]).abs().max().item())
            seen = live.observe()
            imbalance.append(seen.imbalance_L)
            loads = window.update(seen)
            first = k == 0 and name != "static EP"
            if first or (name == "shares and re-plans" and k % 2 == 0):
                wanted = plan(loads, topology, current=live.target_LGC, expert_bytes=one)
                live.apply(wanted.slots_LGC)
                if first:
                    live.settle()
        live.settle()
        results[name] = {
            "mean": float(np.mean(imbalance[1:])),
            "worst": float(np.max(imbalance[1:])),
            "bytes": live.migrator.bytes_moved - moved,
            "difference": worst,
        }
    return results


def texts(model: Any, each: int, length: int) -> list[torch.Tensor]:
    """What the model writes itself: tokens [each, length] for every domain."""
    from moeless_opt.runtime.tiny_moe import model as tiny_moe

    start = 12
    prompts = [tiny_moe.encode(lines[0])[:start] for lines in tiny_moe.PROMPTS.values()]
    shortest = min(map(len, prompts))
    tokens = torch.tensor([p[:shortest] for p in prompts for _ in range(each)])
    chance = torch.Generator().manual_seed(100 + int(os.environ["RANK"]))
    while tokens.size(1) < length:
        logits = worlds.forward(model, tokens)[:, -1, :256].float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(1), 1, generator=chance)], dim=1)
    return list(tokens.view(len(prompts), each, length))


def modes(steps_per_domain: int, slots: int) -> dict[str, Any]:
    """The controller's modes on the project's own model, on text that it writes, domain after domain."""
    from moeless_opt.problems.spec.architecture import ModelSpec
    from moeless_opt.problems.spec.topology import Topology
    from moeless_opt.runtime.control.controller import Controller
    from moeless_opt.runtime.control.layer_planner import LayerPlanner
    from moeless_opt.runtime.control.planner import Planner
    from moeless_opt.runtime.live.slots import static_slots
    from moeless_opt.runtime.predict.foresight import GatePredictor
    from moeless_opt.runtime.predict.gates import plain_gates
    from moeless_opt.runtime.predict.per_layer import PerLayer
    from moeless_opt.runtime.tiny_moe import model as tiny_moe

    _, size = worlds.join()
    model = tiny_moe.load()
    live = attach(model)
    batches = texts(model, 2, 96)
    topology = Topology.uniform(1, size, slots=slots)
    static = static_slots(tiny_moe.EXPERTS, size, tiny_moe.LAYERS)
    curve = live.measure((16, 64, 128, 256, 512), clock=time.thread_time)
    spec = ModelSpec(
        name="tiny MoE",
        layers=tiny_moe.LAYERS,
        experts=tiny_moe.EXPERTS,
        top_k=tiny_moe.TOP_K,
        hidden=tiny_moe.HIDDEN,
        ffn=tiny_moe.EXPERT_WIDTH,
    )
    quick = LayerPlanner(topology, spec, curve, gain=0.01)
    planners = {"few moves": Planner(topology=topology), "by time": quick}
    outputs: list[torch.Tensor] = []
    results: dict[str, Any] = {}
    runs = [("static EP", "", 0), ("windowed", "few moves", 0), ("windowed", "by time", 0)]
    runs += [("per layer", "few moves", 1), ("per layer", "by time", 1), ("per layer", "by time", 2)]
    runs += [("per layer", "by time", 3)]
    for mode, kind, distance in runs:
        live.apply(static)
        live.settle()
        elastic = live.elastic(2.0 * steps_per_domain, clock="passes")
        controller = Controller(live, planners.get(kind) or quick, every=2)
        live.observe()
        imbalance, worst, seconds, step = [], 0.0, [], 0
        context = PerLayer(live, controller, GatePredictor(plain_gates(model)), distance=distance or 1)
        finished = len(live.lanes.finished)
        if mode == "per layer":
            context.__enter__()
        for tokens in batches:
            for _ in range(steps_per_domain):
                began = time.perf_counter()
                out = worlds.forward(model, tokens)
                seconds.append(time.perf_counter() - began)
                if mode == "static EP":
                    outputs.append(out)
                worst = max(worst, (out - outputs[step]).abs().max().item())
                step += 1
                if mode == "windowed":
                    observe, seen = live.observe, live.observe()
                    live.observe = lambda seen=seen: seen  # type: ignore[method-assign]
                    controller.after()
                    live.observe = observe  # type: ignore[method-assign]
                else:
                    seen = live.observe()
                imbalance.append(seen.imbalance_L)
        if mode == "per layer":
            context.__exit__()
        controller.drain()
        live.settle()
        report = elastic.report()
        moved = [t for t in list(live.lanes.finished)[finished:] if t.cold]
        plans = [d.seconds for d in controller.layer_decisions] or [d.seconds for d in controller.decisions]
        results[f"{mode} {kind} {distance or ''}"] = {
            "mean": float(np.mean(imbalance[1:])),
            "worst": float(np.max(imbalance[1:])),
            "cold": report.cold_starts,
            "reuses": report.reuses,
            "same": sum(t.ended == t.opened for t in moved),
            "moved": len(moved),
            "difference": worst,
            "plan_ms": 1e3 * statistics.median(plans) if plans else float("nan"),
            "forward_ms": 1e3 * statistics.median(seconds),
            "cost": [elastic.meter.cost(rule).total for rule in ("resident", "passes", "functions")],
            "waits": live.migrator.courier.waits,
            "errors": sum(bool(d.error) for d in controller.layer_decisions),
        }
        controller.close()
    return results


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    run = {
        "placements": placements,
        "overhead": overhead,
        "grouped": grouped,
        "kills": kills,
        "traffic": traffic,
        "modes": modes,
    }[what]
    worlds.report(run(*(int(n) if n.isdigit() else n for n in numbers)))
