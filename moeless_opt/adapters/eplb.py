"""A drop-in for DeepSeek's expert-parallelism load balancer (EPLB).

``from moeless_opt.adapters.eplb import rebalance_experts``: the same arguments, the same three
arrays. What is new is `current`: with it few replicas move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from moeless_opt.adapters.maps import expert_slots
from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapTask, answer
from moeless_opt.problems.arrays import floats, integers, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Split

if TYPE_CHECKING:
    import torch

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: ArrayLike | torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    current: ArrayLike | torch.Tensor | None = None,
    *,
    tolerance: float = 0.02,
    max_moves: int | None = None,
    fill: str = "copies",
) -> Any:
    """Replicas of all experts and their places, every slot full.

    Parameters
    ----------
    weight : array or tensor, shape [layers, experts]
        Load of each expert.
    num_replicas : int
        Slots of a layer over all GPUs; a multiple of `num_gpus`.
    num_groups : int
        Groups of experts; a divisor of the experts. EPLB's hierarchical policy keeps a group on one node,
        for the sake of routing that is limited to groups. **This does not**: groups are checked and not
        looked at, any node may hold any expert, which is what lets the load be level (EPLB's global policy,
        better packed).
    num_nodes : int
        Nodes; a divisor of `num_gpus`.
    num_gpus : int
        GPUs over all nodes, numbered node by node.
    current : array or tensor, shape [layers, num_replicas], optional
        Expert of every slot now, -1 where there is none. The answer then moves few replicas, what stays
        keeps its slot, and a layer in which moving gains nothing keeps its row.
    tolerance : float
        With `current`: a layer's largest GPU load may be this share above its bound where that saves moves.
    max_moves : int, optional
        With `current`: replicas that may move, over all layers.
    fill : {"copies", "distinct"}
        Whether a slot that nothing better is known for may hold a second copy of an expert of its GPU.

    Returns
    -------
    phy2log : int64, shape [layers, num_replicas]
        Expert of each slot.
    log2phy : int64, shape [layers, experts, most]
        Slots of each expert, ascending, padded with -1.
    logcnt : int64, shape [layers, experts]
        Replicas of each expert.

        Tensors on the processor if `weight` is a tensor, else arrays.

    Raises
    ------
    ProblemError
        If an argument is malformed, or sizes do not divide as they must.
    InfeasibleError
        If there are fewer slots than experts.

    References
    ----------
    DeepSeek-AI, "Expert Parallelism Load Balancer", https://github.com/deepseek-ai/EPLB.

    Examples
    --------
    >>> phy2log, log2phy, logcnt = rebalance_experts([[90, 10, 10, 10]], 6, 1, 1, 2)
    >>> phy2log.shape, log2phy.shape, logcnt.tolist()
    ((1, 6), (1, 4, 2), [[2, 2, 1, 1]])
    """
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups}
    task = _task(weight, sizes | {"num_nodes": num_nodes, "num_gpus": num_gpus}, current)
    options = PolicyOptions(tolerance=tolerance, max_moves=max_moves, fill=fill, min_gain=0.0)
    map_LS = answer(task, options, Split.EQUAL).map_LS
    slot_LEX, count_LE = expert_slots(map_LS, task.experts)
    found = (map_LS.copy(), slot_LEX, count_LE)
    if not type(weight).__module__.startswith("torch"):
        return found
    import torch

    return tuple(torch.from_numpy(one) for one in found)


def _task(weight: Any, sizes: dict[str, int], current: Any) -> MapTask:
    """What is asked, checked."""
    slots, groups, nodes, gpus = (whole(name, value, low=1) for name, value in sizes.items())
    load_LE = floats("weight", weight)
    if load_LE.ndim != 2 or 0 in load_LE.shape:
        raise ProblemError("weight", f"has shape {load_LE.shape}, must be [layers, experts]")
    layers, experts = load_LE.shape
    for name, much, by_name, by in (
        ("num_replicas", slots, "num_gpus", gpus),
        ("num_gpus", gpus, "num_nodes", nodes),
        ("experts", experts, "num_groups", groups),
    ):
        if much % by:
            raise ProblemError(name, f"is {much}, must be a multiple of {by_name} = {by}")
    live_LS = None if current is None else integers("current", current, low=-1, high=experts - 1)
    if live_LS is not None and live_LS.shape != (layers, slots):
        raise ProblemError("current", f"has shape {live_LS.shape}, must be [{layers}, {slots}]")
    return MapTask(load_LE=load_LE, slots=slots, gpus=gpus, nodes=nodes, live_LS=live_LS)
