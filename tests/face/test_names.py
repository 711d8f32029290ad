"""No two public things of one name: who reads `Policy` or `Limits` anywhere knows which is meant."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import moeless_opt as mo

PACKAGE = Path(mo.__file__).resolve().parent
CONTRACTS = {"accepts", "adopt", "check", "main"}
"""By contract in every file of a kind: engines' `accepts` and `adopt`, parts' `check`, commands' `main`."""


def sources() -> list[tuple[str, Path]]:
    """Every file of the package by its name in it."""
    found = []
    for folder in (PACKAGE, *((PACKAGE / name).resolve() for name in ("problems", "solvers", "runtime"))):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if folder != PACKAGE or len(inside.parts) == 1:
                found.append((f"{folder.name}/{inside.as_posix()}", path))
    return found


def public(tree: ast.Module) -> list[str]:
    """What a file's ``__all__`` lists, and its public classes and functions where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_no_two_public_names_are_alike() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for title, path in sources():
        if not path.name.startswith(
            "_"
        ):  # a face shows what stands in the files below it; _files are private
            for name in public(ast.parse(path.read_text(encoding="utf-8"))):
                where[name].append(title)
    assert len(where) > 300
    twins = {name: files for name, files in where.items() if len(files) > 1 and name not in CONTRACTS}
    assert not twins, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(twins.items()))


def test_array_types_are_named_in_one_place() -> None:
    alias = re.compile(r"^\w+ = NDArray\[", re.MULTILINE)
    found = [title for title, path in sources() if alias.search(path.read_text(encoding="utf-8"))]
    assert found == ["problems/arrays.py"]
