"""Simulated time against plain arithmetic, the backend against loops over passes, the table's figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io.arrivals import poisson_arrivals
from moeless_opt.problems.io.traces import TokenTraces
from moeless_opt.problems.spec.architecture import model_preset
from moeless_opt.problems.spec.placement import equal_shares, replica_keys
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.runtime.control.backend import Backend
from moeless_opt.runtime.pool.cost import CostMeter
from moeless_opt.runtime.predict.history import LastWindow
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.cli import main
from moeless_opt.runtime.simulate.drive import drive
from moeless_opt.runtime.simulate.foresight import Assumed, Online, predicted
from moeless_opt.runtime.simulate.machine import Machine, expert_curve
from moeless_opt.runtime.simulate.policies import POLICIES
from moeless_opt.runtime.simulate.report import SimReport
from moeless_opt.runtime.simulate.settings import Settings
from moeless_opt.runtime.simulate.traffic import (
    Passes,
    RoutingModel,
    continuous,
    from_traces,
    one_second_batches,
)
from tests.oracles.small_machine import CAPACITY, MODEL, STATIC, machine_of

MACHINE = machine_of(2, 2, intra_node=1e9, inter_node=1e8)
TOPOLOGY = MACHINE.topology


def passes_of(seed: int, count: int, gap: float = 0.0) -> Passes:
    rng = np.random.default_rng(seed)
    total = 2 * rng.integers(10, 80, (count, 1)).repeat(3, axis=1)
    load = rng.multinomial(total, rng.dirichlet(np.ones(4), (count, 3))).astype(float)
    return Passes(
        start_B=np.arange(count) * gap,
        weight_B=np.ones(count),
        tokens_B=load[:, 0].sum(1) / 2,
        kv_tokens_B=np.full(count, 100.0),
        prefill_B=np.zeros(count, dtype=np.bool_),
        load_BLE=load,
    )


def replicated(seed: int) -> np.ndarray:
    """Every expert on its static GPU, and a second one on each GPU."""
    rng = np.random.default_rng(seed)
    slots = STATIC.copy()
    for layer in range(3):
        for g in range(4):
            slots[layer, g, 1] = rng.choice([e for e in range(4) if e != slots[layer, g, 0]])
    return slots


# --- times -------------------------------------------------------------------------------------------------


def test_all_to_all_by_hand() -> None:
    # GPU 0 serves all 400 pairs: of each quarter, one is its own, one its neighbour's, two come from afar.
    tokens = np.array([[400.0, 0, 0, 0]])
    state = 2 * 64
    near, far = 100 * state / 1e9, 200 * state / 1e8
    assert MACHINE.all_to_all(tokens)[0] == pytest.approx(2 * (max(near, far) + 10e-6))
    assert MACHINE.all_to_all(np.zeros((1, 4)))[0] == 0
    # With a fast network the one neighbour's link is what takes longest.
    fast = MACHINE.replace(topology=TOPOLOGY.replace(links=Links(intra_node=1e9, inter_node=1e12)))
    assert fast.all_to_all(tokens)[0] == pytest.approx(2 * (near + 10e-6))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_layer_times_by_hand(seed: int) -> None:
    slots, passes = replicated(seed), passes_of(seed, 3)
    share = np.broadcast_to(equal_shares(slots, 4), (3, *slots.shape))
    times = MACHINE.layers(passes.load_BLE, slots, share)
    for b in range(3):
        for layer in range(3):
            tokens, used = np.zeros(4), np.zeros(4)
            for g in range(4):
                for expert in slots[layer, g]:
                    part = passes.load_BLE[b, layer, expert] / (slots[layer] == expert).sum()
                    tokens[g] += part
                    used[g] += part > 0
            gpu = np.where(tokens > 0, 1e-6 * tokens + 1e-5 * used, 0)
            assert times.tokens_BLG[b, layer] == pytest.approx(tokens)
            assert times.experts_BL[b, layer] == pytest.approx(gpu.max())
            assert times.used_BL[b, layer] == used.sum()
            network = MACHINE.all_to_all(tokens[None])[0]
            assert times.layer_BL[b, layer] == pytest.approx(gpu.max() + network)


def test_loading_takes_the_nearest_link() -> None:
    warm = np.zeros((1, 4, 4), dtype=np.bool_)
    warm[0, 0, 0] = warm[0, 2, 1] = True
    cold = np.zeros_like(warm)

    def seconds() -> float:
        keys = np.flatnonzero(cold), np.flatnonzero(warm)
        return float(MACHINE.load_seconds(*keys, np.array([10**6]))[0])

    assert seconds() == 0
    cold[0, 1, 0] = True  # from GPU 0, its node
    assert seconds() == pytest.approx(10e-6 + 1e-3)
    cold[0, 1, 1] = True  # and from GPU 2, another node
    assert seconds() == pytest.approx(20e-6 + 1e-3 + 1e-2)
    cold[0, 1, 2] = True  # and from the host
    assert seconds() == pytest.approx(30e-6 + 1e-3 + 1e-2 + 2e-2)


def test_measured_curve(tmp_path: Path) -> None:
    rows = ["layer_name,input,kv_cache,tp_size,latency(ns)"]
    for n in range(1, 65):
        rows += [
            f"{name},{n},0,1,{100 * max(n, 16)}" for name in ("gate", "expert.w1", "expert.w2", "expert.w3")
        ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    model = MODEL.replace(hidden=32, ffn=64)  # a quarter of the expert that was "measured"
    time = expert_curve(tmp_path / "t.csv", model, timed=(64, 128))
    per_token = 3 * 100e-9 / 4
    speed = np.ones(1)
    # One expert below the knee, above it, and beyond what was measured.
    assert time.time([4], [1], speed)[0] == pytest.approx(16 * per_token, rel=0.02)
    assert time.time([48], [1], speed)[0] == pytest.approx(48 * per_token, rel=0.1)
    assert time.time([200], [1], speed)[0] == pytest.approx(200 * per_token, rel=0.15)
    # Reading two experts takes twice as long.
    assert time.time([4], [2], speed)[0] == pytest.approx(2 * time.time([2], [1], speed)[0])
    (tmp_path / "bad.csv").write_text("layer_name,input\nexpert.w1,1\n")
    with pytest.raises(FormatError, match="no table"):
        expert_curve(tmp_path / "bad.csv", model, timed=(64, 128))


def test_measured_curve_of_two_points_or_of_what_cannot_be(tmp_path: Path) -> None:
    head = "layer_name,input,latency(ns)\n"
    path = tmp_path / "t.csv"

    def write(*points: tuple[int, float]) -> None:
        lines = [f"expert.w{w},{tokens},{latency}" for tokens, latency in points for w in (1, 2, 3)]
        path.write_text(head + "\n".join(lines))

    write((10, 1000), (20, 2000))
    time = expert_curve(path, MODEL, timed=(MODEL.hidden, MODEL.ffn))
    assert time.time([10, 60], [1, 1], np.ones(1)) == pytest.approx([3e-6, 18e-6], rel=0.05)
    write(*((2**n, 100.0 * 2**n) for n in range(4, 12)))
    time = expert_curve(path, MODEL, timed=(MODEL.hidden, MODEL.ffn))
    wanted = [300e-9 * tokens for tokens in (64, 1000, 2048, 5000)]
    assert time.time([64, 1000, 2048, 5000], [1] * 4, np.ones(1)) == pytest.approx(wanted, rel=0.05)
    for bad in ((0, 1000.0), (-4, 1000.0), (10, 0.0), (10, -1.0), (10, float("nan")), (10, float("inf"))):
        write(bad, (20, 2000))
        with pytest.raises(
            FormatError, match=rf"t\.csv: has .* ns for {bad[0]} tokens, must be a time above 0"
        ):
            expert_curve(path, MODEL, timed=(MODEL.hidden, MODEL.ffn))


def test_experts_in_turn_take_what_each_takes_for_its_own_tokens() -> None:
    """Few tokens take as long as ten; taken to spread evenly, 2 and 38 looked as quick as 20 and 20."""
    curve = TimeModel(
        curve_tokens=np.array([1.0, 10.0, 100.0]),
        curve_activated=np.array([1.0, 2.0]),
        curve_time=np.array([[10.0, 18.0], [10.0, 18.0], [100.0, 108.0]]),
        unit="s",
    )
    even, turns = (MACHINE.replace(time=curve, in_turn=in_turn) for in_turn in (False, True))
    slots = np.array([[[0, 1], [2, 3], [0, 0], [3, -1]]], dtype=np.int32)
    shares = np.array([[[0.5, 1], [1, 0.5], [0.25, 0.25], [0.5, 0]]])[None]
    load = np.array([[[4.0, 38.0, 30.0, 0.0]]])
    together, apart = (one.layers(load, slots, shares) for one in (even, turns))
    assert together.seconds_BLG[0, 0].tolist() == pytest.approx([48.0, 30.0, 10.0, 0.0])
    # Two experts of 20 take 20 each alone and 48 together; of 2 and 38 they take 10 and 38. Copies of an
    # expert on one GPU are one expert, and one without tokens is none.
    assert apart.seconds_BLG[0, 0].tolist() == pytest.approx([56.0, 30.0, 10.0, 0.0])
    assert np.array_equal(together.tokens_BLG, apart.tokens_BLG)
    fast = turns.replace(topology=TOPOLOGY.replace(speed_G=np.array([2.0, 1, 1, 1])))
    assert fast.layers(load, slots, shares).seconds_BLG[0, 0, 0] == pytest.approx(28.0)
    straight = MACHINE.replace(in_turn=True)  # no curve: nothing to read
    assert np.array_equal(
        straight.layers(load, slots, shares).seconds_BLG, MACHINE.layers(load, slots, shares).seconds_BLG
    )


# --- the backend -------------------------------------------------------------------------------------------


def test_it_is_a_backend() -> None:
    assert isinstance(SimulatedBackend(MACHINE, STATIC, CAPACITY), Backend)


@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_passes_run_one_after_the_other(gap: float) -> None:
    passes = passes_of(1, 12, gap)
    backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal")
    backend.run(passes)
    share = np.broadcast_to(equal_shares(STATIC, 4), (12, *STATIC.shape))
    layer = MACHINE.layers(passes.load_BLE, STATIC, share).layer_BL
    took = layer.sum(1) + MACHINE.rest(passes.tokens_B, passes.kv_tokens_B)
    now = 0.0
    for start, seconds in zip(passes.start_B, took, strict=True):
        now = max(now, start) + seconds
    assert backend.now == pytest.approx(now)
    assert backend.report.busy == pytest.approx(took.sum())
    seen = backend.observe()
    assert np.array_equal(seen.load_LE, passes.load_BLE.sum(0))
    assert seen.batches == 12
    assert backend.observe().batches == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["equal", "balanced", "timed"]), st.integers(1, 9))
def test_cutting_the_traffic_changes_nothing(seed: int, shares: str, cut: int) -> None:
    passes = passes_of(seed, 10, 0.001)
    reports = []
    for parts in ([passes], [passes.part(0, cut), passes.part(cut, 10)]):
        backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares=shares)
        backend.apply(np.roll(replicated(seed), 1, axis=1))  # replicas come and go
        for part in parts:
            backend.run(part)
        reports.append(backend)
    a, b = reports
    assert a.now == pytest.approx(b.now)
    assert np.concatenate(a.report.layer_BL) == pytest.approx(np.concatenate(b.report.layer_BL))
    for rule in ("resident", "passes", "functions"):
        assert a.meter.cost(rule).total == pytest.approx(b.meter.cost(rule).total)


def test_passes_of_one_size_count_as_so_many_and_small_ones_beside_a_large_one_hardly() -> None:
    backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal")
    same = passes_of(5, 6)
    same.load_BLE[:] = same.load_BLE[:1]
    backend.run(same)
    assert backend.observe().even == pytest.approx(6)
    same.load_BLE[1:] = 0
    same.load_BLE[1:, :, 0] = 1
    large, small = same.load_BLE[0].sum(), same.load_BLE[1].sum()
    backend.run(same.part(0, 3))
    backend.run(same.part(3, 6))
    wanted = (large + 5 * small) ** 2 / (large**2 + 5 * small**2)
    assert backend.observe().even == pytest.approx(wanted)
    assert 1 < wanted < 2
    assert backend.observe().even == 0


def test_overlapped_switches_when_the_transfers_are_done_and_exposed_waits() -> None:
    passes, wanted = passes_of(2, 200, 0.0), replicated(2)
    ends = {}
    for transfers in ("overlapped", "exposed"):
        backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", transfers=transfers)
        plain = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal")
        plain.run(passes.part(0, 1))
        first = plain.now
        backend.apply(wanted)
        moved = int((wanted[:, :, 1] >= 0).sum())
        assert backend.report.moved == moved
        assert backend.report.moved_bytes == moved * MODEL.expert_bytes
        assert backend.memory().held_G.sum() == (12 + moved) * MODEL.expert_bytes
        backend.run(passes.part(0, 1))
        if transfers == "overlapped":
            assert backend.now == pytest.approx(first)
            assert np.array_equal(backend.slots_LGC, STATIC)
        else:
            assert backend.now > 2 * first
            assert np.array_equal(backend.slots_LGC, wanted)
        backend.run(passes.part(1, 200))
        assert np.array_equal(backend.slots_LGC, wanted)
        ends[transfers] = backend.now
    assert ends["exposed"] > ends["overlapped"]


def test_per_pass_waits_for_what_the_layers_before_do_not_hide() -> None:
    backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", transfers="per-pass", distance=1)
    passes = passes_of(3, 2)
    backend.run(passes.part(0, 1))
    before = backend.pool.keys.copy()
    last = backend.report.layer_BL[0][0]
    wanted = replicated(3)
    backend.apply(wanted)
    backend.run(passes.part(1, 2))
    share = equal_shares(wanted, 4)[None]
    layer = MACHINE.layers(passes.load_BLE[1:], wanted, share).layer_BL[0]
    cold = np.setdiff1d(backend.pool.keys, before)
    load = MACHINE.load_seconds(cold, before, backend.bytes_L)
    lead = np.array([last[2], layer[0], layer[1]])
    assert backend.report.exposed_BL[1][0] == pytest.approx(np.maximum(load - lead, 0))
    assert backend.report.layer_BL[1][0] == pytest.approx(layer + np.maximum(load - lead, 0))
    assert load.max() > lead.min()  # else this shows nothing


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_share_policies_in_order(seed: int) -> None:
    """Timed is never slower than balanced, whose largest GPU load is never above that of equal shares."""
    runs = {}
    for shares in ("equal", "balanced", "timed", "oracle"):
        backend = SimulatedBackend(MACHINE, replicated(seed), CAPACITY, shares=shares)
        backend.run(passes_of(seed, 5))
        runs[shares] = backend.report
    assert runs["balanced"].largest <= runs["equal"].largest * (1 + 1e-9)
    timed, balanced = (np.concatenate(runs[name].layer_BL) for name in ("timed", "balanced"))
    assert (timed <= balanced + 1e-15).all()
    assert runs["oracle"].imbalance == pytest.approx(1.0)
    assert runs["oracle"].mean == pytest.approx(runs["equal"].mean)


def test_what_serves_no_token_goes_after_its_keep_alive() -> None:
    """With live shares a replica is used by a pass that gives it tokens, not by one that finds it there."""
    slots = replicated(3)
    backend = SimulatedBackend(MACHINE, slots, CAPACITY, shares="timed", transfers="per-pass", keep_alive=2.0)
    passes = passes_of(3, 6, gap=1.0)
    for i in range(passes.count):
        part = passes.part(i, i + 1)
        backend.wait_until(float(part.start_B[0]))
        held = backend.slots_LGC
        backend.run(part)
        if i < 2:  # nothing is let go before the keep-alive is over
            np.testing.assert_array_equal(replica_keys(held, 4), replica_keys(slots, 4))
    left = backend.slots_LGC
    np.testing.assert_array_equal(replica_keys(left, 4), backend.pool.keys)
    assert (left >= 0).sum() < (slots >= 0).sum()
    assert all(set(layer[layer >= 0]) == set(range(4)) for layer in left)


def test_percentile_counts_weights() -> None:
    report = SimReport()
    report.layer_BL.append(np.array([[1.0], [2.0], [3.0]]))
    report.weight_B.append(np.array([97.0, 2.0, 1.0]))
    report.prefill_B.append(np.array([False, True, False]))
    assert report.percentile(0.97) == 1.0
    assert report.percentile(0.99) == 2.0
    assert report.percentile(1.0) == 3.0
    assert report.mean_latency() == pytest.approx(1.04)
    assert report.mean_latency(prefill=True) == 2.0


def test_charging_rules_by_hand() -> None:
    held, used = np.array([3.0, 2.0]), np.array([[1.0, 2.0]])
    layer, whole = np.array([[0.5, 1.0]]), np.array([4.0])
    for elastic, functions in ((False, 5 * 4.0), (True, 1 * 0.5 + 2 * 1.0)):
        meter = CostMeter([1e9, 1e9], 2e9, elastic=elastic)
        meter.add_passes(held, used, layer, whole, np.array([1e9]), np.array([10.0]))
        meter.add_wall(7e9, 50.0)
        assert meter.cost("passes").experts == pytest.approx(5 * 40)
        assert meter.cost("passes").rest == pytest.approx(3 * 40)
        assert meter.cost("functions").experts == pytest.approx(10 * functions)
        assert meter.cost("resident").total == pytest.approx(7 + 100)


def test_a_pass_that_stands_for_many_waits_moves_and_costs_so_often() -> None:
    passes = passes_of(3, 2, gap=1.0)
    runs = {}
    for weight in (1.0, 7.0):
        backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", transfers="per-pass")
        backend.run(passes.part(0, 1))
        first, cost = backend.report.busy, backend.meter.cost("passes").total
        backend.wait_until(1.0)
        backend.apply(replicated(3))
        backend.run(passes.part(1, 2).replace(weight_B=np.array([weight])))
        assert backend.report.exposed_BL[1].any(), "else nothing is waited for"
        runs[weight] = (
            backend.report.busy - first,
            backend.now - 1.0,
            backend.report.moved,
            backend.report.moved_bytes,
            backend.meter.cost("passes").total - cost,
        )
    assert runs[7.0] == pytest.approx([7 * one for one in runs[1.0]])


def test_waiting_is_charged_as_time_of_passes() -> None:
    """Under the rule `passes` somebody who waits holds what it holds for as long."""
    backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", transfers="per-pass")
    backend.run(passes_of(3, 1))
    cost, busy = backend.meter.cost("passes").experts, backend.report.busy
    backend.apply(replicated(3))
    backend.run(passes_of(3, 1))
    held = int((replicated(3) >= 0).sum()) * MODEL.expert_bytes / 1e9
    assert backend.meter.cost("passes").experts - cost == pytest.approx(held * (backend.report.busy - busy))


@pytest.mark.parametrize("transfers", ["overlapped", "per-pass"])
def test_resident_charges_from_the_first_pass_on(transfers: str) -> None:
    passes = passes_of(3, 4)
    late = passes.replace(start_B=passes.start_B + 1000.0)
    costs = []
    for part in (passes, late):
        backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", transfers=transfers)
        backend.run(part)
        costs.append(backend.meter.cost("resident").total)
    assert costs[1] == pytest.approx(costs[0])


# --- traffic -----------------------------------------------------------------------------------------------


def test_generated_loads_have_the_routers_totals() -> None:
    model = RoutingModel(popularity_DLE=np.ones((2, 3, 4)), concentration=5.0, top_k=2)
    arrivals = poisson_arrivals(4, 20, prompt=20, output=10, seed=1)
    batches = list(one_second_batches(model, arrivals, decode_every=4))
    for part in batches:
        assert np.array_equal(part.load_BLE.sum(2), np.repeat(2 * part.tokens_B[:, None], 3, axis=1))
    prompts = sum(part.tokens_B[part.prefill_B].sum() for part in batches)
    assert prompts == np.maximum(arrivals.prompt_R, 1).sum()
    # All writing passes are stood for: the longest answer of each second, less its first token.
    second = np.floor(arrivals.time_R).astype(int)
    longest = sum(int(arrivals.output_R[second == s].max()) - 1 for s in np.unique(second))
    stood = sum(part.weight_B[~part.prefill_B].sum() for part in batches)
    assert longest - 4 * len(batches) <= stood <= longest
    # Two of each four are simulated: the first, and one like it with loads of its own for the others.
    weight = np.concatenate([part.weight_B[~part.prefill_B] for part in batches])
    assert set(weight) <= {1.0, 2.0, 3.0}
    assert (weight == 3).sum() > 2
    pairs = [(part, i) for part in batches for i in np.flatnonzero(part.weight_B == 3)]
    assert all(part.tokens_B[i] == part.tokens_B[i - 1] for part, i in pairs)
    assert any((part.load_BLE[i] != part.load_BLE[i - 1]).any() for part, i in pairs)
    steps = list(continuous(model, arrivals, period=0.1, window=8))
    assert np.array_equal(
        np.concatenate([s.load_BLE.sum(2)[:, 0] for s in steps]),
        2 * np.concatenate([s.tokens_B for s in steps]),
    )


def test_continuous_is_the_slow_loop() -> None:
    model = RoutingModel(popularity_DLE=np.ones((1, 1, 4)), concentration=5.0, top_k=1)
    arrivals = poisson_arrivals(5, 10, prompt=9, output=6, seed=4)
    steps = list(continuous(model, arrivals, period=0.25, window=5))
    tokens, cached = (np.concatenate([getattr(s, k) for s in steps]) for k in ("tokens_B", "kv_tokens_B"))
    for step in range(len(tokens)):
        want = kept = 0
        for t, prompt, output in zip(arrivals.time_R, arrivals.prompt_R, arrivals.output_R, strict=True):
            age = step - int(np.ceil(t / 0.25 - 1e-9))
            if 0 <= age < max(output, 1):
                want += max(prompt, 1) if age == 0 else 1
                kept += prompt + age
        assert (tokens[step], cached[step]) == (want, kept)


def test_fit_finds_the_concentration_back() -> None:
    rng = np.random.default_rng(0)
    truth = RoutingModel(
        popularity_DLE=rng.uniform(0.5, 1.5, (1, 3, 8)), concentration=20.0, top_k=1, source="made up"
    )
    share = truth.distributions(np.zeros(400, dtype=np.int64), rng)
    tokens = 100
    routed = np.stack(
        [[rng.choice(8, tokens, p=np.float64(p) / np.float64(p).sum()) for p in layers] for layers in share]
    )
    traces = TokenTraces(
        experts_TLK=routed.transpose(0, 2, 1).reshape(-1, 3, 1),
        offsets=np.arange(401) * tokens,
        experts=8,
    )
    fitted = RoutingModel.fit(traces)
    assert fitted.concentration == pytest.approx(20.0, rel=0.1)
    assert fitted.popularity_DLE == pytest.approx(truth.popularity_DLE, abs=0.03)
    like = fitted.like(5, 16, 2, seed=1)
    assert like.popularity_DLE.shape == (1, 5, 16)
    assert like.popularity_DLE.max() <= 0.5 + 1e-12


def test_recorded_traces_pass_through() -> None:
    rng = np.random.default_rng(1)
    traces = TokenTraces(experts_TLK=rng.integers(0, 4, (60, 3, 2)), offsets=np.arange(0, 61, 10), experts=4)
    parts = list(from_traces(traces, poisson_arrivals(5, 20, seed=2), period=0.1, window=8))
    assert parts
    for part in parts:
        assert np.array_equal(part.load_BLE.sum(2), np.repeat(2 * part.tokens_B[:, None], 3, axis=1))


def test_prediction_keeps_totals_and_errs_as_much_as_it_says() -> None:
    rng = np.random.default_rng(2)
    load = np.zeros((1, 2, 4))
    load[0, :, 0] = 10_000
    seen = predicted(load, np.ones((2, 4)), 0.4, rng)
    assert seen.sum(2) == pytest.approx(load.sum(2))
    assert np.abs(seen - load).sum(2) / 2 / 10_000 == pytest.approx(0.4 * 0.75, abs=0.02)
    assert np.array_equal(predicted(load, np.ones((2, 4)), 0.0, rng), load)


# --- policies and the command ------------------------------------------------------------------------------


def test_figures_for_programs_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "cdf.svg"
    common = ["--seconds", "5", "--model", "mixtral-8x7b", "--policies", "static,ours-windowed"]
    assert main([*common, "--json", "--plot", str(target), "--sweep", "slots", "1", "2"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [(r["variant"], r["policy"]) for r in rows] == [
        (f"slots = {n}", name) for n in (1, 2) for name in ("static", "ours-windowed")
    ]
    assert all(any("assumed" in line for line in r["basis"]) for r in rows)
    assert rows[0]["held"] == 256
    assert "static" in captured.err
    assert target.read_text().startswith("<?xml")


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_runs_and_repeats_itself(name: str) -> None:
    topology = Topology.preset("8xA6000", slots=2)
    model = model_preset("Mixtral-8x7B").replace(layers=2)
    machine = Machine.of(topology, model)
    rng = np.random.default_rng(0)
    routing = RoutingModel(popularity_DLE=rng.uniform(0.2, 2, (3, 2, 8)), concentration=10.0, top_k=2)
    arrivals = poisson_arrivals(4, 12, seed=3)
    ends = []
    for _ in range(2):
        run = POLICIES[name].build(machine, topology, Settings(every=4))
        foresight = Online(LastWindow(), 1) if run.policy.predictor == "last" else Assumed(0.1)
        report = drive(
            run.backend,
            one_second_batches(routing, arrivals),
            run.controller,
            foresight=foresight if run.policy.per_pass else None,
        )
        ends.append((report.mean_latency(), report.moved, run.backend.meter.cost("resident").total))
    assert ends[0] == ends[1]
    assert ends[0][0] > 0


def test_command_prints_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "6", "--model", "Mixtral-8x7B", "--policies", "static,moeless,ours"]) == 0
    text = capsys.readouterr().out
    for word in ("measured", "composed", "assumed", "resident:", "functions:", "moeless", "Poisson"):
        assert word in text
    assert main(["--seconds", "5", "--model", "x"]) == 2
    assert main(["--policies", "stat"]) == 2
    assert main(["--model", "Mixtral-8x7B", "--sweep", "cv", "low"]) == 2
    assert "'low' is no value for cv" in capsys.readouterr().err
    with pytest.raises(ProblemError, match=r"shares: 'timid' is unknown; did you mean 'timed'\?"):
        SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="timid")
    with pytest.raises(ProblemError, match="transfers"):
        SimulatedBackend(MACHINE, STATIC, CAPACITY, transfers="x")
    with pytest.raises(ProblemError, match=r"gpu: 'V100' is unknown; .*there are A6000, A100, H100, H200"):
        Machine.of(TOPOLOGY, MODEL, gpu="V100")


def test_contention_slows_passes_beside_a_migration_and_the_migration() -> None:
    ends, switched = {}, {}
    for contention in (False, True):
        backend = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal", contention=contention)
        passes = passes_of(1, 200)
        backend.run(passes.part(0, 1))
        share = backend._network_share
        backend.apply(replicated(2))
        assert backend._switch is not None
        switched[contention] = backend._switch[0] - backend.now
        began = backend.now
        backend.run(passes.part(1, 2))
        ends[contention] = backend.now - began
        network = backend.report.network_BL[-1].sum()
    assert switched[True] == pytest.approx(switched[False] * (1 + share))
    assert ends[True] == pytest.approx(ends[False] + network / 2)


def test_deciding_is_hidden_or_waited_for() -> None:
    wait = {}
    for seconds in (0.0, 1e-4, 1.0):
        backend = SimulatedBackend(
            MACHINE, STATIC, CAPACITY, shares="equal", transfers="per-pass", decide_seconds=seconds
        )
        passes = passes_of(3, 2)
        backend.run(passes.part(0, 1))
        backend.run(passes.part(1, 2))
        wait[seconds] = backend.report.exposed_BL[1][0]
    layer = backend.report.layer_BL[1][0] - wait[1.0]
    before = backend.report.layer_BL[0][0] - backend.report.exposed_BL[0][0]
    hidden = np.array([before[2], layer[0], layer[1]])
    assert not wait[0.0].any()
    assert wait[1.0] == pytest.approx(1.0 - hidden)
    assert wait[1e-4] == pytest.approx(np.maximum(1e-4 - hidden, 0))
