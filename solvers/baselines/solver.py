"""The published balancers, as published, as solvers of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from moeless_opt.problems.arrays import number, whole
from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.problems.spec import Fill, Problem, contiguous
from moeless_opt.solvers.baselines import eplb, moeless
from moeless_opt.solvers.core import Built, Heuristic, NoOptions, Task

__all__ = ["Eplb", "EplbHierarchical", "EplbOptions", "MoEless", "MoelessOptions", "Static"]


class _Published(Heuristic):
    """A method as its authors published it: it knows nothing of a plan to start from."""

    refuses_initial = "it stays as published"


class Static(_Published):
    """Static expert parallelism: contiguous blocks, one replica of each expert."""

    name = "static"
    summary = "contiguous blocks, one replica each (Megatron-LM's expert parallelism)"

    def build(self, task: Task[NoOptions]) -> Built:
        """Place every expert once, in order."""
        return Built(slots_LGC=contiguous(task.problem.experts, task.problem.capacity_LG))


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbOptions:
    """Options of EPLB.

    Parameters
    ----------
    groups : int, optional
        Expert groups of the hierarchical policy: the model's, else the number of nodes.
    """

    groups: int | None = None

    def __post_init__(self) -> None:
        if self.groups is not None:
            object.__setattr__(self, "groups", whole("groups", self.groups, low=1))


class Eplb(_Published):
    """DeepSeek's EPLB, global policy; duplicates on a GPU are merged, unless `fill` lets copies be."""

    name = "eplb"
    summary = "DeepSeek's EPLB, global policy"
    policy: ClassVar[Literal["global", "hierarchical"]] = "global"
    Options = EplbOptions

    def unused(self, problem: Problem) -> Mapping[str, str]:
        """The global policy looks at no groups."""
        if self.policy == "hierarchical":
            return {}
        return {"groups": "whose policy is global: groups count for 'eplb-hierarchical'"}

    def build(self, task: Task[EplbOptions]) -> Built:
        """Replicate greedily, pack greedily."""
        problem, groups = task.problem, task.options.groups
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
        # The method numbers GPUs node by node.
        back_G = np.argsort(np.argsort(topology.node_G, kind="stable"))
        if problem.fill == Fill.COPIES:
            return Built(slots_LGC=found.slots_LGC[:, back_G])
        slots_LGC, share_LGC, wasted_L = found.merged()
        slots_LGC, share_LGC = slots_LGC[:, back_G], share_LGC[:, back_G]
        wasted = int(wasted_L.sum())
        message = f"{wasted} slots wasted on second copies" if wasted else ""
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, message=message)


class EplbHierarchical(Eplb):
    """DeepSeek's EPLB, hierarchical policy: expert groups first go to nodes."""

    name = "eplb-hierarchical"
    summary = "DeepSeek's EPLB, hierarchical policy (expert groups to nodes, then GPUs)"
    policy: ClassVar[Literal["global", "hierarchical"]] = "hierarchical"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoelessOptions:
    """Options of MoEless.

    Parameters
    ----------
    within : float, optional
        Use a warm replica only where its GPU's load stays within this share beyond the mean; by default
        whatever its load.
    """

    within: float | None = None

    def __post_init__(self) -> None:
        if self.within is not None:
            object.__setattr__(self, "within", number("within", self.within))


class MoEless(_Published):
    """MoEless as published: the greedy scaler to a CV threshold, then the placer with function locality."""

    name = "moeless"
    summary = "the MoEless paper's scaler (CV threshold) and placer (warm first, then least loaded)"
    Options = MoelessOptions

    def build(self, task: Task[MoelessOptions]) -> Built:
        """Scale, then place; token shares are even."""
        problem = task.problem
        capacity_LG, sizing = problem.capacity_LG, problem.sizing
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
            within=task.options.within,
        )
        return Built(slots_LGC=placed.slots_LGC)
