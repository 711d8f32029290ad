"""The documentation: its Python runs, its links lead somewhere, and it tells of every option."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moeless_opt.cli.options import parser
from moeless_opt.problems.io.documents import problem_from_json
from tests.face.test_doc_commands import has_commands

TREE = Path(__file__).resolve().parents[2]
PAGES = [page for page in (TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))) if page.is_file()]
if not PAGES:
    pytest.skip("the documentation is not here", allow_module_level=True)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line and text of the fenced blocks of a language."""
    found, text = [], page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append((text[: match.start()].count("\n") + 2, match[1]))
    return found


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and not has_commands(p)], ids=lambda p: p.name
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All blocks of a page, in order, in one namespace and an empty folder (others: `test_doc_commands`)."""
    monkeypatch.chdir(tmp_path)
    page_module = ModuleType("__docs__")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "__docs__", page_module)
    for line, code in blocks(page, "python"):
        if "moeless_opt.runtime" in code or "import torch" in code:
            pytest.importorskip("torch")
        compiled = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)
        exec(compiled, page_module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_is_told() -> None:
    text = (TREE / "docs" / "cli.md").read_text(encoding="utf-8")
    for action in parser()._actions:
        for option in action.option_strings:
            if option not in ("-h",):
                assert f"`{option}" in text, f"docs/cli.md does not tell of {option}"


def test_json_examples_are_read() -> None:
    (document,) = [json.loads(code) for _, code in blocks(TREE / "docs" / "json-format.md", "json")]
    assert problem_from_json(document).layers == 2
