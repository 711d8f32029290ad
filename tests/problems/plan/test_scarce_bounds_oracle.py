"""The bound for few spare slots is as high as its argument allows, written out expert by expert.

`test_scarce_bounds` holds it below the optimum of an enumeration; this holds it up.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import moeless_opt.problems.plan.scarce_bounds as module
from moeless_opt.problems.plan.scarce_bounds import scarce_bound

HOPELESS = 0.9  # of what is proven: where even the lightest fillers leave an expert below it, nothing follows


class Argument:
    """The k heaviest experts of one layer, x of them in groups with a cost."""

    def __init__(self, load: Any, slots: Any, speed: Any) -> None:
        self.heavy = sorted((float(w) for w in load), reverse=True)
        E = len(self.heavy)
        self.gpus = [(min(int(c), E), float(s)) for c, s in zip(slots, speed, strict=True) if c > 0]
        self.G = len(self.gpus)
        self.spare = sum(c for c, _ in self.gpus) - E
        self.alike = len(set(self.gpus)) == 1

    def light(self, count: int) -> float:
        """Load of so many of the lightest experts."""
        count = min(max(count, 0), len(self.heavy))
        return math.fsum(self.heavy[len(self.heavy) - count :])

    def slots(self, K: int) -> int:
        return sum(sorted(c for c, _ in self.gpus)[:K])

    def speed(self, K: int) -> float:
        return math.fsum(sorted((s for _, s in self.gpus), reverse=True)[:K])

    def spread(self, load: float, most: int, without: int) -> float:
        """Least mean load of up to `most` GPUs that hold `load` and, in their other slots, the lightest."""
        times = [
            (load + self.light(self.slots(K) - without)) / self.speed(K)
            for K in range(1, min(most, self.G) + 1)
        ]
        if self.alike:  # only where every further GPU helps
            return times[-1] if len(times) < 2 or times[-1] <= times[-2] else 0.0
        return min(times)

    def all_of(self, k: int, most: int) -> float:
        top = math.fsum(self.heavy[:k])
        return min(
            (top + self.light(self.slots(K) - k - self.spare)) / self.speed(K)
            for K in range(1, min(most, self.G) + 1)
        )

    def whole(self, k: int, x: int, lighter: int = 0) -> float:
        n = k - x
        return self.spread(math.fsum(self.heavy[x:k]), n, n + lighter) if n > 0 else 0.0

    def crowd(self, k: int) -> float:
        times = [
            self.spread(math.fsum(self.heavy[k - q - 1 : k]), q + 1, 2 * q + 1)
            for q in range(1, min(self.spare, k - 1) + 1)
        ]
        return min(times)

    def proves(self, k: int) -> float:
        """The easiest number of experts in groups with a cost."""
        d = self.spare
        easiest = []
        for x in range(k + 1 if d else 1):
            time = max(self.all_of(k, k - x + min(2 * d, x + d)), self.whole(k, x))
            if x > d:
                time = max(time, self.crowd(k))
            easiest.append(time)
        return min(easiest)

    def undivided(self, k: int) -> float:
        """An equal split: of the k heaviest all but d are whole."""
        d, times = self.spare, []
        for x in range(d + 1):
            n = min(self.slots(min(k - x, self.G)), len(self.heavy))
            heaviest = self.light(n) - self.light(n - 1)
            lighter = min(d, 2 * (d - x)) if self.heavy[k - 1] >= 2 * heaviest else d
            times.append(self.whole(k, x, lighter))
        return min(times)

    def bound(self, known: float, split: str) -> float:
        d, best = self.spare, known
        if d < 0 or (d > self.G and self.alike):
            return best
        slow = sorted(self.gpus, key=lambda one: -one[0] / one[1])
        for K in range(1, self.G + 1):
            best = max(best, self.light(sum(c for c, _ in slow[:K]) - d) / math.fsum(s for _, s in slow[:K]))
        if d > self.G:
            return best
        for k in range(1, min(len(self.heavy), self.G + d) + 1):
            alone = min((self.heavy[k - 1] + self.light(c - 1)) / s for c, s in self.gpus)
            if alone <= HOPELESS * best:
                break
            best = max(best, self.proves(k))
            if split == "equal" and k > d:
                best = max(best, self.undivided(k))
        return best


def layers_of_one_shape(rng: Any, alike: bool) -> tuple[Any, Any, Any]:
    """Loads, slots and speeds: heavy experts over light ones as a rule, where it is hard to pair them."""
    G = int(rng.integers(1, 9))
    slots = np.full(G, rng.integers(1, 5)) if alike else rng.integers(0, 5, G)
    E = max(int(slots.sum()) - int(rng.integers(-1, min(G + 3, 7))), 1)
    shape = (int(rng.integers(1, 4)), E)
    heavy = np.arange(E) < rng.integers(1, G + 4)
    load = np.where(heavy, rng.choice([4.0, 10.0, 20.0]), rng.choice([0.0, 1.0, 2.0]))
    load = load * rng.uniform(0.6, 1.4, shape)
    kind = rng.integers(6)
    if kind == 0:
        load = rng.lognormal(0, 1, shape)
    elif kind == 1:
        load = rng.integers(0, 9, shape).astype(float)
    elif kind == 2:
        load = np.round(load)
    return load, slots, np.full(G, rng.choice([1.0, 2.0])) if alike else rng.choice([0.25, 0.5, 1.0, 2.0], G)


@pytest.mark.parametrize("split", ["equal", "fractional"])
@pytest.mark.parametrize("alike", [True, False])
def test_as_high_as_its_argument(split: str, alike: bool) -> None:
    rng = np.random.default_rng([len(split), alike])
    raised = 0
    for _ in range(400):
        load, slots, speed = layers_of_one_shape(rng, alike)
        known = load.sum(1) / speed.sum() * rng.choice([0.0, 1.0, 1.2])
        got = scarce_bound(-np.sort(-load, axis=1), slots, speed, known, split)
        want = [Argument(w, slots, speed).bound(t, split) for w, t in zip(load, known.tolist(), strict=True)]
        assert (got >= np.array(want) * (1 - 1e-9) - 1e-12).all(), (load, slots, speed, split)
        raised += int((got > known * (1 + 1e-9)).sum())
    assert raised > 200


@pytest.mark.parametrize(
    ("heavy", "light", "slots", "speed"),
    [
        ([28.3, 15.6, 15.1, 12.8, 12.7], [1.2, 1.1, 1.0, 0.9, 0.8, 0.5], [2] * 7, [1.0] * 7),
        (
            [27.9, 24.0, 21.9, 21.7, 20.8, 16.9],
            [1.4, 1.4, 1.3, 1.0, 1.0, 0.9, 0.9, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5],
            [3, 3, 2, 3, 3, 2, 1, 4],
            [2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 2.0],
        ),
    ],
)
def test_whole_experts_say_more_of_an_equal_split(
    heavy: Any, light: Any, slots: Any, speed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rarely, and by little: where free shares would let a group hold more than it can divide evenly."""
    load = np.array([[*heavy, *light]])
    # The steps of heavy experts are an argument of their own, and say more here.
    monkeypatch.setattr(module, "_steps", lambda heavy_LE, light_LE, shape, known_L: known_L)
    args = (np.array(slots), np.array(speed), np.zeros(1))
    equal, free = (scarce_bound(load, *args, split)[0] for split in ("equal", "fractional"))
    assert equal > free * 1.001
    assert equal == pytest.approx(Argument(load[0], slots, speed).bound(0.0, "equal"))


