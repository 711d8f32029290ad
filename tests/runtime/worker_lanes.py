"""Ranks of `test_live_modes`: plans of single layers, elastic experts, and the per-layer mode."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import worlds

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links
from moeless_opt.runtime.control.backend import LayerBackend
from moeless_opt.runtime.control.controller import Controller
from moeless_opt.runtime.control.layer_planner import LayerPlanner
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.live.home import PinnedHome
from moeless_opt.runtime.live.model import LiveModel
from moeless_opt.runtime.live.slots import rows_to_slots, static_slots
from moeless_opt.runtime.pool.keep_alive import AdaptiveKeepAlive
from moeless_opt.runtime.predict.foresight import GatePredictor
from moeless_opt.runtime.predict.gates import plain_gates
from moeless_opt.runtime.predict.per_layer import PerLayer

LAYERS, BATCHES = 4, 3


class World:
    def __init__(self) -> None:
        self.rank, self.size = worlds.join()
        self.model = worlds.tiny_model(LAYERS, 2, torch.float64, exact=True)
        self.x = [worlds.batch(self.rank, k) for k in range(BATCHES)]
        self.stock = [worlds.forward(self.model, x) for x in self.x]
        self.rng = np.random.default_rng(2)
        self.passes = 0

    def same(self, batch: int | None = None) -> None:
        k = self.passes % BATCHES if batch is None else batch
        assert (worlds.forward(self.model, self.x[k]) - self.stock[k]).abs().max().item() == 0.0
        self.passes += 1

    def slots(self) -> np.ndarray:
        return worlds.random_slots(self.rng, 1, self.size)[0]

    def over(self, live: LiveModel, number: int) -> str:
        for _ in range(30):
            if live.layer_plan(number).over:
                return live.layer_plan(number).status
            self.same()
        raise AssertionError(f"not over: {live.layer_plan(number)}")


def physical(live: LiveModel) -> list[int]:
    return [len(bank.resident) + len(bank.staged) for bank in live.banks]


def single_layers(w: World, live: LiveModel) -> None:
    """Layers change one by one under traffic, and whole plans in between."""
    numbers = []
    whole = 0
    for step in range(24):
        for layer in range(LAYERS):
            if w.rng.random() < 0.5:
                numbers.append(live.apply_layer(layer, w.slots()))
        w.same()
        if step == 8:
            whole = live.apply(worlds.random_slots(w.rng, LAYERS, w.size))
    live.settle()
    assert live.migration(whole).status == "done"
    status = [live.layer_plan(n).status for n in numbers]
    assert set(status) <= {"done", "superseded"}
    assert status.count("done") > len(status) / 2
    # The newest plan of a layer is the one in force, and nothing else is in memory.
    for layer in range(LAYERS):
        last = max(t.number for t in live.lanes.finished if t.layer == layer and t.status == "done")
        wanted = live.layer_plan(last).slots_GC
        assert wanted is not None
        assert [sorted(r) for r in live.migrator.rows_LG[layer]] == [
            sorted(e for e in row if e >= 0) for row in wanted.tolist()
        ]
    assert (live.memory().held_G == live.memory().live_G).all()
    assert not live.lanes.extra


def refusals(w: World, live: LiveModel) -> None:
    """A layer's plan fails on all ranks or on none."""
    before = live.slots_LGC
    with w_raises(ProblemError, "layer"):
        live.open_layer(LAYERS)
    with w_raises(ProblemError, "no replica"):
        live.apply_layer(0, np.full((w.size, 2), -1, dtype=np.int32))
    with w_raises(ProblemError, "elastic"):
        live.prewarm_layer(0, w.slots())
    # One rank could not plan; the ranks planned differently; one rank never hears of it until later.
    ticket = live.open_layer(1)
    assert ticket is not None
    assert live.open_layer(1) is None  # it is still being made
    shifted = np.roll(before[1], 1, axis=0)
    live.offer_layer(ticket, None if w.rank == 2 else shifted, "no plan here" if w.rank == 2 else "")
    assert w.over(live, ticket.number) == "void"
    ticket = live.open_layer(1)
    assert ticket is not None
    live.offer_layer(ticket, np.roll(before[1], w.rank % 2, axis=0))
    assert w.over(live, ticket.number) == "void"
    assert "differently" in ticket.reason
    # No memory on one rank.
    if w.rank == 3:
        live.meter.hard_limit = live.meter.now
    number = live.apply_layer(2, np.roll(before[2], 1, axis=0))
    assert w.over(live, number) == "void"
    live.meter.hard_limit = None
    assert (live.slots_LGC == before).all()
    # Late on one rank: everybody waits for it without waiting.
    ticket = live.open_layer(0)
    assert ticket is not None
    shifted = np.roll(before[0], 1, axis=0)
    if w.rank != 1:
        live.offer_layer(ticket, shifted)
    for _ in range(3):
        w.same()
    assert ticket.status == "open"
    if w.rank == 1:
        live.offer_layer(ticket, shifted)
    assert w.over(live, ticket.number) == "done"
    assert (live.slots_LGC[0, :, : shifted.shape[1]] == shifted).all()


