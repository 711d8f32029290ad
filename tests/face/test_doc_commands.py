"""The commands of the documentation run, one after the other, and print what the pages say they do.

``UPDATE_DOCS=1 python -m pytest tests/face/test_doc_commands.py`` writes what they print now into the pages.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moeless_opt.cli import main
from moeless_opt.runtime.predict import cli as forecast
from moeless_opt.runtime.serve import cli as serve
from moeless_opt.runtime.simulate import advise_cli as advise
from moeless_opt.runtime.simulate import cli as simulate

TREE = Path(__file__).resolve().parents[2]
PAGES = [page for page in (TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))) if page.is_file()]
if not PAGES:
    pytest.skip("the documentation is not here", allow_module_level=True)

BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = "$ moeless-solve "


def has_commands(page: Path) -> bool:
    """Whether something of the page is to be run here."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return any((kind == "sh" and "moeless-" in body) or body.startswith(SHOWN) for kind, body in found)


def settled(text: str) -> list[str]:
    """Output without what varies by machine (times), and without the widths that follow from it."""
    text = re.sub(r"\d+(\.\d+)? (us|ms|s)\b", "TIME", text)
    lines = [re.sub(r"-{2,}", "--", re.sub(r"\s+", " ", line)).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def commands(body: str) -> list[str]:
    """The single commands of a block of shell lines."""
    lines = [re.sub(r"\s+#.*$", "", line) for line in body.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&?(?:\s|$)", line)]
    return [part for part in parts if part.startswith("moeless-")]


def solve(command: str, capsys: Any) -> str:
    """Run ``moeless-solve ...``; what it prints for people to keep."""
    capsys.readouterr()
    code = main(shlex.split(command)[1:])
    out, err = capsys.readouterr()
    wanted = 1 if "no plan keeps" in out or "no plan keeps" in err else 0
    assert code == wanted, f"{command} ends with {code}: {err}"
    return str(out)


@pytest.mark.parametrize("page", [page for page in PAGES if has_commands(page)], ids=lambda page: page.name)
def test_commands_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """All blocks of a page in order, in one folder: Python makes the files that the commands take."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    module = ModuleType("__docs__")
    monkeypatch.setitem(sys.modules, "__docs__", module)
    text = page.read_text(encoding="utf-8")
    written = text
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            exec(compile(body, str(page), "exec", dont_inherit=True), module.__dict__)
        elif kind == "sh":
            for command in commands(body):
                if command.startswith("moeless-solve "):
                    solve(command, capsys)
                elif command.startswith("moeless-serve"):
                    serve._parser().parse_args(shlex.split(command)[1:])
                elif command.startswith("moeless-advise"):
                    advise._parser().parse_args(shlex.split(command)[1:])
                elif command.startswith("moeless-forecast"):
                    forecast._parser().parse_args(shlex.split(command)[1:])
                else:
                    simulate._parser().parse_args(shlex.split(command)[1:])
        elif body.startswith(SHOWN):
            first, _, wanted = body.partition("\n")
            printed = solve(first.removeprefix("$ "), capsys)
            if os.environ.get("UPDATE_DOCS") and settled(printed) != settled(wanted):
                written = written.replace(f"```text\n{body}```", f"```text\n{first}\n{printed}```")
            elif not os.environ.get("UPDATE_DOCS"):
                assert settled(printed) == settled(wanted), f"{page.name}: {first} prints\n{printed}"
    if written != text:
        page.write_text(written, encoding="utf-8")


def test_what_varies_is_left_out() -> None:
    assert settled("solver  time\n------  ----\nauto    1.2 ms") == settled(
        "solver   time\n------  -----\nauto    12.25 s"
    )
    assert settled("gap 1.0%") != settled("gap 1.1%")
    assert commands("pip install . && moeless-solve x --bound  # told\nls") == ["moeless-solve x --bound"]
