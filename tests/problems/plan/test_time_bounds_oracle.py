"""The bound for any time model: below every choice of what serves what, and as high as its own argument."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.time_bounds import TimeTable, timed_bound
from moeless_opt.problems.spec.time_model import TimeModel


def models(rng: Any) -> TimeModel:
    """Linear ones, and curves that rise, or fall and rise again, with the tokens."""
    if rng.random() < 0.4:
        return TimeModel(
            token_cost=float(rng.choice([0.5, 1.0])),
            activation_cost=float(rng.choice([0.0, 4.0])),
            launch=float(rng.choice([0.0, 3.0])),
        )
    rows = np.sort(rng.integers(1, 30, (3, 4)), axis=1).astype(float)  # more experts take no less
    if rng.random() < 0.7:
        rows = np.sort(rows, axis=0)
    rows[-1] += rows[-2] + rng.integers(0, 3)
    return TimeModel(
        curve_tokens=[0.0, 6.0, 20.0],
        curve_activated=[0.0, 1.0, 2.0, 4.0],
        curve_time=rows,
        unit="s",
    )


def most_tokens(model: TimeModel, used: int, time: float, extra: float = 0.0) -> float:
    """Most tokens of so many active experts in a time at speed 1, by looking at the pieces of the curve."""
    if used == 0:
        return 0.0 if float(model.time(0.0, 0, 1.0)) <= time else -math.inf
    knots = [0.0, 1.0] if model.curve_tokens is None else model.curve_tokens.tolist()
    values = [float(model.time(k, used, 1.0)) + extra * k for k in knots]
    best = -math.inf
    for (a, b), (low, high) in zip(itertools.pairwise(knots), itertools.pairwise(values), strict=True):
        if high <= time:
            best = max(best, b)
        elif low <= time:
            best = max(best, a + (b - a) * (time - low) / (high - low))
    if values[-1] <= time:
        slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
        best = knots[-1] + (time - values[-1]) / slope if slope > 0 else math.inf
    return best


def layer(rng: Any) -> tuple[Any, Any, Any, TimeModel]:
    E, G = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    load = rng.integers(0, 40, E).astype(float)
    load[0] += not load.any()
    slots = rng.integers(1, 4, G)
    speed = rng.choice([0.5, 1.0, 2.0], G) if rng.random() < 0.5 else np.full(G, rng.choice([1.0, 2.0]))
    return load, slots, speed, models(rng)


def possible(load: Any, slots: Any, speed: Any, model: TimeModel, time: float) -> bool:
    """Whether some choice of who serves what ends in time: a flow for each, by Hall's condition."""
    active = [e for e in range(len(load)) if load[e] > 0]
    choices = [
        [c for n in range(min(int(room), len(active)) + 1) for c in itertools.combinations(active, n)]
        for room in slots
    ]
    groups = [group for n in range(1, len(active) + 1) for group in itertools.combinations(active, n)]
    for serving in itertools.product(*choices):
        if len({e for held in serving for e in held}) < len(active):
            continue
        room = [most_tokens(model, len(held), time * s) for held, s in zip(serving, speed, strict=True)]
        if min(room) < 0:
            continue
        if all(
            sum(load[e] for e in group)
            <= sum(r for r, held in zip(room, serving, strict=True) if set(held) & set(group)) + 1e-9
            for group in groups
        ):
            return True
    return False


def argued(load: Any, slots: Any, speed: Any, model: TimeModel, time: float) -> bool:
    """Whether some price of an activated expert proves that a time is too short."""
    room = [
        [most_tokens(model, a, time * s) for a in range(int(c) + 1)]
        for c, s in zip(slots, speed, strict=True)
    ]
    if any(max(row) == -math.inf for row in room):
        return True
    active, total = sum(w > 0 for w in load), sum(load)
    prices = {0.0}
    for row in room:
        for a, b in itertools.combinations(range(len(row)), 2):
            if math.isfinite(row[a]) and math.isfinite(row[b]) and row[a] > row[b]:
                prices.add((row[a] - row[b]) / (b - a))
    return any(
        sum(max(cap + price * a for a, cap in enumerate(row)) for row in room) - price * active
        < total * (1 - 1e-12)
        for price in prices
    )


@pytest.mark.parametrize("seed", range(2))
def test_no_choice_is_quicker_and_no_time_below_is_open(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tight = 0
    for _ in range(40):
        load, slots, speed, model = layer(rng)
        used = np.minimum(slots, len(load))
        if used.sum() < len(load):
            continue
        table = TimeTable.of(model, int(used.max()))
        bound = float(timed_bound(load[None], used[None], speed, table)[0])
        assert not possible(load, used, speed, model, bound * (1 - 1e-6) - 1e-9)
        assert argued(load, used, speed, model, bound * (1 - 1e-6) - 1e-9)
        assert not argued(load, used, speed, model, bound * (1 + 1e-6) + 1e-6)
        tight += possible(load, used, speed, model, bound * (1 + 1e-6) + 1e-6)
    assert tight > 15


def test_layers_and_equal_gpus_are_counted() -> None:
    """All layers at once, with GPUs of equal kinds in any order: as one by one."""
    rng = np.random.default_rng(5)
    for _ in range(12):
        L, G, E = 3, int(rng.integers(1, 6)), int(rng.integers(1, 6))
        load = rng.integers(0, 50, (L, E)).astype(float)
        slots = rng.integers(1, 4, (L, G))
        speed = rng.choice([0.5, 1.0], G)
        table = TimeTable.of(models(rng), 3, per_token=float(rng.choice([0.0, 0.25])))
        together = timed_bound(load, slots, speed, table)
        mixed = rng.permutation(G)
        for x in range(L):
            alone = timed_bound(load[[x]], slots[[x]][:, mixed], speed[mixed], table)[0]
            assert alone == pytest.approx(together[x], rel=1e-7, abs=1e-7)
            assert (load[x].sum() > 0) or together[x] == 0.0


def test_most_tokens_in_a_time_by_its_pieces() -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        model = models(rng)
        extra = float(rng.choice([0.0, 0.5]))
        table = TimeTable.of(model, 4, per_token=extra)
        times = np.concatenate([table.table_AK.ravel(), rng.uniform(0, 90, 6), [0.0]])
        got = table.largest(times)
        for x, time in enumerate(times.tolist()):
            want = [most_tokens(model, a, time, extra) for a in range(5)]
            np.testing.assert_allclose(got[x], want, rtol=1e-9, atol=1e-9)


def test_an_idle_gpu_has_no_link_to_wait_for() -> None:
    table = TimeTable.of(TimeModel(token_cost=2.0, launch=1.0, activation_cost=3.0), 2, per_token=0.5)
    assert table.knot_K.tolist() == [0.0, 1.0]
    assert table.table_AK.tolist() == [[1.0, 1.0], [4.0, 6.5], [7.0, 9.5]]
