"""Makes a lesson's bare comparisons tell what they saw: `assert f(2) == 5` fails with both sides, not with an empty line.

The two sides are computed once, in their order, as without this; only the words of the failure are new. An assertion that brings
its own message keeps it. Knows syntax trees; knows nothing of lessons.
"""

from __future__ import annotations

import ast
from pathlib import Path

LONGEST = 300  # characters of one side; what stands in the middle of a longer one is left out
LEFT, RIGHT = "on the left  ", "on the right "
NAME = "__minipaged_seen__"


def describe(left: object, right: object) -> str:
    """The two sides of a comparison that did not hold, a line each."""
    return f"{LEFT} {_short(left)}\n{RIGHT} {_short(right)}"


def _short(value: object) -> str:
    """What Python says of a value, cut in the middle; of a tensor its shape and a few numbers."""
    shape = getattr(value, "shape", None)
    text, longest = repr(value), LONGEST
    if shape is not None:
        text, longest = f"{list(shape)} {' '.join(text.split())}", LONGEST // 2
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


class _Telling(ast.NodeTransformer):
    """`assert a == b` becomes: left = a; right = b; assert left == right, describe(left, right). torch.equal(a, b) likewise."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST | list[ast.stmt]:
        test = node.test
        if node.msg is not None:
            return node
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            values = [test.left, test.comparators[0]]
        elif isinstance(test, ast.Call) and ast.unparse(test.func) == "torch.equal" and len(test.args) == 2:
            values = list(test.args)
        else:
            return node
        names = [f"{NAME}{side}" for side in ("left", "right")]
        keep: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], value) for name, value in zip(names, values, strict=True)
        ]
        seen: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
        words = ast.Call(ast.Name(NAME, ast.Load()), seen, [])
        if isinstance(test, ast.Compare):
            again: ast.expr = ast.Compare(seen[0], test.ops, [seen[1]])
        else:
            again = ast.Call(test.func, seen, [])
        told = ast.Assert(again, words)
        return [
            ast.copy_location(ast.fix_missing_locations(ast.copy_location(each, node)), node) for each in (*keep, told)
        ]


def telling(source: str, path: Path) -> ast.Module:
    """A lesson's source, ready to compile. SyntaxError as Python itself would raise it."""
    tree = ast.parse(source, str(path))
    at = 1 if ast.get_docstring(tree) is not None else 0
    while at < len(tree.body) and isinstance(first := tree.body[at], ast.ImportFrom) and first.module == "__future__":
        at += 1
    _Telling().visit(tree)
    helper = ast.parse(f"from minipaged.learn.asserting import describe as {NAME}").body
    tree.body[at:at] = helper
    return tree
