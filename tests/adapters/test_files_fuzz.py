"""Engines' files with one thing wrong: refused in one line that names the file, or read as what they are."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moeless_opt as mo
from moeless_opt.adapters.files import ENGINES, export, read_placement
from moeless_opt.problems.errors import MoelessError

LAYERS, GPUS, SLOTS, EXPERTS = (3, 4), 5, 3, 11
ROUNDS = 60


def written(engine: str, rng: np.random.Generator, folder: Path) -> tuple[Path, np.ndarray]:
    """A file of the engine, and the slots in it."""
    row = np.arange(GPUS * SLOTS) % EXPERTS
    slots_LGC = np.stack([rng.permutation(row) for _ in LAYERS]).reshape(len(LAYERS), GPUS, SLOTS)
    if engine == "ascend":
        slots_LGC = np.stack([rng.permutation(EXPERTS)[row].reshape(GPUS, SLOTS) for _ in LAYERS])
    path = folder / f"map{ENGINES[engine][0]}"
    export(slots_LGC, engine, path, layers=LAYERS)
    return path, slots_LGC


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything inside a document."""
    found = [way]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*way, key))
    return found


def at(document: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        document = document[key]
    return document


def damaged(document: Any, rng: np.random.Generator) -> Any:
    """A document with one thing wrong: a key or row renamed, dropped, added, an axis turned, a kind."""
    document = copy.deepcopy(document)
    ways = places(document)
    for _ in range(100):
        way = ways[rng.integers(len(ways))]
        value, inside = at(document, way), at(document, way[:-1]) if way else None
        kind = rng.integers(6)
        if kind == 0 and isinstance(value, dict):
            key = list(value)[rng.integers(len(value))]
            value[f"{key}_" if isinstance(key, str) else key + 7] = value.pop(key)
        elif kind == 1 and isinstance(inside, dict | list):
            del inside[way[-1]]
        elif kind == 2 and isinstance(value, list) and value and isinstance(value[0], list):
            value[:] = [list(column) for column in zip(*value, strict=False)]
        elif kind == 3 and isinstance(value, int):
            other: list[Any] = [float(value) + 0.5, str(value), None, [value], {"a": value}, True, -value - 2]
            inside[way[-1]] = other[rng.integers(len(other))]
        elif kind == 4 and isinstance(value, list) and value:
            value.append(copy.deepcopy(value[-1]))
        elif kind == 5 and isinstance(value, dict):
            value["another"] = 1
        else:
            continue
        return document
    return None


def outcome(path: Path) -> tuple[str, mo.Placement | None]:
    """Why a file is refused, or what it is read as."""
    try:
        return "", read_placement(path, gpus=GPUS, experts=EXPERTS, layers=LAYERS)
    except MoelessError as error:
        return str(error), None


def judged(path: Path, slots_LGC: np.ndarray) -> bool:
    """Whether a file is refused as it should be; if it is read, then as the slots that were written."""
    message, found = outcome(path)
    if found is not None:
        assert (found.slots_LGC == slots_LGC).all()
        return False
    assert message.startswith(str(path)), message
    assert "\n" not in message
    return True


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "ascend", "eplb"])
def test_one_thing_wrong(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(sum(map(ord, engine)))
    path, slots_LGC = written(engine, rng, tmp_path)
    if engine == "eplb":
        path = tmp_path / "map.json"
        export(slots_LGC, engine, path, layers=LAYERS)
    text = path.read_text()
    document = yaml.safe_load(text) if engine == "tensorrt-llm" else json.loads(text)
    refused = 0
    for _ in range(ROUNDS):
        wrong = damaged(document, rng)
        path.write_text(yaml.safe_dump(wrong) if engine == "tensorrt-llm" else json.dumps(wrong))
        refused += judged(path, slots_LGC)
    assert refused > ROUNDS * 3 // 4  # the rest lacks nothing that is needed


@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_that_are_cut_or_turned(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    path, slots_LGC = written(engine, rng, tmp_path)
    raw = path.read_bytes()
    for _ in range(ROUNDS // 2):
        path.write_bytes(raw[: rng.integers(len(raw) - 1)])
        if engine != "tensorrt-llm":  # a YAML may end after any line
            judged(path, slots_LGC)
        wrong = bytearray(raw)
        wrong[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(wrong))
        # A digit may have become another one: then it is another map, and a whole one.
        message, found = outcome(path)
        assert message.startswith(str(path)) if found is None else (found.replicas_LE > 0).all()


def test_arrays_with_one_thing_wrong(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    path, slots_LGC = written("eplb", rng, tmp_path)
    with np.load(path) as arrays:
        good = {name: arrays[name] for name in arrays.files}
    phy2log = good["phy2log"]
    for name, array in (
        ("turned", phy2log.T),
        ("floats", phy2log.astype(float)),
        ("texts", phy2log.astype(str)),
        ("bools", phy2log.astype(bool)),
        ("complex", phy2log.astype(complex)),
        ("a row less", phy2log[:1]),
        ("a rank less", phy2log[:, :-SLOTS]),
        ("a slot less", phy2log[:, :-1]),
        ("flat", phy2log.ravel()),
        ("deep", phy2log[None, None]),
        ("empty", phy2log[:0]),
        ("shifted", phy2log + 1),
        ("negative", phy2log - 2),
        ("huge", phy2log.astype(np.uint64) + 2**63),
    ):
        for extra in ({}, {key: good[key] for key in ("log2phy", "logcnt")}):
            np.savez(path, phy2log=array, **extra)
            assert judged(path, slots_LGC), name
        buffer = io.BytesIO()
        np.save(buffer, array)
        (tmp_path / "map.npy").write_bytes(buffer.getvalue())
        assert judged(tmp_path / "map.npy", slots_LGC), name
    np.savez(path, phy2log=phy2log.astype(np.int8))
    assert not judged(path, slots_LGC)


def test_nothing_that_could_run_is_loaded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"phy2log": torch.zeros(1, 2), "model": Path("x")}, tmp_path / "map.pt")
    np.savez(tmp_path / "map.npz", phy2log=np.array([{"a": 1}], dtype=object))
    for name in ("map.pt", "map.npz"):
        with pytest.raises(mo.FormatError):
            read_placement(tmp_path / name, gpus=1)
