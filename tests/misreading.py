"""Recordings damaged by knowledge of their structure: a reader may refuse one, but never read it as another.

`run_case` draws a model and its traffic, writes them as one of the kinds of `recorded`, changes the files,
reads them, and compares what comes out with what the files still say. Wrong is any other load than that (it
would be planned for), and any end but a refusal by a `MoelessError` of one line.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import MoelessError
from moeless_opt.problems.io.recordings.read import read_recording
from tests.recorded import Kind, World, kinds

__all__ = ["CHANGES", "Verdict", "run_case"]


@dataclass
class Verdict:
    """What became of one case."""

    kind: str
    change: str
    read: bool = False
    wrong: str = ""
    text: str = ""


@dataclass
class Case:
    """A kind's files, and what they may be read as."""

    world: World
    kind: Kind
    path: Path
    right: list[NDArray[Any]] = field(default_factory=list)

    def files(self) -> list[Path]:
        """The files that hold loads."""
        found = [self.path] if self.path.is_file() else sorted(self.path.iterdir())
        return [one for one in found if "meta_info" not in one.name and "_raw" not in one.name]


def _arrays(path: Path) -> dict[str, Any] | None:
    """The arrays of a file, by name; None where it is a text of rows."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    if path.suffix == ".npy":
        return {"": np.load(path)}
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    if path.suffix == ".pt":
        import torch

        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors: dict[str, Any] = load_file(path)
        return tensors
    return None


def _save(path: Path, arrays: dict[str, Any]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays[""])
    elif path.suffix == ".json":
        path.write_text(json.dumps(arrays))
    elif path.suffix == ".pt":
        import torch

        torch.save(arrays, path)
    else:
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path)


# --- changes: each returns whether it did anything ---------------------------------------------------------


def nothing(case: Case, rng: random.Random) -> bool:
    """The files as they are."""
    return True


def rename(case: Case, rng: random.Random) -> bool:
    """A key by another name: a known one of the same meaning, one of another, or an unknown one."""
    names = (
        "data",
        "arr_0",
        "x",
        "loads",
        "counts",
        "expert_load",
        "expert_load_window",
        "topk_ids",
        "mapping",
        "physical_to_logical_map",
        "values",
        "layer_9",
        "weights",
        "tokens_per_expert",
    )
    done = False
    new = rng.choice(names)
    which = rng.random()
    for path in case.files():
        arrays = _arrays(path)
        if arrays and list(arrays) != [""]:
            old = list(arrays)[int(which * len(arrays))]
            if new not in arrays:
                _save(path, {new if key == old else key: value for key, value in arrays.items()})
                done = True
        elif path.suffix in (".csv", ".jsonl", ".log"):
            text = path.read_text()
            words = [
                word
                for word in ("count", "expert", "layer", "step", "tokens_per_expert", "rank")
                if word in text
            ]
            if words:
                path.write_text(text.replace(words[int(which * len(words))], new))
                done = True
    return done


def transpose(case: Case, rng: random.Random) -> bool:
    """Arrays with their axes in another order; with one layer, steps could not be told from layers then."""
    done = False
    which = rng.random()
    for path in case.files():
        arrays = _arrays(path)
        for key, value in (arrays or {}).items():
            if isinstance(value, list) and isinstance(value[0], dict):
                continue
            array = np.asarray(value)
            if array.ndim in (2, 3) and array.dtype.kind in "iuf" and "map" not in key:
                orders = (
                    [(1, 0)] if array.ndim == 2 else [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
                )
                turned = array.transpose(orders[int(which * len(orders))])
                arrays[key] = turned.tolist() if isinstance(value, list) else _like(value, turned)  # type: ignore[index]
                done = True
        if arrays and done:
            _save(path, arrays)
    return done


def _like(value: Any, array: NDArray[Any]) -> Any:
    if type(value).__module__ == "torch":
        import torch

        return torch.tensor(array.copy())
    return array


def retype(case: Case, rng: random.Random) -> bool:
    """Arrays of another type that holds the same numbers."""
    done = False
    kind = rng.choice(("f4", "f8", "i8", "u4", "i2"))
    for path in case.files():
        arrays = _arrays(path)
        for key, value in (arrays or {}).items():
            if (
                isinstance(value, np.ndarray)
                and value.dtype.kind in "iuf"
                and value.ndim
                and "map" not in key
                and np.array_equal(value.astype(kind), value)
            ):
                arrays[key] = value.astype(kind)  # type: ignore[index]
                done = True
        if arrays and done:
            _save(path, arrays)
    return done


def drop_rank(case: Case, rng: random.Random) -> bool:
    """One rank's files away: never the last, whose absence nothing may tell."""
    ranks = sorted(
        {int(one.stem.split("rank")[1].split("_")[0]) for one in case.files() if "rank" in one.stem}
    )
    if len(ranks) < 2:
        return False
    gone = rng.choice(ranks[:-1])
    for path in case.files():
        if f"rank{gone}" in path.stem:
            path.unlink()
    case.right = []
    return True


