"""vLLM's expert-parallel load balancer, planned by ours: an opt-in general plug-in (vLLM 0.33).

Nothing happens unless the environment variable ``MOELESS_VLLM`` says so (see `options`). Then our policy
stands in the place of the one that vLLM calls "default", in every process and in both of its modes,
synchronous and asynchronous; and where ``entries`` are asked for, replicas are weighted: vLLM's router
takes entry ``hash(token) % count`` of an expert's list of slots, and a slot that stands there k of N times
serves k/N of the expert's tokens.

The map is the same on every rank: it depends on the call's arguments alone, and the ranks compare digests
before they use it. Whatever goes wrong in planning is logged, and the live map stays.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from moeless_opt.adapters.files import read_map
from moeless_opt.adapters.journal import Journal
from moeless_opt.adapters.maps import slots_of_map
from moeless_opt.adapters.options import PolicyOptions, options_from
from moeless_opt.adapters.planner import PlannerProcess
from moeless_opt.adapters.policy import MapTask, first_map, idle_answer
from moeless_opt.problems.arrays import IntArray, SlotArray, integers
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Split
from moeless_opt.solvers.shares import ShareTable

if TYPE_CHECKING:
    import torch

__all__ = ["Balancer", "DispatchTables", "register_vllm"]

_VARIABLE = "MOELESS_VLLM"
_ENTRIES = 256  # where replicas are to be weighted and nobody says by how many
_MODELS = 8  # whose tables are remembered: a model and its drafters
_logger = logging.getLogger("vllm.moeless_opt")  # below vLLM's own, whose handlers show it


def register_vllm() -> None:
    """Put our policy in the place of vLLM's: the entry point of ``vllm.general_plugins``.

    Raises
    ------
    ProblemError
        Naming the environment variable or file, and the option that is unknown or wrong.
    """
    options = options_from(_VARIABLE)
    if options is None:
        return
    balancer = Balancer(options)
    policies = importlib.import_module("vllm.distributed.eplb.policy")
    if balancer.options.entries is not None:
        balancer.tables.take_over(importlib.import_module("vllm.distributed.eplb.eplb_state"))
    policies.EPLB_POLICIES["default"] = _policy_class(policies.AbstractEplbPolicy, balancer)
    _logger.info("moeless-opt plans the placement of experts: %s", balancer.options)


def _policy_class(base: Any, balancer: Balancer) -> type:
    """The policy as vLLM wants it: a class with one class method."""

    class MoelessEplbPolicy(base):  # type: ignore[misc]
        """Few moves from the live map, by moeless-opt."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            import torch

            # Groups are not looked at: any GPU may hold any expert.
            found = balancer.rebalance(weight, num_replicas, num_nodes, num_ranks, old_global_expert_indices)
            return torch.from_numpy(found)

    return MoelessEplbPolicy


class Balancer:
    """What stands behind the policy in one worker.

    Parameters
    ----------
    options : PolicyOptions
        What the owner wants.

    Raises
    ------
    ProblemError
        If an option is none for vLLM, or a file or folder that it names cannot be used.
    """

    def __init__(self, options: PolicyOptions) -> None:
        if options.split == "nearest":
            raise ProblemError(
                _VARIABLE, "option split is 'nearest', but vLLM splits evenly: must be equal or weighted"
            )
        if options.split == "weighted" and options.entries is None:
            options = options.replace(entries=_ENTRIES)
        self.options, self.tables = options, DispatchTables()
        self.split = Split.EQUAL if options.entries is None else Split.FRACTIONAL
        self.begin = None if options.plan is None else read_map(options.plan)
        self.journal = Journal(options, _logger)
        self.planner = PlannerProcess(options, _logger.warning)

    def rebalance(self, weight: Any, slots: int, nodes: int, gpus: int, live: Any = None) -> IntArray:
        """The map that vLLM is to have, [L, slots]: the same on every rank, whatever happens on one."""
        began, figures = perf_counter(), {}
        map_LS, table, main = None, None, _rank() == 0
        try:
            task = self._task(weight, slots, nodes, gpus, live)
            self.journal.record(main, task.load_LE)
            found = idle_answer(task)
            if found is None:
                found = self.planner.plan(task, self.split)
            else:
                self.planner.begin()  # the profile run: there is time to load until the first window is full
            map_LS, table, figures = found.map_LS.copy(), found.table, found.figures
        except Exception:  # whatever it is, the engine goes on
            _logger.exception("moeless-opt cannot plan; the live map stays")
            figures = {"reason": "an error, see the log"}
        if self.options.agree and not _agree(map_LS, table):
            _logger.error("moeless-opt: the ranks' maps differ; the live map stays on all of them")
            map_LS, figures = None, {"reason": "the ranks' maps differ"}
        if map_LS is None:
            map_LS, table = _fallback(weight, slots, live), None
        if table is not None:
            self.tables.add(map_LS, table)
        self.journal.note(main, 1e3 * (perf_counter() - began), figures)
        return map_LS

    def _task(self, weight: Any, slots: int, nodes: int, gpus: int, live: Any) -> MapTask:
        """What vLLM asks; while its map is still the one it begins with, with the plan to begin with."""
        task = MapTask(load_LE=weight, slots=slots, gpus=gpus, nodes=nodes, live_LS=live)
        begin, at_start = self.begin, task.live_LS is None
        if task.live_LS is not None:
            at_start = np.array_equal(task.live_LS, first_map(len(task.load_LE), task.experts, slots))
        if begin is None or not at_start or not task.load_LE.any():
            return task
        fits = begin.map_LS.shape == (len(task.load_LE), slots) and begin.gpus in (None, gpus)
        if not fits or int(begin.map_LS.max()) >= task.experts:
            have, want = begin.map_LS.shape, (len(task.load_LE), slots)
            _logger.warning(
                "moeless-opt: %s is not taken: it is for %s (layers, slots) or other GPUs or experts, not %s",
                self.options.plan,
                have,
                want,
            )
            return task
        return task.replace(wanted_LGC=slots_of_map(begin.map_LS, gpus))


