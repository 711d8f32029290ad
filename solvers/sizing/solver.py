"""Sizing policies and time models beyond tokens, as solvers of the registry.

`Sized` takes the policies ``makespan`` (the fewest replicas for a wanted imbalance) and ``memory`` (all
layers share the GPUs' bytes, replicas go where they buy most). `ActivationAware` plans for a time model in
which a used replica costs something whatever its tokens, as in decode.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.bounds import LinearTime
from moeless_opt.problems.plan.evaluate import gpu_times, new_replicas
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.result import ProgressCallback, Result
from moeless_opt.problems.plan.time_bounds import TimeTable
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.finish import Clock, Feature, finish
from moeless_opt.solvers.core.stopping import NeverStop, Stop
from moeless_opt.solvers.replan.solver import Replan, live_slots
from moeless_opt.solvers.shares.best import best_shares
from moeless_opt.solvers.sizing.budget import plan_budget
from moeless_opt.solvers.sizing.minimal import fewest_for_time
from moeless_opt.solvers.timed.activation import shares_of_one, worthwhile_replicas
from moeless_opt.solvers.timed.search import kicks_for, timed_plan

__all__ = ["ActivationAware", "Sized"]

_SPLITS = frozenset({Feature.EQUAL_SPLIT, Feature.FRACTIONAL, Feature.HETEROGENEOUS})


class Sized:
    """The policies ``makespan`` and ``memory``."""

    name = "sized"
    summary = "fewest replicas for a wanted imbalance, or one budget of bytes over all layers"
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = _SPLITS | {
        Feature.MIGRATION,
        Feature.MEMORY,
        Feature.SCENARIOS,
        Feature.NODE_AWARE,
        Feature.SIZING_MAKESPAN,
        Feature.SIZING_MEMORY,
    }

    def __init__(self, name: str = "sized") -> None:
        self.name = name

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Size, place, share."""
        began = Clock.begin()
        policy = problem.sizing.policy
        solve = {"makespan": _few_replicas, "memory": _shared_memory}.get(policy)
        if solve is None:
            raise ProblemError(
                "sizing.policy", f"is {policy!r}; solver {self.name!r} takes 'makespan' and 'memory'"
            )
        slots_LGC, message = solve(problem)
        share_LGC = best_shares(problem, slots_LGC)
        return finish(
            problem,
            slots_LGC,
            share_LGC,
            solver=self.name,
            began=began,
            options=options,
            seed=seed,
            message=message,
            proof=message,
        )


def _few_replicas(problem: Problem) -> tuple[SlotArray, str]:
    wanted = problem.sizing.imbalance
    speed_G = problem.topology.speed_G
    mean_L = problem.load_LE.sum(1) / speed_G.sum()
    found = fewest_for_time(
        problem.load_LE,
        problem.capacity_LG,
        speed_G,
        wanted * mean_L,
        "equal" if problem.split == "equal" else "fractional",
    )
    if not found.met_L.all():
        missed = [problem.loads.layers[i] for i in np.flatnonzero(~found.met_L)]
        raise InfeasibleError(
            f"sizing.imbalance: {wanted} was not reached in {len(missed)} layer(s), first {missed[0]}; "
            "more slots or a larger imbalance would do"
        )
    few, least = int(found.replicas_L.sum()), int(found.bound_L.sum())
    return found.slots_LGC, f"{few} replicas for an imbalance of {wanted}; no plan has fewer than {least}"


def _shared_memory(problem: Problem) -> tuple[SlotArray, str]:
    topology, bytes_L = problem.topology, problem.bytes_L
    if topology.memory_G is None or not bytes_L.any():
        raise ProblemError(
            "sizing.policy", "'memory' needs topology.memory and the size of an expert (model=...)"
        )
    if topology.slots_G is not None:
        raise ProblemError(
            "topology.slots", "cannot be given with sizing 'memory': there bytes are the only limit"
        )
    budget = int(topology.memory_G.sum()) - problem.experts * int(bytes_L.sum())
    found = plan_budget(
        problem.load_LE, topology.speed_G, budget, bytes_L=bytes_L, memory_G=topology.memory_G
    )
    mean = float(problem.load_LE.sum() / topology.speed_G.sum()) or 1.0
    return found.slots_LGC, (
        f"{found.spare_L.sum()} spare replicas, {found.spare_L.min()} to {found.spare_L.max()} a layer; "
        f"no spending of {budget} bytes has a mean imbalance below {found.bound / mean:.5f}"
    )