@pytest.mark.parametrize("alike", [True, False])
def test_each_part_is_what_it_says(alike: bool) -> None:
    """For every number of heavy experts, also where another part proves more of the layer."""
    rng = np.random.default_rng(alike)
    for _ in range(120):
        load, slots, speed = layers_of_one_shape(rng, alike)
        heavy = -np.sort(-load, axis=1)
        shape = module._Shape.make(heavy.shape[1], slots, speed)
        d, G = shape.spare, len(shape.slots_K) - 1
        if not 0 <= d <= G or G == 0:
            continue
        zero = np.zeros((len(heavy), 1))
        top = np.concatenate([zero, heavy.cumsum(axis=1)], axis=1)
        light = np.concatenate([zero, heavy[:, ::-1].cumsum(axis=1)], axis=1)
        each = [Argument(w, slots, speed) for w in load]
        for k in range(1, min(heavy.shape[1], G + d) + 1):
            found = module._bound(top, light, shape, k)
            np.testing.assert_allclose(found, [one.proves(k) for one in each], rtol=1e-9, atol=1e-12)
            if k > d:
                found = module._undivided(top, light, shape, k)
                np.testing.assert_allclose(found, [one.undivided(k) for one in each], rtol=1e-9, atol=1e-12)
            if k > d > 0:
                found = module._crowd(top, light, shape, k)
                np.testing.assert_allclose(found, [one.crowd(k) for one in each], rtol=1e-9, atol=1e-12)
