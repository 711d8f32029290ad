"""TensorRT-LLM's ``moe_config.load_balancer``: a YAML of three keys.

``initial_global_assignments`` has every MoE layer that is built by the model's own number, each with
``num_slots`` experts; ``layer_updates_per_iter`` above 0 lets its own planner go on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeless_opt.adapters import EngineMap
from moeless_opt.adapters.files.rows import whole_row
from moeless_opt.problems.arrays import IntArray, whole
from moeless_opt.problems.codec import Fields, kind_name
from moeless_opt.problems.errors import FormatError

__all__ = ["parse", "parse_yaml", "render"]

_MAPS = "initial_global_assignments"


def parse(document: object) -> EngineMap:
    """The map of a parsed document."""
    entry = Fields(document, "")
    slots = whole("num_slots", entry.take("num_slots", int), low=1, high=2**31 - 1)
    given = entry.take(_MAPS, dict)
    whole("layer_updates_per_iter", entry.take("layer_updates_per_iter", int, 0))
    entry.done()
    if not given:
        raise FormatError(_MAPS, "names no layer")
    for layer in given:
        if type(layer) is not int or layer < 0:
            raise FormatError(_MAPS, f"has the key {layer!r}, must be the number of a layer")
    layers = sorted(given)
    rows = [whole_row(given[layer], f"{_MAPS}: layer {layer}", slots=slots) for layer in layers]
    return EngineMap(map_LS=np.array(rows), engine="tensorrt-llm", layers=tuple(layers))


def render(map_LS: IntArray, numbers: Sequence[int], updates: int) -> bytes:
    """The document of a map whose rows are the model's layers `numbers`."""
    lines = [f"num_slots: {map_LS.shape[1]}", f"{_MAPS}:"]
    lines += [f"  {layer}: {row}" for layer, row in zip(numbers, map_LS.tolist(), strict=True)]
    return "\n".join([*lines, f"layer_updates_per_iter: {updates}", ""]).encode()


def parse_yaml(text: str, name: str) -> Any:
    """Parse plain YAML: no tags, no references, no key twice.

    Raises
    ------
    FormatError
        Naming the file and line.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Plain(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if not isinstance(key, str | int):
                    raise FormatError(name, f"line {line}: has a key that is {kind_name(key)}")
                if key in found:
                    raise FormatError(name, f"line {line}: has the key {key!r} twice; once is enough")
                found[key] = self.construct_object(value_node, deep=True)
            return found

    Plain.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))
    try:
        for event in yaml.parse(text, Loader=base):
            if isinstance(event, yaml.AliasEvent):
                raise FormatError(name, f"line {event.start_mark.line + 1}: has a reference (*)")
        return yaml.load(text, Plain)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise FormatError(name, f"is not YAML: {getattr(error, 'problem', error)}{line}") from None
    except FormatError:
        raise
    except (RecursionError, ValueError) as error:
        raise FormatError(name, f"is not YAML that can be read ({type(error).__name__})") from None
