"""The package as a whole: what its import costs, what its wheel holds, which way its imports run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import moeless_opt as mo

TREE = Path(__file__).resolve().parents[2]
PACKAGE = Path(mo.__file__).resolve().parent
HEAVY = {
    "torch",
    "megatron",
    "numba",
    "matplotlib",
    "networkx",
    "pulp",
    "transformers",
    "scipy",
    "pandas",
    "tqdm",
    "ortools.sat.python.cp_model",
}
NAMES = {"problems", "solvers", "runtime"}


def modules_after(statement: str) -> set[str]:
    """All modules that a fresh interpreter has after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import moeless_opt",
        "import moeless_opt.cli",
        "import moeless_opt\nmoeless_opt.load_instance('mixtral-zipf')",
        "import moeless_opt as mo\nmo.plan([[4, 3, 2, 1]], mo.uniform(1, 2, slots=2), solver='static')",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    loaded = modules_after(statement)
    assert "moeless_opt.api" in loaded
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_bare_folders_are_never_imported() -> None:
    assert not modules_after("import moeless_opt.cli") & NAMES


# --- which way imports run ---------------------------------------------------------------------------------

ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "problems": (
        ("text",),
        ("errors",),
        ("arrays",),
        ("codec", "files"),
        ("spec",),
        ("plan",),
        ("io",),
        ("instances",),
    ),
    "solvers": (
        ("twins",),
        ("shares",),
        ("core",),
        ("pack", "migration"),
        ("limits",),
        ("nearest",),
        ("construct", "baselines"),
        ("replan", "exact"),
        ("sizing",),
        ("timed", "lexicographic"),
        ("locality",),
        ("auto",),
    ),
    "runtime": (
        ("control", "pool", "checkpoint"),
        ("live",),
        ("engines",),
        ("predict",),
        ("simulate",),
        ("tiny_moe",),
        ("gpu_check",),
        ("serve",),
    ),
}
"""Rooms of each folder, floor by floor: a module imports its own room and those of lower floors."""

RUNTIME_MAY_USE = ("core", "shares", "timed", "migration", "pack.fast", "twins")
"""Of the solvers."""


def all_sources() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    found = {}
    for folder in (".", *sorted(NAMES)):
        # The folders are links in the source tree, which a walk from above would not follow.
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            if folder == "." and parts[0] in NAMES:
                continue
            found[".".join(("moeless_opt", *parts)).removesuffix(".__init__")] = path
    return found


SOURCES = all_sources()


def public_names() -> dict[str, dict[str, str]]:
    """Room -> public name -> module that it lives in, as the stub of the room's face says."""
    faces = {}
    for module, path in SOURCES.items():
        stub = path.with_suffix(".pyi")
        if path.name == "__init__.py" and stub.exists():
            names = {}
            for node in ast.parse(stub.read_text(encoding="utf-8")).body:
                assert isinstance(node, ast.ImportFrom)
                assert node.level == 1
                for alias in node.names:
                    names[alias.name] = f"{module}.{node.module or alias.name}"
            faces[module] = names
    return faces


FACES = public_names()


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules that a file names in its imports, wherever they stand: inside functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            behind = FACES.get(node.module or "", {})
            homes = {behind[alias.name] for alias in node.names if alias.name in behind}
            found |= homes | (whole & SOURCES.keys()) or {node.module or ""}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def test_every_folder_is_walked() -> None:
    assert len(SOURCES) > 150
    for name, folder in (("solvers", "exact"), ("runtime", "live"), ("problems", "spec")):
        assert any(module.startswith(f"moeless_opt.{name}.{folder}.") for module in SOURCES)


def test_no_source_imports_a_folder_bare() -> None:
    for path in SOURCES.values():
        bare = {name.split(".")[0] for name in imports_of(path)} & NAMES
        assert not bare, f"{path} imports {bare} bare: import moeless_opt.{min(bare)}"


@pytest.mark.parametrize(
    ("folder", "banned"),
    [("problems", ("solvers", "runtime", "face")), ("solvers", ("runtime", "face")), ("face", ("runtime",))],
)
def test_imports_run_one_way_between_folders(folder: str, banned: tuple[str, ...]) -> None:
    for module, path in SOURCES.items():
        if top_of(module) != folder:
            continue
        wrong = [
            name for name in imports_of(path) if name.startswith("moeless_opt") and top_of(name) in banned
        ]
        assert not wrong, f"{module} imports {wrong}"


def top_of(module: str) -> str:
    """problems, solvers, runtime, or the face."""
    second = f"{module}.".split(".")[1]
    return second if second in NAMES else "face"


def room_of(module: str) -> str:
    """The room inside a folder: ``exact`` of ``moeless_opt.solvers.exact.layer``."""
    return f"{module}..".split(".")[2]


@pytest.mark.parametrize("folder", ORDER)
def test_imports_run_one_way_between_rooms(folder: str) -> None:
    floor = {room: number for number, rooms in enumerate(ORDER[folder]) for room in rooms}
    for module, path in SOURCES.items():
        room = room_of(module)
        if top_of(module) != folder or not room:
            continue
        assert room in floor, f"{module} is in a room that has no floor"
        for name in imports_of(path):
            other = room_of(name) if name.startswith(f"moeless_opt.{folder}.") else room
            assert other == room or floor[other] < floor[room], f"{module} imports {name}"


