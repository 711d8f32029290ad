"""Write a placement as the file that an engine takes; what it would refuse or misread is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.adapters import map_of_slots
from moeless_opt.adapters.files import ascend, eplb, sglang, tensorrt_llm, vllm
from moeless_opt.adapters.files.layers import model_numbers
from moeless_opt.problems.arrays import IntArray, SlotArray, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.files import atomic_write, format_of
from moeless_opt.problems.plan import Plan
from moeless_opt.problems.spec import ModelSpec, Placement, Problem

__all__ = ["ENGINES", "NUMBERED", "check_name", "export"]

ENGINES: dict[str, tuple[str, ...]] = {
    "vllm": (".json",),
    "sglang": (".json",),
    "tensorrt-llm": (".yaml", ".yml"),
    "ascend": (".json",),
    "eplb": (".npz", ".pt", ".json"),
}
"""Engines by name, and what their files may be called."""
NUMBERED = ("sglang", "tensorrt-llm")
"""Those whose files go by the model's own numbers of its layers, dense ones counted."""


def export(
    plan: Plan | Placement | ArrayLike,
    engine: str,
    path: str | PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    model: ModelSpec | None = None,
    model_layers: int | str | Sequence[int] | None = None,
    updates: int = 0,
) -> None:
    """Write a placement as an engine's own file.

    ==============  =========================================================================
    engine          what the file is for
    ==============  =========================================================================
    vllm            our plug-in, or the proposed ``eplb_config.initial_expert_map_path``
    sglang          ``--init-expert-location``
    tensorrt-llm    ``moe_config: {load_balancer: FILE}``
    ascend          vllm-ascend's ``eplb_config.expert_map_path``
    eplb            ``phy2log``, ``log2phy``, ``logcnt`` (.npz, .pt or JSON)
    ==============  =========================================================================

    Parameters
    ----------
    plan : Plan, Placement or array [L, G, C]
        What to write; every slot must be filled (plan with ``fill="copies"``, for ascend ``"distinct"``).
    engine : str
        Whose.
    path : path
        The file.
    layers : sequence of int, optional
        The layers' own numbers where `plan` has none (it is no `Plan`); 0, 1, ... by default.
    model : ModelSpec, optional
        Says which layers are dense, for SGLang and TensorRT-LLM; by default that of the plan's problem.
    model_layers : int, str or sequence of int, optional
        Or: decoder layers of the model in all (``61``), or the number of each planned layer (``"3-60"``).
    updates : int
        TensorRT-LLM's ``layer_updates_per_iter``: above 0 its own planner goes on from there.

    Raises
    ------
    ProblemError
        If the engine cannot take the placement: naming layer, slot, and what would mend it.
    FormatError
        If the file's name is not such as the engine reads, or it cannot be written.
    """
    suffix = check_name(engine, path)
    placement, own, made_for = _given(plan, layers)
    map_LS = _checked(placement, own, engine)
    gpus, experts = placement.slots_LGC.shape[1], placement.experts
    if updates and engine != "tensorrt-llm":
        raise ProblemError("updates", f"are TensorRT-LLM's, {engine} has none")
    updates = whole("updates", updates)
    if engine in NUMBERED:
        numbers, total = model_numbers(own, model=model or made_for, told=model_layers)
        if engine == "sglang":
            data = sglang.render(map_LS, experts, numbers, total)
        else:
            data = tensorrt_llm.render(map_LS, numbers, updates)
    elif engine == "ascend":
        data = ascend.render(map_LS, gpus)
    elif engine == "vllm":
        data = vllm.render(map_LS)
    else:
        data = eplb.render(map_LS, experts, suffix)
    atomic_write(path, data)


def check_name(engine: str, path: str | PathLike[str]) -> str:
    """The format of an engine's file by its name.

    Raises
    ------
    ProblemError, FormatError
        If there is no such engine, or it reads no such file.
    """
    if engine not in ENGINES:
        raise ProblemError("engine", f"is {engine!r}, must be one of {', '.join(ENGINES)}")
    return format_of(path, ENGINES[engine], default=ENGINES[engine][0])


def _given(plan: Any, layers: Sequence[int] | None) -> tuple[Placement, tuple[int, ...], ModelSpec | None]:
    """The placement, its layers' numbers, and the model where the plan knows it."""
    if isinstance(plan, Plan):
        if layers is not None and tuple(layers) != plan.layers:
            raise ProblemError("layers", "are in the plan; leave them out")
        model = plan.made_for.model if isinstance(plan.made_for, Problem) else None
        return plan.placement, plan.layers, model
    if not isinstance(plan, Placement):
        slots: Any = getattr(plan, "slots_LGC", plan)
        most = int(np.max(slots, initial=0)) + 1
        plan = Placement.of(slots, most, "plan")
    rows = len(plan.slots_LGC)
    own = tuple(range(rows)) if layers is None else tuple(int(layer) for layer in layers)
    if len(own) != rows:
        raise ProblemError("layers", f"are {len(own)}, the placement has {rows}")
    return plan, own, None


def _checked(placement: Placement, layers: Sequence[int], engine: str) -> IntArray:
    """The map of a placement that the engine can take."""
    slots_LGC = placement.slots_LGC
    fill = "distinct" if engine == "ascend" else "copies"
    if placement.partial:
        layer, expert = (int(i) for i in np.argwhere(placement.replicas_LE == 0)[0])
        raise ProblemError(
            f"layer {layers[layer]}", f"no slot holds expert {expert}; {engine} needs every one"
        )
    used_LG, wide = placement.used_LG, slots_LGC.shape[2]
    if (used_LG < wide).any():
        layer, gpu = (int(i) for i in np.argwhere(used_LG < wide)[0])
        if (used_LG == used_LG[:1]).all():
            what = "holds nothing" if used_LG[0, gpu] == 0 else f"has {used_LG[0, gpu]} slots"
            raise ProblemError(
                f"GPU {gpu}",
                f"{what}, another has {wide}; {engine} needs as many on each: give every GPU the same --slots"
                f" and fill them (--fill {fill})",
            )
        place = int(np.flatnonzero(slots_LGC[layer, gpu] < 0)[0])
        raise ProblemError(
            f"layer {layers[layer]}, slot {gpu * wide + place} (GPU {gpu})",
            f"is empty; {engine} needs every slot filled: plan with fill={fill!r} (--fill {fill})",
        )
    if engine == "ascend":
        _refuse_copies(slots_LGC, layers)
    return map_of_slots(slots_LGC)


def _refuse_copies(slots_LGC: SlotArray, layers: Sequence[int]) -> None:
    ordered = np.sort(slots_LGC, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if twice.size:
        layer, gpu, at = (int(i) for i in twice[0])
        expert = int(ordered[layer, gpu, at])
        slot = int(np.flatnonzero(slots_LGC[layer, gpu] == expert)[1])
        raise ProblemError(
            f"layer {layers[layer]}, slot {gpu * slots_LGC.shape[2] + slot} (GPU {gpu})",
            f"holds a second copy of expert {expert}, for which vllm-ascend drops the layer's "
            "whole plan: plan with fill='distinct' (--fill distinct)",
        )