def w_raises(error: type[Exception], match: str) -> Any:
    import pytest

    return pytest.raises(error, match=match)


def damaged(w: World, live: LiveModel) -> None:
    """A damaged arrival never serves, and the layer can be planned again."""
    live.apply(static_slots(worlds.EXPERTS, w.size, LAYERS))
    live.settle()
    wanted = rows_to_slots([[0, 1], [2, 3], [4, 5], [6, 7, 0]])
    bits = live.banks[2].resident[0][0].data.view(torch.int64) if w.rank == 0 else None
    if bits is not None:
        bits[3, 5] ^= 1 << 17
    number = live.apply_layer(2, wanted)
    other = live.apply_layer(3, wanted)
    for _ in range(6):
        worlds.forward(w.model, w.x[0])
    assert live.layer_plan(number).status == "void"
    assert "checksum" in live.layer_plan(number).reason
    assert live.layer_plan(other).over
    if bits is not None:
        bits[3, 5] ^= 1 << 17
    w.same()
    assert w.over(live, live.apply_layer(2, wanted)) == "done"
    live.settle()
    assert (live.memory().held_G == live.memory().live_G).all()


def elastic(w: World, live: LiveModel) -> dict[str, Any]:
    """The pool is what is in memory; kept-alive replicas need no transfer; what it releases is freed."""
    one = live.banks[0].expert_bytes
    static = static_slots(worlds.EXPERTS, w.size)
    more = rows_to_slots([[0, 1, 2], [2, 3], [4, 5], [6, 7, 0]])
    live.apply(static_slots(worlds.EXPERTS, w.size, LAYERS))
    live.settle()
    e = live.elastic(3.0, clock="passes", slots=4)
    first = live.memory().held_G.sum()
    assert w.over(live, live.apply_layer(1, more)) == "done"
    assert (e.cold_starts, live.memory().held_G.sum()) == (2, first + 2 * one)
    assert w.over(live, live.apply_layer(1, static)) == "done"
    assert live.memory().held_G.sum() == first + 2 * one  # kept alive
    number = live.apply_layer(1, more)
    assert w.over(live, number) == "done"
    assert live.layer_plan(number).cold == 0
    assert (e.cold_starts, e.reuses) == (2, 2)
    assert w.over(live, live.apply_layer(1, static)) == "done"
    for _ in range(5):
        w.same()
    assert live.memory().held_G.sum() == first  # scaled to zero, and freed
    # Ahead of their use.
    number = live.prewarm_layer(3, more)
    assert w.over(live, number) == "done"
    assert (live.slots_LGC[3, :, :2] == static).all()
    number = live.apply_layer(3, more)
    assert w.over(live, number) == "done"
    assert live.layer_plan(number).cold == 0
    # All but one replica of each go, after their keep-alive.
    number = live.scale_to_zero()
    for _ in range(7):
        w.same()
    assert live.migration(number).status == "done"
    assert live.memory().held_G.sum() == first
    # At random: the pool, the experts and the memory always agree, on every rank.
    for _ in range(25):
        for layer in range(LAYERS):
            if w.rng.random() < 0.3:
                live.apply_layer(layer, w.slots())
        w.same()
        assert physical(live) == e.warm_LGE[:, w.rank].sum(1).tolist()
        assert live.memory().held_G.sum() == e.bytes
        assert not (held(live, e) & ~e.warm_LGE).any()
    report = e.report()
    passes, functions = e.meter.cost("passes"), e.meter.cost("functions")
    assert 0 < functions.experts < passes.experts
    assert 0 < passes.rest == functions.rest
    assert abs(e.meter.cost("resident").experts * 1e9 / report.byte_seconds - 1) < 1e-9
    assert not report.from_home
    assert live.migrator.courier.waits == 0
    return {"cold": report.cold_starts, "reuses": report.reuses, "released": report.released}


