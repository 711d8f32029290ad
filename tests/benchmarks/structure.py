"""The shape of the code, as figures: rooms, arrows, circles, long functions, the way of an argument.

``python tests/benchmarks/structure.py [--tree FOLDER]`` reads a source tree (this one by default);
``--walk`` runs `plan`, the command line and a controller's planner and prints through which files `loads` and
`problem` go.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

FOLDERS = ("problems", "solvers", "runtime", "moeless_opt")
RUN = 6
"""Lines that two places share before they count as one thing said twice."""


def sources(tree: Path) -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for folder in FOLDERS:
        pattern = "*.py" if folder == "moeless_opt" else "**/*.py"
        for path in sorted((tree / folder).glob(pattern)):
            parts = path.relative_to(tree).with_suffix("").parts
            name = ".".join(parts if folder == "moeless_opt" else ("moeless_opt", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules that it imports, for types and lazily too."""
    out: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        if path.name == "__init__.py":
            continue  # a face names its own files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            out[name] |= {target for target in targets if target in modules and target != name}
    return out


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node."""
    import networkx as nx

    directed = nx.DiGraph([(a, b) for a, targets in graph.items() for b in targets])
    return sorted(sorted(part) for part in nx.strongly_connected_components(directed) if len(part) > 1)


def functions(modules: dict[str, Path]) -> list[tuple[int, int, str]]:
    """(lines, parameters, name) of every function outside the compiled kernels."""
    found = []
    for name, path in modules.items():
        if "kernels" in path.name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                parameters = len(a.posonlyargs + a.args + a.kwonlyargs) - (
                    bool(a.args) and a.args[0].arg in ("self", "cls")
                )
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((lines, parameters, f"{name}.{node.name}"))
    return found


def said_twice(modules: dict[str, Path]) -> int:
    """Pairs of places that share a run of `RUN` lines of code or more, white space aside."""
    at: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, path in modules.items():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [
            (i, line)
            for i, line in enumerate(lines)
            if len(line) > 3 and not line.startswith(("#", "from ", "import "))
        ]
        for k in range(len(kept) - RUN + 1):
            at[tuple(line for _, line in kept[k : k + RUN])].append((name, k))
    pairs = set()
    for places in at.values():
        for x, (a, i) in enumerate(places):
            pairs |= {(a, b, i - j) for b, j in places[x + 1 :] if (a, i) != (b, j)}
    return len(pairs)


def show_shape(tree: Path) -> None:
    """Print the figures of a tree."""
    modules = sources(tree)
    graph = arrows(modules)
    rooms = Counter(str(path.parent.relative_to(tree)) for path in modules.values())
    print("files per folder: " + ", ".join(f"{room} {count}" for room, count in sorted(rooms.items())))
    between = {
        (str(modules[a].parent.relative_to(tree)), str(modules[b].parent.relative_to(tree)))
        for a, targets in graph.items()
        for b in targets
    }
    folders = sum(a != b for a, b in between)
    print(f"arrows between files {sum(map(len, graph.values()))}, between folders {folders}")
    found = circles(graph)
    print(f"circles of files: {len(found)}" + "".join(f"\n  {', '.join(part)}" for part in found))
    every = functions(modules)
    print("longest functions: " + ", ".join(f"{name} {n}" for n, _, name in sorted(every, reverse=True)[:3]))
    print(f"functions over 80 lines: {sum(n > 80 for n, _, _ in every)}")
    most = sorted(every, key=lambda one: (-one[1], one[2]))[:3]
    print("most parameters: " + ", ".join(f"{name} {count}" for _, count, name in most))
    print(f"functions over 10 parameters: {sum(count > 10 for _, count, _ in every)}")
    print(f"places that share {RUN} lines or more: {said_twice(modules)} pairs")


class Walk:
    """Files whose functions are handed the loads (any array of them) or the problem, in order."""

    def __init__(self, tree: Path) -> None:
        self.tree = str(tree) + os.sep
        self.way: dict[str, list[str]] = {"loads": [], "problem": []}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Note a call."""
        if event != "call":
            return
        file = os.path.realpath(frame.f_code.co_filename)
        if not file.startswith(self.tree) or "/tests/" in file or file.endswith(">"):
            return
        code = frame.f_code
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            way = self.way.get("loads" if name.startswith("load") else name)
            here = file.removeprefix(self.tree)
            if way is not None and (not way or way[-1] != here):
                way.append(here)

    def tell(self, title: str) -> None:
        """Print the ways: first visits in order, and how often the object changed files."""
        for kind, way in self.way.items():
            first = list(dict.fromkeys(way))
            print(f"{title}, {kind}: {len(way)} stops in {len(first)} files: {' -> '.join(first)}")


def walk(tree: Path) -> None:
    """Run the three ways in and print what `loads` and `problem` pass through."""
    import numpy as np

    import moeless_opt as mo

    load_LE = np.random.default_rng(0).lognormal(0, 1, (4, 16)) * 1e6
    topology = mo.uniform(1, 8, slots=3)
    live = mo.plan(load_LE, topology)

    def command_line() -> None:
        sys.argv = ["moeless-solve", "mixtral-lognormal", "--quiet"]
        try:
            runpy.run_module("moeless_opt.cli", run_name="__main__")
        except SystemExit as done:
            print(f"exit code {done.code}")

    ways = {
        "plan(loads)": lambda: mo.plan(load_LE, topology),
        "plan(loads, current)": lambda: mo.plan(load_LE[:, ::-1].copy(), topology, current=live),
        "moeless-solve": command_line,
        "planner of the controller": lambda: planned(topology, load_LE, live),
    }
    for title, go in ways.items():
        watch = Walk(tree)
        sys.setprofile(watch)
        try:
            go()
        finally:
            sys.setprofile(None)
        watch.tell(title)


def planned(topology: Any, load_LE: Any, live: Any) -> None:
    """What a controller does when a window ends."""
    from moeless_opt.runtime import Planner

    Planner(topology=topology)(load_LE[:, ::-1].copy(), live.slots_LGC)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument(
        "--walk", action="store_true", help="run the code of the tree and follow the arguments"
    )
    args = parser.parse_args()
    tree = args.tree.resolve()
    if args.walk:
        sys.path.insert(0, str(tree))
        walk(tree)
    else:
        show_shape(tree)


if __name__ == "__main__":
    main()
