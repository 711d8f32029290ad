"""The layer state of equal re-plans: exact bookkeeping, and one plan from both twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.replan import equal, equal_state
from moeless_opt.solvers.replan.equal_state import (
    FILL,
    LOAD_UNIT,
    REACH,
    ROUNDS,
    EqualSearch,
    Layers,
    LayerState,
)
from moeless_opt.solvers.replan.task import ReplanTask, ReplanWish


def random_state(rng: np.random.Generator, *, copies: bool = False, full: bool = False) -> LayerState:
    """A valid layer; some experts without tokens, some pairs barred, some slots free unless full."""
    G, C = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    E = int(rng.integers(1, G * C + 1))
    content = np.full((G, C), -1, dtype=np.int64)
    places = rng.permutation(G * C)
    content.ravel()[places[:E]] = rng.permutation(E)
    for place in places[E:]:
        held = content[place // C]
        others = np.arange(E) if copies else np.setdiff1d(np.arange(E), held)
        if len(others) and (full or rng.random() < 0.7):
            content.ravel()[place] = rng.choice(others)
    load = np.rint(rng.lognormal(0, 1, E) * (rng.random(E) < 0.9) * LOAD_UNIT).astype(np.int64)
    price = rng.integers(0, 3, (E, G))
    state = equal_state.new_state(
        load,
        content,
        np.full(G, C),
        price,
        rng.random((E, G)) < 0.9,
        rng.random((E, G)) < 0.1,
        np.ones(E, dtype=np.int64),
        np.full(E, G * C if copies else G),
        rng.integers(0, 3, G),
        np.ones(E, dtype=np.int64),
    )
    equal_state.refresh(state, G * C)
    if rng.random() < 0.5:
        state.spread_E[:] = np.where(rng.random(E) < 0.7, state.reach_E.min(), 1)
        state.facts_3[2] = int(state.spread_E.max() > 1)
    equal_state.give_rooms(state, rng.uniform(0.5, 2.0, G), float(load.sum() / LOAD_UNIT / G * 1.1))
    return state


def pieces(state: LayerState) -> np.ndarray:
    """GPU loads by the definition."""
    load = np.zeros(len(state.room_G), dtype=np.int64)
    for g, row in enumerate(state.content_GC.tolist()):
        for e in row:
            if e >= 0:
                load[g] += int(state.load_E[e]) // int((state.content_GC == e).sum())
    return load


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_changes_are_exact_kept_up_to_date_and_taken_back(seed: int, copies: bool, full: bool) -> None:
    rng = np.random.default_rng(seed)
    state = random_state(rng, copies=copies, full=full)
    search = EqualSearch(full, copies, 0, 3, 0, 0)
    best = np.zeros((4, 9), dtype=np.int64)
    for change in best[: equal_state.best_changes(state, search, seed % 3, best)]:
        before = [one.copy() for one in state]
        paid, pressure = equal_state.paid(state), equal_state.pressure(state)
        price = equal_state.make(state, change)
        np.testing.assert_array_equal(state.carried_G, pieces(state))
        assert equal_state.paid(state) == paid + price
        kept = [one.copy() for one in state]
        equal_state.refresh(state, state.content_GC.size)
        for name, one, other in zip(LayerState._fields, kept, state, strict=True):
            if name != "host_KE":
                np.testing.assert_array_equal(one, other, err_msg=name)
        for e, gpus in enumerate(state.host_KE.T):
            assert sorted(gpus[: state.hosts_E[e]]) == np.flatnonzero(state.on_EG[e]).tolist()
        kind, e, h, _, f, g, _ = change.tolist()[:7]
        if kind != equal_state.DROP:
            assert state.open_EG[e, g]
            assert copies or state.on_EG[e].max() == 1
        if kind in (equal_state.MOVE, equal_state.SWAP, equal_state.DROP):
            assert not state.held_EG[e, h] or state.on_EG[e, h] > 0
        if kind == equal_state.SWAP:
            assert state.open_EG[f, h]
        assert state.count_E.min() >= 1
        assert (state.reach_E >= state.spread_E).all()
        assert not full or (state.content_GC >= 0).sum() == (before[1] >= 0).sum()
        equal_state.unmake(state, change)
        np.testing.assert_array_equal(state.content_GC, before[1])
        assert equal_state.pressure(state) == pressure


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_first_change_is_the_best_of_all_single_ones(seed: int) -> None:
    """Of every change that touches the hottest GPU none has a better rate (experts that share no GPU)."""
    state = random_state(np.random.default_rng(seed))
    best = np.zeros((1, 9), dtype=np.int64)
    over = state.carried_G - state.room_G
    h, before = int(over.argmax()), equal_state.pressure(state)
    if equal_state.best_changes(state, EqualSearch(False, False, 0, 3, 0, 0), 0, best) == 0:
        return

    def rate(change: Any) -> float:
        price = equal_state.make(state, change)
        gain = before - equal_state.pressure(state)
        equal_state.unmake(state, change)
        return gain / price if price > 0 else gain * equal_state._FREE

    found = rate(best[0])
    G, C = state.content_GC.shape
    for at in range(C):
        e = int(state.content_GC[h, at])
        for g in range(G):
            if e < 0 or g == h or state.on_EG[e, g] or not state.open_EG[e, g]:
                continue
            for to in range(C):
                f = int(state.content_GC[g, to])
                if f >= 0 and (state.count_E[f] == 1 or state.held_EG[f, g]):
                    continue
                if f >= 0 and (state.on_EG[e] * state.on_EG[f]).any():
                    continue
                for kind in (equal_state.ADD, equal_state.MOVE):
                    if kind == equal_state.MOVE and (state.held_EG[e, h] or state.load_E[e] == 0):
                        continue
                    if kind == equal_state.MOVE and f >= 0 and state.on_EG[f, h]:
                        continue
                    if state.spread_E.max() > 1:
                        continue
                    assert rate((kind, e, h, at, f, g, to)) <= found * (1 + 1e-9)


def layers_of(rng: np.random.Generator, G: int, C: int, E: int, L: int) -> tuple[ReplanTask, np.ndarray]:
    before = rng.lognormal(0, 1, (L, E))
    capacity = np.full((L, G), C)
    speed = rng.choice([1.0, 1.0, 0.6, 2.0], G)
    live = construct_equal(before, capacity, speed)
    task = ReplanTask(before * rng.lognormal(0, 0.5, before.shape), live, capacity, speed)
    return task, live


@pytest.mark.slow
@pytest.mark.xdist_group("numba")
@pytest.mark.skipif(not fast.available(), reason="needs Numba")
def test_twins_find_the_same_plans_with_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal.warm_equal()
    rng = np.random.default_rng(5)
    for G, C, E in ((4, 3, 9), (3, 2, 5), (8, 4, 24), (6, 5, 16), (1, 3, 3), (16, 3, 40)):
        task, _ = layers_of(rng, G, C, E, 7)
        for wish in (ReplanWish(tolerance=0.02), ReplanWish(tolerance=0.1, rounds=3, seed=9, max_moves=4)):
            plain = equal.replan_equal(task, wish, backend="numpy")
            for cores in (1, 3):
                monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
                compiled = equal.replan_equal(task, wish, backend="numba")
                np.testing.assert_array_equal(plain.slots_LGC, compiled.slots_LGC)
    # Full slots, second copies, prices and limits: straight from the state.
    kernel = equal._kernel()
    for seed in range(60):
        full, copies = seed % 2 == 0, seed % 3 == 0
        found = []
        for run in (equal_state.search_layers, kernel):
            one = random_state(np.random.default_rng(seed), copies=copies, full=full)
            layers = one_layer(one, np.random.default_rng(seed))
            told = np.zeros(1, dtype=np.uint8)
            for task_code in (FILL, REACH, ROUNDS) if full else (REACH, ROUNDS):
                turns = np.zeros(2, dtype=np.int64)
                run(layers, EqualSearch(full, copies, 4, 3, 2, 0), task_code, turns, told, True)
            found.append(layers)
        for name, a, b in zip(Layers._fields, *found, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    # Arrays that may not be written to, or views, would be other types and compiled anew.
    speed = np.array([1.0, 1.0, 2.0, 0.5])
    speed.flags.writeable = False
    task, _ = layers_of(rng, 4, 3, 8, 3)
    frozen = ReplanTask(task.load_LE[:, ::-1], task.live_LGC, task.capacity_LG, speed)
    equal.replan_equal(frozen, ReplanWish(tolerance=0.0), backend="numba")
    assert len(kernel.signatures) == 1


def one_layer(state: LayerState, rng: np.random.Generator) -> Layers:
    """A layer as the search takes it, on GPUs of one speed."""
    G = len(state.room_G)
    layers = Layers(
        load_LE=state.load_E[None],
        content_LGC=state.content_GC[None].copy(),
        capacity_LG=state.capacity_G[None],
        least_LE=state.least_E[None],
        most_LE=state.most_E[None],
        live_LGC=state.content_GC[None].copy(),
        price_LEG=rng.integers(1, 4, (1, len(state.load_E), G)),
        open_LEG=state.open_EG[None],
        held_LEG=state.held_EG[None],
        speed_G=np.ones(G),
        domain_G=state.domain_G,
        spread_LE=state.spread_E[None].copy(),
        replicas_L=np.array([state.content_GC.size]),
        word_L=np.array([equal_state.first_word(3, 0)], dtype=np.uint64),
        base_LGC=state.content_GC[None].copy(),
        goal_L=np.array([float(state.load_E.sum()) / LOAD_UNIT / G * 1.02]),
        price_L=np.zeros(1, dtype=np.int64),
        reached_L=np.zeros(1, dtype=np.bool_),
        cut_L=np.zeros(1, dtype=np.bool_),
    )
    return Layers(*(np.array(one) for one in layers))
