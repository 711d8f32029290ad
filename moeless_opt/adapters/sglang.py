"""SGLang's expert-parallel load balancer, planned by ours: an opt-in plug-in (SGLang 0.5.23).

Nothing happens unless the environment variable ``MOELESS_SGLANG`` says so (see `options`). Then ours stands
in the place of ``sglang.srt.eplb.eplb_algorithms.rebalance_experts``, whichever ``--eplb-algorithm`` is
chosen: few replicas move from the map that is live, which SGLang does not hand to its planners and which is
read from its metadata.

Every rank plans for itself; the answer depends on the arguments and the live map alone. Whatever goes wrong
in planning is logged, and the live map stays.
"""

from __future__ import annotations

import importlib
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from moeless_opt.adapters.journal import Journal
from moeless_opt.adapters.maps import expert_slots
from moeless_opt.adapters.options import PolicyOptions, options_from
from moeless_opt.adapters.planner import PlannerProcess
from moeless_opt.adapters.policy import MapTask, first_map, idle_answer
from moeless_opt.problems.arrays import BoolArray, IntArray, floats
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.spec import Split

if TYPE_CHECKING:
    import torch

__all__ = ["Rebalancer", "register_sglang"]

_VARIABLE = "MOELESS_SGLANG"
_PLANNER = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
_MANAGER = "sglang.srt.eplb.eplb_manager.EPLBManager.__init__"
_SPLITS = {"equal": Split.EQUAL, "weighted": Split.FRACTIONAL, "nearest": Split.NEAREST}
_DISPATCH = {"lp": Split.FRACTIONAL, "static": Split.NEAREST}
_logger = logging.getLogger("sglang.moeless_opt")


def register_sglang() -> None:
    """Put our planner in the place of SGLang's: the entry point of ``sglang.srt.plugins``.

    Raises
    ------
    SystemExit
        Naming the environment variable or file, and the option that is unknown or wrong; SGLang would go on
        without a plug-in that raised anything else.
    """
    try:
        options = options_from(_VARIABLE)
        if options is None:
            return
        planner = Rebalancer(options)
    except MoelessError as error:
        raise SystemExit(f"moeless-opt: {error}") from None
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(_PLANNER, planner.rebalance_experts, hooks.HookType.REPLACE)
    hooks.HookRegistry.register(_MANAGER, planner.begin, hooks.HookType.AFTER)
    _logger.info("moeless-opt plans the placement of experts: %s", options)


class Rebalancer:
    """What stands behind ``rebalance_experts`` in one worker.

    Parameters
    ----------
    options : PolicyOptions
        What the owner wants.

    Raises
    ------
    ProblemError
        If an option is none for SGLang, or a folder that it names cannot be used.
    """

    def __init__(self, options: PolicyOptions) -> None:
        for name, instead in (
            ("entries", "SGLang's dispatch has no table of entries"),
            ("plan", "SGLang takes one by --init-expert-location"),
        ):
            if getattr(options, name) is not None:
                raise ProblemError(_VARIABLE, f"option {name} is for vLLM: {instead}")
        self.options = options
        self.journal = Journal(options, _logger)
        self.planner = PlannerProcess(options, _logger.warning)

    def begin(self, *_: Any, **__: Any) -> None:
        """Start the planner's process, once SGLang has a balancer of its own."""
        self.planner.begin()

    def rebalance_experts(
        self,
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps as SGLang has them: slots to experts, experts to slots padded with -1, and their number.

        Groups are not looked at: any GPU may hold any expert.
        """
        import torch

        began, main = perf_counter(), _rank() == 0
        layers, experts = tokens_per_expert.shape[1:]
        width, slots = num_local_physical_experts, num_physical_experts
        alive_S = np.repeat(_alive(slots // width, algorithm), width)
        live_LS, figures = _live((layers, slots)), {"reason": "an error, see the log"}
        map_LS = first_map(layers, experts, slots) if live_LS is None else live_LS
        map_LS = _over(alive_S, map_LS[:, alive_S])
        try:
            load_LE = floats("tokens_per_expert", tokens_per_expert).sum(axis=0)
            self.journal.record(main, load_LE)
            if live_LS is not None:
                live_LS = live_LS[:, alive_S]
            gpus = int(alive_S.sum()) // width
            nodes = num_nodes if alive_S.all() else 1
            task = MapTask(load_LE=load_LE, slots=gpus * width, gpus=gpus, nodes=nodes, live_LS=live_LS)
            found = idle_answer(task) or self.planner.plan(task, self._split())
            map_LS, figures = _over(alive_S, found.map_LS), found.figures
        except Exception:  # whatever it is, the engine goes on
            _logger.exception("moeless-opt cannot plan; the live map stays")
        slot_LEX, count_LE = expert_slots(np.where(alive_S, map_LS, -1), experts)
        if not count_LE.all():  # a live map that has lost an expert with a rank
            map_LS = _over(alive_S, first_map(layers, experts, int(alive_S.sum())))
            slot_LEX, count_LE = expert_slots(np.where(alive_S, map_LS, -1), experts)
        self.journal.note(main, 1e3 * (perf_counter() - began), figures)
        return torch.from_numpy(map_LS), torch.from_numpy(slot_LEX), torch.from_numpy(count_LE)

    def _split(self) -> Split:
        """What SGLang's dispatch does with an expert's tokens."""
        if self.options.split != "auto":
            return _SPLITS[self.options.split]
        try:
            moe = importlib.import_module("sglang.srt.runtime_context").get_exec().moe
            return _DISPATCH.get(moe.ep_dispatch_algorithm, Split.EQUAL)
        except (ImportError, AttributeError):
            return Split.EQUAL


def _over(alive_S: BoolArray, map_LA: IntArray) -> IntArray:
    """A map of the slots that are alive as one of all; expert 0 in the others, as SGLang's planners do."""
    map_LS = np.zeros((len(map_LA), len(alive_S)), dtype=np.int64)
    map_LS[:, alive_S] = map_LA
    return map_LS


def _alive(gpus: int, algorithm: Any) -> BoolArray:
    """Ranks that are there: all but for an algorithm that knows of lost ones, shape [G]."""
    alive_G = np.ones(gpus, dtype=np.bool_)
    if getattr(algorithm, "name", "").startswith("elasticity_aware"):
        state = importlib.import_module("sglang.srt.elastic_ep.elastic_ep").ElasticEPStateManager.instance()
        if state is not None:
            alive_G &= state.active_ranks.cpu().numpy().astype(np.bool_)
    return alive_G


def _live(shape: tuple[int, int]) -> IntArray | None:
    """The live map, if there is one of this shape: at the start there is none."""
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    found = location.get_global_expert_location_metadata()
    if found is None or tuple(found.physical_to_logical_map_cpu.shape) != shape:
        return None
    live_LS: IntArray = found.physical_to_logical_map_cpu.numpy().astype(np.int64)
    return live_LS


def _rank() -> int:
    import torch

    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return int(torch.distributed.get_rank()) if ready else 0
