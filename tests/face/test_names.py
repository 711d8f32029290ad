"""No two public things of one name: who reads `Policy` or `Limits` anywhere knows which is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import moeless_opt as mo

PACKAGE = Path(mo.__file__).resolve().parent
CONTRACTS = {"accepts", "adopt", "main"}
"""What every file of a kind has by contract: engines' `accepts` and `adopt`, commands' `main`."""


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
    folders = [PACKAGE, *((PACKAGE / name).resolve() for name in ("problems", "solvers", "runtime"))]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if path.name.startswith("_") or (folder == PACKAGE and len(inside.parts) > 1):
                continue  # a face shows what stands in the files below it; _files are private
            for name in public(ast.parse(path.read_text(encoding="utf-8"))):
                where[name].append(f"{folder.name}/{inside.as_posix()}")
    assert len(where) > 300
    twins = {name: files for name, files in where.items() if len(files) > 1 and name not in CONTRACTS}
    assert not twins, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(twins.items()))