def shuffle_steps(case: Case, rng: random.Random) -> bool:
    """Rows and records in another order; what they say stays."""
    done = False
    for path in case.files():
        if path.suffix in (".jsonl", ".log"):
            lines = path.read_text().splitlines()
            rng.shuffle(lines)
            path.write_text("\n".join(lines) + "\n")
            done = True
        elif path.suffix == ".csv" and "step" in (text := path.read_text()).split("\n", 1)[0]:
            head, *lines = text.splitlines()
            rng.shuffle(lines)
            path.write_text("\n".join([head, *lines]))
            done = True
        elif path.suffix == ".pt" and "records" in (content := _arrays(path) or {}):
            rng.shuffle(content["records"])
            _save(path, content)
            done = True
    return done


def mix_models(case: Case, rng: random.Random) -> bool:
    """One of several files, or some rows, of another model with other experts."""
    other = World.drawn(
        rng.randrange(10**6), len(case.world.steps_TLE), len(case.world.layers), case.world.experts + 4
    )
    twin = next(kind for kind in kinds(other) if kind.name == case.kind.name)
    folder = case.path.parent / "other"
    folder.mkdir()
    files = case.files()
    theirs = twin.write(folder)
    if len(files) > 1:
        victim = rng.choice(files)
        shutil.copy(theirs / victim.name, victim)
    elif files[0].suffix in (".jsonl", ".log"):
        lines = theirs.read_text().splitlines()
        files[0].write_text(files[0].read_text() + "\n".join(lines[-2:]) + "\n")
    else:
        return False
    # Rows that name experts one by one say nothing of how many there are.
    case.right = []
    return case.kind.name not in (
        "tables-of-ranks",
        "tables-of-layers",
        "lines-of-cells",
        "router-trace",
        "routed-experts-lines",
    )


def truncate(case: Case, rng: random.Random) -> bool:
    """A file that ends too early."""
    victim = rng.choice(case.files())
    raw = victim.read_bytes()
    victim.write_bytes(raw[: rng.randrange(len(raw))])
    return True


def drop_row(case: Case, rng: random.Random) -> bool:
    """A row of a text away, but never where rows are only those of busy experts or single requests."""
    if case.kind.name not in ("lines", "vllm-stats", "megatron-log", "router-trace", "wide-steps"):
        return False
    victim = rng.choice(case.files())
    lines = victim.read_text().splitlines()
    kept = [i for i, line in enumerate(lines) if i and "mtp" not in line and "meta" not in line]
    gone = rng.choice(kept)
    victim.write_text("\n".join(lines[:gone] + lines[gone + 1 :]) + "\n")
    case.right = []
    if case.kind.name == "vllm-stats" or (case.kind.name == "wide-steps" and len(case.world.layers) == 1):
        case.right = [case.world.total - case.world.steps_TLE[gone - 1]]
    return True


def copy_file(case: Case, rng: random.Random) -> bool:
    """A rank's file a second time, under the name of another rank or none."""
    files = case.files()
    if len(files) < 2 or case.kind.name == "tables-of-layers":
        return False
    source = rng.choice(files)
    name = rng.choice((f"copy_of_{source.name}", source.name.replace("rank", "rank9")))
    shutil.copy(source, source.with_name(name))
    case.right = []
    return True


