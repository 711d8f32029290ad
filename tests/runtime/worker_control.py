"""Ranks of `test_worlds`: plans that are refused, replaced, damaged, late; observation; traces."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import source_check
import torch
import torch.distributed as dist
import worlds

from moeless_opt.problems.errors import InfeasibleError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.io.traces import read_token_traces
from moeless_opt.problems.plan.migration import Migration
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.control.backend import Backend, LoadWindow
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.engines.observe import (
    record_traces,
    replay_gate,
    replay_routes,
    save_token_traces,
    tap_hidden,
)
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.live.schedule import Shipment
from moeless_opt.runtime.live.slots import rows_to_slots, static_slots
from moeless_opt.solvers.migration.schedule import schedule_migration

LAYERS = 3


class World:
    def __init__(self) -> None:
        self.rank, self.size = worlds.join()
        self.model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
        self.x = worlds.batch(self.rank)
        self.stock = worlds.forward(self.model, self.x)
        self.rng = np.random.default_rng(1)

    def same(self) -> None:
        assert (worlds.forward(self.model, self.x) - self.stock).abs().max().item() == 0.0

    def until_over(self, live: LiveModel, number: int, forwards: int = 60) -> str:
        for _ in range(forwards):
            if live.migration(number).status not in ("waiting", "moving"):
                return live.migration(number).status
            self.same()
        raise AssertionError(f"not over after {forwards} forwards: {live.migration(number)}")

    def slots(self, **more: Any) -> np.ndarray:
        return worlds.random_slots(self.rng, LAYERS, self.size, **more)


def refuses(w: World) -> None:
    """What attach does not support is refused by name."""
    config = w.model.config
    for field, value, word in (
        ("moe_expert_capacity_factor", 1.0, "moe_expert_capacity_factor"),
        ("cuda_graph_impl", "local", "CUDA graphs"),
        ("moe_shared_expert_overlap", True, "moe_shared_expert_overlap"),
        ("context_parallel_size", 2, "context parallelism"),
        ("virtual_pipeline_model_parallel_size", 2, "interleaved pipeline stages"),
    ):
        old = getattr(config, field)
        setattr(config, field, value)
        with pytest.raises(UnsupportedFeatureError, match=word):
            attach(w.model)
        setattr(config, field, old)
    dispatcher = w.model.decoder.layers[0].mlp.token_dispatcher
    dispatcher.tp_size = 2
    with pytest.raises(UnsupportedFeatureError, match="expert tensor parallelism"):
        attach(w.model)
    dispatcher.tp_size = 1


def refused_plans(w: World, live: LiveModel) -> None:
    """A plan that cannot be is refused where it is handed in, and nothing changes."""
    before = live.slots_LGC
    twice = live.slots_LGC.copy()
    twice[1, 0, 1] = twice[1, 0, 0]
    for bad, error in (
        (np.full((LAYERS, w.size, 2), -1), ProblemError),
        (twice, ProblemError),
        (before[:, :2], ProblemError),
        (before.astype(float), ProblemError),
    ):
        with pytest.raises(error):
            live.apply(bad)
    shifted = np.roll(static_slots(worlds.EXPERTS, w.size, LAYERS), 1, axis=1)
    with pytest.raises(InfeasibleError, match="max_extra_bytes"):
        live.apply(shifted, max_extra_bytes=0)
    assert (live.slots_LGC == before).all()
    w.same()


def memory(w: World, live: LiveModel) -> dict[str, int]:
    """Peak bytes stay within the limit, measured on live tensors."""
    one = live.banks[0].expert_bytes
    worst = 0
    for k in range(4):
        wanted = w.slots() if k else np.roll(live.slots_LGC, 1, axis=1)
        now = np.array([sum(len(row[g]) for row in live.migrator.rows_LG) for g in range(w.size)]) * one
        after = (wanted >= 0).sum(axis=(0, 2)) * one
        live.memory()
        live.meter.reset_peak()
        number = live.apply(wanted, max_step_bytes=one, max_extra_bytes=2 * one)
        assert w.until_over(live, number, 200) == "done", live.migration(number)
        peak_G = live.memory().peak_G
        limit_G = np.maximum(now, after) + 2 * one
        assert (peak_G <= limit_G).all(), (peak_G.tolist(), limit_G.tolist())
        assert (live.memory().held_G == after).all(), (live.memory().held_G, after)
        worst = max(worst, int((peak_G - np.maximum(now, after)).max()))
        assert (np.sort(live.slots_LGC, axis=2)[:, :, -1] >= -1).all()
    return {"extra_bytes_used": worst, "extra_bytes_allowed": 2 * one}


def superseded(w: World, live: LiveModel) -> None:
    """A newer plan replaces one under way; what was on its way arrives, the rest is dropped."""
    one = live.banks[0].expert_bytes
    early = w.slots()
    first = live.apply(early, max_step_bytes=one)
    for _ in range(2):
        w.same()
    assert live.migration(first).status == "moving"
    assert (live.target_LGC == early).all()
    last = w.slots()
    second = live.apply(w.slots(), max_step_bytes=one)
    third = live.apply(last, max_step_bytes=one)
    assert w.until_over(live, third, 200) == "done"
    assert live.migration(first).status == "superseded", live.migration(first)
    assert live.migration(second).status == "superseded"
    assert [[sorted(r) for r in layer] for layer in live.migrator.rows_LG] == [
        [sorted(e for e in row if e >= 0) for row in layer] for layer in last.tolist()
    ]
    live.settle()
    assert (live.target_LGC == live.slots_LGC).all()
    assert (live.memory().held_G == live.memory().live_G).all(), live.memory()


def late_and_different(w: World, live: LiveModel) -> None:
    """Ranks hand a plan in at different moments, or different plans: nobody stumbles."""
    wanted = w.slots()
    number = live.apply(wanted) if w.rank != 1 else 0
    w.same()
    w.same()
    if w.rank == 1:
        number = live.apply(wanted)
    assert w.until_over(live, number) == "done"
    # Refused on one rank alone: nobody takes it, and the next one is understood again.
    before = live.slots_LGC
    if w.rank == 2:
        with pytest.raises(ProblemError):
            live.apply(before[:, :2])
    else:
        number = live.apply(np.roll(before, 1, axis=1))
    for _ in range(3):
        w.same()
    assert w.rank == 2 or live.migration(number).status == "aborted", live.migration(number)
    assert (live.slots_LGC == before).all()
    mine = worlds.random_slots(np.random.default_rng(w.rank), LAYERS, w.size)
    number = live.apply(mine)
    assert w.until_over(live, number) == "aborted"
    assert "different plans" in live.migration(number).reason
    assert (live.slots_LGC == before).all()


def damaged(w: World, live: LiveModel) -> None:
    """A checksum catches a damaged transfer before it serves; without memory nothing moves either."""
    live.apply(static_slots(worlds.EXPERTS, w.size, LAYERS))
    live.settle()
    before = live.slots_LGC
    wanted = before.copy()
    wanted[:, 3, :] = [[7, 0]] * LAYERS
    wanted[:, 0, :] = [[6, 1]] * LAYERS
    if w.rank == 0:
        weight = live.banks[1].resident[0][0]
        bits = weight.data.view(torch.int64)
        bits[3, 5] ^= 1 << 17
    number = live.apply(wanted)
    # The damaged expert serves wrongly on rank 0 already: only the plan's fate matters here.
    for _ in range(60):
        if live.migration(number).status not in ("waiting", "moving"):
            break
        worlds.forward(w.model, w.x)
    assert live.migration(number).status == "aborted", live.migration(number)
    assert (live.slots_LGC[1] == before[1]).all()
    if w.rank == 3:
        assert "expert 0 of layer 1" in live.migration(number).reason, live.migration(number)
    if w.rank == 0:
        bits[3, 5] ^= 1 << 17
    w.same()
    if w.rank == 3:
        live.meter.hard_limit = live.meter.now + live.banks[0].expert_bytes - 1
    before = live.slots_LGC
    number = live.apply(np.roll(before, 1, axis=1))
    assert w.until_over(live, number) == "aborted"
    assert "memory" in live.migration(number).reason or "bytes" in live.migration(number).reason
    assert (live.slots_LGC == before).all()
    live.meter.hard_limit = None
    live.settle()
    assert (live.memory().held_G == live.memory().live_G).all(), live.memory()


def given_steps(w: World, live: LiveModel) -> None:
    """A schedule that somebody else made is followed."""
    static = static_slots(worlds.EXPERTS, w.size, LAYERS)
    live.apply(static)
    live.settle()
    wanted = static.copy()
    wanted[0, 0] = [6, 1]
    wanted[0, 3] = [0, 7]
    steps = [[Shipment(0, 6, 3, 0, 1)], [Shipment(0, 0, 0, 3, 1)]]
    number = live.apply(wanted, steps=steps)
    assert w.until_over(live, number) == "done"
    assert live.migration(number).steps == 2
    assert (live.slots_LGC == wanted).all()
    with pytest.raises(ProblemError, match="step"):
        live.apply(static, steps=steps[:1])
    # The planner's own schedules, with drops, and cycles broken by way of a third rank.
    topology = Topology.uniform(1, w.size, slots=worlds.EXPERTS)
    one = live.banks[0].expert_bytes
    for _ in range(3):
        wanted = w.slots()
        migration: Migration = schedule_migration(
            live.slots_LGC,
            wanted,
            worlds.EXPERTS,
            topology,
            bytes_L=np.full(LAYERS, one),
            max_step_bytes=3 * one,
        )
        number = live.apply(wanted, steps=migration)
        assert w.until_over(live, number, 200) == "done", live.migration(number)
        assert (np.sort(live.slots_LGC, 2)[:, :, -3:] == np.sort(wanted, 2)[:, :, -3:]).all()
        assert live.migration(number).bytes == migration.bytes


def observation(w: World, live: LiveModel) -> dict[str, float]:
    """Loads are exactly what was routed; padding does not count; time is measured."""
    assert isinstance(live, Backend)
    live.observe()
    with record_traces(live, batch_size=2) as recorder:
        w.same()
    trace = recorder.trace()
    seen = live.observe()
    assert seen.batches == 1
    assert trace.experts_TLK.shape == (w.x.numel(), LAYERS, 2)
    assert trace.offsets.tolist() == [0, w.x.size(1), 2 * w.x.size(1)]
    mine = torch.from_numpy(trace.load_LE().astype(np.int64))
    dist.all_reduce(mine)
    assert (mine.numpy() == seen.load_LE).all()
    assert (seen.tokens_LG.sum(axis=1) == seen.load_LE.sum(axis=1)).all()
    assert (seen.seconds_LG.sum(axis=0) > 0).all()
    window = LoadWindow(decay=0.5)
    window.update(seen)
    assert np.allclose(window.update(seen), 1.5 * seen.load_LE)
    assert window.speed_G().shape == (w.size,)
    # Megatron's tokens are sequence-major: position s of sequence b is token s * batch + b.
    valid = torch.ones(w.x.size(1), w.x.size(0), dtype=torch.bool)
    valid[20:] = False
    with live.real_tokens(valid), record_traces(live) as recorder:
        w.same()
    half = live.observe()
    assert half.load_LE.sum() == LAYERS * 2 * valid.sum().item() * w.size
    assert len(recorder.trace().experts_TLK) == valid.sum().item()
    with live.real_tokens(valid, skip=True):
        out = worlds.forward(w.model, w.x)
    skipped = live.observe()
    assert (skipped.load_LE == half.load_LE).all()
    assert skipped.tokens_LG.sum() < half.tokens_LG.sum()
    assert (out[:, :20] - w.stock[:, :20]).abs().max().item() == 0.0
    source_check.check(live, w.same, valid, mine.numpy())
    live.observe()
    # Traces to a file, and back through the routers of other tokens.
    path = f"{os.environ['WORLD_FOLDER']}/trace{w.rank}.npz"
    save_token_traces(trace, path)
    again = read_token_traces(path, experts=worlds.EXPERTS)
    assert (again.experts_TLK == trace.experts_TLK).all()
    other = worlds.batch(w.rank, 5)
    with replay_routes(w.model) as replay:
        replay.load(again.experts_TLK)
        worlds.forward(w.model, other)
    assert (live.observe().load_LE == seen.load_LE).all()
    worlds.forward(w.model, other)
    assert (live.observe().load_LE != seen.load_LE).any()
    # The gate of a layer, replayed on what that layer sees, is exact; one layer ahead it is a guess.
    exact, ahead = {}, {}

    def look(layer: int, hidden: torch.Tensor) -> None:
        exact[layer] = replay_gate(w.model, layer, hidden)
        if layer + 1 < LAYERS:
            ahead[layer + 1] = replay_gate(w.model, layer + 1, hidden)

    tap = tap_hidden(w.model, look)
    w.same()
    tap.close()
    for layer in range(LAYERS):
        assert exact[layer].tolist() == trace.load_LE()[layer].tolist()
    assert all(int(c.sum()) == 2 * w.x.numel() for c in ahead.values())
    live.observe()
    w.same()
    assert len(exact) == LAYERS
    return {}


def shares(w: World, live: LiveModel) -> dict[str, list[float]]:
    """Balanced shares even the ranks out at least as well as equal ones; both give the same outputs."""
    rows = [[0, 1, 2, 3], [4, 5, 0, 1], [6, 7, 2, 0], [3, 4, 5, 6]]
    live.apply(np.stack([rows_to_slots(rows)] * LAYERS))
    live.settle()
    out = {}
    for name in ("equal", "balanced"):
        live.set_shares(name)
        worlds.forward(w.model, w.x)
        live.observe()
        worlds.forward(w.model, w.x)
        seen = live.observe()
        assert seen.tokens_LG.sum() == seen.load_LE.sum()
        out[name] = seen.imbalance_L.tolist()
    assert sum(out["balanced"]) <= sum(out["equal"]) + 1e-9, out
    w.same()
    return out


def main() -> None:
    w = World()
    refuses(w)
    live = attach(w.model, checksums=True)
    refused_plans(w, live)
    results: dict[str, Any] = {"memory": memory(w, live)}
    superseded(w, live)
    late_and_different(w, live)
    damaged(w, live)
    given_steps(w, live)
    observation(w, live)
    results["shares"] = shares(w, live)
    assert live.migrator.courier.waits == 0
    live.detach()
    w.same()
    worlds.report(results)


main()
