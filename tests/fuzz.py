"""Cases in a stranger's hands: damaged files, senseless options, odd arguments; each from its number alone.

`run_case` makes a case's files in a folder, runs it inside this process, and says what is wrong with what
happened: a traceback, a warning, an exit code of none of the documented kinds, an error of more than one line
or that does not say where, a character that commands a terminal, a file that was touched though the command
failed, anything left behind.

Files are made from whole ones (problems, plans, topologies, recordings of all formats, traces) by mutations
that know their structure (values, keys, rows, arrays of an archive) or only their bytes.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import re
import stat
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import moeless_opt as mo
from moeless_opt.cli import main
from moeless_opt.problems.io.arrivals import read_arrivals, read_lengths
from moeless_opt.problems.io.traces import read_token_traces

ANSI = "\x1b[31mred\x07\x9b\u202e\ud800 \n"
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 0.1, 300, 10**9, 2**31, 2**53 + 1, 2**63, 2**64, 10**30,
    -(10**30), 1e-320, 1e-300, 1e-12, 1e12, 1e29, 1e30, 1e31, 1e200, 1.7e308, 1e999, -1e999, float("nan"),
    "", "x", "1", "slots", "memory", "worst", "cvar", "cv", "NaN", ANSI, "x" * 5000, "../x", "/dev/zero", "-",
    "a\0b", [], [[]], [[[]]], [0], [1, 2], [[1, 2], [3]], [[1, 2], [3, 4]], [None], ["x"], [True], [[1e308]],
    [[[0]]], [-1],
    {}, {"a": 1}, {"kind": "npz"}, {"kind": "x"}, {"kind": "recording", "path": "rec.json"},
    {"kind": "plan", "path": "plan.npz"}, {"kind": "plan", "path": "problem.json"}, {"policy": "makespan"},
    {"kind": "generated", "recipe": {"kind": "zipf", "layers": 10**6, "experts": 10**6}},
]  # fmt: skip
CODES = (0, 1, 2, 3)
QUICK = ("auto", "static", "eplb", "moeless", "construct", "replan", "constrained", "sized", "stay")


@dataclass(slots=True)
class Outcome:
    """What a case was, and what is wrong about it (nothing: "")."""

    kind: str
    text: str
    code: int | None = None
    wrong: list[str] = field(default_factory=list)


# --- whole files -------------------------------------------------------------------------------------------


def whole_files(folder: Path) -> dict[str, bytes]:
    """One valid file of every kind, by name."""
    rng = np.random.default_rng(0)
    load = rng.integers(1, 99, (2, 6)).astype(float)
    gpus = mo.uniform(2, 2, slots=3)
    problem = mo.Problem(loads=mo.Loads(load_TLE=load), topology=gpus, name="whole")
    plan = mo.solve(problem, "auto").plan
    assert plan is not None
    for name in ("plan.json", "plan.npz"):
        mo.save_plan(plan, folder / name)
    np.save(folder / "rec.npy", load)
    np.savez(folder / "rec.npz", chat=load, code=load[:, ::-1], names=np.array(["a", "b"]))
    steps = rng.integers(0, 9, (3, 2, 8))
    physical = np.array([[0, 1, 2, 3, 4, 5, 0, 1]] * 2)
    np.savez(folder / "vllm.npz", expert_load_window=steps, physical_to_logical_map=physical)
    chosen = rng.integers(0, 6, (20, 2, 2)).astype(np.uint8)
    np.savez(folder / "traces.npz", experts=chosen, offsets=[0, 5, 20], prompt_tokens=[2, 3])
    rows = [f"{x},{e},{int(load[x, e])}" for x in range(2) for e in range(6)]
    texts = {
        "rec.csv": "\n".join(["layer,expert,count", *rows]),
        "rec.json": json.dumps({"rank": 0, "logical_count": [load.tolist(), load.tolist()]}),
        "arrivals.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"
        "2023-11-16 18:15:50.9,396,109\n",
        "arrivals.jsonl": '{"timestamp": 0, "input_length": 9, "output_length": 3}\n'
        '{"timestamp": 27482, "input_length": 6, "output_length": 5}\n',
        "lengths.csv": "num_prefill_tokens,num_decode_tokens\n5,7\n6,1\n",
        "problem.json": json.dumps(document(load.tolist(), np.load(folder / "plan.npz")["slots"].tolist())),
        "small.json": json.dumps(
            {"format": "moeless-problem", "version": 1, "loads": {"load": load.tolist()},
             "topology": {"gpus_per_node": 4, "slots": 3}}
        ),
        "topology.json": json.dumps(explicit()),
        "uniform.json": json.dumps({"kind": "uniform", "nodes": 2, "gpus_per_node": 2, "slots": 3}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def explicit() -> dict[str, Any]:
    """A topology that uses every key."""
    gpu = {"node": 0, "speed": 1, "slots": 3, "memory": 10**9, "domain": 0}
    return {
        "kind": "explicit",
        "gpus": [gpu, gpu | {"speed": 0.5}, gpu | {"node": 1, "domain": 1}, gpu | {"node": 1}],
        "links": {"intra_node": 1e11, "inter_node": 1e10},
    }


def document(load: list[list[float]], slots: list[Any]) -> dict[str, Any]:
    """A problem that uses nearly every key."""
    return {
        "format": "moeless-problem",
        "version": 1,
        "name": "whole",
        "split": "fractional",
        "fill": "none",
        "share_entries": 16,
        "loads": {
            "kind": "inline",
            "load": [load, [row[::-1] for row in load]],
            "weights": [1, 3],
            "layers": [3, 5],
            "scenarios": ["a", "b"],
            "skipped": [0],
            "source": "s",
            "notes": ["n"],
        },
        "topology": {"kind": "uniform", "nodes": 2, "gpus_per_node": 2, "slots": 3},
        "expert_bytes": [1000, 2000],
        "time": {"kind": "linear", "token_cost": 2.0, "unit": "s"},
        "objective": {"risk": "cvar", "cvar_alpha": 0.5, "balance_tolerance": 0.02},
        "limits": {"max_moves": 9},
        "current": {"kind": "inline", "slots": slots},
        "sizing": {"policy": "slots"},
        "known": {"source": "me", "best": [1, 1], "bound": [0.5, 1]},
    }


# --- mutations ---------------------------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path for key in keys for path in ((*at, key), *places(value[key], (*at, key)))]


def mutate_json(rng: random.Random, raw: bytes) -> bytes:
    """Change values, keys, rows and numbers of a document."""
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = places(value)
        if not paths:
            break
        *parents, last = rng.choice(paths)
        entry = value
        for key in parents:
            entry = entry[key]
        what = rng.randrange(7)
        if what == 0:
            del entry[last]
        elif what == 1 and isinstance(entry, dict):
            entry[rng.choice(("topolgy", ANSI, "x" * 3000, "kind", "load", "path"))] = rng.choice(STRANGE)
        elif what == 2 and isinstance(entry, list):
            entry.extend(copy.deepcopy(entry[last]) for _ in range(rng.choice((1, 2, 300))))
        elif what == 3 and isinstance(entry[last], int | float):
            entry[last] = entry[last] * rng.choice((-1, 0, 1e-300, 1e12, 1e29, 10**12, 0.5, 3))
        elif what == 4 and isinstance(entry[last], list):
            rng.shuffle(entry[last])
        else:
            entry[last] = copy.deepcopy(rng.choice(STRANGE))
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace(": ", ': 1, "twice": 1, "twice": ', 1)
    if rng.random() < 0.02:
        text = "[" * rng.choice((100, 100_000)) + text
    return text.encode()


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut, flip, double, pack, or put before."""
    what = rng.randrange(10)
    at = rng.randrange(len(raw) + 1)
    if what == 0:
        return raw[:at]
    if what == 1:
        return raw[at:]
    if what in (2, 3):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 3, 30))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if what == 4:
        return raw[:at] + rng.randbytes(rng.choice((1, 8, 100))) + raw[at:]
    if what == 5:
        return raw[:at] + raw[rng.randrange(len(raw) + 1) :]
    if what == 6:
        return gzip.compress(raw, mtime=0)[: rng.choice((None, -5))]
    if what == 7:
        return gzip.compress(b"[" + b" " * rng.choice((10**5, 10**8)), compresslevel=1, mtime=0)
    if what == 8:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n ", b"PK", b"\x80\x04", b"\x1f\x8b")) + raw
    return raw.decode("latin-1").encode(rng.choice(("utf-16", "utf-8", "utf-32")))


