"""Bounds on moves and their proofs against enumeration, for every kind of layer that they claim."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.replan.counts import fewest_counts
from moeless_opt.solvers.replan.min_moves import min_moves, min_moves_bound


class Layer(NamedTuple):
    """One small layer: tokens, live contents, slots and speeds."""

    load_E: np.ndarray
    live: list[list[int]]
    capacity_G: list[int]
    speed_G: np.ndarray

    @property
    def slots_GC(self) -> np.ndarray:
        wide = max(1, *(len(row) for row in self.live))
        return np.array([row + [-1] * (wide - len(row)) for row in self.live])


def least_moves(layer: Layer, time: float) -> int | None:
    """Fewest moves over all placements that meet a time (by Hall's condition on every set of GPUs)."""
    load_E, live, capacity_G, speed_G = layer
    experts, gpus = len(load_E), len(live)
    everyone = (1 << experts) - 1
    weigh = [sum(load_E[e] for e in range(experts) if mask >> e & 1) for mask in range(everyone + 1)]
    now = [sum(1 << e for e in row) for row in live]
    rows = [[m for m in range(everyone + 1) if m.bit_count() <= slots] for slots in capacity_G]
    sets = [
        (tuple(g for g in range(gpus) if not inside >> g & 1), time * (1 + 1e-9) * room)
        for inside in range(1 << gpus)
        for room in [sum(float(speed_G[g]) for g in range(gpus) if inside >> g & 1)]
    ]
    best: int | None = None
    for content in itertools.product(*rows):
        moves = sum((row & ~old).bit_count() for row, old in zip(content, now, strict=True))
        if best is not None and moves >= best:
            continue
        for outside, room in sets:
            reached = 0
            for gpu in outside:
                reached |= content[gpu]
            # Nothing of no load may stay without a replica either.
            if weigh[everyone & ~reached] > room or (not room and reached != everyone):
                break
        else:
            best = moves
    return best


KINDS = (
    "even",
    "uneven slots",
    "speeds",
    "no spare",
    "one spare",
    "zero loads",
    "lost GPU",
    "whole",
    "free slots",
)


def drawn(kind: str, seed: int) -> tuple[Layer, list[float]]:
    """A layer of a kind and times that are of interest for it."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    gpus = int(rng.integers(2, 4))
    experts = int(rng.integers(3, 6)) if gpus == 3 else int(rng.integers(2, 7))
    capacity = [-(-(experts + gpus) // gpus)] * gpus
    speed = np.ones(gpus)
    if kind in ("uneven slots", "lost GPU"):
        capacity = rng.integers(1, 4, gpus).tolist()
    if kind == "speeds":
        speed = rng.choice([0.5, 1.0, 2.0], gpus)
    if kind in ("no spare", "one spare"):
        capacity = [(experts + (kind == "one spare")) // gpus] * gpus
    capacity = [min(slots, experts) for slots in capacity]
    while sum(capacity) < experts + (kind == "one spare"):
        gpu = int(np.argmin(capacity))
        capacity[gpu] += 1
    load = rng.lognormal(0, 1, experts)
    if kind == "zero loads":
        load[rng.random(experts) < 0.5] = 0.0
        load[0] = 1.0
    if kind == "whole":
        load = rng.integers(0, 6, experts).astype(float) + (np.arange(experts) == 0)
    live: list[list[int]] = [[] for _ in range(gpus)]
    for expert in rng.permutation(experts).tolist():  # everyone once, then more
        open_G = [g for g in range(gpus) if len(live[g]) < capacity[g]]
        live[int(rng.choice(open_G))].append(expert)
    for gpu in range(gpus):
        missing = [e for e in rng.permutation(experts).tolist() if e not in live[gpu]]
        keep = capacity[gpu] - len(live[gpu]) - int(kind == "free slots" and rng.random() < 0.5)
        live[gpu] += missing[: max(keep, 0)]
    layer = Layer(load, live, capacity, speed)
    if kind == "lost GPU" and sum(capacity) - capacity[-1] >= experts:
        # Gone with what it held, or to be emptied.
        layer = layer._replace(capacity_G=[*capacity[:-1], 0], live=[*live[:-1], live[-1] * (seed % 2)])
    mean = load.sum() / sum(s for s, c in zip(layer.speed_G, layer.capacity_G, strict=True) if c)
    return layer, [mean * by for by in (1.0, 1.01, *rng.uniform(1.05, 3.0, 2))]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_and_proofs_agree_with_enumeration(kind: str) -> None:
    met = 0
    for seed in range(5):
        layer, times = drawn(kind, seed)
        covered = len(set().union(*layer.live)) == len(layer.load_E)
        for time in times:
            least = least_moves(layer, time)
            proof = min_moves(
                layer.load_E, layer.slots_GC, layer.capacity_G, layer.speed_G, time, stop=MaxTime(30)
            )
            if least is None:
                assert (proof.status, proof.moves) == ("infeasible", None)
                continue
            met += 1
            assert (proof.status, proof.moves, proof.bound) == ("optimal", least, least)
            unit = float(layer.load_E.sum() / layer.speed_G.sum())
            for classes in (1, 3):
                counts = fewest_counts(
                    (layer.load_E / unit).tolist(),
                    layer.live,
                    layer.capacity_G,
                    (layer.speed_G * (time / unit)).tolist(),
                    least=0,
                    below=None,
                    classes=classes,
                    stop=MaxTime(30),
                )
                assert counts.bound <= least
                assert counts.sent_E is not None
                assert counts.sent_E.sum() == counts.entered_G.sum() == counts.bound
            if covered:
                args = ([layer.load_E], [layer.slots_GC], layer.speed_G, [time])
                assert min_moves_bound(*args)[0] <= min_moves_bound(*args, close=True)[0] <= least
    assert met >= 4
