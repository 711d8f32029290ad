"""Replicas on their way: ports by hand, copies that stay, and passes that need not wait for weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.spec.placement import equal_shares, replica_keys
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.runtime.pool.warm import WarmPool
from moeless_opt.runtime.simulate.backend import SimulatedBackend, Terms
from moeless_opt.runtime.simulate.coming import STAGED, Coming, Memory
from moeless_opt.runtime.simulate.shares import SplitCost
from moeless_opt.runtime.simulate.traffic import Passes
from tests.oracles.small_machine import CAPACITY, MODEL, STATIC, machine_of

MACHINE = machine_of(1, 4, intra_node=1e8, inter_node=1e8)


def backend_of(transfers: str, shares: str = "equal", **options: object) -> SimulatedBackend:
    keep = {"keep_alive": 10.0, **options}
    return SimulatedBackend(
        MACHINE,
        STATIC,
        CAPACITY,
        shares=shares,
        transfers=transfers,
        **keep,  # type: ignore[arg-type]
    )


def pass_of(load: object, start: float = 0.0) -> Passes:
    load_LE = np.broadcast_to(np.asarray(load, dtype=float), (3, 4))
    return Passes(
        start_B=np.array([start]),
        weight_B=np.ones(1),
        tokens_B=load_LE[0].sum(keepdims=True) / 2,
        kv_tokens_B=np.zeros(1),
        prefill_B=np.zeros(1, dtype=np.bool_),
        load_BLE=load_LE[None].copy(),
    )


def with_second(expert: int, gpu: int) -> np.ndarray:
    """Static, and a second copy of an expert in every layer."""
    slots = STATIC.copy()
    slots[:, gpu, 1] = expert
    return slots


# -------------------------------------------------------------------------------------------- the ports


def test_a_port_receives_one_after_the_other() -> None:
    coming = Coming(gpus=2, experts=4)
    # GPU 0 gets two replicas, decided on at 1 and 2, GPU 1 one; keys are (layer * 2 + gpu) * 4 + expert.
    coming.ask(np.array([1, 8 + 2, 4]), np.array([5.0, 3.0, 1.0]), np.array([1.0, 2.0, 2.0]))
    assert coming.key.tolist() == [1, 10, 4]
    assert coming.begin.tolist() == [1.0, 6.0, 2.0]
    assert coming.end.tolist() == [6.0, 9.0, 3.0]
    coming.settle(4.0)
    assert coming.key.tolist() == [1, 10]
    # What has not begun and nobody wants is given up; what has begun comes.
    assert coming.give_up(np.array([], dtype=np.int64), 4.0).tolist() == [10]
    coming.ask(np.array([3]), np.array([2.0]), np.array([5.0]))
    assert coming.end.tolist() == [6.0, 8.0]
    coming.settle(7.0)
    coming.ask(np.array([2]), np.array([2.0]), np.array([7.0]))
    assert coming.end.tolist() == [8.0, 10.0], "the port is busy with what began at 6"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_port_is_never_shared_and_never_idle_with_work(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coming, now, seen = Coming(gpus=3, experts=5), 0.0, dict[int, tuple[float, float]]()
    for _ in range(6):
        now += float(rng.exponential(2.0))
        coming.settle(now)
        for key in coming.give_up(rng.choice(30, 10), now):
            assert seen.pop(int(key))[0] > now
        fresh = np.setdiff1d(rng.choice(30, 5, replace=False), [*coming.key, *seen])
        coming.ask(fresh, rng.uniform(0.1, 3, len(fresh)), now + rng.uniform(0, 1, len(fresh)))
        for key, begin, end in zip(coming.key, coming.begin, coming.end, strict=True):
            if key in seen and seen[key][0] <= now:
                assert (begin, end) == pytest.approx(seen[key]), "what has begun goes on"
            seen[int(key)] = (begin, end)
    for gpu in range(3):
        spans = sorted(span for key, span in seen.items() if key // 5 % 3 == gpu)
        assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(spans))


@pytest.mark.parametrize("staged", [0, 1])
def test_the_last_copy_that_is_there_stays_until_another_has_come(
    staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 0 is to change its GPU, and nothing else may take its slot meanwhile."""
    slots = np.array([[[0], [1]]], dtype=np.int32)
    pool = WarmPool(slots, 3, capacity_LG=np.array([[1, 2]]), bytes_L=[1])
    wanted = replica_keys(np.array([[[2, -1], [0, 1]]], dtype=np.int32), 3)
    monkeypatch.setattr("moeless_opt.runtime.simulate.coming.STAGED", staged)
    for most in (1, 2, 9):
        keys, kept = Coming(gpus=2, experts=3).guarded(wanted, pool, most)
        assert kept.tolist() == [0]
        # Expert 2 is put off where GPU 0 has no room for it beside expert 0.
        assert keys.tolist() == ([0, 2, 3, 4] if staged and most > 1 else [0, 3, 4])


