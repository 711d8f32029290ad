"""The placement on disk, so that a restart begins from the last plan. No torch here."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.api import plan as make_plan
from moeless_opt.problems.arrays import IntArray, SlotArray, integers
from moeless_opt.problems.codec import Fields, read_record
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.files import atomic_write
from moeless_opt.problems.io import json_bytes, read_json
from moeless_opt.problems.plan import check_slots
from moeless_opt.problems.spec import Topology
from moeless_opt.runtime.serve import Planning

__all__ = ["ServeState", "read_state", "slots_for", "write_state"]

FORMAT = "moeless-serve-state"
log = logging.getLogger("moeless.serve")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServeState:
    """What a restart begins from.

    Parameters
    ----------
    model : str
        Whose placement it is.
    experts : int
        Of a layer.
    slots_LGC : array of int32, shape [L, G, C]
        The last plan.
    load_LE : array, shape [L, E]
        Loads of the last window, for a start with other ranks.
    planning : Planning
        What the controller may do.
    asked : Planning
        What it was asked to do at the start: settings that were changed since outlive a restart, but not one
        that asks for others itself.
    """

    model: str
    experts: int
    slots_LGC: SlotArray
    load_LE: IntArray
    planning: Planning
    asked: Planning


def write_state(path: str, state: ServeState) -> None:
    """Write it, all or nothing."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "model": state.model,
        "experts": state.experts,
        "slots": state.slots_LGC.tolist(),
        "load": state.load_LE.tolist(),
        "planning": asdict(state.planning),
        "asked": asdict(state.asked),
    }
    atomic_write(path, json_bytes(document))


def set_aside(path: str) -> str:
    """Give a file that is not used another name, so that nothing overwrites it; says which."""
    for number in range(1, 1000):
        place = Path(f"{path}.unused{'' if number == 1 else number}")
        if not place.exists():
            Path(path).rename(place)
            return str(place)
    raise OSError(f"{path}.unused: there are 1000 of them already")


def read_state(path: str, model: str, layers: int, experts: int) -> ServeState | None:
    """Read it; None where there is none, or none of this model (which is said in the log).

    A state that cannot be used must not keep a server from starting: it is an optimisation. Nor is it lost:
    it gets another name.
    """
    if not Path(path).exists():
        return None
    try:
        entry = Fields(read_json(path), "")
        for key, want in (("format", FORMAT), ("version", 1), ("model", model), ("experts", experts)):
            if (have := entry.take(key)) != want:
                raise ProblemError(key, f"is {have!r}, not {want!r}")
        slots_LGC = integers("slots", entry.take("slots"), low=-1, high=experts - 1).astype(np.int32)
        load_LE = integers("load", entry.take("load"))
        planning: Planning = read_record(Planning, entry.take("planning", dict, {}), "planning")
        asked: Planning = read_record(Planning, entry.take("asked", dict, {}), "asked")
        if slots_LGC.ndim != 3 or len(slots_LGC) != layers or load_LE.shape != (layers, experts):
            raise ProblemError("slots", f"have shape {slots_LGC.shape}, the model has {layers} layers")
        for slots_GC in slots_LGC:
            check_slots(slots_GC, experts, np.full(slots_GC.shape[0], experts))
    except MoelessError as error:
        try:
            log.warning("%s is not used, and kept as %s: %s", path, set_aside(path), error)
        except OSError as problem:
            log.warning("%s is not used: %s (and cannot be renamed: %s)", path, error, problem)
        return None
    return ServeState(
        model=model, experts=experts, slots_LGC=slots_LGC, load_LE=load_LE, planning=planning, asked=asked
    )


def slots_for(state: ServeState, ranks: int, slots: int | None) -> SlotArray:
    """Its placement, or one for the same loads where there are other ranks now."""
    if state.slots_LGC.shape[1] == ranks:
        return state.slots_LGC
    each = -(-state.experts // ranks) + 1 if slots is None else slots
    topology = Topology.uniform(1, ranks, slots=min(each, state.experts))
    load_LE = np.maximum(state.load_LE, 1)
    return np.asarray(make_plan(load_LE, topology).slots_LGC)
