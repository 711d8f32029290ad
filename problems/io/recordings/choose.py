"""Which array of a recording holds the loads, what it is, and how it becomes loads of logical experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.io.recordings.arrays import Array, plain_numbers
from moeless_opt.problems.io.recordings.evidence import (
    choices_of,
    either_way,
    map_like,
    reading_of,
    whole_numbers,
)
from moeless_opt.problems.io.recordings.source import Found, Source, cut, shape_text

__all__ = ["CHOICES", "LOGICAL", "MAPS", "PHYSICAL", "Chooser"]

# Names of arrays that hold loads of logical experts, the likelier first. Those of `_STEPPED` have a leading
# axis of steps of one run, where they have one at all.
LOGICAL = (
    "logical_count", "global_expert_load_window", "global_expert_load", "logical_expert_load_window",
    "load_TLE", "load_LE", "loads", "load", "counts", "count", "expert_counts", "expert_count",
    "expert_load", "tokens_per_expert", "tokens", "weight", "weights", "hist", "histogram",
)  # fmt: skip
PHYSICAL = (
    "expert_load_window", "expert_load_pass", "expert_load_view", "global_physical_count",
    "global_physical_count_of_buffered_step", "physical_count", "physical_load", "physical_loads",
)  # fmt: skip
_STEPPED = frozenset(
    ("logical_count", "global_expert_load_window", "logical_expert_load_window", "expert_load_window",
     "global_physical_count_of_buffered_step")
)  # fmt: skip
_SURELY_LOGICAL = frozenset(name for name in LOGICAL if name.startswith(("logical_", "global_")))
MAPS = (
    "physical_to_logical_map", "last_physical_to_logical_map", "physical_to_logical", "phy2log",
    "p2l_map", "p2l",
    "physical_to_logical_map_cpu",
)  # fmt: skip
_NO_LOADS = (
    *MAPS, "logical_to_physical_map", "logical_to_physical", "log2phy", "l2p", "logical_replica_count",
    "logcnt",
)  # fmt: skip
CHOICES = (
    "routed_experts", "experts", "topk_ids", "topk", "topk_indices", "expert_ids", "router_indices",
    "selected_experts", "top_indices", "topk_experts",
)  # fmt: skip
_LAYERS_FIRST = "topk_ids_of_layer"  # SGLang's recorder: [layers, tokens, top-k]
_OTHER = re.compile(r"rank|gpu|device|node|logit|prob|slot|map|placement|bias")
_NAMES = ("workloads", "scenarios", "names", "datasets", "domains", "labels")


class Chooser:
    """Finds the loads among the arrays of one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.error = source.error

    def choose(self, arrays: Mapping[str, Array], container: str) -> Found:
        """Pick the array of loads: the caller's key, a known name, or the only one that can be."""
        key = self.source.key
        if key is not None and key not in arrays and any(c in key for c in "*?["):
            return self._stack(arrays, container)
        name = self._name(arrays)
        if name in (*CHOICES, _LAYERS_FIRST) and self.source.as_ in (None, "trace"):
            chosen = arrays[name].get()
            if name == _LAYERS_FIRST and chosen.ndim == 3:
                return self.count_choices(chosen.transpose(1, 0, 2), name, by_name=True, turned=True)
            return self.count_choices(chosen, name, by_name=True)
        kind = f"sglang-{container}" if name == "logical_count" else container
        axis: Literal["steps", "scenarios"] = "steps" if name in _STEPPED else "scenarios"
        load = arrays[name].get()
        map_name = self._map_name(arrays, name, load)
        if map_name is not None:
            to_logical = self.source.map if map_name == "the given map" else arrays[map_name].get()
            assert to_logical is not None
            logical = self.to_logical(load, to_logical, name, map_name)
            note = f"{name} summed to logical experts by {map_name}"
            what, why = reading_of(logical)
            if what == "swapped" and logical.shape[-2] > 1 and self.source.as_ is None:
                raise self.error(
                    f"{name} {shape_text(load.shape)} has not the axes [steps, layers, slots]: "
                    f"{why}; transpose it, or give --as physical (as_='physical') to take it as it is"
                )
            return Found(load=logical, format=f"vllm-{container}", axis=axis, notes=(note,))
        labels = self._labels(arrays, load.shape[0]) if load.ndim == 3 else ()
        known = name in (*LOGICAL, *PHYSICAL)
        found = self.read_array(load, name, kind, known=known)
        if found.format == "token-trace":
            return found
        return Found(
            load=found.load,
            format=kind,
            axis="scenarios" if labels else axis,
            scenarios=labels,
            notes=(f"loads from {name}", *found.notes),
        )

    def read_array(self, array: NDArray[Any], name: str, form: str, *, known: bool = False) -> Found:
        """Read an array as what it is; refused where it can be two things and its name does not say which."""
        if self.source.as_ == "trace":
            return self.count_choices(array, name)
        if self.source.as_ == "physical":
            return replace(self.read_physical(array, name), format=form)
        if self.source.as_ == "counts":
            return Found(load=array, format=form)
        what, why = reading_of(array)
        if what == "trace" and not known:
            found = self.count_choices(array, name)
            return Found(
                load=found.load, format=found.format, notes=(f"{name} is a trace: {why}", *found.notes)
            )
        shape = shape_text(array.shape)
        if what == "transposed" or (what == "swapped" and (array.shape[-2] > 1 or not known)):
            raise self.error(
                f"{name} {shape} has its axes in another order than [(steps,) layers, experts]: {why}; "
                "transpose it, or give --as counts (as_='counts') to take it as it is"
            )
        if what == "trace" or (what == "either" and not known):
            trace = "[tokens, layers, top-k]" if array.ndim == 3 else "[tokens, layers] of one choice each"
            loads = "[steps, layers, experts]" if array.ndim == 3 else "[layers, experts]"
            raise self.error(
                f"{name} {shape} can be loads {loads} or the experts that tokens chose {trace}: {why}; say "
                "which with --as counts or --as trace (as_='counts' or 'trace')"
            )
        return Found(load=array, format=form)

    def read_physical(self, array: NDArray[Any], name: str) -> Found:
        """Loads of slots, summed to logical experts by the caller's map."""
        if self.source.map is None:
            raise self.error(
                f"{name} are of physical slots, and there is no map to logical experts; have "
                "physical_to_logical_map [layers, slots] beside them, or give one (--map)"
            )
        logical = self.to_logical(array, self.source.map, name, "the given map")
        return Found(
            load=logical, format="physical", notes=(f"{name} summed to logical experts by the given map",)
        )

    # --- names -------------------------------------------------------------------------------------------

    def _name(self, arrays: Mapping[str, Array]) -> str:
        """The array to read."""
        key = self.source.key
        if key is not None:
            if key not in arrays:
                raise self.error(f"has no key {key!r}; it has {cut(', '.join(arrays) or 'none')}")
            return key
        choices = next((n for n in (*CHOICES, _LAYERS_FIRST) if n in arrays and _able(arrays[n])), None)
        loads = next((n for n in (*LOGICAL, *PHYSICAL) if n in arrays and _able(arrays[n])), None)
        if self.source.as_ == "trace":
            loads = None if choices is not None else loads
        elif self.source.as_ == "physical":
            loads = next((n for n in (*PHYSICAL, *LOGICAL) if n in arrays and _able(arrays[n])), None)
        if loads is not None and choices is not None:
            if arrays[loads].shape() == arrays[choices].shape():  # the router's weights of the choices
                loads = None
            elif self.source.as_ is None:
                raise self.error(
                    f"has both loads {loads} {shape_text(arrays[loads].shape())} and chosen experts "
                    f"{choices} "
                    f"{shape_text(arrays[choices].shape())}; choose one by key (--key)"
                )
        found = loads or choices or next((n for n in (*LOGICAL, *PHYSICAL) if n in arrays), None)
        if found is not None:
            return found
        able = [k for k in arrays if len(arrays[k].shape()) in (2, 3) and k not in _NO_LOADS]
        if len(able) > 1:
            listed = ", ".join(f"{k} {shape_text(arrays[k].shape())}" for k in able)
            raise self.error(f"has several arrays that could be the loads; choose one by key: {cut(listed)}")
        if not able:
            placed = [k for k in arrays if k in _NO_LOADS]
            raise self.error(
                f"is a placement ({placed[0]}) and holds no loads" if placed else
                "has no array [layers, experts] or [scenarios, layers, experts]; its keys: "
                f"{cut(', '.join(arrays) or 'none')}; expected logical_count, counts or the like"
            )  # fmt: skip
        if _OTHER.search(able[0].lower()):
            raise self.error(
                f"has {able[0]} alone, which by its name is no load of experts; give it as key if it is"
            )
        return able[0]

    def _map_name(self, arrays: Mapping[str, Array], name: str, load: NDArray[Any]) -> str | None:
        """The map that turns `name` into loads of logical experts; None if it is of logical ones already."""
        if self.source.as_ in ("counts", "trace"):
            return None
        given = None if self.source.map is None else "the given map"
        beside = given or next((k for k in MAPS if k in arrays), None)
        if name in PHYSICAL or self.source.as_ == "physical":
            if beside is None:
                raise self.error(
                    f"{name} counts physical experts, and the map to logical ones is missing; expected "
                    f"physical_to_logical_map [layers, physical experts] beside it, or give one (--map)"
                )
            return beside
        if load.ndim not in (2, 3):
            return None
        if beside is None:
            for other, array in arrays.items():
                if (
                    other != name
                    and array.shape()[-1:] == load.shape[-1:]
                    and map_like(array.get(), load.shape[-1])
                ):
                    raise self.error(
                        f"{name} may be loads of physical slots: {other} beside it looks like their map; "
                        "name it "
                        "physical_to_logical_map, or give --as counts (as_='counts') if it is none"
                    )
            return None
        to_logical = self.source.map if given else arrays[beside].get()
        assert to_logical is not None
        if to_logical.size == 0 or not whole_numbers(to_logical):
            return beside  # is refused there
        slots, experts, width = to_logical.shape[-1], int(to_logical.max()) + 1, load.shape[-1]
        if width == slots and width != experts and name not in _SURELY_LOGICAL:
            return beside
        if width == slots == experts:
            if given is None and (name in _SURELY_LOGICAL or (to_logical == np.arange(slots)).all()):
                return None
            raise self.error(
                f"{name} has {width} columns, and there are as many slots as experts: it can be loads of "
                "slots or "
                "of logical experts; say which with --as physical or --as counts (as_='physical' or 'counts')"
            )
        if width == experts or (width == self.source.experts and width != slots):
            return None
        raise self.error(
            f"{name} has {width} columns, but {beside} has {slots} slots of {experts} experts: one of them "
            "is "
            "of another model"
        )

    def _labels(self, arrays: Mapping[str, Array], length: int) -> tuple[str, ...]:
        """Names of the leading axis: an array of as many strings."""
        for name in sorted(arrays, key=lambda k: (k not in _NAMES, k)):
            labels = arrays[name].strings()
            if labels is not None and len(labels) == length:
                return labels
        return ()

    def _stack(self, arrays: Mapping[str, Array], container: str) -> Found:
        assert self.source.key is not None
        matching = [k for k in arrays if fnmatchcase(k, self.source.key)]
        if not matching:
            raise self.error(
                f"has no key like {self.source.key!r}; it has {cut(', '.join(arrays) or 'none')}"
            )
        shapes = {k: arrays[k].shape() for k in matching}
        first = shapes[matching[0]]
        for k, shape in shapes.items():
            if len(shape) != 2 or shape != first:
                raise self.error(
                    f"{k} has shape {shape_text(shape)}; arrays stacked by key={self.source.key!r} must all "
                    f"be [layers, experts] and equal, like {matching[0]} {shape_text(first)}"
                )
        if len(matching) * math.prod(first) * 8 > self.source.max_bytes:
            raise self.error(f"the arrays of key={self.source.key!r} take more than {self.source.most}")
        load = np.stack([plain_numbers(self.source, k, arrays[k].get()) for k in matching])
        return Found(
            load=load, format=container, scenarios=tuple(matching), notes=(f"{len(load)} arrays stacked",)
        )

    # --- to logical counts -------------------------------------------------------------------------------

    def to_logical(
        self, physical: NDArray[Any], to_logical: NDArray[Any], name: str, map_name: str
    ) -> FloatArray:
        """Sum loads [..., layers, physical] to logical experts by the map [layers, physical] (-1: unused)."""
        if physical.ndim not in (2, 3) or 0 in physical.shape:
            raise self.error(
                f"{name} has shape {shape_text(physical.shape)}, must be [(steps,) layers, physical experts]"
            )
        layers, slots = physical.shape[-2:]
        if to_logical.ndim == 1 and to_logical.shape == (slots,):
            to_logical = np.broadcast_to(to_logical, (layers, slots))
        if to_logical.shape != (layers, slots):
            raise self.error(
                f"{map_name} has shape {shape_text(to_logical.shape)}, {name} needs "
                f"[{layers} layers, {slots} slots]"
            )
        load = plain_numbers(self.source, name, physical)
        if to_logical.dtype.kind == "f":
            to_logical = to_logical.astype(np.float64)  # half a float does not reach the limit below
        fits = to_logical.dtype.kind in "iuf" and bool(((to_logical >= -1) & (to_logical < 2**31)).all())
        if not fits or (to_logical.dtype.kind == "f" and (to_logical % 1 != 0).any()):
            raise self.error(f"{map_name} must hold logical experts from 0, or -1 for an unused slot")
        to_logical = to_logical.astype(np.int64)
        count = self.source.expert_count(int(to_logical.max()) + 1, map_name)
        steps = load.shape[0] if load.ndim == 3 else 1
        if steps * layers * count * 8 > self.source.max_bytes:
            raise self.error(
                f"{map_name} names expert {count - 1}: the loads would take over {self.source.most}"
            )
        load_TLP = load.reshape(steps, layers, slots)
        used_LP = to_logical >= 0
        if load_TLP[:, ~used_LP].any():
            layer = int(np.argwhere(load_TLP.any(axis=0) & ~used_LP)[0, 0])
            raise self.error(f"{name}: layer {layer} has load on a slot that {map_name} calls unused (-1)")
        at = (np.arange(layers)[:, None] * count + to_logical)[used_LP]
        logical = [
            np.bincount(at, weights=load_LP[used_LP], minlength=layers * count) for load_LP in load_TLP
        ]
        return np.stack(logical).astype(np.float64).reshape(*physical.shape[:-1], count)

    def count_choices(
        self, chosen: NDArray[Any], name: str, *, by_name: bool = False, turned: bool = False
    ) -> Found:
        """Count how often each expert was chosen in a trace [tokens, layers, top-k] (-1: no token).

        Unless the caller says that it is one, it must have more tokens than layers: with its axes in another
        order it would be read wrong.
        """
        if not whole_numbers(chosen) or chosen.ndim not in (2, 3) or chosen.size == 0:
            raise self.error(
                f"{name} has shape {shape_text(chosen.shape)} of {chosen.dtype}; a token trace must be a "
                "non-empty integer array [tokens, layers, top-k]"
            )
        chosen = chosen if chosen.dtype.kind in "iu" else chosen.astype(np.int64)
        chosen = self._three_axes(chosen, name)
        if chosen.min() < -1:
            raise self.error(f"{name} names expert {chosen.min()}; experts count from 0 (-1: none)")
        tokens, layers, top_k = chosen.shape
        if self.source.as_ is None and tokens < (16 if turned else max(layers, top_k, 16)):
            raise self.error(
                f"{name} {shape_text(chosen.shape)} is a trace of few tokens, or its axes are not [tokens, "
                "layers, top-k]: too few to tell; transpose it, or give --as trace (as_='trace') if they are"
            )
        if self.source.as_ is None and either_way(chosen):
            raise self.error(
                f"{name} {shape_text(chosen.shape)} can be a trace [tokens, layers, top-k] or [tokens, "
                "top-k, layers]: "
                "neither repeats a value; give --as trace (as_='trace') if it is the first, else transpose it"
            )
        valid_PL, wrong, notes = choices_of(chosen)
        if wrong is not None:
            row = chosen[wrong]
            twice = int(np.sort(row)[:-1][np.diff(np.sort(row)) == 0][-1])
            raise self.error(
                f"{name}: token {wrong[0]} chooses expert {twice} twice in layer {wrong[1]}, which no "
                "router does: "
                "it is no trace [tokens, layers, top-k]; "
                f"{'transpose it' if by_name else 'leave --as trace out'}"
            )
        valid = valid_PL[:, :, None] & (chosen >= 0)
        high = int(chosen[valid].max()) if valid.any() else 0
        count = self.source.expert_count(high + 1, name)
        if layers * count * 8 > self.source.max_bytes:
            raise self.error(f"{name} names expert {count - 1}: the loads would take over {self.source.most}")
        load_LE = np.stack(
            [np.bincount(chosen[:, i][valid[:, i]], minlength=count) for i in range(layers)]
        ).astype(np.float64)
        note = f"{name}: {tokens} tokens counted, top-{top_k}, over {count} experts"
        if self.source.experts is None:
            note += " (up to the highest that occurs)"
        return Found(load=load_LE, format="token-trace", notes=(note, *notes), sparse=True)

    def _three_axes(self, chosen: NDArray[Any], name: str) -> NDArray[Any]:
        """A trace with its axis of choices: one each where a token repeats an expert over its layers."""
        if chosen.ndim == 3:
            return chosen
        ordered = np.sort(chosen, axis=1)
        if chosen.shape[1] > 1 and not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise self.error(
                f"{name} {shape_text(chosen.shape)} can be a trace [tokens, layers] of one choice each or "
                "[tokens, top-k] of one layer: no row repeats a value; save it as [tokens, layers, top-k]"
            )
        return chosen[:, :, None]


def _able(array: Array) -> bool:
    return len(array.shape()) in (2, 3)
