"""The published balancers and the two ends of every comparison, as solvers of the registry."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.problems.plan.plan import Plan, Status
from moeless_opt.problems.plan.result import ProgressCallback, Result
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.baselines import eplb, moeless, static
from moeless_opt.solvers.core.finish import Clock, Feature, finish
from moeless_opt.solvers.core.stopping import Stop

__all__ = ["Eplb", "EplbHierarchical", "MoEless", "Oracle", "Static"]

_BOTH_SPLITS = frozenset({Feature.EQUAL_SPLIT, Feature.FRACTIONAL})
# They ignore the live placement and all but the expected loads; their plans are valid and pay for it.
_ANY_TRAFFIC = frozenset(
    {Feature.MIGRATION, Feature.MEMORY, Feature.SCENARIOS, Feature.NODE_AWARE, Feature.TIME_MODEL}
)


class Static:
    """Static expert parallelism: contiguous blocks, one replica of each expert."""

    name = "static"
    summary = "contiguous blocks, one replica each (Megatron-LM's expert parallelism)"
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = _BOTH_SPLITS | _ANY_TRAFFIC | {Feature.HETEROGENEOUS}

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
        """Place every expert once, in order."""
        began = Clock.begin()
        slots_LGC = static.contiguous(problem.experts, problem.capacity_LG)
        return finish(problem, slots_LGC, solver=self.name, began=began, options=options, seed=seed)


class Eplb:
    """DeepSeek's EPLB, global policy; duplicates on a GPU merged, their double share kept."""

    name = "eplb"
    summary = "DeepSeek's EPLB, global policy"
    policy: Literal["global", "hierarchical"] = "global"
    options: ClassVar[frozenset[str]] = frozenset({"groups"})
    features: ClassVar[frozenset[Feature]] = _BOTH_SPLITS | _ANY_TRAFFIC

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        groups: int | None = None,
        **options: Any,
    ) -> Result:
        """Replicate greedily, pack greedily.

        Parameters
        ----------
        groups : int, optional
            Expert groups of the hierarchical policy: the model's, else the number of nodes.
        """
        began = Clock.begin()
        topology = problem.topology
        if groups is None:
            groups = problem.model.groups if problem.model is not None else topology.nodes
        sizes = np.bincount(topology.node_G)
        if (sizes != sizes[0]).any():
            raise UnsupportedFeatureError(f"solver {self.name!r} needs nodes with equal numbers of GPUs")
        found = eplb.rebalance(
            problem.load_LE,
            int(problem.capacity_LG[0].sum()),
            groups,
            topology.nodes,
            topology.gpus,
            policy=self.policy,
        )
        slots_LGC, share_LGC, wasted_L = found.merged()
        wasted = int(wasted_L.sum())
        message = f"{wasted} slots wasted on second copies" if wasted else ""
        return finish(
            problem,
            slots_LGC,
            share_LGC,
            solver=self.name,
            began=began,
            options={"groups": groups, **options},
            seed=seed,
            message=message,
        )


class EplbHierarchical(Eplb):
    """DeepSeek's EPLB, hierarchical policy: expert groups first go to nodes."""

    name = "eplb-hierarchical"
    summary = "DeepSeek's EPLB, hierarchical policy (expert groups to nodes, then GPUs)"
    policy: Literal["global", "hierarchical"] = "hierarchical"


class MoEless:
    """MoEless as published: the greedy scaler to a CV threshold, then the placer with function locality."""

    name = "moeless"
    summary = "the MoEless paper's scaler (CV threshold) and placer (warm first, then least loaded)"
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = (
        _BOTH_SPLITS | _ANY_TRAFFIC | {Feature.HETEROGENEOUS, Feature.SIZING_CV}
    )

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
        """Scale, then place; token shares are even."""
        began = Clock.begin()
        capacity_LG = problem.capacity_LG
        sizing = problem.sizing
        replicas_LE = moeless.scale(
            problem.load_LE,
            sizing.cv,
            capacity_LG.sum(1),
            sizing.ddof,
            max_replicas=np.count_nonzero(capacity_LG > 0, axis=1)[:, None],
        )
        placed = moeless.place(
            problem.load_LE,
            replicas_LE,
            capacity_LG,
            None if problem.current is None else problem.current.slots_LGC,
            speed_G=problem.topology.speed_G,
        )
        return finish(
            problem,
            placed.slots_LGC,
            solver=self.name,
            began=began,
            options={"cv": sizing.cv, "ddof": sizing.ddof, **options},
            seed=seed,
        )


class Oracle:
    """Perfect balance, whatever the slots: no plan, but the line that reports are measured against."""

    name = "oracle"
    summary = "perfect balance: a bound for reports, not a plan"
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = frozenset(Feature)

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
        """Say what perfect balance would be."""
        began = Clock.begin()
        time_LG = static.oracle(problem.load_LE, problem.topology.speed_G)
        return Result(
            problem=problem,
            plan=None,
            status=Status.NO_SOLUTION,
            seconds=began.seconds,
            solver=self.name,
            seed=seed,
            message=f"a bound, not a plan: {time_LG.max(1).sum():.6g} {problem.time.unit} over all layers",
        )