def mutate_text(rng: random.Random, raw: bytes) -> bytes:
    """Change cells and lines of a table."""
    lines = [line.split(",") for line in raw.decode("latin-1").splitlines()]
    for _ in range(rng.choice((1, 1, 2, 5))):
        line = rng.choice(lines)
        what = rng.randrange(5)
        if what == 0:
            line[rng.randrange(len(line))] = str(rng.choice(STRANGE)).replace("\n", " ")
        elif what == 1:
            line.append("1")
        elif what == 2:
            line.pop()
            line.extend([] if line else ["1"])
        elif what == 3:
            lines.append(list(line))
        else:
            rng.shuffle(lines)
    return "\n".join(",".join(line) for line in lines).encode("utf-8", "surrogatepass")


def mutate_npy(rng: random.Random, array: Any) -> Any:
    """Another type, shape or content."""
    what = rng.randrange(9)
    kinds = ("f2", "f4", "i1", "u8", "c16", "U3", "S4", "?", "f16", "M8[s]", "V4", "O")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            if what == 0:
                return array.astype(rng.choice(kinds))
            if what == 1:
                return array[..., None] if rng.random() < 0.5 else array.reshape(-1)
            if what == 2:
                return array[: rng.randrange(2)]
            if what == 3:
                return np.zeros(rng.choice(((), (0,), (0, 3), (2, 0), (1, 1, 1, 1), (3000, 3000))))
            if what == 4:
                flat = np.array(array, dtype=float)
                flat.flat[rng.randrange(max(flat.size, 1))] = rng.choice(
                    (-1, np.nan, np.inf, 1e308, 0.5, 1e30)
                )
                return flat
            if what == 5:
                return np.asfortranarray(array)
            if what == 6:
                return array.astype(array.dtype.newbyteorder())
            return np.concatenate([array, array]) if what == 7 else array * 0
        except (TypeError, ValueError, IndexError, np.exceptions.AxisError):
            return array


