"""The package as a whole: what its import costs, what its wheel holds, which way its imports run."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
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


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("*.py"))
    assert found
    return found


def test_no_source_imports_a_folder_bare() -> None:
    folders = [".", "problems", "solvers", "runtime"]
    for path in [p for folder in folders for p in sources(folder)]:
        bare = {name.split(".")[0] for name in imports_of(path)} & NAMES
        assert not bare, f"{path} imports {bare} bare: import moeless_opt.{min(bare)}"


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("problems", ("moeless_opt.solvers", "moeless_opt.runtime", "moeless_opt.api", "moeless_opt.cli")),
        ("solvers", ("moeless_opt.runtime", "moeless_opt.api", "moeless_opt.cli")),
        (".", ("moeless_opt.runtime",)),
    ],
)
def test_imports_run_one_way(folder: str, banned: tuple[str, ...]) -> None:
    for path in sources(folder):
        wrong = [name for name in imports_of(path) if name.startswith(banned)]
        assert not wrong, f"{path} imports {wrong}"


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
                and path.suffix in (".py", ".json", ".npz", ".typed")
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
