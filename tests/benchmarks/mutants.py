"""What the tests notice: ``python tests/benchmarks/mutants.py --room problems/plan --sample 30 --seed 1``.

Changes one operator, number, loop or extremum of one file at a time (the operators are cosmic-ray's, of the
extra ``mutants``), in a copy of the tree, and runs the tests that mirror the file, its own first, until one
fails. Prints what was caught, what survived and how. Mutants that change nothing which a test could see stand
with the reason in ``mutants.toml`` beside this file, with the tests of files that are mirrored by none.

A place is drawn first, then one change of it, so that rich operators weigh no more than poor ones.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[2]
KNOWN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
MEMORY = 12 << 30  # bytes of addresses that a run of tests may take

_SWAPPED = """
    Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd BitXor_BitOr
    LShift_RShift RShift_LShift
"""
_COMPARED = """
    Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq Eq_GtE Eq_LtE NotEq_Eq NotEq_Gt NotEq_Lt
    Is_IsNot IsNot_Is
"""
_OTHERS = """
    ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Invert ReplaceUnaryOperator_Delete_Not AddNot
    ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue
    ReplaceContinueWithBreak ExceptionReplacer NumberReplacer ZeroIterationForLoop
"""
_TWINS = [("max", "min"), ("maximum", "minimum"), ("any", "all"), ("argmax", "argmin"), ("floor", "ceil")]
TWIN = dict(_TWINS) | {there: here for here, there in _TWINS}


class Extremum(Operator):
    """Takes the least for the largest, any for all, down for up, and back."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Names of functions that have a twin, where they are called."""
        if node.type == "name" and node.value in TWIN:
            after = node.get_next_leaf()
            if after is not None and after.value in ("(", "."):
                yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Put the twin's name."""
        node.value = TWIN[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """None: they are for the tester's own tests."""
        return ()


NAMES = [
    *(f"ReplaceBinaryOperator_{name}" for name in _SWAPPED.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in _COMPARED.split()),
    *_OTHERS.split(),
]
OPERATORS: dict[str, Operator] = {name: get_operator(f"core/{name}")() for name in NAMES}
OPERATORS["Extremum"] = Extremum()


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file: the operator and which of its occurrences."""

    file: str
    line: int
    operator: str
    occurrence: int

    def code(self, source: str) -> str | None:
        """The file with the change; None if it is no change of what runs."""
        changed = mutate_code(source, OPERATORS[self.operator], self.occurrence)
        if changed is None or _same_code(source) == _same_code(changed):
            return None
        return None if _ranked_texts(changed) > _ranked_texts(source) else changed


class _Plain(ast.NodeTransformer):
    """Leaves out what never runs: annotations, and how a decorator stores or caches."""

    def visit(self, node: ast.AST) -> Any:
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
        if hasattr(node, "decorator_list"):
            node.decorator_list = [
                one.func if isinstance(one, ast.Call) else one for one in node.decorator_list
            ]
        return self.generic_visit(node)


def _same_code(source: str) -> str:
    try:
        return ast.dump(_Plain().visit(ast.parse(source)))
    except SyntaxError:
        return ""


def _ranked_texts(source: str) -> int:
    """How often a text is asked whether it comes before another: names are equal or not."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return 0
    return sum(
        isinstance(node, ast.Compare)
        and any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
        and any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in node.comparators)
        for node in nodes
    )