def mutate_npz(rng: random.Random, raw: bytes) -> bytes:
    """Change, drop, add or blow up the arrays of an archive."""
    with np.load(io.BytesIO(raw)) as archive:
        arrays: dict[str, Any] = {key: archive[key] for key in archive.files}
    key = rng.choice(sorted(arrays))
    what = rng.randrange(7)
    if what == 0:
        del arrays[key]
    elif what == 1:
        arrays[rng.choice(("extra", "loads", ANSI.replace("\ud800", "")))] = np.arange(4.0)
    elif what == 2 and key == "document":
        text = mutate_json(rng, arrays[key].tobytes())
        arrays[key] = np.frombuffer(text, np.uint8)
    elif what == 3:
        return bomb(rng, key)
    else:
        arrays[key] = mutate_npy(rng, arrays[key])
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def bomb(rng: random.Random, key: str) -> bytes:
    """An archive that says it is, or is, far larger than its file."""
    shape = rng.choice(("(1099511627776, 8)", "(-1, 8)", "(300000000,)", "(2, 6)", "(0, 10000000000)"))
    kind = rng.choice(("<f8", "|u1", "|O", "|S0"))
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.ljust(117).encode() + b"\n"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        if rng.random() < 0.3:
            for i in range(12_000):
                archive.writestr(f"{i}.npy", b"")
        archive.writestr(f"{key}.npy", head + b"\0" * rng.choice((0, 96, 10**7, 3 * 10**8)))
    return out.getvalue()


