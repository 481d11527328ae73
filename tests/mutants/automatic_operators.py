"""Every small change that the automatic run can make to a module: found in its syntax tree, applied to a fresh copy of it.

A mutant is named by its module and its number in a fixed order, so a seed gives the same
sample everywhere. Left alone: strings, type hints, error messages, `__repr__`, `__all__`, decorators, imports.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.Mult: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
HINTS = {"annotation", "returns", "decorator_list", "type_params"}
SHOWN = 160  # characters of a change that are kept
YES_OR_NO = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)

Change = Callable[[], ast.AST]


@dataclass(frozen=True)
class Mutant:
    """One change: `number` counts the changes of the module in their order."""

    module: str
    path: str
    number: int
    kind: str
    line: int
    before: str
    after: str
    text: str = ""  # the line of the module that it stands in

    @property
    def name(self) -> str:
        """module:line kind."""
        return f"{self.module}:{self.line} {self.kind}"


@dataclass
class Site:
    """A node and the place that it stands in."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    nested: bool  # inside an if, a loop or a with of its function

    def put(self, node: ast.AST) -> None:
        """Another node stands here."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def _sites(parent: ast.AST, nested: bool = False) -> Iterator[Site]:
    """Every place that may be changed, in the order of the text."""
    for field, value in ast.iter_fields(parent):
        if field in HINTS:
            continue
        inside = nested or (isinstance(parent, ast.If | ast.For | ast.While | ast.With) and field in ("body", "orelse"))
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _left_alone(node):
                continue
            function = isinstance(node, ast.FunctionDef | ast.Lambda)
            yield Site(parent, field, index, node, inside)
            yield from _sites(node, inside and not function)


def _left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Constant()) | ast.FunctionDef(name="__repr__"):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _changes(site: Site) -> Iterator[tuple[str, Change]]:
    """(kind, how) for each change of one place. A change returns the node that stands there from then on."""
    node: Any = site.node
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                yield (
                    "comparison",
                    lambda i=i, o=operator: _set(node, "ops", _replaced(node.ops, i, COMPARISONS[type(o)]())),
                )  # type: ignore[misc]
        case ast.BoolOp():
            yield "and/or", lambda: _set(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.BinOp() | ast.AugAssign() if type(node.op) in ARITHMETIC:
            yield "arithmetic", lambda: _set(node, "op", ARITHMETIC[type(node.op)]())
            if isinstance(node, ast.AugAssign):
                yield "removed statement", ast.Pass
        case ast.Constant(value=bool()):
            yield "constant", lambda: ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", lambda: ast.Constant(node.value + 1)
            yield "constant", lambda: ast.Constant(node.value - 1)
        case ast.UnaryOp(op=ast.Not()):
            yield "removed not", lambda: node.operand
        case ast.Expr(value=ast.Call()):
            yield "removed statement", ast.Pass
        case ast.Return() if site.nested:
            yield "removed return", ast.Pass
        case ast.Continue() | ast.Break():
            yield "removed statement", ast.Pass
        case ast.Call(func=ast.Name(id=name)) if name in EXTREMES:
            yield "min/max", lambda: _set(node.func, "id", EXTREMES[name]) and node
        case ast.Call(func=ast.Attribute(attr=name)) if name in EXTREMES:
            yield "min/max", lambda: _set(node.func, "attr", EXTREMES[name]) and node
        case ast.Call(func=ast.Name(id="range")):
            last = 0 if len(node.args) == 1 else 1
            for by in (1, -1):
                yield (
                    "range end",
                    lambda by=by: _set(node, "args", _replaced(node.args, last, _plus(node.args[last], by))),
                )  # type: ignore[misc]
        case ast.Slice():
            for end in ("lower", "upper"):
                bound = getattr(node, end)
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield "range end", lambda end=end, bound=bound: _set(node, end, _plus(bound, 1))  # type: ignore[misc]
        case ast.If() | ast.While() | ast.IfExp() if _worth_negating(node.test):
            yield "negated condition", lambda: _set(node, "test", ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension():
            for i, test in enumerate(node.ifs):
                if _worth_negating(test):
                    yield (
                        "negated condition",
                        lambda i=i, t=test: _set(node, "ifs", _replaced(node.ifs, i, ast.UnaryOp(ast.Not(), t))),
                    )  # type: ignore[misc]


def _worth_negating(test: ast.expr) -> bool:
    """Whether no other change has the same effect."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return False
    return not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], YES_OR_NO))


