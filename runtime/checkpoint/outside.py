"""megatron-core's groups in a process that comes back to a world which runs without it."""

from __future__ import annotations

import torch.distributed as dist

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.checkpoint.parts import parallel_state

__all__ = ["stand_outside"]


def stand_outside(rank: int, size: int, expert_parallel_size: int | None = None) -> None:
    """Make the groups as this rank had them, without connecting to anybody.

    A world of `torch.distributed` lets nobody in again. But megatron-core only asks its groups who is in them
    when a model is built; what talks from then on are the groups of the attached model, which this rank
    enters by ``attach(model, join=rank, store=store)`` and a `Guard`.

    Parameters
    ----------
    rank, size : int
        Of this process in the world, as before.
    expert_parallel_size : int, optional
        Ranks of one expert-parallel group; all ranks by default.
    """
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    # Importing registers the backend, whose operations do nothing.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ProblemError("rank", "stands in a world already: call this before init_process_group")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel_size or size, create_gloo_process_groups=False
    )