def mutated(rng: random.Random, name: str, raw: bytes) -> bytes:
    """A file as a stranger has it."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, raw)
    by_suffix: dict[str, Callable[[random.Random, bytes], bytes]] = {
        ".json": mutate_json, ".csv": mutate_text, ".jsonl": mutate_text, ".npz": mutate_npz,
    }  # fmt: skip
    suffix = Path(name).suffix
    if suffix == ".npy":
        out = io.BytesIO()
        array = mutate_npy(rng, np.load(io.BytesIO(raw)))
        np.save(out, array, allow_pickle=True)
        return out.getvalue()
    return by_suffix[suffix](rng, raw)


# --- command lines -----------------------------------------------------------------------------------------

RECORDED = ("rec.npy", "rec.npz", "rec.csv", "rec.json", "vllm.npz")
VALUES: dict[str, tuple[str, ...]] = {
    "--solver": (*QUICK, "magic", "", ANSI.replace("\ud800", "")),
    "--time": ("0.3", "0", "-1", "nan", "x"),
    "--seed": ("0", "7", "-1", "1.5", "9" * 40),
    "--worst": ("0", "2", "-1", "99"),
    "--slots": ("3", "0", "2", "9,9,8,8", "3,1=2", "-1", "1e9", "99999999999", "x", "3=4"),
    "--memory": ("1GB", "0", "9999TB", "1", "-1", "1e400", "x", "5 MiB"),
    "--reserve": ("1GB", "0", "1", "x"),
    "--speed": ("1", "1,1,0.5,2", "3=0.5", "0", "1e-300", "1e300", "989e12,312e12,1,1", "nan", "x"),
    "--lost": ("0", "1,2", "0-3", "9", "3-1", "", "x"),
    "--model": ("Mixtral-8x7B", "DeepSeek-V3", "Phi-3.5-MoE", "x"),
    "--split": ("equal", "fractional", "x"),
    "--share-entries": ("1", "16", "0", "x"),
    "--fill": ("none", "distinct", "copies", "x"),
    "--sizing": ("slots", "cv=0.2", "makespan=1.05", "memory", "cv=x", "makespan=0", "cv=1e-12", "x"),
    "--max-moves": ("0", "3", "-1", "9" * 30),
    "--max-move-bytes": ("1GB", "0", "x"),
    "--tolerance": ("0", "0.5", "-1", "nan", "1e300"),
    "--scenario": ("0", "a", "9", "chat", "x"),
    "--key": ("chat", "c*", "x", "logical_count", "[", "names"),
    "--steps": ("sum", "keep", "x"),
    "--experts": ("6", "5", "600", "-1", "999999999999"),
    "--layer": ("0", "3", "-1"),
}
OUTPUTS = (
    "out.json", "out.npz", "OUT.JSON", "out", "out.txt", "problem.json", "./small.json", "link.json",
    "dangling.json", "loop.json", "folder", "absent/out.json", "/dev/null", "/dev/full", "-", "a\0b",
    "x" * 300 + ".json", "fold\x1b[31m.json",
)  # fmt: skip
INPUTS = (
    "/dev/zero",
    "/dev/null",
    "loop.json",
    "folder",
    "absent.json",
    "-",
    "a\0b",
    "x" * 300,
    "zero.json",
    "",
)


def command_line(rng: random.Random) -> list[str]:
    """A mode, its files, and some options."""
    file = rng.choice(("problem.json", "problem.json", "small.json", "small.json", *RECORDED))
    argv = [
        file if rng.random() < 0.96 else rng.choice((*INPUTS, "flashlb-equal", "plan.json", "topology.json"))
    ]
    if file in RECORDED:
        argv += rng.choice((["--gpus", "2x2", "--slots", "3"], ["--gpus", "4", "--slots", "3"],
                            ["--topology", "topology.json"], ["--topology", "uniform.json"], []))  # fmt: skip
        if file == "rec.npz":
            argv += ["--key", rng.choice(("chat", "c*"))]
    elif rng.random() < 0.1:
        argv += ["--topology", rng.choice(("topology.json", "uniform.json", "8xH100", *INPUTS))]
    mode = rng.random()
    if mode < 0.1:
        argv += ["--check", rng.choice(("plan.json", "plan.npz") * 4 + INPUTS)]
    elif mode < 0.18:
        argv += [rng.choice(("--bound", "--recommend"))]
    elif mode < 0.24:
        argv += ["--pareto", rng.choice(("moves", "memory", "x"))]
    elif mode < 0.27:
        argv += ["--export", rng.choice(("out.lp", "out.MPS", "out.txt", *OUTPUTS))]
    elif mode < 0.34:
        argv += ["--compare", rng.choice(("static,auto", "eplb,oracle", "static,magic", ",", "moeless,stay"))]
    elif mode < 0.7:
        argv += ["--solver", rng.choice(QUICK)]
    if rng.random() < 0.2:
        argv += ["--current", rng.choice(("plan.json", "plan.npz") * 4 + INPUTS)]
        argv += rng.choice(([], ["--repair"]))
    if rng.random() < 0.6:
        argv += ["-o", rng.choice(OUTPUTS if rng.random() < 0.3 else OUTPUTS[:4])]
    for option in rng.sample(sorted(VALUES), rng.choice((0, 0, 0, 0, 1, 1, 2, 3))):
        some = VALUES[option]
        argv += [option, rng.choice(some if rng.random() < 0.3 else some[: len(some) // 2])]
    argv += [flag for flag, share in (("--json", 0.15), ("--quiet", 0.2)) if rng.random() < share]
    return argv


# --- one case ----------------------------------------------------------------------------------------------


def laid_out(folder: Path, whole: dict[str, bytes]) -> None:
    """Whole files, and what is no file, in an empty folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    for name, raw in whole.items():
        (folder / name).write_bytes(raw)
    (folder / "folder").mkdir()
    (folder / "target.json").write_bytes(b"old")
    for name, target in (
        ("link.json", "target.json"),
        ("dangling.json", "made.json"),
        ("loop.json", "loop.json"),
        ("zero.json", "/dev/zero"),
    ):
        os.symlink(target, folder / name)


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder: links, kinds, bytes."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        else:
            found[path.name] = path.read_bytes() if path.is_file() else stat.S_IFMT(path.stat().st_mode)
    return found