def test_two_layers_change_places_one_after_the_other() -> None:
    """Two GPUs with room for one replica more swap an expert in each of two layers."""
    coming = Coming(gpus=2, experts=2)
    key = np.array([1, 2, 5, 6])  # expert 1 to GPU 0 and expert 0 to GPU 1, in both layers
    leaving = np.array([0, 3, 4, 7])
    coming.memory = Memory(most=3, there_G=np.array([2, 2]), leaving=leaving, now=0.0)
    coming.ask(key, np.array([1.0, 2.0, 1.0, 1.0]), np.zeros(4))
    # GPU 1 has its second at 2, and GPU 0 may then let go; GPU 1 has let go at 1, and waits for its port.
    assert coming.begin.tolist() == [0.0, 0.0, 2.0, 2.0]
    assert coming.memory.gone.tolist() == [0, 3]
    assert coming.memory.gone_at.tolist() == [2.0, 2.0]
    assert coming.memory.peak_G.tolist() == [3, 3]
    coming.forget_limits(0.5)
    assert coming.begin.tolist() == [0.0, 0.0, 1.0, 2.0]
    coming.keep_within(Memory(most=2, there_G=np.array([2, 2]), leaving=leaving, now=-1.0))
    assert np.isinf(coming.begin).all(), "without room nothing begins"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_no_gpu_ever_holds_more_than_it_has_room_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus, experts, layers = 3, 4, 4
    coming, cells = Coming(gpus, experts), gpus * experts * layers
    there = np.sort(rng.choice(cells, cells // 3, replace=False))
    key = np.sort(rng.choice(np.setdiff1d(np.arange(cells), there), 12, replace=False))
    there_G = np.bincount(there // experts % gpus, minlength=gpus)
    leaving = there[np.isin(coming.kind(there), coming.kind(key))]
    memory = Memory(most=int(there_G.max() + rng.integers(0, 3)), there_G=there_G, leaving=leaving, now=0.0)
    coming.memory = memory
    coming.ask(key, rng.uniform(0.1, 2, 12), rng.uniform(0, 5, 12))
    gone_at = dict(zip(memory.gone.tolist(), memory.gone_at.tolist(), strict=True))
    assert set(gone_at) <= set(leaving.tolist())
    assert (coming.begin >= coming.decided).all()
    for one, when in gone_at.items():  # another copy of it has come
        assert coming.end[coming.kind(coming.key) == coming.kind(np.array(one))].min() <= when
    for gpu in range(gpus):
        mine = coming.key // experts % gpus == gpu
        begin, end = coming.begin[mine], coming.end[mine]
        assert (begin[1:] >= end[:-1]).all(), "one after the other, in their order"
        left = np.array([when for one, when in gone_at.items() if one // experts % gpus == gpu])
        held = [there_G[gpu] + (begin <= t).sum() - (left <= t).sum() for t in begin[np.isfinite(begin)]]
        assert max(held, default=there_G[gpu]) == memory.peak_G[gpu] <= memory.most
        if memory.most > there_G[gpu]:
            assert not len(begin) or np.isfinite(begin[0])


# -------------------------------------------------------------------------------------------- passes


def test_what_is_there_serves_until_the_load_has_come() -> None:
    load = [60.0, 10.0, 10.0, 10.0]
    wanted, alone, shared = with_second(0, 3), {}, {}
    for name, slots in (("alone", STATIC), ("shared", wanted)):
        share = np.broadcast_to(equal_shares(slots, 4), (1, *slots.shape))
        (alone if name == "alone" else shared)["L"] = MACHINE.layers(
            pass_of(load).load_BLE, slots, share
        ).layer_BL[0]
    runs = {}
    for transfers in ("per-pass", "warm-first", "sooner"):
        backend = backend_of(transfers)
        backend.run(pass_of(load))
        backend.apply(wanted)
        for _ in range(12):
            backend.run(pass_of(load))
        runs[transfers] = np.concatenate(backend.report.layer_BL)
        assert backend.report.moved == 3
        assert backend.report.moved_bytes == 3 * MODEL.expert_bytes
        waited = np.concatenate(backend.report.exposed_BL)
        assert waited[1].any() == (transfers == "per-pass")
    assert runs["per-pass"][1].max() > alone["L"].max(), "or waiting costs nothing here"
    # Without waiting no layer is slower than static ever, and in the end all replicas serve.
    for transfers in ("warm-first", "sooner"):
        assert runs[transfers][1] == pytest.approx(alone["L"])
        assert (runs[transfers] <= alone["L"] + 1e-12).all()
        assert runs[transfers][-1] == pytest.approx(shared["L"])


def test_sooner_waits_where_that_pays() -> None:
    """Large passes: a load is a small part of what it saves."""
    load, wanted = [40_000.0, 10.0, 10.0, 10.0], with_second(0, 3)
    runs = {}
    for transfers in ("per-pass", "warm-first", "sooner"):
        backend = backend_of(transfers)
        backend.run(pass_of([10.0] * 4))
        backend.apply(wanted)
        backend.run(pass_of(load))
        runs[transfers] = backend.report.layer_BL[1][0]
    assert runs["sooner"] == pytest.approx(runs["per-pass"], rel=0.02)
    assert runs["sooner"][0] < runs["warm-first"][0]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["equal", "timed"]),
    st.sampled_from(["warm-first", "sooner"]),
    st.integers(0, 3),
)
def test_every_expert_is_served_whatever_is_wanted(
    seed: int, shares: str, transfers: str, spare: int
) -> None:
    rng = np.random.default_rng(seed)
    room = (int(CAPACITY.sum(0).max()) + spare) * MODEL.expert_bytes if spare < 3 else np.inf
    keep_alive = float(rng.choice([0.0, 1e-4, 1.0]))
    backend = backend_of(transfers, shares, keep_alive=keep_alive, terms=Terms(room=room))
    for i in range(8):
        slots = STATIC[:, rng.permutation(4)].copy()
        for gpu in range(4):
            slots[:, gpu, 1] = rng.choice(np.setdiff1d(np.arange(4), slots[:, gpu, 0]))
        backend.wait_until(i * float(rng.choice([0, 1e-4, 1e-2])))
        backend.apply(slots)
        part = pass_of(rng.integers(0, 200, (3, 4)), start=backend.now)
        if not part.load_BLE.any():
            continue
        backend.run(part)
        beyond_LG = np.maximum(backend.pool.held_LG - CAPACITY, 0)
        assert beyond_LG.max() <= STAGED
        held = backend.pool.slots()
        assert all(set(layer[layer >= 0]) == set(range(4)) for layer in held)
    report = backend.report
    assert backend.memory().peak_G.max() <= room
    assert np.isfinite(np.concatenate(report.layer_BL)).all()
    assert (np.concatenate(report.exposed_BL) >= 0).all()


# -------------------------------------------------------------------------------------------- shares


def test_live_shares_cost_what_they_cost_and_are_left_where_they_do_not_pay() -> None:
    load = [[300.0, 100.0, 60.0, 20.0]] * 3
    slots = with_second(0, 3)
    runs = {}
    for split in (None, 0.0, 2e-6, 1.0):
        backend = SimulatedBackend(MACHINE, slots, CAPACITY, shares="timed", terms=Terms(split_seconds=split))
        for _ in range(3):
            backend.run(pass_of(load))
        runs[split] = np.concatenate(backend.report.layer_BL)[-1]
    assert runs[0.0] == pytest.approx(runs[None])
    assert runs[2e-6] == pytest.approx(runs[None] + 2e-6)
    static = SimulatedBackend(MACHINE, STATIC, CAPACITY, shares="equal")
    static.run(pass_of(load))
    assert runs[1.0] == pytest.approx(static.report.layer_BL[0][0]), "one replica each is ready and free"


def test_a_split_learns_from_passes_of_its_size() -> None:
    split = SplitCost(1.0, layers=2)
    ready = np.array([20.0, 4.0])
    assert split.worth_it(100, ready, ready, None).tolist() == [True, False]  # a tenth is hoped for
    assert split.worth_it(120, ready, ready - 4.0, None).tolist() == [True, False]
    for _ in range(8):
        split.worth_it(127, ready, ready - [0.0, 4.0], None)
    assert split.worth_it(127, ready, ready, None).tolist() == [False, True]
    assert split.worth_it(1000, ready, ready, None).tolist() == [True, False]
    for _ in range(4):
        split.worth_it(127, ready[:1], ready[:1], np.array([1]))
    assert split.worth_it(127, ready, ready, None).tolist() == [False, False]


def test_a_split_that_pays_now_and_then_is_left_alone() -> None:
    """One pass of eight saves what six cost: in the mean it hardly pays, and in the others it is lost."""
    split, ready = SplitCost(1.0, layers=1), np.array([9.0])
    paid = [bool(split.worth_it(8, ready, ready - 6.0 * (i % 8 == 7), None)[0]) for i in range(64)]
    assert not any(paid)


def test_a_split_that_is_in_vain_half_of_the_time_is_left_alone() -> None:
    """In the mean it saves three times what it costs, but every other pass ends later for it."""
    split, ready = SplitCost(1.0, layers=2), np.array([9.0, 9.0])
    paid = [
        split.worth_it(8, ready, ready - [6.0 * (i % 2), 6.0 * (i % 4 > 0)], None).tolist() for i in range(64)
    ]
    assert not any(first for first, _ in paid[16:])
    assert all(second for _, second in paid[16:])  # one in four


def test_what_is_believed_decides_and_the_truth_judges() -> None:
    """A system that takes experts to be free spreads tokens, and pays for it."""
    load, slots = [[40.0, 30.0, 20.0, 10.0]] * 3, with_second(0, 3)
    wrong = TimeModel(token_cost=1e-5, activation_cost=0.0, unit="s")
    runs = {}
    for believed in (None, wrong):
        backend = SimulatedBackend(MACHINE, slots, CAPACITY, shares="timed", terms=Terms(believed=believed))
        backend.run(pass_of(load))
        runs[believed] = backend.report.layer_BL[0][0]
    assert (runs[wrong] > runs[None] + 1e-6).all()
