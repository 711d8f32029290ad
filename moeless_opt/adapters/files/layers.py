"""Which of a model's layers are planned, by its own numbers, for engines that count dense layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import ModelSpec, span

__all__ = ["model_numbers"]


def model_numbers(
    layers: Sequence[int],
    *,
    model: ModelSpec | None = None,
    told: str | int | Sequence[int] | None = None,
    sure: bool = True,
) -> tuple[tuple[int, ...], int]:
    """The model's own number of each planned layer, and how many layers the model has in all.

    A recording without numbers counts its layers from 0, which may or may not leave out dense layers.

    Parameters
    ----------
    layers : sequence of int
        As the loads or the plan number them.
    model : ModelSpec, optional
        Says how many dense layers come first.
    told : int, str or sequence of int, optional
        Decoder layers of the model in all, dense ones included (``61``); or the number of each planned layer
        (``"3-60"``, ``"1,3,5"``).
    sure : bool
        Refuse to guess where the layers count from 0 and nobody says whether dense ones were left out.

    Raises
    ------
    ProblemError
        If they do not fit each other, or nobody says it.
    """
    given = tuple(int(layer) for layer in layers)
    plain = given == tuple(range(len(given)))
    if isinstance(told, str):
        told = int(told) if re.fullmatch(r"\s*\d+\s*", told) else _listed(told)
    if told is not None and not isinstance(told, int):
        numbers = tuple(int(layer) for layer in told)
        if len(numbers) != len(given) or any(a >= b for a, b in pairwise(numbers)):
            raise ProblemError(
                "model-layers", f"names {len(numbers)} layers, must be {len(given)} rising numbers"
            )
        if not plain and numbers != given:
            raise ProblemError("model-layers", f"is {span(numbers)}, the loads say {span(given)}")
        return numbers, numbers[-1] + 1
    if isinstance(told, int):
        if told <= given[-1]:
            raise ProblemError("model-layers", f"is {told}, there is a layer {given[-1]}")
        if plain and told > len(given):
            shown = f"{told - len(given)}-{told - 1}"
            raise ProblemError(
                "model-layers",
                f"is {told}, and {len(given)} layers are numbered from 0: say which of the model's they are, "
                f"such as {shown}",
            )
        return given, told
    if model is not None and plain and len(given) == model.layers:
        first = model.first_moe_layer
        return tuple(range(first, first + len(given))), first + len(given)
    if model is not None and given[0] < model.first_moe_layer:
        raise ProblemError("layers", f"name {given[0]}, which is dense in {model.name}")
    if plain and sure:
        raise ProblemError(
            "model-layers",
            f"is missing: {len(given)} layers are numbered from 0, and nothing says whether dense layers of "
            "the model are left out; give the model's name, its layers in all, or the numbers, such as 3-60",
        )
    return given, given[-1] + 1


def _listed(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if found is None:
            raise ProblemError("model-layers", f"is {text!r}, must be like 61, 3-60 or 1,3,5")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(numbers)
