"""Each bound against its own definition in plain Python: not only valid, but as high as it says."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.bounds import (
    apportionment_pairs,
    best_bound,
    density_bound,
    mean_bound,
    packing_bound,
    replicas_needed,
    slots_bound,
    tau_curve,
    tau_star,
)
from moeless_opt.problems.plan.scarce_bounds import scarce_bound
from moeless_opt.problems.spec.time_model import TimeModel

TIMES = (
    TimeModel(),
    TimeModel(),
    TimeModel(token_cost=0.5),
    TimeModel(activation_cost=4.0),
    TimeModel(launch=3.0),
    TimeModel(token_cost=0.25, activation_cost=2.0, launch=1.0),
)


class Layer:
    """One layer and the definitions of its bounds."""

    def __init__(self, load: Any, capacity: Any, speed: Any, split: str, time: TimeModel) -> None:
        self.load = [float(w) for w in load]
        self.used = [(int(c), float(s)) for c, s in zip(capacity, speed, strict=True) if c > 0]
        self.split, self.time = split, time
        self.fast = sorted((s for _, s in self.used), reverse=True)
        self.slots = sum(min(c, len(self.load)) for c, _ in self.used)

    def mean(self) -> float:
        if not self.used:
            return math.inf
        active = sum(w > 0 for w in self.load)
        work = self.time.launch * len(self.used) + self.time.activation_cost * active
        return (work + self.time.token_cost * math.fsum(self.load)) / math.fsum(self.fast)

    def alone(self, load: float, most: int) -> float:
        """Least time of an expert with at most so many replicas, on the fastest GPUs."""
        if load == 0:
            return 0.0
        start, cost, times = self.time.launch + self.time.activation_cost, self.time.token_cost, []
        for r in range(1, most + 1):
            if self.split == "equal":  # every piece alike: the slowest of them ends last
                times.append((start + cost * load / r) / self.fast[r - 1])
            else:
                times.append((start * r + cost * load) / math.fsum(self.fast[:r]))
        return min(times)

    def needed(self, load: float, time: float) -> int:
        for r in range(1, len(self.fast) + 1):
            if self.alone(load, r) <= time * (1 + 1e-12):
                return r
        return len(self.fast) + 1

    def tau(self, most: Any = None, least: Any = None, total: int | None = None, room: bool = True) -> float:
        """The least candidate at which the replicas needed are within all limits."""
        E, G = len(self.load), len(self.fast)
        slots = self.slots if total is None else min(self.slots, total)
        if G == 0 or slots < E:
            return math.inf
        floor = [1] * E if least is None else [max(int(n), 1) for n in least]
        cap = [G] * E if most is None else [min(max(int(n), 1), G) for n in most]
        if max(floor) > G or sum(floor) > slots:
            return math.inf
        steps = {0.0} | {self.alone(w, r) for w in self.load for r in range(1, G + 1)}
        for time in sorted(steps):
            wanted = [self.needed(w, time) for w in self.load]
            if any(n > c for n, c in zip(wanted, cap, strict=True)):
                continue
            need = sorted((max(n, f) for n, f in zip(wanted, floor, strict=True)), reverse=True)
            # Where experts have floors of replicas, only the sum is looked at.
            places = range(1, E + 1) if room and least is None else ()
            if sum(need) <= slots and all(
                sum(need[:k]) <= sum(min(c, k) for c, _ in self.used) for k in places
            ):
                return time
        return math.inf

    def by_slots(self) -> float:
        """The root by halving."""
        heavy = sorted(self.load, reverse=True)
        most = [(sum(heavy[:c]), s) for c, s in self.used]
        total = sum(heavy)
        if sum(m for m, _ in most) < total * (1 - 1e-12):
            return math.inf
        low, high = 0.0, total / min((s for _, s in most), default=1.0) if total else 0.0
        for _ in range(200):
            middle = (low + high) / 2
            enough = sum(min(middle * s, m) for m, s in most) >= total * (1 - 1e-15)
            low, high = (low, middle) if enough else (middle, high)
        return self.time.token_cost * high

    def packing(self, total: int | None = None) -> float:
        """Of k G + 1 whole experts k + 1 lie together: no lighter than the lightest k + 1 of them."""
        E, G = len(self.load), len(self.used)
        spare = (self.slots if total is None else min(self.slots, total)) - E
        if spare < 0 or G == 0:
            return 0.0
        whole = sorted(self.load, reverse=True)[spare:]
        best = 0.0
        for k in range(1, E + 1):
            if k * G + 1 > len(whole):
                break
            group = whole[: k * G + 1][-(k + 1) :]
            active = self.time.activation_cost * len(group) * (min(group) > 0)
            best = max(best, self.time.launch + active + self.time.token_cost * sum(group))
        return best / max(self.fast)


def instance(rng: Any, gpus: Any = None, alike: bool | None = None) -> tuple[Any, Any, Any]:
    """Loads and slots of several layers, some of them without slots, and speeds."""
    L, E = int(rng.integers(1, 5)), int(rng.integers(1, 8))
    G = int(rng.integers(1, 6)) if gpus is None else gpus
    load = [rng.lognormal(0, 1.5, (L, E)), rng.integers(0, 9, (L, E)).astype(float)][rng.integers(2)]
    alike = rng.random() < 0.4 if alike is None else alike
    if alike:
        capacity = np.broadcast_to(rng.integers(rng.random() < 0.8, 5, (L, 1)), (L, G))
        if rng.random() < 0.5:
            capacity = np.broadcast_to(capacity[:1], (L, G))
        return load, capacity, np.full(G, rng.choice([1.0, 0.5, 2.0]))
    capacity = rng.integers(0, 5, (L, G))
    if rng.random() < 0.4:
        capacity = np.broadcast_to(capacity[:1], (L, G))
    speed = rng.choice([0.25, 0.5, 1.0, 2.0, 4.0], G) if rng.random() < 0.7 else np.ones(G)
    return load, capacity, speed


def layers(
    load: Any, capacity: Any, speed: Any, split: str = "equal", time: TimeModel = TIMES[0]
) -> list[Layer]:
    return [Layer(w, c, speed, split, time) for w, c in zip(load, capacity, strict=True)]


def same(got: Any, want: list[float]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_every_bound_is_what_it_says(split: Any) -> None:
    rng = np.random.default_rng(len(split))
    for _ in range(150):
        load, capacity, speed = instance(rng)
        time = TIMES[rng.integers(len(TIMES))]
        each = layers(load, capacity, speed, split, time)
        same(mean_bound(load, capacity, speed, time=time), [one.mean() for one in each])
        same(tau_star(load, capacity, speed, split, time=time), [one.tau() for one in each])
        same(slots_bound(load, capacity, speed, time=time), [one.by_slots() for one in each])
        total = int(rng.integers(1, capacity.sum() // len(load) + 3))
        same(
            packing_bound(load, capacity, speed, replicas_L=total, time=time),
            [one.packing(total) for one in each],
        )
        same(packing_bound(load, capacity, speed, time=time), [one.packing() for one in each])


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_tau_within_limits_on_replicas(split: Any) -> None:
    rng = np.random.default_rng(7)
    for _ in range(150):
        load, capacity, speed = instance(rng)
        L, E = load.shape
        time = TIMES[rng.integers(len(TIMES))]
        most = [None, int(rng.integers(1, 4)), rng.integers(1, 5, E), rng.integers(1, 5, (L, E))][
            rng.integers(4)
        ]
        least = [None, None, 1, int(rng.integers(1, 3)), rng.integers(0, 3, (L, E))][rng.integers(5)]
        total = [None, None, rng.integers(E, 3 * E + 1, L)][rng.integers(3)]
        got = tau_star(
            load, capacity, speed, split, max_replicas=most, min_replicas=least, replicas_L=total, time=time
        )
        want = [
            one.tau(
                None if most is None else np.broadcast_to(most, (L, E))[x],
                None if least is None else np.broadcast_to(least, (L, E))[x],
                None if total is None else int(total[x]),
            )
            for x, one in enumerate(layers(load, capacity, speed, split, time))
        ]
        same(got, want)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_the_best_bound_is_the_largest_and_has_its_name(split: Any) -> None:
    rng = np.random.default_rng(11)
    won: set[str] = set()
    for _ in range(200):
        load, capacity, speed = instance(rng)
        time = TIMES[rng.integers(len(TIMES))]
        total = [None, rng.integers(load.shape[1], 3 * load.shape[1], len(load))][rng.integers(2)]
        bound, name = best_bound(load, capacity, speed, split, replicas_L=total, time=time)
        for x, one in enumerate(layers(load, capacity, speed, split, time)):
            limit = None if total is None else int(total[x])
            parts = {
                "mean": one.mean(),
                "tau": one.tau(total=limit),
                "slots": one.by_slots(),
                "packing": one.packing(limit),
            }
            best = max(parts.values())
            if math.isfinite(best):
                heavy = np.sort(load[x])[::-1]
                more = scarce_bound(
                    heavy[None], capacity[x], speed, np.array([best / time.token_cost]), split
                )
                parts["fillers"] = time.token_cost * float(more[0])
            same(bound[x], max(parts.values()))  # type: ignore[arg-type]
            # Of equal ones the first; a tie within rounding may go either way.
            assert parts[name[x]] >= bound[x] * (1 - 1e-9)
            before = [
                value for key, value in parts.items() if list(parts).index(key) < list(parts).index(name[x])
            ]
            assert all(value < bound[x] or not math.isfinite(value) for value in before)
            won.add(str(name[x]))
    assert won == {"mean", "tau", "slots", "packing", "fillers"}


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_the_curve_of_tau_has_every_number_of_spare_replicas(split: Any) -> None:
    rng = np.random.default_rng(13)
    for _ in range(80):
        load, _, speed = instance(rng, alike=bool(rng.integers(2)))
        time = TIMES[rng.integers(len(TIMES))]
        E, G = load.shape[1], len(speed)
        most, copies = int(rng.integers(0, 12)), [None, int(rng.integers(1, 7))][rng.integers(2)]
        curve = tau_curve(load, speed, most, split, max_replicas=copies, time=time)
        assert curve.shape == (len(load), most + 1)
        for x, one in enumerate(layers(load, np.full((len(load), G), E), speed, split, time)):
            cap = None if copies is None else [copies] * E
            want = [one.tau(most=cap, total=E + spare, room=False) for spare in range(most + 1)]
            same(curve[x], want)
            assert all(b <= a * (1 + 1e-12) for a, b in pairwise(curve[x]))


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_the_fewest_replicas_in_time(split: Any) -> None:
    rng = np.random.default_rng(17)
    for _ in range(150):
        load, _, speed = instance(rng, alike=bool(rng.integers(2)))
        time = TIMES[rng.integers(len(TIMES))]
        each = layers(load, np.ones((len(load), len(speed))), speed, split, time)
        # Times that some number of replicas just meets, or a little less or more, and any others.
        wanted = np.array([one.alone(one.load[0], int(rng.integers(1, len(speed) + 1))) for one in each])
        wanted *= rng.choice([1.0, 1 - 1e-9, 1 + 1e-9, 0.5, 1.7])
        got = replicas_needed(load, wanted, speed, split, time=time)
        assert got.tolist() == [
            [one.needed(w, t) for w in one.load] for one, t in zip(each, wanted.tolist(), strict=True)
        ]
        alone = replicas_needed(load[0], wanted[0], speed, split, time=time)
        assert alone.tolist() == got[:1].tolist()


def test_pairs_of_an_apportionment() -> None:
    for experts in range(1, 6):
        for most in range(5):
            for wanted in range(1, 12):
                rank, count = apportionment_pairs(experts, most, wanted)
                want = [(e, r) for e in range(experts) for r in range(1, most + 1) if (e + 1) * r <= wanted]
                assert list(zip(rank.tolist(), count.tolist(), strict=True)) == want


def test_the_sets_of_a_density() -> None:
    """The k slowest GPUs, and all that the slowest can hand on to: the densest of them."""
    rng = np.random.default_rng(19)
    for _ in range(150):
        L, E, G = (int(n) for n in rng.integers(1, [4, 6, 6]))
        speed = rng.choice([0.5, 1.0, 2.0], G) if rng.random() < 0.6 else None
        load = rng.integers(0, 40, (L, E)).astype(float)
        slots = np.full((L, G, E), -1, dtype=np.int32)
        share = np.zeros((L, G, E))
        for x in range(L):
            hosts = rng.random((E, G)) < 0.4
            hosts[np.arange(E), rng.integers(0, G, E)] = True
            part = hosts * rng.random((E, G)) * (rng.random((E, G)) < 0.7)
            part = np.where(part.sum(1, keepdims=True) > 0, part, hosts)
            part /= part.sum(1, keepdims=True)
            for g in range(G):
                for c, e in enumerate(np.flatnonzero(hosts[:, g])):
                    slots[x, g, c], share[x, g, c] = e, part[e, g]
        got = density_bound(load, slots, share, speed)
        fast = np.ones(G) if speed is None else speed
        for x in range(L):
            home = {e: {g for g in range(G) if e in slots[x, g]} for e in range(E)}
            served = [
                {e: s for e, s in zip(slots[x, g], share[x, g], strict=True) if e >= 0} for g in range(G)
            ]
            time = [sum(load[x, e] * s for e, s in served[g].items()) / fast[g] for g in range(G)]
            order = sorted(range(G), key=lambda g: -time[g])
            reach = {g for g in range(G) if time[g] >= max(time)}
            while True:
                wider = reach | {h for g in reach for e, s in served[g].items() if s > 1e-9 for h in home[e]}
                if wider == reach:
                    break
                reach = wider
            sets = [set(order[:k]) for k in range(1, G + 1)] + [reach]
            want = [
                sum(load[x, e] for e in range(E) if home[e] <= chosen) / sum(fast[g] for g in chosen)
                for chosen in sets
            ]
            assert got[x] == pytest.approx(max(want), rel=1e-12)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_units_and_names_do_not_matter(split: Any) -> None:
    """Loads in other units, experts and GPUs in another order: the same bound in those units."""
    rng = np.random.default_rng(23)
    for _ in range(80):
        load, capacity, speed = instance(rng)
        bound, name = best_bound(load, capacity, speed, split)
        scaled, _ = best_bound(load * 1024, capacity, speed * 4, split)
        same(scaled / 256, bound.tolist())
        mixed, again = best_bound(
            rng.permuted(load, axis=1),
            capacity[:, (order := rng.permutation(len(speed)))],
            speed[order],
            split,
        )
        same(mixed, bound.tolist())
        assert again.shape == name.shape
        # A layer for itself, and one more of it.
        twice, _ = best_bound(np.repeat(load, 2, 0), np.repeat(capacity, 2, 0), speed, split)
        same(twice, np.repeat(bound, 2).tolist())
