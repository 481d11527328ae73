"""Counts the house: python tests/house.py [CHECKOUT]. Files, code lines, what one must read to follow a token.

Counts, for a checkout (this one, or an older one whose kernels and tui were top-level names):
  files, code lines      of kernels, minipaged and tui; a code line is one with a token other than a comment or a docstring
  modules of LLM         ours, loaded by LLM("toy")
  decode step            calls of our functions, and their files, in one warm decode step of two sequences of the toy
  CPU path               files of which LLM("toy") and its generate call at least one function, and their code lines
  longest chain          most modules on one way along the imports at the top of modules, those for type checking left out
"""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

FOLDERS = ("kernels", "minipaged", "tui")
IN_CHILD = r"""
import json, os, sys
root = os.path.realpath(sys.argv[1])
sys.path.insert(0, root)
def ours():
    files = {os.path.realpath(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    return sorted(f for f in files if f.startswith(root + "/") and "/.venv/" not in f and f.endswith(".py") and os.path.exists(f))
called = set()
def note(frame, event, arg):
    if event == "call" and frame.f_code.co_name != "<module>" and frame.f_code.co_filename[0] != "<":
        called.add(frame.f_code.co_filename)
from minipaged import LLM, SamplingParams
sys.setprofile(note)
llm = LLM("toy", device="cpu")
llm.generate(["a cache"], SamplingParams(max_tokens=4))
sys.setprofile(None)
loaded = ours()
engine = llm.engine
for prompt in ("one two three", "four five six"):
    engine.submit(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
for _ in range(12):
    engine.step()
calls, files = 0, set()
def profile(frame, event, arg):
    global calls
    if event == "call" and frame.f_code.co_filename[0] != "<":
        name = os.path.realpath(frame.f_code.co_filename)
        if name.startswith(root + "/") and "/.venv/" not in name and not frame.f_code.co_name.startswith("<"):
            calls += 1
            files.add(name)
sys.setprofile(profile)
engine.step()
sys.setprofile(None)
path = sorted(set(map(os.path.realpath, called)) & set(loaded))
print(json.dumps({"loaded": loaded, "calls": calls, "step_files": sorted(files), "path": path}))
"""


def python_files(root: Path) -> list[Path]:
    """The source files of the house; links to a file that is counted already are left out."""
    return [p for folder in FOLDERS for p in sorted((root / folder).rglob("*.py")) if not p.is_symlink()]


def code_lines(path: Path) -> int:
    """Lines with code on them."""
    text = path.read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def longest_chain(root: Path) -> list[str]:
    """Module names from the top of the longest way to its end."""
    packaged = not (root / "kernels" / "__init__.py").exists()
    names: dict[str, Path] = {}
    for path in python_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts if parts[0] == "minipaged" or not packaged else ("minipaged", *parts))
        names[name.removesuffix(".__init__")] = path

    def targets(name: str) -> set[str]:
        found = set()
        for node in ast.parse(names[name].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found.update(t if (t := f"{node.module}.{a.name}") in names else node.module for a in node.names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        return {t for t in found if t in names and t != name and t != "minipaged"}

    way: set[str] = set()

    @cache
    def below(name: str) -> tuple[str, ...]:
        way.add(name)
        longest = max((below(t) for t in targets(name) if t not in way), key=len, default=())
        way.discard(name)
        return (name, *longest)

    return list(max((below(name) for name in names), key=len))


def count(root: Path) -> dict[str, object]:
    """All counts of one checkout."""
    files = python_files(root)
    done = subprocess.run([sys.executable, "-P", "-c", IN_CHILD, str(root)], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    path = [Path(name) for name in seen["path"] if "/tui/" not in name]
    chain = longest_chain(root)
    return {
        "files": len(files),
        "code lines": sum(map(code_lines, files)),
        "modules of LLM('toy')": len(seen["loaded"]),
        "calls of a decode step": seen["calls"],
        "files of a decode step": len(seen["step_files"]),
        "files of the CPU path": len(path),
        "code lines of the CPU path": sum(map(code_lines, path)),
        "longest import chain": len(chain),
        "the chain": " > ".join(chain),
        "the step's files": " ".join(sorted(str(Path(f).relative_to(root.resolve())) for f in seen["step_files"])),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    for what, number in count(where).items():
        print(f"{what:28} {number}")