def held(live: LiveModel, e: Any) -> np.ndarray:
    from moeless_opt.problems.spec.placement import held_LGE

    return held_LGE(live.slots_LGC, live.experts)


def from_the_host(w: World) -> dict[str, Any]:
    """Home copies are the source where their link is the quickest, and where the own node has none."""
    homes = PinnedHome(copies=w.size)
    live = attach(w.model, home=homes, checksums=True, links=Links(host=900e9))
    e = live.elastic(AdaptiveKeepAlive(low=0.01, high=0.05), clock="seconds")
    more = rows_to_slots([[0, 1, 2], [2, 3], [4, 5], [6, 7, 0]])
    numbers = [live.apply_layer(layer, more) for layer in range(LAYERS)]
    for number in numbers:
        assert w.over(live, number) == "done"
        assert (live.layer_plan(number).cold, live.layer_plan(number).from_home) == (2, 2)
    report = e.report()
    assert (report.cold_starts, report.from_home) == (2 * LAYERS, 2 * LAYERS)
    assert (report.cold_seconds > 0) or w.rank in (1, 2)
    # An idle server moves its clock by itself: kept-alive replicas go.
    live.scale_to_zero()
    live.settle()
    until = time.monotonic() + 10
    gone = False
    while not gone and time.monotonic() < until:
        live.tick()
        gone = bool((live.memory().held_G == live.memory().live_G).all())
    assert gone
    assert e.now >= 0.05
    live.detach()
    w.same()
    live = attach(w.model, home=PinnedHome(copies=w.size), node_G=[0, 0, 1, 1])
    # Rank 0 finds expert 2 in its own node; expert 0 is on the other node than rank 3: its host is nearer.
    number = live.apply_layer(0, more)
    assert w.over(live, number) == "done"
    assert (live.layer_plan(number).cold, live.layer_plan(number).from_home) == (2, 1)
    live.detach()
    w.same()
    return {"cold": report.cold_starts, "from_home": report.from_home}


def per_layer(w: World, distance: int) -> dict[str, Any]:
    """Every pass plans its own layers, and gives what the stock model gives."""
    live = attach(w.model, checksums=True)
    assert isinstance(live, LayerBackend)
    e = live.elastic(4.0, clock="passes", slots=5)
    topology = mo.uniform(1, w.size, slots=4)
    spec = ModelSpec(name="m", layers=LAYERS, experts=worlds.EXPERTS, top_k=2, hidden=worlds.HIDDEN, ffn=96)
    by_time = LayerPlanner(topology, spec, TimeModel(token_cost=1e-4, unit="s"))
    controller = Controller(live, Planner(topology=topology) if distance == 1 else by_time)
    gates = plain_gates(w.model)
    live.observe()
    w.same(0)
    unplanned = live.observe().imbalance_L
    with PerLayer(live, controller, GatePredictor(gates), distance=distance):
        for k in range(12):
            w.same(min(k // 4, BATCHES - 1))
    controller.drain()
    live.settle()
    live.observe()
    w.same(BATCHES - 1)
    planned = live.observe().imbalance_L
    assert planned.mean() < unplanned.mean()
    tokens = w.x[0].numel() * 2 * w.size
    decisions = list(controller.layer_decisions)
    assert all(d.error == "" for d in decisions)
    assert all(d.load_E.sum() in (0.0, tokens) for d in decisions)
    assert any(d.applied is not None for d in decisions)
    assert live.migrator.courier.waits == 0
    report = e.report()
    curve = live.measure((4, 64), repeats=2)
    assert curve.unit == "s"
    live.detach()
    controller.close()
    w.same()
    return {
        "curve": curve.time([4, 64], [1, 2], 1.0).tolist(),
        "unplanned": unplanned.tolist(),
        "planned": planned.tolist(),
        "cold": report.cold_starts,
        "decisions": [
            [d.layer, d.load_E.tolist(), np.sort(d.slots_GC, axis=1).tolist(), d.applied] for d in decisions
        ],
        "fate": [[t.number, t.layer, t.status, t.ended] for t in live.lanes.finished],
    }


def main() -> None:
    w = World()
    if sys.argv[1] == "lanes":
        live = attach(w.model, checksums=True)
        single_layers(w, live)
        refusals(w, live)
        damaged(w, live)
        results: dict[str, Any] = {"elastic": elastic(w, live)}
        live.detach()
        w.same()
        results["host"] = from_the_host(w)
    else:
        results = {f"distance {d}": per_layer(w, d) for d in (1, 2)}
    worlds.report(results)


if __name__ == "__main__":
    main()