def _set(node: Any, field: str, value: Any) -> Any:
    setattr(node, field, value)
    return node


def _replaced(items: list[Any], index: int, item: Any) -> list[Any]:
    return [*items[:index], item, *items[index + 1 :]]


def _plus(node: ast.expr, by: int) -> ast.expr:
    return ast.BinOp(node, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


def _line_of(node: ast.AST, parent: ast.AST) -> int:
    return int(getattr(node, "lineno", getattr(parent, "lineno", getattr(getattr(node, "target", None), "lineno", 0))))


def _shown(node: ast.AST) -> str:
    """A node as one line of text; of a statement with a body, its head."""
    return ast.unparse(node).split("\n")[0].strip()


def _all_changes(tree: ast.Module) -> Iterator[tuple[Site, str, Change]]:
    for site in list(_sites(tree)):
        for kind, change in _changes(site):
            yield site, kind, change


def _changed(path: Path, number: int) -> tuple[ast.Module, str, str]:
    """The module's tree with one change, and the changed text before and after."""
    tree = ast.parse(path.read_text())
    site, _, change = list(_all_changes(tree))[number]
    before = _shown(site.node)
    after = change()
    site.put(ast.copy_location(after, site.node))
    return ast.fix_missing_locations(tree), before, _shown(after)


def compiled(path: Path, number: int) -> CodeType:
    """The code of the module with this change."""
    return compile(_changed(path, number)[0], str(path), "exec", dont_inherit=True)


def count_changes(path: Path) -> int:
    """How many changes the module has, those without effect included."""
    return sum(1 for _ in _all_changes(ast.parse(path.read_text())))


def texts_of(path: Path) -> list[tuple[str, str]]:
    """Kind and changed text of every change of the module, in order."""
    return [(kind, _shown(site.node)[:SHOWN]) for site, kind, _ in _all_changes(ast.parse(path.read_text()))]


def mutant_of(module: str, path: Path, number: int) -> Mutant | None:
    """Change `number` of the module; None if the compiled code is the module's own."""
    original = compile(ast.parse(path.read_text()), str(path), "exec", dont_inherit=True)
    if compiled(path, number) == original:
        return None
    site, kind, _ = list(_all_changes(ast.parse(path.read_text())))[number]
    _, before, after = _changed(path, number)
    line = _line_of(site.node, site.parent)
    text = path.read_text().splitlines()[line - 1].strip()
    return Mutant(module, str(path), number, kind, line, before[:SHOWN], after[:SHOWN], text)


def statement_of(path: Path, number: int) -> tuple[int, int, bool]:
    """First and last line of the smallest statement around the change (of one with a body, its head), and whether it runs on import."""
    tree = ast.parse(path.read_text())
    site = list(_all_changes(tree))[number][0]
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    node: ast.AST = site.node
    statement, in_function = None, False
    while node in parents:
        above = parents[node]
        if isinstance(node, ast.stmt) and statement is None:
            statement = node
        in_function |= (
            isinstance(above, ast.FunctionDef | ast.Lambda)
            and getattr(above, "body", None) is not None
            and (node is above.body if isinstance(above, ast.Lambda) else node in above.body)
        )
        node = above
    if statement is None or isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return 0, 0, True
    body: list[ast.stmt] = getattr(statement, "body", [])
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return statement.lineno, max(last, statement.lineno), not in_function