class ActivationAware:
    """Plans for time models with a cost per used replica: more replicas can be slower."""

    name = "activation"
    summary = "for time models with activation cost or a measured curve: which replicas to have, and to use"
    options: ClassVar[frozenset[str]] = frozenset({"kicks"})
    features: ClassVar[frozenset[Feature]] = _SPLITS | {
        Feature.MIGRATION,
        Feature.MEMORY,
        Feature.SCENARIOS,
        Feature.NODE_AWARE,
        Feature.TIME_MODEL,
    }

    def __init__(self, name: str = "activation") -> None:
        self.name = name

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Per layer the fastest, by the problem's own time model, of lean and balanced placements."""
        began = Clock.begin()
        tokens = problem.replace(time=_TOKENS, known=None)
        fresh = Replan() if problem.current is not None else Construct()
        base = fresh.solve(tokens, stop=NeverStop(), seed=seed).plan
        assert base is not None
        if problem.split == "fractional":
            candidates = self._by_time(problem, base, options.get("kicks", 4 * kicks_for(problem.experts)))
        else:
            placements = [base.slots_LGC]
            if problem.current is None:
                lean, _ = worthwhile_replicas(
                    problem.load_LE, problem.capacity_LG, problem.topology.speed_G, linear_time(problem)
                )
                placements.append(lean)
            elif not problem.current.partial:
                placements.append(live_slots(problem))
            candidates = [(slots_LGC, equal_shares(slots_LGC, problem.experts)) for slots_LGC in placements]
        slots_LGC, share_LGC = _best(problem, candidates)
        return finish(
            problem, slots_LGC, share_LGC, solver=self.name, began=began, options=options, seed=seed
        )

    @staticmethod
    def _by_time(problem: Problem, base: Plan, kicks: int) -> list[tuple[SlotArray, FloatArray]]:
        """From the balanced placement and from what is live; there a move has to pay or to be needed."""
        load_LE, capacity_LG, speed_G = problem.load_LE, problem.capacity_LG, problem.topology.speed_G
        table = TimeTable.of(problem.time, min(int(capacity_LG.max()), problem.experts))
        free_G = np.zeros(len(speed_G))
        fresh = timed_plan(load_LE, base.slots_LGC, capacity_LG, speed_G, table, load_G=free_G, kicks=kicks)
        if problem.current is None or problem.current.partial:
            alone_LGC = shares_of_one(load_LE, fresh.slots_LGC, speed_G)
            return [
                (base.slots_LGC, base.share_LGC),
                (fresh.slots_LGC, fresh.share_LGC),
                (fresh.slots_LGC, alone_LGC),
            ]
        live_LGC = live_slots(problem)
        objective, links = problem.objective, problem.topology.links
        if objective.horizon is not None and problem.time.unit == "s":
            slowest = links.inter_node if problem.topology.nodes > 1 else links.intra_node
            price_L = (links.latency + problem.bytes_L / slowest) / objective.horizon
            paid = timed_plan(
                load_LE, live_LGC, capacity_LG, speed_G, table, load_G=free_G, price_L=price_L, kicks=kicks
            )
            return [(paid.slots_LGC, paid.share_LGC)]
        near = timed_plan(load_LE, live_LGC, capacity_LG, speed_G, table, load_G=free_G, kicks=kicks)
        found = [(plan.slots_LGC, plan.share_LGC) for plan in (base, fresh, near)]
        found.append((live_LGC, shares_of_one(load_LE, live_LGC, speed_G)))
        best_L = np.minimum(fresh.value_L, near.value_L)
        for part in (0.1, 1.0):
            price_L = part * objective.balance_tolerance * best_L
            priced = timed_plan(
                load_LE, live_LGC, capacity_LG, speed_G, table, load_G=free_G, price_L=price_L, kicks=kicks
            )
            found.append((priced.slots_LGC, priced.share_LGC))
        return found


_TOKENS = Problem.__dataclass_fields__["time"].default


def linear_time(problem: Problem) -> LinearTime:
    """The problem's time model, or the linear one nearest to its curve where the loads are."""
    time = problem.time
    if not time.has_curve:
        return LinearTime(
            launch=time.launch, activation=time.activation_cost, token=max(time.token_cost, 1e-12)
        )
    assert time.curve_tokens is not None
    assert time.curve_activated is not None
    assert time.curve_time is not None
    tokens, used = np.meshgrid(time.curve_tokens, time.curve_activated, indexing="ij")
    reach = 2 * float(problem.load_LE.sum(1).max()) / problem.topology.gpus
    near = (tokens <= max(reach, float(time.curve_tokens[1]))).ravel()
    table = np.stack([np.ones(near.sum()), used.ravel()[near], tokens.ravel()[near]], axis=1)
    (launch, activation, token), *_ = np.linalg.lstsq(table, time.curve_time.ravel()[near], rcond=None)
    return LinearTime(launch=max(launch, 0.0), activation=max(activation, 0.0), token=max(token, 1e-12))


def _best(problem: Problem, candidates: list[tuple[SlotArray, FloatArray]]) -> tuple[SlotArray, FloatArray]:
    """Per layer the fastest candidate; where something is live, of those within the tolerance the nearest."""
    wide = max(slots.shape[2] for slots, _ in candidates)
    shape = (*candidates[0][0].shape[:2], wide)
    speed_G, current = problem.topology.speed_G, problem.current
    time_XL = np.array(
        [gpu_times(problem.load_LE, *candidate, speed_G, problem.time).max(1) for candidate in candidates]
    )
    rank_XL = time_XL
    if current is not None and "moves" in problem.objective.priorities:
        moves_XL = np.array(
            [new_replicas(slots, current.slots_LGC, problem.experts).sum((1, 2)) for slots, _ in candidates]
        )
        least_L = time_XL.min(0)
        near_XL = time_XL <= least_L * (1 + problem.objective.balance_tolerance) + 1e-300
        # Moves are whole numbers; the time decides between equals.
        rank_XL = np.where(near_XL, moves_XL + 0.5 * time_XL / np.maximum(time_XL.max(0), 1e-300), np.inf)
    best_LGC, best_share = np.full(shape, -1, dtype=np.int32), np.zeros(shape)
    for layer, x in enumerate(rank_XL.argmin(0)):
        slots_LGC, share_LGC = candidates[x]
        best_LGC[layer, :, : slots_LGC.shape[2]] = slots_LGC[layer]
        best_share[layer, :, : slots_LGC.shape[2]] = share_LGC[layer]
    return best_LGC, best_share
