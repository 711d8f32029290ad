"""Shares in multiples of 1/N: their largest time beside enumeration, the twins, and tables of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.shares import entries as entry_module
from moeless_opt.solvers.shares import entry_shares, entry_table, solve_shares
from moeless_opt.solvers.shares.entry_table import met_order
from moeless_opt.solvers.shares.rounding import round_tokens
from tests.oracles.entries import best_entries

KNUTH = 2654435769


def layer(rng: Any, gpus: int, slots: int, experts: int) -> Any:
    """Slots of one layer: every expert somewhere, most other slots filled at random, none twice on a GPU."""
    while True:
        slots_GC = np.full((gpus, slots), -1, dtype=np.int32)
        for at, expert in enumerate(rng.permutation(experts)):
            slots_GC[at % gpus, at // gpus] = expert
        for gpu in range(gpus):
            for slot in range(slots):
                if slots_GC[gpu, slot] < 0 and rng.random() < 0.8:
                    others = np.setdiff1d(np.arange(experts), slots_GC[gpu])
                    if len(others):
                        slots_GC[gpu, slot] = rng.choice(others)
        return slots_GC


def largest(load_LE: Any, slots_LGC: Any, share_LGC: Any, speed_G: Any) -> Any:
    return gpu_times(load_LE, slots_LGC, share_LGC, speed_G).max(1)


def by_remainders(load_LE: Any, slots_LGC: Any, share_LGC: Any, entries: int) -> Any:
    where = np.nonzero(slots_LGC >= 0)
    key = where[0] * load_LE.shape[1] + slots_LGC[where]
    rounded = np.zeros(slots_LGC.shape)
    rounded[where] = round_tokens(share_LGC[where] * entries, key, np.full(load_LE.size, entries)) / entries
    return rounded


def cycles(slots_GC: Any) -> int:
    """Edges of the graph of replicas beyond those of trees."""
    held = slots_GC[slots_GC >= 0]
    count = np.bincount(held)
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    extra = 0
    for gpu, row in enumerate(slots_GC):
        for expert in row[row >= 0]:
            if count[expert] > 1:
                a, b = root(("gpu", gpu)), root(("expert", int(expert)))
                extra += a == b
                parent[a] = b
    return extra


@pytest.mark.parametrize("seed", range(60))
def test_no_rounding_is_better_where_replicas_have_few_cycles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus, experts, entries = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(1, 7))
    slots = -(-experts // gpus) + int(rng.integers(0, 2))
    load_LE = rng.choice([0.0, 1.0, 3.0, 10.0], (1, experts)) * rng.uniform(0.5, 2.0, (1, experts))
    slots_LGC = layer(rng, gpus, slots, experts)[None]
    speed_G = rng.choice([1.0, 2.0, 0.7], gpus)
    share_LGC = solve_shares(load_LE, slots_LGC, speed_G).share_LGC
    rounded_LGC = entry_shares(load_LE, slots_LGC, share_LGC, entries, speed_G)
    assert np.array_equal(rounded_LGC * entries, np.rint(rounded_LGC * entries))
    sums = np.zeros(experts + 1)
    np.add.at(sums, slots_LGC[0], rounded_LGC[0])
    assert np.allclose(sums[:experts], 1.0, rtol=0, atol=1e-12)
    assert not rounded_LGC[slots_LGC < 0].any()
    ours = float(largest(load_LE, slots_LGC, rounded_LGC, speed_G)[0])
    least = best_entries(load_LE[0], slots_LGC[0], speed_G, entries)
    assert ours <= least * (1 + (1e-6 if cycles(slots_LGC[0]) <= 1 else 0.05))
    assert ours >= least * (1 - 1e-9)


@pytest.mark.xdist_group("numba")
def test_the_search_beats_largest_remainders_and_the_twins_agree() -> None:
    rng = np.random.default_rng(1)
    load_LE = rng.lognormal(0, 1, (6, 64))
    plan = mo.plan(load_LE, mo.uniform(2, 8, slots=5))
    speed_G = np.ones(16)
    for entries in (3, 16, 64, 1000):
        found = [
            entry_shares(load_LE, plan.slots_LGC, plan.share_LGC, entries, backend=name)
            for name in ("numpy", "numba")
        ]
        assert np.array_equal(*found)
        ours_L = largest(load_LE, plan.slots_LGC, found[0], speed_G)
        plain_LGC = by_remainders(load_LE, plan.slots_LGC, plan.share_LGC, entries)
        theirs_L = largest(load_LE, plan.slots_LGC, plain_LGC, speed_G)
        assert (ours_L <= theirs_L * (1 + 1e-9)).all()
        assert ours_L.sum() < 0.999 * theirs_L.sum() or entries == 1000
        assert (ours_L >= plan.certificate.value_L * (1 - 1e-9)).all()


def test_idle_replicas_stay_idle_and_what_else_takes_time_counts() -> None:
    load_LE = np.array([[8.0, 8.0]])
    slots_LGC = np.array([[[0, 1], [0, -1], [1, 0]]], dtype=np.int32)
    share_LGC = np.array([[[0.0, 0.0], [0.5, 0.0], [1.0, 0.5]]])
    kept_LGC = entry_shares(load_LE, slots_LGC, share_LGC, 4, idle=False)
    assert not kept_LGC[share_LGC == 0].any()
    extra_LG = np.array([[100.0, 0.0, 0.0]])
    moved_LGC = entry_shares(load_LE, slots_LGC, share_LGC, 4, extra_LG=extra_LG)
    assert not moved_LGC[0, 0].any()


def test_a_table_serves_the_shares_from_the_first_tokens_on() -> None:
    rng = np.random.default_rng(3)
    load_LE = rng.lognormal(0, 1, (2, 32))
    plan = mo.plan(load_LE, mo.uniform(1, 8, slots=6))
    for entries in (16, 64, 100):
        table = mo.share_table(plan, entries)
        share_LGC = entry_shares(load_LE, plan.slots_LGC, plan.share_LGC, entries)
        assert table.slot_LEN.shape == (2, 32, entries)
        for x in range(2):
            flat = share_LGC[x].ravel()
            for expert in range(32):
                count = int(table.count_LE[x, expert])
                row = table.slot_LEN[x, expert]
                assert (row[:count] >= 0).all()
                assert (row[count:] == -1).all()
                slots = np.flatnonzero(plan.slots_LGC[x].ravel() == expert)
                served = {slot: Fraction(int((row[:count] == slot).sum()), count) for slot in slots.tolist()}
                assert all(float(part) == pytest.approx(flat[slot]) for slot, part in served.items())
                for tokens in range(1, min(count, 64) + 1):
                    met = row[met_order(count)[:tokens]]
                    off = max(abs((met == slot).sum() - tokens * part) for slot, part in served.items())
                    assert off < 1


@pytest.mark.xdist_group("numba")
def test_the_twins_schedule_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    for total in (1, 7, 64):
        count_KR = rng.multinomial(total, [0.4, 0.3, 0.2, 0.1, 0.0], 20)
        plain, quick = [], []
        for name, found in (("numpy", plain), ("numba", quick)):
            monkeypatch.setattr(
                entry_table, "kernels", lambda _, work, name=name: entry_module.kernels(name, work)
            )
            found.append(entry_table._schedule(count_KR, total))
        assert np.array_equal(plain[0], quick[0])


def test_tokens_meet_entries_as_the_hash_says() -> None:
    for count in (1, 2, 3, 16, 64, 100):
        order = met_order(count)
        assert sorted(order) == list(range(count))
        hashed = [(token * KNUTH % 2**32) % count for token in range(64 * count)]
        assert list(dict.fromkeys(hashed)) == order[: len(set(hashed))].tolist()


def test_an_even_split_has_every_slot_once() -> None:
    load_LE = np.random.default_rng(5).lognormal(0, 1, (2, 16))
    plan = mo.plan(load_LE, mo.uniform(1, 4, slots=6), split="equal")
    table = mo.share_table(plan)
    assert np.array_equal(table.count_LE, plan.replicas_LE)
    slots = np.sort(table.slot_LEN[table.slot_LEN >= 0])
    filled = np.flatnonzero((plan.slots_LGC >= 0).reshape(2, -1))
    assert np.array_equal(slots, np.sort(filled % plan.slots_LGC[0].size))
    with pytest.raises(mo.ProblemError, match="entries: is 1, must be at least"):
        mo.share_table(plan, 1)


def test_a_table_of_free_shares_needs_its_length() -> None:
    plan = mo.plan(np.ones((1, 4)), mo.uniform(1, 2, slots=3))
    with pytest.raises(mo.ProblemError, match="entries: is missing"):
        mo.share_table(plan)
    with pytest.raises(mo.ProblemError, match="entries: is 0"):
        mo.share_table(plan, 0)


def test_shares_of_a_plan_without_its_problem_go_by_largest_remainders() -> None:
    load_LE = np.random.default_rng(7).lognormal(0, 1, (1, 16))
    plan = mo.plan(load_LE, mo.uniform(1, 4, slots=6)).replace(made_for="")
    table = mo.share_table(plan, 8)
    rounded = by_remainders(load_LE, plan.slots_LGC, plan.share_LGC, 8)[0].ravel()
    for expert in range(16):
        count = int(table.count_LE[0, expert])
        slots, times = np.unique(table.slot_LEN[0, expert, :count], return_counts=True)
        assert rounded[slots] == pytest.approx(times / count)


def test_even_shares_are_rounded_too() -> None:
    slots_LGC = np.array([[[0], [0], [0]]], dtype=np.int32)
    rounded = entry_shares(np.array([[6.0]]), slots_LGC, equal_shares(slots_LGC, 1), 4)
    assert sorted(rounded.ravel().tolist()) == [0.25, 0.25, 0.5]
