"""Engines' maps: the expert of every slot, GPU after GPU, the same number of slots on each.

Every engine numbers slots so that slot s lives on rank ``s // (S / G)``, and calls the array [layers, S] its
physical-to-logical map (EPLB: ``phy2log``). Our placements have an axis of GPUs instead; -1 is an empty slot
in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import IntArray, Record, SlotArray, integers, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Placement, replica_counts, span

__all__ = ["EngineMap", "expert_slots", "map_of_slots", "slots_of_map"]


def slots_of_map(map_LS: ArrayLike, gpus: int, *, where: str = "map") -> SlotArray:
    """The slots of every GPU, shape [L, G, C], of a map [L, S]."""
    found = integers(where, map_LS, low=-1, high=2**31 - 1)
    if found.ndim != 2 or 0 in found.shape:
        raise ProblemError(where, f"has shape {found.shape}, must be [layers, slots]")
    slots = found.shape[1]
    if gpus < 1 or slots % gpus:
        raise ProblemError(
            where, f"has {slots} slots per layer, which {gpus} GPUs cannot have in equal parts"
        )
    return found.reshape(len(found), gpus, slots // gpus).astype(np.int32)


def map_of_slots(slots_LGC: ArrayLike, slots: int | None = None) -> IntArray:
    """The map [L, S] of slots [L, G, C]; with `slots` of each GPU where the placement's array has fewer."""
    given = integers("slots", slots_LGC, low=-1, high=2**31 - 1)
    if given.ndim != 3 or 0 in given.shape[:2]:
        raise ProblemError("slots", f"has shape {given.shape}, must be [layers, gpus, slots]")
    layers, gpus, most = given.shape
    wide = most if slots is None else slots
    if (given[:, :, wide:] >= 0).any():
        layer, gpu, _ = (int(i) for i in np.argwhere(given[:, :, wide:] >= 0)[0])
        raise ProblemError(f"slots[{layer}][{gpu}]", f"go beyond the {wide} slots of a GPU")
    full = np.full((layers, gpus, wide), -1, dtype=np.int64)
    full[:, :, :most] = given[:, :, :wide]
    return full.reshape(layers, gpus * wide)