def pad(case: Case, rng: random.Random) -> bool:
    """Padded tokens in a trace, or dense layers in front of loads; what they say stays."""
    arrays = _arrays(case.path) if case.path.is_file() else None
    for key, value in (arrays or {}).items():
        if case.kind.name.startswith("routed-experts") and isinstance(value, np.ndarray):
            fill = rng.choice((0, -1, 255)) if value.shape[2] > 1 else -1  # 0 may be a choice
            wide = value.astype(np.int64)
            arrays[key] = np.concatenate([wide, np.full((rng.randrange(1, 9), *wide.shape[1:]), fill)])  # type: ignore[index]
            _save(case.path, arrays)  # type: ignore[arg-type]
            return True
    return False


CHANGES: tuple[Callable[[Case, random.Random], bool], ...] = (
    nothing, rename, transpose, retype, drop_rank, shuffle_steps, mix_models, truncate, drop_row, copy_file,
    pad,
)  # fmt: skip
"""What is done to files."""


# --- one case ----------------------------------------------------------------------------------------------


def run_case(seed: int, number: int, folder: Path) -> Verdict:
    """One case, from its number alone; `folder` is empty and is left so."""
    rng = random.Random(f"{seed}/misreading/{number}")
    change = rng.choice(CHANGES)
    top_k = rng.choice((1, 2, 4))
    experts = 2 * rng.randrange(2, 17)
    top_k = min(top_k, experts - 1)
    world = World.drawn(
        rng.randrange(10**6),
        rng.randrange(2, 7),
        rng.randrange(2 if change is transpose else 1, 7),
        experts,
        top_k,
        rng.choice((8, 40, 200)),
    )
    kind = rng.choice(kinds(world))
    verdict = Verdict(kind.name, change.__name__)
    inner = folder / "case"
    inner.mkdir()
    try:
        path = kind.write(inner)
        case = Case(world, kind, path, [kind.load_LE])
        while not change(case, rng):  # until a kind that it can be done to
            shutil.rmtree(inner)
            inner.mkdir()
            kind = rng.choice(kinds(world))
            case = Case(world, kind, kind.write(inner), [kind.load_LE])
            verdict.kind = kind.name
        options = dict(kind.options)
        if kind.format in ("token-trace", "router-trace"):
            options["experts"] = experts
        _judge(case, options, verdict)
    finally:
        shutil.rmtree(inner)
    return verdict


def _judge(case: Case, options: dict[str, Any], verdict: Verdict) -> None:
    try:
        got = read_recording(case.path, **options)
    except MoelessError as error:
        verdict.text = str(error)
        if "\n" in verdict.text:
            verdict.wrong = "an error of several lines"
        return
    except Exception as error:
        verdict.wrong = "escaped: " + "".join(traceback.format_exception(error))[-1500:]
        return
    verdict.read = True
    verdict.text = f"{got.format} {got.load_TLE.shape} {got.notes}"
    load = got.load_TLE.sum(0)
    if not any(_agrees(load, right, verdict.change) for right in case.right):
        verdict.wrong = f"read as {got.format} {got.load_TLE.shape}, layers {got.layers}: {got.notes}"


def _agrees(load: NDArray[Any], right: NDArray[Any], change: str) -> bool:
    """Whether what was read is what was written; a table that was cut off may be of fewer layers or steps."""
    right = right[right.any(1)]
    if load.shape[1] < right.shape[1] and not right[:, load.shape[1] :].any():
        load = np.pad(load, ((0, 0), (0, right.shape[1] - load.shape[1])))
    if load.shape == right.shape and np.array_equal(load, right):
        return True
    if change != "truncate" or len(load) > len(right):
        return False
    # What ends between two layers, or within the only one, is a shorter recording by all that its bytes say.
    return len(load) == 1 or bool(load.shape[1] == right.shape[1] and (load <= right[: len(load)]).all())