def _fallback(weight: Any, slots: int, live: Any) -> IntArray:
    """The live map; where there is none of that size, the one that vLLM begins with."""
    layers, experts = weight.shape
    if live is not None and tuple(live.shape) == (layers, slots):
        found: IntArray = live.cpu().numpy().astype(np.int64)
        return found
    return first_map(layers, experts, slots)


# -- all ranks alike -------------------------------------------------------------------------------------


def _group() -> Any:
    """vLLM's group of EPLB ranks, None where there is none (one process, a test)."""
    try:
        return importlib.import_module("vllm.distributed.parallel_state").get_eplb_group()
    except (ImportError, AttributeError, AssertionError):
        return None


def _rank() -> int:
    return int(getattr(_group(), "rank_in_group", 0))


def _agree(map_LS: IntArray | None, table: ShareTable | None) -> bool:
    """Whether all ranks have the same map and table; a rank that failed has none."""
    group = _group()
    if group is None or group.world_size == 1:
        return True
    import torch

    content = b"" if map_LS is None else map_LS.tobytes()
    content += b"" if table is None else table.slot_LEN.tobytes()
    word = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    pair = torch.tensor([word, -word], dtype=torch.int64)
    torch.distributed.all_reduce(pair, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return int(pair[0]) == -int(pair[1])


# -- weighted replicas -----------------------------------------------------------------------------------


class DispatchTables:
    """In the place of vLLM's ``compute_logical_maps``: experts' slots, each as often as it weighs.

    A map that is not one of ours, as after scaling, gets vLLM's own: every slot once.
    """

    def __init__(self) -> None:
        self._tables: deque[tuple[IntArray, ShareTable]] = deque(maxlen=_MODELS)
        self._here = threading.local()
        self._theirs: Any = None

    def take_over(self, state: Any) -> None:
        """Put `logical_maps` in the place of vLLM's function in its module `state`.

        Raises
        ------
        ProblemError
            If this vLLM has no such functions.
        """
        for name in ("compute_logical_maps", "_commit_eplb_maps_for_layer"):
            if not hasattr(state, name):
                raise ProblemError(
                    _VARIABLE, f"option entries needs {name} of {state.__name__}, which this vLLM lacks"
                )
        self._theirs, commit = state.compute_logical_maps, state._commit_eplb_maps_for_layer

        def commit_layer(model_state: Any, new_physical_to_logical_map: Any, layer: int) -> Any:
            with self._at(layer):
                return commit(model_state, new_physical_to_logical_map, layer)

        state.compute_logical_maps = self.logical_maps
        state._commit_eplb_maps_for_layer = commit_layer

    def add(self, map_LS: IntArray, table: ShareTable) -> None:
        """Remember the table of a map."""
        self._tables.append((map_LS.copy(), table))

    def logical_maps(self, physical_to_logical_map: torch.Tensor, num_logical_experts: int) -> Any:
        """Slots of every expert, [L, E, entries] or [E, entries], and their number."""
        import torch

        found = self._found(integers("map", physical_to_logical_map, low=-1), num_logical_experts)
        if found is None:
            return self._theirs(physical_to_logical_map, num_logical_experts)
        slots, count = found
        wide = np.ascontiguousarray(slots[..., : int(count.max())])
        return tuple(torch.from_numpy(one).to(physical_to_logical_map.dtype) for one in (wide, count.copy()))

    @contextmanager
    def _at(self, layer: int) -> Iterator[None]:
        """Rows of maps that are asked for in this thread are those of this layer."""
        self._here.layer = layer
        try:
            yield
        finally:
            self._here.layer = None

    def _found(self, given: IntArray, experts: int) -> tuple[SlotArray, SlotArray] | None:
        """Slots and counts of a map, or of one layer of a map; the latest that was remembered."""
        layer = getattr(self._here, "layer", None)
        for map_LS, table in reversed(self._tables):
            if table.count_LE.shape[1] != experts:
                continue
            if given.ndim == 2 and np.array_equal(map_LS, given):
                return table.slot_LEN, table.count_LE
            one = given.ndim == 1 and layer is not None and layer < len(map_LS)
            if one and np.array_equal(map_LS[layer], given):
                return table.slot_LEN[layer], table.count_LE[layer]
        return None