def test_rooms_use_each_other_by_their_faces() -> None:
    """A file is private to its room unless the room's face names it, or the name that is imported."""
    for module, path in SOURCES.items():
        home = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module not in SOURCES:
                continue
            target = SOURCES[node.module]
            room = node.module if target.name == "__init__.py" else node.module.rpartition(".")[0]
            if room == home or room not in FACES or home == "moeless_opt.runtime":
                continue
            names = {alias.name for alias in node.names}
            public = node.module in FACES[room].values() and node.module.rpartition(".")[2] in FACES[room]
            fine = public if node.module != room else names <= FACES[room].keys()
            assert fine, f"{module} imports {sorted(names)} of {node.module}: not in the face of its room"


def test_every_room_has_a_face_that_keeps_its_word() -> None:
    assert len(FACES) >= 20
    for room, names in FACES.items():
        face = importlib.import_module(room)
        assert face.__doc__, room
        assert sorted(face.__all__) == sorted(names), room
        if not room.startswith("moeless_opt.runtime"):  # its parts need torch
            for name in names:
                assert getattr(face, name) is not None


def test_the_runtime_uses_of_the_solvers_what_it_may() -> None:
    may = tuple(f"moeless_opt.solvers.{room}." for room in RUNTIME_MAY_USE)
    for module, path in SOURCES.items():
        if top_of(module) == "runtime":
            used = [name for name in imports_of(path) if name.startswith("moeless_opt.solvers")]
            wrong = [name for name in used if not f"{name}.".startswith(may)]
            assert not wrong, f"{module} imports {wrong}"


def test_no_imports_in_a_circle() -> None:
    """Whole package, imports for types alone and inside functions counted."""
    uses = {
        module: sorted(name for name in imports_of(path) if name in SOURCES and name != module)
        for module, path in SOURCES.items()
    }
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        circle = " -> ".join((*way[way.index(module) :], module)) if module in way else ""
        assert not circle, f"a circle: {circle}"
        for name in uses[module]:
            visit(name, (*way, module))
        state[module] = 2

    for module in uses:
        visit(module, ())


# --- sizes -------------------------------------------------------------------------------------------------

LONGEST = 80
LONG = {"moeless_opt.api.plan"}
"""Functions of more lines than that, docstring and all; the list only shrinks."""


def is_compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Numba compiles the function, for which splitting it costs time."""
    return any("jit" in ast.unparse(one) for one in node.decorator_list)


def test_no_function_is_long() -> None:
    long = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_compiled(node):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST:
                    long.add(f"{module}.{node.name}")
    assert long == LONG, f"too long: {sorted(long ^ LONG)}"


def test_everything_public_is_there_and_documented() -> None:
    for name in mo.__all__:
        thing = getattr(mo, name)
        if callable(thing):
            assert thing.__doc__, name
    assert mo.__version__


def data_files() -> set[str]:
    """Every file of the source tree that the package needs, by its name in the wheel."""
    wanted = {"moeless_opt/py.typed"}
    for folder in (".", *NAMES):
        root = TREE / ("moeless_opt" if folder == "." else folder)
        for path in root.rglob("*"):
            inside = path.relative_to(root)
            if (
                path.is_file()
                and path.suffix in (".py", ".pyi", ".json", ".npz", ".typed")
                and "__pycache__" not in path.parts
            ):
                if folder == "." and inside.parts[0] in NAMES:
                    continue
                prefix = "moeless_opt" if folder == "." else f"moeless_opt/{folder}"
                wanted.add(f"{prefix}/{inside.as_posix()}")
    return wanted


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (TREE / "pyproject.toml").is_file():
        pytest.skip("the source tree is not here")
    if find_spec("build") is None or find_spec("hatchling") is None:
        pytest.skip("build and hatchling are needed to build a wheel without a network")
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(TREE)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("moeless_opt-*.whl")
    return path


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {entry.filename: entry for entry in archive.infolist()}
    wanted = data_files()
    assert len([name for name in wanted if "/instances/" in name]) >= 20
    assert len([name for name in wanted if "/schema/" in name]) == 3
    assert wanted <= inside.keys(), sorted(wanted - inside.keys())
    for name in wanted:
        mode = inside[name].external_attr >> 16
        assert mode & 0o170000 in (0, 0o100000), f"{name} is not a real file"
    tops = {name.split("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moeless_opt"}


def test_the_wheel_works_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "moeless-solve = moeless_opt.cli:main" in archive.read(points).decode()
    done = subprocess.run(
        [sys.executable, "-m", "moeless_opt.cli", "flashlb-fractional", "--json", "--quiet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["certificate"]["status"] == "optimal"


def test_links_of_the_source_tree() -> None:
    if not (TREE / "moeless_opt" / "problems").exists():
        pytest.skip("the source tree is not here")
    for name in sorted(NAMES):
        link = TREE / "moeless_opt" / name
        assert link.is_symlink(), f"{link} must be a symlink (git config core.symlinks true)"
        assert os.readlink(link) == f"../{name}"