def expert_slots(map_LS: IntArray, experts: int) -> tuple[IntArray, IntArray]:
    """Slots of every expert, ascending, padded with -1, [L, E, most]; and how many they are [L, E]."""
    layers, slots = map_LS.shape
    count_LE = replica_counts(map_LS.astype(np.int32), experts).astype(np.int64)
    order_LS = np.argsort(map_LS, axis=1, kind="stable")
    expert_LS = np.take_along_axis(map_LS, order_LS, axis=1)
    empty_L = (map_LS < 0).sum(axis=1)
    first_LE = np.cumsum(count_LE, axis=1) - count_LE + empty_L[:, None]
    rank_LS = np.arange(slots) - np.take_along_axis(first_LE, np.maximum(expert_LS, 0), axis=1)
    slot_LEX = np.full((layers, experts, max(1, int(count_LE.max()))), -1, dtype=np.int64)
    full_LS = expert_LS >= 0
    row_LS = np.broadcast_to(np.arange(layers)[:, None], map_LS.shape)
    slot_LEX[row_LS[full_LS], expert_LS[full_LS], rank_LS[full_LS]] = order_LS[full_LS]
    return slot_LEX, count_LE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineMap(Record):
    """A map as an engine, or its file, has it.

    Parameters
    ----------
    map_LS : array of int64, shape [L, S]
        Expert in each slot, -1 for an empty one.
    engine : str
        By whose format, for people.
    gpus : int, optional
        GPUs, where the format says how many there are.
    layers : tuple of int, optional
        The model's own number of each row, where the format says it.
    all_layers : bool
        Row i is the model's layer i, dense layers included (SGLang).
    repeated : bool
        The one row is that of every layer (vLLM).
    experts : int, optional
        Experts per layer, where the format says it.

    Raises
    ------
    ProblemError
        If the map is none.
    """

    map_LS: IntArray
    engine: str = ""
    gpus: int | None = None
    layers: tuple[int, ...] | None = None
    all_layers: bool = False
    repeated: bool = False
    experts: int | None = None

    def __post_init__(self) -> None:
        map_LS = integers("map", self.map_LS, low=-1, high=2**31 - 1)
        if map_LS.ndim != 2 or 0 in map_LS.shape:
            raise ProblemError("map", f"has shape {map_LS.shape}, must be [layers, slots]")
        object.__setattr__(self, "map_LS", map_LS)
        if self.layers is not None and len(self.layers) != len(map_LS):
            raise ProblemError("layers", f"are {len(self.layers)}, the map has {len(map_LS)} rows")

    def placement(
        self,
        *,
        gpus: int | None = None,
        experts: int | None = None,
        layers: Sequence[int] | None = None,
        partial: bool = False,
    ) -> Placement:
        """The placement that the map is.

        Parameters
        ----------
        gpus : int, optional
            GPUs; needed where the map does not say it.
        experts : int, optional
            Experts per layer; without it as many as the map names.
        layers : sequence of int, optional
            The model's own numbers of the layers that are wanted, as `Loads.layers` has them; all by default.
        partial : bool
            Whether experts may be missing.

        Raises
        ------
        ProblemError
            If it does not fit: naming layer, GPU and slot.
        """
        slots_LGC, names = self.slots(gpus=gpus, layers=layers)
        most = self.experts if experts is None else whole("experts", experts, low=1)
        if most is None:  # no more than there are slots, or one of them would be nowhere
            most = min(int(slots_LGC.max(initial=0)) + 1, slots_LGC[0].size)
        unknown = np.argwhere(slots_LGC >= most)
        if unknown.size:
            row, gpu, slot = (int(i) for i in unknown[0])
            raise ProblemError(
                f"layer {names[row]}, slot {gpu * slots_LGC.shape[2] + slot} (GPU {gpu})",
                f"expert {slots_LGC[row, gpu, slot]} is unknown; a layer has the experts 0 to {most - 1}",
            )
        missing = np.argwhere(replica_counts(slots_LGC, most) == 0)
        if missing.size and not partial:
            row, expert = (int(i) for i in missing[0])
            raise ProblemError(
                f"layer {names[row]}",
                f"no slot holds expert {expert}; each of the {most} experts needs one",
            )
        return Placement(slots_LGC=slots_LGC, experts=most, partial=bool(missing.size))

    def slots(
        self, *, gpus: int | None = None, layers: Sequence[int] | None = None
    ) -> tuple[SlotArray, tuple[int, ...]]:
        """The slots [L, G, C] as they stand, whichever experts are in them, and each row's layer."""
        count = self._gpus(gpus)
        rows, names = self._rows(layers)
        return slots_of_map(self.map_LS[rows], count), tuple(names)

    def _gpus(self, asked: int | None) -> int:
        if asked is None and self.gpus is None:
            raise ProblemError("gpus", "are not in a map of slots; say how many there are")
        if asked is not None and self.gpus is not None and asked != self.gpus:
            raise ProblemError("gpus", f"are {self.gpus} in the map, {asked} are wanted")
        found = self.gpus if asked is None else whole("gpus", asked, low=1)
        assert found is not None
        return found

    def _rows(self, layers: Sequence[int] | None) -> tuple[list[int], list[int]]:
        """Rows of the wanted layers, and what to call them."""
        have = list(range(len(self.map_LS)))
        own = have if self.layers is None else list(self.layers)
        if layers is None:
            return have, own
        want = list(layers)
        if self.repeated:
            return [0] * len(want), want
        if self.layers is None and not self.all_layers:
            if len(have) != len(want):
                raise ProblemError("layers", f"are {len(have)} in the map, {len(want)} are wanted")
            return have, want
        place = {layer: row for row, layer in enumerate(own)}
        absent = [layer for layer in want if layer not in place]
        if absent:
            raise ProblemError(f"layer {absent[0]}", f"is not in the map, which has the layers {span(own)}")
        return [place[layer] for layer in want], want
