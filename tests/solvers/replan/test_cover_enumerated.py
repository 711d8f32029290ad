"""Coverage after a loss against every placement: fewest moves, refused only where none obeys."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Fill, Placement
from moeless_opt.solvers.migration import schedule_migration
from tests.strategies import random_slots

MOST = 6000
"""Placements of a layer that are looked at."""


def drawn(rng: Any, fill: str, *, spread: int = 1) -> mo.Problem | None:
    """A layer with free slots, of which some GPUs are gone; None if the others lack room."""
    gpus, experts = int(rng.integers(2, 5)), int(rng.integers(2, 7 if spread == 1 else 5))
    slots_G = rng.integers(1, 4, gpus)
    gone = rng.random(gpus) < (0.3 if spread == 1 else 0.15)
    if fill != Fill.COPIES:
        slots_G = np.minimum(slots_G, experts)
    if np.minimum(slots_G, experts).sum() < experts:
        return None
    live = random_slots(rng, np.minimum(slots_G, experts)[None], experts)
    live[(rng.random(live.shape) < 0.25) | gone[None, :, None]] = -1
    slots_G[gone] = 0
    if np.minimum(slots_G, experts).sum() < experts:
        return None
    return mo.Problem(
        loads=mo.Loads(load_TLE=rng.integers(0, 9, (1, experts)).astype(float)),
        topology=mo.Topology(
            node_G=np.arange(gpus) // 2, speed_G=rng.choice([1.0, 0.5], gpus), slots_G=slots_G
        ),
        split=str(rng.choice(["equal", "fractional"])),
        fill=fill,
        expert_bytes_L=7,
        current=Placement(slots_LGC=live, experts=experts, partial=True),
        limits=mo.Limits(spread=spread),
    )


def arrivals(problem: mo.Problem) -> dict[tuple[int, ...], list[list[int]]]:
    """What may come to each GPU, and one placement each, of all that obey; of too many, none is looked at."""
    assert problem.current is not None
    experts, fill, limits = problem.experts, problem.fill, problem.limits
    live = [{e for e in row if e >= 0} for row in problem.current.slots_LGC[0].tolist()]
    rows = []
    for slots in problem.capacity_LG[0].tolist():
        sizes = (
            range(slots + 1) if fill == Fill.NONE else [slots if fill == Fill.COPIES else min(slots, experts)]
        )
        if fill == Fill.COPIES:  # a GPU's distinct experts: copies of them fill the rest
            sizes = range(min(slots, 1), min(slots, experts) + 1)
        rows.append([set(one) for size in sizes for one in itertools.combinations(range(experts), size)])
    if np.prod([len(row) for row in rows]) > MOST:
        return {}
    domain = problem.topology.failure_domain_G.tolist()
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for content in itertools.product(*rows):
        homes: list[set[int]] = [set() for _ in range(experts)]
        for gpu, held in enumerate(content):
            for expert in held:
                homes[expert].add(domain[gpu])
        if all(len(home) >= limits.spread for home in homes):
            come = tuple(len(held - old) for held, old in zip(content, live, strict=True))
            found.setdefault(come, [sorted(held) for held in content])
    return found


# Copies with domains are not among them: what a first copy costs, a flow cannot say.
@pytest.mark.parametrize(
    ("fill", "spread"),
    [(Fill.NONE, 1), (Fill.NONE, 2), (Fill.DISTINCT, 1), (Fill.DISTINCT, 2), (Fill.COPIES, 1)],
)
def test_no_placement_takes_fewer_moves(fill: str, spread: int) -> None:
    rng = np.random.default_rng([spread, len(fill)])
    seen = 0
    for _ in range(150):
        problem = drawn(rng, fill, spread=spread)
        found = {} if problem is None else arrivals(problem)
        if problem is None or not found:
            continue
        seen += 1
        fewest = min(map(sum, found))
        assert mo.solve(problem, "cover").plan.moves.bytes == 7 * fewest
        for name, size in (("max_moves", 1), ("max_layer_moves", 1), ("max_move_bytes", 7)):
            bound = problem.limits.replace(**{name: size * fewest})
            assert mo.solve(problem.replace(limits=bound), "cover").plan.moves.count == fewest
            if fewest:
                less = problem.replace(limits=problem.limits.replace(**{name: size * fewest - 1}))
                with pytest.raises(
                    InfeasibleError, match=f"{name}: is {size * fewest - 1}; {size * fewest} "
                ):
                    mo.solve(less, "cover")
    assert seen > 15


@pytest.mark.parametrize("spread", [1, 2])
def test_no_coverage_of_as_few_moves_comes_sooner(spread: int) -> None:
    rng = np.random.default_rng([7, spread])
    seen = 0
    for _ in range(150):
        problem = drawn(rng, Fill.NONE, spread=spread)
        found = {} if problem is None else arrivals(problem)
        if problem is None or not found:
            continue
        assert problem.current is not None
        soonest = float("inf")
        fewest = min(map(sum, found))
        for content in (one for come, one in found.items() if sum(come) == fewest):
            wide = max(map(len, content))
            after = np.array([[row + [-1] * (wide - len(row)) for row in content]], dtype=np.int32)
            schedule = schedule_migration(
                problem.current.slots_LGC, after, problem.experts, problem.topology, bytes_L=problem.bytes_L
            )
            soonest = min(soonest, schedule.seconds)
        seen += soonest > 0
        bound = problem.limits.replace(max_move_seconds=soonest * (1 + 1e-9))
        assert mo.solve(problem.replace(limits=bound), "cover").plan is not None
    assert seen > 10


def test_domains_and_full_slots_where_nothing_is_live() -> None:
    live = Placement(slots_LGC=np.full((1, 4, 2), -1), experts=2, partial=True)
    found = mo.plan(
        [[9.0, 1]],
        mo.uniform(2, 2, slots=2),
        fill="copies",
        current=live,
        limits=mo.Limits(spread=2),
        solver="cover",
    )
    assert (found.slots_LGC >= 0).all()