def mutants_of(file: str, source: str) -> dict[tuple[int, int], list[Mutant]]:
    """All changes of a file by place."""
    found: dict[tuple[int, int], list[Mutant]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in OPERATORS.items():
        positions = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(positions):
            found.setdefault(start, []).append(Mutant(file, start[0], name, occurrence))
    return found


def sample(files: Iterable[str], size: int, seed: int) -> list[tuple[Mutant, str, str]]:
    """Mutants drawn over the places of all files, with the new source and the two lines that differ."""
    rng = random.Random(seed)
    places = [
        sorted(group, key=lambda one: (one.operator, one.occurrence))
        for file in sorted(files)
        for _, group in sorted(mutants_of(file, (ROOT / file).read_text()).items())
    ]
    rng.shuffle(places)
    drawn: list[tuple[Mutant, str, str]] = []
    for group in places:
        if len(drawn) == size:
            break
        rng.shuffle(group)
        for mutant in group:
            source = (ROOT / mutant.file).read_text()
            code = mutant.code(source)
            if code is not None and _same_code(code):
                drawn.append((mutant, code, _difference(source, code)))
                break
    return drawn


def _difference(source: str, code: str) -> str:
    """The lines that differ, as ``old => new``."""
    old, new = source.splitlines(), code.splitlines()
    pairs = [
        (a.split("  #")[0].strip(), b.split("  #")[0].strip())
        for a, b in zip(old, new, strict=False)
        if a != b
    ]
    return " / ".join(f"{a} => {b}" for a, b in pairs[:2])


def reason(mutant: Mutant, difference: str) -> str | None:
    """Why a mutant can't be seen, if it is known."""
    for one in KNOWN["equivalent"]:
        if one["file"] not in (mutant.file, "any"):
            continue
        if difference == one.get("change") or difference.split(" => ")[0] == one.get("line"):
            return str(one["why"])
        if "pattern" in one and re.search(one["pattern"], difference):
            return str(one["why"])
    return None


def stale() -> list[str]:
    """Known mutants whose line is no longer in its file."""
    found = []
    for one in KNOWN["equivalent"]:
        line = one.get("line", one.get("change", "").split(" => ")[0])
        path = ROOT / one["file"]
        lines = path.read_text().splitlines() if path.is_file() else []
        if line and line not in [text.split("  #")[0].strip() for text in lines]:
            found.append(f"{one['file']}: {line}")
    return found


@cache
def tests_of(file: str, own_only: bool) -> tuple[list[str], list[str]]:
    """Test files that can notice a change of `file`: its own, then the others."""
    path = Path(file)
    mirror = Path("tests") / path.parent
    own = mirror / f"test_{path.stem.lstrip('_')}.py"
    named = [Path(one) for one in KNOWN["tests"].get(file, [])]
    folder = KNOWN["tests"].get(f"{path.parent.as_posix()}/", [])
    # A mirrored test of a part has the part's name and more: test_bounds_oracle.py.
    parts = sorted(mirror.glob(f"test_{path.stem.lstrip('_')}_*.py")) if mirror.is_dir() else []
    rest = sorted(mirror.glob("test_*.py")) if mirror.is_dir() else []
    late = KNOWN["late"]
    listed = dict.fromkeys(one.as_posix() for one in (*parts, own, *named, *rest, *map(Path, folder)))
    listed = [one for one in listed if (ROOT / one).is_file()]
    chosen = {one.as_posix() for one in (*parts, *named, own)} - set(late)
    first = [one for one in listed if one in chosen]
    others = sorted((one for one in listed if one not in chosen), key=lambda one: one in late)
    return first, [] if own_only and first else others


class Copy:
    """A copy of the tree in which mutants are tried one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            source, target = ROOT / name, folder / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def run(self, tests: list[str], seconds: float | None, fresh: bool = False) -> tuple[int, float, str]:
        """Exit code (-1: out of time), processor seconds of a run of tests, and what failed."""
        kernels = tempfile.mkdtemp(dir=self.folder.parent) if fresh else str(self.folder.parent / "kernels")
        env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": kernels}
        env.setdefault("MOELESS_DATA", str(ROOT.parent / "shared" / "data"))
        if seconds is not None:
            env["PYTHONDONTWRITEBYTECODE"] = "1"  # two changes in one second would look like one to a .pyc
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=no",
            "-p",
            "no:cacheprovider",
        ]
        child = subprocess.Popen(
            [*command, "--hypothesis-profile=mutants", *tests],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=partial(_limit, seconds),
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            output, _ = child.communicate(timeout=None if seconds is None else 20 * seconds)
            code = child.returncode
        except subprocess.TimeoutExpired:
            code, output = -1, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if fresh:
                shutil.rmtree(kernels, ignore_errors=True)
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return code, took, failed[0] if failed else output[-300:]


def _limit(seconds: float | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 6))


Stages = dict[str, list[tuple[list[str], float]]]
"""By file: its tests in the order of their runs, and the processor seconds that each run may take."""


def stages_of(copy: Copy, files: Iterable[str], own: bool) -> Stages:
    """Run the tests of files as they are: they must pass, and say how long they take."""
    seconds: dict[tuple[str, ...], float] = {}
    stages: Stages = {}
    for file in files:
        stages[file] = []
        for tests in tests_of(file, own):
            if tests and tuple(tests) not in seconds:
                code, took, failed = copy.run(tests, None)
                if code != 0:
                    raise SystemExit(f"without any change the tests of {file} fail: {failed}")
                seconds[tuple(tests)] = 3 * took + 20
            if tests:
                stages[file].append((tests, seconds[tuple(tests)]))
        if not stages[file]:
            raise SystemExit(f"no test mirrors {file}: name some in mutants.toml")
    return stages


def judge(copy: Copy, mutant: Mutant, code: str, stages: Stages) -> tuple[str, str]:
    """What becomes of a mutant: caught, late or survived; and which test failed."""
    target = copy.folder / mutant.file
    try:
        target.write_text(code)
        for tests, seconds in stages[mutant.file]:
            rc, _, failed = copy.run(tests, seconds, fresh="njit" in code)
            if rc != 0:
                return ("late", "") if rc in (-1, -signal.SIGXCPU) else ("caught", failed)
        return "survived", ""
    finally:
        shutil.copy2(ROOT / mutant.file, target)


def main() -> int:
    """Draw mutants, run their tests, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--room", nargs="+", required=True, help="folders or files, from the top folder")
    parser.add_argument("--sample", type=int, default=30, help="mutants per room (default 30)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--wanted", type=float, default=0.0, help="exit 1 where fewer per cent are caught")
    parser.add_argument("--own", action="store_true", help="only the tests of each file's own: quicker")
    parser.add_argument("--list", action="store_true", help="only print what would be tried")
    args = parser.parse_args()
    for text in stale():
        print(f"mutants.toml is out of date, {text}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        copies = [] if args.list else [Copy(Path(work) / str(job) / "tree") for job in range(args.jobs)]
        for room in args.room:
            files = _files(room)
            drawn = sample(files, args.sample, args.seed)
            if args.list:
                for mutant, _, difference in drawn:
                    print(f"{mutant.file}:{mutant.line} {mutant.operator}: {difference}")
                continue
            rows.append((room, _try(copies, drawn, args.own)))
    heads = ("mutants", "caught", "late", "survived", "equivalent")
    print("\n" + f"{'room':42}" + "".join(f"{head:>12}" for head in heads) + f"{'caught':>9}")
    short = False
    for room, ends in rows:
        told = sum(ends.values()) - ends["equivalent"]
        rate = 100 * (ends["caught"] + ends["late"]) / max(told, 1)
        short |= rate < args.wanted
        counts = [sum(ends.values()), *(ends[head] for head in heads[1:])]
        print(f"{room:42}" + "".join(f"{count:12}" for count in counts) + f"{rate:8.1f}%")
    return int(short)


def _files(room: str) -> list[str]:
    path = ROOT / room
    if not path.exists():
        raise SystemExit(f"--room: there is no {room} (give a folder or a file, such as problems/plan)")
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [one.relative_to(ROOT).as_posix() for one in found if one.name != "__init__.py"]


def _try(copies: list[Copy], drawn: list[tuple[Mutant, str, str]], own: bool) -> Counter[str]:
    """Run the tests of every mutant; print what survives as it does."""
    known = [(mutant, reason(mutant, difference)) for mutant, _, difference in drawn]
    ends: Counter[str] = Counter(equivalent=sum(why is not None for _, why in known))
    work = [one for one, (_, why) in zip(drawn, known, strict=True) if why is None]
    stages = stages_of(copies[0], dict.fromkeys(mutant.file for mutant, _, _ in work), own)

    def some(job: int) -> list[str]:
        return [_tell(copies[job], *one, stages) for one in work[job :: len(copies)]]

    with ThreadPoolExecutor(len(copies)) as pool:
        for told in pool.map(some, range(len(copies))):
            ends.update(told)
    return ends


def _tell(copy: Copy, mutant: Mutant, code: str, difference: str, stages: Stages) -> str:
    """Judge a mutant and print its line."""
    end, failed = judge(copy, mutant, code, stages)
    text = difference if end != "caught" else failed[:110]
    print(f"{end:9}{mutant.file}:{mutant.line} {mutant.operator}: {text}", flush=True)
    return end


if __name__ == "__main__":
    sys.exit(main())
