"""How quantities are told to people: one way for all tables, messages and reprs."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["bytes_text", "html_facts", "html_table", "printable"]


def printable(text: str, *, keep: str = "") -> str:
    """A text with what would command a terminal (escapes, line ends, direction marks) spelled out.

    Characters of `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() or x in keep else x.encode("unicode_escape").decode() for x in text)


def bytes_text(count: int | float, digits: int = 3) -> str:
    """Render bytes with a unit, powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.{digits}g} {unit}"
        value /= 1000
    return f"{value:.{max(digits, 4)}g} TB"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table for notebooks; every cell is escaped."""
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{title}<tr>{top}</tr>{body}</table>"


def html_facts(facts: Sequence[tuple[str, str]], caption: str = "") -> str:
    """Names and values for notebooks, one below the other; every cell is escaped."""
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts
    )
    return f"<table>{title}{body}</table>"
