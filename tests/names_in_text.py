"""What a text names in code spans, and whether this repository has it: files, and names that are defined in them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = r"(?:minipaged|kernels|tui|tests|tutorials)/[\w/.]*"


def wrong_names(text: str) -> list[str]:
    """What a text names and this repository lacks: files, and the names that stand behind a file and should be defined in it.

    A name is a function, class or constant of the file, or Class.attribute, or an attribute of a class that was named before it.
    """
    wrong: list[str] = []
    path, classes = None, list[str]()
    for word in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(FILE, word):
            path, classes = word, []
            if not (ROOT / path).exists():
                wrong.append(path)
        elif re.fullmatch(r"[A-Za-z_][\w.]*", word) and path is not None and (ROOT / path).is_file():
            names = defined_in(ROOT / path)
            if word not in names and not any(f"{owner}.{word}" in names for owner in classes):
                wrong.append(f"{path}: {word}")
            classes.append(word.partition(".")[0])
    return wrong


@cache
def defined_in(path: Path) -> set[str]:
    """The names that a module defines at its top, and its classes' methods and fields as Class.name."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef) and not prefix:
                collect(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names
