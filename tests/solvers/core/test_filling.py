"""Full slots: whatever a method leaves empty is filled, in place, and where possible over no link."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.plan.verify import violations
from moeless_opt.problems.spec.placement import without_copies
from moeless_opt.solvers.core.filling import filled
from moeless_opt.solvers.core.finish import Built
from tests.strategies import few, full_slots, random_slots

FILLS = ("distinct", "copies")
fewer = settings(few, max_examples=10)


def random_problem(rng: Any, split: str, fill: str, live: str = "none") -> mo.Problem:
    """Few layers on a few GPUs of any slots and speeds, some dead, some with more slots than experts."""
    G, L = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    slots_G = rng.integers(0, 5, G)
    slots_G[0] = max(slots_G[0], 1)
    E = int(rng.integers(1, slots_G.sum() + 1))
    if fill == "distinct":
        slots_G = np.minimum(slots_G, E)
    E = min(E, int(np.minimum(slots_G, E).sum()))
    slots_G = np.minimum(slots_G, E) if fill == "distinct" else slots_G
    load_LE = rng.lognormal(0, 1.5, (L, E)) * (rng.random((L, E)) < 0.8)
    load_LE[0, 0] += 1
    speed = np.ones(G) if rng.random() < 0.5 else rng.choice([0.5, 1.0, 2.0], G)
    problem = make_problem(load_LE, mo.uniform(1, G, slots=slots_G, speed=speed), split=split, fill=fill)
    if live == "none":
        return problem
    slots = random_slots(rng, np.minimum(problem.capacity_LG, E), E)
    if live == "full":
        slots = full_slots(rng, slots, problem)
    return problem.replace(current=mo.Placement(slots_LGC=slots, experts=E))


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from(["fractional", "equal"]), st.sampled_from(FILLS))
def test_whatever_is_built_is_full(seed: int, split: str, fill: str) -> None:
    rng = np.random.default_rng(seed)
    for live in ("none", "some", "full"):
        problem = random_problem(rng, split, fill, live)
        slots = random_slots(rng, np.minimum(problem.capacity_LG, problem.experts), problem.experts)
        share = np.where(slots >= 0, rng.random(slots.shape), 0.0)
        built = filled(problem, Built(slots_LGC=slots, share_LGC=share))
        assert ((built.slots_LGC >= 0).sum(2) == problem.capacity_LG).all()
        if fill == "distinct":
            assert (without_copies(built.slots_LGC) == built.slots_LGC).all()
        old = slots >= 0
        wide = slots.shape[2]
        assert (built.slots_LGC[:, :, :wide][old] == slots[old]).all()
        if split == "fractional":
            assert built.share_LGC is not None
            assert (built.share_LGC[:, :, :wide][old] == share[old]).all()
            assert np.count_nonzero(built.share_LGC) == np.count_nonzero(share)


@fewer
@given(st.integers(0, 2**32 - 1), st.sampled_from(["fractional", "equal"]), st.sampled_from(FILLS))
def test_plans_are_full_and_what_stays_keeps_its_slot(seed: int, split: str, fill: str) -> None:
    """Of every solver that takes it, with and without a live placement."""
    rng = np.random.default_rng(seed)
    for live in ("none", "some", "full"):
        problem = random_problem(rng, split, fill, live)
        for solver in ("auto", "construct", "replan", "stay"):
            if live == "none" and solver in ("replan", "stay"):
                continue
            if live == "some" and solver == "stay" and fill == "distinct":
                continue
            plan = mo.solve(problem, solver).plan
            assert plan is not None
            assert violations(problem, plan) == []
            assert ((plan.slots_LGC >= 0).sum(2) == problem.capacity_LG).all()
            if problem.current is not None:
                old = problem.current.slots_LGC
                for x, g in np.ndindex(*old.shape[:2]):
                    for e in range(problem.experts):
                        at, now = np.flatnonzero(old[x, g] == e), np.flatnonzero(plan.slots_LGC[x, g] == e)
                        at = at[at < problem.capacity_LG[x, g]]
                        assert len({*at} & {*now}) == min(len(at), len(now))


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("fill", FILLS)
def test_staying_in_full_slots_moves_nothing(split: str, fill: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        problem = random_problem(rng, split, fill, "full")
        plan = mo.solve(problem, "stay").plan
        assert plan is not None
        assert problem.current is not None
        assert plan.moves.count == 0
        np.testing.assert_array_equal(plan.slots_LGC, problem.current.slots_LGC)


def test_staying_cannot_fill_with_other_experts() -> None:
    problem = make_problem([[3.0, 2.0, 1.0]], mo.uniform(1, 2, slots=2), fill="distinct")
    problem = problem.replace(current=mo.Placement(slots_LGC=[[[0, 1], [2, -1]]], experts=3))
    with pytest.raises(mo.InfeasibleError, match=r"^current: GPU 1 has empty slots in layer 0"):
        mo.solve(problem, "stay")
    copies = mo.solve(problem.replace(fill="copies"), "stay").plan
    assert copies is not None
    assert copies.slots_LGC.tolist() == [[[0, 1], [2, 2]]]
    assert copies.moves.count == 0


def test_engines_second_copies_are_a_live_placement() -> None:
    """Accepted as they are, whatever the plan may hold; a copy is dropped or kept at no cost."""
    load, gpus = [[5.0, 4.0, 3.0, 1.0]], mo.uniform(1, 2, slots=4)
    live = [[[0, 0, 1, 2], [3, 3, 1, 0]]]
    for split in ("fractional", "equal"):
        for fill in ("none", *FILLS):
            plan = mo.plan(load, gpus, split=split, fill=fill, current=live)
            twice = (without_copies(plan.slots_LGC) != plan.slots_LGC).any()
            assert fill == "copies" or not twice


def test_copies_take_slots_beyond_the_experts() -> None:
    """Three slots on each GPU, two experts: only copies fill them, and they are coarse weights."""
    load, gpus = [[3.0, 1.0]], mo.uniform(1, 2, slots=3)
    with pytest.raises(mo.InfeasibleError, match=r"^topology\.slots: GPU 0 has 3 slots, there are 2 experts"):
        mo.plan(load, gpus, fill="distinct")
    plan = mo.plan(load, gpus, split="equal", fill="copies")
    assert plan.replicas == 6
    assert plan.imbalance_L[0] == pytest.approx(1.0)


def test_eplb_keeps_its_second_copies() -> None:
    """As published: with fill "copies" they are in the plan, else they are merged; the times are the same."""
    load = np.random.default_rng(1).lognormal(0, 2, (8, 12))
    problem = make_problem(load, mo.uniform(1, 4, slots=5), split="equal")
    merged = mo.solve(problem, "eplb").plan
    whole = mo.solve(problem.replace(fill="copies"), "eplb").plan
    assert merged is not None
    assert whole is not None
    assert (without_copies(whole.slots_LGC) != whole.slots_LGC).any()
    np.testing.assert_allclose(merged.time_LG, whole.time_LG)
    assert whole.replicas == 8 * 20
    assert whole.share_LGE == pytest.approx(merged.share_LGE)
    assert whole.moves.count == merged.moves.count


@fewer
@given(st.integers(0, 2**32 - 1), st.sampled_from(["fractional", "equal"]), st.sampled_from(FILLS))
def test_limits_on_moves_hold_with_full_slots(seed: int, split: str, fill: str) -> None:
    """From a full placement any limit can be kept; from one that is not, filling takes its part, or all."""
    rng = np.random.default_rng(seed)
    for live in ("some", "full"):
        problem = random_problem(rng, split, fill, live)
        assert problem.current is not None
        held_LG = problem.current.held_LGE.sum(2)
        alone = (problem.capacity_LG > 0) & (held_LG == 0)  # its first expert has to come
        short = int((problem.capacity_LG - held_LG).sum() if fill == "distinct" else alone.sum())
        for most in (0, short, short + 2):
            limited = problem.replace(limits=mo.Limits(max_moves=most))
            if most < short:
                with pytest.raises(mo.InfeasibleError, match=r"^limits\.max_moves: is .; filling"):
                    mo.solve(limited)
                continue
            plan = mo.solve(limited).plan
            assert plan is not None
            assert plan.moves.count <= most
