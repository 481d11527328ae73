"""One self-contained HTML page: headings, tables, notes and SVG plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from minipaged.errors import InputError

_STYLE = """
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
p.note { color: #555; font-size: 0.9rem; }
svg { width: 100%; max-width: 50rem; height: auto; display: block; margin: 1rem 0; }
"""


class Page:
    """Parts of a page in the order they are added. Everything that is text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section begins."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of words and numbers."""
        head = "".join(f"<th>{escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def notes(self, lines: Sequence[str]) -> None:
        """A paragraph of remarks."""
        if lines:
            self._parts.append(f'<p class="note">{escape(" ".join(lines))}</p>')

    def svg(self, picture: str) -> None:
        """A picture from svg.py."""
        self._parts.append(picture)

    def text(self) -> str:
        """The whole page."""
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write it. Raises InputError where the file cannot be written."""
        try:
            path.write_text(self.text())
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
