"""What the plug-ins ask the planner, on live maps of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.adapters.policy import MapTask, answer, first_map


def drawn(seed: int) -> tuple[MapTask, PolicyOptions, str]:
    """A random question: any shape, idle layers, new ranks, ranks to go, second copies, budgets."""
    rng = np.random.default_rng(seed)
    experts, gpus, layers = (int(rng.integers(1, most)) for most in (9, 5, 3))
    fill = str(rng.choice(["copies", "distinct"]))
    width = -(-experts // gpus) + int(rng.integers(0, 3))
    width = min(width, experts) if fill == "distinct" else width
    slots = gpus * width
    load = np.rint(1000 * rng.lognormal(0, 1, (layers, experts))) * (rng.random((layers, 1)) < 0.8)
    more = rng.integers(0, experts, (layers, slots - experts))
    rows = np.concatenate([np.tile(np.arange(experts), (layers, 1)), more], axis=1)
    live = rng.permuted(rows, axis=1)
    kind = rng.integers(4)
    if kind == 1:
        live[:, -width:] = -1
    elif kind == 2:
        live = np.concatenate([live, rng.integers(0, experts, (layers, width))], axis=1)
    elif kind == 3 and gpus > 1:
        live = live[:, :-width]
    split = str(rng.choice(["equal", "fractional", "nearest"]))
    options: dict[str, Any] = {"fill": fill}
    if rng.random() < 0.4:
        options["max_moves"] = int(rng.integers(0, 6))
    if split == "fractional":
        options["entries"] = int(rng.choice([2, 7, 64]))
    task = MapTask(load_LE=load, slots=slots, gpus=gpus, nodes=int(rng.choice([1, 2])), live_LS=live)
    return task, PolicyOptions(**options), split


@pytest.mark.parametrize("seed", range(12))
def test_every_slot_is_full_and_every_expert_there(seed: int) -> None:
    task, options, split = drawn(seed)
    found = answer(task, options, split)
    layers, experts = task.load_LE.shape
    assert found.map_LS.shape == (layers, task.slots)
    assert all(set(row.tolist()) == set(range(experts)) for row in found.map_LS)
    if options.fill == "distinct":
        held = found.map_LS.reshape(layers * task.gpus, -1)
        assert all(len(set(row.tolist())) == len(row) for row in held)
    assert np.isfinite(found.before_L).all()
    assert (found.after_L >= 1 - 1e-9).all()
    idle = task.load_LE.sum(axis=1) == 0
    assert (found.after_L[idle] == 1).all()
    if options.entries is None:
        assert found.table is None
        return
    assert found.table is not None
    for layer, expert in np.ndindex(layers, experts):
        own = found.table.slot_LEN[layer, expert][: found.table.count_LE[layer, expert]]
        assert len(own) >= 1
        assert (found.map_LS[layer][own] == expert).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_LE": [1, 2]}, "weight: has shape"),
        ({"load_LE": [[1, -2]]}, "weight"),
        ({"slots": 5}, "multiple of the 2 GPUs"),
        ({"slots": 0}, "slots"),
        ({"load_LE": np.ones((1, 7))}, "7 experts need at least 7 slots"),
        ({"live_LS": [[0, 1, 2, 9]]}, "map.*is 9"),
        ({"live_LS": [[0, 1, 2, -2]]}, "map.*is -2"),
        ({"live_LS": [0, 1]}, "map: has shape"),
    ],
)
def test_questions_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(mo.MoelessError, match=words):
        MapTask(**{"load_LE": np.ones((1, 3)), "slots": 4, "gpus": 2} | change)


def test_the_map_that_engines_begin_with() -> None:
    assert first_map(2, 3, 5).tolist() == [[0, 1, 2, 0, 1]] * 2