class _Input(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def command_case(rng: random.Random, folder: Path, whole: dict[str, bytes]) -> Outcome:
    """Run ``moeless-solve``, mostly with one file mutated."""
    argv = command_line(rng)
    used = [name for name in argv if name in whole]
    kind, text = "options", ""
    if used and rng.random() < 0.6:
        victim = rng.choice(used)
        (folder / victim).write_bytes(mutated(rng, victim, whole[victim]))
        kind, text = victim, f" (mutated: {victim})"
    if rng.random() < 0.3:
        (folder / "out.json").write_bytes(b"old")
    before = contents(folder)
    given = before.get(rng.choice(used), b"") if used else b""
    out, err, standard = io.StringIO(), io.StringIO(), sys.stdin
    outcome = Outcome(kind, " ".join(map(repr, argv)) + text)
    sys.stdin = _Input(io.BytesIO(given))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            outcome.code = main(argv)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.wrong.append("escaped: " + "".join(traceback.format_exception(error))[-1500:])
        return outcome
    finally:
        sys.stdin = standard
    outcome.wrong = judged(outcome.code, argv, out.getvalue(), err.getvalue(), before, contents(folder))
    return outcome


def judged(
    code: int, argv: list[str], out: str, err: str, before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """What is wrong with what a command left and said."""
    wrong = []
    if code not in CODES:
        wrong.append(f"exit code {code}")
    for name, text in (("stdout", out), ("stderr", err)):
        if not text.replace("\n", "").isprintable():
            bad = next(x for x in text if not x.isprintable() and x != "\n")
            wrong.append(f"{bad!r} on {name}")
        if re.search(r"\b0(\.0+)? (GB|GiB|MiB|KiB)\b", text):
            wrong.append(f"bytes read as nothing on {name}")
    said = [line for line in err.splitlines() if line.startswith("moeless-solve: ")]
    if code == 2 and (len(said) != 1 or err.splitlines()[-1] != said[0]):
        wrong.append(f"{len(said)} lines of error: {err[-500:]!r}")
    if code == 2 and not re.match(r"moeless-solve: [^:]{1,600}: .", said[0] if said else ""):
        wrong.append(f"the error does not say where: {err[-300:]!r}")
    if any(len(line) > 2200 for line in said):
        wrong.append("an error of thousands of characters")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if code != 0 and changed and "--check" not in argv:
        wrong.append(f"failed, and changed {sorted(changed)}")
    if lost := sorted(name for name in before if name not in after):
        wrong.append(f"removed {lost}")
    if left := [name for name in after if name.startswith(".moeless-")]:
        wrong.append(f"left {left}")
    for path in ("/dev/null", "/dev/full", "/dev/zero"):
        if not stat.S_ISCHR(os.stat(path).st_mode):
            wrong.append(f"{path} is no device any more")
    links = {"link.json": "target.json", "dangling.json": "made.json", "loop.json": "loop.json"}
    if any(after.get(name) != target for name, target in links.items()):
        wrong.append("a link was replaced")
    return wrong


def reader_case(rng: random.Random, folder: Path, whole: dict[str, bytes]) -> Outcome:
    """Read a mutated file with the reader that it is for: an answer, or an error that names it."""
    readers: dict[str, Callable[[Any], Any]] = {
        "arrivals.csv": read_arrivals, "arrivals.jsonl": read_arrivals, "lengths.csv": read_lengths,
        "traces.npz": read_token_traces, "plan.json": mo.load_plan, "plan.npz": mo.load_plan,
        "problem.json": mo.load_problem, **dict.fromkeys(RECORDED, mo.read_loads),
    }  # fmt: skip
    name = rng.choice(sorted(readers))
    path = folder / name
    path.write_bytes(mutated(rng, name, whole[name]))
    outcome = Outcome(f"read {name}", name)
    try:
        readers[name](path)
        outcome.code = 0
    except mo.MoelessError as error:
        outcome.code = 2
        if name not in str(error):
            outcome.wrong.append(f"does not name the file: {error}")
        if not str(error).isprintable():
            outcome.wrong.append(f"is no plain line: {str(error)!r}")
    except Exception as error:
        outcome.wrong.append("escaped: " + "".join(traceback.format_exception(error))[-1500:])
    return outcome


def argument_case(rng: random.Random, folder: Path, whole: dict[str, bytes]) -> Outcome:
    """Call `plan` with odd arguments: a plan, or an error of ours."""
    load = np.random.default_rng(0).integers(1, 99, (2, 6)).astype(float)
    kwargs: dict[str, Any] = {"topology": mo.uniform(2, 2, slots=3)}
    options = ("current", "model", "split", "fill", "share_entries", "solver", "balance_tolerance",
               "objective", "limits", "sizing", "time", "expert_bytes", "time_limit", "seed", "name",
               "repair", "topology", "loads")  # fmt: skip
    for key in rng.sample(options, rng.choice((1, 1, 2))):
        kwargs[key] = odd(rng, key, load)
    loads = kwargs.pop("loads", load)
    outcome = Outcome("arguments", f"loads={loads!r}, {kwargs!r}"[:1000])
    here = os.getcwd()
    os.chdir(folder)
    try:
        mo.plan(loads, **kwargs)
        outcome.code = 0
    except mo.MoelessError as error:
        outcome.code = 2
        if not str(error).isprintable() or len(str(error)) > 2200:
            outcome.wrong.append(f"is no plain line: {str(error)[:300]!r}")
    except Exception as error:
        outcome.wrong.append("escaped: " + "".join(traceback.format_exception(error))[-1500:])
    finally:
        os.chdir(here)
    return outcome


def odd(rng: random.Random, key: str, load: Any) -> Any:
    """Something that might be meant by an argument."""
    records: dict[str, Any] = {
        "objective": mo.Objective,
        "limits": mo.Limits,
        "sizing": mo.Sizing,
        "time": mo.TimeModel,
    }
    if key in records and rng.random() < 0.8:
        names = sorted(records[key].__dataclass_fields__)
        try:
            return records[key](**{rng.choice(names): rng.choice(STRANGE)})
        except mo.MoelessError:
            return None
    if key == "loads" and rng.random() < 0.7:
        mask = np.random.default_rng(rng.randrange(99)).random(load.shape) < 0.3
        return rng.choice((
            np.ma.masked_array(load, mask), load.astype(object), load.tolist(), load[0], load[None, None],
            load > 50, load.astype(np.longdouble) * np.longdouble("1e4000"), load * 1e29, load * 1e-300,
            load * 0, -load,
            [[1, 2], [3]], np.array([[1, None]], object), load.astype("f2"), load[:, :0], "rec.npz",
            "problem.json", "plan.npz", b"rec.npy", Path("rec.csv"), {"layer": [0]}, iter([1]),
            load.astype("M8[s]"), mo.Loads,
        ))  # fmt: skip
    if key == "topology" and rng.random() < 0.7:
        document = json.dumps(rng.choice((explicit(), {"gpus_per_node": 4, "slots": 3}))).encode()
        try:
            return json.loads(mutate_json(rng, document))
        except (ValueError, RecursionError):
            return document
    if key == "current" and rng.random() < 0.7:
        return rng.choice(
            ("plan.npz", Path("plan.json"), "absent", np.zeros((2, 4, 3), int), [[[0]]], load, 5)
        )
    if key == "solver":
        return rng.choice((*QUICK, None, 5, "x", "", mo.Problem, ["auto"]))
    return copy.deepcopy(rng.choice(STRANGE))


def run_case(seed: int, number: int, folder: Path, whole: dict[str, bytes]) -> Outcome:
    """Run one case; the folder is emptied first, and is the working folder meanwhile."""
    rng = random.Random(f"{seed}/{number}")
    laid_out(folder, whole)
    here = os.getcwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            draw = rng.random()
            case = command_case if draw < 0.6 else reader_case if draw < 0.8 else argument_case
            return case(rng, folder, whole)
    finally:
        os.chdir(here)
