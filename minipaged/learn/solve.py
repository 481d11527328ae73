"""Makes a solved lesson from two texts: the exercise that a learner gets, and the file with its solutions.

In the exercise, a function that a learner writes ends in a stub:

    def blocks_for(tokens: int, block_size: int) -> int:
        \"""How many blocks hold so many tokens.\"""
        raise NotImplementedError("lesson 6, task 1: blocks_for")

The file of solutions has the same function with the same signature; its docstring is the stub's title:

    def blocks_for(tokens: int, block_size: int) -> int:
        \"""lesson 6, task 1: blocks_for\"""
        return -(-tokens // block_size)

The solved lesson is the exercise, with the lines below that docstring in the stub's place. Everything else of it comes from the
exercise.
"""

from __future__ import annotations

import ast
import re
import textwrap

Function = ast.FunctionDef | ast.AsyncFunctionDef
TITLE = re.compile(r"lesson \d+, task (\d+): ([\w.]+)")


def solve(exercise: str, solutions: str, tasks: int | None = None) -> str:
    """The solved lesson; with `tasks`, only its first so many tasks are solved. ValueError where the two texts do not agree."""
    found, answers = stubs(exercise), _functions(ast.parse(solutions))
    _check_that_only_functions_stand_in(solutions)
    for name in found.keys() - answers.keys():
        raise ValueError(f"{name} is a stub in the exercise and has no solution")
    for name in answers.keys() - found.keys():
        raise ValueError(f"{name} has a solution and is no stub in the exercise")
    lines, written = exercise.splitlines(), solutions.splitlines()
    for name, (title, function) in sorted(found.items(), key=lambda item: -item[1][1].lineno):
        answer = answers[name]
        if ast.get_docstring(answer) != title:
            raise ValueError(
                f"the solution of {name} must begin with the docstring {title!r}, as in the exercise's stub"
            )
        if _signature(answer) != _signature(function):
            raise ValueError(
                f"the solution of {name} has the signature {_signature(answer)!r}, not {_signature(function)!r}"
            )
        if len(answer.body) == 1:
            raise ValueError(f"the solution of {name} is empty")
        if tasks is None or task_in(title) <= tasks:
            stub = function.body[-1]
            lines[stub.lineno - 1 : stub.end_lineno] = written[answer.body[0].end_lineno : answer.end_lineno]
    return "\n".join(lines) + "\n"


def stubs(exercise: str) -> dict[str, tuple[str, Function]]:
    """Function or Class.method -> the title in its stub, and the function. In the order of the file."""
    found = {}
    for name, function in _functions(ast.parse(exercise)).items():
        match function.body[-1]:
            case ast.Raise(exc=ast.Call(func=ast.Name("NotImplementedError"), args=[ast.Constant(str(title))])):
                if TITLE.fullmatch(title):
                    found[name] = title, function
    return found


def task_in(title: str) -> int:
    """The task's number in a stub's title, "lesson 6, task 1: blocks_for"."""
    match = TITLE.fullmatch(title)
    assert match is not None, title
    return int(match[1])


def source_of(names: list[str], solved: str) -> str:
    """The named functions as they stand in a solved lesson, decorators included; methods without their class' indentation."""
    functions, lines = _functions(ast.parse(solved)), solved.splitlines()
    parts = []
    for function in (functions[name] for name in names):
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        parts.append(textwrap.dedent("\n".join(lines[first - 1 : function.end_lineno])))
    return "\n\n".join(parts)


def _functions(module: ast.Module) -> dict[str, Function]:
    """Functions of a module and methods of its classes, by qualified name."""
    found: dict[str, Function] = {}
    for node in module.body:
        if isinstance(node, Function):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}": each for each in node.body if isinstance(each, Function)}
    return found


def _check_that_only_functions_stand_in(solutions: str) -> None:
    """Nothing else of a file of solutions reaches the solved lesson, so nothing else may stand there."""
    module = ast.parse(solutions)
    for node in [
        *module.body,
        *(inner for each in module.body if isinstance(each, ast.ClassDef) for inner in each.body),
    ]:
        docstring = node is module.body[0] and isinstance(node, ast.Expr)
        if not docstring and not isinstance(node, Function | ast.ClassDef):
            raise ValueError(f"line {node.lineno} of the solutions is no function: {ast.unparse(node)}")


def _signature(function: Function) -> str:
    """Decorators, name, arguments and what is returned, on one line."""
    bare = type(function)(function.name, function.args, [ast.Pass()], function.decorator_list, function.returns)
    return ast.unparse(ast.fix_missing_locations(bare)).removesuffix("\n    pass").replace("\n", " ")
